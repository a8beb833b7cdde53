"""The command line of every script: settings from defaults, a YAML file and flags; failures as one line.

Parse with `parse_config`, start with `run_cli`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from utils import DISK_FULL, ProcessDied, RunFinished, UserError, one_line


def run_cli(main: Callable[[list[str] | None], None]) -> None:
    """Call `main(None)` and turn the failures that a user can mend into one line.

    Exit codes: 2 for bad input, a file that cannot be used or a full disk, 1 for a process that died, 130 for Ctrl-C, 0
    for a run that was finished already. Any other exception is a defect of the program and keeps its traceback.
    """
    try:
        main(None)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except ProcessDied as error:
        print(f"error: {one_line(error)}; what was saved before is kept", file=sys.stderr)
        sys.exit(1)
    except RunFinished as finished:
        print(one_line(finished))
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted: what was saved before is kept", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in DISK_FULL:
            if error.filename is None:  # not about a file that the user chose: a defect
                raise
            print(
                f"error: {one_line(error.filename)}: {error.strerror}; check the path and its permissions",
                file=sys.stderr,
            )
            sys.exit(2)
        name = error.filename or "an output file"
        print(
            f"error: {one_line(name)}: the disk is full ({os.strerror(error.errno)}); "
            "the last good checkpoint is kept: free some space and continue from it",
            file=sys.stderr,
        )
        sys.exit(2)


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
        config_class: fields of type int, float, bool, str, Literal, tuple[T, ...], or one of these or None.
        argv: the arguments without the program's name; None takes them from sys.argv.
        description: first paragraph of `--help`.
        config_flag: the flag that names the YAML file (flat `field: value` lines).
        default_run_dir: where a run with given settings lies if `--run_dir` does not say so; None for no one place.
        aliases: other spellings of fields, on the command line and in the file.
        readers: what turns a field's value as the file has it into its type; raises ValueError.

    A repeated flag counts once, with its last value. `--resume` without a YAML file takes the run's own config.yaml, in
    `--run_dir` or the usual directory; a `--run_dir` that nothing else is said of must be there. Raises UserError for
    that, and for an unknown or ill-typed key or flag.
    `--help` prints the fields with their comments and exits 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    description = f"{description}\n\n{config_flag} FILE reads flat `field: value` YAML; flags override it.".strip()
    if "-h" in arguments or "--help" in arguments:
        tyro.cli(config_class, args=["--help"], description=description, use_underscores=True)
    types_by_name = typing.get_type_hints(config_class)
    hints = {field.name: types_by_name[field.name] for field in dataclasses.fields(config_class) if field.init}
    aliases = aliases or {}
    groups, config_path = _group_arguments(arguments, hints, config_flag, aliases)
    given = {key: _flag_to_tokens(key, values, hints[key]) for key, values in groups.items()}
    resumes = False  # whether the settings are those of the run to continue
    if config_path is None and groups.get("resume") is True:
        folder = groups["run_dir"][-1] if groups.get("run_dir") else None
        if folder is None and default_run_dir is not None:
            folder = default_run_dir(_call_tyro(config_class, given, hints, description))
        if folder is not None and not Path(folder).exists() and groups.keys() == {"resume", "run_dir"}:
            raise UserError(f"--resume --run_dir {folder}: there is no such run; check the path")
        if folder is not None and (Path(folder) / "config.yaml").exists():
            config_path = Path(folder) / "config.yaml"
            resumes = True
            given["run_dir"] = _value_to_tokens("run_dir", str(folder))  # it may have been moved since it began
    try:
        stored = {} if config_path is None else _read_config(Path(config_path), hints, aliases, readers or {})
    except UserError as error:
        if not resumes:
            raise
        raise UserError(f"--resume: {error}; is it a run of another command, or of another version?") from None
    tokens = {key: _value_to_tokens(key, value) for key, value in stored.items()} | given
    return _call_tyro(config_class, tokens, hints, description)


def _group_arguments(
    arguments: list[str], hints: dict[str, Any], config_flag: str, aliases: dict[str, str]
) -> tuple[dict, str | None]:
    """Map each field to the values given for it (a bool for a switch), and the path given with config_flag."""
    switches = {f"no_{name}": name for name, hint in hints.items() if hint is bool}
    groups: dict[str, Any] = {}
    current = None
    for token in arguments:
        if not _is_flag(token):
            if current is None:
                raise UserError(f"unexpected argument {token!r}: every value follows a --flag")
            if isinstance(groups[current], bool):
                raise UserError(f"--{current} takes no value, got {token!r}: write --{current} or --{current}=false")
            groups[current].append(token)
            continue
        flag, equals, value = token.partition("=")
        name = flag[2:].replace("-", "_") if flag != config_flag else config_flag
        name = aliases.get(name, name)
        if name not in hints and name not in switches and name != config_flag or not flag.startswith("--"):
            known = [f"--{known}" for known in hints] + [config_flag]
            raise UserError(f"unknown flag {flag}; the nearest one is {_nearest(flag.replace('-', '_'), known)}")
        current = switches.get(name, name)
        groups[current] = name not in switches if hints.get(current) is bool else [value] if equals else []
        if equals and hints.get(current) is bool:
            groups[current] = _read_switch(flag, value) == (name not in switches)
    config_path = groups.pop(config_flag, None)
    if config_path is not None and len(config_path) != 1:
        raise UserError(f"{config_flag} needs one file, got {len(config_path)}")
    return groups, config_path[0] if config_path else None


def _is_flag(token: str) -> bool:
    """-1e-3, -inf and the -4] of an unquoted list are values, -x and --lr are flags."""
    if not token.startswith("-") or token == "-":
        return False
    try:
        float(token.rstrip("]),"))
    except ValueError:
        return True
    return False


def _read_switch(flag: str, value: str) -> bool:
    """The value of --flag=true or --flag=false, in any case."""
    if value.lower() not in ("true", "false"):
        raise UserError(f"{flag} takes no value, or =true or =false, got {value!r}")
    return value.lower() == "true"


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, or the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _flag_to_tokens(name: str, values: bool | list[str], hint: Any) -> list[str]:
    """Spell one field's command-line values the way tyro reads them."""
    if isinstance(values, bool):
        return _value_to_tokens(name, values)
    if not values:
        raise UserError(f"--{name} needs a value")
    options = _alternatives(hint)
    if type(None) in options and [value.lower() for value in values] in (["none"], ["null"]):
        return _value_to_tokens(name, None)
    if any(typing.get_origin(option) is tuple for option in options):
        text = " ".join(values)
        if "," in text or text.startswith(("[", "(")):
            return _value_to_tokens(name, _read_bracketed(name, text, hint))
        return [f"--{name}", *values]
    if len(values) > 1:
        raise UserError(f"--{name} takes one value, got {' '.join(values)!r}")
    return [f"--{name}={values[0]}"]


