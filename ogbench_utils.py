"""OGBench mazes: dataset ids and files, windows and goals for training, environments for evaluation.

Source: Park et al., "OGBench: Benchmarking Offline Goal-Conditioned RL" (2024), https://github.com/seohongpark/ogbench.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from dataset_files import Dataset, bad_file, check_arrays, find, jumps, read_npz
from utils import UserError, torch

DATASET_URL = "https://rail.eecs.berkeley.edu/datasets/ogbench"
NUM_TASKS = 5  # evaluation goals an environment
NEVER = 2**30  # steps to a goal that does not lie ahead in the same episode

# What OGBench publishes: task types of each family and size. Other combinations have no official file.
_PUBLISHED = {
    "pointmaze": {size: ("navigate", "stitch") for size in ("medium", "large", "giant", "teleport")},
    "antmaze": {
        "medium": ("navigate", "stitch", "explore"),
        "large": ("navigate", "stitch", "explore"),
        "giant": ("navigate", "stitch"),
        "teleport": ("navigate", "stitch", "explore"),
    },
    "humanoidmaze": {size: ("navigate", "stitch") for size in ("medium", "large", "giant")},
}
# What make_dataset.py can generate; its recipes must cover exactly these. `full` ids are of OGBench's size.
GENERATED_IDS = tuple(
    f"local/{maze_env}-{size}-{task_type}{full}-v0"
    for full in ("", "-full")
    for maze_env, task_types in (("pointmaze", ("navigate", "stitch")), ("antmaze", ("navigate", "stitch", "explore")))
    for size in ("medium", "large")
    for task_type in task_types
)
_DIMENSIONS = {"pointmaze": (2, 2), "antmaze": (29, 8), "humanoidmaze": (69, 21)}  # observation, action
_LONGEST_STEP = 1.0  # metres in x or y; no robot moves further in a step
_BLOCK_ROWS = 1 << 16  # rows summed at a time, so that float64 needs no second copy of the data


@dataclass(frozen=True)
class MazeDataset(Dataset):
    """A dataset such as `local/pointmaze-medium-navigate-v0`: a file to train on and one to validate."""

    VARIABLE, RECIPES, url = "OGBENCH_DATASET_DIR", GENERATED_IDS, DATASET_URL

    @property
    def maze_env(self) -> str:
        return self.name.split("-")[0]  # pointmaze, antmaze or humanoidmaze

    @property
    def maze_size(self) -> str:
        return self.name.split("-")[1]  # medium, large, giant or teleport

    @property
    def task_type(self) -> str:
        return self.name.split("-")[2]  # navigate, stitch or explore

    @property
    def env_id(self) -> str:
        """The Gymnasium environment, e.g. pointmaze-medium-v0."""
        return f"{self.maze_env}-{self.maze_size}-v0"

    @property
    def files(self) -> tuple[str, ...]:
        return f"{self.name}.npz", f"{self.name}-val.npz"

    def read(self, path: Path) -> dict[str, np.ndarray]:
        """Read and check a file: observations [N, obs_dim], actions [N, act_dim] float32, terminals [N] bool.

        Raises UserError for the faults of `dataset_files.check_arrays`, terminals that do not end the file, an episode
        of one row, a jump inside an episode, and files written from what OGBench's own loader returns: it leaves out
        the last state of each episode.
        """
        arrays = read_npz(path, ("observations", "actions", "terminals"), ("next_observations", "valids"))
        if "next_observations" in arrays or "valids" in arrays:
            raise bad_file(path, "was written from what OGBench's loader returns, not as the file that it reads")
        check_arrays(functools.partial(bad_file, path), arrays, _DIMENSIONS[self.maze_env])
        terminals = arrays["terminals"]
        if not terminals[-1]:
            raise bad_file(path, f"the last row ({len(terminals) - 1}) does not end an episode")
        ends = np.flatnonzero(terminals)
        short = np.flatnonzero(np.diff(ends, prepend=-1) < 2)
        if len(short):
            raise bad_file(path, f"the episode that ends at row {ends[short[0]]} has fewer than 2 rows")
        rows = jumps(arrays["observations"][:, :2], _LONGEST_STEP)
        rows = rows[~terminals[rows]]
        if len(rows) and self.maze_size != "teleport":
            words = f"row {rows[0] + 1} cannot follow row {rows[0]} in an episode, it is too far off"
            raise bad_file(path, f"{words}: rows are shuffled, or a mark in terminals is missing or a row off")
        return arrays

    def load(
        self,
        split: str = "train",
        dataset_dir: str | os.PathLike | None = None,
        max_trajectories: int | None = None,
        device: str | torch.device = "cpu",
    ) -> TrajectoryDataset:
        """The episodes of the `train` or `val` file; raises UserError as `ensure` and `read` do."""
        path = self.ensure(dataset_dir)[("train", "val").index(split)]
        return TrajectoryDataset(self.read(path), max_trajectories, device)

    def transitions(self, dataset_dir: str | os.PathLike | None = None) -> dict[str, Any]:
        task = f"{self.id.removesuffix('-v0')}-singletask-v0"
        raise UserError(f"dataset {self.id} has no rewards; a single task of it has, as {task}")

    def make_env(self, dataset_dir: str | os.PathLike | None = None, **kwargs: Any) -> gymnasium.Env:
        return make_env(self.id, **kwargs)


OFFICIAL_IDS = tuple(
    f"{maze_env}-{size}-{task_type}-v0"
    for maze_env, sizes in _PUBLISHED.items()
    for size, task_types in sizes.items()
    for task_type in task_types
)
DATASETS = {dataset_id: MazeDataset(dataset_id) for dataset_id in OFFICIAL_IDS + GENERATED_IDS}


def parse_dataset_id(dataset_id: str) -> MazeDataset:
    """The dataset of an id; raises UserError, naming an id that is near where there is one."""
    return find(dataset_id, DATASETS, "an OGBench maze dataset (see `python make_dataset.py --list`)")


class TrajectoryDataset:
    """Episodes laid end to end in rows, on one device.

                   |<---- episode 0 ---->|<- episode 1 ->|
    row              0   1   2   3   4     5   6   7       N = 8 rows, E = 2 episodes
    observations     s0  s1  s2  s3  s4    s0  s1  s2
    actions          a0  a1  a2  a3  .     a0  a1  .       the action of an episode's last row leads nowhere
    episode_start    0   0   0   0   0     5   5   5
    episode_end      4   4   4   4   4     7   7   7       inclusive: the row of the last state

    A window of length L = 3 holds L transitions and L + 1 states. In episode 0 it can start at row 0 or 1; episode 1
    is shorter than L + 1 states, so its one window is padded on the right with its last state:

    rows  [0, 1, 2, 3]  valid [1, 1, 1]      rows  [5, 6, 7, 7]  valid [1, 1, 0]
    rows  [1, 2, 3, 4]  valid [1, 1, 1]

    Attributes: observations [N, obs_dim] and actions [N, act_dim] float32, episode_start and episode_end [N] int64,
    episode_starts and episode_lengths [E] int64 (rows).
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], max_trajectories: int | None = None, device: str | torch.device = "cpu"
    ):
        """The first `max_trajectories` episodes of `MazeDataset.read`, or all; UserError for fewer than 1."""
        if max_trajectories is not None and max_trajectories < 1:
            raise UserError(f"--max_trajectories {max_trajectories}: at least 1 is needed")
        ends = np.flatnonzero(arrays["terminals"])[:max_trajectories]
        rows = int(ends[-1]) + 1
        # A cut is copied, so that the rest of the file's memory is freed.
        self.observations, self.actions = (
            torch.from_numpy(array if rows == len(array) else array[:rows].copy()).to(device)
            for array in (arrays["observations"], arrays["actions"])
        )
        self.episode_lengths = torch.from_numpy(np.diff(ends, prepend=-1)).to(device)
        self.episode_starts = torch.from_numpy(ends).to(device) + 1 - self.episode_lengths
        self.episode_start = self.episode_starts.repeat_interleave(self.episode_lengths)
        self.episode_end = self.episode_start + (self.episode_lengths - 1).repeat_interleave(self.episode_lengths)
        self._window_tables: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

    @property
    def device(self) -> torch.device:
        return self.observations.device

    @property
    def num_trajectories(self) -> int:
        return len(self.episode_starts)

    @property
    def observation_dim(self) -> int:
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        return self.actions.shape[1]

    def normalizer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the observations, [obs_dim] float32: at least 1e-3, 1 where a column never changes."""
        mean = torch.zeros(self.observation_dim, dtype=torch.float64, device=self.device)
        variance = torch.zeros_like(mean)
        # Block by block in float64: exact sums without a float64 copy of the data.
        for block in self.observations.split(_BLOCK_ROWS):
            mean += block.double().sum(dim=0) / len(self.observations)
        for block in self.observations.split(_BLOCK_ROWS):
            variance += (block.double() - mean).square().sum(dim=0) / len(self.observations)
        constant = self.observations.amin(dim=0) == self.observations.amax(dim=0)
        std = torch.where(constant, torch.ones_like(mean), variance.sqrt().clamp(min=1e-3))
        return mean.float(), std.float()

    def _window_table(self, length: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """First and past-the-last number of each episode's windows [E], which are numbered in a row; and their count.

        Kept by length, so that `sample_windows` itself never waits for the device.
        """
        if length not in self._window_tables:
            counts = (self.episode_lengths - 1 - length).clamp(min=0) + 1
            last = counts.cumsum(dim=0)
            self._window_tables[length] = (last - counts, last, int(last[-1]))
        return self._window_tables[length]

    def sample_windows(self, batch_size: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Draw B windows of L transitions, every possible start equally likely.

        An episode with room for several full windows is drawn in proportion to their number; one shorter than L + 1
        states counts as one window, from its first row, padded on the right. `generator` lives on the data's device.

        Returns rows [B, L + 1] int64 (the last state's row where padded), observations [B, L + 1, obs_dim] float32,
        valid [B, L] bool (True where s_t and s_{t+1} both lie in the episode).
        """
        first, last, total = self._window_table(length)
        window = torch.randint(total, (batch_size,), generator=generator, device=self.device)
        episode = torch.searchsorted(last, window, right=True)
        start = self.episode_starts[episode] + window - first[episode]
        end = (self.episode_starts[episode] + self.episode_lengths[episode] - 1)[:, None]
        unclamped = start[:, None] + torch.arange(length + 1, device=self.device)
        rows = torch.minimum(unclamped, end)
        return {"rows": rows, "observations": self.observations[rows], "valid": unclamped[:, 1:] <= end}

    def sample_goals(
        self,
        rows: torch.Tensor,
        generator: torch.Generator,
        p_self: float,
        p_future: float,
        p_random: float,
        goal_discount: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a hindsight goal for each row, independently: rows [B, L] int64 of the states s_t.

        With probability p_self the goal is the state the transition arrives at (row + 1); with p_future it lies
        Geometric(1 - goal_discount) >= 1 steps ahead, at most at the episode's end; else it is any row of the data.

        Returns goal_rows [B, L] and steps_to_goal [B, L], int64: how many steps ahead the goal lies when it is a
        later row of the same episode, however it was drawn, else NEVER.
        """
        if abs(p_self + p_future + p_random - 1) > 1e-6:
            raise ValueError(f"goal shares {p_self}, {p_future} and {p_random} do not sum to 1")
        shares = p_self, p_future, goal_discount
        return hindsight_goals(rows, self.episode_end, len(self.observations), *shares, generator)


def hindsight_goals(
    rows: torch.Tensor,
    episode_end: torch.Tensor,
    random_rows: int | torch.Tensor,
    p_self: float,
    p_future: float,
    goal_discount: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The draw of `TrajectoryDataset.sample_goals`, for any rows of episodes.

    rows: [...] int64; episode_end: [N] int64; random_rows: the rows that a random goal may be, [M] int64, or their
    number where these are the first ones. Returns goal_rows and steps_to_goal, shaped as rows.
    """
    device = rows.device
    kind, uniform = torch.rand(2, *rows.shape, generator=generator, device=device)
    log_discount = math.log(goal_discount) if goal_discount > 0 else -math.inf
    # Inverse of the geometric distribution; capped before the cast so that no number overflows.
    ahead = 1 + (torch.log1p(-uniform) / log_discount).clamp(max=NEVER).long()
    end = episode_end[rows]
    count = random_rows if isinstance(random_rows, int) else len(random_rows)
    drawn = torch.randint(count, rows.shape, generator=generator, device=device)
    drawn = drawn if isinstance(random_rows, int) else random_rows[drawn]
    goal_rows = torch.minimum(rows + torch.where(kind < p_self, torch.ones_like(ahead), ahead), end)
    goal_rows = torch.where(kind < p_self + p_future, goal_rows, drawn)
    is_ahead = (goal_rows > rows) & (goal_rows <= end)
    return goal_rows, torch.where(is_ahead, goal_rows - rows, torch.full_like(rows, NEVER))


@contextlib.contextmanager
def _global_draws_from(state: tuple) -> Iterator[None]:
    """Let NumPy's global generator, which OGBench draws from, run from `state`; put the caller's state back after."""
    saved = np.random.get_state()
    np.random.set_state(state)
    try:
        yield
    finally:
        np.random.set_state(saved)


class SeededDraws(gymnasium.Wrapper):
    """OGBench's environments whose episodes depend on the seed of their reset alone; one without goes on as OGBench's.

    OGBench draws the noise of starts and goals from NumPy's global generator, and a few actions from the action space,
    neither of which `env.reset(seed=...)` reaches. `in_steps` says that steps draw, too, as a teleporter its exit and
    a directional robot its direction. The global state is put back after.
    """

    def __init__(self, env: gymnasium.Env, in_steps: bool):
        super().__init__(env)
        self._in_steps, self._state = in_steps, np.random.RandomState(0).get_state()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        if seed is None:
            return self.env.reset(options=options)
        seed = int(seed) % 2**32
        self.env.action_space.seed(seed)
        with _global_draws_from(np.random.RandomState(seed).get_state()):
            result = self.env.reset(seed=seed, options=options)
            self._state = np.random.get_state()
        return result

    def step(self, action: np.ndarray):
        if not self._in_steps:
            return self.env.step(action)
        with _global_draws_from(self._state):
            result = self.env.step(action)
            self._state = np.random.get_state()
        return result


def _discard_maze_file(path: str, fd: int) -> None:
    """Close and delete the temporary XML file that OGBench leaves open for every maze it builds.

    fd: the lowest descriptor that was free before, which the file has unless another thread took it.
    """
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            os.close(fd)
    with contextlib.suppress(OSError):
        os.remove(path)


def make_env(dataset_id: str, **kwargs: Any) -> SeededDraws:
    """The Gymnasium environment of a dataset; `kwargs` go to `gymnasium.make`. Raises UserError for an unknown id."""
    env_id = parse_dataset_id(dataset_id).env_id
    import ogbench  # noqa: F401  registers the environments

    kwargs.setdefault("disable_env_checker", True)  # it warns about observations beyond float32, at every reset
    probe = os.open(os.devnull, os.O_RDONLY)
    os.close(probe)
    env = gymnasium.make(env_id, **kwargs)
    _discard_maze_file(env.unwrapped.fullpath, probe)
    return SeededDraws(env, "teleport" in env_id)


def max_episode_steps(dataset_id: str) -> int:
    """Steps after which an evaluation episode is cut, as OGBench registers them."""
    env_id = parse_dataset_id(dataset_id).env_id
    import ogbench  # noqa: F401  registers the environments

    return int(gymnasium.spec(env_id).max_episode_steps)


def seeded_reset(env: SeededDraws, seed: int, options: dict | None = None) -> tuple[np.ndarray, dict]:
    """Reset with a seed: the observation [obs_dim] float32, and the info, whose `goal` is the goal's observation."""
    observation, info = env.reset(seed=seed, options=options)
    return np.asarray(observation, dtype=np.float32), info
