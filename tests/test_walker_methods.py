"""The study's learners against plain computations: transformer, models, PPO, what each batch is made of."""

import math

import numpy as np
import pytest
import torch

from utils import ReplayBuffer
from walker.dynamics import DataStatistics, MLPDynamics, VAEDynamics, statistics_of
from walker.policies import DecisionTransformer, ReturnConditioned, TransformerBlock
from walker.ppo import PPO, PPOConfig, Rollout
from walker.train_dt import SequenceLearner, TransformerConfig
from walker.train_il import BehaviorCloning, CloningConfig
from walker.train_morel import MORELConfig, MORELLearner

SMALL = {"context": 4, "hidden_dim": 16, "layers": 2, "heads": 2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def windows(n=3, steps=4, dim=5, seed=0):
    g = generator(seed)
    times = torch.randint(900, (n, 1), generator=g) + torch.arange(steps)
    inputs, actions = torch.randn(n, steps, dim, generator=g), torch.rand(n, steps, 2, generator=g)
    return [inputs, actions, torch.rand(n, steps, generator=g), times, torch.ones(n, steps, dtype=torch.bool)]


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    network = DecisionTransformer(5, 2, **SMALL).eval()
    for parameter in network.parameters():  # larger than at first, so that every path counts
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator(1))
    return network


@pytest.mark.parametrize(("part", "own"), [(0, True), (1, False), (2, True)])
def test_an_action_sees_the_past_and_its_own_state_and_return_but_no_more(transformer, part, own):
    arguments = windows()
    before = transformer(*arguments)
    arguments[part] = arguments[part].clone()
    arguments[part][:, 2] += 1.0
    changed = (transformer(*arguments) - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False, False, own, True]


@pytest.mark.parametrize("kept, padded", [(slice(0, 2), slice(2, 4)), (slice(2, 4), slice(0, 2))])
def test_padding_changes_nothing(transformer, kept, padded):
    arguments = windows()
    expected = transformer(*(part[:, kept] for part in arguments))
    newest = transformer(*(part[:, kept] for part in arguments), newest=True)
    assert torch.allclose(newest, expected[:, -1:], atol=1e-6)
    for part, fill in zip(arguments, (1e3, 1e3, 1e3, 0, False), strict=True):
        part[:, padded] = fill
    assert torch.allclose(transformer(*arguments)[:, kept], expected, atol=1e-6)


def test_a_transformer_block_is_that_of_pytorch():
    ours = TransformerBlock(16, 2, 0.0)
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "relu", batch_first=True, norm_first=True)
    pairs = {
        "self_attn.in_proj_weight": ours.qkv.weight,
        "self_attn.in_proj_bias": ours.qkv.bias,
        "self_attn.out_proj.weight": ours.out.weight,
        "self_attn.out_proj.bias": ours.out.bias,
        **{f"linear1.{kind}": getattr(ours.mlp[0], kind) for kind in ("weight", "bias")},
        **{f"linear2.{kind}": getattr(ours.mlp[2], kind) for kind in ("weight", "bias")},
        **{f"norm1.{kind}": getattr(ours.norm_attention, kind) for kind in ("weight", "bias")},
        **{f"norm2.{kind}": getattr(ours.norm_mlp, kind) for kind in ("weight", "bias")},
    }
    theirs.load_state_dict({name: value.detach() for name, value in pairs.items()})
    x, causal = torch.randn(3, 6, 16, generator=generator()), torch.ones(6, 6, dtype=torch.bool).tril()
    expected = theirs.train()(x, src_mask=~causal)
    assert torch.allclose(ours(x, causal.expand(3, 1, 6, 6)), expected, atol=1e-5)


def test_acting_is_the_network_on_the_last_steps(transformer):
    policy = ReturnConditioned(transformer, {"walk": 900.0, "run": 300.0}, 1000.0)
    policy.begin(2, "run")
    g = generator(3)
    inputs, rewards = torch.randn(6, 2, 5, generator=g), torch.rand(6, 2, generator=g)
    actions = [policy.act(inputs[t], rewards[t]) for t in range(6)]
    returns = 0.3 - torch.cat([torch.zeros(1, 2), rewards[1:].cumsum(0)]) / 1000
    past = torch.stack([*actions[:5], torch.full((2, 2), 7.0)])  # its own action is not looked at
    last = slice(2, 6)
    arguments = (inputs[last], past[last], returns[last])
    times = torch.arange(2, 6).expand(2, 4)
    expected = transformer(*(part.transpose(0, 1) for part in arguments), times, torch.ones(2, 4, dtype=torch.bool))
    assert torch.allclose(actions[5], expected[:, -1], atol=1e-6)


