"""SAC-N: soft actor-critic with many critics (An, Moon, Kim & Song, "Uncertainty-Based Offline RL with Diversified
Q-Ensemble", 2021, section 3).

    temperature   E[-log alpha (log pi(a_pi|s) - A)]
    actor         E[alpha log pi(a_pi|s) - min_k Q_k(s, a_pi)]
    critics       y = r + discount (1 - terminated) (min_k Q'_k(s', a') - alpha log pi(a'|s'))

in this order, as the authors' code has it. Three hidden layers, their initialisation. EDAC is one more term in
`critic_loss`. Deviation: the density of tanh(u) is exact, where CORL adds 1e-6 to 1 - tanh(u)^2.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from algorithms.offline.base import Batch, Info, OfflineAlgorithm, OfflineConfig, UpdateActors
from algorithms.offline.pogo_policies import Distribution, Draw, TanhGaussianMLP, initialise
from model import EnsembleCritic
from utils import Count, Positive


@dataclass
class SACNConfig(OfflineConfig):
    num_critics: Count = 10  # 10 for halfcheetah, 20 walker2d, 200 hopper (medium: 500), 25 antmaze
    alpha_learning_rate: Positive = 3e-4  # learning rate of Adam for the temperature


class SACN(OfflineAlgorithm):
    config: SACNConfig

    def default_actor(self) -> type[TanhGaussianMLP]:
        return TanhGaussianMLP

    def build(self, observation_dim: int, action_dim: int, max_action: float) -> None:
        sizes = (observation_dim, action_dim, self.config.hidden_dim, self.config.num_critics)
        make_critic = functools.partial(EnsembleCritic, *sizes, hidden_layers=3)
        self.critic = self.add("critic", make_critic(), self.config.qf_lr)
        initialise(self.critic.net, last_bound=3e-3)
        self.critic_target = self.add_target("critic_target", make_critic(), self.critic)
        self.temperature = self.add("temperature", Temperature(), self.config.alpha_learning_rate)

    def update(self, batch: Batch, update_actors: UpdateActors | None = None) -> Info:
        loss, info = self.temperature_loss(batch)
        self.minimise("temperature", loss)
        info |= (update_actors or self.update_actor)(batch)
        loss, more = self.critic_loss(batch)
        self.minimise("critic", loss)
        self.update_targets()
        self.step += 1
        return info | more

    def temperature_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        with torch.no_grad():
            log_prob = self.draw(self.actor, batch["observations"])[1].log_prob
        loss = self.temperature.loss(log_prob, target_entropy=-self.actor.action_dim)
        return loss, {"alpha_loss": loss.detach(), "entropy": -log_prob.mean()}

    def actor_loss(self, distribution: Distribution, draw: Draw, batch: Batch) -> tuple[Tensor, Info]:
        q = self.critic.frozen(batch["observations"], draw.actions)
        alpha = self.temperature.alpha()
        loss = (alpha * draw.log_prob - q.amin(0)).mean()
        return loss, {"q": q.detach().amin(0).mean(), "q_std": q.detach().std(0).mean(), "alpha": alpha}

    next_actor_loss = actor_loss

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        target = self.critic_target_value(batch)
        loss, q = self.critic.squared_error(batch["observations"], batch["actions"], target)
        return loss, {"critic_loss": loss.detach(), "q_data": q.mean()}

    @torch.no_grad()
    def critic_target_value(self, batch: Batch) -> Tensor:
        """y [n] of the equation above."""
        _, draw = self.draw(self.actor, batch["next_observations"])
        value = self.critic_target(batch["next_observations"], draw.actions).amin(0)
        value = value - self.temperature.alpha() * draw.log_prob
        return batch["rewards"] + self.config.discount * (1 - batch["terminated"]) * value


class Temperature(nn.Module):
    """alpha = exp(log_alpha), the price of negative entropy."""

    def __init__(self):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def alpha(self) -> Tensor:
        return self.log_alpha.detach().exp()

    def loss(self, log_prob: Tensor, target_entropy: float) -> Tensor:
        """E[-log alpha (log pi + target_entropy)]: alpha rises while the entropy is below its target."""
        return -(self.log_alpha * (log_prob.detach() + target_entropy)).mean()
