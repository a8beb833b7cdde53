"""How well a pretrained model knows its maze: V against the shortest paths, and maps of V and the proposer."""

import numpy as np
import torch

from offline_agent import OfflineAgent
from ogbench_utils import TrajectoryDataset
from opso.maze import Maze, Task, distances

PROPOSALS = 20  # made one after the other; one alone is a single step, less than the codes resolve
NEIGHBOURS = 5  # held-out states whose mean position an arrow leads to
WAY_GOALS = 8  # held-out goals that proposer_cosine looks at


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
        xy, goals_xy = (each[:, :2].cpu().numpy() for each in (self.states, self.goals))
        self.distance = distances(maze, goals_xy, xy)
        self.directions = path_directions(maze, goals_xy[:WAY_GOALS], xy)

    def evaluate(self, agent: OfflineAgent) -> dict[str, float]:
        """`value_distance_spearman` over all pairs, and the collapse diagnostics of the codes."""
        z = agent.encode_windows(self.observations, self.lengths)
        value = agent.value(z.unsqueeze(0), self.goals.unsqueeze(1)).cpu().numpy()  # [goals, states]
        far = self.distance >= np.median(self.distance)
        return {
            "value_distance_spearman": spearman(value, -self.distance),
            "value_distance_spearman_far": spearman(value[far], -self.distance[far]),
            "proposer_cosine": self.proposer_cosine(agent),
            "code_std": float(z.std(0).mean()),
            "code_rank": float(effective_rank(z)),
        }

    def proposer_cosine(self, agent: OfflineAgent) -> float:
        """Mean cosine of the proposer's arrows (see `value_map`) with the way, over all states and some goals."""
        z, xy = agent.encode_states(self.states), self.states[:, :2]
        arrows = [proposal_ends(agent, z, z, xy, goal) - xy for goal in self.goals[:WAY_GOALS]]
        return mean_cosine(torch.stack(arrows).cpu().numpy(), self.directions)


def effective_rank(codes: torch.Tensor) -> torch.Tensor:
    """exp(entropy of the normalised singular values) (Roy & Vetterli, 2007). codes: [n, d] -> 0-d, in 1..d."""
    s = torch.linalg.svdvals(codes - codes.mean(0))
    p = s / s.sum().clamp(min=1e-12)
    return torch.exp(-torch.special.xlogy(p, p).sum())


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of all entries; 0 where one of them is constant (a collapsed value orders nothing)."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    from scipy.stats import spearmanr  # late: it takes a third of a second, and --help does without

    return float(spearmanr(a.ravel(), b.ravel()).statistic)


def path_directions(maze: Maze, goals_xy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Unit vectors [G, P, 2] along the shortest path from each point [P, 2] to each goal [G, 2].

    Zeros within a cell's side of the goal and where no path leads.
    """
    step = maze.unit / 50
    moves = step * np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (0, 0)])
    moved = distances(maze, goals_xy, (xy + moves[:, None]).reshape(-1, 2)).reshape(len(goals_xy), len(moves), -1)
    moved = np.where(np.isfinite(moved), moved, 0)
    downhill = np.stack([moved[:, 1] - moved[:, 0], moved[:, 3] - moved[:, 2]], axis=-1)
    length = np.linalg.norm(downhill, axis=-1, keepdims=True)
    known = (length > step / 2) & (moved[:, 4, :, None] > maze.unit)
    return np.where(known, downhill / np.maximum(length, 1e-12), 0)


def mean_cosine(arrows: np.ndarray, directions: np.ndarray) -> float:
    """Mean cosine of vectors [..., 2] with unit vectors, where these are not zero; 0 for an arrow of no length."""
    known = np.linalg.norm(directions, axis=-1) > 0
    length = np.linalg.norm(arrows, axis=-1)
    cosine = (arrows * directions).sum(-1) / np.maximum(length, 1e-12)
    return float(cosine[known].mean()) if known.any() else 0.0


def proposal_ends(
    agent: OfflineAgent, z: torch.Tensor, others: torch.Tensor, xy: torch.Tensor, goal: torch.Tensor
) -> torch.Tensor:
    """Mean positions [n, 2] of the states whose codes are nearest to where PROPOSALS proposals lead.

    z [n, d_model] begin; others [m, d_model] and xy [m, 2]: the codes and positions of the states to arrive at.
    """
    for _ in range(PROPOSALS):
        z = agent.propose(z, goal)
    nearest = torch.cdist(z, others).topk(min(NEIGHBOURS, len(others)), largest=False).indices
    return xy[nearest].mean(1)


def value_map(agent: OfflineAgent, states: torch.Tensor, task: Task, reach: float) -> dict:
    """What `plot_value_maps` draws for one goal, at single states [n, D].

    `uphill` leads to the mean position of the states within `reach` that have the highest V. `proposals` leads to where
    the code lies that PROPOSALS proposals, one after the other, arrive at: to the states whose codes are nearest.
    """
    z, goal = agent.encode_states(states), torch.as_tensor(task.goal_observation, device=states.device)
    value, xy = agent.value(z, goal), states[:, :2]
    some = slice(None, None, 4)  # a quarter of the states to lead to: all would take gigabytes
    best = torch.where(torch.cdist(xy, xy[some]) <= reach, value[some], -torch.inf).topk(NEIGHBOURS).indices
    return {
        "name": f"task {task.task_id}",
        "start_xy": task.init_xy,
        "goal_xy": task.goal_xy,
        "value": value.cpu().numpy(),
        "uphill": (xy[some][best].mean(1) - xy).cpu().numpy(),
        "proposals": (proposal_ends(agent, z, z[some], xy[some], goal) - xy).cpu().numpy(),
    }
