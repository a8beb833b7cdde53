"""The floor plan of a maze, its evaluation tasks, and shortest distances, which value maps are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from ogbench_utils import NUM_TASKS, seeded_reset

SUBCELLS = 8  # nodes along a cell's side in the graph


class Maze:
    """The floor plan of a maze. Row i of `maze_map` runs along y, column j along x; lengths are MuJoCo's.

    Attributes: maze_map [H, W] int (1 is wall), unit (side of a cell), offset_x, offset_y (cell (0, 0) is centred at
    (-offset_x, -offset_y)), extent (x_min, x_max, y_min, y_max), for `imshow(maze_map, origin="lower", extent=extent)`.
    """

    def __init__(self, maze_map: np.ndarray, unit: float = 4.0, offset_x: float = 4.0, offset_y: float = 4.0):
        self.maze_map = np.array(maze_map, dtype=int)
        self.unit = float(unit)
        self.offset_x = float(offset_x)
        self.offset_y = float(offset_y)
        height, width = self.maze_map.shape
        x_min, y_min = -self.offset_x - self.unit / 2, -self.offset_y - self.unit / 2
        self.extent = (x_min, x_min + width * self.unit, y_min, y_min + height * self.unit)

    @classmethod
    def from_env(cls, env: gymnasium.Env) -> Maze:
        """The maze of an OGBench environment."""
        maze_env: Any = env.unwrapped
        return cls(maze_env.maze_map, maze_env._maze_unit, maze_env._offset_x, maze_env._offset_y)

    def xy_to_ij(self, xy: np.ndarray) -> np.ndarray:
        """Cell (row, column) [..., 2] int of points [..., 2]."""
        corner = np.array([self.extent[0], self.extent[2]])
        return np.floor((np.asarray(xy, dtype=np.float64) - corner) / self.unit).astype(int)[..., ::-1]

    def ij_to_xy(self, ij: np.ndarray) -> np.ndarray:
        """Centre [..., 2] float64 of cells (row, column) [..., 2]."""
        return np.asarray(ij)[..., ::-1] * self.unit - np.array([self.offset_x, self.offset_y])

    def is_free(self, xy: np.ndarray) -> np.ndarray:
        """Whether points [..., 2] lie in a free cell: [...] bool, False outside the map."""
        ij = self.xy_to_ij(xy)
        inside = ((ij >= 0) & (ij < self.maze_map.shape)).all(axis=-1)
        clipped = np.clip(ij, 0, np.array(self.maze_map.shape) - 1)
        return inside & (self.maze_map[clipped[..., 0], clipped[..., 1]] == 0)


@dataclass(frozen=True)
class Task:
    """One evaluation task as reset with a given seed."""

    task_id: int  # 1..5
    init_xy: np.ndarray  # [2] float64
    goal_xy: np.ndarray  # [2] float64
    goal_observation: np.ndarray  # [obs_dim] float32


def evaluation_tasks(env: gymnasium.Env, seed: int = 0) -> list[Task]:
    """The benchmark's five tasks, each as `seeded_reset` with this seed draws it. Leaves `env` reset to the last."""
    tasks = []
    for task_id in range(1, NUM_TASKS + 1):
        _, info = seeded_reset(env, seed, {"task_id": task_id})
        maze_env: Any = env.unwrapped
        xy = np.array(maze_env.get_xy(), dtype=np.float64)
        goal_xy = np.array(maze_env.cur_goal_xy, dtype=np.float64)
        tasks.append(Task(task_id, xy, goal_xy, np.asarray(info["goal"], dtype=np.float32)))
    return tasks


