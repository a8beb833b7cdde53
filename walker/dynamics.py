"""Learned models of the walker: next observation and reward of an observation and an action.

Observations are standardised; an input may carry the task's bit behind them, which a step leaves as it is. A model
predicts the change of the observation, in units of that change's deviation over the data, and the reward.

    MLPDynamics    an ensemble of E networks, each trained on rows of its own; a row steps by one of them at random
                   mean squared error
    VAEDynamics    a conditional variational autoencoder: a step is decoded from (s, a, z), z ~ N(0, I)
                   mean squared error + KL_WEIGHT / (D + 1) KL(q(z|s, a, s', r) || N(0, I))

Predictions are kept to what the data has seen: observations to their range, rewards to [0, 1].
"""

import abc
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import MLP

LATENT_DIM, KL_WEIGHT = 8, 0.05  # of the autoencoder


class DataStatistics(NamedTuple):
    """Of standardised observations [D]."""

    change_std: Tensor  # standard deviation of a step's change
    low: Tensor  # smallest and largest value
    high: Tensor


class Dynamics(nn.Module, abc.ABC):
    """input_dim: D, or D + 1 with the task's bit."""

    members = 1

    def __init__(self, input_dim: int, statistics: DataStatistics):
        super().__init__()
        self.observation_dim, self.input_dim = len(statistics.low), input_dim
        for name, value in statistics._asdict().items():
            self.register_buffer(name, value)

    @abc.abstractmethod
    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a batch of `members` times n transitions; 0-d, and its parts."""

    @abc.abstractmethod
    def predict(self, inputs: Tensor, actions: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of scaled change and reward, [n, D + 1]."""

    @torch.no_grad()
    def step(self, inputs: Tensor, actions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs [n, input_dim] and rewards [n] that follow."""
        predicted = self.predict(inputs, actions.clamp(-1.0, 1.0), generator)
        own = self.observation_dim
        following = inputs[:, :own] + predicted[:, :own] * self.change_std
        following = torch.minimum(torch.maximum(following, self.low), self.high)
        return torch.cat([following, inputs[:, own:]], 1), predicted[:, own].clamp(0.0, 1.0)

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """Scaled change and reward of transitions, [n, D + 1]."""
        own = self.observation_dim
        change = (batch["next_observations"][:, :own] - batch["observations"][:, :own]) / self.change_std
        return torch.cat([change, batch["rewards"].unsqueeze(1)], 1)


class MLPDynamics(Dynamics):
    """`members` MLPs of three hidden layers."""

    def __init__(
        self, input_dim: int, action_dim: int, statistics: DataStatistics, hidden_dim: int = 256, members: int = 1
    ):
        super().__init__(input_dim, statistics)
        self.members = members
        self.net = MLP(input_dim + action_dim, hidden_dim, self.observation_dim + 1, 3, members)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.cat([batch["observations"], batch["actions"]], 1).unflatten(0, (self.members, -1))
        squared = (self.net(rows) - self.targets(batch).unflatten(0, (self.members, -1))).square()
        loss = squared.mean((1, 2)).sum()  # a sum, so that a member's gradient does not depend on their number
        return loss, {"model_loss": loss.detach() / self.members, "reward_error": squared[..., -1].detach().mean()}

    def predict(self, inputs: Tensor, actions: Tensor, generator: torch.Generator) -> Tensor:
        found = self.net(inputs, actions)  # of every member, [E, n, D + 1]
        chosen = torch.randint(self.members, (len(inputs),), generator=generator, device=inputs.device)
        return found[chosen, torch.arange(len(inputs), device=inputs.device)]

    @torch.no_grad()
    def disagreement(self, inputs: Tensor, actions: Tensor) -> Tensor:
        """Largest distance between two members' predictions, [n]."""
        found = self.net(inputs, actions.clamp(-1.0, 1.0))
        pairs = found.unsqueeze(0) - found.unsqueeze(1)  # [E, E, n, D + 1]
        return pairs.norm(dim=-1).flatten(0, 1).amax(0)


class VAEDynamics(Dynamics):
    """Encoder of two and decoder of three hidden layers around LATENT_DIM numbers."""

    def __init__(self, input_dim: int, action_dim: int, statistics: DataStatistics, hidden_dim: int = 256):
        super().__init__(input_dim, statistics)
        condition, target = input_dim + action_dim, self.observation_dim + 1
        self.encoder = MLP(condition + target, hidden_dim, 2 * LATENT_DIM)
        self.decoder = MLP(condition + LATENT_DIM, hidden_dim, target, 3)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        condition, target = torch.cat([batch["observations"], batch["actions"]], 1), self.targets(batch)
        mean, log_std = self.encoder(condition, target).chunk(2, dim=1)
        log_std = log_std.clamp(-6.0, 2.0)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        z = mean + log_std.exp() * noise
        squared = (self.decoder(condition, z) - target).square()
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1).mean()
        loss = squared.mean() + KL_WEIGHT * kl / squared.shape[1]
        parts = {"model_loss": squared.mean(), "kl": kl, "reward_error": squared[:, -1].mean()}
        return loss, {name: value.detach() for name, value in parts.items()}

    def predict(self, inputs: Tensor, actions: Tensor, generator: torch.Generator) -> Tensor:
        z = torch.randn(len(inputs), LATENT_DIM, generator=generator, device=inputs.device)
        return self.decoder(inputs, actions, z)


def statistics_of(observations: Tensor, following: Tensor) -> DataStatistics:
    change = (following - observations).std(0).clamp(min=1e-6)
    return DataStatistics(change, following.amin(0), following.amax(0))
