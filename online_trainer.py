"""Imitate from states alone: reach goals in a maze with a pretrained OPSO model, through inverse dynamics.

Needs the model that offline_trainer.py leaves for the same dataset. With no flag: local/pointmaze-medium-navigate-v0,
strict state-only (actions come from the agent's own episodes), minutes on two cores. A run's directory holds
config.yaml, metrics.csv, TensorBoard events, best_model.pth (highest success rate), checkpoints/last.pth,
online_training_curves.png and paths.png.

    python online_trainer.py --inverse_dynamics_data offline --max_episodes 0    # the offline-only policy
    python online_trainer.py --evaluate RUN/best_model.pth    # a saved policy once more
"""

import contextlib
import functools
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmark_data.local import generate_if_missing
from model import OfflineModel
from model_kernels import KernelConfig, use_kernels
from ogbench_utils import (
    NUM_TASKS,
    Maze,
    TrajectoryDataset,
    hindsight_goals,
    make_env,
    max_episode_steps,
    parse_dataset_id,
    seeded_reset,
)
from online_agent import Navigator, OnlineAgent, OnlineAgentConfig, StateGraph
from runs.cli import check_bounds, parse_config, run_cli
from runs.directory import (
    check_run,
    hold_run,
    load_checkpoint,
    mark_finished,
    plain_config,
    prepare_run,
    save_checkpoint,
)
from runs.metrics import MetricLogger, RunningMeans, read_metrics
from runs.plots import plot_online_curves, plot_paths
from utils import EpisodeReplay, RandomStreams, UserError, progress, resolve_device, write_text_atomic

TRAIN_SEED_OFFSET = 10**6  # training episodes are reset with seeds from here on, evaluation with those below


@dataclass
class OnlineTrainerConfig(KernelConfig, OnlineAgentConfig):
    dataset: str = "local/pointmaze-medium-navigate-v0"  # OGBench id, or local/<id> for one generated here
    dataset_dir: str | None = None  # folder of the data; default OGBENCH_DATASET_DIR, else datasets/ beside the code
    offline_run_dir: str | None = None  # run of offline_trainer.py; default logs/offline/<dataset>/seed_<seed>
    offline_checkpoint: Literal["last", "best"] = "last"  # which of its models: last, or best (lowest validation loss)
    inverse_dynamics_data: Literal["online", "offline"] = "online"  # own actions alone; offline: the dataset's too
    max_trajectories: int | None = None  # use the dataset's first so many episodes; default: those of the pretraining
    max_episodes: int = 64  # episodes to act in; 0 fits on the dataset and evaluates
    num_envs: int = 8  # environments at once; a round is one episode in each
    batch_size: int = 8  # an update draws batch_size x transitions_per_window transitions from each source
    transitions_per_window: int = 64  # see batch_size
    subgoal_steps: int | None = None  # how far ahead z' lies; default 10 for the point, 25 for ants and humanoids
    metric_steps: int | None = None  # the metric learns from states 1..so many steps apart; default 10, or 25
    metric_updates: int | None = None  # of 512 pairs each, before everything else; default 1500, or 3000
    fit_updates: int | None = None  # updates on the dataset, once its actions are known; default 1500, or 4000
    label_updates: int | None = None  # of the labeller, after the random rounds; default 1500, or 6000
    relabel_updates: int = 500  # of the labeller after each later round, before the dataset is labelled anew
    label_lr: float = 1e-3  # of the labeller, decaying to a fiftieth; half as high after later rounds
    updates_per_round: int = 250  # updates after each round of episodes
    random_steps: int | None = None  # rounds that begin before so many steps act at random; default 2000, or 32000
    replay_episodes: int = 200  # own episodes kept
    epsilon_start: float = 0.30  # probability of exploring straight towards the goal, in the first round
    epsilon_end: float = 0.05  # and in the last
    action_noise_start: float = 0.20  # standard deviation of the noise on actions, in the first round
    action_noise_end: float = 0.05  # and in the last
    eval_freq: int = 4  # rounds between evaluations; each one writes a checkpoint
    eval_episodes: int = 20  # episodes of each of the five tasks at the end
    eval_episodes_between: int = 4  # and in the evaluations on the way
    seed: int = 0  # of initialisation, sampling, acting and evaluation, each its own stream
    device: str = "auto"  # auto, cpu or cuda
    run_dir: str | None = None  # default logs/online/<dataset>/<inverse_dynamics_data>/seed_<seed>
    resume: bool = False  # continue the run in run_dir from its last checkpoint
    tensorboard: bool = True  # write TensorBoard events
    wandb_project: str | None = None  # also log to Weights & Biases (requirements/tracking.txt)
    record_video: bool = False  # write evaluation.mp4, an episode of each task (needs EGL or OSMesa)
    evaluate: str | None = None  # train nothing: evaluate this best_model.pth or last.pth, on --eval_episodes a task


