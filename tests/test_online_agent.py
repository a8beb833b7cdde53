"""Targets, losses and acting against loops written out by hand; what an update touches; which rows a batch may read."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import InverseDynamicsModel, OfflineModel
from ogbench_utils import NEVER
from online_agent import OnlineAgent, OnlineAgentConfig, minimize
from opso import search
from opso.batches import MOST_TRAVEL_STEPS, CodeSet, sample_batch, sample_pairs, steps_to_travel
from opso.routes import Routes
from opso.search import Planner, StateGraph
from utils import EpisodeReplay

SETTINGS = {
    **{"lr": 1e-3, "tau": 0.1, "expectile": 0.9, "horizon": 5, "subgoal_steps": 4},
    **{"acting": "search", "num_links": 3, "link_cost": 0.5},
    **{"trusted_steps": 5.0, "aim_steps": 3.0, "replan_every": 1, "patience": 1000, "block_radius": 2.0},
    **{"escape_steps": 3, "metric_steps": 4, "metric_dim": 6, "metric_lr": 3e-3},
    **{"p_self": 0.2, "p_future": 0.4, "p_random": 0.4, "goal_discount": 0.7},
}
DISCOUNT, WIDTH, ACTIONS = 0.9, 8, 2
FEATURES = WIDTH + 2  # a code and the state, two numbers
LENGTHS = (2, 3, 8, 13)  # rows of the episodes


def make_agent(seed=0, kind=OnlineAgent, discount=DISCOUNT, **settings) -> OnlineAgent:
    torch.manual_seed(seed)
    model = OfflineModel(2, d_model=WIDTH, hidden_dim=16, n_layers=1, d_state=8)
    agent = kind(OnlineAgentConfig(**(SETTINGS | settings)), model, ACTIONS, 16, discount)
    with torch.no_grad():  # so that a target taken from the online network shows, and values lie inside (0, 1)
        for parameter in agent.target_parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
        agent.target["v"].net.layers()[-1][1].add_(0.5)
        agent.target["q"].net.layers()[-1][1].add_(0.5)
    return agent


def episode_ends(lengths=LENGTHS) -> list[int]:
    """For each row the last row of its episode."""
    return [sum(lengths[: i + 1]) - 1 for i, length in enumerate(lengths) for _ in range(length)]


def code_set(states: torch.Tensor, lengths=LENGTHS) -> CodeSet:
    """Episodes of these lengths in one row of rows; the action of row r is (r + 1, -r - 1)."""
    end = torch.tensor(episode_ends(lengths))
    rows = torch.arange(len(end))
    return CodeSet(states, torch.stack([rows + 1.0, -rows - 1.0], dim=1), end, rows[rows < end])


def random_codes(seed=0) -> CodeSet:
    return code_set(torch.randn(sum(LENGTHS), FEATURES, generator=torch.Generator().manual_seed(seed)))


def make_batch(agent: OnlineAgent, count=64, seed=0) -> dict[str, torch.Tensor]:
    return sample_batch(random_codes(), agent, count, torch.Generator().manual_seed(seed))


def random_states(agent: OnlineAgent, count=40) -> StateGraph:
    states = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(count)
    return StateGraph(agent, agent.encode(states), rows, rows // 10 * 10 + 9)


def route_of(agent: OnlineAgent, seed=0) -> dict[str, torch.Tensor]:
    return Routes(random_states(agent), 7).sample(64, torch.Generator().manual_seed(seed))


def update(agent: OnlineAgent, seed=0, lr_scale=1.0) -> dict[str, torch.Tensor]:
    batch = make_batch(agent, seed=seed)
    return agent.update(batch, (batch, route_of(agent, seed)), lr_scale)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_targets_equal_a_walk_along_each_episode():
    agent = make_agent()
    batch, source, ends = make_batch(agent, 300), random_codes(), episode_ends()
    critic, v = agent.critic_target(batch), agent.v_target(batch)
    z = agent.code(source.states)
    row_of = {tuple(code.tolist()): row for row, code in enumerate(z)}
    seen = set()
    for i in range(300):
        row, goal = (row_of[tuple(batch[name][i].tolist())] for name in ("z", "z_goal"))
        n, z_goal = int(batch["n"][i]), batch["z_goal"][i]
        expected = {}
        for k in range(1, n + 1):  # transitions behind us
            if "v" not in expected and k == n:
                smaller = float(agent.target["q"](z[row + k - 1], z[row + k], z_goal).min())
                expected["v"] = DISCOUNT ** (k - 1) * min(max(smaller, 0), 1)
            if row + k == goal:
                early = "v" not in expected
                expected |= {"critic": DISCOUNT ** (k - 1)} | ({"v": DISCOUNT ** (k - 1)} if early else {})
                break
        if "critic" not in expected:
            expected["critic"] = DISCOUNT**n * min(max(float(agent.target["v"](z[row + n], z_goal)), 0), 1)
        assert critic[i].item() == pytest.approx(expected["critic"], abs=1e-6)
        assert v[i].item() == pytest.approx(expected["v"], abs=1e-6)
        distance = goal - row if row < goal <= ends[row] else NEVER
        seen.add("never" if distance == NEVER else "at" if distance == n else "inside" if distance < n else "beyond")
    assert seen == {"inside", "at", "beyond", "never"}


def test_critic_and_v_losses():
    agent = make_agent()
    batch = make_batch(agent)
    target, q = agent.critic_target(batch), agent.heads["q"](batch["z"], batch["z_next"], batch["z_goal"])
    expected = (F.smooth_l1_loss(q[0], target) + F.smooth_l1_loss(q[1], target)) / 2
    assert torch.allclose(agent.critic_loss(batch)[0], expected, atol=1e-6)
    with torch.no_grad():
        agent.heads["v"].net.layers()[-1][1].add_(0.6)
    error = agent.v_target(batch) - agent.heads["v"](batch["z"], batch["z_goal"])
    assert (error > 0).any() and (error < 0).any()
    expected = (torch.where(error > 0, 0.9, 1 - 0.9) * error**2).mean()
    assert torch.allclose(agent.v_loss(batch)[0], expected, atol=1e-6)


def test_action_loss_equals_a_loop():
    agent = make_agent()
    batch = make_batch(agent, seed=1)
    errors = []
    for i in range(64):
        action = agent.act(*(batch[name][i] for name in ("x", "x_sub", "x_goal")))
        errors.append(float((action - batch["actions"][i]).square().mean()))
    assert agent.action_loss(batch)[0].item() == pytest.approx(np.mean(errors), rel=1e-4)


# -- update -----------------------------------------------------------------------------------------------------------


def test_features_are_the_code_and_the_normalised_state_whatever_the_block():
    agent = make_agent()
    agent.encoder.set_normalizer(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]))
    observations = torch.randn(3, 7, 2)
    features = agent.encode(observations)
    assert features.shape == (3, 7, FEATURES)
    rows, encode_goal = [], agent.encoder.encode_goal
    agent.encoder.encode_goal = lambda part: rows.append(len(part)) or encode_goal(part)
    assert torch.allclose(agent.encode(observations, block=4), features, atol=1e-6)
    assert torch.allclose(agent.encode(observations[0, :3]), features[0, :3], atol=1e-6) and set(rows) == {1, 4}
    code = agent.encoder(observations[1, 2].view(1, 1, 2)).flatten()
    assert torch.allclose(features[1, 2, :WIDTH], code, atol=1e-6)
    assert torch.equal(agent.code(features), features[..., :WIDTH])
    a, b = observations[1, 2].tolist()
    assert features[1, 2, WIDTH:].tolist() == pytest.approx([(a - 1) / 0.5, (b + 2) / 4], abs=1e-6)
    point = agent.metric(torch.tensor([(a - 1) / 0.5, (b + 2) / 4]))  # the metric sees the state alone
    assert torch.allclose(agent.embed(features)[1, 2], point, atol=1e-5)


def test_every_head_learns_nothing_else_does_and_the_targets_follow_by_tau():
    agent = make_agent(tau=0.25)
    heads, target = copy.deepcopy(agent.heads.state_dict()), copy.deepcopy(agent.target.state_dict())
    frozen = copy.deepcopy((agent.encoder.state_dict(), agent.metric.state_dict()))
    info = update(agent, lr_scale=0.5)
    assert all(value.ndim == 0 and not value.requires_grad for value in info.values())
    assert {"critic_loss", "v_loss", "state_loss", "train_loss", "route_v_loss"} <= set(info)
    assert agent.optimizer.lr.item() == pytest.approx(5e-4)
    for name, value in agent.heads.state_dict().items():
        assert not torch.equal(value, heads[name]), name
    for name, value in agent.target.state_dict().items():
        expected = target[name] + 0.25 * (agent.heads.state_dict()[name] - target[name])
        assert torch.allclose(value, expected, rtol=0, atol=1e-7), name
    for module, before in zip((agent.encoder, agent.metric), frozen, strict=True):
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    heads = copy.deepcopy(agent.heads.state_dict())
    update(agent, lr_scale=0.0)
    assert all(torch.equal(value, heads[name]) for name, value in agent.heads.state_dict().items())


def test_values_learn_where_they_are_given_from_their_rows_and_the_policy_from_its_own():
    agent = make_agent()
    for number, learns_values in enumerate((True, False, True)):
        rows, batch = make_batch(agent, seed=number), make_batch(agent, 24, seed=9 + number)
        losses = {"train_loss": agent.action_loss(batch)[0]}
        if learns_values:
            losses |= {"critic_loss": agent.critic_loss(rows)[0], "v_loss": agent.v_loss(rows)[0]}
        before = copy.deepcopy((agent.heads.state_dict(), agent.target.state_dict()))
        info = agent.update(batch, (rows, route_of(agent)) if learns_values else None)
        assert all(info[name] == loss for name, loss in losses.items()) and ("v_loss" in info) == learns_values
        for module, old in zip((agent.heads, agent.target), before, strict=True):
            for name, value in module.state_dict().items():
                learns = learns_values or name.startswith("inverse_dynamics")
                assert torch.equal(value, old[name]) != learns, name


def test_updates_learn_which_way_to_go():
    """A corridor walked to and fro by known steps: actions point at the subgoal, V falls with the distance."""
    agent = make_agent(lr=3e-3, tau=0.05, horizon=5, subgoal_steps=4)
    place = torch.linspace(-1, 1, 21)
    walk = torch.cat([place, place.flip(0)])
    code = torch.stack([walk * scale for scale in torch.linspace(0.5, 2, FEATURES)], dim=1)
    source = code_set(code, (21, 21))
    forth = torch.arange(42) < 21
    source.actions = torch.where(forth, 0.8, -0.8).unsqueeze(1).expand(-1, ACTIONS).contiguous()
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        here, there = torch.randint(21, (2, 128), generator=generator)
        route = {"x": code[here], "x_goal": code[there], "x_aim": code[there], "steps": (here - there).abs().float()}
        batch = sample_batch(source, agent, 128, generator)
        agent.update(batch, (batch, route))
    start, end = code[10].expand(2, -1), code[[14, 6]]
    action = agent.act(start, end, end)
    assert (action[0] > 0.4).all() and (action[1] < -0.4).all()
    value = agent.heads["v"](agent.code(code[10]).expand(11, -1), agent.code(code[10:21]))
    assert value[1] > value[5] + 0.1 > value[10] + 0.2


# -- metric -----------------------------------------------------------------------------------------------------------


def pairs_of(source: CodeSet, metric_steps=4, count=64, seed=0):
    """What draws the metric's pairs from these rows."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: sample_pairs(source, metric_steps, count, generator)


