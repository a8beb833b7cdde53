"""The command line of every script: settings from defaults, a YAML file and flags; failures as one line.

Parse with `parse_config`, start with `run_cli`.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from utils import BASIC, DISK_FULL, ProcessDied, Range, RunFinished, UserError, did_you_mean, one_line

# Flags of the original texts that have no place here, and what takes it.
REPLACED = {"comet_api": "TensorBoard, which every run writes, or --wandb_project takes its place"}
DATA_FLAGS = ("dataset", "env", "USE_DATASET_STR")  # of OPSO, POGO and the walker: each names the data


def run_cli(main: Callable[[list[str] | None], None]) -> None:
    """Call `main(None)` and turn the failures that a user can mend into one line.

    A KeyboardInterrupt may bring words on what is left.

    Exit codes: 2 for bad input, a file that cannot be used or a full disk, 3 for a run that another process has, 1
    for a process that died, 130 for Ctrl-C, 0 for a run that was finished already. Any other exception is a defect of
    the program and keeps its traceback.
    """
    atexit.register(gc.freeze)  # the interpreter's last collection would take half a second for torch's objects
    try:
        main(None)
    except UserError as error:
        _stop(f"error: {one_line(error)}", error.exit_code)
    except ProcessDied as error:
        _stop(f"error: {one_line(error)}; what was saved before is kept", 1)
    except RunFinished as finished:
        print(one_line(finished))
        sys.exit(0)
    except KeyboardInterrupt as interrupt:
        _stop(f"interrupted: {interrupt.args[0] if interrupt.args else 'nothing was saved'}", 130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter's last flush, too, has somewhere to go
        sys.exit(141)
    except OSError as error:
        if error.errno in DISK_FULL:
            fault = f"the disk is full ({os.strerror(error.errno)})"
            remedy = "the last good checkpoint is kept: free some space and continue from it"
        elif error.filename is None:  # not about a file that the user chose: a defect
            raise
        else:
            fault, remedy = error.strerror, "check the path and its permissions"
        _stop(f"error: {one_line(error.filename or 'an output file')}: {fault}; {remedy}", 2)


def _stop(words: str, code: int) -> None:
    print(words, file=sys.stderr)
    sys.exit(code)


def parse_config(
    config_class: type,
    argv: list[str] | None = None,
    description: str = "",
    config_flag: str = "--config",
    default_run_dir: Callable[[Any], Path | None] | None = None,
    aliases: dict[str, str] | None = None,
    readers: dict[str, Callable[[Any], Any]] | None = None,
) -> Any:
    """An instance of a flat dataclass: its defaults, overridden by a YAML file, overridden by the command line.

    Args:
        config_class: fields with defaults, of type int, float, bool, str, Literal, tuple[T, ...], or one of these or
            None, with a `Range` and the marks of utils.py where they have them.
        argv: the arguments without the program's name; None takes them from sys.argv.
        default_run_dir: where a run with given settings lies if `--run_dir` does not say so; None for no one place.
        aliases: other spellings of fields, on the command line and in the file.
        readers: what turns a field's value as the file has it into its type; raises ValueError.

    A repeated flag counts once, with its last value. `--resume` without a YAML file takes the run's own config.yaml, in
    `--run_dir` or the usual directory. `--resume --run_dir DIR` alone requires that DIR exists. Raises UserError for
    that, for an unknown or ill-typed key or flag, and for a number outside its range.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        _show_help(
            config_class, f"{description}\n\n{config_flag} FILE reads flat `field: value` YAML; flags override it."
        )
    hints = typing.get_type_hints(config_class)
    given, path = _read_flags(words, hints, config_flag, aliases or {})
    resumes = False  # whether the settings are those of the run to continue
    if path is None and given.get("resume"):
        folder = given.get("run_dir") or (default_run_dir and default_run_dir(config_class(**given)))
        if folder and not Path(folder).exists() and given.keys() == {"resume", "run_dir"}:
            raise UserError(f"--resume --run_dir {folder}", "there is no such run", "check the path")
        if folder and (Path(folder) / "config.yaml").exists():
            path, given["run_dir"] = Path(folder) / "config.yaml", str(folder)  # it may have been moved
            resumes = True
    try:
        stored = {} if path is None else check_values(path, load_yaml(Path(path)), hints, aliases, readers)
    except UserError as error:
        if not resumes:
            raise
        remedy = "a run of another command or version: choose another --run_dir, or --overwrite"
        raise UserError("--resume", str(error), remedy) from None
    config = config_class(**stored | given)
    check_ranges(config)
    return config


