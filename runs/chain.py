"""A training run of a chain of actors on offline data: all but the algorithm.

A command derives from `ChainRun` what its algorithm needs, and from `ChainRunConfig` its settings. Shared are the loop,
the data's normalisation, evaluation of all actors, and the run's directory:

    config.yaml, versions.json                  settings and versions
    training/metrics.csv, evaluations.csv       rows of training; every evaluated episode
    checkpoints/last.pth                        all that the next update depends on
    training_curves.png, finished.json          at the end
"""

import abc
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from offline_data import OfflineData, data_scores, find_dataset, is_official, made_here, make_env, normalized_score
from runs.cuda_graphs import GraphedStep
from runs.directory import mark_finished, save_checkpoint
from runs.evaluation import Episodes, Evaluator, episode_seeds, num_workers, report_steps
from runs.metrics import EpisodeLog, RunningMeans, read_metrics
from runs.plots import plot_chain_curves
from runs.run import DeviceRunConfig, Run, largest_q, part_of
from transport import MAX_EXACT
from utils import Basic, Count, MayChange, Positive, RandomStreams, UserError, Workers, counted, progress

MODES = ("deterministic", "stochastic")
Act = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of observations [..., D] and noise z [..., A]; z = 0: mode


@dataclass
class ChainRunConfig(DeviceRunConfig):
    env: Basic[str] = "local/hopper-medium-v2"  # id of the dataset: D4RL's, local/, minari/, or an OGBench single task
    dataset_dir: Basic[MayChange[str | None]] = None  # folder of the data; default: D4RL_DATASET_DIR, or the usual one
    max_timesteps: Basic[Count] = 10_000  # updates of the run; 1,000,000 for a result to quote
    batch_size: Count = 256  # transitions in an update
    normalize: bool = True  # train on (s - mean) / (std + 1e-3), with the data's mean and standard deviation
    eval_freq: Count = 5_000  # updates between evaluations, and at most between checkpoints
    eval_episodes: Count = 10  # episodes of an evaluation, for every actor, deterministic and stochastic
    final_runs: Count = 5  # evaluations at the end, on seeds that no other evaluation uses
    eval_workers: MayChange[Workers | None] = None  # processes that step environments; default: cores - 1, at most 7
    log_freq: Count = 1_000  # updates between rows of metrics.csv, with the chain's diagnostics
    q_limit: MayChange[Positive] = 10.0  # stop where mean Q passes so many times the largest return that rewards allow
    cuda_graph: MayChange[bool] = True  # on a GPU: capture the update once and replay it
    save_model: MayChange[bool] = True  # write checkpoints, without which a run cannot be resumed
    keep_checkpoints: MayChange[bool] = False  # keep each evaluation's checkpoint too, as step_<updates>.pth
    checkpoint_dir: str | None = None  # keep checkpoints under this folder, in folders named as under logs/
    evaluate: MayChange[str | None] = None  # train nothing: score the actors of this last.pth, or run's directory
    evaluate_episodes: MayChange[Count | None] = None  # episodes of --evaluate; default: as many as at the run's end


