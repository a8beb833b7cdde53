"""CQL, conservative Q-learning (Kumar, Zhou, Tucker & Levine, 2020), CQL(H) over soft actor-critic.

    critics       y = r + discount (1 - terminated) min_k Q'_k(s', a'), a' ~ pi(s'), and for each critic
                  + cql_alpha E[T log sum_j exp((Q_k(s, a_j) - log p(a_j)) / T) - Q_k(s, a)]     equation 4, appendix F
    actor         E[alpha log pi(a_pi|s) - min_k Q_k(s, a_pi)]
    temperature   E[-log alpha (log pi(a|s) - A)]

The a_j are `cql_n_actions` uniform ones, as many of pi(s) and as many of pi(s'). All losses are those of the networks
as they stand before the step. With `cql_lagrange` a multiplier holds the penalty at `cql_target_action_gap` (equation
30).

Deviations from CORL: log std has no two trainable scalars beside the network's own output; the actions of pi(s) in the
penalty are also those that the temperature learns from; every critic has `q_n_hidden_layers`; the penalty is not cut
below (CORL's antmaze files do so at -200).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from algorithms.offline.base import Batch, Info, OfflineAlgorithm, OfflineConfig, UpdateActors
from algorithms.offline.pogo_policies import Distribution, Draw, TanhGaussianMLP
from algorithms.offline.sac_n import Temperature
from model import EnsembleCritic
from utils import Count, NonNegative, Number, Positive

LARGEST_MULTIPLIER = 1e6


@dataclass
class CQLConfig(OfflineConfig):
    actor_lr: Positive = 3e-5  # learning rate of Adam for the actors and the temperature
    cql_alpha: NonNegative = 10.0  # weight of the penalty (antmaze: 5)
    cql_n_actions: Count = 10  # actions of each of the three kinds in the penalty
    cql_temp: Positive = 1.0  # T of the penalty's soft maximum
    cql_lagrange: bool = False  # learn a multiplier that holds the penalty at a value (antmaze)
    cql_target_action_gap: Number = 0.8  # that value
    cql_max_target_backup: bool = False  # targets take the best of cql_n_actions actions (antmaze)
    target_entropy: Number | None = None  # of the temperature; default: minus the number of action numbers
    q_n_hidden_layers: Count = 3  # hidden layers of the critics (antmaze: 5)
    orthogonal_init: bool = True  # orthogonal initialisation of the critics


class CQL(OfflineAlgorithm):
    config: CQLConfig

    def default_actor(self) -> Callable[..., TanhGaussianMLP]:
        return make_actor

    def build(self, observation_dim: int, action_dim: int, max_action: float) -> None:
        config, sizes = self.config, (observation_dim, action_dim)
        depth = {"hidden_layers": config.q_n_hidden_layers}
        make_critic = functools.partial(EnsembleCritic, *sizes, config.hidden_dim, **depth)
        critic = initialise(make_critic()) if config.orthogonal_init else make_critic()
        self.critic = self.add("critic", critic, config.qf_lr)
        self.critic_target = self.add_target("critic_target", make_critic(), self.critic)
        self.temperature = self.add("temperature", Temperature(), config.actor_lr)
        self.multiplier = self.add("multiplier", Multiplier(), config.qf_lr)
        self.target_entropy = -action_dim if config.target_entropy is None else config.target_entropy

    def update(self, batch: Batch, update_actors: UpdateActors | None = None) -> Info:
        here, following = self.policy_draws(batch)
        loss, gaps, info = self.critic_loss(batch, here, following)
        self.optimizers["critic"].zero_grad()
        loss.backward()
        info |= (update_actors or self.update_actor)(batch)  # before the critics step
        self.optimizers["critic"].step()
        loss = self.temperature.loss(here.log_prob, self.target_entropy)
        self.minimise("temperature", loss)
        if self.config.cql_lagrange:
            self.minimise("multiplier", self.multiplier.loss(self.config.cql_alpha * gaps))
        self.update_targets()
        self.step += 1
        return info | {"alpha_loss": loss.detach(), "entropy": -here.log_prob.mean()}

    @torch.no_grad()
    def policy_draws(self, batch: Batch) -> tuple[Draw, Draw]:
        """Actions of the actor: `cql_n_actions` in s, and one more in s', the target's, which comes first."""
        n, count = len(batch["actions"]), self.config.cql_n_actions
        here = self.actor(batch["observations"]).draw(self.noise(n, count))
        return here, self.actor(batch["next_observations"]).draw(self.noise(n, count + 1))

    def critic_loss(self, batch: Batch, here: Draw, following: Draw) -> tuple[Tensor, Tensor, Info]:
        """Both critics' squared errors and penalties; the penalties less their target value, [2]."""
        config, (n, action_dim) = self.config, batch["actions"].shape
        target = batch["rewards"] + config.discount * (1 - batch["terminated"]) * self.next_value(batch, following)
        uniform = torch.rand(n, config.cql_n_actions, action_dim, generator=self.generator, device=self.device)
        uniform = (2 * uniform - 1) * self.max_action
        actions = [batch["actions"].unsqueeze(1), uniform, here.actions, following.actions[:, 1:]]
        q = self.q_of_many(self.critic, batch["observations"], torch.cat(actions, dim=1))  # [2, n, 1 + 3 K]
        q_data, q_others = q[..., 0], q[..., 1:]
        flat = torch.full_like(here.log_prob, -action_dim * math.log(2))
        density = torch.cat([flat, here.log_prob, following.log_prob[:, 1:]], dim=1)
        soft_maximum = config.cql_temp * ((q_others - density) / config.cql_temp).logsumexp(-1)
        penalty = (soft_maximum - q_data).mean(1)  # [2]
        gaps = penalty - config.cql_target_action_gap if config.cql_lagrange else penalty
        weight = config.cql_alpha * (self.multiplier.value() if config.cql_lagrange else 1.0)
        squared = (q_data - target).square().mean(1)
        loss = (squared + weight * gaps).sum()
        info = {"critic_loss": squared.sum(), "penalty": penalty.mean(), "q_data": q_data.mean()}
        return loss, gaps.detach(), {name: value.detach() for name, value in info.items()}

    @torch.no_grad()
    def next_value(self, batch: Batch, following: Draw) -> Tensor:
        """min_k Q'_k(s', a') of one action, or the largest of `cql_n_actions`, [n]."""
        if self.config.cql_max_target_backup:
            actions = following.actions[:, : self.config.cql_n_actions]
            return self.q_of_many(self.critic_target, batch["next_observations"], actions).amin(0).amax(-1)
        return self.critic_target(batch["next_observations"], following.actions[:, 0]).amin(0)

    @staticmethod
    def q_of_many(critic: EnsembleCritic, observations: Tensor, actions: Tensor) -> Tensor:
        """Several actions a state: [n, D], [n, K, A] -> [2, n, K]."""
        n, count, _ = actions.shape
        q = critic(observations.repeat_interleave(count, dim=0), actions.flatten(0, 1))
        return q.view(len(q), n, count)

    def actor_loss(self, distribution: Distribution, draw: Draw, batch: Batch) -> tuple[Tensor, Info]:
        q = self.critic.frozen(batch["observations"], draw.actions).amin(0)
        alpha = self.temperature.alpha()
        return (alpha * draw.log_prob - q).mean(), {"q": q.detach().mean(), "alpha": alpha}

    next_actor_loss = actor_loss


