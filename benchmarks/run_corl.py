"""CORL's own files on our data: the peers of the tables, trained and scored by their code.

    git clone https://github.com/corl-team/CORL
    python benchmarks/run_corl.py --path CORL --algorithms td3_bc iql --envs hopper-medium-v2 --seeds 0 1 2

Each run is CORL's `train` with the settings of its configs/offline/<algorithm>/<env>/, but for the flags below, one
evaluation at the end and a buffer no larger than need be. td3_bc, iql and cql work; its other files have settings of
other names. They need gym, d4rl, pyrallis and wandb to be imported: small stand-ins give them Gymnasium's environments
and the data that our own commands load. Scores are of the last update, over `n_episodes` episodes. A finished run is
not trained again; one that was cut begins anew, as CORL saves nothing that it could go on from.
"""

import dataclasses
import importlib.util
import json
import sys
import types
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark_data.local import generate_if_missing
from comparison.tables import cell_text
from offline_data import load_transitions, make_env, normalized_score
from runs.cli import load_yaml, parse_config, run_cli
from utils import Count, UserError, progress, write_text_atomic


@dataclass
class RunCORLConfig:
    path: str = "CORL"  # clone of CORL
    algorithms: tuple[str, ...] = ("td3_bc", "iql")  # files of its algorithms/offline: td3_bc, iql, cql
    envs: tuple[str, ...] = ("hopper-medium-v2",)  # ids of datasets, as of pogo_main.py
    seeds: tuple[int, ...] = (0, 1, 2)  # of each
    dataset_dir: str | None = None  # folder of the data; default: as pogo_main.py
    max_timesteps: Count = 100_000  # updates of a run
    n_episodes: Count = 50  # episodes of the evaluation at the end
    device: str = "cpu"  # cpu or cuda
    threads: Count = 1  # CPU threads
    log_dir: str = "logs/corl"  # a run's score is written to <log_dir>/<env>/<algorithm>/updates_<n>/seed_<seed>.json


class OldEnv:
    """A Gymnasium environment by the old interface: reset gives an observation, step gives one `done`."""

    def __init__(self, env: Any, name: str, dataset_dir: str | None, see: Callable = lambda observation: observation):
        self.env, self.name, self.dataset_dir, self.see, self.first_seed = env, name, dataset_dir, see, None
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def seed(self, seed: int) -> None:
        self.first_seed = seed

    def reset(self) -> np.ndarray:
        observation, _ = self.env.reset(seed=self.first_seed)
        self.first_seed = None
        return self.see(observation)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self.see(observation), reward, terminated or truncated, info

    def get_normalized_score(self, value: float) -> float:
        """A return as a share of 1, as d4rl has it."""
        return float(normalized_score(self.name, np.array([value]), self.dataset_dir)[0]) / 100


def qlearning_dataset(env: OldEnv) -> dict[str, np.ndarray]:
    """Transitions by d4rl's names; rewards of mazes as they are in the file, as CORL itself takes 1 from them."""
    data = load_transitions(env.name, env.dataset_dir, antmaze_reward_shift=0.0)
    names = {"terminals": "terminated"} | {name: name for name in ("observations", "actions", "next_observations")}
    return {name: getattr(data, own) for name, own in (names | {"rewards": "rewards"}).items()}


def stand_ins(config: RunCORLConfig, log: Callable) -> dict[str, types.ModuleType]:
    """What CORL's files import."""

    def make(name: str) -> OldEnv:
        return OldEnv(make_env(name, config.dataset_dir), name, config.dataset_dir)

    def transform(env: OldEnv, see: Callable) -> OldEnv:
        return OldEnv(env.env, env.name, env.dataset_dir, lambda observation: see(env.see(observation)))

    run = types.SimpleNamespace(id="", save=lambda: None)
    contents = {
        "gym": {"make": make, "Env": OldEnv, "wrappers": types.SimpleNamespace(TransformObservation=transform)},
        "d4rl": {"qlearning_dataset": qlearning_dataset},
        "pyrallis": {"wrap": lambda: lambda function: function},
        "wandb": {"init": lambda **_: None, "log": log, "run": run},
    }
    modules = {}
    for name, values in contents.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(values)
    return modules


