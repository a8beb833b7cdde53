"""Train POGO's chain over an offline algorithm, and score every actor of it.

--algorithm iql, td3_bc, awac, cql, sac_n or edac: critics, V and temperature are that algorithm's own, its actor
becomes a chain of as many actors as --w2_weights has numbers. --help with an algorithm shows its settings too. A run's
directory is logs/{env}/{algorithm}_w2_{weights}/seed_{seed}.

    python -m algorithms.offline.pogo_multi_main --algorithm iql --env local/hopper-medium-v2
    python -m algorithms.offline.pogo_multi_main --config FILE --w2_weights 20 20 20
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from algorithms.offline.awac import AWAC, AWACConfig
from algorithms.offline.base import OfflineAlgorithm
from algorithms.offline.cql import CQL, CQLConfig
from algorithms.offline.edac import EDAC, EDACConfig
from algorithms.offline.iql import IQL, IQLConfig
from algorithms.offline.pogo_multi import ChainConfig, MultiActor
from algorithms.offline.pogo_policies import POLICIES
from algorithms.offline.sac_n import SACN, SACNConfig
from algorithms.offline.td3_bc import TD3BC, TD3BCConfig
from benchmark_data.local import generate_if_missing
from offline_data import OfflineData, load_transitions
from runs.chain import Act, ChainRun, ChainRunConfig, run_chain
from runs.cli import load_yaml, parse_config, run_cli
from runs.directory import expecting, load_checkpoint
from runs.policy import evaluate_again
from runs.run import data_values
from utils import Basic, Count, MayChange, Number, Positive, UserError, warn

NEED_DENSITY = {"cql", "sac_n", "edac"}  # their losses have log pi; their own policy is the default
# Spellings of the original text.
ALIASES = {
    "config_path": "config",
    "n_episodes": "eval_episodes",
    "checkpoints_path": "checkpoint_dir",
    "project": "wandb_project",
}
PolicyName = Literal["own", "stochastic", "deterministic", "gaussian", "tanh_gaussian"]


@dataclass
class MultiRunConfig(ChainRunConfig, ChainConfig):
    algorithm: Basic[str] = ""  # required: iql, td3_bc, awac, cql, sac_n or edac
    num_actors: Count | None = None  # must be the number of w2_weights, if given
    actor_configs: tuple[PolicyName, ...] | None = None  # kind of each actor; default: see docs/pogo_multi.md
    normalize_reward: bool = False  # locomotion: times 1000 / (largest - smallest return); antmaze: minus 1
    reward_scale: Positive = 1.0  # rewards are multiplied by this, after that
    reward_bias: Number = 0.0  # added to the rewards in the end
    buffer_size: Count = 2_000_000  # transitions that the data may hold at most
    group: MayChange[str | None] = None  # of the run in Weights & Biases
    name: MayChange[str | None] = None  # of the run in Weights & Biases; default: its directory
    load_model: str | None = None  # begin with the networks and optimizers of this last.pth, at update 0


# An algorithm, and the settings of its runs: those of a run, of the chain and its own, no other's.
ALGORITHMS: dict[str, tuple[type[OfflineAlgorithm], type[MultiRunConfig]]] = {
    name: (algorithm, dataclass(type(f"{algorithm.__name__}RunConfig", (MultiRunConfig, own), {})))
    for name, algorithm, own in (
        ("iql", IQL, IQLConfig),
        ("td3_bc", TD3BC, TD3BCConfig),
        ("awac", AWAC, AWACConfig),
        ("cql", CQL, CQLConfig),
        ("sac_n", SACN, SACNConfig),
        ("edac", EDAC, EDACConfig),
    )
}


def read_actor_configs(values: Any) -> list[str] | None:
    """The file's list of {deterministic: bool} or {type: name} as names. Raises ValueError."""
    if values is None:
        return None
    names = []
    for value in values if isinstance(values, list) else [None]:
        match value:
            case str() as name:
                names.append(name)
            case {"type": name, **rest} if not rest:
                names.append(name)
            case {"deterministic": bool() as point, **rest} if not rest:
                names.append("deterministic" if point else "stochastic")
            case _:
                raise ValueError
    return names


