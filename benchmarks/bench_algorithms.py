"""The six offline algorithms, updates a second: ours against CORL, JAX-CORL and unifloral.

    python benchmarks/bench_algorithms.py
    python benchmarks/bench_algorithms.py --corl CORL --jax_corl JAX-CORL --unifloral unifloral

Each flag names a clone (benchmarks/peers.py has their addresses); a peer without one is left out. JAX comes with
`pip install -r requirements/benchmarks.txt`. Ours is what pogo_multi_main.py runs with one actor: a batch from the
buffer, the algorithm's update with its own policy, the learning rate, the means of the metrics. All take turns in one
process; the time is processor time, compilation left out, and medians are printed. `eager` is PyTorch as it is; on a
GPU (wall time) there is also the update captured as a CUDA graph, and JAX is left out.

Beside CORL, the largest difference of any weight is printed after `--checked` updates of both in float64, from the same
weights, batches and random numbers.

What is alike, and what is not:
- TD3+BC of unifloral makes two critic updates and one of the actor in a step: counted as two updates, as ours have one
  of the critics each and one of the actor at every second.
- JAX-CORL has layer norm in TD3+BC, IQL and AWAC: measured as shipped and without it. The best JAX file is the faster.
- CQL of unifloral has ten critics and one action of each kind, ours two critics and ten actions: shown, and left out of
  the best.
- SAC-N and EDAC have ten critics everywhere.
- On a GPU, our TD3+BC updates its actor every time and CORL's every second time: a captured update is always the same.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from algorithms.offline.pogo_multi import ChainConfig, MultiActor
from algorithms.offline.pogo_multi_main import ALGORITHMS
from benchmarks import corl, peers
from benchmarks.turns import Contestant, choose_clock, claim, median_rates, on_device
from model_kernels import KernelConfig, use_kernels
from runs.cli import parse_config, run_cli
from runs.cuda_graphs import GraphedStep
from runs.metrics import RunningMeans
from utils import Count, NonNegative, ReplayBuffer, UserError, Whole, progress, resolve_device, warn

OTHER_WORK = {("cql", "unifloral")}  # shown, but no measure of ours


@dataclass
class BenchAlgorithmsConfig(KernelConfig):
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)  # which of them
    corl: str | None = None  # a clone of CORL, to measure it too
    jax_corl: str | None = None  # a clone of JAX-CORL, to measure it too
    unifloral: str | None = None  # a clone of unifloral, to measure it too
    checked: Whole = 20  # updates in float64 after which weights are compared with CORL's; 0 leaves that out
    turns: Count = 7  # of each contestant; the median is printed
    seconds: NonNegative = 0.4  # length of a turn
    transitions: Count = 100_000  # in the data
    threads: Count = 1  # CPU threads
    device: str = "cpu"  # cpu, cuda or auto


def make_arrays(transitions: int) -> dict[str, np.ndarray]:
    """Random data [transitions, ...] float32, by the names that CORL's files use."""
    random, n = np.random.default_rng(0), transitions
    states = {name: random.standard_normal((n, corl.D), np.float32) for name in ("observations", "next_observations")}
    actions = 2 * random.random((n, corl.A), np.float32) - 1
    return states | {"actions": actions, "rewards": random.random(n, np.float32), "dones": np.zeros(n, np.float32)}


def make_ours(name: str, arrays: dict[str, np.ndarray], device: torch.device, graph: bool) -> Contestant:
    """One update of a chain of one actor on a fresh batch, eager or captured as a CUDA graph."""
    algorithm, settings = ALGORITHMS[name]
    config = settings()
    if device.type == "cuda" and name == "td3_bc":
        config.policy_freq = 1  # one graph holds one kind of update; eager alike, to compare the two
    noise, sampling = (torch.Generator(device).manual_seed(seed) for seed in (0, 1))
    agent = MultiActor(algorithm, config, ChainConfig(w2_weights=(10.0,)), (corl.D, corl.A, 1.0), noise, device)
    columns = [arrays[key] for key in ("observations", "actions", "rewards", "next_observations", "dones", "dones")]
    buffer, means = ReplayBuffer(*columns, device), RunningMeans()

    def update() -> dict[str, torch.Tensor]:
        return agent.update(buffer.sample(corl.BATCH, sampling))

    call = GraphedStep(update, [noise, sampling]) if graph else update

    def step() -> None:
        agent.anneal(0.1)
        means.add(call())

    return on_device(step, device)


