"""Evaluation of OPSO on a maze's five tasks: success, the paths over the maze, a film."""

import contextlib
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from ogbench_utils import NUM_TASKS, make_env, max_episode_steps, seeded_reset
from online_agent import Acting, OnlineAgent
from opso.episodes import TRAIN_SEED_OFFSET, Episode, GoalEnv, episode_code, rollout
from opso.maze import Maze
from opso.policy import MazePolicy
from opso.search import Planner, StateGraph
from runs.evaluation import Evaluator, num_workers
from runs.plots import plot_paths
from utils import RandomStreams, UserError, counted, progress, resolve_device, write_text_atomic

EVAL_ENVS = 20  # evaluation episodes at once
VIDEO_SKIP = 3  # environment steps a frame
TASKS = range(1, NUM_TASKS + 1)


def open_evaluator(config: Any, dataset: str) -> Evaluator:
    """Environments for rounds of episodes and for evaluations, by the settings of online_trainer.py."""
    make_env = functools.partial(GoalEnv, dataset, max_episode_steps(dataset))
    return Evaluator(make_env, max(config.num_envs, EVAL_ENVS), num_workers(config.eval_workers))


class Evaluation:
    """Episodes of the five tasks, without exploration or noise, and their pictures.

    The same episodes every time: one depends on the seed, its task and its number alone, but for rounding, as states
    are encoded together.
    """

    def __init__(self, evaluator: Evaluator, dataset: str, seed: int):
        self.evaluator, self.dataset, self.seed = evaluator, dataset, seed
        self.episodes: dict[int, list[Episode]] = {}  # those of the last run, by task

    def reset_seed(self, number: int) -> int:
        """Of the number-th episode of each task; training resets use TRAIN_SEED_OFFSET and more."""
        return (self.seed + number) % TRAIN_SEED_OFFSET

    def run(
        self, agent: OnlineAgent, graph: StateGraph, episodes: int, acting: Acting | None = None
    ) -> dict[str, float]:
        """Play `episodes` episodes of each task; returns success in all and by task, and the mean length.

        Names begin with eval/, or eval/{acting}/ where it acts otherwise than its settings say.
        """
        jobs = [(task, self.reset_seed(number)) for number in range(episodes) for task in TASKS]
        self.episodes = {task: [] for task in TASKS}
        with progress(len(jobs), "evaluate", unit="episode", leave=False) as bar:
            for start in range(0, len(jobs), EVAL_ENVS):
                part = jobs[start : start + EVAL_ENVS]
                seeds = [seed * NUM_TASKS + task for task, seed in part]
                planner_for = functools.partial(Planner, agent, graph, seeds=seeds, acting=acting)
                codes = [episode_code(seed, task) for task, seed in part]
                played, _ = rollout(self.evaluator, codes, planner_for, bar.update)
                for (task, _), episode in zip(part, played, strict=True):
                    self.episodes[task].append(episode)
        success = {f"success_task{task}": self.success(task) for task in TASKS}
        steps = [len(episode.actions) for played in self.episodes.values() for episode in played]
        mean = float(np.mean(list(success.values())))
        figures = {"success_rate": mean, **success, "episode_steps": float(np.mean(steps))}
        return {f"eval/{acting}/{name}" if acting else f"eval/{name}": value for name, value in figures.items()}

    def run_all(
        self, agent: OnlineAgent, graph: StateGraph, episodes: int, others: Sequence[Acting] | None
    ) -> dict[str, float]:
        """`run` for each other way of acting, then for the agent's own, whose episodes are those of the pictures."""
        metrics = {}
        for acting in (*dict.fromkeys(others or ()), None):
            if acting != agent.config.acting:
                metrics |= self.run(agent, graph, episodes, acting)
        return metrics

    def success(self, task: int) -> float:
        """Share of a task's episodes that reached the goal."""
        return float(np.mean([episode.success for episode in self.episodes[task]]))

    def record_video(self, path: Path) -> None:
        """The first episode of each task as an MP4, its actions replayed from the same reset."""
        env, imageio = open_video(self.dataset)
        part = path.with_suffix(f".part{path.suffix}")
        with contextlib.closing(env), imageio.get_writer(part, fps=30) as writer:
            for task, played in progress(self.episodes.items(), "video", unit="episode"):
                seeded_reset(env, self.reset_seed(0), {"task_id": task})
                for step, action in enumerate(played[0].actions):
                    env.step(action)
                    if step % VIDEO_SKIP == 0:
                        writer.append_data(env.render())
        part.replace(path)

    def plot(self, path: Path, nodes: np.ndarray, title: str) -> None:
        """The paths over the maze, and of nodes [n, 2] those that the first episode of each task aimed at."""
        panels = []
        for task, played in self.episodes.items():
            chosen = played[0].subgoals
            panels.append(
                {
                    "name": f"task {task}: {self.success(task):.0%}",
                    "paths": [episode.observations[:, :2] for episode in played],
                    "success": [episode.success for episode in played],
                    "goal_xy": played[0].goal[:2],
                    "subgoals": nodes[chosen[(chosen >= 0) & (chosen < len(nodes))]],
                }
            )
        with contextlib.closing(make_env(self.dataset)) as env:
            plot_paths(Maze.from_env(env), panels, path, title)


def open_video(dataset: str) -> tuple[gymnasium.Env, Any]:
    """An environment that renders without a display, and imageio with its MP4 writer; UserError without either."""
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise UserError("--record_video needs imageio-ffmpeg: pip install -r requirements/video.txt") from None
    chosen = os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = make_env(dataset, render_mode="rgb_array", width=320, height=320)
        seeded_reset(env, 0)
        env.render()
    except Exception as error:  # each OpenGL library fails in its own way
        raise UserError(
            f"--record_video: cannot render with MUJOCO_GL={chosen} ({type(error).__name__}); it needs EGL (a GPU's "
            "driver) or OSMesa (libosmesa6 and MUJOCO_GL=osmesa); leave --record_video out where there is neither"
        ) from None
    return env, imageio


def evaluate_file(config: Any) -> None:
    """`--evaluate`: the episodes that the run's own evaluation takes, as many as asked for, in a folder beside it."""
    policy = MazePolicy(config.evaluate, resolve_device(config.device))
    if policy.agent is None:
        raise UserError(f"{policy.path}: not a policy of online_trainer.py; give the best_model.pth of one of its runs")
    dataset, seed = policy.dataset, policy.config["seed"]
    if config.record_video:
        open_video(dataset)[0].close()
    folder = Path(config.run_dir or policy.path.parent / "evaluation")
    with open_evaluator(config, dataset) as evaluator:
        evaluation = Evaluation(evaluator, dataset, RandomStreams(seed).evaluation_seed)
        metrics = evaluation.run_all(policy.agent, policy.graph, config.eval_episodes, config.eval_acting)
    write_text_atomic(folder / "evaluation.json", json.dumps({"dataset": dataset, **metrics}, indent=2) + "\n")
    actions, states = policy.config["inverse_dynamics_data"], policy.state["data_states"]
    title = f"{dataset} ({states:,} states), {actions} actions, {policy.config['acting']}, seed {seed}"
    evaluation.plot(folder / "paths.png", policy.state["nodes"][:, :2].cpu().numpy(), title)
    if config.record_video:
        evaluation.record_video(folder / "evaluation.mp4")
    print(f"{title}: {policy.path}, after {counted(policy.state['episodes'])} of its own")
    print_metrics(metrics)
    print(f"outputs in {folder}: evaluation.json, paths.png{', evaluation.mp4' if config.record_video else ''}")


def print_metrics(metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        print(f"  {name}: {value:.3f}")
