"""Every dataset by its id: files, transitions, environment and score, whichever benchmark it is of.

hopper-medium-v2                             D4RL's own file, see d4rl_utils
local/hopper-medium-v2                       the same recipe, made by make_dataset.py
antmaze-medium-navigate-v0                   OGBench's file without rewards, see ogbench_utils
antmaze-medium-navigate-singletask-v0        with the rewards of its default task
antmaze-medium-navigate-singletask-task3-v0  of task 3; all of these also as local/...
walker_walk-td3-medium                       the walker study's episodes, see dmc_utils
minari/mujoco/halfcheetah/medium-v0          through Minari (pip install -r requirements/data.txt)

    dataset = find_dataset("local/hopper-medium-v2")
    dataset.ensure(); dataset.transitions(); dataset.make_env(); dataset.score(returns)
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike

import d4rl_utils
import dmc_utils
import ogbench_utils
from d4rl_utils import is_official as is_official  # None for another benchmark's id
from dataset_files import Dataset, check_arrays, find, take_rows, whole_returns
from utils import ReplayBuffer, UserError, one_line, torch, warn

_BLOCK_ROWS = 1 << 16  # rows summed at a time, so that float64 needs no second copy of the data


@dataclass
class OfflineData:
    """A dataset's transitions in memory: nothing in them crosses the end of an episode."""

    dataset_id: str
    env_id: str
    observations: np.ndarray  # [N, obs_dim] float32
    actions: np.ndarray  # [N, act_dim] float32, in [-max_action, max_action]
    rewards: np.ndarray  # [N] float32, reward_shift added
    next_observations: np.ndarray  # [N, obs_dim] float32
    terminated: np.ndarray  # [N] bool: no value beyond this transition
    truncated: np.ndarray  # [N] bool: the episode was cut here, values go on
    returns: np.ndarray  # [E] float64: undiscounted, of whole episodes, without reward_shift
    reached: np.ndarray | None = None  # [E] bool: of a single task, the episodes that reach its goal
    reward_shift: float = 0.0  # added to every reward
    max_action: float = 1.0
    scored: bool = True  # whether a score is more than the return

    @property
    def observation_dim(self) -> int:
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        return self.actions.shape[1]

    def __len__(self) -> int:
        return len(self.rewards)

    def facts(self) -> dict[str, Any]:
        facts = {"dataset": self.dataset_id, "env": self.env_id, "transitions": len(self)}
        facts |= {"terminations": int(self.terminated.sum()), "episodes": len(self.returns)}
        facts |= {"mean_return": float(self.returns.mean()), "max_return": float(self.returns.max())}
        facts |= {"max_action": self.max_action, "reward_shift": self.reward_shift}
        return facts if self.scored else facts | {"score": "the return, as the data have no references"}

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

    def replay_buffer(self, device: str | torch.device = "cpu") -> ReplayBuffer:
        """A full buffer, without a copy: on the CPU it shares the large arrays, and writing into one changes both."""
        return ReplayBuffer(*(getattr(self, name) for name in ReplayBuffer.FIELDS), device)


def load_transitions(
    dataset_id: str, dataset_dir: str | os.PathLike | None = None, antmaze_reward_shift: float = -1.0
) -> OfflineData:
    """Read a dataset, downloading an official one that is missing, and compare it with its environment.

    antmaze_reward_shift: added to the rewards of D4RL's antmazes, 1 at the goal and 0 elsewhere; IQL adds -1. Raises
    UserError for data that cannot be had, rewards that no action changes, an environment that is not the data's.
    """
    data = OfflineData(dataset_id, **find_dataset(dataset_id).transitions(dataset_dir))
    low, high = data.rewards.min(), data.rewards.max()
    if low == high and not (low and data.terminated.any()):  # the same for each step until a fall is worth learning
        raise UserError(f"dataset {dataset_id}: every reward is {low:g}, there is nothing to learn; use another")
    check_environment(data, make_env(dataset_id, dataset_dir))
    if data.env_id.removeprefix("antmaze-") in d4rl_utils.AntMaze.MAPS:
        data.reward_shift = float(antmaze_reward_shift)
        data.rewards += np.float32(antmaze_reward_shift)
    return data


