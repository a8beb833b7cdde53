"""The base of every run: settings, a directory of its own, random streams, a checkpoint to continue from, a log."""

import abc
import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_kernels import KernelConfig, use_kernels
from runs import directory
from runs.cli import marked
from runs.metrics import MetricLogger
from utils import MAY_CHANGE, Basic, MayChange, RandomStreams, UserError, Whole, resolve_device, warn

SAVE_SECONDS = 60.0  # after which the next row of metrics is saved too, where evaluations lie farther apart


@dataclass
class RunConfig:
    seed: Basic[Whole] = 0  # seed of initialisation, sampling, noise and evaluation, each a stream of its own
    run_dir: Basic[MayChange[str | None]] = None  # directory of the run; default: one named by the settings, in logs/
    resume: Basic[bool] = False  # continue the run from its last checkpoint
    overwrite: Basic[bool] = False  # replace the run that is in the directory by a new one
    tensorboard: MayChange[bool] = True  # write TensorBoard events
    wandb_project: MayChange[str | None] = None  # also log to Weights & Biases (requirements/tracking.txt)


@dataclass
class DeviceRunConfig(RunConfig, KernelConfig):
    device: Basic[MayChange[str]] = "auto"  # auto (a GPU if there is one), cpu, cuda or cuda:<index>