def states_only(states: torch.Tensor) -> torch.Tensor:
    """Features of states [n, 2] whose codes are nothing."""
    return F.pad(states, (WIDTH, 0))


def test_minimize_is_adamw_with_a_cosine():
    """Bit by bit, PyTorch's own; then the network is frozen."""
    nets, x = [InverseDynamicsModel(3, 8, 2)], torch.randn(50, 3)
    nets.append(copy.deepcopy(nets[0]))
    mine, theirs = ((lambda net=net: net(x, x + 0.1).square().mean()) for net in nets)
    minimize(nets[0], 1e-2, mine, range(20), floor=0.02, decay=1e-4)
    optimizer = torch.optim.AdamW(nets[1].parameters(), weight_decay=1e-4)
    for number in range(20):
        optimizer.param_groups[0]["lr"] = 1e-2 * (0.51 + 0.49 * math.cos(math.pi * number / 20))
        optimizer.zero_grad()
        theirs().backward()
        optimizer.step()
    for own, usual in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(own, usual) and not own.requires_grad


def test_the_metrics_loss_is_infonce_both_ways():
    agent = make_agent()
    state, later, steps = pairs_of(random_codes(), count=9)()
    with torch.no_grad():
        x, y = agent.embed(state).numpy(), agent.embed(later).numpy()
    logits = [[-math.dist(a, b) for b in y] for a in x]
    total = 0.0
    for i in range(9):
        row, column = logits[i], [logits[k][i] for k in range(9)]
        total -= 2 * logits[i][i] - math.log(sum(map(math.exp, row))) - math.log(sum(map(math.exp, column)))
    loss = agent.fit_metric(lambda: (state, later, steps), range(1))
    assert loss == pytest.approx(total / 18, rel=1e-4)


