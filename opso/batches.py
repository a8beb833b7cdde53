"""Batches of the online stage: the dataset's states, encoded once, and what an update samples of them."""

from dataclasses import dataclass

import torch

from ogbench_utils import hindsight_goals
from online_agent import OnlineAgent
from utils import EpisodeReplay

TRAVELLED = 12  # single steps that an aim is away, chosen on medium-navigate
MOST_TRAVEL_STEPS = 100
TRAVEL_ROWS = 20_000  # rows that are looked at


@dataclass
class CodeSet:
    """The dataset as features; the same attributes as `EpisodeReplay`, whose states are features too."""

    states: torch.Tensor  # [N, d_model + D]
    actions: torch.Tensor  # [N, A]
    episode_end: torch.Tensor  # [N] int64, inclusive
    transitions: torch.Tensor  # [M] int64, rows that start a transition


def sample_batch(
    source: CodeSet | EpisodeReplay, agent: OnlineAgent, count: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """`count` transitions with hindsight goals, horizons and subgoals, as `OnlineAgent.update` takes them.

    The policy aims 1..subgoal_steps ahead, sampled. Nothing crosses an episode's end.
    """
    config, device = agent.config, source.states.device

    def sample(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator, device=device)

    rows = source.transitions[sample(0, len(source.transitions))]
    goals, steps_to_goal = hindsight_goals(
        rows, source.episode_end, source.transitions, config.p_self, config.p_future, config.goal_discount, generator
    )
    remaining = source.episode_end[rows] - rows
    n = torch.minimum(sample(1, config.horizon + 1), remaining)
    sub = torch.minimum(sample(1, config.subgoal_steps + 1), remaining)
    at = torch.stack([rows, rows + 1, rows + n - 1, rows + n, rows + sub, goals])
    names = ("", "_next", "_before", "_ahead", "_sub", "_goal")
    features = dict(zip(names, source.states[at], strict=True))
    batch = {f"z{name}": agent.code(features[name]) for name in ("", "_next", "_before", "_ahead", "_goal")}
    batch |= {f"x{name}": features[name] for name in ("", "_sub", "_goal")}
    return batch | {"steps_to_goal": steps_to_goal, "n": n, "actions": source.actions[rows]}


def steps_to_travel(positions: torch.Tensor, episode_end: torch.Tensor) -> int:
    """The fewest steps that take a trajectory as far as TRAVELLED single steps straight on would.

    Judged by the upper quartile of distances, as some stand still. positions [N, 2]; episode_end [N] int64. Where none
    gets so far: MOST_TRAVEL_STEPS, or as many as the longest has.
    """
    rows = torch.arange(len(positions), device=positions.device)
    rows = rows[:: max(len(rows) // TRAVEL_ROWS, 1)]
    steps, single = 0, 0.0
    while steps < MOST_TRAVEL_STEPS:
        rows = rows[rows + steps < episode_end[rows]]
        if len(rows) == 0:
            break
        steps += 1
        far = torch.quantile((positions[rows + steps] - positions[rows]).norm(dim=-1), 0.75)
        single = single or far  # while most stand still, the first distance is yet to come
        if far > 0 and far >= TRAVELLED * single:
            break
    return max(steps, 1)


def sample_pairs(
    source: CodeSet, metric_steps: int, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [count, F] of states and of those 1..metric_steps later, or at the episode's end; steps [count]."""
    device = source.states.device
    number = torch.randint(0, len(source.transitions), (count,), generator=generator, device=device)
    rows = source.transitions[number]
    steps = torch.randint(1, metric_steps + 1, (count,), generator=generator, device=device)
    steps = torch.minimum(steps, source.episode_end[rows] - rows)
    return source.states[rows], source.states[rows + steps], steps
