"""Runs whose learner is one of algorithms/offline: what TD3+BC's and CQL's scripts share."""

from typing import Any

import numpy as np

from algorithms.offline.base import OfflineAlgorithm
from dmc_utils import ACTION_DIM
from runs.cli import check_bounds
from walker.agent import acting_state
from walker.policies import Markov
from walker.study_run import StudyRun

BOUNDS = {
    **dict.fromkeys(("reward_scale", "actor_lr", "qf_lr"), (1e-9, 1e9)),
    "hidden_dim": (1, 10**6),
    "discount": (0.0, 1 - 1e-9),
    "tau": (1e-9, 1.0),
}


class ValueRun(StudyRun):
    """Settings need `reward_scale`, and those of the algorithm. Time limits bootstrap: nothing terminates here."""

    algorithm: type[OfflineAlgorithm]
    kind: str  # entry of walker.policies.POLICIES that the actor is
    bounds: dict[str, tuple[float, float]]  # of the algorithm's own numbers
    learner: OfflineAlgorithm

    def check(self, config: Any) -> None:
        super().check(config)
        check_bounds(config, BOUNDS | self.bounds)

    def make_learner(self) -> OfflineAlgorithm:
        sizes = (self.input_dim, ACTION_DIM, 1.0)
        return self.algorithm(self.config, sizes, self.streams.policy, self.device)

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        return rewards * np.float32(self.config.reward_scale)

    def acting(self) -> dict[str, Any]:
        policy, sizes = Markov(self.learner.actor), {"hidden_dim": self.config.hidden_dim}
        return acting_state(self.method, self.kind, sizes, policy, (self.mean, self.std), self.config.ADD_TASK_BIT)
