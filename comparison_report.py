"""What a comparison found: results.csv, results.md and report.html, one self-contained page.

Scores are those of each run's last checkpoint, from the episodes that it kept in training/evaluations.csv. Statistics
follow rliable (Agarwal et al., 2021): the interquartile mean is the mean of the middle half of all scores, and an
interval holds the middle 95% of a statistic over 10,000 bootstrap draws of seeds, each dataset (stratum) drawn by
itself. A few seeds give few different draws, so that such an interval is rather too narrow. Two seeds give no more than
their range, which is written as one, and one seed gives nothing.

The figures of other methods are for D4RL's official files; beside runs on other data they are marked (`is_official`).
"""

from __future__ import annotations

import csv
import datetime
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d4rl_utils import is_official
from runs.metrics import read_episodes, read_metrics
from utils import UserError, one_line, write_text_atomic

DRAWS = 10_000  # of the bootstrap
STILL = 1e-6  # a distance below this is none: of two Gaussians or two points the floor is 0
POGO = "pogo"  # the chain with critics of its own, which is not named in labels
LEAST_SEEDS = 3  # for an interval; of two seeds a bootstrap's ends are the two scores
MODES = ("deterministic", "stochastic")
METHODS = ("TD3+BC", "IQL", "CQL", "ReBRAC", "EDAC", "MOBILE", "POGO paper, 1 / 2 steps")
# Scores on the official files, in the order of METHODS, last checkpoints: CORL's README and the papers.
PUBLISHED = {
    "halfcheetah-medium-v2": ("48.1", "48.3", "47.0", "64.0", "67.7", "75.8", "58.6 / 61.9"),
    "halfcheetah-medium-replay-v2": ("44.8", "44.5", "45.0", "51.2", "62.1", "71.9", "52.3 / 53.8"),
    "halfcheetah-medium-expert-v2": ("90.8", "94.7", "95.6", "103.8", "104.8", "100.9", "96.7 / 50.5"),
    "hopper-medium-v2": ("60.4", "67.5", "59.1", "102.3", "101.7", "103.6", "64.7 / 74.8"),
    "hopper-medium-replay-v2": ("64.4", "97.4", "95.1", "95.0", "99.7", "105.1", "85.7 / 99.3"),
    "hopper-medium-expert-v2": ("101.2", "107.4", "99.3", "109.5", "105.2", "112.5", "100.7 / 93.7"),
    "walker2d-medium-v2": ("82.7", "80.9", "80.8", "85.8", "93.4", "88.3", "85.7 / 86.7"),
    "walker2d-medium-replay-v2": ("85.6", "82.2", "73.1", "84.3", "87.1", "90.5", "93.8 / 91.6"),
    "walker2d-medium-expert-v2": ("110.0", "111.7", "109.6", "111.9", "114.8", "114.5", "110.9 / 111.9"),
    "antmaze-umaze-v2": ("71", "77", "93", "98", "0", "", "92 / 84"),
    "antmaze-umaze-diverse-v2": ("45", "54", "37", "84", "0", "", "52 / 36"),
    "antmaze-medium-play-v2": ("0", "66", "66", "90", "0", "", "26 / 34"),
    "antmaze-medium-diverse-v2": ("0", "74", "67", "84", "0", "", "48 / 25"),
    "antmaze-large-play-v2": ("0", "42", "21", "52", "0", "", "30 / 15"),
    "antmaze-large-diverse-v2": ("0", "30", "21", "64", "0", "", "23 / 6"),
}
OTHER_DATA = "†"
COLUMNS, SHOWN = 100, 10  # of a terminal; runs without a result that are listed there


@dataclass
class ComparedRun:
    """A run of the comparison, finished or not."""

    dataset: str
    weights: tuple[float, ...]
    variant: int  # which of its dataset's weights
    seed: int
    run_dir: Path
    finished: bool
    note: str = ""  # why it is not finished
    seconds: float | None = None  # that its processes took, where they are known
    algorithm: str = POGO  # whose critics the chain has


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


# ----------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: without the lowest and highest quarter, each rounded down.

    Of fewer than four scores nothing is left out, and it is their mean.
    """
    ordered = np.sort(scores, axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return np.asarray(scores).mean(-1)


def bootstrap_interval(
    strata: Iterable[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a statistic of all scores, seeds drawn with replacement within each stratum.

    Args:
        strata: scores [seeds] of each dataset.
        statistic: of the last axis of an array.

    Returns the ends, nan where a stratum has fewer than two seeds.
    """
    generator, drawn = np.random.default_rng(seed), []
    for scores in map(np.asarray, strata):
        if len(scores) < 2:
            return math.nan, math.nan
        drawn.append(scores[generator.integers(len(scores), size=(draws, len(scores)))])
    low, high = np.percentile(statistic(np.concatenate(drawn, axis=1)), [2.5, 97.5])
    return float(low), float(high)


