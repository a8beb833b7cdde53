"""A dataset's rows in one form, whatever its benchmark, and the simulator that they are held against."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import d4rl_utils
import dmc_utils
import ogbench_utils
from dataset_files import Dataset, whole_returns

FAULT, NOTE = "fault", "note"
BENCHMARKS = (ogbench_utils.MazeDataset, d4rl_utils.D4RLDataset, dmc_utils.WalkerDataset)


class Simulator:
    """The environment of a dataset, put into recorded states.

    A state holds MuJoCo's positions and velocities. Attributes: env, shape (numbers an observation and an action),
    in_maze, positions (how many numbers an observation begins with that say where the body is), place (goes to a
    float64 state), padding (zeros before and after an observation that make it a state, None where it does not show the
    whole state).
    """

    def __init__(self, dataset: Dataset):
        self.env: Any = dataset.make_env()
        self.env.reset(seed=0)
        self.shape = self.env.observation_space.shape + self.env.action_space.shape
        self.in_maze, robot = "maze" in dataset.id, self.env.unwrapped
        if isinstance(dataset, dmc_utils.WalkerDataset):
            size, self.positions, self.place = dmc_utils.PHYSICS_DIM, 15, robot.set_physics
        else:
            nq, nv = robot.model.nq, robot.model.nv
            size, self.positions = nq + nv, 2 if self.in_maze else nq - 1
            self.place = lambda state: robot.set_state(*np.split(state, [nq]))
        # A runner's observation leaves out x, on which nothing depends, and a point's its velocity, which is set to
        # zero in each step. An ant's is the state; a humanoid's and the walker study's are other numbers.
        self.padding = {0: (0, 0), 1: (1, 0), 2: (0, 2)}.get(size - self.shape[0])

    def step(self, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Observations [n, obs_dim] and rewards [n] of one step from each state; nan where the physics diverge."""
        observations, rewards = np.full((len(states), self.shape[0]), np.nan), np.full(len(states), np.nan)
        for row, (state, action) in enumerate(zip(states, actions, strict=True)):
            self.place(state.astype(np.float64))
            try:
                observations[row], rewards[row] = self.env.step(action)[:2]
            except RuntimeError:  # dm_control's, from a state that never was
                self.env.reset(seed=0)
        return observations, rewards

    def rebuild(self, observations: np.ndarray) -> np.ndarray:
        """States of observations [n, obs_dim]; nan where a runner's velocity may have been clipped."""
        states = np.pad(observations, ((0, 0), self.padding))
        if not self.in_maze:
            states[(np.abs(observations) == 10).any(axis=1)] = np.nan
        return states


