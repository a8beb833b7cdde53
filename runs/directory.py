"""The directory of a run: one process at a time, its settings, its checkpoints, and the sign that it is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from runs.cli import load_yaml
from utils import (
    RunFinished,
    RunLocked,
    UserError,
    exclusive,
    one_line,
    processor_name,
    torch,
    write_bytes_atomic,
    write_text_atomic,
)

LAST = "checkpoints/last.pth"  # of a run, in its directory
LENGTHS = {"max_timesteps", "num_epochs", "max_episodes"}
HOW_IT_STARTED = {"resume", "overwrite"}  # settings that say how a run was started, not what it is


@contextlib.contextmanager
def expecting(path: str | Path, what: str, remedy: str = "") -> Iterator[None]:
    """Turn what fails where a file's content is not as expected into one UserError line: the path, and not `what`."""
    try:
        yield
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = one_line(error) or type(error).__name__
        raise UserError(path, f"not {what} ({reason})", remedy) from None


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, text and None; equal states give equal bytes.

    Raises TypeError, before anything is written, for a value that `weights_only=True` could not read back.
    """
    buffer, texts = io.BytesIO(), {}

    def canonical(value: Any) -> Any:
        """A copy whose tensors lie on the CPU and share no memory, and whose equal texts are one object.

        The bytes of a pickle depend on which objects are identical; here they depend on the values alone.
        """
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu", copy=True).clone(memory_format=torch.contiguous_format)
        if isinstance(value, dict):
            return {canonical(key): canonical(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(canonical, value))
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, str):
            return texts.setdefault(value, value)
        if value is None or type(value) in (bool, int, float):
            return value
        raise TypeError(f"a checkpoint holds tensors, numbers, text, dicts and lists, not {value!r}")

    torch.save(canonical(state), buffer)
    write_bytes_atomic(path, buffer.getbuffer())


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


def prepare_run(
    run_dir: str | Path,
    config: Any,
    may_change: Iterable[str] = (),
    checkpoint: str | Path = LAST,
    data: dict[str, Any] | None = None,
) -> Path | None:
    """Open a run's directory, inside `lock_run`; returns the checkpoint to continue from, or None for a new run.

    Writes config.yaml and versions.json, with what is known of the `data`; with `config.overwrite` it removes the run
    that is there first. Raises as `check_run`.
    """
    run_dir, checkpoint = Path(run_dir), Path(run_dir) / checkpoint
    check_run(run_dir, config, may_change, checkpoint)
    if getattr(config, "overwrite", False):
        _clear(run_dir, checkpoint)
    started = checkpoint.exists()
    write_text_atomic(run_dir / "config.yaml", yaml.safe_dump(_stored_config(config), sort_keys=False))
    write_text_atomic(run_dir / "versions.json", json.dumps(_versions(config) | (data or {}), indent=2) + "\n")
    if getattr(config, "resume", False) and not started:
        print(f"{run_dir}: nothing to resume, starting anew", file=sys.stderr)
    return checkpoint if started else None


def check_run(run_dir: str | Path, config: Any, may_change: Iterable[str] = (), checkpoint: str | Path = LAST) -> None:
    """Whether a run may begin or go on here, as `prepare_run` asks, without writing anything: cheap, to ask first.

    may_change: settings that, like run_dir, may differ from the stored config.yaml. checkpoint: the file to continue
    from; a relative path is in run_dir.

    Raises RunFinished for a finished run of these settings, and UserError where continuing would mix two runs: other
    settings, or a checkpoint without `--resume`.
    """
    run_dir, checkpoint = Path(run_dir), Path(run_dir) / checkpoint
    resume, overwrite = getattr(config, "resume", False), getattr(config, "overwrite", False)
    finished, started = (run_dir / "finished.json").exists(), checkpoint.exists()
    if resume and overwrite:
        raise UserError("--resume --overwrite", "one continues the run, the other replaces it", "give one of them")
    if started and not (run_dir / "config.yaml").exists():
        raise UserError(
            checkpoint,
            f"belongs to another run, as {run_dir} has no config.yaml",
            "choose another folder of checkpoints, or the directory of that run",
        )
    if overwrite:
        return
    replacing = ", or replace it with --overwrite" if hasattr(config, "overwrite") else ""
    if finished or resume and (started or (run_dir / LAST).exists()):  # or the link to another --checkpoint_dir
        _check_same_config(run_dir, config, {"run_dir", *may_change})
    if finished:
        remedy = f"choose another --run_dir to train again{replacing}"
        raise RunFinished(f"{run_dir}: this run is finished, its results are in finished.json; {remedy}")
    if started and not resume:
        remedy = f"continue it with --resume, or choose another --run_dir{replacing}"
        raise UserError(run_dir, "holds an unfinished run", remedy)


def _clear(run_dir: Path, checkpoint: Path) -> None:
    """Remove a run: what lies in its directory, and its checkpoints. A directory that holds no run is left alone."""
    if not (run_dir / "config.yaml").exists() or not (run_dir / "versions.json").exists():
        return
    (run_dir / "finished.json").unlink(missing_ok=True)  # first: half of a run must not look like a finished one
    for path in [*run_dir.iterdir(), checkpoint, *checkpoint.parent.glob("step_*.pth")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_run(run_dir: str | Path) -> Iterator[None]:
    """Make a run's directory and keep it to one process.

    Raises RunLocked where another process has it, OSError where it cannot be made.
    """
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(exclusive(run_dir, wait=False))
        except BlockingIOError:
            raise RunLocked(run_dir, "another process is training there", "choose another --run_dir") from None
        yield


def mark_finished(run_dir: str | Path, summary: dict[str, Any]) -> None:
    """Write finished.json: the run's last figures, and the sign that nothing is left to do."""
    write_text_atomic(Path(run_dir) / "finished.json", json.dumps(summary, indent=2, default=float) + "\n")


