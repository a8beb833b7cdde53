"""Generate OGBench maze datasets on this machine: `local/pointmaze-{medium,large}-{navigate,stitch}-v0`.

    python make_dataset.py --dataset local/pointmaze-medium-navigate-v0 --num_episodes 100 --seed 0

The recipe is that of OGBench (Park et al. 2024, appendix on dataset collection): a policy follows the environment's
oracle waypoints, with Gaussian noise on its actions.

    navigate    start in any free cell; whenever a goal is reached, the next one is drawn from the cells that are not
                part of a corridor; 1001 rows an episode
    stitch      start in any free cell, walk to a goal exactly 4 cells away and stay there; 201 rows an episode

Deviations: every episode has a random stream of its own, so that the files do not depend on --jobs; there is at least
one validation episode (OGBench: a tenth, rounded down); fewer episodes than OGBench's 1000 or 5000 unless asked for.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils
from ogbench_utils import (
    GENERATED_IDS,
    DatasetId,
    dataset_paths,
    exclusive_folder,
    load_arrays,
    make_env,
    parse_dataset_id,
    read_manifest,
    seeded_reset,
)
from utils import UserError

STITCH_CELLS = 4  # how many cells a stitch goal lies from the start
Cell = tuple[int, int]  # row, column


@dataclass
class MakeDatasetConfig:
    """Settings of one generated dataset."""

    dataset: str = GENERATED_IDS[0]  # id of the dataset, local/<OGBench id>
    num_episodes: int = 100  # training episodes; a tenth as many, at least 1, are made for validation
    seed: int = 0  # the files depend on the id, this and num_episodes alone
    dataset_dir: str | None = None  # where datasets are kept; else OGBENCH_DATASET_DIR, else datasets/ beside the code
    jobs: int = 1  # processes that make episodes side by side; changes no byte of the files
    overwrite: bool = False  # replace a dataset of another seed or number of episodes


# ----------------------------------------------------------------------------------------------------------------
# Recipes: who walks, and how
# ----------------------------------------------------------------------------------------------------------------


def oracle_policy(observation: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The point mass steps straight towards the waypoint. direction: unit vector [2]; returns the action [2]."""
    return direction


@dataclass(frozen=True)
class Recipe:
    """How one family's data is made."""

    policy: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (observation, unit direction) -> action before noise
    noise: float  # standard deviation of the Gaussian added to each action
    rows: dict[str, int]  # rows an episode, by task type
    sizes: tuple[str, ...]  # mazes it is made for


# A family whose robot must first learn to walk joins with its locomotion policy here.
RECIPES = {
    "pointmaze": Recipe(oracle_policy, noise=0.5, rows={"navigate": 1001, "stitch": 201}, sizes=("medium", "large"))
}


def find_recipe(dataset_id: str) -> tuple[DatasetId, Recipe]:
    """The id's parts and its recipe. Raises UserError for an id that cannot be made here."""
    dataset = parse_dataset_id(dataset_id)
    if not dataset.local:
        raise UserError(
            f"--dataset {dataset_id} names the official file, which is downloaded; make local/{dataset_id} instead"
        )
    recipe = RECIPES.get(dataset.maze_env)
    choices = ", ".join(GENERATED_IDS)
    if recipe is None:
        raise UserError(
            f"--dataset {dataset_id}: its recipe needs a trained locomotion policy, which is not shipped here; "
            f"what can be made: {choices}"
        )
    if dataset.maze_size not in recipe.sizes or dataset.task_type not in recipe.rows:
        raise UserError(f"--dataset {dataset_id}: there is no recipe for it; what can be made: {choices}")
    return dataset, recipe


# ----------------------------------------------------------------------------------------------------------------
# Cells and waypoints
# ----------------------------------------------------------------------------------------------------------------


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


class OracleWaypoints:
    """The environment's `get_oracle_subgoal`, with one search a goal cell instead of one a step."""

    def __init__(self, maze_env: Any):
        self.maze_env = maze_env
        self._waypoints: dict[tuple[Cell, Cell], np.ndarray] = {}
        self._distances: dict[Cell, np.ndarray] = {}

    def __call__(self, start_xy: np.ndarray, goal_xy: np.ndarray) -> np.ndarray:
        """Centre [2] of the next cell on the way, the start's own cell when none is nearer to the goal."""
        key = (self.maze_env.xy_to_ij(start_xy), self.maze_env.xy_to_ij(goal_xy))
        if key not in self._waypoints:
            self._waypoints[key] = self._next_cell(*key)
        return self._waypoints[key]

    def _next_cell(self, start: Cell, goal: Cell) -> np.ndarray:
        maze_map = self.maze_env.maze_map
        if goal not in self._distances:
            self._distances[goal] = cell_distances(maze_map, goal)
        distances = self._distances[goal]
        # `min` keeps the first of equals: the own cell, then the oracle's order.
        best = min([start, *free_neighbours(maze_map, start)], key=lambda cell: distances[cell])
        return np.array(self.maze_env.ij_to_xy(best))


