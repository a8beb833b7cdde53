"""Files of data: their digests and manifests, and npz archives read without trust."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError, one_line


def sha256(path: str | Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_npz(path: Path, keys: Iterable[str], flag: str, bad_file: Callable[[Path, str], UserError]) -> dict[str, Any]:
    """Arrays of an npz file by name, nothing pickled, as they are stored.

    Raises `bad_file(path, fault)` for a file that is damaged, no archive, lacks a key or declares more than it holds,
    and UserError that names the flag of its folder for one that is not there, may not be read or does not fit in
    memory.
    """
    damaged = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, struct.error, tokenize.TokenError)
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check {flag}")
        with open(path, "rb"):  # is_zipfile would take a file without read permission for a damaged one
            pass
        if not zipfile.is_zipfile(path):
            raise bad_file(path, "not an npz archive, or cut short")
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive.files]
            if missing:
                raise bad_file(path, f"no array {missing[0]!r} (it holds {', '.join(archive.files) or 'nothing'})")
            for key in keys:
                _check_declared(archive.zip, key, path.stat().st_size)
            return {key: archive[key] for key in keys}
    except MemoryError:
        raise UserError(f"{path}: does not fit in memory; use a smaller dataset") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it; change that, or {flag}") from None
    except OSError as error:
        raise bad_file(path, f"cannot be read ({error})") from None
    except (*damaged, SyntaxError) as error:  # the last two: NumPy parses an array's header as Python
        text = one_line(error) or type(error).__name__
        raise bad_file(path, f"not a readable npz of plain arrays ({text})") from None


def _check_declared(archive: zipfile.ZipFile, key: str, file_bytes: int) -> None:
    """Raise ValueError for an array that declares more or less than its member of the archive holds.

    NumPy would get the memory that the header asks for before it reads a number.
    """
    if f"{key}.npy" not in archive.namelist():
        raise ValueError(f"{key} is no .npy array")
    info = archive.getinfo(f"{key}.npy")
    # Deflate makes at most 1032 bytes of one, so this much is there at most, whatever the archive's directory says.
    if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and info.file_size > 1032 * file_bytes:
        raise ValueError(f"{key} cannot unpack to {info.file_size:,} bytes, the file has {file_bytes:,}")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(member)
        else:  # names of fields beyond Latin-1
            raise ValueError(f"{key} has NumPy format {version}")
        held = info.file_size - member.tell()
    declared = math.prod(shape) * dtype.itemsize
    if declared != held and not dtype.hasobject:  # NumPy refuses those itself
        raise ValueError(f"{key} declares {shape} of {dtype}, {declared:,} bytes, and holds {held:,}")


def read_manifest(path: str | Path, dataset_id: str) -> dict[str, Any] | None:
    """The manifest of a complete generated dataset, else None.

    Complete means: the manifest is there, names this id, lists the dataset's own file or folder (the manifest's name
    but for the suffix), nothing outside its folder, and every file it lists is there with the size it says. A manifest
    is written after its files, so a generation that was cut leaves none.
    """
    path = Path(path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {Path(name): entry["bytes"] for name, entry in manifest["files"].items()}
        inside = not any(name.is_absolute() or ".." in name.parts for name in files)
        own = any(name.parts[0] in (path.stem, f"{path.stem}.npz", f"{path.stem}.hdf5") for name in files)
        complete = manifest["id"] == dataset_id and inside and own
        complete = complete and all((path.parent / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if complete else None
