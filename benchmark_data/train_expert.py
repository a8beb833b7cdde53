"""Train an expert policy with SAC of stable-baselines3: the walkers behind the local datasets.

    python -m benchmark_data.train_expert --env hopper

A run's directory holds config.yaml, metrics.csv, policies/<env>_<step>.safetensors with a card each, learning_curve.png
and checkpoints/last.pth, which includes the replay buffer. `make_dataset.py --experts_dir <run>/policies` uses them.
A resumed run goes on with networks, optimizers and replay buffer, but is not bit-exact: it begins a new episode with
random numbers of its own.

Needs `pip install -r requirements/experts.txt`. One core trains about 100 steps a second.

Recipes: ant-xy is that of OGBench's data_gen_scripts/main_sac.py, the others SAC's published settings
(Haarnoja et al. 2018) with two layers of 256. The ant takes the learning rate 3e-4 and 250,000 steps where OGBench
takes 1e-4 and 400,000, because it comes as far in half the steps (docs/notebook_data.md). What stable-baselines3 does
differently from OGBench's JAX code: it updates the critic before the actor instead of both at once, learns the
logarithm of the temperature, bounds the log standard deviation by [-20, 2] instead of [-5, 2], and does not scale down
the actor's last layer at the start.
"""

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from torch import nn

from benchmark_data import experts
from runs.cli import parse_config, run_cli
from runs.directory import mark_finished
from runs.metrics import read_metrics
from runs.plots import Panel, panels_figure
from runs.run import Run, RunConfig
from utils import Basic, Count, MayChange, PositiveFraction, UserError, Whole, progress


@dataclass
class TrainExpertConfig(RunConfig):
    env: Basic[Literal[tuple(experts.ENVIRONMENTS)]] = "hopper"  # robot and task
    max_timesteps: Basic[MayChange[Count | None]] = None  # environment steps; default: the recipe's
    lr: PositiveFraction = 3e-4  # learning rate of actor, critics and temperature
    batch_size: Count = 256  # transitions in an update
    hidden_dim: Count = 256  # width of the two hidden layers of the actor and of each critic
    discount: PositiveFraction = 0.99  # discount factor of rewards
    tau: PositiveFraction = 0.005  # step of the target critics towards the critics
    start_steps: Whole = 10_000  # uniformly random actions before the first update
    buffer_size: Count = 1_000_000  # transitions in the replay buffer
    snapshot_every: Count = 10_000  # steps between policy files, each of them evaluated, and between checkpoints
    eval_episodes: Count = 10  # deterministic episodes of a snapshot's evaluation
    card_episodes: MayChange[Count] = experts.CARD_EPISODES  # episodes behind the cards of the last and the best policy
    log_every: Count = 2_000  # steps between rows of metrics.csv


LOSSES = {"critic_loss": "train/critic_loss", "actor_loss": "train/actor_loss", "temperature": "train/ent_coef"}


@dataclass(frozen=True)
class Recipe:
    """What differs between environments: OGBench's, or SAC's."""

    steps: int = 300_000  # environment steps
    activation: str = "relu"
    entropy: float = 1.0  # target entropy as a multiple of -dim(action)
    source: str = "SAC, Haarnoja et al. 2018, as in stable-baselines3"


_OGBENCH = "OGBench data_gen_scripts/main_sac.py, but for what train_expert.py lists"
RECIPES = {
    "ant-xy": Recipe(250_000, "gelu_tanh", 0.5, _OGBENCH),
    **dict.fromkeys(("hopper", "halfcheetah", "walker2d"), Recipe()),
    **dict.fromkeys(("walker_walk", "walker_run"), Recipe(200_000)),
}
ACTIVATIONS = {"relu": nn.ReLU, "gelu_tanh": functools.partial(nn.GELU, approximate="tanh")}


def stable_baselines3() -> Any:
    try:
        import stable_baselines3
    except ImportError:
        raise UserError("training an expert needs stable-baselines3: pip install -r requirements/experts.txt") from None
    return stable_baselines3


def build_model(config: TrainExpertConfig, env: gymnasium.Env, seed: int) -> Any:
    """SAC on `env`, seeded; it draws from the global generators of NumPy and torch."""
    sb3 = stable_baselines3()
    from stable_baselines3.common.logger import Logger

    recipe, layers = RECIPES[config.env], [config.hidden_dim, config.hidden_dim]
    activation = ACTIVATIONS[recipe.activation]
    seen = gymnasium.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)  # half the replay buffer
    model = sb3.SAC(
        "MlpPolicy",
        gymnasium.wrappers.TransformObservation(env, lambda observation: observation.astype(np.float32), seen),
        learning_rate=config.lr,
        buffer_size=config.buffer_size,
        learning_starts=config.start_steps,
        batch_size=config.batch_size,
        tau=config.tau,
        gamma=config.discount,
        train_freq=1,
        gradient_steps=1,
        target_entropy=-recipe.entropy * env.action_space.shape[0],
        policy_kwargs={"net_arch": layers, "activation_fn": activation, "optimizer_kwargs": {"fused": True}},
        seed=seed % 2**32,
        device="cpu",
    )
    model.set_logger(Logger(folder=None, output_formats=[]))  # metrics.csv is written here
    return model