# ----------------------------------------------------------------------------------------------------------------
# Episodes
# ----------------------------------------------------------------------------------------------------------------


class EpisodeMaker:
    """An environment and its recipe, ready to make episodes of one dataset."""

    def __init__(self, dataset_id: str):
        self.dataset, self.recipe = find_recipe(dataset_id)
        self.rows = self.recipe.rows[self.dataset.task_type]
        self.env = make_env(dataset_id, terminate_at_goal=False, max_episode_steps=self.rows)
        self.maze_env: Any = self.env.unwrapped
        self.waypoints = OracleWaypoints(self.maze_env)
        self.free_cells = [tuple(cell) for cell in np.argwhere(self.maze_env.maze_map == 0).tolist()]
        self.vertex_cells = vertex_cells(self.maze_env.maze_map)

    def make(self, seed: np.random.SeedSequence) -> dict[str, np.ndarray]:
        """One episode: observations, actions, qpos, qvel [rows, .] float32 and terminals [rows] bool.

        A row holds the state before the step, the clipped action, and whether the episode ends with it.
        """
        rng = np.random.default_rng(seed)
        start = _draw(rng, self.free_cells)
        task = {"init_ij": start, "goal_ij": self._first_goal(rng, start)}
        observation, _ = seeded_reset(self.env, int(rng.integers(2**32)), {"task_info": task})
        columns: dict[str, list] = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel")}
        done = False
        while not done:
            action = self._noisy_action(rng, observation)
            columns["observations"].append(observation)
            columns["actions"].append(action)
            observation, _, terminated, truncated, info = self.env.step(action)
            done = terminated or truncated
            columns["terminals"].append(done)
            columns["qpos"].append(info["prev_qpos"])
            columns["qvel"].append(info["prev_qvel"])
            if info["success"] and self.dataset.task_type == "navigate":
                self._move_goal(rng)
        return {
            key: np.array(values, dtype=bool if key == "terminals" else np.float32) for key, values in columns.items()
        }

    def _first_goal(self, rng: np.random.Generator, start: Cell) -> Cell:
        if self.dataset.task_type == "navigate":
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
        xy = self.maze_env.get_xy()
        direction = self.waypoints(xy, self.maze_env.cur_goal_xy) - xy
        action = self.recipe.policy(observation, direction / (np.linalg.norm(direction) + 1e-6))
        return np.clip(action + rng.normal(0.0, self.recipe.noise, size=np.shape(action)), -1.0, 1.0)


def _draw(rng: np.random.Generator, cells: list[Cell]) -> Cell:
    return cells[rng.integers(len(cells))]


@functools.lru_cache(maxsize=1)
def _maker(dataset_id: str) -> EpisodeMaker:
    """One environment a process, however many episodes it makes."""
    return EpisodeMaker(dataset_id)


def _make_episode(task: tuple[str, int, int, int]) -> dict[str, np.ndarray]:
    dataset_id, seed, split, index = task
    return _maker(dataset_id).make(np.random.SeedSequence(seed, spawn_key=(split, index)))


