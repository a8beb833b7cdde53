"""POGO updates a second with 1, 2 and 3 actors: ours against the scheme of the published agent.

    python benchmarks/bench_pogo.py
    python benchmarks/bench_pogo.py --device cuda
    git clone https://github.com/seonvin0319/POGO
    python benchmarks/bench_pogo.py --path POGO/pogogo/agent.py

The peer is the published agent where `--path` says where its file lies. Beside it, always, its scheme written plainly
with the same sizes: twin critics one after the other, a pass of one sample for Q beside the K samples of the distance,
GeomLoss's tensorized Sinkhorn, Adam and averages parameter by parameter. All take turns in one process on the same
data; medians are printed. On a GPU, ours is measured captured as a CUDA graph too, and so are `--num_seeds` agents at
once, branches of one graph, against one after the other. `--compile` also tries torch.compile on our update, which
needs a C++ compiler on a CPU.
"""

import contextlib
import copy
import importlib.util
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from geomloss import SamplesLoss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import mlp
from pogo_agent import POGOAgent, POGOConfig
from utils import (
    GraphedStep,
    ReplayBuffer,
    SideBySide,
    UserError,
    check_counts,
    one_line,
    parse_config,
    resolve_device,
    run_cli,
)

PEERS = ("plain scheme", "published agent")


@dataclass
class BenchPOGOConfig:
    observation_dim: int = 17  # of halfcheetah and walker2d
    action_dim: int = 6  # likewise
    batch_size: int = 256  # transitions in an update
    sinkhorn_K: int = 4  # samples a state and policy
    transitions: int = 100_000  # in the data
    updates: int = 50  # in a turn
    repeats: int = 5  # turns of each; the median is printed
    max_actors: int = 3  # chains of 1 to so many actors
    path: str | None = None  # agent.py of the published code, to measure it too
    num_seeds: int = 8  # on a GPU: agents trained at once, as `pogo_main.py --num_seeds` does
    compile: bool = False  # also measure ours under torch.compile
    threads: int = 1  # CPU threads
    device: str = "auto"  # auto, cpu or cuda


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


class TheirBuffer:
    """Our batches in the shapes and the order that the published agent asks for."""

    def __init__(self, buffer: ReplayBuffer):
        self.buffer = buffer
        self.generator = torch.Generator(buffer.device).manual_seed(1)

    def sample(self, batch_size: int, seed: int | None = None) -> tuple[torch.Tensor, ...]:
        batch = self.buffer.sample(batch_size, self.generator)
        following, rewards = batch["next_observations"], batch["rewards"][:, None]
        return batch["observations"], batch["actions"], following, rewards, 1 - batch["terminated"][:, None]


def load_published(path: str, device: torch.device) -> ModuleType:
    """The module of the published agent; UserError where it is none, or would compute on another device."""
    try:
        spec = importlib.util.spec_from_file_location("published_agent", path)
        module = importlib.util.module_from_spec(spec)
        with contextlib.redirect_stdout(io.StringIO()):  # it says which device it takes
            spec.loader.exec_module(module)
        _, own_device = module.POGO, module.device.type
    except Exception as error:  # a file of somebody else's may raise anything
        raise UserError(f"--path {path}: not the published agent.py ({one_line(error)})") from None
    if own_device != device.type:
        raise UserError(f"--device {device.type}: the published agent takes {own_device} wherever it is")
    return module


def make_buffer(config: BenchPOGOConfig, device: torch.device) -> ReplayBuffer:
    """Random transitions on the device."""
    n, d, a = config.transitions, config.observation_dim, config.action_dim
    states, following, actions = torch.randn(n, d), torch.randn(n, d), torch.rand(n, a) * 2 - 1
    rewards, ends = torch.rand(n), torch.zeros(n)
    return ReplayBuffer.from_arrays(states, actions, rewards, following, ends, ends, device)


