"""Environment steps a second while acting: codes of single states, against encoding the window anew at each step.

    python benchmarks/bench_online.py
    python benchmarks/bench_online.py --num_envs 32

Both act by search with the same networks and the same graph of states, in OGBench's antmaze-medium, which is simulated
by both and counts in the second pair of figures. The peer encodes each environment's last `context_length` states at
every step. The networks are untrained and the nodes random; distances are scaled so that every goal is far and the
search has paths to find and to block. The two take turns; medians are printed.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import OfflineModel
from ogbench_utils import make_env, seeded_reset
from online_agent import OnlineAgent, OnlineAgentConfig
from opso.search import Planner, StateGraph
from runs.cli import parse_config, run_cli
from utils import Count

DATASET = "antmaze-medium-navigate-v0"
FAR = 300.0  # steps that a squared distance of the untrained metric counts as


@dataclass
class BenchOnlineConfig:
    num_envs: Count = 8  # environments at once, beside one alone
    context_length: Count = 100  # states in the peer's window
    graph_nodes: Count = 20_000  # of the graph, in episodes of 1001
    steps: Count = 200  # of each environment in a turn
    repeats: Count = 5  # turns of each; the median is printed
    threads: Count = 1  # CPU threads


class WindowPlanner(Planner):
    """Encodes the window anew at each step, as the original does."""

    def __init__(self, *arguments, context_length: int):
        super().__init__(*arguments)
        self.length, self.past = context_length, [[] for _ in self.goals]

    def features(self, observations: np.ndarray, live: np.ndarray) -> torch.Tensor:
        for env, observation in zip(live, observations, strict=True):
            self.past[env].append(observation)
        windows = np.stack([np.stack(self.past[env][-self.length :]) for env in live])
        encoder = self.agent.encoder
        states = (torch.as_tensor(np.asarray(observations, np.float32)) - encoder.mean) / encoder.std
        return torch.cat([encoder(torch.as_tensor(windows, dtype=torch.float32))[:, -1], states], -1)


def turn(planner: Planner, envs: list, steps: int) -> tuple[float, float]:
    """Seconds that acting takes, and acting with the simulator, over `steps` steps of every environment."""
    observations = np.stack([seeded_reset(env, number)[0] for number, env in enumerate(envs)])
    live, acting, began = np.arange(len(envs)), 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        actions = planner.act(observations, live)
        acting += time.perf_counter() - before
        observations = np.stack([env.step(action)[0] for env, action in zip(envs, actions, strict=True)])
    return acting, time.perf_counter() - began


def compare(config: BenchOnlineConfig, agent: OnlineAgent, graph: StateGraph, envs: list) -> dict[str, list]:
    """Seconds of each turn, acting alone and with the simulator, of ours and the peer."""
    goals = np.random.default_rng(0).standard_normal((len(envs), agent.encoder.observation_dim))
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    for round_ in range(config.repeats + 1):
        for name in times:
            seeds = range(len(envs))
            if name == "ours":
                planner = Planner(agent, graph, goals, seeds)
            else:
                planner = WindowPlanner(agent, graph, goals, seeds, context_length=config.context_length)
            taken = turn(planner, envs, config.steps)
            if round_:  # the first one warms up
                times[name].append(taken)
    return times


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchOnlineConfig, argv, __doc__)
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    envs = [make_env(DATASET) for _ in range(config.num_envs)]
    dim, actions = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    agent = OnlineAgent(OnlineAgentConfig(aim_steps=15.0), OfflineModel(dim), actions, hidden_dim=256, discount=0.99)
    agent.metric.steps_per_square.fill_(FAR)
    rows = torch.arange(config.graph_nodes)
    graph = StateGraph(agent, agent.encode(torch.randn(len(rows), dim)), rows, rows // 1001 * 1001 + 1000)
    for count in sorted({1, config.num_envs}):
        times = compare(config, agent, graph, envs[:count])
        for number, what in enumerate(("acting", "acting_and_simulation")):
            rate = {n: count * config.steps / np.median([t[number] for t in taken]) for n, taken in times.items()}
            print(
                f"search_{what}_steps_per_second_{count}_envs: ours {rate['ours']:.0f}, "
                f"peer {rate['peer']:.0f}, ratio {rate['ours'] / rate['peer']:.1f}"
            )


if __name__ == "__main__":
    run_cli(main)
