"""OPSO's episodes: played in environments that the evaluator spreads over processes; their pictures and films."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np

from ogbench_utils import NUM_TASKS, make_env, seeded_reset
from online_agent import OnlineAgent
from opso.maze import Maze
from opso.search import Planner, StateGraph
from runs.evaluation import Evaluator
from runs.plots import plot_paths
from utils import UserError, progress

TRAIN_SEED_OFFSET = 10**6  # training episodes are reset with seeds from here on, evaluation with those below
EVAL_ENVS = 20  # evaluation episodes at once
VIDEO_SKIP = 3  # environment steps a frame


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
        # Not the seeds themselves: the environment's numbers come from those.
        self.generators = [np.random.default_rng([seed, 1]) for seed in seeds]
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


class Evaluation:
    """Episodes of the five tasks, without exploration or noise, and their pictures.

    The same episodes every time: one depends on the seed, its task and its number alone, but for rounding, as states
    are encoded together.
    """

    def __init__(self, evaluator: Evaluator, dataset: str, seed: int):
        self.evaluator, self.dataset, self.seed = evaluator, dataset, seed
        self.episodes: list[tuple[int, Episode]] = []  # those of the last run: task and episode

    def reset_seed(self, number: int) -> int:
        """Of the number-th episode of each task; training resets use TRAIN_SEED_OFFSET and more."""
        return (self.seed + number) % TRAIN_SEED_OFFSET

    def run(self, agent: OnlineAgent, graph: StateGraph, episodes: int) -> dict[str, float]:
        """Play `episodes` episodes of each task; returns success in all and by task, and the mean length."""
        jobs = [(task, self.reset_seed(number)) for number in range(episodes) for task in range(1, NUM_TASKS + 1)]
        self.episodes = []
        with progress(len(jobs), "evaluate", unit="episode", leave=False) as bar:
            for start in range(0, len(jobs), EVAL_ENVS):
                part = jobs[start : start + EVAL_ENVS]
                seeds = [seed * NUM_TASKS + task for task, seed in part]
                played, _ = rollout(
                    self.evaluator,
                    [episode_code(seed, task) for task, seed in part],
                    lambda goals, seeds=seeds: Planner(agent, graph, goals, seeds),
                    bar.update,
                )
                self.episodes += zip([task for task, _ in part], played, strict=True)
        by_task = {
            f"eval/success_task{task}": float(np.mean([episode.success for episode in self.of_task(task)]))
            for task in range(1, NUM_TASKS + 1)
        }
        steps = float(np.mean([len(episode.actions) for _, episode in self.episodes]))
        return {"eval/success_rate": float(np.mean(list(by_task.values()))), **by_task, "eval/episode_steps": steps}

    def of_task(self, task: int) -> list[Episode]:
        """The episodes of one task, in the order of their seeds."""
        return [episode for number, episode in self.episodes if number == task]

    def record_video(self, path: Path) -> None:
        """The first episode of each task as an MP4, its actions replayed from the same reset."""
        env = renderer(self.dataset)
        part = path.with_suffix(f".part{path.suffix}")
        with contextlib.closing(env), find_video_writer().get_writer(part, fps=30) as writer:
            for task in progress(range(1, NUM_TASKS + 1), "video", unit="episode"):
                seeded_reset(env, self.reset_seed(0), {"task_id": task})
                for step, action in enumerate(self.of_task(task)[0].actions):
                    env.step(action)
                    if step % VIDEO_SKIP == 0:
                        writer.append_data(env.render())
        part.replace(path)

    def plot(self, path: Path, nodes: np.ndarray, title: str) -> None:
        """The paths over the maze, and of nodes [n, 2] those that the first episode of each task aimed at."""
        panels = []
        for task in range(1, NUM_TASKS + 1):
            played = self.of_task(task)
            chosen = played[0].subgoals
            success = [episode.success for episode in played]
            panels.append(
                {
                    "name": f"task {task}: {np.mean(success):.0%}",
                    "paths": [episode.observations[:, :2] for episode in played],
                    "success": success,
                    "goal_xy": played[0].goal[:2],
                    "subgoals": nodes[chosen[(chosen >= 0) & (chosen < len(nodes))]],
                }
            )
        with contextlib.closing(make_env(self.dataset)) as env:
            plot_paths(Maze.from_env(env), panels, path, title)


def renderer(dataset: str) -> gymnasium.Env:
    """An environment that renders without a display. Raises UserError where nothing here can."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    chosen = os.environ["MUJOCO_GL"]
    try:
        env = make_env(dataset, render_mode="rgb_array", width=320, height=320)
        seeded_reset(env, 0)
        env.render()
    except Exception as error:  # each OpenGL library fails in its own way
        raise UserError(
            f"--record_video: cannot render with MUJOCO_GL={chosen} ({type(error).__name__}); it needs EGL (a GPU's "
            "driver) or OSMesa (libosmesa6 and MUJOCO_GL=osmesa); leave --record_video out where there is neither"
        ) from None
    return env


def check_video(dataset: str) -> None:
    """Raises UserError where no film can be made."""
    renderer(dataset).close()
    find_video_writer()


def find_video_writer():
    """imageio with its MP4 writer; raises UserError without the package."""
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise UserError("--record_video needs imageio-ffmpeg: pip install -r requirements/video.txt") from None
    return imageio
