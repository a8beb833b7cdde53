"""Train an expert policy with SAC or TD3 of stable-baselines3: the walkers behind the local datasets.

    python train_expert.py --env hopper
    python train_expert.py --evaluate datasets/experts/hopper_270000.safetensors

A run's directory holds config.yaml, metrics.csv, policies/<env>_<step>.safetensors with a card each, learning_curve.png
and checkpoints/last.pth, which includes the replay buffer. `make_dataset.py --experts_dir <run>/policies` uses them.

Needs `pip install -r requirements/experts.txt`. One core trains about 100 steps a second.

Recipes: ant-xy and humanoid-xy are those of OGBench's data_gen_scripts/main_sac.py, the others SAC's published settings
(Haarnoja et al. 2018) with two layers of 256. The ant takes the learning rate 3e-4 and 250,000 steps where OGBench
takes 1e-4 and 400,000, because it comes as far in half the steps (docs/data.md). What stable-baselines3 does
differently from OGBench's JAX code: it updates the critic before the actor instead of both at once, learns the
logarithm of the temperature, bounds the log standard deviation by [-20, 2] instead of [-5, 2], and does not scale down
the actor's last layer at the start. For the humanoid it also takes the minimum of the critics instead of the mean, and
has no layer norm in them.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from torch import nn

from benchmark_data.experts import (
    CARD_EPISODES,
    CARD_SEED,
    ENVIRONMENTS,
    Policy,
    card_path,
    evaluate_policy,
    expert_env,
    make_expert_env,
    policy_path,
    read_card,
    read_policy,
    write_card,
    write_policy,
)
from runs.cli import check_bounds, parse_config, run_cli
from runs.directory import hold_run, load_checkpoint, mark_finished, prepare_run, save_checkpoint
from runs.metrics import MetricLogger, read_metrics
from utils import RandomStreams, UserError, progress, write_bytes_atomic


@dataclass
class TrainExpertConfig:
    env: str = "hopper"  # ant-xy, humanoid-xy, hopper, halfcheetah, walker2d, walker_walk or walker_run
    algorithm: Literal["sac", "td3"] = "sac"  # of stable-baselines3
    max_timesteps: int | None = None  # environment steps; default: the recipe's
    lr: float | None = None  # learning rate of actor, critics and temperature; default: the recipe's
    batch_size: int = 256  # transitions in an update
    hidden_dims: tuple[int, ...] | None = None  # layers of the actor and of each critic; default: the recipe's
    discount: float = 0.99  # of future rewards
    tau: float = 0.005  # step of the target critics towards the critics
    start_steps: int = 10_000  # uniformly random actions before the first update
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    exploration_noise: float = 0.1  # standard deviation of TD3's noise on its actions
    seed: int = 0  # of networks, exploration, sampling and episodes
    snapshot_every: int = 10_000  # steps between policy files, each of them evaluated
    eval_episodes: int = 10  # deterministic episodes of a snapshot's evaluation
    card_episodes: int = CARD_EPISODES  # episodes behind the last and the best policy's card, and of --evaluate
    checkpoint_every: int = 25_000  # steps after which the next episode end writes a checkpoint
    log_every: int = 2_000  # steps between rows of metrics.csv
    threads: int = 1  # of torch; more than one is slower for networks of this size
    run_dir: str | None = None  # default logs/expert/<env>/<algorithm>/seed_<seed> in the current folder
    resume: bool = False  # continue the run in run_dir from its last checkpoint
    tensorboard: bool = True  # write TensorBoard events
    evaluate: tuple[str, ...] | None = None  # policy files: measure their returns again for their cards, train nothing


BOUNDS = {
    **dict.fromkeys(("max_timesteps", "batch_size", "snapshot_every", "eval_episodes", "card_episodes"), (1, 10**9)),
    **dict.fromkeys(("checkpoint_every", "log_every", "buffer_size"), (1, 10**9)),
    **dict.fromkeys(("lr", "discount", "tau"), (1e-9, 1.0)),
    "start_steps": (0, 10**9),
    "exploration_noise": (0.0, 1.0),
    "seed": (0, 2**53),
    "threads": (1, 1024),
}
MAY_CHANGE_ON_RESUME = {"max_timesteps", "checkpoint_every", "threads", "tensorboard", "card_episodes", "evaluate"}
EPISODE_STREAM = 5  # of the run's seed sequence; utils.RandomStreams takes the ones below
LOSSES = {"critic_loss": "train/critic_loss", "actor_loss": "train/actor_loss", "temperature": "train/ent_coef"}


class TanhGELU(nn.GELU):
    """GELU in its tanh form, as a class without arguments, which is what stable-baselines3 takes."""

    def __init__(self):
        super().__init__(approximate="tanh")


@dataclass(frozen=True)
class Recipe:
    """Settings of one environment that its flags leave open."""

    steps: int  # environment steps
    lr: float
    actor: tuple[int, ...]  # hidden layers
    critic: tuple[int, ...]
    activation: type[nn.Module]
    entropy: float  # target entropy of SAC as a multiple of -dim(action)
    interval: int  # environment steps an update
    source: str


_OGBENCH = "OGBench data_gen_scripts/main_sac.py, but for what train_expert.py lists"
_STANDARD = "SAC, Haarnoja et al. 2018, as in stable-baselines3"
RECIPES = {
    "ant-xy": Recipe(250_000, 3e-4, (256, 256), (256, 256), TanhGELU, 0.5, 1, _OGBENCH),
    "humanoid-xy": Recipe(40_000_000, 1e-4, (256, 256), (1024,) * 3, TanhGELU, 0.5, 4, _OGBENCH),
    "hopper": Recipe(300_000, 3e-4, (256, 256), (256, 256), nn.ReLU, 1.0, 1, _STANDARD),
    "halfcheetah": Recipe(300_000, 3e-4, (256, 256), (256, 256), nn.ReLU, 1.0, 1, _STANDARD),
    "walker2d": Recipe(300_000, 3e-4, (256, 256), (256, 256), nn.ReLU, 1.0, 1, _STANDARD),
    "walker_walk": Recipe(200_000, 3e-4, (256, 256), (256, 256), nn.ReLU, 1.0, 1, _STANDARD),
    "walker_run": Recipe(200_000, 3e-4, (256, 256), (256, 256), nn.ReLU, 1.0, 1, _STANDARD),
}
ACTIVATION_NAMES = {TanhGELU: "gelu_tanh", nn.ReLU: "relu"}


# ----------------------------------------------------------------------------------------------------------------
# stable-baselines3
# ----------------------------------------------------------------------------------------------------------------


class SeededEpisodes(gymnasium.Wrapper):
    """The training environment: float32 observations, and an own seed for each episode.

    Because episode n starts from the seed (run's seed, n) whatever came before, a run that continues at an episode's
    end meets the episodes that it would have met. `finished` collects (return, length) of episodes that ended.
    """

    def __init__(self, env: gymnasium.Env, seed: int):
        super().__init__(env)
        shape = env.observation_space.shape
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.seed, self.next_episode = seed, 0
        self.total, self.length = 0.0, 0
        self.finished: list[tuple[float, int]] = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """The next episode; a seed given here is not used."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(EPISODE_STREAM, self.next_episode))
        self.next_episode += 1
        self.total, self.length = 0.0, 0
        observation, _ = self.env.reset(seed=int(sequence.generate_state(1)[0]), options=options)
        return observation.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.total += float(reward)
        self.length += 1
        if terminated or truncated:
            self.finished.append((self.total, self.length))
        # stable-baselines3 copies the info deeply at every step; nothing reads it.
        return observation.astype(np.float32), reward, terminated, truncated, {}


def stable_baselines3() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import stable_baselines3
    except ImportError:
        raise UserError("training an expert needs stable-baselines3: pip install -r requirements/experts.txt") from None
    return stable_baselines3


def build_model(config: TrainExpertConfig, env: SeededEpisodes, seed: int) -> Any:
    """SAC or TD3 on `env`, seeded; it draws from the global generators of NumPy and torch."""
    sb3 = stable_baselines3()
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import DummyVecEnv

    recipe, action_dim = RECIPES[config.env], env.action_space.shape[0]
    layers = {"pi": list(config.hidden_dims or recipe.actor), "qf": list(config.hidden_dims or recipe.critic)}
    special: dict[str, Any] = {"target_entropy": -recipe.entropy * action_dim}
    if config.algorithm == "td3":
        special = {
            "action_noise": NormalActionNoise(np.zeros(action_dim), np.full(action_dim, config.exploration_noise))
        }
    model = {"sac": sb3.SAC, "td3": sb3.TD3}[config.algorithm](
        "MlpPolicy",
        DummyVecEnv([lambda: env]),
        learning_rate=config.lr or recipe.lr,
        buffer_size=min(config.buffer_size, total_steps(config)),
        learning_starts=config.start_steps,
        batch_size=config.batch_size,
        tau=config.tau,
        gamma=config.discount,
        train_freq=recipe.interval,
        gradient_steps=1,
        policy_kwargs={"net_arch": layers, "activation_fn": recipe.activation, "optimizer_kwargs": {"fused": True}},
        seed=seed,
        device="cpu",
        **special,
    )
    model.set_logger(Logger(folder=None, output_formats=[]))  # metrics.csv is written here
    spare_critic_gradients(model.critic)
    return model


def spare_critic_gradients(critic: nn.Module) -> None:
    """Leave out the critics' gradients of SAC's actor loss, which stable-baselines3 computes and throws away.

    That loss is the one whose actions carry a gradient. No number changes; an update takes 7% less time.
    """
    parameters = list(critic.parameters())

    def before_forward(_: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        for parameter in parameters:
            parameter.requires_grad_(not inputs[1].requires_grad)

    critic.register_forward_pre_hook(before_forward)


def total_steps(config: TrainExpertConfig) -> int:
    return config.max_timesteps or RECIPES[config.env].steps


def extract_policy(model: Any, config: TrainExpertConfig, step: int) -> Policy:
    """The acting part of the model that `build_model` made for `config`."""
    from stable_baselines3.sac import policies as sac_policies

    actor = model.policy.actor
    gaussian = config.algorithm == "sac"
    body = list(actor.latent_pi if gaussian else actor.mu)
    linear = [module for module in body if isinstance(module, nn.Linear)]
    named = {} if gaussian else {"mean": linear.pop()}
    named |= {f"hidden.{index}": layer for index, layer in enumerate(linear)}
    if gaussian:
        named |= {"mean": actor.mu, "log_std": actor.log_std}
    weights = {}
    for name, layer in named.items():
        weights[f"{name}.weight"] = layer.weight.detach().numpy().T.copy()
        weights[f"{name}.bias"] = layer.bias.detach().numpy().copy()
    return Policy(
        config.env,
        step,
        weights,
        ACTIVATION_NAMES[type(body[1])],
        float(sac_policies.LOG_STD_MIN),
        float(sac_policies.LOG_STD_MAX),
        0.0 if gaussian else config.exploration_noise,
        ENVIRONMENTS[config.env].observation,
    )


def between_updates(visit: Any) -> Any:
    """A callback that calls `visit()` before each environment step and at the end.

    There the last transition is stored and its update is done, so that a checkpoint loses nothing.
    """
    from stable_baselines3.common.callbacks import BaseCallback

    class BetweenUpdates(BaseCallback):
        def _on_rollout_start(self) -> None:
            visit()

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            visit()

    return BetweenUpdates()


# ----------------------------------------------------------------------------------------------------------------
# A run's state
# ----------------------------------------------------------------------------------------------------------------

_BUFFER_FIELDS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def model_state(model: Any, algorithm: str) -> dict[str, Any]:
    """Everything that the next update depends on but the environment: tensors, numbers and text."""
    buffer = model.replay_buffer
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "counters": [model.num_timesteps, model._n_updates, model._episode_num],
        "policy": model.policy.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in _optimizers(model, algorithm)],
        "buffer": {name: torch.from_numpy(getattr(buffer, name)[: buffer.size()]) for name in _BUFFER_FIELDS},
        "buffer_position": [buffer.pos, buffer.full],
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "actions": json.dumps(model.action_space.np_random.bit_generator.state),
    }
    if algorithm == "sac":
        state["log_ent_coef"] = model.log_ent_coef
    return state