class MultiRun(ChainRun):
    config: MultiRunConfig
    agent: MultiActor

    @classmethod
    def check(cls, config: MultiRunConfig) -> None:
        super().check(config)
        actors, kinds = len(config.w2_weights), config.actor_configs or ()
        if config.num_actors not in (None, actors):
            raise UserError(f"--num_actors {config.num_actors}: w2_weights has {actors} weights; give as many of each")
        if kinds and len(kinds) != actors:
            raise UserError(f"--actor_configs {' '.join(kinds)}: {len(kinds)} for {actors} weights; give one for each")
        without = [kind for kind in kinds if kind in ("stochastic", "deterministic")]
        if without and config.algorithm in NEED_DENSITY:
            raise UserError(
                f"--actor_configs {without[0]}: {config.algorithm} needs a density; choose gaussian or tanh_gaussian"
            )
        goes_on = config.resume and cls.checkpoint_path(config).exists()
        if config.load_model is not None and not goes_on and not Path(config.load_model).is_file():
            raise UserError(f"--load_model {config.load_model}: no such file; give the last.pth of another run")

    @classmethod
    def run_name(cls, config: MultiRunConfig) -> Path:
        return super().run_name(config, f"{config.algorithm}_")

    def load_transitions(self) -> OfflineData:
        """The transitions, rewards scaled as the settings say; a local dataset that is missing is made first."""
        config = self.config
        generate_if_missing(config.env, config.dataset_dir)
        data = load_transitions(config.env, config.dataset_dir, -1.0 if config.normalize_reward else 0.0)
        if len(data) > config.buffer_size:
            raise UserError(f"--buffer_size {config.buffer_size}: {config.env} has {len(data)} transitions; raise it")
        if config.normalize_reward and data.reward_shift == 0:
            if np.ptp(data.returns) == 0:
                raise UserError(f"--normalize_reward: all episodes of {config.env} have one return; leave it out")
            data.rewards *= np.float32(1000 / np.ptp(data.returns))
        data.rewards *= np.float32(config.reward_scale)
        data.rewards += np.float32(config.reward_bias)
        return data

    def describe(self) -> str:
        """As every chain, and the weights of docs/pogo_multi.md's rule for later actors."""
        data, config = self.data, self.config
        value = data_values(data.rewards, data.terminated, data.truncated, config.discount)[0]
        size = config.alpha if isinstance(config, TD3BCConfig) else abs(value)
        weight = float(f"{1.6 / data.action_dim * size:.2g}")
        return f"{super().describe()}; discounted returns {value:.4g}, by docs/pogo_multi.md's rule w_i {weight:g}"

    def make_agent(self, observation_dim: int, action_dim: int, max_action: float) -> MultiActor:
        sizes = (observation_dim, action_dim, max_action)
        agent = build(self.config, sizes, self.streams.policy, self.device)
        if self.config.load_model is not None and not (self.config.resume and self.checkpoint.exists()):
            self.begin_with(agent, self.config.load_model)
        return agent

    def begin_with(self, agent: MultiActor, path: str) -> None:
        """Take over networks and optimizers of another run; UserError where they do not fit."""
        state = load_checkpoint(path, self.device)
        with expecting(f"--load_model {path}", "a checkpoint of such a chain"):
            theirs, own = state["agent"]["networks"].keys(), agent.algorithm.networks.keys()
            if theirs != own:
                raise ValueError(f"it has {', '.join(theirs)}, this run {', '.join(own)}")
            mean, std = (state[f"observation_{name}"].cpu().numpy() for name in ("mean", "std"))
            if mean.shape != self.mean.shape:
                raise ValueError(f"observations of {len(mean)} numbers, here {len(self.mean)}")
            agent.load_state_dict(state["agent"])
            if not (np.allclose(mean, self.mean, 1e-3, 1e-3) and np.allclose(std, self.std, 1e-3, 1e-3)):
                warn(f"--load_model {path}: was trained on observations of another mean or spread than this run")
        agent.step = 0

    def acting(self) -> list[Act]:
        return acting(self.agent)

    def wandb_labels(self) -> dict[str, str | None]:
        return {"group": self.config.group, "name": self.config.name}

    def evaluate(self) -> dict[str, float]:
        """As every chain; eval_actor_i is actor i's deterministic score."""
        figures = super().evaluate()
        scores = [figures[f"eval/actor_{number}/deterministic/score"] for number in range(len(self.agent.actors))]
        return figures | {f"eval_actor_{number}": score for number, score in enumerate(scores)}

    def summary(self) -> dict[str, Any]:
        return {"algorithm": self.config.algorithm}