def test_fitting_the_metric_changes_nothing_else_and_leaves_it_frozen():
    agent, names = make_agent(), ("encoder", "heads", "target", "optimizer")
    before = copy.deepcopy(agent.state_dict())
    agent.fit_metric(pairs_of(random_codes()), range(5))
    after = agent.state_dict()
    assert all(p.grad is None for part in names[:3] for p in getattr(agent, part).parameters())
    assert all(torch.equal(value, after[part][name]) for part in names[:3] for name, value in before[part].items())
    assert str(before["optimizer"]) == str(after["optimizer"])
    changed = {name for name, value in before["metric"].items() if not torch.equal(value, after["metric"][name])}
    still = {"net.4.bias", "aim_steps"}  # a shift is no distance; the aim is measured apart
    assert changed >= set(before["metric"]) - still and "steps_per_square" in changed
    assert not any(p.requires_grad for p in agent.metric.parameters())


def test_a_squared_distance_is_worth_the_steps_of_the_pairs():
    """Over the pairs that calibrate, the metric's steps and those of the data sum up to the same."""
    agent, (state, later, steps) = make_agent(), pairs_of(random_codes(), count=50)()
    agent.fit_metric(lambda: (state, later, steps), range(3))
    apart = agent.metric_steps(agent.embed(state), agent.embed(later))
    assert apart.shape == (50, 50)
    assert apart.diagonal().sum().item() == pytest.approx(float(steps.sum()), rel=1e-4)
    i, k = 3, 17
    square = float((agent.embed(state[i]) - agent.embed(later[k])).square().sum())
    assert apart[i, k].item() == pytest.approx(float(agent.metric.steps_per_square) * square, rel=1e-4)


