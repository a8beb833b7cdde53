"""Train and compare chains of actors over datasets, weights and seeds: config.yaml says which.

Every run is a process of its own in logs/{env}/w2_{weights}/seed_{seed}: a pogo_main.py, or, where the file names an
algorithm, a pogo_multi_main. The command can be cut and repeated: finished runs are kept, runs that were cut go on from
their last checkpoint, failed ones are tried again. It writes results/results.csv, results/results.md and
results/report.html after every finished run. With --max_timesteps runs and results are kept apart, in folders
updates_<number>, so that a quick look takes no place from the real runs.

    python run_comparison.py --config config.yaml --dry_run
    python run_comparison.py --config config.yaml --jobs 2

A file that names commands (`runs:`) is a table of results instead: see docs/results.md.

    python run_comparison.py --config results/walker_main.yaml --jobs 2
    python run_comparison.py --tables
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import os
import shutil
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pogo_main
from algorithms.offline import make_configs, pogo_multi_main
from comparison import estimate, tables
from comparison.groups import POGO, ComparedRun
from comparison.jobs import Job, Pool, describe_state, seconds_spent, updates_done
from comparison.queue import Queue, TableQueue, make_job, only_named
from comparison.ray import check_gpus
from comparison.registry import as_flags, check_keys, is_table
from comparison.report import write_report
from offline_data import is_minari, normalized_score
from pogo_agent import POGOAgent
from pogo_main import POGORun, POGOTrainerConfig
from runs.chain import ChainRun, ChainRunConfig
from runs.cli import check_ranges, check_values, load_yaml, parse_config, run_cli
from runs.directory import check_run, plain_config
from utils import Count, Range, RunFinished, UserError, Whole, warn

ROOT = Path(__file__).resolve().parent


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class RunComparisonConfig:
    config: str | None = None  # YAML file of the comparison, see docs/comparison.md; default: the shipped config.yaml
    log_dir: str = "logs"  # keep every run in a directory of its own in this folder
    output: str = "results"  # write results.csv, results.md and report.html to this folder
    only: str | None = None  # take only the runs whose name, as --dry_run shows it, holds this text
    dry_run: bool = False  # list the runs, say what data, time and disk space those that are left need, and stop
    report_only: bool = False  # train nothing, only write the results of the runs that are finished
    tables: bool = False  # train nothing, only rewrite the tables of README.md and docs/ from results/*.csv
    jobs: Count | None = None  # train this many runs at once; default: 1, on Ray as many as the cluster has room for
    threads: Count | None = None  # CPU threads of a run; default: its share of the cores, at most 4; on Ray 1
    retries: Whole = 2  # start a crashed run again up to this many times; never one that diverged or has bad settings
    backend: Literal["local", "ray"] = "local"  # train on this machine (local) or on the Ray cluster at --address (ray)
    address: str | None = None  # connect to this Ray cluster: host:port, ray://host:port, or auto for this machine's
    gpus_per_run: Annotated[float, Range(0, 64)] | None = None  # share of a GPU for a run on Ray; default: 0.25 if any
    dataset_dir: str | None = None  # read the data from this folder, whatever the comparison's file says
    max_timesteps: Count | None = None  # train runs for this many updates, apart from those of the file's number
    seeds: tuple[int, ...] | None = None  # train every chain with these seeds, whatever the comparison's file says

    def apart(self, folder: str) -> Path:
        """The folder, or with --max_timesteps one in it."""
        return Path(folder) / (f"updates_{self.max_timesteps}" if self.max_timesteps else "")

    @property
    def run_cores(self) -> int:
        """Cores of a run."""
        return self.threads or (1 if self.backend == "ray" else max(usable_cores() // (self.jobs or 1), 1))

    @property
    def run_threads(self) -> int:
        """CPU threads of a run. Networks of this size gain nothing from more than four unless that is asked for."""
        return self.threads or min(self.run_cores, 4)

    @property
    def eval_workers(self) -> int:
        """Processes that step the environments of a run's evaluations beside its own."""
        return min(self.run_cores - 1, 7)


