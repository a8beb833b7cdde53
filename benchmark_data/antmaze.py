"""Local D4RL antmazes: an ant policy follows waypoints through D4RL's mazes, recorded in D4RL's HDF5 layout.

D4RL's recipe (Fu et al. 2020, appendix; its scripts/generation/generate_ant_maze_datasets.py): the way to a destination
is the shortest one from cell to cell; the ant walks in the direction of the next cell's middle plus up to 1 m in x and
y, drawn anew at each step, and in the last cell of the destination itself; Gaussian noise of 0.2 is added to its
actions. A policy sees joints and direction, data sees no destination.

    umaze      from R to the evaluation's own goal in G
    diverse    from any free cell to any free cell
    play       from any other free cell to the cells of PLAY_CELLS

A row pays 1 and has a terminal where its step ends within 0.5 m of the goal, which need not be the destination. As in
D4RL the recording goes on there, row after row with a terminal, up to a timeout after 700 (umaze) or 1000 rows.
Deviations are listed in docs/recipes.md; beside them, the ant acts by its policy's mean where D4RL samples.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

import utils
from benchmark_data import experts
from benchmark_data.d4rl import COLUMNS, write_file
from benchmark_data.generation import Family, Plan, run_tasks
from benchmark_data.maze import ANT, Ways, free_neighbours
from d4rl_utils import GENERATED_IDS, AntMaze, D4RLDataset

NOISE = 0.2  # standard deviation of the noise on actions
REACHED = 0.5  # metres from a destination, and on the way from 0.5 m in x and y beyond the middle of a cell
# Where "play" goes, [row, column]: the cells g of BIG_MAZE and HARDEST_MAZE in d4rl/locomotion/maze_env.py.
PLAY_CELLS = {
    "medium": ((2, 6), (5, 1), (6, 5)),
    "large": ((1, 6), (3, 5), (3, 10), (5, 2), (7, 4), (7, 6), (7, 9)),
}
ROW = COLUMNS | {"infos/goal": np.float32}
Cell = tuple[int, int]


class EpisodeMaker:
    def __init__(self, dataset: D4RLDataset, policy: experts.Policy):
        size, _, kind = dataset.level.partition("-")
        self.maze, self.policy, self.limit = AntMaze(size), policy, dataset.max_episode_steps
        self.walls = (self.maze.cells == "#").astype(int)
        self.fixed = dataset.level == "umaze"
        self.starts = self.destinations = [tuple(cell) for cell in np.argwhere(self.walls == 0).tolist()]
        if kind == "play":
            self.destinations = list(PLAY_CELLS[size])
            self.starts = [cell for cell in self.starts if cell not in self.destinations]
        self.ways = Ways(self.walls)

    def cell(self, xy: np.ndarray) -> Cell:
        row, column = np.argwhere(self.maze.cells == "R")[0] + np.rint(xy[::-1] / self.maze.CELL).astype(int)
        return int(row), int(column)

    def draw_destination(self, rng: np.random.Generator) -> np.ndarray:
        """A point [2] in one of the cells to go to, as far from its middle as the environment's own goals."""
        cell = self.destinations[rng.integers(len(self.destinations))]
        return self.maze._middle(np.array(cell)) + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2)

    def next_aim(self, aim: Cell, xy: np.ndarray, destination: np.ndarray) -> Cell:
        """The cell to walk to from a position [2]: `aim` until it is reached, then the next one on the way.

        The ant must come near the middle: one that turned where a cell begins would pass the goals in it by 2 m.
        """
        here, last = self.cell(xy), self.cell(destination)
        if here != aim and here not in free_neighbours(self.walls, aim):  # pushed off the way
            return here if not self.walls[here] else aim
        if np.linalg.norm(self.maze._middle(np.array(aim)) + 0.5 - xy) > REACHED:
            return aim
        return self.ways.next_cell(aim, last)

    def direction(self, aim: Cell, xy: np.ndarray, destination: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Unit vector [2] from a position towards the cell to walk to, or in the last one to the destination."""
        point = self.maze._middle(np.array(aim)) + rng.uniform(0, 1, 2)
        target = destination if aim == self.cell(destination) else point
        return (target - xy) / (np.linalg.norm(target - xy) + 1e-6)

    def make(self, seed: np.random.SeedSequence) -> dict[str, np.ndarray]:
        """ROW's columns of one episode, each [limit] or [limit, numbers]."""
        rng, robot = np.random.default_rng(seed), self.maze.unwrapped
        observation, _ = self.maze.reset(seed=int(rng.integers(2**32)))
        destination = self.maze.goal
        if not self.fixed:
            start = self.starts[rng.integers(len(self.starts))]
            robot.set_xy(robot.get_xy() + self.maze._middle(np.array(start)) + rng.uniform(0, 1, 2))
            observation, destination = robot.get_ob(), self.draw_destination(rng)
        rows: dict[str, list] = {key: [] for key in ROW}
        aim = self.cell(observation[:2])
        for step in range(self.limit):
            seen = observation.astype(np.float32)
            aim = self.next_aim(aim, observation[:2], destination)
            towards = self.direction(aim, observation[:2], destination, rng).astype(np.float32)
            action = self.policy.act(np.concatenate([seen[2:], towards]))  # it has never seen positions
            action = np.clip(action + NOISE * rng.standard_normal(action.shape), -1.0, 1.0).astype(np.float32)
            qpos, qvel = robot.data.qpos.copy(), robot.data.qvel.copy()
            observation, reward, reached, _, _ = self.maze.step(action)
            timeout = step + 1 == self.limit
            values = (seen, observation, action, reward, reached, timeout, qpos, qvel, self.maze.goal)
            for key, value in zip(ROW, values, strict=True):
                rows[key].append(value)
            if not self.fixed and np.linalg.norm(observation[:2] - destination) <= REACHED:
                destination = self.draw_destination(rng)
        return {key: np.array(values, dtype=ROW[key]) for key, values in rows.items()}


@functools.lru_cache(maxsize=1)
def _maker(plan: Plan) -> EpisodeMaker:
    return EpisodeMaker(plan.dataset, experts.read_policy(experts.latest_policy(plan.experts_dir, *ANT)))


def _make_episode(task: tuple[Plan, int]) -> dict[str, np.ndarray]:
    plan, index = task
    return _maker(plan).make(np.random.SeedSequence(plan.seed, spawn_key=(index,)))


class AntMazeFamily(Family):
    """`local/antmaze-{umaze,umaze-diverse,medium-play,...}-v2`; see generation.Family."""

    ids = tuple(name for name in GENERATED_IDS if "antmaze" in name)
    unit, size = "transitions", 100_000

    def policies(self, dataset_id: str, experts_dir: Path) -> list[Path]:
        return [experts.latest_policy(experts_dir, *ANT)]

    def write(self, plan: Plan, stage: Path) -> dict[str, Any]:
        dataset, (path,) = plan.dataset, self.policies(plan.dataset_id, plan.experts_dir)
        starts = np.arange(0, plan.size, dataset.max_episode_steps)
        parts = list(run_tasks(_make_episode, [(plan, index) for index in range(len(starts))], plan))
        columns = {key: np.concatenate([part[key] for part in parts])[: plan.size] for key in ROW}
        columns["timeouts"][-1] = True  # where the file ends, the episode is cut
        recipe = f"D4RL antmaze-{dataset.level}: an ant that follows waypoints, noise of {NOISE:g} on its actions"
        write_file(stage / dataset.files[0], columns, recipe, experts.algorithms([path]), None)
        dataset.read(stage / dataset.files[0])
        reached = np.maximum.reduceat(columns["rewards"], starts)
        whole = reached[:-1] if plan.size % dataset.max_episode_steps and len(starts) > 1 else reached
        if not reached.any():
            utils.warn(f"{plan.dataset_id}: no episode reaches its goal; ask for more with --num_transitions")
        return {
            "recipe": recipe,
            "episodes": len(starts),
            "transitions": plan.size,
            "returns": None,  # an evaluation ends at the goal, the recording does not
            "goal_reached": round(float(whole.mean()), 3),  # share of the episodes that the size did not cut
        }
