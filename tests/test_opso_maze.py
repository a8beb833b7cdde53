"""Mazes: cells and coordinates are the environment's, distances are those of a visibility graph."""

import numpy as np
import pytest
from scipy.sparse.csgraph import dijkstra

from ogbench_utils import make_env
from opso.maze import Maze, distances

CORNER = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]])


def test_cells_and_coordinates():
    maze = Maze(CORNER)
    assert maze.ij_to_xy((1, 3)).tolist() == [8.0, 0.0] and maze.xy_to_ij([8.0, 0.0]).tolist() == [1, 3]
    assert maze.extent == (-6.0, 14.0, -6.0, 14.0)
    inside = np.array([[0.0, 0.0], [1.9, 4.0], [2.1, 4.0], [-4.0, 0.0], [99.0, 0.0], [-99.0, 0.0]])
    assert maze.is_free(inside).tolist() == [True, True, False, False, False, False]


def test_distances_by_hand():
    maze = Maze(CORNER)
    # Along the corridor and across it, with nothing between.
    np.testing.assert_allclose(distances(maze, [[0.5, 7.0]], [[-1.0, -1.5]]), np.hypot(1.5, 8.5))
    # From one arm of the U to the other, over the two corners of the wall at (2, 2) and (6, 2).
    by_hand = np.hypot(1, 5) + 4.0 + np.hypot(1, 5)
    np.testing.assert_allclose(distances(maze, [[1.0, 7.0]], [[7.0, 7.0]]), by_hand, rtol=0.03)
    # Round one corner, in diagonal cells: over the corner at (2, 2), or straight past it.
    np.testing.assert_allclose(distances(maze, [[1.9, 2.5]], [[2.5, 1.9]]), np.hypot(0.1, 0.5) * 2)
    np.testing.assert_allclose(distances(maze, [[1.5, 2.1]], [[2.1, 1.0]]), np.hypot(0.6, 1.1))
    # A tenth inside the wall counts from the wall's face.
    np.testing.assert_allclose(distances(maze, [[0.0, 4.0]], [[2.1, 4.0]]), 2.0, atol=1e-6)


def test_walls_that_meet_at_a_point_leave_no_gap():
    pinched = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    assert np.isinf(distances(Maze(pinched), [[0.0, 0.0]], [[4.0, 4.0]])).all()


def free_segments(starts, ends, boxes):
    """Which segments [S, 2] to [S, 2] stay out of the inside of all boxes (x0, x1, y0, y1)."""
    free = np.ones(len(starts), dtype=bool)
    direction = ends - starts
    direction = np.where(np.abs(direction) < 1e-12, 1e-12, direction)
    for x0, x1, y0, y1 in boxes:
        low, high = (np.array([x0, y0]) + 1e-7 - starts) / direction, (np.array([x1, y1]) - 1e-7 - starts) / direction
        enter, leave = np.minimum(low, high).max(axis=1), np.maximum(low, high).min(axis=1)
        free &= ~(np.maximum(enter, 0) < np.minimum(leave, 1))
    return free


def visibility_graph_distances(maze, points):
    """Exact distances between points [P, 2]: straight lines between points and wall corners that see each other."""
    half = maze.unit / 2
    walls = [tuple(ij) for ij in np.argwhere(maze.maze_map == 1)]
    boxes = []
    for i, j in walls:
        for k, m in [(i, j), (i, j + 1), (i + 1, j)]:  # a wall, and the seams between it and the next ones
            if (k, m) in walls:
                (x0, y0), (x1, y1) = maze.ij_to_xy([(i, j), (k, m)])
                boxes.append((x0 - half, x1 + half, y0 - half, y1 + half))
        for side in (-1, 1):
            if (i + 1, j + side) in walls:  # walls that touch at a point let nothing through
                x, y = maze.ij_to_xy((i + 0.5, j + side / 2))
                boxes.append((x - 1e-3, x + 1e-3, y - 1e-3, y + 1e-3))
    signs = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)])
    corners = np.unique((maze.ij_to_xy(walls)[:, None] + half * signs).reshape(-1, 2), axis=0)
    nodes = np.concatenate([points, corners])
    first, second = np.triu_indices(len(nodes), 1)
    seen = free_segments(nodes[first], nodes[second], boxes)
    weights = np.zeros((len(nodes), len(nodes)))
    weights[first[seen], second[seen]] = np.linalg.norm(nodes[first] - nodes[second], axis=1)[seen]
    return dijkstra(weights, directed=False, indices=np.arange(len(points)))[:, : len(points)]


@pytest.mark.parametrize("size", ["medium", "large"])
def test_distances_against_a_visibility_graph(size):
    maze = Maze.from_env(make_env(f"pointmaze-{size}-navigate-v0"))
    rng = np.random.default_rng(0)
    cells = maze.ij_to_xy(np.argwhere(maze.maze_map == 0))
    spread = cells[rng.integers(len(cells), size=60)] + rng.uniform(-2, 2, (60, 2))
    in_corners = cells[rng.integers(len(cells), size=20)] + 1.998 * rng.choice([-1, 1], (20, 2))
    points = np.unique(np.concatenate([spread, in_corners]), axis=0)
    exact = visibility_graph_distances(maze, points)
    found = distances(maze, points, points)
    assert np.isfinite(exact).all()
    apart = ~np.eye(len(points), dtype=bool)
    assert (found[apart] / exact[apart]).min() > 1 - 1e-6
    assert (found[apart] / exact[apart]).max() < 1.03
    np.testing.assert_allclose(np.diag(found), 0, atol=1e-12)
    np.testing.assert_allclose(found, found.T, atol=1e-9)
    detours = (found[:, :, None] + found[None]).min(axis=1)
    assert (found <= detours * 1.03 + 1e-9).all()


def test_maze_geometry_is_the_environments():
    env = make_env("pointmaze-medium-navigate-v0")
    maze = Maze.from_env(env)
    for ij in np.argwhere(maze.maze_map == 0):
        np.testing.assert_array_equal(maze.ij_to_xy(ij), env.unwrapped.ij_to_xy(ij))
        xy = maze.ij_to_xy(ij) + [1.9, -1.9]
        assert tuple(maze.xy_to_ij(xy)) == env.unwrapped.xy_to_ij(xy) == tuple(ij)
