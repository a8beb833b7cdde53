"""Training a table's runs: what is missing, what was cut, and a row of scores for each one that is finished.

A kill at any moment loses no finished run and repeats none: a run is finished once its directory says so, its rows are
appended in one step, and whatever lies between is made up for at the next start.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.registry import Run, Table, as_flags, check_flags, settings_of
from comparison.rows import append_csv, is_finished, relabelled, rows_by_run, rows_of
from comparison_jobs import Job, Outcome, is_held, read_attempts
from utils import UserError, one_line, progress, warn

# A module of this checkout as a command: -m alone would look for it in the current folder first.
RUN_MODULE = (
    "import runpy, sys; sys.path[0] = sys.argv.pop(1); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
ROOT = str(Path(__file__).resolve().parent.parent)
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Options:
    """Where and how runs train, from the command line of run_comparison.py."""

    log_dir: str
    dataset_dir: str | None
    only: str | None
    seeds: tuple[int, ...] | None
    retries: int
    threads: int  # of a run
    jobs: int  # runs at once, for estimates
    eval_workers: int  # more processes that step a run's environments in evaluations


def choose(table: Table, options: Options) -> list[Run]:
    """The runs asked for. Raises UserError where there is none."""
    runs = [run for run in table.runs if options.seeds is None or run.seed in options.seeds]
    if not runs:
        known = sorted({run.seed for run in table.runs})
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))}: {table.path} has {' '.join(map(str, known))}")
    chosen = [run for run in runs if options.only is None or options.only in run.name]
    if not chosen:
        raise UserError(f"--only {options.only!r}: no run has that in its name; one is {runs[0].name!r}")
    return chosen


def to_job(run: Run, options: Options) -> Job:
    """The run's process."""
    arguments = run.arguments(options.log_dir, options.dataset_dir)
    known = vars(settings_of(run, arguments))
    machine = {"eval_workers": options.eval_workers, "tensorboard": False, "resume": True}
    arguments += [word for name, value in machine.items() if name in known for word in as_flags(name, value)]
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    return Job(str(run.run_dir(options.log_dir)), ["-c", RUN_MODULE, ROOT, run.command, *arguments], environment)


def state(run: Run, options: Options) -> str:
    """finished, cut or not started, and how the last process ended if that was not well."""
    run_dir = run.run_dir(options.log_dir)
    if is_finished(run_dir):
        return "finished"
    attempts = read_attempts(run_dir)
    line = f" ({attempts[-1]['line']})" if attempts and attempts[-1]["code"] not in (None, 0, 130) else ""
    started = list(run_dir.glob("checkpoints/last.pth"))
    return f"cut{line}" if started else f"failed{line}" if line else "not started"