# ----------------------------------------------------------------------------------------------------------------
# config.yaml -> runs
# ----------------------------------------------------------------------------------------------------------------

SECTIONS = ("common", "sinkhorn", "environments")
SINKHORN = {"K": "sinkhorn_K", "blur": "sinkhorn_blur", "backend": "sinkhorn_backend", "blur_relative": "blur_relative"}
WEIGHTS = {
    "w2_weights": tuple[float, ...],
    "w2_weights_base": tuple[float, float],
    "w2_weights_third": tuple[float, ...],
}
DECIDED_HERE = {"seed", "num_seeds", "w2_weights", "env", "run_dir", "resume", "overwrite", "algorithm", "num_actors"}
DECIDED_HERE |= {"name", "evaluate", "evaluate_episodes", "evaluate_seed", *SINKHORN.values()}


@dataclass(frozen=True)
class System:
    """An algorithm that config.yaml can name."""

    config_class: type[ChainRunConfig]
    run_class: type[ChainRun]
    make_agent: Callable[..., Any]  # of settings, sizes of observation, action and largest action, generator, device

    @functools.cached_property
    def hints(self) -> dict[str, Any]:
        """Its settings and their types."""
        types = typing.get_type_hints(self.config_class)
        return {field.name: types[field.name] for field in dataclasses.fields(self.config_class)}

    @property
    def own_hints(self) -> dict[str, Any]:
        """Those that a file may set by their names."""
        return {name: hint for name, hint in self.hints.items() if name not in DECIDED_HERE}

    @property
    def sinkhorn_hints(self) -> dict[str, Any]:
        """Those of a section `sinkhorn`, which has names of its own."""
        return {name: self.hints[name] for name in SINKHORN.values() if name in self.hints}


SYSTEMS = {POGO: System(POGOTrainerConfig, POGORun, lambda config, sizes, *more: POGOAgent(config, *sizes, *more))}
SYSTEMS |= {
    name: System(config_class, pogo_multi_main.MultiRun, pogo_multi_main.build)
    for name, (_, config_class) in pogo_multi_main.ALGORITHMS.items()
}
ALGORITHM = {"algorithm": Literal[tuple(SYSTEMS)]}


@dataclass(eq=False)
class Run(ComparedRun):
    """One run of the comparison."""

    config: Any = None  # all of its settings, run_dir included

    @property
    def system(self) -> System:
        return SYSTEMS[self.algorithm]


def read(where: str, values: Any, hints: dict[str, Any], aliases: dict[str, str] | None = None) -> dict[str, Any]:
    """Settings of a section by field, typed as in a run's own YAML file. Raises UserError that names file and key."""
    aliases = aliases or ({"learning_rate": "lr"} if "lr" in hints else {})
    return check_values(where, values, hints, aliases, {"actor_configs": pogo_multi_main.read_actor_configs})


def read_entries(path: Path, environments: Any, usual: str) -> Iterator[tuple[str, str, dict, str]]:
    """Of each entry: its place in the file, dataset id, itself without `algorithm`, and that. Raises UserError."""
    check_keys(f"{path}: environments", environments, environments)
    for environment, datasets in environments.items():
        where = f"{path}: environments.{environment}"
        check_keys(where, datasets, datasets)
        if not datasets:
            raise UserError(f"{where}: names no datasets; see docs/comparison.md")
        for dataset, found in datasets.items():
            if found == []:
                raise UserError(f"{where}.{dataset}: is an empty list; give an entry, or leave it out")
            for number, entry in enumerate(found if isinstance(found, list) else [found]):
                place = f"{where}.{dataset}" + (f"[{number}]" if isinstance(found, list) else "")
                check_keys(place, entry, entry)
                algorithm = check_values(place, {"algorithm": entry.get("algorithm", usual)}, ALGORITHM)
                rest = {key: value for key, value in entry.items() if key != "algorithm"}
                yield place, f"{environment}-{dataset}-v2", rest, algorithm["algorithm"]


