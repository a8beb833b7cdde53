"""Train and compare chains of actors over datasets, weights and seeds: config.yaml says which.

Every run is a process of its own in logs/{env}/w2_{weights}/seed_{seed}: a pogo_main.py, or, where the file names an
algorithm, a pogo_multi_main. The command can be cut and repeated: finished runs are kept, runs that were cut go on from
their last checkpoint, failed ones are tried again. It writes results/results.csv, results/results.md and
results/report.html after every finished run.

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
import io
import os
import re
import shutil
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import torch

import pogo_main
from algorithms.offline import make_configs, pogo_multi_main
from comparison import queue, tables
from comparison.queue import RUN_MODULE
from comparison.registry import as_flags, check_keys, is_table, load_file, read_table
from comparison_jobs import Job, LocalPool, Outcome, RayPool, is_held, read_attempts, seconds_spent
from comparison_report import POGO, ComparedRun, write_report
from offline_data import is_minari, make_env, normalized_score
from pogo_agent import POGOAgent
from pogo_main import POGORun, POGOTrainerConfig
from runs.chain import ChainRun, ChainRunConfig
from runs.cli import parse_config, run_cli
from runs.directory import check_run, plain_config
from utils import RunFinished, UserError, one_line, progress, resolve_device, warn

SCRIPT = Path(pogo_main.__file__).resolve()
POLL_SECONDS = 0.5


@dataclass
class RunComparisonConfig:
    config: str = "config.yaml"  # read the comparison from this YAML file, which docs/comparison.md explains
    log_dir: str = "logs"  # keep every run in a directory of its own in this folder
    output: str = "results"  # write results.csv, results.md and report.html to this folder
    only: str | None = None  # take only the runs whose name, as --dry_run shows it, holds this text
    dry_run: bool = False  # list the runs, say what time and disk space those that are left will take, and stop
    report_only: bool = False  # train nothing, only write the results of the runs that are finished
    tables: bool = False  # train nothing, only rewrite the tables of README.md and docs/ from results/*.csv
    jobs: int | None = None  # train this many runs at once; default: 1, on Ray as many as the cluster has room for
    threads: int | None = None  # give a run this many CPU threads; default: its share of the cores, at most 4; on Ray 1
    retries: int = 2  # start a crashed run again up to this many times, but never one that diverged or has bad settings
    backend: Literal["local", "ray"] = "local"  # train on this machine (local) or on the Ray cluster at --address (ray)
    address: str | None = None  # connect to this Ray cluster: host:port, ray://host:port, or auto for this machine's
    gpus_per_run: float | None = None  # give each run on Ray this share of a GPU; default: 0.25 if there are GPUs
    dataset_dir: str | None = None  # read the data from this folder, whatever the comparison's file says
    max_timesteps: int | None = None  # train every run for this many updates, whatever the comparison's file says
    seeds: tuple[int, ...] | None = None  # train every chain with these seeds, whatever the comparison's file says


# ----------------------------------------------------------------------------------------------------------------
# config.yaml -> runs
# ----------------------------------------------------------------------------------------------------------------

SINKHORN = {
    "K": "sinkhorn_K",
    "blur": "sinkhorn_blur",
    "backend": "sinkhorn_backend",
    "blur_relative": "blur_relative",
}
DECIDED_HERE = {"seed", "num_seeds", "w2_weights", "lr", "env", "run_dir", "resume", "algorithm", "num_actors", "name"}
DECIDED_HERE |= set(SINKHORN.values())
NO_TRAINING = {"evaluate", "evaluate_episodes", "evaluate_seed"}


@dataclass(frozen=True)
class System:
    """What an entry's `algorithm` names."""

    config_class: type[ChainRunConfig]
    run_class: type[ChainRun]
    check: Callable[[Any], None]  # of settings
    make_agent: Callable[..., Any]  # of settings, sizes of observation, action and largest action, generator, device

    @property
    def fields(self) -> set[str]:
        """Its settings."""
        return {field.name for field in dataclasses.fields(self.config_class)}

    @property
    def keys(self) -> dict[str, str]:
        """What `common` or an entry may set -> the setting."""
        own = {name: name for name in sorted(self.fields - DECIDED_HERE - NO_TRAINING)}
        return own | ({"learning_rate": "lr"} if "lr" in self.fields else {})

    @property
    def sinkhorn(self) -> dict[str, str]:
        """What the section `sinkhorn` may set -> the setting."""
        return {key: name for key, name in SINKHORN.items() if name in self.fields}


