"""D4RL's MuJoCo and AntMaze datasets: ids, files, transitions, environments, scores.

Files keep D4RL's names and layout (Fu et al. 2020; https://github.com/Farama-Foundation/D4RL), one HDF5 a dataset:

    observations  next_observations  actions  rewards  terminals  timeouts  infos/qpos  infos/qvel  metadata/...

    <dataset_dir>/hopper_medium_replay-v2.hdf5        hopper-medium-replay-v2, the official file
    <dataset_dir>/Ant_maze_u-maze_..._fixed.hdf5      antmaze-umaze-v2, likewise: see ANTMAZES for the names
    <dataset_dir>/local/hopper_medium_replay-v2.hdf5  local/hopper-medium-replay-v2, made by make_dataset.py
    <dataset_dir>/local/hopper_medium_replay-v2.json  its manifest

The `d4rl` package itself needs MuJoCo 2.1 and an old gym. Environments here are Gymnasium's v4, which have the rewards,
terminations and observations of the v2 environments that D4RL's v2 files come from, on a newer simulator. Antmazes are
built here from OGBench's copy of D4RL's ant and D4RL's maps, see AntMaze; gymnasium-robotics' own differ in the ant's
actuators (five times as strong), contacts, the length of a step (0.05 s, not 0.1) and the coordinates, so that a policy
trained on D4RL's files would not find its way in them.
"""

from __future__ import annotations

import contextlib
import difflib
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
import h5py
import numpy as np
from numpy.typing import ArrayLike

from dataset_files import read_manifest
from downloads import download
from utils import UserError, one_line, warn

DATASET_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
ANTMAZE_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/ant_maze_v2"
MAX_EPISODE_STEPS = 1000  # steps after which D4RL's MuJoCo environments cut an episode

ENVIRONMENTS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
OFFICIAL_LEVELS = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
GENERATED_LEVELS = ("medium", "medium-replay", "medium-expert")
# What make_dataset.py can generate; its recipes must cover exactly these.
GENERATED_IDS = tuple(f"local/{robot}-{level}-v2" for robot in ENVIRONMENTS for level in GENERATED_LEVELS)
# D4RL's file of each antmaze level; the names are those of the d4rl package's infos.py.
ANTMAZES = {
    "umaze": "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
    "umaze-diverse": "Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
    "medium-play": "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
    "medium-diverse": "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
    "large-play": "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
    "large-diverse": "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
}
REPLAY_ROWS = {"halfcheetah": 202_000, "hopper": 402_000, "walker2d": 302_000}  # of the medium-replay files
_DIMENSIONS = {"hopper": (11, 3), "halfcheetah": (17, 6), "walker2d": (17, 6), "antmaze": (29, 8)}

# Returns that score 0 and 100 (d4rl/infos.py); every v2 dataset of a robot has the same.
REFERENCE_RETURNS = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
}

_FLAGS, _STATES = ("terminals", "timeouts"), ("infos/qpos", "infos/qvel")
_CHECK_ROWS = 1 << 14  # rows checked at a time, so that checks need no second copy of the data
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
    robot: str  # hopper, halfcheetah, walker2d, antmaze
    level: str  # medium, medium-replay, ...; umaze, medium-play, ...
    env_id: str  # the Gymnasium environment, e.g. Hopper-v4, or D4RL's name of the maze, e.g. antmaze-umaze

    @property
    def file_name(self) -> str:
        """D4RL's name of the file, e.g. hopper_medium_replay-v2.hdf5."""
        if self.robot == "antmaze":
            return ANTMAZES[self.level]
        return f"{self.robot}_{self.level.replace('-', '_')}-v2.hdf5"

    @property
    def url(self) -> str | None:
        """D4RL's address of the official file; a local dataset has none."""
        if self.local:
            return None
        return f"{ANTMAZE_URL if self.robot == 'antmaze' else DATASET_URL}/{self.file_name}"

    @property
    def max_episode_steps(self) -> int:
        """Steps after which D4RL's environment cuts an episode."""
        return 700 if self.env_id == "antmaze-umaze" else MAX_EPISODE_STEPS


@functools.lru_cache(maxsize=1)
def _known_ids() -> dict[str, DatasetId]:
    known = {}
    for robot, env_id in ENVIRONMENTS.items():
        for prefix, levels in (("", OFFICIAL_LEVELS), ("local/", GENERATED_LEVELS)):
            for level in levels:
                name = f"{robot}-{level}-v2"
                known[prefix + name] = DatasetId(prefix + name, bool(prefix), name, robot, level, env_id)
    for level in ANTMAZES:
        name = f"antmaze-{level}-v2"
        known[name] = DatasetId(name, False, name, "antmaze", level, f"antmaze-{level.split('-')[0]}")
    return known


