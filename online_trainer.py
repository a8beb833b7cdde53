"""Imitate from states alone: reach goals in a maze with a pretrained OPSO model, through inverse dynamics.

Needs the model that offline_trainer.py leaves for the same dataset. With no flag: local/pointmaze-medium-navigate-v0,
strict state-only (actions come from the agent's own episodes), minutes on two cores. A run's directory holds
config.yaml, metrics.csv, TensorBoard events, best_model.pth (highest success rate), checkpoints/last.pth,
online_training_curves.png and paths.png.

    python online_trainer.py --inverse_dynamics_data offline --max_episodes 0    # the offline-only policy
    python online_trainer.py --evaluate RUN/best_model.pth    # a saved policy once more
"""

import functools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmark_data.local import generate_if_missing
from offline_data import made_here
from ogbench_utils import max_episode_steps, parse_dataset_id
from online_agent import Acting, OnlineAgent, OnlineAgentConfig
from opso.batches import CodeSet, sample_batch, sample_pairs, steps_to_travel
from opso.episodes import TRAIN_SEED_OFFSET, RandomPolicy, episode_code, rollout
from opso.evaluation import Evaluation, evaluate_file, open_evaluator, open_video, print_metrics
from opso.pretrained import load_pretrained
from opso.routes import Routes
from opso.search import Planner, StateGraph, spaced_rows
from runs.cli import parse_config, run_cli
from runs.directory import mark_finished, save_checkpoint
from runs.metrics import RunningMeans, read_metrics
from runs.plots import plot_online_curves
from runs.run import DeviceRunConfig, Run
from utils import (
    Basic,
    Count,
    EpisodeReplay,
    Fraction,
    MayChange,
    NonNegative,
    Positive,
    UserError,
    Whole,
    Workers,
    counted,
    progress,
)


@dataclass
class OnlineTrainerConfig(DeviceRunConfig, OnlineAgentConfig):
    dataset: Basic[str] = "local/pointmaze-medium-navigate-v0"  # OGBench id, or local/<id> for one generated here
    dataset_dir: Basic[MayChange[str | None]] = None  # folder of the data; default: OGBENCH_DATASET_DIR, or datasets/
    offline_run_dir: Basic[MayChange[str | None]] = None  # run of offline_trainer.py; default: in logs/offline/
    inverse_dynamics_data: Basic[Literal["online", "offline"]] = "online"  # actions to learn from: own alone, or all
    max_trajectories: Count | None = None  # use the dataset's first so many episodes; default: those of the pretraining
    max_episodes: Basic[Whole] = 64  # episodes to act in; 0 fits on the dataset and evaluates
    num_envs: Count = 8  # environments at once; a round is one episode in each
    batch_size: Count = 8  # an update samples batch_size x transitions_per_window transitions from each source
    transitions_per_window: Count = 64  # an update samples batch_size x transitions_per_window transitions a source
    metric_updates: Count | None = None  # updates of the metric, before all else; default 1500, ant and humanoid 3000
    fit_updates: Whole | None = None  # updates on the dataset with its actions; default 1500, ant and humanoid 12000
    idm_updates: Count | None = None  # first updates of the inverse dynamics model; default 1500, ant, humanoid 6000
    idm_updates_per_round: Whole = 500  # updates of the inverse dynamics model after each later round
    idm_lr: Positive = 1e-3  # learning rate of the inverse dynamics model at first; halved in later rounds
    updates_per_round: Whole = 250  # updates after each round of episodes
    value_every: Count = 3  # updates of the policy, by which search acts, for each one of Q, V and the proposer
    random_steps: Whole | None = None  # random steps before training; default 2000, ant and humanoid 32000
    replay_episodes: Count = 200  # own episodes kept
    epsilon_start: Fraction = 0.30  # probability of exploring straight towards the goal, first round after random ones
    epsilon_end: Fraction = 0.05  # probability of exploring straight towards the goal, last round
    action_noise_start: NonNegative = 0.20  # standard deviation of action noise, first round after random ones
    action_noise_end: NonNegative = 0.05  # standard deviation of action noise, last round
    eval_freq: Count = 4  # rounds between evaluations; each one writes a checkpoint
    eval_episodes: Count = 20  # episodes of each of the five tasks in the last evaluation
    eval_episodes_between: Count = 4  # episodes of each of the five tasks in intermediate evaluations
    eval_acting: tuple[Acting, ...] | None = None  # other ways of acting, which the last evaluation plays too
    eval_workers: MayChange[Workers | None] = None  # processes that step environments; default: cores - 1, at most 7
    record_video: MayChange[bool] = False  # write evaluation.mp4, an episode of each task (needs EGL or OSMesa)
    evaluate: MayChange[str | None] = None  # train nothing: evaluate this run or checkpoint, on --eval_episodes a task


