"""Training runs that are left: which may start, what came of them, and a row of scores for each one of a table.

A kill at any moment loses no finished run and repeats none: a run is finished once its directory says so, a table's
rows are appended in one step, and whatever lies between is made up for at the next start.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from comparison.jobs import BAD_INPUT, LOCKED, Job, LocalPool, Outcome, Pool, describe_state, is_locked
from comparison.ray import RayPool
from comparison.registry import Run, Table, as_flags, check_flags, read_table, settings_of
from comparison.rows import Scores, append_csv, is_finished, read_csv, rows_of
from offline_data import find_dataset
from utils import UserError, one_line, progress, torch, warn

# A module of this checkout as a command: -m alone would look for it in the current folder first.
RUN_MODULE = (
    "import runpy, sys; sys.path[0] = sys.argv.pop(1); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
ROOT = str(Path(__file__).resolve().parent.parent)
POLL_SECONDS = 0.5


def make_job(run_dir: Path, module: str, flags: list[str], threads: int) -> Job:
    """A process of this checkout."""
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return Job(str(run_dir), ["-c", RUN_MODULE, ROOT, module, *flags], environment)


def missing(dataset_id: str, dataset_dir: str | None) -> str | None:
    """How a dataset that is not there comes about; None for one that is there. Raises UserError for an unknown id."""
    dataset = find_dataset(dataset_id)
    if dataset.local:
        return None if dataset.manifest(dataset_dir) else f"made in {dataset.folder(dataset_dir)}"
    there = all(path.exists() for path in dataset.paths(dataset_dir))
    how = f"downloaded from {dataset.url}" if dataset.url else "fetched as docs/data.md says"
    return None if there else how


def only_named(only: str | None, runs: list) -> list:
    """The runs whose name holds a text. Raises UserError where there is none."""
    chosen = [run for run in runs if only is None or only in run.name]
    if not chosen:
        raise UserError(f"--only {only!r}: no run has that in its name; one is {runs[0].name!r}")
    return chosen


class Queue:
    """Runs that are left, where they train, and what came of them.

    A subclass says what a run is, by `run_dir`, `job`, `datasets` and `is_finished` of one, and by `done` what to do
    with one that has just finished. A run has a `name`, and may need another one (`needs`).

    Args:
        config: the settings of run_comparison.py.
        name: of the progress bar.
    """

    noun, scale = "run", False  # of the progress bar
    names_devices = False  # whether the runs' settings say which GPU they train on

    def __init__(self, config: Any, name: str):
        self.config, self.name = config, name
        self.left: list = []
        self.failed: dict[Any, str] = {}
        self.starts: Counter = Counter()
        self.waiting = 0  # runs that another process trains

    def open_pool(self) -> Pool:
        """Where the runs train: this machine, whose GPUs they get in turn, or Ray's cluster. Raises UserError."""
        config = self.config
        if config.backend == "ray":
            return RayPool(config.address, config.jobs, config.run_threads, config.gpus_per_run)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        return LocalPool(config.jobs or 1, [] if self.names_devices else devices)

    def train(self) -> None:
        """Train what is left; Ctrl-C stops the processes and keeps what they saved."""
        if not self.left:
            return
        pool = self.open_pool()
        total, done = self.amount(pool)
        try:
            with progress(total, self.name, initial=done, unit=self.noun, unit_scale=self.scale) as bar:
                while self.left or pool.running:
                    self.start_some(pool)
                    for run, outcome in pool.poll():
                        self.take(run, outcome)
                    counts = {pool.verb: len(pool.running), "failed": len(self.failed)}
                    counts |= {"trained by others": self.waiting} if self.waiting else {}
                    bar.set_postfix(counts, refresh=False)
                    bar.update(max(self.amount(pool)[1] - bar.n, 0))
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt as interrupt:
            print("stopping the runs at their last checkpoints", file=sys.stderr)
            interrupt.args = ("what was saved is kept; the same command continues the runs",)
            raise
        finally:
            pool.stop()

    def start_some(self, pool: Pool) -> None:
        """Start runs in their order while there is room; one that waits for another run is passed over."""
        self.waiting = 0
        for run in list(self.left):
            if not pool.room():
                return
            needed = getattr(run, "needs", None)
            if needed in self.failed:
                self.left.remove(run)
                self.fail(run, f"it needs {needed.name}, which failed")
            elif needed is None or self.is_finished(needed):
                self.start(run, pool)

    def start(self, run: Any, pool: Pool) -> None:
        """Start one run, unless another process has it or has finished it."""
        try:
            if is_locked(self.run_dir(run)):
                self.waiting += 1
                return
            self.left.remove(run)
            if self.is_finished(run):
                self.done(run)
                return
            self.starts[run] += 1
            pool.start(run, self.job(run))
        except (UserError, OSError) as error:
            self.left = [other for other in self.left if other is not run]
            self.fail(run, one_line(error))

    def take(self, run: Any, outcome: Outcome) -> None:
        """A process has ended: its run is finished, starts again, or has failed."""
        if outcome.code == LOCKED:  # it gave way to another process, which is no try
            self.starts[run] -= 1
            self.left.append(run)
        elif outcome.code == 0 and self.is_finished(run):
            self.done(run)
        else:
            words = f"exit code {outcome.code}: {outcome.line}" if outcome.code is not None else outcome.line
            if outcome.code != BAD_INPUT and self.starts[run] <= self.config.retries:
                warn(f"{run.name}: {words}; starting it again")
                self.left.insert(0, run)
                return
            self.fail(run, words, f"; see {self.run_dir(run) / 'output.log'}")
            self.fail_others(run, words)

    def fail(self, run: Any, words: str, more: str = "") -> None:
        self.failed[run] = words
        warn(f"{run.name}: failed, {words}{more}")

    def fail_others(self, run: Any, words: str) -> None:
        """Runs of the data that a failed one could not get: the next try would fail as it did."""
        lost = self.lacks(run).keys()
        others = [other for other in self.left if lost & self.lacks(other).keys()] if lost else []
        if others:
            warn(f"{len(others)} other runs of {', '.join(sorted(lost))} fail with it")
            self.failed |= dict.fromkeys(others, words)
            self.left = [other for other in self.left if other not in others]

    def lacks(self, run: Any) -> dict[str, str]:
        """A run's datasets that are not there, and how they come about."""
        ids, folder = self.datasets(run)
        return {name: how for name in ids if (how := missing(name, folder)) is not None}

    def describe_data(self, runs: list) -> None:
        """`--dry_run`: the datasets that are missing, and how they come about."""
        places: dict[str, dict[str, None]] = {}
        for name, how in [pair for run in runs for pair in self.lacks(run).items()]:
            places.setdefault(how, {})[name] = None
        for how, names in places.items():
            print(f"Data: {len(names)} missing, will be {how}: {', '.join(names)}")

    def amount(self, pool: Pool) -> tuple[int, int]:
        """All there is to do, and how much of it is done."""
        self.total = max(getattr(self, "total", 0), len(self.left))
        return self.total, self.total - len(self.left) - len(pool.running)