class ChainRun(Run):
    """One run: the data, the agent, its environments, its random streams and its directory.

    The agent has `update(batch)`, `anneal(share)`, `diagnose(batch, seed)`, `state_dict()`, `load_state_dict()`,
    `generators` of its noise, the first that of the streams, and `step`; the settings have `w2_weights`, `discount`
    and the solver's too.
    """

    config: ChainRunConfig

    @classmethod
    def check(cls, config: ChainRunConfig) -> None:
        """One line for a setting that cannot work, before anything is loaded."""
        weights = config.w2_weights
        if not weights or not all(0 <= weight < math.inf for weight in weights):
            words = " ".join(f"{weight:g}" for weight in weights)
            raise UserError(f"--w2_weights {words}: give one weight for each actor, none negative, as in 0.4 0.5 0.5")
        if config.sinkhorn_backend == "exact" and config.sinkhorn_K > MAX_EXACT:
            raise UserError(f"--sinkhorn_K {config.sinkhorn_K}: --sinkhorn_backend exact takes at most {MAX_EXACT}")
        if config.sinkhorn_backend == "online" and importlib.util.find_spec("pykeops") is None:
            raise UserError(
                "--sinkhorn_backend online: needs pykeops (pip install pykeops); or take tensorized, or fused"
            )
        sampled = (config.w2_noise, config.sinkhorn_backend)
        if config.sinkhorn_K == 1 and len(weights) > 1 and sampled != ("same", "exact"):
            raise UserError(
                "--sinkhorn_K 1: one sample says nothing of a policy's spread, so it takes --w2_noise same and "
                "--sinkhorn_backend exact; give 2 or more, the original has 4"
            )
        if config.resume and not config.save_model:
            raise UserError("--resume --no_save_model: such a run leaves nothing to go on from; start it anew")

    def __init__(self, config: ChainRunConfig):
        if config.checkpoint_dir:  # a run may be continued from another folder
            config = replace(config, checkpoint_dir=str(Path(config.checkpoint_dir).resolve()))
        super().__init__(config)

    def load_data(self) -> None:
        self.data = self.load_transitions()
        self.data_facts = made_here([self.config.env], self.config.dataset_dir)

    def build(self) -> None:
        """Normalise the data, make the agent and the environments to evaluate it in."""
        config, data = self.config, self.data
        self.mean, self.std = self.normalize()
        self.buffer = data.replay_buffer(self.device)
        self.q_bound = largest_q(data.rewards, config.discount, config.q_limit)
        with self.streams.initialising():
            self.agent = self.make_agent(data.observation_dim, data.action_dim, data.max_action)
        self.step, self.best, self.means = 0, {"score": -math.inf}, RunningMeans()
        policies = 2 * len(self.acting())
        environment = functools.partial(make_env, config.env, config.dataset_dir)
        self.evaluator = Evaluator(environment, policies * config.eval_episodes, num_workers(config.eval_workers))
        self.resources.callback(self.evaluator.close)

    def started(self, resume_step: int | None) -> None:
        self.episodes = EpisodeLog(self.log_dir() / "evaluations.csv", resume_step)
        usual = self.run_dir / "checkpoints"  # leads to another --checkpoint_dir, so that the run's directory is enough
        if self.checkpoint.parent != usual.resolve() and not usual.is_dir():
            usual.unlink(missing_ok=True)
            usual.symlink_to(self.checkpoint.parent, target_is_directory=True)

    def log_dir(self) -> Path:
        return self.run_dir / "training"

    def normalize(self) -> tuple[np.ndarray, np.ndarray]:
        """Put the data's observations in units of (s - mean) / std, in place; returns mean and std."""
        data = self.data
        if not self.config.normalize:
            return np.zeros(data.observation_dim, np.float32), np.ones(data.observation_dim, np.float32)
        mean, std = data.normalizer()
        for observations in (data.observations, data.next_observations):
            np.divide(np.subtract(observations, mean, out=observations), std, out=observations)
        return mean, std

    # -- what an algorithm defines -----------------------------------------------------------------------------------

    @abc.abstractmethod
    def load_transitions(self) -> OfflineData:
        """The data."""

    @abc.abstractmethod
    def make_agent(self, observation_dim: int, action_dim: int, max_action: float) -> Any:
        """The agent, freshly initialised."""

    @abc.abstractmethod
    def acting(self) -> list[Act]:
        """How each actor acts, in the order of the chain."""

    def is_captured(self) -> bool:
        """Whether its update is replayed as a CUDA graph: where every one does the same work, with no look at a value.

        Updates with and without the actors are different graphs, and GeomLoss's solvers look at values.
        """
        config = self.config
        same = getattr(config, "policy_freq", 1) == 1 and config.sinkhorn_backend in ("fused", "exact")
        return same and self.device.type == "cuda" and config.cuda_graph

    def generators(self) -> list[torch.Generator]:
        return [self.streams.sampling, *self.agent.generators]

    def diagnose(self) -> dict[str, float]:
        """The chain's diagnostics on the first rows of a fixed draw; no training number depends on it."""
        generator = torch.Generator(self.device).manual_seed(self.streams.evaluation_seed)
        batch = self.buffer.sample(self.config.batch_size, generator)
        found = self.agent.diagnose(batch, self.streams.evaluation_seed)
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))

    # -- directories -------------------------------------------------------------------------------------------------

    @classmethod
    def run_name(cls, config: ChainRunConfig, kind: str = "") -> Path:
        """{env}/{kind}w2_{weights}/seed_{seed}, under logs/; its checkpoint's place under `checkpoint_dir`."""
        weights = "_".join(f"{weight:g}" for weight in config.w2_weights)
        return Path(config.env) / f"{kind}w2_{weights}" / f"seed_{config.seed}"

    @classmethod
    def default_run_dir(cls, config: ChainRunConfig) -> Path:
        return Path(config.run_dir or Path("logs") / cls.run_name(config))

    @classmethod
    def checkpoint_path(cls, config: ChainRunConfig) -> Path:
        if config.checkpoint_dir:
            return Path(config.checkpoint_dir).resolve() / cls.run_name(config) / "last.pth"
        return cls.default_run_dir(config).resolve() / "checkpoints" / "last.pth"

    # -- training ----------------------------------------------------------------------------------------------------

    def update(self) -> dict[str, torch.Tensor]:
        """One update on a fresh batch, which waits for nothing on the host."""
        return self.agent.update(self.buffer.sample(self.config.batch_size, self.streams.sampling))

    def record(self, info: dict[str, torch.Tensor], bar: tqdm) -> None:
        """Count an update; log, evaluate and save where it is time to."""
        self.means.add(info)
        self.step += 1
        logs, evaluates = self.step % self.config.log_freq == 0, self.is_evaluation(self.step)
        if not (logs or evaluates):
            return
        metrics = self.means.take()
        self.check_metrics(metrics, "lower the learning rates, raise --w2_weights, or allow more with --q_limit")
        bar.set_postfix(q=f"{metrics['q_data']:.1f}", critic_loss=f"{metrics['critic_loss']:.3g}")
        metrics |= self.diagnose()
        if evaluates:
            metrics |= self.evaluate()
        self.logger.log(self.step, metrics)
        if evaluates or self.is_save_due():
            self.save()  # before the lines that say how far it is: whoever stops it then keeps what they tell of
        if evaluates:
            self.print_evaluation(metrics)

    def is_evaluation(self, step: int) -> bool:
        return step % self.config.eval_freq == 0 or step == self.config.max_timesteps

    # -- evaluation --------------------------------------------------------------------------------------------------

    def rollout(self, seeds: list[int], noise_seed: int, desc: str) -> Episodes:
        """Every actor, deterministic and stochastic, one episode a seed; policies in the order of `policy_names`."""
        normalizer = [torch.from_numpy(values).to(self.device) for values in (self.mean, self.std)]
        return rollout(self.evaluator, self.acting(), self.data.action_dim, *normalizer, seeds, noise_seed, desc)

    def score(self, returns: np.ndarray) -> np.ndarray:
        return normalized_score(self.config.env, returns, self.config.dataset_dir)

    def data_score(self) -> float:
        return float(data_scores(self.data, self.config.dataset_dir).mean())

    def evaluate(self) -> dict[str, float]:
        """Score every actor on the run's evaluation episodes; keep every episode, and where the best score was."""
        seeds = episode_seeds(self.streams.evaluation_seed, self.config.eval_episodes)
        played = self.rollout(seeds, self.streams.evaluation_seed, "evaluate")
        names = policy_names(len(self.acting()))
        scores = self.score(played.returns)
        self.episodes.add(self.step, names, played.returns, played.lengths, scores)
        metrics = {}
        for (number, mode), returns, score in zip(names, played.returns, scores.mean(1).tolist(), strict=True):
            name = f"eval/actor_{number}/{mode}"
            metrics |= {f"{name}/return": float(returns.mean()), f"{name}/return_std": float(returns.std())}
            metrics[f"{name}/score"] = score
            if score > self.best["score"]:
                self.best = {"score": score, "actor": number, "mode": mode, "step": self.step}
        return metrics

    def print_evaluation(self, metrics: dict[str, float]) -> None:
        """The block of an evaluation, from its metrics."""
        lines = [f"Update {self.step:,}.", f"Evaluation over {counted(self.config.eval_episodes)}:"]
        for number, mode in policy_names(len(self.acting())):
            name = f"eval/actor_{number}/{mode}"
            lines.append(
                describe_score(self.config.env, number, mode, metrics[f"{name}/return"], metrics[f"{name}/score"])
            )
        tqdm.write("\n".join(lines))

    def final_evaluation(self) -> dict[str, float]:
        """`final_runs` evaluations on seeds of their own: mean score of each actor, and the spread over the runs."""
        runs = self.config.final_runs
        first, seeds = final_seeds(self.streams, runs * self.config.eval_episodes)
        played = self.rollout(seeds, first, "final evaluation")
        scores = self.score(played.returns)
        names = policy_names(len(self.acting()))
        self.episodes.add(self.step, names, played.returns, played.lengths, scores, "final")
        report = report_final(self.config.env, "Final evaluation, last checkpoint", played, scores, runs)
        return report | report_steps(self.diagnose(), scores)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        if not self.config.save_model:
            return
        self.agent.step = self.step
        state = {
            "env": self.config.env,
            "data": self.data.facts(),
            "config": self.model_config(),
            "max_action": self.data.max_action,
            "action_dim": self.data.action_dim,
            "observation_mean": torch.from_numpy(self.mean),
            "observation_std": torch.from_numpy(self.std),
            "agent": self.agent.state_dict(),
            "streams": self.streams.state_dict(),
            "later_noise": [generator.get_state() for generator in self.agent.generators[1:]],
            "step": self.step,
            "best": self.best,
        }
        self.write_checkpoint(state)
        if self.config.keep_checkpoints and self.is_evaluation(self.step):
            save_checkpoint(self.checkpoint.with_name(f"step_{self.step}.pth"), state)

    def load_state(self, path: Path, state: dict[str, Any]) -> None:
        mean, std = state["observation_mean"].cpu().numpy(), state["observation_std"].cpu().numpy()
        same = np.array_equal(mean, self.mean) and np.array_equal(std, self.std)
        if not same or state["data"] != self.data.facts():
            raise UserError(path, "began on other data", "give its --dataset_dir, or another --run_dir")
        self.agent.load_state_dict(state["agent"])
        self.streams.load_state_dict(state["streams"])
        for generator, stored in zip(self.agent.generators[1:], state["later_noise"], strict=True):
            generator.set_state(stored.cpu())
        self.step, self.best = state["step"], state["best"]

    def plot(self) -> None:
        title = str(self.run_name(self.config))
        metrics, path = read_metrics(self.run_dir / "training"), self.run_dir / "training_curves.png"
        plot_chain_curves(metrics, path, title, len(self.acting()), self.data_score())

    def describe(self) -> str:
        facts, data = self.data.facts(), self.data
        shift = f", rewards shifted by {data.reward_shift:g}" if data.reward_shift else ""
        other = " (too few to be D4RL's own file)" if is_official(data.dataset_id, len(data)) is False else ""
        return (
            f"{data.dataset_id}: {len(data):,} transitions{other}, {counted(facts['episodes'])}, mean return "
            f"{facts['mean_return']:.1f} (score {self.data_score():.1f}){shift}; {self.device}"
        )

    def finish(self) -> dict[str, Any]:
        """Score the last checkpoint, write the picture and finished.json; returns what that holds."""
        scores = self.final_evaluation()
        self.plot()
        summary = {**scores, "data_score": self.data_score(), "steps": self.step, "best": self.best}
        summary |= {"seed": self.config.seed, **self.summary(), "w2_weights": list(self.config.w2_weights)}
        summary |= self.data.facts()
        mark_finished(self.run_dir, summary)
        return summary

    def summary(self) -> dict[str, Any]:
        """Further entries of finished.json."""
        return {}