def test_the_inverse_dynamics_model_finds_the_actions_of_states_alone():
    """Own transitions of a known dynamics teach it; it then infers others', at places it has not seen."""
    agent = make_agent()
    generator = torch.Generator().manual_seed(0)
    push = torch.tensor([[0.2, 0.05, 0.0], [0.0, -0.1, 0.1]])[:, :ACTIONS]

    def transitions(count: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states = spread * torch.randn(count, 2, generator=generator)
        actions = 2 * torch.rand(count, ACTIONS, generator=generator) - 1
        return agent.state(agent.encode(states)), agent.state(agent.encode(states + actions @ push.T)), actions

    states, later, actions = transitions(500, 2.0)
    agent.scale_idm(states, later)
    assert torch.allclose(agent.idm.scale, (later - states).std(0) + 1e-3, atol=1e-5)
    heads = copy.deepcopy(agent.heads.state_dict())
    blank = (agent.infer_actions(states, later) - actions).abs().mean()
    loss = agent.fit_idm(lambda: transitions(64, 1.0), range(600), 3e-3)
    found = agent.infer_actions(states, later, block=64)
    assert torch.allclose(found, agent.infer_actions(states, later), atol=1e-5) and found.abs().max() <= 1
    # Two numbers of motion tell two actions.
    assert (found - actions)[:, :2].abs().mean() < 0.1 < blank and loss < 0.1
    assert all(torch.equal(before, agent.heads.state_dict()[name]) for name, before in heads.items())
    assert not any(parameter.requires_grad for parameter in agent.idm.parameters())


def horseshoe(rows: int, back: bool = False) -> torch.Tensor:
    """A corridor round the end of a wall: two arms of 20 steps, 0.3 apart, and 4 steps across. [rows, 2]."""
    along = torch.linspace(0, 44, rows)
    x = torch.minimum(along, 44 - along).clamp(max=20) / 10 - 1
    y = ((along - 20) / 4).clamp(0, 1) * 0.3
    states = torch.stack([x, y], dim=1)
    return states.flip(0) if back else states


def test_the_metric_learns_the_steps_along_a_corridor_and_sees_the_wall():
    """Walked to and fro, a row a step. The two ends lie 0.3 apart, three steps of the arms, and 44 by the corridor."""
    agent = make_agent(metric_dim=16, metric_lr=5e-3)
    torch.manual_seed(0)
    walks = [horseshoe(45, back) + 0.02 * torch.randn(45, 2) for back in (False, True) * 10]
    source = code_set(states_only(torch.cat(walks)), (45,) * 20)
    draw = pairs_of(source, metric_steps=8, count=128)
    first = agent.fit_metric(draw, range(1))
    last = agent.fit_metric(draw, range(400))
    assert last < first - 0.4
    points = agent.embed(states_only(horseshoe(45)))
    steps = agent.metric_steps(points, points).numpy()
    rows = np.arange(45)
    mean = {k: steps[rows[:-k], rows[k:]].mean() for k in (1, 2, 4, 8, 12, 16)}
    assert list(mean.values()) == sorted(mean.values())  # on the whole
    assert mean[1] < 0.5 * mean[4] < 0.5 * mean[8]
    ordered = [steps[i, i + 2] < steps[i, i + 8] for i in range(37)]
    assert np.mean(ordered) > 0.95  # and state by state
    across = np.array([steps[i, 44 - i] for i in range(10)])  # the other side of the wall
    assert across.min() > 1.5 * mean[16]


# -- batches and the replay -------------------------------------------------------------------------------------------


def counted(rows: torch.Tensor) -> torch.Tensor:
    """Features of rows: the code of row r is r, its state r + 0.5."""
    return torch.cat([rows.unsqueeze(1).expand(-1, WIDTH), rows.unsqueeze(1).expand(-1, 2) + 0.5], dim=1)


def counted_codes() -> CodeSet:
    return code_set(counted(torch.arange(float(sum(LENGTHS)))))


def counted_replay() -> EpisodeReplay:
    """Episodes of 1, 2, 7 and 12 transitions in slots of 14 rows, the oldest two overwritten; features as counted.

    Rows that belong to no episode hold nan.
    """
    replay = EpisodeReplay(4, 13, FEATURES, ACTIONS)
    replay.states.fill_(math.nan)
    for count, length in enumerate((5, 3, 7, 12, 1, 2)):
        first = (count % 4) * 14
        replay.states[first : first + 14] = math.nan
        rows = torch.arange(first, first + length + 1, dtype=torch.float32)
        replay.add(counted(rows), torch.stack([rows[:-1] + 1, -rows[:-1] - 1], dim=1))
    return replay


ENDS = {
    counted_codes: dict(enumerate(episode_ends())),
    counted_replay: {
        14 * slot + i: 14 * slot + length for slot, length in enumerate((1, 2, 7, 12)) for i in range(length + 1)
    },
}


@pytest.mark.parametrize("make", [counted_codes, counted_replay])
def test_a_batch_never_crosses_an_episodes_end(make):
    agent, ends = make_agent(), ENDS[make]
    batch = sample_batch(make(), agent, 3000, torch.Generator().manual_seed(0))
    names = ("z", "z_next", "z_before", "z_ahead", "x_sub", "z_goal")
    assert torch.equal(batch["x_sub"], counted(batch["x_sub"][:, 0]))
    for end in ("", "_goal"):
        rows = batch[f"z{end}"][:, 0]
        assert torch.equal(batch[f"x{end}"], counted(rows)) and torch.equal(batch[f"z{end}"], counted(rows)[:, :WIDTH])
    numbers = zip(*(batch[name][:, 0].tolist() for name in names), strict=True)
    seen, goals_of = {"n": set(), "sub": set()}, {"never": 0, "next": 0}
    for i, (row, after, before, ahead, sub, goal) in enumerate(numbers):
        end, n, steps = ends[row], int(batch["n"][i]), int(batch["steps_to_goal"][i])
        assert row < end and after == row + 1
        assert 1 <= n <= 5 and before == row + n - 1 and ahead == row + n <= end
        assert row < sub <= min(end, row + 4)
        assert goal in ends and steps == (goal - row if row < goal <= end else NEVER)
        assert batch["actions"][i].tolist() == [row + 1, -row - 1]
        seen["n"].add(n), seen["sub"].add(sub - row)
        goals_of["never"] += steps == NEVER
        goals_of["next"] += steps == 1
    assert seen == {"n": {1, 2, 3, 4, 5}, "sub": {1, 2, 3, 4}}
    assert min(goals_of.values()) > 100
    assert {row for row, end in ends.items() if row < end} == set(batch["z"][:, 0].tolist())


def test_pairs_never_cross_an_episodes_end():
    """Steps are uniform in 1..metric_steps, or what is left of the episode."""
    ends, generator = ENDS[counted_codes], torch.Generator().manual_seed(0)
    state, later, steps = sample_pairs(counted_codes(), 4, 4000, generator)
    assert torch.equal(state, counted(state[:, 0])) and torch.equal(later, counted(later[:, 0]))
    assert steps.dtype == torch.int64
    seen = set()
    for row, after, apart in zip(state[:, 0].tolist(), later[:, 0].tolist(), steps.tolist(), strict=True):
        assert row < after <= min(ends[row], row + 4) and apart == after - row
        seen.add((row, apart))
    assert seen == {(row, k) for row, end in ends.items() for k in range(1, min(4, end - row) + 1)}
    free = torch.tensor([ends[row] - row >= 4 for row in state[:, 0].tolist()])
    assert torch.bincount(steps[free], minlength=5)[1:].float().div(free.sum()).tolist() == pytest.approx(
        [0.25] * 4, abs=0.05
    )


def straight(count: int, step: float) -> torch.Tensor:
    return torch.stack([step * torch.arange(count), torch.zeros(count)], dim=1)


def test_the_aim_is_as_far_ahead_as_a_trajectory_takes_to_get_away():
    """Straight on, 12 steps; back with every third, 10 times 3 and 2; some of it standing still, no more than 12."""
    end = torch.full((400,), 399)
    assert steps_to_travel(straight(400, 0.25), end) == 12
    dithering = torch.tensor([1.0, 1.0, -1.0]).repeat(134)[:400].cumsum(0)
    assert steps_to_travel(torch.stack([dithering, torch.zeros(400)], dim=1), end) == 32
    still = torch.cat([straight(250, 0.25), straight(1, 0).expand(150, -1)])
    assert steps_to_travel(still, end) == 12


def test_the_aim_looks_at_no_other_episode_and_ends_somewhere():
    short = torch.cat([straight(9, 1.0), 100 + straight(5, 1.0)])
    assert steps_to_travel(short, torch.tensor([8] * 9 + [13] * 5)) == 8
    round_and_round = torch.stack([torch.arange(500.0).cos(), torch.arange(500.0).sin()], dim=1)
    assert steps_to_travel(round_and_round, torch.full((500,), 499)) == MOST_TRAVEL_STEPS
    agent = make_agent(aim_steps=None)
    agent.metric.aim_steps.fill_(26)
    assert agent.aim_steps == 26 and make_agent(aim_steps=4.5).aim_steps == 4.5


# -- the graph --------------------------------------------------------------------------------------------------------


class PlaceAgent(OnlineAgent):
    """Its metric is plain: the squared distance between two places in the plane is the steps between them."""

    def embed(self, features):
        return features[..., self.code_dim :]


def place_agent(**settings) -> PlaceAgent:
    return make_agent(kind=PlaceAgent, **settings)


def join(agent: OnlineAgent, *trajectories, gaps=None) -> StateGraph:
    """Places as nodes, trajectory by trajectory; gaps[k] rows between two of the k-th; one row follows its last."""
    rows, ends, first = [], [], 0
    for number, places in enumerate(trajectories):
        gap = gaps[number] if gaps else 1
        rows += [first + gap * i for i in range(len(places))]
        ends += [rows[-1] + 1] * len(places)
        first = ends[-1] + 1
    places = torch.tensor([place for places in trajectories for place in places], dtype=torch.float32)
    return StateGraph(agent, agent.encode(places), torch.tensor(rows), torch.tensor(ends))


def edges(graph: StateGraph) -> dict[tuple[int, int], float]:
    found = list(zip(graph.source.tolist(), graph.target.tolist(), strict=True))
    assert len(set(found)) == len(found)  # parallel edges would be added up
    return dict(zip(found, graph.cost.tolist(), strict=True))


def link(agent: OnlineAgent, a, b) -> float:
    steps, config = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)), agent.config
    return config.link_cost + steps * (1 + steps / config.trusted_steps)


