"""Tables of README.md and docs/, made from results/*.csv between markers:

    <!-- table: walker_main -->
    <!-- /table -->

A cell is the mean over seeds of the score of each seed's last checkpoint. Rows of a CSV count for a cell only where
their command is the one that the YAML file asks for and their settings are what it stands for now, so that runs of
other settings never mix with them.
"""

import html
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.registry import Run, Table, check_keys, fill, read_table
from comparison.rows import COLUMNS, Row, Scores, read_csv
from comparison.statistics import cell_text
from runs.cli import load_yaml
from utils import UserError, write_text_atomic

MARKED = re.compile(r"^(<!-- table: (\S+) -->\n)(.*?)^(<!-- /table -->)$", re.DOTALL | re.MULTILINE)
MISSING = "-"  # a cell that a run will fill
Key = tuple[tuple[str, ...], str]  # labels of a row, name of a column


@dataclass
class Grid:
    """Cells of text under a header, written in three ways."""

    header: list[str]
    rows: list[list[str]]
    words: int  # leading columns that hold words rather than figures

    def markdown(self) -> str:
        rule = "|" + "---|" * self.words + "---:|" * (len(self.header) - self.words)
        header, *rows = (
            f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in [self.header, *self.rows]
        )
        return "\n".join([header, rule, *rows])

    def text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:{'<' if n < self.words else '>'}{widths[n]}}" for n, cell in enumerate(line)).rstrip()
            for line in lines
        )

    def html(self) -> str:
        """A table that scrolls where the window is narrow; one of sentences alone breaks its lines instead."""

        def row(cells: list[str], tag: str) -> str:
            kinds = ["w"] * self.words + ["n"] * (len(cells) - self.words)
            words = [f'<{tag} class="{k}">{html.escape(c)}</{tag}>' for k, c in zip(kinds, cells, strict=True)]
            return f"<tr>{''.join(words)}</tr>"

        kind = "scroll words" if self.words == len(self.header) else "scroll"
        body = "\n".join([row(self.header, "th"), *(row(cells, "td") for cells in self.rows)])
        return f'<div class="{kind}"><table>{body}</table></div>'


def matching(table: Table, scores: Scores) -> list[tuple[Run, Row]]:
    """Rows of the table's present runs that pass its `where`. Raises UserError where their data or precision differ."""
    found = [(run, row) for run in table.runs for row in scores.of(run)]
    groups = {"data_sha256": "{dataset}", "rows": "{dataset}", "data_score": "{dataset} {task}", "precision": "{label}"}
    for name, group in groups.items():
        kinds: dict[str, set[str]] = {}
        for run, row in found:
            key = group.format(**row, label=" ".join(run.row)).strip()
            kinds.setdefault(key, set()).update({row[name]} - {""})
        for key, values in kinds.items():
            if len(values) > 1:
                listed = ", ".join(sorted(values))
                remedy = "remove those of one of them and train these runs again"
                raise UserError(f"{table.csv}: rows of {key} differ in {name} ({listed}); {remedy}")
    where = table.layout.get("where", {})
    check_keys(f"{table.path}: layout.where", where, COLUMNS)
    wanted = {key: list(map(str, value if isinstance(value, list) else [value])) for key, value in where.items()}
    for key, values in wanted.items():
        known = {row[key] for _, row in found}
        if found and known.isdisjoint(values):
            raise UserError(f"{table.path}: layout.where: {key} is {' or '.join(sorted(known))}, never {values[0]}")
    return [(run, row) for run, row in found if all(row[key] in values for key, values in wanted.items())]


def cells_of(table: Table, found: list[tuple[Run, Row]]) -> dict[Key, dict[int, Row]]:
    """Rows of each cell by seed. Raises UserError for a column that is not listed, and for two rows of one seed."""
    cells: dict[Key, dict[int, Row]] = {}
    for run, row in found:
        column = fill(table.path, f"column of {run.method}", run.column, row)
        if column not in table.layout["columns"]:
            raise UserError(f"{table.path}: layout.columns lacks {column!r}, the column of {run.method}")
        seeds = cells.setdefault((run.row, column), {})
        if run.seed in seeds:
            raise UserError(f"{table.path}: two scores of seed {run.seed} for {' '.join(run.row)}, {column}")
        seeds[run.seed] = row
    return cells


def data_text(rows: Iterable[Row], digits: int) -> str:
    """The score of the data's own episodes, which the rows of a cell agree on; empty where there is none."""
    texts = {f"{float(row['data_score']):.{digits}f}" for row in rows if row["data_score"]}
    return " / ".join(sorted(texts))


def make_grid(table: Table, cells: dict[Key, dict[int, Row]], missing: set[str]) -> Grid:
    """The table, a row for each of its labels. `missing` are the commands of runs that have no scores yet."""
    layout, digits = table.layout, table.layout.get("digits", 1)
    header, columns = [str(name) for name in layout.get("header", ["method"])], layout["columns"]
    more = ["the data"] if layout.get("data_column") else []
    rows = []
    if layout.get("data_row"):
        own = [
            data_text([r for (_, name), s in cells.items() if name == c for r in s.values()], digits) for c in columns
        ]
        blank = [""] * (len(header) - 1)
        rows.append(["the data", *blank, *(text or (MISSING if missing else "") for text in own)])
    for label in dict.fromkeys(run.row for run in table.runs):
        runs = [run for run in table.runs if run.row == label]
        empty = MISSING if any(run.text in missing for run in runs) else ""
        planned = len({run.seed for run in runs})
        own = [cells.get((label, column), {}) for column in columns]
        texts = [data_text([row for seeds in own for row in seeds.values()], digits) or empty] if more else []
        for seeds in own:
            text = cell_text([float(row["score"]) for row in seeds.values()], planned, digits) if seeds else empty
            if seeds and layout.get("spread"):
                deviations = [float(row["std"]) for row in seeds.values()]
                text += f" [{math.fsum(deviations) / len(deviations):.{digits}f}]"
            texts.append(text)
        rows.append([*label, *texts])
    return Grid([*header, *more, *columns], rows, len(header))


