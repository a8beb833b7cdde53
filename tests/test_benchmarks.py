"""The benchmark scripts' own logic; tests/test_commands.py runs each of them in a small form."""

import copy
import functools
import os
import sys

import numpy as np
import pytest
import torch

from benchmarks import (
    bench_algorithms,
    bench_encoder,
    bench_offline,
    bench_online,
    bench_pogo,
    bench_updates,
    peers,
    run_all,
    turns,
)
from pogo_agent import POGOAgent, POGOConfig
from runs.cli import parse_config


def as_nets(critic, actors):
    """Two critics and actors of ours as jax_pogo.py has them: weight [in, out] and bias [out] of each layer."""
    critics = [[(weight[k], bias[k, 0]) for weight, bias in critic.net.layers()] for k in (0, 1)]
    return critics, [actor.net.layers() for actor in actors]


def gradient_net(optimizer, network):
    """The network with Adam's mean gradient in the place of its weights: one step's new weights tell only its sign."""
    network = copy.deepcopy(network)
    for own, moment in zip(network.parameters(), optimizer.first, strict=True):
        own.data = moment
    return network


def test_an_update_in_jax_equals_ours():
    """From the same weights and noise, in float64: weights, gradients and averages differ by rounding alone."""
    pytest.importorskip("jax")
    jax = peers.start_jax()
    from benchmarks import jax_pogo

    def plain(tree):
        return jax.tree.map(lambda value: jax.numpy.asarray(value.detach().numpy().copy()), tree)

    config = POGOConfig(hidden_dim=8, w2_noise="independent", sinkhorn_backend="fused")
    sizes = {"observations": (16, 3), "next_observations": (16, 3), "actions": (16, 2), "rewards": (16,)}
    torch.set_default_dtype(torch.float64)
    try:
        with jax.enable_x64(True):
            torch.manual_seed(0)
            agent = POGOAgent(config, 3, 2, 1.0, torch.default_generator)
            for actor in agent.actors[1:]:  # so that the distances are not 0
                actor.net.theta.data += 0.3 * torch.randn(len(actor.net.theta))
            batch = {name: torch.rand(size) for name, size in sizes.items()} | {"terminated": torch.rand(16).round()}
            drawn = [torch.randn(shape) for shape in [(16, 2)] * 3 + [(16, 4, 2)] * 4]  # in the order of ours
            target_action, target_z, z, *clouds = plain(drawn)
            noise = jax_pogo.Noise(target_action, target_z, [z, *clouds[::2]], clouds[1::2])
            start = jax_pogo.start(*plain(as_nets(agent.critic, agent.actors)))
            state = jax.jit(functools.partial(jax_pogo.update, config))(start, plain(batch), noise)
            agent.noise = lambda *shape: drawn.pop(0)
            agent.update(batch)
    finally:
        torch.set_default_dtype(torch.float32)
    slopes = (
        gradient_net(agent.critic_optimizer, agent.critic),
        list(map(gradient_net, agent.actor_optimizers, agent.actors)),
    )
    pairs = [
        (as_nets(agent.critic, agent.actors), (state.critics, state.actors)),
        (as_nets(agent.critic_target, [agent.actor_target]), (state.critic_targets, [state.actor_target])),
        (as_nets(*slopes), (state.critic_moments.first, [moments.first for moments in state.actor_moments])),
    ]
    for own, other in pairs:
        assert jax.tree.structure(own) == jax.tree.structure(other)
        for expected, found in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
            assert np.abs(expected.detach().numpy() - np.asarray(found)).max() < 1e-10
    assert min(float(value.detach().abs().max()) for value in jax.tree.leaves(as_nets(*slopes))) > 1e-4


CONFIGS = {
    "pogo": bench_pogo.BenchPOGOConfig,
    "algorithms": bench_algorithms.BenchAlgorithmsConfig,
    "encoder": bench_encoder.BenchEncoderConfig,
    "updates": bench_updates.BenchUpdatesConfig,
    "offline": bench_offline.BenchOfflineConfig,
    "online": bench_online.BenchOnlineConfig,
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_of_the_whole_run_takes_its_flags(device):
    clones = dict.fromkeys(run_all.PEERS, "there")
    found = {
        name: run_all.command_of(name, run_all.RunAllConfig(device, quick=True, **clones)) for name in run_all.PARTS
    }
    assert [name for name, command in found.items() if command is None] == (["online"] if device == "cuda" else [])
    settings = {name: parse_config(CONFIGS[name], command[2:]) for name, command in found.items() if command}
    assert all(config.device == device for name, config in settings.items() if name != "online")
    assert settings["algorithms"].corl == settings["algorithms"].unifloral == settings["updates"].base == "there"


def test_rates_are_medians_of_turns_and_count_the_updates_of_a_call():
    now = [0.0]
    lengths = iter([9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 2.0])  # a warm-up, a look how long a call is, turns of two

    def step():
        now[0] += next(lengths)

    rates = turns.median_rates({"x": turns.Contestant(step, updates=10, warmup=2)}, 3, 2.0, lambda: now[0])
    assert rates["x"] == pytest.approx(10 * 2 / 6.0)
    assert turns.claim("a", 3.0, 2.0, " (b)") == "a: ours 3.0 (b), peer 2.0, ratio 1.50"


def test_the_best_jax_file_leaves_other_work_out():
    lines = bench_algorithms.claims_of("cql", {"ours, eager": 10.0, "CORL": 5.0, "JAX-CORL": 8.0, "unifloral": 20.0})
    assert [line.split(": ")[1] for line in lines] == [
        "ours 10.0 (eager), peer 8.0, ratio 1.25 (JAX-CORL)",
        "ours 10.0 (eager), peer 5.0, ratio 2.00",
    ]


def test_a_file_of_a_peer_leaves_the_environment_as_it_was(tmp_path):
    (tmp_path / "x.py").write_text("import os, sys, wandb\nos.environ['XLA_FLAGS'] = 'theirs'\nargv = sys.argv\n")
    module, before = peers.load_file("--corl", str(tmp_path), "x.py"), list(sys.argv)
    assert "wandb" not in sys.modules and "gym" not in sys.modules
    assert module.argv == [str(tmp_path / "x.py")] and sys.argv == before and os.environ.get("XLA_FLAGS") != "theirs"
