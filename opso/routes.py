"""The ways of the graph to goals from all of the dataset, worked out once: what V and the proposer learn from.

A proposer that is taught the way from everywhere needs no search when it acts.
"""

import numpy as np
import torch
from torch import Tensor

from opso.search import StateGraph
from utils import progress


class Routes:
    """Shortest paths from every node of the graph to `count` of them, evenly spaced in time.

    goals [K] int64: the nodes that are goals. steps [K, n] float32: from each node to each goal, inf where no path
    leads. aims [K, n] int32: the node `aim_steps` ahead on the way, the goal itself where it is nearer.
    """

    def __init__(self, graph: StateGraph, count: int):
        n = len(graph)
        goals = np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(np.int64))
        steps, aims = np.empty((len(goals), n), np.float32), np.empty((len(goals), n), np.int32)
        for number, goal in enumerate(progress(goals, "ways to goals", unit="goal", leave=False)):
            left, next_node = graph.shortest_paths([goal], [0.0])
            next_node[next_node == n] = goal  # the goal is a node
            steps[number], aims[number] = left, ahead(left, next_node, graph.agent.aim_steps)
        self.features, device = graph.features, graph.features.device
        self.goals, self.steps, self.aims = (torch.from_numpy(each).to(device) for each in (goals, steps, aims))

    def sample(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` pairs of a node and a goal: features x, x_goal and x_aim [count, d_model + D], steps [count]."""
        device = self.features.device
        goal, node = (torch.randint(0, most, (count,), generator=generator, device=device) for most in self.steps.shape)
        x, x_goal, x_aim = self.features[node], self.features[self.goals[goal]], self.features[self.aims[goal, node]]
        return {"x": x, "x_goal": x_goal, "x_aim": x_aim, "steps": self.steps[goal, node]}


def ahead(steps: np.ndarray, next_node: np.ndarray, aim_steps: float) -> np.ndarray:
    """The first node on each node's way that is `aim_steps` ahead, or the way's end: [n] int.

    steps [n] to the goal, inf where no path leads; next_node [n]: the goal's is the goal itself. A node from which no
    path leads is its own answer.
    """
    place = np.arange(len(steps))
    moving = np.flatnonzero(np.isfinite(steps) & (next_node != place))
    while len(moving):
        place[moving] = next_node[place[moving]]
        here = place[moving]
        moving = moving[(steps[moving] - steps[here] < aim_steps) & (next_node[here] != here)]
    return place
