"""The POGO agent: its losses against loops, one actor against a plain agent, the chain's order, diagnostics."""

import copy
import itertools

import numpy as np
import pytest
import torch
from plain_nets import plain, plain_critics
from torch import nn

from model import EnsembleCritic, TransportActor
from pogo_agent import POGOAgent, POGOConfig
from runs.cuda_graphs import GraphedStep
from transport import box_diameter, cloud_spread, sinkhorn

D, A, N = 5, 3, 32


def make_agent(seed=0, device="cpu", max_action=1.0, apart=True, dtype=torch.float32, **settings) -> POGOAgent:
    """An agent whose actors differ, unless they are to stand where they begin."""
    torch.manual_seed(seed)
    config = POGOConfig(**({"hidden_dim": 16, "w2_weights": (0.4, 1.0, 0.5)} | settings))
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        agent = POGOAgent(config, D, A, max_action, torch.Generator(device).manual_seed(seed), device)
    finally:
        torch.set_default_dtype(kept)
    with torch.no_grad():
        for parameter in agent.actors[1:].parameters() if apart else ():
            parameter += 0.1 * torch.randn_like(parameter)
    return agent


def test_actors_begin_as_copies_of_the_first_and_apart_in_memory():
    agent = make_agent(apart=False)
    first, *others = ([p for p in actor.parameters()] for actor in agent.actors)
    assert all(same(first, other) for other in others)
    agent.update(make_batch())
    assert not any(same(first, other) for other in others) and not same(*others)


def test_the_critics_begin_at_the_value_of_the_data():
    batch = make_batch()
    inputs, levels = (batch["observations"], batch["actions"]), []
    for settings, value in (({}, 0.0), ({}, 50.0), ({"q_start": "zero"}, 50.0)):
        torch.manual_seed(0)
        config = POGOConfig(hidden_dim=16, w2_weights=(0.4,), **settings)
        agent = POGOAgent(config, D, A, 1.0, torch.Generator().manual_seed(0), data_value=value)
        q, slow = agent.critic(*inputs).detach(), agent.critic_target(*inputs)
        assert torch.equal(q, slow)
        levels.append(q)
    assert torch.allclose(levels[1], levels[0] + 50, atol=1e-4) and torch.equal(levels[2], levels[0])


def make_batch(seed=0, dtype=torch.float32, max_action=1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "observations": torch.randn(N, D, generator=generator, dtype=dtype),
        "next_observations": torch.randn(N, D, generator=generator, dtype=dtype),
        "actions": max_action * (2 * torch.rand(N, A, generator=generator, dtype=dtype) - 1),
        "rewards": torch.rand(N, generator=generator, dtype=dtype),
        "terminated": (torch.rand(N, generator=generator) < 0.3).to(dtype),
    }


def rewound(agent: POGOAgent, seed: int) -> torch.Generator:
    """The agent's generator from a known state, and a twin that draws the same."""
    agent.generator.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def mode(agent: POGOAgent, number: int, observations: torch.Tensor) -> torch.Tensor:
    return agent.actors[number](observations, observations.new_zeros(len(observations), A))


def values(agent: POGOAgent) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors(agent.state_dict())]


def tensors(state) -> list[torch.Tensor]:
    if isinstance(state, dict | list | tuple):
        return [found for item in (state.values() if isinstance(state, dict) else state) for found in tensors(item)]
    return [state] if isinstance(state, torch.Tensor) else []


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# -- networks ---------------------------------------------------------------------------------------------------------


def test_the_actor_is_an_mlp_of_state_and_noise():
    torch.manual_seed(0)
    actor, s, z = TransportActor(D, A, 2.0, 8), torch.randn(N, D), torch.randn(N, 4, A)
    expected = 2 * torch.tanh(plain(actor.net)(torch.cat([s.unsqueeze(1).expand(-1, 4, -1), z], -1)))
    assert torch.allclose(actor(s, z), expected, atol=1e-6) and actor(s, z).shape == (N, 4, A)
    assert torch.allclose(actor(s, z[:, 2]), expected[:, 2], atol=1e-6)
    assert actor(s.view(2, 16, D), z[:, 0].view(2, 16, A)).shape == (2, 16, A)


