"""OGBench maze datasets made on this machine: `local/{pointmaze,antmaze}-{medium,large}-{navigate,stitch,explore}-v0`,
and `...-full-v0` of the official files' size.

The recipe is that of OGBench (Park et al. 2024, appendix on dataset collection): a policy that can walk in a given
direction follows the environment's oracle waypoints, with Gaussian noise on its actions.

    navigate    start in any free cell; whenever a goal is reached, the next one is drawn from the cells that are not
                part of a corridor; 1001 rows an episode
    stitch      start in any free cell, walk to a goal exactly 4 cells away and stay there; 201 rows an episode
    explore     start in any free cell, walk in a direction drawn anew every 10 steps; 501 rows an episode (ants)

The point mass steps along the direction; the ant's policy (datasets/experts/) sees its joints and the direction.
docs/recipes.md lists the deviations.
"""

import collections
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmark_data import experts
from benchmark_data.generation import Family, Plan, run_tasks
from ogbench_utils import DATASETS, GENERATED_IDS, MazeDataset, make_env, seeded_reset

STITCH_CELLS = 4  # how many cells a stitch goal lies from the start
EXPLORE_STEPS = 10  # steps in one direction
Cell = tuple[int, int]  # row, column


ANT = ("ant-xy", 400_000)  # the locomotion policy's environment and training steps
ROWS = {"navigate": 1001, "stitch": 201, "explore": 501}  # an episode
NOISE = {"pointmaze": 0.5, "antmaze": 0.2}  # standard deviation of the Gaussian added to each action
EXPLORE_NOISE = 1.0
# Training episodes where none are asked for: 100,000 rows in navigate, 60,000 in stitch. Of fewer in explore, links of
# 0.3 m do not join the start and the goal of every task in the large maze.
DEFAULT_EPISODES = {"navigate": 100, "stitch": 300, "explore": 500}
OFFICIAL_EPISODES = {"navigate": 1000, "stitch": 5000, "explore": 10_000}  # of the medium and large mazes' files
AIMS = {
    "navigate": "oracle waypoints, a new goal from the cells outside corridors whenever one is reached",
    "stitch": f"oracle waypoints to one goal exactly {STITCH_CELLS} cells from the start",
    "explore": f"a random direction every {EXPLORE_STEPS} steps",
}
HUMANOID_MESSAGE = (
    "not made here, take the official files: the recipe needs a humanoid that walks in a given direction, which is not "
    "shipped"
)


def noise(dataset: MazeDataset) -> float:
    return EXPLORE_NOISE if dataset.task_type == "explore" else NOISE[dataset.maze_env]


def cell_distances(maze_map: np.ndarray, origin: Cell) -> np.ndarray:
    """Steps between cell centres from `origin` to each cell [H, W] int by breadth-first search; -1 is out of reach."""
    distances = np.full(maze_map.shape, -1)
    distances[origin] = 0
    queue = collections.deque([origin])
    while queue:
        cell = queue.popleft()
        for neighbour in free_neighbours(maze_map, cell):
            if distances[neighbour] < 0:
                distances[neighbour] = distances[cell] + 1
                queue.append(neighbour)
    return distances


def free_neighbours(maze_map: np.ndarray, cell: Cell) -> Iterator[Cell]:
    """Free cells that share a side with `cell`, in the order in which OGBench's oracle breaks ties."""
    height, width = maze_map.shape
    for di, dj in ((-1, 0), (0, -1), (1, 0), (0, 1)):
        i, j = cell[0] + di, cell[1] + dj
        if 0 <= i < height and 0 <= j < width and maze_map[i, j] == 0:
            yield i, j


def vertex_cells(maze_map: np.ndarray) -> list[Cell]:
    """Free cells that are not part of a straight corridor: dead ends, corners and crossings."""
    chosen = []
    for i, j in np.argwhere(maze_map == 0).tolist():
        free = {(a - i, b - j) for a, b in free_neighbours(maze_map, (i, j))}
        if free not in ({(-1, 0), (1, 0)}, {(0, -1), (0, 1)}):
            chosen.append((i, j))
    return chosen


class Ways:
    """Shortest ways from cell to cell of a maze [H, W] with walls of 1: as the environment's `get_oracle_subgoal`."""

    def __init__(self, maze_map: np.ndarray):
        self.maze_map = maze_map
        self.distances = functools.cache(functools.partial(cell_distances, maze_map))

    def next_cell(self, here: Cell, goal: Cell) -> Cell:
        """The next cell on the way, `here` itself where none is nearer to the goal."""
        # `min` keeps the first of equals: the own cell, then the oracle's order.
        return min([here, *free_neighbours(self.maze_map, here)], key=self.distances(goal).__getitem__)