def official_ids() -> tuple[str, ...]:
    """Every id with an official file."""
    return tuple(name for name, dataset in _known_ids().items() if not dataset.local)


def parse_dataset_id(dataset_id: str) -> DatasetId:
    """Split a dataset id into its parts. Only listed ids pass, so an id can never point outside the dataset folder.

    Raises UserError, naming an id that is near where there is one.
    """
    known = _known_ids()
    if dataset_id in known:
        return known[dataset_id]
    nearest = difflib.get_close_matches(str(dataset_id), known, n=1, cutoff=0.7)
    hint = f"did you mean {nearest[0]!r}? Ids" if nearest else "ids"
    raise UserError(
        f"--dataset {dataset_id!r} is not a D4RL MuJoCo or AntMaze dataset; {hint} are "
        f"{{{','.join(ENVIRONMENTS)}}}-{{{','.join(OFFICIAL_LEVELS)}}}-v2, antmaze-{{{','.join(ANTMAZES)}}}-v2, or "
        f"local/<id> for {', '.join(GENERATED_LEVELS)} made by make_dataset.py"
    )


def is_official(dataset_id: str, transitions: int) -> bool | None:
    """Whether so many transitions can be D4RL's own file: at least nine tenths of its rows, whatever a file is called.

    None for an id that is not D4RL's, or whose file has a size that is not known here.
    """
    robot, _, level = dataset_id.removesuffix("-v2").partition("-")
    if dataset_id not in official_ids() or level in ("random", "expert", "full-replay"):
        return None
    rows = REPLAY_ROWS[robot] if "replay" in level else 2_000_000 if level == "medium-expert" else 1_000_000
    return transitions >= 0.9 * rows


def resolve_dataset_dir(dataset_dir: str | os.PathLike | None = None, local: bool = False) -> Path:
    """The dataset folder: the argument, else D4RL_DATASET_DIR, else D4RL's own ~/.d4rl/datasets.

    The last resort for local datasets is `datasets` beside this file. Raises UserError where it is a file.
    """
    default = Path(__file__).resolve().parent / "datasets" if local else "~/.d4rl/datasets"
    folder = Path(dataset_dir or os.environ.get("D4RL_DATASET_DIR") or default).expanduser()
    if folder.is_file():
        raise UserError(f"--dataset_dir {folder}: is a file; give the folder that holds it, {folder.parent}")
    return folder


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
    return UserError(f"{path}: {fault}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    if path.parent.name == "local":
        return "make it again with make_dataset.py --overwrite, or choose another --dataset_dir"
    return "choose another --dataset_dir, or move the file away and it is fetched again"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The HDF5 file open for reading; whatever HDF5 says of a damaged one becomes one line."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check --dataset_dir")
        with open(path, "rb"):  # HDF5 reports a file without read permission in its own words
            pass
        # Without a lock, because files are renamed into place whole and read-only folders cannot lock. Without a cache
        # of chunks, because each is read once: HDF5 and malloc would keep a third of the data's size.
        with h5py.File(path, "r", locking=False, rdcc_nbytes=0) as file:
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
    for start in range(0, len(arrays["actions"]), _CHECK_ROWS):
        # Squashed policies stay within 1 in float32; the tolerance is for rounding alone.
        beyond = np.abs(arrays["actions"][start : start + _CHECK_ROWS]).max(axis=1) > 1.0 + 1e-5
        if beyond.any():
            raise _bad_file(path, f"actions row {start + int(np.argmax(beyond))} lies outside [-1, 1]")
    return arrays


def _load_checked(path: Path, dataset: DatasetId) -> dict[str, np.ndarray]:
    """`load_arrays`, and the numbers a row must be those of the id's robot."""
    arrays = load_arrays(path)
    found = (arrays["observations"].shape[1], arrays["actions"].shape[1])
    expected = _DIMENSIONS[dataset.robot]
    if found != expected:
        raise _bad_file(path, f"{found[0]} observation and {found[1]} action numbers a row, not {expected}")
    return arrays


# ----------------------------------------------------------------------------------------------------------------
# Finding and downloading files
# ----------------------------------------------------------------------------------------------------------------