def read_entry(where: str, dataset_id: str, entry: dict, algorithm: str, shared: dict) -> tuple[dict, list[tuple]]:
    """Settings of an entry's runs but seed, and lists of weights. The lowest layer is what CORL sets for the data."""
    system, sinkhorn = SYSTEMS[algorithm], entry.pop("sinkhorn", {})
    settings = {"env": dataset_id} | shipped_settings(algorithm, entry.get("env", dataset_id))
    settings |= {name: value for name, value in shared.items() if name in system.hints and name != "algorithm"}
    settings |= read(where, entry, system.own_hints | WEIGHTS | {"env": str})
    settings |= read(f"{where}.sinkhorn", sinkhorn, system.sinkhorn_hints, SINKHORN)
    weights = {name: settings.pop(name) for name in WEIGHTS if name in settings}
    if weights.keys() == {"w2_weights"}:
        lists = [weights["w2_weights"]]
    elif weights.keys() == {"w2_weights_base", "w2_weights_third"}:
        lists = [(*weights["w2_weights_base"], third) for third in weights["w2_weights_third"]]
    else:
        raise UserError(
            f"{where} needs w2_weights, or both w2_weights_base and w2_weights_third; "
            f"it has {' and '.join(weights) or 'none'}"
        )
    return settings, lists


def shipped_settings(algorithm: str, dataset_id: Any) -> dict[str, Any]:
    """What CORL sets differently for an algorithm on a dataset, by the file that the repository ships for the two."""
    robot, _, level = str(dataset_id).removeprefix("local/").removesuffix("-v2").partition("-")
    if algorithm == POGO or (robot, level) not in make_configs.DATASETS:
        return {}
    values = make_configs.DIFFERENCES[algorithm](robot, level)
    return {name: value for name, value in values.items() if name != "max_timesteps"}


def expand(config: RunComparisonConfig) -> list[Run]:
    """The runs that a comparison's file and flags ask for, in the file's order. Raises UserError in one line."""
    path = Path(config.config)
    sections = load_yaml(path)
    check_keys(f"{path}", sections, SECTIONS)
    common, sinkhorn, environments = (sections.get(name) or {} for name in SECTIONS)
    check_keys(f"{path}: common", common, common)
    entries = list(read_entries(path, environments, common.get("algorithm", POGO)))
    if not entries:
        raise UserError(f"{path}: environments names no datasets; see docs/comparison.md")
    used = [SYSTEMS[name] for name in SYSTEMS if name in {algorithm for *_, algorithm in entries}]
    hints = {name: hint for system in used for name, hint in system.own_hints.items()}
    shared = read(f"{path}: common", common, hints | ALGORITHM | {"seeds": tuple[int, ...]})
    hints = {name: hint for system in used for name, hint in system.sinkhorn_hints.items()}
    shared |= read(f"{path}: sinkhorn", sinkhorn, hints, SINKHORN)
    seeds = config.seeds or shared.get("seeds", (0,))
    if len(set(seeds)) != len(seeds):
        source = "--seeds" if config.seeds else f"{path}: common.seeds:"
        raise UserError(f"{source} {' '.join(map(str, seeds))}: holds a seed twice; give each once")
    runs: dict[Path, Run] = {}
    variants: collections.Counter[tuple[str, str]] = collections.Counter()  # a dataset's lists of weights so far
    for where, dataset_id, entry, algorithm in entries:
        settings, lists = read_entry(where, dataset_id, entry, algorithm, shared)
        for weights in lists:
            place = (settings["env"], algorithm)
            for seed in seeds:
                own = settings | {"w2_weights": weights, "seed": seed}
                run = make_run(where, config, own, variants[place], algorithm)
                if run.run_dir in runs:
                    raise UserError(f"{where}: {run.run_dir} belongs to an earlier entry; leave one out")
                runs[run.run_dir] = run
            variants[place] += 1
    return only_named(config.only, list(runs.values()))


