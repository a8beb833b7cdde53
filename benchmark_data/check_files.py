"""Reading a dataset for `--check`: all that can be read, as it is stored, with what is wrong as findings.

The loaders of ogbench_utils, d4rl_utils and dmc_utils stop at the first fault; here only a path that is no
dataset raises. Nothing pickled is loaded, no link out of a file is followed, and no array gets memory that its bytes
in the file cannot fill.
"""

from __future__ import annotations

import functools
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import d4rl_utils
import dmc_utils
import ogbench_utils
from benchmark_data.check_robots import ROBOTS, RUNNER_STEPS, Robot
from ogbench_utils import Maze
from utils import UserError, one_line, progress

FAULT, NOTE = "fault", "note"
BLOCK = 1 << 16  # rows looked at together, so that no check needs a copy of the data

# Rows an episode in OGBench's own generation commands.
_RECIPE_ROWS = {"navigate": 1001, "stitch": 201, "explore": 501}
_LONG_ROWS = {
    ("pointmaze", "giant", "navigate"): 2001,
    ("antmaze", "giant", "navigate"): 2001,
    ("humanoidmaze", "medium", "navigate"): 2001,
    ("humanoidmaze", "large", "navigate"): 2001,
    ("humanoidmaze", "giant", "navigate"): 4001,
    **{("humanoidmaze", size, "stitch"): 401 for size in ("medium", "large", "giant")},
}


_MOST_EXPANSION, _HARMLESS_BYTES = 1032, 1 << 26  # deflate makes at most so much of a byte


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


@dataclass(frozen=True)
class Finding:
    """One thing found."""

    severity: str  # FAULT or NOTE
    what: str  # in words; equal words in several places become one finding
    where: str = ""  # the first place
    count: int = 1  # places

    def line(self) -> str:
        places = f" ({self.count:,} places, first: {self.where})" if self.count > 1 and self.where else ""
        return f"{self.what}{places or (f' ({self.where})' if self.where else '')}"


# ----------------------------------------------------------------------------------------------------------------
# Arrays in a file
# ----------------------------------------------------------------------------------------------------------------


class Damaged(Exception):
    """A file, or one array of it, cannot be read; the message says why."""


@dataclass(frozen=True)
class Stored:
    """An array in a file, not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # raises Damaged


@dataclass(frozen=True)
class Column:
    """An array of a layout."""

    key: str  # in the file
    name: str  # here
    ndim: int
    required: bool = True
    flags: bool = False  # 0 and 1; else float32


_D4RL_COLUMNS = (
    Column("observations", "observations", 2),
    Column("actions", "actions", 2),
    Column("rewards", "rewards", 1),
    Column("terminals", "terminals", 1, flags=True),
    Column("timeouts", "timeouts", 1, required=False, flags=True),
    Column("next_observations", "next_observations", 2, required=False),
)
LAYOUTS = {
    "ogbench": (_D4RL_COLUMNS[0], _D4RL_COLUMNS[1], _D4RL_COLUMNS[3]),
    "d4rl": _D4RL_COLUMNS,
    "walker": tuple(
        Column(key, {"physics": key}.get(key, f"{key}s"), 1 if width == 1 else 2)
        for key, width in dmc_utils.EPISODE_COLUMNS.items()
    ),
}
LAYOUT_NAMES = {"ogbench": "OGBench maze", "d4rl": "D4RL", "walker": "walker study"}
_NPZ_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError, struct.error)
_HDF5_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError)


def _check_type(shape: tuple[int, ...], dtype: np.dtype, stored_bytes: int) -> None:
    """Raise Damaged for arrays that are not plain numbers, or that declare more than `stored_bytes` can hold."""
    if dtype.kind not in "biuf" or dtype.itemsize > 16:
        raise Damaged(f"holds {dtype}, not plain numbers; it is not read")
    if min(shape, default=0) < 0 or holds_too_little(shape, dtype.itemsize, stored_bytes):
        declared = math.prod(shape) * dtype.itemsize
        raise Damaged(f"declares {shape}, {declared:,} bytes, which the {stored_bytes:,} in the file cannot hold")


def npz_arrays(path: Path) -> dict[str, Stored]:
    """The arrays of an npz file by key; one that is no plain array raises Damaged when it is read. Nothing pickled is
    ever loaded. Raises Damaged for what is no whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _npz_array(path, archive, info) for info in archive.infolist()}
    except (*_NPZ_ERRORS, OSError) as error:
        begin, size = _first_bytes(path)
        _raise_if_other(begin, b"PK", "an npz archive")
        missing = "the directory at the archive's end is missing" if "not a zip" in str(error) else one_line(error)
        raise Damaged(f"the file is cut short or damaged: {missing} ({size:,} bytes are there)") from None


