"""Data files of every benchmark: dataset ids, where the files are, reading, checks, downloads. No pickle is loaded."""

import abc
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from utils import UserError, did_you_mean, exclusive, one_line, progress

BLOCK_ROWS = 1 << 14  # rows checked at a time, so that checks need no second copy of the data
Bad = Callable[[str], UserError]  # of a fault: the error that names the file and what to do about it


@dataclass(frozen=True)
class Dataset(abc.ABC):
    """One dataset id: where its files are kept and how they get there. Each benchmark adds what they hold.

    `<name>` is the official dataset and nothing else. `local/<name>` was made on this machine by make_dataset.py, and
    counts only with its manifest, which is written last:

        <folder>/hopper_medium-v2.hdf5            hopper-medium-v2
        <folder>/local/hopper_medium-v2.hdf5      local/hopper-medium-v2
        <folder>/local/hopper_medium-v2.json      its manifest
    """

    id: str
    VARIABLE: ClassVar[str] = ""  # environment variable that names the folder where no argument does
    RECIPES: ClassVar[tuple[str, ...]] = ()  # ids that make_dataset.py can make
    url: ClassVar[str] = ""  # address of the folder of the official files; empty where they are not published at one
    score_name: ClassVar[str] = "score"  # what `score` is called where it is shown
    OFFICIAL_FOLDER: ClassVar[str] = ""  # of official files where nothing names one; else `datasets` beside the code

    @property
    def file_id(self) -> str:
        """The id under which the files are kept."""
        return self.id

    @property
    def local(self) -> bool:
        return self.file_id.startswith("local/")

    @property
    def name(self) -> str:
        return self.file_id.removeprefix("local/")

    @property
    @abc.abstractmethod
    def files(self) -> tuple[str, ...]:
        """Names of the files, below the folder."""

    @abc.abstractmethod
    def read(self, path: Path) -> Any:
        """Read and check one of the files; raises UserError."""

    def transitions(self, dataset_dir: str | os.PathLike | None = None) -> dict[str, Any]:
        """Fields of offline_data.OfflineData; raises UserError for data that are not read so."""
        raise UserError(f"dataset {self.id} is not read as transitions with rewards; use another")

    @abc.abstractmethod
    def make_env(self, dataset_dir: str | os.PathLike | None = None) -> Any:
        """The Gymnasium environment that its policies are evaluated in, with its time limit."""

    def score(self, returns: ArrayLike, dataset_dir: str | os.PathLike | None = None) -> np.ndarray:
        """Scores of undiscounted returns there, any shape, float64: the returns themselves where there is no scale."""
        return np.asarray(returns, dtype=np.float64)

    def folder(self, dataset_dir: str | os.PathLike | None = None) -> Path:
        """The argument, else what VARIABLE names, else the benchmark's own or `datasets` here; local/ in it."""
        default = not self.local and self.OFFICIAL_FOLDER or Path(__file__).resolve().parent / "datasets"
        folder = Path(dataset_dir or os.environ.get(self.VARIABLE) or default).expanduser()
        if folder.is_file():
            raise UserError(f"--dataset_dir {folder}: is a file; give the folder that holds it, {folder.parent}")
        return folder / "local" if self.local else folder

    def paths(self, dataset_dir: str | os.PathLike | None = None) -> tuple[Path, ...]:
        """The files, or the folder that holds them, whether or not they are there."""
        return tuple(self.folder(dataset_dir) / file for file in self.files)

    def manifest_path(self, dataset_dir: str | os.PathLike | None = None) -> Path:
        """The JSON file beside the files of a local dataset."""
        return self.paths(dataset_dir)[0].with_suffix(".json")

    def manifest(self, dataset_dir: str | os.PathLike | None = None) -> dict[str, Any] | None:
        """The manifest, written last, of a complete local dataset whose files have the sizes it says; else None."""
        path = self.manifest_path(dataset_dir)
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            sizes = [(path.parent / name, entry["bytes"]) for name, entry in manifest["files"].items()]
            whole = manifest["id"] == self.file_id and all(file.stat().st_size == size for file, size in sizes)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return manifest if whole else None

    def changed(self, manifest: dict[str, Any], dataset_dir: str | os.PathLike | None = None) -> str | None:
        """What to say of the first file that is not the one which `manifest` describes; None where all are."""
        folder = self.manifest_path(dataset_dir).parent
        names = (name for name, entry in manifest["files"].items() if sha256(folder / name) != entry["sha256"])
        name = next(names, None)
        return name and f"{name} has changed since it was made (SHA-256); make it again with --overwrite"

    def ensure(self, dataset_dir: str | os.PathLike | None = None) -> tuple[Path, ...]:
        """`paths`, after a download of what is missing of an official dataset.

        Raises UserError for a local dataset that is missing or incomplete, and for a download that fails: it names the
        address, and where to put the file by hand.
        """
        paths = self.paths(dataset_dir)
        if not self.local:
            for path in paths:
                if not path.exists():
                    self._fetch(path)
        elif self.manifest(dataset_dir) is None:
            flag = f" --dataset_dir {dataset_dir}" if dataset_dir else ""
            command = f"python make_dataset.py --dataset {self.file_id}{flag}"
            raise UserError(f"{self.id}: no complete dataset at {paths[0]}; make it with `{command}`")
        return paths

    def _fetch(self, path: Path) -> None:
        advice = f"put {path.name} into {path.parent} by hand"
        if f"local/{self.name}" in self.RECIPES:
            advice += f", or use local/{self.name}, which is made on this machine"
        download(f"{self.url}/{path.name}", path, self.read, advice)


