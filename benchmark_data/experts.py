"""Expert policies: small files of MLP weights with a card each, their environments, and how their returns are measured.

A policy file `<env>_<step>.safetensors` holds float32 matrices [in, out] and biases [out] under the names

    hidden.0.weight, hidden.0.bias, hidden.1.weight, ...    mean.weight, mean.bias    log_std.weight, log_std.bias

and one metadata entry, "policy", a JSON object of the other fields of `Policy`. A deterministic policy (TD3) has no
log_std; its exploration noise is added to the action. The card `<env>_<step>.json` beside it says where the policy
came from and what it returns.

Acting takes NumPy alone, because data generation asks for one action at a time: torch would spend more on the call
than on the arithmetic.
"""

from __future__ import annotations

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
from utils import UserError, one_line, progress, write_bytes_atomic, write_text_atomic

DEFAULT_EXPERTS_DIR = Path(__file__).resolve().parent.parent / "datasets" / "experts"
CARD_EPISODES = 100  # episodes behind the returns of a card
CARD_SEED = 0  # of those episodes
MAX_NAMED = 8  # files that a message lists

# ----------------------------------------------------------------------------------------------------------------
# Environments
# ----------------------------------------------------------------------------------------------------------------


class DirectionalEnv(gymnasium.Wrapper):
    """Walk along a direction that changes: OGBench's protocol for training locomotion policies.

    The observation is the robot's, without its position, followed by a unit vector [2]. A new direction comes with
    each episode and every `interval` steps; the step after which it changes is still paid for the old one. The reward
    is the displacement along the direction in metres.

    OGBench's own wrapper (ogbench.online_locomotion.wrappers) draws the directions from NumPy's global generator;
    here they come from the environment's, so that a seed fixes them.
    """

    def __init__(self, env: gymnasium.Env, interval: int):
        super().__init__(env)
        self.interval = interval
        self.direction, self.steps = np.zeros(2), 0
        size = env.observation_space.shape[0] + 2
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        observation, info = self.env.reset(seed=seed, options=options)
        self.steps = 0
        self._turn()
        return np.concatenate([observation, self.direction]), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        robot = self.unwrapped
        before = robot.data.qpos[:2].copy()
        observation, _, terminated, truncated, info = self.env.step(action)
        reward = float((robot.data.qpos[:2] - before) @ self.direction)
        self.steps += 1
        if self.steps % self.interval == 0:
            self._turn()
        return np.concatenate([observation, self.direction]), reward, terminated, truncated, info

    def _turn(self) -> None:
        direction = self.np_random.standard_normal(2)
        self.direction = direction / np.linalg.norm(direction)


def _directional_ant() -> gymnasium.Env:
    import ogbench.online_locomotion  # noqa: F401  (registers the robot)

    return DirectionalEnv(gymnasium.make("online-ant-v0", disable_env_checker=True), 100)


@dataclass(frozen=True)
class ExpertEnv:
    """An environment that a policy can be trained in."""

    simulator: str  # whose environment it is
    observation: str  # what the policy sees, in its order
    observation_dim: int
    action_dim: int
    reward: str  # what a step pays
    factory: Callable[[], gymnasium.Env]
    packages: tuple[str, ...] = ("gymnasium", "mujoco")  # whose versions the returns depend on


def _runner(robot: str, sizes: tuple[int, int], clipped: str, bonus: str) -> ExpertEnv:
    env = functools.partial(d4rl_utils.make_env, f"{robot.lower()}-medium-v2")  # the same for every level
    reward = f"forward velocity{bonus} minus the control cost"
    return ExpertEnv(f"Gymnasium {robot}-v4", f"qpos[1:], qvel{clipped}", *sizes, reward, env)


def _dm_walker(task: str) -> ExpertEnv:
    seen, env = "orientations [14], height, qvel [9]", functools.partial(dmc_utils.WalkerEnv, task)
    packages = ("dm_control", "mujoco")
    return ExpertEnv(f"dm_control walker-{task}", seen, 24, 6, "dm_control's, in [0, 1]", env, packages)


ENVIRONMENTS: dict[str, ExpertEnv] = {
    "ant-xy": ExpertEnv(
        "OGBench online-ant-v0, a new direction every 100 steps",
        "qpos[2:15], qvel[0:14], unit direction [2]",
        29,
        8,
        "displacement along the direction in metres",
        _directional_ant,
        ("gymnasium", "mujoco", "ogbench"),
    ),
    "hopper": _runner("Hopper", (11, 3), " clipped to [-10, 10]", " and a bonus for being healthy,"),
    "halfcheetah": _runner("HalfCheetah", (17, 6), "", ""),
    "walker2d": _runner("Walker2d", (17, 6), " clipped to [-10, 10]", " and a bonus for being healthy,"),
    "walker_walk": _dm_walker("walk"),
    "walker_run": _dm_walker("run"),
}


