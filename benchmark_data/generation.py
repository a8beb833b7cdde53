"""The machinery of make_dataset.py: episodes made side by side, files that appear whole, and a manifest.

A family (maze, D4RL, walker) knows its ids and how their files are made. What is the same for all of them is here:

    family.write(plan, stage)  ->  hash the files  ->  move them into place  ->  write the manifest

Files without their manifest do not count as a dataset, so whatever a kill leaves behind is never taken for one. They
may be someone's own, and are replaced with --overwrite only.
"""

import abc
import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import utils
from benchmark_data import experts
from dataset_files import sha256
from offline_data import find_dataset
from utils import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


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

    @property
    def dataset(self) -> Any:
        return find_dataset(self.dataset_id)


class Family(abc.ABC):
    """Datasets of one benchmark that can be made here."""

    ids: tuple[str, ...]  # each begins with local/
    unit: str  # what Plan.size counts, the flag's name without num_: episodes or transitions
    size: int  # Plan.size where none is asked for

    def default_size(self, dataset_id: str) -> int:
        return self.size

    @abc.abstractmethod
    def policies(self, dataset_id: str, experts_dir: Path) -> list[Path]:
        """The policy files that the recipe needs."""

    @abc.abstractmethod
    def write(self, plan: Plan, stage: Path) -> dict[str, Any]:
        """Write the files into the empty folder `stage` as they shall lie below the manifest's folder.

        Returns what the manifest says of them: recipe (a sentence), episodes, transitions, returns (see
        `experts.describe_returns`, None where there are none), and how often goals were reached.
        """


def run_tasks(
    function: Callable[[Task], Result], tasks: list[Task], plan: Plan, unit: str = "episode"
) -> Iterator[Result]:
    """function(task) for each task, in order, by `plan.jobs` processes behind a bar; UserError where one was killed."""
    results = map(function, tasks) if plan.jobs == 1 else _side_by_side(function, tasks, plan.jobs)
    return utils.progress(results, plan.dataset_id, total=len(tasks), unit=unit, disable=not plan.progress)


def _side_by_side(function: Callable[[Task], Result], tasks: list[Task], jobs: int) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks that torch may hold
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        try:
            yield from pool.map(function, tasks)
        except BrokenProcessPool:
            raise UserError("a worker was killed, probably out of memory; use fewer --jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Prepare a worker process: it leaves Ctrl-C to its parent, and ends when the parent was killed."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # idle workers share the queue's both ends: they would wait for ever

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def make(family: Family, plan: Plan, dataset_dir: str | os.PathLike | None, overwrite: bool = False) -> Path:
    """Make a dataset and return its main file or folder; one that is there already is kept.

    Raises UserError for policies that are missing, a folder that cannot be written, and, unless `overwrite`, for
    another dataset of the same id (seed, size or policies differ) and for files in its place that have no manifest.
    """
    policies = family.policies(plan.dataset_id, plan.experts_dir)
    for path in policies:
        experts.read_policy(path)  # else it is told now
    plan = dataclasses.replace(plan, policies=tuple((path.name, sha256(path)) for path in policies))
    target, folder = plan.dataset.paths(dataset_dir)[0], plan.dataset.manifest_path(dataset_dir).parent
    try:
        if _already_made(family, plan, dataset_dir, overwrite):
            if plan.progress:
                print(f"{plan.dataset_id}: already at {target}", file=sys.stderr)
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with alone_making(target):
            if _already_made(family, plan, dataset_dir, overwrite):  # by another, while this one waited
                return target
            for path in () if overwrite else plan.dataset.paths(dataset_dir):
                if path.is_file() or any(path.rglob("*")):  # perhaps someone's own
                    fault, remedy = "is there without a complete dataset's manifest", "choose another --dataset_dir"
                    raise UserError(f"{path} {fault}; move it away, replace it with --overwrite or {remedy}")
            _write_dataset(family, plan, dataset_dir)
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); choose another --dataset_dir") from None
    return target


@contextlib.contextmanager
def alone_making(target: Path) -> Iterator[None]:
    """Keep a dataset to this process; wait for another that makes it, and say so. Others of the folder go on."""
    lock = target.with_name(f".{target.name}.lock")
    if not lock.exists():  # another user's can be held, but not touched
        lock.touch()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(utils.exclusive(lock, wait=False))
        except BlockingIOError:
            print(f"{target}: waiting for another process that makes it", file=sys.stderr, flush=True)
            stack.enter_context(utils.exclusive(lock))
        yield


def _already_made(family: Family, plan: Plan, dataset_dir: str | os.PathLike | None, overwrite: bool) -> bool:
    """Whether this very dataset is there. Raises UserError when another one is, unless it may be replaced."""
    manifest, target = plan.dataset.manifest(dataset_dir), plan.dataset.paths(dataset_dir)[0]
    if manifest is None:
        return False
    count, policies = f"num_{family.unit}", dict(plan.policies)
    if (manifest.get("seed"), manifest.get(count), manifest.get("policies")) == (plan.seed, plan.size, policies):
        return True
    if not overwrite:
        others = "" if manifest.get("policies") == policies else " and made by other policies"
        raise UserError(
            f"{target} holds {manifest.get(count)} {family.unit} of seed {manifest.get('seed')}{others}, not "
            f"{plan.size} of seed {plan.seed}; replace it with --overwrite or choose another --dataset_dir"
        )
    return False


def _write_dataset(family: Family, plan: Plan, dataset_dir: str | os.PathLike | None) -> None:
    manifest_path = plan.dataset.manifest_path(dataset_dir)
    stage = manifest_path.with_name(f".{manifest_path.stem}.tmp")
    shutil.rmtree(stage, ignore_errors=True)  # a run that was killed may have left it
    began = time.perf_counter()
    try:
        stage.mkdir()
        facts = family.write(plan, stage)
        files = {}
        for path in sorted(path for path in stage.rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            files[path.relative_to(stage).as_posix()] = entry
        manifest_path.unlink(missing_ok=True)  # from here until it is written there is no complete dataset
        for path in stage.iterdir():
            place = manifest_path.with_name(path.name)
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(path, place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    manifest = {"id": plan.dataset_id, "seed": plan.seed, f"num_{family.unit}": plan.size, **facts}
    manifest |= {"policies": dict(plan.policies), "files": files, "versions": _versions()}
    manifest["seconds"] = round(time.perf_counter() - began, 2)
    utils.write_text_atomic(manifest_path, json.dumps(manifest, indent=2) + "\n")


def _versions() -> dict[str, str]:
    """What the bytes depend on beside the plan: packages, and the processor, for which BLAS chooses its arithmetic."""
    packages = ("numpy", "mujoco", "gymnasium", "ogbench", "dm_control", "h5py")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    versions["blas"] = f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
    return versions | {"cpu": utils.processor_name()}
