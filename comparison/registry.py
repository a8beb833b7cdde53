"""results/<table>.yaml: the runs behind a table. docs/results.md describes the file."""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dmc_utils
from runs.cli import check_values, load_yaml, parse_config
from runs.directory import plain_config
from utils import UserError, did_you_mean


@dataclass(frozen=True)
class Command:
    """A training command of this repository."""

    system: str  # walker, pogo, pogo_multi or opso: which files its runs leave
    settings: str  # in its module: the settings' class, or a function that finds it by the arguments
    data: str | None = None  # the flag that names its dataset
    folder: str | None = None  # the flag of the data's folder


_WALKER = {"data": "USE_DATASET_STR", "folder": "data_dir"}
COMMANDS = {
    "walker.agent": Command("walker", "AgentConfig"),
    "walker.train_il": Command("walker", "CloningConfig", **_WALKER),
    "walker.train_td3bc": Command("walker", "WalkerTD3BCConfig", **_WALKER),
    "walker.train_cqlsac": Command("walker", "WalkerCQLConfig", **_WALKER),
    "walker.train_dt": Command("walker", "TransformerConfig", **_WALKER),
    "walker.train_model": Command("walker", "ModelConfig", **_WALKER),
    "walker.train_morel": Command("walker", "MORELConfig", **_WALKER),
    "walker.train_cds": Command("walker", "CDSConfig", **_WALKER),
    "pogo_main": Command("pogo", "POGOTrainerConfig", "env", "dataset_dir"),
    "algorithms.offline.pogo_multi_main": Command("pogo_multi", "find_config", "env", "dataset_dir"),
    "offline_trainer": Command("opso", "OfflineTrainerConfig", "dataset", "dataset_dir"),
    "online_trainer": Command("opso", "OnlineTrainerConfig", "dataset", "dataset_dir"),
}
# Flags that the queue sets itself.
RESERVED = {"seed", "run_dir", "resume", "overwrite", "evaluate"}
RESERVED |= {"offline_run_dir", "dataset_dir", "data_dir"}
# Settings that say on which machine and how watched a run is trained, and not what it is.
MACHINE = {"device", "eval_workers", "tensorboard", "cuda_graph", "kernels", "wandb_project"}
FILE_KEYS = {"title": str, "seeds": tuple[int, ...], "runs": list, "layout": dict}
RUN_KEYS = {"method": str, "command": str, "flags": dict, "each": dict, "seeds": tuple[int, ...], "needs": dict}
RUN_KEYS |= {"row": tuple[str, ...], "column": str, "hours": float}
NEEDS_KEYS = {"command": str, "flags": dict}
LAYOUT_KEYS = {"header": list, "columns": list, "where": dict, "digits": int}
LAYOUT_KEYS |= {"spread": bool, "data_row": bool, "data_column": bool}