def load_file(config: RunCORLConfig, algorithm: str) -> types.ModuleType:
    """A file of CORL's; UserError where it is not there."""
    path = Path(config.path) / "algorithms" / "offline" / f"{algorithm}.py"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --path is a clone of CORL, --algorithms name its files")
    spec = importlib.util.spec_from_file_location(f"corl_{algorithm}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def settings_of(module: types.ModuleType, config: RunCORLConfig, algorithm: str, env: str, seed: int) -> Any:
    """CORL's settings for a dataset, ours where the flags say so."""
    robot, _, level = env.removeprefix("local/").removesuffix("-v2").partition("-")
    path = Path(config.path) / "configs" / "offline" / algorithm / robot / f"{level.replace('-', '_')}_v2.yaml"
    stored = load_yaml(path)
    kinds = {field.name: field.type for field in dataclasses.fields(module.TrainConfig)}
    # "3e-4" is text to YAML 1.1.
    stored = {name: float(value) if kinds.get(name) is float else value for name, value in stored.items()}
    steps = {"max_timesteps": config.max_timesteps, "eval_freq": config.max_timesteps, "n_episodes": config.n_episodes}
    own = steps | {"env": env, "seed": seed, "device": config.device}
    if not own.keys() <= kinds.keys():
        raise UserError(f"--algorithms {algorithm}: CORL's file has no {', '.join(sorted(own.keys() - kinds.keys()))}")
    own |= {"buffer_size": 2_000_000} if "buffer_size" in kinds else {}
    return module.TrainConfig(**{name: value for name, value in (stored | own).items() if name in kinds})


def identity(settings: Any, data: dict[str, Any]) -> dict[str, Any]:
    """What makes a run what it is: CORL's settings but for names, places and the device, and facts of the data."""
    left_out = {"name", "group", "project", "checkpoints_path", "load_model", "device"}
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in left_out}
    return json.loads(json.dumps({"settings": kept, "data": data}, default=float))


def run_one(config: RunCORLConfig, algorithm: str, env: str, seed: int) -> dict[str, float]:
    """Train and score one run, unless it is finished; what its file holds.

    Raises UserError where that is of other settings or data.
    """
    path = Path(config.log_dir) / env / algorithm / f"updates_{config.max_timesteps}" / f"seed_{seed}.json"
    generate_if_missing(env, config.dataset_dir)
    facts = load_transitions(env, config.dataset_dir, antmaze_reward_shift=0.0).facts()
    scores = []
    with progress(config.max_timesteps, f"{algorithm} {env} {seed}", unit="update") as bar:

        def log(figures: dict[str, float], step: int) -> None:
            bar.update(step - bar.n)
            scores.extend(value for name, value in figures.items() if name == "d4rl_normalized_score")

        with unittest.mock.patch.dict(sys.modules, stand_ins(config, log)):
            module = load_file(config, algorithm)
            settings = settings_of(module, config, algorithm, env, seed)
            own = identity(settings, facts)
            if path.is_file():
                return stored_run(path, own)
            module.train(settings)
    found = {"score": float(scores[-1]), **own}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(found, indent=2) + "\n")
    return found


def stored_run(path: Path, own: dict[str, Any]) -> dict[str, float]:
    """What a finished run's file holds; UserError where it is not of these settings and this data."""
    stored = json.loads(path.read_text())
    for part in own:
        for name, value in own[part].items():
            if stored[part].get(name) != value:
                was = stored[part].get(name)
                raise UserError(f"{path}: {name} was {was} and is now {value}; choose another --log_dir")
    return stored


def main(argv: list[str] | None = None) -> None:
    config = parse_config(RunCORLConfig, argv, __doc__)
    torch.set_num_threads(config.threads)
    figures = {}
    for seed in config.seeds:
        for env in config.envs:
            for algorithm in config.algorithms:
                figures[f"{algorithm}, {env}", seed] = run_one(config, algorithm, env, seed)
    title = f"CORL's files, {config.max_timesteps:,} updates, {len(config.seeds)} seeds, {config.n_episodes} episodes"
    print(f"{title}\n\n| method, data | score |\n|---|---|")
    for name in dict.fromkeys(name for name, _ in figures):
        scores = [found["score"] for (other, _), found in figures.items() if other == name]
        print(f"| {name} | {cell_text(scores, len(config.seeds))} |")


if __name__ == "__main__":
    run_cli(main)
