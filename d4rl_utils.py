"""D4RL's MuJoCo datasets: ids, folders, reading a file, episodes, environments.

Files keep D4RL's names and layout (Fu et al. 2020; https://github.com/Farama-Foundation/D4RL), one HDF5 a dataset:

    observations  next_observations  actions  rewards  terminals  timeouts  infos/qpos  infos/qvel  metadata/...

    <dataset_dir>/hopper_medium_replay-v2.hdf5        hopper-medium-replay-v2, the official file
    <dataset_dir>/local/hopper_medium_replay-v2.hdf5  local/hopper-medium-replay-v2, made by make_dataset.py
    <dataset_dir>/local/hopper_medium_replay-v2.json  its manifest

The `d4rl` package itself needs MuJoCo 2.1 and an old gym. Environments here are Gymnasium's v4, which have the rewards,
terminations and observations of the v2 environments that D4RL's v2 files come from, on a newer simulator.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import h5py
import numpy as np

from utils import UserError, one_line, warn

DATASET_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
MAX_EPISODE_STEPS = 1000  # steps after which D4RL's environments cut an episode

ENVIRONMENTS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
OFFICIAL_LEVELS = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
GENERATED_LEVELS = ("medium", "medium-replay", "medium-expert")
# What make_dataset.py can generate; its recipes must cover exactly these.
GENERATED_IDS = tuple(f"local/{robot}-{level}-v2" for robot in ENVIRONMENTS for level in GENERATED_LEVELS)

_FLAGS, _STATES = ("terminals", "timeouts"), ("infos/qpos", "infos/qvel")
_CHECK_ROWS = 1 << 16  # rows checked at a time, so that checks need no second copy of the data
# Deflate makes at most 1032 bytes of one. Beyond a size that does no harm, an array that declares more than that holds
# less than it says, and is not given the memory.
_MOST_EXPANSION, _HARMLESS_BYTES = 1032, 1 << 26


# ----------------------------------------------------------------------------------------------------------------
# Dataset ids and folders
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetId:
    """The parts of a dataset id such as `local/hopper-medium-replay-v2`."""

    id: str  # as given
    local: bool  # generated on this machine
    name: str  # without `local/`
    robot: str  # hopper, halfcheetah, walker2d
    level: str  # medium, medium-replay, ...
    env_id: str  # the Gymnasium environment, e.g. Hopper-v4

    @property
    def file_name(self) -> str:
        """D4RL's name of the file, e.g. hopper_medium_replay-v2.hdf5."""
        return f"{self.robot}_{self.level.replace('-', '_')}-v2.hdf5"

    @property
    def url(self) -> str | None:
        """D4RL's address of the official file; a local dataset has none."""
        return None if self.local else f"{DATASET_URL}/{self.file_name}"


@functools.lru_cache(maxsize=1)
def _known_ids() -> dict[str, DatasetId]:
    known = {}
    for robot, env_id in ENVIRONMENTS.items():
        for prefix, levels in (("", OFFICIAL_LEVELS), ("local/", GENERATED_LEVELS)):
            for level in levels:
                name = f"{robot}-{level}-v2"
                known[prefix + name] = DatasetId(prefix + name, bool(prefix), name, robot, level, env_id)
    return known


def official_ids() -> tuple[str, ...]:
    """Every id with an official file."""
    return tuple(name for name, dataset in _known_ids().items() if not dataset.local)


def parse_dataset_id(dataset_id: str) -> DatasetId:
    """Split a dataset id into its parts. Only listed ids pass, so an id can never point outside the dataset folder.

    Raises UserError, naming the nearest id that exists.
    """
    known = _known_ids()
    if dataset_id in known:
        return known[dataset_id]
    nearest = difflib.get_close_matches(str(dataset_id), known, n=1, cutoff=0.0)[0]
    raise UserError(
        f"--dataset {dataset_id!r} is not a D4RL MuJoCo dataset; did you mean {nearest!r}? Ids are "
        f"{{{','.join(ENVIRONMENTS)}}}-{{{','.join(OFFICIAL_LEVELS)}}}-v2, or local/<id> for "
        f"{', '.join(GENERATED_LEVELS)} made by make_dataset.py"
    )