@dataclass(frozen=True)
class Run:
    """One training run, or an evaluation that trains nothing. How it is shown makes it no other run."""

    table: str = field(compare=False)
    method: str = field(compare=False)  # its display name
    command: str  # of COMMANDS
    flags: tuple[str, ...]  # but for seed, directories and what follows from the machine
    dataset: str  # id, or the command's own list of them; empty where it reads no data
    seed: int
    row: tuple[str, ...] = field(default=(), compare=False)  # labels of the table's row
    column: str = field(default="{task}", compare=False)  # the table's; {task}, {actor}, ... are of a row of scores
    needs: Run | None = None  # a run that must be finished before, whose directory this one reads
    hours: float | None = field(default=None, compare=False)  # a guess for one core
    variant: tuple[str, ...] = field(default=(), compare=False)  # its values of the entry's `each`
    folder: Path | None = field(default=None, compare=False)  # its directory; default: one that follows from its flags

    @property
    def system(self) -> str:
        return COMMANDS[self.command].system

    @property
    def datasets(self) -> list[str]:
        if not self.dataset:
            return []
        return dmc_utils.parse_datasets(self.dataset) if self.system == "walker" else [self.dataset]

    @property
    def name(self) -> str:
        words = (self.table, self.method, *self.row, self.dataset, *self.variant, f"seed {self.seed}")
        return " ".join(filter(None, dict.fromkeys(words)))

    @property
    def text(self) -> str:
        """The shell command that trains it by itself; it identifies the run."""
        words = [f"{self.command}.py"] if "." not in self.command else ["-m", self.command]
        own = shlex.join(["python", *words, *self.flags, "--seed", str(self.seed)])
        return own if self.needs is None else f"{self.needs.text} && {own}"

    def run_dir(self, log_dir: str | Path) -> Path:
        """<log_dir>/results/<command>/<dataset>/<8 digits of its settings>/seed_<seed>, whichever table asks for it."""
        if self.folder is not None:
            return self.folder
        dataset = re.sub(r"[^\w.+-]+", "_", self.dataset) or "no_data"
        place = Path(log_dir).resolve() / "results" / self.command / dataset
        return place / settings_digest(self) / f"seed_{self.seed}"

    def arguments(self, log_dir: str | Path, dataset_dir: str | None) -> list[str]:
        """All flags of its process but for those that follow from the machine."""
        words = [*self.flags, "--seed", str(self.seed), "--run_dir", str(self.run_dir(log_dir))]
        folder = COMMANDS[self.command].folder
        if dataset_dir is not None and folder is not None:
            words += [f"--{folder}", str(Path(dataset_dir).expanduser().resolve())]
        if self.needs is not None:
            words += ["--offline_run_dir", str(self.needs.run_dir(log_dir))]
        return words


@dataclass
class Table:
    """A file of runs."""

    name: str
    path: Path
    title: str
    runs: list[Run]  # in the order of training: one seed of everything first
    layout: dict[str, Any] = field(default_factory=dict)

    @property
    def csv(self) -> Path:
        return self.path.with_suffix(".csv")


def check_keys(where: str, values: Any, known: Iterable[str]) -> None:
    """Raise UserError unless `values` is a mapping with keys among `known`."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold `key: value` lines, not {values!r}")
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known) or f"; it must be one of {', '.join(sorted(known))}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")


def as_flags(name: str, value: Any) -> list[str]:
    """A setting as it stands on a command line."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{name}", *(str(value).lower() if value is None else str(value) for value in values)]


def fill(path: Path, where: str, template: Any, values: dict[str, Any]) -> str:
    """A text with values in place of its {names}. Raises UserError for a name that is not there."""
    try:
        return str(template).format(**values)
    except (KeyError, IndexError, ValueError):
        known = ", ".join(f"{{{name}}}" for name in values) or "nothing"
        raise UserError(f"{path}: {where}: {template!r} must hold no other braces than {known}") from None


def read_table(path: str | Path) -> Table:
    """A file's runs and layout. Raises UserError that names the file and the key."""
    path = Path(path)
    usual = {"title": f"{path.stem}.", "seeds": (0,), "layout": {}}
    sections = usual | check_values(path, load_yaml(path), FILE_KEYS)
    layout = {"columns": []} | check_values(f"{path}: layout", sections["layout"], LAYOUT_KEYS)
    runs: list[Run] = []
    for number, entry in enumerate(sections["runs"]):
        found = list(_entry_runs(path, f"runs[{number}]", entry, sections["seeds"]))
        if not found:
            raise UserError(f"{path}: runs[{number}]: an empty list in seeds or each leaves no run")
        runs += found
    if not runs:
        raise UserError(f"{path}: runs must be a list of commands, see docs/results.md")
    layout["columns"], header = [*map(str, layout["columns"])], layout.get("header", ["method"])
    for run in runs:
        if len(run.row) != len(header):
            raise UserError(f"{path}: row {' '.join(run.row)}: layout.header needs a word for each of its labels")
    texts = [run.text for run in runs]
    for text in texts:
        if texts.count(text) > 1:
            raise UserError(f"{path}: two entries name the same run, {text}; leave one out")
    runs.sort(key=lambda run: run.seed)  # stable: within a seed in the order of the file
    return Table(path.stem, path, sections["title"], runs, layout)