# What each number may be: smallest and largest value, ends included.
BOUNDS = {
    **dict.fromkeys(("horizon", "subgoal_steps", "replan_every", "patience", "batch_size", "num_links"), (1, 10**9)),
    **dict.fromkeys(
        ("transitions_per_window", "num_envs", "replay_episodes", "eval_freq", "metric_steps", "metric_dim"), (1, 10**9)
    ),
    **dict.fromkeys(("eval_episodes", "eval_episodes_between", "max_trajectories"), (1, 10**9)),
    **dict.fromkeys(
        ("max_episodes", "fit_updates", "updates_per_round", "random_steps", "wander_steps", "seed"), (0, 2**53)
    ),
    "label_updates": (1, 10**9),
    "relabel_updates": (0, 10**9),
    "graph_nodes": (2, 10**6),
    "metric_updates": (1, 10**9),
    **dict.fromkeys(("lr", "metric_lr", "label_lr", "max_weight", "aim_steps", "trusted_steps"), (1e-9, 1e9)),
    **dict.fromkeys(("link_cost", "bar_steps"), (0.0, 1e9)),
    **dict.fromkeys(("state_temperature", "action_temperature", "action_noise_start", "action_noise_end"), (0.0, 1e3)),
    **dict.fromkeys(("expectile", "epsilon_start", "epsilon_end", "p_self", "p_future", "p_random"), (0.0, 1.0)),
    "tau": (1e-9, 1.0),
    "goal_discount": (0.0, 1 - 1e-9),
}
# What None stands for, by robot: a step of the point goes farther than an ant's.
BY_ROBOT = {
    "pointmaze": {
        **{"subgoal_steps": 10, "metric_steps": 10, "metric_updates": 1500, "fit_updates": 1500},
        **{"random_steps": 2000, "label_updates": 1500},
    },
    "antmaze": {
        **{"subgoal_steps": 25, "metric_steps": 25, "metric_updates": 3000, "fit_updates": 4000},
        **{"random_steps": 32_000, "label_updates": 6000},
    },
}
BY_ROBOT["humanoidmaze"] = BY_ROBOT["antmaze"]
MAY_CHANGE_ON_RESUME = {"dataset_dir", "offline_run_dir", "device", "tensorboard", "wandb_project", "record_video"}
NOT_THE_MODEL = {"resume", "run_dir", "evaluate", *MAY_CHANGE_ON_RESUME}
EVAL_ENVS = 20  # evaluation episodes at once
NODES_PER_AIM = 2  # nodes of the graph that aim_steps span at least
METRIC_PAIRS = 512  # in an update of the metric
LABEL_PAIRS = 512  # in an update of the labeller
VIDEO_SKIP = 3  # environment steps a frame


def check(config: OnlineTrainerConfig) -> None:
    """One line for a setting that cannot work, before anything is loaded."""
    parse_dataset_id(config.dataset)
    check_bounds(config, BOUNDS)
    if abs(config.p_self + config.p_future + config.p_random - 1) > 1e-6:
        raise UserError(f"--p_self {config.p_self} --p_future {config.p_future} --p_random {config.p_random}: sum to 1")
    if config.inverse_dynamics_data == "online" and config.max_episodes == 0:
        raise UserError(
            "--max_episodes 0 --inverse_dynamics_data online: no action is ever seen; use --inverse_dynamics_data "
            "offline for the policy without interaction, or --max_episodes above 0"
        )


def resolve(config: OnlineTrainerConfig) -> OnlineTrainerConfig:
    """The settings with every None that depends on the robot filled in."""
    chosen = BY_ROBOT[parse_dataset_id(config.dataset).maze_env]
    return replace(config, **{name: value for name, value in chosen.items() if getattr(config, name) is None})


# -- the pretrained model ------------------------------------------------------------------------------------------


def offline_command(config: OnlineTrainerConfig, folder: str | None = None) -> str:
    """The command that makes the pretrained model this run asks for, in a folder other than the usual one if given."""
    flags = [f" --dataset {config.dataset}"] if config.dataset != OnlineTrainerConfig.dataset else []
    flags += [f" --dataset_dir {shlex.quote(config.dataset_dir)}"] if config.dataset_dir else []
    flags += [f" --seed {config.seed}"] if config.seed else []
    flags += [f" --run_dir {shlex.quote(folder)}"] if folder else []
    return "python offline_trainer.py" + "".join(flags)


