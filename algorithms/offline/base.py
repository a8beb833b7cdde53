"""What the algorithms of this folder share: plumbing, no update rule.

An algorithm's `update` reads top to bottom in its own file. Where the actor's turn comes it calls `update_actors`,
which is its own single step unless a chain of actors takes that place (pogo_multi.MultiActor):

    actor_loss(distribution, draw, batch)        of the algorithm's actor, and of a chain's first
    next_actor_loss(distribution, draw, batch)   of a chain's later ones, without the distance to the one before

`distribution` is what `policy(observations)` gives, `draw` one action a state of it. A batch holds observations,
next_observations [n, D], actions [n, A], rewards, terminated, truncated [n] float32. The run and a chain's diagnostics
ask for `self.critic`, and for `critic_loss` and `q_data`, Q of the batch's actions, in what `update` gives.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.offline.pogo_policies import Distribution, Draw
from model_kernels import Adam, cosine
from utils import BelowOne, Count, Positive, PositiveFraction

Batch = dict[str, Tensor]
Info = dict[str, Tensor]  # 0-d tensors on the device
UpdateActors = Callable[[Batch], Info]


@dataclass
class OfflineConfig:
    discount: BelowOne = 0.99  # discount factor of rewards
    tau: PositiveFraction = 0.005  # rate of the target networks' Polyak average
    hidden_dim: Count = 256  # width of the hidden layers of every network
    actor_lr: Positive = 3e-4  # learning rate of Adam for the actors
    qf_lr: Positive = 3e-4  # learning rate of Adam for the critics


class Learner:
    """Networks, an optimizer for each that is trained (an Adam, where `add` makes it), and their checkpoint."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.device, self.step = torch.device(device), 0
        self.networks: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Adam | torch.optim.Optimizer] = {}

    def add(self, name: str, network: nn.Module, lr: float | Tensor) -> nn.Module:
        self.networks[name] = network.to(self.device)
        self.optimizers[name] = Adam(network.parameters(), torch.as_tensor(lr, device=self.device))
        return network

    def minimise(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].minimise(loss)

    def anneal(self, share: float) -> None:  # noqa: B027  most rates stay
        """Set learning rates for a share of the run behind, 0 to 1; none falls by default."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on but the generator, which is the caller's."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step = int(state["step"])


class OfflineAlgorithm(Learner, abc.ABC):
    """What every algorithm has: an actor, target networks, noise.

    Args:
        sizes: observation_dim, action_dim, max_action: actions lie in [-max_action, max_action].
        generator: of all noise, on the device.
        make_actor: makes the policy that it trains and that its critics bootstrap from, given sizes and hidden_dim;
            default: the algorithm's own.
    """

    actor_lr_decay = False  # whether the actors' learning rate falls to 0 along a cosine over the run

    def __init__(
        self,
        config: OfflineConfig,
        sizes: tuple[int, int, float],
        generator: torch.Generator,
        device: str | torch.device = "cpu",
        make_actor: Callable[..., nn.Module] | None = None,
    ):
        super().__init__(device)
        self.config, self.generator = config, generator
        self.max_action, self.make_actor = sizes[2], make_actor or self.default_actor()
        self.targets: list[tuple[list[Tensor], list[Tensor]]] = []  # target networks' parameters, and the online ones
        self.actor_lr = torch.tensor(config.actor_lr, device=self.device)
        self.actor = self.add("actor", self.make_actor(*sizes, config.hidden_dim), self.actor_lr)
        self.build(*sizes)

    def add_target(self, name: str, network: nn.Module, source: nn.Module) -> nn.Module:
        """Keep a network that begins as a copy of another and follows it by `update_targets`."""
        self.networks[name] = network.to(self.device).requires_grad_(False)
        network.load_state_dict(source.state_dict())
        self.targets.append((list(network.parameters()), list(source.parameters())))
        return network

    @torch.no_grad()
    def update_targets(self) -> None:
        for target, online in self.targets:
            torch._foreach_lerp_(target, online, self.config.tau)

    def noise(self, *shape: int) -> Tensor:
        """Standard normal [*shape, A] from the algorithm's generator."""
        return torch.randn(*shape, self.actor.action_dim, generator=self.generator, device=self.device)

    def draw(self, policy: nn.Module, observations: Tensor) -> tuple[Distribution, Draw]:
        """A policy's distribution in each state, and one action of it."""
        distribution = policy(observations)
        return distribution, distribution.draw(self.noise(len(observations)))

    def anneal(self, share: float) -> None:
        if self.actor_lr_decay:
            self.actor_lr.fill_(self.config.actor_lr * cosine(share))

    @abc.abstractmethod
    def default_actor(self) -> Callable[..., nn.Module]:
        """What makes the algorithm's own policy."""

    @abc.abstractmethod
    def build(self, observation_dim: int, action_dim: int, max_action: float) -> None:
        """Make everything but the actor: critics, target networks, temperatures."""

    @abc.abstractmethod
    def update(self, batch: Batch, update_actors: UpdateActors | None = None) -> Info:
        """One step. `update_actors` trains the actors in place of `update_actor`."""

    @abc.abstractmethod
    def actor_loss(self, distribution: Distribution, draw: Draw, batch: Batch) -> tuple[Tensor, Info]:
        """Loss of the algorithm's actor."""

    @abc.abstractmethod
    def next_actor_loss(self, distribution: Distribution, draw: Draw, batch: Batch) -> tuple[Tensor, Info]:
        """What a chain's later actors minimise beside their distance to the one before."""

    def update_actor(self, batch: Batch) -> Info:
        distribution, draw = self.draw(self.actor, batch["observations"])
        loss, info = self.actor_loss(distribution, draw, batch)
        self.minimise("actor", loss)
        return info | {"actor_loss": loss.detach()}
