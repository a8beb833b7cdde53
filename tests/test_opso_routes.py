"""Ways along the graph to many goals: against an exhaustive search; what V and the proposer make of them."""

import numpy as np
import pytest
import torch
from test_online_agent import (
    ACTIONS,
    DISCOUNT,
    LINE,
    WIDTH,
    edges,
    join,
    make_agent,
    make_batch,
    place_agent,
    places,
    plan,
    random_graph,
    route_of,
    shortest,
)

from opso.routes import Routes


@pytest.mark.parametrize("aim_steps", [0.3, 3.0, 9.0])
@pytest.mark.parametrize("num_links", [1, 3])
def test_ways_are_the_shortest_and_their_aims_lie_on_them(num_links, aim_steps):
    """The aim is the first node so many steps ahead: what lies between is nearer, by an edge that the graph has."""
    agent, kinds = place_agent(num_links=num_links, aim_steps=aim_steps), set()
    for seed in range(3):
        graph, *_ = random_graph(agent, seed)
        found, n = edges(graph), len(graph)
        cost = np.full((n, n), np.inf)
        cost[tuple(zip(*found, strict=True))] = list(found.values())
        best = shortest(cost)
        routes = Routes(graph, n)
        assert routes.goals.tolist() == list(range(n))
        assert np.allclose(routes.steps.numpy(), best.T, rtol=1e-4)
        for goal in range(n):
            for node in range(n):
                aim, left = int(routes.aims[goal, node]), best[node, goal]
                if node == goal:
                    assert aim == node
                    continue
                assert best[node, aim] + best[aim, goal] == pytest.approx(left, rel=1e-4)
                assert aim == goal or best[node, aim] >= aim_steps - 1e-4
                before = [
                    k for k in range(n) if (k, aim) in found and best[node, k] + found[k, aim] <= best[node, aim] + 1e-6
                ]
                assert any(k == node or best[node, k] < aim_steps + 1e-6 for k in before)
                kinds.add("goal" if aim == goal else "on the way")
    assert kinds == {"goal", "on the way"} or aim_steps == 0.3


def test_where_no_way_leads_there_is_no_aim():
    """Two lines that no link joins."""
    routes = Routes(join(place_agent(num_links=1), LINE[:5], [(30, 0), (31, 0), (32, 0)]), 8)
    apart = torch.tensor([[(node < 5) != (goal < 5) for node in range(8)] for goal in range(8)])
    none = routes.steps.isinf()
    assert none[apart].all() and not none[4, :5].any() and not none.all()
    assert torch.equal(routes.aims[none], torch.arange(8, dtype=torch.int32).expand(8, -1)[none])


def test_goals_come_from_all_of_the_data():
    agent = place_agent()
    graph = join(agent, LINE)
    assert Routes(graph, 4).goals.tolist() == [0, 6, 13, 19] and len(Routes(graph, 99).goals) == 20
    assert Routes(graph, 1).goals.tolist() == [0]


def test_what_is_sampled_are_the_features_of_nodes_goals_and_aims():
    agent = place_agent()
    graph, *_ = random_graph(agent, 1)
    routes, generator = Routes(graph, 5), torch.Generator().manual_seed(0)
    sampled = routes.sample(400, generator)
    number = {tuple(x.tolist()): node for node, x in enumerate(graph.features)}
    pairs = set()
    for x, x_goal, x_aim, steps in zip(*sampled.values(), strict=True):
        node, goal, aim = (number[tuple(each.tolist())] for each in (x, x_goal, x_aim))
        row = routes.goals.tolist().index(goal)
        assert aim == routes.aims[row, node] and steps == routes.steps[row, node]
        pairs.add((node, goal))
    assert len(pairs) > 0.8 * 5 * len(graph)


