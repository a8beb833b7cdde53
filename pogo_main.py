"""Train a POGO chain on one dataset and score every actor of it.

With no flag: a short run on local/hopper-medium-v2, which is made first; minutes on two cores. A result worth quoting
takes --max_timesteps 1000000. A run's directory, logs/{env}/w2_{weights}/seed_{seed}, holds config.yaml,
training/metrics.csv, training/evaluations.csv (every episode), TensorBoard events, training_curves.png and
checkpoints/last.pth.

    python pogo_main.py --env halfcheetah-medium-v2 --w2_weights 0.2 0.2 0.2 --max_timesteps 1000000
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import make_dataset
from evaluation import Episodes, Evaluator, episode_seeds
from model import TransportActor
from offline_data import OfflineData, data_scores, load_transitions, make_env, normalized_score
from pogo_agent import POGOAgent, POGOConfig
from transport import MAX_EXACT
from utils import (
    EpisodeLog,
    GraphedStep,
    MetricLogger,
    RandomStreams,
    RunningMeans,
    UserError,
    check_bounds,
    check_run,
    hold_run,
    load_checkpoint,
    mark_finished,
    one_line,
    parse_config,
    plain_config,
    prepare_run,
    progress,
    read_metrics,
    resolve_device,
    run_cli,
    save_checkpoint,
    warn,
)
from visualize import plot_chain_curves


@dataclass
class POGOTrainerConfig(POGOConfig):
    env: str = "local/hopper-medium-v2"  # id of the dataset: D4RL's, local/<id>, minari/<id>, or OGBench's single tasks
    dataset_dir: str | None = None  # folder of the data; default: D4RL_DATASET_DIR, or the benchmark's usual folder
    seed: int = 0  # seed of initialisation, sampling, noise and evaluation, each a stream of its own
    max_timesteps: int = 10_000  # updates of the run; 1,000,000 for a result to quote
    batch_size: int = 256  # transitions in an update
    normalize: bool = True  # train on (s - mean) / (std + 1e-3), with the data's mean and standard deviation
    antmaze_reward_shift: float = -1.0  # added to the rewards of D4RL's antmazes, and to no others
    eval_freq: int = 5_000  # updates between evaluations; each one writes a checkpoint
    eval_episodes: int = 10  # episodes of an evaluation, for every actor, deterministic and stochastic
    final_runs: int = 5  # evaluations at the end, on seeds that no other evaluation uses
    eval_workers: int | None = None  # more processes that step environments; default: cores - 1, at most 7
    log_freq: int = 1_000  # updates between rows of metrics.csv, with the chain's diagnostics
    q_limit: float = 10.0  # stop the run where mean Q passes so many times the largest return that the rewards allow
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda or cuda:<index>
    cuda_graph: bool = True  # on a GPU: capture the update once and replay it
    save_model: bool = True  # write checkpoints, without which a run cannot be resumed
    keep_checkpoints: bool = False  # keep each evaluation's checkpoint too, as step_<updates>.pth
    checkpoint_dir: str | None = None  # keep checkpoints in <this>/{env}/w2_{weights}/seed_{seed} instead
    run_dir: str | None = None  # directory of the run; default: logs/{env}/w2_{weights}/seed_{seed} here
    resume: bool = False  # continue the run from its last checkpoint
    tensorboard: bool = True  # write TensorBoard events
    wandb_project: str | None = None  # also log to Weights & Biases (requirements-tracking.txt)
    evaluate: str | None = None  # train nothing: score the actors of this last.pth as at the end of its run
    evaluate_episodes: int | None = None  # with --evaluate: so many episodes instead
    evaluate_seed: int | None = None  # with --evaluate: on other episodes than the run itself


# What each number may be: smallest and largest value, ends included.
BOUNDS = {
    **dict.fromkeys(("batch_size", "eval_freq", "eval_episodes", "log_freq", "policy_freq"), (1, 10**9)),
    **dict.fromkeys(("max_timesteps", "final_runs", "hidden_dim"), (1, 10**9)),
    "sinkhorn_K": (2, 64),
    "eval_workers": (0, 256),
    "evaluate_episodes": (1, 10**9),
    **dict.fromkeys(("seed", "evaluate_seed"), (0, 2**53)),
    **dict.fromkeys(("lr", "sinkhorn_blur", "q_limit"), (1e-9, 1e9)),
    **dict.fromkeys(("policy_noise", "noise_clip"), (0.0, 1e3)),
    "antmaze_reward_shift": (-1e6, 1e6),
    "discount": (0.0, 1 - 1e-9),
    "tau": (1e-9, 1.0),
}
MAY_CHANGE_ON_RESUME = {
    *("dataset_dir", "device", "cuda_graph", "eval_workers", "tensorboard", "wandb_project", "save_model"),
    *("keep_checkpoints", "evaluate", "evaluate_episodes", "evaluate_seed"),
}
NOT_THE_MODEL = {"resume", "run_dir", "checkpoint_dir", *MAY_CHANGE_ON_RESUME}
MODES = ("deterministic", "stochastic")


def check(config: POGOTrainerConfig) -> None:
    """One line for a setting that cannot work, before anything is loaded."""
    check_bounds(config, BOUNDS)
    weights = " ".join(f"{weight:g}" for weight in config.w2_weights)
    if not config.w2_weights or not all(0 <= weight < math.inf for weight in config.w2_weights):
        raise UserError(f"--w2_weights {weights}: give one weight for each actor, none negative, as in 0.4 0.5 0.5")
    if config.sinkhorn_backend == "exact" and config.sinkhorn_K > MAX_EXACT:
        raise UserError(f"--sinkhorn_K {config.sinkhorn_K}: --sinkhorn_backend exact takes at most {MAX_EXACT}")
    if config.resume and not config.save_model:
        raise UserError("--resume --no_save_model: such a run leaves nothing to go on from; start it anew")


def run_name(config: POGOTrainerConfig) -> Path:
    """{env}/w2_{weights}/seed_{seed}, weights joined by _."""
    weights = "_".join(f"{weight:g}" for weight in config.w2_weights)
    return Path(config.env) / f"w2_{weights}" / f"seed_{config.seed}"


def default_run_dir(config: POGOTrainerConfig) -> Path:
    """The directory that the settings name, or the usual one."""
    return Path(config.run_dir or Path("logs") / run_name(config))


def checkpoint_path(config: POGOTrainerConfig) -> Path:
    """Where the run's checkpoint lies."""
    if config.checkpoint_dir:
        return Path(config.checkpoint_dir).resolve() / run_name(config) / "last.pth"
    return default_run_dir(config).resolve() / "checkpoints" / "last.pth"