class Multiplier(nn.Module):
    """exp(log_alpha_prime), the weight that holds the penalty at its target."""

    def __init__(self):
        super().__init__()
        self.log_alpha_prime = nn.Parameter(torch.ones(()))

    def value(self) -> Tensor:
        return self.log_alpha_prime.detach().exp().clamp(max=LARGEST_MULTIPLIER)

    def loss(self, gaps: Tensor) -> Tensor:
        """The multiplier rises while the penalty is above its target. gaps: [2], weighted."""
        return -0.5 * (self.log_alpha_prime.exp().clamp(max=LARGEST_MULTIPLIER) * gaps).sum()


def make_actor(observation_dim: int, action_dim: int, max_action: float, hidden_dim: int = 256) -> TanhGaussianMLP:
    """The policy of CORL's file, in its initialisation."""
    sizes = (observation_dim, action_dim, max_action, hidden_dim)
    actor = TanhGaussianMLP(*sizes, log_std_bounds=(-20.0, 2.0), log_std_offset=-1.0, edac_init=False)
    weight, bias = actor.net.layers()[-1]
    with torch.no_grad():
        nn.init.xavier_uniform_(weight, gain=1e-2)
        bias.zero_()
    return actor


@torch.no_grad()
def initialise(critic: EnsembleCritic) -> EnsembleCritic:
    """Orthogonal weights of gain sqrt(2), 0.01 in the last layer, and no bias, in place."""
    layers = critic.net.layers()
    for number, (weights, bias) in enumerate(layers):
        for weight in weights:
            nn.init.orthogonal_(weight, 1e-2 if number == len(layers) - 1 else math.sqrt(2))
        bias.zero_()
    return critic
