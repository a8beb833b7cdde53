"""What a run records: metrics.csv and the trackers beside it, evaluations.csv with every episode."""

from __future__ import annotations

import contextlib
import csv
import math
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from runs.directory import plain_config
from utils import UserError, one_line, torch, warn, write_text_atomic

Policy = tuple[int, str]  # actor of a chain, and deterministic or stochastic


class MetricLogger:
    """metrics.csv of one run, and the trackers beside it: TensorBoard under tensorboard/, wandb where asked for.

    Log a step before saving its checkpoint: a resumed run drops the rows after `resume_step` and writes them again,
    so its file equals that of a run that was never stopped. A tracker that fails is switched off with one warning.
    `wandb_labels` are further arguments of wandb.init, as `group`; None leaves one out.
    """

    def __init__(
        self,
        run_dir: str | Path,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Any = None,
        wandb_labels: dict[str, str | None] | None = None,
    ):
        self.path = Path(run_dir) / "metrics.csv"
        self.columns: list[str] = ["step"]
        rows: list[dict[str, str]] = []
        if resume_step is not None and self.path.exists():
            rows = [row for row in _read_rows(self.path) if int(row["step"]) <= resume_step]
            # A column whose first value came later is left out here and added again at its turn.
            if rows:
                self.columns = [name for name in rows[0] if any(row[name] for row in rows)]
        self._rewrite(rows)
        self._trackers: dict[str, tuple[Callable, Callable]] = {}  # what logs a row, and what closes it
        if tensorboard:
            self._guard("TensorBoard", self._open_tensorboard, Path(run_dir), resume_step)
        if wandb_project:
            labels = {name: label for name, label in (wandb_labels or {}).items() if label is not None}
            self._guard("wandb", self._open_wandb, Path(run_dir), resume_step, wandb_project, config, labels)

    def log(self, step: int, metrics: dict[str, float | torch.Tensor]) -> None:
        """Append one row; values are numbers or 0-d tensors. Raises OSError that names the file when it cannot."""
        values = {name: float(value) for name, value in metrics.items()}
        late = [name for name in values if name not in self.columns]
        if late:
            self.columns += late
            self._rewrite(_read_rows(self.path))
        row = {"step": str(int(step))} | {name: repr(value) for name, value in values.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:  # closed: the row is in the file when this returns
                file.write(_csv_line(row.get(name, "") for name in self.columns))
        except OSError as error:
            error.filename = str(self.path)
            raise
        for name, (log, _) in list(self._trackers.items()):
            self._guard(name, log, int(step), values)

    def close(self) -> None:
        """Close the trackers; closing twice is harmless."""
        for name, (_, close) in list(self._trackers.items()):
            self._guard(name, close)
        self._trackers.clear()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        lines = [_csv_line(self.columns)] + [_csv_line(row.get(name, "") for name in self.columns) for row in rows]
        write_text_atomic(self.path, "".join(lines))

    def _open_tensorboard(self, run_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        if resume_step is None:  # a run that died before its first checkpoint left curves that are not this one's
            for stale in (run_dir / "tensorboard").glob("events.out.tfevents.*"):
                stale.unlink()
        writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

        def log(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._trackers["TensorBoard"] = log, writer.close

    def _open_wandb(
        self, run_dir: Path, resume_step: int | None, project: str, config: Any, labels: dict[str, str]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise RuntimeError("not installed: pip install -r requirements/tracking.txt") from None
        # The id lies beside the run, so that a resumed run continues its own page.
        id_file = run_dir / "wandb_id.txt"
        if resume_step is None or not id_file.exists():
            write_text_atomic(id_file, uuid.uuid4().hex)
        settings = plain_config(config) if config is not None else None
        labels = {"name": "/".join(Path(run_dir).resolve().parts[-4:])} | labels
        identity = {"id": id_file.read_text().strip(), "resume": "allow"}
        # One process may train several runs, each with a page of its own.
        run = wandb.init(project=project, dir=str(run_dir), config=settings, reinit="create_new", **identity, **labels)
        self._trackers["wandb"] = (lambda step, values: run.log(values, step=step)), run.finish

    def _guard(self, name: str, action: Callable, *arguments: Any) -> None:
        """Call a tracker; whatever it raises costs that tracker and nothing else."""
        try:
            action(*arguments)
        except Exception as error:
            self._trackers.pop(name, None)
            warn(f"{name} is off for this run ({type(error).__name__}: {error}); metrics.csv goes on")


class RunningMeans:
    """Means of dicts of 0-d tensors, without waiting for the device until asked for. Lists would scatter the heap."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, info: dict[str, torch.Tensor]) -> None:
        """Add one update; a name that some updates lack is averaged over the others."""
        for name, value in info.items():
            if name not in self.sums:
                self.sums[name], self.counts[name] = torch.zeros_like(value, dtype=torch.float32), 0
            self.counts[name] += 1
        torch._foreach_add_([self.sums[name] for name in info], list(info.values()))

    def take(self) -> dict[str, float]:
        """The means as floats, in one transfer, and begin anew; empty where nothing was added."""
        if not self.sums:
            return {}
        sums = torch.stack(list(self.sums.values())).tolist()
        means = {name: total / self.counts[name] for name, total in zip(self.sums, sums, strict=True)}
        self.sums, self.counts = {}, {}
        return means


def _csv_line(cells: Iterable[str]) -> str:
    return ",".join(cells) + "\n"


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv as text; a line that a kill or a full disk cut short is left out."""
    # Only lines that end in a line break are whole: a cut number still reads as a number.
    columns, *lines = path.read_text(errors="replace").split("\n")[:-1] or [""]
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError):
            row = dict(zip(columns.split(","), line.split(","), strict=True))
            int(row["step"])
            for cell in row.values():
                float(cell or 0)
            rows.append(row)
    return rows


class EpisodeLog:
    """evaluations.csv: every evaluated episode of a run, so that any statistic can be taken later.

    Columns: evaluation (`training`, or `final` for that of the end), step, actor, mode, episode, length, return, score.
    The whole file is replaced at each evaluation; a resumed run drops what came after `resume_step`.
    """

    COLUMNS = {"evaluation": str, "step": int, "actor": int, "mode": str, "episode": int, "length": int}
    COLUMNS |= {"return": float, "score": float}

    def __init__(self, path: str | Path, resume_step: int | None = None):
        self.path = Path(path)
        self.lines = [_csv_line(self.COLUMNS)]
        if resume_step is not None and self.path.exists():
            kept = [row for row in read_episodes(self.path) if row["evaluation"] == "training"]
            kept = [row for row in kept if row["step"] <= resume_step]
            self.lines += [_csv_line(str(row[name]) for name in self.COLUMNS) for row in kept]
        write_text_atomic(self.path, "".join(self.lines))

    def add(self, step: int, policies: list[tuple[int, str]], returns, lengths, scores, evaluation="training") -> None:
        """One evaluation: returns, lengths and scores [P, E] of policies [P], each an actor and a mode."""
        for (actor, mode), *rows in zip(policies, returns, lengths, scores, strict=True):
            for episode, (value, length, score) in enumerate(zip(*rows, strict=True)):
                cells = (evaluation, step, actor, mode, episode, int(length), float(value), float(score))
                self.lines.append(_csv_line(map(str, cells)))
        write_text_atomic(self.path, "".join(self.lines))


def read_episodes(path: str | Path) -> list[dict[str, Any]]:
    """Rows of an evaluations.csv, numbers as numbers. Raises UserError where it is missing or no such file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file, restval="")
            if rows.fieldnames != [*EpisodeLog.COLUMNS]:
                raise ValueError("other columns")
            return [{name: kind(row[name]) for name, kind in EpisodeLog.COLUMNS.items()} for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: no evaluations can be read ({one_line(error)}); give a run's directory") from None


def episodes_by_policy(path: str | Path) -> tuple[dict[Policy, list[dict]], dict[Policy, dict[int, list[float]]]]:
    """By actor and mode of an evaluations.csv: rows of the last evaluation, scores of those in training by step."""
    final: dict[Policy, list[dict]] = {}
    training: dict[Policy, dict[int, list[float]]] = {}
    for row in read_episodes(path):
        policy = row["actor"], row["mode"]
        if row["evaluation"] == "final":
            final.setdefault(policy, []).append(row)
        else:
            training.setdefault(policy, {}).setdefault(row["step"], []).append(row["score"])
    return final, training


def read_metrics(run_dir: str | Path) -> dict[str, list[float]]:
    """Column -> values of metrics.csv (UserError without it), `step` as ints, nan where a row lacks the value."""
    path = Path(run_dir) / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the directory of a run")
    rows = _read_rows(path)
    names = list(rows[0]) if rows else ["step"]
    return {
        name: [int(row[name]) if name == "step" else float(row[name] or math.nan) for row in rows] for name in names
    }