def make_pogo(
    config: POGOTrainerConfig, sizes: tuple[int, int, float], generator: torch.Generator, device: torch.device
) -> POGOAgent:
    return POGOAgent(config, *sizes, generator, device)


SYSTEMS = {POGO: System(POGOTrainerConfig, POGORun, pogo_main.check, make_pogo)} | {
    name: System(config_class, pogo_multi_main.MultiRun, pogo_multi_main.check, pogo_multi_main.build)
    for name, (_, config_class) in pogo_multi_main.ALGORITHMS.items()
}


@dataclass(frozen=True)
class Run:
    """One run of the comparison."""

    config: Any  # all of its settings, run_dir included
    variant: int  # which of its dataset's weights: 0, 1, ...
    algorithm: str = POGO  # of SYSTEMS

    @property
    def system(self) -> System:
        return SYSTEMS[self.algorithm]

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def name(self) -> str:
        weights = " ".join(f"{weight:g}" for weight in self.config.w2_weights)
        algorithm = "" if self.algorithm == POGO else f" {self.algorithm}"
        return f"{self.config.env}{algorithm} w2 {weights} seed {self.config.seed}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's sections. Raises UserError for a file that cannot be read, is no YAML or has other sections."""
    sections, known = load_file(path), ("common", "sinkhorn", "environments")
    check_keys(path, "", sections, known)
    if not sections.get("environments"):
        raise UserError(f"{path}: environments is missing or empty; it names the datasets, see docs/comparison.md")
    return {name: sections.get(name) or {} for name in known}


def read_settings(
    path: Path, where: str, values: Any, fields: dict[str, str], config_class: type[ChainRunConfig]
) -> dict[str, Any]:
    """Settings by field, typed as on the command line of `config_class`; `fields` maps keys to fields.

    Raises UserError that names the file and the key.
    """
    check_keys(path, where, values, fields)
    switches = {name for name, hint in typing.get_type_hints(config_class).items() if hint is bool}
    for key, value in values.items():
        if isinstance(value, bool) != (fields[key] in switches):
            words = "must be true or false" if fields[key] in switches else "must not be true or false"
            raise UserError(f"{path}: {where}.{key}: {words}, not {value!r}")
    values = dict(values)
    if values.get("actor_configs") is not None:
        try:
            values["actor_configs"] = pogo_multi_main.read_actor_configs(values["actor_configs"])
        except ValueError:
            raise UserError(f"{path}: {where}.actor_configs: must be a list of names, as in [own, gaussian]") from None
    arguments = [word for key, value in values.items() for word in as_flags(fields[key], value)]
    try:
        config = parse_config(config_class, arguments)
    except UserError as error:
        flag, _, fault = str(error).partition(" ")
        keys = {f"--{field}": key for key, field in fields.items()}
        key = keys.get(flag, flag)
        words = re.search(r"(must be|needs|takes) .*", fault)
        raise UserError(f"{path}: {where}.{key}: {words.group() if words else error}") from None
    return {fields[key]: getattr(config, fields[key]) for key in values}


def _numbers(path: Path, where: str, values: Any, kind: type = float) -> tuple:
    """A list of numbers, 3e-4 among them; UserError names the key."""
    try:
        if not isinstance(values, list) or not values or any(isinstance(value, bool | list | dict) for value in values):
            raise ValueError
        numbers = tuple(kind(value) for value in values)
        if kind is int and list(numbers) != values:
            raise ValueError
    except (TypeError, ValueError):
        words = "integers, as in [0, 1, 2]" if kind is int else "numbers, as in [0.4, 1.0]"
        raise UserError(f"{path}: {where} must be a list of {words}, not {values!r}") from None
    return numbers