def test_the_critic_is_two_mlps_and_its_frozen_half_is_the_first():
    torch.manual_seed(0)
    critic, s, a = EnsembleCritic(D, A, 8), torch.randn(N, D), torch.randn(N, A, requires_grad=True)
    for number in range(2):
        h = torch.cat([s, a], -1)
        for depth, (weight, bias) in enumerate(critic.net.layers()):
            h = h @ weight[number] + bias[number]
            h = h.relu() if depth < 2 else h
        assert torch.allclose(critic(s, a)[number], h.squeeze(-1), atol=1e-6)
        slope = torch.autograd.grad(h.sum(), a)[0]
        if number == 0:
            frozen = critic.frozen_q1(s, a)
            assert torch.allclose(frozen, h.squeeze(-1), atol=1e-6)
            frozen.sum().backward()
            assert torch.allclose(a.grad, slope, atol=1e-6)
            assert all(parameter.grad is None for parameter in critic.parameters())


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("td_actor", ["online", "target"])
def test_the_target_equals_a_loop(td_actor):
    agent, batch = make_agent(td_actor=td_actor, max_action=2.0, policy_noise=0.4), make_batch(max_action=2.0)
    with torch.no_grad():
        for parameter in agent.actors[0].parameters():
            parameter += 0.5 * torch.randn_like(parameter)  # else the target copy would be the same
    twin = rewound(agent, 3)
    actor = {"online": agent.actors[0], "target": agent.actor_target}[td_actor]
    noise = [torch.randn(N, A, generator=twin) for _ in range(2)]
    found = agent.critic_target_value(batch)
    clipped = 0
    for i in range(N):
        s = batch["next_observations"][i : i + 1]
        shake = (0.8 * noise[0][i]).clamp(-1, 1)
        clipped += int((shake.abs() == 1).any())
        action = (actor(s, noise[1][i : i + 1]) + shake).clamp(-2, 2)
        value = agent.critic_target(s, action).min().item()
        expected = float(batch["rewards"][i]) + (0 if batch["terminated"][i] else 0.99 * value)
        assert float(found[i]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert clipped and not found.requires_grad and 0 < batch["terminated"].sum() < N


def test_the_critic_loss_counts_both_and_leads_to_the_critic_alone():
    agent, batch = make_agent(), make_batch()
    twin = agent.generator.get_state()
    target = agent.critic_target_value(batch)
    agent.generator.set_state(twin)
    loss, info = agent.critic_loss(batch)
    q = agent.critic(batch["observations"], batch["actions"])
    assert loss.item() == pytest.approx(sum(((q[k] - target) ** 2).mean().item() for k in range(2)), rel=1e-5)
    assert info["q_data"].item() == pytest.approx(q.mean().item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in agent.critic.parameters())
    others = [*agent.actors.parameters(), *agent.critic_target.parameters(), *agent.actor_target.parameters()]
    assert all(parameter.grad is None for parameter in others)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"q_normalization": "none"},
        {"sinkhorn_K": 4},
        {"w2_noise": "independent", "sinkhorn_K": 4, "sinkhorn_backend": "fused"},
        {"w2_noise": "debiased", "sinkhorn_K": 4, "sinkhorn_scaling": 0.8, "sinkhorn_backend": "fused"},
    ],
)
def test_an_actors_loss_equals_its_equation(number, settings):
    agent, batch = make_agent(**settings), make_batch()
    config = agent.config
    twin, s = rewound(agent, 5), batch["observations"]
    loss, info = agent.actor_loss(number, batch)
    if number == 0:
        actions = agent.actors[0](s, torch.randn(N, A, generator=twin))
        distance = ((actions - batch["actions"]) ** 2).mean()
    else:
        noise = [torch.randn(N, config.sinkhorn_K, A, generator=twin) for _ in range(4)]
        solver = (0.05, "exact" if config.w2_noise == "same" else "tensorized", box_diameter(1.0, A))

        def d(x, y):
            return sinkhorn(x, y, *solver, config.sinkhorn_scaling).mean()

        own, before = (lambda z, actor=agent.actors[number - k]: actor(s, z) for k in range(2))
        samples, reference = own(noise[0]), before(noise[0 if config.w2_noise == "same" else 1])
        distance, actions = d(samples, reference.detach()), samples[:, 0]
        if config.w2_noise == "debiased":
            distance = distance - d(samples, own(noise[2])) / 2 - d(reference, before(noise[3])).detach() / 2
    q = agent.critic(s, actions)[0]
    scale = 1 / q.abs().mean() if config.q_normalization == "batch" else 1
    expected = -scale * q.mean() + agent.config.w2_weights[number] * distance
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert info[f"actor_{number}/distance"].item() == pytest.approx(distance.item(), rel=1e-4, abs=1e-6)
    loss.backward()
    for other, actor in enumerate(agent.actors):
        assert all((parameter.grad is None) == (other != number) for parameter in actor.parameters())
    assert all(parameter.grad is None for parameter in agent.critic.parameters())


