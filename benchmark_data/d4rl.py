"""Local D4RL datasets: snapshots of a training run act in Gymnasium's robots, recorded in D4RL's HDF5 layout.

D4RL's recipe (Fu et al. 2020, section 5), with the training steps of the snapshots in SNAPSHOTS:

    medium         a policy stopped at about half of the expert's return, sampling its actions
    medium-replay  the replay buffer of the training that led to it
    medium-expert  half the transitions as medium, then half by the expert

As D4RL does it: actions are samples, an episode has at most 1000 steps, and one that falls at step 1000 exactly is a
timeout and no terminal. The last episode of a file is cut where the number of transitions is reached.

Deviations, beside those of docs/recipes.md: medium-replay has no buffer to copy. The first 10,000 steps are uniform
random actions, as SAC's warm-up is; every later training step is recorded anew by the snapshot nearest to it.
"""

import functools
import io
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import h5py
import numpy as np

import utils
from benchmark_data import experts
from benchmark_data.experts import describe_returns
from benchmark_data.generation import Family, Plan, run_tasks
from d4rl_utils import DATASETS, GENERATED_IDS, MAX_EPISODE_STEPS, D4RLDataset, make_env
from dataset_files import whole_returns

WARM_UP_STEPS = 10_000  # training steps of medium-replay that are random
BLOCK_ROWS = 4000  # transitions a task makes, so that short episodes do not cost a call each

# What a row holds, in D4RL's types but for infos/: states in float32 would not lead to the recorded next ones.
COLUMNS = {
    "observations": np.float32,
    "next_observations": np.float32,
    "actions": np.float32,
    "rewards": np.float32,
    "terminals": bool,
    "timeouts": bool,
    "infos/qpos": np.float64,
    "infos/qvel": np.float64,
}


@dataclass(frozen=True)
class Snapshots:
    earlier: tuple[int, ...]  # on the way to the medium level
    medium: tuple[int, ...]  # at the medium level
    expert: int


SNAPSHOTS = {
    "hopper": Snapshots(earlier=(10_000, 30_000, 50_000), medium=(110_000, 120_000), expert=270_000),
    "halfcheetah": Snapshots(earlier=(20_000, 40_000, 60_000), medium=(80_000,), expert=300_000),
    "walker2d": Snapshots(earlier=(90_000, 110_000), medium=(150_000,), expert=230_000),
}


@dataclass(frozen=True)
class Part:
    steps: tuple[int, ...]  # training steps of the snapshots, which take turns by episode; none: random actions
    end: float  # where it ends, as a share of the dataset


def recipe_parts(dataset: D4RLDataset) -> tuple[Part, ...]:
    """The stretches of a dataset in their order. An episode belongs to the stretch in which it begins."""
    snapshots = SNAPSHOTS[dataset.robot]
    if dataset.level == "medium":
        return (Part(snapshots.medium, 1.0),)
    if dataset.level == "medium-expert":
        return (Part(snapshots.medium, 0.5), Part((snapshots.expert,), 1.0))
    steps = snapshots.earlier + snapshots.medium
    # A snapshot stands for the training steps that are nearer to it than to its neighbours.
    ends = [(step + later) / 2 for step, later in zip(steps[:-1], steps[1:], strict=True)] + [steps[-1]]
    shares = [(step, end / steps[-1]) for step, end in zip(steps, ends, strict=True)]
    return (Part((), WARM_UP_STEPS / steps[-1]), *(Part((step,), end) for step, end in shares))


def _describe_recipe(dataset: D4RLDataset, experts_dir: Path, algorithms: str) -> str:
    run, share = f"of a policy trained with {algorithms}", _medium_share(dataset.robot, experts_dir)
    text = {
        "medium": f"snapshots {run}",
        "medium-replay": f"uniform random actions, then snapshots {run}, up to the medium level in their order",
        "medium-expert": f"half by the medium snapshots {run}, then half by its expert",
    }[dataset.level]
    return f"D4RL {dataset.level}: {text}{share}; whole episodes of at most 1000 steps"


