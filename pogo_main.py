"""Train a POGO chain on one dataset and score every actor of it.

With no flag: a short run on local/hopper-medium-v2, which is made first; minutes on two cores. A result worth quoting
takes --max_timesteps 1000000. A run's directory, logs/{env}/w2_{weights}/seed_{seed}, holds config.yaml,
training/metrics.csv, training/evaluations.csv (every episode), TensorBoard events, training_curves.png and
checkpoints/last.pth.

    python pogo_main.py --env halfcheetah-medium-v2 --w2_weights 0.2 0.2 0.2 --max_timesteps 1000000
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmark_data.local import generate_if_missing
from model import TransportActor
from offline_data import OfflineData, load_transitions
from pogo_agent import POGOAgent, POGOConfig
from runs.chain import Act, ChainRun, ChainRunConfig, run_chain
from runs.cli import parse_config, run_cli
from runs.policy import evaluate_again
from runs.run import data_values
from utils import Number, warn


@dataclass
class POGOTrainerConfig(ChainRunConfig, POGOConfig):
    antmaze_reward_shift: Number = -1.0  # added to the rewards of D4RL's antmazes, and to no others


class POGORun(ChainRun):
    """One run of this command."""

    config: POGOTrainerConfig
    agent: POGOAgent

    blur_told = False  # whether it has warned of a wide blur

    def load_transitions(self) -> OfflineData:
        """The transitions; a local dataset that is missing is made first."""
        config = self.config
        generate_if_missing(config.env, config.dataset_dir)
        return load_transitions(config.env, config.dataset_dir, config.antmaze_reward_shift)

    def make_agent(self, observation_dim: int, action_dim: int, max_action: float) -> POGOAgent:
        sizes, data = (observation_dim, action_dim, max_action), self.data
        rows = (data.rewards, data.terminated, data.truncated, self.config.discount)
        self.values = data_values(*rows)
        mean, self.best_value = self.values
        return POGOAgent(self.config, *sizes, self.streams.policy, self.device, mean, step_reward(data.rewards))

    def describe(self) -> str:
        """As every chain, and what Q and the weights have to compare with."""
        (mean, best), rule = self.values, 1.6 / self.data.action_dim  # docs/pogo.md derives it
        returns = f"discounted returns {mean:.4g}, at most {best:.4g}"
        return f"{super().describe()}; {returns}; w_i by the rule of docs/pogo.md {rule:.2g}"

    def acting(self) -> list[Act]:
        return list(self.agent.actors)

    def diagnose(self) -> dict[str, float]:
        """As every chain, with a word about a blur that is too wide."""
        metrics = super().diagnose()
        largest = max((value for name, value in metrics.items() if name.endswith("blur_to_spread")), default=0.0)
        if largest > 1 and not self.blur_told:
            self.blur_told = True
            warn(
                f"the blur is {largest:.1f} times the spread of an actor's samples, so that distances see little but "
                "their means (usual with the published blur, see docs/pogo.md); --sinkhorn_backend exact has none, and "
                "--blur_relative spread or a smaller --sinkhorn_blur would see more"
            )
        return metrics


def step_reward(rewards: np.ndarray) -> float:
    """What each step pays where rewards [N] are of two values, as -1 of the -1 and 0 of a maze; else 0."""
    values = np.unique(rewards)
    return float(values[0]) if len(values) == 2 else 0.0


def trained_actors(state: dict[str, Any], device: torch.device) -> list[TransportActor]:
    """The actors of a checkpoint of this command, in the order of the chain."""
    config = state["config"]
    sizes = (len(state["observation_mean"]), state["action_dim"], state["max_action"], config["hidden_dim"])
    actors = torch.nn.ModuleList(TransportActor(*sizes) for _ in config["w2_weights"])
    actors.load_state_dict(state["agent"]["actors"])
    return list(actors.to(device).requires_grad_(False))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train to the end, and return what `run_chain` does; or evaluate a file, and return its scores."""
    config = parse_config(POGOTrainerConfig, argv, __doc__, default_run_dir=POGORun.default_run_dir)
    if config.evaluate is not None:
        return evaluate_again(config, trained_actors, "pogo_main.py")
    return run_chain(POGORun, config)


if __name__ == "__main__":
    run_cli(main)
