"""The walker study's episodes made on this machine: `local/walker_{walk,run}-td3-{medium,medium-replay}`.

Policies sampled as they acted in training fill episodes of 1000 steps, in the layout of dmc_utils.py.

    medium          the snapshots nearest to the study's return: 963 (walk), 318 (run)
    medium-replay   the snapshots up to there, in the order of training, in shares that give 930 (walk), 251 (run)

Deviations: medium-replay is played by snapshots, not cut from one replay buffer, and leaves out the first steps of
training, whose returns the study's mean has no room for. No snapshot of run returns 318: two share its medium. The
policies were trained with SAC; the names say td3 because the study's collectors were.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from benchmark_data import experts
from benchmark_data.experts import describe_returns
from benchmark_data.generation import Family, Plan, run_tasks
from dmc_utils import DATASETS, EPISODE_STEPS, GENERATED_IDS, WalkerEnv, episode_path, write_episode

# Training step of a snapshot -> its share of the episodes, in order of training; sum 1.
SHARES = {
    "local/walker_walk-td3-medium": {200_000: 1.0},
    "local/walker_walk-td3-medium-replay": {130_000: 0.28, 150_000: 0.3, 200_000: 0.42},
    "local/walker_run-td3-medium": {80_000: 0.48, 90_000: 0.52},
    "local/walker_run-td3-medium-replay": {70_000: 0.35, 80_000: 0.46, 90_000: 0.19},
}


def snapshot_steps(dataset_id: str, size: int) -> list[int]:
    """Training step of the policy that plays each of `size` episodes, in the order of training."""
    steps, shares = zip(*SHARES[dataset_id].items(), strict=True)
    middles = (np.arange(size) + 0.5) / size
    return [steps[index] for index in np.searchsorted(np.cumsum(shares)[:-1], middles)]


@functools.lru_cache(maxsize=1)
def _env(task: str) -> WalkerEnv:
    return WalkerEnv(task)  # once a process


@functools.lru_cache(maxsize=1)
def _policy(plan: Plan, step: int) -> experts.Policy:
    return experts.read_policy(experts.policy_path(plan.experts_dir, f"walker_{plan.dataset.task}", step))


def play_episode(env: WalkerEnv, policy: experts.Policy, seed: np.random.SeedSequence) -> dict[str, np.ndarray]:
    """One episode of 1001 rows, laid out as dmc_utils.py says, with actions sampled from the policy."""
    start, noise = seed.spawn(2)
    rng = np.random.default_rng(noise)
    observation, info = env.reset(seed=int(start.generate_state(1)[0]))
    rows = [(observation, np.zeros(env.action_space.shape), 0.0, 1.0, info["physics"])]
    truncated = False
    while not truncated:
        action = policy.act(observation, rng)
        observation, reward, terminated, truncated, info = env.step(action)
        rows.append((observation, action, reward, 1.0 - terminated, info["physics"]))
    keys = ("observation", "action", "reward", "discount", "physics")
    columns = dict(zip(keys, zip(*rows, strict=True), strict=True))
    return {key: np.array(values, np.float32).reshape(len(rows), -1) for key, values in columns.items()}


def _make_episode(task: tuple[Plan, int, int, Path]) -> float:
    """Play and write episode `index` with the snapshot of `step`; returns its return."""
    plan, index, step, folder = task
    # The dataset is in the key, because two of a task share snapshots and would share episodes.
    seed = np.random.SeedSequence(plan.seed, spawn_key=(GENERATED_IDS.index(plan.dataset_id), index))
    episode = play_episode(_env(plan.dataset.task), _policy(plan, step), seed)
    write_episode(episode_path(folder, index), episode)
    return float(episode["reward"].sum(dtype=np.float64))


class WalkerFamily(Family):
    """See `generation.Family`: a folder of episode files in the study's layout."""

    ids = GENERATED_IDS
    unit, size = "episodes", 100

    def policies(self, dataset_id: str, experts_dir: Path) -> list[Path]:
        robot = f"walker_{DATASETS[dataset_id].task}"
        return [experts.policy_path(experts_dir, robot, step) for step in SHARES[dataset_id]]

    def write(self, plan: Plan, stage: Path) -> dict[str, Any]:
        steps, folder = snapshot_steps(plan.dataset_id, plan.size), stage / plan.dataset.name
        tasks = [(plan, index, step, folder) for index, step in enumerate(steps)]
        returns = list(run_tasks(_make_episode, tasks, plan))
        algorithms = experts.algorithms(self.policies(plan.dataset_id, plan.experts_dir))
        return {
            "recipe": f"dm_control walker-{plan.dataset.task}: {EPISODE_STEPS} steps an episode, actions sampled from "
            f"snapshots, in the order of training, of a policy trained with {algorithms}; the name says td3 because "
            "the study's own data were collected by TD3",
            "episodes": plan.size,
            "transitions": plan.size * EPISODE_STEPS,
            "returns": describe_returns(returns),
        }
