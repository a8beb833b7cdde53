"""How well a pretrained model knows its maze: V against the shortest paths, and maps of V and the proposer."""

import numpy as np
import torch

from offline_agent import OfflineAgent, effective_rank
from ogbench_utils import TrajectoryDataset
from opso.maze import Maze, Task, distances

PROPOSALS = 20  # made one after the other; one alone is a single step, less than the codes resolve
NEIGHBOURS = 5  # held-out states whose mean position an arrow leads to


class HeldOut:
    """Fixed held-out histories and goals, and the shortest-path distances between them.

    A history is the first n states of a window, n uniform in 1..context_length + 1; a goal is a single state. The
    same ones serve every evaluation of a run.
    """

    def __init__(self, val: TrajectoryDataset, maze: Maze, context_length: int, states: int, goals: int, seed: int):
        generator = torch.Generator(val.device).manual_seed(seed)
        windows = val.sample_windows(states, context_length, generator)
        full = windows["valid"].sum(1) + 1
        self.lengths = (torch.rand(states, generator=generator, device=val.device) * full).long() + 1
        self.observations = windows["observations"]
        last = (self.lengths - 1).view(-1, 1, 1).expand(-1, 1, val.observation_dim)
        self.states = self.observations.gather(1, last).squeeze(1)  # [states, D]
        rows = torch.randint(len(val.observations), (goals,), generator=generator, device=val.device)
        self.goals = val.observations[rows]  # [goals, D]
        self.distance = distances(maze, self.goals[:, :2].cpu().numpy(), self.states[:, :2].cpu().numpy())

    def evaluate(self, agent: OfflineAgent) -> dict[str, float]:
        """`value_distance_spearman` over all pairs, and the collapse diagnostics of the codes."""
        z = agent.encode_windows(self.observations, self.lengths)
        value = agent.value(z.unsqueeze(0), self.goals.unsqueeze(1)).cpu().numpy()  # [goals, states]
        far = self.distance >= np.median(self.distance)
        return {
            "value_distance_spearman": spearman(value, -self.distance),
            "value_distance_spearman_far": spearman(value[far], -self.distance[far]),
            "code_std": float(z.std(0).mean()),
            "code_rank": float(effective_rank(z)),
        }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of all entries; 0 where one of them is constant (a collapsed value orders nothing)."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    from scipy.stats import spearmanr  # late: it takes a third of a second, and --help does without

    return float(spearmanr(a.ravel(), b.ravel()).statistic)


def value_map(agent: OfflineAgent, states: torch.Tensor, task: Task, reach: float) -> dict:
    """What `plot_value_maps` draws for one goal, at single states [n, D].

    `uphill` leads to the mean position of the states within `reach` that have the highest V. `proposals` leads to where
    the code lies that PROPOSALS proposals, one after the other, arrive at: to the states whose codes are nearest.
    """
    z, goal = agent.encode_states(states), torch.as_tensor(task.goal_observation, device=states.device)
    value, xy, ahead = agent.value(z, goal), states[:, :2], z
    for _ in range(PROPOSALS):
        ahead = agent.propose(ahead, goal)
    some = slice(None, None, 4)  # a quarter of the states to lead to: all would take gigabytes
    nearest = torch.cdist(ahead, z[some]).topk(NEIGHBOURS, largest=False).indices
    best = torch.where(torch.cdist(xy, xy[some]) <= reach, value[some], -torch.inf).topk(NEIGHBOURS).indices
    return {
        "name": f"task {task.task_id}",
        "start_xy": task.init_xy,
        "goal_xy": task.goal_xy,
        "value": value.cpu().numpy(),
        "uphill": (xy[some][best].mean(1) - xy).cpu().numpy(),
        "proposals": (xy[some][nearest].mean(1) - xy).cpu().numpy(),
    }
