"""Mazes: cells and coordinates are the environment's, distances lie as close below a fine grid's as they must."""

import numpy as np
import pytest
from scipy.sparse import coo_matrix
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
    np.testing.assert_allclose(distances(maze, [[1.0, 7.0]], [[7.0, 7.0]]), by_hand)
    # Round one corner, in diagonal cells: over the corner at (2, 2), or straight past it.
    np.testing.assert_allclose(distances(maze, [[1.9, 2.5]], [[2.5, 1.9]]), np.hypot(0.1, 0.5) * 2)
    np.testing.assert_allclose(distances(maze, [[1.5, 2.1]], [[2.1, 1.0]]), np.hypot(0.6, 1.1))
    # A tenth inside the wall counts from the wall's face.
    np.testing.assert_allclose(distances(maze, [[0.0, 4.0]], [[2.1, 4.0]]), 2.0, atol=1e-6)


def test_walls_that_meet_at_a_point_leave_no_gap():
    ring_and_cell = np.ones((6, 6), dtype=int)
    ring_and_cell[1:4, 1:4] = 0
    ring_and_cell[2, 2], ring_and_cell[4, 4] = 1, 0
    assert distances(Maze(ring_and_cell), [[8.0, 8.0], [12.0, 12.0]], [[0.0, 0.0]]) == pytest.approx(
        np.array([[4 * np.sqrt(10)], [np.inf]])
    )


def grid_distances(maze: Maze, fine: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the free cells' fine x fine parts [n, 2], and the shortest ways between every 37th and all of them.

    From part to part beside it or across a corner whose four parts are free.
    """
    free = np.kron(maze.maze_map == 0, np.ones((fine, fine), dtype=bool))
    number = np.where(free, free.cumsum().reshape(free.shape) - 1, -1)
    rows, columns, lengths = [], [], []
    for di, dj in ((0, 1), (1, 0), (1, 1), (1, -1)):
        i, j = np.nonzero(free[:-1, 1:-1])  # walls are all round
        j += 1
        k, m = i + di, j + dj
        open_ = free[k, m] & free[i, m] & free[k, j]
        rows.append(number[i, j][open_])
        columns.append(number[k, m][open_])
        lengths.append(np.full(open_.sum(), np.hypot(di, dj) * maze.unit / fine))
    edges = coo_matrix((np.concatenate(lengths), (np.concatenate(rows), np.concatenate(columns))), (free.sum(),) * 2)
    places = maze.ij_to_xy((np.argwhere(free) + 0.5) / fine - 0.5)
    return places, dijkstra(edges.tocsr(), directed=False, indices=np.arange(0, len(places), 37))


@pytest.mark.parametrize("size", ["medium", "large"])
def test_distances_against_a_fine_grid(size):
    """A way along a grid of eight directions is up to 1 / cos(pi / 8) times as long, and turns beside the corners."""
    maze = Maze.from_env(make_env(f"pointmaze-{size}-navigate-v0"))
    places, grid = grid_distances(maze, fine=8)
    found = distances(maze, places[::37], places)
    assert np.isfinite(grid).all() and (found <= grid + 1e-6).all()
    assert (grid <= found / np.cos(np.pi / 8) + 2 * maze.unit / 8).all()
    own = found[:, ::37]
    np.testing.assert_allclose(own, own.T, atol=1e-6)
    assert (own <= (own[:, :, None] + own[None]).min(axis=1) + 1e-6).all()


def test_maze_geometry_is_the_environments():
    env = make_env("pointmaze-medium-navigate-v0")
    maze = Maze.from_env(env)
    for ij in np.argwhere(maze.maze_map == 0):
        np.testing.assert_array_equal(maze.ij_to_xy(ij), env.unwrapped.ij_to_xy(ij))
        xy = maze.ij_to_xy(ij) + [1.9, -1.9]
        assert tuple(maze.xy_to_ij(xy)) == env.unwrapped.xy_to_ij(xy) == tuple(ij)
