"""Fetching a dataset file: to a temporary name, continued where it stopped, checked, then renamed into place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from utils import UserError, exclusive_folder, progress


class _Interrupted(Exception):
    """A download that stopped early and may be tried again."""


def download(url: str, path: Path, check: Callable[[Path], object], advice: str) -> None:
    """Fetch one file to `<path>.part`, check it, rename it into place; nothing happens where it is there already.

    Args:
        url: address of the file.
        path: where it goes. Its folder is made, and unmade if nothing comes; one process at a time fetches into it.
        check: called with the temporary path; raises UserError `<path>: <fault>; <remedy>` for a wrong file.
        advice: what to do when it cannot be had, the end of every message.

    Raises UserError in one line for a server that fails, a file that arrives short and one that `check` refuses (which
    is removed). What has arrived is kept where the server can continue it.
    """
    import requests

    part, made = path.with_name(path.name + ".part"), not path.parent.exists()
    if made:
        advice = f"{path.parent} did not exist: check the folder, or {advice}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_folder(path.parent):
            if path.exists():
                return  # another process fetched it while this one waited
            _fetch_with_retry(url, part)
            try:
                check(part)
            except UserError as error:
                _discard(part)
                fault = str(error).removeprefix(f"{part}: ").rpartition("; ")[0]
                raise UserError(f"{url} is not the dataset: {fault}; {advice}") from None
            os.replace(part, path)
            _discard(part)
    except (requests.RequestException, _Interrupted) as error:
        if part.exists() and not _validator_path(part).exists():
            _discard(part)  # nothing tells whether it could be continued
        plain = isinstance(error, _Interrupted | requests.HTTPError)
        raise UserError(f"cannot download {url} ({error if plain else type(error).__name__}); {advice}") from None
    except OSError as error:
        raise UserError(f"{path.parent}: cannot store {path.name} there ({error.strerror or error})") from None
    finally:
        if made and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()


def _fetch_with_retry(url: str, part: Path) -> None:
    """`_fetch`, once more after a failure that may pass."""
    import requests

    try:
        _fetch(url, part)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, _Interrupted):
        _fetch(url, part)


def _validator_path(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_path(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path) -> None:
    """Download `url` to `part`, going on where an earlier attempt stopped when the server says it is the same file.

    The server's ETag (or date) is kept beside the part; If-Range makes it send the rest only when that still holds,
    and the whole file otherwise. Raises requests.RequestException or _Interrupted.
    """
    import requests

    have, headers = 0, {"Accept-Encoding": "identity"}  # compressed transfer would make Content-Length useless
    if part.exists() and _validator_path(part).exists():
        have = part.stat().st_size
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": _validator_path(part).read_text(encoding="utf-8")}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
        if response.status_code == 416:  # the part is as long as the file, or longer
            _discard(part)
            raise _Interrupted("the server refused to continue the download")
        if response.status_code not in (200, 206):
            kind = requests.HTTPError if response.status_code < 500 else _Interrupted
            raise kind(f"HTTP status {response.status_code}")
        resumed = response.status_code == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            _discard(part)
            raise _Interrupted("the server continued at the wrong place")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if not resumed:
            _discard(part)
            _write_validator(part, response.headers)
        with (
            open(part, "ab") as file,
            progress(total or 0, part.stem, initial=have, unit="B", unit_scale=True) as bar,
        ):
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if total is not None and size != total:
        if size > total:
            _discard(part)
        raise _Interrupted(f"{size} of {total} bytes arrived")


def _write_validator(part: Path, headers: Mapping[str, str]) -> None:
    """Keep what identifies the server's file, if it says so and can send parts. A weak ETag does not identify it."""
    etag = headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    if validator and headers.get("Accept-Ranges", "bytes") == "bytes":
        _validator_path(part).write_text(validator, encoding="utf-8")
