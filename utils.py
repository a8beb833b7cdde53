"""Plumbing that every system shares: command line, random streams, files that are never half-written, replay, metrics.

Nothing here knows an algorithm or a benchmark. Bad input raises UserError with one line; run_cli prints it and exits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import importlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import struct
import subprocess
import sys
import tokenize
import types
import typing
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
import yaml
from tqdm import tqdm


class LateImport:
    """Stands for a module in the namespace given, and gives way to it when something of it is first used."""

    def __init__(self, name: str, namespace: dict[str, Any]):
        self._name, self._namespace = name, namespace

    def __getattr__(self, attribute: str) -> Any:
        self._namespace[self._name] = module = importlib.import_module(self._name)
        return getattr(module, attribute)


if TYPE_CHECKING:
    import torch
else:  # torch takes a second to import: `--help` and `make_dataset.py --list` do without
    torch = LateImport("torch", globals())

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ALWAYS_MAY_CHANGE = {"resume", "run_dir"}

# ---------------------------------------------------------------------------------------------------------------------
# Errors and the command line
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Bad input. The message names the file, key or flag and says what to do about it."""


class ProcessDied(Exception):
    """A process that works for this one was killed or crashed: no fault of the input, and worth another try."""


class RunFinished(Exception):
    """The run directory holds a finished run of these settings: nothing is left to do."""


def one_line(text: object) -> str:
    """The text with every run of white space, line breaks included, as one space."""
    return " ".join(str(text).split())


def warn(text: object) -> None:
    """Print one line `warning: ...` on stderr without tearing a progress bar."""
    tqdm.write(f"warning: {one_line(text)}", file=sys.stderr)


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


# ---------------------------------------------------------------------------------------------------------------------
# Device, randomness, progress
# ---------------------------------------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:<index>` names; raises UserError where it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: unknown device; use auto, cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: no such CUDA device on this machine; use --device cpu or auto")
    return device


class RandomStreams:
    """The separate random streams of one run, spawned from one numpy SeedSequence.

    Because the streams are separate, evaluating more often or drawing other action noise changes no minibatch.

    Attributes:
        init_seed: for building networks, see `initialising`.
        sampling: torch.Generator on the device, for minibatches and relabelling.
        policy: torch.Generator on the device, for action noise.
        evaluation_seed: int below 2**31, the same all through a run, so that every evaluation sees the same episodes.
        dropout_seed: for torch's global generators, the only ones that dropout can draw from.
    """

    def __init__(self, seed: int, device: str | torch.device = "cpu"):
        if seed < 0:
            raise UserError(f"--seed {seed}: must be 0 or larger")
        self.device = torch.device(device)
        init, sampling, policy, evaluation, dropout = np.random.SeedSequence(seed).spawn(5)
        self.init_seed = _seed_from(init)
        self.sampling = torch.Generator(self.device).manual_seed(_seed_from(sampling))
        self.policy = torch.Generator(self.device).manual_seed(_seed_from(policy))
        self.evaluation_seed = _seed_from(evaluation) % 2**31
        self.dropout_seed = _seed_from(dropout)

    @contextlib.contextmanager
    def initialising(self) -> Iterator[None]:
        """Seed torch's global generators with init_seed inside the block and restore them after it."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.random.default_generator.manual_seed(self.init_seed)
            if devices:
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(self.init_seed)
            yield

    def state_dict(self) -> dict[str, int | torch.Tensor]:
        """Two ints and two uint8 tensors on the CPU."""
        return {
            "init_seed": self.init_seed,
            "sampling": self.sampling.get_state(),
            "policy": self.policy.get_state(),
            "evaluation_seed": self.evaluation_seed,
        }

    def load_state_dict(self, state: dict[str, int | torch.Tensor]) -> None:
        """Continue every stream exactly; raises UserError for the state of another kind of device."""
        if state["sampling"].numel() != self.sampling.get_state().numel():
            raise UserError(f"the checkpoint's generators are not for {self.device.type}: resume on the same --device")
        self.init_seed, self.evaluation_seed = state["init_seed"], state["evaluation_seed"]
        self.sampling.set_state(state["sampling"].cpu())
        self.policy.set_state(state["policy"].cpu())


def _seed_from(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1, np.uint64)[0])


def progress(iterable_or_total: Iterable | int, desc: str, **options: Any) -> tqdm:
    """A tqdm bar on stderr over an iterable, or a manual one of so many steps; options go to tqdm.

    Into a file or a pipe it writes a line every ten seconds at most.
    """
    terminal = sys.stderr.isatty()
    shared = {
        "desc": desc,
        "file": sys.stderr,
        "dynamic_ncols": terminal,
        "ncols": None if terminal else 100,
        "mininterval": 0.2 if terminal else 10.0,
        "maxinterval": 10.0,
    } | options
    if isinstance(iterable_or_total, int):
        return tqdm(total=iterable_or_total, **shared)
    return tqdm(iterable_or_total, **shared)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are whole or absent, and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def write_bytes_atomic(path: str | Path, data: bytes | memoryview) -> None:
    """Write beside the target, flush to the disk, rename: a reader sees the old file or the new one.

    Raises OSError that names the file, and leaves no temporary one behind.
    """
    path = Path(path)
    # One fixed temporary name: what a kill left behind is overwritten by the next write instead of piling up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not know its file
        raise


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace a text file (UTF-8) as a whole; raises OSError that names it and leaves the old file on failure."""
    write_bytes_atomic(path, text.encode())