def edges_by_hand(agent, places, rows, ends) -> dict[tuple[int, int], float]:
    """Every pair looked at: the rows between neighbours of one episode, and links to the num_links nearest."""
    n, found = len(places), {}
    for i in range(n):
        others = sorted((k for k in range(n) if k != i), key=lambda k: math.dist(places[i], places[k]))
        for k in others[: agent.config.num_links]:
            found[i, k] = found[k, i] = link(agent, places[i], places[k])
    for i in range(n - 1):
        if ends[i] == ends[i + 1]:
            found[i, i + 1] = min(rows[i + 1] - rows[i], found.get((i, i + 1), math.inf))
    return found


def random_graph(agent: OnlineAgent, seed: int, lengths=(7, 1, 4, 9, 3)):
    """Episodes of so many nodes, 1 to 3 rows apart, that jump about a square of side 5. Graph, places, rows, ends."""
    rng = np.random.default_rng(seed)
    rows, ends, first = [], [], 0
    for length in lengths:
        own = first + np.cumsum(rng.integers(1, 4, length))
        rows += own.tolist()
        ends += [int(own[-1]) + 2] * length
        first = ends[-1] + 1
    places = rng.uniform(0, 5, (len(rows), 2)).astype(np.float32)
    graph = StateGraph(agent, agent.encode(torch.from_numpy(places)), torch.tensor(rows), torch.tensor(ends))
    return graph, places.astype(float).tolist(), rows, ends


@pytest.mark.parametrize("settings", [{}, {"num_links": 1, "link_cost": 0.0}, {"num_links": 100, "trusted_steps": 0.5}])
def test_links_lead_both_ways_to_the_nearest(settings):
    agent = place_agent(**settings)
    graph, places, rows, ends = random_graph(agent, 0, (1,) * 30)
    found, expected = edges(graph), edges_by_hand(agent, places, rows, ends)
    assert set(found) == set(expected) and all((b, a) in found for a, b in found)
    assert all(found[pair] == pytest.approx(cost, rel=1e-3, abs=1e-4) for pair, cost in expected.items())
    found = edges(join(agent, *[[(1, 1)]] * 7, [(5, 1)]))  # so many in one place that a node is not its own nearest
    assert all(a != b for a, b in found) and {a for a, _ in found} == set(range(8))


