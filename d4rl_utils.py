"""D4RL's MuJoCo and AntMaze datasets: ids, files, transitions, environments, scores.

Files keep D4RL's names and layout (Fu et al. 2020; https://github.com/Farama-Foundation/D4RL), one HDF5 a dataset:

    observations  next_observations  actions  rewards  terminals  timeouts  infos/qpos  infos/qvel  metadata/...

The `d4rl` package itself needs MuJoCo 2.1 and an old gym. Environments here are Gymnasium's v4, which have the rewards,
terminations and observations of the v2 environments that D4RL's v2 files come from, on a newer simulator. Antmazes are
built here from OGBench's copy of D4RL's ant and D4RL's maps, see AntMaze; gymnasium-robotics' own differ in the ant's
actuators (five times as strong), contacts, the length of a step (0.05 s, not 0.1) and the coordinates, so that a policy
trained on D4RL's files would not find its way in them.
"""

import contextlib
import functools
import math
import os
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike

from dataset_files import BLOCK_ROWS, Dataset, bad_file, check_arrays, jumps, read_hdf5, take_rows, whole_returns
from utils import warn

DATASET_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
ANTMAZE_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/ant_maze_v2"
MAX_EPISODE_STEPS = 1000  # steps after which D4RL's MuJoCo environments cut an episode

ENVIRONMENTS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
OFFICIAL_LEVELS = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
# D4RL's file of each antmaze level; the names are those of the d4rl package's infos.py.
ANTMAZES = {
    "umaze": "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
    "umaze-diverse": "Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
    "medium-play": "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
    "medium-diverse": "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
    "large-play": "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
    "large-diverse": "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
}
OFFICIAL_IDS = tuple(f"{robot}-{level}-v2" for robot in ENVIRONMENTS for level in OFFICIAL_LEVELS)
OFFICIAL_IDS += tuple(f"antmaze-{level}-v2" for level in ANTMAZES)
# What make_dataset.py can generate; its recipes must cover exactly these.
_GENERATED = dict.fromkeys(ENVIRONMENTS, ("medium", "medium-replay", "medium-expert")) | {"antmaze": tuple(ANTMAZES)}
GENERATED_IDS = tuple(f"local/{robot}-{level}-v2" for robot, levels in _GENERATED.items() for level in levels)
REPLAY_ROWS = {"halfcheetah": 202_000, "hopper": 402_000, "walker2d": 302_000}  # of the medium-replay files
_DIMENSIONS = {"hopper": (11, 3), "halfcheetah": (17, 6), "walker2d": (17, 6), "antmaze": (29, 8)}

# Returns that score 0 and 100 (d4rl/infos.py); every v2 dataset of a robot has the same.
REFERENCE_RETURNS = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
}