# -- training one run ------------------------------------------------------------------------------------------------


def run_chain(run_class: type[ChainRun], config: ChainRunConfig) -> dict[str, Any]:
    """Train one run to its end, and score it; what finished.json holds. Raises UserError where it cannot go on."""
    with run_class(config) as run:
        print(run.describe())
        began, before = time.perf_counter(), run.step
        train(run)
        summary = run.finish()
        seconds = time.perf_counter() - began
        print(f"{part_of(run.step, run.step - before)} updates in {seconds:.0f} seconds; outputs in {run.run_dir}")
    return summary


def train(run: ChainRun) -> None:
    """Bring a run to max_timesteps, logging, evaluating and saving on the way."""
    total = run.config.max_timesteps
    update = GraphedStep(run.update, run.generators()) if run.is_captured() else run.update
    with progress(total, run.config.env, initial=run.step, unit="update") as bar:
        while run.step < total:
            run.agent.anneal(run.step / total)
            run.record(update(), bar)
            bar.update()


# -- evaluation --------------------------------------------------------------------------------------------------------


def policy_names(actors: int) -> list[tuple[int, str]]:
    return [(number, mode) for number in range(actors) for mode in MODES]


def rollout(
    evaluator: Evaluator,
    actors: Sequence[Act],
    action_dim: int,
    mean: torch.Tensor,
    std: torch.Tensor,
    seeds: list[int],
    noise_seed: int,
    desc: str,
) -> Episodes:
    """One episode a seed of every actor, deterministic (z = 0) and stochastic, on observations (s - mean) / std.

    All actors have the same noise, drawn anew in each round, so that how many there are changes nothing of an actor.
    """
    generator = torch.Generator(mean.device)

    @torch.no_grad()
    def policies(observations: np.ndarray, alive: np.ndarray) -> torch.Tensor:
        states = (torch.as_tensor(observations, device=mean.device) - mean) / std
        z = torch.zeros(*states.shape[:2], action_dim, device=mean.device)
        z[1::2] = torch.randn(z.shape[1:], generator=generator, device=mean.device)
        return torch.cat([actor(states[2 * i : 2 * i + 2], z[2 * i : 2 * i + 2]) for i, actor in enumerate(actors)])

    return evaluator.evaluate(
        policies, 2 * len(actors), seeds, desc, lambda start: generator.manual_seed(noise_seed + start)
    )