# ----------------------------------------------------------------------------------------------------------------
# The runs of a table
# ----------------------------------------------------------------------------------------------------------------


def choose(table: Table, only: str | None, seeds: tuple[int, ...] | None) -> list[Run]:
    """The runs asked for. Raises UserError where there is none."""
    runs = [run for run in table.runs if seeds is None or run.seed in seeds]
    if not runs:
        known = sorted({run.seed for run in table.runs})
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: {table.path} has {' '.join(map(str, known))}")
    return only_named(only, runs)


class TableQueue(Queue):
    """The runs of a table that have no rows yet."""

    def __init__(self, config: Any):
        self.table = read_table(config.config)
        super().__init__(config, self.table.name)
        check_flags(self.table)
        for name, usual in (("max_timesteps", None), ("output", "results")):
            if getattr(config, name) != usual:
                raise UserError(f"--{name} {getattr(config, name)}: does nothing for {config.config}; leave it out")
        self.chosen = choose(self.table, config.only, config.seeds)

    def settle(self) -> None:
        """Append what is finished, and queue the rest; of a run that other runs need, only where they are left."""
        own = Scores([read_csv(self.table.csv)])
        others = Scores(map(read_csv, sorted(self.table.csv.parent.glob("*.csv"))))
        for run in self.chosen:
            if own.of(run):
                continue
            if rows := others.of(run):
                append_csv(self.table.csv, [row | {"table": run.table, "method": run.method} for row in rows])
            elif not self.append(run) and run not in self.failed:
                if run.needs is not None and run.needs not in self.left and not self.is_finished(run.needs):
                    self.left.append(run.needs)
                if run not in self.left:
                    self.left.append(run)

    def run_dir(self, run: Run) -> Path:
        return run.run_dir(self.config.log_dir)

    def is_finished(self, run: Run) -> bool:
        return is_finished(self.run_dir(run))

    def datasets(self, run: Run) -> tuple[list[str], str | None]:
        return run.datasets, self.config.dataset_dir

    def job(self, run: Run) -> Job:
        arguments = run.arguments(self.config.log_dir, self.config.dataset_dir)
        known = vars(settings_of(run.command, arguments))
        machine = {"eval_workers": self.config.eval_workers, "tensorboard": False, "resume": True}
        arguments += [word for name, value in machine.items() if name in known for word in as_flags(name, value)]
        return make_job(self.run_dir(run), run.command, arguments, self.config.run_threads)

    def append(self, run: Run) -> bool:
        """Append the rows of a finished run; False where it is not finished, or its directory cannot be used."""
        if not self.is_finished(run):
            return False
        try:
            append_csv(self.table.csv, rows_of(run, self.config.log_dir, self.config.dataset_dir))
            return True
        except (UserError, OSError) as error:  # the other runs go on; the next start appends it
            self.fail(run, one_line(error))
            return False

    def done(self, run: Run) -> None:
        """Append a finished run; of one that is only needed by others, nothing."""
        for chosen in self.chosen:
            if chosen == run:
                self.append(chosen)

    def describe(self) -> None:
        """`--dry_run`: every run with its state, the data that is missing, and the hours of the runs that are left."""
        scores, left = Scores([read_csv(self.table.csv)]), []
        for run in dict.fromkeys(part for one in self.chosen for part in (one.needs, one) if part is not None):
            found = "has its rows" if scores.of(run) else describe_state(self.run_dir(run), self.is_finished(run))
            print(f"{run.name}: {found}")
            left += [run] if found not in ("has its rows", "finished") else []
        self.describe_data(left)
        jobs, unknown = self.config.jobs or 1, sum(run.hours is None for run in left)
        hours = sum(run.hours or 0.0 for run in left) / jobs
        without = f"; without {unknown} runs that it has no guess for" if unknown else ""
        print(f"Time: about {hours:.1f} hours, with {jobs} at once, by the guesses of the file{without}")

    def report(self) -> str:
        """What the table's CSV has now."""
        scores = Scores([read_csv(self.table.csv)])
        there, all_runs = sum(bool(scores.of(run)) for run in self.table.runs), len(self.table.runs)
        words = f"{self.name}: {there} of {all_runs} runs are in {self.table.csv}; {len(self.failed)} failed"
        return f"{words}\npython run_comparison.py --tables puts them into README and docs" if there else words
