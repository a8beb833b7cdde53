"""Training runs that are left: which may start, what came of them, and a row of scores for each one of a table.

A kill at any moment loses no finished run and repeats none: a run is finished once its directory says so, a table's
rows are appended in one step, and whatever lies between is made up for at the next start.
"""

import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from comparison import jobs
from comparison.ray import RayPool
from comparison.registry import Run, Table, as_flags, resolved_settings, settings_of
from comparison.rows import Row, Scores, append_csv, is_finished, read_csv, rows_of
from comparison.tables import draw
from offline_data import find_dataset
from runs.cli import load_yaml
from runs.directory import plain_config
from utils import UserError, counted, one_line, progress, torch, warn

# A module of this checkout as a command: -m alone would look for it in the current folder first.
RUN_MODULE = (
    "import runpy, sys; sys.path[0] = sys.argv.pop(1); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
ROOT = str(Path(__file__).resolve().parent.parent)
POLL_SECONDS = 0.5


def make_job(run_dir: Path, module: str, flags: list[str], threads: int) -> jobs.Job:
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return jobs.Job(str(run_dir), ["-c", RUN_MODULE, ROOT, module, *flags], environment)


def missing(dataset_id: str, dataset_dir: str | None) -> str | None:
    """How a dataset that is not there comes about; None for one that is there. Raises UserError for an unknown id."""
    dataset = find_dataset(dataset_id)
    if dataset.local:
        return None if dataset.manifest(dataset_dir) else f"made in {dataset.folder(dataset_dir)}"
    there = all(path.exists() for path in dataset.paths(dataset_dir))
    how = f"downloaded from {dataset.url}" if dataset.url else "fetched as docs/data.md says"
    return None if there else how


def choose(runs: list[Run], only: str | None) -> list[Run]:
    """The runs whose name holds a text, as whole words: BC is not TD3+BC. Raises UserError where there is none."""
    words = re.compile(rf"(?<![\w+]){re.escape(only or '')}(?![\w+])")
    chosen = [run for run in runs if only is None or words.search(run.name)]
    if not chosen:
        raise UserError(f"--only {only!r}: no run has that in its name, as a whole word; one is {runs[0].name!r}")
    return chosen


class Queue:
    """The runs of a table that have no rows yet, or those of them that are asked for; rows go to the table's CSV."""

    machine: ClassVar[dict[str, Any]] = {"tensorboard": False}  # further settings of every run

    def __init__(self, config: Any, table: Table, runs: list[Run] | None = None):
        self.config, self.table = config, table
        self.runs = choose(runs or table.runs, config.only)
        self.left: list[Run] = []
        self.failed: dict[Run, str] = {}
        self.starts: Counter = Counter()
        self.waiting = 0  # runs that another process trains

    # -- what a run is, and what it leaves -----------------------------------------------------------------------------

    def run_dir(self, run: Run) -> Path:
        return run.run_dir(self.config.log_dir)

    def is_finished(self, run: Run) -> bool:
        return is_finished(self.run_dir(run))

    def trained(self, run: Run) -> float:
        """The part of a run that is trained, as far as its metrics tell."""
        most = resolved_settings(run.command, run.flags).get("max_timesteps")
        return 1.0 if self.is_finished(run) else min(jobs.updates_done(self.run_dir(run)) / most, 1.0) if most else 0.0

    def job(self, run: Run) -> jobs.Job:
        """A run's process. Every setting is a flag, so that no file left by an earlier start decides one."""
        words = run.arguments(self.config.log_dir, self.config.dataset_dir)
        settings = plain_config(settings_of(run.command, words))
        own = {"eval_workers": self.config.eval_workers, "resume": True} | self.machine
        settings |= {name: value for name, value in own.items() if name in settings and f"--{name}" not in words}
        flags = [word for name, value in settings.items() for word in as_flags(name, value)]
        return make_job(self.run_dir(run), run.command, flags, self.config.run_threads)

    def known(self) -> tuple[Scores, Scores]:
        """Rows of this table, and of all in its folder; a comparison's results.csv, say, is no table's."""
        files = [path for path in self.table.path.parent.glob("*.yaml") if "runs" in load_yaml(path)]
        tables = sorted(path.with_suffix(".csv") for path in files)
        return Scores([read_csv(self.table.csv)]), Scores(map(read_csv, filter(Path.exists, tables)))

    def add(self, run: Run, rows: list[Row]) -> None:
        append_csv(self.table.csv, rows)

    def settle(self) -> None:
        """Take up what is finished, and queue the rest; of a run that other runs need, only where they are left."""
        own, others = self.known()
        for run in self.runs:
            if own.of(run):
                continue
            if rows := others.of(run):
                self.add(run, [row | {"table": run.table, "method": run.method} for row in rows])
            elif not self.append(run) and run not in self.failed:
                if run.needs is not None and run.needs not in self.left and not self.is_finished(run.needs):
                    self.left.append(run.needs)
                if run not in self.left:
                    self.left.append(run)

    def append(self, run: Run) -> bool:
        """Take up the rows of a finished run; False where it is not finished, or its directory cannot be used."""
        if not self.is_finished(run):
            return False
        try:
            self.add(run, rows_of(run, self.config.log_dir))
            return True
        except (UserError, OSError) as error:  # the other runs go on; the next start takes it up
            self.fail(run, one_line(error))
            return False

    def done(self, run: Run) -> None:
        """Take up a run that has just finished; of one that is only needed by others, nothing."""
        for chosen in self.runs:
            if chosen == run:
                self.append(chosen)

    # -- training ------------------------------------------------------------------------------------------------------

    def open_pool(self) -> jobs.Pool:
        """Where the runs train: this machine, whose GPUs they get in turn, or Ray's cluster. Raises UserError."""
        config = self.config
        if config.backend == "ray":
            return RayPool(config.address, config.jobs, config.run_threads, config.gpus_per_run)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        names_devices = any("--device cuda:" in run.text for run in self.runs)  # the runs' own settings say which
        return jobs.LocalPool(config.jobs or 1, [] if names_devices else devices)

    def train(self) -> None:
        """Train what is left; Ctrl-C stops the processes and keeps what they saved."""
        if not self.left:
            return
        pool, total = self.open_pool(), len(self.left)
        try:
            with progress(total, self.table.name, unit="run", unit_scale=True) as bar:
                while self.left or pool.running:
                    self.start_some(pool)
                    for run, outcome in pool.poll():
                        self.take(run, outcome)
                    counts = {pool.verb: len(pool.running), "failed": len(self.failed)}
                    counts |= {"trained by others": self.waiting} if self.waiting else {}
                    bar.set_postfix(counts, refresh=False)
                    going = sum(1 - self.trained(run) for run in pool.running.values())
                    bar.update(max(total - len(self.left) - going - bar.n, 0))
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt as interrupt:
            print("stopping the runs at their last checkpoints", file=sys.stderr)
            interrupt.args = ("what was saved is kept; the same command continues the runs",)
            raise
        finally:
            pool.stop()

    def start_some(self, pool: jobs.Pool) -> None:
        """Start runs in their order while there is room; one that waits for another run is passed over."""
        self.waiting = 0
        for run in list(self.left):
            if not pool.room():
                return
            needed = run.needs
            if needed in self.failed:
                self.left.remove(run)
                self.fail(run, f"it needs {needed.name}, which failed")
            elif needed is None or self.is_finished(needed):
                self.start(run, pool)

    def start(self, run: Run, pool: jobs.Pool) -> None:
        """Start one run, unless another process has it or has finished it."""
        try:
            if jobs.is_locked(self.run_dir(run)):
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

    def take(self, run: Run, outcome: jobs.Outcome) -> None:
        """A process has ended: its run is finished, starts again, or has failed."""
        if outcome.code == 0 and self.is_finished(run):
            self.done(run)
        else:
            words = f"exit code {outcome.code}: {outcome.line}" if outcome.code is not None else outcome.line
            if outcome.code != jobs.BAD_INPUT and self.starts[run] <= self.config.retries:
                warn(f"{run.name}: {words}; starting it again")
                self.left.insert(0, run)
                return
            self.fail(run, words, f"; see {self.run_dir(run) / 'output.log'}")

    def fail(self, run: Run, words: str, more: str = "") -> None:
        self.failed[run] = words
        warn(f"{run.name}: failed, {words}{more}")

    def lacks(self, run: Run) -> dict[str, str]:
        """A run's datasets that are not there, and how they come about."""
        folder = self.config.dataset_dir
        return {name: how for name in run.datasets if (how := missing(name, folder)) is not None}

    # -- telling -------------------------------------------------------------------------------------------------------

    def describe(self) -> None:
        """`--dry_run`: every run with its state, the data that is missing, and the time of the runs that are left."""
        scores, states = self.known(), {}
        for run in self.runs:
            if any(known.of(run) for known in scores):
                states[run] = "has its rows"
                continue
            for part in filter(None, (run.needs, run)):
                states[part] = jobs.describe_state(self.run_dir(part), self.is_finished(part))
        for run, state in states.items():
            print(f"{run.name}: {state}")
        left = [run for run, state in states.items() if state not in ("has its rows", "finished")]
        self.describe_data(left)
        self.describe_time(left)

    def describe_data(self, runs: list) -> None:
        places: dict[str, dict[str, None]] = {}
        for name, how in [pair for run in runs for pair in self.lacks(run).items()]:
            places.setdefault(how, {})[name] = None
        for how, names in places.items():
            print(f"Data: {len(names)} missing, will be {how}: {', '.join(names)}")

    def describe_time(self, left: list[Run]) -> None:
        """Hours of the runs that are left: guesses, times what trained runs took of theirs on this machine."""
        parts = {run: self.trained(run) for run in dict.fromkeys([*self.runs, *left])}
        begun = [run for run in self.runs if run.hours and parts[run] and jobs.seconds_spent(self.run_dir(run))]
        guessed = sum(run.hours * parts[run] for run in begun)
        scale = sum(jobs.seconds_spent(self.run_dir(run)) for run in begun) / 3600 / guessed if begun else 1.0
        known = [scale * run.hours * (1 - parts[run]) for run in left if run.hours is not None]
        if not known:
            return print(f"{counted(len(left), 'run')} left" + "; how long, their progress will tell" * bool(left))
        at_once, whole = self.config.jobs or 1, sum(known) / (self.config.jobs or 1)
        units = ((24, "days"), (1, "hours"), (1 / 60, "minutes"))
        size, unit = next((pair for pair in units if whole >= 2 * pair[0]), units[-1])
        words = f"{whole / size:.1f} {unit}, with {at_once} at once, by what was trained and guesses"
        if len(known) < len(left):
            words += f"; without {counted(len(left) - len(known), 'run')} of unknown length"
        print(f"{counted(len(left), 'run')} left: about {words}")

    def report(self) -> str:
        own, runs = self.known()[0], self.table.runs
        try:
            words, grid, _ = draw(self.table, own)
            shown = f"{words}\n\n{grid.text()}"
        except UserError as error:
            shown = f"no table yet: {error}"
        there = f"{len(runs) - len(own.missing(runs))} of {len(runs)} runs are in {self.table.csv}"
        return f"{shown}\n\n{there}; {len(self.failed)} failed"