class EpisodeMaker:
    def __init__(self, dataset_id: str, experts_dir: Path):
        dataset = DATASETS[dataset_id]
        self.task_type, self.noise, self.policy = dataset.task_type, noise(dataset), None
        if dataset.maze_env == "antmaze":  # a point moves along the direction itself
            self.policy = experts.read_policy(experts.latest_policy(experts_dir, *ANT))
        self.env = make_env(dataset_id, terminate_at_goal=False, max_episode_steps=ROWS[self.task_type])
        self.maze_env: Any = self.env.unwrapped
        self.ways = Ways(self.maze_env.maze_map)
        self.free_cells = [tuple(cell) for cell in np.argwhere(self.maze_env.maze_map == 0).tolist()]
        self.vertex_cells = vertex_cells(self.maze_env.maze_map)

    def make(self, seed: np.random.SeedSequence) -> tuple[dict[str, np.ndarray], int]:
        """One episode and how many goals it reached (of one that stays: 1 if it was ever reached).

        A row holds the state before the step, the clipped action, and whether the episode ends with it.
        """
        rng = np.random.default_rng(seed)
        start = _draw(rng, self.free_cells)
        task = {"init_ij": start, "goal_ij": self._first_goal(rng, start)}
        observation, _ = seeded_reset(self.env, int(rng.integers(2**32)), {"task_info": task})
        columns: dict[str, list] = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel")}
        reached, done = 0, False
        moves_on = self.task_type == "navigate"
        while not done:
            if self.task_type == "explore" and len(columns["terminals"]) % EXPLORE_STEPS == 0:
                self.direction = _unit(rng.normal(size=2))
            seen, action = observation, self._noisy_action(rng, observation)
            observation, _, terminated, truncated, info = self.env.step(action)
            done = terminated or truncated
            row = (seen, action, done, info["prev_qpos"], info["prev_qvel"])
            for key, value in zip(columns, row, strict=True):
                columns[key].append(value)
            if info["success"]:
                reached = reached + 1 if moves_on else 1
                if moves_on:
                    self._move_goal(rng)
        kinds = {"terminals": bool}
        return {key: np.array(values, kinds.get(key, np.float32)) for key, values in columns.items()}, reached

    def _first_goal(self, rng: np.random.Generator, start: Cell) -> Cell:
        if self.task_type != "stitch":
            return _draw(rng, self.vertex_cells)
        away = np.argwhere(cell_distances(self.maze_env.maze_map, start) == STITCH_CELLS).tolist()
        return _draw(rng, [tuple(cell) for cell in away]) if away else start

    def _move_goal(self, rng: np.random.Generator) -> None:
        """A new goal, with the environment's noise drawn from the episode's own stream."""
        maze_env = self.maze_env
        reach = maze_env._noise * maze_env._maze_unit / 4
        centre = np.array(maze_env.ij_to_xy(_draw(rng, self.vertex_cells)))
        maze_env.set_goal(goal_xy=centre + rng.uniform(-reach, reach, size=2))

    def _noisy_action(self, rng: np.random.Generator, observation: np.ndarray) -> np.ndarray:
        if self.task_type == "explore":
            direction = self.direction
        else:
            xy = self.maze_env.get_xy()
            here, goal = self.maze_env.xy_to_ij(xy), self.maze_env.xy_to_ij(self.maze_env.cur_goal_xy)
            direction = _unit(np.array(self.maze_env.ij_to_xy(self.ways.next_cell(here, goal))) - xy)
        # The policy has never seen positions; the direction stands where OGBench's directional ant has it, at the end.
        action = self.policy.act(np.concatenate([observation[2:], direction])) if self.policy else direction
        return np.clip(action + rng.normal(0.0, self.noise, size=np.shape(action)), -1.0, 1.0)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / (np.linalg.norm(vector) + 1e-6)


def _draw(rng: np.random.Generator, cells: list[Cell]) -> Cell:
    return cells[rng.integers(len(cells))]


@functools.lru_cache(maxsize=1)
def _maker(plan: Plan) -> EpisodeMaker:
    return EpisodeMaker(plan.dataset_id, plan.experts_dir)  # once a process


def _make_episode(task: tuple[Plan, int, int]) -> tuple[dict[str, np.ndarray], int]:
    plan, split, index = task
    return _maker(plan).make(np.random.SeedSequence(plan.seed, spawn_key=(split, index)))


class MazeFamily(Family):
    ids = GENERATED_IDS
    unit = "episodes"

    def default_size(self, dataset_id: str) -> int:
        sizes = OFFICIAL_EPISODES if dataset_id.endswith("-full-v0") else DEFAULT_EPISODES
        return sizes[DATASETS[dataset_id].task_type]

    def policies(self, dataset_id: str, experts_dir: Path) -> list[Path]:
        return [experts.latest_policy(experts_dir, *ANT)] if DATASETS[dataset_id].maze_env == "antmaze" else []

    def write(self, plan: Plan, stage: Path) -> dict[str, Any]:
        counts = (plan.size, max(plan.size // 10, 1))
        tasks = [(plan, split, index) for split, count in enumerate(counts) for index in range(count)]
        made = list(run_tasks(_make_episode, tasks, plan))
        for name, part in zip(plan.dataset.files, (made[: plan.size], made[plan.size :]), strict=True):
            arrays = {key: np.concatenate([episode[key] for episode, _ in part]) for key in part[0][0]}
            with open(stage / name, "wb") as file:
                np.savez_compressed(file, **arrays)  # it dates the members 1980: equal arrays give equal bytes
            plan.dataset.read(stage / name)
        task_type, rows = plan.dataset.task_type, ROWS[plan.dataset.task_type]
        what = f"start in any free cell, {AIMS[task_type]}; noise of {noise(plan.dataset):g}"
        facts: dict[str, Any] = {
            "recipe": f"OGBench {task_type}: {what}",
            "episodes": plan.size,
            "transitions": plan.size * (rows - 1),
            "returns": None,  # the files carry no rewards
        }
        reached = sum(goals for _, goals in made[: plan.size])
        if task_type == "navigate":
            facts["goals_reached_per_1000_steps"] = round(1000 * reached / (plan.size * rows), 3)
        elif task_type == "stitch":
            facts["goal_reached"] = round(reached / plan.size, 3)  # share of episodes
        return facts