def shortest(cost: np.ndarray) -> np.ndarray:
    """Fewest steps between all nodes [n, n], by Floyd and Warshall."""
    best = cost.copy()
    np.fill_diagonal(best, 0)
    for k in range(len(best)):
        best = np.minimum(best, best[:, k : k + 1] + best[k : k + 1])
    return best


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("num_links", [1, 3])
def test_routes_equal_an_exhaustive_search(count, num_links):
    """Over the edges written out by hand, without those blocked."""
    agent, ways = place_agent(num_links=num_links), []
    for seed in range(6):
        graph, places, rows, ends = random_graph(agent, seed)
        rng, n = np.random.default_rng(100 + seed), len(places)
        goal = rng.uniform(0, 5, 2).astype(np.float32)
        last, last_cost = (links[0] for links in graph.links(torch.from_numpy(goal)[None]))
        near = sorted(range(n), key=lambda k: math.dist(places[k], goal))[:num_links]
        assert last.tolist() == near
        blocked = [(rng.random(n) < 0.5, rng.random(n) < 0.5) for _ in range(count)]
        cost = np.full((n + 1, n + 1), np.inf)
        for (a, b), price in edges_by_hand(agent, places, rows, ends).items():
            if not any(here[a] and there[b] for here, there in blocked):
                cost[a, b] = price
        for k in near:  # the goal itself is never blocked
            cost[k, n] = link(agent, places[k], goal.tolist())
        best = shortest(cost)
        steps, next_node = graph.shortest_paths(last, last_cost, blocked)
        assert np.allclose(steps, best[:n, n], rtol=1e-4)
        for node in range(n):
            after = next_node[node]
            if np.isfinite(steps[node]):
                assert steps[node] == pytest.approx(cost[node, after] + best[after, n], rel=1e-4)
            else:
                assert after < 0
        ways += np.isfinite(steps).tolist()
    assert any(ways) and (count < 3 or not all(ways))


def test_a_link_of_no_cost_is_an_edge():
    agent = place_agent(num_links=1, link_cost=0.0)
    graph = join(agent, [(0, 0), (0, 9)], [(0, 9), (9, 9)], [(9, 9), (30, 9)])
    steps, next_node = graph.shortest_paths([5], [1.0])
    assert steps.tolist() == pytest.approx([4, 3, 3, 2, 2, 1]) and next_node.tolist() == [1, 2, 3, 4, 5, 6]


def test_links_from_outside_and_the_ends_of_a_way():
    agent = place_agent(num_links=4, block_radius=3.0)
    graph, places, *_ = random_graph(agent, 3)
    points = torch.rand(5, 2) * 5
    (nodes, costs), n = graph.links(points), len(graph)
    assert nodes.shape == costs.shape == (5, 4) and costs.dtype == np.float64
    seen = []
    for row, point in enumerate(points.tolist()):
        near = sorted(range(n), key=lambda k: math.dist(places[k], point))[:4]
        assert nodes[row].tolist() == near
        assert costs[row].tolist() == pytest.approx([link(agent, places[k], point) for k in near], rel=1e-3)
        away = [(math.dist(place, point) ** 2, math.dist(place, places[row]) ** 2) for place in places]
        here = [k != row and a <= 3 and a < b for k, (a, b) in enumerate(away)]
        there = [k == row or (b <= 3 and b <= a) for k, (a, b) in enumerate(away)]
        assert [side.tolist() for side in graph.around(points[row], row)] == [here, there]
        seen += here + there
    assert any(seen) and not all(seen)


def test_candidates_lie_in_the_ring_away_from_where_the_episode_was():
    """Against every node; where places cover the ring, it alone counts, and where no node is in it, the nearest do."""
    agent, aim = place_agent(num_links=4), 2.0
    graph, nodes_at, *_ = random_graph(agent, 3)
    low, high = (math.sqrt(aims * aim) for aims in search.RING)
    sizes = set()
    for number, point in enumerate((torch.rand(40, 2) * 7).tolist()):
        avoided = torch.rand(number % 12, 2) * 5
        ring = [k for k, place in enumerate(nodes_at) if low < math.dist(place, point) <= high]
        fresh = [k for k in ring if all(math.dist(nodes_at[k], place) > low for place in avoided.tolist())]
        nearest = sorted(range(len(graph)), key=lambda k: math.dist(nodes_at[k], point))[:4]
        expected = fresh or ring or nearest
        assert graph.candidates(torch.tensor(point), list(avoided), aim).tolist() == expected
        sizes.add("fresh" if 0 < len(fresh) < len(ring) else "all" if fresh else "ring" if ring else "nearest")
    assert sizes == {"fresh", "all", "ring", "nearest"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MOST_CANDIDATES", 2)
        middle = torch.tensor([10.0, 0.0])
        assert join(agent, LINE).candidates(middle, [], 8.0).tolist() == [6, 13]  # of 6, 7, 13, 14


ROUND = [(x, 0) for x in range(21)] + [(20, 1), (20, 2)] + [(x, 3) for x in range(20, -1, -1)]


def test_no_way_leads_through_a_wall():
    """Two arms, 9 steps apart through the wall, where a row is a step. Only who trusts long links goes through."""
    start, goal, n = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]), 2 * len(ROUND)

    def way(**settings) -> tuple[dict, float, StateGraph]:
        agent = place_agent(**settings)
        graph = join(agent, ROUND, ROUND[::-1])
        (last, last_cost), (first, first_cost) = (
            (nodes[0], costs[0]) for nodes, costs in map(graph.links, (goal, start))
        )
        steps, _ = graph.shortest_paths(last, last_cost)
        return edges(graph), float((first_cost + steps[first]).min()), graph

    def along(node: int) -> int:
        return node if node < len(ROUND) else n - 1 - node

    found, length, _ = way(num_links=4)
    assert max(abs(along(a) - along(b)) for a, b in found) == 2  # the nearest are all in the corridor
    assert length == pytest.approx(len(ROUND) - 1 + 2 * 0.5)
    found, length, _ = way(num_links=n, trusted_steps=1.0)
    assert found[0, len(ROUND) - 1] == pytest.approx(0.5 + 9 * 10)  # there is a link through
    assert length == pytest.approx(len(ROUND) - 1 + 2 * 0.5)  # chains are preferred
    _, length, _ = way(num_links=n, trusted_steps=1e9)
    assert length == pytest.approx(9 + 2 * 0.5)  # straight through