def _npz_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Stored:
    def fail() -> np.ndarray:
        raise Damaged(problem)

    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as again, again.open(info.filename) as member:
                return np.lib.format.read_array(member, allow_pickle=False)
        except MemoryError:
            raise
        except Exception as error:  # as below
            raise Damaged(f"cannot be read: it is damaged or cut short ({one_line(error)})") from None

    shape, dtype = (), np.dtype(bool)
    try:
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in header:
                raise Damaged(f"has NumPy format {version}, which plain arrays do not need; it is not read")
            shape, _, dtype = header[version](member)
            begin = member.tell()
        _check_type(shape, dtype, info.compress_size)
        if math.prod(shape) * dtype.itemsize != info.file_size - begin:
            raise Damaged(f"declares {shape} of {dtype}, but {info.file_size - begin:,} bytes are there")
        return Stored(shape, dtype, read)
    except Damaged as error:
        problem = str(error)
    except Exception as error:  # NumPy's parser of headers answers damaged ones with whatever it meets
        problem = f"cannot be read: it is damaged ({one_line(error)})"
    return Stored(shape, dtype, fail)


def hdf5_arrays(path: Path) -> dict[str, Stored]:
    """The arrays of an HDF5 file by key, with those in infos/; metadata/ is left alone. Links out of the file are not
    followed. Raises Damaged for what is no whole file."""
    arrays = {}
    try:
        # Without a lock: nothing is written, and read-only folders cannot lock.
        with h5py.File(path, "r", locking=False) as file:
            # Damaged names are bytes.
            names = [name for name in file if isinstance(name, str) and name not in ("infos", "metadata")]
            if isinstance(file.get("infos", getlink=True), h5py.HardLink) and isinstance(file["infos"], h5py.Group):
                names += [f"infos/{name}" for name in file["infos"] if isinstance(name, str)]
            for name in names:
                arrays[name] = _hdf5_array(path, file, name)
    except _HDF5_ERRORS as error:
        begin, size = _first_bytes(path)
        _raise_if_other(begin, b"\x89HDF", "an HDF5 file")
        whole = re.search(r"stored_eof = (\d+)", str(error))
        if whole:
            raise Damaged(f"the file is cut short: {size:,} of {int(whole[1]):,} bytes are there") from None
        raise Damaged(f"the file is damaged: {one_line(error)}") from None
    return {name: array for name, array in arrays.items() if array is not None}


def _hdf5_array(path: Path, file: h5py.File, name: str) -> Stored | None:
    """The array `name` of an open file; None for a group."""

    def fail() -> np.ndarray:
        raise Damaged(problem)

    def read() -> np.ndarray:
        try:
            with h5py.File(path, "r", locking=False) as again:
                return again[name][()]
        except _HDF5_ERRORS as error:
            raise Damaged(f"cannot be read: it is damaged or cut short ({one_line(error)})") from None

    shape, dtype = (), np.dtype(bool)
    try:
        outside = outside_fault(file, name)
        if outside:
            raise Damaged(outside)
        item = file[name]
        if not isinstance(item, h5py.Dataset):
            return None
        if item.shape is None:
            raise Damaged("holds no array")
        shape, dtype = item.shape, item.dtype
        _check_type(shape, dtype, min(item.id.get_storage_size(), path.stat().st_size))
        return Stored(shape, dtype, read)
    except Damaged as error:
        problem = str(error)
    except _HDF5_ERRORS as error:
        problem = f"cannot be read ({one_line(error)})"
    return Stored(shape, dtype, fail)