def load_pretrained(config: OnlineTrainerConfig) -> tuple[OfflineModel, dict[str, Any]]:
    """The EMA model of a run of offline_trainer.py, and that run's settings.

    Raises UserError, naming the command that makes the right one, where there is none, where it is another dataset's
    or not a model of ours, and where it lacks its normaliser.
    """
    folder = Path(config.offline_run_dir or Path("logs") / "offline" / config.dataset / f"seed_{config.seed}")
    path = folder / ("checkpoints/last.pth" if config.offline_checkpoint == "last" else "best_model.pth")
    remedy = f"make it with `{offline_command(config, config.offline_run_dir)}`"
    if not path.exists():
        raise UserError(f"{path}: no pretrained model; {remedy}")
    state = load_checkpoint(path)
    if state.get("dataset") != config.dataset:
        other = "" if config.offline_run_dir is None else ", and leave --offline_run_dir out"
        raise UserError(
            f"{path}: pretrained on {state.get('dataset')}, not on {config.dataset}; make it with "
            f"`{offline_command(config)}`{other}"
        )
    try:
        weights = state["agent"]["target"] if config.offline_checkpoint == "last" else state["target"]
        settings = state["config"]
        # The weights are the same for every backend; the one that fits this machine is taken.
        shape = {name: settings[name] for name in ("n_layers", "d_state", "d_conv", "expand")}
        model = OfflineModel(state["observation_dim"], settings["d_model"], settings["hidden_dim"], **shape)
        absent = [f"encoder.{name}" for name in ("mean", "std") if f"encoder.{name}" not in weights]
        if absent:
            raise UserError(f"{path}: holds no normaliser ({', '.join(absent)} absent); {remedy}")
        model.load_state_dict(weights)
        settings["discount"], settings["hidden_dim"], settings["max_trajectories"]  # noqa: B018  the run needs them
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a model of offline_trainer.py ({reason}); {remedy}") from None
    if not 0 < settings["discount"] < 1:
        raise UserError(f"{path}: pretrained with --discount {settings['discount']}, which counts no steps; {remedy}")
    if not (folder / "finished.json").exists():
        print(f"{folder}: this pretraining is not finished; what it has learned so far is used", file=sys.stderr)
    return model, settings


# -- data: features of single states, encoded once --------------------------------------------------------------------


@dataclass
class CodeSet:
    """The dataset as features; the same attributes as `EpisodeReplay`, whose states are features too."""

    states: torch.Tensor  # [N, d_model + D]
    actions: torch.Tensor  # [N, A]
    episode_end: torch.Tensor  # [N] int64, inclusive
    transitions: torch.Tensor  # [M] int64, rows that start a transition

    @classmethod
    def from_dataset(cls, data: TrajectoryDataset, agent: OnlineAgent, actions: torch.Tensor) -> "CodeSet":
        """The dataset's states with these actions [N, A]: its own, or those that take their place."""
        rows = torch.arange(len(data.observations), device=data.device)
        starts = rows[rows < data.episode_end]
        return cls(agent.encode(data.observations), actions, data.episode_end, starts)


def sample_batch(
    source: CodeSet | EpisodeReplay,
    agent: OnlineAgent,
    count: int,
    acted: bool,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """`count` transitions with hindsight goals, horizons and subgoals, as `OnlineAgent.update` takes them.

    The inverse dynamics aims 1..subgoal_steps ahead, drawn; the proposer exactly subgoal_steps, or at the goal where
    that comes first. Nothing crosses an episode's end. `acted` says whether the actions may be read.
    """
    config, device = agent.config, source.states.device

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator, device=device)

    rows = source.transitions[draw(0, len(source.transitions))]
    goals, steps_to_goal = hindsight_goals(
        rows, source.episode_end, source.transitions, config.p_self, config.p_future, config.goal_discount, generator
    )
    remaining = source.episode_end[rows] - rows
    n = torch.minimum(draw(1, config.horizon + 1), remaining)
    sub = torch.minimum(draw(1, config.subgoal_steps + 1), remaining)
    far = torch.minimum(remaining, steps_to_goal).clamp(max=config.subgoal_steps)
    at = torch.stack([rows, rows + 1, rows + n - 1, rows + n, rows + sub, rows + far, goals])
    names = ("", "_next", "_before", "_ahead", "_sub", "_far", "_goal")
    features = dict(zip(names, source.states[at], strict=True))
    batch = {f"z{name}": agent.code(x) for name, x in features.items()}
    batch |= {f"x{name}": features[name] for name in ("", "_sub", "_goal")}
    batch |= {"steps_to_goal": steps_to_goal, "n": n, "sub_steps": sub, "far_steps": far}
    actions = source.actions[rows] if acted else torch.zeros_like(source.actions[rows])
    known = torch.full((count,), float(acted), device=device)
    return batch | {"actions": actions, "acted": known}