def _start_worker() -> None:
    """Prepare a worker process: it leaves Ctrl-C to its parent, and ends when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Idle workers share the queue's both ends, so a dead parent alone would leave them waiting for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def make_episodes(tasks: list[tuple[str, int, int, int]], jobs: int) -> Iterator[dict[str, np.ndarray]]:
    """The episode of each task (dataset id, seed, split, index), in order."""
    if jobs == 1:
        yield from map(_make_episode, tasks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks that torch may hold
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_start_worker) as pool:
        try:
            yield from pool.map(_make_episode, tasks, chunksize=4)
        finally:
            pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------


def generate(
    dataset_id: str,
    num_episodes: int = 100,
    seed: int = 0,
    dataset_dir: str | os.PathLike | None = None,
    jobs: int = 1,
    progress: bool = True,
    overwrite: bool = False,
) -> Path:
    """Make a local dataset and return the path of its train file; one that is there already is kept.

    The manifest is written last: files without it do not count as a dataset. Raises UserError for an id without a
    recipe, numbers out of range, a folder that cannot be written, and, unless `overwrite`, a dataset of another seed
    or number of episodes.
    """
    find_recipe(dataset_id)
    for name, value, least in (("num_episodes", num_episodes, 1), ("seed", seed, 0), ("jobs", jobs, 1)):
        if value < least:
            raise UserError(f"--{name} {value}: at least {least} is needed")
    train_path = dataset_paths(dataset_id, dataset_dir)[0]
    if _already_made(dataset_id, num_episodes, seed, dataset_dir, overwrite):
        if progress:
            print(f"{dataset_id}: already at {train_path}, {num_episodes} episodes, seed {seed}", file=sys.stderr)
        return train_path
    try:
        train_path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_folder(train_path.parent):
            # Another run may have made it while this one waited.
            if not _already_made(dataset_id, num_episodes, seed, dataset_dir, overwrite):
                _write_dataset(dataset_id, num_episodes, seed, dataset_dir, jobs, progress)
    except OSError as error:
        if error.errno in utils.DISK_FULL:
            raise
        raise UserError(
            f"{train_path.parent}: cannot write there ({error.strerror}); choose another --dataset_dir"
        ) from None
    return train_path


def generate_if_missing(dataset_id: str, dataset_dir: str | os.PathLike | None = None, jobs: int = 1) -> None:
    """Make a local dataset that is not there, with the default seed and number of episodes; leave others alone."""
    if dataset_id in GENERATED_IDS and read_manifest(dataset_id, dataset_dir) is None:
        generate(dataset_id, MakeDatasetConfig.num_episodes, MakeDatasetConfig.seed, dataset_dir, jobs)


def _write_dataset(dataset_id: str, num_episodes: int, seed: int, dataset_dir: Any, jobs: int, progress: bool) -> None:
    """Make both files under temporary names, then rename them, then write the manifest."""
    train_path, val_path, manifest_path = dataset_paths(dataset_id, dataset_dir)
    counts = {train_path: num_episodes, val_path: max(num_episodes // 10, 1)}
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in counts}
    began = time.perf_counter()
    try:
        files = _write_files(dataset_id, seed, {temporary[path]: counts[path] for path in counts}, jobs, progress)
        manifest_path.unlink(missing_ok=True)  # from here to the end the folder holds no complete dataset
        for path in counts:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    manifest = _manifest(dataset_id, num_episodes, seed, files, time.perf_counter() - began)
    utils.write_text_atomic(manifest_path, json.dumps(manifest, indent=2) + "\n")


def _already_made(dataset_id: str, num_episodes: int, seed: int, dataset_dir: Any, overwrite: bool) -> bool:
    """Whether this very dataset is there. Raises UserError when another one is, unless it may be replaced."""
    manifest = read_manifest(dataset_id, dataset_dir)
    if manifest is None:
        return False
    if (manifest.get("seed"), manifest.get("num_episodes")) == (seed, num_episodes):
        return True
    if overwrite:
        return False
    raise UserError(
        f"{dataset_paths(dataset_id, dataset_dir)[0]} holds {manifest.get('num_episodes')} episodes of seed "
        f"{manifest.get('seed')}, not {num_episodes} of seed {seed}; replace it with --overwrite or choose another "
        "--dataset_dir"
    )


def _write_files(
    dataset_id: str, seed: int, counts: dict[Path, int], jobs: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """Make the episodes and write one npz a split; returns what the manifest says of each, in the same order."""
    tasks = [(dataset_id, seed, split, index) for split, n in enumerate(counts.values()) for index in range(n)]
    episodes = make_episodes(tasks, jobs)
    if progress:
        episodes = utils.progress(episodes, dataset_id, total=len(tasks), unit="episode")
    source = iter(episodes)
    described = {}
    for path, count in counts.items():
        made = [next(source) for _ in range(count)]
        arrays = {key: np.concatenate([episode[key] for episode in made]) for key in made[0]}
        with open(path, "wb") as file:
            # numpy dates the members 1980, so equal arrays give equal bytes.
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        load_arrays(path)
        name = path.name.removeprefix(".").removesuffix(".tmp")
        data = path.read_bytes()
        described[name] = {
            "episodes": count,
            "rows": len(arrays["terminals"]),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    # Run the source to its end, so that the bar and the pool close.
    for _ in source:
        raise AssertionError("more episodes than were asked for")
    return described


def _manifest(dataset_id: str, num_episodes: int, seed: int, files: dict[str, Any], seconds: float) -> dict[str, Any]:
    dataset, recipe = find_recipe(dataset_id)
    versions = {package: importlib.metadata.version(package) for package in ("numpy", "mujoco", "gymnasium", "ogbench")}
    goals = {
        "navigate": "a new goal from the cells outside corridors whenever one is reached",
        "stitch": f"one goal exactly {STITCH_CELLS} cells from the start",
    }
    return {
        "id": dataset_id,
        "recipe": f"OGBench {dataset.task_type}: oracle waypoints, start in any free cell, {goals[dataset.task_type]}",
        "noise": recipe.noise,
        "seed": seed,
        "num_episodes": num_episodes,
        "rows_per_episode": recipe.rows[dataset.task_type],
        "files": files,
        "versions": {"python": platform.python_version(), **versions},
        "seconds": round(seconds, 2),
    }


def main(argv: list[str] | None = None) -> None:
    config = utils.parse_config(MakeDatasetConfig, argv, "Generate an OGBench maze dataset on this machine.")
    path = generate(
        config.dataset,
        config.num_episodes,
        config.seed,
        config.dataset_dir,
        config.jobs,
        overwrite=config.overwrite,
    )
    print(path)


if __name__ == "__main__":
    utils.run_cli(main)
