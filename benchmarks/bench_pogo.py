"""POGO updates a second with 1, 2 and 3 actors: ours against the scheme of the published agent.

    python benchmarks/bench_pogo.py
    python benchmarks/bench_pogo.py --device cuda
    python benchmarks/bench_pogo.py --jax

The peer is that scheme (https://github.com/seonvin0319/POGO) written plainly with the same sizes: twin critics one
after the other, a pass of one sample for Q beside the K samples of the distance, GeomLoss's tensorized Sinkhorn, Adam
and averages parameter by parameter. `--jax` adds our own plain JAX version, jax_pogo.py, a jitted scan on one thread
(`pip install -r requirements/benchmarks.txt`; on a CPU alone).

All take turns in one process on the same data; medians are printed, of processor time with one thread on a CPU, else of
wall time. On a GPU, ours is measured captured as a CUDA graph too.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from geomloss import SamplesLoss
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers
from benchmarks.turns import Contestant, choose_clock, claim, median_rates, on_device
from model_kernels import KernelConfig, use_kernels
from pogo_agent import POGOAgent, POGOConfig
from runs.cli import parse_config, run_cli
from runs.cuda_graphs import GraphedStep
from transport import Backend, Noise
from utils import Count, NonNegative, ReplayBuffer, UserError, resolve_device

PEERS = ("plain scheme", "plain JAX")


@dataclass
class BenchPOGOConfig(KernelConfig):
    observation_dim: Count = 17  # of halfcheetah and walker2d
    action_dim: Count = 6  # likewise
    batch_size: Count = 256  # transitions in an update
    sinkhorn_K: Count = 4  # samples a state and policy
    w2_noise: Noise = "independent"  # noise of our distances; the peers have independent noise
    sinkhorn_backend: Backend = "fused"  # solver of our distances; fused solves the peers' problem
    transitions: Count = 100_000  # in the data
    seconds: NonNegative = 0.5  # length of a turn
    repeats: Count = 7  # turns of each; the median is printed
    max_actors: Count = 3  # chains of 1 to so many actors
    jax: bool = False  # also measure our plain JAX version
    threads: Count = 1  # CPU threads
    device: str = "auto"  # auto, cpu or cuda


def mlp(input_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    """Two hidden layers of ReLU."""
    hidden = (nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(hidden_dim, output_dim))


class PublishedScheme:
    """The same losses, a pass for each purpose."""

    def __init__(self, config: BenchPOGOConfig, actors: int, device: torch.device):
        d, a = config.observation_dim, config.action_dim
        self.actors = [mlp(d + a, 256, a).to(device) for _ in range(actors)]
        self.critics = [mlp(d + a, 256, 1).to(device) for _ in range(2)]
        self.targets = copy.deepcopy(self.critics)
        parameters = [p for critic in self.critics for p in critic.parameters()]
        self.critic_optimizer = torch.optim.Adam(parameters, 3e-4)
        self.optimizers = [torch.optim.Adam(actor.parameters(), 3e-4) for actor in self.actors]
        self.divergence, self.K, self.action_dim = SamplesLoss("sinkhorn", p=2, blur=0.05), config.sinkhorn_K, a

    def act(self, number: int, states: torch.Tensor) -> torch.Tensor:
        z = torch.randn(len(states), self.action_dim, device=states.device)
        return torch.tanh(self.actors[number](torch.cat([states, z], 1)))

    def samples(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return self.act(number, states.repeat_interleave(self.K, 0)).view(len(states), self.K, -1)

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states, following = batch["observations"], batch["next_observations"]
        with torch.no_grad():
            action = self.act(0, following)
            action = (action + (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)).clamp(-1, 1)
            inputs = torch.cat([following, action], 1)
            value = torch.min(*(target(inputs) for target in self.targets)).squeeze(1)
            target = batch["rewards"] + 0.99 * (1 - batch["terminated"]) * value
        inputs = torch.cat([states, batch["actions"]], 1)
        loss = sum(F.mse_loss(critic(inputs).squeeze(1), target) for critic in self.critics)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        for number, optimizer in enumerate(self.optimizers):
            action = self.act(number, states)
            q = self.critics[0](torch.cat([states, action], 1))
            if number == 0:
                distance = F.mse_loss(action, batch["actions"])
            else:
                with torch.no_grad():
                    reference = self.samples(number - 1, states)
                distance = self.divergence(self.samples(number, states), reference).mean()
            policy_loss = -q.mean() / q.abs().mean().detach() + 0.4 * distance
            optimizer.zero_grad()
            policy_loss.backward()
            optimizer.step()
        for slow, fast in zip(self.targets, self.critics, strict=True):
            for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
                a.data.copy_(0.005 * b.data + 0.995 * a.data)
        return {"critic_loss": loss.detach()}


def make_buffer(config: BenchPOGOConfig, device: torch.device) -> ReplayBuffer:
    """Random transitions on the device."""
    n, d, a = config.transitions, config.observation_dim, config.action_dim
    states, following, actions = torch.randn(n, d), torch.randn(n, d), torch.rand(n, a) * 2 - 1
    rewards, ends = torch.rand(n), torch.zeros(n)
    return ReplayBuffer(states, actions, rewards, following, ends, ends, device)


def chain_settings(config: BenchPOGOConfig, actors: int) -> POGOConfig:
    """Those of our agents, in PyTorch and in JAX."""
    solver = {"w2_noise": config.w2_noise, "sinkhorn_backend": config.sinkhorn_backend}
    return POGOConfig(w2_weights=(0.4,) * actors, sinkhorn_K=config.sinkhorn_K, **solver)


def make_step(config: BenchPOGOConfig, actors: int, buffer: ReplayBuffer) -> tuple[Callable, list[torch.Generator]]:
    """One update of a new agent of ours on a fresh batch, and the generators it draws from."""
    settings = chain_settings(config, actors)
    noise, sampling = (torch.Generator(buffer.device).manual_seed(seed) for seed in (0, 1))
    agent = POGOAgent(settings, config.observation_dim, config.action_dim, 1.0, noise, buffer.device)
    return lambda: agent.update(buffer.sample(config.batch_size, sampling)), [*agent.generators, sampling]


def contestants(config: BenchPOGOConfig, actors: int, buffer: ReplayBuffer) -> dict[str, Contestant]:
    """Name -> one update on a fresh batch; those that are not ours are in PEERS."""
    device = buffer.device
    steps = {"eager": make_step(config, actors, buffer)[0]}
    if device.type == "cuda":
        steps["graph"] = GraphedStep(*make_step(config, actors, buffer))
    scheme, sampling = PublishedScheme(config, actors, device), torch.Generator(device).manual_seed(1)
    steps["plain scheme"] = lambda: scheme.update(buffer.sample(config.batch_size, sampling))
    found = {name: on_device(step, device) for name, step in steps.items()}
    if config.jax:
        from benchmarks import jax_pogo  # not before peers.start_jax has set its threads

        names = ("observations", "next_observations", "actions", "rewards", "terminated")
        arrays = {name: getattr(buffer, name).numpy() for name in names}
        found["plain JAX"] = jax_pogo.make_contestant(chain_settings(config, actors), arrays, config.batch_size)
    return found


def main(argv: list[str] | None = None) -> None:
    """Print the table and a closing line a claim."""
    config = parse_config(BenchPOGOConfig, argv, __doc__)
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    device = resolve_device(config.device)
    use_kernels(config, device)
    if config.jax and device.type != "cpu":
        raise UserError(f"--jax --device {device.type}: the JAX version is measured on a CPU")
    if config.jax:
        peers.start_jax()
    buffer, closing = make_buffer(config, device), []
    clock = choose_clock(device, config.threads)
    print("| actors | whose | updates/s |\n|---|---|---|")
    for actors in range(1, config.max_actors + 1):
        made = contestants(config, actors, buffer)
        rates = median_rates(made, config.repeats, config.seconds, clock)
        for name, rate in rates.items():
            print(f"| {actors} | {name if name in PEERS else f'ours, {name}'} | {rate:.1f} |")
        best = max((name for name in rates if name not in PEERS), key=rates.get)
        for peer in (name for name in PEERS if name in rates):
            name = f"pogo_updates_per_second_{actors}_actors_{peer.replace(' ', '_')}"
            closing.append(claim(name, rates[best], rates[peer], f" ({best})"))
        if "graph" in rates:
            name = f"pogo_updates_per_second_{actors}_actors_eager"
            closing.append(claim(name, rates["graph"], rates["eager"], " (graph)"))
    print("\n".join(closing))


if __name__ == "__main__":
    run_cli(main)
