"""`make_dataset.py --list`: every dataset id, its size, and where it is or how to get it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import d4rl_utils
import ogbench_utils
import utils
from benchmark_data.generation import Family
from walker import dmc_utils


@dataclass(frozen=True)
class Row:
    """One line of the list."""

    dataset_id: str
    size: str  # of what is there, or "-"
    content: str  # how many episodes or transitions, or ""
    where: str  # where it is, or how to get it


def local_rows(families: Iterable[Family], dataset_dir: str | os.PathLike | None) -> Iterator[Row]:
    """What can be made here, made or not."""
    folder = f" --dataset_dir {dataset_dir}" if dataset_dir else ""
    for family in families:
        for dataset_id in family.ids:
            manifest = utils.read_manifest(family.manifest_path(dataset_id, dataset_dir), dataset_id)
            if manifest is None:
                count = f"{family.default_size(dataset_id):,} {family.unit}"
                yield Row(dataset_id, "-", count, f"python make_dataset.py --dataset {dataset_id}{folder}")
            else:
                size = sum(entry["bytes"] for entry in manifest["files"].values())
                count = f"{manifest.get(f'num_{family.unit}', 0):,} {family.unit}, seed {manifest.get('seed')}"
                yield Row(dataset_id, megabytes(size), count, str(family.target(dataset_id, dataset_dir)))


def official_rows(dataset_dir: str | os.PathLike | None) -> Iterator[Row]:
    """The official files: the path of one that is there, else its address."""
    for dataset_id in ogbench_utils.official_ids():
        path = ogbench_utils.dataset_paths(dataset_id, dataset_dir)[0]
        yield _official(dataset_id, path, f"{ogbench_utils.DATASET_URL}/{path.name}, fetched when it is first used")
    for dataset_id in d4rl_utils.official_ids():
        path = d4rl_utils.dataset_path(dataset_id, dataset_dir)
        yield _official(dataset_id, path, str(d4rl_utils.parse_dataset_id(dataset_id).url))
    for dataset_id in dmc_utils.OFFICIAL_IDS:
        path = dmc_utils.dataset_folder(dataset_id, dataset_dir)
        yield _official(dataset_id, path, f"the study's own files, not published at an address; put them in {path}")


def _official(dataset_id: str, path: Path, otherwise: str) -> Row:
    if not path.exists():
        return Row(dataset_id, "-", "", otherwise)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Row(dataset_id, megabytes(sum(file.stat().st_size for file in files)), "", str(path))


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def table(rows: Iterable[Row], where: str) -> str:
    """Aligned columns below their headings; `where` heads the last one, which is as long as it is.

    A column that is empty in every row is left out.
    """
    lines = [(row.dataset_id, row.size, row.content, row.where) for row in rows]
    headings = ("id", "size", "content", where)
    kept = [column for column in range(4) if any(line[column] for line in lines)]
    widths = [max(len(line[column]) for line in (headings, *lines)) for column in kept[:-1]] + [0]
    aligned = [(column, f"{'>' if column == 1 else '<'}{width}") for column, width in zip(kept, widths, strict=True)]
    return "\n".join(
        "  ".join(["", *(f"{line[column]:{form}}" for column, form in aligned)]).rstrip() for line in (headings, *lines)
    )