def weight_lists(path: Path, where: str, entry: dict[str, Any]) -> list[tuple[float, ...]]:
    """The w2_weights of an entry: one list as it stands, or one for each third weight after the two of the base."""
    names = ("w2_weights", "w2_weights_base", "w2_weights_third")
    given = {name: _numbers(path, f"{where}.{name}", entry[name]) for name in names if name in entry}
    if given.keys() not in ({"w2_weights"}, {"w2_weights_base", "w2_weights_third"}):
        raise UserError(
            f"{path}: {where} needs w2_weights, or both w2_weights_base and w2_weights_third; "
            f"it has {' and '.join(given) or 'none'}"
        )
    if "w2_weights" in given:
        return [given["w2_weights"]]
    base = given["w2_weights_base"]
    if len(base) != 2:
        raise UserError(f"{path}: {where}.w2_weights_base: two weights, of actors 0 and 1, are needed, not {len(base)}")
    return [(*base, third) for third in given["w2_weights_third"]]


def expand(config: RunComparisonConfig) -> list[Run]:
    """The runs that a comparison's file and flags ask for, in the file's order. Raises UserError in one line."""
    path = Path(config.config)
    sections = read_yaml(path)
    check_keys(path, "environments", sections["environments"], sections["environments"])
    common = dict(sections["common"]) if isinstance(sections["common"], dict) else sections["common"]
    seeds, usual = [0], POGO
    if isinstance(common, dict):
        seeds, usual = common.pop("seeds", seeds), system_of(path, "common", common.pop("algorithm", usual))
    seeds = config.seeds or _numbers(path, "common.seeds", seeds, int)
    if len(set(seeds)) != len(seeds):
        source = "--seeds" if config.seeds else f"{path}: common.seeds:"
        raise UserError(f"{source} {' '.join(map(str, seeds))}: holds a seed twice; give each once")
    entries = list(entries_of(path, sections["environments"], usual))
    shared = shared_settings(path, common, sections["sinkhorn"], {algorithm for *_, algorithm in entries})
    runs: dict[Path, Run] = {}
    variants: collections.Counter[tuple[str, str]] = collections.Counter()  # a dataset's lists of weights so far
    for where, dataset_id, entry, algorithm in entries:
        lists = weight_lists(path, where, entry)
        settings = entry_settings(path, where, dataset_id, entry, algorithm, shared[algorithm], config)
        place = (settings["env"], algorithm)
        first = variants[place]
        for run in runs_of(path, where, settings, lists, seeds, algorithm, config.log_dir, first):
            if run.run_dir in runs:
                raise UserError(f"{path}: {where}: {run.run_dir} belongs to an earlier entry; leave one out")
            runs[run.run_dir] = run
        variants[place] += len(lists)
    chosen = [run for run in runs.values() if config.only is None or config.only in run.name]
    if not chosen:
        raise UserError(
            f"--only {config.only!r}: no run has that in its name; one is {next(iter(runs.values())).name!r}"
        )
    return chosen


def system_of(path: Path, where: str, algorithm: Any) -> str:
    """A known algorithm; UserError names the key."""
    if not isinstance(algorithm, str) or algorithm not in SYSTEMS:
        raise UserError(f"{path}: {where}.algorithm: must be one of {', '.join(SYSTEMS)}, not {algorithm!r}")
    return algorithm


def entries_of(path: Path, environments: dict, usual: str) -> Iterator[tuple[str, str, dict, str]]:
    """Of each entry: its place in the file, dataset id, itself without `algorithm`, and that. Raises UserError."""
    for environment, datasets in environments.items():
        check_keys(path, f"environments.{environment}", datasets, datasets)
        if not datasets:
            raise UserError(f"{path}: environments.{environment} is empty; it names datasets, see docs/comparison.md")
        for dataset, found in datasets.items():
            place = f"environments.{environment}.{dataset}"
            several = isinstance(found, list)
            if found == []:
                raise UserError(f"{path}: {place} is an empty list; give an entry, or leave it out")
            for number, entry in enumerate(found if several else [found]):
                where = f"{place}[{number}]" if several else place
                check_keys(path, where, entry, entry)
                entry = dict(entry)
                algorithm = system_of(path, where, entry.pop("algorithm", usual))
                yield where, f"{environment}-{dataset}-v2", entry, algorithm


