"""The processes of a comparison: each run is one, on this machine or a Ray cluster's.

A run's directory gains output.log, everything its processes printed, and attempts.json, when each one began, how long
it took, how it ended. A process dies with the one that started it (on Linux), so that no run goes on unseen.

On Ray, run directories and this checkout lie on a file system that every node shares, at the same path.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runs.directory import hold_run
from utils import UserError, one_line, write_text_atomic

HELD = "another process is training there"  # hold_run's words
STOP_SECONDS = 20  # from an interrupt to a kill
INTERRUPTED = 130  # exit code of Ctrl-C
HELD_SECONDS = 120  # how long a Ray task waits for a directory that a lost node's process may still hold
LINGER_SECONDS = 30  # how long Ctrl-C waits for a cluster's tasks
PROBE_SECONDS = 5, 45  # for a connection to an address, and for Ray's answer behind it


@dataclass
class Job:
    """One run to be started: where, by which words after `python`, and with which variables."""

    run_dir: str
    command: list[str]
    environment: dict[str, str]


@dataclass
class Outcome:
    """How a process ended. `code` is its exit code, -9 and so on for a signal, None where its node was lost."""

    code: int | None
    line: str  # the last error that it printed, or its last line
    seconds: float

    @property
    def held(self) -> bool:
        """It gave way to another process in its directory."""
        return self.code == 2 and HELD in self.line


# ----------------------------------------------------------------------------------------------------------------
# Notes in a run's directory
# ----------------------------------------------------------------------------------------------------------------


def read_attempts(run_dir: str | Path) -> list[dict[str, Any]]:
    """The processes that worked on a run: began (ISO time), seconds, code and line; the last two None while it runs.

    A process that was killed together with its parent has no end; its seconds reach to the last thing it wrote.
    """
    run_dir = Path(run_dir)
    try:
        attempts = json.loads((run_dir / "attempts.json").read_text())
        for attempt in attempts:
            if attempt["seconds"] is None:
                written = [run_dir / name for name in ("output.log", "training/metrics.csv", "finished.json")]
                last = max(path.stat().st_mtime for path in written if path.exists())
                began = datetime.datetime.fromisoformat(attempt["began"]).timestamp()
                attempt["seconds"] = max(last - began, 0.0)
        return attempts
    except (OSError, ValueError, KeyError, TypeError):
        return []


def seconds_spent(run_dir: str | Path) -> float | None:
    """Seconds over all processes of a run, or None where no comparison ran it."""
    attempts = read_attempts(run_dir)
    return sum(attempt["seconds"] for attempt in attempts) if attempts else None


def _write_attempts(run_dir: Path, attempts: list[dict[str, Any]]) -> None:
    write_text_atomic(run_dir / "attempts.json", json.dumps(attempts, indent=1) + "\n")


def last_error(log: Path, start: int = 0) -> str:
    """The last `error: ...` line of an output.log from a byte on, or its last line."""
    with contextlib.suppress(OSError):
        with open(log, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 20_000, start))
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        if lines:
            return one_line((errors or lines)[-1].removeprefix("error: "))
    return "it printed nothing"


def is_held(run_dir: str | Path) -> bool:
    """Whether some process trains in a run's directory. Raises UserError where the directory cannot be made."""
    try:
        with hold_run(run_dir):
            return False
    except UserError as error:
        if HELD in str(error):
            return True
        raise