def score_range(strata: Iterable[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """The statistic of every stratum's lowest score, and of every one's highest: no draw of seeds lies beyond them."""
    strata = [np.asarray(scores) for scores in strata]
    low, high = (np.concatenate([np.full(len(s), end(s)) for s in strata]) for end in (np.min, np.max))
    return float(statistic(low)), float(statistic(high))


def paired_interval(gains: np.ndarray) -> tuple[float, float]:
    """95% t-interval of a mean gain over seeds; nan with fewer than three, or where all are the same.

    Equal gains say that scores move in steps, as antmaze's do, not that nothing varies. With three seeds a bootstrap
    would be far too sure.
    """
    from scipy.stats import t as student  # late: it takes a third of a second, and --help does without

    if len(gains) < LEAST_SEEDS or np.ptp(gains) == 0:
        return math.nan, math.nan
    half = student.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / math.sqrt(len(gains))
    return float(gains.mean() - half), float(gains.mean() + half)


def across_seeds(results: list[Result], column: str) -> dict[str, np.ndarray]:
    """A column of metrics.csv at the updates that every seed logged: x, mean, and the ends of its interval, [T] each.

    The ends are bootstrap intervals of the mean, 500 draws; nan with one seed.
    """
    tables = [
        {
            step: value
            for step, value in zip(r.metrics["step"], r.metrics.get(column, []), strict=False)
            if _known(value)
        }
        for r in results
    ]
    steps = sorted(set.intersection(*map(set, tables)))
    values = np.array([[table[step] for step in steps] for table in tables])
    low = high = np.full(len(steps), math.nan)
    if len(results) > 1 and steps:
        rows = np.random.default_rng(0).integers(len(results), size=(500, len(results)))
        low, high = np.percentile(values[rows].mean(1), [2.5, 97.5], axis=0)
    return {"x": np.array(steps, dtype=float), "mean": values.mean(0), "low": low, "high": high}


def _known(value: float) -> bool:
    return math.isfinite(value)


# ----------------------------------------------------------------------------------------------------------------
# Reading runs
# ----------------------------------------------------------------------------------------------------------------


def load_result(run: ComparedRun) -> Result:
    """Read a finished run's directory. Raises UserError where a file of it is missing or damaged."""
    folder = run.run_dir / "training"
    try:
        summary = json.loads((run.run_dir / "finished.json").read_text())
        summary["transitions"], summary["data_score"], summary["steps"]  # noqa: B018  raises where one is missing
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.run_dir / 'finished.json'}: cannot be used ({one_line(repr(error))})") from None
    final: dict[tuple, list[float]] = {}
    training: dict[tuple, dict[int, list[float]]] = {}
    for row in read_episodes(folder / "evaluations.csv"):
        key = (row["actor"], row["mode"])
        if row["evaluation"] == "final":
            final.setdefault(key, []).append(row["score"])
        else:
            training.setdefault(key, {}).setdefault(row["step"], []).append(row["score"])
    expected = {(actor, mode) for actor in range(len(run.weights)) for mode in MODES}
    if final.keys() != expected or training.keys() != expected:
        raise UserError(f"{folder / 'evaluations.csv'}: lacks evaluations of some actor; train the run anew")
    best = {
        key: max((float(np.mean(scores)), -step) for step, scores in steps.items()) for key, steps in training.items()
    }
    scores = {key: np.array(values) for key, values in final.items()}
    best = {key: (score, -step) for key, (score, step) in best.items()}
    return Result(run, summary, scores, best, read_metrics(folder))


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


# ----------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------

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


@dataclass
class Table:
    """Rows of text under a header."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    wide: int  # leading columns that hold words rather than figures
    soft: int = 0  # trailing columns that are no result

    def text(self) -> str:
        """Aligned columns for a terminal."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.header, tuple("-" * width for width in widths), *self.rows]
        return "\n".join(
            "  ".join(f"{cell:{'<' if n < self.wide else '>'}{widths[n]}}" for n, cell in enumerate(line)).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        lines = [self.header, tuple("---" if n < self.wide else "---:" for n in range(len(self.header))), *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)

    def html(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            kinds = ["w" if n < self.wide else "n" for n in range(len(cells))]
            names = [f' class="{kind}{" soft" * (n >= len(cells) - self.soft)}"' for n, kind in enumerate(kinds)]
            return (
                "<tr>"
                + "".join(f"<{tag}{name}>{html.escape(cell)}</{tag}>" for name, cell in zip(names, cells, strict=True))
                + "</tr>"
            )

        body = "\n".join(row(cells, "td") for cells in self.rows)
        return (
            f'<div class="scroll"><table><thead>{row(self.header, "th")}</thead>\n<tbody>{body}</tbody></table></div>'
        )


def _figure(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _with_ends(value: float, ends: tuple[float, float], form: str = ".1f") -> str:
    """A value and, in brackets, its 95% interval where there is one."""
    return f"{value:{form}}" + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if math.isfinite(ends[0]) else "")


def _statistic(strata: list[np.ndarray], what: Callable[[np.ndarray], np.ndarray]) -> str:
    """A statistic of all scores with its 95% interval, or of two seeds with their range in round brackets."""
    value = float(what(np.concatenate(strata)))
    fewest = min(map(len, strata))
    if 1 < fewest < LEAST_SEEDS:
        low, high = score_range(strata, what)
        return f"{value:.1f} ({low:.1f} to {high:.1f})"
    return _with_ends(value, bootstrap_interval(strata, what))


def _statistics(strata: list[np.ndarray]) -> tuple[str, ...]:
    """Mean and IQM, each with its interval or range."""
    return _statistic(strata, mean), _statistic(strata, iqm)


STATISTICS = ("mean [95%]", "IQM [95%]")
BEST = "highest in training (no result)"


def published_cells(dataset: str, official: bool) -> tuple[str, ...]:
    """The other methods' scores on the official file of that name, marked where the runs are on other data."""
    cells = PUBLISHED.get(dataset.removeprefix("local/"), ("",) * len(METHODS))
    return tuple(f"{cell}{'' if official else OTHER_DATA}" if cell else "–" for cell in cells)


def pools(groups: list[Group]) -> list[tuple[str, list[Group]]]:
    """What the rows of a table are over, with a name: each group by itself, then the groups of each suite."""
    return [(group.dataset, [group]) for group in groups] + suites(groups)


def last_actor_table(groups: list[Group]) -> Table:
    """The chain's last actor, deterministic, beside the published figures; a row a group, then a row a suite."""
    rows = []
    for name, members in pools(groups):
        last = members[0].actors - 1
        cells = (name, _weights(members), *_statistics([group.scores(last) for group in members]))
        cells += (str(len(members[0].results)), _episodes(members, last), _data_score(members), _minutes(members))
        rows.append(cells + published_means(members))
    return Table(("dataset", "w2_weights", *STATISTICS, "seeds", "episodes", "data", "minutes", *METHODS), rows, 2)


def terminal_table(groups: list[Group]) -> Table:
    """What of the last actors fits a terminal, and which actor has the highest mean."""
    rows = []
    for name, members in pools(groups):
        strata = [[group.scores(actor) for group in members] for actor in range(members[0].actors)]
        means = [float(mean(np.concatenate(scores))) for scores in strata]
        cells = (name, _weights(members), str(len(members[0].results)), _data_score(members), _figure(means[-1]))
        rows.append((*cells, _statistic(strata[-1], iqm), str(int(np.argmax(means)))))
    return Table(("dataset", "w2_weights", "seeds", "data", "mean", STATISTICS[1], "best"), rows, 2)


def _weights(members: list[Group]) -> str:
    """The weights of all members where they are the same."""
    labels = {group.label for group in members}
    return labels.pop() if len(labels) == 1 else "of each dataset"


def _episodes(groups: list[Group], actor: int) -> str:
    """Final episodes of one actor over all seeds."""
    return str(sum(len(result.final[actor, MODES[0]]) for group in groups for result in group.results))


def _data_score(members: list[Group]) -> str:
    """Mean score of the datasets' own episodes."""
    return _figure(float(np.mean([group.mean(lambda result: result.summary["data_score"]) for group in members])))


def _minutes(members: list[Group]) -> str:
    """Mean wall time of a run, over those whose times are known."""
    known = [[r.run.seconds for r in group.results if r.run.seconds is not None] for group in members]
    return _figure(float(np.mean([np.mean(seconds) for seconds in known])) / 60) if all(known) else "–"


def suites(groups: list[Group]) -> list[tuple[str, list[Group]]]:
    """Groups of the same benchmark and place in their dataset's list of weights, two datasets at least.

    Datasets with fewer finished seeds than others of the suite are left out, as a mean over all would weigh them less.
    """
    found: dict[tuple, list[Group]] = {}
    for group in groups:
        match = re.match(r"(local/)?(halfcheetah|hopper|walker2d|antmaze)-", group.dataset)
        if match:
            name = (match[1] or "") + ("antmaze" if match[2] == "antmaze" else "MuJoCo")
            found.setdefault((name, group.algorithm, group.variant, group.actors), []).append(group)
    complete = []
    for (name, algorithm, variant, _), members in found.items():
        seeds = max(len(group.results) for group in members)
        members = [group for group in members if len(group.results) == seeds]
        if len(members) > 1:
            words = "" if algorithm == POGO else f"{algorithm}, "
            complete.append((f"{len(members)} {name} sets, {words}weights {variant + 1}", members))
    return complete


def published_means(members: list[Group]) -> tuple[str, ...]:
    """The other methods' scores beside a row: of its dataset, or their means over the datasets of a suite."""
    if len(members) == 1:
        return published_cells(members[0].dataset, members[0].official)
    official = all(group.official for group in members)
    columns = zip(*(published_cells(group.dataset, True) for group in members), strict=True)
    published = []
    for cells in columns:
        steps = [[float(text) for text in cell.split(" / ")] for cell in cells if cell != "–"]
        means = " / ".join(f"{value:.1f}" for value in np.mean(steps, 0)) if len(steps) == len(members) else "–"
        published.append(means if official or means == "–" else means + OTHER_DATA)
    return tuple(published)


def actor_table(groups: list[Group]) -> Table:
    """Every actor in both modes; the highest evaluation of training stands last and is marked as no result."""
    rows = []
    for group in groups:
        for actor in range(group.actors):
            for mode in MODES:
                scores = group.scores(actor, mode)
                best = group.mean(lambda result, key=(actor, mode): result.best[key][0])
                cells = (group.dataset, group.label, f"{actor}", mode, *_statistics([scores]), str(len(scores)))
                rows.append((*cells, _episodes([group], actor), _figure(best)))
    return Table(("dataset", "w2_weights", "actor", "mode", *STATISTICS, "seeds", "episodes", BEST), rows, 4, soft=1)


def unfinished_table(runs: list[ComparedRun]) -> Table:
    """Runs without a result, and why."""
    rows = [
        (run.dataset, label(run.algorithm, run.weights), str(run.seed), run.note or "not started")
        for run in runs
        if not run.finished
    ]
    return Table(("dataset", "w2_weights", "seed", "state"), rows, 4)


# ----------------------------------------------------------------------------------------------------------------
# Diagnostics of the chain
# ----------------------------------------------------------------------------------------------------------------


def last_tenth(values: list[float]) -> float:
    """Mean over the last tenth of a run's rows, nan where none of them has a value."""
    tail = [value for value in values[-max(len(values) // 10, 1) :] if _known(value)]
    return float(np.mean(tail)) if tail else math.nan


def last_value(result: Result, actor: int, name: str) -> float:
    """A diagnostic at the end of training, nan where it was not logged."""
    return last_tenth(result.metrics.get(f"chain/actor_{actor}/{name}", []))


def verdict(actor: int, distance: float, floor: float, gains: np.ndarray) -> str:
    """Whether a step of the chain moved, and whether the score says that this helped.

    gains: [seeds], this actor's score less that of the one before it (of the data, for actor 0), same seed, same
    episodes.
    """
    if actor > 0 and distance < max(2 * floor, STILL):
        return "did not move"
    if len(gains) < LEAST_SEEDS:
        return "moved; too few seeds to say more"
    low, high = paired_interval(gains)
    return "moved and helped" if low > 0 else "moved and hurt" if high < 0 else "moved, no clear gain"


def diagnostics_table(groups: list[Group]) -> Table:
    """What each step of each chain did at the end of training, means over seeds."""
    rows = []
    for group in groups:
        for actor in range(group.actors):

            def at_end(name: str, actor: int = actor, group: Group = group) -> float:
                return float(np.mean([last_value(result, actor, name) for result in group.results]))

            own = np.array([result.summary["data_score"] for result in group.results])
            gains = group.scores(actor) - (group.scores(actor - 1) if actor else own)
            distance, floor, blur = at_end("distance"), at_end("floor"), at_end("blur_to_spread")
            cells = (group.dataset, group.label, f"{actor}", verdict(actor, distance, floor, gains))
            cells += (_with_ends(gains.mean(), paired_interval(gains), "+.1f"),)
            cells += (_figure(at_end("energy_before"), 3), _figure(at_end("energy"), 3))
            cells += (_figure(100 * at_end("energy_fell"), 0), f"{distance:.2g}", f"{floor:.2g}" if actor else "–")
            cells += (f"{at_end('q'):.4g}", f"{at_end('spread'):.2g}")
            rows.append((*cells, "–" if not _known(blur) else f"{blur:.2g}{' ⚠' if blur > 1 else ''}"))
    header = ("dataset", "w2_weights", "actor", "step", "score gained [95%]", "energy before", "energy after")
    header += ("fell, % of rows", "distance", "its floor", "Q", "spread", "blur / spread")
    return Table(header, rows, 4)


# ----------------------------------------------------------------------------------------------------------------
# Curves, as SVG that takes its colours from the page
# ----------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 230, 54, 8, 30, 34


@dataclass
class Line:
    """One curve: `curve` is what across_seeds returns, `colour` counts the page's colours."""

    name: str
    colour: int
    curve: dict[str, np.ndarray]
    dashed: bool = False


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers within [low, high], as few as there can be."""
    power = 10 ** math.floor(math.log10(high - low))
    for factor in (2, 1, 0.5, 0.2):
        numbers = range(math.ceil(low / (power * factor)), math.floor(high / (power * factor)) + 1)
        if len(numbers) >= 3:
            break
    return [float(f"{number * power * factor:.12g}") for number in numbers]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between 10**low and 10**high: powers of ten, or 1, 2 and 5 of each, or evenly spaced ones."""
    for factors in ((1,), (1, 2, 5)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        numbers = [float(f"{factor}e{power}") for power in powers for factor in factors]
        ticks = [number for number in numbers if low <= math.log10(number) <= high]
        if len(ticks) >= 3:
            return ticks
    return _ticks(10**low, 10**high)


def _short(value: float, digits: int = 4) -> str:
    """1200000 as 1.2M."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def _labels(ticks: list[float]) -> list[str]:
    """The ticks in words, with as many digits as tell them apart."""
    for digits in range(4, 13):
        labels = [_short(tick, digits) for tick in ticks]
        if len(set(labels)) == len(ticks):
            break
    return labels


def _bounds(arrays: list[np.ndarray]) -> tuple[float, float]:
    """Least and largest finite value, a little apart."""
    values = np.concatenate(arrays)
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    flat = high - low <= 1e-6 * max(abs(low), abs(high))  # rounding errors are no curve
    margin = abs(high) * 0.1 or 1.0 if flat else 0.05 * (high - low)
    return low - margin, high + margin


def chart(title: str, lines: list[Line], baseline: tuple[str, float] | None = None, log: bool = False) -> str:
    """An SVG of curves over updates with their bands; `baseline` is a named horizontal line; `log` for the y axis."""
    lines = [line for line in lines if len(line.curve["x"])]
    if not lines:
        return ""
    scale = (lambda y: np.log10(np.maximum(y, 1e-8))) if log else np.asarray
    shown = [scale(line.curve[name]) for line in lines for name in ("mean", "low", "high")]
    low, high = _bounds(shown + ([np.array([baseline[1]])] if baseline else []))
    right = max(max(line.curve["x"].max() for line in lines), 1.0)

    def at(x: np.ndarray, y: np.ndarray) -> str:
        across = LEFT + np.asarray(x) / right * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))

    parts = [_axes(low, high, right, log, at)]
    if baseline:
        points = at([0, right], np.full(2, baseline[1]))
        parts.append(f'<polyline class="base" points="{points}"><title>{html.escape(baseline[0])}</title></polyline>')
    for line in lines:
        x, ends = line.curve["x"], (line.curve["low"], line.curve["high"])
        if np.isfinite(ends[0]).all():
            band = f"{at(x, scale(ends[1]))} {at(x[::-1], scale(ends[0])[::-1])}"
            parts.append(f'<polygon class="b{line.colour}" points="{band}"/>')
        name = "dot" if line.dashed else "line"
        points = at(x, scale(line.curve["mean"]))
        label = f"{line.name}: {line.curve['mean'][-1]:.4g} at the end"
        parts.append(
            f'<polyline class="{name} c{line.colour}" points="{points}"><title>{html.escape(label)}</title></polyline>'
        )
        if len(x) == 1:
            (place,) = points.split()
            a, b = place.split(",")
            parts.append(f'<circle class="f{line.colour}" cx="{a}" cy="{b}" r="3"/>')
    words = html.escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">'
        f'<text class="t" x="{LEFT}" y="18">{words}</text>{"".join(parts)}</svg>'
    )


def _axes(low: float, high: float, right: float, log: bool, at: Callable) -> str:
    """Grid lines with their numbers."""
    parts = []
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    for tick, label in zip(ticks, _labels(ticks), strict=True):
        left, end = at([0, right], np.full(2, math.log10(tick) if log else tick)).split()
        (x1, y1), (x2, y2) = left.split(","), end.split(",")
        parts.append(f'<line class="grid" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{float(y1) + 4:.1f}" text-anchor="end">{label}</text>')
    ticks = _ticks(0, right)
    for tick, label in zip(ticks, _labels(ticks), strict=True):
        x = LEFT + tick / right * (WIDTH - LEFT - RIGHT)
        anchor = "end" if x > WIDTH - 30 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">updates</text>')
    return "".join(parts)


def score_chart(group: Group) -> str:
    """Deterministic scores of a group's actors over training, the data's own as a dashed line."""
    lines = [
        Line(f"actor {actor}", actor % 6, across_seeds(group.results, f"eval/actor_{actor}/{MODES[0]}/score"))
        for actor in range(group.actors)
    ]
    data = group.mean(lambda result: result.summary["data_score"])
    return chart(f"score, w2_weights {group.label}", lines, ("the data's own episodes", data))


def chain_charts(group: Group) -> str:
    """Q of each actor, the energy that its step won where it is logged, and the distance with its floor."""

    def lines(name: str, actors: Iterable[int], **style: Any) -> list[Line]:
        curves = {actor: across_seeds(group.results, f"chain/actor_{actor}/{name}") for actor in actors}
        # Two Gaussians or two points have a closed form, whose floor is 0: no line on a logarithmic axis.
        known = {actor: curve for actor, curve in curves.items() if np.any(curve["mean"] != 0)}
        return [Line(f"actor {actor}, {name}", actor % 6, curve, **style) for actor, curve in known.items()]

    everyone, later = range(group.actors), range(1, group.actors)
    won = []
    for actor in everyone:
        for result in group.results:
            before = result.metrics.get(f"chain/actor_{actor}/energy_before", [])
            after = result.metrics.get(f"chain/actor_{actor}/energy", [])
            result.metrics[f"chain/actor_{actor}/energy won"] = [b - a for b, a in zip(before, after, strict=True)]
        won += lines("energy won", [actor])
    moved = lines("distance", everyone) + lines("floor", later, dashed=True)
    charts = (
        chart("Q of each actor", lines("q", everyone)),
        chart("energy won by the step", won, ("nothing won", 0.0)) if won else "",
        chart("distance moved; dotted: its floor", moved, log=True),
        chart("spread of an actor's samples", lines("spread", everyone), log=True),
    )
    return "".join(charts)


# ----------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6670; --paper: #fff; --line: #dde2e6; --base: #5b6670;
  --c0: #2166c2; --c1: #c2570c; --c2: #1a8057; --c3: #8b3fb8; --c4: #b3263e; --c5: #7a6a00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8eb; --soft: #9aa5ae; --paper: #14181c; --line: #333b42; --base: #9aa5ae;
    --c0: #6aa9ff; --c1: #ff9d57; --c2: #4fc796; --c3: #cf95f2; --c4: #ff7f92; --c5: #d6c34a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1240px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.4em 0; } h2 { font-size: 1.2rem; margin: 2em 0 0.4em; }
h3 { font-size: 1rem; margin: 1.4em 0 0.3em; }
p { max-width: 75ch; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; margin: 0.8em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.75rem; overflow-wrap: normal; }
th, td { padding: 4px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { white-space: nowrap; } .n { text-align: right; } th { color: var(--soft); font-weight: 600; }
table.notes td { white-space: normal; overflow-wrap: anywhere; min-width: 3em; }
@media (max-width: 600px) { td.w:first-child { white-space: normal; min-width: 11em; max-width: 11em; } }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 10px; }
svg { width: 100%; height: auto; display: block; overflow: visible; } svg text { fill: var(--soft); font-size: 11px; }
svg .t { fill: var(--ink); font-size: 12px; font-weight: 600; } .grid { stroke: var(--line); }
.line, .dot, .base { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.dot { stroke-dasharray: 1.5 4; stroke-linecap: round; }
.base { stroke: var(--base); stroke-dasharray: 6 4; stroke-width: 1.2; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 0.85rem; } .key i { display: inline-block; width: 22px;
  border-top: 3px solid; vertical-align: middle; margin-right: 6px; }
.key .dashes { border-top: 2px dashed var(--base); } .key .dots { border-top: 2px dotted; }
summary { cursor: pointer; margin: 0.5em 0; }
""" + "".join(
    f".c{n} {{ stroke: var(--c{n}); }} .b{n} {{ fill: var(--c{n}); opacity: 0.16; }} .f{n} {{ fill: var(--c{n}); }} "
    for n in range(6)
)

HOW_MADE = (
    "Scores are D4RL's, 0 for a random policy and 100 for its expert, of each run's last checkpoint, acting with z = 0 "
    "unless a row says stochastic. A run's score is the mean over its final episodes; mean and IQM (the mean without "
    "the lowest and highest quarter) are over seeds. Square brackets hold 95% of 10,000 bootstrap draws of seeds, "
    "stratified by dataset. Of a few seeds they are rather too narrow: of three they reach from the lowest score to "
    "the highest. Of two, that range stands in round brackets and claims nothing; one seed has none. “Data” is the "
    "mean score of the dataset's own episodes, “minutes” the wall time of one run, mean over seeds."
)
OUR_CHAIN = (
    "The chain trained here differs from the paper's in its defaults: an actor takes over the change of the one "
    "before it (follow), the actors' learning rate falls to 0 (lr_decay), and Q is divided by its size "
    "(q_normalization batch)."
)
ITS_CRITICS = "A name before the weights says whose critics and losses the chain has (docs/pogo_multi.md)."
SAME_IQM = "With fewer than four seeds, a dataset's IQM is its mean."
NO_RESULT = (
    "The last column is the highest of many evaluations in training, chosen after the fact: it is no result. The "
    "scores to quote are the others, of the last checkpoint."
)
PUBLISHED_FOR = "Figures of other methods are published ones for D4RL's official files."
NOT_SAME_DATA = (
    f"{OTHER_DATA} Published for D4RL's official file of that name. The runs here are on other data (made on this "
    "machine, or a file of another size), so these figures are no comparison."
)
HOW_TO_READ = (
    "At the end of training, the last tenth of the rows of metrics.csv, means over seeds. A step moved if its distance "
    "is at least twice its floor, the distance between two independent draws of the actor before it (where that has "
    f"a closed form and is 0: at least {STILL:g}). It helped if the "
    "score that it gained over the actor before it on the same episodes (for actor 0: over the data) has a paired 95% "
    "t-interval above 0. Energy is the loss L of the step; before: had the actor stayed where the chain stood. ⚠ "
    "marks a blur larger than the spread of the samples: the distance then understates how far apart two actors are, "
    "and hardly holds the later one back."
)


def page(runs: list[ComparedRun], groups: list[Group], source: str) -> str:
    """report.html: self-contained, without scripts."""
    unfinished = unfinished_table(runs)
    other = any(not group.official and published_cells(group.dataset, False)[0] != "–" for group in groups)
    steps = sorted({result.summary["steps"] for group in groups for result in group.results})
    facts = f"{sum(run.finished for run in runs)} of {len(runs)} runs finished"
    facts += f", {' and '.join(f'{count:,}' for count in steps)} updates each" if steps else ""
    facts += f"; seeds {', '.join(map(str, sorted({run.seed for run in runs})))}"
    now = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
    parts = [
        f"<h1>Comparison: {html.escape(source)}</h1><p class='soft'>{facts}. Written {now}.</p>",
        "<h2>The last actor of each chain</h2>",
        last_actor_table(groups).html() if groups else "<p>No run is finished yet.</p>",
        f"<p class='soft'>{how_made(groups)}</p>" + (f"<p><b>{NOT_SAME_DATA}</b></p>" if other else ""),
    ]
    if unfinished.rows:
        parts += ["<h2>Failed and unfinished runs</h2>", unfinished.html().replace("<table>", '<table class="notes">')]
    if groups:
        parts += ["<h2>Learning curves</h2>", curves_section(groups)]
        parts += [f"<h2>Actor by actor</h2><p class='soft'>{no_result(groups)}</p>", actor_table(groups).html()]
        parts += ["<h2>What each step of the chain did</h2>", f"<p class='soft'>{HOW_TO_READ}</p>"]
        parts += [diagnostics_table(groups).html(), diagnostics_section(groups)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Comparison of chains</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _key(groups: list[Group], *others: tuple[str, str]) -> str:
    """The colours of the actors, then other kinds of lines, each with its class and its meaning."""
    actors = max(group.actors for group in groups)
    names = [f"<span><i style='border-color: var(--c{n % 6})'></i>actor {n}</span>" for n in range(actors)]
    names += [f"<span><i class='{kind}'></i>{words}</span>" for kind, words in others]
    return f"<p class='key'>{''.join(names)}</p>"


def same_iqm(groups: list[Group]) -> list[str]:
    """The note on rows whose IQM is their mean, where there are any."""
    return [SAME_IQM] * any(len(group.results) < 4 for group in groups)


def how_made(groups: list[Group]) -> str:
    """What the figures of the first table are."""
    kinds = {group.algorithm == POGO for group in groups}
    chains = [OUR_CHAIN] * (True in kinds) + [ITS_CRITICS] * (False in kinds)
    return " ".join([*same_iqm(groups), HOW_MADE, *chains, PUBLISHED_FOR])


def no_result(groups: list[Group]) -> str:
    """What the last column of the table of actors is not."""
    return " ".join([NO_RESULT, *same_iqm(groups)])


def curves_section(groups: list[Group]) -> str:
    """Scores over training, a heading a dataset."""
    note = (
        "Deterministic scores in training, mean over seeds. Bands: 95% bootstrap intervals, of two seeds their range."
    )
    parts = [f"<p class='soft'>{note}</p>{_key(groups, ('dashes', 'the data’s own episodes'))}"]
    for dataset in dict.fromkeys(group.dataset for group in groups):
        charts = "".join(score_chart(group) for group in groups if group.dataset == dataset)
        parts.append(f'<h3>{html.escape(dataset)}</h3><div class="charts">{charts}</div>')
    return "\n".join(parts)


def diagnostics_section(groups: list[Group]) -> str:
    """The chain's curves, folded away but for the first group."""
    floor = [("dots", "floor of a distance, in its actor's colour")] if any(g.actors > 1 for g in groups) else []
    parts = [_key(groups, *floor, ("dashes", "no energy won"))]
    for number, group in enumerate(groups):
        title = html.escape(f"{group.dataset}, w2_weights {group.label}")
        parts.append(
            f"<details{' open' if number == 0 else ''}><summary>{title}</summary>"
            f'<div class="charts">{chain_charts(group)}</div></details>'
        )
    return "\n".join(parts)


def terminal_text(runs: list[ComparedRun], groups: list[Group]) -> str:
    """What the command prints: the last actors, and the first runs without a result, in lines for a terminal."""
    notes = ["Scores of the last actor; best: number of the actor with the highest mean.", *same_iqm(groups)]
    notes += ["Round brackets: the range of two seeds."] * any(len(group.results) == 2 for group in groups)
    words = "\n".join([terminal_table(groups).text(), "", *notes]) if groups else "No run is finished yet."
    unfinished = unfinished_table(runs)
    if unfinished.rows:
        count, unfinished.rows = len(unfinished.rows), unfinished.rows[:SHOWN]
        more = f"\nand {count - SHOWN} more" if count > SHOWN else ""
        lines = [line if len(line) <= COLUMNS else f"{line[: COLUMNS - 1]}…" for line in unfinished.text().split("\n")]
        words += "\n\nWithout a result:\n\n" + "\n".join(lines) + more
    return words


def write_report(runs: list[ComparedRun], output: Path, source: str) -> str:
    """Write results.csv, results.md and report.html; returns a summary for the terminal.

    `source` names the comparison. Raises OSError that names a file that cannot be written.
    """
    groups = collect(runs)
    tables = [last_actor_table(groups), actor_table(groups), diagnostics_table(groups)]
    marked = any(OTHER_DATA in cell for row in tables[0].rows for cell in row)
    unfinished = unfinished_table(runs)
    titles = ("The last actor of each chain", "Actor by actor", "What each step of the chain did")
    sections = [f"## {title}\n\n{table.markdown()}" for title, table in zip(titles, tables, strict=True)]
    sections[0] += f"\n\n{NOT_SAME_DATA}" if marked else ""
    sections[0] += f"\n\nWithout a result:\n\n{unfinished.markdown()}" if unfinished.rows else ""
    sections[0] += f"\n\n{how_made(groups)}"
    sections[1] += f"\n\n{no_result(groups)}"
    text = "\n\n".join([f"# Comparison: {source}", *sections, HOW_TO_READ])
    write_text_atomic(output / "results.csv", csv_text(groups))
    write_text_atomic(output / "results.md", text + "\n")
    write_text_atomic(output / "report.html", page(runs, groups, source))
    return terminal_text(runs, groups)
