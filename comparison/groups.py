"""The finished runs of a comparison, read from their directories and grouped by dataset, algorithm and weights."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d4rl_utils import is_official
from runs.chain import read_summary
from runs.metrics import episodes_by_policy, read_metrics
from utils import UserError, one_line

POGO = "pogo"  # the chain with critics of its own, which is not named in labels
MODES = ("deterministic", "stochastic")


@dataclass(eq=False)
class ComparedRun:
    """A run of the comparison, finished or not."""

    dataset: str
    weights: tuple[float, ...]
    variant: int  # which of its dataset's weights: 0, 1, ...
    seed: int
    run_dir: Path
    finished: bool = False
    note: str = ""  # why it is not finished
    seconds: float | None = None  # that its processes took, where they are known
    algorithm: str = POGO  # whose critics the chain has

    @property
    def label(self) -> str:
        """`0.4 0.5`, or `iql 0.4 0.5`."""
        words = [] if self.algorithm == POGO else [self.algorithm]
        return " ".join([*words, *(f"{weight:g}" for weight in self.weights)])

    @property
    def name(self) -> str:
        weights = " ".join(f"{weight:g}" for weight in self.weights)
        return f"{self.dataset}{'' if self.algorithm == POGO else f' {self.algorithm}'} w2 {weights} seed {self.seed}"


@dataclass
class Result:
    """What a finished run left. `final` and `best` are keyed by actor and mode."""

    run: ComparedRun
    summary: dict[str, Any]  # finished.json
    final: dict[tuple[int, str], np.ndarray]  # scores [episodes] of the last checkpoint
    best: dict[tuple[int, str], tuple[float, int]]  # highest mean score of an evaluation in training, and its update
    metrics: dict[str, list[float]]  # training/metrics.csv


@dataclass
class Group:
    """The finished runs of one dataset, algorithm and list of weights: they differ in their seeds."""

    results: list[Result]

    @property
    def run(self) -> ComparedRun:
        """The first one, whose dataset, algorithm and weights are those of all."""
        return self.results[0].run

    @property
    def name(self) -> str:
        """The dataset; one that has an official file's name and cannot be it says so."""
        other = is_official(self.run.dataset, self.results[0].summary["transitions"]) is False
        return f"{self.run.dataset} (not the official file)" if other else self.run.dataset

    @property
    def actors(self) -> int:
        return len(self.run.weights)

    def scores(self, actor: int, mode: str = MODES[0]) -> np.ndarray:
        """Mean scores of the last checkpoint, [seeds]."""
        return np.array([result.final[actor, mode].mean() for result in self.results])

    def mean(self, value: Callable[[Result], float]) -> float:
        return float(np.mean([value(result) for result in self.results]))

    @property
    def official(self) -> bool:
        return all(is_official(self.run.dataset, result.summary["transitions"]) is True for result in self.results)


def load_result(run: ComparedRun) -> Result:
    """Read a finished run's directory. Raises UserError where a file of it is missing or damaged."""
    folder = run.run_dir / "training"
    summary = read_summary(run.run_dir)
    final, training = episodes_by_policy(folder / "evaluations.csv")
    expected = {(actor, mode) for actor in range(len(run.weights)) for mode in MODES}
    if final.keys() != expected or training.keys() != expected:
        raise UserError(f"{folder / 'evaluations.csv'}: lacks evaluations of some actor; train the run anew")
    best = {}
    for key, evaluations in training.items():
        means = {step: float(np.mean(scores)) for step, scores in evaluations.items()}
        step = max(means, key=means.get)
        best[key] = (means[step], step)
    metrics = read_metrics(folder)
    for actor in range(len(run.weights)):
        before, after = (metrics.get(f"chain/actor_{actor}/{name}", []) for name in ("energy_before", "energy"))
        metrics[f"chain/actor_{actor}/energy_won"] = [b - a for b, a in zip(before, after, strict=True)]
    scores = {key: np.array([row["score"] for row in rows]) for key, rows in final.items()}
    return Result(run, summary, scores, best, metrics)


def collect(runs: list[ComparedRun]) -> list[Group]:
    """The finished runs by dataset and weights, in the order given. A run whose files fail is noted as unfinished."""
    groups: dict[tuple, Group] = {}
    for run in runs:
        if not run.finished:
            continue
        try:
            result = load_result(run)
        except UserError as error:
            run.finished, run.note = False, one_line(error)
            continue
        group = groups.setdefault((run.dataset, run.algorithm, run.weights), Group([]))
        group.results.append(result)
        for key in ("transitions", "data_score"):
            if result.summary[key] != group.results[0].summary[key]:
                raise UserError(
                    f"{run.run_dir}: trained on other data than {group.run.run_dir} ({key} {result.summary[key]} "
                    f"and {group.results[0].summary[key]}); train both on the same, in another --log_dir"
                )
    return list(groups.values())


CSV_COLUMNS = (
    *("dataset", "official_data", "algorithm", "w2_weights", "seed", "actor", "actors", "mode", "step", "score"),
    *("episodes", "best_score_in_training", "best_step", "data_score", "transitions", "seconds", "run_dir"),
)


def csv_text(groups: list[Group]) -> str:
    """results.csv: a row for each finished run, actor and mode."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for group in groups:
        for result in group.results:
            run, summary = result.run, result.summary
            weights, seconds = " ".join(f"{weight:g}" for weight in run.weights), run.seconds
            for (actor, mode), scores in sorted(result.final.items()):
                cells = (run.dataset, group.official, run.algorithm, weights, run.seed, actor, group.actors, mode)
                cells += (summary["steps"], float(scores.mean()), len(scores), *result.best[actor, mode])
                cells += (summary["data_score"], summary["transitions"])
                writer.writerow((*cells, "" if seconds is None else round(seconds, 1), run.run_dir))
    return file.getvalue()
