"""What every system shares: errors, devices, random streams, progress, files that are never half-written, replay.

Nothing here knows an algorithm or a benchmark.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from tqdm import tqdm


class LateImport:
    """Stands for a module, which is imported when something of it is first used."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch
else:  # torch takes a second to import: `--help` and `make_dataset.py --list` do without
    torch = LateImport("torch")

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# -- Errors -----------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Bad input, told in one line: where it is (a file, key or flag), what is wrong there, and what to do about it.

    Code that must tell errors apart asks for a subclass, or reads the three parts; nothing reads the line.
    """

    exit_code = 2

    def __init__(self, where: object, fault: str = "", remedy: str = ""):
        super().__init__(where, fault, remedy)
        self.where, self.fault, self.remedy = str(where), fault, remedy

    def __str__(self) -> str:
        return self.where + (f": {self.fault}" if self.fault else "") + (f"; {self.remedy}" if self.remedy else "")


class RunLocked(UserError):
    """Another process trains in the run's directory."""

    exit_code = 3


class ProcessDied(Exception):
    """A process that works for this one was killed or crashed: no fault of the input, and worth another try."""


class RunFinished(Exception):
    """The run directory holds a finished run of these settings: nothing is left to do."""


def one_line(text: object) -> str:
    """The text with every run of white space, line breaks included, as one space."""
    return " ".join(str(text).split())


def did_you_mean(name: str, known: Iterable[str], shown: str = "{!r}") -> str:
    """The end of an error line: the known name that is near, where there is one, written as `shown` has it."""
    spelled = {other.lower(): other for other in known}
    near = difflib.get_close_matches(str(name).lower(), spelled, 1, 0.7)
    return f"; did you mean {shown.format(spelled[near[0]])}?" if near else ""


def counted(number: int, what: str = "episode") -> str:
    """`1 episode`, `10 episodes`."""
    return f"{number} {what}{'s' * (number != 1)}"


def warn(text: object) -> None:
    """Print one line `warning: ...` on stderr without tearing a progress bar."""
    tqdm.write(f"warning: {one_line(text)}", file=sys.stderr)


# -- Settings: what the type of a config dataclass's field says beside its type; the comment behind it is its help ----


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included."""

    least: float
    most: float
    below: float | None = None  # what the largest number is below, said instead of it


T = TypeVar("T")
MAY_CHANGE = "may change when the run is resumed"
MayChange = Annotated[T, MAY_CHANGE]
BASIC = "stands at the top of --help"
Basic = Annotated[T, BASIC]

Count = Annotated[int, Range(1, 10**9)]
Whole = Annotated[int, Range(0, 2**53)]
Workers = Annotated[int, Range(0, 256)]
Positive = Annotated[float, Range(1e-9, 1e9)]
NonNegative = Annotated[float, Range(0.0, 1e9)]
Number = Annotated[float, Range(-1e9, 1e9)]
Fraction = Annotated[float, Range(0.0, 1.0)]
PositiveFraction = Annotated[float, Range(1e-9, 1.0)]
BelowOne = Annotated[float, Range(0.0, 1 - 1e-9, below=1)]
PositiveBelowOne = Annotated[float, Range(1e-9, 1 - 1e-9, below=1)]


# -- Device, randomness, progress -------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:<index>` names; raises UserError where it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:\d{1,2})?", name):
        raise UserError(f"--device {name}: unknown device; use auto, cpu, cuda or cuda:<index>")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: no such CUDA device on this machine; use --device cpu or auto")
    return device


def processor_facts() -> dict[str, str]:
    """What Linux tells of the first CPU, as `model name`; empty elsewhere."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


def processor_name(device: str = "cpu") -> str:
    """Model of the processor behind a device."""
    place = resolve_device(device)
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return processor_facts().get("model name") or platform.processor() or platform.machine()


