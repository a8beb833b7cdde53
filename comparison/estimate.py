"""What runs of a comparison will take: by finished ones of the same settings, else by a short trial on this machine."""

from __future__ import annotations

import collections
import io
import statistics
import time
from typing import Any

import torch

from comparison.jobs import seconds_spent
from utils import resolve_device

# Settings that do not decide how long an update takes.
OTHERS = {"env", "seed", "run_dir", "w2_weights", "max_timesteps", "resume", "dataset_dir", "lr"}
SIZES = (17, 6, 1.0)  # of a trial: observation, action and largest action, whose sizes change little
WARM_UP, CALLS = 5, 15  # updates of a trial
MORE_BYTES = 2_000_000  # of a run beside its checkpoint: metrics, episodes, curves


def trial(run: Any) -> tuple[float, int]:
    """Seconds of one update on made-up transitions, the median of a few, and bytes of a checkpoint.

    On one thread: several wait for each other wherever other processes keep the cores busy, and add little elsewhere.
    """
    config, device, threads = run.config, resolve_device(run.config.device), torch.get_num_threads()
    agent = run.system.make_agent(config, SIZES, torch.Generator(device).manual_seed(0), device)
    n, taken = config.batch_size, []
    batch = {name: torch.randn(n, SIZES[0], device=device) for name in ("observations", "next_observations")}
    batch |= {name: torch.zeros(n, device=device) for name in ("rewards", "terminated")}
    batch["actions"] = torch.rand(n, SIZES[1], device=device)
    torch.set_num_threads(1)
    for _ in range(WARM_UP + CALLS):
        began = time.perf_counter()
        float(agent.update(batch)["critic_loss"])  # waits for the device
        taken.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    buffer = io.BytesIO()
    torch.save(agent.state_dict(), buffer)
    return statistics.median(taken[WARM_UP:]), buffer.tell() + MORE_BYTES


class Estimate:
    """Seconds and bytes of runs."""

    def __init__(self, finished: list):
        self.guessed = 0  # runs
        self.known: dict[str, list[tuple[float, int]]] = collections.defaultdict(list)  # of an update, and of a run
        for run in finished:
            if seconds := seconds_spent(run.run_dir):
                size = sum(path.stat().st_size for path in run.run_dir.rglob("*") if path.is_file())
                self.known[self.kind(run)].append((seconds / run.config.max_timesteps, size))
        self.tried: dict[str, tuple[float, int]] = {}

    @staticmethod
    def kind(run: Any) -> str:
        """What decides how long an update takes, but for the dataset's sizes."""
        settings = {name: value for name, value in vars(run.config).items() if name not in OTHERS}
        return repr((run.algorithm, len(run.config.w2_weights), settings))

    def of(self, run: Any) -> tuple[float, int]:
        """Seconds of the whole run, and its bytes."""
        kind = self.kind(run)
        if kind not in self.known:
            self.guessed += 1
            self.tried[kind] = self.tried.get(kind) or trial(run)
        rates, sizes = zip(*(self.known.get(kind) or [self.tried[kind]]), strict=True)
        return run.config.max_timesteps * sum(rates) / len(rates), sum(sizes) // len(sizes)

    def source(self, runs: int) -> str:
        """What the numbers of so many runs come from."""
        if not self.guessed:
            return "This is what finished runs of this comparison took."
        which = "This is" if self.guessed == runs else f"For {self.guessed} of the {runs} runs this is"
        return f"{which} a guess from a short trial of one thread on this machine, without evaluations."


def in_bytes(size: float) -> str:
    """1200000 as 1.2 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def in_time(seconds: float) -> str:
    """In seconds, minutes, hours or days."""
    for length, word in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {word}"
    return f"{seconds:.0f} seconds"