def test_the_transformer_learns_to_read_the_return_that_is_asked_for():
    torch.manual_seed(0)
    config = TransformerConfig(**SMALL, dropout=0.0, warmup_steps=1, lr=1e-2)
    learner = SequenceLearner(config, 5, 2, {})
    for number in range(160):
        inputs, _, returns, times, valid = windows(32, seed=number)
        actions = torch.stack([returns, -returns], -1)
        batch = {"observations": inputs, "actions": actions, "returns": returns, "times": times, "valid": valid}
        loss = learner.update(batch)["action_loss"]
    assert float(loss) < 0.01  # 0.083 for the mean


def test_padding_is_not_learned_from():
    torch.manual_seed(0)
    config = TransformerConfig(**SMALL, dropout=0.0)
    inputs, actions, returns, times, valid = windows()
    valid[:, 2:] = False
    names = ("observations", "actions", "returns", "times", "valid")
    losses = []
    for fill in (0.0, 50.0):
        torch.manual_seed(0)
        learner = SequenceLearner(config, 5, 2, {})
        changed = torch.where(valid.unsqueeze(-1), actions, fill)
        found = learner.update(dict(zip(names, (inputs, changed, returns, times, valid), strict=True)))
        losses.append((float(found["action_loss"]), float(found["gradient_norm"])))
    assert losses[0] == losses[1]


def test_cloning_overfits_a_few_rows_and_its_rate_falls_to_nothing():
    torch.manual_seed(0)
    learner = BehaviorCloning(CloningConfig(hidden_dim=32, lr=1e-2), 5, 2)
    batch = {"observations": torch.randn(8, 5), "actions": torch.rand(8, 2) * 1.8 - 0.9}
    for number in range(150):
        learner.anneal(number / 150)
        loss = learner.update(batch)["bc_loss"]
    assert float(loss) < 1e-4 and float(learner.lr) < 1e-5


def linear_system(n, dim=3, seed=0):
    """Transitions of s' = s + A s + B a, r = sigmoid(s_0), with a task's bit behind s."""
    g = generator(seed)
    a, b = (torch.randn(*shape, generator=generator(9)) * 0.2 for shape in ((dim, dim), (2, dim)))
    states, bits = torch.randn(n, dim, generator=g), torch.randint(2, (n, 1), generator=g).float()
    actions = torch.rand(n, 2, generator=g) * 2 - 1
    following = states + states @ a + actions @ b
    rewards = torch.sigmoid(states[:, 0])
    batch = {"observations": torch.cat([states, bits], 1), "next_observations": torch.cat([following, bits], 1)}
    return batch | {"actions": actions, "rewards": rewards}


def statistics():
    batch = linear_system(2000)
    return statistics_of(batch["observations"][:, :3], batch["next_observations"][:, :3])


