"""README's table: cells of other tables, which comparison/glance.yaml names."""

from __future__ import annotations

from pathlib import Path

from comparison import tables
from comparison.registry import read_table
from comparison.rows import Scores, read_csv
from comparison.statistics import cell_text
from runs.cli import load_yaml
from utils import UserError


def render(root: Path) -> str:
    """The text between the markers, line break included. Raises UserError for a cell that its table does not have."""
    path = root / "comparison" / "glance.yaml"
    glance = load_yaml(path)
    lines, commits = [], set()
    for cell in glance["cells"]:
        table = read_table(root / "results" / f"{cell['table']}.yaml")
        label, column = tuple(cell["row"]), cell["column"]
        planned = {run.seed for run in table.runs if run.row == label}
        if not planned or column not in table.layout["columns"]:
            raise UserError(f"{path}: {table.path} has no cell {' '.join(label)}, {column}")
        found = tables.cells_of(table, tables.matching(table, Scores([read_csv(table.csv)]))).get((label, column), {})
        digits = table.layout.get("digits", 1)
        scores = [float(row["score"]) for row in found.values()]
        score = cell_text(scores, len(planned), digits) if scores else tables.MISSING
        lines.append([*cell["labels"], score, tables.data_text(found.values(), digits)])
        commits |= {row["commit"][:7] for row in found.values()} - {""}
    grid = tables.Grid([*glance["header"], "score", "the data's own"], lines, len(glance["header"]))
    words = f"{glance['title']} Last checkpoints, mean over seeds, ± 95% t-interval, (lowest to highest) of two seeds, "
    words += "* one seed, - not trained yet" + (f"; commits {', '.join(sorted(commits))}." if commits else ".")
    return f"{words}\n\n{grid.markdown()}\n"
