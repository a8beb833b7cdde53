"""CORL's files beside ours: the same weights and draws in float64, and one update of theirs for the speed.

Weights are copied from CORL's networks into ours; then both make the same updates from the same batches and random
numbers, and no weight should differ by more than rounding. bench_algorithms.py prints the largest difference.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from algorithms.offline.awac import AWAC, AWACConfig
from algorithms.offline.cql import CQL, CQLConfig
from algorithms.offline.edac import EDAC, EDACConfig
from algorithms.offline.iql import IQL, IQLConfig
from algorithms.offline.sac_n import SACN, SACNConfig
from algorithms.offline.td3_bc import TD3BC, TD3BCConfig
from benchmarks.peers import load_file
from benchmarks.turns import Contestant, on_device
from model import EnsembleCritic

D, A, BATCH = 17, 6, 256  # halfcheetah and walker2d
LR = 3e-4
CPU = torch.device("cpu")

Weights = list[tuple[torch.Tensor, torch.Tensor]]
Layers = Weights  # weight and bias of each


@dataclass
class Pair:
    """One algorithm in both forms, from the same weights."""

    ours: Callable[[dict], Any]  # one update of a batch
    theirs: Callable[[list], Any]
    weights: Weights  # ours beside theirs, as views that the updates write into


def linears(net: nn.Module) -> list[nn.Linear]:
    return [layer for layer in net.modules() if isinstance(layer, nn.Linear)]


def layers_of(ours: nn.Module) -> Layers:
    """Weight [in, out] and bias [out] of the layers of a network's one MLP; with members in front, of an ensemble."""
    return [(weight.detach(), bias.detach()) for weight, bias in ours.net.layers()]


def beside(ours: nn.Module, theirs: nn.Module) -> Weights:
    """The parameters of two MLPs, layer by layer."""
    return layers_beside(layers_of(ours), linears(theirs))


def layers_beside(ours: Layers, theirs: Sequence[nn.Linear]) -> Weights:
    pairs = zip(ours, theirs, strict=True)
    return [both for (w, b), other in pairs for both in ((w, other.weight.data.T), (b, other.bias.data))]


def critics_beside(ours: EnsembleCritic, theirs: list[nn.Module]) -> Weights:
    """The parameters of stacked critics and of single ones."""
    found = []
    for number, critic in enumerate(theirs):
        found += layers_beside([(w[number], b[number, 0]) for w, b in layers_of(ours)], linears(critic))
    return found


def stacked_beside(ours: EnsembleCritic, theirs: list[nn.Module]) -> Weights:
    """The parameters of critics that both have stacked."""
    pairs = zip(layers_of(ours), theirs, strict=True)
    return [both for (w, b), other in pairs for both in ((w, other.weight.data), (b, other.bias.data))]


def adam(net: nn.Module, lr: float = LR) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr)


def td3_bc(corl: Any, _: str, device: torch.device = CPU) -> Pair:
    actor, critics = corl.Actor(D, A, 1.0), [corl.Critic(D, A) for _ in range(2)]
    ours = TD3BC(TD3BCConfig(), (D, A, 1.0), torch.default_generator)
    first, second = critics
    trainer = corl.TD3_BC(*(1.0, actor, adam(actor), first, adam(first), second, adam(second)), device=str(device))
    weights = beside(ours.actor, actor) + critics_beside(ours.critic, critics)
    copy_over(weights + beside(ours.actor_target, actor) + critics_beside(ours.critic_target, critics))
    return Pair(ours.update, trainer.train, weights)


def iql(corl: Any, _: str, device: torch.device = CPU) -> Pair:
    actor, q, value = corl.GaussianPolicy(D, A, 1.0), corl.TwinQ(D, A), corl.ValueFunction(D)
    trainer = corl.ImplicitQLearning(1.0, actor, adam(actor), q, adam(q), value, adam(value), device=str(device))
    ours = IQL(IQLConfig(), (D, A, 1.0), torch.default_generator)
    critics = [q.q1, q.q2]
    weights = beside(ours.actor, actor) + beside(ours.value, value) + critics_beside(ours.critic, critics)
    copy_over(weights + critics_beside(ours.critic_target, critics))
    return Pair(ours.update, trainer.train, weights)


def awac(corl: Any, _: str, __: torch.device = CPU) -> Pair:
    actor, critics = corl.Actor(D, A, 256), [corl.Critic(D, A, 256) for _ in range(2)]
    optimizers = [adam(critic) for critic in critics]
    trainer = corl.AdvantageWeightedActorCritic(
        actor, adam(actor), critics[0], optimizers[0], critics[1], optimizers[1], awac_lambda=1 / 3
    )
    ours = AWAC(AWACConfig(), (D, A, 1.0), torch.default_generator)
    weights = beside(ours.actor, actor) + critics_beside(ours.critic, critics)
    copy_over(weights + critics_beside(ours.critic_target, critics))
    return Pair(ours.update, trainer.update, weights)


