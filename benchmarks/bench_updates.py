"""Updates a second of four algorithms, OPSO's stages and the Decision Transformer, against another checkout.

    python benchmarks/bench_updates.py
    git worktree add ../before 7e105a0
    python benchmarks/bench_updates.py --base ../before

Each checkout computes in a process of its own, update_worker.py; they take turns, only one works at a time, and
medians are printed: processor time with one thread on a CPU, else wall time. Without --base there is no peer, and the
table alone is printed.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.turns import claim
from benchmarks.update_worker import UPDATES
from runs.cli import parse_config, run_cli
from utils import Count, UserError, one_line, progress, resolve_device, warn


@dataclass
class BenchUpdatesConfig:
    base: str | None = None  # another checkout of this repository, the peer
    updates: tuple[str, ...] = tuple(UPDATES)  # which of them
    calls: Count = 3  # updates in a turn
    repeats: Count = 7  # turns of each; the median is printed
    small: bool = False  # tiny batches, to try the script
    threads: Count = 1  # CPU threads
    device: str = "cpu"  # cpu, cuda or auto


class Worker:
    """A process that makes one checkout's updates."""

    def __init__(self, checkout: str, device: str, config: BenchUpdatesConfig):
        command = [sys.executable, str(ROOT / "benchmarks" / "update_worker.py")]
        command += [checkout, device, str(config.small), str(config.threads)]
        self.checkout = checkout
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, name: str, calls: int) -> float:
        """Time of so many updates. Raises UserError where the checkout cannot make them."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"name": name, "calls": calls}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{name} of {self.checkout}: its process died, see above")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"{name} of {self.checkout}: {one_line(answer['error'])}")
        return answer["seconds"]


@contextlib.contextmanager
def start_workers(config: BenchUpdatesConfig) -> Iterator[dict[str, Worker]]:
    """A worker for this checkout, `ours`, and for the other one, `base`; ended at the end."""
    device = str(resolve_device(config.device))
    checkouts = {"ours": str(ROOT)} | ({"base": config.base} if config.base else {})
    if config.base and not (Path(config.base) / "offline_agent.py").is_file():
        raise UserError(f"--base {config.base}: not a checkout of this repository")
    workers = {who: Worker(checkout, device, config) for who, checkout in checkouts.items()}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.process.stdin.close()
            worker.process.kill()
            worker.process.wait()


def median_rates(name: str, workers: dict[str, Worker], config: BenchUpdatesConfig) -> dict[str, float]:
    """Updates a second of each worker, which take turns."""
    times: dict[str, list[float]] = {who: [] for who in workers}
    for turn in range(config.repeats + 1):
        for who, worker in workers.items():
            taken = worker.seconds(name, config.calls)
            if turn:  # the first one warms up
                times[who].append(max(taken, 1e-9) / config.calls)
    return {who: 1 / float(np.median(taken)) for who, taken in times.items()}


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchUpdatesConfig, argv, __doc__)
    if unknown := set(config.updates) - set(UPDATES):
        raise UserError(f"--updates {unknown.pop()}: choose among {', '.join(UPDATES)}")
    closing = []
    with start_workers(config) as workers:
        print("| update | whose | ms | updates/s |\n|---|---|---|---|")
        for name in progress(config.updates, "updates"):
            try:
                rates = median_rates(name, workers, config)
            except UserError as error:  # the others are worth having without this one
                warn(f"left out: {error}")
                continue
            for who, rate in rates.items():
                print(f"| {name} | {who} | {1e3 / rate:.1f} | {rate:.2f} |", flush=True)
            if "base" in rates:
                closing.append(claim(f"{name}s_per_second_against_base", rates["ours"], rates["base"]))
    print("\n".join(closing))


if __name__ == "__main__":
    run_cli(main)
