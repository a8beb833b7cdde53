"""Bodies that datasets record: how far their coordinates can move in a step, and what their rewards are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Motion:
    """How far some coordinates can depart from their velocity within a step.

    The departure of a coordinate q with velocity v is |q' - q - dt (v + v') / 2|: what acceleration and impacts do to
    the trapezoid rule. Without velocities it is the whole move. `slack` is the departure that no step reaches; the
    comments give the largest of good data.
    """

    word: str  # what the coordinates are, for the report
    q: tuple[int, ...]  # columns
    slack: float
    v: tuple[int, ...] = ()  # columns of their velocities
    dt: float = 0.0  # seconds a row
    column: str = "observations"  # the array that holds them

    def strain(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Largest departure from rows `before` to `after` [n, .] as a share of the slack: [n], nan where not finite."""
        move = after[:, self.q].astype(np.float64) - before[:, self.q]
        if self.v:
            move -= self.dt / 2 * (after[:, self.v].astype(np.float64) + before[:, self.v])
        strain = np.abs(move).max(axis=1) / self.slack
        return np.where(np.isfinite(strain), strain, np.nan)


@dataclass(frozen=True)
class VelocityReward:
    """reward = healthy + velocity - control_cost |a|^2, as Gymnasium's and D4RL's runners have it.

    The velocity of a step is (x' - x) / dt. x is not observed, and the mean of the velocities before and after the step
    stands for it; the last three numbers bound by how much that departs. The comments give the largest of good data.
    """

    velocity: int  # column of the observation
    control_cost: float
    healthy: float
    slack: float  # departure that no row reaches
    drift: float  # departure that the mean of 20 rows does not reach
    scale: float  # share by which rewards of a whole file do not grow with the motion faster or slower than they should


@dataclass(frozen=True)
class Robot:
    """What is known of the body that a dataset records."""

    name: str
    dims: tuple[int, int]  # numbers an observation and an action
    motions: tuple[Motion, ...]
    driven: tuple[int, ...] = (0, 1)  # columns of the observation that actions change at once
    turned: tuple[int, ...] = ()  # the column that each action pushes towards larger values
    maze: bool = False  # the first two numbers are a position in a maze
    reward: VelocityReward | None = None
    velocity_limit: float = np.inf  # to which observed velocities are clipped
    fallen: Callable[[np.ndarray], np.ndarray] | None = None  # observations [n, .] -> [n] bool, ends an episode


def _columns(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def _fallen_hopper(observations: np.ndarray) -> np.ndarray:
    return (observations[:, 0] <= 0.7) | (np.abs(observations[:, 1]) >= 0.2)


def _fallen_walker2d(observations: np.ndarray) -> np.ndarray:
    return ~((observations[:, 0] > 0.8) & (observations[:, 0] < 2.0) & (np.abs(observations[:, 1]) < 1.0))


_ANT_JOINTS = Motion("joint angles", _columns(7, 8), 1.0, _columns(21, 8), 0.1)  # 0.30
_WALKER_MOTIONS = (
    Motion("height", (14,), 0.15, (15,), 0.025),  # 0.037
    Motion("orientations", _columns(0, 14), 1.8),  # 1.2: a leg can turn that far in 25 ms
    Motion("height and x", (0, 1), 0.15, (9, 10), 0.025, "physics"),  # 0.037
    Motion("angles", _columns(2, 7), 2.0, _columns(11, 7), 0.025, "physics"),  # 0.61
)
ROBOTS = {
    # A point moves by a fifth of its action, |a| <= 1, each way; 0.24 where a wall pushes it.
    "pointmaze": Robot("point", (2, 2), (Motion("x, y", (0, 1), 0.5),), turned=(0, 1), maze=True),
    "antmaze": Robot(
        "ant",
        (29, 8),
        (Motion("x, y", (0, 1), 0.3, (15, 16), 0.1), _ANT_JOINTS),  # 0.093; the ant itself moves by up to 0.35 a step
        _columns(15, 14),
        (27, 28, *_columns(21, 6)),
        maze=True,
    ),
    # A humanoid would need 40 m/s for it.
    "humanoidmaze": Robot("humanoid", (69, 21), (Motion("x, y", (0, 1), 1.0),), maze=True),
    # D4RL's ants and points ran on an older MuJoCo, whose impacts are not measured here: the slack is wider. A restart
    # elsewhere in the maze is a move of 4 or more; maze2d's points are held to 5 m/s, a move of 0.05.
    "d4rl antmaze": Robot("ant", (29, 8), (Motion("x, y", (0, 1), 1.0, (15, 16), 0.1),), _columns(15, 14), maze=True),
    "d4rl maze2d": Robot("point", (4, 2), (Motion("x, y", (0, 1), 0.3, (2, 3), 0.01),), (2, 3), maze=True),
    "hopper": Robot(
        "hopper",
        (11, 3),
        (
            Motion("height", (0,), 0.02, (6,), 0.008),  # 0.0014
            Motion("angles", _columns(1, 4), 0.4, _columns(7, 4), 0.008),  # 0.10
        ),
        _columns(5, 6),
        _columns(8, 3),
        reward=VelocityReward(5, 1e-3, 1.0, slack=1.0, drift=0.06, scale=0.01),  # 0.36, 0.019, 0.0002
        velocity_limit=10.0,
        fallen=_fallen_hopper,
    ),
    "halfcheetah": Robot(
        "halfcheetah",
        (17, 6),
        (
            Motion("height", (0,), 0.5, (9,), 0.05),  # 0.12
            Motion("angles", _columns(1, 7), 2.5, _columns(10, 7), 0.05),  # 0.81
        ),
        _columns(8, 9),
        _columns(11, 6),
        reward=VelocityReward(8, 0.1, 0.0, slack=2.5, drift=0.3, scale=0.04),  # 1.17, 0.13, 0.01
    ),
    "walker2d": Robot(
        "walker2d",
        (17, 6),
        (
            Motion("height", (0,), 0.02, (9,), 0.008),  # 0.0024
            Motion("angles", _columns(1, 7), 2.0, _columns(10, 7), 0.008),  # 0.61
        ),
        _columns(8, 9),
        _columns(11, 6),
        reward=VelocityReward(8, 1e-3, 1.0, slack=1.0, drift=0.06, scale=0.01),  # 0.41, 0.023, 0.0003
        velocity_limit=10.0,
        fallen=_fallen_walker2d,
    ),
    "walker": Robot("planar walker", (24, 6), _WALKER_MOTIONS),
}

RUNNER_STEPS = 1000  # time limit of D4RL's hopper, halfcheetah and walker2d
