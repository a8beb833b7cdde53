"""OPSO's episodes, played in environments that the evaluator spreads over processes."""

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium
import numpy as np

from ogbench_utils import NUM_TASKS, make_env, seeded_reset
from opso.search import Planner
from runs.evaluation import Evaluator

TRAIN_SEED_OFFSET = 10**6  # training episodes are reset with seeds from here on, evaluation with those below


class GoalEnv(gymnasium.Wrapper):
    """A dataset's maze whose observation [2 D] is the state and then the goal, and whose episodes end at success.

    `reset(seed=...)` takes what `episode_code` makes of a seed and a task.
    """

    def __init__(self, dataset: str, max_episode_steps: int | None = None):
        super().__init__(make_env(dataset, max_episode_steps=max_episode_steps))
        size = 2 * self.env.observation_space.shape[0]
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self, *, seed: int, options: dict | None = None):
        seed, task = divmod(seed, NUM_TASKS + 1)
        state, info = seeded_reset(self.env, seed, {"task_id": task} if task else {})
        self.goal = np.asarray(info["goal"], np.float32)
        return np.concatenate([state, self.goal]), info

    def step(self, action: np.ndarray):
        state, reward, terminated, truncated, info = self.env.step(action)
        state = np.asarray(state, np.float32)
        return np.concatenate([state, self.goal]), reward, terminated or bool(info["success"]), truncated, info


def episode_code(seed: int, task: int | None = None) -> int:
    """One number for a reset seed and a task (1..5, or None for a random one)."""
    return seed * (NUM_TASKS + 1) + (task or 0)


class RandomPolicy:
    """Acts as `Planner` does, uniformly in [-1, 1], anew at each step; aims at nothing."""

    def __init__(self, seeds: list[int], action_dim: int):
        self.generators = [np.random.default_rng([seed, 1]) for seed in seeds]  # not the environment's own
        self.action_dim, self.chosen = action_dim, np.full(len(seeds), -2)

    def act(self, observations: np.ndarray, live: np.ndarray) -> np.ndarray:
        actions = [self.generators[env].uniform(-1, 1, self.action_dim) for env in live]
        return np.stack(actions).astype(np.float32)


@dataclass
class Episode:
    """What one episode left."""

    observations: np.ndarray  # [T + 1, D] float32
    actions: np.ndarray  # [T, A] float32
    goal: np.ndarray  # [D] float32
    subgoals: np.ndarray  # [T] int, the node aimed at
    reward: float  # sum over the episode
    success: bool


def rollout(
    evaluator: Evaluator,
    codes: list[int],
    policy_for: Callable[[np.ndarray], Planner | RandomPolicy],
    ended: Callable[[int], object] = lambda count: None,
) -> tuple[list[Episode], Planner | RandomPolicy]:
    """One episode for each code at once, to success or the time limit. Returns them, and the policy that acted.

    policy_for(goals [E, D]) makes the policy. ended(count) is told how many episodes have just ended.
    """
    steps: list[tuple[np.ndarray, ...]] = []
    policy, playing = None, len(codes)

    def policies(observations: np.ndarray, alive: np.ndarray) -> np.ndarray:
        nonlocal policy, playing
        states, goals = np.split(observations[0], 2, axis=-1)
        policy = policy or policy_for(goals)
        live = np.flatnonzero(alive[0])
        acted = policy.act(states[live], live)
        actions = np.zeros((len(states), acted.shape[1]), np.float32)
        actions[live] = acted
        steps.append((states, actions, policy.chosen.copy()))
        if len(live) < playing:
            ended(playing - len(live))
            playing = len(live)
        return actions[None]

    played = evaluator.evaluate(policies, 1, codes)
    ended(playing)
    states, actions, chosen = (np.stack(each, axis=1) for each in zip(*steps, strict=True))
    episodes = []
    for env, (length, last) in enumerate(zip(played.lengths[0], played.last_observations[0], strict=True)):
        state, goal = np.split(last, 2)
        seen, reward = np.concatenate([states[env, :length], state[None]]), float(played.returns[0, env])
        success = bool(played.successes[0, env])
        episodes.append(Episode(seen, actions[env, :length], goal, chosen[env, :length], reward, success))
    return episodes, policy