def check_environment(data: OfflineData, env: gymnasium.Env) -> None:
    """Close the environment; UserError where it has other observations or actions than the data."""
    env.close()
    for space, what in ((env.observation_space, "observations"), (env.action_space, "actions")):
        array = getattr(data, what)
        if space.shape != array.shape[1:]:
            raise UserError(
                f"dataset {data.dataset_id}: its {what} have {array.shape[1]} numbers, those of its environment "
                f"{data.env_id} have the shape {space.shape}; use another dataset"
            )


class SingleTask(ogbench_utils.MazeDataset):
    """`<maze dataset>-singletask-v0`, or -singletask-task1-v0 to task5: its file with the rewards of one task."""

    @property
    def file_id(self) -> str:
        return re.sub("-singletask(-task[1-5])?", "", self.id)

    @property
    def env_id(self) -> str:
        task = re.search("-singletask(-task[1-5])?", self.id)[0]
        return super().env_id.removesuffix("-v0") + f"{task}-v0"

    def make_env(self, dataset_dir: str | os.PathLike | None = None) -> gymnasium.Env:
        import ogbench  # noqa: F401  registers the environments

        return ogbench_utils.make_env(self.file_id, **gymnasium.spec(self.env_id).kwargs)

    def transitions(self, dataset_dir: str | os.PathLike | None = None) -> dict[str, Any]:
        """The file's transitions with the task's rewards, as OGBench's relabel_dataset has them.

        One from a state within the goal's radius has reward 0 and terminates, any other -1; the recording goes on.
        """
        arrays = self.read(self.ensure(dataset_dir)[0])
        observations, last = arrays["observations"], np.flatnonzero(arrays["terminals"])
        env = self.make_env()
        env.reset(seed=0)  # sets the task
        maze: Any = env.unwrapped
        reached = np.linalg.norm(observations[:, :2] - maze.cur_goal_xy, axis=1) <= maze._goal_tol
        env.close()
        rows = np.flatnonzero(~arrays["terminals"])
        terminated, following = reached[rows], observations[rows + 1]
        rewards = terminated.astype(np.float32) - 1
        ends = last - np.arange(1, len(last) + 1)  # rows left out before and at each end
        return {
            "env_id": self.env_id,
            "observations": take_rows(observations, rows),
            "actions": take_rows(arrays["actions"], rows),
            "rewards": rewards,
            "next_observations": following,
            "terminated": terminated,
            "truncated": np.isin(rows, last - 1) & ~terminated,
            "returns": whole_returns(rewards, terminated, ends),
            "reached": np.logical_or.reduceat(terminated, np.append(0, ends[:-1] + 1)),
        }

    def score(self, returns: ArrayLike, dataset_dir: str | os.PathLike | None = None) -> np.ndarray:
        """100 for an episode that reaches the goal, else 0: one that fails has return -1 for every step."""
        import ogbench  # noqa: F401  registers the environments

        return 100.0 * (np.asarray(returns, dtype=np.float64) > -gymnasium.spec(self.env_id).max_episode_steps)


