"""What the ablation scripts beside this file share: variants of one command, each over seeds, and their table."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runs.cli import load_yaml
from utils import UserError, progress

Figures = dict[str, float]


def check_variants(names: Sequence[str], known: dict[str, list[str]], num_seeds: int, jobs: int) -> None:
    """UserError for a variant that does not exist, or for none at all of something."""
    if num_seeds < 1 or jobs < 1:
        raise UserError(f"--num_seeds {num_seeds} --jobs {jobs}: at least 1 each")
    for name in names:
        if name not in known:
            raise UserError(f"--variants '{name}': choose from {', '.join(map(repr, known))}")


def train(script: str, run_dir: Path, flags: list[str]) -> dict[str, Any]:
    """Train one run on one CPU thread, unless it is finished, and return its finished.json.

    Raises UserError if it fails, and where the directory holds a run on other data.
    """
    stored = load_yaml(run_dir / "config.yaml") if (run_dir / "config.yaml").exists() else {}
    asked = flags[flags.index("--dataset_dir") + 1] if "--dataset_dir" in flags else None
    if stored and stored.get("dataset_dir") != asked:
        raise UserError(f"{run_dir}: dataset_dir was {stored.get('dataset_dir')} and is now {asked}; change --log_dir")
    command = [sys.executable, str(ROOT / script), *flags, "--run_dir", str(run_dir), "--resume"]
    command += ["--device", "cpu", "--no_tensorboard"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads((run_dir / "finished.json").read_text())


def run_variants(
    names: Sequence[str], num_seeds: int, jobs: int, run_one: Callable[[str, int], Figures]
) -> dict[tuple[str, int], Figures]:
    """`run_one(name, seed)` for every variant and seed, so many at once."""
    tasks = [(name, seed) for name in names for seed in range(num_seeds)]
    with ThreadPoolExecutor(jobs) as pool:
        try:
            results = pool.map(lambda task: run_one(*task), tasks)
            return dict(zip(tasks, progress(results, "ablation", total=len(tasks), unit="run"), strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # do not start what is still queued
            raise


def print_table(title: str, first: str, columns: dict[str, str], figures: dict[tuple[str, int], Figures]) -> None:
    """Mean over seeds, and the half-width of its 95% t-interval.

    Args:
        title: line above the table.
        first: header of the variants' column.
        columns: name of a figure -> how it is printed, as in `.3f`.
        figures: of each variant and seed.
    """
    from scipy.stats import t as student  # late: --help does without

    print(f"{title}\n\n| {first} | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for variant in dict.fromkeys(name for name, _ in figures):
        rows = [found for (name, _), found in figures.items() if name == variant]
        half = student.ppf(0.975, max(len(rows) - 1, 1)) / np.sqrt(len(rows))
        cells = []
        for column, form in columns.items():
            values = np.array([row[column] for row in rows])
            spread = f" ± {half * values.std(ddof=1):{form}}" if len(rows) > 1 else ""
            cells.append(f"{values.mean():{form}}{spread}")
        print(f"| {variant} | " + " | ".join(cells) + " |")