def shared_settings(path: Path, common: Any, sinkhorn: Any, used: set[str]) -> dict[str, dict[str, Any]]:
    """What `common` and `sinkhorn` set, for each algorithm in use, as far as it has such settings."""
    systems = {name: SYSTEMS[name] for name in SYSTEMS if name in used}
    for where, values, keys in (
        ("common", common, [system.keys for system in systems.values()]),
        ("sinkhorn", sinkhorn, [system.sinkhorn for system in systems.values()]),
    ):
        check_keys(path, where, values, {key: key for known in keys for key in known})
    found = {}
    for name, system in systems.items():
        own = {key: value for key, value in common.items() if key in system.keys}
        found[name] = read_settings(path, "common", own, system.keys, system.config_class)
        own = {key: value for key, value in sinkhorn.items() if key in system.sinkhorn}
        found[name] |= read_settings(path, "sinkhorn", own, system.sinkhorn, system.config_class)
    return found


def entry_settings(
    path: Path,
    where: str,
    dataset_id: str,
    entry: dict[str, Any],
    algorithm: str,
    shared: dict[str, Any],
    config: RunComparisonConfig,
) -> dict[str, Any]:
    """All settings of an entry's runs but weights and seed."""
    system = SYSTEMS[algorithm]
    weights_keys = {"w2_weights": "", "w2_weights_base": "", "w2_weights_third": ""}
    check_keys(path, where, entry, system.keys | weights_keys | {"env": "env", "sinkhorn": "", "algorithm": ""})
    values = {key: value for key, value in entry.items() if key not in {*weights_keys, "sinkhorn"}}
    own = (system.keys | {"env": "env"}, system.config_class)
    settings = shipped_settings(algorithm, entry.get("env", dataset_id)) | shared
    settings |= read_settings(path, where, values, *own)
    own = (system.sinkhorn, system.config_class)
    settings |= read_settings(path, f"{where}.sinkhorn", entry.get("sinkhorn", {}), *own)
    settings.setdefault("env", dataset_id)
    overrides = {name: getattr(config, name) for name in ("dataset_dir", "max_timesteps")}
    settings |= {name: value for name, value in overrides.items() if value is not None}
    if "eval_workers" not in settings:
        settings["eval_workers"] = min(cores_of(config) - 1, 7)
    for name in ("dataset_dir", "checkpoint_dir", "load_model"):
        if settings.get(name):
            settings[name] = str(Path(settings[name]).expanduser().resolve())  # a Ray task runs in another folder
    return settings


def shipped_settings(algorithm: str, dataset_id: Any) -> dict[str, Any]:
    """What CORL sets differently for an algorithm on a dataset, by the file that the repository ships for the two."""
    robot, _, level = str(dataset_id).removeprefix("local/").removesuffix("-v2").partition("-")
    if algorithm == POGO or (robot, level) not in make_configs.DATASETS:
        return {}
    values = make_configs.DIFFERENCES[algorithm](robot, level)
    return {name: value for name, value in values.items() if name != "max_timesteps"}


def runs_of(
    path: Path,
    where: str,
    settings: dict[str, Any],
    lists: list[tuple[float, ...]],
    seeds: tuple[int, ...],
    algorithm: str,
    log_dir: str,
    first: int,
) -> Iterator[Run]:
    """A run for each list of weights and seed, settings checked as its command checks them; UserError in one line."""
    system = SYSTEMS[algorithm]
    if settings.get("save_model") is False:
        raise UserError(f"{path}: {where}: save_model: a run without checkpoints cannot be continued; leave it out")
    for variant, weights in enumerate(lists, first):
        for seed in seeds:
            try:
                trainer = system.config_class(**settings, w2_weights=weights, seed=seed, resume=True)
                trainer.run_dir = str(Path(log_dir).resolve() / system.run_class.run_name(trainer))
                system.check(trainer)
                if not is_minari(trainer.env):  # whose ids only Minari knows
                    normalized_score(trainer.env, 0.0)
            except UserError as error:
                raise UserError(f"{path}: {where}: {error}") from None
            yield Run(trainer, variant, algorithm)