def check_values(
    where: object,
    values: dict[str, Any],
    hints: dict[str, Any],
    aliases: dict[str, str] | None = None,
    readers: dict[str, Callable[[Any], Any]] | None = None,
) -> dict[str, Any]:
    """Values of a YAML file, or a section of it, each of the type that `hints` has; UserError names `where` and key."""
    aliases, readers, checked = aliases or {}, readers or {}, {}
    if not isinstance(values, dict):
        raise UserError(where, f"must hold `key: value` lines, not {values!r}")
    for spelled, value in values.items():
        key = aliases.get(spelled, spelled)
        if key in checked:
            raise UserError(where, f"{spelled} stands twice, once under another name", "leave one out")
        if key not in hints:
            hint = did_you_mean(key, [*hints, *aliases]) or "; see --help"
            raise UserError(where, f"unknown key {str(key)!r}{hint}")
        try:
            checked[key] = _coerce(readers[key](value) if key in readers else value, hints[key])
        except ValueError:
            raise UserError(where, f"{spelled} must be {_expected(hints[key])}, not {value!r}") from None
    return checked


def _read_flags(
    words: list[str], hints: dict[str, Any], config_flag: str, aliases: dict[str, str]
) -> tuple[dict[str, Any], str | None]:
    """Values of the fields that the command line sets, and the file that it names with config_flag."""
    hints = {config_flag.removeprefix("--"): str} | hints
    groups: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    name, unknown = None, []
    for word in words:
        if not _is_flag(word):
            if name is None:
                raise UserError(f"unexpected argument {word!r}: every value follows a --flag")
            groups[name].append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        off = name.startswith("no_") and hints.get(name[3:]) is bool
        name = name[3:] if off else aliases.get(name, name)
        groups[name] = ["false"] if off else []
        groups[name] += [value] if equals else []
        if name not in hints or not flag.startswith("--"):
            data = [f"--{each} names the data here" for each in DATA_FLAGS if name in DATA_FLAGS and each in hints]
            said = REPLACED.get(name) or "".join(data)
            known = [*hints, *(f"no_{each}" for each, hint in hints.items() if hint is bool)]
            hint = f"; {said}" if said else did_you_mean(name, known, "--{}") or "; see --help"
            unknown.append(f"unknown flag {flag}{hint}")
    if unknown:
        raise UserError("; ".join(unknown))
    for name, given in groups.items():
        if hints[name] is bool:
            text = " ".join(given or ["true"]).lower()
            if text not in ("true", "false"):
                raise UserError(f"--{name} takes true, false or no value, not {text!r}")
            values[name] = text == "true"
            continue
        if not given:
            raise UserError(f"--{name} needs a value")
        try:
            values[name] = _from_words(given, hints[name])
        except ValueError:
            raise UserError(f"--{name} {' '.join(given)}: must be {_expected(hints[name])}") from None
    return values, values.pop(config_flag.removeprefix("--"), None)


def _is_flag(word: str) -> bool:
    """-1e-3, -inf and the -4] of an unquoted list are values, -x and --lr are flags."""
    with contextlib.suppress(ValueError):
        float(word.rstrip("]),"))
        return False
    return word.startswith("-") and word != "-"


