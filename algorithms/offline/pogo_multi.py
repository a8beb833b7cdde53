"""POGO's chain of actors over an offline algorithm: its critics, V and temperature stay, its actor becomes a chain.

    actor 0       the algorithm's own actor loss + w_0 D(pi_0, data)
    actor i >= 1  the algorithm's improvement      + w_i D(pi_i, pi_{i-1})

and everything of the algorithm that asks for an action (targets, advantages, penalties) asks actor 0, whose bits no
later actor changes. (The original text keeps a second actor for CQL's penalty, without the weight w_0; here the critics
are those of the policy that the chain begins with.) Actors are trained in order, each after the one before has made its
step, which gives no gradient.

D is half of W2 squared between the two policies' actions in a state, averaged over states, whatever the policies are:

| between | D | factor |
|---|---|---|
| a policy and the data's action | E||pi(s, z) - a||^2 / 2, closed form for a Gaussian | exact: one coupling |
| two points | ||pi_i(s) - pi_{i-1}(s)||^2 / 2 | exact |
| two Gaussians | (||mean - mean'||^2 + ||std - std'||^2) / 2 | exact, before actions are cut to the box |
| any other two | from `sinkhorn_K` draws each, by `transport.policy_distance` | by default exact for a JKO step |

so that a weight means the same everywhere. (`pogo_agent.py` has the mean over elements in actor 0: w there is 2 w / A
here.) Draws of two densities with the same noise, the default, are coupled optimally: each number of an action rises
with its own noise. As in `pogo_agent.py`, an actor of the same kind as the one before begins as its copy and takes over
its change of weights before it makes its own step (`follow`), without which it would spend the run on catching up.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.offline.base import Batch, Info, OfflineAlgorithm, OfflineConfig
from algorithms.offline.pogo_policies import Distribution, Draw, Gaussian, Point
from pogo_agent import SHOWN, ActorChain, step_metrics
from transport import DistanceConfig, gaussian_w2, policy_distance
from utils import Basic


@dataclass
class ChainConfig(DistanceConfig):
    w2_weights: Basic[tuple[float, ...]] = (10.0, 10.0, 10.0)  # weight of each actor's distance: more keeps it nearer
    follow: bool = True  # an actor first repeats the change of weights that the actor before it has just made
    lr_decay: bool = False  # let the actors' learning rate fall to 0 along a cosine over the run, as IQL's always does


class MultiActor(ActorChain):
    """An algorithm with a chain of actors in the place of its one.

    Args:
        algorithm, config, sizes, generator, device: the algorithm, and what it is made with.
        chain: settings of the chain; as many actors as weights.
        policies: what makes each actor's policy, given sizes and hidden_dim; None: the algorithm's own.
    """

    def __init__(
        self,
        algorithm: type[OfflineAlgorithm],
        config: OfflineConfig,
        chain: ChainConfig,
        sizes: tuple[int, int, float],
        generator: torch.Generator,
        device: str | torch.device = "cpu",
        policies: Sequence[Callable[..., nn.Module] | None] | None = None,
    ):
        self.algorithm = algorithm(config, sizes, generator, device, policies[0] if policies else None)
        self.algorithm.actor_lr_decay |= chain.lr_decay
        self.chain, self.actors, self.noise_owner = chain, [self.algorithm.actor], self.algorithm
        self.device = self.algorithm.device
        self.generators = self.spawn_generators(generator, len(chain.w2_weights))
        given = policies or [None] * len(chain.w2_weights)
        own = self.algorithm.make_actor if given[0] is None else self.algorithm.default_actor()
        makers = [make or own for make in given]
        self.actor_optimizers, self.follows = [self.algorithm.optimizers["actor"]], [False]
        for number, make in enumerate(makers[1:], 1):
            actor, name = make(*sizes, config.hidden_dim), f"actor_{number}"
            # Of the same maker, not of the same class: one class may hold differently built policies.
            is_copy = make is makers[number - 1]
            if is_copy:
                actor.load_state_dict(self.actors[-1].state_dict())
            self.actors.append(self.algorithm.add(name, actor, self.algorithm.actor_lr))
            self.actor_optimizers.append(self.algorithm.optimizers[name])
            self.follows.append(chain.follow and is_copy)

    def update(self, batch: Batch) -> Info:
        return self.algorithm.update(batch, self.update_actors)

    def actor_loss(self, number: int, batch: Batch) -> tuple[Tensor, Info]:
        observations, actor = batch["observations"], self.actors[number]
        if number == 0:
            distribution, draw = self.algorithm.draw(actor, observations)
            loss, info = self.algorithm.actor_loss(distribution, draw, batch)
            distance = distance_to_data(distribution, draw, batch["actions"])
        else:
            z = self.algorithm.noise(len(observations), self.chain.sinkhorn_K)
            distribution = actor(observations)
            draw = distribution.draw(z)
            loss, info = self.algorithm.next_actor_loss(distribution, draw.first(), batch)
            with torch.no_grad():
                reference = self.actors[number - 1](observations)
            distance = self.distance(distribution, reference, z, draw.actions)
        if self.chain.w2_weights[number] != 0:  # adding 0 would change how gradients are rounded
            loss = loss + self.chain.w2_weights[number] * distance
        info |= {"loss": loss.detach(), "distance": distance.detach()}
        return loss, {f"actor_{number}/{name}": value for name, value in info.items()}

    def distance(self, policy: Distribution, reference: Distribution, z: Tensor, actions: Tensor) -> Tensor:
        """D, 0-d, of the table above; z, actions: [n, K, A] noise and the policy's actions at it."""
        if isinstance(policy, Gaussian) and isinstance(reference, Gaussian):
            return gaussian_w2(policy.mean, policy.std, reference.mean, reference.std).mean()
        if isinstance(policy, Point) and isinstance(reference, Point):
            return (policy.mode - reference.mode).square().sum(-1).mean() / 2
        samplers = [lambda z, of=of: of.draw(z).actions for of in (policy, reference)]
        noise = functools.partial(self.algorithm.noise, *z.shape[:2])
        return policy_distance(self.chain, self.algorithm.max_action, *samplers, z, actions, noise)

    @property
    def step(self) -> int:
        return self.algorithm.step

    @step.setter
    def step(self, value: int) -> None:
        self.algorithm.step = value

    @torch.no_grad()
    def diagnose_actor(self, number: int, batch: Batch) -> Info:
        """As every chain; `q` is the mean of the lesser Q at one draw a state."""
        observations, policy = batch["observations"], self.actors[number](batch["observations"])
        z = self.algorithm.noise(len(observations), max(self.chain.sinkhorn_K, SHOWN))
        draw = policy.draw(z)
        if number == 0:
            before = batch["actions"].unsqueeze(1).expand_as(draw.actions)
            distance, floor = distance_to_data(policy, draw.first(), batch["actions"]), before.new_zeros(())
        else:
            reference = self.actors[number - 1](observations)
            before = reference.draw(z).actions
            distance = self.distance(policy, reference, z, draw.actions)
            floor = self.distance(reference, reference, z, before)
        q, stayed = (self.algorithm.critic(observations, a[:, 0]).amin(0).mean() for a in (draw.actions, before))
        return step_metrics(draw.actions, before, q, stayed, distance, floor)

    def anneal(self, share: float) -> None:
        self.algorithm.anneal(share)

    def state_dict(self) -> dict[str, Any]:
        return self.algorithm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.algorithm.load_state_dict(state)


def distance_to_data(distribution: Distribution, draw: Draw, actions: Tensor) -> Tensor:
    """Half of W2 squared between a policy and the data's action in a state, averaged over states, 0-d."""
    if isinstance(distribution, Gaussian):
        return gaussian_w2(distribution.mean, distribution.std, actions, torch.zeros_like(actions)).mean()
    return (draw.actions - actions).square().sum(-1).mean() / 2
