"""Make `local/` datasets: which family makes an id, and one call that makes what a command is missing."""

import os
from pathlib import Path

from benchmark_data import generation
from benchmark_data.antmaze import AntMazeFamily
from benchmark_data.d4rl import D4RLFamily
from benchmark_data.experts import DEFAULT_EXPERTS_DIR as EXPERTS_DIR
from benchmark_data.generation import Family, Plan
from benchmark_data.maze import HUMANOID_MESSAGE, MazeFamily
from benchmark_data.walker import WalkerFamily
from dataset_files import Dataset
from offline_data import find_dataset
from utils import UserError, did_you_mean

FAMILIES: tuple[Family, ...] = (MazeFamily(), D4RLFamily(), AntMazeFamily(), WalkerFamily())


def find_family(dataset_id: str) -> Family:
    """The family that makes an id. Raises UserError that says why one cannot be made, or names a near one that can."""
    for family in FAMILIES:
        if dataset_id in family.ids:
            return family
    ids = [known for family in FAMILIES for known in family.ids]
    if f"local/{dataset_id}" in ids:
        raise UserError(f"dataset {dataset_id} names the official file; what is made here is local/{dataset_id}")
    if dataset_id.split("/")[-1].startswith("humanoidmaze-"):
        raise UserError(f"dataset {dataset_id}: {HUMANOID_MESSAGE}")
    hint = did_you_mean(dataset_id, ids) or "; see `python make_dataset.py --list`"
    raise UserError(f"dataset {dataset_id!r} cannot be made here{hint}")


def generate(
    dataset_id: str,
    size: int | None = None,
    seed: int = 0,
    dataset_dir: str | os.PathLike | None = None,
    jobs: int = 1,
    progress: bool = True,
    overwrite: bool = False,
    experts_dir: str | os.PathLike | None = None,
) -> Path:
    """`generation.make` of a local dataset; `size` counts what the benchmark counts, episodes or transitions.

    Raises UserError for an id without a recipe, a folder of policies that is missing, and as `generation.make` does.
    """
    family = find_family(dataset_id)
    if experts_dir is not None and not Path(experts_dir).is_dir():
        raise UserError(f"--experts_dir {experts_dir}: no such folder")
    size = family.default_size(dataset_id) if size is None else size
    plan = Plan(dataset_id, size, seed, Path(experts_dir or EXPERTS_DIR), jobs, progress)
    return generation.make(family, plan, dataset_dir, overwrite)


def generate_if_missing(dataset_id: str, dataset_dir: str | os.PathLike | None = None, jobs: int = 1) -> Dataset:
    """The dataset of an id, made first where it is a local one that is missing. Raises UserError as `generate`."""
    dataset = find_dataset(dataset_id)
    if dataset.local and dataset.manifest(dataset_dir) is None:
        generate(dataset.file_id, dataset_dir=dataset_dir, jobs=jobs)
    return dataset