def open_dataset(config: POGOTrainerConfig) -> OfflineData:
    """The transitions; a local dataset that is missing is made first."""
    try:
        make_dataset.generate_if_missing(config.env, config.dataset_dir)
        return load_transitions(config.env, config.dataset_dir, config.antmaze_reward_shift)
    except UserError as error:
        raise UserError(str(error).replace("--dataset ", "--env ")) from None


class POGORun:
    """One run: the data, the agent, its environments, its random streams and its directory."""

    def __init__(self, config: POGOTrainerConfig):
        check(config)
        if config.checkpoint_dir:  # a run may be continued from another folder
            config = replace(config, checkpoint_dir=str(Path(config.checkpoint_dir).resolve()))
        self.config, self.device = config, resolve_device(config.device)
        self.run_dir, self.checkpoint = default_run_dir(config), checkpoint_path(config)
        where = {"may_change": MAY_CHANGE_ON_RESUME, "checkpoint_name": str(self.checkpoint)}
        check_run(self.run_dir, config, config.resume, **where)  # before the data is made or loaded
        self.streams, self.resources = RandomStreams(config.seed, self.device), contextlib.ExitStack()
        self.data = open_dataset(config)
        try:
            for folder in {self.run_dir.resolve(), self.checkpoint.parent}:
                self.resources.enter_context(hold_run(folder))
            self.open(prepare_run(self.run_dir, config, config.resume, **where))
        except BaseException:
            self.close()
            raise

    def open(self, checkpoint: Path | None) -> None:
        """Build the agent, move the data to the device, continue from the checkpoint if there is one."""
        config, data = self.config, self.data
        with self.streams.initialising():
            sizes = (data.observation_dim, data.action_dim, data.max_action)
            self.agent = POGOAgent(config, *sizes, self.streams.policy, self.device)
        self.mean, self.std = np.zeros(data.observation_dim, np.float32), np.ones(data.observation_dim, np.float32)
        if config.normalize:
            self.mean, self.std = data.normalizer()
            for observations in (data.observations, data.next_observations):
                np.divide(np.subtract(observations, self.mean, out=observations), self.std, out=observations)
        self.q_bound = config.q_limit * float(np.abs(data.rewards).max()) / (1 - config.discount)
        self.buffer = data.replay_buffer(self.device)
        self.step, self.best, self.warned = 0, {"score": -math.inf}, False
        if checkpoint is not None:
            self.load(checkpoint)
        resume_step = self.step if checkpoint else None
        training = self.run_dir / "training"
        training.mkdir(exist_ok=True)
        self.logger = MetricLogger(training, resume_step, config.tensorboard, config.wandb_project, config)
        self.resources.callback(self.logger.close)
        self.episodes = EpisodeLog(training / "evaluations.csv", resume_step)
        policies = 2 * len(config.w2_weights)
        environment = functools.partial(make_env, config.env, config.dataset_dir)
        self.evaluator = Evaluator(environment, policies * config.eval_episodes, num_workers(config))
        self.resources.callback(self.evaluator.close)

    def close(self) -> None:
        """Release the directory, the environments and the log; closing twice is harmless."""
        self.resources.close()

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Update to max_timesteps, logging, evaluating and saving on the way. Returns the scores of the end."""
        config = self.config
        update = self.make_update()
        total, means = config.max_timesteps, RunningMeans()
        with progress(total, config.env, initial=self.step, unit="update") as bar:
            while self.step < total:
                self.agent.anneal(self.step / total)
                means.add(update())
                self.step += 1
                bar.update()
                logs, evaluates = self.step % config.log_freq == 0, self.is_evaluation(self.step)
                if logs or evaluates:
                    metrics = means.take()
                    self.check_losses(metrics)
                    bar.set_postfix(q=f"{metrics['q_data']:.1f}", critic_loss=f"{metrics['critic_loss']:.3g}")
                    metrics |= self.diagnose()
                    if evaluates:
                        metrics |= self.evaluate()
                    self.logger.log(self.step, metrics)
                    if evaluates:
                        self.save()
        return self.final_evaluation()

    def is_evaluation(self, step: int) -> bool:
        """Whether the run evaluates and saves after this many updates."""
        return step % self.config.eval_freq == 0 or step == self.config.max_timesteps

    def make_update(self) -> Callable[[], dict[str, torch.Tensor]]:
        """One update on a fresh batch; on a GPU, replayed from a captured graph unless that is turned off."""
        config = self.config

        def update() -> dict[str, torch.Tensor]:
            return self.agent.update(self.buffer.sample(config.batch_size, self.streams.sampling))

        # Updates with and without the actors are different graphs, and GeomLoss's solvers look at values on the host.
        captured = config.policy_freq == 1 and config.sinkhorn_backend in ("fused", "exact")
        if self.device.type != "cuda" or not config.cuda_graph or not captured:
            return update
        return GraphedStep(update, [self.streams.sampling, self.streams.policy])

    def check_losses(self, metrics: dict[str, float]) -> None:
        """Stop a run that has diverged; UserError says where and what to change."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise UserError(f"{self.run_dir}: {name} is {value} at update {self.step}; lower --lr")
        largest = max(abs(value) for name, value in metrics.items() if name == "q_data" or name.endswith("/q"))
        if largest > self.q_bound:
            raise UserError(
                f"{self.run_dir}: mean Q is {largest:.4g} at update {self.step}, more than --q_limit "
                f"{self.config.q_limit:g} times the largest return that the rewards allow; raise --w2_weights"
            )

    def diagnose(self) -> dict[str, float]:
        """The chain's diagnostics on the first rows of a fixed draw; no training number depends on it."""
        generator = torch.Generator(self.device).manual_seed(self.streams.evaluation_seed)
        batch = self.buffer.sample(self.config.batch_size, generator)
        found = self.agent.diagnose(batch, self.streams.evaluation_seed)
        figures = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
        largest = max((value for name, value in figures.items() if name.endswith("blur_to_spread")), default=0.0)
        if largest > 1 and not self.warned and self.config.sinkhorn_backend != "exact":
            self.warned = True
            warn(
                f"the blur is {largest:.1f} times the spread of an actor's samples, so that distances see little but "
                "their means; --blur_relative spread or a smaller --sinkhorn_blur would see more"
            )
        return figures

    # -- evaluation --------------------------------------------------------------------------------------------------

    def play(self, seeds: list[int], noise_seed: int, desc: str) -> Episodes:
        """Every actor, deterministic and stochastic, one episode a seed; policies in the order of `policy_names`."""
        actors, mean, std = self.agent.actors, torch.from_numpy(self.mean), torch.from_numpy(self.std)
        return play(self.evaluator, actors, mean.to(self.device), std.to(self.device), seeds, noise_seed, desc)

    def policy_names(self) -> list[tuple[int, str]]:
        """Actor and mode of each evaluated policy."""
        return policy_names(len(self.config.w2_weights))

    def score(self, returns: np.ndarray) -> np.ndarray:
        """Normalised scores of returns, of any shape."""
        return normalized_score(self.config.env, returns, self.config.dataset_dir)

    def data_score(self) -> float:
        """Mean score of the dataset's own episodes."""
        return float(data_scores(self.data, self.config.dataset_dir).mean())

    def evaluate(self) -> dict[str, float]:
        """Score every actor on the run's evaluation episodes, print the block, keep every episode."""
        seeds = episode_seeds(self.streams.evaluation_seed, self.config.eval_episodes)
        played = self.play(seeds, self.streams.evaluation_seed, "evaluate")
        self.episodes.add(self.step, self.policy_names(), played.returns, played.lengths, self.score(played.returns))
        figures, lines = {}, [f"Evaluation over {len(seeds)} episodes:"]
        for (number, mode), returns in zip(self.policy_names(), played.returns, strict=True):
            score = float(self.score(returns).mean())
            figures |= {f"eval/actor_{number}/{mode}/return": float(returns.mean())}
            figures |= {f"eval/actor_{number}/{mode}/score": score}
            lines.append(f"  Actor {number} - {mode.capitalize()}: {returns.mean():.3f}, D4RL score: {score:.3f}")
            if score > self.best["score"]:
                self.best = {"score": score, "actor": number, "mode": mode, "step": self.step}
        tqdm.write("\n".join(lines))
        return figures

    def final_evaluation(self) -> dict[str, float]:
        """`final_runs` evaluations on seeds of their own: mean score of each actor, and the spread over the runs."""
        first, seeds = final_seeds(self.streams, self.config.final_runs * self.config.eval_episodes)
        played = self.play(seeds, first, "final evaluation")
        scores = self.score(played.returns)
        self.episodes.add(self.step, self.policy_names(), played.returns, played.lengths, scores, "final")
        return report_final("Final evaluation, last checkpoint", played, scores, self.config.final_runs)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """checkpoints/last.pth, whole or the one before."""
        if not self.config.save_model:
            return
        self.agent.step = self.step
        state = {
            "env": self.config.env,
            "data": self.data.facts(),
            "config": self.model_config(),
            "max_action": self.data.max_action,
            "observation_mean": torch.from_numpy(self.mean),
            "observation_std": torch.from_numpy(self.std),
            "agent": self.agent.state_dict(),
            "streams": self.streams.state_dict(),
            "step": self.step,
            "best": self.best,
        }
        save_checkpoint(self.checkpoint, state)
        if self.config.keep_checkpoints:
            save_checkpoint(self.checkpoint.with_name(f"step_{self.step}.pth"), state)

    def model_config(self) -> dict[str, Any]:
        """The settings that make this run what it is; where and how long it goes on are not among them."""
        return {name: value for name, value in plain_config(self.config).items() if name not in NOT_THE_MODEL}

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; UserError where it is another run's or model's, or began on other data."""
        state = load_checkpoint(path, self.device)
        try:
            own = self.model_config()
            other = next((name for name in own if state["config"].get(name) != own[name]), None)
            if other is not None:
                raise UserError(
                    f"{path}: checkpoint of another run ({other} {state['config'].get(other)}, here {own[other]}); "
                    "choose another --checkpoint_dir or --run_dir"
                )
            mean, std = state["observation_mean"].cpu().numpy(), state["observation_std"].cpu().numpy()
            same = np.array_equal(mean, self.mean) and np.array_equal(std, self.std)
            if not same or state["data"] != self.data.facts():
                raise UserError(f"{path}: began on other data; give its --dataset_dir, or another --run_dir")
            self.agent.load_state_dict(state["agent"])
            self.streams.load_state_dict(state["streams"])
            self.step, self.best = state["step"], state["best"]
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a checkpoint of this model ({error}); choose another --run_dir") from None

    def plot(self) -> None:
        """training_curves.png."""
        config = self.config
        weights = " ".join(f"{weight:g}" for weight in config.w2_weights)
        title = f"{config.env}, w2_weights {weights}, seed {config.seed}"
        baseline = self.data_score()
        metrics = read_metrics(self.run_dir / "training")
        plot_chain_curves(metrics, self.run_dir / "training_curves.png", title, len(config.w2_weights), baseline)


def policy_names(actors: int) -> list[tuple[int, str]]:
    """Actor and mode of each policy that `play` plays."""
    return [(number, mode) for number in range(actors) for mode in MODES]


def play(
    evaluator: Evaluator,
    actors: Sequence[TransportActor],
    mean: torch.Tensor,
    std: torch.Tensor,
    seeds: list[int],
    noise_seed: int,
    desc: str,
) -> Episodes:
    """One episode a seed of every actor, deterministic (z = 0) and stochastic, on observations (s - mean) / std."""
    generator = torch.Generator(mean.device).manual_seed(noise_seed)

    @torch.no_grad()
    def policies(observations: np.ndarray, alive: np.ndarray) -> torch.Tensor:
        states = (torch.as_tensor(observations, device=mean.device) - mean) / std
        z = torch.zeros(*states.shape[:2], actors[0].action_dim, device=mean.device)
        z[1::2].normal_(generator=generator)
        return torch.cat([actor(states[2 * i : 2 * i + 2], z[2 * i : 2 * i + 2]) for i, actor in enumerate(actors)])

    return evaluator.evaluate(policies, 2 * len(actors), seeds, desc)


def final_seeds(streams: RandomStreams, count: int) -> tuple[int, list[int]]:
    """Seed of the noise and reset seeds of the evaluation at the end, which no evaluation before has used."""
    first = (streams.evaluation_seed + 1) % 2**31
    return first, episode_seeds(first, count)


def report_final(title: str, played: Episodes, scores: np.ndarray, runs: int) -> dict[str, float]:
    """Print and return the mean score of each policy over runs of equally many episodes; scores [P, episodes]."""
    figures = {}
    count = scores.shape[1] // runs
    print(f"{title}: {runs} runs of {count} episodes:" if runs > 1 else f"{title}: {count} episodes:")
    for (number, mode), returns, score in zip(policy_names(len(scores) // 2), played.returns, scores, strict=True):
        means = score.reshape(runs, -1).mean(1)
        figures[f"actor_{number}/{mode}/score"] = float(means.mean())
        spread = f" ± {means.std():.3f} over runs" if runs > 1 else ""
        print(f"  Actor {number} - {mode.capitalize()}: {returns.mean():.3f}, D4RL score: {means.mean():.3f}{spread}")
    return figures


class Policy:
    """A trained chain from its last.pth alone, to act with.

    policy = Policy("logs/.../checkpoints/last.pth"); action = policy.act(observation)

    Raises UserError for a file that is no checkpoint of this script.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu"):
        state = load_checkpoint(path, device)
        if "observation_mean" not in state:
            raise UserError(f"{path}: not a checkpoint of pogo_main.py; give the last.pth of one of its runs")
        try:
            self.env, self.config, self.step = state["env"], state["config"], state["step"]
            self.seed, self.eval_episodes, self.final_runs = (
                self.config[name] for name in ("seed", "eval_episodes", "final_runs")
            )
            self.mean, self.std = state["observation_mean"].to(device), state["observation_std"].to(device)
            self.actors = self._build(state, device)
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a checkpoint of pogo_main.py ({one_line(error)})") from None

    def _build(self, state: dict[str, Any], device: str | torch.device) -> list[TransportActor]:
        weights, actors = state["agent"]["actors"], []
        sizes = (len(self.mean), len(weights["0.net.4.bias"]), state["max_action"], self.config["hidden_dim"])
        for number in range(len(self.config["w2_weights"])):
            prefix, actor = f"{number}.", TransportActor(*sizes)
            own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            actor.load_state_dict(own)
            actors.append(actor.to(device).requires_grad_(False))
        return actors

    @torch.no_grad()
    def act(self, observations: np.ndarray, actor: int = -1, stochastic: bool = False) -> np.ndarray:
        """Actions [..., A] of raw observations [..., D]: of the last actor, with z = 0 unless stochastic."""
        states = torch.as_tensor(observations, dtype=torch.float32, device=self.mean.device)
        z = states.new_zeros(*states.shape[:-1], self.actors[actor].action_dim)
        return self.actors[actor]((states - self.mean) / self.std, z.normal_() if stochastic else z).cpu().numpy()