def resolve_dataset_dir(dataset_dir: str | os.PathLike | None = None, local: bool = False) -> Path:
    """The dataset folder: the argument, else D4RL_DATASET_DIR, else D4RL's own ~/.d4rl/datasets.

    The last resort for local datasets is `datasets` beside this file.
    """
    default = Path(__file__).resolve().parent / "datasets" if local else "~/.d4rl/datasets"
    return Path(dataset_dir or os.environ.get("D4RL_DATASET_DIR") or default).expanduser()


def dataset_path(dataset_id: str, dataset_dir: str | os.PathLike | None = None) -> Path:
    """Where the dataset's HDF5 file is kept, whether or not it is there."""
    dataset = parse_dataset_id(dataset_id)
    folder = resolve_dataset_dir(dataset_dir, dataset.local)
    return (folder / "local" if dataset.local else folder) / dataset.file_name


def manifest_path(dataset_id: str, dataset_dir: str | os.PathLike | None = None) -> Path:
    """The JSON beside a local dataset's file, without which the file does not count."""
    return dataset_path(dataset_id, dataset_dir).with_suffix(".json")


# ----------------------------------------------------------------------------------------------------------------
# Reading a file
# ----------------------------------------------------------------------------------------------------------------


def _bad_file(path: Path, fault: str) -> UserError:
    return UserError(
        f"{path}: {fault}; delete the file and fetch it again (a local/ dataset: make_dataset.py --overwrite)"
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The HDF5 file open for reading; whatever HDF5 says of a damaged one becomes one line."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check --dataset_dir")
        with open(path, "rb"):  # HDF5 reports a file without read permission in its own words
            pass
        # Without a lock, because files are renamed into place whole and read-only folders cannot lock.
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except PermissionError:
        raise UserError(f"{path}: no permission to read it; change that, or --dataset_dir") from None
    except MemoryError:
        raise UserError(f"{path}: does not fit in memory; use a smaller dataset") from None
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise _bad_file(path, f"not a readable HDF5 file, or cut short ({one_line(error)})") from None


def outside_fault(file: h5py.File, key: str) -> str | None:
    """Why an array that is there is not read: the file says to look elsewhere, maybe in another file. None if it is.

    Nothing is followed to find out. A file from the internet must not make this process open other files.
    """
    place = file
    for name in key.split("/"):
        if not isinstance(place.get(name, getlink=True), h5py.HardLink):
            return "is a link, which is not followed"
        place = place[name]
    # Asked before its shape, which a virtual array may look up in the files that it names.
    if isinstance(place, h5py.Dataset) and (place.is_virtual or place.external):
        return "keeps its numbers in another file, which is not read"
    return None


def holds_too_little(shape: tuple[int, ...], item_bytes: int, stored_bytes: int) -> bool:
    """Whether an array declares more numbers than its bytes in the file can hold, and so many that they do harm."""
    return math.prod(shape) * item_bytes > max(_HARMLESS_BYTES, _MOST_EXPANSION * stored_bytes)


def _declared(path: Path, file: h5py.File, states: bool) -> dict[str, h5py.Dataset]:
    """The arrays to read by key, and whatever else lies in infos/: none of them is read yet, or outside the file.

    Raises UserError for a key missing, links and arrays kept elsewhere.
    """
    needed = ["observations", "actions", "rewards", "terminals", *(_STATES if states else ())]
    held = {name for name in file if isinstance(name, str)}  # damaged names are bytes
    if "infos" in held:
        fault = outside_fault(file, "infos")
        if fault:
            raise _bad_file(path, f"infos {fault}")
        infos = file["infos"]
        held |= {f"infos/{name}" for name in infos if isinstance(name, str)} if isinstance(infos, h5py.Group) else set()
    missing = [key for key in needed if key not in held]
    if missing:
        raise _bad_file(path, f"no array {missing[0]!r} (it holds {', '.join(sorted(held)) or 'nothing'})")
    optional = [key for key in ("next_observations", "timeouts") if key in held]
    rest = sorted(key for key in held if key.startswith("infos/") and key not in needed)
    for key in needed + optional + rest:
        fault = outside_fault(file, key)
        if fault:
            raise _bad_file(path, f"{key} {fault}")
    return {key: file[key] for key in needed + optional + rest}


