"""PPO (Schulman et al., "Proximal Policy Optimization Algorithms", 2017) inside a learned model.

    actor    -E[min(rho A, clip(rho, 1 - clip, 1 + clip) A)] - bc_weight E_data[log pi(a|s)]
    value    E[(V(s) - R)^2]                                       rho = pi(a|s) / pi_old(a|s)

A and R from generalised advantage estimation (Schulman et al., 2016). Many imagined episodes go on side by side; one
that is cut by the horizon bootstraps from V, one that a model ends does not. Rewards are multiplied by 1 - discount, so
that V is of the size of a reward. The policy begins as a clone and V knows no state yet, so V alone is trained for the
first `value_warmup` iterations. The likelihood of the data's actions keeps the policy where the model was fitted, and
its learning rate falls to 0. No clipping of V; policy and value have an Adam and a limit of the gradient each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model import MLP
from utils import BelowOne, Count, Fraction, NonNegative, Positive, Whole

# One step of a model: (inputs [n, D], actions [n, A]) -> inputs, rewards [n], ended [n] bool.
ModelStep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass
class PPOConfig:
    discount: BelowOne = 0.99  # discount factor of rewards
    gae_lambda: Fraction = 0.95  # lambda of generalised advantage estimation
    clip: Positive = 0.2  # how far the ratio of densities may move in an iteration
    bc_weight: NonNegative = 0.3  # weight of the likelihood of the data's actions, without which PPO exploits the model
    ppo_lr: Positive = 1e-4  # learning rate of Adam for the policy
    value_lr: Positive = 1e-3  # learning rate of Adam for V
    value_warmup: Whole = 10  # iterations at first in which V alone is trained
    epochs: Count = 4  # passes over an iteration's rows
    minibatches: Count = 8  # updates in a pass
    imagined_envs: Count = 256  # imagined episodes side by side
    horizon: Count = 20  # steps of each in an iteration
    max_grad_norm: Positive = 0.5  # largest norm of the policy's gradient, and of V's
    initial_std: Positive = 0.2  # of the policy's actions at first


class GaussianActor(nn.Module):
    """N(tanh(net(s)), std^2), std a parameter for each action number. The output is the mean."""

    def __init__(self, input_dim: int, action_dim: int, hidden_dim: int = 256, initial_std: float = 0.2):
        super().__init__()
        self.net = MLP(input_dim, hidden_dim, action_dim)
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(initial_std)))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.net(inputs))

    def log_prob(self, inputs: Tensor, actions: Tensor) -> Tensor:
        """log pi(a|s), [n], of actions before they are cut to [-1, 1]."""
        z = (actions - self(inputs)) / self.log_std.exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class Rollout(NamedTuple):
    """Imagined rows, [T * n, ...] each."""

    inputs: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor


class PPO:
    """Policy, value, an Adam each; `generator`, on the device, is of actions and of the order of rows."""

    def __init__(
        self,
        config: PPOConfig,
        input_dim: int,
        action_dim: int,
        hidden_dim: int,
        generator: torch.Generator,
        device: str | torch.device = "cpu",
    ):
        self.config, self.generator, self.device = config, generator, torch.device(device)
        self.actor = GaussianActor(input_dim, action_dim, hidden_dim, config.initial_std).to(device)
        self.value = MLP(input_dim, hidden_dim, 1).to(device)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), config.ppo_lr, fused=True)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), config.value_lr, fused=True)

    def values(self, inputs: Tensor) -> Tensor:
        """V(s), [n]."""
        return self.value(inputs).squeeze(-1)

    @torch.no_grad()
    def imagine(self, starts: Tensor, model_step: ModelStep) -> tuple[Rollout, dict[str, Tensor]]:
        """Rows of `horizon` steps from starts [n, D]; those that end go on from a start."""
        config, inputs = self.config, starts
        rows: dict[str, list[Tensor]] = {name: [] for name in ("inputs", "actions", "rewards", "ended", "values")}
        for _ in range(config.horizon):
            noise = torch.randn(len(inputs), len(self.actor.log_std), generator=self.generator, device=self.device)
            actions = self.actor(inputs) + self.actor.log_std.exp() * noise
            following, rewards, ended = model_step(inputs, actions)
            found = (inputs, actions, rewards, ended, self.values(inputs))
            for name, value in zip(rows, found, strict=True):
                rows[name].append(value)
            inputs = torch.where(ended.unsqueeze(1), starts, following)
        stacked = {name: torch.stack(values) for name, values in rows.items()}
        following_values = torch.cat([stacked["values"][1:], self.values(inputs)[None]])
        rewards, not_done = stacked["rewards"] * (1 - config.discount), ~stacked["ended"] * 1.0
        advantages = self.advantages(rewards, stacked["values"], following_values, not_done)
        flat = {name: stacked[name].flatten(0, 1) for name in ("inputs", "actions")}
        log_probs = self.actor.log_prob(flat["inputs"], flat["actions"])
        returns = (advantages + stacked["values"]).flatten()
        figures = {"imagined_reward": stacked["rewards"].mean(), "halted": stacked["ended"].float().mean()}
        return Rollout(flat["inputs"], flat["actions"], log_probs, advantages.flatten(), returns), figures

    def advantages(self, rewards: Tensor, values: Tensor, following: Tensor, not_done: Tensor) -> Tensor:
        """Generalised advantage estimates, all [T, n]; not_done is 0 where a row ended its episode."""
        config, advantages = self.config, torch.zeros_like(rewards)
        td_errors = rewards + config.discount * not_done * following - values
        running = torch.zeros_like(rewards[0])
        for t in reversed(range(len(rewards))):
            running = td_errors[t] + config.discount * config.gae_lambda * not_done[t] * running
            advantages[t] = running
        return advantages

    def improve(self, rollout: Rollout, data: tuple[Tensor, Tensor], train_actor: bool = True) -> dict[str, Tensor]:
        """`epochs` passes over the rows, each in `minibatches` updates; means over them. data: inputs and actions."""
        config, losses = self.config, []
        for _ in range(config.epochs):
            order = torch.randperm(len(rollout.inputs), generator=self.generator, device=self.device)
            for chosen in order.chunk(config.minibatches):
                losses.append(self.minibatch(Rollout(*(part[chosen] for part in rollout)), data, train_actor))
        figures = {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
        with torch.no_grad():
            unexplained = (rollout.returns - self.values(rollout.inputs)).var() / (rollout.returns.var() + 1e-8)
        return figures | {"explained_variance": 1 - unexplained}

    def anneal(self, share: float) -> None:
        """Let the policy's learning rate fall to 0 along a line, for a share of the iterations behind."""
        self.actor_optimizer.param_groups[0]["lr"] = self.config.ppo_lr * (1 - share)

    def minibatch(self, rows: Rollout, data: tuple[Tensor, Tensor], train_actor: bool = True) -> dict[str, Tensor]:
        actor_loss, kl = self.actor_loss(rows, data)
        value_loss = (self.values(rows.inputs) - rows.returns).square().mean()
        if train_actor:
            self.minimise(actor_loss, self.actor, self.actor_optimizer)
        self.minimise(value_loss, self.value, self.value_optimizer)
        figures = {"actor_loss": actor_loss, "value_loss": value_loss, "std": self.actor.log_std.exp().mean(), "kl": kl}
        return {name: value.detach() for name, value in figures.items()}

    def actor_loss(self, rows: Rollout, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The clipped loss, advantages standardised over the rows; and the divergence from the policy that acted."""
        config = self.config
        log_ratio = self.actor.log_prob(rows.inputs, rows.actions) - rows.log_probs
        ratio, clipped = log_ratio.exp(), log_ratio.exp().clamp(1 - config.clip, 1 + config.clip)
        advantages = (rows.advantages - rows.advantages.mean()) / (rows.advantages.std(correction=0) + 1e-8)
        loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        return loss - config.bc_weight * self.actor.log_prob(*data).mean(), (ratio - 1 - log_ratio).mean()

    def minimise(self, loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), self.config.max_grad_norm)
        optimizer.step()

    PARTS = ("actor", "value", "actor_optimizer", "value_optimizer")

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on but the generator, which is the caller's."""
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