def load_model_state(model: Any, algorithm: str, state: dict[str, Any]) -> None:
    """Continue from `model_state`; raises one of KeyError, ValueError, RuntimeError where it is another model's."""
    model.num_timesteps, model._n_updates, model._episode_num = state["counters"]
    model.policy.load_state_dict(state["policy"])
    if algorithm == "sac":
        with torch.no_grad():
            model.log_ent_coef.copy_(state["log_ent_coef"])
    for optimizer, stored in zip(_optimizers(model, algorithm), state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    buffer = model.replay_buffer
    size = len(state["buffer"]["rewards"])
    if size > buffer.buffer_size:
        raise ValueError(f"{size} stored transitions, room for {buffer.buffer_size}")
    for name in _BUFFER_FIELDS:
        getattr(buffer, name)[:size] = state["buffer"][name].numpy()
    position, full = state["buffer_position"]
    # A buffer that was as large as a shorter run is not full in a longer one.
    buffer.full = full and size == buffer.buffer_size
    buffer.pos = size if full and not buffer.full else position
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    model.action_space.np_random.bit_generator.state = json.loads(state["actions"])


def _optimizers(model: Any, algorithm: str) -> list[torch.optim.Optimizer]:
    temperature = [model.ent_coef_optimizer] if algorithm == "sac" else []
    return [model.actor.optimizer, model.critic.optimizer, *temperature]


def remove_policies(run_dir: Path) -> None:
    """Remove the policies of a run that ended before its first checkpoint: a new run's must not stand among them."""
    for path in (run_dir / "policies").glob("*"):
        if not path.is_dir():
            path.unlink()


class ExpertRun:
    """One training run: model, environments, log and directory."""

    def __init__(self, config: TrainExpertConfig):
        check(config)
        stable_baselines3()
        self.config, self.total = config, total_steps(config)
        self.run_dir = Path(
            config.run_dir or Path("logs", "expert", config.env, config.algorithm, f"seed_{config.seed}")
        )
        self.streams, self.resources = RandomStreams(config.seed), contextlib.ExitStack()
        try:
            self.resources.enter_context(hold_run(self.run_dir))
            self.open(prepare_run(self.run_dir, config, config.resume, may_change=MAY_CHANGE_ON_RESUME))
        except BaseException:
            self.close()
            raise

    def open(self, checkpoint: Path | None) -> None:
        """Build model and environments, continue from the checkpoint if there is one, open the log."""
        config = self.config
        torch.set_num_threads(config.threads)
        self.train_env = SeededEpisodes(make_expert_env(config.env), config.seed)
        self.eval_env = make_expert_env(config.env)
        self.resources.callback(self.train_env.close)
        self.resources.callback(self.eval_env.close)
        self.model = build_model(config, self.train_env, self.streams.init_seed % 2**32)
        self.evaluations: dict[int, float] = {}  # step -> mean return of the snapshot
        self.step, self.saved_at = 0, 0
        self.recent: list[tuple[float, int]] = []  # episodes since the last row
        if checkpoint is None:
            remove_policies(self.run_dir)
        else:
            self.load(checkpoint)
        self.logger = MetricLogger(self.run_dir, self.step if checkpoint else None, config.tensorboard)
        self.resources.callback(self.logger.close)

    def close(self) -> None:
        """Release the directory, the environments and the log; closing twice is harmless."""
        self.resources.close()

    def train(self) -> None:
        """Train to the last step, with snapshots, rows and checkpoints along the way."""
        remaining = self.total - self.step
        if remaining <= 0:
            return
        with progress(self.total, f"{self.config.env} {self.config.algorithm}", initial=self.step, unit="step") as bar:
            self.bar = bar
            # With reset_num_timesteps=False stable-baselines3 counts `remaining` from where it stands.
            self.model.learn(remaining, between_updates(self.visit), log_interval=None, reset_num_timesteps=False)

    def visit(self) -> None:
        """What happens between an update and the next environment step."""
        step = self.model.num_timesteps
        if step == self.step:
            return
        loss = self.model.logger.name_to_value.get(LOSSES["critic_loss"], 0.0)
        if not math.isfinite(loss):
            raise UserError(f"{self.run_dir}: the critic's loss is {loss} at step {step}; lower --lr")
        self.bar.update(step - self.step)
        self.step = step
        config, env = self.config, self.train_env
        last = step == self.total
        if env.finished:
            self.recent += env.finished
            env.finished.clear()
            self.bar.set_postfix(self.figures(), refresh=False)
        row = {}
        if step % config.snapshot_every == 0 or last:
            row = self.snapshot(step)
        if row or step % config.log_every == 0:
            self.log(step, row)
        if row:
            plot_learning_curve(self.run_dir, self.title())
        # A continued run begins an episode. With several steps an update, one may have begun already: a checkpoint
        # would repeat its transitions.
        between_episodes = env.length == 0
        if between_episodes and step - self.saved_at >= config.checkpoint_every or last:
            self.save()

    def figures(self) -> dict[str, str]:
        """What the bar shows beside step and rate."""
        shown = {"return": f"{self.recent[-1][0]:.1f}"} if self.recent else {}
        if self.evaluations:
            shown["evaluated"] = f"{list(self.evaluations.values())[-1]:.1f}"
        return shown

    def snapshot(self, step: int) -> dict[str, float]:
        """Write the policy of this step with its card; returns the columns of its evaluation.

        The evaluation has an environment, seeds and generators of its own, so that it changes nothing in the training.
        """
        config = self.config
        policy = extract_policy(self.model, config, step)
        path = policy_path(self.run_dir / "policies", config.env, step)
        write_policy(path, policy)
        result = evaluate_policy(policy, config.eval_episodes, self.streams.evaluation_seed, env=self.eval_env)
        write_card(path, facts(config), {"deterministic": result})
        self.evaluations[step] = result["mean"]
        return {"eval_return": result["mean"], "eval_std": result["std"], "eval_length": result["mean_length"]}

    def log(self, step: int, row: dict[str, float]) -> None:
        """One row of metrics.csv: returns of the episodes since the last one, and the losses of the last update."""
        recorded = self.model.logger.name_to_value
        row = row | {name: recorded[key] for name, key in LOSSES.items() if key in recorded}
        if self.recent:
            returns, lengths = zip(*self.recent, strict=True)
            row |= {"train_return": float(np.mean(returns)), "train_length": float(np.mean(lengths))}
            self.recent.clear()
        self.logger.log(step, row)

    def save(self) -> None:
        """checkpoints/last.pth: everything that the rest of the run depends on, written as a whole."""
        state = {
            "model": model_state(self.model, self.config.algorithm),
            "step": self.step,
            "next_episode": self.train_env.next_episode,
            "recent": [list(episode) for episode in self.recent],
            "evaluations": self.evaluations,
        }
        save_checkpoint(self.run_dir / "checkpoints" / "last.pth", state)
        self.saved_at = self.step

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; UserError where it is another model's."""
        state = load_checkpoint(path)
        if state.get("step", 0) > self.total:
            raise UserError(
                f"--max_timesteps {self.total}: the run in {self.run_dir} is at step {state['step']} already"
            )
        try:
            load_model_state(self.model, self.config.algorithm, state["model"])
            self.step = self.saved_at = state["step"]
            # The episode that had just begun begins again, from the same seed.
            self.train_env.next_episode = state["next_episode"] - 1
            self.recent = [(total, int(length)) for total, length in state["recent"]]
            self.evaluations = dict(state["evaluations"])
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a checkpoint of this model ({error}); choose another --run_dir") from None

    def finish(self) -> dict[str, Any]:
        """Full cards for the last policy and the best one; returns the summary of finished.json."""
        best = max(self.evaluations, key=self.evaluations.__getitem__)
        summary: dict[str, Any] = {"env": self.config.env, "steps": self.step, "best_step": best}
        measured = {}
        for step in {self.step, best}:
            path = policy_path(self.run_dir / "policies", self.config.env, step)
            card = measure(path, self.config.card_episodes, facts(self.config))
            measured[step] = card["returns"]["deterministic"]["mean"]
        summary |= {"last_return": measured[self.step], "best_return": measured[best]}
        plot_learning_curve(self.run_dir, self.title())
        mark_finished(self.run_dir, summary)
        return summary

    def title(self) -> str:
        return f"{self.config.env}, {self.config.algorithm}, seed {self.config.seed}"


def facts(config: TrainExpertConfig) -> dict[str, Any]:
    """What a card says of the training."""
    recipe = RECIPES[config.env]
    return {
        "algorithm": f"{config.algorithm.upper()} of stable-baselines3 {stable_baselines3().__version__}",
        "recipe": {
            "source": recipe.source if config.algorithm == "sac" else "TD3, Fujimoto et al. 2018",
            "lr": config.lr or recipe.lr,
            "batch_size": config.batch_size,
            "discount": config.discount,
            "tau": config.tau,
            "start_steps": config.start_steps,
            "critic": list(config.hidden_dims or recipe.critic),
            "steps_per_update": recipe.interval,
        },
        "seed": config.seed,
    }


def measure(path: Path, episodes: int, origin: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a policy file, deterministic and stochastic, and write its card."""
    return write_card(path, origin, returns_of(path, episodes))


def returns_of(path: Path, episodes: int) -> dict[str, Any]:
    """Returns of a policy file, deterministic and stochastic."""
    policy = read_policy(path)
    return {
        kind: evaluate_policy(policy, episodes, CARD_SEED, stochastic=kind == "stochastic", show=True)
        for kind in ("deterministic", "stochastic")
    }


def evaluate_file(path: Path, episodes: int) -> None:
    """`--evaluate`: measure a policy again, keeping what its card says of its origin."""
    origin = {"algorithm": "not recorded", "recipe": "not recorded", "seed": "not recorded"}
    measured: dict[str, Any] = {}
    if card_path(path).exists():
        card = read_card(path)
        origin = {name: card.get(name, value) for name, value in origin.items()}
        measured = card.get("returns", {})
    returns = returns_of(path, episodes)
    for kind, result in returns.items():
        print(f"{path.stem}, {kind}: {describe(result)}")
    known = max((int(old["episodes"]) for old in measured.values()), default=0)
    if episodes < known:
        print(f"{card_path(path)} keeps its returns over {known} episodes; --card_episodes {known} replaces them")
    else:
        write_card(path, origin, returns)
        print(f"wrote {card_path(path)}")


def describe(result: dict[str, Any]) -> str:
    """One line of an evaluation."""
    return (
        f"return {result['mean']:.1f} +- {result['std']:.1f} over {result['episodes']} episodes "
        f"(min {result['min']:.1f}, median {result['50%']:.1f}, max {result['max']:.1f}), "
        f"{result['mean_length']:.0f} steps an episode, {result['reward_per_step']:.4f} a step"
    )


def plot_learning_curve(run_dir: Path, title: str) -> None:
    """learning_curve.png: returns of training episodes and of snapshots against environment steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = read_metrics(run_dir)
    steps = np.array(metrics["step"])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for column, name, style in (
        ("train_return", "training episodes", {"color": "tab:blue", "linewidth": 1}),
        ("eval_return", "snapshots, deterministic", {"color": "tab:orange", "marker": "."}),
    ):
        values = np.array(metrics.get(column, [math.nan] * len(steps)))
        known = np.isfinite(values)
        axis.plot(steps[known], values[known], label=name, **style)
    axis.set(title=title, xlabel="environment step", ylabel="return")
    axis.grid(alpha=0.3)
    axis.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_bytes_atomic(run_dir / "learning_curve.png", buffer.getvalue())


def check(config: TrainExpertConfig) -> None:
    """One line for a setting that cannot work, before anything is made."""
    expert_env(config.env)
    check_bounds(config, BOUNDS)
    interval = RECIPES[config.env].interval
    for name in ("max_timesteps", "snapshot_every", "log_every"):
        if (getattr(config, name) or 0) % interval:
            raise UserError(f"--{name} {getattr(config, name)}: must be a multiple of {interval}, the steps an update")
    if config.hidden_dims is not None and not (
        config.hidden_dims and all(1 <= size <= 2**14 for size in config.hidden_dims)
    ):
        raise UserError(f"--hidden_dims {' '.join(map(str, config.hidden_dims))}: one or more sizes from 1 to 16384")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(TrainExpertConfig, argv, __doc__)
    if config.evaluate is not None:
        check(config)
        for path in config.evaluate:
            evaluate_file(Path(path), config.card_episodes)
        return
    began = time.perf_counter()
    run = ExpertRun(config)
    with contextlib.closing(run):
        first = run.step
        run.train()
        rate = (run.step - first) / (time.perf_counter() - began)
        summary = run.finish()
    policies = run.run_dir / "policies"
    print(f"{run.title()}: {run.step} steps, {rate:.0f} a second")
    print(f"  last policy: return {summary['last_return']:.1f}")
    print(f"  best snapshot, step {summary['best_step']}: return {summary['best_return']:.1f}")
    print(f"make_dataset.py uses them with --experts_dir {policies}")


if __name__ == "__main__":
    run_cli(main)
