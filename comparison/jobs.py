"""The processes of a comparison: each run is one, on this machine; comparison/ray.py has the same for a Ray cluster.

A run's directory gains output.log, everything its processes printed, and attempts.json, when each one began, how long
it took, how it ended. A process dies with the one that started it (on Linux), so that no run goes on unseen.
"""

import contextlib
import datetime
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs.directory import lock_run
from utils import RunLocked, UserError, one_line, write_text_atomic

BAD_INPUT, INTERRUPTED = UserError.exit_code, 130  # exit codes
STOP_SECONDS = 20  # from an interrupt to a kill
POLL_SECONDS = 0.1


@dataclass
class Job:
    """One run to be started: where, by which words after `python`, and with which variables."""

    run_dir: str
    command: list[str]
    environment: dict[str, str]


@dataclass
class Outcome:
    """How a process ended."""

    code: int | None  # exit code, -9 and so on for a signal, None where its node was lost
    line: str  # the last error that it printed, or its last line


# -- Notes in a run's directory ---------------------------------------------------------------------------------------


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


def updates_done(run_dir: Path) -> int:
    for path in (run_dir / "training" / "metrics.csv", run_dir / "metrics.csv"):
        with contextlib.suppress(OSError, ValueError, IndexError), open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 20_000, 0))
            return int(float(file.read().split(b"\n")[:-1][-1].split(b",")[0]))
    return 0


def describe_state(run_dir: Path, finished: bool) -> str:
    """finished, cut at some update, or not started; and how the last process ended if that was not well."""
    if finished:
        return "finished"
    attempts, done = read_attempts(run_dir), updates_done(run_dir)
    line = f" ({attempts[-1]['line']})" if attempts and attempts[-1]["code"] not in (None, 0, INTERRUPTED) else ""
    return f"cut at update {done:,}{line}" if done else f"failed{line}" if line else "not started"


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


def is_locked(run_dir: str | Path) -> bool:
    """Whether some process trains in a run's directory, which is made. Raises OSError where it cannot be."""
    try:
        with lock_run(run_dir):
            return False
    except RunLocked:
        return True


# -- Processes --------------------------------------------------------------------------------------------------------


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


def execute(job: Job, stop: threading.Event | None = None) -> Outcome:
    """Run a job to its end; once `stop` is set or this thread is interrupted, to its last checkpoint."""
    run_dir, stop = Path(job.run_dir), stop or threading.Event()
    run_dir.mkdir(parents=True, exist_ok=True)
    now, began = datetime.datetime.now().astimezone(), time.monotonic()
    attempt = {"began": now.isoformat(), "seconds": None, "code": None, "line": None}
    attempts = [*read_attempts(run_dir), attempt]
    write_text_atomic(run_dir / "attempts.json", json.dumps(attempts, indent=1) + "\n")
    with open(run_dir / "output.log", "ab") as log:
        words = shlex.join(["python", *job.command])
        log.write(f"\n--- {now:%Y-%m-%d %H:%M:%S} on {socket.gethostname()}: {words}\n".encode())
        start = log.tell()
        log.flush()
        process = subprocess.Popen(
            [sys.executable, "-c", GUARD, str(os.getpid()), *job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | job.environment,
            start_new_session=True,  # Ctrl-C in a terminal reaches the comparison alone
        )
    try:
        while process.poll() is None and not stop.wait(POLL_SECONDS):
            pass
    finally:
        stopped = end(process)
        code = INTERRUPTED if stopped and process.returncode else process.returncode  # by us: no failure
        line = "" if code in (0, INTERRUPTED) else last_error(run_dir / "output.log", start)
        attempts[-1] |= {"seconds": round(time.monotonic() - began, 1), "code": code, "line": line}
        write_text_atomic(run_dir / "attempts.json", json.dumps(attempts, indent=1) + "\n")
    return Outcome(code, line)


def end(process: subprocess.Popen) -> bool:
    """Interrupt a process that still runs, and kill it with all that it started if it does not end; whether it ran."""
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGINT)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return True


class Pool:
    """So many runs at once. Subclasses say where: `submit` gives the Future of a job's Outcome, `stop` ends all."""

    verb = "running"
    lost: tuple[type[Exception], ...] = ()  # what a run's Future raises where its machine is lost

    def __init__(self, jobs: int | None):
        self.jobs = jobs  # None for no limit
        self.running: dict[Future, Any] = {}

    def room(self) -> bool:
        return self.jobs is None or len(self.running) < self.jobs

    def start(self, key: Any, job: Job) -> None:
        """Start a run; `poll` gives its key back with its outcome."""
        self.running[self.submit(job)] = key

    def poll(self) -> Iterator[tuple[Any, Outcome]]:
        """Those that have ended since the last call."""
        for future in [future for future in self.running if future.done()]:
            key = self.running.pop(future)
            try:
                yield key, future.result()
            except OSError as error:  # of its directory: a full disk, no permission
                yield key, Outcome(BAD_INPUT, one_line(error))
            except self.lost as error:
                yield key, Outcome(None, one_line(error)[:300])


class LocalPool(Pool):
    """On this machine; where it has several GPUs (`devices`), each run gets one in turn."""

    def __init__(self, jobs: int, devices: list[str]):
        super().__init__(jobs)
        self.devices, self.places = devices, {}  # Future -> which of the jobs it is
        self.threads, self.stopping = ThreadPoolExecutor(jobs), threading.Event()

    def submit(self, job: Job) -> Future:
        place = min(set(range(self.jobs)) - {self.places[future] for future in self.running})
        if len(self.devices) > 1:
            job.environment["CUDA_VISIBLE_DEVICES"] = self.devices[place % len(self.devices)]
        future = self.threads.submit(execute, job, self.stopping)
        self.places[future] = place
        return future

    def stop(self) -> None:
        self.stopping.set()
        self.threads.shutdown()