def evaluate_file(config: POGOTrainerConfig) -> dict[str, float]:
    """`--evaluate`: the evaluation at the end of a run once more, from its checkpoint alone."""
    device = resolve_device(config.device)
    policy = Policy(config.evaluate, device)
    runs, episodes = policy.final_runs, policy.eval_episodes
    if config.evaluate_episodes is not None:
        runs, episodes = 1, config.evaluate_episodes
    seed = policy.seed if config.evaluate_seed is None else config.evaluate_seed
    first, seeds = final_seeds(RandomStreams(seed, device), runs * episodes)
    environment = functools.partial(make_env, policy.env, config.dataset_dir)
    with Evaluator(environment, 2 * len(policy.actors) * min(episodes, 10), num_workers(config)) as evaluator:
        played = play(evaluator, policy.actors, policy.mean, policy.std, seeds, first, "evaluate")
    title = f"{policy.env}, update {policy.step} of {config.evaluate}"
    return report_final(title, played, normalized_score(policy.env, played.returns, config.dataset_dir), runs)


def num_workers(config: POGOTrainerConfig) -> int:
    """Processes that step environments beside this one."""
    return min((os.cpu_count() or 1) - 1, 7) if config.eval_workers is None else config.eval_workers


def describe(run: POGORun) -> str:
    """What is trained on: the data in one line."""
    facts, data = run.data.facts(), run.data
    score = run.data_score()
    shift = f", rewards shifted by {data.reward_shift:g}" if data.reward_shift else ""
    return (
        f"{data.dataset_id}: {len(data):,} transitions, {facts['episodes']} episodes, mean return "
        f"{facts['mean_return']:.1f} (score {score:.1f}){shift}; {run.device}"
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train one run to its end; returns what finished.json holds."""
    config = parse_config(POGOTrainerConfig, argv, __doc__, default_run_dir=default_run_dir)
    if config.evaluate is not None:
        check(config)
        return evaluate_file(config)
    began = time.perf_counter()
    run = POGORun(config)
    print(describe(run))
    first = run.step
    with contextlib.closing(run):
        scores = run.train()
        run.plot()
        summary = {**scores, "data_score": run.data_score(), "steps": run.step}
        summary |= {"best": run.best, "w2_weights": list(config.w2_weights), "seed": config.seed, **run.data.facts()}
        mark_finished(run.run_dir, summary)
    seconds = time.perf_counter() - began
    print(f"{run.step - first:,} updates in {seconds:.0f} seconds; outputs in {run.run_dir}")
    return summary


if __name__ == "__main__":
    run_cli(main)
