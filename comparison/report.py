"""What a comparison found: results.csv, results.md and report.html, one self-contained page.

Scores are those of each run's last checkpoint, from the episodes that it kept in training/evaluations.csv. The scores
of other methods (published.yaml) are for D4RL's official files, and stand beside runs on these alone.
"""

from __future__ import annotations

import datetime
import functools
import html
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from comparison.charts import dataset_chart
from comparison.groups import MODES, POGO, ComparedRun, Group, Result, collect, csv_text
from comparison.statistics import (
    IQM_SEEDS,
    LEAST_SEEDS,
    bootstrap_interval,
    iqm,
    mean,
    paired_interval,
    score_range,
)
from utils import write_text_atomic

MIN_DISTANCE = 1e-6  # below this an actor counts as not moved: of two Gaussians or two points the floor is 0
COLUMNS, SHOWN = 100, 10  # of a terminal; kinds of runs without a result that are listed there


# ----------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Rows of text under a header."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    wide: int  # leading columns that hold words rather than figures
    soft: int = 0  # trailing columns that are no result

    def pick(self, names: Sequence[str]) -> Table:
        """These columns alone, in this order."""
        places = [self.header.index(name) for name in names]
        return Table(tuple(names), [tuple(row[place] for place in places) for row in self.rows], self.wide)

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
            words = ""
            for n, cell in enumerate(cells):
                kind = ("w" if n < self.wide else "n") + " soft" * (n >= len(cells) - self.soft)
                words += f'<{tag} class="{kind}">{html.escape(cell)}</{tag}>'
            return f"<tr>{words}</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        words = " words" * (self.wide == len(self.header))  # sentences, which may go on in another line
        return f'<div class="scroll{words}"><table>{row(self.header, "th")}\n{body}</table></div>'


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


