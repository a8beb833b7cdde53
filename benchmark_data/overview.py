"""`make_dataset.py --list`: every dataset id by benchmark, its size, and where it is or how to get it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import d4rl_utils
import dmc_utils
import ogbench_utils
from benchmark_data.generation import Family
from dataset_files import official_ids
from offline_data import find_dataset


@dataclass(frozen=True)
class Row:
    """One line of the list."""

    dataset_id: str
    size: str  # of what is there, or "-"
    content: str  # how many episodes or transitions, or ""
    where: str  # the path of what is there, else its name


@dataclass(frozen=True)
class Group:
    """One benchmark's datasets: where they go, how they get there, and a line each."""

    title: str
    folder: str
    source: str
    rows: tuple[Row, ...]


_MAZES, _ROBOTS = official_ids(ogbench_utils.DATASETS), official_ids(d4rl_utils.DATASETS)
# Title, ids, where they come from below their address.
OFFICIAL = (
    ("OGBench mazes", _MAZES, "<file>, with <id>-val.npz; fetched when first used"),
    ("D4RL", [name for name in _ROBOTS if "maze" not in name], "<file>; fetched when first used"),
    ("D4RL antmazes", [name for name in _ROBOTS if "maze" in name], "<file>; fetched when first used"),
    ("walker study", dmc_utils.OFFICIAL_IDS, "the study's own folders, not published at an address"),
)


def local_groups(families: Iterable[Family], dataset_dir: str | os.PathLike | None) -> Iterator[Group]:
    """What can be made here, made or not."""
    for family in families:
        first = find_dataset(family.ids[0])
        flag = f" --dataset_dir {dataset_dir}" if dataset_dir else ""
        yield Group(
            f"{family.title}, made here",
            f"{first.manifest_path(dataset_dir).parent} (local/ in {first.folder_rule})",
            f"python make_dataset.py --dataset <id>{flag}",
            tuple(_local_row(family, dataset_id, dataset_dir) for dataset_id in family.ids),
        )


def _local_row(family: Family, dataset_id: str, dataset_dir: str | os.PathLike | None) -> Row:
    dataset = find_dataset(dataset_id)
    manifest, target = dataset.manifest(dataset_dir), dataset.paths(dataset_dir)[0]
    if manifest is None:
        return Row(dataset_id, "-", f"{family.default_size(dataset_id):,} {family.unit}", target.name)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    count = f"{manifest.get(f'num_{family.unit}', 0):,} {family.unit}, seed {manifest.get('seed')}"
    return Row(dataset_id, megabytes(size), count, str(target))


def official_groups(dataset_dir: str | os.PathLike | None) -> Iterator[Group]:
    """The official files, there or not."""
    for title, ids, source in OFFICIAL:
        datasets = [find_dataset(dataset_id) for dataset_id in ids]
        address = f"{datasets[0].url}/" if datasets[0].url else ""
        yield Group(
            f"{title}, official files",
            f"{datasets[0].paths(dataset_dir)[0].parent} ({datasets[0].folder_rule})",
            address + source,
            tuple(_official_row(dataset.id, dataset.paths(dataset_dir)) for dataset in datasets),
        )


def _official_row(dataset_id: str, paths: tuple[Path, ...]) -> Row:
    files = [path for path in paths if path.is_file()]
    files += [file for path in paths if path.is_dir() for file in path.rglob("*") if file.is_file()]
    if not paths[0].exists():
        return Row(dataset_id, "-", "", paths[0].name)
    return Row(dataset_id, megabytes(sum(file.stat().st_size for file in files)), "", str(paths[0]))


def only(groups: Iterable[Group], text: str | None) -> list[Group]:
    """The groups with those of their ids that hold `text`, or as they are where it is None; none that is empty."""
    kept = [replace(group, rows=tuple(row for row in group.rows if (text or "") in row.dataset_id)) for group in groups]
    return [group for group in kept if group.rows]


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def describe(group: Group) -> str:
    """A group's lines: its title, where it goes and comes from, and aligned columns below their headings.

    A column that is empty in every row is left out; the last one is as long as it is.
    """
    lines = [(row.dataset_id, row.size, row.content, row.where) for row in group.rows]
    headings = ("id", "size", "content", "file, or the path of what is there")
    kept = [column for column in range(4) if any(line[column] for line in lines)]
    widths = [max(len(line[column]) for line in (headings, *lines)) for column in kept[:-1]] + [0]
    aligned = [(column, f"{'>' if column == 1 else '<'}{width}") for column, width in zip(kept, widths, strict=True)]
    table = (
        "  ".join(["", *(f"{line[column]:{form}}" for column, form in aligned)]).rstrip() for line in (headings, *lines)
    )
    return "\n".join([group.title, f"  folder: {group.folder}", f"  source: {group.source}", "", *table])


def nearest_id(name: str, ids: Iterable[str]) -> str | None:
    """The id that `name` is near to, local/ aside; None where it is near none."""
    by_name = {dataset_id.removeprefix("local/"): dataset_id for dataset_id in ids}
    # 0.74 is hopper-medium-v2 to swimmer-medium-v2, which is no slip of the hand.
    near = difflib.get_close_matches(name.removeprefix("local/"), by_name, n=1, cutoff=0.75)
    return by_name[near[0]] if near else None