def _entry_runs(path: Path, where: str, entry: Any, seeds: tuple[int, ...]) -> Iterator[Run]:
    """Every seed of every combination of the values in `each`."""
    usual = {"flags": {}, "each": {}, "seeds": seeds, "column": "{task}", "needs": None, "hours": None}
    entry = usual | check_values(f"{path}: {where}", entry, RUN_KEYS)
    for key in {"method", "command"} - entry.keys():
        raise UserError(f"{path}: {where}.{key}: must be given")
    each = check_values(f"{path}: {where}.each", entry["each"], dict.fromkeys(entry["each"], list))
    needs = entry["needs"] and check_values(f"{path}: {where}.needs", entry["needs"], NEEDS_KEYS)
    for values in itertools.product(*each.values()):
        chosen = dict(zip(each, values, strict=True))
        flags, dataset = _flags(path, where, entry["command"], entry["flags"] | chosen)
        row = tuple(fill(path, f"{where}.row", label, chosen) for label in entry.get("row", [entry["method"]]))
        method = fill(path, f"{where}.method", entry["method"], chosen)
        for seed in entry["seeds"]:
            before = None
            if needs is not None:
                more = {"dataset": dataset, **needs.get("flags", {})}
                words, _ = _flags(path, f"{where}.needs", needs.get("command", ""), more)
                before = Run(path.stem, f"{method}, pretraining", needs["command"], words, dataset, seed)
            own = (flags, dataset, seed, row, entry["column"], before, entry["hours"], tuple(map(str, chosen.values())))
            yield Run(path.stem, method, entry["command"], *own)


def _flags(path: Path, where: str, command: str, flags: Any) -> tuple[tuple[str, ...], str]:
    """Flags in the order of their names, and the dataset that they name."""
    if command not in COMMANDS:
        raise UserError(f"{path}: {where}.command: must be one of {', '.join(COMMANDS)}, not {command!r}")
    for name in RESERVED & flags.keys():
        raise UserError(f"{path}: {where}.flags.{name}: is set by run_comparison.py; leave it out")
    data = COMMANDS[command].data
    dataset = "" if data is None else str(flags.get(data, ""))
    if data is not None and not dataset:
        raise UserError(f"{path}: {where}.flags.{data}: must be given, the id of the data")
    return tuple(word for name in sorted(flags) for word in as_flags(name, flags[name])), dataset


def settings_of(command: str, arguments: list[str]) -> Any:
    """The settings of a process, as its command reads and resolves them: what None stands for may depend on the data.

    Raises UserError for flags that it does not have.
    """
    module = importlib.import_module(command)
    found = getattr(module, COMMANDS[command].settings)
    config = parse_config(found if isinstance(found, type) else found(arguments), arguments)
    return module.resolve(config) if hasattr(module, "resolve") else config


@functools.cache
def resolved_settings(command: str, flags: tuple[str, ...]) -> dict[str, Any]:
    """All settings that flags and defaults decide, as YAML writes them, but for seed, places and the machine."""
    values = plain_config(settings_of(command, list(flags)))
    return {name: value for name, value in values.items() if name not in MACHINE | RESERVED}


@functools.cache
def settings_digest(run: Run) -> str:
    """8 digits of a run's settings, by which a row of scores is known to be of the present defaults.

    Settings that are off (None, False) are left out: a new one that is off by default changes no digits.
    """
    parts = [run] if run.needs is None else [run.needs, run]
    settings = [resolved_settings(part.command, part.flags) for part in parts]
    on = [{name: value for name, value in own.items() if value is not None and value is not False} for own in settings]
    return hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:8]


def check_flags(table: Table) -> None:
    """Raise UserError, naming the file, for the first run whose command would refuse its flags."""
    for run in [part for whole in table.runs for part in (whole.needs, whole) if part is not None]:
        try:
            settings_of(run.command, [*run.flags, "--seed", str(run.seed)])
        except UserError as error:
            raise UserError(f"{table.path}: {run.method}: {error}") from None
