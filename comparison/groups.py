"""The finished runs of a comparison, read from their directories and grouped by dataset, algorithm and weights."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d4rl_utils import is_official
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

    def score(self, actor: int, mode: str = MODES[0]) -> float:
        return float(self.final[actor, mode].mean())


@dataclass
class Group:
    """The finished runs of one dataset, algorithm and list of weights: they differ in their seeds."""

    dataset: str
    weights: tuple[float, ...]
    variant: int
    algorithm: str = POGO
    results: list[Result] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Weights, after the algorithm's name."""
        return label(self.algorithm, self.weights)

    @property
    def name(self) -> str:
        """The dataset; one that has an official file's name and cannot be it says so."""
        other = is_official(self.dataset, self.results[0].summary["transitions"]) is False
        return f"{self.dataset} (not the official file)" if other else self.dataset

    @property
    def actors(self) -> int:
        return len(self.weights)

    def scores(self, actor: int, mode: str = MODES[0]) -> np.ndarray:
        """Mean scores of the last checkpoint, [seeds]."""
        return np.array([result.score(actor, mode) for result in self.results])

    def mean(self, value: Callable[[Result], float]) -> float:
        return float(np.mean([value(result) for result in self.results]))

    @property
    def official(self) -> bool:
        return all(is_official(self.dataset, result.summary["transitions"]) is True for result in self.results)


def label(algorithm: str, weights: tuple[float, ...]) -> str:
    """`0.4 0.5`, or `iql 0.4 0.5`."""
    words = [] if algorithm == POGO else [algorithm]
    return " ".join([*words, *(f"{weight:g}" for weight in weights)])


def load_result(run: ComparedRun) -> Result:
    """Read a finished run's directory. Raises UserError where a file of it is missing or damaged."""
    folder = run.run_dir / "training"
    try:
        summary = json.loads((run.run_dir / "finished.json").read_text())
        summary["transitions"], summary["data_score"], summary["steps"]  # noqa: B018  raises where one is missing
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.run_dir / 'finished.json'}: cannot be used ({one_line(repr(error))})") from None
    final, training = episodes_by_policy(folder / "evaluations.csv")
    expected = {(actor, mode) for actor in range(len(run.weights)) for mode in MODES}
    if final.keys() != expected or training.keys() != expected:
        raise UserError(f"{folder / 'evaluations.csv'}: lacks evaluations of some actor; train the run anew")
    best = {
        key: max((float(np.mean(scores)), -step) for step, scores in steps.items()) for key, steps in training.items()
    }
    scores = {key: np.array([row["score"] for row in rows]) for key, rows in final.items()}
    best = {key: (score, -step) for key, (score, step) in best.items()}
    metrics = read_metrics(folder)
    for actor in range(len(run.weights)):
        before, after = (metrics.get(f"chain/actor_{actor}/{name}", []) for name in ("energy_before", "energy"))
        metrics[f"chain/actor_{actor}/energy_won"] = [b - a for b, a in zip(before, after, strict=True)]
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
        identity = (run.dataset, run.algorithm, run.weights)
        group = Group(run.dataset, run.weights, run.variant, run.algorithm)
        results = groups.setdefault(identity, group).results
        results.append(result)
        for key in ("transitions", "data_score"):
            if result.summary[key] != results[0].summary[key]:
                raise UserError(
                    f"{run.run_dir}: trained on other data than {results[0].run.run_dir} ({key} {result.summary[key]} "
                    f"and {results[0].summary[key]}); train both on the same, in another --log_dir"
                )
    return list(groups.values())


CSV_COLUMNS = (
    *("dataset", "official_data", "algorithm", "w2_weights", "seed", "actor", "actors", "mode", "step", "score"),
    *("episodes", "best_score_in_training", "best_step", "data_score", "transitions", "seconds", "run_dir"),
)


def csv_text(groups: list[Group]) -> str:
    """results.csv: a row for each finished run, actor and mode."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for group in groups:
        for result in group.results:
            for (actor, mode), scores in sorted(result.final.items()):
                best, best_step = result.best[actor, mode]
                weights = label(POGO, group.weights)
                cells = (group.dataset, group.official, group.algorithm, weights)
                cells += (result.run.seed, actor, group.actors, mode)
                cells += (result.summary["steps"], float(scores.mean()), len(scores), best, best_step)
                cells += (result.summary["data_score"], result.summary["transitions"])
                cells += ("" if result.run.seconds is None else round(result.run.seconds, 1), result.run.run_dir)
                writer.writerow(dict(zip(CSV_COLUMNS, cells, strict=True)))
    return file.getvalue()