def _raise_if_other(begin: bytes, magic: bytes, kind: str) -> None:
    if not begin:
        raise Damaged("the file is empty: it was cut short")
    if not begin.startswith(magic[: len(begin)]):
        raise Damaged(f"the file is not {kind}: it begins with {begin!r}")


def _first_bytes(path: Path) -> tuple[bytes, int]:
    """What a file begins with, and its size. Raises UserError where it may not be read: the data is not at fault."""
    try:
        with open(path, "rb") as file:
            return file.read(8), path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); change its permissions") from None


# ----------------------------------------------------------------------------------------------------------------
# One dataset
# ----------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """A dataset as far as it could be read; arrays of all columns have the same number of rows."""

    path: Path
    layout: str
    dataset_id: str
    robot_key: str | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # by Column.name; rewards and flags are [N]
    extra: dict[str, Stored] = field(default_factory=dict)  # qpos, qvel, infos/*: read one at a time
    findings: list[Finding] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # of a walker dataset, with `starts`
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # first row of each episode
    flagged: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # rows that the file says end an episode
    memory: dict[str, Any] = field(default_factory=dict)  # what checks share

    @property
    def rows(self) -> int:
        return len(self.columns["observations"]) if "observations" in self.columns else 0

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts, append=self.rows)

    @property
    def robot(self) -> Robot | None:
        return ROBOTS.get(self.robot_key)

    @property
    def maze_id(self) -> ogbench_utils.MazeDataset | None:
        """The parts of an OGBench id."""
        try:
            return ogbench_utils.parse_dataset_id(self.dataset_id) if self.layout == "ogbench" else None
        except UserError:
            return None

    @property
    def from_rlkit(self) -> bool:
        """A replay buffer as D4RL's own converter writes it: float64, and with episode ends that no flag marks."""
        return bool(re.search(r"replay|mixed", self.dataset_id)) and "infos/action_log_probs" in self.extra

    @functools.cached_property
    def recipe_rows(self) -> int | None:
        """Rows an episode by the recipe of the name."""
        parts = self.maze_id
        if parts is None:
            return dmc_utils.EPISODE_STEPS + 1 if self.layout == "walker" else None
        return _LONG_ROWS.get((parts.maze_env, parts.maze_size, parts.task_type), _RECIPE_ROWS[parts.task_type])

    @functools.cached_property
    def _maze_env(self) -> Any:
        return ogbench_utils.make_env(self.dataset_id).unwrapped

    @functools.cached_property
    def maze(self) -> Maze | None:
        return Maze.from_env(self._maze_env) if self.maze_id else None

    @functools.cached_property
    def teleport_exits(self) -> np.ndarray:
        """Where a maze's teleporters let out: [n, 2]."""
        if self.maze_id is None or self.maze_id.maze_size != "teleport":
            return np.zeros((0, 2))
        return np.array(self._maze_env._teleport_info["teleport_out_xys"], dtype=np.float64)

    def blocks(self, rows: int | None = None) -> Iterator[slice]:
        rows = self.rows if rows is None else rows
        return (slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK))

    def episode(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def at(self, row: int) -> str:
        """A row in words."""
        episode = self.episode(row)
        step = row - self.starts[episode]
        return f"{self.files[episode]} row {step}" if self.files else f"row {row:,}, episode {episode:,} step {step}"

    def fault(self, what: str, rows: Iterable[int] = (), count: int | None = None) -> Finding:
        return self._finding(FAULT, what, rows, count)

    def note(self, what: str, rows: Iterable[int] = (), count: int | None = None) -> Finding:
        return self._finding(NOTE, what, rows, count)

    def _finding(self, severity: str, what: str, rows: Iterable[int], count: int | None) -> Finding:
        rows = np.asarray(rows)
        return Finding(severity, what, self.at(int(rows[0])) if rows.size else "", count or max(rows.size, 1))


def open_data(path: Path) -> Data:
    """Read a dataset, keeping what is wrong in `findings`. Raises UserError for a path that cannot be one."""
    if path.is_dir():
        return _read_walker(path, _episode_files(path))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give the path of a dataset after --check")
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise UserError(f"{path}: not a dataset; --check takes an .npz, an .hdf5 or a folder of episode files")
    try:
        arrays = npz_arrays(path) if path.suffix == ".npz" else hdf5_arrays(path)
    except Damaged as error:
        layout = "d4rl" if path.suffix != ".npz" else "walker" if EPISODE_NAME.match(path.name) else "ogbench"
        return Data(path, layout, _name_of(path, layout), findings=[Finding(FAULT, str(error))])
    if path.suffix == ".npz" and (EPISODE_NAME.match(path.name) or {"observation", "physics"} <= set(arrays)):
        return _read_walker(path, [path])
    layout = "ogbench" if path.suffix == ".npz" else "d4rl"
    if not {column.key for column in LAYOUTS[layout]} & set(arrays):
        held = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(f"{path}: not a dataset of this kind: it holds {held[:200]}; see --check in --help")
    return _read_flat(path, layout, arrays)


SUFFIXES = (".npz", ".hdf5", ".h5")
_D4RL_NAMES = {d4rl_utils.parse_dataset_id(name).file_name: name for name in d4rl_utils.official_ids()}
EPISODE_NAME = re.compile(r"episode_(\d+)_(\d+)\.npz$")


def _episode_files(folder: Path) -> list[Path]:
    """The walker study's files of a folder or its data/. Raises UserError where there are none."""
    files = _episodes_in(folder)
    if files:
        return files
    raise UserError(
        f"{folder}: not a dataset: no episode_<index>_<steps>.npz in it or in its data/ folder; give such a folder, an "
        ".npz or .hdf5 file, or a dataset id after --check"
    )


def _episodes_in(folder: Path) -> list[Path]:
    """The walker study's files of a folder, or else of its data/."""
    for place in (folder, folder / "data"):
        files = sorted(path for path in place.glob("*.npz") if EPISODE_NAME.match(path.name))
        if files:
            return files
    return []


def only_dataset(folder: Path) -> Path:
    """The folder where it is a dataset or holds none, else the one dataset in it: a maze's train file for its two.

    Raises UserError, naming some, where there are several.
    """
    if _episodes_in(folder):
        return folder
    episodes = [path for depth in (1, 2, 3) for path in folder.glob("*/" * depth + "data/episode_*.npz")]
    files = [path for depth in (0, 1, 2) for end in SUFFIXES for path in folder.glob("*/" * depth + f"*{end}")]
    inside = {path.parent.parent for path in episodes}
    inside |= {path for path in files if not EPISODE_NAME.match(path.name)}
    inside |= {path.parent for path in files if EPISODE_NAME.match(path.name) and path.parent.name != "data"}
    # Hidden folders hold datasets that are being made.
    inside = {path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)}
    inside -= {path for path in inside if path.with_name(path.name.replace("-val.npz", ".npz")) in inside - {path}}
    if len(inside) > 1:
        names = ", ".join(map(str, sorted(inside)[:6])) + (f" and {len(inside) - 6} more" if len(inside) > 6 else "")
        raise UserError(f"{folder}: holds {len(inside)} datasets; check one of them: {names}")
    return inside.pop() if inside else folder


