"""Expert policies: small files of MLP weights with a card each, their environments, and how their returns are measured.

A policy file `<env>_<step>.safetensors` holds float32 matrices [in, out] and biases [out] under the names

    hidden.0.weight, hidden.0.bias, hidden.1.weight, ...    mean.weight, mean.bias    log_std.weight, log_std.bias

and one metadata entry, "policy", a JSON object of the other fields of `Policy`. The card `<env>_<step>.json` beside it
says what the policy was trained with and what it returns.

Acting takes NumPy alone, because data generation asks for one action at a time: torch would spend more on the call
than on the arithmetic.
"""

import functools
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import d4rl_utils
import dmc_utils
from dataset_files import sha256
from ogbench_utils import SeededDraws
from utils import UserError, one_line, progress, write_bytes_atomic, write_text_atomic

DEFAULT_EXPERTS_DIR = Path(__file__).resolve().parent.parent / "datasets" / "experts"
CARD_EPISODES = 100  # episodes behind the returns of a card
CARD_SEED = 0  # of those episodes


def _directional_ant() -> gymnasium.Env:
    """OGBench's protocol for training locomotion policies: walk along a direction that changes.

    The observation is the robot's, without its position, followed by a unit vector [2]. A new direction comes with
    each episode and every 100 steps; the step after which it changes is still paid for the old one. The reward is the
    displacement along the direction in metres.
    """
    import ogbench.online_locomotion  # noqa: F401  (registers the robot)
    from ogbench.online_locomotion.wrappers import GymXYWrapper

    return SeededDraws(GymXYWrapper(gymnasium.make("online-ant-v0", disable_env_checker=True), 100), in_steps=True)


# What a policy can be trained in, 1000 steps an episode at most. A robot's is the same for every level.
ENVIRONMENTS: dict[str, Callable[[], gymnasium.Env]] = {
    "ant-xy": _directional_ant,
    **{robot: functools.partial(d4rl_utils.make_env, f"{robot}-medium-v2") for robot in d4rl_utils.ENVIRONMENTS},
    **{f"walker_{task}": functools.partial(dmc_utils.WalkerEnv, task) for task in dmc_utils.TASKS},
}


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), the form that JAX takes by default."""
    return (np.tanh((x * x * 0.044715 + 1) * x * math.sqrt(2 / math.pi)) + 1) * x * 0.5  # this order decides bits


ACTIVATIONS = {"gelu_tanh": _gelu_tanh, "relu": lambda x: np.maximum(x, 0)}
SETTINGS = ("env", "step", "activation", "log_std_min", "log_std_max")  # of a policy, beside its weights


@dataclass
class Policy:
    """A squashed Gaussian (SAC): an MLP's mean, with noise of its own standard deviation, goes through tanh.

    `weights` maps the names of the module's docstring to float32 arrays, matrices [in, out]. Raises ValueError or
    KeyError where they do not form a network.
    """

    env: str  # name in ENVIRONMENTS
    step: int  # environment steps it was trained for
    weights: dict[str, np.ndarray]
    activation: str = "relu"  # of the hidden layers, a name in ACTIVATIONS
    log_std_min: float = -20.0  # bounds of the Gaussian's log standard deviation
    log_std_max: float = 2.0

    def __post_init__(self) -> None:
        if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in self.weights.values()):
            raise ValueError("a weight is no float32, or holds NaN or infinity")
        *layers, mean, log_std = (
            tuple(self.weights[f"{name}.{part}"].astype(float) for part in ("weight", "bias"))
            for name in self.layer_names
        )
        self._network = layers, mean, log_std, ACTIVATIONS[self.activation]
        self.act(np.zeros(self.sizes[0]), np.random.default_rng(0))  # raises where sizes do not fit each other

    @property
    def layer_names(self) -> list[str]:
        depth = sum(name.startswith("hidden.") and name.endswith(".weight") for name in self.weights)
        return [*(f"hidden.{index}" for index in range(depth)), "mean", "log_std"]

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers in an observation and in an action."""
        return len(self.weights[f"{self.layer_names[0]}.weight"]), len(self.weights["mean.bias"])

    def act(self, observation: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Actions in [-1, 1], float32: [action_dim] for [observation_dim], [n, action_dim] for [n, observation_dim].

        The mean's when `rng` is None, else a sample. Computed in float64: how a product is rounded depends on the
        processor, and what is left of that after the rounding to float32 changes a bit in about one of 10^7 actions.
        """
        layers, mean, log_std, activation = self._network
        hidden = np.asarray(observation, dtype=np.float32).astype(float)
        for weight, bias in layers:
            hidden = activation(hidden @ weight + bias)
        action = hidden @ mean[0] + mean[1]
        if rng is not None:
            scale = np.clip(hidden @ log_std[0] + log_std[1], self.log_std_min, self.log_std_max)
            action += np.exp(scale) * rng.standard_normal(action.shape)
        return np.tanh(action).astype(np.float32)


def policy_path(experts_dir: str | Path, env: str, step: int) -> Path:
    """`<experts_dir>/<env>_<step>.safetensors`, whether or not it is there."""
    return Path(experts_dir) / f"{env}_{step}.safetensors"


def latest_policy(experts_dir: str | Path, env: str, step: int) -> Path:
    """The policy of the most training steps in a folder, not of the highest return; else that of `step`."""
    steps = [path.stem.removeprefix(f"{env}_") for path in Path(experts_dir).glob(f"{env}_*.safetensors")]
    return policy_path(experts_dir, env, max((int(text) for text in steps if text.isdecimal()), default=step))


def card_path(policy_file: str | Path) -> Path:
    return Path(policy_file).with_suffix(".json")


def write_policy(path: str | Path, policy: Policy) -> None:
    """Write a policy file as a whole; equal policies give equal bytes. Raises OSError that names the file."""
    from safetensors.numpy import save

    # safetensors writes the memory as it lies: a transposed array would come back as other numbers.
    weights = {name: np.ascontiguousarray(array) for name, array in policy.weights.items()}
    settings = {name: getattr(policy, name) for name in SETTINGS}
    # safetensors keeps no order among metadata entries, so there is one.
    write_bytes_atomic(path, save(weights, {"policy": json.dumps(settings, sort_keys=True)}))


def read_policy(path: str | Path) -> Policy:
    """Read and check a policy file, whose name must be true of what it holds. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(path)
    try:
        data = path.read_bytes()
        weights = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        settings = json.loads(header["__metadata__"]["policy"])
        policy = Policy(weights=weights, **{name: settings[name] for name in SETTINGS})
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this policy ({error.strerror}); train it with `python -m benchmark_data.train_expert "
            f"--env {path.stem.rpartition('_')[0]}`, or leave out --experts_dir to take the shipped ones"
        ) from None
    except (SafetensorError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"{path}: not a policy file of this program ({one_line(error)}); copy it again, or train one"
        ) from None
    if path.stem != f"{policy.env}_{policy.step}":
        raise UserError(f"{path}: the policy inside is {policy.env}_{policy.step}; copy or train it again")
    return policy


