"""Runs whose learner is one of algorithms/offline: what TD3+BC's and CQL's scripts share."""

from typing import Any

import numpy as np

from algorithms.offline.base import OfflineAlgorithm
from dmc_utils import ACTION_DIM
from runs.run import largest_q
from walker.policies import Markov
from walker.study_run import StudyRun


class ValueRun(StudyRun):
    """Settings need `reward_scale`, and those of the algorithm. Time limits bootstrap: nothing terminates here."""

    algorithm: type[OfflineAlgorithm]
    kind: str  # entry of walker.policies.POLICIES that the actor is
    learner: OfflineAlgorithm

    def make_learner(self) -> OfflineAlgorithm:
        self.q_bound = largest_q(self.rewards(self.data.rewards), self.config.discount)
        sizes = (self.input_dim, ACTION_DIM, 1.0)
        return self.algorithm(self.config, sizes, self.streams.policy, self.device)

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        return rewards * np.float32(self.config.reward_scale)

    def policy(self) -> tuple[str, dict[str, Any], Markov]:
        return self.kind, {"hidden_dim": self.config.hidden_dim}, Markov(self.learner.actor)
