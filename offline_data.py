"""Transitions, environments and scores by dataset id, whichever benchmark it is of.

hopper-medium-v2                             D4RL's own file, see d4rl_utils
local/hopper-medium-v2                       the same recipe, made by make_dataset.py
antmaze-medium-navigate-singletask-v0        OGBench's file with the rewards of its default task
antmaze-medium-navigate-singletask-task3-v0  of task 3; both also as local/...
minari/mujoco/halfcheetah/medium-v0          through Minari (pip install -r requirements/data.txt)
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import ArrayLike

import d4rl_utils
import ogbench_utils
from utils import ReplayBuffer, UserError, one_line

_BLOCK_ROWS = 1 << 16  # rows summed at a time, so that float64 needs no second copy of the data


# ----------------------------------------------------------------------------------------------------------------
# Transitions
# ----------------------------------------------------------------------------------------------------------------


@dataclass
class OfflineData:
    """A dataset's transitions in memory: nothing in them crosses the end of an episode."""

    dataset_id: str
    env_id: str
    max_action: float  # actions lie in [-max_action, max_action]
    observations: np.ndarray  # [N, obs_dim] float32
    actions: np.ndarray  # [N, act_dim] float32
    rewards: np.ndarray  # [N] float32, reward_shift added
    next_observations: np.ndarray  # [N, obs_dim] float32
    terminated: np.ndarray  # [N] bool: no value beyond this transition
    truncated: np.ndarray  # [N] bool: the episode was cut here, values go on
    returns: np.ndarray  # [E] float64: undiscounted, of whole episodes, without reward_shift
    reward_shift: float  # added to every reward
    reached: np.ndarray | None = None  # [E] bool: of a single task, the episodes that reach its goal

    @property
    def observation_dim(self) -> int:
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        return self.actions.shape[1]

    def __len__(self) -> int:
        return len(self.rewards)

    def facts(self) -> dict[str, Any]:
        """What a run records of its data: plain numbers and text."""
        facts = {"dataset": self.dataset_id, "env": self.env_id, "transitions": len(self)}
        facts |= {"terminations": int(self.terminated.sum()), "episodes": len(self.returns)}
        facts |= {"mean_return": float(self.returns.mean()), "max_return": float(self.returns.max())}
        return facts | {"max_action": self.max_action, "reward_shift": self.reward_shift}

    def normalizer(self, epsilon: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the observations and their standard deviation plus epsilon, [obs_dim] float32 each."""
        mean = np.zeros(self.observation_dim)
        variance = np.zeros(self.observation_dim)
        blocks = [slice(start, start + _BLOCK_ROWS) for start in range(0, len(self), _BLOCK_ROWS)]
        for block in blocks:
            mean += self.observations[block].sum(axis=0, dtype=np.float64) / len(self)
        for block in blocks:
            variance += np.square(self.observations[block] - mean).sum(axis=0) / len(self)
        return mean.astype(np.float32), (np.sqrt(variance) + epsilon).astype(np.float32)

    def tensors(self, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """ReplayBuffer.FIELDS as float32 tensors on the device; on the CPU the large ones share the arrays' memory."""
        fields = {name: torch.from_numpy(getattr(self, name)) for name in ReplayBuffer.FIELDS}
        return {name: tensor.to(device, torch.float32) for name, tensor in fields.items()}

    def replay_buffer(self, device: str | torch.device = "cpu") -> ReplayBuffer:
        """A full buffer over `tensors(device)`, without a copy: on the CPU, writing into one changes the other."""
        buffer = ReplayBuffer(0, self.observation_dim, self.action_dim, device)
        for name, tensor in self.tensors(device).items():
            setattr(buffer, name, tensor)
        buffer.capacity = buffer.size = len(self)
        return buffer


def load_transitions(
    dataset_id: str, dataset_dir: str | os.PathLike | None = None, antmaze_reward_shift: float = -1.0
) -> OfflineData:
    """Read a dataset, downloading an official one that is missing.

    Args:
        dataset_id: see the module's docstring.
        dataset_dir: the folder of the benchmark's files; None takes the benchmark's own variable, then its default.
        antmaze_reward_shift: added to the rewards of D4RL's antmazes, which are 1 at the goal and 0 elsewhere, as
            IQL does; other datasets are left as they are.

    Raises UserError in one line: an unknown id, a file that is missing, damaged or cannot be fetched, an optional
    package that is missing, rewards that are all equal.
    """
    loader = _load_minari if is_minari(dataset_id) else _load_singletask if is_singletask(dataset_id) else _load_d4rl
    data = loader(dataset_id, dataset_dir)
    if data.rewards.min() == data.rewards.max():
        raise UserError(
            f"--dataset {dataset_id}: every reward is {data.rewards[0]:g}, there is nothing to learn; use another"
        )
    if data.env_id in {f"antmaze-{maze}" for maze in d4rl_utils.AntMaze.MAPS}:
        data.reward_shift = float(antmaze_reward_shift)
        data.rewards += np.float32(antmaze_reward_shift)
    return data


def _load_d4rl(dataset_id: str, dataset_dir: str | os.PathLike | None) -> OfflineData:
    env_id = d4rl_utils.parse_dataset_id(dataset_id).env_id
    columns, returns = d4rl_utils.load_transitions(dataset_id, dataset_dir)
    return OfflineData(dataset_id, env_id, 1.0, **columns, returns=returns, reward_shift=0.0)


# ----------------------------------------------------------------------------------------------------------------
# OGBench's single tasks
# ----------------------------------------------------------------------------------------------------------------

_SINGLETASK = re.compile(r"(?P<start>.+)-singletask(?P<task>-task[1-5])?-v0")


def is_singletask(dataset_id: str) -> bool:
    return "-singletask" in str(dataset_id)


def _parse_singletask(dataset_id: str) -> tuple[str, str]:
    """The id of the file, and the Gymnasium id of the environment. Raises UserError."""
    match = _SINGLETASK.fullmatch(dataset_id)
    if match is None:
        raise UserError(
            f"--dataset {dataset_id!r} is not an OGBench single-task dataset; ids are <dataset>-singletask-v0 for the "
            "default task and <dataset>-singletask-task1-v0 to task5, as in antmaze-medium-navigate-singletask-v0"
        )
    dataset = ogbench_utils.parse_dataset_id(f"{match['start']}-v0")
    return dataset.id, dataset.env_id.removesuffix("-v0") + f"-singletask{match['task'] or ''}-v0"


class _SeededReset(gymnasium.Wrapper):
    """Episodes that depend on the seed of their reset alone, which OGBench's do not."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        if seed is None:
            return self.env.reset(options=options)
        return ogbench_utils.seeded_reset(self.env, seed, options)


def _make_singletask(dataset_id: str) -> gymnasium.Env:
    file_id, env_id = _parse_singletask(dataset_id)
    import ogbench  # noqa: F401  registers the environments

    return _SeededReset(ogbench_utils.make_env(file_id, **gymnasium.spec(env_id).kwargs))


def _load_singletask(dataset_id: str, dataset_dir: str | os.PathLike | None) -> OfflineData:
    """OGBench's file with the rewards of one task, as its relabel_dataset has them.

    A transition from a state within the goal's radius has reward 0 and terminates, any other has -1; the recording
    goes on. The place is taken from the first two observation numbers, which are qpos in every maze.
    """
    file_id, env_id = _parse_singletask(dataset_id)
    data = ogbench_utils.TrajectoryDataset.load(file_id, "train", dataset_dir)
    env = _make_singletask(dataset_id)
    env.reset(seed=0)  # sets the task
    maze: Any = env.unwrapped
    observations, actions = data.observations.numpy(), data.actions.numpy()
    last = (data.episode_starts + data.episode_lengths - 1).numpy()
    reached = np.empty(len(observations), dtype=bool)
    for start in range(0, len(reached), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        reached[block] = np.linalg.norm(observations[block, :2] - maze.cur_goal_xy, axis=1) <= maze._goal_tol
    env.close()
    rows = np.delete(np.arange(len(observations)), last)
    terminated = reached[rows]
    rewards = terminated.astype(np.float32) - 1
    cut = np.zeros(len(reached), dtype=bool)
    cut[last - 1] = True
    following = d4rl_utils.following_rows(observations, rows, np.zeros(len(rows), dtype=bool))
    ends = last - np.arange(1, len(last) + 1)  # rows left out before and at each end
    return OfflineData(
        dataset_id=dataset_id,
        env_id=env_id,
        max_action=1.0,
        observations=d4rl_utils.take_rows(observations, rows),
        actions=d4rl_utils.take_rows(actions, rows),
        rewards=rewards,
        next_observations=following,
        terminated=terminated,
        truncated=cut[rows] & ~terminated,
        returns=d4rl_utils.task_returns(rewards, terminated, ends),
        reward_shift=0.0,
        reached=np.logical_or.reduceat(terminated, np.append(0, ends[:-1] + 1)),
    )


# ----------------------------------------------------------------------------------------------------------------
# Minari
# ----------------------------------------------------------------------------------------------------------------


def is_minari(dataset_id: str) -> bool:
    return str(dataset_id).startswith("minari/")


def _open_minari(dataset_id: str, dataset_dir: str | os.PathLike | None = None) -> Any:
    """The MinariDataset, downloaded by Minari where it is missing. Raises UserError in one line."""
    try:
        import minari
    except ImportError:
        raise UserError(
            f"--dataset {dataset_id}: needs the package minari: pip install -r requirements/data.txt"
        ) from None
    name = dataset_id.removeprefix("minari/")
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", name):
        raise UserError(
            f"--dataset {dataset_id!r}: after minari/ comes Minari's id, as in mujoco/halfcheetah/medium-v0"
        )
    before = os.environ.get("MINARI_DATASETS_PATH")
    try:
        if dataset_dir is not None:  # Minari knows its folder by this variable alone
            os.environ["MINARI_DATASETS_PATH"] = str(Path(dataset_dir).expanduser())
        return minari.load_dataset(name, download=True)
    except Exception as error:  # the network and the file format fail in many ways
        raise UserError(
            f"--dataset {dataset_id}: Minari cannot load it ({type(error).__name__}: {one_line(error)}); "
            f"`minari list remote` shows what there is, `minari download {name}` fetches it"
        ) from None
    finally:
        if dataset_dir is not None:
            os.environ.pop("MINARI_DATASETS_PATH")
            if before is not None:
                os.environ["MINARI_DATASETS_PATH"] = before


def _load_minari(dataset_id: str, dataset_dir: str | os.PathLike | None) -> OfflineData:
    """Episodes of flat observations and actions. Observations of several parts, as with goals, are refused."""
    dataset = _open_minari(dataset_id, dataset_dir)
    spaces = (dataset.observation_space, dataset.action_space)
    for space, what in zip(spaces, ("observations", "actions"), strict=True):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
            raise UserError(f"--dataset {dataset_id}: {what} are {space}, not one row of numbers; use another dataset")
    widths, steps = [space.shape[0] for space in spaces], int(dataset.total_steps)
    shapes = {"observations": (steps, widths[0]), "actions": (steps, widths[1]), "rewards": (steps,)}
    shapes |= {"next_observations": (steps, widths[0])}
    columns = {name: np.empty(shape, dtype=np.float32) for name, shape in shapes.items()}
    columns |= {name: np.zeros(steps, dtype=bool) for name in ("terminated", "truncated")}
    ends, end = [], 0
    for episode in dataset.iterate_episodes():
        rows = slice(end, end := end + len(episode.rewards))
        columns["observations"][rows], columns["next_observations"][rows] = (
            episode.observations[:-1],
            episode.observations[1:],
        )
        columns["actions"][rows], columns["rewards"][rows] = episode.actions, episode.rewards
        columns["terminated"][rows] = episode.terminations
        ends.append(end - 1)
    columns["truncated"][ends] = ~columns["terminated"][ends]
    for name in shapes:
        if not np.isfinite(columns[name].sum(dtype=np.float64)):
            raise UserError(f"--dataset {dataset_id}: {name} hold NaN or infinity; use another dataset")
    returns = d4rl_utils.task_returns(columns["rewards"], columns["terminated"], np.array(ends))
    env_id = dataset.env_spec.id if dataset.env_spec else "unknown"
    return OfflineData(
        dataset_id, env_id, float(dataset.action_space.high.max()), **columns, returns=returns, reward_shift=0.0
    )


def _make_minari(dataset_id: str, dataset_dir: str | os.PathLike | None) -> gymnasium.Env:
    dataset = _open_minari(dataset_id, dataset_dir)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the recording had other versions of the packages
            return dataset.recover_environment(eval_env=True, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        raise UserError(
            f"--dataset {dataset_id}: its environment cannot be made here ({one_line(error)}); "
            "pip install -r requirements/data.txt"
        ) from None


# ----------------------------------------------------------------------------------------------------------------
# Environments and scores
# ----------------------------------------------------------------------------------------------------------------


def make_env(dataset_id: str, dataset_dir: str | os.PathLike | None = None) -> gymnasium.Env:
    """The environment that a dataset's policies are evaluated in, with its time limit.

    `functools.partial(make_env, dataset_id)` can be given to evaluation.Evaluator. `dataset_dir` matters for Minari
    alone, whose datasets name their environments. Raises UserError.
    """
    if is_minari(dataset_id):
        return _make_minari(dataset_id, dataset_dir)
    if is_singletask(dataset_id):
        return _make_singletask(dataset_id)
    if d4rl_utils.parse_dataset_id(dataset_id).robot in d4rl_utils.ENVIRONMENTS:
        return d4rl_utils.QuickRunner(dataset_id)
    return d4rl_utils.make_env(dataset_id)


def is_official(dataset_id: str, transitions: int) -> bool | None:
    """As d4rl_utils.is_official; None for another benchmark's id."""
    return d4rl_utils.is_official(dataset_id, transitions)


def data_scores(data: OfflineData, dataset_dir: str | os.PathLike | None = None) -> np.ndarray:
    """Scores of the dataset's own whole episodes, [E] float64, comparable with `normalized_score` of a policy's.

    A single task's recordings are shorter than an evaluation, so that their returns alone do not say who failed.
    """
    if data.reached is not None:
        return 100.0 * data.reached
    return normalized_score(data.dataset_id, data.returns, dataset_dir)


def normalized_score(dataset_id: str, returns: ArrayLike, dataset_dir: str | os.PathLike | None = None) -> np.ndarray:
    """Scores of undiscounted episode returns in `make_env`'s environment, any shape, float64.

    D4RL: 0 is a random policy, 100 its expert. OGBench single task: 100 for an episode that reaches the goal, else 0;
    an episode that fails has return -1 for every step of the time limit, and any other has more. Minari: as D4RL, with
    the references that the dataset brings. Raises UserError for an unknown id, and where there are no references.
    """
    if is_singletask(dataset_id):
        env_id = _parse_singletask(dataset_id)[1]
        import ogbench  # noqa: F401  registers the environments

        return 100.0 * (np.asarray(returns, dtype=np.float64) > -gymnasium.spec(env_id).max_episode_steps)
    if is_minari(dataset_id):
        metadata = _open_minari(dataset_id, dataset_dir).storage.metadata
        low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
        if low is None or high is None:
            raise UserError(f"--dataset {dataset_id}: the dataset has no reference returns, so that it has no score")
        return 100.0 * (np.asarray(returns, dtype=np.float64) - low) / (high - low)
    return d4rl_utils.normalized_score(dataset_id, returns)
