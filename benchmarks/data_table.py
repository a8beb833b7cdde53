"""The table of docs/data.md: makes every local dataset at its default size, and prints what its manifest says.

    python benchmarks/data_table.py --jobs 2

Seconds are those of the generation, on the machine that made the file. What is there already is not made again; a row
of another size or seed than the default says so.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark_data.generation import Family
from benchmark_data.local import FAMILIES, find_family, generate_if_missing
from offline_data import find_dataset
from runs.cli import parse_config, run_cli
from utils import Count


@dataclass
class DataTableConfig:
    ids: tuple[str, ...] = ()  # rows of the table; default every id that can be made but the full mazes
    dataset_dir: str | None = None  # where datasets are kept; else the benchmark's own variable, else datasets/
    jobs: Count = 1  # processes


def outcome(manifest: dict) -> str:
    """Mean return, or how often goals were reached."""
    if manifest["returns"]:
        return f"return {manifest['returns']['mean']:.0f} ± {manifest['returns']['std']:.0f}"
    if "goals_reached_per_1000_steps" in manifest:
        return f"{manifest['goals_reached_per_1000_steps']:.1f} goals in 1000 steps"
    if "goal_reached" in manifest:
        return f"{100 * manifest['goal_reached']:.0f}% reach their goal"
    return "random directions"


def deviation(family: Family, manifest: dict) -> str:
    """How a dataset was asked for where that is not the default: its size, its seed; empty where it is."""
    size, default = manifest.get(f"num_{family.unit}"), family.default_size(manifest["id"])
    found = [f"{size:,} {family.unit}, not {default:,}"] if size != default else []
    found += [f"seed {manifest['seed']}"] if manifest["seed"] != 0 else []
    return f" (not the default: {'; '.join(found)})" if found else ""


def main(argv: list[str] | None = None) -> None:
    config = parse_config(DataTableConfig, argv, __doc__)
    print("| id | episodes | transitions | outcome | MB | seconds |\n|---|---|---|---|---|---|")
    for dataset_id in config.ids or [known for family in FAMILIES for known in family.ids if "-full-" not in known]:
        generate_if_missing(dataset_id, config.dataset_dir, config.jobs)
        family = find_family(dataset_id)
        manifest = find_dataset(dataset_id).manifest(config.dataset_dir)
        size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
        name = f"`{dataset_id}`{deviation(family, manifest)}"
        print(
            f"| {name} | {manifest['episodes']:,} | {manifest['transitions']:,} | {outcome(manifest)} "
            f"| {size:.1f} | {manifest['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    run_cli(main)
