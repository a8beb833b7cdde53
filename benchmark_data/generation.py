"""The machinery of make_dataset.py: episodes made side by side, files that appear whole, and a manifest.

A family (maze, D4RL, walker) knows its ids, where their files go and how an episode is made. What is the same for all
of them is here:

    family.write(plan, stage)  ->  hash the files  ->  move them into place  ->  write the manifest

Files without their manifest do not count as a dataset, so whatever a kill leaves behind is never taken for one. They
may be someone's own, and are replaced with --overwrite only.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import utils
from benchmark_data import experts
from dataset_files import read_manifest, sha256
from offline_data import find_dataset
from utils import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 8  # tasks in flight for each process


@dataclass(frozen=True)
class Plan:
    """One dataset to make.

    With the same versions its bytes depend on the id, the size, the seed and the policies (with their cards) alone, on
    any x86-64 processor that has AVX2.
    """

    dataset_id: str  # local/...
    size: int  # how many of the family's unit
    seed: int
    experts_dir: Path  # folder of the policy files
    jobs: int = 1  # processes
    progress: bool = True  # show a bar
    policies: tuple[tuple[str, str], ...] = ()  # (file name, SHA-256) of each policy, which `make` fills in


class Family(abc.ABC):
    """Datasets of one benchmark that can be made here."""

    title: str  # of the benchmark
    ids: tuple[str, ...]  # each begins with local/
    unit: str  # what Plan.size counts, the flag's name without num_: episodes or transitions

    @abc.abstractmethod
    def default_size(self, dataset_id: str) -> int:
        """Plan.size where none is asked for."""

    def official_size(self, dataset_id: str) -> int | None:
        """Plan.size of the benchmark's own file, None where that is not known here."""
        return None

    @abc.abstractmethod
    def policies(self, dataset_id: str, experts_dir: Path) -> list[Path]:
        """The policy files that the recipe needs."""

    @abc.abstractmethod
    def write(self, plan: Plan, stage: Path) -> dict[str, Any]:
        """Write the files into the empty folder `stage` as they shall lie below the manifest's folder.

        Returns what the manifest says of them: recipe (a sentence), episodes, transitions, returns (see
        `experts.describe_returns`, None where there are none), and what else tells how they came about.
        """


# ----------------------------------------------------------------------------------------------------------------
# Episodes side by side
# ----------------------------------------------------------------------------------------------------------------


def run_tasks(function: Callable[[Task], Result], tasks: Iterable[Task], jobs: int) -> Iterator[Result]:
    """function(task) for each task, in order, computed by `jobs` processes.

    Only a few tasks are in flight, so `tasks` may be endless; closing the iterator stops the work. With more than
    one process, function and tasks must be picklable. Raises UserError where a process was killed.
    """
    if jobs == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks that torch may hold
    source = iter(tasks)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        try:
            waiting = collections.deque(pool.submit(function, task) for task in itertools.islice(source, jobs * _AHEAD))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, task) for task in itertools.islice(source, 1))
        except BrokenProcessPool:
            raise UserError("a worker was killed, probably out of memory; use fewer --jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Prepare a worker process: it leaves Ctrl-C to its parent, and ends when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Idle workers share the queue's both ends, so a dead parent alone would leave them waiting for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def warn_unplayed(plan: Plan, unit: str, names: Iterable[str]) -> None:
    """Say which of a recipe's actors a dataset of this size had no room for."""
    if names := list(names):
        utils.warn(
            f"{plan.dataset_id}: {plan.size} {unit} are too few for the whole recipe; without {', '.join(names)}; "
            f"ask for more with --num_{unit}"
        )


# ----------------------------------------------------------------------------------------------------------------
# Files and manifest
# ----------------------------------------------------------------------------------------------------------------


def make(family: Family, plan: Plan, dataset_dir: str | os.PathLike | None, overwrite: bool = False) -> Path:
    """Make a dataset and return its main file or folder; one that is there already is kept.

    Raises UserError for numbers out of range, policies that are missing or another robot's, a folder that cannot be
    written, and, unless `overwrite`, for another dataset of the same id (seed, size or policies differ) and for files
    in its place that have no manifest.
    """
    for name, value, least in ((f"num_{family.unit}", plan.size, 1), ("seed", plan.seed, 0), ("jobs", plan.jobs, 1)):
        if value < least:
            raise UserError(f"--{name} {value}: at least {least} is needed")
    dataset = find_dataset(plan.dataset_id)
    target, manifest_path = dataset.paths(dataset_dir)[0], dataset.manifest_path(dataset_dir)
    policies = {path.name: _hash_policy(path) for path in family.policies(plan.dataset_id, plan.experts_dir)}
    plan = dataclasses.replace(plan, policies=tuple(policies.items()))
    if _already_made(family, plan, policies, target, manifest_path, overwrite):
        if plan.progress:
            print(f"{plan.dataset_id}: already at {target}", file=sys.stderr)
        return target
    try:
        manifest_path.parent.mkdir(parents=True, exist_ok=True)
        with hold_dataset(plan.dataset_id, manifest_path):
            # Another run may have made it while this one waited.
            if not _already_made(family, plan, policies, target, manifest_path, overwrite):
                _write_dataset(family, plan, target, manifest_path, overwrite)
    except OSError as error:
        if error.errno in utils.DISK_FULL:
            raise
        raise UserError(
            f"{manifest_path.parent}: cannot write there ({error.strerror}); choose another --dataset_dir"
        ) from None
    return target


@contextlib.contextmanager
def hold_dataset(dataset_id: str, manifest_path: Path) -> Iterator[None]:
    """Keep one dataset's place to this process; wait for another that has it, and say so.

    The lock is on a hidden file beside the manifest, which names its holder. It goes with the process, so a killed
    one blocks nobody.
    """
    path = manifest_path.with_name(f".{manifest_path.stem}.lock")
    descriptor = _lock(path, dataset_id)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, dataset_id: str) -> int:
    """A descriptor of the locked file."""
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 100, 0).decode(errors="replace") or "another process"
                print(f"{dataset_id}: waiting for {holder}, which makes it", file=sys.stderr, flush=True)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:  # some network file systems have no locks
                return descriptor
            # Who held it deletes it at the end: the lock counts only on the file that still has the name.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _already_made(
    family: Family, plan: Plan, policies: dict[str, str], target: Path, manifest_path: Path, overwrite: bool
) -> bool:
    """Whether this very dataset is there. Raises UserError when another one is, unless it may be replaced."""
    manifest = read_manifest(manifest_path, plan.dataset_id)
    if manifest is None:
        return False
    count = f"num_{family.unit}"
    if (manifest.get("seed"), manifest.get(count), manifest.get("policies")) == (plan.seed, plan.size, policies):
        return True
    if overwrite:
        return False
    others = "" if manifest.get("policies") == policies else " and made by other policies"
    raise UserError(
        f"{target} holds {manifest.get(count)} {family.unit} of seed {manifest.get('seed')}"
        f"{others}, not {plan.size} of seed {plan.seed}; replace it with --overwrite or choose another --dataset_dir"
    )


