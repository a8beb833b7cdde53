"""Forward and backward of the Sinkhorn distance between policies: our `fused`, GeomLoss tensorized, and `exact`.

    python benchmarks/bench_sinkhorn.py                     # one CPU thread, 256 states, 4 samples, 6 dimensions
    python benchmarks/bench_sinkhorn.py --device cuda       # adds `fused` replayed as a CUDA graph

GeomLoss runs twice, with the box's diameter given, as `fused` has it, and measuring it itself, as published code has
it. Gradients are by the first cloud, as in training. The candidates take turns, so that a machine whose speed drifts
drifts for all of them; medians are printed, and ratios are medians of the ratios of a turn. `exact` solves another
problem, without blur: it is there to show what an enumeration of the assignments costs.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs.cli import parse_config, run_cli
from transport import MAX_EXACT, box_diameter, sinkhorn
from utils import Count, UserError, resolve_device


@dataclass
class BenchSinkhornConfig:
    batch: Count = 256  # states
    samples: Count = 4  # samples of each policy in a state
    action_dim: Count = 6  # dimensions of an action, each in [-1, 1]
    blur: float = 0.05  # in units of actions
    repeats: Count = 100  # timed turns; medians are printed
    calls: Count = 5  # calls in a row in a turn; 1 times each with the caches that the candidate before it left
    threads: Count = 1  # CPU threads
    device: str = "cpu"  # cpu, cuda or auto


def make_candidates(config: BenchSinkhornConfig) -> dict:
    """name -> function of (x, y) -> [B]."""
    box = box_diameter(1.0, config.action_dim)
    candidates = {
        "fused": lambda x, y: sinkhorn(x, y, config.blur, "fused", box),
        "tensorized": lambda x, y: sinkhorn(x, y, config.blur, "tensorized", box),
        "tensorized, own diameter": lambda x, y: sinkhorn(x, y, config.blur, "tensorized"),
    }
    if config.samples <= MAX_EXACT:
        candidates["exact"] = lambda x, y: sinkhorn(x, y, backend="exact")
    return candidates


def value_and_gradient(distance, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What training needs of a distance: the mean over the states, and its gradient by the first cloud."""
    value = distance(x, y).mean()
    return value, torch.autograd.grad(value, x)[0]


def capture(distance, x: Tensor, y: Tensor):
    """The forward and backward pass as a CUDA graph on these very tensors; call it to replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            value_and_gradient(distance, x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value_and_gradient(distance, x, y)
    return graph.replay


def agreement(candidates: dict, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Largest differences of fused and tensorized in value and gradient, in float32.

    Peers must be equal in float64, where rounding cannot hide behind a small blur.
    """
    errors = []
    for dtype in (torch.float32, torch.float64):
        x_, y_ = x.detach().to(dtype).requires_grad_(), y.to(dtype)
        values = [candidates[name](x_, y_) for name in ("fused", "tensorized")]
        gradients = [torch.autograd.grad(value.sum(), x_)[0] for value in values]
        errors.append([(a - b).abs().max().item() for a, b in (values, gradients)])
    if max(errors[1]) > 1e-9:
        raise RuntimeError(f"fused computes something else than GeomLoss: errors {errors}")
    return tuple(errors[0])


def seconds(runs: dict, repeats: int, calls: int, wait) -> dict[str, Tensor]:
    """Times of one call of each run, [repeats], the candidates one after another in every turn."""
    times = {name: [] for name in runs}
    for turn in range(repeats + 10):
        for name, run in runs.items():
            wait()
            began = time.perf_counter()
            for _ in range(calls):
                run()
            wait()
            if turn >= 10:  # the first turns warm caches and allocators
                times[name].append((time.perf_counter() - began) / calls)
    return {name: torch.tensor(values) for name, values in times.items()}


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchSinkhornConfig, argv, __doc__)
    device = resolve_device(config.device)
    if not 0 < config.blur < math.inf:
        raise UserError(f"--blur {config.blur}: must be positive")
    torch.set_num_threads(config.threads)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, config.batch, config.samples, config.action_dim, generator=generator).to(device).tanh()
    x.requires_grad_()
    candidates = make_candidates(config)
    errors = agreement(candidates, x, y)
    runs = {name: lambda f=distance: value_and_gradient(f, x, y) for name, distance in candidates.items()}
    if device.type == "cuda":
        runs["fused, CUDA graph"] = capture(candidates["fused"], x, y)
    times = seconds(
        runs, config.repeats, config.calls, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    )
    print(f"{config.batch} states, {config.samples} samples, {config.action_dim} dimensions, {device}")
    print(f"largest difference of fused and tensorized: value {errors[0]:.1e}, gradient {errors[1]:.1e}")
    print(f"{'':26}{'median ms':>12}{'fastest':>10}")
    for name, values in times.items():
        print(f"{name:26}{1e3 * values.median().item():12.3f}{1e3 * values.min().item():10.3f}")
    for ours in (name for name in times if name.startswith("fused")):
        for peer in (name for name in times if not name.startswith("fused")):
            claim = f"sinkhorn_{ours}_vs_{peer}".replace(", ", "_").replace(" ", "_").lower()
            ratio = (times[peer] / times[ours]).median().item()
            pair = [f"{1e3 * times[name].median().item():.3f} ms" for name in (ours, peer)]
            print(f"{claim}: ours {pair[0]}, peer {pair[1]}, ratio {ratio:.2f}")


if __name__ == "__main__":
    run_cli(main)