def _medium_share(robot: str, experts_dir: Path) -> str:
    """How the medium snapshots' return compares with the expert's by their cards; empty where a card does not tell."""

    def mean(step: int, kind: str) -> float:
        card = experts.read_card(experts.policy_path(experts_dir, robot, step))
        return float(card["returns"][kind]["mean"])

    snapshots = SNAPSHOTS[robot]
    try:
        medium = float(np.mean([mean(step, "stochastic") for step in snapshots.medium]))
        expert, sampled = (mean(snapshots.expert, kind) for kind in ("deterministic", "stochastic"))
    except LookupError:
        return ""
    return (
        f"; by the cards medium's actions, sampled, return {medium / expert:.3f} of the expert's mean action "
        f"and {medium / sampled:.3f} of the expert's sampled ones"
    )


class Block(NamedTuple):
    """Some consecutive episodes of one part: what one task makes."""

    plan: Plan
    part: int
    index: int  # within the part
    rows: int  # whole episodes are made until there are so many


@functools.lru_cache(maxsize=1)
def _env(dataset_id: str) -> gymnasium.Env:
    return make_env(dataset_id)  # once a process


def record_episode(
    env: gymnasium.Env, policy: experts.Policy | None, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """One episode's COLUMNS, each [steps] or [steps, numbers]. Without a policy, actions are uniform in [-1, 1]."""
    simulator: Any = env.unwrapped  # steps are counted here, so no wrapper needs to
    rows: dict[str, list] = {key: [] for key in COLUMNS}
    observation, _ = simulator.reset(seed=int(rng.integers(2**32)))
    terminal = timeout = False
    while not (terminal or timeout):
        seen = observation.astype(np.float32)  # the policy sees what the file says
        if policy is None:
            action = rng.uniform(-1.0, 1.0, size=env.action_space.shape).astype(np.float32)
        else:
            action = policy.act(seen, rng)
        state = simulator.data.qpos.copy(), simulator.data.qvel.copy()
        observation, reward, fallen, _, _ = simulator.step(action)
        timeout = len(rows["rewards"]) + 1 == MAX_EPISODE_STEPS
        terminal = bool(fallen) and not timeout
        for key, value in zip(COLUMNS, (seen, observation, action, reward, terminal, timeout, *state), strict=True):
            rows[key].append(value)
    return {key: np.array(values, dtype=COLUMNS[key]) for key, values in rows.items()}


def make_block(block: Block) -> dict[str, np.ndarray]:
    """The COLUMNS of a block's episodes, end to end. Every episode has a random stream of its own."""
    plan, steps = block.plan, recipe_parts(block.plan.dataset)[block.part].steps
    paths = [experts.policy_path(plan.experts_dir, plan.dataset.robot, step) for step in steps]
    env, policies = _env(plan.dataset_id), [experts.read_policy(path) for path in paths] or [None]
    episodes, rows = [], 0
    while rows < block.rows:
        stream = np.random.SeedSequence(plan.seed, spawn_key=(block.part, block.index, len(episodes)))
        # Blocks begin with different snapshots, so that an odd number of episodes favours none.
        policy = policies[(block.index + len(episodes)) % len(policies)]
        episodes.append(record_episode(env, policy, np.random.default_rng(stream)))
        rows += len(episodes[-1]["rewards"])
    return {key: np.concatenate([episode[key] for episode in episodes]) for key in COLUMNS}


def plan_blocks(plan: Plan) -> list[Block]:
    """Blocks enough for every part, whatever the lengths of the episodes turn out to be."""
    blocks, begin = [], 0
    for number, part in enumerate(recipe_parts(plan.dataset)):
        rows = round(part.end * plan.size) - begin
        for index in range(math.ceil(rows / BLOCK_ROWS)):
            needed = min(BLOCK_ROWS, rows - index * BLOCK_ROWS)
            blocks.append(Block(plan, number, index, needed))
        begin += rows
    return blocks


def make_columns(plan: Plan) -> dict[str, np.ndarray]:
    """The dataset's COLUMNS [plan.size, ...]: whole episodes until every part has its share, then cut to the size."""
    ends = [round(part.end * plan.size) for part in recipe_parts(plan.dataset)]
    blocks, pieces, done = plan_blocks(plan), [], 0
    for block, made in zip(blocks, run_tasks(make_block, blocks, plan, unit="block"), strict=True):
        missing = ends[block.part] - done
        if missing > 0:  # longer episodes than expected leave blocks over
            episode_ends = np.flatnonzero(made["terminals"] | made["timeouts"])
            last = min(np.searchsorted(episode_ends, missing - 1), len(episode_ends) - 1)
            rows = int(episode_ends[last]) + 1  # of the episodes that begin before row `missing`
            pieces.append({key: column[:rows] for key, column in made.items()})
            done += rows
    columns = {key: np.concatenate([piece[key] for piece in pieces])[: plan.size] for key in COLUMNS}
    columns["timeouts"][-1] = not columns["terminals"][-1]  # where the file ends, the episode is cut
    return columns


def write_file(
    path: Path, columns: dict[str, np.ndarray], recipe: str, algorithms: str, policy: experts.Policy | None
) -> None:
    """Write one D4RL file. metadata/policy is there where one policy alone made it, as in D4RL's own."""
    # Built in memory first: HDF5 crashes the process when the disk fills up under it.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column, compression="gzip", shuffle=True)
        file["metadata/algorithm"] = np.bytes_(algorithms.encode())
        file["metadata/note"] = np.bytes_("generated locally by make_dataset.py; not the official file")
        file["metadata/recipe"] = np.bytes_(recipe.encode())
        if policy is not None:
            file["metadata/iteration"] = np.int32(policy.step // 1000)  # D4RL counts epochs of 1000 steps
            file["metadata/policy/nonlinearity"] = np.bytes_(policy.activation)
            file["metadata/policy/output_distribution"] = np.bytes_("tanh_gaussian")
            names = {"mean": "last_fc", "log_std": "last_fc_log_std"}
            # D4RL's matrices are [out, in]. The order decides the file's bytes, by which rows of scores know the data.
            for part, name in itertools.product(("weight", "bias"), policy.layer_names):
                layer = names.get(name, name.replace("hidden.", "fc"))
                file[f"metadata/policy/{layer}/{part}"] = policy.weights[f"{name}.{part}"].T
    utils.write_bytes_atomic(path, buffer.getbuffer())


class D4RLFamily(Family):
    """`local/{hopper,halfcheetah,walker2d}-{medium,medium-replay,medium-expert}-v2`; see generation.Family."""

    ids = tuple(name for name in GENERATED_IDS if "antmaze" not in name)
    unit, size = "transitions", 100_000

    def policies(self, dataset_id: str, experts_dir: Path) -> list[Path]:
        dataset = DATASETS[dataset_id]
        steps = sorted({step for part in recipe_parts(dataset) for step in part.steps})
        return [experts.policy_path(experts_dir, dataset.robot, step) for step in steps]

    def write(self, plan: Plan, stage: Path) -> dict[str, Any]:
        paths = self.policies(plan.dataset_id, plan.experts_dir)
        algorithms = experts.algorithms(paths)
        recipe = _describe_recipe(plan.dataset, plan.experts_dir, algorithms)
        columns, path = make_columns(plan), stage / plan.dataset.files[0]
        write_file(path, columns, recipe, algorithms, experts.read_policy(paths[0]) if len(paths) == 1 else None)
        arrays = plan.dataset.read(path)
        ends = plan.dataset.episode_ends(arrays)
        returns = whole_returns(arrays["rewards"], arrays["terminals"], ends, MAX_EPISODE_STEPS)
        counts = {"episodes": len(ends), "transitions": plan.size}
        return {"recipe": recipe, **counts, "returns": describe_returns(returns)}
