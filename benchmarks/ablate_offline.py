"""Does each part of the offline stage matter? Takes one away at a time and prints the table of docs/opso.md.

    python benchmarks/ablate_offline.py --jobs 2

Every row is several seeds of offline_trainer.py on the same data and updates; a finished run is not run again, so the
command can be cut and repeated. Figures are those of the last checkpoint: mean, and the half-width of a 95% t-interval
over seeds.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark_data.local import generate_if_missing
from benchmarks.ablation import check_variants, print_table, run_variants, train
from runs.cli import parse_config, run_cli

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
COLUMNS = dict.fromkeys(("value_distance_spearman", "code_rank", "code_std"), ".3f")


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
    return train("offline_trainer.py", run_dir, [*flags, "--seed", str(seed), "--no_plot_maps", *VARIANTS[name]])


def main(argv: list[str] | None = None) -> None:
    config = parse_config(AblateOfflineConfig, argv, __doc__)
    check_variants(config.variants, VARIANTS, config.num_seeds, config.jobs)
    generate_if_missing(config.dataset, config.dataset_dir)
    figures = run_variants(
        config.variants, config.num_seeds, config.jobs, lambda name, seed: run_one(name, seed, config)
    )
    title = f"{config.dataset}, {config.num_epochs} epochs, {config.num_seeds} seeds, last checkpoint"
    print_table(title, "losses", COLUMNS, figures)


if __name__ == "__main__":
    run_cli(main)
