"""The floor plan of a maze, its evaluation tasks, and shortest distances, which value maps are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from ogbench_utils import NUM_TASKS, seeded_reset


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

    By a visibility graph: shortest paths are straight, or bend at the walls' corners. Points in a wall count from the
    nearest free place; unreachable ones are at infinity. Teleporters are ignored.
    """
    from scipy.sparse.csgraph import dijkstra

    goals, points = (_snap(maze, np.asarray(xy, dtype=np.float64).reshape(-1, 2)) for xy in (goals_xy, points_xy))
    corners, walls = _corners(maze), _walls(maze)
    between = dijkstra(_straight(walls, corners, corners))
    to_goal = (_straight(walls, goals, corners)[:, :, None] + between).min(axis=1)  # [G, C]
    distance = _straight(walls, goals, points)
    for goal_costs, point_costs in zip(to_goal.T, _straight(walls, corners, points), strict=True):
        distance = np.minimum(distance, goal_costs[:, None] + point_costs)
    return distance


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


def _corners(maze: Maze) -> np.ndarray:
    """The walls' corners that paths bend at [C, 2]: where one of the four cells around is a wall."""
    walls = maze.maze_map
    around = walls[:-1, :-1] + walls[:-1, 1:] + walls[1:, :-1] + walls[1:, 1:]
    return maze.ij_to_xy(np.argwhere(around == 1) + 0.5)


def _walls(maze: Maze) -> np.ndarray:
    """Boxes that nothing passes, as opposite corners [B, 2, 2]: the runs of walls along each row and each column.

    Where two walls meet at a point there is a tiny box, so that nothing squeezes through.
    """
    walls, boxes = maze.maze_map, []
    for across, lines in enumerate((walls, walls.T)):
        for number, line in enumerate(lines):
            ends = np.flatnonzero(np.diff(np.pad(line, 1))).reshape(-1, 2)
            runs = [[(number, first), (number + 1, last)] for first, last in ends]
            boxes += [np.flip(run, axis=-1) if across else np.array(run) for run in runs]
    a, b, c, d = walls[:-1, :-1], walls[:-1, 1:], walls[1:, :-1], walls[1:, 1:]
    boxes += [np.stack([ij - 1e-4, ij + 1e-4]) for ij in np.argwhere((a == d) & (b == c) & (a != b)) + 1]
    return maze.ij_to_xy(np.stack(boxes) - 0.5)


def _straight(walls: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Lengths [S, E] of the lines from points [S, 2] to [E, 2], infinite where a wall of [B, 2, 2] is between."""
    start = starts[:, None]
    direction = ends[None] - start
    safe = np.where(np.abs(direction) < 1e-12, 1e-12, direction)
    free = np.ones(direction.shape[:2], dtype=bool)
    for low, high in walls:
        # The parts of the line, from 0 to 1, between the box's sides in x and in y; both at once lie inside it.
        sides = np.stack([low + 1e-7 - start, high - 1e-7 - start]) / safe
        enters, leaves = sides.min(axis=0).max(axis=-1), sides.max(axis=0).min(axis=-1)
        free &= np.maximum(enters, 0) >= np.minimum(leaves, 1)
    return np.where(free, np.linalg.norm(direction, axis=-1), np.inf)
