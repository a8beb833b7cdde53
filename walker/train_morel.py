"""MOReL (Kidambi et al., "Model-Based Offline Reinforcement Learning", 2020): a pessimistic model.

An ensemble of models is fitted to the data. Where the largest distance between two members' predictions passes a
threshold, an imagined episode ends with `halt_reward`: the pessimistic MDP of section 4. PPO trains the policy there.

Deviations from the paper: PPO in place of natural policy gradient; the threshold is a quantile of the same distance
over the data; each step is that of a member drawn at random; episodes begin at any state of the data.

    python -m walker.train_morel
    python -m walker.train_morel --exp_name threshold_0.99 --halt_quantile 0.99
"""

import functools
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from dmc_utils import ACTION_DIM
from runs.cli import run_cli
from utils import Basic, Count, Fraction, Number, Range
from walker.dynamics import MLPDynamics
from walker.study_run import run_command
from walker.train_model import InModelConfig, InModelLearner, InModelRun


@dataclass
class MORELConfig(InModelConfig):
    max_timesteps: Basic[Count] = 20_300  # updates of the model, and then iterations of PPO
    horizon: Count = 100  # steps of each imagined episode in an iteration
    members: Annotated[int, Range(2, 1000)] = 4  # models in the ensemble
    halt_quantile: Fraction = 0.999  # share of the data's transitions that the threshold lets pass
    halt_reward: Number = -10.0  # reward of the step that ends an imagined episode


class MORELLearner(InModelLearner):
    config: MORELConfig
    model: MLPDynamics
    threshold: Tensor | None = None  # 0-d, set once the model is fitted

    def iterate(self, starts: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.threshold is None:
            self.threshold = self.find_threshold()
        return super().iterate(starts) | {"threshold": self.threshold}

    def find_threshold(self) -> Tensor:
        """The quantile of the ensemble's disagreement over the data, 0-d."""
        data, parts = self.data, []
        for start in range(0, len(data), 8192):
            rows = slice(start, start + 8192)
            parts.append(self.model.disagreement(data.observations[rows], data.actions[rows]))
        found, _ = torch.cat(parts).sort()
        return found[round(self.config.halt_quantile * (len(found) - 1))]

    def model_step(self, inputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A step of the model, which ends where its members disagree."""
        following, rewards, _ = super().model_step(inputs, actions)
        ended = self.model.disagreement(inputs, actions) > self.threshold
        return following, torch.where(ended, self.config.halt_reward, rewards), ended

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.threshold = state["threshold"]


class MORELRun(InModelRun):
    method = "morel"
    config: MORELConfig
    learner: MORELLearner

    def make_learner(self) -> MORELLearner:
        sizes = (self.input_dim, ACTION_DIM, self.statistics, self.config.hidden_dim)
        model = MLPDynamics(*sizes, self.config.members)
        return MORELLearner(self.config, model, self.buffer, self.streams.policy)


main = functools.partial(run_command, MORELRun, MORELConfig, __doc__)


if __name__ == "__main__":
    run_cli(main)
