"""What a comparison of chains found: results.csv, results.md and report.html, one self-contained page.

Its table is made as those of README and docs are (comparison/tables.py). The scores of other methods (published.yaml)
are for D4RL's official files, and stand beside runs on these alone.
"""

from __future__ import annotations

import base64
import datetime
import functools
import html
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from comparison.registry import Run, Table
from comparison.rows import COLUMNS, Row, Scores, write_csv
from comparison.statistics import LEAST_SEEDS, bootstrap_interval, cell_text, iqm, mean, t_half_width
from comparison.tables import Grid, caption, cells_of, make_grid, matching
from offline_data import is_official
from runs.metrics import read_metrics
from runs.plots import Metrics, chart_png
from utils import write_text_atomic

MIN_DISTANCE = 1e-6  # below this an actor counts as not moved, where the floor is 0
UNKNOWN = "–"
NOT_SHOWN = {"table", "system", "method", "dataset", "task", "environment_steps"}
CSV_COLUMNS = ("dataset", "algorithm", "w2_weights", "official_data", *(n for n in COLUMNS if n not in NOT_SHOWN))


@dataclass
class Chain:
    """The finished runs of one dataset and chain: they differ in their seeds."""

    label: tuple[str, str]  # dataset; algorithm and weights
    place: int  # which of its dataset's chains of that algorithm: 0, 1, ...
    rows: list[list[Row]]  # of each run's last checkpoint, deterministic: a row an actor
    metrics: list[Metrics]  # training/metrics.csv of each run

    @property
    def algorithm(self) -> str:
        return self.label[1].split()[0]

    @property
    def actors(self) -> int:
        return len(self.rows[0])

    @property
    def data_score(self) -> float:
        return float(self.rows[0][0]["data_score"])

    @property
    def official(self) -> bool | None:
        """Whether its data can be D4RL's official file; None where there is none."""
        return is_official(self.label[0], int(self.rows[0][0]["rows"]))

    @property
    def dataset(self) -> str:
        """Its id; one that has an official file's name and cannot be it says so."""
        return f"{self.label[0]} (not the official file)" if self.official is False else self.label[0]

    def scores(self, actor: int) -> np.ndarray:
        """Of the last checkpoint, [seeds]."""
        return np.array([float(rows[actor]["score"]) for rows in self.rows])

    def gains(self, actor: int) -> np.ndarray:
        """Score over that of the actor before, or over the data, of the same seed, [seeds]."""
        data = [float(rows[0]["data_score"]) for rows in self.rows]
        return self.scores(actor) - (self.scores(actor - 1) if actor else data)

    def at_end(self, actor: int, name: str) -> float:
        """Mean of a diagnostic over the last tenth of each run's rows, then over seeds; nan where one has none."""
        means = []
        for values in [metrics.get(f"chain/actor_{actor}/{name}", []) for metrics in self.metrics]:
            tail = [value for value in values[-max(len(values) // 10, 1) :] if math.isfinite(value)]
            means.append(np.mean(tail) if tail else math.nan)
        return float(np.mean(means))


def collect(runs: list[Run], scores: Scores) -> list[Chain]:
    """The chains that have finished runs, in the order of the runs."""
    chains: dict[tuple, Chain] = {}
    places: dict[tuple, dict[tuple, None]] = {}
    for run in runs:
        rows = [row for row in scores.of(run) if row["mode"] == "deterministic"]
        others = places.setdefault((run.dataset, run.method.split()[0]), {})
        others.setdefault(run.row)
        if rows:
            chain = chains.setdefault(run.row, Chain(run.row, list(others).index(run.row), [], []))
            chain.rows.append(sorted(rows, key=lambda row: int(row["actor"])))
            chain.metrics.append(read_metrics(run.folder / "training"))
    return list(chains.values())


# ----------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------


@functools.cache
def published() -> tuple[list[str], dict[str, list[str]]]:
    """Names of other methods, and their scores by dataset, in that order."""
    values = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return values["methods"], values["scores"]


def published_cells(chains: list[Chain]) -> list[str]:
    """The other methods' scores on a dataset, or their means over those of a suite; dashes for what is not known."""
    methods, scores = published()
    rows = [scores.get(chain.label[0], []) if chain.official else [] for chain in chains]
    if not chains or not all(rows):
        return [UNKNOWN] * len(methods)
    if len(rows) == 1:
        return [cell or UNKNOWN for cell in rows[0]]
    means = []
    for cells in zip(*rows, strict=True):
        steps = [[float(text) for text in cell.split(" / ")] for cell in cells if cell]
        means.append(" / ".join(f"{value:.1f}" for value in np.mean(steps, 0)) if len(steps) == len(cells) else UNKNOWN)
    return means


def suites(chains: list[Chain]) -> list[tuple[str, str, list[Chain]]]:
    """Name, weights and members: chains of one benchmark and the same place in their dataset's list, two at least.

    Datasets with fewer finished seeds than others of the suite are left out, as a mean over all would weigh them less.
    """
    found: dict[tuple, list[Chain]] = {}
    for chain in chains:
        match = re.match(r"(local/)?(halfcheetah|hopper|walker2d|antmaze)-", chain.label[0])
        if match:
            name = (match[1] or "") + ("antmaze" if match[2] == "antmaze" else "MuJoCo")
            found.setdefault((name, chain.algorithm, chain.place, chain.actors), []).append(chain)
    complete = []
    for (name, algorithm, place, _), members in found.items():
        seeds = max(len(chain.rows) for chain in members)
        members = [chain for chain in members if len(chain.rows) == seeds]
        labels = {chain.label[1] for chain in members}
        if len(members) > 1:
            weights = labels.pop() if len(labels) == 1 else f"{algorithm}, list {place + 1} of each"
            complete.append((f"{len(members)} {name} datasets", weights, members))
    return complete


def suite_rows(name: str, weights: str, members: list[Chain], columns: int) -> list[list[str]]:
    """Mean and interquartile mean over the datasets of a suite, with stratified bootstrap intervals over seeds."""
    rows = []
    data, several = np.mean([chain.data_score for chain in members]), len(members[0].rows) > 1
    for title, statistic in ((name, mean), (f"{name}, IQM", iqm)):
        cells = [title, weights, f"{data:.1f}" if statistic is mean else ""]
        for actor in range(members[0].actors):
            strata = [chain.scores(actor) for chain in members]
            ends = "[{:.1f}, {:.1f}]".format(*bootstrap_interval(strata, statistic)) if several else "*"
            cells.append(f"{statistic(np.concatenate(strata)):.1f} {ends}")
        rows.append(cells + [""] * (columns - len(cells)))
    return rows


def scores_grid(table: Table, scores: Scores, chains: list[Chain]) -> tuple[Grid, Grid]:
    """Every chain's actors beside each other, then the suites; the same with published scores, if data is official."""
    grid = make_grid(table, cells_of(table, matching(table, scores)), scores.missing(table.runs))
    by_label = {chain.label: [chain] for chain in chains}
    members = [by_label.get(tuple(row[:2]), []) for row in grid.rows]
    for row, found in zip(grid.rows, members, strict=True):
        row[0] = found[0].dataset if found else row[0]
    for suite in suites(chains):
        grid.rows += suite_rows(*suite, len(grid.header))
        members += [suite[-1], []]
    if not any(chain.official for chain in chains):
        return grid, grid
    rows = [row + published_cells(found) for row, found in zip(grid.rows, members, strict=True)]
    return grid, Grid(grid.header + published()[0], rows, 2)


def unfinished_grid(runs: list[Run], scores: Scores, states: dict[Run, str]) -> Grid:
    """Runs without a result, and why; those of one dataset and reason in a row."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if not scores.of(run):
            found.setdefault((run.dataset, states[run]), []).append(run)
    rows = []
    for (dataset, state), members in found.items():
        first = f"{members[0].method} seed {members[0].seed}"
        rows.append([dataset, first if len(members) == 1 else f"{len(members)} runs", state])
    return Grid(["dataset", "runs", "state"], rows, 3)


# ----------------------------------------------------------------------------------------------------------------
# What each step of the chain did
# ----------------------------------------------------------------------------------------------------------------

# Diagnostics in the order of the columns, and how each is written.
AT_END = {"energy_before": ".3f", "energy": ".3f", "energy_fell": ".0%", "distance": ".2g", "floor": ".2g"}
AT_END |= {"q": ".4g", "spread": ".2g", "blur_to_spread": ".2g"}


def verdict(actor: int, distance: float, floor: float, gains: np.ndarray) -> str:
    """Whether a step of the chain moved, and whether the score says that this helped.

    gains: [seeds], this actor's score less that of the one before it (of the data, for actor 0), same seed, same
    episodes. Equal gains say that scores move in steps, as antmaze's do, not that nothing varies.
    """
    if actor > 0 and distance < max(2 * floor, MIN_DISTANCE):
        return "did not move"
    if len(gains) < LEAST_SEEDS:
        return "moved; too few seeds to say more"
    if np.ptp(gains) == 0 or abs(gains.mean()) <= t_half_width(gains):
        return "moved, no clear gain"
    return "moved and helped" if gains.mean() > 0 else "moved and hurt"


def steps_grid(chains: list[Chain]) -> Grid:
    """What each step of each chain did at the end of training, means over seeds; one actor alone is no chain."""
    rows = []
    for chain in [chain for chain in chains if chain.actors > 1]:
        for actor in range(chain.actors):
            found, gains = {name: chain.at_end(actor, name) for name in AT_END}, chain.gains(actor)
            if actor == 0:
                found["floor"] = math.nan  # there is no actor before it
            step = verdict(actor, found["distance"], found["floor"], gains)
            texts = [UNKNOWN if math.isnan(found[name]) else f"{found[name]:{form}}" for name, form in AT_END.items()]
            texts[-1] += " ⚠" * (found["blur_to_spread"] > 1)
            gained = cell_text(gains, len(gains), sign="+")
            rows.append([chain.dataset, chain.label[1], f"{actor}", step, gained, *texts])
    header = ["dataset", "chain", "actor", "step", "score gained", "energy before", "energy after", "fell in rows"]
    return Grid([*header, "distance", "its floor", "Q", "spread", "blur / spread"], rows, 4)


# ----------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------

STYLE = """
body { margin: 0 auto; padding: 16px; max-width: 1240px; background: #fff; color: #1d2329;
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2em; } p { max-width: 75ch; color: #5b6670; }
.scroll { overflow-x: auto; margin: 0.8em 0; /* its right edge is shaded while more of it lies beyond */
  background: linear-gradient(to left, #fff 30%, #fff0) right / 40px 100% no-repeat local,
    linear-gradient(to left, #0004, #0000) right / 14px 100% no-repeat scroll; }
img { max-width: 100%; min-width: 900px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.75rem; overflow-wrap: normal; }
th, td { padding: 4px; border-bottom: 1px solid #dde2e6; text-align: left; vertical-align: bottom; }
th, td { white-space: nowrap; } .n { text-align: right; } th { color: #5b6670; }
.words td { white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 600px) { td.w:first-child { white-space: normal; min-width: 9em; } }
"""

NOTES = (
    "Scores are D4RL's: 0 is a random policy, 100 its expert; results.csv has those with noise too. A chain is named "
    "by the algorithm whose critics and losses it has (docs/pogo_multi.md) and by its w2_weights, one for each actor. "
    "Rows over several datasets: square brackets hold 95% of 10,000 bootstrap draws of seeds, each dataset drawn by "
    "itself, too narrow for three seeds or fewer; IQM is the mean without the lowest and highest quarter. Other "
    "methods' scores are published ones, for D4RL's official files."
)
HOW_TO_READ = (
    "At the end of training, the last tenth of the rows of metrics.csv, means over seeds. A step moved if its distance "
    "is at least twice its floor, the distance of the actor before it to itself (where that is 0, as with the same "
    f"noise: at least {MIN_DISTANCE:g}). It helped if the score that it gained over the actor before "
    "it on the same episodes (for actor 0: over the data) has a paired 95% t-interval above 0. Energy is the loss L of "
    "the step; before: had the actor stayed where the chain stood. ⚠ marks a blur larger than the spread of the "
    "samples: the distance then understates how far apart two actors are, and hardly holds the later one back."
)
CURVES = (
    "An actor is a colour, and each of its lines a seed. Scores are deterministic, of a single seed stochastic too "
    "(dotted). Dashed: the data's own episodes. Energy above 0 was saved by the step."
)


def csv_rows(rows: list[Row]) -> list[Row]:
    """Rows of results.csv: one a run, actor and mode."""
    found = []
    for row in rows:
        algorithm, _, weights = row["method"].partition(" ")
        official = str(is_official(row["dataset"], int(row["rows"])) is True)
        own = row | {"algorithm": algorithm, "w2_weights": weights, "official_data": official}
        found.append({name: own[name] for name in CSV_COLUMNS})
    return found


def page(title: str, parts: list[tuple[str, str, str]]) -> str:
    """report.html: self-contained, without scripts; parts are heading, HTML and a note."""
    body = "\n".join(f"<h2>{head}</h2>{text}<p>{html.escape(note)}</p>" for head, text, note in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Comparison of chains</title><style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1><p>Written {datetime.datetime.now():%Y-%m-%d %H:%M}.</p>\n{body}\n"
        "</body></html>\n"
    )


def chart(chains: list[Chain]) -> str:
    """One dataset's."""
    found = [(chain.label[1], chain.metrics, chain.actors, chain.data_score) for chain in chains]
    picture = base64.b64encode(chart_png(chains[0].dataset, found)).decode()
    return f'<div class="scroll"><img alt="curves" src="data:image/png;base64,{picture}"></div>'


def write_report(table: Table, rows: list[Row], states: dict[Run, str], output: Path) -> str:
    """Write results.csv, results.md and report.html; returns a summary for the terminal.

    rows: of the runs that are finished. states: why the others are not.
    Raises UserError where runs of one dataset saw different data, OSError that names a file that cannot be written.
    """
    scores = Scores([rows])
    chains, unfinished = collect(table.runs, scores), unfinished_grid(table.runs, scores, states)
    short, wide = scores_grid(table, scores, chains)
    words = caption(table, matching(table, scores))
    parts = [("The actors of each chain", f"{words} {NOTES}", wide)]
    parts += [("Runs without a result", "", unfinished)] if unfinished.rows else []
    steps = steps_grid(chains)
    parts += [("What each step of the chain did", HOW_TO_READ, steps)] if steps.rows else []
    shown = [(head, grid.html(), note) for head, note, grid in parts]
    for dataset in dict.fromkeys(chain.label[0] for chain in chains):
        own = [chain for chain in chains if chain.label[0] == dataset]
        shown.append((f"Curves of {html.escape(own[0].dataset)}", chart(own), CURVES))
    write_csv(output / "results.csv", CSV_COLUMNS, csv_rows(rows))
    title = f"Comparison: {table.path.name}"
    texts = [f"## {head}\n\n{grid.markdown()}\n\n{note}" for head, note, grid in parts]
    write_text_atomic(output / "results.md", "\n\n".join([f"# {title}", *texts]) + "\n")
    write_text_atomic(output / "report.html", page(title, shown))
    lines = [short.text(), words] + ([f"Without a result:\n\n{unfinished.text()}"] if unfinished.rows else [])
    return "\n\n".join(lines)
