"""The chain of actors over the offline algorithms: what it equals, what each actor learns from, and its distances."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from test_offline_algorithms import ALGORITHMS, SIZES, A, D, N, count_state, make, make_batch, tensors
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from algorithms.offline.pogo_multi import ChainConfig, MultiActor, distance_to_data
from algorithms.offline.pogo_policies import POLICIES, Gaussian, Point, TanhGaussian

DENSITIES = {"gaussian", "tanh_gaussian"}


def make_chain(name: str, weights=(1.0, 1.0, 1.0), policies=None, seed: int = 0, **chain) -> MultiActor:
    algorithm, config = ALGORITHMS[name]
    torch.manual_seed(seed)
    config = dataclasses.replace(config, actor_lr=3e-3)
    makers = [POLICIES[policy] for policy in policies] if policies else None
    settings = ChainConfig(w2_weights=weights, **chain)
    return MultiActor(algorithm, config, settings, SIZES, torch.Generator().manual_seed(seed), policies=makers)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_actor_of_weight_zero_is_the_algorithm_alone(name):
    alone, chain = make(name, actor_lr=3e-3), make_chain(name, weights=(0.0,))
    for seed in range(8):
        batch = make_batch(seed)
        alone.update(batch)
        chain.update(batch)
    pairs = list(zip(tensors(alone.state_dict()), tensors(chain.state_dict()), strict=True))
    assert len(pairs) == count_state(alone) and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_actor_changes_no_bit_before_it(name):
    """Critics, temperatures and actor 0 are those of a chain of one, actor 1 that of a chain of two."""
    chains = [make_chain(name, weights=(1.0,) * actors, w2_noise="debiased") for actors in (1, 2, 3)]
    for seed in range(4):
        for chain in chains:
            chain.update(make_batch(seed))
    for shorter, longer in itertools.pairwise(chain.algorithm.networks for chain in chains):
        for key, network in shorter.items():
            found = longer[key].parameters()
            assert all(torch.equal(*pair) for pair in zip(network.parameters(), found, strict=True)), key


NEED_DENSITY = {name for name in ALGORITHMS if name.startswith(("sac", "edac", "cql"))}  # for an entropy


@pytest.mark.parametrize(
    "name, policy",
    [
        (name, policy)
        for name in ("td3_bc", "iql", "awac", "sac_n", "cql")
        for policy in POLICIES
        if policy in DENSITIES or name not in NEED_DENSITY
    ],
)
def test_q_gives_a_gradient_to_every_actor(name, policy):
    """Without any distance, each actor behind the first must move, and raise Q of the critics as they stand."""
    chain = make_chain(name, weights=(0.0, 0.0, 0.0), policies=[policy] * 3, follow=False)
    batch = make_batch() | {"advantage": torch.zeros(N)}
    critic, observations = chain.algorithm.critic, batch["observations"]
    before = [copy.deepcopy(actor) for actor in chain.actors]
    if name in NEED_DENSITY:
        chain.algorithm.temperature.log_alpha.data.fill_(-20.0)  # entropy plays no part
        critic.net.layers()[-1][0].data.mul_(100)  # which begins near 0 there
    for _ in range(40):
        chain.update_actors(batch)
    for number in (1, 2):
        old, new = (actors[number](observations).mode for actors in (before, chain.actors))
        pairs = zip(before[number].parameters(), chain.actors[number].parameters(), strict=True)
        moved = [not torch.equal(*pair) for pair in pairs]
        assert sum(moved) >= len(moved) - 1, number  # log std of a Gaussian whose actions are all cut may rest
        assert critic(observations, new).mean() > critic(observations, old).mean() + 1e-3, number


def test_distances_are_half_of_w2_squared_for_all_policies():
    """Two policies a step of 0.3 apart in each action number are 0.3^2 A / 2 apart, whatever they are."""
    chain = make_chain("iql", sinkhorn_K=6)
    noise, expected = torch.randn(N, 6, A), 0.3**2 * A / 2
    mean = torch.zeros(N, A)
    points = [Point(mean), Point(mean + 0.3)]
    gaussians = [Gaussian(mean, torch.tensor(0.05), 1.0), Gaussian(mean + 0.3, torch.tensor(0.06), 1.0)]
    cases = (points, 0, 1e-6), (gaussians, 0.01**2 * A / 2, 1e-6), ([points[0], gaussians[1]], 0, 0.01)
    for (first, second), more, tolerance in cases:  # the last one's is the spread of the samples
        found = chain.distance(first, second, noise, first.draw(noise).actions)
        assert found.item() == pytest.approx(expected + more, abs=tolerance)
    for policy in (points[0], gaussians[0]):
        found = distance_to_data(policy, policy.draw(noise[:, 0]), mean + 0.3)
        spread = 0.05**2 * A / 2 if policy is gaussians[0] else 0
        assert found.item() == pytest.approx(expected + spread, rel=1e-5)


@pytest.mark.parametrize("policies", [["gaussian", "stochastic", "deterministic"], ["tanh_gaussian"] * 3])
def test_policies_may_differ_along_the_chain(policies):
    chain = make_chain("iql", policies=policies)
    for seed in range(2):  # before its first own step a copy is where the one before it is
        info = chain.update(make_batch(seed))
    assert [type(actor).__name__ for actor in chain.actors] == [POLICIES[name].__name__ for name in policies]
    assert all(info[f"actor_{n}/distance"] > 0 and info[f"actor_{n}/loss"].isfinite() for n in range(3))


def test_a_heavy_weight_holds_an_actor_at_the_one_before():
    distances = {}
    for weight in (0.01, 100.0):
        chain = make_chain("td3_bc", weights=(1.0, weight), policies=["deterministic"] * 2)
        for seed in range(80):
            chain.update(make_batch(seed))
        s = make_batch()["observations"]
        distances[weight] = (chain.actors[0](s).mode - chain.actors[1](s).mode).square().mean().item()
    assert distances[100.0] < 0.05 * distances[0.01], distances


def test_following_actors_begin_as_copies_and_take_over_changes():
    chain = make_chain("td3_bc", weights=(1.0, 1e6))
    for pair in zip(chain.actors[0].parameters(), chain.actors[1].parameters(), strict=True):
        assert torch.equal(*pair)
    before = [p.clone() for p in chain.actors[1].parameters()]
    first = [p.clone() for p in chain.actors[0].parameters()]
    chain.algorithm.optimizers["actor_1"].lr = torch.tensor(0.0)  # no step of its own
    for seed in range(4):
        chain.update(make_batch(seed))
    changes = [new - old for new, old in zip(chain.actors[0].parameters(), first, strict=True)]
    for new, old, change in zip(chain.actors[1].parameters(), before, changes, strict=True):
        assert torch.allclose(new, old + change, atol=1e-6) and not torch.equal(new, old)


def test_policies_of_one_class_that_are_built_differently_are_not_copies():
    """AWAC's own Gaussian has three hidden layers and no tanh; CQL's own has other bounds."""
    for name, other in (("awac", "gaussian"), ("cql", "tanh_gaussian")):
        algorithm, config = ALGORITHMS[name]
        own = algorithm(config, SIZES, torch.Generator()).make_actor
        makers = [own, own, POLICIES[other], POLICIES[other]]
        chain = MultiActor(algorithm, config, ChainConfig((1.0,) * 4), SIZES, torch.Generator(), policies=makers)
        assert chain.follows == [False, True, False, True]
        chain.update(make_batch())


@pytest.mark.parametrize("name, decays", [("td3_bc", False), ("td3_bc", True), ("iql", False)])
def test_the_actors_rate_falls_where_it_is_asked_for_or_the_algorithm_lets_it(name, decays):
    chain = make_chain(name, lr_decay=decays)
    chain.anneal(1.0)
    rates = [float(optimizer.lr) for optimizer in chain.actor_optimizers]
    assert max(rates) < 1e-9 if decays or name == "iql" else rates == [pytest.approx(3e-3)] * 3


@pytest.mark.parametrize("shape", [(N, A), (N, 4, A)])
def test_densities_are_those_of_torch(shape):
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(N, A), torch.randn(N, A) * 0.3, torch.randn(shape)
    wide = (mean, log_std) if len(shape) == 2 else (mean.unsqueeze(1), log_std.unsqueeze(1))
    draw = TanhGaussian(mean, log_std, 2.0).draw(noise)
    law = TransformedDistribution(Normal(wide[0], wide[1].exp()), TanhTransform(cache_size=1))
    inner = law.transforms[0](wide[0] + wide[1].exp() * noise)
    assert torch.allclose(draw.actions, 2 * inner) and draw.actions.shape == shape
    assert torch.allclose(draw.log_prob, law.log_prob(inner).sum(-1), atol=1e-4)
    back = TanhGaussian(mean, log_std, 2.0).log_prob(draw.actions.clamp(-1.99, 1.99))
    inside = (draw.actions.abs() < 1.99).all(-1)
    assert inside.any() and torch.allclose(back[inside], draw.log_prob[inside], atol=1e-2)
    gaussian = Gaussian(mean, log_std.exp(), 1.0)
    actions = gaussian.draw(noise).actions
    assert actions.abs().max() <= 1
    assert torch.allclose(
        gaussian.log_prob(actions), Normal(wide[0], wide[1].exp()).log_prob(actions).sum(-1), atol=1e-4
    )


def test_a_saturated_density_stays_finite():
    draw = TanhGaussian(torch.tensor([[40.0]]), torch.tensor([[0.0]]), 1.0).draw(torch.zeros(1, 1))
    assert draw.actions.item() == 1.0 and draw.log_prob.item() == pytest.approx(
        -0.5 * math.log(2 * math.pi) + 80 - 2 * math.log(2), rel=1e-5
    )


@pytest.mark.parametrize("name", POLICIES)
def test_one_pass_serves_the_mode_and_all_draws(name):
    torch.manual_seed(0)
    policy, observations = POLICIES[name](D, A, 1.0, 8), torch.randn(N, D)
    distribution, noise = policy(observations), torch.randn(N, 4, A)
    several = distribution.draw(noise)
    for k in range(4):
        one = distribution.draw(noise[:, k])
        assert torch.allclose(several.actions[:, k], one.actions, atol=1e-6)
        assert one.log_prob is None or torch.allclose(several.log_prob[:, k], one.log_prob, atol=1e-4)
    assert torch.allclose(distribution.mode, distribution.draw(torch.zeros(N, A)).actions, atol=1e-6)
    assert torch.equal(several.first().actions, several.actions[:, 0])