def sac_n(corl: Any, name: str, device: torch.device = CPU) -> Pair:
    """SAC-N and EDAC. CORL adds 1e-6 inside the density's logarithm, so that weights part a little."""
    actor, critic = corl.Actor(D, A, 256), corl.VectorizedCritic(D, A, 256, 10)
    make = corl.SACN if name == "sac_n" else corl.EDAC
    trainer = make(actor, adam(actor), critic, adam(critic), alpha_learning_rate=LR, device=str(device))
    settings = SACNConfig() if name == "sac_n" else EDACConfig()
    ours = (SACN if name == "sac_n" else EDAC)(settings, (D, A, 1.0), torch.default_generator)
    *hidden, (weight, bias) = layers_of(ours.actor)
    weights = layers_beside(hidden, linears(actor.trunk))
    weights += layers_beside([(weight[:, :A], bias[:A]), (weight[:, A:], bias[A:])], [actor.mu, actor.log_sigma])
    layers = [layer for layer in critic.critic if hasattr(layer, "weight")]
    weights += stacked_beside(ours.critic, layers)
    copy_over(weights + stacked_beside(ours.critic_target, layers))
    return Pair(ours.update, trainer.update, weights)


def cql(corl: Any, _: str, device: torch.device = CPU) -> Pair:
    """Without the temperature's step, whose draws are others, and CORL's two scalars beside log std."""
    actor = corl.TanhGaussianPolicy(D, A, 1.0)
    critics = [corl.FullyConnectedQFunction(D, A, True) for _ in range(2)]
    for scalar in (actor.log_std_multiplier, actor.log_std_offset):
        scalar.requires_grad_(False)
    optimizers = [adam(critic) for critic in critics]
    trainer = corl.ContinuousCQL(
        *(critics[0], optimizers[0], critics[1], optimizers[1], actor, adam(actor.base_network, 3e-5)),
        **{"target_entropy": -A, "policy_lr": 0.0, "qf_lr": LR, "bc_steps": 0, "cql_alpha": 10.0},
        device=str(device),
    )
    ours = CQL(CQLConfig(), (D, A, 1.0), torch.default_generator)
    ours.optimizers["temperature"].lr = torch.tensor(0.0)
    weights = beside(ours.actor, actor.base_network) + critics_beside(ours.critic, critics)
    copy_over(weights + critics_beside(ours.critic_target, critics))

    def update(batch: dict) -> None:
        """Ours with the draws in CORL's order."""
        own, following = torch.randn(BATCH, A), torch.randn(BATCH, 1, A)
        uniform, here, more = torch.rand(BATCH, 10, A), torch.randn(BATCH, 10, A), torch.randn(BATCH, 10, A)
        noise, rand = [here, torch.cat([following, more], dim=1), own], torch.rand
        ours.noise = lambda *shape: noise.pop(0)
        torch.rand = lambda *shape, **more: uniform
        try:
            ours.update(batch)
        finally:
            torch.rand = rand

    return Pair(update, trainer.train, weights)


MAKERS = {"td3_bc": td3_bc, "iql": iql, "awac": awac, "cql": cql, "sac_n": sac_n, "edac": sac_n}


def copy_over(weights: Weights) -> None:
    for own, other in weights:
        own.copy_(other)


def load(folder: str, name: str) -> Any:
    """CORL's file of an algorithm, from a clone. Raises UserError."""
    return load_file("--corl", folder, f"algorithms/offline/{name}.py")


def contestant(folder: str, name: str, arrays: dict[str, np.ndarray], device: torch.device) -> Contestant:
    """An update of CORL's on a batch of its own ReplayBuffer.

    Args:
        folder: a clone of CORL.
        name: of the algorithm, a key of MAKERS.
        arrays: observations, next_observations [N, D], actions [N, A], rewards, dones [N] float32.
        device: of the networks and the data.
    """
    corl = load(folder, name)
    with device:  # where new tensors go; ours beside them are made for the weights and not used
        update = MAKERS[name](corl, name, device).theirs
    buffer = corl.ReplayBuffer(D, A, len(arrays["rewards"]), str(device))
    with contextlib.redirect_stdout(io.StringIO()):  # it says how large the data is
        buffer.load_d4rl_dataset({**arrays, "terminals": arrays["dones"]})
    return on_device(lambda: update([part.to(device) for part in buffer.sample(BATCH)]), device)


def make_batch(seed: int) -> tuple[dict, list]:
    """One batch as ours and as CORL's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"observations": (BATCH, D), "next_observations": (BATCH, D), "rewards": (BATCH,)}
    batch = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    batch["actions"] = 2 * torch.rand(BATCH, A, generator=generator) - 1
    batch["terminated"] = (torch.rand(BATCH, generator=generator) < 0.1).to(batch["rewards"].dtype)
    columns = [batch["rewards"].unsqueeze(1), batch["next_observations"], batch["terminated"].unsqueeze(1)]
    return batch, [batch["observations"], batch["actions"], *columns]


def largest_difference(corl: Any, name: str, updates: int) -> float:
    """Of any weight after updates from the same draws in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        pair = MAKERS[name](corl, name)
        for seed in range(updates):
            for step, batch in zip((pair.ours, pair.theirs), make_batch(seed), strict=True):
                torch.manual_seed(seed)
                step(batch)
        return max(float((own - other).abs().max()) for own, other in pair.weights)
    finally:
        torch.set_default_dtype(torch.float32)