def build(
    config: MultiRunConfig, sizes: tuple[int, int, float], generator: torch.Generator, device: torch.device
) -> MultiActor:
    takes_own = config.algorithm in NEED_DENSITY or getattr(config, "iql_deterministic", False)
    kinds = config.actor_configs or ("own" if takes_own else "stochastic",) * len(config.w2_weights)
    policies = [None if kind == "own" else POLICIES[kind] for kind in kinds]
    return MultiActor(ALGORITHMS[config.algorithm][0], config, config, sizes, generator, device, policies)


def acting(agent: MultiActor) -> list[Act]:
    return [lambda observations, z, actor=actor: actor(observations).draw(z).actions for actor in agent.actors]


def trained_actors(state: dict[str, Any], device: torch.device) -> list[Act]:
    trained, sizes = state["config"], (len(state["observation_mean"]), state["action_dim"], state["max_action"])
    config_class = ALGORITHMS[trained["algorithm"]][1]
    known = {field.name for field in dataclasses.fields(config_class)}
    config = config_class(**{name: value for name, value in trained.items() if name in known})
    agent = build(config, sizes, torch.Generator(device), device)
    agent.load_state_dict(state["agent"])
    return acting(agent)


def find_config(argv: list[str]) -> type[MultiRunConfig]:
    """The settings of the algorithm that the command line names, or else the file that it names. Raises UserError."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    pairs = zip(words, words[1:], strict=False)
    given = {word.replace("-", "_"): following for word, following in pairs if word.startswith("--")}
    flag, file = given.get("__algorithm"), given.get("__config", given.get("__config_path"))
    folder = given.get("__run_dir")
    if file is None and folder and "--resume" in words and Path(folder, "config.yaml").is_file():
        file = f"{folder}/config.yaml"
    stored = load_yaml(Path(file)).get("algorithm") if file is not None else None
    if flag is not None and stored not in (None, flag):
        raise UserError(f"--algorithm {flag}: {file} is of {stored}; take a file of {flag}, or leave the flag out")
    name = flag or stored
    if name is None and ({"-h", "--help"} & set(argv) or "__evaluate" in given):
        return MultiRunConfig
    if not isinstance(name, str) or name not in ALGORITHMS:
        found = f"--algorithm {name}: must be" if name else "--algorithm is missing, here and in the file: give"
        raise UserError(f"{found} one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name][1]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train to the end, and return what `run_chain` does; or evaluate a file, and return its scores."""
    argv = list(sys.argv[1:] if argv is None else argv)
    config_class = find_config(argv)
    more = (MultiRun.default_run_dir, ALIASES, {"actor_configs": read_actor_configs})
    config = parse_config(config_class, argv, __doc__, "--config", *more)
    if config.evaluate is not None:
        return evaluate_again(config, trained_actors, "pogo_multi_main.py")
    return run_chain(MultiRun, config)


if __name__ == "__main__":
    run_cli(main)