@pytest.mark.parametrize("kind", [MLPDynamics, VAEDynamics])
def test_a_model_learns_a_linear_system(kind):
    torch.manual_seed(0)
    model = kind(4, 2, statistics(), hidden_dim=32)
    optimizer, g = torch.optim.Adam(model.parameters(), 1e-2), generator(5)
    for number in range(250):
        loss, _ = model.loss(linear_system(128, seed=number), g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batch = linear_system(500, seed=10_000)
    following, rewards = model.step(batch["observations"], batch["actions"], g)
    change = batch["next_observations"][:, :3] - batch["observations"][:, :3]
    error = (following - batch["next_observations"])[:, :3]
    assert float(error.square().mean() / change.square().mean()) < 0.03
    assert float((rewards - batch["rewards"]).abs().mean()) < 0.05
    assert torch.equal(following[:, 3], batch["observations"][:, 3])  # the bit stays


def test_a_step_stays_where_the_data_was():
    facts = DataStatistics(torch.full((3,), 100.0), torch.full((3,), -1.0), torch.full((3,), 2.0))
    model = MLPDynamics(3, 2, facts, hidden_dim=8)
    following, rewards = model.step(torch.zeros(50, 3), torch.randn(50, 2), generator())
    assert float(following.min()) >= -1 and float(following.max()) <= 2
    assert float(rewards.min()) >= 0 and float(rewards.max()) <= 1


def test_each_member_is_trained_on_rows_of_its_own():
    torch.manual_seed(0)
    model = MLPDynamics(4, 2, statistics(), hidden_dim=8, members=2)
    batch = linear_system(6)
    loss, _ = model.loss(batch, generator())
    loss.backward()
    gradient = [weight.clone() for weight, _ in model.net.layers(model.net.theta.grad)]
    changed = {name: value.clone() for name, value in batch.items()}
    for value in changed.values():
        value[3:] += 1.0  # the second member's rows
    model.zero_grad()
    model.loss(changed, generator())[0].backward()
    for (weight, _), before in zip(model.net.layers(model.net.theta.grad), gradient, strict=True):
        assert torch.equal(weight[0], before[0]) and not torch.equal(weight[1], before[1])


def test_disagreement_is_the_largest_distance_of_a_pair():
    torch.manual_seed(0)
    model = MLPDynamics(4, 2, statistics(), hidden_dim=8, members=3)
    batch = linear_system(5)
    found = model.net(batch["observations"], batch["actions"])
    pairs = [(found[i] - found[j]).norm(dim=-1) for i, j in ((0, 1), (0, 2), (1, 2))]
    disagreement = model.disagreement(batch["observations"], batch["actions"])
    assert torch.allclose(disagreement, torch.stack(pairs).amax(0), atol=1e-5)


def test_a_row_steps_by_every_member_in_turn():
    torch.manual_seed(0)
    model = MLPDynamics(4, 2, statistics(), hidden_dim=8, members=3)
    batch = linear_system(1)
    one = model.net(batch["observations"], batch["actions"])[:, 0]
    inputs, actions = (batch[name].expand(200, -1) for name in ("observations", "actions"))
    rows = model.predict(inputs, actions, generator())
    nearest = (rows[:, None] - one).norm(dim=-1).detach().min(1)
    assert float(nearest.values.max()) < 1e-5
    assert torch.bincount(nearest.indices, minlength=3).min() > 40


def make_ppo(**settings):
    torch.manual_seed(0)
    return PPO(PPOConfig(**settings), 3, 1, 16, generator())


def test_advantages_are_those_of_a_plain_loop():
    ppo, g = make_ppo(), generator(2)
    rewards, values, following = (torch.randn(7, 2, generator=g) for _ in range(3))
    going_on = (torch.rand(7, 2, generator=g) > 0.3).float()
    found = ppo.advantages(rewards, values, following, going_on)
    for row in range(2):
        for t in range(7):
            total, weight = 0.0, 1.0
            for k in range(t, 7):
                total += weight * float(rewards[k, row] + 0.99 * going_on[k, row] * following[k, row] - values[k, row])
                weight *= 0.99 * 0.95 * float(going_on[k, row])
            assert float(found[t, row]) == pytest.approx(total, abs=1e-5)


def test_a_row_that_ended_begins_anew_and_does_not_bootstrap():
    ppo = make_ppo(horizon=4)
    starts = torch.arange(6.0).view(2, 3)
    ends = iter([[False, True], [False, False], [True, False], [False, False]])

    def step(inputs, actions):
        return inputs + 1, torch.ones(2), torch.tensor(next(ends))

    rollout, figures = ppo.imagine(starts, step)
    rows = rollout.inputs.view(4, 2, 3)
    assert torch.equal(rows[1, 1], starts[1]) and torch.equal(rows[3, 0], starts[0])
    assert torch.equal(rows[2, 0], starts[0] + 2) and float(figures["halted"]) == 0.25
    assert float(rollout.returns.view(4, 2)[2, 0]) == pytest.approx(0.01, abs=1e-6)  # its one reward, scaled; no more


def rollout_of(ppo, n=40):
    """Rows whose ratios lie inside and outside the clip, with advantages of both signs."""
    g = generator(8)
    inputs, actions = torch.randn(n, 3, generator=g), torch.randn(n, 1, generator=g) * 0.3
    old = ppo.actor.log_prob(inputs, actions).detach() + 0.5 * torch.randn(n, generator=g)
    return Rollout(inputs, actions, old, torch.randn(n, generator=g), torch.randn(n, generator=g))


def test_the_clipped_loss_is_the_papers():
    ppo = make_ppo(bc_weight=0.1)
    rows = rollout_of(ppo)
    loss, kl = ppo.actor_loss(rows, rows[:2])
    total, divergence, outside = 0.0, 0.0, 0
    mean = float(rows.advantages.mean())
    deviation = float(((rows.advantages - mean) ** 2).mean() ** 0.5)
    std = float(ppo.actor.log_std.detach().exp())
    modes = ppo.actor(rows.inputs).detach()
    for row in range(40):
        z = (float(rows.actions[row]) - float(modes[row])) / std
        ratio = math.exp(-0.5 * z * z - math.log(std * math.sqrt(2 * math.pi)) - float(rows.log_probs[row]))
        advantage = (float(rows.advantages[row]) - mean) / deviation
        total += min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage) / 40
        divergence += (ratio - 1 - math.log(ratio)) / 40
        outside += not 0.8 < ratio < 1.2
    likelihood = float(torch.distributions.Normal(modes, std).log_prob(rows.actions).mean())
    assert 5 < outside < 35
    assert float(loss.detach()) == pytest.approx(-total - 0.1 * likelihood, abs=1e-5)
    assert float(kl.detach()) == pytest.approx(divergence, abs=1e-5)