# -- acting -----------------------------------------------------------------------------------------------------------


def places(*points) -> np.ndarray:
    return np.array(points, dtype=np.float32)


def plan(agent: OnlineAgent, graph: StateGraph, *goals, seed=0, **more) -> Planner:
    return Planner(agent, graph, places(*goals), range(seed, seed + len(goals)), **more)


def aims(planner: Planner, *points) -> list[int]:
    """The nodes aimed at where the environments show these places, len(graph) for the goal; z' is what they say."""
    actions = planner.act(places(*points), np.arange(len(points)))
    assert actions.shape == (len(points), ACTIONS) and np.abs(actions).max() <= 1
    known = torch.cat([planner.graph.features, torch.zeros(1, FEATURES)])
    for env, node in enumerate(planner.chosen):
        expected = known[node] if node < len(planner.graph) else planner.goals[env]
        assert torch.equal(planner.subgoals[env], expected)
    return planner.chosen.tolist()


LINE = [(float(x), 0.0) for x in range(20)]


@pytest.mark.parametrize("aim_steps,ahead", [(3.0, 2), (0.4, 1), (1.2, 2), (6.5, 3)])
def test_it_aims_some_steps_ahead_on_the_way(aim_steps, ahead):
    """So far by the metric, the square of the places between; a link leads to the line, and one to the goal."""
    agent = place_agent(aim_steps=aim_steps)
    planner = plan(agent, join(agent, LINE), LINE[-1])
    for place in range(20):
        left, to_goal = 19 - place, (19 - place) ** 2
        near = to_goal <= aim_steps or left < ahead
        assert aims(planner, LINE[place]) == [20 if near else place + ahead], place


def test_the_goal_is_the_aim_where_no_way_leads():
    """Two lines that no link joins: there is a way along the first, and none from the second."""
    agent = place_agent(num_links=1)
    graph = join(agent, LINE[:5], [(30, 0), (31, 0), (32, 0)])
    assert aims(plan(agent, graph, (4, 0), (4, 0)), (0, 0), (30, 0)) == [2, 8]


def test_on_a_way_that_winds_it_aims_no_farther_than_twice_as_many_steps():
    """All of a coil is near by the metric: a step of the link and 5 along it come to twice the aim."""
    coil = [(0.5 * math.cos(k / 2), 0.5 * math.sin(k / 2)) for k in range(11)]
    agent = place_agent(num_links=1, link_cost=1.0, aim_steps=3.0)
    assert aims(plan(agent, join(agent, [*coil, (0.2, -6.0), (0.2, -12.0)]), (0.2, -12)), coil[0]) == [5]


UPPER = [(0, 0), (0, 4), (8, 4), (8, 0)]
LOWER = [(0, -0.1), (0, -4), (8, -4), (8, 0.1)]


def stuck_agent(**settings) -> PlaceAgent:
    return place_agent(**({"num_links": 2, "aim_steps": 1.5, "patience": 6, "escape_steps": 4} | settings))


def test_a_way_without_progress_is_blocked_after_patience_and_all_blocked_begins_anew():
    """The upper way is shorter; who does not get on tries the lower one, and in the end the upper one again.

    The second environment gets on, and keeps to the way that the first one blocks.
    """
    agent = stuck_agent()
    graph = join(agent, UPPER, LOWER, gaps=(2, 3))
    planner = plan(agent, graph, (8, 0), (8, 0))
    chosen, other = zip(*(aims(planner, (0, 0), (0, 9 - 0.29 * step)) for step in range(14)), strict=True)
    assert chosen == (1,) * 7 + (5,) * 7 and other == (1,) * 14
    again = [aims(planner, (0, 0), (8, 4))[0] for _ in range(14)]
    assert again[0] in (1, 8) and again[1:6] == [1] * 5 and again[-5:] == [5] * 5
    assert aims(plan(agent, graph, (8, 0)), (0, 0)) == [1]  # given up for the episode, not for ever


def test_a_blocked_edge_holds_for_who_stands_where_it_begins():
    """The blocked node is among those nearest to the place itself."""
    agent = stuck_agent(num_links=3)
    upper = [(-0.5, 0), (0, 2), (8, 4), (8, 0)]
    graph = join(agent, upper, LOWER, gaps=(2, 9))
    planner = plan(agent, graph, (8, 0))
    assert 1 in graph.links(torch.zeros(1, 2))[0]
    chosen = [aims(planner, (0, 0))[0] for _ in range(14)]
    assert chosen == [1] * 7 + [5] * 7


def test_who_is_stuck_escapes_at_random():
    """One random action, escape_steps times, from the choice that blocks the way; the seed's."""
    taken = {}
    for escape_steps, seed in ((0, 0), (4, 0), (4, 1), (4, 0)):
        agent = stuck_agent(escape_steps=escape_steps)
        planner = plan(agent, join(agent, UPPER, LOWER, gaps=(2, 3)), (8, 0), seed=seed)
        actions = np.concatenate([planner.act(places((0, 0)), np.array([0])) for _ in range(12)])
        assert np.array_equal(actions, taken.setdefault((escape_steps, seed), actions))
    calm, *wild = taken.values()
    for actions in wild:
        differs = np.abs(actions - calm).max(axis=1) > 1e-4
        assert np.flatnonzero(differs).tolist() == [6, 7, 8, 9]
        assert (actions[differs] == actions[differs][0]).all() and np.abs(actions).max() <= 1
    assert not np.array_equal(*wild)