class MinariDataset(Dataset):
    """`minari/<Minari's id>`: flat observations and actions, in a folder that Minari keeps.

    Actions are in [-1, 1] here: those of the dataset's action space, each number scaled by its own bounds; `make_env`'s
    environment scales them back.
    """

    @property
    def files(self) -> tuple[str, ...]:
        return (self.id.removeprefix("minari/"),)

    def folder(self, dataset_dir: str | os.PathLike | None = None) -> Path:
        default = Path.home() / ".minari" / "datasets"
        return Path(dataset_dir or os.environ.get("MINARI_DATASETS_PATH") or default).expanduser()

    def _fetch(self, path: Path) -> None:
        self.read(path)

    def _bad(self, fault: str) -> UserError:
        return UserError(f"dataset {self.id}: {fault}; use another dataset")

    def read(self, path: Path) -> Any:
        """The minari.MinariDataset, downloaded where it is missing. Raises UserError in one line."""
        try:
            import minari
        except ImportError:
            raise UserError(
                f"dataset {self.id}: needs the package minari: pip install -r requirements/data.txt"
            ) from None
        (name,) = self.files
        before = os.environ.get("MINARI_DATASETS_PATH")
        os.environ["MINARI_DATASETS_PATH"] = str(path.parents[name.count("/")])  # Minari knows its folder by this alone
        try:
            return minari.load_dataset(name, download=True)
        except Exception as error:  # the network and the file format fail in many ways
            raise UserError(
                f"dataset {self.id}: Minari cannot load it ({type(error).__name__}: {one_line(error)}); "
                f"`minari list remote` shows what there is, `minari download {name}` fetches it"
            ) from None
        finally:
            os.environ.pop("MINARI_DATASETS_PATH")
            if before is not None:
                os.environ["MINARI_DATASETS_PATH"] = before

    def transitions(self, dataset_dir: str | os.PathLike | None = None) -> dict[str, Any]:
        dataset = self.read(*self.paths(dataset_dir))
        for space, what in ((dataset.observation_space, "observations"), (dataset.action_space, "actions")):
            if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
                raise self._bad(f"{what} are {space}, not one row of numbers")
        space = dataset.action_space
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        if not (np.isfinite([low, high]).all() and (low < high).all()):
            raise self._bad(f"actions are without bounds ({space})")
        parts = [self._rows(episode) for episode in dataset.iterate_episodes()]
        if not parts:
            raise self._bad("it has no episodes")
        names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
        columns = {name: np.concatenate(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}
        if not _is_unit(space):
            columns["actions"] = 2 * (columns["actions"] - low) / (high - low) - 1
        check_arrays(self._bad, columns, dataset.observation_space.shape + space.shape)
        np.clip(columns["actions"], -1, 1, out=columns["actions"])
        terminated, last = columns.pop("terminals"), columns.pop("timeouts")
        limit = getattr(dataset.env_spec, "max_episode_steps", None) or np.inf
        scored = self._references(dataset) is not None
        if not scored:
            warn(f"{self.id} has no reference returns: where a score is shown, it is the return")
        return columns | {
            "terminated": terminated,
            "truncated": last & ~terminated,
            "env_id": dataset.env_spec.id if dataset.env_spec else "unknown",
            "returns": whole_returns(columns["rewards"], terminated, np.flatnonzero(last), limit),
            "scored": scored,
        }

    @staticmethod
    def _rows(episode: Any) -> tuple[np.ndarray, ...]:
        """The columns of one episode, the last one a mark at its end."""
        observations, rewards = np.asarray(episode.observations), np.asarray(episode.rewards, np.float64)
        last = np.arange(len(rewards)) == len(rewards) - 1
        return observations[:-1], episode.actions, rewards, observations[1:], episode.terminations, last

    def make_env(self, dataset_dir: str | os.PathLike | None = None) -> gymnasium.Env:
        dataset = self.read(*self.paths(dataset_dir))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the recording had other versions of the packages
                env = dataset.recover_environment(eval_env=True, disable_env_checker=True)
        except Exception as error:  # an environment fails in its package's ways
            raise UserError(
                f"dataset {self.id}: its environment cannot be made here ({one_line(error)}); "
                "pip install -r requirements/data.txt, and put an own module's folder on PYTHONPATH"
            ) from None
        own, other = dataset.action_space, env.action_space
        if own.shape != other.shape or not (np.allclose(own.low, other.low) and np.allclose(own.high, other.high)):
            raise self._bad(f"actions are {own}, those of its environment {other}")
        return env if _is_unit(own) else gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))

    @staticmethod
    def _references(dataset: Any) -> tuple[float, float] | None:
        """Returns that score 0 and 100, where the dataset brings them."""
        low, high = (dataset.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max"))
        return None if low is None or high is None or low == high else (low, high)

    def score(self, returns: ArrayLike, dataset_dir: str | os.PathLike | None = None) -> np.ndarray:
        """As D4RL's, with the references that the dataset brings; the returns themselves where it has none."""
        references, returns = self._references(self.read(*self.paths(dataset_dir))), super().score(returns)
        return returns if references is None else 100.0 * (returns - references[0]) / (references[1] - references[0])


def _is_unit(space: gymnasium.spaces.Box) -> bool:
    return bool((space.low == -1).all() and (space.high == 1).all())


SINGLE_TASKS = {
    dataset_id: SingleTask(dataset_id)
    for name in ogbench_utils.DATASETS
    for task in ("", *(f"-task{number}" for number in range(1, 6)))
    for dataset_id in (f"{name.removesuffix('-v0')}-singletask{task}-v0",)
}
DATASETS = {**ogbench_utils.DATASETS, **SINGLE_TASKS, **d4rl_utils.DATASETS, **dmc_utils.DATASETS}


def find_dataset(dataset_id: str) -> Dataset:
    """The dataset of any id; raises UserError, naming an id that is near where there is one."""
    if is_minari(dataset_id):
        if not re.fullmatch(r"minari(/[\w-]+)+", dataset_id):
            raise UserError(f"dataset {dataset_id!r}: after minari/ comes Minari's id, as in mujoco/hopper/medium-v0")
        return MinariDataset(dataset_id)
    return find(dataset_id, DATASETS, "a dataset of OGBench, D4RL or Minari (`make_dataset.py --list`, docs/data.md)")


def made_here(ids: list[str], dataset_dir: str | os.PathLike | None) -> dict[str, Any]:
    """What a run keeps of local datasets: their rows, and 12 hex digits of the SHA-256 of their file, or of all files.

    Empty where a dataset has no manifest, as official ones. Raises UserError for a file that is not its manifest's.
    """
    datasets = [find_dataset(dataset_id) for dataset_id in ids]
    manifests = [dataset.manifest(dataset_dir) for dataset in datasets]
    if None in manifests:
        return {}
    for dataset, manifest in zip(datasets, manifests, strict=True):
        if changed := dataset.changed(manifest, dataset_dir):
            raise UserError(dataset.id, changed)
    hashes = {name: entry["sha256"] for manifest in manifests for name, entry in manifest["files"].items()}
    listed = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    digest = next(iter(hashes.values())) if len(hashes) == 1 else hashlib.sha256(listed.encode()).hexdigest()
    return {"data_rows": sum(int(manifest["transitions"]) for manifest in manifests), "data_sha256": digest[:12]}


def is_minari(dataset_id: str) -> bool:
    return str(dataset_id).startswith("minari/")


def make_env(dataset_id: str, dataset_dir: str | os.PathLike | None = None) -> gymnasium.Env:
    """The environment that a dataset's policies are evaluated in, with its time limit.

    dataset_dir: for Minari alone, whose environments stand in the data.
    """
    return find_dataset(dataset_id).make_env(dataset_dir)


def data_scores(data: OfflineData, dataset_dir: str | os.PathLike | None = None) -> np.ndarray:
    """Scores of the dataset's own whole episodes, [E] float64, comparable with `normalized_score` of a policy's.

    A single task's recordings are shorter than an evaluation, so that their returns alone do not say who failed.
    """
    if data.reached is not None:
        return 100.0 * data.reached
    return normalized_score(data.dataset_id, data.returns, dataset_dir)


def normalized_score(dataset_id: str, returns: ArrayLike, dataset_dir: str | os.PathLike | None = None) -> np.ndarray:
    """Scores of undiscounted episode returns in `make_env`'s environment, any shape, float64: see each `score`."""
    return find_dataset(dataset_id).score(returns, dataset_dir)
