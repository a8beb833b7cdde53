"""What the speed benchmarks share: contestants that take turns in one process, and the closing line of a claim."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class Contestant:
    """What is timed: `step()` makes `updates` updates, `wait()` returns when their results are there."""

    step: Callable[[], Any]
    updates: int = 1
    wait: Callable[[], Any] = lambda: None
    warmup: int = 5  # calls before anything is timed: caches, the capture of a CUDA graph (the fourth), compilation


def on_device(step: Callable[[], Any], device: torch.device) -> Contestant:
    """A contestant in PyTorch, one update a call."""
    return Contestant(step, 1, torch.cuda.synchronize if device.type == "cuda" else lambda: None)


def choose_clock(device: torch.device, threads: int) -> Callable[[], float]:
    """Processor time for one thread on a CPU, which other programs do not change; else wall time."""
    return time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter


def median_rates(
    contestants: dict[str, Contestant], turns: int, seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """Updates a second of each contestant: the median of its turns.

    Args:
        contestants: by name. They take turns, so that a machine whose speed drifts drifts for all of them.
        turns: of each.
        seconds: length of a turn; at least one call is made.
        clock: gives the time in seconds.
    """
    calls = {}
    for name, contestant in contestants.items():
        for _ in range(contestant.warmup):
            contestant.step()
        contestant.wait()
        calls[name] = max(1, int(seconds / max(_time(contestant, 1, clock), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, contestant in contestants.items():
            times[name].append(_time(contestant, calls[name], clock) / (calls[name] * contestant.updates))
    return {name: 1 / max(float(np.median(taken)), 1e-9) for name, taken in times.items()}


def _time(contestant: Contestant, calls: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(calls):
        contestant.step()
    contestant.wait()
    return clock() - began


def claim(name: str, ours: float, peer: float, note: str = "") -> str:
    """The closing line of a claim; rates, so that a ratio above 1 says that ours is faster. `note` follows ours."""
    return f"{name}: ours {ours:.1f}{note}, peer {peer:.1f}, ratio {ours / peer:.2f}"