def to_job(run: Run, threads: int) -> Job:
    """The run's process: every setting is a flag, so that no file left by an earlier start decides one."""
    flags = [word for name, value in plain_config(run.config).items() for word in as_flags(name, value)]
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    if run.algorithm == POGO:
        return Job(str(run.run_dir), [str(SCRIPT), *flags], environment)
    root = str(Path(pogo_main.__file__).resolve().parent)
    return Job(str(run.run_dir), ["-c", RUN_MODULE, root, pogo_multi_main.__name__, *flags], environment)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of(config: RunComparisonConfig) -> int:
    """Cores of a run: its threads train, and as many processes less one step the evaluation's environments."""
    return config.threads or (1 if config.backend == "ray" else max(cores() // (config.jobs or 1), 1))


def threads_of(config: RunComparisonConfig) -> int:
    """CPU threads of a run. Networks of this size gain nothing from more than four unless that is asked for."""
    return config.threads or min(cores_of(config), 4)


# ----------------------------------------------------------------------------------------------------------------
# What is done, and what the rest will take
# ----------------------------------------------------------------------------------------------------------------


def is_finished(run: Run) -> bool:
    """Whether a run of these very settings is finished. Raises UserError where its directory holds another run."""
    checkpoint = str(run.system.run_class.checkpoint_path(run.config))
    may_change = run.system.run_class.may_change(run.config) - {"dataset_dir"}  # a result is one of its data
    try:
        check_run(run.run_dir, run.config, True, may_change, checkpoint)
        return False
    except RunFinished:
        return True
    except UserError as error:
        raise UserError(error.where, error.fault, "choose another --log_dir, or give the old settings") from None


def updates_done(run: Run) -> int:
    """Updates that a run has logged so far."""
    try:
        with open(run.run_dir / "training" / "metrics.csv", "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 20_000, 0))
            rows = file.read().split(b"\n")[:-1]
        return min(int(rows[-1].split(b",")[0]), run.config.max_timesteps)
    except (OSError, ValueError, IndexError):
        return 0


def describe_state(run: Run, finished: set[Path]) -> str:
    """finished, cut at some update, or not started; and how the last process ended if that was not well."""
    if run.run_dir in finished:
        return "finished"
    attempts, done = read_attempts(run.run_dir), updates_done(run)
    line = f" ({attempts[-1]['line']})" if attempts and attempts[-1]["code"] not in (None, 0, 130) else ""
    return f"cut at update {done:,}{line}" if done else f"failed{line}" if line else "not started"


@functools.lru_cache(maxsize=64)
def _sizes(env: str, dataset_dir: str | None) -> tuple[int, int, float, int, float]:
    """Numbers of an environment: observation and action size, largest action, steps of an episode, seconds a step."""
    environment: gymnasium.Env = make_env(env, dataset_dir)
    try:
        observation_dim, (action_dim,) = environment.observation_space.shape[0], environment.action_space.shape
        environment.reset(seed=0)
        began, steps = time.perf_counter(), 0
        while steps < 50 or (steps < 1000 and time.perf_counter() - began < 0.1):
            _, _, terminated, truncated, _ = environment.step(environment.action_space.sample())
            if terminated or truncated:
                environment.reset(seed=steps)
            steps += 1
        seconds = (time.perf_counter() - began) / steps
        limit = getattr(environment.spec, "max_episode_steps", None) or 1000
        return observation_dim, action_dim, float(environment.action_space.high.max()), limit, seconds
    finally:
        environment.close()


def burst(run: Run, threads: int, seconds: float = 1.0) -> tuple[float, int]:
    """Measured seconds of one update on made-up transitions, and bytes of a checkpoint."""
    config = run.config
    observation_dim, action_dim, max_action, *_ = _sizes(config.env, config.dataset_dir)
    device, before = resolve_device(config.device), torch.get_num_threads()
    generator, n = torch.Generator(device).manual_seed(0), config.batch_size
    agent = run.system.make_agent(config, (observation_dim, action_dim, max_action), generator, device)
    shapes = {"observations": (n, observation_dim), "next_observations": (n, observation_dim), "rewards": (n,)}
    batch = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    batch |= {"actions": torch.rand(n, action_dim, device=device), "terminated": torch.zeros(n, device=device)}
    try:
        torch.set_num_threads(threads)
        for _ in range(5):
            agent.update(batch)
        began, updates = time.perf_counter(), 0
        while updates < 5 or time.perf_counter() - began < seconds:
            float(agent.update(batch)["critic_loss"])  # waits for the device
            updates += 1
        taken = (time.perf_counter() - began) / updates
    finally:
        torch.set_num_threads(before)
    buffer = io.BytesIO()
    torch.save(agent.state_dict(), buffer)
    return taken, buffer.tell()


def kind_of(run: Run) -> tuple:
    """What decides how long an update takes, but for the dataset's sizes."""
    names = ("batch_size", "hidden_dim", "sinkhorn_K", "sinkhorn_backend", "actor_configs", "num_critics")
    names += ("cql_n_actions", "q_n_hidden_layers", "policy_freq")
    return (run.algorithm, len(run.config.w2_weights), *(getattr(run.config, name, None) for name in names))


class Estimate:
    """Seconds and bytes of runs: from finished ones of the same kind where there are some, else from bursts here."""

    def __init__(self, runs: list[Run], finished: set[Path], threads: int):
        self.threads, self.bursts, self.measured, self.guessed = threads, {}, 0, 0
        self.known: dict[tuple, list[tuple[float, int]]] = collections.defaultdict(list)
        for run in runs:
            seconds = seconds_spent(run.run_dir) if run.run_dir in finished else None
            if seconds:
                size = sum(path.stat().st_size for path in run.run_dir.rglob("*") if path.is_file())
                kind = kind_of(run)
                for key in ((run.config.env, *kind), kind):
                    self.known[key].append((seconds / run.config.max_timesteps, size))

    def of(self, run: Run) -> tuple[float, int]:
        """Seconds of the whole run, and its bytes."""
        config, actors = run.config, len(run.config.w2_weights)
        kind = kind_of(run)
        pairs = self.known.get((config.env, *kind)) or self.known.get(kind)
        if pairs:
            self.measured += 1
            rates, sizes = zip(*pairs, strict=True)
            return config.max_timesteps * sum(rates) / len(rates), sum(sizes) // len(sizes)
        self.guessed += 1
        *sizes, limit, step = _sizes(config.env, config.dataset_dir)
        key = (*sizes, *kind)
        if key not in self.bursts:
            self.bursts[key] = burst(run, self.threads)
        update, checkpoint = self.bursts[key]
        evaluations = config.max_timesteps // config.eval_freq
        episodes = 2 * actors * config.eval_episodes * (evaluations + config.final_runs)
        rows = config.max_timesteps // config.log_freq + evaluations
        size = checkpoint + 400_000 + 2 * rows * (12 * actors + 20) * 20 + episodes * 70
        return config.max_timesteps * update + episodes * limit * step, size

    def how(self) -> str:
        """A sentence on what the figures come from."""
        if not self.guessed:
            return "This is what finished runs of this comparison took."
        start, rest = "This is", ""
        if self.measured:
            start, rest = f"For {self.guessed} of the runs this is", "; finished runs tell the rest"
        return f"{start} a guess from a short trial on this machine{rest}."


def dry_run(config: RunComparisonConfig, runs: list[Run], finished: set[Path]) -> None:
    """Say what would run, and what it will take."""
    for run in runs:
        print(f"{run.name}: {describe_state(run, finished)}")
    left = [run for run in runs if run.run_dir not in finished]
    cut = sum(updates_done(run) > 0 for run in left)
    print(f"{len(runs)} runs: {len(finished)} finished, {cut} cut, {len(left) - cut} not started")
    if not left:
        return
    estimate, seconds, size = Estimate(runs, finished, threads_of(config)), 0.0, 0
    for run in left:
        whole, taken = estimate.of(run)
        seconds += whole * (1 - updates_done(run) / run.config.max_timesteps)
        size += taken
    folder = Path(config.log_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    free, at_once = shutil.disk_usage(folder).free, config.jobs or 1
    print(f"Disk: {in_bytes(size)} for the runs that are left; {in_bytes(free)} are free in {folder}")
    most = " at most" if estimate.guessed else ""
    print(f"Time: about {in_time(seconds / at_once)}{most}, with {at_once} at once. {estimate.how()}")
    if size > free:
        raise UserError(f"--log_dir {config.log_dir}: {in_bytes(size)} are needed and {in_bytes(free)} are free")


def in_bytes(size: float) -> str:
    """1200000 as 1.2 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def in_time(seconds: float) -> str:
    """In seconds, minutes or hours."""
    for length, word in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {word}"
    return f"{seconds:.0f} seconds"


# ----------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------


def open_pool(config: RunComparisonConfig, threads: int, devices_named: bool = False) -> LocalPool | RayPool:
    """Where runs train: this machine, whose GPUs they get in turn unless their settings name one, or Ray's cluster.

    Raises UserError.
    """
    if config.backend == "ray":
        if not config.address:
            raise UserError("--backend ray: needs --address host:port of the cluster, or auto for this machine's")
        return RayPool(config.address, config.jobs, threads, config.gpus_per_run, config.retries)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return LocalPool(config.jobs or 1, [] if devices_named else devices)


class Comparison:
    """The runs that are left, where they train, and what came of them."""

    def __init__(self, config: RunComparisonConfig, runs: list[Run], finished: set[Path]):
        self.config, self.runs, self.finished = config, runs, finished
        self.left = collections.deque(run for run in runs if run.run_dir not in finished)
        self.starts: collections.Counter[Path] = collections.Counter()
        self.failed: dict[Path, str] = {}
        self.done = {run.run_dir: updates_done(run) for run in runs}  # updates
        self.looked, self.waiting = 0.0, 0  # when the directories were; runs that another process trains
        self.threads = threads_of(config)

    def open_pool(self) -> LocalPool | RayPool:
        """Where the runs train. Raises UserError."""
        named = any(":" in run.config.device for run in self.runs)  # the file says which device
        return open_pool(self.config, self.threads, named)

    def train(self) -> None:
        """Run what is left; Ctrl-C stops the processes and keeps what they saved."""
        if not self.left:
            return
        pool = self.open_pool()
        total = sum(run.config.max_timesteps for run in self.runs)
        bar = progress(total, "comparison", initial=sum(self.done.values()), unit="update", unit_scale=True)
        try:
            with bar:
                while self.left or pool.running:
                    self.start_some(pool)
                    for run, outcome in pool.poll():
                        self.take(run, outcome)
                    self.show(bar, pool)
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            print("stopping the runs at their last checkpoints; the same command continues them", file=sys.stderr)
            raise
        finally:
            pool.stop()

    def start_some(self, pool: LocalPool | RayPool) -> None:
        """Start runs while there is room; one that another process trains waits at the end of the queue."""
        self.waiting = 0
        for _ in range(len(self.left)):
            if not pool.room():
                return
            run = self.left.popleft()
            try:
                if is_held(run.run_dir):
                    self.left.append(run)
                    self.waiting += 1
                elif is_finished(run):  # by that other process
                    self.finished.add(run.run_dir)
                else:
                    self.starts[run.run_dir] += 1
                    pool.start(run, to_job(run, self.threads))
            except UserError as error:
                self.failed[run.run_dir] = one_line(error)

    def take(self, run: Run, outcome: Outcome) -> None:
        """A process has ended: its run is finished, starts again, or has failed."""
        if outcome.held:  # which is no try
            self.starts[run.run_dir] -= 1
            self.left.append(run)
            return
        if outcome.code == 0 and is_finished(run):
            self.finished.add(run.run_dir)
            try:
                self.report()
            except (UserError, OSError) as error:  # no reason to stop what trains; told again at the end
                warn(f"the results were not written: {error}")
            return
        words = f"exit code {outcome.code}: {outcome.line}" if outcome.code is not None else outcome.line
        if outcome.code != 2 and self.starts[run.run_dir] <= self.config.retries:
            warn(f"{run.name}: {words}; starting it again")
            self.left.append(run)
            return
        self.failed[run.run_dir] = words
        warn(f"{run.name}: failed, {words}; see {run.run_dir / 'output.log'}")

    def show(self, bar: Any, pool: LocalPool | RayPool) -> None:
        """The progress line: updates of all runs, with the time that is left at the present rate."""
        if time.monotonic() - self.looked < 2 and self.left:
            return
        self.looked = time.monotonic()
        for run in self.runs:
            finished = run.run_dir in self.finished
            self.done[run.run_dir] = run.config.max_timesteps if finished else updates_done(run)
        counts = {"finished": f"{len(self.finished)}/{len(self.runs)}", "running": len(pool.running)}
        counts |= {"failed": len(self.failed)} | ({"trained by others": self.waiting} if self.waiting else {})
        bar.set_postfix(counts, refresh=False)
        bar.update(max(sum(self.done.values()) - bar.n, 0))

    def report(self) -> str:
        """Write the results of what is finished; returns a summary of them for the terminal."""
        # Settings were compared at the start, so that what is finished now is a run of these.
        self.finished |= {run.run_dir for run in self.runs if (run.run_dir / "finished.json").exists()}
        compared = []
        for run in self.runs:
            finished = run.run_dir in self.finished
            note = self.failed.get(run.run_dir) or describe_state(run, self.finished)
            identity = (run.config.env, run.config.w2_weights, run.variant, run.config.seed)
            seconds = seconds_spent(run.run_dir) if finished else None
            note = "" if finished else note
            compared.append(ComparedRun(*identity, run.run_dir, finished, note, seconds, run.algorithm))
        return write_report(compared, Path(self.config.output), Path(self.config.config).name)


def check(config: RunComparisonConfig) -> None:
    """One line for a flag that cannot work."""
    for name in ("jobs", "threads", "max_timesteps"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: at least 1 is needed")
    if config.retries < 0:
        raise UserError(f"--retries {config.retries}: at least 0 is needed")
    if config.gpus_per_run is not None and not 0 <= config.gpus_per_run <= 64:
        raise UserError(f"--gpus_per_run {config.gpus_per_run}: must be between 0 and 64")
    if config.address and config.backend != "ray":
        raise UserError(f"--address {config.address}: is of a Ray cluster; add --backend ray")


def check_output(output: str) -> None:
    """UserError where the results cannot be written, before hours of training."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there ({error.strerror}); choose another") from None


def train_table(config: RunComparisonConfig) -> int:
    """A file of commands, whose scores go to the CSV beside it; how many runs failed."""
    for name in ("max_timesteps", "output"):
        if getattr(config, name) != getattr(RunComparisonConfig, name):
            raise UserError(f"--{name} {getattr(config, name)}: does nothing for {config.config}; leave it out")
    more = (config.log_dir, config.dataset_dir, config.only, config.seeds, config.retries, threads_of(config))
    options = queue.Options(*more, config.jobs or 1, min(cores_of(config) - 1, 7))
    action = "list" if config.dry_run else "report" if config.report_only else "train"
    pool = functools.partial(open_pool, config, options.threads)
    return queue.run_table(read_table(config.config), options, action, pool)


def main(argv: list[str] | None = None) -> None:
    """Run the comparison; exits 1 where runs failed."""
    config = parse_config(RunComparisonConfig, argv, __doc__, config_flag="--settings")
    check(config)
    if config.tables:
        return tables.rewrite_pages(Path(__file__).resolve().parent)
    if is_table(load_file(Path(config.config))):
        if train_table(config):
            sys.exit(1)
        return
    runs = expand(config)
    finished = {run.run_dir for run in runs if is_finished(run)}
    if config.dry_run:
        return dry_run(config, runs, finished)
    if config.report_only and not any(run.run_dir.exists() for run in runs):
        raise UserError(
            f"--log_dir {config.log_dir}: none of the runs asked for is there; give the folder that has some"
        )
    comparison = Comparison(config, runs, finished)
    check_output(config.output)
    print(f"{len(runs)} runs, {len(finished)} finished; {runs[0].name} is the first")
    if not config.report_only:
        try:
            comparison.train()
        except KeyboardInterrupt:
            comparison.report()
            raise
    print(f"\n{comparison.report()}\n")
    print(f"All tables, curves and scores: report.html, results.md and results.csv in {Path(config.output).resolve()}")
    if comparison.failed:
        print(f"{len(comparison.failed)} runs failed; the same command tries them again", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
