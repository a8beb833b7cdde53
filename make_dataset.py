"""Make a benchmark's data on this machine, list what there is, check any file.

    python make_dataset.py --list
    python make_dataset.py --dataset local/antmaze-medium-navigate-v0 --num_episodes 100 --jobs 2
    python make_dataset.py --dataset local/hopper-medium-v2 --num_transitions 200000
    python make_dataset.py --check datasets/local/hopper_medium-v2.hdf5

Without --list or --check it makes --dataset.

Sizes where none is given: 100 episodes (mazes' navigate, walker study), 300 (stitch), 500 (explore), 100,000
transitions (D4RL). local/antmaze-medium-navigate-full-v0 and its kin are as large as OGBench's own files: 1,000
episodes (navigate), 5,000 (stitch), 10,000 (explore).

Datasets are kept in --dataset_dir; else in the folder that OGBENCH_DATASET_DIR (mazes) or D4RL_DATASET_DIR (D4RL)
names; else in datasets/ beside the code, official D4RL files in ~/.d4rl/datasets. There, what is made here lies in
local/. --list says where that is.

A `local/` dataset has the layout, names and protocol of the official one and is made by policies of known quality
(datasets/experts/); the id keeps the two apart. A manifest beside the files tells recipe, seed, policies, versions and
SHA-256. With the same versions, the same id, size, seed and policies give the same bytes on any x86-64 processor that
has AVX2, whatever --jobs.
"""

import os
import sys
from dataclasses import dataclass

import d4rl_utils
import dmc_utils
import ogbench_utils
from benchmark_data.check import run_check
from benchmark_data.local import find_family, generate, generate_if_missing  # noqa: F401  for scripts
from benchmark_data.maze import HUMANOID_MESSAGE
from dataset_files import Dataset
from runs.cli import parse_config, run_cli
from utils import Count, UserError, Whole

# For --list: title, datasets, how the official files get there.
BENCHMARKS = (
    ("OGBench mazes", ogbench_utils.DATASETS, "<file>, with <id>-val.npz; fetched when first used"),
    ("D4RL", d4rl_utils.DATASETS, "<file>; fetched when first used"),
    ("walker study", dmc_utils.DATASETS, "the study's own folders, not published at an address"),
)


@dataclass
class MakeDatasetConfig:
    dataset: str = "local/pointmaze-medium-navigate-v0"  # id of the dataset, local/<the benchmark's id>; see --list
    num_episodes: Count | None = None  # episodes of a maze (a tenth more to validate) or walker dataset
    num_transitions: Count | None = None  # transitions of a D4RL dataset; default: 100,000
    seed: Whole = 0  # the files depend on the id, the size, the policies and this alone
    dataset_dir: str | None = None  # folder of the datasets; default: the folder that --list shows
    experts_dir: str | None = None  # folder of policies that benchmark_data.train_expert wrote; else datasets/experts/
    jobs: Count = 1  # processes that make episodes side by side; changes no byte of the files
    overwrite: bool = False  # replace a dataset of another seed, size or policies, or files without a manifest
    list: bool = False  # instead, show every id: size, where it is, or how to get it
    check: str | None = None  # instead, check this file, folder or dataset id, generated or official


def print_list(dataset_dir: str | None) -> None:
    """Print every dataset id."""
    command = "python make_dataset.py --dataset <id>" + (f" --dataset_dir {dataset_dir}" if dataset_dir else "")
    sections = []
    for title, datasets, source in BENCHMARKS:
        made = [dataset for dataset in datasets.values() if dataset.local]
        official = [dataset for dataset in datasets.values() if not dataset.local]
        sections.append(section(f"{title}, made here", command, made, dataset_dir))
        for url in dict.fromkeys(dataset.url for dataset in official):
            group = [dataset for dataset in official if dataset.url == url]
            address = f"{url}/{source}" if url else source
            sections.append(section(f"{title}, official files", address, group, dataset_dir))
    sections.append(f"local/humanoidmaze-*: {HUMANOID_MESSAGE}.")
    print("\n\n".join(sections))


def section(title: str, source: str, datasets: list[Dataset], dataset_dir: str | os.PathLike | None) -> str:
    """Title, folder, source, and a line each dataset in aligned columns."""
    headings = ("id", "size", "content", "file, or the path of what is there")
    lines = [headings, *(describe(dataset, dataset_dir) for dataset in datasets)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1] + [0]
    table = ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
    folder = datasets[0].paths(dataset_dir)[0].parent
    return "\n".join([title, f"  folder: {folder}", f"  source: {source}", "", *table])


def describe(dataset: Dataset, dataset_dir: str | os.PathLike | None) -> tuple[str, ...]:
    paths, manifest, content = dataset.paths(dataset_dir), dataset.manifest(dataset_dir), "official"
    if dataset.local:
        family = find_family(dataset.id)
        content = f"{family.default_size(dataset.id):,} {family.unit}"
        if manifest is not None:
            content = f"{manifest.get(f'num_{family.unit}', 0):,} {family.unit}, seed {manifest.get('seed')}"
    if not paths[0].exists() or dataset.local and manifest is None:
        return dataset.id, "-", content, paths[0].name
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    return dataset.id, f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB", content, str(paths[0])


def main(argv: list[str] | None = None) -> None:
    config = parse_config(MakeDatasetConfig, argv, __doc__)
    if config.list:
        print_list(config.dataset_dir)
    elif config.check is not None:
        sys.exit(run_check(config.check, config.dataset_dir))
    else:
        unit = find_family(config.dataset).unit
        sizes = {"episodes": config.num_episodes, "transitions": config.num_transitions}
        size = sizes.pop(unit)
        if any(sizes.values()):
            raise UserError(f"{config.dataset} is counted in {unit}; use --num_{unit}")
        where = {"dataset_dir": config.dataset_dir, "experts_dir": config.experts_dir}
        print(generate(config.dataset, size, config.seed, jobs=config.jobs, overwrite=config.overwrite, **where))


if __name__ == "__main__":
    run_cli(main)