class Run(contextlib.AbstractContextManager):
    """One run in a directory that no other process trains in. Close it at the end.

    A command says how: `check`, `default_run_dir`, `load_data`, `build`, `load_state`, `step`. They are called in the
    order of `__init__` and `open`. Raises UserError where the run cannot begin or go on, and RunFinished where it is
    finished.
    """

    step: int  # updates, or what else rows of metrics.csv count
    q_bound = math.inf  # mean Q beyond this, either way, has diverged: see `largest_q`
    best_value = math.inf  # mean Q of the data's actions above this overrates them: see `data_values`

    def __init__(self, config: RunConfig):
        self.check(config)
        self.run_dir, self.checkpoint = self.default_run_dir(config), self.checkpoint_path(config)
        # Whether the run may begin or go on, before the data is made or loaded, and without writing anything.
        directory.check_run(self.run_dir, config, self.may_change(config), self.checkpoint)
        for folder in filter(Path.is_dir, {self.run_dir.resolve(), self.checkpoint.parent}):
            with directory.lock_run(folder):
                pass
        self.config, self.device = config, self.choose_device(config)
        self.data_facts: dict[str, Any] = {}  # of the data that is loaded, for versions.json (`offline_data.made_here`)
        self.streams, self.resources = RandomStreams(config.seed, self.device), contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            opening.push(self)  # closes it, unless all went well
            self.load_data()
            self.open()
            opening.pop_all()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt) and self.checkpoint.is_file():
            error.args = ("the same command with --resume, without --overwrite, continues from the last checkpoint",)
        self.close()

    def open(self) -> None:
        """Lock the directory, build what is trained, continue from the checkpoint if there is one, open the log."""
        config = self.config
        for folder in {self.run_dir.resolve(), self.checkpoint.parent}:
            self.resources.enter_context(directory.lock_run(folder))
        checkpoint = directory.prepare_run(
            self.run_dir, config, self.may_change(config), self.checkpoint, self.data_facts
        )
        self.build()
        if checkpoint is not None:
            self.load(checkpoint)
            print(f"continues from step {self.step:,}")
        trackers = (config.tensorboard, config.wandb_project, config, self.wandb_labels())
        self.logger = MetricLogger(self.log_dir(), self.step if checkpoint else None, *trackers)
        self.resources.callback(self.logger.close)
        self.started(self.step if checkpoint else None)
        self.save_at = time.monotonic() + SAVE_SECONDS

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Save it. A save between evaluations is due a minute later, or when a large one takes 5% of the time."""
        began = time.monotonic()
        directory.save_checkpoint(self.checkpoint, state)
        ended = time.monotonic()
        self.save_at = ended + max(SAVE_SECONDS, 20 * (ended - began))

    def is_save_due(self) -> bool:
        """Asked where a row of metrics ends, from where a run can go on."""
        return time.monotonic() >= self.save_at

    def close(self) -> None:
        """Release the directory, the environments and the log; closing twice is harmless."""
        self.resources.close()

    @classmethod
    def choose_device(cls, config: DeviceRunConfig) -> torch.device:
        """Where it trains, with the kernels that the settings ask for."""
        device = resolve_device(config.device)
        use_kernels(config, device)
        return device

    # -- what a command defines --------------------------------------------------------------------------------------

    @classmethod  # noqa: B027  many runs need no check
    def check(cls, config: RunConfig) -> None:
        """UserError for settings that cannot work together; each one alone is within its range."""

    @classmethod
    @abc.abstractmethod
    def default_run_dir(cls, config: RunConfig) -> Path:
        """The directory that the settings name, or the usual one."""

    @abc.abstractmethod
    def load_data(self) -> None:
        """Load what is trained on, and set `data_facts` where there is any; nothing is locked or written yet."""

    @abc.abstractmethod
    def build(self) -> None:
        """Make what is trained, freshly initialised, at step 0."""

    @abc.abstractmethod
    def load_state(self, path: Path, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's content. Whatever it raises for another model's becomes one UserError line."""

    def started(self, resume_step: int | None) -> None:  # noqa: B027  most runs need nothing
        """The log is open: open what else goes on from `resume_step`, None for a new run."""

    def log_dir(self) -> Path:
        """Where metrics.csv lies."""
        return self.run_dir

    def wandb_labels(self) -> dict[str, str | None]:
        """Further arguments of wandb.init, as `name` and `group`."""
        return {}

    @classmethod
    def checkpoint_path(cls, config: RunConfig) -> Path:
        """Where the run's checkpoint lies."""
        return cls.default_run_dir(config).resolve() / "checkpoints" / "last.pth"

    @classmethod
    def may_change(cls, config: RunConfig) -> set[str]:
        """Settings that may differ when the run is resumed: those that are marked."""
        return marked(type(config), MAY_CHANGE)

    # -- shared ------------------------------------------------------------------------------------------------------

    def model_config(self) -> dict[str, Any]:
        """The settings that make this run what it is; where and how long it goes on are not among them."""
        others = marked(type(self.config), MAY_CHANGE) | directory.HOW_IT_STARTED | {"checkpoint_dir"}
        return {name: value for name, value in directory.plain_config(self.config).items() if name not in others}

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; UserError where it is damaged, another run's or another model's."""
        state, own = directory.load_checkpoint(path, self.device), self.model_config()
        with directory.expecting(path, "a checkpoint of this model", "choose another --run_dir"):
            theirs = state["config"]
            other = next((name for name in own if theirs.get(name) != own[name]), None)
            if other is not None:
                fault = f"checkpoint of another run ({other} {theirs.get(other)}, here {own[other]})"
                raise UserError(path, fault, "choose another --run_dir or --checkpoint_dir")
            self.load_state(path, state)

    def check_metrics(self, metrics: dict[str, float], remedy: str = "lower the learning rates") -> None:
        """UserError where the run has diverged.

        A word, once, where the mean Q of the data's actions has passed every return that the data hold.
        """
        if metrics.get("q_data", -math.inf) > self.best_value:
            warn(
                f"Q of the data's actions is {metrics['q_data']:.4g} at update {self.step}, and no return "
                f"of the data is above {self.best_value:.4g}: actor 0 is not to be trusted, its weight is too small"
            )
            self.best_value = math.inf
        for name, value in metrics.items():
            finite, is_q = math.isfinite(value), name == "q_data" or name.endswith(("/q", "_q"))
            if finite and not (is_q and abs(value) > self.q_bound):
                continue
            fault = f"{name} is {value:.4g} at update {self.step}"
            if finite:
                fault += f", beyond the limit of {self.q_bound:.4g} (--q_limit)"
            raise UserError(self.run_dir, fault, remedy)


def part_of(total: int, done: int) -> str:
    """`1,000`, or `the last 400 of 1,000` where that is what was done since the run was resumed."""
    return f"{total:,}" if done == total else f"the last {done:,} of {total:,}"


def largest_q(rewards: np.ndarray, discount: float, limit: float = 10.0) -> float:
    """`limit` times the largest discounted return, either way, that rewards like these [N] allow."""
    return limit * float(np.abs(rewards).max()) / (1 - discount)


def data_values(
    rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, discount: float
) -> tuple[float, float]:
    """Mean and largest discounted return from a row to the end of its episode; all [N] in order, discount below 1.

    An episode that was cut, as the last one is, goes on for ever with its mean reward. One of fewer than 1 / (1 -
    discount) rows, as the file's end may leave, says too little for the largest, where there are others.
    """
    values, rows, telling = np.empty(len(rewards)), rewards.tolist(), np.ones(len(rewards), bool)
    ends = np.flatnonzero(terminated | truncated).tolist()
    start = 0
    for end in ends if ends and ends[-1] == len(rows) - 1 else [*ends, len(rows) - 1]:
        value = 0.0 if terminated[end] else float(np.mean(rows[start : end + 1])) / (1 - discount)
        telling[start : end + 1] = terminated[end] or (end + 1 - start) * (1 - discount) >= 1
        for row in range(end, start - 1, -1):
            value = rows[row] + discount * value
            values[row] = value
        start = end + 1
    return float(values.mean()), float(values[telling if telling.any() else slice(None)].max())