@dataclass(frozen=True)
class D4RLDataset(Dataset):
    """A dataset such as `local/hopper-medium-replay-v2`: one HDF5 file."""

    VARIABLE, RECIPES = "D4RL_DATASET_DIR", GENERATED_IDS
    OFFICIAL_FOLDER, score_name = "~/.d4rl/datasets", "D4RL score"

    @property
    def robot(self) -> str:
        return self.name.split("-")[0]  # hopper, halfcheetah, walker2d or antmaze

    @property
    def level(self) -> str:
        return self.name.removesuffix("-v2").partition("-")[2]  # medium, medium-replay, ...; umaze, medium-play, ...

    @property
    def env_id(self) -> str:
        """The Gymnasium environment, e.g. Hopper-v4, or D4RL's name of the maze, e.g. antmaze-umaze."""
        return ENVIRONMENTS.get(self.robot) or f"antmaze-{self.level.split('-')[0]}"

    @property
    def files(self) -> tuple[str, ...]:
        return (ANTMAZES.get(self.level, f"{self.robot}_{self.level.replace('-', '_')}-v2.hdf5"),)

    @property
    def url(self) -> str:
        return ANTMAZE_URL if self.robot == "antmaze" else DATASET_URL

    @property
    def max_episode_steps(self) -> int:
        return 700 if self.env_id == "antmaze-umaze" else MAX_EPISODE_STEPS

    def read(self, path: Path) -> dict[str, np.ndarray]:
        """Read the file, without infos/ and metadata/, and check it as `dataset_files.check_arrays` does.

        Returns observations [N, obs_dim], actions [N, act_dim] and rewards [N] float32, terminals (the state after the
        row is absorbing) and timeouts (the episode was cut there) [N] bool, and next_observations, which antmazes may
        lack. The rows must be those of the id's robot.
        """
        needed = ("observations", "actions", "rewards", "terminals", "timeouts")
        arrays = read_hdf5(path, needed, ("next_observations",))
        check_arrays(functools.partial(bad_file, path), arrays, _DIMENSIONS[self.robot])
        if "next_observations" not in arrays and self.robot != "antmaze":
            raise bad_file(path, "no array 'next_observations', which tells where episodes end")
        return arrays

    def episode_ends(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Rows that end an episode, int64 [E], ascending, the last row included.

        Beside terminals and timeouts, an episode ends where next_observations is not the following row's observation:
        D4RL's medium-replay files do not mark every such place. In antmazes a terminal marks a row at the goal, and the
        recording goes on: they end at a timeout, or where the ant has moved 1 m or more.
        """
        ends = arrays["timeouts"].copy()
        ends[-1] = True  # often without a mark
        if self.robot == "antmaze":
            ends[jumps(arrays["observations"][:, :2], 1.0)] = True
            return np.flatnonzero(ends)
        ends |= arrays["terminals"]
        following, observations, misplaced = arrays["next_observations"], arrays["observations"], 0
        for start in range(0, len(ends) - 1, BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, len(ends) - 1))
            later = observations[rows.start + 1 : rows.stop + 1]
            moved = np.abs(following[rows] - later).max(axis=1) > 1e-3  # a reset moves every robot further
            misplaced += int((ends[rows] & ~moved).sum())
            ends[rows] |= moved
        if misplaced:
            warn(f"{self.id}: {misplaced} ends stand where the episode goes on; see `make_dataset.py --check`")
        return np.flatnonzero(ends)

    def transitions(self, dataset_dir: str | os.PathLike | None = None) -> dict[str, Any]:
        """Fields of offline_data.OfflineData; raises UserError as `ensure` and `read` do.

        A transition is terminated where the file says `terminals`; truncated where its episode goes no further for
        another reason. Where the file has next_observations every row is a transition; D4RL's `qlearning_dataset` takes
        the next row in all files, which loses one an episode.

        Official antmazes have none, and theirs are the next row's: rows whose next observation is not in the file are
        left out. Rows at a terminal stay, with their own observation, as nothing bootstraps there (D4RL: what follows).
        """
        (path,) = self.ensure(dataset_dir)
        arrays = self.read(path)
        terminated, timeouts, ends = arrays["terminals"], arrays["timeouts"], self.episode_ends(arrays)
        returns = whole_returns(arrays["rewards"], terminated, ends, self.max_episode_steps)
        truncated = np.zeros(len(terminated), dtype=bool)
        truncated[ends] = ~terminated[ends]
        columns = {"env_id": self.env_id, "returns": returns}
        columns |= {key: arrays.pop(key) for key in ("observations", "actions", "rewards")}
        if "next_observations" in arrays:
            columns["next_observations"] = arrays["next_observations"]
            return columns | {"terminated": terminated, "truncated": truncated}
        dropped = truncated | timeouts
        dropped[-1] = True
        truncated[:-1] = dropped[1:] & ~terminated[:-1]  # the last one kept of an episode
        rows = np.flatnonzero(~dropped)
        if len(rows) == 0:
            raise bad_file(path, "no two rows of one episode follow each other")
        columns["next_observations"] = columns["observations"][rows + ~terminated[rows]]
        columns |= {"terminated": terminated, "truncated": truncated}
        for key in ("observations", "actions", "rewards", "terminated", "truncated"):
            columns[key] = take_rows(columns[key], rows)
        return columns

    def make_env(self, dataset_dir: str | os.PathLike | None = None) -> gymnasium.Env:
        """As the function `make_env`, in the fast form where there is one."""
        return QuickRunner(self.id) if self.robot in ENVIRONMENTS else make_env(self.id)

    def score(self, returns: ArrayLike, dataset_dir: str | os.PathLike | None = None) -> np.ndarray:
        """D4RL's score by its robot's references: 0 is a random policy, 100 D4RL's expert.

        In antmaze an episode that reaches the goal scores 100, any other 0.
        """
        low, high = REFERENCE_RETURNS[self.robot]
        return 100.0 * (np.asarray(returns, dtype=np.float64) - low) / (high - low)


DATASETS = {dataset_id: D4RLDataset(dataset_id) for dataset_id in OFFICIAL_IDS + GENERATED_IDS}


def is_official(dataset_id: str, transitions: int) -> bool | None:
    """Whether so many transitions can be D4RL's own file: at least nine tenths of its rows.

    None for an id that is not D4RL's, or whose file has a size that is not known here.
    """
    robot, _, level = dataset_id.removesuffix("-v2").partition("-")
    if dataset_id not in OFFICIAL_IDS or level in ("random", "expert", "full-replay"):
        return None
    rows = REPLAY_ROWS[robot] if "replay" in level else 2_000_000 if level == "medium-expert" else 1_000_000
    return transitions >= 0.9 * rows


@contextlib.contextmanager
def _without_known_warnings() -> Iterator[None]:
    """Silence two warnings of a v4 environment: that there is a v5, and MuJoCo's about `settotalmass`."""
    import mujoco

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None if "settotalmass" in text else warn(text))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date.*", category=DeprecationWarning)
            yield
    finally:
        mujoco.set_mju_user_warning(before)