AnyDataset = TypeVar("AnyDataset", bound=Dataset)


def find(dataset_id: str, known: Mapping[str, AnyDataset], what: str) -> AnyDataset:
    """The dataset of an id. Only listed ids pass, so that none can point outside the dataset folder.

    Raises UserError, `what` being the end of "dataset x is not", and names an id that is near where there is one.
    """
    if dataset_id in known:
        return known[dataset_id]
    raise UserError(f"dataset {dataset_id!r} is not {what}{did_you_mean(dataset_id, known)}")


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def bad_file(path: Path, fault: str) -> UserError:
    remedy = "choose another folder, or move the file away: what is published is fetched again"
    if path.parent.name == "local" or path.parts[-5:-4] == ("local",):  # the latter of the walker study
        remedy = "make it again with make_dataset.py --overwrite, or choose another folder"
    return UserError(path, fault, remedy)


def _read(
    load: Callable[[], Any], path: Path, kind: str, keys: Iterable[str], optional: Iterable[str]
) -> dict[str, np.ndarray]:
    """The arrays of these keys, and of the optional ones that are there. Whatever is wrong with it becomes one line."""
    bad = functools.partial(bad_file, path)
    if not path.is_file():
        raise bad("no such file")
    path.open("rb").close()  # PermissionError, which names the file as HDF5's does not
    try:
        with load() as file:
            missing = [key for key in keys if key not in file]
            if missing:
                raise bad(f"no array {missing[0]!r} (it holds {', '.join(sorted(file)) or 'nothing'})")
            return {key: file[key][()] for key in (*keys, *(key for key in optional if key in file))}
    except UserError:
        raise
    except MemoryError:
        raise UserError(path, "does not fit in memory", "use a smaller dataset") from None
    except Exception as error:  # a damaged file fails in many ways
        raise bad(f"not a readable {kind}, or cut short ({one_line(error) or type(error).__name__})") from None


