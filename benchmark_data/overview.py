"""`make_dataset.py --list`: every dataset id by benchmark, its size, and where it is or how to get it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import d4rl_utils
import dmc_utils
import ogbench_utils
from benchmark_data.generation import Family
from dataset_files import official_ids
from offline_data import find_dataset

HEADINGS = ("id", "size", "content", "file, or the path of what is there")
_ROBOTS = official_ids(d4rl_utils.DATASETS)
# Title, ids, how they get there.
OFFICIAL = (
    ("OGBench mazes", official_ids(ogbench_utils.DATASETS), "<file>, with <id>-val.npz; fetched when first used"),
    ("D4RL", [name for name in _ROBOTS if "maze" not in name], "<file>; fetched when first used"),
    ("D4RL antmazes", [name for name in _ROBOTS if "maze" in name], "<file>; fetched when first used"),
    ("walker study", dmc_utils.OFFICIAL_IDS, "the study's own folders, not published at an address"),
)


def sections(families: Iterable[Family], dataset_dir: str | os.PathLike | None, only: str) -> list[str]:
    """A text for each benchmark: what can be made here, then the official files, of the ids that hold `only`."""
    flag = f" --dataset_dir {dataset_dir}" if dataset_dir else ""
    found = []
    for family in families:
        rows = [_local_row(family, name, dataset_dir) for name in family.ids if only in name]
        source = f"python make_dataset.py --dataset <id>{flag}"
        found.append(_section(f"{family.title}, made here", source, rows, dataset_dir))
    for title, ids, source in OFFICIAL:
        rows = [_official_row(name, dataset_dir) for name in ids if only in name]
        source = "/".join(filter(None, (find_dataset(ids[0]).url, source)))
        found.append(_section(f"{title}, official files", source, rows, dataset_dir))
    return [text for text in found if text]


def _local_row(family: Family, dataset_id: str, dataset_dir: str | os.PathLike | None) -> tuple[str, ...]:
    dataset = find_dataset(dataset_id)
    manifest, target = dataset.manifest(dataset_dir), dataset.paths(dataset_dir)[0]
    if manifest is None:
        return dataset_id, "-", f"{family.default_size(dataset_id):,} {family.unit}", target.name
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    count = f"{manifest.get(f'num_{family.unit}', 0):,} {family.unit}, seed {manifest.get('seed')}"
    return dataset_id, _megabytes(size), count, str(target)


def _official_row(dataset_id: str, dataset_dir: str | os.PathLike | None) -> tuple[str, ...]:
    paths = find_dataset(dataset_id).paths(dataset_dir)
    if not paths[0].exists():
        return dataset_id, "-", "", paths[0].name
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    return dataset_id, _megabytes(sum(file.stat().st_size for file in files)), "", str(paths[0])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _section(title: str, source: str, rows: list[tuple[str, ...]], dataset_dir: str | os.PathLike | None) -> str:
    """Title, folder, source, and a line each row in aligned columns, `content` left out where no row has one."""
    if not rows:
        return ""
    folder: Path = find_dataset(rows[0][0]).paths(dataset_dir)[0].parent
    columns = (0, 1, 2, 3) if any(row[2] for row in rows) else (0, 1, 3)
    lines = [[row[column] for column in columns] for row in (HEADINGS, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1] + [0]
    table = ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([title, f"  folder: {folder}", f"  source: {source}", "", *table])