def plain_config(config: Any) -> dict[str, Any]:
    """A config dataclass as YAML writes it: tuples as lists."""
    values = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _stored_config(config: Any) -> dict[str, Any]:
    return {key: value for key, value in plain_config(config).items() if key not in HOW_IT_STARTED}


def is_same(stored: dict[str, Any], name: str, now: Any, config: Any) -> bool:
    """Whether a setting is as it was stored; one that is new since then, and off by default, changes nothing."""
    if name in stored:
        return stored[name] == now
    return now is None or now is False and getattr(type(config), name) is False


def _check_same_config(run_dir: Path, config: Any, may_change: set[str]) -> None:
    path, current = run_dir / "config.yaml", _stored_config(config)
    stored = load_yaml(path)
    if stored.keys() - {field.name for field in dataclasses.fields(config)}:
        remedy = "choose another --run_dir, or --overwrite"
        raise UserError(run_dir, "holds a run of another command or version", remedy)
    for key in current | stored:
        if key not in may_change and not is_same(stored, key, current.get(key), config):
            fault = f"{key} was {stored.get(key)} and is now {current.get(key)}"
            remedy = "give the old value, or choose another --run_dir"
            if key in LENGTHS:
                fault += "; a run cannot be made longer or shorter, as its schedules follow its length"
            raise UserError(path, fault, f"{remedy}, or replace the run with --overwrite")


def _versions(config: Any) -> dict[str, str | None]:
    """What ran: interpreter, platform, processor, packages (null where not installed), commit of this checkout."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    versions["processor"] = processor_name(getattr(config, "device", "cpu"))
    for package in ("torch", "numpy", "mujoco", "gymnasium", "ogbench", "dm_control"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    from model_kernels import chosen_kernels  # late, as it imports torch

    versions["kernels"] = chosen_kernels()
    versions["commit"] = _commit(Path(__file__).resolve().parent.parent)
    return versions


def _commit(folder: Path) -> str | None:
    """The code's commit, 12 digits, with a + where code was changed since; None where there is none."""
    git = functools.partial(subprocess.check_output, cwd=folder, stderr=subprocess.DEVNULL, text=True, timeout=10)
    try:
        top, commit = git(["git", "rev-parse", "--show-toplevel", "--short=12", "HEAD"]).splitlines()
        changed = git(["git", "diff", "--name-only", "HEAD", "--", "*.py"])
    except (OSError, subprocess.SubprocessError):
        return None
    # A folder that was unpacked inside some other repository has no commit of its own.
    return commit + "+" * bool(changed) if Path(top).resolve() == folder else None


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the last one of a run's directory."""
    path = Path(path)
    return path / LAST if path.is_dir() else path
