"""Updates of one checkout of this repository: the other end of bench_updates.py, which starts one for each checkout.

    python benchmarks/update_worker.py CHECKOUT DEVICE SMALL THREADS

Every line on stdin, `{"name": ..., "calls": n}`, is answered by a line on stdout: the seconds that so many updates
took, or what went wrong. Imports are those of CHECKOUT, inside the functions: nothing may be read before its path is
set.
"""

import functools
import inspect
import json
import sys
import time
from collections.abc import Callable

import torch

OBSERVATION_DIM, ACTION_DIM = 29, 8  # an ant's


def offline_update(device: torch.device, small: bool) -> Callable[[], object]:
    """OPSO's offline stage: windows sampled, six losses, one step."""
    from offline_agent import OfflineAgent, OfflineAgentConfig
    from offline_trainer import sample_batch
    from ogbench_utils import TrajectoryDataset

    generator = torch.Generator().manual_seed(0)
    terminals = torch.zeros(20, 501)
    terminals[:, -1] = 1
    walk = 0.1 * torch.randn(20, 501, OBSERVATION_DIM, generator=generator).cumsum(1)
    arrays = {"observations": walk.flatten(0, 1), "actions": torch.zeros(20 * 501, ACTION_DIM)}
    arrays = {name: value.numpy() for name, value in (arrays | {"terminals": terminals.flatten()}).items()}
    before = getattr(TrajectoryDataset, "from_arrays", None)  # of older checkouts
    data = before(arrays, "random walks", device=device) if before else TrajectoryDataset(arrays, device=device)
    config = OfflineAgentConfig(context_length=10, d_model=32) if small else OfflineAgentConfig()
    agent = OfflineAgent(config, OBSERVATION_DIM, *data.normalizer(), device=device)
    sampling = torch.Generator(device).manual_seed(0)
    return lambda: agent.update(sample_batch(data, config, 2 if small else 16, sampling))


def online_update(device: torch.device, small: bool) -> Callable[[], object]:
    """OPSO's online stage: its losses on codes, five now and four before, one step of 1,024 transitions."""
    from model import OfflineModel
    from online_agent import OnlineAgent, OnlineAgentConfig

    model = OfflineModel(OBSERVATION_DIM)
    agent = OnlineAgent(OnlineAgentConfig(), model, ACTION_DIM, hidden_dim=256, discount=0.99, device=device)
    agent.config.value_every = 1  # between eb9897e and 2d52338 it was the agent's
    n = 16 if small else 1024
    features = {
        name: torch.randn(n, agent.code_dim + OBSERVATION_DIM, device=device)
        for name in ("", "_next", "_before", "_ahead", "_sub", "_far", "_goal")
    }
    batch = {f"z{name}": agent.code(value) for name, value in features.items()}
    batch |= {f"x{name}": features[name] for name in ("", "_sub", "_goal")}
    steps = ("steps_to_goal", "n", "sub_steps", "far_steps")
    batch |= {name: torch.randint(1, 11, (n,), device=device) for name in steps}
    batch |= {"actions": 2 * torch.rand(n, ACTION_DIM, device=device) - 1, "acted": torch.ones(n, device=device)}
    route = {name: features[end] for name, end in (("x", ""), ("x_goal", "_goal"), ("x_aim", "_sub"))}
    route |= {"steps": 100 * torch.rand(n, device=device)}
    known = inspect.signature(agent.update).parameters  # those of older ones differ
    given = {"values": (batch, route), "acted": batch, "route": route}
    more = {name: value for name, value in given.items() if name in known}
    return lambda: agent.update(batch, **more)


def decision_transformer_update(device: torch.device, small: bool) -> Callable[[], object]:
    """The walker study's Decision Transformer: one step on windows of its default size."""
    from walker.train_dt import SequenceLearner, TransformerConfig

    config = TransformerConfig()
    n, length = 2 if small else config.batch_size, config.context
    learner = SequenceLearner(config, 25, 6, {"walk": 1.0, "run": 1.0}, device)
    batch = {"observations": torch.randn(n, length, 25), "actions": 2 * torch.rand(n, length, 6) - 1}
    batch |= {"returns": torch.rand(n, length), "times": torch.arange(length).expand(n, length)}
    batch |= {"valid": torch.ones(n, length, dtype=torch.bool)}
    batch = {name: value.to(device) for name, value in batch.items()}
    return lambda: learner.update(batch)


def chain_update(name: str, device: torch.device, small: bool) -> Callable[[], object]:
    """An algorithm of algorithms/offline/, with its one actor."""
    from algorithms.offline.pogo_multi import ChainConfig, MultiActor
    from algorithms.offline.pogo_multi_main import ALGORITHMS

    (algorithm, settings), n = ALGORITHMS[name], 16 if small else 256
    noise, sizes = torch.Generator(device).manual_seed(0), (OBSERVATION_DIM, ACTION_DIM, 1.0)
    agent = MultiActor(algorithm, settings(), ChainConfig(w2_weights=(10.0,)), sizes, noise, device)
    shapes = {"observations": (n, OBSERVATION_DIM), "next_observations": (n, OBSERVATION_DIM), "rewards": (n,)}
    batch = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    batch |= {"actions": 2 * torch.rand(n, ACTION_DIM, device=device) - 1, "terminated": torch.zeros(n, device=device)}
    return lambda: agent.update(batch)


UPDATES = {
    **{f"{name}_update": functools.partial(chain_update, name) for name in ("td3_bc", "iql", "awac", "sac_n")},
    "opso_offline_update": offline_update,
    "opso_online_update": online_update,
    "decision_transformer_update": decision_transformer_update,
}


def main() -> None:
    checkout, device, small, threads = sys.argv[1], torch.device(sys.argv[2]), sys.argv[3] == "True", int(sys.argv[4])
    sys.path[0] = checkout
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    clock = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    made: dict[str, Callable[[], object]] = {}
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be taken for an answer
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["name"] not in made:
                made[asked["name"]] = UPDATES[asked["name"]](device, small)
            wait()
            began = clock()
            for _ in range(asked["calls"]):
                made[asked["name"]]()
            wait()
            answer = {"seconds": clock() - began}
        except Exception as error:  # another checkout may lack anything
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
