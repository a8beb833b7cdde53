"""The offline algorithms against plain agents written here with the usual modules, and what all of them must do."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from plain_nets import plain, plain_critics
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from algorithms.offline.awac import AWAC, AWACConfig
from algorithms.offline.cql import CQL, CQLConfig
from algorithms.offline.edac import EDAC, EDACConfig
from algorithms.offline.iql import IQL, IQLConfig
from algorithms.offline.sac_n import SACN, SACNConfig
from algorithms.offline.td3_bc import TD3BC, TD3BCConfig
from model import MLP, EnsembleCritic
from runs.cuda_graphs import GraphedStep

D, A, N, WIDTH, UPDATES = 5, 3, 16, 16, 30
SIZES = (D, A, 1.0)
ALGORITHMS = {
    "td3_bc": (TD3BC, TD3BCConfig(hidden_dim=WIDTH)),
    "iql": (IQL, IQLConfig(hidden_dim=WIDTH)),
    "iql_deterministic": (IQL, IQLConfig(hidden_dim=WIDTH, iql_deterministic=True)),
    "awac": (AWAC, AWACConfig(hidden_dim=WIDTH)),
    "sac_n": (SACN, SACNConfig(hidden_dim=WIDTH, num_critics=4)),
    "edac": (EDAC, EDACConfig(hidden_dim=WIDTH, num_critics=4)),
    "cql": (CQL, CQLConfig(hidden_dim=WIDTH, actor_lr=3e-4)),
    "cql_lagrange": (CQL, CQLConfig(hidden_dim=WIDTH, cql_lagrange=True, cql_max_target_backup=True)),
}


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", **changed):
    algorithm, config = ALGORITHMS[name]
    torch.manual_seed(seed)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        generator = torch.Generator(device).manual_seed(seed)
        return algorithm(dataclasses.replace(config, **changed), SIZES, generator, device)
    finally:
        torch.set_default_dtype(kept)


def make_batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "observations": torch.randn(N, D, generator=generator),
        "next_observations": torch.randn(N, D, generator=generator),
        "actions": 1.8 * torch.rand(N, A, generator=generator) - 0.9,
        "rewards": torch.randn(N, generator=generator),
        "terminated": (torch.rand(N, generator=generator) < 0.3).float(),
    }
    return {name: value.to(dtype) for name, value in batch.items()}


def tensors(state) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def count_state(agent) -> int:
    """How many tensors its checkpoint holds: the parameters, and of each trained one Adam's two moments and count."""
    counts = {name: sum(1 for _ in network.parameters()) for name, network in agent.networks.items()}
    trained = sum(counts[name] for name in agent.optimizers)
    assert counts.keys() > agent.optimizers.keys() and trained > 1
    return sum(counts.values()) + 3 * trained


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_moves_every_network_and_reports_numbers(name):
    agent = make(name)
    before = {key: [p.clone() for p in network.parameters()] for key, network in agent.networks.items()}
    for seed in range(4):
        info = agent.update(make_batch(seed))
    assert agent.step == 4 and all(value.dim() == 0 and value.isfinite() for value in info.values())
    assert not any(value.requires_grad for value in info.values()) and "actor_loss" in info
    idle = {"multiplier"} if name == "cql" else set()
    for key, network in agent.networks.items():
        moved = all(not torch.equal(old, new) for old, new in zip(before[key], network.parameters(), strict=True))
        assert moved == (key not in idle), key


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_saved_agent_goes_on_to_the_same_bits(name):
    agent = make(name)
    for seed in range(3):
        agent.anneal(0.5)
        agent.update(make_batch(seed))
    state, noise = copy.deepcopy(agent.state_dict()), agent.generator.get_state()
    later = make(name, seed=1)
    later.load_state_dict(state)
    later.generator.set_state(noise)
    for one in (agent, later):
        for seed in range(3, 6):
            one.anneal(seed / 10)
            one.update(make_batch(seed))
    pairs = list(zip(tensors(agent.state_dict()), tensors(later.state_dict()), strict=True))
    assert len(pairs) == count_state(agent) and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_captured_update_equals_the_eager_one(name):
    """With the actors' learning rate changed between replays, which a graph must read anew."""
    changed = {"policy_freq": 1} if name == "td3_bc" else {}  # one graph holds one kind of update
    eager, captured = (make(name, device="cuda", **changed) for _ in range(2))
    batch = {key: value.cuda() for key, value in make_batch().items()}
    step = GraphedStep(lambda: captured.update(batch), [captured.generator])
    for number in range(20):
        for agent in (eager, captured):
            agent.anneal(number / 20)
        expected, found = eager.update(batch), step()
        for key in expected:
            assert torch.allclose(found[key], expected[key], rtol=1e-3, atol=1e-4), (number, key)
    pairs = zip(tensors(captured.state_dict()["networks"]), tensors(eager.state_dict()["networks"]), strict=True)
    assert all(torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in pairs)