def _name_of(path: Path, layout: str) -> str:
    """The dataset id that the path says: official names as they are, local/ for what lies in a folder local/."""
    if layout == "walker":
        folder = path.absolute() if path.is_dir() else path.absolute().parent
        folder = folder.parent if folder.name == "data" else folder
        return ("local/" if folder.parent.parent.name == "local" else "") + folder.name
    if layout == "d4rl":
        stem = _D4RL_NAMES.get(path.name, path.stem.replace("_", "-"))  # its antmaze files have names of their own
    else:
        stem = path.stem.removesuffix("-val")
    return ("local/" if path.absolute().parent.name == "local" else "") + stem


def _read_columns(data: Data, arrays: dict[str, Stored], place: str = "") -> dict[str, np.ndarray]:
    """The layout's columns that can be read, cut to the same number of rows; what is wrong goes to data.findings."""
    columns, findings = {}, data.findings
    for column in LAYOUTS[data.layout]:
        if column.key not in arrays:
            if column.required:
                held = ", ".join(arrays) or "nothing"
                findings.append(Finding(FAULT, f"key missing: no array {column.key!r}; the file holds {held}", place))
            continue
        stored = arrays[column.key]
        try:
            array = stored.read()
        except Damaged as error:
            findings.append(Finding(FAULT, f"{column.key} {error}", place))
            continue
        # D4RL's own loader takes [rows, 1] for [rows]; the walker study writes it so.
        if column.ndim == 1 and array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != column.ndim or 0 in array.shape[1:]:
            shape = "[rows, numbers]" if column.ndim == 2 else "[rows]"
            findings.append(Finding(FAULT, f"wrong shape: {column.key} is {stored.shape}, not {shape}", place))
            continue
        findings += _type_findings(data, column, array, place)
        if column.flags or array.dtype.kind == "f":
            columns[column.name] = array
    lengths = {name: len(array) for name, array in columns.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {count:,}" for name, count in lengths.items())
        findings.append(Finding(FAULT, f"arrays have different numbers of rows, some were cut: {shown}", place))
    least = min(lengths.values(), default=0)
    if columns and least == 0:
        findings.append(Finding(FAULT, "the file holds no rows", place))
        return {}
    return {name: array[:least] for name, array in columns.items()}


def _type_findings(data: Data, column: Column, array: np.ndarray, place: str) -> Iterator[Finding]:
    """Types other than the layout's."""
    if column.flags:
        if not np.isin(array, (0, 1)).all():
            yield Finding(FAULT, f"{column.key} holds something other than 0 and 1", place)
        elif array.dtype != bool:
            yield Finding(NOTE, f"{column.key} is stored as {array.dtype} of 0 and 1, not bool; loaders cast it", place)
    elif array.dtype != np.float32:
        what = f"{column.key} is {array.dtype}, not float32"
        # TensorFlow Datasets lists D4RL's medium-replay and full-replay files of v1 and v2 as float64, and the script
        # that made antmaze's rewards leaves them in float64.
        relabelled = column.key == "rewards" and re.search("ant.?maze", data.dataset_id.lower())
        if array.dtype == np.float64 and (data.from_rlkit or relabelled):
            yield Finding(NOTE, f"{what}, as D4RL's own scripts leave it; loaders cast it", place)
        elif data.layout == "walker":
            yield Finding(FAULT, f"{what}: the study's loader here refuses it", place)
        else:
            what = f"{what}, as the benchmark writes it: another program wrote this file"
            yield Finding(FAULT, what, place)


def _read_flat(path: Path, layout: str, arrays: dict[str, Stored]) -> Data:
    data = Data(path, layout, _name_of(path, layout))
    known = {column.key for column in LAYOUTS[layout]}
    data.extra = {key: array for key, array in arrays.items() if key not in known}
    data.columns = _read_columns(data, arrays)
    if data.rows == 0:
        return data
    data.robot_key = _identify(data)
    if layout == "ogbench" and data.maze_id is None:
        what = "the name is no OGBench dataset's: neither walls nor the recipe's rows an episode are checked"
        data.findings.append(Finding(NOTE, what))
    flags = [data.columns[name] == 1 for name in ("terminals", "timeouts") if name in data.columns]
    if data.robot_key in ("d4rl antmaze", "d4rl maze2d") and len(flags) == 2:
        flags = flags[1:]  # terminals marks rows at the goal there, and the episode goes on
    data.flagged = functools.reduce(np.logical_or, flags, np.zeros(data.rows, bool))
    if layout == "d4rl" and "timeouts" not in data.columns and data.robot and data.robot.reward:
        _add_time_limits(data)
    ends = np.flatnonzero(data.flagged[:-1])
    data.starts = np.concatenate([[0], ends + 1])
    return data


def _add_time_limits(data: Data) -> None:
    """Cut episodes where D4RL's loader cuts a file without timeouts: at the time limit."""
    data.findings.append(
        Finding(NOTE, f"no timeouts: episodes are cut every {RUNNER_STEPS} steps, as D4RL's loader does")
    )
    start = 0
    for end in [*np.flatnonzero(data.flagged), data.rows - 1]:
        data.flagged[start + RUNNER_STEPS - 1 : end : RUNNER_STEPS] = True
        start = end + 1


def _identify(data: Data) -> str | None:
    """Key of ROBOTS, by the name or else by the numbers a row; a name that the numbers deny is a fault."""
    observations, actions = data.columns["observations"], data.columns.get("actions")
    if actions is None:
        return None
    dims = (observations.shape[1], actions.shape[1])
    name = data.dataset_id.lower()
    if data.layout == "ogbench":
        named = next((key for key in ("pointmaze", "antmaze", "humanoidmaze") if key in name), None)
        choices = ("pointmaze", "antmaze", "humanoidmaze")
    else:
        found = re.search(r"ant-?maze|maze2d|hopper|halfcheetah|walker2d|walker(?=-mixed)", name)
        spelt = {"antmaze": "d4rl antmaze", "ant-maze": "d4rl antmaze", "maze2d": "d4rl maze2d", "walker": "walker2d"}
        named = spelt.get(found.group(), found.group()) if found else None
        choices = ("d4rl antmaze", "d4rl maze2d", "hopper", "halfcheetah", "walker2d")
    if named and ROBOTS[named].dims == dims:
        return named
    if named:
        expected = "{} observation and {} action numbers a row".format(*ROBOTS[named].dims)
        data.findings.append(Finding(FAULT, f"wrong shape: {named} has {expected}, the file {dims[0]} and {dims[1]}"))
        return None
    if data.layout == "d4rl":
        data.findings.append(Finding(NOTE, "the name tells no robot of D4RL's: it is taken from the numbers a row"))
    fitting = [key for key in choices if ROBOTS[key].dims == dims]
    if len(fitting) == 2:  # halfcheetah starts at height 0, walker2d at 1.25
        fitting = ["walker2d" if observations[0, 0] > 0.6 else "halfcheetah"]
    if not fitting:
        data.findings.append(
            Finding(NOTE, f"unknown robot, {dims[0]} observation and {dims[1]} action numbers a row: few checks apply")
        )
    return fitting[0] if fitting else None


def _read_walker(path: Path, files: list[Path]) -> Data:
    """All episodes end to end; an episode file that cannot be read is left out."""
    data = Data(path, "walker", _name_of(path, "walker"), "walker")
    parts, names = [], {column.name for column in LAYOUTS["walker"]}
    bar = progress(files, "reading episodes", disable=None if len(files) > 200 else True)
    for file in bar:
        try:
            columns = _read_columns(data, npz_arrays(file), file.name)
        except Damaged as error:
            data.findings.append(Finding(FAULT, str(error), file.name))
            continue
        widths = {key: columns[name].shape[1] for key, name in _WIDE.items() if name in columns}
        wrong = [key for key, width in widths.items() if width != dmc_utils.EPISODE_COLUMNS[key]]
        for key in wrong:
            expected = dmc_utils.EPISODE_COLUMNS[key]
            what = f"wrong shape: {key} has {widths[key]} numbers a row, walker has {expected}"
            data.findings.append(Finding(FAULT, what, file.name))
        if set(columns) == names and not wrong:
            parts.append(columns)
            data.files.append(file.name)
    if parts:
        data.columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        lengths = [len(part["observations"]) for part in parts]
        data.starts = np.cumsum([0, *lengths[:-1]])
        data.flagged = np.zeros(data.rows, bool)
        data.flagged[np.cumsum(lengths) - 1] = True
    return data


_WIDE = {column.key: column.name for column in LAYOUTS["walker"] if column.ndim == 2}