def extract_policy(model: Any, config: TrainExpertConfig, step: int) -> experts.Policy:
    """The acting part of the model that `build_model` made for `config`."""
    actor = model.policy.actor
    linear = [module for module in actor.latent_pi if isinstance(module, nn.Linear)]
    named = {f"hidden.{index}": layer for index, layer in enumerate(linear)}
    weights = {}
    for name, layer in (named | {"mean": actor.mu, "log_std": actor.log_std}).items():
        weights[f"{name}.weight"] = layer.weight.detach().numpy().T.copy()
        weights[f"{name}.bias"] = layer.bias.detach().numpy().copy()
    # Its bounds of the log standard deviation are experts.Policy's own.
    return experts.Policy(config.env, step, weights, RECIPES[config.env].activation)


def model_state(model: Any) -> dict[str, Any]:
    """Networks, optimizers and the replay buffer, through what stable-baselines3 makes public.

    Its own files (save, save_replay_buffer) are pickles, and not written as a whole.
    """
    buffer = model.replay_buffer
    columns = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    return {
        "parameters": model.get_parameters(),
        "log_ent_coef": model.log_ent_coef,  # not among its parameters
        "buffer": {name: torch.from_numpy(getattr(buffer, name)[: buffer.size()]) for name in columns},
        "buffer_position": [buffer.pos, buffer.full],
    }


def load_model_state(model: Any, state: dict[str, Any]) -> None:
    """Continue from `model_state`; raises ValueError, RuntimeError or KeyError where it is another model's."""
    model.set_parameters(state["parameters"], device="cpu")
    model.log_ent_coef.data.copy_(state["log_ent_coef"])
    for name, column in state["buffer"].items():
        getattr(model.replay_buffer, name)[: len(column)] = column.numpy()
    model.replay_buffer.pos, model.replay_buffer.full = state["buffer_position"]


