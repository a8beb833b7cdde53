"""One training run of the study: all but the method.

A method's script derives from `StudyRun` what it trains, and from `StudyConfig` its settings. Shared are the data and
its standardisation, the loop, evaluation in both tasks, and the run's directory, logs/walker/{method}/{data}/seed_{s}:

    config.yaml, versions.json      settings and versions
    metrics.csv                     losses, and returns of every evaluation
    checkpoints/last.pth            all that the next update depends on, and the agent
    checkpoints/best.pth            the agent that scored highest in training, on episodes that no report uses
    evaluation.csv, finished.json   at the end: every episode of both agents, and the means
    training_curves.png             returns and losses

Agents are played in the tasks that the data is of.
"""

import abc
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from algorithms.offline.base import OfflineAlgorithm
from benchmark_data.local import generate_if_missing
from dmc_utils import ACTION_DIM, ALL_DATASETS, BY_SHORT_NAME, TASKS, load_study_data, parse_datasets
from offline_data import made_here
from runs.cli import parse_config
from runs.directory import LAST, mark_finished, save_checkpoint
from runs.evaluation import episode_seeds, num_workers
from runs.metrics import RunningMeans, read_metrics
from runs.plots import plot_study_curves
from runs.run import DeviceRunConfig, Run, largest_q, part_of
from utils import Basic, Count, MayChange, Number, ReplayBuffer, UserError, Workers, counted, did_you_mean, progress
from walker.agent import EXPERT_RETURNS, Agent, acting_state, evaluate, in_words, play_saved, write_returns
from walker.policies import Markov


@dataclass
class StudyConfig(DeviceRunConfig):
    USE_DATASET_STR: Basic[str] = f"local/{ALL_DATASETS}"  # walk_m, walk_mr, run_m, run_mr, with commas, or __all__
    data_dir: Basic[MayChange[str | None]] = None  # folder of collected_data/; default: datasets/ beside the code
    ADD_TASK_BIT: bool = True  # append 0 for walk, 1 for run to the observation
    random_noise: Number = 0.0  # standard deviation of noise on standardised observations, never on the bit; <= 0: none
    faulty_pairing: bool = False  # for ablation: pair observations with the action that led to them
    max_timesteps: Basic[Count] = 10_000  # updates of the run
    batch_size: Count = 256  # transitions in an update
    eval_freq: Count = 2_000  # updates between evaluations, and at most between checkpoints
    eval_episodes: Count = 10  # episodes a task of an evaluation in training
    log_freq: Count = 500  # updates between rows of metrics.csv
    TEST_AFTER_TRAINING: bool = True  # play test_episodes with the last and the best agent at the end
    test_episodes: Count = 100  # episodes a task of that
    eval_workers: MayChange[Workers | None] = None  # processes that step environments; default: cores - 1, at most 7
    exp_name: MayChange[str | None] = None  # name of the run's folder in place of the data's


