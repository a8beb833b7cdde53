"""Does each part of the offline stage matter? Takes one away at a time and prints the table of docs/opso.md.

    python benchmarks/ablate_offline.py --jobs 2

Every row is several seeds of offline_trainer.py on the same data and updates; a finished run is not run again, so the
command can be cut and repeated. Figures are those of the last checkpoint: mean, and the half-width of a 95% t-interval
over seeds.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import make_dataset
from utils import UserError, parse_config, progress, run_cli

VARIANTS = {
    "all losses": [],
    "no critic": ["--beta_critic", "0"],
    "no V": ["--beta_v", "0"],
    "no state": ["--beta_s", "0"],
    "no reward": ["--beta_r", "0"],
    "no InfoNCE": ["--beta_nce", "0"],
    "no alignment": ["--beta_a", "0"],
    "one-step targets (horizon 1)": ["--horizon", "1"],
    "histories everywhere, as the original": [
        *("--target_history", "--history_dropout", "0", "--history_horizon", "50"),
    ],
}
COLUMNS = ("value_distance_spearman", "code_rank", "code_std")


@dataclass
class AblateOfflineConfig:
    dataset: str = "local/pointmaze-medium-navigate-v0"  # made here when it is missing
    dataset_dir: str | None = None  # folder of the data; default OGBENCH_DATASET_DIR, else datasets/ beside the code
    num_epochs: int = 60  # of offline_trainer.py, 7 updates each on 100 trajectories
    variants: tuple[str, ...] = tuple(VARIANTS)  # rows of the table
    num_seeds: int = 3  # seeds 0, 1, ... of every variant
    jobs: int = 1  # runs at once, one CPU thread each
    log_dir: str = "logs/ablation"  # a run's directory is <log_dir>/epochs_<n>/<variant>/seed_<seed>


def run_one(name: str, seed: int, config: AblateOfflineConfig) -> dict[str, float]:
    """Train one variant and seed, unless it is finished; its last figures."""
    run_dir = Path(config.log_dir) / f"epochs_{config.num_epochs}" / name.replace(" ", "_") / f"seed_{seed}"
    flags = ["--dataset", config.dataset, "--num_epochs", str(config.num_epochs)]
    flags += ["--dataset_dir", config.dataset_dir] if config.dataset_dir else []
    flags += ["--seed", str(seed), "--run_dir", str(run_dir), "--no_plot_maps", "--no_tensorboard", "--device", "cpu"]
    flags += ["--resume", *VARIANTS[name]]
    command = [sys.executable, str(ROOT / "offline_trainer.py"), *flags]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads((run_dir / "finished.json").read_text())


def main(argv: list[str] | None = None) -> None:
    config = parse_config(AblateOfflineConfig, argv, __doc__)
    if config.num_seeds < 1 or config.jobs < 1:
        raise UserError(f"--num_seeds {config.num_seeds} --jobs {config.jobs}: at least 1 each")
    for name in config.variants:
        if name not in VARIANTS:
            raise UserError(f"--variants '{name}': choose from {', '.join(map(repr, VARIANTS))}")
    make_dataset.generate_if_missing(config.dataset, config.dataset_dir)
    tasks = [(name, seed) for name in config.variants for seed in range(config.num_seeds)]
    with ThreadPoolExecutor(config.jobs) as pool:
        try:
            results = pool.map(lambda task: run_one(*task, config), tasks)
            figures = dict(zip(tasks, progress(results, "ablation", total=len(tasks), unit="run"), strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # do not start what is still queued
            raise
    print(f"{config.dataset}, {config.num_epochs} epochs, {config.num_seeds} seeds, last checkpoint\n")
    print("| losses | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    half = student.ppf(0.975, max(config.num_seeds - 1, 1)) / np.sqrt(config.num_seeds)
    for name in config.variants:
        cells = []
        for column in COLUMNS:
            values = np.array([figures[name, seed][column] for seed in range(config.num_seeds)])
            spread = f" ± {half * values.std(ddof=1):.3f}" if config.num_seeds > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_cli(main)