def read_npz(path: Path, keys: Iterable[str], optional: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an npz file as they are stored; UserError where it is missing, damaged or lacks one of the keys."""
    return _read(lambda: np.load(path, allow_pickle=False), path, "npz of plain arrays", keys, optional)


def read_hdf5(path: Path, keys: Iterable[str], optional: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an HDF5 file as they are stored; UserError where it is missing, damaged or lacks one of the keys."""
    import h5py

    # Without a lock, because files are renamed into place whole and read-only folders cannot lock. Without a cache of
    # chunks, because each is read once: HDF5 and malloc would keep a third of the data's size.
    options = {"locking": False, "rdcc_nbytes": 0}
    return _read(lambda: h5py.File(path, "r", **options), path, "HDF5 file", keys, optional)


_FLAGS = ("terminals", "timeouts")


def check_arrays(bad: Bad, arrays: dict[str, np.ndarray], sizes: tuple[int, int]) -> None:
    """Check the arrays of a file, and turn them into float32 and bool in place.

    observations and next_observations [N, obs_dim], actions [N, act_dim] in [-1, 1], rewards [N], terminals and
    timeouts [N], which may be numbers 0 and 1. A column of shape [N, 1] passes for [N], as in D4RL's loader. Raises
    `bad(fault)` at the first fault. sizes: (obs_dim, act_dim) of the robot.
    """
    for key, array in arrays.items():
        flags, ndim = key in _FLAGS, 1 if key in (*_FLAGS, "rewards") else 2
        if ndim == 1 and array.ndim == 2 and array.shape[1] == 1:
            array = arrays[key] = array[:, 0]
        if array.ndim != ndim or 0 in array.shape[1:]:
            raise bad(f"{key} has shape {array.shape}, expected [rows{', numbers' * (ndim - 1)}]")
        if array.dtype.kind not in ("biuf" if flags else "f"):
            raise bad(f"{key} has type {array.dtype}, expected {'bool' if flags else 'float32'}")
    shapes = {key: array.shape for key, array in arrays.items()}
    if len({shape[0] for shape in shapes.values()}) != 1 or shapes["observations"][0] == 0:
        listed = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise bad(f"arrays do not have the same number of rows: {listed}")
    if shapes.get("next_observations", shapes["observations"]) != shapes["observations"]:
        raise bad(f"next_observations {shapes['next_observations']} is not shaped as the observations")
    found = (shapes["observations"][1], shapes["actions"][1])
    if found != sizes:
        raise bad(f"{found[0]} observation and {found[1]} action numbers a row, not {sizes}")
    for key, array in arrays.items():
        if key in _FLAGS:
            if array.dtype != bool and not np.isin(array, (0, 1)).all():
                raise bad(f"{key} holds something other than 0 and 1")
            arrays[key] = array.astype(bool, copy=False)
        else:
            with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is found below
                arrays[key] = np.ascontiguousarray(array, np.float32)
            check_rows(bad, key, arrays[key], *((-1, 1) if key == "actions" else ()))


def check_rows(bad: Bad, name: str, array: np.ndarray, low: float = -np.inf, high: float = np.inf) -> None:
    """Raise `bad(fault)` at the first row of [N, ...] that is not finite, or over 1e-5 (rounding) out of bounds."""
    for start in range(0, len(array), BLOCK_ROWS):
        block = array[start : start + BLOCK_ROWS]
        block = block.reshape(len(block), -1)
        good = np.isfinite(block).all(axis=1)
        if not good.all():
            raise bad(f"{name} row {start + np.argmin(good)} holds NaN or infinity")
        good = ((block >= low - 1e-5) & (block <= high + 1e-5)).all(axis=1)
        if not good.all():
            raise bad(f"{name} row {start + np.argmin(good)} lies outside [{low:g}, {high:g}]")


def jumps(places: np.ndarray, limit: float) -> np.ndarray:
    """Rows after which a place [N, numbers] is further off than one step can lead: an episode ended there."""
    return np.flatnonzero(np.abs(np.diff(places, axis=0)).max(axis=1, initial=0.0) > limit)


def whole_returns(rewards: np.ndarray, terminated: np.ndarray, ends: np.ndarray, limit: float = 0) -> np.ndarray:
    """Undiscounted returns of the episodes that were not cut early, which would pull the mean down: float64.

    rewards [N], terminated [N] bool; ends: the rows that end an episode [E]. Whole are those that terminate, or last
    for `limit` steps, or, where none does, as long as the longest; all, where the limit is 0. A return counts up to the
    first termination, where an evaluation would end; a recording may go on after it.
    """
    starts, lengths = np.concatenate([[0], ends[:-1] + 1]), np.diff(ends, prepend=-1)
    terminations = np.append(np.flatnonzero(terminated), len(terminated))
    lasts = np.minimum(ends, terminations[np.searchsorted(terminations, starts)])
    whole = terminated[ends] | (lengths >= min(limit, lengths.max()))
    # An episode at a time: a million rows in float64 would be a tenth of the data.
    return np.array(
        [rewards[a : b + 1].sum(dtype=np.float64) for a, b in zip(starts[whole], lasts[whole], strict=True)]
    )


def take_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """array[rows] in the array's own memory, which is overwritten. rows: ascending."""
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        array[start : start + len(block)] = array[block]
    return array[: len(rows)]


def download(url: str, path: Path, check: Callable[[Path], object], advice: str) -> None:
    """Fetch one file to `<path>.part`, going on with what an earlier attempt left; check it, rename it into place.

    Raises UserError, ending with `advice`, for a server that fails, a file that arrives short and one that `check`
    refuses, which is removed.
    """
    import requests

    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.parent):
            if path.exists():
                return  # another process fetched it while this one waited
            try:
                _fetch(url, part)
            except requests.RequestException:  # a cut connection, most often
                _fetch(url, part)
            try:
                check(part)
            except UserError as error:
                part.unlink()
                raise UserError(f"{url} is not the dataset", error.fault or str(error), advice) from None
            os.replace(part, path)
    except requests.RequestException as error:
        plain = type(error) in (requests.HTTPError, requests.RequestException)
        raise UserError(f"cannot download {url} ({error if plain else type(error).__name__}); {advice}") from None
    except OSError as error:
        raise UserError(f"{path.parent}: cannot store {path.name} there ({error.strerror or error})") from None


def _fetch(url: str, part: Path) -> None:
    """One attempt, which appends to `part`.

    An npz that changed at its address since the last attempt fails its check (CRC); an HDF5 file may pass it.
    """
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # compressed transfer would make Content-Length useless
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
        if response.status_code == 416:  # nothing is left to send: the check says whether it is whole
            return
        if response.status_code not in (200, 206):
            raise requests.HTTPError(f"HTTP status {response.status_code}")
        have = have if response.status_code == 206 else 0
        total = have + int(response.headers.get("Content-Length", 0))
        bar = progress(total, part.stem, initial=have, unit="B", unit_scale=True)
        with open(part, "ab" if have else "wb") as file, bar:
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total > have and part.stat().st_size != total:
        raise requests.RequestException(f"{part.stat().st_size} of {total} bytes arrived")