def statistics_of(groups: list[Group]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Columns of a table: a mean, and an IQM where some dataset has the seeds that tell the two apart."""
    found: dict[str, Callable] = {"mean [95%]": mean}
    return found | ({"IQM [95%]": iqm} if any(len(group.results) >= IQM_SEEDS for group in groups) else {})


BEST = "highest in training (no result)"


@functools.cache
def published() -> tuple[list[str], dict[str, list[str]]]:
    """Names of other methods, and their scores by dataset, in that order."""
    values = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return values["methods"], values["scores"]


def published_cells(members: list[Group]) -> tuple[str, ...]:
    """The other methods' scores beside a row of official data: of its dataset, or means over the datasets of a suite.

    No cells where none of the data is official, and dashes for what is not known.
    """
    methods, scores = published()
    rows = [scores.get(group.run.dataset, []) if group.official else [] for group in members]
    if not all(rows):
        return ("–",) * len(methods)
    if len(rows) == 1:
        return tuple(cell or "–" for cell in rows[0])
    means = []
    for cells in zip(*rows, strict=True):
        steps = [[float(text) for text in cell.split(" / ")] for cell in cells if cell]
        means.append(" / ".join(f"{value:.1f}" for value in np.mean(steps, 0)) if len(steps) == len(cells) else "–")
    return tuple(means)


def last_actor_table(groups: list[Group]) -> Table:
    """The chain's last actor, deterministic, beside the published scores; a row a group, then a row a suite."""
    rows, statistics = [], statistics_of(groups)
    methods = published()[0] if any(group.official for group in groups) else []
    for name, weights, members in [(group.name, group.run.label, [group]) for group in groups] + suites(groups):
        actors = [[group.scores(actor) for group in members] for actor in range(members[0].actors)]
        best = int(np.argmax([mean(np.concatenate(strata)) for strata in actors]))
        cells = (name, weights, *(_statistic(actors[-1], what) for what in statistics.values()), str(best))
        cells += (str(len(members[0].results)), _episodes(members, len(actors) - 1))
        cells += (_data_score(members), _minutes(members))
        rows.append(cells + (published_cells(members) if methods else ()))
    header = ("dataset", "w2_weights", *statistics, "best", "seeds", "episodes", "data", "minutes", *methods)
    return Table(header, rows, 2)


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


def suites(groups: list[Group]) -> list[tuple[str, str, list[Group]]]:
    """Groups of the same benchmark and place in their dataset's list of weights, two datasets at least.

    Datasets with fewer finished seeds than others of the suite are left out, as a mean over all would weigh them less.
    """
    found: dict[tuple, list[Group]] = {}
    for group in groups:
        match = re.match(r"(local/)?(halfcheetah|hopper|walker2d|antmaze)-", group.run.dataset)
        if match:
            name = (match[1] or "") + ("antmaze" if match[2] == "antmaze" else "MuJoCo")
            found.setdefault((name, group.run.algorithm, group.run.variant, group.actors), []).append(group)
    complete = []
    for (name, algorithm, variant, _), members in found.items():
        seeds = max(len(group.results) for group in members)
        members = [group for group in members if len(group.results) == seeds]
        if len(members) > 1:
            labels, own = {group.run.label for group in members}, "" if algorithm == POGO else f"{algorithm} "
            weights = labels.pop() if len(labels) == 1 else f"{own}list {variant + 1} of each"
            complete.append((f"{len(members)} {name} datasets", weights, members))
    return complete


def actor_table(groups: list[Group]) -> Table:
    """Every actor in both modes; the highest evaluation of training stands last and is marked as no result."""
    rows, statistics = [], statistics_of(groups)
    for group in groups:
        for key in [(actor, mode) for actor in range(group.actors) for mode in MODES]:
            scores, best = group.scores(*key), group.mean(lambda result, key=key: result.best[key][0])
            cells = (group.name, group.run.label, *map(str, key))
            cells += (*(_statistic([scores], what) for what in statistics.values()), str(len(scores)))
            rows.append((*cells, _episodes([group], key[0]), _figure(best)))
    header = ("dataset", "w2_weights", "actor", "mode", *statistics, "seeds", "episodes", BEST)
    return Table(header, rows, 4, soft=1)


def unfinished_table(runs: list[ComparedRun]) -> Table:
    """Runs without a result, and why; those of one dataset and reason in a row."""
    found: dict[tuple[str, str], list[ComparedRun]] = {}
    for run in runs:
        if not run.finished:
            found.setdefault((run.dataset, run.note or "not started"), []).append(run)
    rows = []
    for (dataset, note), members in found.items():
        first = f"w2 {members[0].label} seed {members[0].seed}"
        rows.append((dataset, first if len(members) == 1 else f"{len(members)} runs", note))
    return Table(("dataset", "runs", "state"), rows, 3)


# ----------------------------------------------------------------------------------------------------------------
# Diagnostics of the chain
# ----------------------------------------------------------------------------------------------------------------


def last_tenth(values: list[float]) -> float:
    """Mean over the last tenth of a run's rows, nan where none of them has a value."""
    tail = [value for value in values[-max(len(values) // 10, 1) :] if math.isfinite(value)]
    return float(np.mean(tail)) if tail else math.nan


def last_value(result: Result, actor: int, name: str) -> float:
    """A diagnostic at the end of training, nan where it was not logged."""
    return last_tenth(result.metrics.get(f"chain/actor_{actor}/{name}", []))


def verdict(actor: int, distance: float, floor: float, gains: np.ndarray) -> str:
    """Whether a step of the chain moved, and whether the score says that this helped.

    gains: [seeds], this actor's score less that of the one before it (of the data, for actor 0), same seed, same
    episodes.
    """
    if actor > 0 and distance < max(2 * floor, MIN_DISTANCE):
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
            cells = (group.name, group.run.label, f"{actor}", verdict(actor, distance, floor, gains))
            cells += (_with_ends(gains.mean(), paired_interval(gains), "+.1f"),)
            cells += (_figure(at_end("energy_before"), 3), _figure(at_end("energy"), 3))
            cells += (_figure(100 * at_end("energy_fell"), 0), f"{distance:.2g}", f"{floor:.2g}" if actor else "–")
            cells += (f"{at_end('q'):.4g}", f"{at_end('spread'):.2g}")
            rows.append((*cells, "–" if not math.isfinite(blur) else f"{blur:.2g}{' ⚠' if blur > 1 else ''}"))
    header = ("dataset", "w2_weights", "actor", "step", "score gained [95%]", "energy before", "energy after")
    header += ("fell, % of rows", "distance", "its floor", "Q", "spread", "blur / spread")
    return Table(header, rows, 4)


# ----------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------

STYLE = """
body { margin: 0 auto; padding: 16px; max-width: 1240px; background: #fff; color: #1d2329;
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2em; } p, ul { max-width: 75ch; }
.soft { color: #5b6670; }
.scroll { overflow-x: auto; margin: 0.8em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.75rem; overflow-wrap: normal; }
th, td { padding: 4px; border-bottom: 1px solid #dde2e6; text-align: left; vertical-align: bottom; }
th, td { white-space: nowrap; } .n { text-align: right; } th { color: #5b6670; }
.words td { white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 600px) { td.w:first-child { white-space: normal; min-width: 9em; } }
"""

NOTES = (
    "Scores are D4RL's: 0 is a random policy, 100 its expert. Each run's last checkpoint counts, acting with z = 0 "
    "unless a row says stochastic. A run's score is the mean over its final episodes.",
    "Square brackets hold 95% of 10,000 bootstrap draws of seeds, each dataset drawn by itself. Of three seeds they "
    "reach from the lowest score to the highest, which is too narrow. Round brackets are the range of two seeds. One "
    "seed has none. IQM, shown from four seeds on, is the mean without the lowest and highest quarter.",
    "“Best” is the number of the actor with the highest mean, “data” the mean score of the dataset's own episodes, "
    "“minutes” the wall time of one run. Scores of other methods are published ones for D4RL's official files.",
    "A name before the weights says whose critics and losses the chain has (docs/pogo_multi.md). POGO's own chain "
    "differs from the paper's in its defaults: an actor takes over the change of the one before it (follow), the "
    "actors' learning rate falls to 0 (lr_decay), and Q is divided by its size (q_normalization batch).",
)
NO_RESULT = (
    "The last column is the highest of many evaluations in training, chosen after the fact: it is no result. The "
    "scores to quote are the others, of the last checkpoint."
)
HOW_TO_READ = (
    "At the end of training, the last tenth of the rows of metrics.csv, means over seeds. A step moved if its distance "
    "is at least twice its floor, the distance between two independent draws of the actor before it (where that has "
    f"a closed form and is 0: at least {MIN_DISTANCE:g}). It helped if the score that it gained over the actor before "
    "it on the same episodes (for actor 0: over the data) has a paired 95% t-interval above 0. Energy is the loss L of "
    "the step; before: had the actor stayed where the chain stood. ⚠ marks a blur larger than the spread of the "
    "samples: the distance then understates how far apart two actors are, and hardly holds the later one back."
)
CURVES = (
    "Means over seeds; bands are 95% bootstrap intervals, of two seeds their range. Dashed: the data's own episodes. "
    "Energy above 0 was won by the step; actor 0's is from the data itself, below whose energy a narrower policy does "
    "not get."
)


def sections_of(runs: list[ComparedRun], groups: list[Group]) -> list[tuple[str, Table, tuple[str, ...]]]:
    """Title, table and notes of each part of a report."""
    unfinished = unfinished_table(runs)
    found = [("Failed and unfinished runs", unfinished, ())] if unfinished.rows else []
    if groups:
        found.insert(0, ("The last actor of each chain", last_actor_table(groups), NOTES))
        found.append(("Actor by actor", actor_table(groups), (NO_RESULT,)))
        found.append(("What each step of the chain did", diagnostics_table(groups), (HOW_TO_READ,)))
    return found


def page(runs: list[ComparedRun], groups: list[Group], source: str, charts: dict[tuple, str]) -> str:
    """report.html: self-contained, without scripts. Charts that are in `charts` are not drawn anew."""
    steps = sorted({result.summary["steps"] for group in groups for result in group.results})
    metadata = f"{sum(run.finished for run in runs)} of {len(runs)} runs finished"
    metadata += f", {' and '.join(f'{count:,}' for count in steps)} updates each" if steps else ""
    metadata += f"; seeds {', '.join(map(str, sorted({run.seed for run in runs})))}"
    parts = [
        f"<h1>Comparison: {html.escape(source)}</h1>"
        f"<p class='soft'>{metadata}. Written {datetime.datetime.now():%Y-%m-%d %H:%M}.</p>"
    ]
    parts += [] if groups else ["No run is finished yet."]
    for title, table, words in sections_of(runs, groups):
        listed = "".join(f"<li>{html.escape(note)}</li>" for note in words)
        parts.append(f"<h2>{title}</h2>{table.html()}<ul class='soft'>{listed}</ul>")
    parts += [f"<h2>Curves</h2><p class='soft'>{CURVES}</p>"] if groups else []
    for dataset in dict.fromkeys(group.run.dataset for group in groups):
        own = [group for group in groups if group.run.dataset == dataset]
        key = tuple(result.run.run_dir for group in own for result in group.results)
        charts[key] = charts.get(key) or dataset_chart(own)
        parts.append(f'<h3>{html.escape(own[0].name)}</h3><div class="scroll">{charts[key]}</div>')
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Comparison of chains</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def terminal_text(runs: list[ComparedRun], groups: list[Group]) -> str:
    """What the command prints: the last actors, and the runs without a result with their whole reasons."""
    words = "No run is finished yet."
    if groups:
        shown = ("dataset", "w2_weights", "seeds", "data", list(statistics_of(groups))[-1], "best")
        words = last_actor_table(groups).pick(shown).text()
        words += "\n\nScores of the last actor; best: the actor with the highest mean."
        words += " Round brackets: the range of two seeds." * any(len(group.results) == 2 for group in groups)
    rows = unfinished_table(runs).rows
    lines = [textwrap.fill(f"{d}, {count}: {state}", COLUMNS, subsequent_indent="  ") for d, count, state in rows]
    if lines:
        more = [f"and {len(lines) - SHOWN} more kinds"] if len(lines) > SHOWN else []
        words += "\n\n" + "\n".join(["Without a result:", "", *lines[:SHOWN], *more])
    return words


def write_report(runs: list[ComparedRun], output: Path, source: str, charts: dict[tuple, str] | None = None) -> str:
    """Write results.csv, results.md and report.html; returns a summary for the terminal.

    `source` names the comparison; `charts` keeps what was drawn for the next call. Raises OSError that names a file
    that cannot be written.
    """
    groups = collect(runs)
    parts = [f"# Comparison: {source}"]
    for title, table, words in sections_of(runs, groups):
        parts += [f"## {title}", table.markdown(), *(["\n".join(f"- {note}" for note in words)] if words else [])]
    write_text_atomic(output / "results.csv", csv_text(groups))
    write_text_atomic(output / "results.md", "\n\n".join(parts) + "\n")
    write_text_atomic(output / "report.html", page(runs, groups, source, {} if charts is None else charts))
    return terminal_text(runs, groups)
