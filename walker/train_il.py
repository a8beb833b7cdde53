"""Behaviour cloning: a residual MLP that repeats the data's actions.

    loss   mean over elements of (pi(s) - a)^2

Adam, whose learning rate falls to 0 along a cosine.

    python -m walker.train_il train
    python -m walker.train_il test
    python -m walker.train_il train --random_noise=-1 --ADD_TASK_BIT=True --USE_DATASET_STR="local/walk_m"
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.offline.base import Learner
from dmc_utils import ACTION_DIM
from model_kernels import cosine
from runs.cli import run_cli
from utils import Basic, Count, Positive, Whole
from walker.policies import POLICIES
from walker.study_run import StudyConfig, StudyRun, run_command


@dataclass
class CloningConfig(StudyConfig):
    max_timesteps: Basic[Count] = 20_000  # updates of the run
    lr: Positive = 1e-3  # learning rate of Adam at the beginning
    hidden_dim: Count = 512  # width of the network
    blocks: Whole = 2  # residual blocks of two layers each


class BehaviorCloning(Learner):
    def __init__(self, config: CloningConfig, input_dim: int, action_dim: int, device: str | torch.device = "cpu"):
        super().__init__(device)
        self.config, self.sizes = config, {"hidden_dim": config.hidden_dim, "blocks": config.blocks}
        self.lr = torch.tensor(config.lr, device=device)  # a tensor, so that it can be set between updates
        self.policy = self.add("policy", POLICIES["residual_mlp"](input_dim, action_dim, **self.sizes), self.lr)

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step on observations [n, D] and actions [n, A]."""
        loss = F.mse_loss(self.policy.network(batch["observations"]), batch["actions"])
        self.minimise("policy", loss)
        self.step += 1
        return {"bc_loss": loss.detach()}

    def anneal(self, share: float) -> None:
        self.lr.fill_(self.config.lr * cosine(share))


class CloningRun(StudyRun):
    method = "bc"
    config: CloningConfig
    learner: BehaviorCloning

    def make_learner(self) -> BehaviorCloning:
        return BehaviorCloning(self.config, self.input_dim, ACTION_DIM, self.device)

    def policy(self) -> tuple[str, dict[str, Any], torch.nn.Module]:
        return "residual_mlp", self.learner.sizes, self.learner.policy


main = functools.partial(run_command, CloningRun, CloningConfig, __doc__)


if __name__ == "__main__":
    run_cli(main)