def expert_env(env: str) -> ExpertEnv:
    """The registered environment of that name. Raises UserError for a name that is not there."""
    if env not in ENVIRONMENTS:
        raise UserError(f"--env {env}: no such environment; choose one of {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[env]


def make_expert_env(env: str) -> gymnasium.Env:
    """The environment that `env`'s policies were trained in, 1000 steps an episode at most.

    Raises UserError for a name that is not in ENVIRONMENTS.
    """
    return expert_env(env).factory()


# ----------------------------------------------------------------------------------------------------------------
# Policies
# ----------------------------------------------------------------------------------------------------------------

_GELU_SCALE = math.sqrt(2 / math.pi)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), the form that JAX takes by default."""
    inner = x * x
    inner *= 0.044715
    inner += 1
    inner *= x
    inner *= _GELU_SCALE
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= 0.5
    return inner


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"gelu_tanh": _gelu_tanh, "relu": _relu}


@dataclass(frozen=True)
class Policy:
    """An MLP whose output goes through tanh: a squashed Gaussian (SAC), or a mean with noise added to it (TD3).

    `weights` maps the names of the module's docstring to float32 arrays, matrices [in, out]. Raises ValueError where
    they do not form a network.
    """

    env: str  # name in ENVIRONMENTS
    step: int  # environment steps it was trained for
    weights: dict[str, np.ndarray]
    activation: str = "relu"  # of the hidden layers, a name in ACTIVATIONS
    log_std_min: float = -20.0  # bounds of the Gaussian's log standard deviation
    log_std_max: float = 2.0
    noise: float = 0.0  # standard deviation of the noise on the action of a policy without log_std
    observation: str = ""  # layout of what it sees, in words

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        expected = {f"{name}.{part}" for name in self.layer_names for part in ("weight", "bias")}
        if expected ^ set(self.weights):
            raise ValueError(f"its arrays do not form a network: {', '.join(sorted(expected ^ set(self.weights)))}")
        for name, array in self.weights.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise ValueError(f"{name} is {array.dtype}, or holds NaN or infinity")
        layers, width = {}, self.observation_dim
        for name in self.layer_names:
            weight, bias = layers[name] = [self.weights[f"{name}.{part}"].astype(float) for part in ("weight", "bias")]
            outputs = len(bias) if name.startswith("hidden") else self.action_dim
            if weight.shape != (width, outputs) or bias.shape != (outputs,):
                raise ValueError(f"{name} is {weight.shape} and {bias.shape}, expected {(width, outputs)}")
            width = outputs if name.startswith("hidden") else width
        mean, log_std = layers.pop("mean"), layers.pop("log_std", None)
        # The dataclass is frozen; this is what `act` reads.
        object.__setattr__(self, "_network", (tuple(layers.values()), mean, log_std, ACTIVATIONS[self.activation]))

    @property
    def depth(self) -> int:
        """Number of hidden layers."""
        return sum(name.startswith("hidden.") and name.endswith(".weight") for name in self.weights)

    @property
    def stochastic(self) -> bool:
        """Whether it is a Gaussian (SAC), not a mean alone (TD3)."""
        return "log_std.weight" in self.weights

    @property
    def layer_names(self) -> list[str]:
        """Layers from the input to the outputs."""
        return [f"hidden.{index}" for index in range(self.depth)] + ["mean"] + ["log_std"] * self.stochastic

    @property
    def observation_dim(self) -> int:
        return self.weights[f"{self.layer_names[0]}.weight"].shape[0]

    @property
    def action_dim(self) -> int:
        return self.weights["mean.bias"].shape[0]

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
        if rng is not None and log_std is not None:
            scale = np.clip(hidden @ log_std[0] + log_std[1], self.log_std_min, self.log_std_max)
            action += np.exp(scale) * rng.standard_normal(action.shape)
        action = np.tanh(action)
        if rng is not None and log_std is None:
            action = np.clip(action + self.noise * rng.standard_normal(action.shape), -1.0, 1.0)
        return action.astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------


def policy_path(experts_dir: str | Path, env: str, step: int) -> Path:
    """`<experts_dir>/<env>_<step>.safetensors`, whether or not it is there."""
    return Path(experts_dir) / f"{env}_{step}.safetensors"


def latest_policy(experts_dir: str | Path, env: str, step: int) -> Path:
    """The policy of the most training steps in a folder, which need not be the one of the highest return.

    Where there is none, the path that `step` would have.
    """
    steps = [path.stem.removeprefix(f"{env}_") for path in Path(experts_dir).glob(f"{env}_*.safetensors")]
    return policy_path(experts_dir, env, max((int(text) for text in steps if text.isdecimal()), default=step))


def missing_policy(path: Path) -> UserError:
    """What to say of a policy file that is not there: what its folder holds, and where to get it."""
    folder, env = path.parent, path.stem.rpartition("_")[0]
    if not folder.is_dir():
        return UserError(f"{folder}: no such folder; --experts_dir names the one that holds {path.name}")
    there = sorted(file.name for file in folder.glob("*.safetensors"))
    more = f" and {len(there) - MAX_NAMED} more" * (len(there) > MAX_NAMED)
    holds = f"this folder holds {', '.join(there[:MAX_NAMED]) or 'no policy'}{more}"
    if not there and any((folder / "policies").glob("*.safetensors")):
        holds += f", {folder / 'policies'} does: give that as --experts_dir"
    return UserError(
        f"{path}: no such policy; {holds}; a snapshot carries its training steps in its name, "
        f"<env>_<steps>.safetensors; train with `python -m benchmark_data.train_expert --env {env}`, or leave out "
        "--experts_dir to take the shipped ones"
    )


def card_path(policy_file: str | Path) -> Path:
    """The card beside a policy file."""
    return Path(policy_file).with_suffix(".json")


def write_policy(path: str | Path, policy: Policy) -> None:
    """Write a policy file as a whole; equal policies give equal bytes. Raises OSError that names the file."""
    from safetensors.numpy import save

    # safetensors writes the memory as it lies: a transposed array would come back as other numbers.
    weights = {name: np.ascontiguousarray(array) for name, array in policy.weights.items()}
    settings = {name: value for name, value in vars(policy).items() if name not in ("weights", "_network")}
    # safetensors keeps no order among metadata entries, so there is one.
    write_bytes_atomic(path, save(weights, {"policy": json.dumps(settings, sort_keys=True)}))


def read_policy(path: str | Path) -> Policy:
    """Read and check a policy file. Raises UserError in one line where it is missing, damaged or of another kind."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read this policy file ({error.strerror}); check --experts_dir") from None
    try:
        weights = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        policy = Policy(weights=weights, **json.loads(header["__metadata__"]["policy"]))
        sizes, known = (policy.observation_dim, policy.action_dim), ENVIRONMENTS.get(policy.env)
        if known is None or sizes != (known.observation_dim, known.action_dim):
            raise ValueError(f"{sizes[0]} observation and {sizes[1]} action numbers of {policy.env!r}")
    except (SafetensorError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"{path}: not a policy file of this program ({one_line(error)}); copy it again, or train one"
        ) from None
    return policy