def _check_declared(path: Path, items: dict[str, h5py.Dataset]) -> None:
    """Types, shapes and sizes of arrays that are not read yet. Raises UserError."""
    for key, item in items.items():
        if key.startswith("infos/") and key not in _STATES:
            continue
        flags = key in _FLAGS
        if not isinstance(item, h5py.Dataset) or item.dtype.kind not in ("biuf" if flags else "f"):
            expected = "bool" if flags else "float64" if key.startswith("infos/") else "float32"
            raise _bad_file(path, f"{key} has type {getattr(item, 'dtype', 'a group')}, expected {expected}")
        ndim, shape = 1 if flags or key == "rewards" else 2, item.shape or ()
        column = ndim == 1 and len(shape) == 2 and shape[1] == 1  # D4RL's loader takes [rows, 1] for [rows] too
        if not column and (len(shape) != ndim or 0 in shape[1:]):
            raise _bad_file(path, f"{key} has shape {shape}, expected [rows{', numbers' * (ndim - 1)}]")
    shapes = {key: getattr(item, "shape", None) or (None,) for key, item in items.items()}
    if len({shape[0] for shape in shapes.values()}) != 1 or shapes["observations"][0] == 0:
        listed = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise _bad_file(path, f"arrays do not have the same number of rows: {listed}")
    if shapes.get("next_observations", shapes["observations"]) != shapes["observations"]:
        raise _bad_file(path, f"next_observations {shapes['next_observations']} is not shaped as the observations")


def _check_sizes(path: Path, items: dict[str, h5py.Dataset]) -> None:
    """Raise UserError for arrays whose bytes are not in the file, and for more than this machine's memory holds."""
    total, file_bytes = 0, path.stat().st_size
    for key, item in items.items():
        stored = min(item.id.get_storage_size(), file_bytes)
        if holds_too_little(item.shape, item.dtype.itemsize, stored):
            raise _bad_file(path, f"{key} declares {item.shape}, which the {stored:,} bytes in the file cannot hold")
        total += math.prod(item.shape) * item.dtype.itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total > memory:
        gigabytes = f"its arrays take {total / 1e9:,.1f} GB, more than the {memory / 1e9:,.1f} GB here"
        raise UserError(f"{path}: {gigabytes}; use a smaller dataset")


def _read_floats(path: Path, item: h5py.Dataset, key: str) -> np.ndarray:
    """One array of real numbers as [rows] or [rows, numbers]. Raises UserError for NaN and infinity."""
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is found below
        array = np.ascontiguousarray(item[()], dtype=np.float64 if key.startswith("infos/") else np.float32)
    array = array.reshape(-1) if key == "rewards" else array
    for start in range(0, len(array), _CHECK_ROWS):
        good = np.isfinite(array[start : start + _CHECK_ROWS]).reshape(-1, array[:1].size).all(axis=1)
        if not good.all():
            raise _bad_file(path, f"{key} row {start + int(np.argmin(good))} holds NaN or infinity")
    return array


def _read_flags(path: Path, item: h5py.Dataset, key: str) -> np.ndarray:
    """One array of booleans [rows]; numbers that are 0 or 1 pass for them."""
    flags = item[()].reshape(-1)
    if flags.dtype != bool and not np.isin(flags, (0, 1)).all():
        raise _bad_file(path, f"{key} holds something other than 0 and 1")
    return flags.astype(bool)


