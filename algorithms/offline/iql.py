"""IQL, implicit Q-learning (Kostrikov, Nair & Levine, 2021).

    V       E[|tau - 1(u < 0)| u^2],  u = min_k Q'_k(s, a) - V(s)                                    equation 5
    Q       E[(r + discount (1 - terminated) V(s') - Q_k(s, a))^2], V before this update             equation 6
    actor   E[min(exp(beta u), 100) L(s, a)],  L = -log pi(a|s) of a density, else ||pi(s) - a||^2   equation 7

`iql_tau` is the expectile, `tau` the targets' rate. The actor's learning rate falls along a cosine. Deviation from
CORL: none; benchmarks/bench_algorithms.py compares the two.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from algorithms.offline.base import Batch, Info, OfflineAlgorithm, OfflineConfig, UpdateActors
from algorithms.offline.pogo_policies import DeterministicMLP, Distribution, Draw, GaussianMLP
from model import EnsembleCritic, StateValue
from utils import NonNegative, Positive, Range

LARGEST_WEIGHT = 100.0  # of a transition in the actor's loss


@dataclass
class IQLConfig(OfflineConfig):
    iql_tau: Annotated[float, Range(1e-9, 1 - 1e-9)] = 0.7  # expectile of V (antmaze: 0.9)
    beta: NonNegative = 3.0  # inverse temperature of the advantage weights (antmaze: 10)
    vf_lr: Positive = 3e-4  # learning rate of Adam for V
    iql_deterministic: bool = False  # the actor is a point in each state, not a Gaussian


class IQL(OfflineAlgorithm):
    config: IQLConfig
    actor_lr_decay = True

    def default_actor(self) -> type[DeterministicMLP] | type[GaussianMLP]:
        return DeterministicMLP if self.config.iql_deterministic else GaussianMLP

    def build(self, observation_dim: int, action_dim: int, max_action: float) -> None:
        sizes, width = (observation_dim, action_dim), self.config.hidden_dim
        self.value = self.add("value", StateValue(observation_dim, width), self.config.vf_lr)
        self.critic = self.add("critic", EnsembleCritic(*sizes, width), self.config.qf_lr)
        self.critic_target = self.add_target("critic_target", EnsembleCritic(*sizes, width), self.critic)

    def update(self, batch: Batch, update_actors: UpdateActors | None = None) -> Info:
        with torch.no_grad():
            next_value = self.value(batch["next_observations"])
        loss, advantage, info = self.value_loss(batch)
        self.minimise("value", loss)
        loss, more = self.critic_loss(batch | {"next_value": next_value})
        self.minimise("critic", loss)
        self.update_targets()
        info |= more | (update_actors or self.update_actor)(batch | {"advantage": advantage})
        self.step += 1
        return info

    def value_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Info]:
        """Expectile regression of V, and the advantages u [n]."""
        with torch.no_grad():
            target = self.critic_target(batch["observations"], batch["actions"]).amin(0)
        loss, value = self.value.squared_error(batch["observations"], target, self.config.iql_tau)
        advantage = target - value
        return loss, advantage, {"value_loss": loss.detach(), "advantage": advantage.mean()}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        target = batch["rewards"] + self.config.discount * (1 - batch["terminated"]) * batch["next_value"]
        loss, q = self.critic.squared_error(batch["observations"], batch["actions"], target)
        loss = loss / 2  # the mean over the two
        return loss, {"critic_loss": loss.detach(), "q_data": q.mean()}

    def actor_loss(self, distribution: Distribution, draw: Draw, batch: Batch) -> tuple[Tensor, Info]:
        weight = (self.config.beta * batch["advantage"]).exp().clamp(max=LARGEST_WEIGHT)
        loss = (weight * distribution.bc_loss(batch["actions"], draw)).mean()
        return loss, {"weight": weight.mean()}

    def next_actor_loss(self, distribution: Distribution, draw: Draw, batch: Batch) -> tuple[Tensor, Info]:
        q = self.critic.frozen(batch["observations"], draw.actions).amin(0)
        return -q.mean(), {"q": q.detach().mean()}
