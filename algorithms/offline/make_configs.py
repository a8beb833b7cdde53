"""Write configs/offline/pogo_multi/: a file for each of six algorithms on each of D4RL's 15 datasets.

    python -m algorithms.offline.make_configs

What is here once would otherwise stand in ninety files: each holds the algorithm, the dataset, the chain and what CORL
sets differently there. A test says when the files are not those that this writes.
"""

from pathlib import Path
from typing import Any

import yaml

from utils import write_text_atomic

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "offline" / "pogo_multi"
LOCOMOTION = {name: ("medium", "medium-replay", "medium-expert") for name in ("halfcheetah", "hopper", "walker2d")}
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
DATASETS = [(robot, data) for robot, names in (LOCOMOTION | {"antmaze": MAZES}).items() for data in names]
ALGORITHMS = ("iql", "td3_bc", "cql", "awac", "sac_n", "edac")
CHAIN = {"w2_weights": [10.0, 10.0, 10.0]}


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


def files() -> dict[Path, str]:
    """The text of every file, by its path."""
    found = {}
    for robot, data in DATASETS:
        for algorithm in ALGORITHMS:
            values = {"algorithm": algorithm, "env": f"{robot}-{data}-v2", "max_timesteps": 1_000_000}
            values |= CHAIN | DIFFERENCES[algorithm](robot, data)
            path = FOLDER / robot / f"{data.replace('-', '_')}_v2_{algorithm}.yaml"
            found[path] = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    return found


def main() -> None:
    texts = files()
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, text)
    print(f"{len(texts)} files in {FOLDER}")


if __name__ == "__main__":
    main()
