"""Write configs/offline/pogo_multi/: a file for each of six algorithms on each of D4RL's 15 datasets.

    python -m algorithms.offline.make_configs

What is here once would otherwise stand in ninety files: each holds the algorithm, the dataset, the chain's weights, and
every parameter of the algorithm, with what CORL sets differently there. A test says when the files are not those that
this writes.

Weights are by the rule of docs/pogo_multi.md: none for actor 0, which so is the algorithm itself; for later ones 1.6 by
A times the size of Q, A numbers being in an action, where the algorithm does not normalise Q. On antmazes the
original's 10 is near what the rule gives for rewards of -1 a step, and stays, untried.
"""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from algorithms.offline.awac import AWACConfig
from algorithms.offline.cql import CQLConfig
from algorithms.offline.edac import EDACConfig
from algorithms.offline.iql import IQLConfig
from algorithms.offline.sac_n import SACNConfig
from algorithms.offline.td3_bc import TD3BCConfig
from utils import write_text_atomic

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "offline" / "pogo_multi"
LOCOMOTION = {name: ("medium", "medium-replay", "medium-expert") for name in ("halfcheetah", "hopper", "walker2d")}
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
DATASETS = [(robot, data) for robot, names in (LOCOMOTION | {"antmaze": MAZES}).items() for data in names]
CONFIGS = {"iql": IQLConfig, "td3_bc": TD3BCConfig, "cql": CQLConfig, "awac": AWACConfig, "sac_n": SACNConfig}
CONFIGS["edac"] = EDACConfig
ACTION_DIM = {"halfcheetah": 6, "hopper": 3, "walker2d": 6, "antmaze": 8}
# Of the local/ datasets, medium, medium-replay, medium-expert: mean discounted return (a run's first line has it).
VALUES = {"halfcheetah": (473, 250, 635), "hopper": (245, 187, 287), "walker2d": (268, 172, 320)}
RANGES = {"hopper": (2569, 2795, 3046)}  # largest return less the smallest, for `normalize_reward`
ORIGINAL = [10.0, 10.0, 10.0]


def iql(robot: str, data: str) -> dict[str, Any]:
    if robot == "antmaze":
        return {"iql_tau": 0.9, "beta": 10.0, "normalize_reward": True}
    if robot == "hopper" and data == "medium-expert":
        return {"iql_tau": 0.5, "beta": 6.0}
    return {"iql_deterministic": True, "normalize_reward": True, "tau": 0.001} if robot == "hopper" else {}


def td3_bc(robot: str, data: str) -> dict[str, Any]:
    return {"normalize_reward": True} if robot == "antmaze" else {}


def cql(robot: str, data: str) -> dict[str, Any]:
    if robot != "antmaze":
        return {"normalize_reward": True} if (robot, data) == ("hopper", "medium") else {}
    maze = {"cql_alpha": 5.0, "cql_lagrange": True, "cql_target_action_gap": 0.8, "cql_max_target_backup": True}
    maze |= {"actor_lr": 1e-4, "q_n_hidden_layers": 5, "normalize": False}
    return maze | {"reward_scale": 10.0, "reward_bias": -5.0}


def awac(robot: str, data: str) -> dict[str, Any]:
    return {"awac_lambda": 0.1, "normalize_reward": True} if robot == "antmaze" else {}


def sac_n(robot: str, data: str) -> dict[str, Any]:
    critics = {"halfcheetah": 10, "walker2d": 20, "hopper": 500 if data == "medium" else 200, "antmaze": 25}
    return {"num_critics": critics[robot], "normalize": False, "max_timesteps": 3_000_000}


def edac(robot: str, data: str) -> dict[str, Any]:
    diverse = data == "medium-expert" and robot in ("halfcheetah", "walker2d")
    settings = {"num_critics": 50 if robot == "hopper" else 10, "eta": 5.0 if diverse else 1.0}
    return settings | {"normalize": False, "max_timesteps": 3_000_000}


DIFFERENCES = {"iql": iql, "td3_bc": td3_bc, "cql": cql, "awac": awac, "sac_n": sac_n, "edac": edac}


def weights(algorithm: str, robot: str, data: str) -> list[float]:
    if robot == "antmaze":
        return ORIGINAL
    level = LOCOMOTION[robot].index(data)
    value = VALUES[robot][level]
    if DIFFERENCES[algorithm](robot, data).get("normalize_reward"):
        value *= 1000 / RANGES[robot][level]
    unit = TD3BCConfig.alpha if algorithm == "td3_bc" else value  # td3_bc's Q has the size alpha in its loss
    weight = float(f"{1.6 / ACTION_DIM[robot] * unit:.2g}")
    return [0.0, weight, weight]


def settings(algorithm: str, robot: str, data: str) -> dict[str, Any]:
    values = {"algorithm": algorithm, "env": f"{robot}-{data}-v2", "max_timesteps": 1_000_000}
    values |= {"w2_weights": weights(algorithm, robot, data), "batch_size": 256, "normalize": True}
    values |= {"normalize_reward": False, "reward_scale": 1.0, "reward_bias": 0.0}
    values |= {field.name: field.default for field in dataclasses.fields(CONFIGS[algorithm])}
    return values | DIFFERENCES[algorithm](robot, data)


def files() -> dict[Path, str]:
    found = {}
    for robot, data in DATASETS:
        for algorithm in CONFIGS:
            values = settings(algorithm, robot, data)
            text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
            if values["w2_weights"] != ORIGINAL:
                line = yaml.safe_dump({"w2_weights": values["w2_weights"]}, default_flow_style=None).strip()
                text = text.replace(line, f"{line} # by the rule of docs/pogo_multi.md; the original: {ORIGINAL}")
            found[FOLDER / robot / f"{data.replace('-', '_')}_v2_{algorithm}.yaml"] = text
    return found


def main() -> None:
    texts = files()
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, text)
    print(f"{len(texts)} files in {FOLDER}")


if __name__ == "__main__":
    main()