def make_run(where: str, config: RunComparisonConfig, settings: dict, variant: int, algorithm: str) -> Run:
    """One run, its settings checked as its command checks them; UserError in one line."""
    overrides = {name: getattr(config, name) for name in ("dataset_dir", "max_timesteps")}
    settings = {"eval_workers": config.eval_workers} | settings
    settings |= {name: value for name, value in overrides.items() if value is not None}
    for name in ("dataset_dir", "checkpoint_dir", "load_model"):
        if settings.get(name):
            settings[name] = str(Path(settings[name]).expanduser().resolve())  # a Ray task runs in another folder
    if settings.get("save_model") is False:
        raise UserError(f"{where}: save_model: a run without checkpoints cannot be continued; leave it out")
    system = SYSTEMS[algorithm]
    try:
        trainer = system.config_class(**settings, resume=True)
        run_dir = config.apart(config.log_dir).resolve() / system.run_class.run_name(trainer)
        trainer.run_dir = str(run_dir)
        check_ranges(trainer)
        system.run_class.check(trainer)
        if not is_minari(trainer.env):  # whose ids only Minari knows
            normalized_score(trainer.env, 0.0)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Run(trainer.env, trainer.w2_weights, variant, trainer.seed, run_dir, algorithm=algorithm, config=trainer)


# ----------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------