@dataclass
class Data:
    """A dataset: the action of row t leads to row t + 1, but where row t ends an episode."""

    dataset: Any
    simulator: Simulator
    observations: np.ndarray  # [N, obs_dim] float32
    actions: np.ndarray  # [N, action_dim] float32
    flags: dict[str, np.ndarray]  # terminals, timeouts: [N] bool
    rewards: np.ndarray | None = None  # [N] float32
    next_observations: np.ndarray | None = None  # [N, obs_dim] float32, where the file has them
    states: np.ndarray | None = None  # [N, state_dim], of the file, where observations do not show them
    files: list[str] = field(default_factory=list)  # of the walker study, one an episode
    findings: list[tuple[str, str]] = field(default_factory=list)  # FAULT or NOTE, and a sentence

    @property
    def d4rl(self) -> bool:
        return isinstance(self.dataset, d4rl_utils.D4RLDataset)

    @property
    def goals(self) -> bool:
        """Whether terminals marks rows at the goal, after which the official files go on: D4RL's antmazes."""
        return self.d4rl and "antmaze" in self.dataset.id

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Rows that the file says end an episode, and the last one: [N] bool."""
        ends = np.logical_or.reduce([flag for name, flag in self.flags.items() if name == "timeouts" or not self.goals])
        ends[-1] = True
        return ends

    @functools.cached_property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.flatnonzero(self.ends[:-1]) + 1])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts, append=len(self.ends))

    @property
    def limit(self) -> int:
        """Rows an episode: at most (D4RL), or in each, as in all files of OGBench's mazes and the walker study."""
        return self.dataset.max_episode_steps if self.d4rl else int(np.bincount(self.lengths).argmax())

    def returns(self) -> np.ndarray | None:
        """Undiscounted returns of whole episodes, float64; None without rewards."""
        if self.rewards is None:
            return None
        terminals = self.flags.get("terminals", np.zeros(len(self.rewards), bool))
        return whole_returns(self.rewards, terminals, np.flatnonzero(self.ends), self.limit)

    def next(self, rows: np.ndarray) -> np.ndarray:
        """The observations that the file says the actions of rows lead to."""
        return self.observations[rows + 1] if self.next_observations is None else self.next_observations[rows]

    def at(self, rows: np.ndarray) -> str:
        """The first of these rows in words, and how many more there are."""
        episode = int(np.searchsorted(self.starts, rows[0], side="right")) - 1
        place = f"{self.files[episode]} row {rows[0] - self.starts[episode]}" if self.files else f"row {rows[0]:,}"
        return place if len(rows) == 1 else f"{place} and {len(rows) - 1:,} more"

    def fault(self, what: str) -> None:
        self.findings.append((FAULT, what))

    def note(self, what: str) -> None:
        self.findings.append((NOTE, what))


def read(path: Path, dataset: Dataset) -> Data:
    """Read a dataset's file or folder. Raises UserError for what its benchmark's loader refuses."""
    simulator = Simulator(dataset)
    if isinstance(dataset, dmc_utils.WalkerDataset):
        return _read_walker(path, dataset, simulator)
    d4rl = isinstance(dataset, d4rl_utils.D4RLDataset)
    # A maze's file without the last check of dataset.read, for jumps: the simulator tells what is wrong.
    arrays = dataset.read(path) if d4rl else ogbench_utils.load_arrays(path, simulator.shape)
    flags = {key: arrays.pop(key) for key in ("terminals", "timeouts") if key in arrays}
    data = Data(dataset, simulator, flags=flags, **arrays)
    with h5py.File(path, "r", locking=False) if d4rl else np.load(path) as file:
        _read_stored(data, file, *(("infos/qpos", "infos/qvel") if d4rl else ("qpos", "qvel")))
    return data


def _read_stored(data: Data, file: Mapping[str, Any], *state_keys: str) -> None:
    """What loaders leave aside: the states, and the types of what they cast."""
    for key in ("observations", "actions", "rewards", "next_observations"):
        if key in file and file[key].dtype != np.float32:
            # D4RL's own scripts leave float64 in antmaze's rewards, and in all of the medium-replay files.
            known = "replay" in data.dataset.id or data.goals and key == "rewards"
            known = known and data.d4rl and not data.dataset.local
            tail = "loaders cast it" if known else "another program wrote this file; take the original"
            (data.note if known else data.fault)(f"{key} is {file[key].dtype}, not float32: {tail}")
    if data.simulator.padding is None and all(key in file for key in state_keys):
        data.states = np.concatenate([file[key][()] for key in state_keys], axis=1)


def _read_walker(path: Path, dataset: Dataset, simulator: Simulator) -> Data:
    paths = [path] if path.is_file() else dmc_utils.episode_paths(path.parent if path.name == "data" else path)
    episodes = [dmc_utils.read_episode(file) for file in paths]
    columns = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}
    ends = np.arange(len(columns["reward"])) % (dmc_utils.EPISODE_STEPS + 1) == dmc_utils.EPISODE_STEPS
    # A row of these files holds the action that led to it.
    actions, rewards = np.roll(columns["action"], -1, axis=0), np.roll(columns["reward"][:, 0], -1)
    data = Data(dataset, simulator, columns["observation"], actions, {"timeouts": ends}, rewards)
    data.states, data.files = columns["physics"], [file.name for file in paths]
    return data