def test_who_is_stuck_beside_the_goal_escapes_and_blocks_nothing():
    agent = stuck_agent()
    planner = plan(agent, join(agent, UPPER, LOWER), (8, 0))
    actions = []
    for _ in range(20):
        actions.append(planner.act(places((8, 0.5)), np.array([0]))[0])
        assert planner.chosen[0] == 8
    assert len({tuple(action) for action in actions}) == 3  # towards the goal, and two random ones


@pytest.mark.parametrize("acting", ["search", "value", "proposer"])
def test_environments_act_each_for_itself(acting):
    """Exploration, noise and escapes included: each has its own seed."""
    agent = make_agent(acting=acting, replan_every=2, patience=2, escape_steps=1)
    torch.manual_seed(1)
    goals, seen, graph = torch.randn(3, 2).numpy(), torch.randn(5, 3, 2).numpy(), random_states(agent)
    noise = {"epsilon": 0.5, "action_noise": 0.1}
    together = plan(agent, graph, *goals, **noise)
    alone = [plan(agent, graph, goals[env], seed=env, **noise) for env in range(3)]
    for step in range(5):
        live = np.array([0, 1, 2]) if step < 3 else np.array([0, 2])
        before = together.subgoals[1].clone()
        actions = together.act(seen[step][live], live)
        assert actions.shape == (len(live), ACTIONS) and np.abs(actions).max() <= 1
        for row, env in enumerate(live):
            single = alone[env].act(seen[step][env : env + 1], np.array([0]))
            assert np.allclose(actions[row], single[0], atol=1e-5)
            assert together.chosen[env] == alone[env].chosen[0]
            assert torch.allclose(together.subgoals[env], alone[env].subgoals[0], atol=1e-5)
        assert 1 in live or torch.equal(together.subgoals[1], before)
    assert 0 < together.exploration_rate() < 1


@pytest.mark.parametrize("acting", ["value", "proposer"])
def test_without_search_the_best_candidate_is_taken_every_replan_every_steps(acting):
    """The one of the highest V, or of the code nearest to the proposal; an oracle keeps the places that it avoids."""
    agent = place_agent(acting=acting, replan_every=3, aim_steps=2.0)
    graph, seen = join(agent, LINE, [(x, 1.0) for x, _ in LINE]), np.random.default_rng(1).uniform(2, 9, (9, 2, 1, 2))
    planner, x_goal = plan(agent, graph, (99, 0), (99, 1)), agent.encode(torch.tensor([(99.0, 0.0), (99.0, 1.0)]))
    been, chosen = [[], []], set()
    for step in range(9):
        actions = planner.act(np.float32(seen[step, :, 0]), np.array([0, 1]))
        for env in range(2):
            x = agent.encode(torch.as_tensor(np.float32(seen[step, env])))
            if step % 3 == 0:
                if all((agent.embed(x)[0] - place).square().sum() > search.RING[0] * 2 for place in been[env]):
                    been[env].append(agent.embed(x)[0])
                nodes = graph.candidates(agent.embed(x)[0], been[env], 2.0)
                codes = agent.code(graph.features[nodes])
                if acting == "value":
                    scores = agent.heads["v"](codes, agent.code(x_goal[env]).expand(len(nodes), -1))
                else:
                    proposal = agent.heads["next_state"](agent.code(x), agent.code(x_goal[env : env + 1]))
                    scores = -(codes - proposal).square().sum(-1)
                assert planner.chosen[env] == nodes[int(scores.argmax())]
            chosen.add(int(planner.chosen[env]))
            z_sub = graph.features[planner.chosen[env]][None]
            expected = agent.heads["inverse_dynamics"](x, z_sub, x_goal[env : env + 1]).detach().numpy()
            assert np.allclose(actions[env], expected[0], atol=1e-6)
    assert len(chosen) > 2


@pytest.mark.parametrize("acting", ["search", "value", "proposer"])
def test_exploration_aims_between_the_state_and_the_goal(acting):
    agent = make_agent(acting=acting)
    torch.manual_seed(1)
    goals, seen, graph = torch.randn(200, 2), torch.randn(200, 2), random_states(agent)
    planner = plan(agent, graph, *goals.numpy(), epsilon=1.0)
    planner.act(seen.numpy(), np.arange(200))
    x, way = agent.encode(seen), agent.encode(goals) - agent.encode(seen)
    share = ((planner.subgoals - x) * way).sum(-1) / way.square().sum(-1)
    assert torch.allclose(planner.subgoals, x + share.unsqueeze(-1) * way, atol=1e-4)
    assert 0.2 <= share.min() < 0.25 and 0.95 < share.max() <= 1 and share.mean() == pytest.approx(0.6, abs=0.05)
    assert planner.exploration_rate() == 1
    some = plan(agent, graph, *goals.numpy(), epsilon=0.3)
    some.act(seen.numpy(), np.arange(200))
    assert some.exploration_rate() == pytest.approx(0.3, abs=0.1)


def test_noise_is_the_generators_and_actions_stay_in_their_bounds():
    agent = make_agent(replan_every=2)
    torch.manual_seed(1)
    goals, seen, graph = torch.randn(3, 2).numpy(), torch.randn(6, 3, 2).numpy(), random_states(agent)

    def act(seed, noise):
        planner = plan(agent, graph, *goals, seed=seed, action_noise=noise)
        return np.stack([planner.act(observations, np.arange(3)) for observations in seen])

    assert np.array_equal(act(0, 0.0), act(1, 0.0)) and not np.array_equal(act(0, 0.2), act(1, 0.2))
    assert (act(0, 0.05) - act(0, 0.0)).std() == pytest.approx(0.05, rel=0.4)
    assert np.abs(act(0, 5.0)).max() == 1 and act(0, 5.0).dtype == np.float32