def test_a_minibatch_is_a_step_of_two_plain_adams():
    ppo, plain = make_ppo(), make_ppo()
    rows = rollout_of(ppo)
    figures = ppo.minibatch(rows, rows[:2])
    for loss, network, lr in (
        (plain.actor_loss(rows, rows[:2])[0], plain.actor, 1e-4),
        ((plain.values(rows.inputs) - rows.returns).square().mean(), plain.value, 1e-3),
    ):
        optimizer = torch.optim.Adam(network.parameters(), lr)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
    for ours, theirs in ((ppo.actor, plain.actor), (ppo.value, plain.value)):
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(own, other, atol=1e-7)
    assert set(figures) == {"actor_loss", "value_loss", "std", "kl"}


def test_ppo_finds_the_action_that_pays():
    ppo = make_ppo(horizon=5, ppo_lr=1e-2, discount=0.5, imagined_envs=64, minibatches=2, bc_weight=0.0)
    starts, g = torch.zeros(64, 3), generator(4)

    def step(inputs, actions):
        following = torch.randn(inputs.shape, generator=g)
        return following, 1 - (actions[:, 0] - torch.sign(inputs[:, 0]) * 0.5).square(), torch.zeros(64) > 0

    rewards = []
    for _ in range(40):
        rollout, figures = ppo.imagine(starts, step)
        rewards.append(float(figures["imagined_reward"]))
        ppo.improve(rollout, (starts, starts[:, :1]))
    assert rewards[0] < 0.8 and np.mean(rewards[-5:]) > 0.9


def test_an_imagined_episode_halts_where_members_disagree():
    torch.manual_seed(0)
    config = MORELConfig(model_updates=1, members=2, halt_quantile=0.5, halt_reward=-7.0, imagined_envs=4, horizon=2)
    batch, zeros = linear_system(100), torch.zeros(100)
    fields = (batch["observations"], batch["actions"], batch["rewards"], batch["next_observations"], zeros, zeros)
    model = MLPDynamics(4, 2, statistics(), 8, members=2)
    learner = MORELLearner(config, model, ReplayBuffer(*fields), generator())
    learner.ppo = PPO(config, 4, 2, 8, generator())
    learner.threshold = learner.find_threshold()
    distances = model.disagreement(batch["observations"], batch["actions"])
    assert float(learner.threshold) == pytest.approx(float(distances.median()), rel=0.1)
    _, rewards, ended = learner.model_step(batch["observations"], batch["actions"])
    assert torch.equal(ended, distances > learner.threshold) and 40 <= int(ended.sum()) <= 60
    assert bool((rewards[ended] == -7).all()) and bool((rewards[~ended] >= 0).all())
