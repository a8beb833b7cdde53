"""Make a benchmark's data on this machine, list what there is, check any file.

    python make_dataset.py --list
    python make_dataset.py --list --only hopper
    python make_dataset.py --dataset local/antmaze-medium-navigate-v0 --num_episodes 100 --jobs 2
    python make_dataset.py --dataset local/hopper-medium-v2 --num_transitions 200000
    python make_dataset.py --check datasets/local/hopper_medium-v2.hdf5

Without --list or --check it makes --dataset. Flags that each of the three reads:

    make      --dataset, --num_episodes, --num_transitions or --official_size, --seed, --dataset_dir, --experts_dir,
              --jobs, --overwrite
    --list    --only, --dataset_dir
    --check   --picture, --dataset_dir

Sizes where none is given: 100 episodes (mazes' navigate, walker study), 300 (stitch), 120 (explore), 100,000
transitions (D4RL). --official_size: 1,000 (mazes' navigate), 5,000 (stitch), 10,000 (explore), as OGBench's own files.

Datasets are kept in --dataset_dir; else in the folder that OGBENCH_DATASET_DIR (mazes) or D4RL_DATASET_DIR (D4RL)
names; else in datasets/ beside the code, official D4RL files in ~/.d4rl/datasets. There, what is made here lies in
local/. --list says where that is.

A `local/` dataset has the layout, names and protocol of the official one and is made by policies of known quality
(datasets/experts/); the id keeps the two apart. A manifest beside the files tells recipe, seed, policies, versions and
SHA-256. With the same versions, the same id, size, seed and policies give the same bytes on any x86-64 processor that
has AVX2, whatever --jobs.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass

import utils
from benchmark_data import overview
from benchmark_data.check import run_check
from benchmark_data.local import FAMILIES, find_family, generate
from benchmark_data.local import generate_if_missing as generate_if_missing  # for scripts, beside `generate`
from benchmark_data.maze import HUMANOID_MESSAGE
from runs.cli import parse_config, run_cli
from utils import Count, UserError, Whole


@dataclass
class MakeDatasetConfig:
    """Settings of one generated dataset."""

    dataset: str = "local/pointmaze-medium-navigate-v0"  # id of the dataset, local/<the benchmark's id>; see --list
    num_episodes: Count | None = None  # episodes of a maze (a tenth more to validate) or walker dataset
    num_transitions: Count | None = None  # transitions of a D4RL dataset; default: 100,000
    official_size: bool = False  # as many episodes as a maze's official file has, which can take hours
    seed: Whole = 0  # the files depend on the id, the size, the policies and this alone
    dataset_dir: str | None = None  # folder of the datasets; default: the folder that --list shows
    experts_dir: str | None = None  # folder of policies that benchmark_data.train_expert wrote; else datasets/experts/
    jobs: Count = 1  # processes that make episodes side by side; changes no byte of the files
    overwrite: bool = False  # replace a dataset of another seed, size or policies, or files without a manifest
    list: bool = False  # instead, show every id: size, where it is, or how to get it
    only: str | None = None  # with --list: the ids that hold this text, and no others
    check: str | None = None  # instead, check this file, folder or dataset id, generated or official
    picture: str | None = None  # with --check: where its picture goes; else logs/checks/<id>.png


# Flags that the two other commands read; all others make data.
READ_WITH = {"list": ("only", "dataset_dir"), "check": ("picture", "dataset_dir")}


def print_list(dataset_dir: str | None, only: str | None = None) -> None:
    """Print every dataset id, or those that hold `only`. Raises UserError where there is none."""
    local = overview.only(overview.local_groups(FAMILIES, dataset_dir), only)
    official = overview.only(overview.official_groups(dataset_dir), only)
    if not local and not official:
        raise UserError(f"--only {only}: no dataset id holds it; leave it out to see all")
    sections = [overview.describe(group) for group in local + official]
    if only is None or "humanoid" in only:
        sections.insert(len(local), f"local/humanoidmaze-*: {HUMANOID_MESSAGE}.")
    print("\n\n".join(sections))


def requested_size(config: MakeDatasetConfig) -> int | None:
    """The size asked for, in the family's unit; UserError where the flag is the other benchmark's."""
    unit = find_family(config.dataset).unit
    sizes = {"episodes": config.num_episodes, "transitions": config.num_transitions}
    size = sizes.pop(unit)
    for other, given in sizes.items():
        if given is not None:
            raise UserError(f"--num_{other} {given}: {config.dataset} is counted in {unit}; use --num_{unit}")
    if not config.official_size:
        return size
    if size is not None:
        raise UserError(f"--official_size --num_{unit} {size}: both give the size; leave one of the two out")
    official = find_family(config.dataset).official_size(config.dataset)
    if official is None:
        raise UserError(f"--official_size: not known here for {config.dataset}; use --num_{unit}")
    return official


def refuse_unread_flags(config: MakeDatasetConfig) -> None:
    """Raise UserError for a flag that was given and that nothing would read."""
    given = {field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default}
    modes = [name for name in READ_WITH if name in given]
    if len(modes) > 1:
        raise UserError("--list and --check are two commands; give one of them")
    reads = (modes[0], *READ_WITH[modes[0]]) if modes else given - {"picture", "only"}
    for name in sorted(given.difference(reads)):
        needed = modes[0] if modes else "check" if name == "picture" else "list"
        raise UserError(
            f"--{name} does nothing with --{needed}; leave one of the two out"
            if modes
            else f"--{name} {getattr(config, name)}: it is for --{needed} only; add that, or leave it out"
        )


def run(config: MakeDatasetConfig) -> None:
    """List, check or make, as the settings say."""
    if config.list:
        print_list(config.dataset_dir, config.only)
    elif config.check is not None:
        sys.exit(run_check(config.check, config.picture, config.dataset_dir))
    else:
        size = requested_size(config)
        where = {"dataset_dir": config.dataset_dir, "experts_dir": config.experts_dir}
        print(generate(config.dataset, size, config.seed, jobs=config.jobs, overwrite=config.overwrite, **where))


def main(argv: list[str] | None = None) -> None:
    config = parse_config(MakeDatasetConfig, argv, __doc__)
    refuse_unread_flags(config)
    try:
        run(config)
    except KeyboardInterrupt as interrupt:
        interrupt.args = ("nothing was written; the same command starts again",)
        raise
    except OSError as error:
        if error.errno not in utils.DISK_FULL:
            raise
        name = error.filename or "a file"
        raise UserError(f"{name}: the disk is full; nothing was written; free some space and start again") from None


if __name__ == "__main__":
    run_cli(main)