def ensure_dataset(dataset_id: str, dataset_dir: str | os.PathLike | None = None, base_url: str | None = None) -> Path:
    """Path of the dataset's file; an official one that is missing is downloaded and checked first.

    `base_url` stands for D4RL's address. A file that is there is used without touching the network. Raises UserError
    for an unknown id, a local dataset that is missing or incomplete, and a download that fails; it then names the
    address, and where to put the file by hand.
    """
    dataset = parse_dataset_id(dataset_id)
    path = dataset_path(dataset_id, dataset_dir)
    if dataset.local:
        manifest = read_manifest(manifest_path(dataset_id, dataset_dir), dataset_id)
        if manifest is None or set(manifest["files"]) != {path.name}:
            folder = f" --dataset_dir {dataset_dir}" if dataset_dir else ""
            raise UserError(
                f"{dataset_id}: no complete dataset at {path}; make it with "
                f"`python make_dataset.py --dataset {dataset_id}{folder}`"
            )
    elif not path.exists():
        advice = f"put {path.name} into {path.parent} by hand"
        if f"local/{dataset_id}" in GENERATED_IDS:
            advice += f", or use --dataset local/{dataset_id}, which is made on this machine"
        url = f"{base_url.rstrip('/')}/{path.name}" if base_url else dataset.url
        download(url, path, functools.partial(_load_checked, dataset=dataset), advice)
    return path


# ----------------------------------------------------------------------------------------------------------------
# Episodes
# ----------------------------------------------------------------------------------------------------------------