def evaluate(critics: nn.ModuleList, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """[size, ...]: observations [n, D] and actions [n, A] or [n, K, A]."""
    if actions.dim() == 3:
        observations = observations.unsqueeze(1).expand(-1, actions.shape[1], -1)
    return torch.stack([critic(torch.cat([observations, actions], -1)).squeeze(-1) for critic in critics])


def adam(*modules, lr: float = 3e-4) -> torch.optim.Adam:
    return torch.optim.Adam([p for module in modules for p in module.parameters()], lr=float(torch.tensor(lr)))


def minimise(optimizer: torch.optim.Adam, loss: torch.Tensor) -> None:
    """A step that leaves the gradients of everything else alone."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def average(target: nn.Module, source: nn.Module, tau: float = 0.005) -> None:
    for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
        slow.data = (1 - tau) * slow.data + tau * fast.data


def compare(agent, reference, actor, critics, more=list, updates: int = UPDATES) -> float:
    """Both make the same updates from the same draws; the largest difference of weights, `more` pairs included."""
    twin = torch.Generator().set_state(agent.generator.get_state())
    for seed in range(updates):
        batch = make_batch(seed, torch.float64)
        agent.update(batch)
        reference(batch, lambda *shape: torch.randn(*shape, A, generator=twin), twin)
    pairs = same_mlp(agent.actor.net, actor) + same_critics(agent.critic, critics) + more()
    assert all(ours.shape == theirs.shape for ours, theirs in pairs)
    return max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)


def same_mlp(net: MLP, expected: nn.Sequential) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(plain(net).parameters(), expected.parameters(), strict=True))


def same_critics(critic: EnsembleCritic, expected: nn.ModuleList) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(plain_critics(critic).parameters(), expected.parameters(), strict=True))


def test_td3_bc_equals_a_plain_agent():
    agent = make("td3_bc", dtype=torch.float64)
    actor, critics = plain(agent.actor.net), plain_critics(agent.critic)
    slow_actor, slow_critics = copy.deepcopy(actor), copy.deepcopy(critics)
    critic_optimizer, actor_optimizer, count = adam(critics), adam(actor), 0

    def reference(b, noise, twin):
        nonlocal count
        s, a, r, s2, d = (b[k] for k in ("observations", "actions", "rewards", "next_observations", "terminated"))
        jitter = (0.2 * noise(N)).clamp(-0.5, 0.5)
        noise(N)  # a point takes no noise, yet some is drawn
        a2 = (torch.tanh(slow_actor(s2)) + jitter).clamp(-1, 1)
        y = r + 0.99 * (1 - d) * evaluate(slow_critics, s2, a2).min(0).values
        minimise(critic_optimizer, sum(F.mse_loss(q, y.detach()) for q in evaluate(critics, s, a)))
        count += 1
        if count % 2 == 0:
            noise(N)
            pi = torch.tanh(actor(s))
            q = evaluate(critics[:1], s, pi)[0]
            minimise(actor_optimizer, -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a))
            average(slow_critics, critics)
            average(slow_actor, actor)

    assert compare(agent, reference, actor, critics) < 1e-7


@pytest.mark.parametrize("name", ["iql", "iql_deterministic"])
def test_iql_equals_a_plain_agent(name):
    agent = make(name, dtype=torch.float64, beta=30.0)
    agent.value.net.layers()[-1][1].data.fill_(-0.5)  # so that some weights are cut
    actor, critics, value = plain(agent.actor.net), plain_critics(agent.critic), plain(agent.value.net)
    slow, log_std = copy.deepcopy(critics), nn.Parameter(torch.zeros(A, dtype=torch.float64))
    density = name == "iql"
    actor_optimizer = torch.optim.Adam([*actor.parameters(), *([log_std] if density else [])], lr=agent.actor_lr.item())
    value_optimizer, critic_optimizer, cut = adam(value), adam(critics), 0

    def reference(b, noise, twin):
        nonlocal cut
        noise(N)
        s, a = b["observations"], b["actions"]
        next_value = value(b["next_observations"]).squeeze(-1).detach()
        u = evaluate(slow, s, a).min(0).values.detach() - value(s).squeeze(-1)
        minimise(value_optimizer, ((0.7 - (u < 0).double()).abs() * u**2).mean())
        y = b["rewards"] + 0.99 * (1 - b["terminated"]) * next_value
        minimise(critic_optimizer, sum(F.mse_loss(q, y) for q in evaluate(critics, s, a)) / 2)
        average(slow, critics)
        weight = (30 * u.detach()).exp()
        cut += int((weight > 100).sum())
        mean = torch.tanh(actor(s))
        cloning = -Normal(mean, log_std.exp()).log_prob(a).sum(-1) if density else ((mean - a) ** 2).sum(-1)
        minimise(actor_optimizer, (weight.clamp(max=100) * cloning).mean())

    def more():
        return same_mlp(agent.value.net, value) + ([(agent.actor.log_std, log_std)] if density else [])

    assert compare(agent, reference, actor, critics, more) < 1e-7
    assert 0 < cut < N * UPDATES


def test_awac_equals_a_plain_agent():
    agent = make("awac", dtype=torch.float64, awac_lambda=0.02)
    actor, critics = plain(agent.actor.net), plain_critics(agent.critic)
    slow, log_std = copy.deepcopy(critics), nn.Parameter(torch.zeros(A, dtype=torch.float64))
    actor_optimizer, critic_optimizer = torch.optim.Adam([*actor.parameters(), log_std], lr=3e-4), adam(critics)

    def reference(b, noise, twin):
        s, a, s2 = b["observations"], b["actions"], b["next_observations"]
        a2 = (actor(s2) + log_std.exp() * noise(N)).clamp(-1, 1).detach()
        y = b["rewards"] + 0.99 * (1 - b["terminated"]) * evaluate(slow, s2, a2).min(0).values.detach()
        minimise(critic_optimizer, sum(F.mse_loss(q, y) for q in evaluate(critics, s, a)))
        mean = actor(s)
        drawn = (mean + log_std.exp() * noise(N)).clamp(-1, 1).detach()
        advantage = evaluate(critics, s, a).min(0).values - evaluate(critics, s, drawn).min(0).values
        weight = (advantage / 0.02).exp().clamp(max=100).detach()
        minimise(actor_optimizer, -(weight * Normal(mean, log_std.exp()).log_prob(a).sum(-1)).mean())
        average(slow, critics)

    assert compare(agent, reference, actor, critics) < 1e-7
    assert torch.allclose(agent.actor.log_std, log_std, atol=1e-7) and not torch.equal(log_std, torch.zeros(A))


def squashed(actor: nn.Sequential, s: torch.Tensor, noise: torch.Tensor, bounds=(-5, 2), offset: float = 0.0):
    """Actions and their log densities by torch.distributions."""
    mean, log_std = actor(s).chunk(2, -1)
    log_std = (log_std + offset).clamp(*bounds)
    if noise.dim() == 3:
        mean, log_std = mean.unsqueeze(1), log_std.unsqueeze(1)
    u = mean + log_std.exp() * noise
    law = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    actions = law.transforms[0](u)
    return actions, law.log_prob(actions).sum(-1)


@pytest.mark.parametrize("name", ["sac_n", "edac"])
def test_sac_n_and_edac_equal_plain_agents(name):
    agent = make(name, dtype=torch.float64)
    actor, critics = plain(agent.actor.net), plain_critics(agent.critic)
    slow, log_alpha = copy.deepcopy(critics), nn.Parameter(torch.zeros((), dtype=torch.float64))
    actor_optimizer, critic_optimizer = adam(actor), adam(critics)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=float(torch.tensor(3e-4)))

    def reference(b, noise, twin):
        s, a, s2 = b["observations"], b["actions"].clone().requires_grad_(), b["next_observations"]
        minimise(alpha_optimizer, -(log_alpha * (squashed(actor, s, noise(N))[1].detach() - A)).mean())
        alpha = log_alpha.exp().detach()
        pi, log_pi = squashed(actor, s, noise(N))
        minimise(actor_optimizer, (alpha * log_pi - evaluate(critics, s, pi).min(0).values).mean())
        a2, log_pi2 = squashed(actor, s2, noise(N))
        value = evaluate(slow, s2, a2).min(0).values - alpha * log_pi2
        y = (b["rewards"] + 0.99 * (1 - b["terminated"]) * value).detach()
        q = evaluate(critics, s, a)
        loss = sum(F.mse_loss(one, y) for one in q)
        if name == "edac":
            g = torch.stack([torch.autograd.grad(one.sum(), a, create_graph=True)[0] for one in q])
            g = g / (g.norm(dim=-1, keepdim=True) + 1e-10)
            pairs = [(g[i] * g[j]).sum(-1).mean() for i in range(4) for j in range(4) if i != j]
            loss = loss + sum(pairs) / 3
        minimise(critic_optimizer, loss)
        average(slow, critics)

    assert compare(agent, reference, actor, critics) < 1e-7
    assert abs(agent.temperature.log_alpha.item() - log_alpha.item()) < 1e-7 and log_alpha.item() != 0


@pytest.mark.parametrize("name", ["cql", "cql_lagrange"])
def test_cql_equals_a_plain_agent(name):
    agent, lagrange, K = make(name, dtype=torch.float64, cql_temp=0.7, actor_lr=3e-4), name == "cql_lagrange", 10
    actor, critics = plain(agent.actor.net), plain_critics(agent.critic)
    slow = copy.deepcopy(critics)
    log_alpha, log_prime = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (0.0, 1.0))
    actor_optimizer, critic_optimizer = adam(actor), adam(critics)
    scalars = [torch.optim.Adam([x], lr=float(torch.tensor(3e-4))) for x in (log_alpha, log_prime)]

    def reference(b, noise, twin):
        s, a, s2 = b["observations"], b["actions"], b["next_observations"]
        here, log_here = (x.detach() for x in squashed(actor, s, noise(N, K), (-20, 2), -1.0))
        there, log_there = (x.detach() for x in squashed(actor, s2, noise(N, K + 1), (-20, 2), -1.0))
        uniform = 2 * torch.rand(N, K, A, generator=twin) - 1
        value = evaluate(slow, s2, there[:, :K]).min(0).values
        value = value.max(1).values if lagrange else value[:, 0]
        y = (b["rewards"] + 0.99 * (1 - b["terminated"]) * value).detach()
        loss, gaps = 0.0, []
        for critic in critics:
            one = nn.ModuleList([critic])
            parts = [evaluate(one, s, uniform)[0] - A * math.log(0.5), evaluate(one, s, here)[0] - log_here]
            parts.append(evaluate(one, s, there[:, 1:])[0] - log_there[:, 1:])
            q = evaluate(one, s, a)[0]
            gaps.append((0.7 * (torch.cat(parts, 1) / 0.7).logsumexp(1) - q).mean() - (0.8 if lagrange else 0))
            loss = loss + F.mse_loss(q, y)
        loss = loss + 10 * (log_prime.exp().detach() if lagrange else 1) * sum(gaps)
        pi, log_pi = squashed(actor, s, noise(N), (-20, 2), -1.0)
        actor_loss = (log_alpha.exp().detach() * log_pi - evaluate(critics, s, pi).min(0).values).mean()
        steps = [torch.autograd.grad(loss, list(critics.parameters()))]
        minimise(actor_optimizer, actor_loss)
        for parameter, gradient in zip(critics.parameters(), steps[0], strict=True):
            parameter.grad = gradient
        critic_optimizer.step()
        minimise(scalars[0], -(log_alpha * (log_here - A)).mean())
        if lagrange:
            minimise(scalars[1], -0.5 * log_prime.exp() * 10 * sum(gaps).detach())
        average(slow, critics)

    assert compare(agent, reference, actor, critics) < 1e-7
    found = (agent.temperature.log_alpha.item(), agent.multiplier.log_alpha_prime.item())
    assert found == pytest.approx((log_alpha.item(), log_prime.item()), abs=1e-7)
    assert (log_prime.item() != 1) == lagrange
