"""TD3+BC (Fujimoto & Gu, "A Minimalist Approach to Offline Reinforcement Learning", 2021).

TD3, whose actor is also held near the data's actions:

    critics   y = r + discount (1 - terminated) min_k Q'_k(s', clip(pi'(s') + clipped noise))       TD3, algorithm 1
    actor     -lambda E[Q1(s, pi(s))] + E[(pi(s) - a)^2],   lambda = alpha / mean|Q|                equation 5

The actor and all target networks move every `policy_freq` updates. Deviation from CORL:
none; benchmarks/bench_algorithms.py compares the two.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.offline.base import Batch, Info, OfflineAlgorithm, OfflineConfig, UpdateActors
from algorithms.offline.pogo_policies import DeterministicMLP, Distribution, Draw
from model import EnsembleCritic
from utils import Count, NonNegative


@dataclass
class TD3BCConfig(OfflineConfig):
    alpha: NonNegative = 2.5  # weight of Q against the mean squared distance to the data's actions
    policy_noise: NonNegative = 0.2  # standard deviation of the noise on the target's action, in units of max_action
    noise_clip: NonNegative = 0.5  # largest such noise, in units of max_action
    policy_freq: Count = 2  # updates of the critics for each update of the actors and target networks


class TD3BC(OfflineAlgorithm):
    config: TD3BCConfig

    def default_actor(self) -> type[DeterministicMLP]:
        return DeterministicMLP

    def build(self, observation_dim: int, action_dim: int, max_action: float) -> None:
        sizes, width = (observation_dim, action_dim), self.config.hidden_dim
        self.critic = self.add("critic", EnsembleCritic(*sizes, width), self.config.qf_lr)
        self.critic_target = self.add_target("critic_target", EnsembleCritic(*sizes, width), self.critic)
        actor = self.make_actor(*sizes, max_action, width)
        self.actor_target = self.add_target("actor_target", actor, self.actor)

    def update(self, batch: Batch, update_actors: UpdateActors | None = None) -> Info:
        loss, info = self.critic_loss(batch)
        self.minimise("critic", loss)
        self.step += 1
        if self.step % self.config.policy_freq == 0:
            info |= (update_actors or self.update_actor)(batch)
            self.update_targets()
        return info

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        config, scale = self.config, self.max_action
        with torch.no_grad():
            observations = batch["next_observations"]
            noise = self.noise(len(observations)).mul_(config.policy_noise * scale)
            noise = noise.clamp_(-config.noise_clip * scale, config.noise_clip * scale)
            actions = (self.draw(self.actor_target, observations)[1].actions + noise).clamp_(-scale, scale)
            value = self.critic_target(observations, actions).amin(0)
            target = batch["rewards"] + config.discount * (1 - batch["terminated"]) * value
        loss, q = self.critic.squared_error(batch["observations"], batch["actions"], target)
        return loss, {"critic_loss": loss.detach(), "q_data": q.mean()}

    def actor_loss(self, distribution: Distribution, draw: Draw, batch: Batch) -> tuple[Tensor, Info]:
        loss, info = self.next_actor_loss(distribution, draw, batch)
        cloning = F.mse_loss(draw.actions, batch["actions"])
        return loss + cloning, info | {"bc_loss": cloning.detach()}

    def next_actor_loss(self, distribution: Distribution, draw: Draw, batch: Batch) -> tuple[Tensor, Info]:
        q = self.critic.frozen_q1(batch["observations"], draw.actions)
        scale = self.config.alpha / q.detach().abs().mean()
        return -scale * q.mean(), {"q": q.detach().mean()}