def read_card(policy_file: str | Path) -> dict[str, Any]:
    """The card beside a policy file, empty where there is none that can be read."""
    try:
        return dict(json.loads(card_path(policy_file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def algorithms(policy_files: Iterable[str | Path]) -> str:
    """What policies were trained with, as their cards tell."""
    unknown = "an algorithm that no card names"
    return ", ".join(sorted({str(read_card(file).get("algorithm", unknown)) for file in policy_files}))


def write_card(policy_file: str | Path, facts: dict[str, Any], returns: dict[str, Any]) -> None:
    """Write the card beside a policy file. facts: what its trainer knows. returns: by kind, of `evaluate_policy`."""
    env, _, step = Path(policy_file).stem.rpartition("_")
    card = {"sha256": sha256(policy_file), "environment": env, "steps": int(step), **facts}
    card["returns"] = {kind: {key: round(v, 4) for key, v in result.items()} for kind, result in returns.items()}
    packages = ("numpy", "gymnasium", "mujoco")
    card["measured_with"] = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }
    write_text_atomic(card_path(policy_file), json.dumps(card, indent=2) + "\n")


def evaluate_policy(
    policy: Policy,
    episodes: int = CARD_EPISODES,
    seed: int = CARD_SEED,
    stochastic: bool = False,
    env: gymnasium.Env | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """Returns of `episodes` episodes in the policy's own environment (or `env`), as the card shows them.

    Episode i has the seed (seed, i), whatever the policy, so that policies meet the same starts. Nothing is drawn
    from a global generator. `show` shows a bar.
    """
    kind, env = "stochastic" if stochastic else "deterministic", env or ENVIRONMENTS[policy.env]()
    bar = progress(range(episodes), f"{policy.env}_{policy.step} {kind}", unit="episode", disable=not show)
    results = [_episode(policy, env, np.random.SeedSequence(seed, spawn_key=(i,)), stochastic) for i in bar]
    returns, lengths = (np.array(column) for column in zip(*results, strict=True))
    return {
        "episodes": episodes,
        "seed": seed,
        **describe_returns(returns),
        "mean_length": float(lengths.mean()),
        "reward_per_step": float(returns.sum() / lengths.sum()),
    }


def describe_returns(returns: Iterable[float]) -> dict[str, float]:
    """Mean, standard deviation (of the sample as it is, ddof 0), minimum, quartiles and maximum."""
    values = np.asarray(list(returns), dtype=np.float64)
    spread = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
    named = dict(zip(("min", "25%", "50%", "75%", "max"), spread, strict=True))
    return {"mean": float(values.mean()), "std": float(values.std()), **named}


def _episode(policy: Policy, env: gymnasium.Env, seed: np.random.SeedSequence, stochastic: bool) -> tuple[float, int]:
    start, noise = seed.spawn(2)
    rng = np.random.default_rng(noise) if stochastic else None
    observation, _ = env.reset(seed=int(start.generate_state(1)[0]))
    total, steps, done = 0.0, 0, False
    while not done:
        observation, reward, terminated, truncated, _ = env.step(policy.act(observation, rng))
        total += float(reward)
        steps += 1
        done = terminated or truncated
    return total, steps
