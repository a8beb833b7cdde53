"""CDS, conservative data sharing (Yu et al., "Conservative Data Sharing for Multi-Task Offline RL", 2021), over CQL.

One task is learned, from its own data and from the other task's transitions, paid by the main task's reward, which the
simulator gives for the recorded physics. Of these an update takes the ones whose conservative value min_k Q_k(s, a) is
highest among `share_candidates` times as many drawn, by the critics of the moment.

Deviations from the paper: a fixed part of each batch is shared, the best of a fresh draw, where the paper compares each
candidate with a percentile of the task's own values and may share nothing; one task a run. `shared_q` and `own_q` in
metrics.csv say how the two parts compare.

    python -m walker.train_cds --main_task walk
    python -m walker.train_cds --main_task run
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dmc_utils import TASKS, WalkerEnv, rewards_in_task
from runs.cli import run_cli
from utils import Count, Fraction, ReplayBuffer, UserError, progress
from walker.study_run import run_command
from walker.train_cqlsac import CQLRun, WalkerCQLConfig


@dataclass
class CDSConfig(WalkerCQLConfig):
    main_task: Literal["walk", "run"] = "walk"  # the task that is learned
    shared_part: Fraction = 0.5  # of a batch: transitions of the other task
    share_candidates: Count = 10  # times as many are drawn, and the ones of highest value taken


class CDSRun(CQLRun):
    method = "cds"
    config: CDSConfig

    @staticmethod
    def labels(config: CDSConfig) -> list[str]:
        return [config.main_task]

    def trained_tasks(self) -> list[str]:
        return [self.config.main_task]

    def prepare_data(self) -> None:
        """The main task's transitions, and the other's as it would pay for them, apart."""
        main = TASKS.index(self.config.main_task)
        is_main = self.data.tasks == main
        if is_main.all() or not is_main.any():
            raise UserError(f"--USE_DATASET_STR {self.config.USE_DATASET_STR}: give data of both tasks")
        self.data = self.data._replace(rewards=self.relabelled(main), tasks=np.full_like(self.data.tasks, main))
        super().prepare_data()
        own, others = self.part(is_main), self.part(~is_main)
        self.buffer, self.others = (ReplayBuffer(**rows, device=self.device) for rows in (own, others))

    def relabelled(self, main: int) -> np.ndarray:
        """Rewards [E, T] in the main task: the data's own, and the simulator's for episodes of the other."""
        rewards = self.data.rewards.copy()
        env = WalkerEnv(TASKS[main])
        for episode in progress(np.flatnonzero(self.data.tasks != main), "relabel", unit="episode", leave=False):
            rewards[episode] = rewards_in_task(env, self.data.physics[episode, 1:])
        env.close()
        return rewards

    def make_batch(self) -> dict[str, Tensor]:
        shared = round(self.config.shared_part * self.config.batch_size)
        own = self.buffer.sample(self.config.batch_size - shared, self.streams.sampling)
        candidates = self.others.sample(shared * self.config.share_candidates, self.streams.sampling)
        best = self.value(candidates).topk(shared).indices
        return self.noisy({name: torch.cat([own[name], candidates[name][best]]) for name in own})

    @torch.no_grad()
    def value(self, batch: dict[str, Tensor]) -> Tensor:
        """min_k Q_k(s, a), [n]."""
        return self.learner.critic(batch["observations"], batch["actions"]).amin(0)

    def evaluate(self) -> dict[str, float]:
        """As every run, with the mean value of what is shared and of the task's own rows, on a draw of its own."""
        figures, generator = super().evaluate(), torch.Generator(self.device).manual_seed(self.streams.evaluation_seed)
        own, others = (self.value(rows.sample(2_000, generator)) for rows in (self.buffer, self.others))
        shared = others.topk(max(2_000 // self.config.share_candidates, 1)).values
        return figures | {"own_q": float(own.mean()), "shared_q": float(shared.mean())}


main = functools.partial(run_command, CDSRun, CDSConfig, __doc__)


if __name__ == "__main__":
    run_cli(main)
