"""Make a benchmark's data on this machine, list what there is, check any file.

    python make_dataset.py --list
    python make_dataset.py --dataset local/antmaze-medium-navigate-v0 --num_episodes 100 --jobs 2
    python make_dataset.py --dataset local/hopper-medium-v2 --num_transitions 200000
    python make_dataset.py --check datasets/local/hopper_medium-v2.hdf5

A `local/` dataset has the layout, names and protocol of the official one and is made by policies of known quality
(datasets/experts/); the id keeps the two apart. A manifest beside the files tells recipe, seed, policies, versions and
SHA-256. On one machine with the same versions, the same id, size, seed and policies give the same bytes, whatever
--jobs.
"""

from __future__ import annotations

import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import utils
from benchmark_data import generation, overview
from benchmark_data.check import run_check
from benchmark_data.d4rl import D4RLFamily
from benchmark_data.experts import DEFAULT_EXPERTS_DIR as EXPERTS_DIR
from benchmark_data.generation import Family, Plan
from benchmark_data.maze import HUMANOID_MESSAGE, MazeFamily
from benchmark_data.walker import WalkerFamily
from utils import UserError

FAMILIES: tuple[Family, ...] = (MazeFamily(), D4RLFamily(), WalkerFamily())


@dataclass
class MakeDatasetConfig:
    """Settings of one generated dataset."""

    dataset: str = "local/pointmaze-medium-navigate-v0"  # id of the dataset, local/<the benchmark's id>; see --list
    num_episodes: int | None = None  # mazes: training episodes (a tenth more for validation); walker study: episodes
    num_transitions: int | None = None  # D4RL: transitions
    seed: int = 0  # on one machine the files depend on the id, the size, the policies and this alone
    dataset_dir: str | None = None  # where datasets are kept; else the benchmark's own variable, else datasets/
    experts_dir: str | None = None  # policies to use in place of datasets/experts/, as train_expert.py writes them
    jobs: int = 1  # processes that make episodes side by side; changes no byte of the files
    overwrite: bool = False  # replace a dataset of another seed, size or policies, or files without a manifest
    list: bool = False  # show every id: size, where it is, or how to get it; makes nothing
    check: str | None = None  # check this file or folder, generated or official, instead; makes nothing
    picture: str | None = None  # --check: where its picture goes; default logs/checks/<name>.png


def find_family(dataset_id: str) -> Family:
    """The family that makes an id. Raises UserError that says why one cannot be made, or names the nearest that can."""
    for family in FAMILIES:
        if dataset_id in family.ids:
            return family
    ids = [known for family in FAMILIES for known in family.ids]
    if f"local/{dataset_id}" in ids:
        raise UserError(f"--dataset {dataset_id} names the official file; what is made here is local/{dataset_id}")
    if dataset_id.split("/")[-1].startswith("humanoidmaze-"):
        raise UserError(f"--dataset {dataset_id}: {HUMANOID_MESSAGE}")
    nearest = difflib.get_close_matches(dataset_id, ids, n=1, cutoff=0.0)[0]
    raise UserError(f"--dataset {dataset_id!r} cannot be made here; the nearest that can is {nearest!r}; see --list")


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
    """Make a local dataset and return its main file or folder; one that is there already is kept.

    `size` counts what the benchmark counts, episodes or transitions. Raises UserError for an id without a recipe,
    numbers out of range, policies that are missing or another robot's, a folder that cannot be written, and, unless
    `overwrite`, a dataset of the same id but another seed, size or policies, or files in its place without a manifest.
    """
    family = find_family(dataset_id)
    size = family.default_size(dataset_id) if size is None else size
    plan = Plan(dataset_id, size, seed, Path(experts_dir or EXPERTS_DIR), jobs, progress)
    return generation.make(family, plan, dataset_dir, overwrite)


def generate_if_missing(dataset_id: str, dataset_dir: str | os.PathLike | None = None, jobs: int = 1) -> None:
    """Make a local dataset that is not there, of the default size and seed; leave all others alone."""
    for family in FAMILIES:
        if dataset_id in family.ids:
            if utils.read_manifest(family.manifest_path(dataset_id, dataset_dir), dataset_id) is None:
                generate(dataset_id, None, MakeDatasetConfig.seed, dataset_dir, jobs)
            return


def print_list(dataset_dir: str | None) -> None:
    print("Made on this machine:")
    print(overview.table(overview.local_rows(FAMILIES, dataset_dir)))
    print(f"\nlocal/humanoidmaze-*: {HUMANOID_MESSAGE}.")
    print("\nOfficial files:")
    print(overview.table(overview.official_rows(dataset_dir)))


def requested_size(config: MakeDatasetConfig) -> int | None:
    """The size asked for, in the family's unit; UserError where the flag is the other benchmark's."""
    unit = find_family(config.dataset).unit
    sizes = {"episodes": config.num_episodes, "transitions": config.num_transitions}
    size = sizes.pop(unit)
    for other, given in sizes.items():
        if given is not None:
            raise UserError(f"--num_{other} {given}: {config.dataset} is counted in {unit}; use --num_{unit}")
    return size


def main(argv: list[str] | None = None) -> None:
    config = utils.parse_config(MakeDatasetConfig, argv, __doc__)
    if config.list:
        print_list(config.dataset_dir)
    elif config.check is not None:
        sys.exit(run_check(Path(config.check), config.picture))
    else:
        size = requested_size(config)
        print(
            generate(
                config.dataset,
                size,
                config.seed,
                config.dataset_dir,
                config.jobs,
                overwrite=config.overwrite,
                experts_dir=config.experts_dir,
            )
        )


if __name__ == "__main__":
    utils.run_cli(main)