def sha256(path: str | Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_npz(path: Path, keys: Iterable[str], flag: str, bad_file: Callable[[Path, str], UserError]) -> dict[str, Any]:
    """Arrays of an npz file by name, nothing pickled, as they are stored.

    Raises `bad_file(path, fault)` for a file that is damaged, no archive, lacks a key or declares more than it holds,
    and UserError that names the flag of its folder for one that is not there, may not be read or does not fit in
    memory.
    """
    damaged = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, struct.error, tokenize.TokenError)
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check {flag}")
        with open(path, "rb"):  # is_zipfile would take a file without read permission for a damaged one
            pass
        if not zipfile.is_zipfile(path):
            raise bad_file(path, "not an npz archive, or cut short")
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive.files]
            if missing:
                raise bad_file(path, f"no array {missing[0]!r} (it holds {', '.join(archive.files) or 'nothing'})")
            for key in keys:
                _check_declared(archive.zip, key, path.stat().st_size)
            return {key: archive[key] for key in keys}
    except MemoryError:
        raise UserError(f"{path}: does not fit in memory; use a smaller dataset") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it; change that, or {flag}") from None
    except OSError as error:
        raise bad_file(path, f"cannot be read ({error})") from None
    except (*damaged, SyntaxError) as error:  # the last two: NumPy parses an array's header as Python
        text = one_line(error) or type(error).__name__
        raise bad_file(path, f"not a readable npz of plain arrays ({text})") from None


def _check_declared(archive: zipfile.ZipFile, key: str, file_bytes: int) -> None:
    """Raise ValueError for an array that declares more or less than its member of the archive holds.

    NumPy would get the memory that the header asks for before it reads a number.
    """
    if f"{key}.npy" not in archive.namelist():
        raise ValueError(f"{key} is no .npy array")
    info = archive.getinfo(f"{key}.npy")
    # Deflate makes at most 1032 bytes of one, so this much is there at most, whatever the archive's directory says.
    if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and info.file_size > 1032 * file_bytes:
        raise ValueError(f"{key} cannot unpack to {info.file_size:,} bytes, the file has {file_bytes:,}")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(member)
        else:  # names of fields beyond Latin-1
            raise ValueError(f"{key} has NumPy format {version}")
        held = info.file_size - member.tell()
    declared = math.prod(shape) * dtype.itemsize
    if declared != held and not dtype.hasobject:  # NumPy refuses those itself
        raise ValueError(f"{key} declares {shape} of {dtype}, {declared:,} bytes, and holds {held:,}")