def _from_words(words: list[str], hint: Any) -> Any:
    """The words of a flag as the field's type, or ValueError. A list is words, or one text with commas or brackets."""
    with contextlib.suppress(ValueError):
        (word,) = words
        return _coerce(word, hint)
    text = " ".join(words)
    bracketed = "," in text or text[:1] in ("[", "(")
    return _coerce(text.strip("[]()").replace(",", " ").split() if bracketed else words, hint)


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, or the type itself."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which no key stands twice: the second would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                mark = node.value[position][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"{key!r} stands twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict:
    """The keys of a YAML file. Raises UserError for one that cannot be read or holds something else."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this config file ({error.strerror}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        fault = f"{error.problem}, line {where.line + 1}" if where else one_line(error)
        raise UserError(f"{path}: not valid YAML ({fault}); mend the file") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected `key: value` lines, found {type(values).__name__}; mend the file")
    return values or {}


def _coerce(value: Any, hint: Any) -> Any:
    """A value of a YAML file, or a word, as the field's type; ValueError where it is none. A bool is not an int.

    Text may stand for a number: YAML 1.1 reads 3e-4 as text.
    """
    options, items = _alternatives(hint), typing.get_args(hint)
    if len(options) > 1:
        for option in reversed(options):  # None first
            with contextlib.suppress(ValueError):
                return _coerce(value, option)
    elif typing.get_origin(hint) is Literal:
        if value in items:
            return value
    elif typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            items = items[:1] * len(value) if items[1:] == (...,) else items
            return tuple(_coerce(item, kind) for item, kind in zip(value, items, strict=True))
    elif hint is type(None):
        if value is None or type(value) is str and value.lower() in ("none", "null"):
            return None
    elif type(value) is hint or hint in (int, float) and type(value) is str or hint is float and type(value) is int:
        return hint(value)
    raise ValueError


def _expected(hint: Any) -> str:
    """The type in words for an error message."""
    options = _alternatives(hint)
    if len(options) > 1:
        return " or ".join(_expected(option) for option in options)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list, each item {_expected(typing.get_args(hint)[0])}"
    words = {float: "a number", int: "an integer", bool: "true or false", str: "text", type(None): "null"}
    words |= {list: "a list", dict: "`key: value` lines"}
    return words.get(hint, str(hint))


def marked(config_class: type, mark: object) -> set[str]:
    """Names of the fields of a config dataclass whose type has a mark, such as MAY_CHANGE."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {name for name, hint in hints.items() if mark in getattr(hint, "__metadata__", ())}


def check_ranges(config: Any) -> None:
    """Raises UserError for the first setting of a config dataclass that lies outside its Range; None is not checked."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), _range(hints[field.name])
        if value is not None and limits is not None and not limits.least <= value <= limits.most:  # nan is not either
            most = f"below {limits.below:g}" if limits.below else f"at most {limits.most:g}"
            must = f"must be at least {limits.least:g} and {most}"
            raise UserError(f"--{field.name} {value}", must)


def _range(hint: Any) -> Range | None:
    """The Range in a type, wherever in it."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Range):
            return mark
    return next(filter(None, map(_range, typing.get_args(hint))), None)


def _show_help(config_class: type, description: str) -> None:
    """Print the fields with their comments, those marked BASIC first, the others by the class they are of; exit 0."""
    basic, hints, groups = marked(config_class, BASIC), typing.get_type_hints(config_class), {"basic": []}
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for owner in config_class.__mro__:  # the command's own settings first
        words = re.findall("[A-Z]+[0-9]*(?![a-z])|[A-Z][a-z]+", owner.__name__.removesuffix("Config"))
        for name in [name for name in vars(owner).get("__annotations__", {}) if name in fields]:
            field = fields.pop(name)
            comment = re.search(rf"(?m)^    {name}:[^#]*# *(.*)$", inspect.getsource(owner))
            hint = Annotated[hints[name], tyro.conf.arg(help=comment and comment[1])]
            default = dataclasses.field(default=field.default, default_factory=field.default_factory)
            groups.setdefault("basic" if name in basic else "_".join(words).lower(), []).append((name, hint, default))
    parts = [
        (name, tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass(name, group, kw_only=True)])
        for name, group in groups.items()
        if group
    ]
    nested = dataclasses.make_dataclass("Settings", parts)
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m module; None for a file
    command = f"python -m {module.name}" if module else f"python {Path(sys.argv[0]).name}"
    tyro.cli(nested, prog=command, args=["--help"], description=description, use_underscores=True)
