"""Losses against loops written out by hand, what an update may depend on, and that it learns."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from model import MLP
from model_kernels import choice
from offline_agent import ABSENT, OfflineAgent, OfflineAgentConfig, bank_logsumexp
from offline_trainer import OfflineTrainerConfig, resolve, sample_batch
from ogbench_utils import NEVER, TrajectoryDataset
from opso.diagnostics import effective_rank

SMALL = {"context_length": 12, "d_model": 16, "hidden_dim": 32, "d_state": 8, "horizon": 5, "bank_size": 50}


def corridor(episodes=30, rows=41, seed=0) -> TrajectoryDataset:
    """A corridor of unit cells: walks that keep a direction for a while and never leave [0, 20]."""
    rng = np.random.default_rng(seed)
    observations = []
    for _ in range(episodes):
        x, direction = rng.uniform(0, 20), rng.choice([-1.0, 1.0])
        for _ in range(rows):
            observations.append([x, 0.0])
            if rng.random() < 0.05 or not 0 <= x + direction <= 20:
                direction = -direction
            x = float(np.clip(x + direction * rng.uniform(0.8, 1.2), 0, 20))
    terminals = np.zeros((episodes, rows), dtype=np.float32)
    terminals[:, -1] = 1
    arrays = {
        "observations": np.asarray(observations, dtype=np.float32),
        "actions": np.zeros((episodes * rows, 1), dtype=np.float32),
        "terminals": terminals.ravel(),
    }
    return TrajectoryDataset(arrays)


def matrices(net: MLP) -> list[torch.Tensor]:
    """Its parameters, weights [out, in] as nn.Linear has them where it is one network."""
    layers = [(weight if net.size else weight.T, bias) for weight, bias in net.layers()]
    return [matrix for layer in layers for matrix in layer]


def make_agent(seed=0, **settings) -> OfflineAgent:
    torch.manual_seed(seed)
    config = OfflineAgentConfig(**(SMALL | settings))
    agent = OfflineAgent(config, 2, *corridor().normalizer())
    with torch.no_grad():  # so that a target taken from the online network shows
        for module in agent.target.modules():
            for parameter in module.parameters(recurse=False):
                for matrix in matrices(module) if isinstance(module, MLP) else [parameter]:
                    matrix.add_(0.05 * torch.randn(matrix.shape))
        agent.target.v.net.layers()[-1][1].add_(0.4)
        agent.target.q.net.layers()[-1][1].add_(0.4)
    return agent


def make_batch(config, batch_size=4, seed=0, data=None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return sample_batch(data or corridor(), config, batch_size, generator)


def padded_batch(config) -> dict[str, torch.Tensor]:
    """Episodes of 6 to 9 rows against windows of 13: every window is padded."""
    return make_batch(config, data=corridor(episodes=5, rows=8))


def test_effective_rank_counts_directions():
    torch.manual_seed(0)
    assert effective_rank(torch.ones(50, 8) * 3) == pytest.approx(1, abs=0.01)
    line = torch.randn(200, 1) @ torch.randn(1, 8)
    assert effective_rank(line) == pytest.approx(1, abs=0.05)
    assert effective_rank(torch.randn(5000, 8)) == pytest.approx(8, abs=0.1)


@pytest.mark.parametrize("batch_of", [make_batch, padded_batch])
def test_targets_equal_a_walk_along_each_window(batch_of):
    """History off for half of the windows and short targets for the other half, as by default."""
    agent = make_agent(history_horizon=3)
    batch = batch_of(agent.config)
    codes = agent.encode(batch)
    critic, v, n_steps = agent.critic_target(codes, batch), agent.v_target(codes, batch), agent.n_steps(batch)
    discount, reached = agent.config.discount, 0
    z, goal = codes["target_z"], codes["target_goal"]
    assert n_steps[:2].max() == 3 and (n_steps.max() > 3 or not batch["valid"].all())
    for b, t in batch["valid"].nonzero().tolist():
        n, length = int(batch["horizon"][b, t]), int(batch["valid"][b].sum())
        n = min(n, 3) if b < 2 else n
        expected, k = {}, 0
        while len(expected) < 2:  # k transitions behind us
            last = k + 1 == n or t + k + 1 == length
            if last and "v" not in expected:
                smaller = agent.target.q(z[b, t + k], z[b, t + k + 1], goal[b, t]).min()
                expected["v"] = discount**k * float(smaller.clamp(0, 1))
            k += 1
            if batch["steps_to_goal"][b, t] == k:
                expected = {"v": discount ** (k - 1), "critic": discount ** (k - 1)} | expected
                reached += 1
            elif last:
                expected["critic"] = discount**k * float(agent.target.v(z[b, t + k], goal[b, t]).clamp(0, 1))
        assert critic[b, t].item() == pytest.approx(expected["critic"], abs=1e-5)
        assert v[b, t].item() == pytest.approx(expected["v"], abs=1e-5)
    assert reached > 2  # both branches were walked


def test_critic_and_v_losses():
    agent = make_agent()
    batch = make_batch(agent.config)
    codes = agent.encode(batch)
    target = agent.critic_target(codes, batch)
    q = agent.model.q(codes["z"], codes["z_next"], codes["z_goal"])
    assert torch.allclose(agent.critic_loss(codes, batch)[0], F.smooth_l1_loss(q, target.expand_as(q)), atol=1e-6)
    error = agent.v_target(codes, batch) - agent.model.v(codes["z"], codes["z_goal"])
    expectile = agent.config.expectile
    expected = (torch.where(error > 0, expectile, 1 - expectile) * error**2).mean()
    assert torch.allclose(agent.v_loss(codes, batch)[0], expected, atol=1e-6)


def test_windows_without_history_are_coded_state_by_state():
    agent = make_agent(history_dropout=0.25)
    batch = make_batch(agent.config)
    codes = agent.encode(batch)
    alone = agent.model.encoder.encode_goal(batch["observations"])
    history = agent.model.encoder(batch["observations"])
    assert torch.allclose(codes["z"][3], alone[3, :-1], atol=1e-6)
    assert torch.allclose(codes["z"][:3], history[:3, :-1], atol=1e-6)
    assert torch.allclose(codes["target_z"][3], agent.target.encoder.encode_goal(batch["observations"][3]), atol=1e-6)
    original = make_agent(history_dropout=0.25, target_history=True)
    target_z = original.encode(batch)["target_z"]
    assert torch.allclose(target_z[:3], original.target.encoder(batch["observations"][:3]), atol=1e-6)
    assert torch.allclose(target_z[3], original.target.encoder.encode_goal(batch["observations"][3]), atol=1e-6)
    assert make_agent(history_dropout=0.0)._with_history(4) == 4
    assert make_agent(history_dropout=1.0)._with_history(4) == 0


@pytest.mark.parametrize("focal_gamma,rate", [(0.0, 0.2), (2.0, 0.2), (0.0, 1e-4)])  # weight 4: reached, and capped
def test_reward_loss_equals_a_loop(focal_gamma, rate):
    agent = make_agent(focal_gamma=focal_gamma, max_pos_weight=4.0)
    batch = padded_batch(agent.config)
    agent.positive_rate.fill_(rate)
    codes = agent.encode(batch)
    total, count = 0.0, 0
    for b, t in batch["valid"].nonzero().tolist():
        p = torch.sigmoid(agent.model.reward(codes["z_next"][b, t], codes["z_goal"][b, t])).item()
        positive = bool(batch["steps_to_goal"][b, t] == 1 or batch["last"][b, t])
        weight, likelihood = (4.0, p) if positive else (1.0, 1 - p)
        total += -weight * np.log(likelihood) * (1 - likelihood) ** focal_gamma
        count += 1
    assert agent.reward_loss(codes, batch)[0].item() == pytest.approx(total / count, rel=1e-4)


def test_infonce_equals_a_loop():
    agent = make_agent(nce_positions=4)
    agent.update(make_batch(agent.config, seed=1))  # the bank holds something
    assert 0 < (agent.bank_absent == 0).sum() < agent.config.bank_size
    batch = padded_batch(agent.config)
    codes = agent.encode(batch)
    picked = [(int(batch["nce_offset"]) + 12 * i // 4) % 12 for i in range(4)]
    pairs = [
        (F.normalize(codes["z"][b, t], dim=0), F.normalize(codes["z_next"][b, t], dim=0))
        for b in range(4)
        for t in picked
        if batch["valid"][b, t]
    ]
    bank = list(agent.bank[agent.bank_absent == 0])
    losses = []
    for way in (0, 1):
        for pair in pairs:
            negatives = [other[1 - way] for other in pairs] + bank
            logits = torch.stack([pair[way] @ negative for negative in negatives]) / agent.config.temperature
            losses.append(torch.logsumexp(logits, 0) - pair[way] @ pair[1 - way] / agent.config.temperature)
    assert 0 < len(pairs) < 16
    assert torch.allclose(agent.nce_loss(codes, batch)[0], torch.stack(losses).mean(), atol=1e-5)


def state_loss_by_hand(agent, codes, batch) -> tuple[float, list[float]]:
    """The weighted mean over positions, and the weights, capped exp(0.3 (steps that V says were saved - taken))."""

    def steps_left(z, z_goal) -> float:
        return 1 + math.log(min(max(float(agent.target.v(z, z_goal)), 1e-3), 1)) / math.log(agent.config.discount)

    errors, weights = [], []
    for b, t in np.ndindex(*codes["n"].shape):
        z, goal, n = codes["target_z"][b], codes["target_goal"][b, t], int(codes["n"][b, t])
        to_goal = int(batch["steps_to_goal"][b, t])
        left = 0.0 if to_goal <= n else steps_left(z[t + n], goal)
        weights.append(min(math.exp(0.3 * (steps_left(z[t], goal) - left - min(n, to_goal))), 20.0))
        proposal = agent.model.next_state(codes["z"][b, t], codes["z_goal"][b, t])
        errors.append((proposal - z[t + 1]).square().mean().item())
    return float(np.average(errors, weights=weights)), weights


def test_state_loss_equals_a_loop_and_weighs_what_gets_nearer():
    agent = make_agent()
    batch = make_batch(agent.config)
    codes = agent.encode(batch)
    loss, info = agent.state_loss(codes, batch)
    expected, weights = state_loss_by_hand(agent, codes, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert info["state_weight"].item() == pytest.approx(np.mean(weights), rel=1e-4) and np.std(weights) > 0.1
    proposal = agent.model.next_state(codes["z"], codes["z_goal"])
    unweighted = make_agent(state_temperature=0.0).state_loss(codes, batch)[0]
    assert torch.allclose(unweighted, F.mse_loss(proposal, codes["target_z"][:, 1:]), atol=1e-6)


def test_the_weights_of_a_giant_maze_do_not_vanish_where_the_goal_is_far():
    """A perfect V, 1,000 steps from the goal: who comes a step nearer in one step has weight 1."""
    config = resolve(OfflineTrainerConfig(dataset="pointmaze-giant-navigate-v0"))
    agent = make_agent(discount=config.discount)
    agent.target = SimpleNamespace(v=lambda z, goal: config.discount ** (z[..., 0] - 1))
    left = torch.tensor([1000.0, 999.0, 998.0]).view(1, 3, 1)
    codes = {"target_z": left, "target_ahead": left[:, 1:], "target_goal": None, "n": torch.ones(1, 2)}
    weight = agent.state_weight(codes, {"steps_to_goal": torch.full((1, 2), NEVER)})
    assert torch.allclose(weight, torch.ones(1, 2), atol=1e-3)


def test_value_and_proposer_learn_the_corridor():
    """V must order held-out pairs by distance, though walks turn about, and proposals lead to either end."""
    agent = make_agent(lr=2e-3, tau=0.05, warmup_steps=5, horizon=12, discount=0.95)
    data, held_out = corridor(episodes=60), corridor(episodes=10, seed=9)
    generator = torch.Generator().manual_seed(1)
    infos = [agent.update(sample_batch(data, agent.config, 16, generator)) for _ in range(250)]
    first, last = (torch.stack([info["critic_loss"] for info in part]).mean() for part in (infos[:10], infos[-10:]))
    assert last < first
    windows = held_out.sample_windows(64, 12, generator)["observations"]
    z = agent.encode_windows(windows, torch.full((64,), 13))
    goals = held_out.observations[torch.randint(len(held_out.observations), (64,), generator=generator)]
    value = agent.value(z.unsqueeze(0), goals.unsqueeze(1)).numpy()
    distance = (goals[:, None, 0] - windows[None, :, -1, 0]).abs().numpy()
    assert spearmanr(value.ravel(), -distance.ravel()).statistic > 0.85
    states = data.observations[:200]
    for goal in (0.0, 20.0):
        z = agent.encode_states(states)
        for _ in range(8):
            z = agent.propose(z, torch.tensor([goal, 0.0]))
        nearest = torch.cdist(z, agent.encode_states(data.observations)).argmin(1)
        move = (data.observations[nearest] - states)[:, 0] * (1 if goal else -1)
        assert move[(states[:, 0] - goal).abs() > 5].mean() > 2


def test_alignment_loss():
    agent = make_agent()
    codes = agent.encode(make_batch(agent.config))
    a, b = codes["z_next"] - codes["z"], codes["z_goal"] - codes["z"]
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert torch.allclose(agent.alignment_loss(codes)[0], -cosine.mean(), atol=1e-5)
    toward = codes | {"z_next": codes["z"] + 0.1 * (codes["z_goal"] - codes["z"])}
    assert agent.alignment_loss(toward)[0].item() == pytest.approx(-1, abs=1e-4)


def test_padding_changes_no_loss_no_gradient_and_no_memory():
    batch = padded_batch(OfflineAgentConfig(**SMALL))
    assert not batch["valid"].all()
    other = {key: value.clone() for key, value in batch.items()}
    beyond = ~F.pad(batch["valid"], (1, 0), value=True)
    other["observations"][beyond] = 50.0
    other["goals"][~batch["valid"]] = -50.0
    other["steps_to_goal"][~batch["valid"]] = 1
    first, second = make_agent(), make_agent()
    for _ in range(3):
        a, b = first.update(batch), second.update(other)
        for name, value in a.items():
            assert torch.allclose(value, b[name], rtol=1e-4, atol=1e-6), name
    assert 0 < (first.bank_absent == 0).sum() < first.bank_next  # padded picks took slots that do not count


def test_every_pair_of_a_window_is_coded_as_its_history():
    """Whatever stands in the padding of a history."""
    agent = make_agent(history_dropout=0.0)
    batch = make_batch(agent.config)
    codes, lengths = agent.encode(batch), torch.tensor([2, 7, 12, 13])
    padded = batch["observations"].clone()
    padded[torch.arange(13) >= lengths[:, None]] = 1e6
    expected = codes["z_next"][torch.arange(4), lengths - 2]
    assert torch.allclose(agent.encode_windows(padded, lengths), expected, atol=1e-6)


def test_the_total_is_the_weighted_sum():
    agent = make_agent(**{f"beta_{name}": 1.5**k for k, name in enumerate(("critic", "v", "s", "r", "nce", "a"))})
    total, info, _ = agent.total_loss(make_batch(agent.config))
    losses = [info[f"{name}_loss"] for name in ("critic", "v", "state", "reward", "infonce", "alignment")]
    assert all(loss.abs() > 1e-3 for loss in losses)
    assert total.item() == pytest.approx(sum(1.5**k * loss.item() for k, loss in enumerate(losses)), rel=1e-4)


def test_no_gradient_through_targets():
    agent = make_agent()
    agent.total_loss(make_batch(agent.config))[0].backward()
    assert all(p.grad is None for p in agent.target.parameters())
    assert all(p.grad is not None for p in agent.parameters)


def test_update_follows_the_ema_the_warm_up_and_the_bank():
    agent = make_agent(tau=0.25, warmup_steps=4, nce_positions=3)
    before = copy.deepcopy(agent.target.state_dict())
    info = agent.update(make_batch(agent.config))
    assert agent.optimizer.lr.item() == pytest.approx(agent.config.lr / 4)
    assert all(value.ndim == 0 and not value.requires_grad for value in info.values())
    for name, value in agent.model.named_parameters():
        expected = 0.75 * before[name] + 0.25 * value
        assert torch.allclose(agent.target.state_dict()[name], expected, atol=1e-6), name
    assert (agent.bank_absent[:12] == 0).all() and (agent.bank_absent[12:] < -1e3).all()
    assert torch.allclose(agent.bank[:12].norm(dim=-1), torch.ones(12), atol=1e-5)
    assert agent.bank[12:].abs().max() == 0
    for _ in range(4):
        agent.update(make_batch(agent.config))
    assert agent.bank_next == 10 and (agent.bank.norm(dim=-1) > 0.99).all()  # 60 codes, round the ring of 50


def test_learning_rate_warms_up_and_decays():
    agent = make_agent(warmup_steps=10)
    agent.total_updates = 100
    rates = []
    for agent.step in range(100):
        rates.append(agent.learning_rate())
    assert rates[0] == pytest.approx(agent.config.lr / 10, rel=1e-3)
    assert rates[50] == pytest.approx(agent.config.lr / 2) and 0 < rates[-1] < agent.config.lr / 1000
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert make_agent(lr_decay=False).total_updates is None


def test_evaluation_leaves_no_trace():
    agent = make_agent(dropout=0.5)
    batch = make_batch(agent.config)
    agent.update(batch)
    before = copy.deepcopy(agent.state_dict())
    generator = torch.get_rng_state()
    first, second = agent.evaluate_losses(batch), agent.evaluate_losses(batch)
    assert first == second
    assert torch.equal(generator, torch.get_rng_state())
    after = agent.state_dict()
    for name, value in before["model"].items():
        assert torch.equal(value, after["model"][name])
    assert torch.equal(before["bank"], after["bank"]) and before["positive_rate"] == after["positive_rate"]


def test_unused_bank_and_no_future_goals_are_finite():
    agent = make_agent(bank_size=0, p_self=0.0, p_future=0.0, p_random=1.0)
    batch = make_batch(agent.config)
    assert (batch["steps_to_goal"] == NEVER).any()
    info = agent.update(batch)
    assert all(torch.isfinite(value) for value in info.values())


def test_golden_trace():
    """Three updates with fixed numbers. Whoever changes them on purpose says so in the commit."""
    agent = make_agent()
    trace = [float(agent.update(make_batch(agent.config, seed=i))["loss"]) for i in range(3)]
    assert trace == pytest.approx(GOLDEN, rel=1e-3)


GOLDEN = [8.3866348, 9.1684599, 11.6947947]


@pytest.mark.parametrize("rows", [7, 600])  # less than a block, and several
def test_logsumexp_over_the_bank_equals_its_plain_form(rows, monkeypatch):
    """In float64, with the gradient, over a bank of which a part is absent."""
    torch.manual_seed(0)
    both, bank = torch.randn(rows, 16, dtype=torch.float64), torch.randn(50, 16, dtype=torch.float64)
    absent = torch.where(torch.arange(50) < 30, 0.0, ABSENT).double()
    found = {}
    for kernels in ("plain", "torch"):
        monkeypatch.setattr(choice._Chosen, "kernels", kernels)
        own = both.clone().requires_grad_()
        value = bank_logsumexp(own, bank, absent)
        found[kernels] = value.detach(), *torch.autograd.grad((value * torch.arange(rows)).sum(), own)
    for fast, plain in zip(found["torch"], found["plain"], strict=True):
        assert torch.allclose(fast, plain, rtol=1e-10, atol=1e-10)
    nothing = bank_logsumexp(both, bank, torch.full_like(absent, ABSENT))  # a bank that holds nothing yet
    assert torch.isfinite(nothing).all() and nothing.max() < -9000
