"""Targets, losses and acting against loops written out by hand; what an update touches; which rows a batch may read."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import OfflineModel
from ogbench_utils import NEVER
from online_agent import LandmarkGraph, Navigator, OnlineAgent, OnlineAgentConfig
from online_trainer import CodeSet, sample_batch
from utils import EpisodeReplay, load_checkpoint, save_checkpoint

SETTINGS = {
    **{"lr": 1e-3, "tau": 0.1, "expectile": 0.9, "horizon": 5, "subgoal_steps": 4, "state_temperature": 0.3},
    **{"action_temperature": 0.2, "max_weight": 1.5, "acting": "search", "num_landmarks": 8, "trusted_steps": 5.0},
    **{"aim_steps": 3.0, "replan_every": 1, "patience": 1000, "p_self": 0.2, "p_future": 0.4, "p_random": 0.4},
    **{"goal_discount": 0.7, "p_hard": 0.0, "hard_candidates": 4, "wander_steps": 3},
}
DISCOUNT, WIDTH, ACTIONS = 0.9, 8, 2
LENGTHS = (2, 3, 8, 13)  # rows of the episodes


def make_agent(seed=0, kind=OnlineAgent, discount=DISCOUNT, **settings) -> OnlineAgent:
    torch.manual_seed(seed)
    model = OfflineModel(2, d_model=WIDTH, hidden_dim=16, n_layers=1, d_state=8)
    agent = kind(OnlineAgentConfig(**(SETTINGS | settings)), model, ACTIONS, 16, discount)
    with torch.no_grad():  # so that a target taken from the online network shows, and values lie inside (0, 1)
        for parameter in agent.following:
            parameter.add_(0.1 * torch.randn_like(parameter))
        agent.target["v"].net[-1].bias.add_(0.5)
        agent.target["q"].layers[-1].bias.add_(0.5)
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
    return code_set(torch.randn(sum(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(seed)))


def make_batch(agent: OnlineAgent, count=64, seed=0, acted=True) -> dict[str, torch.Tensor]:
    return sample_batch(random_codes(), agent, count, acted, torch.Generator().manual_seed(seed))


def half_acted(agent: OnlineAgent) -> dict[str, torch.Tensor]:
    """Rows whose action is known beside rows whose action is hidden, as in a run of the online regime."""
    parts = make_batch(agent, 24, seed=1), make_batch(agent, 40, seed=2, acted=False)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


# -- losses -----------------------------------------------------------------------------------------------------------


def test_targets_equal_a_walk_along_each_episode():
    agent = make_agent()
    batch, source, ends = make_batch(agent, 300), random_codes(), episode_ends()
    critic, v = agent.critic_target(batch), agent.v_target(batch)
    row_of = {tuple(code.tolist()): row for row, code in enumerate(source.states)}
    seen = set()
    for i in range(300):
        row, goal = (row_of[tuple(batch[name][i].tolist())] for name in ("z", "z_goal"))
        n, z, z_goal = int(batch["n"][i]), source.states, batch["z_goal"][i]
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


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 100, NEVER])
def test_targets_discount_exactly(steps):
    agent = make_agent()
    batch = {key: value[:5] for key, value in make_batch(agent).items()}
    batch |= {"n": torch.arange(1, 6), "steps_to_goal": torch.full((5,), steps)}
    v = agent.target["v"](batch["z_ahead"], batch["z_goal"]).clamp(0, 1).tolist()
    q = agent.target["q"](batch["z_before"], batch["z_ahead"], batch["z_goal"]).amin(0).clamp(0, 1).tolist()
    for i, n in enumerate(range(1, 6)):
        critic = DISCOUNT ** (steps - 1) if steps <= n else DISCOUNT**n * v[i]
        value = DISCOUNT ** (steps - 1) if steps < n else DISCOUNT ** (n - 1) * q[i]
        assert agent.critic_target(batch)[i].item() == pytest.approx(critic, rel=1e-6)
        assert agent.v_target(batch)[i].item() == pytest.approx(value, rel=1e-6)


def test_critic_and_v_losses():
    agent = make_agent()
    batch = make_batch(agent)
    target, q = agent.critic_target(batch), agent.heads["q"](batch["z"], batch["z_next"], batch["z_goal"])
    expected = (F.smooth_l1_loss(q[0], target) + F.smooth_l1_loss(q[1], target)) / 2
    assert torch.allclose(agent.critic_loss(batch)[0], expected, atol=1e-6)
    with torch.no_grad():
        agent.heads["v"].net[-1].bias.add_(0.6)
    error = agent.v_target(batch) - agent.heads["v"](batch["z"], batch["z_goal"])
    assert (error > 0).any() and (error < 0).any()
    expected = (torch.where(error > 0, 0.9, 1 - 0.9) * error**2).mean()
    assert torch.allclose(agent.v_loss(batch)[0], expected, atol=1e-6)


def weight_by_hand(agent, z, z_later, z_to, steps, temperature) -> float:
    """min(max_weight, exp(temperature * (steps that V says were saved - steps taken)))."""
    before, after = (
        math.log(min(max(float(agent.target["v"](code, z_to)), 1e-3), 1)) / math.log(DISCOUNT) for code in (z, z_later)
    )
    return min(math.exp(temperature * (before - after - steps)), agent.config.max_weight)


def test_state_loss_equals_a_loop():
    agent = make_agent()
    batch = make_batch(agent)
    total, weights = 0.0, []
    for i in range(64):
        z, far, goal = batch["z"][i], batch["z_far"][i], batch["z_goal"][i]
        weights.append(weight_by_hand(agent, z, far, goal, int(batch["far_steps"][i]), 0.3))
        total += weights[-1] * float((agent.propose(z, goal) - far).square().mean())
    loss, info = agent.state_loss(batch)
    assert loss.item() == pytest.approx(total / 64, rel=1e-4)
    assert info["state_weight"].item() == pytest.approx(np.mean(weights), rel=1e-4)
    assert max(weights) == 1.5 and min(weights) < 1  # some are capped, some are not


def test_action_loss_equals_a_loop_over_the_known_actions():
    agent = make_agent(max_weight=1.0)
    batch = half_acted(agent)
    total, weights, errors = 0.0, [], []
    for i in range(64):
        if not batch["acted"][i]:
            continue
        z, z_next, sub, goal = (batch[name][i] for name in ("z", "z_next", "z_sub", "z_goal"))
        weights.append(weight_by_hand(agent, z, z_next, sub, 1, 0.2))
        action = agent.act(z, sub, goal)
        errors.append(float((action - batch["actions"][i]).square().mean()))
        total += weights[-1] * errors[-1]
    loss, info = agent.action_loss(batch)
    assert len(weights) == 24 and max(weights) == 1 and min(weights) < 1
    assert loss.item() == pytest.approx(total / 24, rel=1e-4)
    assert info["action_error"].item() == pytest.approx(np.mean(errors), rel=1e-4)
    assert info["action_weight"].item() == pytest.approx(np.mean(weights), rel=1e-4)


def test_temperature_zero_is_plain_regression():
    agent = make_agent(state_temperature=0.0, action_temperature=0.0)
    batch = make_batch(agent)
    proposal = agent.heads["next_state"](batch["z"], batch["z_goal"])
    assert torch.allclose(agent.state_loss(batch)[0], F.mse_loss(proposal, batch["z_far"]), rtol=1e-5)
    action = agent.heads["inverse_dynamics"](batch["z"], batch["z_sub"], batch["z_goal"])
    assert torch.allclose(agent.action_loss(batch)[0], F.mse_loss(action, batch["actions"]), rtol=1e-5)


def action_gradient(agent: OnlineAgent, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    agent.optimizer.zero_grad(set_to_none=True)
    loss, _ = agent.action_loss(batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in agent.heads["inverse_dynamics"].parameters()])


def test_hidden_actions_change_neither_the_action_loss_nor_its_gradient():
    agent = make_agent()
    batch = half_acted(agent)
    known = batch["acted"] == 1
    other = {key: value.clone() for key, value in batch.items()}
    for name in ("actions", "z", "z_next", "z_sub", "z_goal"):
        other[name][~known] += 3.0
    loss, gradient = action_gradient(agent, batch)
    assert loss > 0 and gradient.abs().max() > 0
    for rest in (other, {key: value[known] for key, value in batch.items()}):
        other_loss, other_gradient = action_gradient(agent, rest)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert torch.allclose(other_gradient, gradient, rtol=1e-4, atol=1e-5)
    loss, gradient = action_gradient(agent, {key: value[~known] for key, value in batch.items()})
    assert loss == 0 and gradient.abs().max() == 0


# -- update -----------------------------------------------------------------------------------------------------------


def test_the_encoder_is_neither_trained_nor_differentiated():
    agent = make_agent()
    before = copy.deepcopy(agent.encoder.state_dict())
    assert not agent.encode(torch.randn(3, 2)).requires_grad
    for seed in range(3):
        agent.update(make_batch(agent, seed=seed))
    for name, parameter in agent.encoder.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad, name
    for name, value in agent.encoder.state_dict().items():
        assert torch.equal(before[name], value), name
    trained = {id(p) for group in agent.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in agent.heads.parameters()}


def test_codes_do_not_depend_on_the_block():
    agent = make_agent()
    observations = torch.randn(3, 7, 2)
    codes = agent.encode(observations)
    assert codes.shape == (3, 7, WIDTH)
    assert torch.allclose(agent.encode(observations, block=4), codes, atol=1e-6)
    assert torch.allclose(codes[1, 2], agent.encoder(observations[1, 2].view(1, 1, 2)).flatten(), atol=1e-6)


def test_every_head_learns_and_the_targets_follow_by_tau():
    agent = make_agent(tau=0.25)
    heads, target = copy.deepcopy(agent.heads.state_dict()), copy.deepcopy(agent.target.state_dict())
    info = agent.update(make_batch(agent), lr_scale=0.5)
    assert all(value.ndim == 0 and not value.requires_grad for value in info.values())
    assert {"critic_loss", "v_loss", "state_loss", "train_loss"} <= set(info)
    assert agent.step == 1 and float(agent.optimizer.param_groups[0]["lr"]) == pytest.approx(5e-4)
    for name, value in agent.heads.state_dict().items():
        assert not torch.equal(value, heads[name]), name
    for name, value in agent.target.state_dict().items():
        expected = target[name] + 0.25 * (agent.heads.state_dict()[name] - target[name])
        assert torch.allclose(value, expected, rtol=0, atol=1e-7), name
    heads = copy.deepcopy(agent.heads.state_dict())
    agent.update(make_batch(agent), lr_scale=0.0)
    assert all(torch.equal(value, heads[name]) for name, value in agent.heads.state_dict().items())


def test_no_gradient_through_targets():
    agent = make_agent()
    agent.update(make_batch(agent))
    assert all(p.grad is None for p in agent.target.parameters())
    assert all(p.grad is not None for p in agent.heads.parameters())


def test_save_and_load_continue_to_the_same_bits(tmp_path):
    whole, half = make_agent(), make_agent()
    batches = [make_batch(whole, seed=seed) for seed in range(6)]
    for number, batch in enumerate(batches):
        whole.update(batch, 1 - number / 6)
    for number, batch in enumerate(batches[:3]):
        half.update(batch, 1 - number / 6)
    save_checkpoint(tmp_path / "agent.pth", half.state_dict())
    resumed = make_agent(seed=5)
    resumed.load_state_dict(load_checkpoint(tmp_path / "agent.pth"))
    for number, batch in enumerate(batches[3:], 3):
        resumed.update(batch, 1 - number / 6)
    save_checkpoint(tmp_path / "whole.pth", whole.state_dict())
    save_checkpoint(tmp_path / "resumed.pth", resumed.state_dict())
    assert (tmp_path / "whole.pth").read_bytes() == (tmp_path / "resumed.pth").read_bytes()
    assert resumed.step == 6


def test_updates_learn_which_way_to_go():
    """A corridor walked to and fro by known steps: actions point at the subgoal, V falls with the distance."""
    agent = make_agent(action_temperature=0.0, lr=3e-3, tau=0.05, horizon=5, subgoal_steps=4)
    place = torch.linspace(-1, 1, 21)
    walk = torch.cat([place, place.flip(0)])
    code = torch.stack([walk * scale for scale in torch.linspace(0.5, 2, WIDTH)], dim=1)
    source = code_set(code, (21, 21))
    forth = torch.arange(42) < 21
    source.actions = torch.where(forth, 0.8, -0.8).unsqueeze(1).expand(-1, ACTIONS).contiguous()
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        agent.update(sample_batch(source, agent, 128, True, generator))
    start, end = code[10].expand(2, -1), code[[14, 6]]
    action = agent.act(start, end, end)
    assert (action[0] > 0.4).all() and (action[1] < -0.4).all()
    value = agent.heads["v"](code[10].expand(11, -1), code[10:21])
    assert value[1] > value[5] + 0.1 > value[10] + 0.2


# -- batches and the replay -------------------------------------------------------------------------------------------


def counted_codes() -> CodeSet:
    """The code of row r is r."""
    return code_set(torch.arange(float(sum(LENGTHS))).unsqueeze(1))


def counted_replay() -> EpisodeReplay:
    """Episodes of 1, 2, 7 and 12 transitions in slots of 14 rows, the oldest two overwritten; the code of row r is r.

    Rows that belong to no episode hold nan.
    """
    replay = EpisodeReplay(4, 13, 1, ACTIONS)
    replay.states.fill_(math.nan)
    for count, length in enumerate((5, 3, 7, 12, 1, 2)):
        first = (count % 4) * 14
        replay.states[first : first + 14] = math.nan
        rows = torch.arange(first, first + length + 1, dtype=torch.float32)
        replay.add(rows.unsqueeze(1), torch.stack([rows[:-1] + 1, -rows[:-1] - 1], dim=1))
    return replay


ENDS = {
    counted_codes: dict(enumerate(episode_ends())),
    counted_replay: {
        14 * slot + i: 14 * slot + length for slot, length in enumerate((1, 2, 7, 12)) for i in range(length + 1)
    },
}


class LowestFirst(OnlineAgent):
    """Holds the candidate with the lowest number for the nearest."""

    def hardest(self, z, candidates):
        return candidates[..., 0].argmin(1)


@pytest.mark.parametrize("make", [counted_codes, counted_replay])
@pytest.mark.parametrize("p_hard", [0.0, 0.5])
def test_a_batch_never_crosses_an_episodes_end(make, p_hard):
    agent, ends = make_agent(kind=LowestFirst, p_hard=p_hard), ENDS[make]
    batch = sample_batch(make(), agent, 3000, True, torch.Generator().manual_seed(0))
    names = ("z", "z_next", "z_before", "z_ahead", "z_sub", "z_far", "z_goal")
    numbers = zip(*(batch[name][:, 0].tolist() for name in names), strict=True)
    seen, goals_of = {"n": set(), "sub": set(), "far": set()}, {"goal first": 0, "never": 0, "next": 0}
    for i, (row, after, before, ahead, sub, far, goal) in enumerate(numbers):
        end, n, steps = ends[row], int(batch["n"][i]), int(batch["steps_to_goal"][i])
        assert row < end and after == row + 1
        assert 1 <= n <= 5 and before == row + n - 1 and ahead == row + n <= end
        assert row < sub <= min(end, row + 4)
        assert goal in ends and steps == (goal - row if row < goal <= end else NEVER)
        assert far == min(end, row + 4, row + steps) and far == row + int(batch["far_steps"][i])
        assert batch["actions"][i].tolist() == [row + 1, -row - 1] and batch["acted"][i] == 1
        seen["n"].add(n), seen["sub"].add(sub - row), seen["far"].add(far - row)
        goals_of["goal first"] += far == goal and goal < min(end, row + 4)
        goals_of["never"] += steps == NEVER
        goals_of["next"] += steps == 1
    assert seen == {"n": {1, 2, 3, 4, 5}, "sub": {1, 2, 3, 4}, "far": {1, 2, 3, 4}}
    assert min(goals_of.values()) > 100
    assert {row for row, end in ends.items() if row < end} == set(batch["z"][:, 0].tolist())
    lowest = batch["z_goal"][:1500].mean() < 0.7 * batch["z_goal"][1500:].mean()
    assert lowest == (p_hard > 0)


def test_hard_goals_are_those_that_v_takes_for_the_nearest():
    agent = make_agent()
    torch.manual_seed(0)
    z, candidates = torch.randn(9, WIDTH), torch.randn(9, 6, WIDTH)
    for i, picked in enumerate(agent.hardest(z, candidates).tolist()):
        assert picked == np.argmax([float(agent.target["v"](z[i], code)) for code in candidates[i]])


@pytest.mark.parametrize("make", [counted_codes, counted_replay])
def test_actions_that_may_not_be_read_are_hidden(make):
    agent = make_agent()
    shown = sample_batch(make(), agent, 50, True, torch.Generator().manual_seed(0))
    hidden = sample_batch(make(), agent, 50, False, torch.Generator().manual_seed(0))
    assert shown["actions"].abs().min() > 0 and hidden["actions"].abs().max() == 0
    assert (shown["acted"] == 1).all() and (hidden["acted"] == 0).all()
    for name in set(shown) - {"actions", "acted"}:
        assert torch.equal(shown[name], hidden[name]), name


def play(replay: EpisodeReplay, lengths, seed=0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    episodes = [
        (torch.randn(length + 1, 3, generator=generator), torch.randn(length, 2, generator=generator))
        for length in lengths
    ]
    for states, actions in episodes:
        replay.add(states, actions)
    return episodes


def assert_holds(replay: EpisodeReplay, kept: dict[int, tuple[torch.Tensor, torch.Tensor]], width: int) -> None:
    """The rows are those of the episodes kept, slot -> (states, actions), and no other row is a transition."""
    expected = []
    for slot, (states, actions) in sorted(kept.items()):
        for i in range(len(states)):
            row = slot * width + i
            assert torch.equal(replay.states[row], states[i]) and replay.episode_end[row] == slot * width + len(actions)
            if i < len(actions):
                assert torch.equal(replay.actions[row], actions[i])
                expected.append(row)
    assert replay.transitions.tolist() == expected and len(replay) == len(expected)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 8])
def test_the_replay_keeps_the_last_episodes_and_its_state_round_trips(count, tmp_path):
    replay = EpisodeReplay(3, 6, 3, 2)
    episodes = play(replay, (6, 2, 5, 1, 6, 3, 4, 2)[:count])
    kept = {number % 3: episodes[number] for number in range(count)}
    assert_holds(replay, kept, 7)
    save_checkpoint(tmp_path / "replay.pth", replay.state_dict())
    other = EpisodeReplay(3, 6, 3, 2)
    other.load_state_dict(load_checkpoint(tmp_path / "replay.pth"))
    assert_holds(other, kept, 7)
    for ring in (replay, other):  # the next episode goes over the oldest in both
        episodes[count:] = play(ring, (2,), seed=1)
        assert_holds(ring, kept | {count % 3: episodes[count]}, 7)


def test_the_replay_refuses_wrong_sizes():
    replay = EpisodeReplay(3, 6, 3, 2)
    for states, actions in ((3, 3), (5, 3), (1, 0), (8, 7)):
        with pytest.raises(ValueError, match="no episode"):
            replay.add(torch.zeros(states, 3), torch.zeros(actions, 2))
    assert len(replay) == 0 and replay.added == 0
    play(replay, (6, 2))
    for other in (EpisodeReplay(2, 6, 3, 2), EpisodeReplay(4, 6, 3, 2), EpisodeReplay(3, 6, 4, 2)):
        with pytest.raises(ValueError):
            other.load_state_dict(replay.state_dict())
        assert len(other) == 0


# -- acting -----------------------------------------------------------------------------------------------------------


class TableAgent(OnlineAgent):
    """Knows a table of steps: places are numbers, the observation and the code of place k begin with k."""

    steps: np.ndarray

    def encode(self, observations, block=4096):
        return F.pad(observations[..., :1].float(), (0, WIDTH - 1))

    def steps_between(self, z, z_goal):
        table = torch.as_tensor(self.steps, dtype=torch.float32)
        return table[z[..., 0].round().long(), z_goal[..., 0].round().long()]


def table_agent(steps: np.ndarray, **settings) -> TableAgent:
    agent = make_agent(kind=TableAgent, **settings)
    agent.steps = steps
    return agent


def places(*numbers: int) -> np.ndarray:
    return np.array([[number, 0.0] for number in numbers], dtype=np.float32)


def start_navigator(agent: TableAgent, goals: np.ndarray, landmarks=None) -> Navigator:
    """With all places as landmarks unless told otherwise."""
    landmarks = range(len(agent.steps)) if landmarks is None else landmarks
    return Navigator(agent, LandmarkGraph(agent, agent.encode(torch.as_tensor(places(*landmarks)))), goals)


def aimed_at(navigator: Navigator, env: int = 0) -> int:
    return round(float(navigator.subgoals[env, 0]))


MAZE = """
.......
.###.#.
.#S..#G
.#####.
.......
"""


def maze_cells() -> tuple[list[tuple[int, int]], np.ndarray, int, int]:
    """Free cells, steps between them by breadth-first search, the numbers of S and G."""
    text = MAZE.split()
    cells = [(i, j) for i, row in enumerate(text) for j, cell in enumerate(row) if cell != "#"]
    steps = np.full((len(cells), len(cells)), np.inf)
    for start, cell in enumerate(cells):
        front, steps[start, start] = [cell], 0
        for i, j in front:
            for near in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if near in cells and np.isinf(steps[start, cells.index(near)]):
                    steps[start, cells.index(near)] = steps[start, cells.index((i, j))] + 1
                    front.append(near)
    found = {text[i][j]: number for number, (i, j) in enumerate(cells)}
    return cells, steps, found["S"], found["G"]


def step_towards(cells, place: int, aim: int) -> int:
    """A free neighbour that is nearer to the aim as the crow flies, or the place itself where a wall is in the way."""

    def apart(a, b):
        return abs(a[0] - b[0]) + abs(a[1] - b[1])

    nearer = [
        number
        for number, cell in enumerate(cells)
        if apart(cell, cells[place]) == 1 and apart(cell, cells[aim]) < apart(cells[place], cells[aim])
    ]
    return nearer[0] if nearer else place


def test_the_way_found_goes_round_the_wall_and_is_the_shortest():
    """V is right about two steps; it takes longer ways for straight lines through the walls, three steps at least."""
    cells, exact, place, goal = maze_cells()
    straight = np.array([[abs(a[0] - b[0]) + abs(a[1] - b[1]) for b in cells] for a in cells], dtype=float)
    believed = np.where(exact <= 2, exact, np.maximum(np.minimum(exact, straight), 3))
    agent = table_agent(believed, trusted_steps=0.25, aim_steps=2.0)
    navigator = start_navigator(agent, places(goal))
    blind, walked = place, [place]
    for _ in range(40):
        navigator.act(places(walked[-1]), np.array([0]))
        walked.append(step_towards(cells, walked[-1], aimed_at(navigator)))
        blind = step_towards(cells, blind, goal)
        if walked[-1] == goal:
            break
    assert blind != goal  # who aims at the goal all the time stands at the wall
    assert exact[place, goal] == 8 > straight[place, goal]
    assert walked[-1] == goal and len(walked) - 1 == 8
    assert all(exact[a, b] == 1 for a, b in zip(walked[:-1], walked[1:], strict=True))


def ways(edges: dict[tuple[int, int], float], count: int) -> np.ndarray:
    """A table of these ways, as long back as forth unless told otherwise; all others are far too long."""
    steps = np.full((count, count), 1e6)
    np.fill_diagonal(steps, 0.0)
    for (a, b), length in edges.items():
        steps[a, b] = length
        if (b, a) not in edges:
            steps[b, a] = length
    return steps


def first_aim(steps: np.ndarray, trusted: float, start: int, goal: int, landmarks, aim_steps=0.5) -> int:
    agent = table_agent(steps, trusted_steps=trusted, aim_steps=aim_steps)
    navigator = start_navigator(agent, places(goal), landmarks)
    navigator.act(places(start), np.array([0]))
    aim = aimed_at(navigator)
    assert aim == (goal if navigator.chosen[0] == len(landmarks) else landmarks[navigator.chosen[0]])
    return aim


@pytest.mark.parametrize(
    "short,long,trusted", [(1.0, 2.5, 100.0), (1.0, 2.5, 2.0), (1.0, 3.5, 100.0), (0.2, 1.0, 100.0), (0.5, 2.0, 1.0)]
)
def test_the_cheapest_way_is_taken(short, long, trusted):
    """0-1-2-3-5 has four edges, 0-4-5 has two. An edge costs one, its steps, and their square over trusted_steps."""
    steps = ways({(0, 1): short, (1, 2): short, (2, 3): short, (3, 5): short, (0, 4): long, (4, 5): long}, 6)
    many, few = (count * (1 + x + x * x / trusted) for count, x in ((4, short), (2, long)))
    assert first_aim(steps, trusted, 0, 5, (1, 2, 3, 4)) == (1 if many < few else 4)


def test_a_way_that_v_sees_in_one_direction_alone_is_avoided():
    """0-1-3 is shorter than 0-2-3, but V sees no way back from 1."""
    both = {(0, 1): 2.0, (1, 3): 2.0, (0, 2): 3.0, (2, 3): 3.0}
    assert first_aim(ways(both, 4), 50.0, 0, 3, (1, 2)) == 1
    assert first_aim(ways(both | {(1, 0): 20.0}, 4), 50.0, 0, 3, (1, 2)) == 2


def test_the_longer_the_way_the_less_it_is_trusted():
    steps = ways({(0, 1): 3.0, (1, 2): 3.0, (2, 3): 3.0, (0, 3): 8.0}, 4)
    assert first_aim(steps, 0.8, 0, 3, (0, 1, 2), aim_steps=1.5) == 1
    assert first_aim(steps, 100.0, 0, 3, (0, 1, 2), aim_steps=1.5) == 3


def test_ways_far_too_long_to_trust_are_no_edges():
    assert first_aim(ways({(0, 1): 8.0, (1, 3): 1.0}, 4), 2.0, 0, 3, (1, 2)) == 1
    assert first_aim(ways({(0, 1): 2000.0, (1, 3): 1.0}, 4), 2.0, 0, 3, (1, 2)) == 3  # no way: straight to the goal


def test_the_goal_is_the_aim_where_it_is_near_or_no_way_leads():
    line = np.abs(np.subtract.outer(np.arange(12.0), np.arange(12.0)))
    navigator = start_navigator(table_agent(line, trusted_steps=0.6, aim_steps=3.0), places(9))
    for place, near in ((0, False), (4, False), (7, True), (9, True)):
        navigator.act(places(place), np.array([0]))
        assert (aimed_at(navigator) == 9) is near
    cut = np.where((np.arange(12)[:, None] < 6) == (np.arange(12) < 6), line, 40.0)
    navigator = start_navigator(table_agent(cut, trusted_steps=0.6, aim_steps=3.0), places(9))
    navigator.act(places(0), np.array([0]))
    assert aimed_at(navigator) == 9


def test_a_subgoal_without_progress_is_given_up_after_patience():
    """0-1-3 is shorter than 0-2-3; who does not get on towards 1 tries 2, and does not come back to 1."""
    steps = ways({(0, 1): 2.0, (1, 3): 2.0, (0, 2): 3.0, (2, 3): 3.0}, 4)
    agent = table_agent(steps, trusted_steps=1.0, aim_steps=1.5, patience=6)
    navigator = start_navigator(agent, places(3, 3), (0, 1, 2))
    chosen = []
    for _ in range(13):
        navigator.act(places(0, 0), np.array([0, 1]))
        chosen.append([aimed_at(navigator, 0), aimed_at(navigator, 1)])
    first = [pair[0] for pair in chosen]
    assert first == [pair[1] for pair in chosen]
    assert set(first[:6]) == {1} and set(first[9:]) == {2}
    fresh = start_navigator(agent, places(3), (0, 1, 2))  # given up for the episode, not for ever
    fresh.act(places(0), np.array([0]))
    assert aimed_at(fresh) == 1


def test_an_exploring_agent_wanders_when_it_is_stuck():
    """One random action, wander_steps times, from the choice that gives the subgoal up; none without a generator."""
    steps = ways({(0, 1): 2.0, (1, 3): 2.0, (0, 2): 3.0, (2, 3): 3.0}, 4)
    agent = table_agent(steps, trusted_steps=1.0, aim_steps=1.5, patience=6, wander_steps=4)
    graph = LandmarkGraph(agent, agent.encode(torch.as_tensor(places(0, 1, 2))))
    taken = []
    for generator in (None, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)):
        navigator = Navigator(agent, graph, places(3), generator=generator)
        taken.append(np.concatenate([navigator.act(places(0), np.array([0])) for _ in range(12)]))
    calm, *wild = taken
    for actions in wild:
        differs = np.abs(actions - calm).max(axis=1) > 1e-4
        assert differs.sum() == 4 and not differs[:6].any() and np.ptp(np.flatnonzero(differs)) == 3
        assert (actions[differs] == actions[differs][0]).all() and np.abs(actions).max() <= 1
    assert not np.array_equal(*wild)


def test_slow_progress_gives_nothing_up():
    line = np.abs(np.subtract.outer(np.arange(20.0), np.arange(20.0)))
    agent = table_agent(line, trusted_steps=1.0, aim_steps=3.0, patience=7)
    graph = LandmarkGraph(agent, agent.encode(torch.as_tensor(places(*range(20)))))
    calm, wild = (Navigator(agent, graph, places(19), generator=g) for g in (None, torch.Generator().manual_seed(0)))
    chosen = []
    for step in range(57):
        actions = [navigator.act(places(step // 3), np.array([0])) for navigator in (calm, wild)]
        assert np.array_equal(*actions)  # one that gave up would wander
        chosen.append(aimed_at(calm))
        assert 1 <= chosen[-1] - step // 3 <= 4
    assert chosen == sorted(chosen)


@pytest.mark.parametrize("acting", ["search", "proposer"])
def test_environments_act_each_for_itself(acting):
    agent = make_agent(acting=acting, replan_every=2)
    torch.manual_seed(1)
    landmarks, goals, seen = agent.encode(torch.randn(8, 2)), torch.randn(3, 2).numpy(), torch.randn(5, 3, 2).numpy()
    graph = LandmarkGraph(agent, landmarks) if acting == "search" else None
    together = Navigator(agent, graph, goals)
    alone = [Navigator(agent, graph, goals[env : env + 1]) for env in range(3)]
    for step in range(5):
        live = np.array([0, 1, 2]) if step < 3 else np.array([0, 2])
        before = together.subgoals[1].clone()
        actions = together.act(seen[step][live], live)
        assert actions.shape == (len(live), ACTIONS) and np.abs(actions).max() <= 1
        for row, env in enumerate(live):
            single = alone[env].act(seen[step][env : env + 1], np.array([0]))
            assert np.allclose(actions[row], single[0], atol=1e-5)
            assert torch.allclose(together.subgoals[env], alone[env].subgoals[0], atol=1e-5)
        assert 1 in live or torch.equal(together.subgoals[1], before)
    assert together.exploring_share() == 0


def test_the_proposer_chooses_every_replan_every_steps():
    agent = make_agent(acting="proposer", replan_every=3)
    torch.manual_seed(1)
    goals, seen = torch.randn(2, 2), torch.randn(7, 2, 2)
    navigator = Navigator(agent, None, goals.numpy())
    for step in range(7):
        actions = navigator.act(seen[step].numpy(), np.array([0, 1]))
        z, z_goal = agent.encode(seen[step]), agent.encode(goals)
        if step % 3 == 0:
            subgoals = agent.heads["next_state"](z, z_goal)
        assert torch.allclose(navigator.subgoals, subgoals, atol=1e-6)
        expected = agent.heads["inverse_dynamics"](z, subgoals, z_goal).detach().numpy()
        assert np.allclose(actions, expected, atol=1e-6)


@pytest.mark.parametrize("acting", ["search", "proposer"])
def test_exploration_aims_between_the_state_and_the_goal(acting):
    agent = make_agent(acting=acting)
    torch.manual_seed(1)
    goals, seen = torch.randn(200, 2), torch.randn(200, 2)
    graph = LandmarkGraph(agent, agent.encode(torch.randn(8, 2))) if acting == "search" else None
    generator = torch.Generator().manual_seed(0)
    navigator = Navigator(agent, graph, goals.numpy(), epsilon=1.0, generator=generator)
    navigator.act(seen.numpy(), np.arange(200))
    z, way = agent.encode(seen), agent.encode(goals) - agent.encode(seen)
    share = ((navigator.subgoals - z) * way).sum(-1) / way.square().sum(-1)
    assert torch.allclose(navigator.subgoals, z + share.unsqueeze(-1) * way, atol=1e-4)
    assert 0.2 <= share.min() < 0.25 and 0.95 < share.max() <= 1 and share.mean() == pytest.approx(0.6, abs=0.05)
    assert navigator.exploring_share() == 1
    some = Navigator(agent, graph, goals.numpy(), epsilon=0.3, generator=generator)
    some.act(seen.numpy(), np.arange(200))
    assert some.exploring_share() == pytest.approx(0.3, abs=0.1)


def test_noise_is_the_generators_and_actions_stay_in_their_bounds():
    agent = make_agent(replan_every=2)
    torch.manual_seed(1)
    goals, seen = torch.randn(3, 2).numpy(), torch.randn(6, 3, 2).numpy()
    graph = LandmarkGraph(agent, agent.encode(torch.randn(8, 2)))

    def act(seed, epsilon, noise):
        navigator = Navigator(agent, graph, goals, epsilon, noise, torch.Generator().manual_seed(seed))
        return np.stack([navigator.act(observations, np.arange(3)) for observations in seen])

    assert np.array_equal(act(0, 0.5, 0.2), act(0, 0.5, 0.2))
    assert not np.array_equal(act(0, 0.5, 0.2), act(1, 0.5, 0.2))
    assert np.array_equal(act(0, 0.0, 0.0), act(1, 0.0, 0.0))
    noise = act(0, 0.0, 0.05) - act(0, 0.0, 0.0)
    assert noise.std() == pytest.approx(0.05, rel=0.4)
    loud = act(0, 0.0, 5.0)
    assert np.abs(loud).max() == 1 and loud.dtype == np.float32
