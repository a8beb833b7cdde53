"""Which of POGO's choices matter? Changes one at a time and prints a table as those of docs/pogo.md.

    python benchmarks/ablate_pogo.py --jobs 2
    python benchmarks/ablate_pogo.py --w2_weights 0.4 --variants default "target copy" "constant learning rate"

Every row is several seeds of pogo_main.py on the same data and updates; a finished run is not run again, so the command
can be cut and repeated. Scores are the last checkpoint's, z = 0, over `--final_runs` times 10 episodes; "lower" says in
what share of the logged rows of the last tenth of training an actor's energy lay below that of staying where the chain
stood. Mean, and the half-width of a 95% t-interval over seeds.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark_data.local import generate_if_missing
from benchmarks.ablation import check_variants, print_table, run_variants, train
from comparison_report import last_tenth
from runs.cli import parse_config, run_cli
from runs.metrics import read_metrics

VARIANTS = {
    "default": [],
    "target copy": ["--td_actor", "target"],  # of actor 0, from which the critics bootstrap
    "constant learning rate": ["--no_lr_decay"],
    "no follow": ["--no_follow"],
    "Q not normalised": ["--q_normalization", "none"],
}


@dataclass
class AblatePOGOConfig:
    env: str = "local/hopper-medium-v2"  # made here when it is missing
    dataset_dir: str | None = None  # folder of the data; default: as pogo_main.py
    w2_weights: tuple[float, ...] = (0.4, 0.5, 0.5)  # the chain; --variants names those that concern a shorter one
    max_timesteps: int = 20_000  # updates of a run
    final_runs: int = 5  # evaluations of 10 episodes at the end
    variants: tuple[str, ...] = tuple(VARIANTS)  # rows of the table
    num_seeds: int = 3  # seeds 0, 1, ... of every variant
    jobs: int = 1  # runs at once, one CPU thread each
    log_dir: str = "logs/ablation_pogo"  # a run's directory is below, by dataset, weights, updates, variant, seed


def run_one(name: str, seed: int, config: AblatePOGOConfig) -> dict[str, float]:
    """Train one variant and seed, unless it is finished; each actor's score, and how often its energy fell."""
    weights = [f"{weight:g}" for weight in config.w2_weights]
    where = Path(config.log_dir) / config.env / f"w2_{'_'.join(weights)}" / f"updates_{config.max_timesteps}"
    run_dir = where / name.replace(" ", "_") / f"seed_{seed}"
    flags = ["--env", config.env, "--w2_weights", *weights, "--seed", str(seed), "--eval_workers", "0"]
    flags += ["--dataset_dir", config.dataset_dir] if config.dataset_dir else []
    flags += ["--max_timesteps", str(config.max_timesteps), "--eval_freq", str(max(config.max_timesteps // 5, 1))]
    flags += ["--final_runs", str(config.final_runs)]
    flags += ["--log_freq", str(max(config.max_timesteps // 100, 1)), *VARIANTS[name]]
    summary, metrics = train("pogo_main.py", run_dir, flags), read_metrics(run_dir / "training")
    figures = {f"actor {number}": summary[f"actor_{number}/deterministic/score"] for number in range(len(weights))}
    for number in range(1, len(weights)):
        figures[f"{number} lower, %"] = 100 * last_tenth(metrics[f"chain/actor_{number}/energy_fell"])
    return figures


def main(argv: list[str] | None = None) -> None:
    config = parse_config(AblatePOGOConfig, argv, __doc__)
    check_variants(config.variants, VARIANTS, config.num_seeds, config.jobs)
    generate_if_missing(config.env, config.dataset_dir)
    figures = run_variants(
        config.variants, config.num_seeds, config.jobs, lambda name, seed: run_one(name, seed, config)
    )
    weights = " ".join(f"{weight:g}" for weight in config.w2_weights)
    title = f"{config.env}, w {weights}, {config.max_timesteps:,} updates, {config.num_seeds} seeds, last checkpoint, "
    title += f"{10 * config.final_runs} episodes"
    columns = {name: ".0f" if name.endswith("%") else ".1f" for name in next(iter(figures.values()))}
    print_table(title, "variant", columns, figures)


if __name__ == "__main__":
    run_cli(main)