def load_arrays(path: str | os.PathLike, states: bool = False) -> dict[str, np.ndarray]:
    """Read and check one D4RL file.

    Returns observations [N, obs_dim], actions [N, act_dim] and rewards [N] float32, terminals [N] bool, and, where the
    file has them, next_observations [N, obs_dim] float32 and timeouts [N] bool. A row is one transition; terminals says
    that the state after it is absorbing, timeouts that the episode was cut there. `states` adds infos/qpos and
    infos/qvel float64, the simulator's state before the step. metadata/ is not read.

    Raises UserError naming the file and the fault: unreadable or cut short, a key missing, wrong shapes or types, NaN,
    actions outside [-1, 1]; links, arrays that the file keeps in other files, and arrays that declare more numbers than
    their bytes hold or this machine's memory does. All that is declared is looked at before an array is read. The last
    row need not end an episode: in official files it often does not.
    """
    path = Path(path)
    with _opened(path) as file:
        items = _declared(path, file, states)
        _check_declared(path, items)
        items = {key: item for key, item in items.items() if not key.startswith("infos/") or states and key in _STATES}
        _check_sizes(path, items)
        arrays = {key: (_read_flags if key in _FLAGS else _read_floats)(path, item, key) for key, item in items.items()}
    # Squashed policies stay within 1 in float32; the tolerance is for rounding alone.
    beyond = np.flatnonzero(np.abs(arrays["actions"]).max(axis=1) > 1.0 + 1e-5)
    if len(beyond):
        raise _bad_file(path, f"actions row {beyond[0]} lies outside [-1, 1]")
    return arrays


# ----------------------------------------------------------------------------------------------------------------
# Episodes
# ----------------------------------------------------------------------------------------------------------------


def episode_ends(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Rows that end an episode, int64 [E], ascending, the last row included.

    Beside terminals and timeouts, an episode ends where next_observations is not the following row's observation.
    D4RL's medium-replay files do not mark every such place, and a file's last episode is often cut without a mark.
    """
    ends = arrays["terminals"].copy()
    ends |= arrays.get("timeouts", False)
    if "next_observations" in arrays:
        following, observations = arrays["next_observations"], arrays["observations"]
        for start in range(0, len(ends) - 1, _CHECK_ROWS):
            rows = slice(start, min(start + _CHECK_ROWS, len(ends) - 1))
            later = observations[rows.start + 1 : rows.stop + 1]
            ends[rows] |= np.abs(following[rows] - later).max(axis=1) > 1e-3  # a reset moves every robot further
    ends[-1] = True
    return np.flatnonzero(ends)


def episode_returns(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Undiscounted return of each episode, float64 [E]. rewards: [N]; ends: the rows that end an episode [E]."""
    starts = np.concatenate([[0], ends[:-1] + 1])
    return np.add.reduceat(rewards.astype(np.float64), starts)


# ----------------------------------------------------------------------------------------------------------------
# Environments
# ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_known_warnings() -> Iterator[None]:
    """Leave out what is known when a v4 environment is made: that there is a v5, and an attribute of its model file.

    MuJoCo would print the latter and write it to a log file in the working folder.
    """
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
    """The environment of a dataset: float64 observations, actions in [-1, 1], cut after 1000 steps.

    Raises UserError for an unknown id, and where the installed Gymnasium has no v4 environments.
    """
    dataset = parse_dataset_id(dataset_id)
    try:
        with _without_known_warnings():
            return gymnasium.make(dataset.env_id, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv:
        raise UserError(
            f"{dataset.env_id} is not in the installed gymnasium {gymnasium.__version__}; install the one that "
            "requirements.txt names"
        ) from None


def replay(
    env: gymnasium.Env, qpos: np.ndarray, qvel: np.ndarray, actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Take each recorded action from its recorded state: next observations [N, obs_dim] and rewards [N], float32.

    qpos [N, nq] and qvel [N, nv] are the states before the steps, actions [N, act_dim]. States in float64 reproduce a
    recorded file exactly on the same MuJoCo. Rounded to float32 they miss the next observation by more than 1e-4 in
    about one row of 1000 in halfcheetah and one of 20,000 in walker2d, where a contact begins or ends.
    """
    simulator = env.unwrapped
    env.reset(seed=0)
    observations = np.empty((len(actions), *env.observation_space.shape), dtype=np.float32)
    rewards = np.empty(len(actions), dtype=np.float32)
    for row, action in enumerate(actions):
        simulator.set_state(qpos[row].astype(np.float64), qvel[row].astype(np.float64))
        observations[row], rewards[row] = simulator.step(action)[:2]
    return observations, rewards