class RandomStreams:
    """The separate random streams of one run, spawned from one numpy SeedSequence.

    Because the streams are separate, evaluating more often or drawing other action noise changes no minibatch.
    """

    def __init__(self, seed: int, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        init, sampling, policy, evaluation, dropout = np.random.SeedSequence(seed).spawn(5)
        self.init_seed = _seed_from(init)  # for building networks, see `initialising`
        self.sampling = torch.Generator(self.device).manual_seed(_seed_from(sampling))  # minibatches and relabelling
        self.policy = torch.Generator(self.device).manual_seed(_seed_from(policy))  # action noise
        self.evaluation_seed = _seed_from(evaluation) % 2**31  # the same all through a run: every evaluation's episodes
        self.dropout_seed = _seed_from(dropout)  # for torch's global generators, the only ones that dropout draws from

    @contextlib.contextmanager
    def initialising(self) -> Iterator[None]:
        """Seed torch's global generators with init_seed inside the block and restore them after it."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.random.default_generator.manual_seed(self.init_seed)
            if devices:
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(self.init_seed)
            yield

    def state_dict(self) -> dict[str, int | torch.Tensor]:
        """Two ints and two uint8 tensors on the CPU."""
        return {
            "init_seed": self.init_seed,
            "sampling": self.sampling.get_state(),
            "policy": self.policy.get_state(),
            "evaluation_seed": self.evaluation_seed,
        }

    def load_state_dict(self, state: dict[str, int | torch.Tensor]) -> None:
        """Continue every stream exactly; raises UserError for the state of another kind of device."""
        if state["sampling"].numel() != self.sampling.get_state().numel():
            raise UserError(f"the checkpoint's generators are not for {self.device.type}: resume on the same --device")
        self.init_seed, self.evaluation_seed = state["init_seed"], state["evaluation_seed"]
        self.sampling.set_state(state["sampling"].cpu())
        self.policy.set_state(state["policy"].cpu())


def _seed_from(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1, np.uint64)[0])


def progress(iterable_or_total: Iterable | int, desc: str, **options: Any) -> tqdm:
    """A tqdm bar on stderr over an iterable, or a manual one of so many steps; into a file a line every ten seconds."""
    terminal = sys.stderr.isatty()
    shared = {
        "desc": desc,
        "file": sys.stderr,
        "dynamic_ncols": terminal,
        "ncols": None if terminal else 100,
        "mininterval": 0.2 if terminal else 10.0,
        "maxinterval": 10.0,
    } | options
    if isinstance(iterable_or_total, int):
        return tqdm(total=iterable_or_total, **shared)
    return tqdm(iterable_or_total, **shared)


# -- Files that are whole or absent -----------------------------------------------------------------------------------


def write_bytes_atomic(path: str | Path, data: bytes | memoryview) -> None:
    """Write beside the target, flush, rename: old file or new one, nothing else. Raises OSError that names the file."""
    path = Path(path)
    # One fixed temporary name: what a kill left behind is overwritten by the next write instead of piling up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not know its file
        raise


def write_text_atomic(path: str | Path, text: str) -> None:
    write_bytes_atomic(path, text.encode())


@contextlib.contextmanager
def exclusive(path: str | Path, wait: bool = True) -> Iterator[None]:
    """Hold a folder or file; while another does, wait or raise BlockingIOError. The lock ends with the process."""
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(descriptor)


# -- Replay -----------------------------------------------------------------------------------------------------------


class ReplayBuffer:
    """A dataset's transitions in float32 on one device, to draw batches from.

    observations, next_observations [N, observation_dim]; actions [N, action_dim]; rewards, terminated, truncated [N].
    The two ends are kept apart: bootstrap through `truncated` only. An array that is float32 on the device already is
    shared, so that writing into one changes both. Raises ValueError where the row counts differ.
    """

    FIELDS = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")

    def __init__(self, observations, actions, rewards, next_observations, terminated, truncated, device="cpu"):
        self.device = torch.device(device)
        values = (observations, actions, rewards, next_observations, terminated, truncated)
        for name, value in zip(self.FIELDS, values, strict=True):
            if len(value) != len(observations):
                raise ValueError(f"{name} has {len(value)} rows, expected {len(observations)}")
            setattr(self, name, torch.as_tensor(value, dtype=torch.float32, device=self.device))

    def __len__(self) -> int:
        return len(self.observations)

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Rows drawn with replacement by a generator on the buffer's device: field -> [batch_size, ...]."""
        rows = torch.randint(len(self), (batch_size,), generator=generator, device=self.device)
        return {name: getattr(self, name).index_select(0, rows) for name in self.FIELDS}


class EpisodeReplay:
    """The last episodes of an agent: a ring of slots of `max_steps` transitions, in float32 on one device.

    An episode of T transitions holds T + 1 states; slot k starts at row k * (max_steps + 1):

        row                0   1   2   3  | 4   5   6   7       max_steps = 3, episodes of 2 and 3 transitions
        states            s0  s1  s2   .  | s0  s1  s2  s3
        actions           a0  a1   .   .  | a0  a1  a2   .
        episode_end        2   2   2   .  | 7   7   7   7       inclusive: the row of the last state
        transitions       [0, 1, 4, 5, 6]                       rows that start a transition

    Attributes: states [rows, state_dim], actions [rows, action_dim], episode_end [rows] int64, transitions [M] int64.
    """

    def __init__(self, num_episodes: int, max_steps: int, state_dim: int, action_dim: int, device="cpu"):
        self.num_episodes, self.width, self.device = num_episodes, max_steps + 1, torch.device(device)
        rows = num_episodes * self.width
        self.states = torch.zeros(rows, state_dim, device=self.device)
        self.actions = torch.zeros(rows, action_dim, device=self.device)
        self.episode_end = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.lengths = [0] * num_episodes  # transitions in each slot
        self.added = 0  # episodes so far
        self._index()

    def _index(self) -> None:
        self.transitions = self._rows(with_last=False)

    def _rows(self, with_last: bool) -> torch.Tensor:
        """The rows that start a transition; with each episode's last one, those of all states."""
        slots = [(slot * self.width, length) for slot, length in enumerate(self.lengths) if length]
        rows = [torch.arange(first, first + length + with_last, device=self.device) for first, length in slots]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        return len(self.transitions)

    def add(self, states: torch.Tensor, actions: torch.Tensor) -> None:
        """One episode, over the oldest: states [T + 1, state_dim], actions [T, action_dim], 1 <= T <= max_steps."""
        steps = len(actions)
        slot = self.added % self.num_episodes
        first = slot * self.width
        self.states[first : first + steps + 1] = states
        self.actions[first : first + steps] = actions
        self.episode_end[first : first + steps + 1] = first + steps
        self.lengths[slot] = steps
        self.added += 1
        self._index()

    def state_dict(self) -> dict[str, Any]:
        """The filled rows, slot by slot, and where the ring stands."""
        filled = self._rows(with_last=True)
        kept = {"states": self.states[filled], "actions": self.actions[filled]}
        return {"added": self.added, "lengths": torch.tensor(self.lengths), **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the episodes of a replay of the same sizes."""
        self.added, self.lengths = int(state["added"]), [int(length) for length in state["lengths"]]
        for slot, length in enumerate(self.lengths):
            self.episode_end[slot * self.width : slot * self.width + length + 1] = slot * self.width + length
        filled = self._rows(with_last=True)
        self.states[filled] = state["states"].to(self.device)
        self.actions[filled] = state["actions"].to(self.device)
        self._index()


def expectile_loss(prediction: torch.Tensor, target: torch.Tensor, expectile: float) -> torch.Tensor:
    """Squared error, weighted `expectile` where the target is above the prediction and 1 - expectile below."""
    error = target - prediction
    return torch.where(error > 0, expectile, 1 - expectile) * error.square()


def n_step_target(steps: torch.Tensor, span: torch.Tensor, discount: float, value: torch.Tensor) -> torch.Tensor:
    """Value target [...]: discount^(k-1) where the goal comes after k <= span steps, else discount^span * value.

    steps to the goal and span [...] int64; value [...] of the states after span steps, clamped to [0, 1].
    """
    known = discount ** (torch.minimum(steps, span) - 1).float()
    return torch.where(steps <= span, known, discount**span * value.clamp(0, 1))


LEAST_VALUE = 1e-3  # V is too coarse below this to count steps: 688 of them at discount 0.99
MAX_WEIGHT = 20.0


def steps_by_value(value: torch.Tensor, discount: float) -> torch.Tensor:
    """Steps to the goal by a value, which is discount^(k-1) where k remain: at least 1, at most LEAST_VALUE's."""
    return 1 + value.clamp(LEAST_VALUE, 1).log() / math.log(discount)


def advantage_weight(advantage: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp(temperature * advantage), capped: the weights of advantage-weighted regression (Peng et al., 2019)."""
    return torch.exp(temperature * advantage).clamp(max=MAX_WEIGHT)