def sample_pairs(
    source: CodeSet, metric_steps: int, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [count, F] of states and of those 1..metric_steps later, or at the episode's end; steps [count]."""
    device = source.states.device
    number = torch.randint(0, len(source.transitions), (count,), generator=generator, device=device)
    rows = source.transitions[number]
    steps = torch.randint(1, metric_steps + 1, (count,), generator=generator, device=device)
    steps = torch.minimum(steps, source.episode_end[rows] - rows)
    return source.states[rows], source.states[rows + steps], steps


# -- episodes ------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """What one episode left."""

    observations: np.ndarray  # [T + 1, D] float32
    actions: np.ndarray  # [T, A] float32
    goal: np.ndarray  # [D] float32
    subgoals: np.ndarray  # [T] int, the node aimed at
    reward: float  # sum over the episode
    success: bool


class EnvPool:
    """Several environments of one dataset, stepped in turn; built at first use and kept."""

    def __init__(self, dataset: str):
        self.dataset, self.envs = dataset, []

    def play(self, seeds: list[int], tasks: list[int | None], policy_for, ended=lambda count: None) -> list[Episode]:
        """One episode in each of len(seeds) environments, to success or the time limit.

        policy_for(goals [E, D]) returns the policy: (observations [m, D], live [m]) -> actions [m, A], chosen [m].
        ended(count) is told how many episodes have just come to their end.
        """
        while len(self.envs) < len(seeds):
            self.envs.append(make_env(self.dataset))
        resets = [
            seeded_reset(env, seed, {} if task is None else {"task_id": task})
            for env, seed, task in zip(self.envs, seeds, tasks, strict=False)
        ]
        goals = np.stack([np.asarray(info["goal"], np.float32) for _, info in resets])
        policy = policy_for(goals)
        seen: list[list[np.ndarray]] = [[observation] for observation, _ in resets]
        done: list[list[tuple]] = [[] for _ in seeds]
        success = np.zeros(len(seeds), dtype=bool)
        live = np.arange(len(seeds))
        while len(live):
            actions, chosen = policy(np.stack([seen[env][-1] for env in live]), live)
            over = []
            for env, action, subgoal in zip(live, actions, chosen, strict=True):
                observation, reward, terminated, truncated, info = self.envs[env].step(action)
                seen[env].append(np.asarray(observation, dtype=np.float32))
                done[env].append((action, float(reward), subgoal))
                success[env] |= bool(info.get("success", False))
                over.append(terminated or truncated or success[env])
            live = live[~np.array(over)]
            if any(over):
                ended(sum(over))
        return [
            Episode(
                np.stack(states),
                np.stack([action for action, _, _ in steps]),
                goal,
                np.array([subgoal for _, _, subgoal in steps]),
                sum(reward for _, reward, _ in steps),
                bool(reached),
            )
            for states, steps, goal, reached in zip(seen, done, goals, success, strict=True)
        ]

    def close(self) -> None:
        for env in self.envs:
            env.close()
        self.envs.clear()


class Evaluation:
    """Episodes of the five tasks, without exploration or noise, and their pictures.

    The same episodes every time: one depends on the seed, its task and its number alone, but for rounding, as states
    are encoded together.
    """

    def __init__(self, dataset: str, seed: int):
        self.dataset, self.seed, self.envs = dataset, seed, EnvPool(dataset)
        self.episodes: list[tuple[int, Episode]] = []  # those of the last run: task and episode

    def reset_seed(self, number: int) -> int:
        """Of the number-th episode of each task; training resets draw from TRAIN_SEED_OFFSET on."""
        return (self.seed + number) % TRAIN_SEED_OFFSET

    def run(self, agent: OnlineAgent, graph: StateGraph, episodes: int) -> dict[str, float]:
        """Play `episodes` episodes of each task; returns success in all and by task, and the mean length."""
        jobs = [(task, self.reset_seed(number)) for number in range(episodes) for task in range(1, NUM_TASKS + 1)]
        self.episodes = []
        with progress(len(jobs), "evaluate", unit="episode", leave=False) as bar:
            for start in range(0, len(jobs), EVAL_ENVS):
                tasks, seeds = map(list, zip(*jobs[start : start + EVAL_ENVS], strict=True))
                acting = [seed * NUM_TASKS + task for task, seed in zip(tasks, seeds, strict=True)]
                policy_for = functools.partial(navigator_policy, agent, graph, acting)
                self.episodes += zip(tasks, self.envs.play(seeds, tasks, policy_for, bar.update), strict=True)
        by_task = {
            f"eval/success_task{task}": float(np.mean([episode.success for t, episode in self.episodes if t == task]))
            for task in range(1, NUM_TASKS + 1)
        }
        steps = float(np.mean([len(episode.actions) for _, episode in self.episodes]))
        return {"eval/success_rate": float(np.mean(list(by_task.values()))), **by_task, "eval/episode_steps": steps}

    def record_video(self, path: Path) -> None:
        """The first episode of each task as an MP4, its actions replayed from the same reset."""
        env = renderer(self.dataset)
        first = {task: episode for task, episode in reversed(self.episodes)}
        part = path.with_suffix(f".part{path.suffix}")
        with contextlib.closing(env), find_video_writer().get_writer(part, fps=30) as writer:
            for task in progress(sorted(first), "video", unit="episode"):
                seeded_reset(env, self.reset_seed(0), {"task_id": task})
                for step, action in enumerate(first[task].actions):
                    env.step(action)
                    if step % VIDEO_SKIP == 0:
                        writer.append_data(env.render())
        part.replace(path)

    def plot(self, path: Path, nodes: np.ndarray, title: str) -> None:
        """The paths over the maze, and of nodes [n, 2] those that the first episode of each task aimed at."""
        panels = []
        for task in range(1, NUM_TASKS + 1):
            played = [episode for t, episode in self.episodes if t == task]
            chosen = played[0].subgoals
            chosen = chosen[(chosen >= 0) & (chosen < len(nodes))]
            panels.append(
                {
                    "name": f"task {task}: {np.mean([episode.success for episode in played]):.0%}",
                    "paths": [episode.observations[:, :2] for episode in played],
                    "success": [episode.success for episode in played],
                    "goal_xy": played[0].goal[:2],
                    "subgoals": nodes[chosen],
                }
            )
        plot_paths(Maze.from_env(self.envs.envs[0]), panels, path, title)

    def close(self) -> None:
        self.envs.close()


class OnlineRun:
    """One run: the pretrained model, the data, the agent, its environments, its random streams and its directory."""

    def __init__(self, config: OnlineTrainerConfig):
        check(config)
        config = resolve(config)
        self.device = resolve_device(config.device)
        use_kernels(config, self.device)
        self.model, self.pretrained = load_pretrained(config)
        trajectories = config.max_trajectories or self.pretrained["max_trajectories"]
        config = self.config = replace(config, max_trajectories=trajectories)
        self.run_dir = default_run_dir(config)
        check_run(self.run_dir, config, config.resume, MAY_CHANGE_ON_RESUME)  # before the data is made or loaded
        self.streams, self.resources = RandomStreams(config.seed, self.device), contextlib.ExitStack()
        generate_if_missing(config.dataset, config.dataset_dir)
        self.data = TrajectoryDataset.load(config.dataset, "train", config.dataset_dir, trajectories, self.device)
        takes, has = self.model.encoder.observation_dim, self.data.observation_dim
        if takes != has:
            raise UserError(
                f"the pretrained model takes {takes} numbers a state, {config.dataset} has {has}; make the right one "
                f"with `{offline_command(config, config.offline_run_dir)}`"
            )
        try:
            self.resources.enter_context(hold_run(self.run_dir))
            self.open(prepare_run(self.run_dir, config, config.resume, may_change=MAY_CHANGE_ON_RESUME))
        except BaseException:
            self.close()
            raise

    def open(self, checkpoint: Path | None) -> None:
        """Build the agent, its codes and replay; continue from the checkpoint if there is one."""
        config = self.config
        with self.streams.initialising():
            self.agent = OnlineAgent(
                config,
                self.model,
                self.data.action_dim,
                self.pretrained["hidden_dim"],
                self.pretrained["discount"],
                self.device,
            )
        # In the strict regime the dataset's actions go no further than this line.
        known = config.inverse_dynamics_data == "offline"
        actions = self.data.actions if known else torch.zeros_like(self.data.actions)
        self.codes = CodeSet.from_dataset(self.data, self.agent, actions)
        if not known:
            rows, states = self.codes.transitions, self.agent.state(self.codes.states)
            self.agent.scale_labeller(states[rows], states[rows + 1])
        self.node_rows = spaced_rows(self.data.episode_end, config.graph_nodes, config.aim_steps)
        self.limit = max_episode_steps(config.dataset)
        self.replay = EpisodeReplay(
            min(config.replay_episodes, max(config.max_episodes, 1)),
            self.limit,
            self.codes.states.shape[1],
            self.data.action_dim,
            self.device,
        )
        self.episodes = self.random_episodes = self.env_steps = 0
        self.best_success, self.measured, self.fitted = -1.0, False, False  # measured: the metric is fitted
        self.figures: dict[str, float] = {}  # of the last evaluation
        if checkpoint is not None:
            self.load(checkpoint)
        else:
            (self.run_dir / "best_model.pth").unlink(missing_ok=True)
        self.envs = EnvPool(config.dataset)
        self.evaluation = Evaluation(config.dataset, self.streams.evaluation_seed)
        for pool in (self.envs, self.evaluation):
            self.resources.callback(pool.close)
        self.logger = MetricLogger(
            self.run_dir, self.episodes if checkpoint else None, config.tensorboard, config.wandb_project, config
        )
        self.resources.callback(self.logger.close)

    def close(self) -> None:
        """Release the directory, the environments and the log; closing twice is harmless."""
        self.resources.close()

    # -- learning ----------------------------------------------------------------------------------------------------

    def learn(self, updates: int, desc: str, anneal: bool = False) -> dict[str, float]:
        """So many updates, on the dataset's states and, where there are any, the agent's own episodes.

        anneal: cosine decay of the learning rate to a tenth over these updates. Returns mean figures.
        """
        config, means = self.config, RunningMeans()
        count = config.batch_size * config.transitions_per_window
        # One's own actions are for the labeller; where the dataset's are known, they are for the inverse dynamics too.
        own = config.inverse_dynamics_data == "offline"
        for number in progress(range(updates), desc, unit="update", leave=False):
            parts = [sample_batch(self.codes, self.agent, count, True, self.streams.sampling)]
            if len(self.replay):
                parts.append(sample_batch(self.replay, self.agent, count, own, self.streams.sampling))
            batch = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            scale = 0.55 + 0.45 * math.cos(math.pi * number / updates) if anneal else 1.0
            means.add(self.agent.update(batch, scale))
        figures = means.take()
        for name, value in figures.items():
            if not math.isfinite(value):
                raise UserError(f"{self.run_dir}: {name} is {value} after {self.episodes} episodes; lower --lr")
        return figures

    def share(self) -> float:
        """How much of the rounds that act by the policy is behind: 0 in the first of them and 1 in the last."""
        last = self.config.max_episodes - self.config.num_envs - self.random_episodes
        return min((self.episodes - self.random_episodes) / max(last, 1), 1.0)

    def between(self, start: float, end: float) -> float:
        """A figure of the coming round that goes linearly from start to end over the run."""
        return start + (end - start) * self.share()

    @functools.cached_property
    def graph(self) -> StateGraph:
        """The dataset's states, joined by the metric as it stands at first use: after it is fitted."""
        rows = self.node_rows
        return StateGraph(self.agent, self.codes.states[rows], rows, self.codes.episode_end[rows])

    def fit_metric(self) -> dict[str, float]:
        """What comes first: the metric."""
        config = self.config

        def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return sample_pairs(self.codes, config.metric_steps, METRIC_PAIRS, self.streams.sampling)

        updates = progress(range(config.metric_updates), "fit the metric", unit="update", leave=False)
        loss = self.agent.fit_metric(draw, updates, config.metric_updates)
        if not math.isfinite(loss):
            raise UserError(f"{self.run_dir}: the loss of the metric is {loss}; lower --metric_lr")
        return {"metric_loss": loss}

    def label(self, updates: int, lr: float) -> dict[str, float]:
        """Train the labeller on one's own transitions and put its actions between the dataset's states."""
        source, generator = self.replay, self.streams.sampling

        def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            number = torch.randint(len(source), (LABEL_PAIRS,), generator=generator, device=self.device)
            rows = source.transitions[number]
            states = self.agent.state(source.states)
            return states[rows], states[rows + 1], source.actions[rows]

        bar = progress(range(updates), "fit the labeller", unit="update", leave=False)
        loss = self.agent.fit_labeller(draw, bar, updates, lr)
        if not math.isfinite(loss):
            raise UserError(f"{self.run_dir}: the loss of the labeller is {loss}; lower --label_lr")
        self.relabel()
        return {"label_loss": loss}

    def relabel(self) -> None:
        """The labeller's actions between the dataset's states."""
        rows, states = self.codes.transitions, self.agent.state(self.codes.states)
        self.codes.actions[rows] = self.agent.label(states[rows], states[rows + 1])

    def imitate(self) -> dict[str, float]:
        """After a round: learn from the dataset, once its actions are known or labelled, and from own episodes."""
        config, strict = self.config, self.config.inverse_dynamics_data == "online"
        if self.fitted:
            labels = (
                self.label(config.relabel_updates, config.label_lr / 2) if strict and config.relabel_updates else {}
            )
            return labels | self.learn(config.updates_per_round, "learn")
        if strict and self.env_steps < config.random_steps and self.episodes < config.max_episodes:
            return {}  # random rounds go on
        labels = self.label(config.label_updates, config.label_lr) if strict else {}
        self.fitted = True
        return labels | self.learn(config.fit_updates, "fit on the dataset", anneal=True)

    def collect(self, ended=lambda count: None) -> dict[str, float]:
        """A round: one episode in each environment, into the replay; `ended` as in `EnvPool.play`. Its figures."""
        config = self.config
        count = min(config.num_envs, config.max_episodes - self.episodes)
        epsilon = self.between(config.epsilon_start, config.epsilon_end)
        noise = self.between(config.action_noise_start, config.action_noise_end)
        random = not self.fitted
        seeds = torch.randint(
            TRAIN_SEED_OFFSET, 2**32, (count,), generator=self.streams.policy, device=self.device
        ).tolist()
        navigators: list[Navigator] = []

        def policy_for(goals: np.ndarray):
            if random:
                return random_policy(seeds, self.data.action_dim)
            return navigator_policy(self.agent, self.graph, seeds, goals, epsilon, noise, navigators)

        played = self.envs.play(seeds, [None] * count, policy_for, ended)
        for episode in played:
            observations = torch.as_tensor(episode.observations, device=self.device)
            self.replay.add(self.agent.encode(observations), torch.as_tensor(episode.actions, device=self.device))
        self.random_episodes += count if random else 0
        self.episodes += count
        self.env_steps += sum(len(episode.actions) for episode in played)
        return {
            "success_rate": float(np.mean([episode.success for episode in played])),
            "episode_reward": float(np.mean([episode.reward for episode in played])),
            "epsilon": 1.0 if random else epsilon,
            "action_noise": 1.0 if random else noise,
            "goal_biased_share": navigators[0].exploring_share() if navigators else 0.0,
            "env_steps": float(self.env_steps),
        }

    def train(self) -> dict[str, float]:
        """Fit the metric, then rounds of episodes and updates, evaluating and saving every eval_freq rounds.

        Where the dataset's actions are known, everything is fitted on it before the first round; else after the random
        rounds, when it is labelled.
        """
        config = self.config
        if not self.measured:
            metrics = self.fit_metric()
            self.measured = True
            if config.inverse_dynamics_data == "offline":
                metrics |= self.imitate()
            self.evaluate_and_save(metrics | {"env_steps": 0.0})
        options = {"initial": self.episodes, "unit": "episode", "disable": config.max_episodes == 0}
        with progress(config.max_episodes, "episodes", **options) as bar:
            while self.episodes < config.max_episodes:
                metrics = self.collect(bar.update)
                metrics |= self.imitate()
                bar.set_postfix(success=f"{metrics['success_rate']:.2f}", steps=self.env_steps)
                round_number = math.ceil(self.episodes / config.num_envs)
                if round_number % config.eval_freq == 0 or self.episodes >= config.max_episodes:
                    self.evaluate_and_save(metrics)
                else:
                    self.logger.log(self.episodes, metrics)
        return self.figures or self.evaluate(config.eval_episodes)  # empty: cut after the last checkpoint

    # -- evaluation and files ----------------------------------------------------------------------------------------

    def evaluate(self, episodes: int) -> dict[str, float]:
        """Success over so many episodes of each task."""
        return self.evaluation.run(self.agent, self.graph, episodes)

    def evaluate_and_save(self, metrics: dict[str, float]) -> None:
        """Evaluate what has learned to act, log the row, then write best_model.pth if it is the best, and last.pth."""
        config = self.config
        if self.fitted:
            last = self.episodes >= config.max_episodes
            self.figures = self.evaluate(config.eval_episodes if last else config.eval_episodes_between)
            metrics = metrics | self.figures
        self.logger.log(self.episodes, metrics)
        success = metrics.get("eval/success_rate", -1.0)
        if success > self.best_success:
            self.best_success = success
            save_checkpoint(self.run_dir / "best_model.pth", self.model_state() | {"success_rate": success})
        state = self.model_state() | {
            "env_steps": self.env_steps,
            "random_episodes": self.random_episodes,
            "best_success": self.best_success,
            "fitted": self.fitted,
            "agent": self.agent.state_dict(),
            "replay": self.replay.state_dict(),
            "streams": self.streams.state_dict(),
        }
        save_checkpoint(self.run_dir / "checkpoints" / "last.pth", state)

    def model_state(self) -> dict[str, Any]:
        """What `load_policy` needs: encoder, heads, metric, the graph's nodes, their sizes and the dataset."""
        return {
            "dataset": self.config.dataset,
            "config": {key: value for key, value in plain_config(self.config).items() if key not in NOT_THE_MODEL},
            "pretrained": self.pretrained,
            "action_dim": self.data.action_dim,
            "agent": self.agent.policy_state_dict(),
            "nodes": self.data.observations[self.node_rows],
            "node_rows": self.node_rows,
            "node_episode_end": self.codes.episode_end[self.node_rows],
            "episodes": self.episodes,
        }

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; UserError where it is another model's."""
        state = load_checkpoint(path, self.device)
        try:
            own, stored = self.agent.encoder.state_dict(), state["agent"]["encoder"]
            if any(not torch.equal(own[name], stored[name]) for name in own):
                raise UserError(f"{path}: began from another pretrained model; give its --offline_run_dir")
            if not torch.equal(state["nodes"], self.data.observations[self.node_rows]):
                raise UserError(f"{path}: began on other data; give its --dataset_dir, or another --run_dir")
            self.agent.load_state_dict(state["agent"])
            self.replay.load_state_dict(state["replay"])
            self.streams.load_state_dict(state["streams"])
            self.episodes, self.env_steps = state["episodes"], state["env_steps"]
            self.random_episodes = state["random_episodes"]
            self.best_success, self.measured, self.fitted = state["best_success"], True, state["fitted"]
            if self.fitted and self.config.inverse_dynamics_data == "online":
                self.relabel()
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a checkpoint of this model ({error}); choose another --run_dir") from None

    def plot(self) -> None:
        """online_training_curves.png, paths.png of the last evaluation and, if asked for, evaluation.mp4."""
        config = self.config
        title = f"{config.dataset}, {config.inverse_dynamics_data} actions, seed {config.seed}"
        plot_online_curves(read_metrics(self.run_dir), self.run_dir / "online_training_curves.png", title)
        nodes = self.data.observations[self.node_rows, :2].cpu().numpy()
        self.evaluation.plot(self.run_dir / "paths.png", nodes, f"{title}, {self.episodes} episodes")
        if config.record_video:
            self.evaluation.record_video(self.run_dir / "evaluation.mp4")


def default_run_dir(config: OnlineTrainerConfig) -> Path:
    """The directory that the settings name, or the usual one."""
    stem = Path("logs") / "online" / config.dataset / config.inverse_dynamics_data / f"seed_{config.seed}"
    return Path(config.run_dir or stem)


def spaced_rows(episode_end: torch.Tensor, most: int, aim_steps: float) -> torch.Tensor:
    """Rows for at most so many nodes: evenly spaced in time, but never farther than half of aim_steps.

    Where all rows would be too many at that spacing, whole episodes are left out, evenly; where one episode alone has
    too many, it is farther after all. episode_end [N] int64, the last row of each row's episode; returns [n] int64.
    """
    rows = torch.arange(len(episode_end), device=episode_end.device)
    spacing = min(math.ceil(len(rows) / most), max(int(aim_steps) // NODES_PER_AIM, 1))
    rows = rows[::spacing]
    ends, lengths = torch.unique_consecutive(episode_end[rows], return_counts=True)
    number = torch.arange(len(ends), device=rows.device)
    # Of every `of` episodes one is kept, as many as it takes to come below the limit.
    for of in range(math.ceil(len(rows) / most), len(ends) + 1):
        if int(lengths[number % of == 0].sum()) <= most:
            return rows[(number % of == 0).repeat_interleave(lengths)]
    return torch.arange(0, len(episode_end), math.ceil(len(episode_end) / most), device=rows.device)


def load_policy(path: str | Path, device: str | torch.device = "cpu") -> tuple[OnlineAgent, StateGraph, dict[str, Any]]:
    """What acts, from best_model.pth or checkpoints/last.pth alone: the agent, its graph and all that the file says.

    Raises UserError for a file that is no policy of this script.
    """
    state = load_checkpoint(Path(path), device)
    if "pretrained" not in state:
        raise UserError(f"{path}: not a policy of online_trainer.py; give the best_model.pth of one of its runs")
    try:
        settings, before = state["config"], state["pretrained"]
        shape = {name: before[name] for name in ("n_layers", "d_state", "d_conv", "expand")}
        model = OfflineModel(state["nodes"].shape[1], before["d_model"], before["hidden_dim"], **shape)
        own = OnlineAgentConfig(**{field.name: settings[field.name] for field in fields(OnlineAgentConfig)})
        agent = OnlineAgent(own, model, state["action_dim"], before["hidden_dim"], before["discount"], device)
        agent.load_policy_state_dict(state["agent"])
        graph = StateGraph(agent, agent.encode(state["nodes"]), state["node_rows"], state["node_episode_end"])
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a policy of online_trainer.py ({reason}); give its best_model.pth") from None
    return agent, graph, state


def evaluate_file(config: OnlineTrainerConfig) -> None:
    """`--evaluate`: the episodes that the run's own evaluation takes, as many as asked for, in a folder beside it."""
    agent, graph, state = load_policy(config.evaluate, resolve_device(config.device))
    dataset, seed = state["dataset"], state["config"]["seed"]
    if config.record_video:
        try_video(dataset)
    folder = Path(config.run_dir or Path(config.evaluate).parent / "evaluation")
    with contextlib.closing(Evaluation(dataset, RandomStreams(seed).evaluation_seed)) as evaluation:
        figures = evaluation.run(agent, graph, config.eval_episodes)
        write_text_atomic(folder / "evaluation.json", json.dumps({"dataset": dataset, **figures}, indent=2) + "\n")
        title = f"{dataset}, {state['config']['inverse_dynamics_data']} actions, seed {seed}"
        evaluation.plot(folder / "paths.png", state["nodes"][:, :2].cpu().numpy(), title)
        if config.record_video:
            evaluation.record_video(folder / "evaluation.mp4")
    print(f"{title}: {config.evaluate}, after {state['episodes']} episodes of its own")
    for name, value in figures.items():
        print(f"  {name}: {value:.3f}")
    print(f"outputs in {folder}: evaluation.json, paths.png{', evaluation.mp4' if config.record_video else ''}")


def navigator_policy(
    agent: OnlineAgent,
    graph: StateGraph,
    seeds: list[int],
    goals: np.ndarray,
    epsilon: float = 0.0,
    action_noise: float = 0.0,
    made: list[Navigator] | None = None,
):
    """A policy for `EnvPool.play`: actions, and the nodes aimed at. Its navigator is appended to `made`."""
    navigator = Navigator(agent, graph, goals, seeds, epsilon, action_noise)
    if made is not None:
        made.append(navigator)
    return lambda observations, live: (navigator.act(observations, live), navigator.chosen[live])


def random_policy(seeds: list[int], action_dim: int):
    """Uniform actions in [-1, 1], drawn anew at each step, aimed at nothing."""
    generators = [np.random.default_rng([seed, 1]) for seed in seeds]  # the environment draws from the seed alone

    def policy(observations: np.ndarray, live: np.ndarray):
        actions = np.stack([generators[env].uniform(-1, 1, action_dim) for env in live])
        return actions.astype(np.float32), np.full(len(live), -2)

    return policy


def renderer(dataset: str):
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


def try_video(dataset: str) -> None:
    """Raises UserError where no film can be made."""
    renderer(parse_dataset_id(dataset).id).close()
    find_video_writer()


def find_video_writer():
    """imageio with its MP4 writer; raises UserError without the package."""
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise UserError("--record_video needs imageio-ffmpeg: pip install -r requirements/video.txt") from None
    return imageio


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate, or evaluate a file."""
    config = parse_config(OnlineTrainerConfig, argv, __doc__, default_run_dir=default_run_dir)
    began = time.perf_counter()
    check(config)
    if config.evaluate is not None:
        return evaluate_file(config)
    if config.record_video:  # say now what would fail after hours
        try_video(config.dataset)
    run = OnlineRun(config)
    print(
        f"{config.dataset}, seed {config.seed}, {run.device}; actions: {config.inverse_dynamics_data}; "
        f"pretrained in {config.offline_run_dir or 'logs/offline'}"
    )
    with contextlib.closing(run):
        metrics = run.train()
        run.plot()
        summary = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        mark_finished(run.run_dir, {**summary, "env_steps": run.env_steps, "dataset": config.dataset})
    print(
        f"{config.dataset}, {config.inverse_dynamics_data} actions, seed {config.seed}: last checkpoint after "
        f"{run.episodes} episodes, {run.env_steps} environment steps, {time.perf_counter() - began:.0f} seconds"
    )
    for name, value in summary.items():
        print(f"  {name}: {value:.3f}")
    print(f"outputs in {run.run_dir}: best_model.pth, checkpoints/last.pth, metrics.csv, *.png")


if __name__ == "__main__":
    run_cli(main)