def final_seeds(streams: RandomStreams, count: int) -> tuple[int, list[int]]:
    """Seed of the noise and reset seeds of the evaluation at the end, which no evaluation before has used."""
    first = (streams.evaluation_seed + 1) % 2**31
    return first, episode_seeds(first, count)


def describe_score(dataset_id: str, number: int, mode: str, mean_return: float, score: float) -> str:
    """A policy's line of an evaluation."""
    name = find_dataset(dataset_id).score_name
    return f"  Actor {number} - {mode.capitalize()}: {mean_return:.3f}, {name}: {score:.3f}"


def report_final(dataset_id: str, title: str, played: Episodes, scores: np.ndarray, runs: int) -> dict[str, float]:
    """Print and return the mean score of each policy over runs of equally many episodes; scores [P, episodes]."""
    metrics = {}
    count = scores.shape[1] // runs
    print(f"{title}: {f'{runs} runs of ' if runs > 1 else ''}{counted(count)}:")
    for (number, mode), returns, score in zip(policy_names(len(scores) // 2), played.returns, scores, strict=True):
        means = score.reshape(runs, -1).mean(1)
        metrics[f"actor_{number}/{mode}/score"] = float(means.mean())
        spread = f" ± {means.std():.3f} over runs" if runs > 1 else ""
        print(f"{describe_score(dataset_id, number, mode, returns.mean(), means.mean())}{spread}")
    return metrics
