"""POGO: policy optimization via gradient flow, a chain of transport-map actors for offline RL.

Each actor a = T(s, z), z ~ N(0, I), is one step of the JKO scheme (Jordan, Kinderlehrer & Otto, 1998) from the one
before it: it raises Q and pays for the distance it moves. Actor i minimises

    L_i = -lambda E[Q1(s, pi_i(s, z))] + w_i D_i
    D_0 = mean over elements of (pi_0(s, z) - a)^2                 to the data, whose actions are points
    D_i = half of W2(pi_i(.|s), pi_{i-1}(.|s)) squared               to the previous actor, i >= 1

and the critics learn the value of the first actor, the one nearest to the data:

    y = r + discount (1 - terminated) min_k Q_k_target(s', clip(pi_0(s', z') + clipped noise))

    data --w_0--> pi_0 --w_1--> pi_1 --w_2--> pi_2                 one update: critic, actors in this order, averages
                   '--> critic

With one actor this is TD3+BC (Fujimoto & Gu, 2021) but for its noise z, its undelayed policy, the decay of its learning
rate and, unless `td_actor` says otherwise, its bootstrap from the online actor; its alpha 2.5 is w_0 = 0.4.

Choices where the sources differ or are silent:
- lambda = 1 / mean|Q| over the batch (`q_normalization batch`), as the original text has a normalisation. The code
  published later has lambda = 1 (`none`). Where each step pays the same but at a goal, as -1 on antmazes, Q is taken
  without what that adds up to: else its size is that of the constant, and nothing is left of its slopes.
- All actors begin as copies of the first, and before its own gradient step an actor takes over the change of weights
  that the one before it has just made (`follow`), as a step of the scheme begins where the one before it stands.
  Without that an actor spends the run on coming near the one before, and never gets to its step.
- The critics begin at the data's mean discounted return (`q_start`), not at 0: Q has to climb to the level of returns
  before its slopes mean anything, one target average at a time, and while it climbs it runs away where actions leave
  the data (docs/notebook_pogo.md).
- The actors' learning rate falls to 0 over the run (`lr_decay`): an actor follows one that moves at every step, and
  lags behind by more than the step it is to make (docs/notebook_pogo.md).
- One sample a state and policy (`sinkhorn_K`), where the original has four: with the same noise on both sides more
  samples are more of the same, and actors are so narrow that their best assignment saves less than a thousandth. Of
  several the distance takes all, Q the first: no difference in expectation.
- Actor and reference are sampled with the same noise, and the optimal assignment is exact: with independent noise an
  actor is drawn to a third of its reference's spread, and GeomLoss's gradients are a third off (docs/pogo_theory.md).
  `--w2_noise independent --sinkhorn_backend tensorized --sinkhorn_K 4` is the original.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from model import EnsembleCritic, TransportActor
from model_kernels import Adam, cosine
from transport import DistanceConfig, Samples, blur_unit, cloud_spread, l2, policy_distance
from utils import BelowOne, Count, NonNegative, Positive, PositiveFraction

EPS = 1e-12  # avoids division by zero
SHOWN = 4  # samples a state, at least, of which diagnostics tell the spread


@dataclass
class POGOConfig(DistanceConfig):
    sinkhorn_K: Samples = 1  # samples of a policy in a state, between which distances are measured; the original has 4
    lr: Positive = 3e-4  # learning rate of Adam for critic and actors; 1e-4 is usual on antmaze
    follow: bool = True  # an actor first repeats the change of weights that the actor before it has just made
    lr_decay: bool = True  # let the actors' learning rate fall to 0 along a cosine over the run
    discount: BelowOne = 0.99  # discount factor of rewards
    tau: PositiveFraction = 0.005  # rate of the target networks' Polyak average
    policy_noise: NonNegative = 0.2  # standard deviation of the noise on the target's action, in units of max_action
    noise_clip: NonNegative = 0.5  # largest such noise, in units of max_action
    policy_freq: Count = 1  # updates of the critics for each update of the actors and target networks
    q_normalization: Literal["batch", "none"] = "batch"  # batch divides Q by its mean size in the batch
    q_start: Literal["data", "zero"] = "data"  # critics begin at the data's mean discounted return, or at 0
    td_actor: Literal["online", "target"] = "online"  # critics bootstrap from actor 0 or its target copy
    hidden_dim: Count = 256  # width of the two hidden layers of every network


class ActorChain:
    """Actors in order, each a step from the one before it, whatever algorithm they are of.

    It has `actor_loss(number, batch) -> (loss, info)` and `diagnose_actor(number, batch)`, and these:
    """

    device: torch.device
    actors: Sequence[nn.Module]
    actor_optimizers: list[Adam]
    follows: list[bool]  # whether an actor repeats the steps of the one before, whose networks it has
    noise_owner: Any  # whose `generator` all noise is drawn from: that of the actor whose turn it is
    generators: list[torch.Generator]  # of each actor; the first is the critics' too

    def spawn_generators(self, generator: torch.Generator, count: int) -> list[torch.Generator]:
        """The given one and others by its seed, one an actor, so that an actor changes no bit of those before it."""
        seeds = np.random.SeedSequence(generator.initial_seed()).generate_state(count - 1, np.uint64)
        return [generator, *(torch.Generator(self.device).manual_seed(int(seed)) for seed in seeds)]

    def update_actors(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A step of each actor, in order."""
        info: dict[str, Tensor] = {}
        change: list[Tensor] = []
        for number, actor in enumerate(self.actors):
            self.noise_owner.generator = self.generators[number]
            parameters = [parameter.detach() for parameter in actor.parameters()]
            before = [parameter.clone() for parameter in parameters]
            if self.follows[number]:
                torch._foreach_add_(parameters, change)
            loss, more = self.actor_loss(number, batch)
            self.actor_optimizers[number].minimise(loss)
            change = torch._foreach_sub(parameters, before)
            info |= more
        self.noise_owner.generator = self.generators[0]
        return info

    def diagnose(self, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """What each step of the chain did, on one batch: `step_metrics` and more, 0-d, as chain/actor_i/...

        Changes nothing: it draws from a generator of its own.
        """
        owner = self.noise_owner
        kept, owner.generator = owner.generator, torch.Generator(self.device).manual_seed(seed)
        try:
            found = [self.diagnose_actor(number, batch) for number in range(len(self.actors))]
        finally:
            owner.generator = kept
        return {f"chain/actor_{i}/{name}": value for i, metrics in enumerate(found) for name, value in metrics.items()}


def step_metrics(
    samples: Tensor, before: Tensor, q: Tensor, stayed: Tensor, distance: Tensor, floor: Tensor
) -> dict[str, Tensor]:
    """What every chain says of a step, 0-d each, from actions [n, K, A] of an actor and of the one before it.

    `q` is the actor's value and `q_gain` what that gains on the one before, `moved` the root mean square distance
    between the actions of both at the same noise, `floor` the distance of the one before to itself, which only
    independent noise puts above 0, `spread` the deviation of an actor's samples.
    """
    moved = (samples - before).square().sum(-1).mean().sqrt()
    metrics = {"q": q, "q_gain": q - stayed, "moved": moved, "distance": distance, "floor": floor}
    return metrics | {"spread": cloud_spread(samples)}


class POGOAgent(ActorChain):
    """Twin critics, a chain of actors, target networks, an Adam each.

    Args:
        observation_dim, action_dim: sizes D and A.
        max_action: actions lie in [-max_action, max_action].
        generator: of the noise of critics and first actor, on the device; by its seed those of the other actors.
        data_value: mean discounted return of the data, at which critics begin (`q_start`).
        step_reward: what every step pays, which lambda takes no account of.
    """

    def __init__(
        self,
        config: POGOConfig,
        observation_dim: int,
        action_dim: int,
        max_action: float,
        generator: torch.Generator,
        device: str | torch.device = "cpu",
        data_value: float = 0.0,
        step_reward: float = 0.0,
    ):
        self.config, self.max_action, self.action_dim = config, max_action, action_dim
        self.q_floor = step_reward / (1 - config.discount)
        self.generator, self.noise_owner, self.device = generator, self, torch.device(device)
        self.generators = self.spawn_generators(generator, len(config.w2_weights))
        sizes = (observation_dim, action_dim)
        self.critic = EnsembleCritic(*sizes, config.hidden_dim).to(self.device)
        if config.q_start == "data":
            with torch.no_grad():
                self.critic.net.layers()[-1][1].add_(data_value)  # the bias of the output
        actors = [TransportActor(*sizes, max_action, config.hidden_dim) for _ in config.w2_weights]
        self.actors = nn.ModuleList(actors).to(self.device)
        for actor in self.actors[1:]:
            actor.load_state_dict(self.actors[0].state_dict())
        self.critic_target = EnsembleCritic(*sizes, config.hidden_dim).to(self.device).requires_grad_(False)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.actor_target = TransportActor(*sizes, max_action, config.hidden_dim).to(self.device).requires_grad_(False)
        self.actor_target.load_state_dict(self.actors[0].state_dict())
        self.follows = [config.follow and number > 0 for number in range(len(self.actors))]
        # Tensors, so that a captured update reads them anew.
        self.actor_lr = torch.tensor(config.lr, device=self.device)
        self.critic_optimizer = Adam(self.critic.parameters(), torch.tensor(config.lr, device=self.device))
        self.actor_optimizers = [Adam(actor.parameters(), self.actor_lr) for actor in self.actors]
        self.online_parameters = [*self.critic.parameters(), *self.actors[0].parameters()]
        self.target_parameters = [*self.critic_target.parameters(), *self.actor_target.parameters()]
        self.step = 0

    # -- losses, in the order of an update ------------------------------------------------------------------------

    @torch.no_grad()
    def critic_target_value(self, batch: dict[str, Tensor]) -> Tensor:
        """y [n] of the equation above."""
        config, scale = self.config, self.max_action
        actor = self.actor_target if config.td_actor == "target" else self.actors[0]
        observations = batch["next_observations"]
        noise = self.noise(len(observations)).mul_(config.policy_noise * scale)
        noise = noise.clamp_(-config.noise_clip * scale, config.noise_clip * scale)
        actions = (actor(observations, self.noise(len(observations))) + noise).clamp_(-scale, scale)
        value = self.critic_target(observations, actions).amin(0)
        return batch["rewards"] + config.discount * (1 - batch["terminated"]) * value

    def critic_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of both critics, summed over the two and averaged over the batch."""
        target = self.critic_target_value(batch)
        loss, q = self.critic.squared_error(batch["observations"], batch["actions"], target)
        return loss, {"critic_loss": loss.detach(), "q_data": q.mean()}

    def actor_loss(self, number: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """L_i of actor `number`, at fresh samples."""
        observations = batch["observations"]
        if number == 0:
            actions = self.actors[0](observations, self.noise(len(observations)))
            distance, q_actions = l2(actions, batch["actions"]), actions
        else:
            z = self.noise(len(observations), self.config.sinkhorn_K)
            samples = self.actors[number](observations, z)
            distance, q_actions = self.distance(number, number - 1, observations, z, samples), samples[:, 0]
        q = self.critic.frozen_q1(observations, q_actions)
        scale = self.q_scale(q)
        loss = self.config.w2_weights[number] * distance - scale * q.mean()
        info = {"loss": loss, "q": q.mean(), "distance": distance}
        if number == 0:
            info["q_scale"] = scale
        return loss, {f"actor_{number}/{name}": value.detach() for name, value in info.items()}

    def q_scale(self, q: Tensor) -> Tensor:
        """lambda, 0-d, without gradient."""
        if self.config.q_normalization == "none":
            return torch.ones_like(q[0])
        return 1 / (q.detach() - self.q_floor).abs().mean()

    def distance(self, number: int, reference: int, observations: Tensor, z: Tensor, samples: Tensor) -> Tensor:
        """D, 0-d, of one actor to another; z, samples: [n, K, A] noise and the actor's actions at it."""
        policies = (functools.partial(self.actors[one], observations) for one in (number, reference))
        return policy_distance(
            self.config, self.max_action, *policies, z, samples, functools.partial(self.noise, *z.shape[:2])
        )

    def noise(self, *shape: int) -> Tensor:
        """Standard normal [*shape, A] from the generator whose turn it is."""
        return torch.randn(*shape, self.action_dim, generator=self.generator, device=self.device)

    # -- update ---------------------------------------------------------------------------------------------------

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step: critics, then every policy_freq steps the actors in order and the averages.

        batch: observations, next_observations [n, D], actions [n, A], rewards, terminated [n] float32. Returns 0-d
        tensors without waiting for the device.
        """
        loss, info = self.critic_loss(batch)
        self.critic_optimizer.minimise(loss)
        if self.step % self.config.policy_freq == 0:
            info |= self.update_actors(batch)
            with torch.no_grad():
                torch._foreach_lerp_(self.target_parameters, self.online_parameters, self.config.tau)
        self.step += 1
        return info

    def anneal(self, share: float) -> None:
        """Set the actors' learning rate for a share of the run behind, 0 to 1; nothing without `lr_decay`."""
        if self.config.lr_decay:
            self.actor_lr.fill_(self.config.lr * cosine(share))

    # -- diagnostics of the chain -----------------------------------------------------------------------------------

    def diagnose_actor(self, number: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As every chain, with mean Q1 over all samples, and beside that:

        The mean norm of Q1's gradient by the action, the energy L_i, and what L_i would be had the actor stayed where
        the chain stood before it: an energy below that says the step moved and helped.
        """
        config, observations = self.config, batch["observations"]
        z = self.noise(len(observations), max(config.sinkhorn_K, SHOWN))
        with torch.no_grad():
            samples = self.actors[number](observations, z)
            if number == 0:
                before = batch["actions"].unsqueeze(1).expand_as(samples)
                distance, floor = l2(samples, before), samples.new_zeros(())
            else:
                before = self.actors[number - 1](observations, z)
                distance = self.distance(number, number - 1, observations, z, samples)
                floor = self.distance(number - 1, number - 1, observations, z, before)
        (q, slope), (stayed, _) = (self._q_and_slope(observations, actions) for actions in (samples, before))
        scale, weight = self.q_scale(q), config.w2_weights[number]
        metrics = step_metrics(samples, before, q.mean(), stayed.mean(), distance, floor) | {
            "q_gradient": slope,
            "energy": weight * distance - scale * q.mean(),
            "energy_before": weight * floor - scale * stayed.mean(),
        }
        metrics["energy_fell"] = (metrics["energy"] < metrics["energy_before"]).float()
        if number > 0 and config.sinkhorn_backend != "exact":
            blur = config.sinkhorn_blur * blur_unit(config, before, self.max_action)
            metrics["blur_to_spread"] = blur / cloud_spread(before).clamp_min(EPS)
        return metrics

    def _q_and_slope(self, observations: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Q1 of samples [n, K, A], flat, and the mean norm of its gradient by the action, 0-d."""
        actions = samples.detach().flatten(0, 1).requires_grad_()
        q = self.critic.frozen_q1(observations.repeat_interleave(samples.shape[1], 0), actions)
        (slope,) = torch.autograd.grad(q.sum(), actions)
        return q.detach(), slope.norm(dim=-1).mean()

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything the next update depends on but `generators`."""
        return {
            "critic": self.critic.state_dict(),
            "actors": self.actors.state_dict(),
            "critic_target": self.critic_target.state_dict(),
            "actor_target": self.actor_target.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "actor_optimizers": [optimizer.state_dict() for optimizer in self.actor_optimizers],
            "step": self.step,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, ValueError or RuntimeError where the state is another agent's."""
        for name in ("critic", "actors", "critic_target", "actor_target", "critic_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, stored in zip(self.actor_optimizers, state["actor_optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step = int(state["step"])
