"""CQL over soft actor-critic on the walker: algorithms/offline/cql.py on both tasks' transitions.

    python -m walker.train_cqlsac train
    python -m walker.train_cqlsac test

A squashed Gaussian whose log std is cut to [-20, 2]; without the cut the study saw it grow to 300. Defaults that differ
from D4RL's are for runs of tens of thousands of updates, not a million: the actor's learning rate is the critics',
which begin at the level of the data's returns, and the temperature near where it ends; and for a CPU: fewer layers,
fewer actions in the penalty. Rewards are of D4RL's size: the penalty counts a uniform action for 10 more than one of
the policy, and where Q differs by less, it lifts the data's without end (docs/notebook_walker.md).
"""

import functools
import math
from dataclasses import dataclass

import torch

from algorithms.offline.cql import CQL, CQLConfig
from runs.cli import run_cli
from utils import Basic, Count, Positive
from walker.study_run import StudyConfig, ValueRun, run_command


@dataclass
class WalkerCQLConfig(StudyConfig, CQLConfig):
    max_timesteps: Basic[Count] = 30_000  # updates of the run
    eval_freq: Count = 5_000  # updates between evaluations, and at most between checkpoints
    reward_scale: Positive = 10.0  # rewards are multiplied by this
    actor_lr: Positive = 3e-4  # learning rate of Adam for the actor and the temperature
    cql_n_actions: Count = 4  # actions of each of the three kinds in the penalty
    q_n_hidden_layers: Count = 2  # hidden layers of the critics


class CQLRun(ValueRun):
    method, algorithm, kind = "cql", CQL, "tanh_gaussian_mlp"
    learner: CQL

    @torch.no_grad()
    def make_learner(self) -> CQL:
        learner = super().make_learner()
        value = self.buffer.rewards.mean() / (1 - self.config.discount)  # nothing ends
        for critic in (learner.critic, learner.critic_target):
            critic.net.layers()[-1][1].add_(value)  # the bias of the output
        learner.temperature.log_alpha.fill_(math.log(0.1))
        return learner


main = functools.partial(run_command, CQLRun, WalkerCQLConfig, __doc__)


if __name__ == "__main__":
    run_cli(main)