def test_lambda_carries_no_gradient():
    agent = make_agent(w2_weights=(0.0,))
    batch = make_batch()
    state = agent.generator.get_state()
    loss, info = agent.actor_loss(0, batch)
    loss.backward()
    found = [parameter.grad.clone() for parameter in agent.actors.parameters()]
    agent.actors.zero_grad()
    agent.generator.set_state(state)
    agent.config.q_normalization = "none"
    agent.actor_loss(0, batch)[0].backward()
    for first, parameter in zip(found, agent.actors.parameters(), strict=True):
        assert torch.allclose(first, parameter.grad * info["actor_0/q_scale"], rtol=1e-4, atol=1e-7)


def test_lambda_does_not_see_what_was_added_to_all_rewards():
    """-1 a step lowers every Q by 100; critics that have learned that pull as hard as without it."""
    plain, shifted = make_agent(), make_agent()
    with torch.no_grad():
        shifted.critic.net.layers()[-1][1].sub_(100)
    shifted.q_floor = POGOAgent(shifted.config, D, A, 1.0, torch.Generator(), step_reward=-1.0).q_floor
    found = [agent.actor_loss(0, make_batch())[1]["actor_0/q_scale"].item() for agent in (plain, shifted)]
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[0] > 1


def distance_alone(agent: POGOAgent, updates: int = 600) -> tuple[float, float]:
    """Spread of actor 1 over that of actor 0, before and after actor 1 alone minimises its distance alone."""
    agent.critic.frozen_q1 = lambda observations, actions: 0 * actions.sum(-1)
    states, z = torch.randn(256, D, generator=torch.Generator().manual_seed(3)), agent.noise(256, 64).detach()
    ratios = []
    for step in range(updates + 1):
        if step in (0, updates):
            with torch.no_grad():
                first, second = (cloud_spread(actor(states, z)).item() for actor in agent.actors[:2])
            ratios.append(second / first)
        loss, _ = agent.actor_loss(1, {"observations": states[128 * (step % 2) :][:128]})
        agent.actor_optimizers[1].minimise(loss)
    return tuple(ratios)


@pytest.mark.parametrize("w2_noise, least, most", [("same", 1, 1), ("debiased", 0.93, 1.05), ("independent", 0, 0.75)])
def test_what_the_distance_alone_does_to_a_copy_of_the_reference(w2_noise, least, most):
    """Nothing with the same noise, next to nothing debiased; with independent noise it narrows the copy."""
    samples = 1 if w2_noise == "same" else 4
    agent = make_agent(apart=False, w2_noise=w2_noise, sinkhorn_K=samples, q_normalization="none", hidden_dim=64)
    with torch.no_grad():
        for actor in agent.actors:
            actor.net.layers()[0][0][D:].mul_(4)
    before, after = distance_alone(agent)
    assert before == 1 and least <= after <= most


def test_the_distance_alone_brings_an_actor_back_to_its_reference():
    agent = make_agent(apart=False, q_normalization="none", hidden_dim=64)
    with torch.no_grad():
        for actor, factor in zip(agent.actors, (4.0, 1.0, 1.0), strict=True):
            actor.net.layers()[0][0][D:].mul_(factor)
    before, after = distance_alone(agent)
    assert before < 0.6 and after == pytest.approx(1, abs=0.1)