def commits_of(rows: Iterable[Row]) -> set[str]:
    """Their commits, 7 digits each, with a + where the code had changes of its own."""
    return {row["commit"][:7] + row["commit"][12:] for row in rows} - {""}


def caption(table: Table, found: list[tuple[Run, Row]]) -> str:
    """What the cells are: seeds, updates, episodes, commits, processors."""
    rows, seeds = [row for _, row in found], sorted({run.seed for run, _ in found})
    if not rows:
        return f"{table.title} No run is finished yet."
    words = [f"{table.title} Last checkpoints of seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"]
    updates = sorted({int(row["updates"] or 0) for row in rows} - {0})
    words += [f"{' or '.join(f'{count:,}' for count in updates)} updates"] if updates else []
    episodes = sorted({int(row["episodes"]) for row in rows if row["episodes"]})
    words += [f"{' or '.join(map(str, episodes))} episode{'s' * (episodes != [1])} each"] if episodes else []
    words.append("mean ± 95% t-interval over seeds, (lowest to highest) of two, * one seed")
    words += ["[standard deviation over episodes]"] if table.layout.get("spread") else []
    commits = sorted(commits_of(rows))
    words += [f"commit {', '.join(commits)}"] if commits else []
    words.append(", ".join(sorted({f"{row['processor']} ({row['precision'] or 'float32'})" for row in rows})))
    return "; ".join(words) + "."


def draw(table: Table, scores: Scores) -> tuple[str, Grid, set[str]]:
    """Caption, cells, and the commands of runs that are missing. Raises UserError as `matching` and `cells_of` do."""
    found, missing = matching(table, scores), scores.missing(table.runs)
    return caption(table, found), make_grid(table, cells_of(table, found), missing), missing


def render(table: Table, scores: Scores) -> str:
    """The text between the markers, line break included. Raises UserError as `draw` does."""
    words, grid, missing = draw(table, scores)
    text = f"{words}\n\n{grid.markdown()}\n"
    if missing:
        there = len(table.runs) - len(missing)
        command = f"run_comparison.py --config results/{table.path.name} --jobs 2"
        text += f"\n{there} of {len(table.runs)} runs are there; `python {command}` adds the rest.\n"
    return text


def render_glance(root: Path) -> str:
    """README's table: cells of other tables, which comparison/glance.yaml names; UserError for one that none has."""
    path = root / "comparison" / "glance.yaml"
    glance = load_yaml(path)
    lines, commits = [], set()
    for cell in glance["cells"]:
        table = read_table(root / "results" / f"{cell['table']}.yaml")
        label, column = tuple(cell["row"]), cell["column"]
        planned = {run.seed for run in table.runs if run.row == label}
        if not planned or column not in table.layout["columns"]:
            raise UserError(f"{path}: {table.path} has no cell {' '.join(label)}, {column}")
        found = cells_of(table, matching(table, Scores([read_csv(table.csv)]))).get((label, column), {})
        digits = table.layout.get("digits", 1)
        scores = [float(row["score"]) for row in found.values()]
        score = cell_text(scores, len(planned), digits) if scores else MISSING
        lines.append([*cell["labels"], score, data_text(found.values(), digits)])
        commits |= commits_of(found.values())
    grid = Grid([*glance["header"], "score", "the data's own"], lines, len(glance["header"]))
    words = f"{glance['title']} Last checkpoints, mean over seeds, ± 95% t-interval, (lowest to highest) of two seeds, "
    listed = f"; commits {', '.join(sorted(commits))}" if commits else ""
    return f"{words}* one seed, which ranks nothing, - not trained yet{listed}.\n\n{grid.markdown()}\n"


def page_texts(root: Path) -> dict[Path, str]:
    """README.md and docs/*.md of a checkout with their tables made anew. Raises UserError for an unknown table."""
    pages = {}
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:

        def between(match: re.Match, page: Path = page) -> str:
            if match[2] == "glance":
                return f"{match[1]}{render_glance(root)}{match[4]}"
            path = root / "results" / f"{match[2]}.yaml"
            if not path.is_file():
                raise UserError(f"{page}: table {match[2]}: there is no {path}")
            table = read_table(path)
            return f"{match[1]}{render(table, Scores([read_csv(table.csv)]))}{match[4]}"

        text = page.read_text(encoding="utf-8")
        if len(re.findall("^<!-- table: ", text, re.MULTILINE)) != len(MARKED.findall(text)):
            raise UserError(f"{page}: a table's marker has no <!-- /table --> after it")
        pages[page] = MARKED.sub(between, text)
    return pages


def rewrite_pages(root: Path) -> None:
    changed: dict[Path, Any] = {page: text for page, text in page_texts(root).items() if text != page.read_text()}
    for page, text in changed.items():
        write_text_atomic(page, text)
        print(f"{page}: tables rewritten")
    if not changed:
        print("all tables are as results/ says")
