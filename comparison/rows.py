"""Raw scores: the rows that a finished run adds to results/<table>.csv.

A row is one run, policy and task, scored by the last checkpoint. `score` is D4RL's score for D4RL's robots, the
success rate in percent for mazes, and the return where data has no score. `best_in_training` was chosen after the fact
and is no result.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparison.jobs import seconds_spent
from comparison.registry import MACHINE, RESERVED, Run, settings_digest, settings_of
from ogbench_utils import NUM_TASKS
from runs.cli import load_yaml, marked
from runs.directory import LENGTHS, is_same, plain_config
from runs.metrics import episodes_by_policy, read_metrics
from utils import MAY_CHANGE, UserError, exclusive, write_text_atomic

COLUMNS = (
    *("table", "system", "method", "dataset", "rows", "data_sha256", "seed", "actor", "mode", "task"),
    *("updates", "environment_steps", "episodes", "mean", "std", "score", "best_in_training", "data_score"),
    *("seconds", "processor", "precision", "commit", "command", "settings"),
)
Row = dict[str, str]


# -- the file --------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[Row]:
    """Rows of a table's CSV; none where there is no file. A column that an older one lacks is empty.

    Raises UserError for a file that is no CSV, or one with other columns.
    """
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it from git") from None
    for row in rows:
        if not {*COLUMNS} >= row.keys() >= {"command", "score"} or None in row.values():
            raise UserError(f"{path}: has other columns than {', '.join(COLUMNS)}; restore it from git")
    return [dict.fromkeys(COLUMNS, "") | row for row in rows]


def append_csv(path: Path, rows: list[Row]) -> None:
    """Add a run's rows to a CSV that has none of it yet, whole or not at all, whoever else does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.parent):
        present = read_csv(path)
        if _identity(rows[0]) not in map(_identity, present):
            write_csv(path, COLUMNS, present + rows)


def write_csv(path: Path, columns: Sequence[str], rows: list[Row]) -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, file.getvalue())


def _identity(row: Row) -> tuple[str, str]:
    return row["command"], row["settings"]


class Scores:
    """The rows of several files; of a run that stands in several files, those of the first."""

    def __init__(self, files: Iterable[list[Row]]):
        self.found: dict[tuple[str, str], list[Row]] = {}
        for rows in files:
            own: dict[tuple[str, str], list[Row]] = {}
            for row in rows:
                own.setdefault(_identity(row), []).append(row)
            self.found = own | self.found
        self.commands = {command for command, _ in self.found}

    def of(self, run: Run) -> list[Row]:
        """A run's rows, none where it has none by the present defaults. Rows that name no settings count as theirs."""
        if run.text not in self.commands:  # its settings take a moment
            return []
        return self.found.get((run.text, settings_digest(run))) or self.found.get((run.text, ""), [])

    def missing(self, runs: list[Run]) -> set[str]:
        return {run.text for run in runs if not self.of(run)}


# -- a finished run --------------------------------------------------------------------------------------------------


def is_finished(run_dir: Path) -> bool:
    return (run_dir / "finished.json").exists()