def distances(maze: Maze, goals_xy: np.ndarray, points_xy: np.ndarray) -> np.ndarray:
    """Shortest distance through free space from each point [P, 2] to each goal [G, 2]: [G, P] float64.

    Exact where the rectangle of cells between the two is free, else at most 3% too long (the angles of a
    16-neighbour grid). Points in a wall count from the nearest free place; unreachable ones are at infinity.
    Teleporters are ignored.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import dijkstra

    goals, points = (_snap(maze, np.asarray(xy, dtype=np.float64).reshape(-1, 2)) for xy in (goals_xy, points_xy))
    nodes = _nodes(maze)
    starts, ends, weights = _edges(maze, nodes)
    count = nodes.max() + 1
    goal_nodes, goal_costs = _links(maze, nodes, goals)
    goal_ids = np.broadcast_to(count + np.arange(len(goals))[:, None], goal_nodes.shape)
    linked = np.isfinite(goal_costs)
    # Goals are nodes with edges out only: a path must not take a short cut through another goal. Their weights
    # stay above 0, which a sparse graph would read as no edge.
    rows = np.concatenate([starts, ends, goal_ids[linked]])
    columns = np.concatenate([ends, starts, goal_nodes[linked]])
    weights = np.concatenate([weights, weights, np.maximum(goal_costs[linked], 1e-12)])
    size = count + len(goals)
    graph = coo_matrix((weights, (rows, columns)), shape=(size, size)).tocsr()
    distance = dijkstra(graph, indices=np.arange(count, size))
    through = np.full((len(goals), len(points)), np.inf)
    for start in range(0, len(points), 4096):  # bounds the memory that the links take
        block = slice(start, start + 4096)
        for near, costs in zip(*(part.T for part in _links(maze, nodes, points[block])), strict=True):
            through[:, block] = np.minimum(through[:, block], distance[:, near] + costs)
    return np.fmin(through, _direct_distance(maze, goals, points))


def _snap(maze: Maze, xy: np.ndarray) -> np.ndarray:
    """Move points [P, 2] that lie in a wall to the nearest place in a free cell."""
    blocked = np.flatnonzero(~maze.is_free(xy))
    if len(blocked) == 0:
        return xy
    centres = maze.ij_to_xy(np.argwhere(maze.maze_map == 0))
    reach = maze.unit / 2 * (1 - 1e-9)
    nearest, best = xy[blocked], np.full(len(blocked), np.inf)
    for centre in centres:
        candidate = centre + np.clip(xy[blocked] - centre, -reach, reach)
        gap = np.linalg.norm(candidate - xy[blocked], axis=1)
        nearest = np.where((gap < best)[:, None], candidate, nearest)
        best = np.minimum(gap, best)
    snapped = xy.copy()
    snapped[blocked] = nearest
    return snapped


def _direct_distance(maze: Maze, goals: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Exact distances [G, P] where they need no graph, NaN elsewhere.

    Two kinds of pairs: no wall in the rectangle of cells that spans both; and diagonal cells with one wall beside
    them, whose shortest path is straight or bends at the wall's corner. What is left is far apart, so that the
    grid's rounding is small beside it.
    """
    walls = np.pad(maze.maze_map, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    goal_ij, point_ij = np.broadcast_arrays(maze.xy_to_ij(goals)[:, None], maze.xy_to_ij(points)[None])
    low, high = np.minimum(goal_ij, point_ij), np.maximum(goal_ij, point_ij) + 1
    top, left, bottom, right = low[..., 0], low[..., 1], high[..., 0], high[..., 1]
    count = walls[bottom, right] - walls[top, right] - walls[bottom, left] + walls[top, left]
    distance = np.full(count.shape, np.nan)
    g, p = np.nonzero(count == 0)
    distance[g, p] = np.linalg.norm(goals[g] - points[p], axis=-1)
    g, p = np.nonzero((count == 1) & (np.abs(goal_ij - point_ij) == 1).all(axis=-1))
    goal, point, (i, j), (k, m) = goals[g], points[p], goal_ij[g, p].T, point_ij[g, p].T
    corner = maze.ij_to_xy(np.stack([i + k, j + m], axis=-1) / 2)
    wall = maze.ij_to_xy(np.where((maze.maze_map[i, m] == 1)[:, None], np.stack([i, m], -1), np.stack([k, j], -1)))
    diagonal = maze.ij_to_xy(np.stack([k, m], -1)) - maze.ij_to_xy(np.stack([i, j], -1))
    # The straight line is free when it leaves the corner on the side where the wall is.
    free = _cross(point - goal, corner - goal) * _cross(diagonal, wall - corner) >= 0
    bent = np.linalg.norm(goal - corner, axis=-1) + np.linalg.norm(corner - point, axis=-1)
    distance[g, p] = np.where(free, np.linalg.norm(goal - point, axis=-1), bent)
    return distance


def _nodes(maze: Maze) -> np.ndarray:
    """Graph node at each corner of the subcells, [8 H + 1, 8 W + 1] int: a number, or -1 where all round is wall.

    Corners, not centres: shortest paths run along walls and bend at their corners. Where two walls meet at a
    point there is no node, so that no path squeezes through.
    """
    free = np.pad(maze.maze_map == 0, 1)
    fine = np.pad(np.kron(maze.maze_map == 0, np.ones((SUBCELLS, SUBCELLS), dtype=bool)), 1)
    usable = fine[:-1, :-1] | fine[:-1, 1:] | fine[1:, :-1] | fine[1:, 1:]
    falling, rising = free[:-1, :-1] & free[1:, 1:], free[:-1, 1:] & free[1:, :-1]
    either = free[:-1, :-1] | free[1:, 1:], free[:-1, 1:] | free[1:, :-1]
    pinched = (falling & ~either[1]) | (rising & ~either[0])
    usable[::SUBCELLS, ::SUBCELLS] &= ~pinched
    return np.where(usable, usable.cumsum().reshape(usable.shape) - 1, -1)


def _edges(maze: Maze, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start nodes, end nodes and lengths of the 16-neighbour grid's edges [M], each once.

    A diagonal crosses one subcell and a knight's move two, which must all be free; a straight edge may run along
    a wall, so one of the two subcells beside it is enough.
    """
    height, width = nodes.shape
    margin = 2
    nodes = np.pad(nodes, margin, constant_values=-1)
    fine = np.kron(maze.maze_map == 0, np.ones((SUBCELLS, SUBCELLS), dtype=bool))
    fine = np.pad(fine, ((margin, margin + 1), (margin, margin + 1)))

    def shifted(array: np.ndarray, di: int, dj: int) -> np.ndarray:
        return array[margin + di : margin + di + height, margin + dj : margin + dj + width]

    # Subcell (0, 0) is the one between a node and its (1, 1) neighbour.
    crossed = {
        (0, 1): [(-1, 0), (0, 0)],
        (1, 0): [(0, -1), (0, 0)],
        (1, 1): [(0, 0)],
        (1, -1): [(0, -1)],
        (1, 2): [(0, 0), (0, 1)],
        (1, -2): [(0, -1), (0, -2)],
        (2, 1): [(0, 0), (1, 0)],
        (2, -1): [(0, -1), (1, -1)],
    }
    starts, ends, weights = [], [], []
    for (di, dj), subcells in crossed.items():
        open_subcells = np.stack([shifted(fine, *subcell) for subcell in subcells])
        allowed = open_subcells.any(axis=0) if 0 in (di, dj) else open_subcells.all(axis=0)
        allowed &= (shifted(nodes, 0, 0) >= 0) & (shifted(nodes, di, dj) >= 0)
        starts.append(shifted(nodes, 0, 0)[allowed])
        ends.append(shifted(nodes, di, dj)[allowed])
        weights.append(np.full(allowed.sum(), math.hypot(di, dj) * maze.unit / SUBCELLS))
    return np.concatenate(starts), np.concatenate(ends), np.concatenate(weights)


def _links(maze: Maze, nodes: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nodes on the borders of each free point's cell and of the four beside it, as far as they are free.

    All are in the point's sight, and far enough to leave it at nearly any angle. For points [P, 2], returns
    nodes [P, 124] int and straight distances [P, 124], infinite where there is no node.
    """
    side = np.arange(SUBCELLS + 1)
    border = np.array([(a, b) for a in side for b in side if {a, b} & {0, SUBCELLS}])
    walls = np.pad(maze.maze_map, 1, constant_values=1)
    corner = np.array([maze.extent[0], maze.extent[2]])
    found, costs = [], []
    for shift in np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]):
        cell = maze.xy_to_ij(xy) + shift
        free = walls[cell[:, 0] + 1, cell[:, 1] + 1] == 0
        # A node that two cells share is taken once, with the point's own cell.
        relative = border + shift * SUBCELLS
        own = ((relative >= 0) & (relative <= SUBCELLS)).all(axis=1) & shift.any()
        lattice = np.where(free[:, None], cell, 0)[:, None] * SUBCELLS + border[~own]
        there = nodes[lattice[..., 0], lattice[..., 1]]
        length = np.linalg.norm(lattice[..., ::-1] * (maze.unit / SUBCELLS) + corner - xy[:, None], axis=-1)
        found.append(np.maximum(there, 0))
        costs.append(np.where((there >= 0) & free[:, None], length, np.inf))
    return np.concatenate(found, axis=1), np.concatenate(costs, axis=1)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """z of the cross product of plane vectors [..., 2]; positive where b points to the left of a."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