def make_step(
    config: BenchPOGOConfig, actors: int, buffer: ReplayBuffer, compiled: bool = False
) -> tuple[Callable, list[torch.Generator]]:
    """One update of a new agent of ours on a fresh batch, and the generators it draws from."""
    settings = POGOConfig(w2_weights=(0.4,) * actors, sinkhorn_K=config.sinkhorn_K)
    noise, sampling = (torch.Generator(buffer.device).manual_seed(seed) for seed in (0, 1))
    agent = POGOAgent(settings, config.observation_dim, config.action_dim, 1.0, noise, buffer.device)
    update = torch.compile(agent.update) if compiled else agent.update
    return lambda: update(buffer.sample(config.batch_size, sampling)), [noise, sampling]


def contestants(
    config: BenchPOGOConfig, actors: int, buffer: ReplayBuffer, published: ModuleType | None
) -> dict[str, Callable]:
    """Name -> one update on a fresh batch; those that are not ours are in PEERS."""
    device = buffer.device
    found = {"eager": make_step(config, actors, buffer)[0]}
    if device.type == "cuda":
        found["graph"] = GraphedStep(*make_step(config, actors, buffer))
    if config.compile:
        found["compiled"] = make_step(config, actors, buffer, compiled=True)[0]
    scheme, sampling = PublishedScheme(config, actors, device), torch.Generator(device).manual_seed(1)
    found["plain scheme"] = lambda: scheme.update(buffer.sample(config.batch_size, sampling))
    if published is not None:
        theirs = published.POGO(config.observation_dim, config.action_dim, 1.0, w2_weights=[0.4] * actors, seed=0)
        batches = TheirBuffer(buffer)
        found["published agent"] = lambda: theirs.train(batches, config.batch_size)
    return found


def seeds_at_once(config: BenchPOGOConfig, actors: int, buffer: ReplayBuffer) -> dict[str, Callable]:
    """Name -> one update of each of `num_seeds` agents: in one graph, and in a graph each."""
    made = [make_step(config, actors, buffer) for _ in range(config.num_seeds)]
    generators = [generator for _, own in made for generator in own]
    single = [GraphedStep(*make_step(config, actors, buffer)) for _ in range(config.num_seeds)]
    together = GraphedStep(SideBySide([step for step, _ in made], buffer.device), generators)
    return {"at once": together, "one after the other": lambda: [step() for step in single]}


def median_rates(steps: dict[str, Callable], config: BenchPOGOConfig, device: torch.device) -> dict[str, float]:
    """Calls a second of each, which take turns; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(config.repeats + 1):
        for name, step in steps.items():
            taken = seconds(step, config.updates, device)
            if turn:
                times[name].append(taken)
    return {name: config.updates / float(np.median(taken)) for name, taken in times.items()}


def seconds(step: Callable, updates: int, device: torch.device) -> float:
    """Wall time of so many updates."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(updates):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    """Print the table and a closing line a claim."""
    config = parse_config(BenchPOGOConfig, argv, __doc__)
    check_counts(config)
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    device = resolve_device(config.device)
    published = load_published(config.path, device) if config.path else None
    if published is not None and config.sinkhorn_K != 4:
        raise UserError(f"--sinkhorn_K {config.sinkhorn_K}: the published agent has 4; leave --path out to change it")
    buffer, closing = make_buffer(config, device), []
    print("| actors | whose | updates/s |\n|---|---|---|")
    for actors in range(1, config.max_actors + 1):
        rates = median_rates(contestants(config, actors, buffer, published), config, device)
        for name, rate in rates.items():
            print(f"| {actors} | {name if name in PEERS else f'ours, {name}'} | {rate:.1f} |")
        best = max((name for name in rates if name not in PEERS), key=rates.get)
        for peer in (name for name in PEERS if name in rates):
            closing.append(
                f"pogo_updates_per_second_{actors}_actors_{peer.replace(' ', '_')}: ours {rates[best]:.1f} ({best}), "
                f"peer {rates[peer]:.1f}, ratio {rates[best] / rates[peer]:.2f}"
            )
    if device.type == "cuda":
        rates = median_rates(seeds_at_once(config, config.max_actors, buffer), config, device)
        ours, peer = (rate * config.num_seeds for rate in rates.values())
        claim = f"pogo_{config.num_seeds}_seeds_at_once"
        closing.append(f"{claim}: ours {ours:.1f}, peer {peer:.1f}, ratio {ours / peer:.2f}")
    print("\n".join(closing))


if __name__ == "__main__":
    run_cli(main)
