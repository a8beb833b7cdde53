"""Forward and backward of a Mamba-2 block: ours, a position-by-position scan, and transformers, on the same weights.

    python benchmarks/bench_encoder.py                      # one CPU thread, batch 16, length 100, d_model 128
    python benchmarks/bench_encoder.py --device cuda        # adds mamba_ssm's kernels where they are installed

The candidates take turns, so that a machine whose speed drifts drifts for all of them; medians are printed. A peer that
is not installed is left out, which is said: transformers is in requirements-dev.txt, mamba_ssm in
requirements/cuda.txt.
"""

import functools
import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.turns import claim, median_rates, on_device
from model import Mamba2
from runs.cli import parse_config, run_cli
from utils import Count, resolve_device


@dataclass
class BenchEncoderConfig:
    batch: Count = 16  # sequences
    length: Count = 100  # positions of each
    d_model: Count = 128  # width of the block
    repeats: Count = 30  # timed runs of each; the median is printed
    threads: Count = 1  # CPU threads
    device: str = "cpu"  # cpu, cuda or auto


def sequential(block: Mamba2, u: torch.Tensor) -> torch.Tensor:
    """The block with its recurrence run position by position."""
    sizes, outputs = (block.d_inner, block.d_state, block.d_state), []
    z, xBC, dt = block.in_proj(u).split([sizes[0], sum(sizes), block.nheads], dim=-1)
    taps = block.conv1d.weight.squeeze(1)
    padded = F.pad(xBC, (0, 0, taps.shape[1] - 1, 0))
    h = u.new_zeros(len(u), block.nheads, block.headdim, block.d_state)
    for t in range(u.shape[1]):
        seen = padded[:, t : t + taps.shape[1]].transpose(1, 2)
        x, B, C = F.silu((seen * taps).sum(-1) + block.conv1d.bias).split(sizes, dim=-1)
        x, step = x.unflatten(-1, (block.nheads, block.headdim)), F.softplus(dt[:, t] + block.dt_bias)
        h = h * torch.exp(-step * block.A_log.exp())[..., None, None]
        h = h + (step.unsqueeze(-1) * x).unsqueeze(-1) * B[:, None, None]
        y = (h @ C[:, None, :, None]).squeeze(-1) + x * block.D.unsqueeze(-1)
        outputs.append(block.out_proj(block.norm(y.flatten(1), z[:, t])))
    return torch.stack(outputs, dim=1)


def transformers_block(block: Mamba2, config: BenchEncoderConfig):
    """transformers' Mamba2Mixer with the block's weights."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    sizes = Mamba2Config(
        num_heads=block.nheads,
        head_dim=block.headdim,
        hidden_size=config.d_model,
        state_size=block.d_state,
        expand=2,
        n_groups=1,
        conv_kernel=4,
        chunk_size=min(block.chunk_size, config.length),  # it fills up every sequence to whole chunks
        use_bias=False,
        num_hidden_layers=1,
    )
    mixer = Mamba2Mixer(sizes, 0).to(config.device)
    mixer.load_state_dict(block.state_dict())
    return mixer


def is_there(package: str) -> bool:
    """Whether a peer is installed; says so where it is not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"{package} is not installed: left out")
    return found


def check_agreement(candidates: dict, u: torch.Tensor) -> None:
    """A peer that computes something else is no peer: outputs and input gradients must agree."""
    expected = None
    for name, run in candidates.items():
        x = u.clone().requires_grad_()
        y = run(x)
        (y * u).sum().backward()
        if expected is None:
            expected = (y.detach(), x.grad)
        for ours, theirs in zip(expected, (y.detach(), x.grad), strict=True):
            error = F.l1_loss(theirs, ours) / ours.abs().mean()
            if error > 1e-3:
                raise RuntimeError(f"{name} computes something else: relative error {error:.1e}")


def forward_and_backward(run: Callable, u: torch.Tensor) -> None:
    run(u.clone().requires_grad_()).sum().backward()


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchEncoderConfig, argv, __doc__)
    device = resolve_device(config.device)
    config.device = str(device)  # of auto, what it chose
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    block = Mamba2(config.d_model, backend="torch").to(config.device)
    u = torch.randn(config.batch, config.length, config.d_model, device=config.device)
    candidates = {"ours": block, "sequential": lambda x: sequential(block, x)}
    if is_there("transformers"):
        logging.getLogger("transformers").setLevel(logging.ERROR)  # it announces at length that it has no kernels
        candidates["transformers"] = transformers_block(block, config)
    if device.type == "cuda" and is_there("mamba_ssm"):
        fused = Mamba2(config.d_model, backend="cuda").to(config.device)
        fused.load_state_dict(block.state_dict())
        candidates["mamba_ssm"] = fused
    check_agreement(candidates, u)
    made = {
        name: on_device(functools.partial(forward_and_backward, run, u), device) for name, run in candidates.items()
    }
    rates = median_rates(made, config.repeats, 0.0, time.perf_counter)
    print(f"{'':14}{'ms':>8}")
    for name, rate in rates.items():
        print(f"{name:14}{1e3 / rate:8.1f}")
    for name in list(rates)[1:]:
        print(claim(f"mamba2_vs_{name}", rates["ours"], rates[name]))


if __name__ == "__main__":
    run_cli(main)