def _read_bracketed(name: str, text: str, hint: Any) -> tuple:
    """The tuple that "[0.2, 0.2]", "(0.2, 0.2)" or "0.2,0.2" spells."""
    brackets = text[:1] + text[-1:]
    inner = text[1:-1] if brackets in ("[]", "()") else text
    try:
        return _coerce(yaml.safe_load(f"[{inner}]"), hint)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--{name} must be {_expected(hint)}, not {text!r}") from None


def _value_to_tokens(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def _read_config(
    path: Path, hints: dict[str, Any], aliases: dict[str, str], readers: dict[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """Read a flat YAML file and check each value against its field's type."""
    values = load_yaml(path)
    checked = {}
    for spelled, value in values.items():
        key = aliases.get(spelled, spelled)
        if key in checked:
            raise UserError(f"{path}: {spelled} stands twice, once under another name; leave one out")
        if key not in hints:
            raise UserError(f"{path}: unknown key {str(key)!r}; the nearest one is {_nearest(str(key), hints)!r}")
        try:
            checked[key] = _coerce(readers[key](value) if key in readers else value, hints[key])
        except ValueError:
            raise UserError(f"{path}: {key} must be {_expected(hints[key])}, not {value!r}") from None
    return checked


def load_yaml(path: Path) -> dict:
    """The keys of a YAML file. Raises UserError for one that cannot be read or holds something else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    """The value as the field's type, or ValueError. YAML 1.1 reads 3e-4 as text; a bool is not an int."""
    options = _alternatives(hint)
    if len(options) > 1:
        for option in options:
            with contextlib.suppress(ValueError):
                return _coerce(value, option)
        raise ValueError
    origin = typing.get_origin(hint)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint)):
            return value
    elif origin is tuple:
        items = typing.get_args(hint)
        if isinstance(value, list | tuple):
            items = items[:1] * len(value) if items[1:] == (...,) else items
            return tuple(_coerce(item, kind) for item, kind in zip(value, items, strict=True))
    elif hint is float:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint or value is None and hint is type(None):
        return value
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
    return words.get(hint, str(hint))


def _call_tyro(config_class: type, tokens: dict[str, list[str]], hints: dict[str, Any], description: str) -> Any:
    """Run tyro on the tokens of each field; its boxed error becomes one UserError line that names the flag."""
    arguments = [token for group in tokens.values() for token in group]
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(config_class, args=arguments, description=description, use_underscores=True)
    except SystemExit:
        name = re.search(r"--(\w+)", captured.getvalue()).group(1)
        if name not in tokens:
            raise UserError(f"--{name} is required; see --help") from None
        given = " ".join(tokens[name]).removeprefix(f"--{name}").lstrip("= ")
        raise UserError(f"--{name} {given}: must be {_expected(hints[name])}") from None


def check_bounds(config: Any, bounds: dict[str, tuple[float, float]]) -> None:
    """Raises UserError for the first setting that lies outside its bounds, ends included; None is not checked.

    bounds: smallest and largest value of each named setting.
    """
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:  # nan is not either
            raise UserError(f"--{name} {value}: must be at least {least:g} and at most {most:g}")


def check_counts(config: Any) -> None:
    """Raises UserError for the first whole number of a config dataclass that is below 1: for configs of sizes alone."""
    for name, value in vars(config).items():
        if type(value) is int and value < 1:
            raise UserError(f"--{name} {value}: at least 1 is needed")
