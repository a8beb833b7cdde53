"""Planning among dataset states: a graph of them, and a planner that follows its shortest paths to a goal.

Search on the replay buffer (Eysenbach et al., 2019) in the manner of semi-parametric topological memory (Savinov et
al., 2018). Edges that turn out not to lead anywhere are blocked for the rest of the episode.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree
from torch import Tensor

from online_agent import Acting, OnlineAgent

KEPT_GOALS = 128  # goals whose paths are kept: each evaluation asks for the same 100
ENOUGH_NODES = 20_000  # more come from more data alone, not from less time between two
NODES_PER_AIM = 2  # nodes of the graph that aim_steps span at least
RING = (0.75, 2.0)  # in aim_steps: how far z' lies without search, nearer to no place where the episode was or failed
MOST_CANDIDATES = 64  # nodes that are compared to choose one without search


class StateGraph:
    """Dataset states, joined along their trajectories and by links to the nearest states of the others.

    A trajectory's edge costs the steps it took. A link of x steps by the agent's metric costs link_cost + x (1 + x /
    trusted_steps), in both directions, so that a chain of short links is preferred to a long one. Only long links lead
    through a wall, since no trajectory passes there.

    features [n, d_model + D]: of the nodes, in the dataset's order; rows [n] int64, increasing: where they lie in it;
    episode_end [n] int64: the last row of each node's episode.
    """

    def __init__(self, agent: OnlineAgent, features: Tensor, rows: Tensor, episode_end: Tensor):
        self.agent, self.features = agent, features
        self.points = agent.embed(features).detach()
        self.tree = cKDTree(self.points.cpu().numpy())
        self.steps_per_square = agent.metric.steps_per_square.item()
        nodes, costs = self.links(self.points, 1)  # one is the node itself
        other = nodes != np.arange(len(self))[:, None]
        other[other.all(1), -1] = False  # so many lie in the same place that the node is not among them
        source, target, cost = np.repeat(np.arange(len(self)), other.sum(1)), nodes[other], costs[other]
        rows, end = rows.cpu().numpy(), episode_end.cpu().numpy()
        first = np.flatnonzero(end[:-1] == end[1:])
        source, target = np.concatenate([source, target, first]), np.concatenate([target, source, first + 1])
        cost = np.concatenate([cost, cost, (rows[first + 1] - rows[first]).astype(np.float64)])
        # The cheapest of parallel edges. Those that lead to one node lie together: rows of a sparse matrix.
        order = np.lexsort((cost, source, target))
        source, target, cost = source[order], target[order], cost[order]
        keep = np.append(True, (source[1:] != source[:-1]) | (target[1:] != target[:-1]))
        self.source, self.target, self.cost = source[keep], target[keep], cost[keep]
        self.row_ends = np.searchsorted(self.target, np.arange(len(self) + 1))  # where the edges to each node begin
        self.paths_to = functools.lru_cache(KEPT_GOALS)(self.shortest_paths)  # takes tuples

    def __len__(self) -> int:
        return len(self.points)

    def links(self, points: Tensor, more: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Links of points [m, metric_dim] to their nearest nodes, num_links + more: nodes [m, L] int, costs [m, L]."""
        config = self.agent.config
        count = min(config.num_links + more, len(self))
        distance, nodes = self.tree.query(points.detach().cpu().numpy(), np.arange(1, count + 1))
        steps = self.steps_per_square * distance**2
        return nodes, config.link_cost + steps * (1 + steps / config.trusted_steps)

    def around(self, point: Tensor, node: int) -> tuple[np.ndarray, np.ndarray]:
        """Nodes within block_radius of a point and of a node, each counted to the nearer one: [n] bool twice."""
        steps = self.agent.metric_steps(torch.stack([point, self.points[node]]), self.points).cpu().numpy()
        near, first = steps <= self.agent.config.block_radius, steps[0] < steps[1]
        first[node], near[1, node] = False, True
        return near[0] & first, near[1] & ~first

    def candidates(self, point: Tensor, places: Sequence[Tensor], aim_steps: float) -> np.ndarray:
        """Nodes that a step towards the goal may lead to: [m] int, at most MOST_CANDIDATES, evenly spaced in time.

        They lie in the ring around a point [metric_dim], away from all places [metric_dim]; where there are none, in
        the ring alone, and where it is empty they are the nearest nodes.
        """
        steps = self.agent.metric_steps(point[None], self.points)[0]
        near, far = (aims * aim_steps for aims in RING)
        ring = ((steps > near) & (steps <= far)).nonzero().squeeze(1)
        if len(ring) == 0:
            return steps.topk(min(self.agent.config.num_links, len(self)), largest=False).indices.cpu().numpy()
        fresh = ring
        if places:
            fresh = ring[self.agent.metric_steps(torch.stack(places), self.points[ring]).amin(0) > near]
        nodes = fresh if len(fresh) else ring
        return nodes[:: math.ceil(len(nodes) / MOST_CANDIDATES)].cpu().numpy()

    def shortest_paths(
        self, last: Sequence[int], last_cost: Sequence[float], blocked: Sequence[tuple[np.ndarray, np.ndarray]] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shortest paths from all nodes to a goal, to which the nodes `last` [L] are linked at costs `last_cost` [L].

        blocked: pairs of [n] bool, no edge from the first set to the second is taken. Returns the steps [n], inf where
        no path leads, and the next node on it [n]: n for the goal, or a negative number.
        """
        n, cost = len(self), np.concatenate([self.cost, last_cost])
        for start, end in blocked:
            cost[: len(self.cost)][start[self.source] & end[self.target]] = np.inf
        source, row_ends = np.concatenate([self.source, last]), np.append(self.row_ends, len(cost))
        backwards = csr_matrix((cost, source, row_ends), shape=(n + 1, n + 1))  # from the goal, its last row
        steps, next_node = dijkstra(backwards, indices=n, return_predecessors=True)
        next_node[np.isinf(steps)] = -1
        return steps[:n], next_node[:n]


def spaced_rows(episode_end: torch.Tensor, most: int, aim_steps: float) -> torch.Tensor:
    """Rows for nodes: evenly spaced in time, ENOUGH_NODES of them, or more where these are half of aim_steps apart.

    Where these are more than `most`, whole episodes are left out, evenly. episode_end [N] int64, the last row of each
    row's episode; returns [n] int64.
    """
    rows = torch.arange(len(episode_end), device=episode_end.device)
    spacing = min(math.ceil(len(rows) / min(most, ENOUGH_NODES)), max(int(aim_steps) // NODES_PER_AIM, 1))
    rows = rows[::spacing]
    _, episode = torch.unique_consecutive(episode_end[rows], return_inverse=True)
    return rows[episode % math.ceil(len(rows) / most) == 0][:most]


class Planner:
    """Acts in several environments at once, towards one goal each, from reset to the episode's end.

    goals [E, D]: their observations. seeds [E]: all that is random comes from an environment's own, so none affects
    another. epsilon: the probability, at each choice of z', of exploring straight towards the goal: z' = z + a (z_g -
    z), a uniform in [0.2, 1]. action_noise: standard deviation of the Gaussian noise on actions. acting: the agent's by
    default.
    """

    def __init__(
        self,
        agent: OnlineAgent,
        graph: StateGraph,
        goals,
        seeds: Sequence[int],
        epsilon: float = 0.0,
        action_noise: float = 0.0,
        acting: Acting | None = None,
    ):
        self.agent, self.graph, self.acting = agent, graph, acting or agent.config.acting
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.epsilon, self.action_noise = epsilon, action_noise
        self.goals = agent.encode(torch.as_tensor(np.asarray(goals, np.float32), device=agent.device))
        count, self.clock = len(self.goals), 0
        self.choices = self.explorations = 0  # how often z' was chosen, and how often by exploring
        self.subgoals = self.goals.clone()  # [E, d_model + D]: z' and its state
        self.chosen = np.full(count, len(graph))  # the node that z' is; n for the goal
        self.aim_steps, self.goal_points = agent.aim_steps, agent.embed(self.goals)
        self.nearest = np.full(count, np.inf)  # search: fewest steps to the goal so far
        self.places: list[list[Tensor]] = [[] for _ in range(count)]  # without search: where it was, and failed to go
        self.progress_at = np.zeros(count, dtype=int)  # when it last got nearer to the goal, or to a new place
        self.escape_left = np.zeros(count, dtype=int)  # steps left of the random escape
        self.escape_actions = torch.zeros(count, agent.action_dim)
        if self.acting == "search":
            links = zip(*graph.links(self.goal_points), strict=True)
            self.last = [(tuple(nodes), tuple(costs)) for nodes, costs in links]  # nodes linked to the goals, and costs
            self.blocked: list[list] = [[] for _ in range(count)]  # pairs of sets of nodes, see shortest_paths
            self.paths = [graph.paths_to(*last) for last in self.last]

    @torch.no_grad()
    def act(self, observations: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Actions [m, A] float32 of the environments `live` [m], which show observations [m, D]."""
        agent, x = self.agent, self.features(observations, live)
        if self.clock % agent.config.replan_every == 0:
            self.choose(x, live)
        self.clock += 1
        actions = agent.act(x, self.subgoals[live], self.goals[live]).cpu()
        if self.action_noise > 0:
            noise = [torch.randn(agent.action_dim, generator=self.generators[env]) for env in live]
            actions = actions + self.action_noise * torch.stack(noise)
        stuck = self.escape_left[live] > 0
        actions[torch.from_numpy(stuck)] = self.escape_actions[live[stuck]]
        self.escape_left[live[stuck]] -= 1
        return actions.clamp(-1, 1).numpy()

    def features(self, observations: np.ndarray, live: np.ndarray) -> Tensor:
        """Features [m, d_model + D] of the states that the environments `live` show, each encoded by itself."""
        return self.agent.encode(torch.as_tensor(np.asarray(observations, np.float32), device=self.agent.device))

    def exploration_rate(self) -> float:
        """Fraction of the choices of z' so far that explored."""
        return self.explorations / max(self.choices, 1)

    def choose(self, x: Tensor, live: np.ndarray) -> None:
        """Choose z' anew for the environments `live`, whose states have features x [m, d_model + D]."""
        points = self.agent.embed(x)
        to_goal = self.agent.metric_steps(points, self.goal_points).cpu().numpy()[np.arange(len(live)), live]
        if self.acting == "search":
            nodes, costs = self.graph.links(points)
            for row, env in enumerate(live):
                self._follow(env, points[row], nodes[row], costs[row], float(to_goal[row]))
        else:
            self._choose_near(x, points, live, to_goal)
        own = np.flatnonzero(self.chosen[live] < len(self.graph))
        self.subgoals[live] = self.goals[live]
        self.subgoals[live[own]] = self.graph.features[self.chosen[live[own]]]
        self.choices += len(live)
        if self.epsilon > 0:
            sampled = torch.stack([torch.rand(2, generator=self.generators[env]) for env in live])
            explore, fraction = sampled.T.to(self.agent.device)
            ahead = x + (0.2 + 0.8 * fraction).unsqueeze(-1) * (self.goals[live] - x)
            explores = (explore < self.epsilon).unsqueeze(-1)
            self.subgoals[live] = torch.where(explores, ahead, self.subgoals[live])
            self.explorations += int(explores.sum())

    def _choose_near(self, x: Tensor, points: Tensor, live: np.ndarray, to_goal: np.ndarray) -> None:
        """Choose z' without search: the goal where `to_goal` [m], the steps to it, are few, else the best candidate.

        That is the one of the highest V, or the one nearest to the proposal. Progress is to come to new places: where
        the goal is far, V is near 0 everywhere.
        """
        agent, graph = self.agent, self.graph
        for env, point in zip(live, points, strict=True):
            places = self.places[env]
            if not places or agent.metric_steps(point[None], torch.stack(places)).min() > RING[0] * self.aim_steps:
                places.append(point)
                self.progress_at[env] = self.clock
            if self.clock - self.progress_at[env] >= agent.config.patience:
                self._escape(env)
                if self.chosen[env] < len(graph):
                    places.append(graph.points[self.chosen[env]])
        found = [
            graph.candidates(point, self.places[env], self.aim_steps) for env, point in zip(live, points, strict=True)
        ]
        counts = torch.tensor([len(nodes) for nodes in found], device=x.device)
        codes, z_goal = agent.code(graph.features[np.concatenate(found)]), agent.code(self.goals[live])
        if self.acting == "value":
            scores = agent.heads["v"](codes, z_goal.repeat_interleave(counts, 0))
        else:
            proposals = agent.heads["next_state"](agent.code(x), z_goal)
            scores = -(codes - proposals.repeat_interleave(counts, 0)).square().sum(-1)
        best = [nodes[int(score.argmax())] for nodes, score in zip(found, scores.split(counts.tolist()), strict=True)]
        self.chosen[live] = np.where(to_goal <= self.aim_steps, len(graph), best)

    def _escape(self, env: int) -> None:
        """Hold one random action for a while, and count progress anew."""
        self.nearest[env], self.progress_at[env] = np.inf, self.clock
        self.escape_left[env] = self.agent.config.escape_steps
        self.escape_actions[env] = 2 * torch.rand(self.agent.action_dim, generator=self.generators[env]) - 1

    def _aim(self, env: int, point: Tensor, node: int, left: float) -> int:
        """The first node on the way that is aim_steps from here by the metric, or twice as far along the way.

        A way from `node` that is `left` steps long, or its end. Trajectories wind: steps along them lead less far.
        """
        steps, next_node = self.paths[env]
        way = [node]
        while way[-1] < len(self.graph) and left - steps[way[-1]] < 2 * self.aim_steps:
            way.append(int(next_node[way[-1]]))
        away = self.agent.metric_steps(point[None], self.graph.points[way[:-1]])[0]
        far = (away >= self.aim_steps).nonzero()
        return way[int(far[0])] if len(far) else way[-1]

    def _follow(self, env: int, point: Tensor, nodes: np.ndarray, costs: np.ndarray, to_goal: float) -> None:
        """Choose z': the goal if it is near, else a node ahead on the shortest path by its links [L], see `_aim`."""
        ahead, count = self.aim_steps, len(self.graph)
        steps, next_node = self.paths[env]
        total = costs + steps[nodes]
        for here, there in self.blocked[env]:
            if here[nodes].any():  # it stands where the blocked edges begin
                total[there[nodes]] = np.inf
        if self.blocked[env] and not np.isfinite(total).any():  # no path is left: begin anew
            self.blocked[env].clear()
            self.nearest[env] = np.inf
            steps, next_node = self.paths[env] = self.graph.paths_to(*self.last[env])
            total = costs + steps[nodes]
        best = int(total.argmin())
        if to_goal <= ahead or not np.isfinite(total[best]):
            node, left = count, to_goal
        else:
            node, left = self._aim(env, point, int(nodes[best]), total[best]), total[best]
        if left < self.nearest[env] - 1:
            self.nearest[env], self.progress_at[env] = left, self.clock
        if self.clock - self.progress_at[env] >= self.agent.config.patience:
            self._escape(env)
            if node < count:  # going from here to it failed: these edges are blocked for the rest of the episode
                self.blocked[env].append(self.graph.around(point, node))
                self.paths[env] = self.graph.shortest_paths(*self.last[env], self.blocked[env])
        self.chosen[env] = node