def processor(command: list[str]) -> str:
    """Model of what a command trains on here: the first NVIDIA GPU unless it is told `--device cpu`, else the CPU."""
    wants_cpu = ("--device", "cpu") in zip(command, command[1:], strict=False)
    sources = [] if wants_cpu else [(path, "Model:") for path in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    for path, key in [*sources, (Path("/proc/cpuinfo"), "model name")]:
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                if line.startswith(key):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------------------------
# One process
# ----------------------------------------------------------------------------------------------------------------


# What a child does before it becomes the command, given its parent's id: ask Linux to be killed when that ends, unless
# it has ended by now. Elsewhere an orphan trains on, and a repeated comparison waits for it.
GUARD = """
import ctypes, os, signal, sys
if sys.platform.startswith("linux"):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class RunProcess:
    """A started run. Its session is its own, so that Ctrl-C in a terminal reaches the comparison alone."""

    def __init__(self, job: Job, environment: dict[str, str] | None = None):
        self.run_dir, self.ended, self.stopped = Path(job.run_dir), False, False
        self.run_dir.mkdir(parents=True, exist_ok=True)
        began = datetime.datetime.now().astimezone()
        attempts = read_attempts(self.run_dir)
        attempt = {"began": began.isoformat(), "seconds": None, "code": None, "line": None}
        self.attempts = [*attempts, attempt | {"processor": processor(job.command)}]
        _write_attempts(self.run_dir, self.attempts)
        self.began = time.monotonic()
        with open(self.run_dir / "output.log", "ab") as log:
            words = shlex.join(["python", *job.command])
            log.write(f"\n--- {began:%Y-%m-%d %H:%M:%S} on {socket.gethostname()}: {words}\n".encode())
            self.start = log.tell()
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, "-c", GUARD, str(os.getpid()), *job.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | job.environment | (environment or {}),
                start_new_session=True,
            )

    def poll(self) -> Outcome | None:
        """The outcome once it has ended."""
        code = self.process.poll()
        if code is None:
            return None
        if self.stopped and code != 0:  # by us, and in whatever it was doing: no failure
            code = INTERRUPTED
        line = "" if code in (0, INTERRUPTED) else last_error(self.run_dir / "output.log", self.start)
        outcome = Outcome(code, line, self.seconds())
        if not self.ended:
            self.ended = True
            self.attempts[-1] |= {"seconds": round(outcome.seconds, 1), "code": code, "line": outcome.line}
            _write_attempts(self.run_dir, self.attempts)
        return outcome

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def interrupt(self) -> None:
        """Ctrl-C for the run, which ends at its last checkpoint."""
        if self.process.poll() is None:
            self.stopped = True
            self.process.send_signal(signal.SIGINT)

    def end(self, seconds: float = STOP_SECONDS) -> None:
        """Wait so long, then kill it with all that it started."""
        try:
            self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.poll()


# ----------------------------------------------------------------------------------------------------------------
# Many processes: on this machine, or on a Ray cluster
# ----------------------------------------------------------------------------------------------------------------


class LocalPool:
    """So many runs at once on this machine; where it has several GPUs (`devices`), each run gets one in turn."""

    def __init__(self, jobs: int, devices: list[str]):
        self.jobs, self.devices = jobs, devices
        self.running: dict[int, tuple[Any, RunProcess]] = {}

    def room(self) -> bool:
        """Whether one more can start."""
        return len(self.running) < self.jobs

    def start(self, key: Any, job: Job) -> None:
        """Start a run; `poll` gives its key back with its outcome."""
        place = min(set(range(self.jobs)) - set(self.running))
        chosen = {"CUDA_VISIBLE_DEVICES": self.devices[place % len(self.devices)]} if len(self.devices) > 1 else {}
        self.running[place] = (key, RunProcess(job, chosen))

    def poll(self) -> Iterator[tuple[Any, Outcome]]:
        """Those that have ended since the last call."""
        for place, (key, process) in list(self.running.items()):
            outcome = process.poll()
            if outcome is not None:
                del self.running[place]
                yield key, outcome

    def stop(self) -> None:
        """Interrupt all, and wait for them; whatever happens meanwhile, none is left running."""
        processes = [process for _, process in self.running.values()]
        try:
            for process in processes:
                process.interrupt()
            deadline = time.monotonic() + STOP_SECONDS
            for process in processes:
                process.end(deadline - time.monotonic())
        finally:
            for process in processes:
                process.end(0)
            self.running.clear()


def execute(job: dict[str, Any]) -> dict[str, Any]:
    """A Ray task: run a Job (as a dict) to its end; returns its Outcome as a dict. A cancelled task stops the run."""
    deadline = time.monotonic() + HELD_SECONDS
    while is_held(job["run_dir"]) and time.monotonic() < deadline:
        time.sleep(1)
    process = RunProcess(Job(**job))
    try:
        while (outcome := process.poll()) is None:
            time.sleep(0.5)
        return asdict(outcome)
    finally:
        process.interrupt()
        process.end()


class RayPool:
    """Runs as tasks of a Ray cluster, which starts a task anew on another node when its worker is lost.

    Args:
        address: host:port of the cluster's head, ray://host:port, or auto for the one on this machine.
        jobs: tasks that are submitted at once; None for as many as there are.
        cpus, gpus: what a task takes of a node; a fraction of a GPU lets several share it. gpus None takes 0.25 where
            the cluster has any.
        retries: how often Ray starts a task anew.

    Raises UserError where Ray is missing, nobody answers or the cluster has no such node.
    """

    def __init__(self, address: str, jobs: int | None, cpus: int, gpus: float | None, retries: int):
        try:
            import ray
        except ImportError:
            raise UserError("--backend ray: needs the package ray: pip install -r requirements/cluster.txt") from None
        probe(address)
        self.ray, self.jobs, self.running = ray, jobs, {}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = gpus if gpus is not None else 0.25 if any(node.get("GPU") for node in nodes) else 0.0
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            ray.shutdown()
            raise UserError(
                f"--address {address}: no node has --threads {cpus} CPU cores and --gpus_per_run {gpus:g} of a GPU; "
                "lower them"
            )
        root = str(Path(__file__).resolve().parent)

        # Inside a function, so that Ray sends the code itself: this module cannot be imported there before the path is.
        def task(job: dict[str, Any]) -> dict[str, Any]:
            sys.path.insert(0, root)
            import comparison_jobs

            return comparison_jobs.execute(job)

        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(task)

    def room(self) -> bool:
        """Whether one more is to be submitted."""
        return self.jobs is None or len(self.running) < self.jobs

    def start(self, key: Any, job: Job) -> None:
        """Submit a run; `poll` gives its key back with its outcome."""
        self.running[self.task.remote(asdict(job))] = (key, time.monotonic())

    def poll(self) -> Iterator[tuple[Any, Outcome]]:
        """Those that have ended since the last call."""
        if not self.running:
            return
        ready, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        for reference in ready:
            key, began = self.running.pop(reference)
            try:
                outcome = Outcome(**self.ray.get(reference))
            except self.ray.exceptions.RayError as error:
                outcome = Outcome(None, f"Ray: {one_line(error)[:300]}", time.monotonic() - began)
            yield key, outcome

    def stop(self) -> None:
        """Cancel all, wait for them, and leave the cluster."""
        try:
            for reference in self.running:
                self.ray.cancel(reference)
            if self.running:
                self.ray.wait(list(self.running), num_returns=len(self.running), timeout=LINGER_SECONDS)
        finally:
            self.running.clear()
            self.ray.shutdown()


def probe(address: str) -> None:
    """Raise UserError where no Ray cluster answers at an address, in seconds; ray.init itself would try for minutes."""
    remedy = "start one with `ray start --head`, or give the address that it printed"
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--address {address}: must be host:port, ray://host:port, or auto")
        faults = [_connection_fault(name, int(port)) for name in _names(host)]
        if all(faults):
            raise UserError(f"--address {address}: no Ray cluster answers there ({faults[0]}); {remedy}")
    code = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)"
    try:
        command = [sys.executable, "-c", code, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS[1])
        fault = "" if done.returncode == 0 else one_line((done.stderr.strip().splitlines() or ["no message"])[-1])
    except subprocess.TimeoutExpired:
        fault = f"no answer in {PROBE_SECONDS[1]} seconds"
    if fault:
        raise UserError(f"--address {address}: no Ray cluster answers there ({fault[:200]}); {remedy}")


def _names(host: str) -> list[str]:
    """What Ray may understand a host as: it takes loopback for this machine's address in its network."""
    import ray

    return [host, ray.util.get_node_ip_address()] if host in ("localhost", "127.0.0.1") else [host]


def _connection_fault(host: str, port: int) -> str:
    """Why nothing accepts a connection there, or nothing."""
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS[0]).close()
        return ""
    except (OSError, OverflowError) as error:
        return one_line(error)