class Comparison(Queue):
    """The runs of a comparison's file."""

    noun, scale = "update", True

    def __init__(self, config: RunComparisonConfig):
        super().__init__(config, "comparison")
        self.runs = expand(config)
        for run in self.runs:
            run.finished = self.is_finished(run)
        self.left = [run for run in self.runs if not run.finished]
        self.names_devices = any(":" in run.config.device for run in self.runs)
        self.output, self.looked, self.updates = config.apart(config.output), 0.0, 0
        self.charts: dict[tuple, str] = {}  # of the report

    def run_dir(self, run: Run) -> Path:
        return run.run_dir

    def is_finished(self, run: Run) -> bool:
        """Whether a run of these very settings is finished. Raises UserError where its directory holds another run."""
        run_class = run.system.run_class
        may_change = run_class.may_change(run.config) - {"dataset_dir"}  # a result is one of its data
        try:
            check_run(run.run_dir, run.config, may_change, run_class.checkpoint_path(run.config))
            return False
        except RunFinished:
            return True
        except UserError as error:
            raise UserError(error.where, error.fault, "choose another --log_dir, or give the old settings") from None

    def datasets(self, run: Run) -> tuple[list[str], str | None]:
        return [run.config.env], run.config.dataset_dir

    def job(self, run: Run) -> Job:
        """Every setting is a flag, so that no file left by an earlier start decides one."""
        flags = [word for name, value in plain_config(run.config).items() for word in as_flags(name, value)]
        module = (pogo_main if run.algorithm == POGO else pogo_multi_main).__name__
        return make_job(run.run_dir, module, flags, self.config.run_threads)

    def settle(self) -> None:
        """Say what there is, and try what would else fail after hours of training."""
        if self.config.report_only and not any(run.run_dir.exists() for run in self.runs):
            raise UserError(
                f"--log_dir {self.config.log_dir}: none of the runs asked for is there; give the folder that has some"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.output).close()
        print(f"{len(self.runs)} runs, {len(self.runs) - len(self.left)} finished; {self.runs[0].name} is the first")

    def train(self) -> None:
        importlib.import_module("matplotlib.backends.backend_agg")  # whole: Ctrl-C in its import spoils the last report
        try:
            super().train()
        except KeyboardInterrupt:
            self.write()
            raise

    def done(self, run: Run) -> None:
        run.finished = True
        try:
            self.write()
        except (UserError, OSError) as error:  # no reason to stop what trains; told again at the end
            warn(f"the results were not written: {error}")

    def amount(self, pool: Pool | None = None) -> tuple[int, int]:
        """Updates of all runs, and how many are done; the directories are looked at every two seconds."""
        if time.monotonic() - self.looked > 2 or not self.left:
            self.looked, self.updates = time.monotonic(), sum(map(self.updates_of, self.runs))
        return sum(run.config.max_timesteps for run in self.runs), self.updates

    def updates_of(self, run: Run) -> int:
        most = run.config.max_timesteps
        return most if run.finished else min(updates_done(run.run_dir), most)

    def write(self) -> str:
        """Write the results of what is finished; returns a summary of them for the terminal."""
        for run in self.runs:
            # Settings were compared at the start, so that what another process has finished since is a run of these.
            run.finished = run.finished or (run.run_dir / "finished.json").exists()
            run.note = "" if run.finished else self.failed.get(run) or describe_state(run.run_dir, False)
            run.seconds = seconds_spent(run.run_dir) if run.finished else None
        return write_report(self.runs, self.output, Path(self.config.config).name, self.charts)

    def report(self) -> str:
        written = f"report.html, results.md and results.csv in {self.output.resolve()}"
        return f"\n{self.write()}\n\nAll tables, curves and scores: {written}"

    def describe(self) -> None:
        """`--dry_run`: say what would run, and what it will take. Raises UserError where the disk is too small."""
        for run in self.runs:
            print(f"{run.name}: {describe_state(run.run_dir, run.finished)}")
        cut = sum(updates_done(run.run_dir) > 0 for run in self.left)
        counts = f"{len(self.runs) - len(self.left)} finished, {cut} cut, {len(self.left) - cut} not started"
        print(f"{len(self.runs)} runs: {counts}")
        if not self.left:
            return
        self.describe_data(self.left)
        guess, seconds, size = estimate.Estimate([run for run in self.runs if run.finished]), 0.0, 0
        for run in self.left:
            whole, taken = guess.of(run)
            seconds += whole * (1 - self.updates_of(run) / run.config.max_timesteps)
            size += taken
        folder = self.config.apart(self.config.log_dir).resolve()
        while not folder.exists():
            folder = folder.parent
        free, at_once = shutil.disk_usage(folder).free, self.config.jobs or 1
        needed, there = map(estimate.in_bytes, (size, free))
        print(f"Disk: {needed} for the runs that are left; {there} are free in {folder}")
        time_left = f"{estimate.in_time(seconds / at_once)}, with {at_once} at once"
        print(f"Time: about {time_left}. {guess.source(len(self.left))}")
        if size > free:
            raise UserError(f"--log_dir {self.config.log_dir}: {needed} are needed and {there} are free")


def check(config: RunComparisonConfig) -> None:
    """One line for a flag that cannot work."""
    check_gpus(config.gpus_per_run)
    if config.address and config.backend != "ray":
        raise UserError(f"--address {config.address}: is of a Ray cluster; add --backend ray")
    if config.backend == "ray" and not config.address:
        raise UserError("--backend ray: needs --address host:port of the cluster, or auto for this machine's")


def main(argv: list[str] | None = None) -> None:
    """Run the comparison; exits 1 where runs failed."""
    config = parse_config(RunComparisonConfig, argv, __doc__, config_flag="--settings")
    check(config)
    config.config = config.config or str(ROOT / "config.yaml")
    if config.tables:
        return tables.rewrite_pages(ROOT)
    queue = TableQueue(config) if is_table(load_yaml(Path(config.config))) else Comparison(config)
    if config.dry_run:
        return queue.describe()
    queue.settle()
    if not config.report_only:
        queue.train()
    print(queue.report())
    if queue.failed:
        print(f"{len(queue.failed)} runs failed; the same command tries them again", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