def read_named_policy(path: str | Path) -> Policy:
    """`read_policy` of a file whose name, see `policy_path`, must be true of what it holds; else UserError."""
    policy = read_policy(path)
    if Path(path).stem != f"{policy.env}_{policy.step}":
        raise UserError(f"{path}: the policy inside is {policy.env}_{policy.step}; copy or train it again")
    return policy


def read_card(policy_file: str | Path) -> dict[str, Any]:
    """The card beside a policy file. Raises UserError where it is missing or not JSON."""
    path = card_path(policy_file)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: cannot read this card ({one_line(error)}); write it with "
            f"`python -m benchmark_data.train_expert --evaluate {policy_file}`"
        ) from None


def algorithm(policy_file: str | Path) -> str:
    """What a policy was trained with, as its card tells."""
    try:
        return str(read_card(policy_file).get("algorithm") or "an algorithm that its card does not name")
    except UserError:
        return "an unknown algorithm (it has no card)"


def write_card(policy_file: str | Path, facts: dict[str, Any], returns: dict[str, Any]) -> dict[str, Any]:
    """Write the card beside a policy file and return it.

    Args:
        facts: algorithm, recipe, seed and what else only the one who trained it knows.
        returns: "deterministic" and "stochastic" -> what `evaluate_policy` returned.
    """
    policy = read_policy(policy_file)
    registered = ENVIRONMENTS[policy.env]
    hidden = [policy.weights[f"hidden.{index}.bias"].shape[0] for index in range(policy.depth)]
    card = {
        "policy": Path(policy_file).name,
        "sha256": sha256(policy_file),
        "environment": policy.env,
        "simulator": registered.simulator,
        "reward": registered.reward,
        "observation": policy.observation or registered.observation,
        "steps": policy.step,
        **facts,
        "hidden": hidden,
        "activation": policy.activation,
        "log_std": [policy.log_std_min, policy.log_std_max] if policy.stochastic else None,
        "returns": {kind: {key: round(value, 4) for key, value in result.items()} for kind, result in returns.items()},
        "measured_with": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", *registered.packages)},
        },
    }
    write_text_atomic(card_path(policy_file), json.dumps(card, indent=2) + "\n")
    return card


# ----------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------


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
    own = make_expert_env(policy.env) if env is None else env
    indices: Iterable[int] = range(episodes)
    if show:
        kind = "stochastic" if stochastic else "deterministic"
        indices = progress(indices, f"{policy.env}_{policy.step} {kind}", unit="episode")
    try:
        results = [_episode(policy, own, np.random.SeedSequence(seed, spawn_key=(i,)), stochastic) for i in indices]
    finally:
        if env is None:
            own.close()
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
    """Return and number of steps of one episode."""
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
