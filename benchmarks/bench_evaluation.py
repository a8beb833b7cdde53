"""Environment steps a second of an evaluation: all actors and episodes at once, against one after another.

    python benchmarks/bench_evaluation.py
    python benchmarks/bench_evaluation.py --dataset halfcheetah-medium-v2 --steps 40000 80000 300000 --episodes 5

Actors of an MLP 256-256, each acting deterministically and stochastically on the same seeds. The peer is the usual
loop: one environment of gymnasium.make, one actor at a time, a batch of one. Both normalise states. The actors are this
repository's snapshots of the robot, so that episodes are as long as those of a trained policy. The two take turns;
medians are printed.
"""

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import d4rl_utils
import offline_data
from benchmark_data import experts
from runs import chain
from runs.cli import parse_config, run_cli
from runs.evaluation import Evaluator, episode_seeds
from utils import Count, Workers


@dataclass
class BenchEvaluationConfig:
    dataset: str = "hopper-medium-v2"  # whose environment
    steps: tuple[int, ...] = (110_000, 120_000, 270_000)  # snapshots in datasets/experts that act
    episodes: Count = 10  # of each actor and way of acting
    workers: Workers = 1  # processes beside this one; 0: this one alone, as --eval_workers 0 of a run
    repeats: Count = 3  # turns of each; the median is printed
    threads: Count = 1  # CPU threads of the policies


ACTIVATIONS = {"gelu_tanh": lambda: nn.GELU("tanh"), "relu": nn.ReLU, "tanh": nn.Tanh}


class Actor(nn.Module):
    """a = tanh(mean(s) + 0.1 z), the mean by a snapshot's MLP."""

    def __init__(self, policy: experts.Policy):
        super().__init__()
        observation_dim, self.action_dim = policy.sizes
        layers = [nn.Linear(observation_dim, 256), nn.Linear(256, 256), nn.Linear(256, self.action_dim)]
        for layer, name in zip(layers, ("hidden.0", "hidden.1", "mean"), strict=True):
            layer.weight.data = torch.from_numpy(policy.weights[f"{name}.weight"].T.copy())
            layer.bias.data = torch.from_numpy(policy.weights[f"{name}.bias"])
        self.activation = ACTIVATIONS[policy.activation]()
        self.mean = nn.Sequential(layers[0], self.activation, layers[1], self.activation, layers[2])

    def forward(self, observation: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mean(observation) + 0.1 * noise)


@torch.no_grad()
def one_at_a_time(actors: list[Actor], env, seeds: list[int]) -> tuple[np.ndarray, int]:
    """Returns [2 actors, E] and the number of steps, by the loop of TD3+BC's eval_policy."""
    shift, scale = np.zeros(env.observation_space.shape), np.ones(env.observation_space.shape)
    returns, steps = np.zeros((2 * len(actors), len(seeds))), 0
    generator = torch.Generator().manual_seed(0)
    for number in range(2 * len(actors)):
        for episode, seed in enumerate(seeds):
            observation, ended = env.reset(seed=seed)[0], False
            while not ended:
                noise = torch.zeros(1, *env.action_space.shape)
                if number % 2:
                    noise.normal_(generator=generator)
                state = torch.FloatTensor(((observation - shift) / scale).reshape(1, -1))
                action = actors[number // 2](state, noise).cpu().numpy().flatten()
                observation, reward, terminated, truncated, _ = env.step(action)
                ended = terminated or truncated
                returns[number, episode] += reward
                steps += 1
    return returns, steps


def all_at_once(actors: list[Actor], evaluator: Evaluator, seeds: list[int]) -> tuple[np.ndarray, int]:
    """The same as pogo_main.py evaluates."""
    size = actors[0].mean[0].in_features
    normalizer = (torch.zeros(size), torch.ones(size))
    found = chain.rollout(evaluator, actors, actors[0].action_dim, *normalizer, seeds, 0, "all at once")
    return found.returns, int(found.lengths.sum())


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchEvaluationConfig, argv, __doc__)
    torch.set_num_threads(config.threads)
    robot, env = offline_data.find_dataset(config.dataset).robot, d4rl_utils.make_env(config.dataset)
    paths = [experts.policy_path(experts.DEFAULT_EXPERTS_DIR, robot, step) for step in config.steps]
    actors = [Actor(experts.read_policy(path)) for path in paths]
    seeds, rates = episode_seeds(0, config.episodes), {"ours": [], "peer": []}
    count = 2 * len(actors) * config.episodes
    with Evaluator(functools.partial(offline_data.make_env, config.dataset), count, config.workers) as evaluator:
        for turn in range(config.repeats + 1):
            for name, play, place in (("ours", all_at_once, evaluator), ("peer", one_at_a_time, env)):
                began = time.perf_counter()
                returns, steps = play(actors, place, seeds)
                taken = time.perf_counter() - began
                if turn:  # the first one makes the environments and warms up
                    rates[name].append(steps / taken)
                    print(
                        f"{name}  turn {turn}  {steps:7d} steps  {taken:7.2f} s  {steps / taken:9.0f} steps/s", end=""
                    )
                    print(f"  return {returns.mean():8.2f}")
    ours, peer = (float(np.median(rates[name])) for name in ("ours", "peer"))
    print(f"evaluation_steps_per_second: ours {ours:.0f}, peer {peer:.0f}, ratio {ours / peer:.2f}")


if __name__ == "__main__":
    run_cli(main)
