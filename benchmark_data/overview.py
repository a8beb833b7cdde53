"""`make_dataset.py --list`: every dataset id by benchmark, its size, and where it is or how to get it."""

import os

import d4rl_utils
import dmc_utils
import ogbench_utils
from benchmark_data.local import find_family
from dataset_files import Dataset

HEADINGS = ("id", "size", "content", "file, or the path of what is there")
# Title, datasets, how the official files get there.
BENCHMARKS = (
    ("OGBench mazes", ogbench_utils.DATASETS, "<file>, with <id>-val.npz; fetched when first used"),
    ("D4RL", d4rl_utils.DATASETS, "<file>; fetched when first used"),
    ("walker study", dmc_utils.DATASETS, "the study's own folders, not published at an address"),
)


def sections(dataset_dir: str | os.PathLike | None, only: str) -> list[str]:
    """A text for each benchmark: what can be made here, then the official files, of the ids that hold `only`."""
    flag = f" --dataset_dir {dataset_dir}" if dataset_dir else ""
    found = []
    for title, datasets, source in BENCHMARKS:
        shown = [dataset for name, dataset in datasets.items() if only in name]
        made = [dataset for dataset in shown if dataset.local and dataset.generated]
        official = [dataset for dataset in shown if not dataset.local]
        found += [_section(f"{title}, made here", f"python make_dataset.py --dataset <id>{flag}", made, dataset_dir)]
        for url in dict.fromkeys(dataset.url for dataset in official):
            group = [dataset for dataset in official if dataset.url == url]
            found += [_section(f"{title}, official files", "/".join(filter(None, (url, source))), group, dataset_dir)]
    return [text for text in found if text]


def _section(title: str, source: str, datasets: list[Dataset], dataset_dir: str | os.PathLike | None) -> str:
    """Title, folder, source, and a line each dataset in aligned columns."""
    if not datasets:
        return ""
    lines = [HEADINGS, *(_row(dataset, dataset_dir) for dataset in datasets)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1] + [0]
    table = ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
    folder = datasets[0].paths(dataset_dir)[0].parent
    return "\n".join([title, f"  folder: {folder}", f"  source: {source}", "", *table])


def _row(dataset: Dataset, dataset_dir: str | os.PathLike | None) -> tuple[str, ...]:
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