# What None stands for: for the point, whose steps go farther, and for ants and humanoids.
BY_ROBOT = {
    **{"subgoal_steps": (10, 25), "metric_steps": (10, 25), "metric_updates": (1500, 3000)},
    **{"fit_updates": (1500, 12_000), "idm_updates": (1500, 6000), "random_steps": (2000, 32_000)},
}
METRIC_PAIRS = 512  # in an update of the metric
COUNTERS = ("episodes", "random_episodes", "env_steps", "best_success", "fitted")  # of a run, kept in last.pth
IDM_TRANSITIONS = 512  # in an update of the inverse dynamics model


def check(config: OnlineTrainerConfig) -> None:
    """One line for a setting that cannot work, before anything is loaded."""
    parse_dataset_id(config.dataset)
    if abs(config.p_self + config.p_future + config.p_random - 1) > 1e-6:
        raise UserError(f"--p_self {config.p_self} --p_future {config.p_future} --p_random {config.p_random}: sum to 1")
    if config.inverse_dynamics_data == "online" and config.max_episodes == 0:
        raise UserError(
            "--max_episodes 0 --inverse_dynamics_data online: no action is ever seen; use --inverse_dynamics_data "
            "offline for the policy without interaction, or --max_episodes above 0"
        )
    if config.record_video:  # say now what would fail after hours
        open_video(config.dataset)[0].close()


def resolve(config: OnlineTrainerConfig) -> OnlineTrainerConfig:
    """The settings with every None that depends on the robot filled in."""
    kind = 0 if parse_dataset_id(config.dataset).maze_env == "pointmaze" else 1
    absent = {name: values[kind] for name, values in BY_ROBOT.items() if getattr(config, name) is None}
    return replace(config, **absent)