def make_env(dataset_id: str) -> gymnasium.Env:
    """The environment of one of DATASETS: float64 observations, actions in [-1, 1], D4RL's time limit."""
    dataset = DATASETS[dataset_id]
    if dataset.robot == "antmaze":
        env = AntMaze(dataset.env_id.removeprefix("antmaze-"))
        return gymnasium.wrappers.TimeLimit(env, dataset.max_episode_steps)
    with _without_known_warnings():
        return gymnasium.make(dataset.env_id, disable_env_checker=True)


class QuickRunner(gymnasium.Wrapper):
    """hopper, halfcheetah or walker2d as `make_env` makes it, time limit included, with less Python a step.

    Observations, rewards and ends are those of Gymnasium's v4 to the last bit. Left out are what it computes twice, the
    checks of its wrappers, the info, and the contact forces, which none of the three shows.
    """

    def __init__(self, dataset_id: str):
        import mujoco

        made = make_env(dataset_id)
        super().__init__(made.unwrapped)
        robot: Any = self.env
        self._simulate = functools.partial(mujoco.mj_step, robot.model, robot.data, nstep=robot.frame_skip)
        # Views of MuJoCo's memory, which stays where it is.
        self._qpos, self._qvel, self._ctrl = robot.data.qpos, robot.data.qvel, robot.data.ctrl
        self._seconds, self._limit, self._steps = robot.dt, made.spec.max_episode_steps, 0
        self._forward, self._control = robot._forward_reward_weight, robot._ctrl_cost_weight
        self._falls = hasattr(robot, "_healthy_z_range")
        if self._falls:
            self._bonus, self._heights, self._angles = (
                getattr(robot, f"_healthy_{name}") for name in ("reward", "z_range", "angle_range")
            )
            self._bounds = getattr(robot, "_healthy_state_range", (-math.inf, math.inf))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self._steps = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray):
        before = self._qpos[0]
        self._ctrl[:] = action
        self._simulate()
        self._steps += 1
        reward = self._forward * ((self._qpos[0] - before) / self._seconds)
        fallen, velocity = False, self._qvel
        if self._falls:
            reward += self._bonus
            fallen = not self._healthy()
            velocity = np.minimum(np.maximum(velocity, -10.0), 10.0)
        # The cost is of the action's type: float64 would differ from Gymnasium's in the last bits.
        reward -= self._control * np.add.reduce(np.square(action))
        observation = np.concatenate((self._qpos[1:], velocity))
        return observation, reward, fallen, self._steps >= self._limit, {}

    def _healthy(self) -> bool:
        _, height, angle, *joints = self._qpos.tolist()
        (low, high), (left, right), (least, most) = self._heights, self._angles, self._bounds
        standing = low < height < high and left < angle < right
        return standing and all(least < number < most for number in (angle, *joints, *self._qvel.tolist()))


