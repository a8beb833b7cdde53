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

import dataclasses
import functools
import importlib
import os
import sys
import tempfile
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from algorithms.offline import pogo_multi_main
from comparison import tables
from comparison.jobs import describe_state
from comparison.queue import Queue
from comparison.ray import check_gpus
from comparison.registry import RESERVED, Run, Table, as_flags, check_flags, check_keys, read_table, settings_of
from comparison.report import write_report
from comparison.rows import Row, Scores, check_settings
from offline_data import is_minari, normalized_score
from pogo_main import POGORun
from runs.cli import check_values, load_yaml, parse_config, run_cli
from runs.metrics import read_metrics
from utils import Count, Range, UserError, Whole, counted, warn

ROOT = Path(__file__).resolve().parent
SHIPPED = ROOT / "configs" / "offline" / "pogo_multi"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class RunComparisonConfig:
    config: str | None = None  # YAML file of the comparison, see docs/comparison.md; default: the shipped config.yaml
    log_dir: str = "logs"  # keep every run in a directory of its own in this folder
    output: str = "results"  # write results.csv, results.md and report.html to this folder
    only: str | None = None  # take only the runs whose name, as --dry_run shows it, holds this text as whole words
    dry_run: bool = False  # list the runs, say what data is missing and about how long they take, and stop
    report_only: bool = False  # train nothing, only write the results of the runs that are finished
    tables: bool = False  # train nothing, only rewrite the tables of README.md and docs/ from results/*.csv
    jobs: Count | None = None  # train this many runs at once; default: 1, on Ray as many as the cluster has room for
    threads: Count | None = None  # CPU threads of a run; default: OMP_NUM_THREADS, or its share of the cores; Ray: 1
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
        return self.threads or (1 if self.backend == "ray" else max(usable_cores() // (self.jobs or 1), 1))

    @property
    def run_threads(self) -> int:
        """CPU threads of a run. Networks of this size gain nothing from more than four unless that is asked for."""
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        return self.threads or (int(wanted) if wanted.isdecimal() and int(wanted) else min(self.run_cores, 4))

    @property
    def eval_workers(self) -> int:
        """Processes that step the environments of a run's evaluations beside its own."""
        return min(self.run_cores - 1, 7)


# -- config.yaml -> runs ----------------------------------------------------------------------------------------------

SECTIONS = ("common", "sinkhorn", "environments")
SINKHORN = {"K": "sinkhorn_K", "blur": "sinkhorn_blur", "backend": "sinkhorn_backend", "blur_relative": "blur_relative"}
WEIGHTS = {
    "w2_weights": tuple[float, ...],
    "w2_weights_base": tuple[float, float],
    "w2_weights_third": tuple[float, ...],
}
DECIDED_HERE = RESERVED | {"w2_weights", "env", "algorithm", "num_actors", "name", "evaluate_episodes"}
POGO = "pogo"
COMMANDS = {POGO: ("pogo_main", POGORun)} | dict.fromkeys(
    pogo_multi_main.ALGORITHMS, ("algorithms.offline.pogo_multi_main", pogo_multi_main.MultiRun)
)
# Milliseconds of an update with one actor on one core, and of each further actor, by samples: docs/performance.md.
UPDATE_MS = {POGO: 3.8, "td3_bc": 3.2, "iql": 4.7, "awac": 8.2, "cql": 79.0, "sac_n": 29.0, "edac": 43.0}
FURTHER_ACTOR_MS, SAMPLE_MS = 1.4, 0.8
Settings = dict[str, Any]


@functools.cache
def settings_hints(algorithm: str) -> Settings:
    """What a file may set for an algorithm's command, and of which type."""
    found = settings_of(COMMANDS[algorithm][0], [] if algorithm == POGO else ["--algorithm", algorithm])
    hints = typing.get_type_hints(type(found))
    return {name: hints[name] for name in vars(found) if name not in DECIDED_HERE}


def read(where: str, values: Any, hints: Settings) -> Settings:
    """Settings of a section by field, typed as in a run's own YAML file. Raises UserError that names file and key."""
    hints = {name: hint for name, hint in hints.items() if name not in SINKHORN.values()}
    aliases = {"learning_rate": "lr"} if "lr" in hints else {}
    return check_values(where, values, hints, aliases, {"actor_configs": pogo_multi_main.read_actor_configs})


def read_sinkhorn(where: str, values: Any, hints: Settings) -> Settings:
    """As `read`, of a section that has names of its own."""
    return check_values(where, values, {name: hints[name] for name in SINKHORN.values()}, SINKHORN)


def read_entries(path: Path, environments: Any, usual: str) -> Iterator[tuple[str, str, Settings, str]]:
    """Of each entry: its place in the file, dataset id, itself without `algorithm`, and that. Raises UserError."""
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
                rest = dict(entry)
                algorithm = rest.pop("algorithm", usual)
                if algorithm not in [*COMMANDS]:
                    raise UserError(f"{place}: algorithm must be one of {', '.join(COMMANDS)}, not {algorithm!r}")
                yield place, f"{environment}-{dataset}-v2", rest, algorithm


def read_entry(where: str, entry: Settings, algorithm: str, shared: Settings) -> tuple[Settings, list[tuple]]:
    """Settings of an entry's runs but seed, and its lists of weights. The lowest layer is what CORL sets for the data.

    `shared` holds the settings of `common` and `sinkhorn`, of which it takes those that its algorithm has.
    """
    hints, sinkhorn = settings_hints(algorithm), entry.pop("sinkhorn", {})
    settings = shipped_settings(algorithm, entry["env"])
    settings |= {name: value for name, value in shared.items() if name in hints}
    settings |= read_sinkhorn(f"{where}.sinkhorn", sinkhorn, hints)
    settings |= read(where, entry, hints | WEIGHTS | {"env": str})
    weights = {name: settings.pop(name) for name in WEIGHTS if name in settings}
    if weights.keys() == {"w2_weights"}:
        return settings, [weights["w2_weights"]]
    if weights.keys() == {"w2_weights_base", "w2_weights_third"}:
        return settings, [(*weights["w2_weights_base"], third) for third in weights["w2_weights_third"]]
    found = " and ".join(weights) or "none"
    raise UserError(f"{where} needs w2_weights, or both w2_weights_base and w2_weights_third; it has {found}")


def shipped_settings(algorithm: str, dataset_id: Any) -> Settings:
    """What CORL sets differently for an algorithm on a dataset, by the file that the repository ships for the two."""
    robot, _, level = str(dataset_id).removeprefix("local/").removesuffix("-v2").partition("-")
    path = SHIPPED / robot / f"{level.replace('-', '_')}_v2_{algorithm}.yaml"
    if path not in SHIPPED.glob("*/*.yaml"):
        return {}
    usual = {field.name: field.default for field in dataclasses.fields(pogo_multi_main.ALGORITHMS[algorithm][1])}
    shared = ("algorithm", "env", "max_timesteps", "w2_weights")
    return {k: value for k, value in load_yaml(path).items() if k not in shared and value != usual[k]}


def expand(config: RunComparisonConfig) -> Table:
    """The runs that a comparison's file and flags ask for, in the file's order. Raises UserError in one line."""
    path = Path(config.config)
    sections = check_values(path, load_yaml(path), dict.fromkeys(SECTIONS, dict | None))
    common, sinkhorn, environments = (sections.get(name) or {} for name in SECTIONS)
    entries = list(read_entries(path, environments, common.pop("algorithm", POGO)))
    if not entries:
        raise UserError(f"{path}: environments names no datasets; see docs/comparison.md")
    hints = {name: hint for *_, algorithm in entries for name, hint in settings_hints(algorithm).items()}
    shared = read(f"{path}: common", common, hints | {"seeds": tuple[int, ...], "dataset_dir": str | None})
    shared |= read_sinkhorn(f"{path}: sinkhorn", sinkhorn, hints)
    config.dataset_dir = config.dataset_dir or shared.get("dataset_dir")
    seeds = config.seeds or shared.get("seeds", (0,))
    runs: dict[Path, Run] = {}
    for where, dataset_id, entry, algorithm in entries:
        settings, lists = read_entry(where, {"env": dataset_id} | entry, algorithm, shared)
        if not (seeds and lists):
            raise UserError(where, "an empty list of seeds or weights leaves no run", "give one, or leave the list out")
        for weights in lists:
            for run in make_runs(where, config, settings | {"w2_weights": weights}, algorithm, seeds):
                if run.folder in runs:
                    fault = f"{run.folder} is asked for twice, as weights and seed alone tell runs apart"
                    raise UserError(where, fault, "for other settings write a file with `runs:`, see docs/results.md")
                runs[run.folder] = run
    actors = max(len(run.method.split()) - 1 for run in runs.values())
    layout = {"header": ["dataset", "chain"], "columns": [f"actor {actor}" for actor in range(actors)]}
    layout |= {"where": {"mode": "deterministic"}, "data_column": True}
    return Table(path.stem, path, f"Scores of {path.name}.", list(runs.values()), layout)


def make_runs(where: str, config: RunComparisonConfig, settings: Settings, algorithm: str, seeds: Any) -> Iterator[Run]:
    """A run for each seed, its settings checked as its command checks them; UserError in one line."""
    if config.max_timesteps is not None:
        settings = settings | {"max_timesteps": config.max_timesteps}
    for name in ("checkpoint_dir", "load_model"):
        if settings.get(name):
            settings[name] = str(Path(settings[name]).expanduser().resolve())  # a Ray task runs in another folder
    command, run_class = COMMANDS[algorithm]
    try:
        settings = settings | ({} if algorithm == POGO else {"algorithm": algorithm})
        flags = tuple(word for name in sorted(settings) for word in as_flags(name, settings[name]))
        for seed in seeds:
            trainer = settings_of(command, [*flags, "--seed", str(seed)])
            run_class.check(dataclasses.replace(trainer, resume=True))  # as it will be run
            if not is_minari(trainer.env):  # whose ids only Minari knows
                normalized_score(trainer.env, 0.0)
            label = " ".join([algorithm, *(f"{weight:g}" for weight in trainer.w2_weights)])
            shown = {"row": (trainer.env, label), "column": "actor {actor}"}
            folder = config.apart(config.log_dir).resolve() / run_class.run_name(trainer)
            further = (len(trainer.w2_weights) - 1) * (FURTHER_ACTOR_MS + SAMPLE_MS * trainer.sinkhorn_K)
            first = UPDATE_MS.get(algorithm)  # None: not measured, nothing is guessed
            hours = first and (first + further) * trainer.max_timesteps / 3.6e6
            yield Run("", label, command, flags, trainer.env, seed, hours=hours, folder=folder, **shown)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# -- Running ----------------------------------------------------------------------------------------------------------


class Comparison(Queue):
    """The runs of a comparison's file. Their rows are read from their directories, and reported after each of them."""

    machine: ClassVar[Settings] = {}

    def __init__(self, config: RunComparisonConfig):
        super().__init__(config, expand(config))
        self.table.runs = self.runs  # the report is of those that --only takes
        self.rows: dict[Run, list[Row]] = {}
        self.output = config.apart(config.output)
        for run in self.runs:
            if (run.folder / "checkpoints" / "last.pth").exists():  # one line now, in place of a failed run later
                check_settings(run, config.log_dir, config.dataset_dir)

    def known(self) -> tuple[Scores, Scores]:
        return Scores(self.rows.values()), Scores([])

    def add(self, run: Run, rows: list[Row]) -> None:
        check_settings(run, self.config.log_dir, self.config.dataset_dir)  # another process may have trained it
        read_metrics(run.folder / "training")  # the report needs them: a run without is none
        self.rows[run] = rows

    def settle(self) -> None:
        """As every queue; first try what would else fail after hours of training."""
        if self.config.report_only and not any(run.folder.exists() for run in self.runs):
            raise UserError(
                f"--log_dir {self.config.log_dir}: none of the runs asked for is there; give the folder that has some"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.output).close()
        super().settle()
        print(f"{counted(len(self.runs), 'run')}, {len(self.rows)} finished; {self.runs[0].name} is the first")

    def train(self) -> None:
        importlib.import_module("matplotlib.backends.backend_agg")  # whole: Ctrl-C in its import spoils the last report
        try:
            super().train()
        except KeyboardInterrupt:
            self.write()
            raise

    def done(self, run: Run) -> None:
        super().done(run)
        try:
            self.write()
        except (UserError, OSError) as error:  # no reason to stop what trains; told again at the end
            warn(f"the results were not written: {error}")

    def write(self) -> str:
        """Write the results of what is finished; returns a summary of them for the terminal."""
        for run in self.runs:
            if run not in self.rows and run not in self.failed:
                self.append(run)  # it may have finished since it was looked at, and in another process
        states = {run: self.failed.get(run) or describe_state(run.folder, False) for run in self.runs}
        rows = [row for run in self.runs for row in self.rows.get(run, [])]
        return write_report(self.table, rows, states, self.output)

    def report(self) -> str:
        written = f"report.html, results.md and results.csv in {self.output.resolve()}"
        return f"\n{self.write()}\n\nAll tables, curves and scores: {written}"


def check(config: RunComparisonConfig) -> None:
    check_gpus(config.gpus_per_run)
    for name, value in (("address", config.address), ("gpus_per_run", config.gpus_per_run)):
        if value is not None and config.backend != "ray":
            raise UserError(f"--{name} {value}: is of a Ray cluster; add --backend ray")
    if config.backend == "ray" and not config.address:
        raise UserError("--backend ray: needs --address host:port of the cluster, or auto for this machine's")


def table_queue(config: RunComparisonConfig) -> Queue:
    """The runs of a file that names commands. Raises UserError."""
    for name, usual in (("max_timesteps", None), ("output", "results")):
        if getattr(config, name) != usual:
            raise UserError(f"--{name} {getattr(config, name)}: does nothing for {config.config}; leave it out")
    table = read_table(config.config)
    check_flags(table)
    runs = [run for run in table.runs if config.seeds is None or run.seed in config.seeds]
    if not runs:
        known = sorted({run.seed for run in table.runs})
        raise UserError(f"--seeds {' '.join(map(str, config.seeds))}: {table.path} has {' '.join(map(str, known))}")
    return Queue(config, table, runs)


def main(argv: list[str] | None = None) -> None:
    """Run the comparison; exits 1 where runs failed."""
    config = parse_config(RunComparisonConfig, argv, __doc__, config_flag="--settings")
    check(config)
    config.config = config.config or str(ROOT / "config.yaml")
    if config.tables:
        return tables.rewrite_pages(ROOT)
    queue = table_queue(config) if "runs" in load_yaml(Path(config.config)) else Comparison(config)
    if config.dry_run:
        return queue.describe()
    queue.settle()
    if not config.report_only:
        queue.train()
    print(queue.report())
    if queue.failed:
        print(f"{counted(len(queue.failed), 'run')} failed; the same command tries them again", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
