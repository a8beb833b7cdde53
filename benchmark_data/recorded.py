"""A dataset's rows in one form, whatever its benchmark, and the simulator that they are held against."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import d4rl_utils
import dmc_utils
import ogbench_utils
from dataset_files import Dataset, read_npz, whole_returns

FAULT, NOTE = "fault", "note"
BENCHMARKS = (ogbench_utils.MazeDataset, d4rl_utils.D4RLDataset, dmc_utils.WalkerDataset)


class Simulator:
    """The environment of a dataset, put into recorded states.

    A state holds MuJoCo's positions and velocities. Attributes: env, observation_dim, in_maze, place (goes to a float64
    state), padding (zeros before and after an observation that make it a state, None where it does not show the whole
    state).
    """

    def __init__(self, dataset: Dataset):
        self.env: Any = dataset.make_env()
        self.env.reset(seed=0)
        (self.observation_dim,) = self.env.observation_space.shape
        self.in_maze, robot = "maze" in dataset.id, self.env.unwrapped
        if isinstance(dataset, dmc_utils.WalkerDataset):
            size, self.place = dmc_utils.PHYSICS_DIM, robot.set_physics
        else:
            nq, nv = robot.model.nq, robot.model.nv
            size = nq + nv
            self.place = lambda state: robot.set_state(*np.split(state, [nq]))
        # A runner's observation leaves out x, on which nothing depends, and a point's its velocity, which is set to
        # zero in each step. An ant's is the state; a humanoid's and the walker study's are other numbers.
        self.padding = {0: (0, 0), 1: (1, 0), 2: (0, 2)}.get(size - self.observation_dim)

    def step(self, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Observations [n, obs_dim] and rewards [n] of one step from each state; nan where the physics diverge."""
        observations, rewards = np.full((len(states), self.observation_dim), np.nan), np.full(len(states), np.nan)
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
    arrays = dataset.read(path)
    flags = {key: arrays.pop(key) for key in ("terminals", "timeouts") if key in arrays}
    data = Data(dataset, simulator, flags=flags, **arrays)
    if simulator.padding is None:  # a humanoid's
        states = read_npz(path, (), ("qpos", "qvel"))
        data.states = np.hstack(list(states.values())) if len(states) == 2 else None
    return data


def _read_walker(path: Path, dataset: Dataset, simulator: Simulator) -> Data:
    paths = dmc_utils.episode_paths(path)
    episodes = [dmc_utils.read_episode(file) for file in paths]
    columns = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}
    ends = np.arange(len(columns["reward"])) % (dmc_utils.EPISODE_STEPS + 1) == dmc_utils.EPISODE_STEPS
    # A row of these files holds the action that led to it.
    actions, rewards = np.roll(columns["action"], -1, axis=0), np.roll(columns["reward"][:, 0], -1)
    data = Data(dataset, simulator, columns["observation"], actions, {"timeouts": ends}, rewards)
    data.states, data.files = columns["physics"], [file.name for file in paths]
    return data