def contestants(name: str, config: BenchAlgorithmsConfig, device: torch.device) -> dict[str, Contestant]:
    """Name -> one algorithm in all its forms; those of ours begin with `ours`."""
    arrays = make_arrays(config.transitions)
    makers = {"ours, eager": lambda: make_ours(name, arrays, device, graph=False)}
    if device.type == "cuda":
        makers["ours, graph"] = lambda: make_ours(name, arrays, device, graph=True)
    if config.corl:
        makers["CORL"] = lambda: corl.contestant(config.corl, name, arrays, device)
    if device.type == "cpu" and config.jax_corl and name in peers.JAX_CORL:
        makers["JAX-CORL"] = lambda: peers.jax_corl(config.jax_corl, name, arrays, layer_norm=True)
        if name != "cql":  # which has none
            without = "JAX-CORL without layer norm"
            makers[without] = lambda: peers.jax_corl(config.jax_corl, name, arrays, layer_norm=False)
    if device.type == "cpu" and config.unifloral and name in peers.UNIFLORAL:
        makers["unifloral"] = lambda: peers.unifloral(config.unifloral, name, arrays)
    found = {}
    for who, make in makers.items():
        try:
            found[who] = make()
            found[who].step()
        except UserError:
            raise
        except Exception as error:  # a file of somebody else's may raise anything
            if who == "ours, eager":
                raise
            found.pop(who, None)
            warn(f"{name}: {who} is left out ({type(error).__name__}: {error})")
    return found


def missing_peers(config: BenchAlgorithmsConfig, device: torch.device) -> list[str]:
    """A line for each peer that is not measured, and why."""
    found = [f"{flag} is not given: left out" for flag in ("corl", "jax_corl", "unifloral") if not vars(config)[flag]]
    if device.type != "cpu" and (config.jax_corl or config.unifloral):
        found.append("JAX is measured on a CPU alone: left out")
    return found


def claims_of(name: str, rates: dict[str, float]) -> list[str]:
    """The closing lines of one algorithm: against the best JAX file, and against CORL."""
    best = max((who for who in rates if who.startswith("ours")), key=rates.get)
    note = f" ({best.removeprefix('ours, ')})"
    jax = [who for who in rates if not who.startswith(("ours", "CORL")) and (name, who) not in OTHER_WORK]
    lines = []
    if jax:
        peer = max(jax, key=rates.get)
        lines.append(claim(f"{name}_updates_per_second_best_jax", rates[best], rates[peer], note) + f" ({peer})")
    if "CORL" in rates:
        lines.append(claim(f"{name}_updates_per_second_corl", rates[best], rates["CORL"], note))
    if "ours, graph" in rates:
        lines.append(claim(f"{name}_updates_per_second_eager", rates["ours, graph"], rates["ours, eager"], " (graph)"))
    return lines


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchAlgorithmsConfig, argv, __doc__)
    if unknown := set(config.algorithms) - set(ALGORITHMS):
        raise UserError(f"--algorithms {unknown.pop()}: choose among {', '.join(ALGORITHMS)}")
    device = resolve_device(config.device)
    if device.type == "cpu" and (config.jax_corl or config.unifloral):
        peers.start_jax()
    torch.set_num_threads(config.threads)
    use_kernels(config, device)
    torch.manual_seed(0)
    print("\n".join(missing_peers(config, device)))
    print("| algorithm | whose | updates/s | largest difference of a weight |\n|---|---|---|---|")
    closing, clock = [], choose_clock(device, config.threads)
    for name in progress(config.algorithms, "algorithms"):
        different = ""
        if config.corl and config.checked:
            different = f"{corl.largest_difference(corl.load(config.corl, name), name, config.checked):.1e}"
        rates = median_rates(contestants(name, config, device), config.turns, config.seconds, clock)
        for who, rate in rates.items():
            other = ", not the same work" if (name, who) in OTHER_WORK else ""
            print(f"| {name} | {who}{other} | {rate:.1f} | {different if who == 'CORL' else ''} |", flush=True)
        closing += claims_of(name, rates)
    print("\n".join(closing))


if __name__ == "__main__":
    run_cli(main)
