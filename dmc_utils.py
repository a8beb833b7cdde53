"""dm_control's planar walker as a Gymnasium environment, and the study's episode files.

An episode file has 1001 rows. Row t holds what step t led to, beside the action that led there; row 0 is the reset:

    row             0      1      2     ...  1000
    observation    o_0    o_1    o_2    ...  o_1000
    action          0     a_1    a_2    ...  a_1000       a_t was chosen at o_{t-1}
    reward          0     r_1    r_2    ...  r_1000       r_t and discount d_t came with o_t
    physics        s_0    s_1    s_2    ...  s_1000       s_t is the state that o_t was observed in

so that a transition takes the observation of the row before: (o_{t-1}, a_t, r_t, d_t, o_t), t = 1 ... 1000.
"""

import functools
import hashlib
import math
import os
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from dataset_files import Dataset, bad_file, check_rows, read_npz
from utils import UserError, did_you_mean, one_line

TASKS = ("walk", "run")
OBSERVATION_DIM = 24
ACTION_DIM = 6
PHYSICS_DIM = 18
EPISODE_STEPS = 1000

# Columns of each array of an episode file; all have EPISODE_STEPS + 1 rows of float32.
EPISODE_COLUMNS = {"observation": OBSERVATION_DIM, "action": ACTION_DIM, "reward": 1, "discount": 1}
EPISODE_COLUMNS |= {"physics": PHYSICS_DIM}
_LIMITS = {"action": (-1.0, 1.0), "reward": (0.0, 1.0), "discount": (0.0, 1.0)}

# The study's names say td3 because its collectors were TD3; who collected a local one, its manifest says.
OFFICIAL_IDS = tuple(f"walker_{task}-td3-{level}" for task in TASKS for level in ("medium", "medium-replay"))
GENERATED_IDS = tuple(f"local/{name}" for name in OFFICIAL_IDS)
SHORT_NAMES = ("walk_m", "walk_mr", "run_m", "run_mr")
ALL_DATASETS = "__all__"
BY_SHORT_NAME = dict(zip(SHORT_NAMES, OFFICIAL_IDS, strict=True))
BY_SHORT_NAME |= {f"local/{short}": f"local/{name}" for short, name in BY_SHORT_NAME.items()}