class ExpertRun(Run):
    config: TrainExpertConfig

    @classmethod
    def check(cls, config: TrainExpertConfig) -> None:
        stable_baselines3()

    @classmethod
    def default_run_dir(cls, config: TrainExpertConfig) -> Path:
        return Path(config.run_dir or Path("logs", "expert", config.env, f"seed_{config.seed}"))

    @classmethod
    def choose_device(cls, config: TrainExpertConfig) -> torch.device:
        """A CPU's one thread: more are slower for networks of this size."""
        torch.set_num_threads(1)
        return torch.device("cpu")

    def load_data(self) -> None:
        """None: it acts in the environment."""

    def build(self) -> None:
        self.total = self.config.max_timesteps or RECIPES[self.config.env].steps
        train_env, self.eval_env = (experts.ENVIRONMENTS[self.config.env]() for _ in range(2))
        self.resources.callback(train_env.close)
        self.resources.callback(self.eval_env.close)
        self.step, self.evaluations = 0, {}  # step of a snapshot -> its mean return
        self.model = build_model(self.config, train_env, self.streams.init_seed)

    def load_state(self, path: Path, state: dict[str, Any]) -> None:
        """Continue, but not to the bit: a new episode begins, with random numbers of its own."""
        self.step, self.evaluations = state["step"], state["evaluations"]
        if self.step > self.total:
            raise UserError(f"--max_timesteps {self.total}: the run in {self.run_dir} is at step {self.step} already")
        load_model_state(self.model, state)
        self.model.num_timesteps = self.step
        self.model.set_random_seed((self.streams.init_seed + self.step) % 2**32)  # else it would repeat its beginning
        print(
            f"{self.run_dir}: continuing from step {self.step}; not bit-exact: the rest differs from that of a run "
            "that was not stopped",
            file=sys.stderr,
        )

    def started(self, resume_step: int | None) -> None:
        if resume_step is None:
            for left in (self.run_dir / "policies").glob("*.*"):  # of a run that ended before its first checkpoint
                left.unlink()

    def train(self) -> None:
        """Train to the last step, with snapshots, rows and checkpoints along the way."""
        if self.step == self.total:
            return
        with progress(self.total, self.config.env, initial=self.step, unit="step") as bar:
            self.bar = bar
            # With reset_num_timesteps=False stable-baselines3 counts from where it stands.
            remaining = self.total - self.step
            self.model.learn(remaining, self.after_step, log_interval=None, reset_num_timesteps=False)
            self.record()

    def after_step(self, *_: Any) -> bool:
        """stable-baselines3's callback: a step is taken, the transition not yet stored. Returns whether to go on."""
        self.step = self.model.num_timesteps
        self.bar.update(self.step - self.bar.n)
        if self.step < self.total:  # else after the last update
            self.record()
        return True

    def record(self) -> None:
        """What is due at this step: a snapshot and a checkpoint, a row of metrics.csv."""
        config = self.config
        saves = self.step % config.snapshot_every == 0 or self.step == self.total
        row = self.snapshot() if saves else {}
        if row or self.step % config.log_every == 0:
            row |= self.training_figures()
            self.logger.log(self.step, row)
            self.bar.set_postfix({name: f"{row[name]:.1f}" for name in row if "return" in name}, refresh=False)
        if saves:
            state = {"step": self.step, "evaluations": self.evaluations, "config": self.model_config()}
            self.write_checkpoint(state | model_state(self.model))

    def snapshot(self) -> dict[str, float]:
        """Write the policy of this step with its card; returns the columns of its evaluation.

        The evaluation has an environment, seeds and generators of its own, so that it changes nothing in the training.
        """
        config = self.config
        policy = extract_policy(self.model, config, self.step)
        path = experts.policy_path(self.run_dir / "policies", config.env, self.step)
        experts.write_policy(path, policy)
        result = experts.evaluate_policy(policy, config.eval_episodes, self.streams.evaluation_seed, env=self.eval_env)
        experts.write_card(path, facts(config), {"deterministic": result})
        self.evaluations[self.step] = result["mean"]
        return {"eval_return": result["mean"], "eval_std": result["std"], "eval_length": result["mean_length"]}

    def training_figures(self) -> dict[str, float]:
        """Losses of the last update, and return and length of the last episodes (at most 100)."""
        recorded, episodes = self.model.logger.name_to_value, self.model.ep_info_buffer
        figures = {name: recorded[key] for name, key in LOSSES.items() if key in recorded}
        if episodes:
            figures["train_return"] = float(np.mean([episode["r"] for episode in episodes]))
            figures["train_length"] = float(np.mean([episode["l"] for episode in episodes]))
        return figures

    def finish(self) -> dict[str, Any]:
        """Full cards for the last policy and the best one, the curve; returns the summary of finished.json."""
        config, returns = self.config, {}
        best = max(self.evaluations, key=self.evaluations.__getitem__)
        for step in {self.step, best}:
            path = experts.policy_path(self.run_dir / "policies", config.env, step)
            policy = experts.read_policy(path)
            measured = {
                kind: experts.evaluate_policy(
                    policy, config.card_episodes, experts.CARD_SEED, sampled, self.eval_env, show=True
                )
                for kind, sampled in (("deterministic", False), ("stochastic", True))
            }
            experts.write_card(path, facts(config), measured)
            returns[step] = measured["deterministic"]["mean"]
        summary = {"env": config.env, "steps": self.step, "best_step": best}
        summary |= {"last_return": returns[self.step], "best_return": returns[best]}
        metrics = read_metrics(self.run_dir)
        panels = [Panel(name, name, [(metrics, name, {"color": "black"})]) for name in metrics if name != "step"]
        figure = panels_figure(self.title(), panels, "step", "environment step", 4)
        figure.savefig(self.run_dir / "learning_curve.png")
        mark_finished(self.run_dir, summary)
        return summary

    def title(self) -> str:
        return f"{self.config.env}, SAC, seed {self.config.seed}"


def facts(config: TrainExpertConfig) -> dict[str, Any]:
    flags = ("lr", "batch_size", "discount", "tau", "start_steps", "hidden_dim")
    return {
        "algorithm": f"SAC of stable-baselines3 {stable_baselines3().__version__}",
        "recipe": {"source": RECIPES[config.env].source, **{name: getattr(config, name) for name in flags}},
        "seed": config.seed,
    }


def main(argv: list[str] | None = None) -> None:
    config = parse_config(TrainExpertConfig, argv, __doc__, default_run_dir=ExpertRun.default_run_dir)
    began = time.perf_counter()
    with ExpertRun(config) as run:
        first = run.step
        run.train()
        rate = (run.step - first) / (time.perf_counter() - began)
        summary = run.finish()
    print(f"{run.title()}: {run.step} steps, {rate:.0f} a second")
    print(f"  last policy: return {summary['last_return']:.1f}")
    print(f"  best snapshot, step {summary['best_step']}: return {summary['best_return']:.1f}")
    print(f"make_dataset.py uses them with --experts_dir {run.run_dir / 'policies'}")


if __name__ == "__main__":
    run_cli(main)