def test_the_losses_equal_a_loop():
    agent = make_agent(num_links=1)
    route = route_of(agent)
    route["steps"][:9] = torch.inf
    squares, errors = [], []
    for x, x_goal, x_aim, steps in zip(*route.values(), strict=True):
        z, z_goal, z_aim = (each[:WIDTH] for each in (x, x_goal, x_aim))
        target = 0.0 if np.isinf(float(steps)) else DISCOUNT ** (max(float(steps), 1) - 1)
        squares.append((agent.heads["v"](z, z_goal).item() - target) ** 2)
        if np.isfinite(float(steps)):
            errors.append((agent.heads["next_state"](z, z_goal) - z_aim).square().mean().item())
    assert 0 < len(errors) <= 55
    assert agent.route_value_loss(route)[0].item() == pytest.approx(np.mean(squares), rel=1e-4)
    assert agent.state_loss(route)[0].item() == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("loss, head", [("route_value_loss", "v"), ("state_loss", "next_state")])
def test_each_loss_teaches_one_head(loss, head):
    agent = make_agent()
    getattr(agent, loss)(route_of(agent))[0].backward()
    taught = {name for name in agent.heads if any(p.grad is not None for p in agent.heads[name].parameters())}
    assert taught == {head}


def test_v_and_the_proposer_learn_the_way_round_a_wall():
    """Two arms beside each other, joined at one end: the way to the other arm begins away from it."""
    arm = [(0.5 * x, 0.0) for x in range(12)]
    back = [(0.5 * x, 1.5) for x in range(11, -1, -1)]
    agent = place_agent(num_links=2, aim_steps=2.0, lr=1e-2)
    graph = join(agent, [*arm, (6.0, 0.7), *back])
    routes, generator = Routes(graph, 25), torch.Generator().manual_seed(0)
    batch = make_batch(agent)
    for _ in range(500):
        agent.update(batch, (batch, routes.sample(128, generator)))
    agent.config.acting = "proposer"  # V alone takes a node beyond the wall, which is thinner than its reach
    for node in (0, 3, 6):  # beside the goal, on the wall's other side
        planner = plan(agent, graph, back[-1])
        planner.act(places(arm[node]), np.array([0]))
        assert 1 <= planner.chosen[0] - node <= 4, node
    z_goal = agent.code(graph.features[-1:])
    values = [agent.heads["v"](agent.code(graph.features[k : k + 1]), z_goal).item() for k in (0, 12, 20)]
    assert values[0] < values[1] < values[2]


def test_without_search_the_goal_is_taken_where_it_is_near_and_who_gets_no_further_escapes():
    """And aims no more at what it failed to reach."""
    agent = place_agent(acting="value", aim_steps=4.0, patience=5, escape_steps=2)
    graph = join(agent, LINE)
    planner, aims = plan(agent, graph, LINE[-1], LINE[-1]), []
    for step in range(14):
        actions = planner.act(places((17.5, 0), (16.5, 0)), np.array([0, 1]))
        assert actions.shape == (2, ACTIONS)
        assert planner.chosen[0] == len(graph) and planner.chosen[1] < len(graph)
        assert (planner.escape_left > 0).any() == (step in (5, 10)), step
        aims.append(int(planner.chosen[1]))
    first = aims[0]  # of two nodes in the ring; once both have failed, both are tried again
    assert {first, aims[6]} == {14, 19} and aims == [first] * 5 + [aims[6]] * 5 + [first] * 4


def test_who_comes_to_new_places_gets_on_whatever_v_says():
    """Far from the goal V is 0 to all who walk. One walks along the line, one to and fro: that one alone escapes."""
    agent = place_agent(acting="value", aim_steps=2.0, patience=6)
    agent.target["v"].net.layers()[-1][1].sub_(9.0)
    planner = plan(agent, join(agent, LINE), (99, 0), (99, 0))
    for step in range(12):
        planner.act(places((0.5 * step, 0), (3 * (step % 2), 0)), np.array([0, 1]))
        assert not planner.escape_left[0] and (planner.escape_left[1] > 0) == (step in (7, 8)), step


def test_a_new_place_is_three_quarters_of_the_aim_from_all_others():
    """The steps between two places are the square of their distance, so 1.3 is far enough and 1.1 is not."""
    agent = place_agent(acting="value", aim_steps=2.0, replan_every=1)
    planner = plan(agent, join(agent, LINE), (99, 0))
    for x in (0.0, 1.3, 2.4, 2.6, 1.5):
        planner.act(places((x, 0)), np.array([0]))
    assert [place[0].item() for place in planner.places[0]] == pytest.approx([0.0, 1.3, 2.6])