class AntMaze(gymnasium.Wrapper):
    """D4RL's antmaze-v2: an ant that starts in the cell R and is to reach a point in the cell G.

    Observations [29] float64: x, y, height and orientation (7 numbers), 8 joint angles, 14 velocities; the goal is not
    among them. Reward 1 and termination within 0.5 m of the goal, else 0. A step is 0.1 s. info["success"] is a bool.
    The origin is the middle of R, a cell is 4 m wide. As in D4RL the goal is drawn anew at each reset: up to 1.5 m from
    the middle of G in x and y, the sum of two uniform draws.

    Deviations from d4rl/locomotion: MuJoCo 3 in place of 2.1; the goal comes from the environment's own generator, not
    NumPy's global one, so that a seed fixes an episode. The ant is OGBench's copy of D4RL's model: the same but for the
    scale of its actuators, which D4RL's wrapper applies to the actions instead.
    """

    CELL = 4.0  # metres
    MAPS = {
        "umaze": ("#####", "#R..#", "###.#", "#G..#", "#####"),
        "medium": (
            "########",
            "#R.##..#",
            "#..#...#",
            "##...###",
            "#..#...#",
            "#.#..#.#",
            "#...#.G#",
            "########",
        ),
        "large": (
            "############",
            "#R...#.....#",
            "#.##.#.#.#.#",
            "#......#...#",
            "#.####.###.#",
            "#..#.#.....#",
            "##.#.#.#.###",
            "#..#...#.G.#",
            "############",
        ),
    }

    def __init__(self, maze: str):
        from ogbench.locomaze.ant import AntEnv

        self.cells = np.array([list(row) for row in self.MAPS[maze]])
        self.goal = np.zeros(2)
        tree = ElementTree.parse(AntEnv.xml_file)
        world = tree.find("worldbody")
        for cell in np.argwhere(self.cells == "#"):
            x, y = self._middle(cell)
            ElementTree.SubElement(
                world, "geom", type="box", pos=f"{x} {y} 1", size="2 2 1", contype="1", conaffinity="1", material="wall"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "ant_maze.xml")
            tree.write(path)
            super().__init__(AntEnv(xml_file=path))

    def _middle(self, cell: np.ndarray) -> np.ndarray:
        return (cell - np.argwhere(self.cells == "R")[0])[::-1] * self.CELL

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        observation, info = self.env.reset(seed=seed, options=options)
        rng = self.env.unwrapped.np_random
        noise = rng.uniform(0, self.CELL / 4, 2) + rng.uniform(0, self.CELL / 8, 2)
        self.goal = np.maximum(self._middle(np.argwhere(self.cells == "G")[0]) + noise, 0.0)
        return observation, info | {"success": False}

    def step(self, action: np.ndarray):
        observation, _, _, truncated, info = self.env.step(action)
        success = bool(np.linalg.norm(observation[:2] - self.goal) <= 0.5)
        return observation, float(success), success, truncated, info | {"success": success}
