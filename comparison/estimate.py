"""What runs of a comparison will take: by finished ones of the same kind, else by a short trial on this machine."""

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


def typical_seconds(work: Callable[[], Any], seconds: float, warm_up: int = 10, least: int = 5) -> float:
    """Median seconds of a call, after a warm-up: what stops the process for a while moves it little."""
    for _ in range(warm_up):
        work()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < least or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


@functools.cache
def sizes(env: str, dataset_dir: str | None) -> tuple[int, int, float, int, float]:
    """Numbers of an environment: observation and action size, largest action, steps of an episode, seconds a step."""
    environment = make_env(env, dataset_dir)

    def step() -> None:
        _, _, terminated, truncated, _ = environment.step(environment.action_space.sample())
        if terminated or truncated:
            environment.reset(seed=0)

    try:
        observation_dim, (action_dim,) = environment.observation_space.shape[0], environment.action_space.shape
        environment.reset(seed=0)
        seconds = typical_seconds(step, 0.1, least=50)
        limit = getattr(environment.spec, "max_episode_steps", None) or 1000
        return observation_dim, action_dim, float(environment.action_space.high.max()), limit, seconds
    finally:
        environment.close()


def trial(run: Any, seconds: float = 1.0) -> tuple[float, int]:
    """Measured seconds of one update on made-up transitions, and bytes of a checkpoint.

    On one thread: several wait for each other wherever other processes keep the cores busy, and add little elsewhere.
    """
    config = run.config
    observation_dim, action_dim, max_action, *_ = sizes(config.env, config.dataset_dir)
    device, before = resolve_device(config.device), torch.get_num_threads()
    generator, n = torch.Generator(device).manual_seed(0), config.batch_size
    agent = run.system.make_agent(config, (observation_dim, action_dim, max_action), generator, device)
    shapes = {"observations": (n, observation_dim), "next_observations": (n, observation_dim), "rewards": (n,)}
    batch = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    batch |= {"actions": torch.rand(n, action_dim, device=device), "terminated": torch.zeros(n, device=device)}
    try:
        torch.set_num_threads(1)
        taken = typical_seconds(lambda: float(agent.update(batch)["critic_loss"]), seconds)  # waits for the device
    finally:
        torch.set_num_threads(before)
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
        self.trials: dict[Any, tuple[float, int]] = {}
        self.guessed = 0  # runs
        self.known: dict[Any, list[tuple[float, int]]] = collections.defaultdict(list)
        for run in finished:
            if seconds := seconds_spent(run.run_dir):
                size = sum(path.stat().st_size for path in run.run_dir.rglob("*") if path.is_file())
                for key in ((run.config.env, kind_of(run)), kind_of(run)):
                    self.known[key].append((seconds / run.config.max_timesteps, size))

    def of(self, run: Any) -> tuple[float, int]:
        """Seconds of the whole run, and its bytes."""
        config, actors, kind = run.config, len(run.config.w2_weights), kind_of(run)
        pairs = self.known.get((config.env, kind)) or self.known.get(kind)
        if pairs:
            rates, files = zip(*pairs, strict=True)
            return config.max_timesteps * sum(rates) / len(rates), sum(files) // len(files)
        self.guessed += 1
        *shape, limit, step = sizes(config.env, config.dataset_dir)
        key = (*shape, kind)
        if key not in self.trials:
            self.trials[key] = trial(run)
        update, checkpoint = self.trials[key]
        evaluations = config.max_timesteps // config.eval_freq
        episodes = 2 * actors * config.eval_episodes * (evaluations + config.final_runs)
        rows = config.max_timesteps // config.log_freq + evaluations
        size = checkpoint + 400_000 + 2 * rows * (12 * actors + 20) * 20 + episodes * 70
        return config.max_timesteps * update + episodes * limit * step, size

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