def rows_of(run: Run, log_dir: str | Path) -> list[Row]:
    """Rows of a finished run, from its directory; UserError where that is damaged."""
    run_dir = run.run_dir(log_dir)
    try:
        summary, versions = (json.loads((run_dir / name).read_text()) for name in ("finished.json", "versions.json"))
        scores = list({"walker": _walker, "opso": _opso}.get(run.system, _chain)(run_dir, summary))
        if not scores:
            raise ValueError("no score of a last checkpoint")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{run_dir}: its scores cannot be read ({error!r}); remove it to train it again") from None
    seconds = seconds_spent(run_dir)
    shared = {
        "table": run.table,
        "system": run.system,
        "method": run.method,
        "dataset": run.dataset,
        "rows": versions.get("data_rows") or summary.get("transitions", ""),
        "data_sha256": versions.get("data_sha256", ""),
        "seed": run.seed,
        "seconds": "" if seconds is None else round(seconds),
        "processor": versions.get("processor", ""),
        "precision": load_yaml(run_dir / "config.yaml").get("precision", "float32"),
        "commit": versions.get("commit") or "",
        "command": run.text,
        "settings": settings_digest(run),
    }
    return [{name: _text((shared | row).get(name, "")) for name in COLUMNS} for row in scores]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def check_settings(run: Run, log_dir: str | Path, dataset_dir: str | None) -> None:
    """Raise UserError where a run was trained with other settings than its command has now.

    A default may have changed since. What is still None is filled in by the run, from what it finds; what may change
    on resuming may, but for its length.
    """
    run_dir = run.run_dir(log_dir)
    stored = load_yaml(run_dir / "config.yaml")
    config = settings_of(run.command, run.arguments(log_dir, dataset_dir))
    now, free = plain_config(config), marked(type(config), MAY_CHANGE) - LENGTHS
    for name in sorted(now.keys() - MACHINE - RESERVED - free):
        if now[name] is not None and not is_same(stored, name, now[name], config):
            remedy = "take the old settings or another --log_dir, or remove that directory to train it again"
            raise UserError(run_dir, f"{name} was {stored.get(name)} and is now {now[name]}", remedy)


def _walker(run_dir: Path, summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each task, from evaluation.csv; the random agent's too."""
    returns: dict[tuple[str, str], list[float]] = {}
    with open(run_dir / "evaluation.csv", newline="") as file:
        for row in csv.DictReader(file):
            returns.setdefault((row["agent"], row["task"]), []).append(float(row["return"]))
    for task, found in [(task, found) for (agent, task), found in returns.items() if agent == "last"]:
        best = returns.get(("best", task))
        yield {
            **{"task": task, "updates": summary.get("steps", 0), "environment_steps": 0},
            **_episodes(found),
            "score": float(np.mean(found)),
            "best_in_training": float(np.mean(best)) if best else "",
            "data_score": summary.get(f"data/{task}/return", ""),
        }


def _chain(run_dir: Path, summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each actor and mode, from training/evaluations.csv."""
    final, training = episodes_by_policy(run_dir / "training" / "evaluations.csv")
    for (actor, mode), rows in final.items():
        returns, scores = ([row[name] for row in rows] for name in ("return", "score"))
        yield {
            **{"actor": actor, "mode": mode, "updates": summary["steps"], "environment_steps": 0},
            **_episodes(returns),
            "score": float(np.mean(scores)),
            "best_in_training": max(float(np.mean(found)) for found in training[actor, mode].values()),
            "data_score": summary["data_score"],
        }


def _opso(run_dir: Path, summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Online: success in all tasks and in each. Offline: each figure of the held-out states, which has no episodes."""
    if "eval/success_rate" not in summary:
        for name in ("value_distance_spearman", "proposer_cosine", "code_rank", "code_std"):
            value = {"mean": float(summary[name]), "score": float(summary[name])}
            yield {"task": name, "updates": summary["updates"], "environment_steps": 0, **value}
        return
    metrics, config = read_metrics(run_dir), load_yaml(run_dir / "config.yaml")
    for name in sorted(name for name in summary if "/success_" in name):
        *other, task = name.removeprefix("eval/").split("/")
        success = float(summary[name])
        row = {"environment_steps": summary["env_steps"], "mean": success, "std": math.sqrt(success * (1 - success))}
        row |= {"mode": other[0] if other else config["acting"], "score": 100 * success}
        row |= {"task": task.removeprefix("success_").replace("rate", "all")}
        row |= {"episodes": config["eval_episodes"] * (NUM_TASKS if task == "success_rate" else 1)}
        best = [value for value in metrics.get(name, []) if math.isfinite(value)]
        if best and not other:  # which the last evaluation alone plays
            row["best_in_training"] = 100 * max(best)
        yield row


def _episodes(values: list[float]) -> dict[str, Any]:
    """Columns of so many episodes; the standard deviation is over episodes, divided by their number."""
    return {"episodes": len(values), "mean": float(np.mean(values)), "std": float(np.std(values))}