def _write_dataset(family: Family, plan: Plan, target: Path, manifest_path: Path, overwrite: bool) -> None:
    """Make the files in a folder of their own, move them into place, write the manifest."""
    stage = manifest_path.with_name(f".{manifest_path.stem}.tmp")
    shutil.rmtree(stage, ignore_errors=True)  # a run that was killed may have left it
    if not overwrite:
        _refuse_unknown_files(target, [], manifest_path.parent)  # before the work
    began = time.perf_counter()
    try:
        stage.mkdir()
        facts = family.write(plan, stage)
        about = facts.pop("files", {})
        paths = sorted(path for path in stage.rglob("*") if path.is_file())
        files = {path.relative_to(stage).as_posix(): _describe(path) for path in paths}
        for name, more in about.items():
            files[name] = more | files[name]
        if not overwrite:
            _refuse_unknown_files(target, files, manifest_path.parent)
        _move_files(stage, files, target, manifest_path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    manifest = {"id": plan.dataset_id, "seed": plan.seed, f"num_{family.unit}": plan.size, **facts}
    manifest |= {"policies": dict(plan.policies), "files": files, "versions": _versions()}
    manifest["seconds"] = round(time.perf_counter() - began, 2)
    utils.write_text_atomic(manifest_path, json.dumps(manifest, indent=2) + "\n")


def _move_files(stage: Path, files: Iterable[str], target: Path, manifest_path: Path) -> None:
    """Put the files of `stage` in the place of what is there."""
    manifest_path.unlink(missing_ok=True)  # from here until it is written there is no complete dataset
    if target.is_dir():
        shutil.rmtree(target)
    for name in files:
        final = manifest_path.parent / name
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / name, final)


def _refuse_unknown_files(target: Path, files: Iterable[str], folder: Path) -> None:
    """Raise UserError where files would be lost that may be someone's own."""
    paths = {target, *target.rglob("*"), *(folder / name for name in files)}
    there = sorted(path for path in paths if path.is_symlink() or path.is_file())
    if there:
        raise UserError(
            f"{there[0]} is there without a complete dataset's manifest; move it away, replace it with --overwrite or "
            "choose another --dataset_dir"
        )


def _describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file, which is on the disk when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _hash_policy(path: Path) -> str:
    """SHA-256 of a policy file. Raises UserError for one that is missing, damaged or not what its name says."""
    if not path.is_file():
        raise experts.missing_policy(path)
    experts.read_named_policy(path)
    return sha256(path)


def _versions() -> dict[str, str]:
    """What the bytes depend on beside the plan: packages, and the processor, for which BLAS chooses its arithmetic."""
    packages = ("numpy", "mujoco", "gymnasium", "ogbench", "dm_control", "h5py")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    versions["blas"] = f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
    return versions | {"cpu": utils.processor_name()}
