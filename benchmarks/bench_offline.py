"""Transitions trained a second: all positions of a window in one pass, against one transition a window.

    python benchmarks/bench_offline.py
    python benchmarks/bench_offline.py --device cuda

The peer is the published scheme on the same networks, losses and windows: the history up to s_t, the history up to
s_{t+1} and the goal are encoded each in a pass of its own, by the online network and by its target, six passes an
update, to train on the last transition of each window. The two take turns; medians are printed.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.turns import claim, median_rates, on_device
from offline_agent import OfflineAgent, OfflineAgentConfig
from offline_trainer import sample_batch
from ogbench_utils import TrajectoryDataset
from runs.cli import parse_config, run_cli
from utils import Count, resolve_device


@dataclass
class BenchOfflineConfig:
    batch_size: Count = 16  # windows in an update
    context_length: Count = 100  # transitions in a window
    d_model: Count = 128  # width of the encoder
    observation_dim: Count = 29  # an ant's
    repeats: Count = 15  # timed updates of each; the median is printed
    threads: Count = 2  # CPU threads
    device: str = "cpu"  # cpu, cuda or auto


class OneTransitionAgent(OfflineAgent):
    """The same losses on the last transition of each window alone, with a pass for every code."""

    def encode(self, batch):
        windows = batch["observations"]
        z, z_next = (self.model.encoder(part)[:, -1:] for part in (windows[:, :-1], windows[:, 1:]))
        z_goal = self.model.encoder.encode_goal(batch["goals"])
        with torch.no_grad():
            target = [self.target.encoder(part)[:, -1:] for part in (windows[:, :-1], windows[:, 1:])]
            target_goal = self.target.encoder.encode_goal(batch["goals"])
            target_z = torch.cat(target, dim=1)
            n = self.n_steps(batch)
        return {
            "z": z,
            "z_next": z_next,
            "z_goal": z_goal,
            "target_z": target_z,
            "target_goal": target_goal,
            "n": n,
            "target_ahead": self._along(target_z, n),
            "valid": batch["valid"].to(z.dtype),
        }


def random_walks(config: BenchOfflineConfig, episodes: int = 20, rows: int = 501) -> TrajectoryDataset:
    """Data of the right shapes; what it holds does not change the time."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(episodes, rows, config.observation_dim, generator=generator)
    terminals = torch.zeros(episodes, rows)
    terminals[:, -1] = 1
    arrays = {
        "observations": (0.1 * steps.cumsum(1)).flatten(0, 1).numpy(),
        "actions": torch.zeros(episodes * rows, 2).numpy(),
        "terminals": terminals.flatten().numpy(),
    }
    return TrajectoryDataset(arrays, device=config.device)


def one_transition(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with everything but the windows cut down to the last transition."""
    return {k: v if k in ("observations", "nce_offset") else v[:, -1:] for k, v in batch.items()}


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchOfflineConfig, argv, __doc__)
    device = resolve_device(config.device)
    config.device = str(device)  # of auto, what it chose
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    data = random_walks(config)
    agent_config = OfflineAgentConfig(context_length=config.context_length, d_model=config.d_model)
    ours = OfflineAgent(agent_config, config.observation_dim, *data.normalizer(), device=config.device)
    peer = OneTransitionAgent(agent_config, config.observation_dim, *data.normalizer(), device=config.device)
    generator = torch.Generator(config.device).manual_seed(0)
    batch = sample_batch(data, agent_config, config.batch_size, generator)
    last = one_transition(batch)
    made = {"ours": on_device(lambda: ours.update(batch), device), "peer": on_device(lambda: peer.update(last), device)}
    updates = median_rates(made, config.repeats, 0.0, time.perf_counter)
    sizes = {"ours": config.batch_size * config.context_length, "peer": config.batch_size}
    rates = {name: size * updates[name] for name, size in sizes.items()}
    print(f"{'':8}{'ms an update':>14}{'transitions an update':>24}{'transitions/s':>16}")
    for name, size in sizes.items():
        print(f"{name:8}{1e3 / updates[name]:14.1f}{size:24d}{rates[name]:16,.0f}")
    print(claim("offline_transitions_per_second", rates["ours"], rates["peer"]))


if __name__ == "__main__":
    run_cli(main)
