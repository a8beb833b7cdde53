"""AWAC, advantage-weighted actor-critic (Nair, Gupta, Dalal & Levine, 2020), offline.

    critics   y = r + discount (1 - terminated) min_k Q'_k(s', a'), a' ~ pi(s')                      equation 3
    actor     E[min(exp((Q(s, a) - Q(s, a_pi)) / lambda), 100) (-log pi(a|s))], Q the lesser         equation 13

with a_pi ~ pi(s), cut to the box as all actions are. Three hidden layers. Deviation from CORL:
none; benchmarks/bench_algorithms.py compares the two.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.offline.base import Batch, Info, OfflineAlgorithm, OfflineConfig, UpdateActors
from algorithms.offline.pogo_policies import Distribution, Draw, GaussianMLP
from model import EnsembleCritic
from utils import Positive


@dataclass
class AWACConfig(OfflineConfig):
    awac_lambda: Positive = 1 / 3  # temperature of the advantage weights (antmaze: 0.1)
    exp_adv_max: Positive = 100.0  # largest weight


class AWAC(OfflineAlgorithm):
    config: AWACConfig

    def default_actor(self) -> functools.partial[GaussianMLP]:
        return functools.partial(GaussianMLP, hidden_layers=3, squash_mean=False)

    def build(self, observation_dim: int, action_dim: int, max_action: float) -> None:
        width = self.config.hidden_dim
        make_critic = functools.partial(EnsembleCritic, observation_dim, action_dim, width, hidden_layers=3)
        self.critic = self.add("critic", make_critic(), self.config.qf_lr)
        self.critic_target = self.add_target("critic_target", make_critic(), self.critic)

    def update(self, batch: Batch, update_actors: UpdateActors | None = None) -> Info:
        loss, info = self.critic_loss(batch)
        self.minimise("critic", loss)
        info |= (update_actors or self.update_actor)(batch)
        self.update_targets()
        self.step += 1
        return info

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        with torch.no_grad():
            _, draw = self.draw(self.actor, batch["next_observations"])
            value = self.critic_target(batch["next_observations"], draw.actions).amin(0)
            target = batch["rewards"] + self.config.discount * (1 - batch["terminated"]) * value
        loss, q = self.critic.squared_error(batch["observations"], batch["actions"], target)
        return loss, {"critic_loss": loss.detach(), "q_data": q.mean()}

    def actor_loss(self, distribution: Distribution, draw: Draw, batch: Batch) -> tuple[Tensor, Info]:
        with torch.no_grad():
            observations, actions = batch["observations"].repeat(2, 1), torch.cat([batch["actions"], draw.actions])
            q, value = self.critic(observations, actions).amin(0).chunk(2)
            weight = ((q - value) / self.config.awac_lambda).exp().clamp(max=self.config.exp_adv_max)
        loss = (weight * distribution.bc_loss(batch["actions"], draw)).mean()
        return loss, {"weight": weight.mean(), "advantage": (q - value).mean()}

    def next_actor_loss(self, distribution: Distribution, draw: Draw, batch: Batch) -> tuple[Tensor, Info]:
        q = self.critic.frozen(batch["observations"], draw.actions).amin(0)
        return -q.mean(), {"q": q.detach().mean()}