def _suite_walker() -> types.ModuleType:
    """dm_control.suite.walker; raises UserError where the renderer that MUJOCO_GL names cannot be loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GLFW's, where no renderer loads: nothing is drawn here
        try:
            from dm_control.suite import walker
        except Exception as error:  # a named renderer fails in its own library's ways
            raise UserError(
                f"dm_control cannot be imported ({type(error).__name__}: {one_line(error)}); "
                "unset MUJOCO_GL, or install dm_control"
            ) from None
    return walker


class WalkerEnv(gymnasium.Env):
    """walker-walk or walker-run of the DeepMind Control Suite, 1000 steps of 25 ms.

    Observation, float32 [24]: 14 orientations (xx and xz of the 7 bodies' rotations), torso height, 9 velocities.
    Action, float32 [6]: torques in [-1, 1]; the simulator clips what lies outside.
    Reward in [0, 1] a step. Nothing terminates; after 1000 steps the episode is truncated.
    info["physics"], float64 [18]: positions and velocities, which physics.set_state takes.

    Physics, task and their random resets are dm_control's. One step goes to the simulator directly, and reads
    observation and reward from its arrays: dm_control's named arrays cost as much as half of the simulation.
    """

    metadata = {"render_modes": []}

    def __init__(self, task: str):
        if task not in TASKS:
            raise UserError(f"walker task {task!r}: it is one of {', '.join(TASKS)}")
        self.suite_env = getattr(_suite_walker(), task)()
        import mujoco  # after dm_control, whose failure has a line of its own

        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self.move_speed = self.suite_env.task._move_speed
        self._steps = EPISODE_STEPS
        self._mujoco = mujoco
        physics = self.suite_env.physics
        self._model, self._data = physics.model.ptr, physics.data.ptr
        self._sub_steps = round(self.suite_env.control_timestep() / physics.timestep())
        # Views of the simulator's memory, made once.
        self._control, self._qpos, self._qvel = self._data.ctrl, self._data.qpos, self._data.qvel
        self._orientations = self._data.xmat[1:, 0:3:2]
        self._torso_xmat, self._torso_xpos = self._data.xmat[1], self._data.xpos[1]
        self._velocity, self._warnings = self._data.sensordata, self._data.warning.number

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode; the same seed gives the same state, whatever was done before."""
        super().reset(seed=seed)
        if seed is not None:
            self.suite_env.task.random.seed(self.np_random.integers(2**32, dtype=np.uint32))
        self.suite_env.reset()
        self._steps = 0
        return self._observation(), {"physics": self._physics()}

    def set_physics(self, physics: np.ndarray) -> np.ndarray:
        """Put the simulator into a state [18] as info["physics"] reports it; returns its observation [24].

        Steps count from here. What the state leaves out, the solver's warm start, changes the next step by less than
        1e-14; rounding the state to float32, as episode files do, by about 1e-5.
        """
        self._mujoco.mj_resetData(self._model, self._data)
        self._qpos[:], self._qvel[:] = np.split(np.asarray(physics, np.float64), [len(self._qpos)])
        self._mujoco.mj_step1(self._model, self._data)
        self._steps = 0
        return self._observation()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One step of 25 ms; raises RuntimeError when the episode is over or the physics diverged."""
        if self._steps >= EPISODE_STEPS:
            raise RuntimeError("call reset before the first step and after the last")
        self._control[:] = action
        # As dm_control steps: the first half of a simulator step was done at the end of the last call, so that
        # everything derived from positions and velocities belongs to the state that the observation reports.
        self._mujoco.mj_step2(self._model, self._data)
        self._mujoco.mj_step(self._model, self._data, self._sub_steps - 1)
        self._mujoco.mj_step1(self._model, self._data)
        if self._warnings.any():
            raise RuntimeError("the simulation diverged: the action was not finite, or the state has become so")
        self._steps += 1
        truncated = self._steps >= EPISODE_STEPS
        return self._observation(), self._reward(), False, truncated, {"physics": self._physics()}

    def _observation(self) -> np.ndarray:
        observation = np.empty(OBSERVATION_DIM, np.float32)
        observation[:14].reshape(7, 2)[:] = self._orientations
        observation[14] = self._torso_xpos[2]
        observation[15:] = self._qvel
        return observation

    def _physics(self) -> np.ndarray:
        return np.concatenate([self._qpos, self._qvel])

    def _reward(self) -> float:
        """dm_control's PlanarWalker.get_reward, which a test compares: how well it stands times how fast it moves."""
        height, upright, speed = self._torso_xpos.item(2), self._torso_xmat.item(8), self._velocity.item(0)
        # 1 from a height of 1.2 m on, and below it a Gaussian that is 0.1 at 0.6 m.
        standing = 1.0 if height >= 1.2 else math.exp(math.log(0.1) * ((1.2 - height) / 0.6) ** 2)
        moving = min(max(speed / self.move_speed, 0.0), 1.0)
        return (3 * standing + (1 + upright) / 2) / 4 * (5 * moving + 1) / 6

    def close(self) -> None:
        self.suite_env.close()


@dataclass(frozen=True)
class WalkerDataset(Dataset):
    """A dataset such as `local/walker_walk-td3-medium`: a folder of episode files.

    <dataset_dir>/collected_data/<name>/data/episode_<index>_<steps>.npz
    <dataset_dir>/local/collected_data/<name>/..., and <name>.json beside the folder
    """

    @property
    def task(self) -> str:
        return self.name.removeprefix("walker_").split("-")[0]

    @property
    def files(self) -> tuple[str, ...]:
        return (f"collected_data/{self.name}",)

    RECIPES = GENERATED_IDS

    def read(self, path: Path) -> list[dict[str, np.ndarray]]:
        return load_episodes(path)

    def _fetch(self, path: Path) -> None:
        raise UserError(
            f"{self.id}: no folder {path}; put the study's collected_data folder into {path.parent.parent}, or use "
            f"local/{self.name}, which make_dataset.py makes"
        )

    def make_env(self, dataset_dir: str | os.PathLike | None = None) -> WalkerEnv:
        return WalkerEnv(self.task)


DATASETS = {dataset_id: WalkerDataset(dataset_id) for dataset_id in OFFICIAL_IDS + GENERATED_IDS}


def parse_datasets(text: str) -> list[str]:
    """Dataset ids of `walk_m`, `walk_m,run_mr`, `__all__`, or of ids; in the order of SHORT_NAMES, each once.

    `local/walk_m`, `local/__all__` are data made on this machine. Raises UserError for another name.
    """
    known = {ALL_DATASETS: OFFICIAL_IDS, f"local/{ALL_DATASETS}": GENERATED_IDS}
    known |= {short: (name,) for short, name in BY_SHORT_NAME.items()} | {name: (name,) for name in DATASETS}
    chosen: set[str] = set()
    for name in (name.strip() for name in text.split(",")):
        if name not in known:
            words = f"none of {', '.join((*SHORT_NAMES, ALL_DATASETS))}, nor one of these after local/"
            raise UserError(f"--USE_DATASET_STR {text!r}: {name!r} is {words}{did_you_mean(name, known)}")
        chosen.update(known[name])
    return [dataset_id for dataset_id in DATASETS if dataset_id in chosen]


class Transitions(NamedTuple):
    """Rows of one or more episodes, float32: (o, a, r, discount, o')."""

    observations: np.ndarray  # [N, 24]
    actions: np.ndarray  # [N, 6]
    rewards: np.ndarray  # [N]
    discounts: np.ndarray  # [N], 1 throughout where nothing terminates
    next_observations: np.ndarray  # [N, 24]


def episode_path(folder: str | os.PathLike, index: int) -> Path:
    return Path(folder) / "data" / f"episode_{index:06d}_{EPISODE_STEPS}.npz"


def write_episode(path: str | os.PathLike, episode: dict[str, np.ndarray]) -> None:
    """Write an episode as `read_episode` returns it; equal arrays give equal bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{key: episode[key] for key in EPISODE_COLUMNS})  # it dates the members 1980


def read_episode(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read and check an episode file: float32 arrays of 1001 rows, by EPISODE_COLUMNS. Raises UserError."""
    bad = functools.partial(bad_file, Path(path))
    episode = read_npz(Path(path), EPISODE_COLUMNS)
    for key, columns in EPISODE_COLUMNS.items():
        array = episode[key]
        if array.dtype != np.float32:
            raise bad(f"{key} has type {array.dtype}, expected float32")
        if array.shape != (EPISODE_STEPS + 1, columns):
            raise bad(f"{key} has shape {array.shape}, expected {(EPISODE_STEPS + 1, columns)}")
        check_rows(bad, key, array, *_LIMITS.get(key, ()))
    if episode["action"][0].any() or episode["reward"][0].any():
        raise bad("row 0 has an action or a reward, but nothing led to the reset: rows are out of line")
    return episode


def episode_paths(folder: str | os.PathLike) -> list[Path]:
    """In the order of their indices; raises UserError where there are none."""
    data = Path(folder) / "data"
    paths = sorted(data.glob("episode_*.npz"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise UserError(f"{data}: no episode_<index>_<steps>.npz in it; check --data_dir")
    return paths


def load_episodes(folder: str | os.PathLike) -> list[dict[str, np.ndarray]]:
    return [read_episode(path) for path in episode_paths(folder)]


class StudyData(NamedTuple):
    ids: tuple[str, ...]
    observations: np.ndarray  # [E, 1001, 24], from the reset to the end
    actions: np.ndarray  # [E, 1000, 6]
    rewards: np.ndarray  # [E, 1000]
    discounts: np.ndarray  # [E, 1000]
    physics: np.ndarray  # [E, 1001, 18]
    tasks: np.ndarray  # [E] int64, place in TASKS: 0 walk, 1 run

    def transitions(self, faulty_pairing: bool = False) -> Transitions:
        """All transitions, episode by episode.

        With `faulty_pairing`, for ablation, as the study's first results had them: an observation beside the action
        that led to it; 999 an episode, as the last row has no successor.
        """
        here, following = self.observations[:, :-1], self.observations[:, 1:]
        outcomes = (self.actions, self.rewards, self.discounts)
        if faulty_pairing:
            here, following = here[:, 1:], following[:, 1:]
            outcomes = tuple(part[:, :-1] for part in outcomes)
        parts = (here, *outcomes, following)
        return Transitions(*(part.reshape(-1, *part.shape[2:]) for part in parts))

    def fingerprint(self) -> str:
        """SHA-256 of what is learned from, to tell data apart."""
        digest = hashlib.sha256(repr(self.ids).encode())
        for part in (self.observations, self.actions, self.rewards, self.discounts):
            digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()


def load_study_data(ids: list[str], dataset_dir: str | os.PathLike | None = None) -> StudyData:
    """The episodes of these datasets; raises UserError for a dataset that is missing and for the first bad file."""
    episodes, tasks = [], []
    for dataset_id in ids:
        dataset = DATASETS[dataset_id]
        found = dataset.read(*dataset.ensure(dataset_dir))
        episodes += found
        tasks += [TASKS.index(dataset.task)] * len(found)
    observations, actions, rewards, discounts, physics = (
        np.stack([episode[key] for episode in episodes]) for key in EPISODE_COLUMNS
    )
    outcomes = (actions[:, 1:], rewards[:, 1:, 0], discounts[:, 1:, 0])
    return StudyData(tuple(ids), observations, *outcomes, physics, np.array(tasks))


def rewards_in_task(env: WalkerEnv, physics: np.ndarray) -> np.ndarray:
    """Rewards [n] float32 of the environment's task for arriving in physics states [n, 18]; nothing else matters."""
    rewards = np.empty(len(physics), np.float32)
    for number, state in enumerate(physics):
        env.set_physics(state)
        rewards[number] = env._reward()
    return rewards