class Queue:
    """The runs of a table that have no rows yet."""

    def __init__(self, table: Table, options: Options):
        self.table, self.options = table, options
        self.chosen = choose(table, options)
        self.failed: dict[Run, str] = {}
        self.starts: Counter[Run] = Counter()
        self.left: list[Run] = []

    def settle(self) -> None:
        """Append what is finished, and queue the rest; of a run that other runs need, only where they are left."""
        present = rows_by_run([self.table.csv, *sorted(self.table.csv.parent.glob("*.csv"))])
        own = rows_by_run([self.table.csv])
        for run in self.chosen:
            if run.text in own:
                continue
            if run.text in present:
                append_csv(self.table.csv, relabelled(present[run.text], run))
            elif not self.append(run) and run not in self.failed:
                if run.needs is not None and run.needs not in self.left and not self.is_finished(run.needs):
                    self.left.append(run.needs)
                self.left.append(run)

    def is_finished(self, run: Run) -> bool:
        return is_finished(run.run_dir(self.options.log_dir))

    def append(self, run: Run) -> bool:
        """Append the rows of a finished run; False where it is not finished, or its directory cannot be used."""
        if not self.is_finished(run):
            return False
        try:
            append_csv(self.table.csv, rows_of(run, self.options.log_dir, self.options.dataset_dir))
            return True
        except (UserError, OSError) as error:  # the other runs go on; the next start appends it
            self.fail(run, one_line(error))
            return False

    def fail(self, run: Run, words: str) -> None:
        self.failed[run] = words
        warn(f"{run.name}: failed, {words}")

    def train(self, open_pool: Callable[[], Any]) -> None:
        """Train what is left; Ctrl-C stops the processes and keeps what they saved."""
        if not self.left:
            return
        pool = open_pool()
        try:
            with progress(len(self.left), self.table.name, unit="run") as bar:
                total = len(self.left)
                while self.left or pool.running:
                    self.start_some(pool)
                    for run, outcome in pool.poll():
                        self.take(run, outcome)
                    bar.set_postfix(running=len(pool.running), failed=len(self.failed), refresh=False)
                    bar.update(total - len(self.left) - len(pool.running) - bar.n)
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            print("stopping the runs at their last checkpoints; the same command continues them", file=sys.stderr)
            raise
        finally:
            pool.stop()

    def start_some(self, pool: Any) -> None:
        """Start runs in their order while there is room; one that waits for another run is passed over."""
        for run in list(self.left):
            if not pool.room():
                return
            if run.needs in self.failed:
                self.left.remove(run)
                self.fail(run, f"it needs {run.needs.name}, which failed")
            elif run.needs is not None and not self.is_finished(run.needs):
                continue
            else:
                self.start(run, pool)

    def start(self, run: Run, pool: Any) -> None:
        """Start one run, unless another process has it or has finished it."""
        try:
            if is_held(run.run_dir(self.options.log_dir)):
                return
            self.left.remove(run)
            if self.is_finished(run):
                self.done(run)
                return
            self.starts[run] += 1
            pool.start(run, to_job(run, self.options))
        except (UserError, OSError) as error:
            self.left = [other for other in self.left if other != run]
            self.fail(run, one_line(error))

    def done(self, run: Run) -> None:
        """Append a finished run; of one that is only needed by others, nothing."""
        if run in self.chosen:
            self.append(run)

    def take(self, run: Run, outcome: Outcome) -> None:
        """A process has ended: its run is finished, starts again, or has failed."""
        if outcome.held:  # which is no try
            self.starts[run] -= 1
            self.left.append(run)
            return
        if outcome.code == 0 and self.is_finished(run):
            self.done(run)
            return
        words = f"exit code {outcome.code}: {outcome.line}" if outcome.code is not None else outcome.line
        if outcome.code != 2 and self.starts[run] <= self.options.retries:
            warn(f"{run.name}: {words}; starting it again")
            self.left.insert(0, run)
            return
        self.fail(run, f"{words}; see {run.run_dir(self.options.log_dir) / 'output.log'}")


def describe(queue: Queue) -> None:
    """`--dry_run`: every run with its state, and the hours of those that are left."""
    options, runs = queue.options, list(queue.chosen)
    runs += [run.needs for run in runs if run.needs is not None and run.needs not in runs]
    rows, hours, unknown = rows_by_run([queue.table.csv]), 0.0, 0
    for run in dict.fromkeys(runs):
        found = "has its rows" if run.text in rows else state(run, options)
        print(f"{run.name}: {found}")
        if found not in ("has its rows", "finished"):
            hours, unknown = hours + (run.hours or 0.0), unknown + (run.hours is None)
    guess = f"Time: about {hours / options.jobs:.1f} hours, with {options.jobs} at once, by the guesses of the file"
    print(f"{guess}; without {unknown} runs that it has no guess for" if unknown else guess)


def run_table(table: Table, options: Options, action: str, open_pool: Callable[[], Any]) -> int:
    """Train a table's runs; how many failed.

    Args:
        table: from `read_table`.
        options: the command line.
        action: train; report, to append what is finished and train nothing; or list, to say what would run.
        open_pool: makes a LocalPool or RayPool.
    """
    check_flags(table)
    queue = Queue(table, options)
    if action == "list":
        describe(queue)
        return 0
    queue.settle()
    if action == "train":
        queue.train(open_pool)
    rows = rows_by_run([table.csv])
    there = sum(run.text in rows for run in table.runs)
    print(f"{table.name}: {there} of {len(table.runs)} runs are in {table.csv}; {len(queue.failed)} failed")
    if there:
        print("python run_comparison.py --tables puts them into README and docs")
    return len(queue.failed)