class StudyRun(Run):
    """One run of a method. What it trains, `learner`, is a `Learner` with `update(batch)`."""

    method: str  # its name in reports and directories
    config: StudyConfig

    def load_data(self) -> None:
        self.ids = parse_datasets(self.config.USE_DATASET_STR)
        for dataset_id in self.ids:
            generate_if_missing(dataset_id, self.config.data_dir)
        self.data = load_study_data(self.ids, self.config.data_dir)
        self.data_facts = made_here(self.ids, self.config.data_dir)
        self.fingerprint, returns = self.data.fingerprint(), self.data.rewards.sum(1, dtype=np.float64)
        episodes = {task: self.data.tasks == TASKS.index(task) for task in TASKS}
        self.data_returns = {task: returns[own] for task, own in episodes.items() if own.any()}

    def build(self) -> None:
        rows = self.data.observations[:, :-1].reshape(-1, self.data.observations.shape[-1])
        self.mean, self.std = rows.mean(0), rows.std(0) + np.float32(1e-3)
        self.step, self.best = 0, {"score": -math.inf, "step": 0}
        self.prepare_data()
        with self.streams.initialising():
            self.learner = self.make_learner()
        torch.manual_seed(self.streams.dropout_seed)  # dropout can draw from torch's global generator alone

    @abc.abstractmethod
    def make_learner(self) -> Any:
        """What is trained, freshly initialised; the data is ready."""

    @abc.abstractmethod
    def policy(self) -> tuple[str, dict[str, Any], torch.nn.Module]:
        """Who acts: an entry of walker.policies.POLICIES, what it is made with, and that policy as it stands."""

    def prepare_data(self) -> None:
        """Move what batches are drawn from to the device: by default all transitions."""
        parts = self.data.transitions(self.config.faulty_pairing)
        steps = len(parts.rewards) // len(self.data.tasks)
        bits = np.repeat(self.data.tasks, steps)
        truncated = np.tile(np.arange(steps) == steps - 1, len(self.data.tasks))
        here, following = (self.inputs(part, bits) for part in (parts.observations, parts.next_observations))
        fields = (here, parts.actions, self.rewards(parts.rewards), following, parts.discounts == 0, truncated)
        self.buffer = ReplayBuffer(*fields, self.device)

    def part(self, chosen: np.ndarray) -> dict[str, torch.Tensor]:
        """All transitions of the chosen episodes, [episodes] bool, by field."""
        rows = torch.as_tensor(np.repeat(chosen, len(self.buffer) // len(chosen)), device=self.device)
        return {name: getattr(self.buffer, name)[rows] for name in ReplayBuffer.FIELDS}

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        """Rewards as the method learns from them; the data's own by default."""
        return rewards

    def make_batch(self) -> dict[str, torch.Tensor]:
        """A batch of transitions, with new noise on the observations."""
        return self.noisy(self.buffer.sample(self.config.batch_size, self.streams.sampling))

    @property
    def input_dim(self) -> int:
        return len(self.mean) + int(self.config.ADD_TASK_BIT)

    def inputs(self, observations: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Standardised observations [n, 24], with the bits [n] beside them where there is one."""
        standard = (observations - self.mean) / self.std
        return np.column_stack([standard, bits]).astype(np.float32) if self.config.ADD_TASK_BIT else standard

    def with_noise(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs [..., D] with noise on all but the bit."""
        if self.config.random_noise <= 0:
            return inputs
        noise = torch.randn(inputs.shape, generator=self.streams.policy, device=self.device)
        if self.config.ADD_TASK_BIT:
            noise[..., -1] = 0
        return inputs + self.config.random_noise * noise

    def noisy(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch | {name: self.with_noise(batch[name]) for name in ("observations", "next_observations")}

    @classmethod
    def default_run_dir(cls, config: StudyConfig) -> Path:
        """logs/walker/{method}/{exp_name or data and settings}/seed_{seed}."""
        name = Path(cls.method, config.exp_name or cls.label(config), f"seed_{config.seed}")
        return Path(config.run_dir or Path("logs", "walker", name))

    @classmethod
    def label(cls, config: StudyConfig) -> str:
        """The data, and what is not the usual run of a method, in a word."""
        ids = parse_datasets(config.USE_DATASET_STR)
        names = "+".join(short.removeprefix("local/") for short, name in BY_SHORT_NAME.items() if name in ids)
        if len(ids) == 4 and len({"/" in dataset_id for dataset_id in ids}) == 1:
            names = "all"
        words = ["local", names] if any("/" in dataset_id for dataset_id in ids) else [names]
        words += [f"noise_{config.random_noise:g}"] if config.random_noise > 0 else []
        words += [] if config.ADD_TASK_BIT else ["no_task_bit"]
        words += ["faulty_pairing"] if config.faulty_pairing else []
        return "_".join([*words, *cls.labels(config)])

    @staticmethod
    def labels(config: StudyConfig) -> list[str]:
        """Further words of the folder's name, for what is not the usual run of a method."""
        return []

    def run(self) -> dict[str, Any]:
        began, before, config = time.perf_counter(), self.step, self.config
        print(self.describe())
        with self:
            self.train()
            summary = self.test() if config.TEST_AFTER_TRAINING else {}
            summary |= {f"data/{task}/return": float(found.mean()) for task, found in self.data_returns.items()}
            summary |= {"best_step": self.best["step"], "steps": self.step, "seed": config.seed}
            summary |= {"method": self.method, "datasets": list(self.ids)}
            self.plot()
            mark_finished(self.run_dir, summary)
        seconds = time.perf_counter() - began
        print(f"{part_of(self.step, self.step - before)} updates in {seconds:.0f} seconds; outputs in {self.run_dir}")
        return summary

    def plot(self) -> None:
        means = {task: float(found.mean()) for task, found in self.data_returns.items() if task in self.trained_tasks()}
        title, path = f"{self.method}: {', '.join(self.ids)}; seed {self.config.seed}", "training_curves.png"
        plot_study_curves(read_metrics(self.run_dir), self.run_dir / path, title, means)

    def describe(self) -> str:
        found = self.data_returns.items()
        means = ", ".join(f"{task} {returns.mean():.1f} in {counted(len(returns))}" for task, returns in found)
        return f"{', '.join(self.ids)}: mean return of {means}; {self.device}"

    def train(self) -> None:
        """Update to max_timesteps, logging, evaluating and saving on the way."""
        config, means = self.config, RunningMeans()
        with progress(config.max_timesteps, self.method, initial=self.step, unit="update") as bar:
            while self.step < config.max_timesteps:
                self.learner.anneal(self.step / config.max_timesteps)
                means.add(self.learner.update(self.make_batch()))
                self.step += 1
                bar.update()
                evaluates = self.is_evaluation(self.step)
                if evaluates or self.step % config.log_freq == 0:
                    metrics = means.take()
                    self.check_metrics(metrics)
                    bar.set_postfix({name: f"{value:.3g}" for name, value in list(metrics.items())[:2]})
                    if evaluates:
                        metrics |= self.evaluate()
                    self.logger.log(self.step, metrics)
                    if evaluates or self.is_save_due():
                        self.save()
                    if evaluates:  # after saving: whoever stops the run then keeps what the line tells of
                        tqdm.write(f"update {self.step}: {self.last_returns}", file=sys.stdout)

    def is_evaluation(self, step: int) -> bool:
        return step % self.config.eval_freq == 0 or step == self.config.max_timesteps

    def trained_tasks(self) -> list[str]:
        """The tasks to play: those that the data has episodes of."""
        return list(self.data_returns)

    def evaluate(self) -> dict[str, float]:
        """Returns on the episodes that choose the best agent, which is kept if this is it."""
        agent, seeds = Agent(device=self.device), episode_seeds(self.streams.evaluation_seed, self.config.eval_episodes)
        agent.load_acting(self.acting())
        figures, lines = {}, []
        for task in self.trained_tasks():
            returns = evaluate(agent, task, seeds, num_workers(self.config.eval_workers), f"evaluate {task}")
            figures |= {f"eval/{task}/return": float(returns.mean()), f"eval/{task}/return_std": float(returns.std())}
            lines.append(f"{task} {in_words(returns)}")
        score = np.mean([figures[f"eval/{task}/return"] / EXPERT_RETURNS[task] for task in self.trained_tasks()])
        self.last_returns = ", ".join(lines)
        if score > self.best["score"]:
            self.best = {"score": float(score), "step": self.step}
            save_checkpoint(self.run_dir / "checkpoints" / "best.pth", self.saved_agent())
        return figures

    def saved_agent(self) -> dict[str, Any]:
        """What a file needs to play the agent as it stands, and to test it as the run does."""
        state = {"acting": self.acting(), "step": self.step, "config": self.model_config()}
        return state | {"tasks": self.trained_tasks()}

    def acting(self) -> dict[str, Any]:
        return acting_state(self.method, *self.policy(), (self.mean, self.std), self.config.ADD_TASK_BIT)

    def test(self) -> dict[str, float]:
        found = play_saved(self.run_dir, None, None, self.config.eval_workers, self.config.device)
        write_returns(self.run_dir / "evaluation.csv", found)
        figures = {}
        for (name, task), returns in found.items():
            figures[f"{name}/{task}/return"] = float(returns.mean())
            figures[f"{name}/{task}/return_std"] = float(returns.std())
        return figures

    def save(self) -> None:
        state = {"learner": self.learner.state_dict(), "streams": self.streams.state_dict(), "best": self.best}
        state |= {"method": self.method, "data": self.fingerprint}
        self.write_checkpoint(state | self.saved_agent())

    def load_state(self, path: Path, state: dict[str, Any]) -> None:
        """UserError where it is another method's, or began on other data."""
        if state["method"] != self.method:
            raise UserError(path, f"checkpoint of another run (method {state['method']}, here {self.method})")
        if state["data"] != self.fingerprint:
            raise UserError(path, "began on other data", "give its --data_dir, or another --run_dir")
        self.streams.load_state_dict(state["streams"])  # first: it says what another kind of device lacks
        self.learner.load_state_dict(state["learner"])
        self.step, self.best = state["step"], state["best"]


class ValueRun(StudyRun):
    """A learner of algorithms/offline; settings need `reward_scale`, and its own. All ends are time limits."""

    algorithm: type[OfflineAlgorithm]
    kind: str  # entry of walker.policies.POLICIES that the actor is
    learner: OfflineAlgorithm

    def make_learner(self) -> OfflineAlgorithm:
        self.q_bound = largest_q(self.rewards(self.data.rewards), self.config.discount)
        sizes = (self.input_dim, ACTION_DIM, 1.0)
        return self.algorithm(self.config, sizes, self.streams.policy, self.device)

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        return rewards * np.float32(self.config.reward_scale)

    def policy(self) -> tuple[str, dict[str, Any], Markov]:
        return self.kind, {"hidden_dim": self.config.hidden_dim}, Markov(self.learner.actor)


def run_command(
    run_class: type[StudyRun], config_class: type[StudyConfig], description: str, argv: list[str] | None = None
) -> dict[str, Any]:
    """A method's `main`: `train` (the default) or `test`, then flags. Returns the figures of the end."""
    words = list(sys.argv[1:] if argv is None else argv)
    action = words.pop(0) if words and not words[0].startswith("-") else "train"
    if action not in ("train", "test"):
        raise UserError(f"{action!r}: the first word is train or test{did_you_mean(action, ('train', 'test'))}")
    config = parse_config(config_class, words, description, default_run_dir=run_class.default_run_dir)
    if action == "train":
        return run_class(config).run()
    run_dir = run_class.default_run_dir(config)
    if not (run_dir / LAST).is_file():
        raise UserError(f"{run_dir / LAST}: no such file; train first, with the same flags and `train`")
    found = play_saved(run_dir, config.test_episodes, None, config.eval_workers, config.device)
    return {f"{name}/{task}/return": float(returns.mean()) for (name, task), returns in found.items()}