def read_manifest(path: str | Path, dataset_id: str) -> dict[str, Any] | None:
    """The manifest of a complete generated dataset, else None.

    Complete means: the manifest is there, names this id, lists the dataset's own file or folder (the manifest's name
    but for the suffix), nothing outside its folder, and every file it lists is there with the size it says. A manifest
    is written after its files, so a generation that was cut leaves none.
    """
    path = Path(path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {Path(name): entry["bytes"] for name, entry in manifest["files"].items()}
        inside = not any(name.is_absolute() or ".." in name.parts for name in files)
        own = any(name.parts[0] in (path.stem, f"{path.stem}.npz", f"{path.stem}.hdf5") for name in files)
        complete = manifest["id"] == dataset_id and inside and own
        complete = complete and all((path.parent / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if complete else None


@contextlib.contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Hold a folder; wait while another process does, so that runs side by side do not write the same files."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, text and None; equal states give equal bytes.

    Raises TypeError, before anything is written, for a value that `weights_only=True` could not read back.
    """
    buffer = io.BytesIO()
    torch.save(_canonical(state, "state", {}), buffer)
    write_bytes_atomic(path, buffer.getbuffer())


def _canonical(value: Any, where: str, texts: dict[str, str]) -> Any:
    """A copy in which tensors lie on the CPU without sharing memory and equal texts are one object.

    The bytes of a pickle depend on which objects are identical; here they depend on the values alone.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        keys = {key: _canonical(key, where, texts) for key in value}
        return {keys[key]: _canonical(item, f"{where}[{key!r}]", texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_canonical(item, f"{where}[{index}]", texts) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return _canonical(value.item(), where, texts)
    if isinstance(value, str):
        return texts.setdefault(value, value)
    if value is None or type(value) in (bool, int, float):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors, numbers, text, dicts and lists")


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what save_checkpoint wrote; raises UserError for a missing, damaged or foreign file."""
    try:
        data = io.BytesIO(Path(path).read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this checkpoint ({error.strerror}); check the path or train first"
        ) from None
    try:
        # torch does not compare the checksums of the archive, zipfile does.
        with zipfile.ZipFile(data) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum differs")
        data.seek(0)
        state = torch.load(data, map_location=map_location, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("no dictionary inside")
    except Exception:  # damaged bytes fail in many ways
        raise UserError(
            f"{path}: damaged, or not a checkpoint of this program; give another, or move it away and start anew"
        ) from None
    return state


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


class GraphedStep:
    """A training step that is captured as a CUDA graph once and replayed: one launch instead of hundreds.

    The step must have static shapes, wait for nothing on the host, and draw its random numbers from `generators` alone.
    Its first calls run as they are, because libraries choose kernels then; they count like any other. What it returns,
    dicts of tensors, lies in the same memory at every replay.
    """

    WARMUP = 3  # calls before the capture

    def __init__(self, step: Callable[[], Any], generators: Iterable[torch.Generator]):
        self.step, self.generators = step, list(generators)
        self.device = self.generators[0].device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls, self.stream = 0, torch.cuda.Stream(self.device)

    def __call__(self) -> Any:
        with torch.cuda.device(self.device):  # which need not be the current one
            self.calls += 1
            if self.calls <= self.WARMUP:
                return self._run_beside()
            if self.graph is None:
                self._capture()
            self.graph.replay()
            return self.output

    def _run_beside(self) -> Any:
        """The step on a stream of its own: a capture needs what autograd keeps to be of another stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.step()
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            self.output = self.step()


class SideBySide:
    """Steps that share nothing but data they only read, each on a CUDA stream of its own: branches of a captured graph.

    A call returns what each step returned, and is ordered before and after what else the current stream does.
    """

    def __init__(self, steps: Iterable[Callable[[], Any]], device: torch.device):
        self.branches = [(step, torch.cuda.Stream(device)) for step in steps]

    def __call__(self) -> list[Any]:
        current, outputs = torch.cuda.current_stream(), []
        for step, stream in self.branches:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                outputs.append(step())
        for _, stream in self.branches:
            current.wait_stream(stream)
        return outputs


# ---------------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------------


class ReplayBuffer:
    """A ring of transitions in float32 on one device; the oldest rows are overwritten.

    observations, next_observations [capacity, observation_dim]; actions [capacity, action_dim];
    rewards, terminated, truncated [capacity]. The two ends are kept apart: bootstrap through `truncated` only.
    """

    FIELDS = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, device: str | torch.device = "cpu"):
        self.capacity, self.device = capacity, torch.device(device)
        self.size, self.position = 0, 0
        shapes = {"observations": (observation_dim,), "next_observations": (observation_dim,), "actions": (action_dim,)}
        for name in self.FIELDS:
            setattr(self, name, torch.zeros((capacity, *shapes.get(name, ())), device=self.device))

    @classmethod
    def from_arrays(
        cls, observations, actions, rewards, next_observations, terminated, truncated, device="cpu"
    ) -> ReplayBuffer:
        """A full buffer of a whole dataset; arrays or tensors of n rows."""
        buffer = cls(len(observations), observations.shape[1], actions.shape[1], device)
        buffer.add(observations, actions, rewards, next_observations, terminated, truncated)
        return buffer

    def __len__(self) -> int:
        return self.size

    def add(self, observations, actions, rewards, next_observations, terminated, truncated) -> None:
        """Append n rows, arrays or tensors [n, ...]; raises ValueError where the row counts or shapes differ."""
        values = (observations, actions, rewards, next_observations, terminated, truncated)
        count = len(observations)
        first = max(0, count - self.capacity)
        rows = torch.arange(first, count, device=self.device)
        slots = (self.position + rows) % self.capacity
        tensors = []
        for name, value in zip(self.FIELDS, values, strict=True):
            if not isinstance(value, torch.Tensor):
                value = torch.tensor(np.asarray(value), dtype=torch.float32)
            expected = (count, *getattr(self, name).shape[1:])
            if tuple(value.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}")
            tensors.append(value.to(self.device, torch.float32))
        for name, tensor in zip(self.FIELDS, tensors, strict=True):
            getattr(self, name)[slots] = tensor[first:]
        self.position = (self.position + count) % self.capacity
        self.size = min(self.capacity, self.size + count)

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Rows drawn with replacement by a generator on the buffer's device: field -> [batch_size, ...]."""
        if self.size == 0:
            raise ValueError("cannot sample from an empty replay buffer")
        rows = torch.randint(self.size, (batch_size,), generator=generator, device=self.device)
        return {name: getattr(self, name).index_select(0, rows) for name in self.FIELDS}

    def state_dict(self) -> dict[str, Any]:
        """The filled rows and the ring's position."""
        fields = {name: getattr(self, name)[: self.size] for name in self.FIELDS}
        return {"capacity": self.capacity, "position": self.position, **fields}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore rows and position; raises ValueError for another capacity or other row shapes."""
        size = len(state["observations"])
        for name in self.FIELDS:
            if state["capacity"] != self.capacity or state[name].shape[1:] != getattr(self, name).shape[1:]:
                raise ValueError("the stored replay buffer has another capacity or other row shapes")
            getattr(self, name)[:size] = state[name].to(self.device)
        self.size, self.position = size, state["position"]


class EpisodeReplay:
    """The last episodes of an agent: a ring of slots of `max_steps` transitions, in float32 on one device.

    An episode of T transitions holds T + 1 states; slot k starts at row k * (max_steps + 1):

        row                0   1   2   3  | 4   5   6   7       max_steps = 3, episodes of 2 and 3 transitions
        states            s0  s1  s2   .  | s0  s1  s2  s3
        actions           a0  a1   .   .  | a0  a1  a2   .
        episode_end        2   2   2   .  | 7   7   7   7       inclusive: the row of the last state
        transitions       [0, 1, 4, 5, 6]                       rows that start a transition

    Attributes: states [rows, state_dim], actions [rows, action_dim], episode_end [rows] int64, transitions [M] int64.
    """

    def __init__(self, num_episodes: int, max_steps: int, state_dim: int, action_dim: int, device="cpu"):
        self.num_episodes, self.width, self.device = num_episodes, max_steps + 1, torch.device(device)
        rows = num_episodes * self.width
        self.states = torch.zeros(rows, state_dim, device=self.device)
        self.actions = torch.zeros(rows, action_dim, device=self.device)
        self.episode_end = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.lengths = [0] * num_episodes  # transitions in each slot
        self.added = 0  # episodes so far
        self._index()

    def _index(self) -> None:
        starts = [torch.arange(n, device=self.device) + k * self.width for k, n in enumerate(self.lengths)]
        self.transitions = torch.cat(starts)

    def __len__(self) -> int:
        return len(self.transitions)

    def add(self, states: torch.Tensor, actions: torch.Tensor) -> None:
        """One episode, over the oldest: states [T + 1, state_dim], actions [T, action_dim], 1 <= T <= max_steps."""
        steps = len(actions)
        if len(states) != steps + 1 or not 1 <= steps < self.width:
            raise ValueError(f"{len(states)} states and {steps} actions are no episode of 1 to {self.width - 1} steps")
        slot = self.added % self.num_episodes
        first = slot * self.width
        self.states[first : first + steps + 1] = states
        self.actions[first : first + steps] = actions
        self.episode_end[first : first + steps + 1] = first + steps
        self.lengths[slot] = steps
        self.added += 1
        self._index()

    def state_dict(self) -> dict[str, Any]:
        """The filled rows, slot by slot, and where the ring stands."""
        filled = self._filled()
        kept = {name: getattr(self, name)[filled] for name in ("states", "actions")}
        return {"added": self.added, "lengths": torch.tensor(self.lengths), **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the episodes; raises ValueError for another capacity or other row shapes."""
        if len(state["lengths"]) != self.num_episodes or state["states"].shape[1] != self.states.shape[1]:
            raise ValueError("the stored episodes have another number of slots or other row shapes")
        self.added, self.lengths = int(state["added"]), [int(length) for length in state["lengths"]]
        for slot, length in enumerate(self.lengths):
            self.episode_end[slot * self.width : slot * self.width + length + 1] = slot * self.width + length
        filled = self._filled()
        for name in ("states", "actions"):
            getattr(self, name)[filled] = state[name].to(self.device)
        self._index()

    def _filled(self) -> torch.Tensor:
        rows = [
            torch.arange(length + 1, device=self.device) + slot * self.width
            for slot, length in enumerate(self.lengths)
            if length
        ]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=self.device)


def expectile_loss(prediction: torch.Tensor, target: torch.Tensor, expectile: float) -> torch.Tensor:
    """Squared error, weighted `expectile` where the target is above the prediction and 1 - expectile below."""
    error = target - prediction
    return torch.where(error > 0, expectile, 1 - expectile) * error.square()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


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
        self._file: io.FileIO | None = None
        self._rewrite(rows)
        self._trackers: dict[str, Any] = {}
        if tensorboard:
            self._guard("TensorBoard", self._open_tensorboard, Path(run_dir), resume_step)
        if wandb_project:
            labels = {name: label for name, label in (wandb_labels or {}).items() if label is not None}
            self._guard("wandb", self._open_wandb, Path(run_dir), resume_step, wandb_project, config, labels)

    def log(self, step: int, metrics: dict[str, float | torch.Tensor]) -> None:
        """Append one row; values are numbers or 0-d tensors. Raises OSError that names the file when it cannot."""
        values = _to_floats(metrics)
        late = [name for name in values if name not in self.columns]
        if late:
            rows = _read_rows(self.path)
            self.columns += late
            self._rewrite(rows)
        row = {"step": str(int(step))} | {name: repr(value) for name, value in values.items()}
        self._write(_csv_line(row.get(name, "") for name in self.columns))
        for name, tracker in list(self._trackers.items()):
            self._guard(name, tracker.log, int(step), values)

    def close(self) -> None:
        """Close the file and the trackers; closing twice is harmless."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for name, tracker in list(self._trackers.items()):
            self._guard(name, tracker.close)
        self._trackers.clear()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        lines = [_csv_line(self.columns)] + [_csv_line(row.get(name, "") for name in self.columns) for row in rows]
        if self._file is not None:
            self._file.close()
        write_text_atomic(self.path, "".join(lines))
        self._file = io.FileIO(self.path, "ab")  # unbuffered: a row is in the file when log returns

    def _write(self, line: str) -> None:
        data = memoryview(line.encode())
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _open_tensorboard(self, run_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        if resume_step is None:  # a run that died before its first checkpoint left curves that are not this one's
            for stale in (run_dir / "tensorboard").glob("events.out.tfevents.*"):
                stale.unlink()
        self._trackers["TensorBoard"] = _TensorBoard(SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge))

    def _open_wandb(
        self, run_dir: Path, resume_step: int | None, project: str, config: Any, labels: dict[str, str]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise RuntimeError("not installed: pip install -r requirements-tracking.txt") from None
        # The id lies beside the run, so that a resumed run continues its own page.
        id_file = run_dir / "wandb_id.txt"
        if resume_step is None or not id_file.exists():
            write_text_atomic(id_file, uuid.uuid4().hex)
        settings = plain_config(config) if config is not None else None
        labels = {"name": "/".join(Path(run_dir).resolve().parts[-4:])} | labels
        identity = {"id": id_file.read_text().strip(), "resume": "allow"}
        # One process may train several runs, each with a page of its own.
        run = wandb.init(project=project, dir=str(run_dir), config=settings, reinit="create_new", **identity, **labels)
        self._trackers["wandb"] = _Wandb(run)

    def _guard(self, name: str, action: Callable, *arguments: Any) -> None:
        """Call a tracker; whatever it raises costs that tracker and nothing else."""
        try:
            action(*arguments)
        except Exception as error:
            self._trackers.pop(name, None)
            warn(f"{name} is off for this run ({type(error).__name__}: {error}); metrics.csv goes on")


class _TensorBoard:
    def __init__(self, writer: Any):
        self.writer = writer

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, run: Any):
        self.run = run

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class RunningMeans:
    """Means of what updates return, dicts of 0-d tensors, without waiting for the device until they are asked for.

    Sums, not lists: thousands of small tensors that outlive an update would scatter the heap.
    """

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


def _to_floats(metrics: dict[str, float | torch.Tensor]) -> dict[str, float]:
    """All values as floats; the tensors leave the device in one copy."""
    for name in metrics:
        if name == "step" or any(character in name for character in ',"\r\n'):
            raise ValueError(f"a metric cannot be called {name!r}")
    tensors = {name: value for name, value in metrics.items() if isinstance(value, torch.Tensor)}
    moved: dict[str, float] = {}
    if tensors:
        stacked = torch.stack([value.detach().double() for value in tensors.values()])
        moved = dict(zip(tensors, stacked.tolist(), strict=True))
    return {name: moved[name] if name in moved else float(value) for name, value in metrics.items()}


def _csv_line(cells: Iterable[str]) -> str:
    return ",".join(cells) + "\n"


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv as text; a line that a kill or a full disk cut short is left out."""
    # Only lines that end in a line break are whole: a cut number still reads as a number.
    lines = path.read_text(errors="replace").split("\n")[:-1]
    columns = lines[0].split(",") if lines else []
    rows = []
    for line in lines[1:]:
        cells = line.split(",")
        try:
            int(cells[0])
            for cell in cells[1:]:
                float(cell or 0)
        except ValueError:
            continue
        if len(cells) == len(columns) and columns[0] == "step":
            rows.append(dict(zip(columns, cells, strict=True)))
    return rows


class EpisodeLog:
    """evaluations.csv: every evaluated episode of a run, so that any statistic can be taken later.

    Columns: evaluation (`training`, or `final` for that of the end), step, actor, mode, episode, length, return, score.
    The whole file is replaced at each evaluation; a resumed run drops what came after `resume_step`.
    """

    COLUMNS = ("evaluation", "step", "actor", "mode", "episode", "length", "return", "score")

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
    path, types = Path(path), (str, int, int, str, int, int, float, float)
    try:
        header, *lines = path.read_text().splitlines()
        if tuple(header.split(",")) != EpisodeLog.COLUMNS:
            raise ValueError("other columns")
        return [
            {name: kind(cell) for name, kind, cell in zip(EpisodeLog.COLUMNS, types, line.split(","), strict=True)}
            for line in lines
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no evaluations can be read ({one_line(error)}); give a run's directory") from None


def read_metrics(run_dir: str | Path) -> dict[str, list[float]]:
    """Column -> values over the rows of metrics.csv, `step` as ints, nan where a row lacks the value.

    Raises UserError when the directory has no metrics.csv.
    """
    path = Path(run_dir) / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the directory of a run")
    rows = _read_rows(path)
    names = list(rows[0]) if rows else ["step"]
    return {
        name: [int(row[name]) if name == "step" else float(row[name] or math.nan) for row in rows] for name in names
    }


# ---------------------------------------------------------------------------------------------------------------------
# Run directories
# ---------------------------------------------------------------------------------------------------------------------


def prepare_run(
    run_dir: str | Path,
    config: Any,
    resume: bool,
    checkpoint_name: str = "checkpoints/last.pth",
    may_change: Iterable[str] = (),
) -> Path | None:
    """Open a run's directory; returns the checkpoint to continue from, or None for a new run.

    Call it inside `hold_run`: a second start must not change the settings of a run that goes on.

    Writes config.yaml and versions.json. Keys in may_change, and resume and run_dir, may differ from the stored
    config.yaml. Raises RunFinished for a finished run of these settings, and UserError where continuing would mix
    two runs: other settings, or a checkpoint without `--resume`.
    """
    run_dir = Path(run_dir)
    checkpoint = run_dir / checkpoint_name
    started = checkpoint.exists()
    check_run(run_dir, config, resume, may_change, checkpoint_name)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text_atomic(run_dir / "config.yaml", yaml.safe_dump(_stored_config(config), sort_keys=False))
        write_text_atomic(run_dir / "versions.json", json.dumps(_versions(), indent=2) + "\n")
    except OSError as error:
        raise _no_run_dir(run_dir, error) from None
    if resume and not started:
        print(f"{run_dir}: nothing to resume, starting anew", file=sys.stderr)
    return checkpoint if started else None


def check_run(
    run_dir: str | Path,
    config: Any,
    resume: bool,
    may_change: Iterable[str] = (),
    checkpoint_name: str = "checkpoints/last.pth",
) -> None:
    """Whether a run may begin or go on here, as `prepare_run` asks, without writing anything: cheap, to ask first."""
    run_dir = Path(run_dir)
    finished, started = (run_dir / "finished.json").exists(), (run_dir / checkpoint_name).exists()
    if started and not (run_dir / "config.yaml").exists():
        raise UserError(
            f"{run_dir / checkpoint_name}: belongs to another run, as {run_dir} has no config.yaml; choose another "
            "folder of checkpoints, or the directory of that run"
        )
    if finished or (resume and (run_dir / "config.yaml").exists()):
        _check_same_config(run_dir, _stored_config(config), ALWAYS_MAY_CHANGE | set(may_change))
    if finished:
        figures = _last_figures(run_dir)
        raise RunFinished(f"{run_dir}: this run is finished{figures}; choose another --run_dir to train again")
    if started and not resume:
        raise UserError(f"{run_dir}: holds an unfinished run; continue it with --resume or choose another --run_dir")


def _last_figures(run_dir: Path) -> str:
    """` (name 0.123, ...)`: the first eight figures of finished.json, or nothing where it cannot be read."""
    try:
        summary = json.loads((run_dir / "finished.json").read_text())
        figures = [f"{name} {value:.3f}" for name, value in summary.items() if isinstance(value, float)]
        figures = [figure for figure in figures if "/" in figure] or figures
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({', '.join(figures[:8])})" if figures else ""


def _no_run_dir(run_dir: Path, error: OSError) -> Exception:
    """What to raise for a directory that cannot be written: a full disk is no reason to choose another name."""
    if error.errno in DISK_FULL:
        return error
    return UserError(f"--run_dir {run_dir}: cannot write there ({error.strerror}); choose another")


@contextlib.contextmanager
def hold_run(run_dir: str | Path) -> Iterator[None]:
    """Make a run's directory and keep it to one process.

    Raises UserError where there can be no such directory and where another process trains in it. The lock goes with the
    process, so that a killed run leaves none behind.
    """
    import fcntl

    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_run_dir(Path(run_dir), error) from None
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another process is training there; choose another --run_dir") from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(folder)


def mark_finished(run_dir: str | Path, summary: dict[str, Any]) -> None:
    """Write finished.json: the run's last figures, and the sign that nothing is left to do."""
    write_text_atomic(Path(run_dir) / "finished.json", json.dumps(summary, indent=2, default=float) + "\n")


def plain_config(config: Any) -> dict[str, Any]:
    """A config dataclass (or dict) as YAML writes it: tuples as lists, paths as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config)


def _stored_config(config: Any) -> dict[str, Any]:
    """Settings as a run keeps them: `resume` says how it was started, not what it is."""
    return {key: value for key, value in plain_config(config).items() if key != "resume"}


def _check_same_config(run_dir: Path, current: dict[str, Any], may_change: set[str]) -> None:
    path = run_dir / "config.yaml"
    stored = load_yaml(path)
    absent = "(absent)"
    if stored.keys() - current.keys() and current.keys() - stored.keys():
        raise UserError(f"{run_dir}: holds a run of another command or version; choose another --run_dir")
    for key in [*current, *(key for key in stored if key not in current)]:
        before, now = stored.get(key, absent), current.get(key, absent)
        if key not in may_change and before != now:
            raise UserError(
                f"{path}: {key} was {before} and is now {now}; give the old value, or choose another --run_dir"
            )


def _versions() -> dict[str, str | None]:
    """What ran: interpreter, platform, packages (null where not installed) and the commit of this checkout."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "numpy", "mujoco", "gymnasium", "ogbench", "dm_control"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["commit"] = _commit(Path(__file__).resolve().parent)
    return versions


def _commit(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    # A folder that was unpacked inside some other repository has no commit of its own.
    return lines[1] if Path(lines[0]).resolve() == folder else None