# -- an update --------------------------------------------------------------------------------------------------------


def plain_update(critics, targets, actor, optimizers, batch, generator, weight) -> None:
    """Deterministic policy gradients with a squared distance to the data, as one would write it first."""
    draws = [torch.randn(N, A, generator=generator, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        s = batch["next_observations"]
        action = torch.tanh(actor(torch.cat([s, draws[1]], 1))) + (0.2 * draws[0]).clamp(-0.5, 0.5)
        inputs = torch.cat([s, action.clamp(-1, 1)], 1)
        value = torch.minimum(*(target(inputs) for target in targets)).squeeze(1)
        y = batch["rewards"] + 0.99 * (1 - batch["terminated"]) * value
    inputs = torch.cat([batch["observations"], batch["actions"]], 1)
    loss = sum(nn.functional.mse_loss(critic(inputs).squeeze(1), y) for critic in critics)
    optimizers[0].zero_grad()
    loss.backward()
    optimizers[0].step()
    z = torch.randn(N, A, generator=generator, dtype=torch.float64)
    action = torch.tanh(actor(torch.cat([batch["observations"], z], 1)))
    q = critics[0](torch.cat([batch["observations"], action], 1))
    loss = weight * nn.functional.mse_loss(action, batch["actions"]) - q.mean() / q.abs().mean().detach()
    optimizers[1].zero_grad()
    loss.backward()
    optimizers[1].step()
    for target, critic in zip(targets, critics, strict=True):
        for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
            slow.data.mul_(0.995).add_(0.005 * fast.data)


def test_one_actor_equals_a_plain_agent_for_100_updates():
    """In float64, to 1e-6: deterministic policy gradients plus L2, written here with the usual modules."""
    agent = make_agent(w2_weights=(0.4,), dtype=torch.float64)
    agent.noise = lambda *shape: torch.randn(*shape, A, generator=agent.generator, dtype=torch.float64)
    critics, actor = plain_critics(agent.critic), plain(agent.actors[0].net)
    targets = copy.deepcopy(critics)
    optimizers = [torch.optim.Adam(critics.parameters(), 3e-4), torch.optim.Adam(actor.parameters(), 3e-4)]
    twin = rewound(agent, 9)
    for number in range(100):
        batch = make_batch(number, torch.float64)
        agent.update(batch)
        plain_update(critics, targets, actor, optimizers, batch, twin, 0.4)
    ours = [plain(agent.actors[0].net), plain_critics(agent.critic), plain_critics(agent.critic_target)]
    for own, theirs in zip(ours, (actor, critics, targets), strict=True):
        pairs = zip(own.parameters(), theirs.parameters(), strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs)


def test_actors_follow_in_order_and_each_refers_to_the_one_just_updated(monkeypatch):
    agent, batch, seen = make_agent(), make_batch(), []
    distance = POGOAgent.distance

    def watched(self, number, reference, *more):
        seen.append((reference, self.actors[reference].net.theta.detach().clone()))
        return distance(self, number, reference, *more)

    monkeypatch.setattr(POGOAgent, "distance", watched)
    before = [actor.net.theta.detach().clone() for actor in agent.actors]
    agent.update(batch)
    assert [number for number, _ in seen] == [0, 1]
    for number, weight in seen:
        assert torch.equal(weight, agent.actors[number].net.theta) and not torch.equal(weight, before[number])


def test_an_actor_takes_over_the_change_of_the_one_before_it():
    """With no weight on its own loss's gradient an actor keeps its distance in weights; without `follow` it stays."""
    for follow in (True, False):
        agent = make_agent(follow=follow, lr_decay=False)
        for optimizer in agent.actor_optimizers[1:]:
            optimizer.lr = torch.tensor(0.0)
        before = [[p.detach().clone() for p in actor.parameters()] for actor in agent.actors]
        agent.update(make_batch())
        changes = [
            [new.detach() - old for new, old in zip(actor.parameters(), kept, strict=True)]
            for actor, kept in zip(agent.actors, before, strict=True)
        ]
        assert max(float(change.abs().max()) for change in changes[0]) > 1e-4
        for own in changes[1:]:
            for change, first in zip(own, changes[0], strict=True):
                assert torch.allclose(change, first if follow else torch.zeros_like(first), atol=1e-6)


@pytest.mark.parametrize("w2_noise", ["same", "independent"])
def test_an_actor_changes_no_bit_before_it(w2_noise):
    agents = [make_agent(apart=False, w2_weights=(0.4,) * actors, w2_noise=w2_noise) for actors in (1, 2, 3)]
    for seed in range(4):
        for agent in agents:
            agent.update(make_batch(seed))
    first_draws = {torch.rand(1, generator=generator).item() for generator in agents[2].generators}
    assert len(first_draws) == 3
    for shorter, longer in itertools.pairwise(agents):
        assert same(tensors(shorter.critic.state_dict()), tensors(longer.critic.state_dict()))
        for actor, found in zip(shorter.actors, longer.actors, strict=False):
            assert same(tensors(actor.state_dict()), tensors(found.state_dict()))


def test_targets_follow_by_tau_and_policy_freq_skips_actors():
    agent, batch = make_agent(policy_freq=3, tau=0.1), make_batch()
    for step in range(4):
        actors, target = [p.clone() for p in agent.actors.parameters()], [p.clone() for p in agent.target_parameters]
        info = agent.update(batch)
        moved = not same(actors, list(agent.actors.parameters()))
        assert moved == (step % 3 == 0) == ("actor_0/loss" in info)
        for before, slow, fast in zip(target, agent.target_parameters, agent.online_parameters, strict=True):
            expected = 0.9 * before + 0.1 * fast if moved else before
            assert torch.allclose(slow, expected, atol=1e-6)
    assert agent.step == 4


def test_the_actors_rate_follows_a_cosine_and_the_critics_stays():
    agent, batch = make_agent(lr=1e-3), make_batch()
    for share, expected in ((0.0, 1e-3), (0.5, 5e-4), (1.0, 0.0)):
        agent.anneal(share)
        rates = [float(optimizer.lr) for optimizer in agent.actor_optimizers]
        assert rates == pytest.approx([expected] * 3, abs=1e-9)
        assert float(agent.critic_optimizer.lr) == pytest.approx(1e-3)
    before = [tensor.clone() for tensor in agent.actors.parameters()], agent.critic.net.theta.clone()
    agent.update(batch)
    assert same(before[0], list(agent.actors.parameters())) and not torch.equal(before[1], agent.critic.net.theta)
    steady = make_agent(lr=1e-3, lr_decay=False)
    steady.anneal(1.0)
    assert float(steady.actor_lr) == pytest.approx(1e-3)
    agent.load_state_dict(steady.state_dict())
    agent.anneal(0.5)  # still what the optimizers read
    assert float(agent.actor_optimizers[1].lr) == pytest.approx(5e-4)


def climbed_agent() -> tuple[POGOAgent, dict[str, torch.Tensor]]:
    """A chain after 300 updates under a fixed Q that rewards one corner, from data that stays in the middle."""
    agent, batch = make_agent(w2_weights=(4.0, 4.0, 4.0), lr=3e-3), make_batch()
    agent.critic.frozen_q1 = lambda observations, actions: actions.sum(-1) + 10
    batch["actions"] = torch.zeros(N, A)
    for _ in range(300):
        agent.update(batch)
    return agent, batch


def test_every_network_learns_and_the_chain_climbs():
    """With Q fixed to reward one corner, each actor goes further towards it than the one before."""
    agent, batch = climbed_agent()
    climbed = [float(mode(agent, number, batch["observations"]).mean()) for number in range(3)]
    assert climbed[0] < climbed[1] - 0.01 < climbed[2] - 0.02


# -- diagnostics ------------------------------------------------------------------------------------------------------


def test_diagnostics_change_nothing_and_say_what_moved():
    agent, batch = make_agent(), make_batch()
    for _ in range(3):
        agent.update(batch)
    before, state = values(agent), agent.generator.get_state()
    first, second = agent.diagnose(batch, 1), agent.diagnose(batch, 1)
    assert same(before, values(agent)) and torch.equal(agent.generator.get_state(), state)
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(agent.diagnose(batch, 2)["chain/actor_1/distance"], first["chain/actor_1/distance"])
    agent.actors[1].load_state_dict(agent.actors[0].state_dict())  # an actor that stays where the chain stood
    found = {name.removeprefix("chain/"): float(value) for name, value in agent.diagnose(batch, 1).items()}
    still = ("distance", "floor", "moved", "q_gain", "energy_fell")
    assert not any(found[f"actor_1/{name}"] for name in still) and found["actor_2/moved"] > 0
    assert found["actor_1/energy"] == found["actor_1/energy_before"] and "actor_1/blur_to_spread" not in found
    assert found["actor_2/q_gain"] == pytest.approx(found["actor_2/q"] - found["actor_1/q"], abs=0.05)
    assert found["actor_0/floor"] == 0 and found["actor_0/distance"] > 0
    s = batch["observations"]
    actions = mode(agent, 0, s).requires_grad_()
    slope = torch.autograd.grad(agent.critic(s, actions)[0].sum(), actions)[0].norm(dim=-1).mean()
    assert found["actor_0/q_gradient"] == pytest.approx(float(slope), rel=0.3)


def test_diagnostics_with_independent_noise_have_a_floor_and_a_blur():
    agent = make_agent(w2_noise="independent", sinkhorn_K=4, sinkhorn_backend="fused")
    agent.actors[1].load_state_dict(agent.actors[0].state_dict())
    found = {name.removeprefix("chain/"): float(value) for name, value in agent.diagnose(make_batch(), 1).items()}
    assert found["actor_1/distance"] == pytest.approx(found["actor_1/floor"], rel=0.3) and found["actor_1/floor"] > 0
    assert found["actor_1/moved"] == 0 == found["actor_1/q_gain"]
    assert found["actor_1/blur_to_spread"] == pytest.approx(0.05 / found["actor_0/spread"], rel=0.3)


@pytest.mark.parametrize("centre", [10.0, 0.0])
def test_energies_are_the_losses(centre):
    """Over many draws the mean of L_i, for values of one sign and of both."""
    agent, batch = make_agent(), make_batch()
    agent.critic.frozen_q1 = lambda observations, actions: 3 * actions.sum(-1) + observations[:, 0] + centre
    found = [agent.diagnose(batch, seed) for seed in range(60)]
    for number in range(3):
        with torch.no_grad():
            losses = [float(agent.actor_loss(number, batch)[0]) for _ in range(200)]
        energy = np.mean([float(figures[f"chain/actor_{number}/energy"]) for figures in found])
        assert energy == pytest.approx(np.mean(losses), abs=0.02)


def test_the_energy_of_a_step_that_helps_falls():
    agent, batch = climbed_agent()
    found = agent.diagnose(batch, 0)
    for number in range(3):
        assert found[f"chain/actor_{number}/energy_fell"] == 1, number
        assert found[f"chain/actor_{number}/energy"] < found[f"chain/actor_{number}/energy_before"]


@pytest.mark.gpu
@pytest.mark.parametrize("w2_noise, backend", [("same", "exact"), ("independent", "fused"), ("debiased", "exact")])
def test_a_captured_update_equals_the_eager_one(w2_noise, backend):
    agents = [make_agent(device="cuda", w2_noise=w2_noise, sinkhorn_K=4, sinkhorn_backend=backend) for _ in range(2)]
    batch = {name: value.cuda() for name, value in make_batch().items()}
    captured = GraphedStep(lambda: agents[1].update(batch), agents[1].generators)
    for _ in range(20):
        expected, found = agents[0].update(batch), captured()
        for name in expected:
            assert np.isclose(float(found[name]), float(expected[name]), rtol=1e-4, atol=1e-5), name
    states = [tensors(agent.state_dict()) for agent in agents]
    assert all(torch.allclose(*pair, rtol=1e-3, atol=1e-5) for pair in zip(*states, strict=True))