def episode_ends(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Rows that end an episode, int64 [E], ascending, the last row included.

    Beside terminals and timeouts, an episode ends where next_observations is not the following row's observation.
    D4RL's medium-replay files do not mark every such place, and a file's last episode is often cut without a mark. In
    a file that has neither timeouts nor next_observations it ends after 1000 steps, as D4RL has it.
    """
    ends = arrays["terminals"].copy()
    ends |= arrays.get("timeouts", False)
    if "next_observations" not in arrays and "timeouts" not in arrays:
        _cut_after(ends, MAX_EPISODE_STEPS)
    if "next_observations" in arrays:
        following, observations = arrays["next_observations"], arrays["observations"]
        for start in range(0, len(ends) - 1, _CHECK_ROWS):
            rows = slice(start, min(start + _CHECK_ROWS, len(ends) - 1))
            later = observations[rows.start + 1 : rows.stop + 1]
            ends[rows] |= np.abs(following[rows] - later).max(axis=1) > 1e-3  # a reset moves every robot further
    ends[-1] = True
    return np.flatnonzero(ends)


def _cut_after(ends: np.ndarray, steps: int) -> None:
    """Mark a further end after every `steps` rows without one, in place. ends: bool [N]."""
    first = 0
    for end in [*np.flatnonzero(ends).tolist(), len(ends)]:
        ends[first + steps - 1 : end : steps] = True
        first = end + 1


def _maze_episode_ends(arrays: dict[str, np.ndarray], max_episode_steps: int) -> np.ndarray:
    """Like `episode_ends` for antmaze files, whose recording goes on at the goal: row after row there is a terminal.

    An episode ends at a timeout, or where the ant is elsewhere in the next row: it walks less than 1 m a step.
    """
    ends = np.zeros(len(arrays["rewards"]), dtype=bool)
    place = arrays["observations"][:, :2]
    ends[:-1] = np.abs(place[1:] - place[:-1]).max(axis=1) > 1.0
    if "timeouts" in arrays:
        ends |= arrays["timeouts"]
    else:
        _cut_after(ends, max_episode_steps)
    ends[-1] = True
    return np.flatnonzero(ends)


def episode_returns(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Undiscounted return of each episode, float64 [E]. rewards: [N]; ends: the rows that end an episode [E]."""
    starts = np.concatenate([[0], ends[:-1] + 1])
    return np.add.reduceat(rewards.astype(np.float64), starts)


# ----------------------------------------------------------------------------------------------------------------
# Transitions
# ----------------------------------------------------------------------------------------------------------------


def task_returns(rewards: np.ndarray, terminated: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Undiscounted return of each episode up to its first termination, where an evaluation would end, float64 [E].

    rewards [N], terminated [N] bool; ends: the rows that end an episode [E]. Differs from `episode_returns` only where
    the recording goes on after the goal.
    """
    starts = np.concatenate([[0], ends[:-1] + 1])
    terminations = np.append(np.flatnonzero(terminated), len(terminated))
    first = terminations[np.searchsorted(terminations, starts)]
    lasts = np.minimum(ends, first)
    # An episode at a time: a million rows in float64 would be a tenth of the data.
    return np.array([rewards[a : b + 1].sum(dtype=np.float64) for a, b in zip(starts, lasts, strict=True)])


def take_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """array[rows] in the array's own memory, which is overwritten. rows: ascending."""
    for start in range(0, len(rows), _CHECK_ROWS):
        block = rows[start : start + _CHECK_ROWS]
        array[start : start + len(block)] = array[block]
    return array[: len(rows)]


def following_rows(observations: np.ndarray, rows: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """The observation after each of `rows`, [n, obs_dim]; the row's own where unknown [n] bool."""
    following = np.empty((len(rows), observations.shape[1]), dtype=observations.dtype)
    for start in range(0, len(rows), _CHECK_ROWS):
        block = slice(start, start + _CHECK_ROWS)
        following[block] = observations[rows[block] + ~unknown[block]]
    return following


def load_transitions(
    dataset_id: str, dataset_dir: str | os.PathLike | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A dataset's transitions, and the returns of its whole episodes, as `task_returns` has them.

    Returns ({observations [N, obs_dim], actions [N, act_dim], rewards [N], next_observations [N, obs_dim] float32,
    terminated [N] and truncated [N] bool}, returns [E] float64). A transition is terminated where the file says
    `terminals`; truncated where its episode goes no further for another reason. The last episode counts as whole only
    where the file marks its end, or where it is the only one.

    Where the file has next_observations every row is a transition. Otherwise they are the next row's, as in D4RL's
    `qlearning_dataset`: rows at a timeout or at an unmarked end, whose next observation is not in the file, are left
    out, and so is the last one. Rows at a terminal stay; what follows them is not in the file either and never
    bootstrapped from, so they carry their own observation (D4RL has the next episode's first). D4RL itself takes the
    next row in all files; where next_observations are there, this keeps one more transition an episode.

    Raises UserError as `ensure_dataset` and `load_arrays` do.
    """
    dataset = parse_dataset_id(dataset_id)
    path = ensure_dataset(dataset_id, dataset_dir)
    arrays = _load_checked(path, dataset)
    terminated, timeouts = arrays["terminals"], arrays.get("timeouts")
    maze = dataset.robot == "antmaze"
    ends = _maze_episode_ends(arrays, dataset.max_episode_steps) if maze else episode_ends(arrays)
    returns = task_returns(arrays["rewards"], terminated, ends)
    marked = terminated[-1] or (timeouts is not None and timeouts[-1])
    returns = returns if marked or len(returns) == 1 else returns[:-1]
    truncated = np.zeros(len(terminated), dtype=bool)
    truncated[ends] = ~terminated[ends]
    columns = {key: arrays.pop(key) for key in ("observations", "actions", "rewards")}
    if "next_observations" in arrays:
        columns["next_observations"] = arrays["next_observations"]
        return columns | {"terminated": terminated, "truncated": truncated}, returns
    dropped = truncated | timeouts if timeouts is not None else truncated.copy()
    dropped[-1] = True
    truncated[:-1] = dropped[1:] & ~terminated[:-1]  # the last one kept of an episode
    rows = np.flatnonzero(~dropped)
    if len(rows) == 0:
        raise _bad_file(path, "no two rows of one episode follow each other")
    columns["next_observations"] = following_rows(columns["observations"], rows, terminated[rows])
    columns |= {"terminated": terminated, "truncated": truncated}
    for key in ("observations", "actions", "rewards", "terminated", "truncated"):
        columns[key] = take_rows(columns[key], rows)
    return columns, returns


# ----------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------


def normalized_score(dataset_id: str, returns: ArrayLike) -> np.ndarray:
    """D4RL's score of undiscounted returns of any shape: 0 is a random policy, 100 D4RL's expert, float64.

    A local dataset has its robot's references. In antmaze the score is 100 for an episode that reaches the goal, with
    the environment's rewards of 0 and 1. Raises UserError for an unknown id.
    """
    low, high = REFERENCE_RETURNS[parse_dataset_id(dataset_id).robot]
    return 100.0 * (np.asarray(returns, dtype=np.float64) - low) / (high - low)


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
    """The environment of a dataset: float64 observations, actions in [-1, 1], cut after D4RL's number of steps.

    Raises UserError for an unknown id, and where the installed Gymnasium has no v4 environments.
    """
    dataset = parse_dataset_id(dataset_id)
    if dataset.robot == "antmaze":
        env = AntMaze(dataset.env_id.removeprefix("antmaze-"))
        return gymnasium.wrappers.TimeLimit(env, dataset.max_episode_steps)
    try:
        with _without_known_warnings():
            return gymnasium.make(dataset.env_id, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv:
        raise UserError(
            f"{dataset.env_id} is not in the installed gymnasium {gymnasium.__version__}; install the one that "
            "requirements.txt names"
        ) from None


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
        """x and y of the middle of a cell [row, column]."""
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
