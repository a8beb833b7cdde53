"""What runs of a comparison will take: by finished ones of the same settings, else by a short trial on this machine."""

from __future__ import annotations

import collections
import functools
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from comparison.jobs import seconds_spent
from offline_data import make_env
from utils import resolve_device

# Settings that do not decide how long an update takes.
OTHERS = {"env", "seed", "run_dir", "w2_weights", "max_timesteps", "resume", "dataset_dir", "lr"}
MORE_BYTES = 2_000_000  # of a run beside its checkpoint: metrics, episodes, curves


def typical_seconds(work: Callable[[], Any], calls: int) -> float:
    """Median seconds of a call after five others: what stops the process for a while moves it little."""
    taken = []
    for _ in range(5 + calls):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[5:])


@functools.cache
def measure_env(env: str, dataset_dir: str | None) -> tuple[tuple[int, int, float], float]:
    """Sizes of observation and action with the largest action, and seconds of an episode at full length."""
    environment = make_env(env, dataset_dir)

    def step() -> None:
        _, _, terminated, truncated, _ = environment.step(environment.action_space.sample())
        if terminated or truncated:
            environment.reset(seed=0)

    try:
        space, (action_dim,) = environment.action_space, environment.action_space.shape
        environment.reset(seed=0)
        limit = getattr(environment.spec, "max_episode_steps", None) or 1000
        sizes = (environment.observation_space.shape[0], action_dim, float(space.high.max()))
        return sizes, limit * typical_seconds(step, 50)
    finally:
        environment.close()


def trial(run: Any, sizes: tuple[int, int, float]) -> tuple[float, int]:
    """Measured seconds of one update on made-up transitions, and bytes of a checkpoint.

    On one thread: several wait for each other wherever other processes keep the cores busy, and add little elsewhere.
    """
    config, (observation_dim, action_dim, _) = run.config, sizes
    device, threads, n = resolve_device(config.device), torch.get_num_threads(), config.batch_size
    agent = run.system.make_agent(config, sizes, torch.Generator(device).manual_seed(0), device)
    shapes = {"observations": (n, observation_dim), "next_observations": (n, observation_dim), "rewards": (n,)}
    batch = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    batch |= {"actions": torch.rand(n, action_dim, device=device), "terminated": torch.zeros(n, device=device)}
    try:
        torch.set_num_threads(1)
        taken = typical_seconds(lambda: float(agent.update(batch)["critic_loss"]), 15)  # waits for the device
    finally:
        torch.set_num_threads(threads)
    buffer = io.BytesIO()
    torch.save(agent.state_dict(), buffer)
    return taken, buffer.tell()


def kind_of(run: Any) -> str:
    """What decides how long an update takes, but for the dataset's sizes."""
    settings = {name: value for name, value in vars(run.config).items() if name not in OTHERS}
    return repr((run.algorithm, len(run.config.w2_weights), settings))


class Estimate:
    """Seconds and bytes of runs."""

    def __init__(self, finished: list):
        self.guessed = 0  # runs
        self.trials: dict[Any, tuple[float, int]] = {}
        self.known: dict[str, list[tuple[float, int]]] = collections.defaultdict(list)  # of an update, of a run
        for run in finished:
            if seconds := seconds_spent(run.run_dir):
                size = sum(path.stat().st_size for path in run.run_dir.rglob("*") if path.is_file())
                self.known[kind_of(run)].append((seconds / run.config.max_timesteps, size))

    def of(self, run: Any) -> tuple[float, int]:
        """Seconds of the whole run, and its bytes."""
        config, kind = run.config, kind_of(run)
        if pairs := self.known.get(kind):
            rates, files = zip(*pairs, strict=True)
            return config.max_timesteps * sum(rates) / len(rates), sum(files) // len(files)
        self.guessed += 1
        sizes, episode = measure_env(config.env, config.dataset_dir)
        if (sizes, kind) not in self.trials:
            self.trials[sizes, kind] = trial(run, sizes)
        update, checkpoint = self.trials[sizes, kind]
        evaluations = config.max_timesteps // config.eval_freq + config.final_runs
        episodes = 2 * len(config.w2_weights) * config.eval_episodes * evaluations
        return config.max_timesteps * update + episodes * episode, checkpoint + MORE_BYTES

    def source(self, runs: int) -> str:
        """What the figures of so many runs come from."""
        if not self.guessed:
            return "This is what finished runs of this comparison took."
        which = "This is" if self.guessed == runs else f"For {self.guessed} of the {runs} runs this is"
        return f"{which} a guess from a short trial of one thread on this machine."


def in_bytes(size: float) -> str:
    """1200000 as 1.2 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def in_time(seconds: float) -> str:
    """In seconds, minutes, hours or days."""
    for length, word in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {word}"
    return f"{seconds:.0f} seconds"