class OnlineRun(Run):
    """One run: the pretrained model, the data, the agent, its environments, its random streams and its directory."""

    config: OnlineTrainerConfig

    def __init__(self, config: OnlineTrainerConfig):
        check(config)
        self.model, self.pretrained = load_pretrained(config)
        trajectories = config.max_trajectories or self.pretrained["max_trajectories"]
        super().__init__(replace(resolve(config), max_trajectories=trajectories))

    @property
    def step(self) -> int:
        """Episodes so far."""
        return self.episodes

    @classmethod
    def default_run_dir(cls, config: OnlineTrainerConfig) -> Path:
        """The directory that the settings name, or logs/online/{dataset}/{inverse_dynamics_data}/seed_{seed}."""
        stem = Path("logs") / "online" / config.dataset / config.inverse_dynamics_data / f"seed_{config.seed}"
        return Path(config.run_dir or stem)

    def load_data(self) -> None:
        config = self.config
        dataset = generate_if_missing(config.dataset, config.dataset_dir)
        self.data = dataset.load("train", config.dataset_dir, config.max_trajectories, self.device)
        self.data_facts = made_here([config.dataset], config.dataset_dir)

    def build(self) -> None:
        """The agent, its codes and replay, and the environments."""
        config = self.config
        self.evaluator = open_evaluator(config, config.dataset)
        self.resources.callback(self.evaluator.close)
        with self.streams.initialising():
            width, discount = self.pretrained["hidden_dim"], self.pretrained["discount"]
            self.agent = OnlineAgent(config, self.model, self.data.action_dim, width, discount, self.device)
        # In the strict regime the dataset's actions go no further than this line.
        known = config.inverse_dynamics_data == "offline"
        actions = self.data.actions if known else torch.zeros_like(self.data.actions)
        rows, end = torch.arange(len(actions), device=self.device), self.data.episode_end
        self.codes = CodeSet(self.agent.encode(self.data.observations), actions, end, rows[rows < end])
        if not known:
            self.agent.scale_idm(*self.neighbours(self.codes, self.codes.transitions))
        self.agent.metric.aim_steps.fill_(steps_to_travel(self.data.observations[:, :2], self.data.episode_end))
        self.node_rows = spaced_rows(self.data.episode_end, config.graph_nodes, self.agent.aim_steps)
        kept = min(config.replay_episodes, max(config.max_episodes, 1))
        sizes = (max_episode_steps(config.dataset), self.codes.states.shape[1], self.data.action_dim)
        self.replay = EpisodeReplay(kept, *sizes, self.device)
        self.episodes = self.random_episodes = self.env_steps = 0
        self.best_success, self.measured, self.fitted = -1.0, False, False  # measured: the metric is fitted
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.evaluation = Evaluation(self.evaluator, config.dataset, self.streams.evaluation_seed)

    # -- learning ----------------------------------------------------------------------------------------------------

    def learn(self, updates: int, desc: str, anneal: bool = False) -> dict[str, float]:
        """So many updates, on the dataset's states and, where there are any, the agent's own episodes.

        anneal: cosine decay of the learning rate to a tenth over these updates. Returns mean losses.
        """
        config, means = self.config, RunningMeans()
        count = config.batch_size * config.transitions_per_window
        known = config.inverse_dynamics_data == "offline"  # else own actions are the inverse dynamics model's alone
        for number in progress(range(updates), desc, unit="update", leave=False):
            batch = acted = sample_batch(self.codes, self.agent, count, self.streams.sampling)
            learns_values = number % config.value_every == 0
            if len(self.replay) and (known or learns_values):
                played = sample_batch(self.replay, self.agent, count, self.streams.sampling)
                batch = {key: torch.cat([value, played[key]]) for key, value in batch.items()}
            values = (batch, self.routes.sample(count, self.streams.sampling)) if learns_values else None
            scale = 0.55 + 0.45 * math.cos(math.pi * number / updates) if anneal else 1.0
            means.add(self.agent.update(batch if known else acted, values, scale))
        losses = means.take()
        self.check_metrics(losses, "lower --lr")
        return losses

    def schedule(self, start: float, end: float) -> float:
        """Linear from start, in the first round that acts by the policy, to end, in the last."""
        last = self.config.max_episodes - self.config.num_envs - self.random_episodes
        return start + (end - start) * min((self.episodes - self.random_episodes) / max(last, 1), 1.0)

    @functools.cached_property
    def graph(self) -> StateGraph:
        """The dataset's states, joined by the metric as it stands at first use: after it is fitted."""
        rows = self.node_rows
        return StateGraph(self.agent, self.codes.states[rows], rows, self.codes.episode_end[rows])

    @functools.cached_property
    def routes(self) -> Routes:
        """Ways along the graph, for V and the proposer to learn."""
        return Routes(self.graph, self.config.route_goals)

    def fit_metric(self) -> dict[str, float]:
        """What comes first: the metric."""
        config = self.config

        sample = functools.partial(sample_pairs, self.codes, config.metric_steps, METRIC_PAIRS, self.streams.sampling)
        updates = progress(range(config.metric_updates), "fit the metric", unit="update", leave=False)
        losses = {"metric_loss": self.agent.fit_metric(sample, updates)}
        self.check_metrics(losses, "lower --metric_lr")
        return losses

    def neighbours(self, source: CodeSet | EpisodeReplay, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised states [n, D] of these rows, and the next ones."""
        states = self.agent.state(source.states)
        return states[rows], states[rows + 1]

    def fit_idm(self, updates: int, lr: float) -> dict[str, float]:
        """Train the inverse dynamics model on own transitions and infer the dataset's actions by it."""
        own, size, generator = self.replay, (IDM_TRANSITIONS,), self.streams.sampling

        def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            rows = own.transitions[torch.randint(len(own), size, generator=generator, device=self.device)]
            return *self.neighbours(own, rows), own.actions[rows]

        bar = progress(range(updates), "fit the inverse dynamics model", unit="update", leave=False)
        losses = {"idm_loss": self.agent.fit_idm(sample, bar, lr)}
        self.check_metrics(losses, "lower --idm_lr")
        self.infer_actions()
        return losses

    def infer_actions(self) -> None:
        """Put what the inverse dynamics model infers between the dataset's states."""
        rows = self.codes.transitions
        self.codes.actions[rows] = self.agent.infer_actions(*self.neighbours(self.codes, rows))

    def imitate(self) -> dict[str, float]:
        """After a round: learn from the dataset, once its actions are known or inferred, and from own episodes."""
        config, strict = self.config, self.config.inverse_dynamics_data == "online"
        if self.fitted:
            updates = config.idm_updates_per_round if strict else 0
            losses = self.fit_idm(updates, config.idm_lr / 2) if updates else {}
            return losses | self.learn(config.updates_per_round, "learn")
        if strict and self.env_steps < config.random_steps and self.episodes < config.max_episodes:
            return {}  # random rounds go on
        losses = self.fit_idm(config.idm_updates, config.idm_lr) if strict else {}
        self.fitted = True
        return losses | self.learn(config.fit_updates, "fit on the dataset", anneal=True)

    def collect(self, ended=lambda count: None) -> dict[str, float]:
        """A round: one episode in each environment, into the replay; `ended` as in `rollout`. Returns its metrics."""
        config, random = self.config, not self.fitted
        count = min(config.num_envs, config.max_episodes - self.episodes)
        epsilon = self.schedule(config.epsilon_start, config.epsilon_end)
        noise = self.schedule(config.action_noise_start, config.action_noise_end)
        generator, device = self.streams.policy, self.device
        seeds = torch.randint(TRAIN_SEED_OFFSET, 2**32, (count,), generator=generator, device=device).tolist()

        def policy_for(goals: np.ndarray) -> Planner | RandomPolicy:
            if random:
                return RandomPolicy(seeds, self.data.action_dim)
            return Planner(self.agent, self.graph, goals, seeds, epsilon, noise)

        played, policy = rollout(self.evaluator, [episode_code(seed) for seed in seeds], policy_for, ended)
        for episode in played:
            observations = torch.as_tensor(episode.observations, device=device)
            self.replay.add(self.agent.encode(observations), torch.as_tensor(episode.actions, device=device))
        self.random_episodes += count if random else 0
        self.episodes += count
        self.env_steps += sum(len(episode.actions) for episode in played)
        return {
            "success_rate": float(np.mean([episode.success for episode in played])),
            "episode_reward": float(np.mean([episode.reward for episode in played])),
            "epsilon": 1.0 if random else epsilon,
            "action_noise": 1.0 if random else noise,
            "goal_biased_share": 0.0 if random else policy.exploration_rate(),
            "env_steps": float(self.env_steps),
        }

    def train(self) -> dict[str, float]:
        """Fit the metric, then rounds of episodes and updates, evaluating and saving every eval_freq rounds.

        Where the dataset's actions are known, everything is fitted on it before the first round; else after the random
        rounds, when they are inferred.
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
        return self.metrics or self.evaluate(last=True)  # empty: cut after the last checkpoint

    # -- evaluation and files ----------------------------------------------------------------------------------------

    def evaluate(self, last: bool) -> dict[str, float]:
        """Success over episodes of each task, in the last evaluation by every way of acting asked for."""
        config = self.config
        if last:
            return self.evaluation.run_all(self.agent, self.graph, config.eval_episodes, config.eval_acting)
        return self.evaluation.run(self.agent, self.graph, config.eval_episodes_between)

    def evaluate_and_save(self, metrics: dict[str, float]) -> None:
        """Evaluate what has learned to act, log the row, then write best_model.pth if it is the best, and last.pth."""
        config = self.config
        if self.fitted:
            self.metrics = self.evaluate(last=self.episodes >= config.max_episodes)
            metrics = metrics | self.metrics
        self.logger.log(self.episodes, metrics)
        success = metrics.get("eval/success_rate", -1.0)
        if success > self.best_success:
            self.best_success = success
            save_checkpoint(self.run_dir / "best_model.pth", self.model_state() | {"success_rate": success})
        state = self.model_state() | {name: getattr(self, name) for name in COUNTERS}
        parts = {name: getattr(self, name).state_dict() for name in ("agent", "replay", "streams")}
        self.write_checkpoint(state | parts)

    def model_state(self) -> dict[str, Any]:
        """What `MazePolicy` needs: encoder, heads, metric, the graph's nodes, their sizes and the dataset."""
        return {
            "dataset": self.config.dataset,
            "config": self.model_config(),
            "pretrained": self.pretrained,
            "data_states": len(self.data.observations),
            "action_dim": self.data.action_dim,
            "agent": self.agent.policy_state_dict(),
            "nodes": self.data.observations[self.node_rows],
            "node_rows": self.node_rows,
            "node_episode_end": self.codes.episode_end[self.node_rows],
            "episodes": self.episodes,
        }

    def load_state(self, path: Path, state: dict[str, Any]) -> None:
        """UserError where the run began from another model or on other data."""
        own, stored = self.agent.encoder.state_dict(), state["agent"]["encoder"]
        if any(not torch.equal(own[name], stored[name]) for name in own):
            raise UserError(path, "began from another pretrained model", "give its --offline_run_dir")
        if not torch.equal(state["nodes"], self.data.observations[self.node_rows]):
            raise UserError(path, "began on other data", "give its --dataset_dir, or another --run_dir")
        for name in ("agent", "replay", "streams"):
            getattr(self, name).load_state_dict(state[name])
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.measured = True
        if self.fitted and self.config.inverse_dynamics_data == "online":
            self.infer_actions()

    def plot(self) -> None:
        """online_training_curves.png, paths.png of the last evaluation and, if asked for, evaluation.mp4."""
        config = self.config
        vars(self).pop("routes", None)  # nothing learns any more: the pictures get its memory
        data = f"{config.dataset} ({len(self.data.observations):,} states)"
        title = f"{data}, {config.inverse_dynamics_data} actions, {config.acting}, seed {config.seed}"
        plot_online_curves(read_metrics(self.run_dir), self.run_dir / "online_training_curves.png", title)
        nodes = self.data.observations[self.node_rows, :2].cpu().numpy()
        self.evaluation.plot(self.run_dir / "paths.png", nodes, f"{title}, {counted(self.episodes)}")
        if config.record_video:
            self.evaluation.record_video(self.run_dir / "evaluation.mp4")


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate, or evaluate a file."""
    config = parse_config(OnlineTrainerConfig, argv, __doc__, default_run_dir=OnlineRun.default_run_dir)
    began = time.perf_counter()
    if config.evaluate is not None:
        return evaluate_file(config)
    since = " since it was resumed" if config.resume else ""
    run = OnlineRun(config)
    print(
        f"{config.dataset}, seed {config.seed}, {run.device}; actions: {config.inverse_dynamics_data}; "
        f"pretrained in {config.offline_run_dir or 'logs/offline'}"
    )
    with run:
        metrics = run.train()
        run.plot()
        summary = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        mark_finished(run.run_dir, {**summary, "env_steps": run.env_steps, "dataset": config.dataset})
    seconds = f"{time.perf_counter() - began:.0f} seconds{since}"
    print(
        f"{config.dataset}, {config.inverse_dynamics_data} actions, {config.acting}, seed {config.seed}: last "
        f"checkpoint after {counted(run.episodes)}, {run.env_steps} environment steps, {seconds}"
    )
    print_metrics(summary)
    print(f"outputs in {run.run_dir}: best_model.pth, checkpoints/last.pth, metrics.csv, *.png")


if __name__ == "__main__":
    run_cli(main)
