"""Several seeds of a chain at once, each in its own directory and, on a CPU, bit for bit what it would be alone.

On a GPU the updates of all are branches of one captured graph, so that the small kernels of one run fill the gaps of
another. Runs that were cut at different updates come together first.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from runs.chain import ChainRun, ChainRunConfig, run_chain
from runs.cuda_graphs import GraphedStep, SideBySide
from runs.directory import expecting
from runs.run import part_of
from utils import RunExists, RunFinished, RunLocked, UserError, progress, warn


def run_seeds(run_class: type[ChainRun], config: ChainRunConfig) -> dict[str, Any]:
    """Train `num_seeds` runs to their end, at once; what finished.json of the one holds, or `seed_k` -> that of each.

    Finished ones are left as they are; one that diverges does not stop the others. Raises UserError for it in the end,
    and RunFinished if nothing is left to do.
    """
    if config.num_seeds == 1:
        return run_chain(run_class, config)
    if config.run_dir is not None:
        raise UserError(f"--run_dir {config.run_dir}: is one run's; leave it out, or --num_seeds {config.num_seeds}")
    left, summaries = _preflight_seeds(run_class, config)
    with contextlib.ExitStack() as open_runs:
        runs: list[ChainRun] = []
        for own in left:
            run = run_class(own, runs[0] if runs else None, f"Seed {own.seed}: ")
            runs.append(open_runs.enter_context(run))
        _check_same_data(summaries, runs)
        if runs:
            summaries |= _train_to_the_end(runs)
    _report_seeds(summaries)
    if not runs:
        raise RunFinished(f"all {config.num_seeds} runs are finished; change --seed or --num_seeds to train more")
    if failed := [str(run.config.seed) for run in runs if run.failed]:
        raise UserError(f"seed {', '.join(failed)}: not finished, see the warnings above; the other seeds are")
    return summaries


def _preflight_seeds(
    run_class: type[ChainRun], config: ChainRunConfig
) -> tuple[list[ChainRunConfig], dict[str, dict[str, Any]]]:
    """Settings of the seeds that are left, and `seed_k` -> finished.json of the others, before anything is written."""
    left, summaries = [], {}
    for seed in range(config.seed, config.seed + config.num_seeds):
        own = replace(config, seed=seed, num_seeds=1)
        try:
            run_class.preflight(own)
            left.append(own)
        except RunFinished:
            path = run_class.default_run_dir(own) / "finished.json"
            print(f"Seed {seed}: finished, see {path.parent}")
            with expecting(path, "what a finished run leaves", "remove it and continue the run"):
                summary = summaries[f"seed_{seed}"] = json.loads(path.read_text())
                _ = summary["transitions"], summary["data_score"]  # which tell whether the data are the same
        except (RunExists, RunLocked) as error:  # a directory follows from its seed here
            goes_on = "" if config.resume or isinstance(error, RunLocked) else "continue it with --resume, "
            remedy = f"{goes_on}choose another --seed"
            raise type(error)(error.where, error.fault, remedy) from None
    return left, summaries


def _check_same_data(summaries: dict[str, dict[str, Any]], runs: Sequence[ChainRun]) -> None:
    """Raise UserError where finished seeds, or those that are left, have other data than the first one."""
    facts = {name: (summary["transitions"], summary["data_score"]) for name, summary in summaries.items()}
    facts |= {f"seed_{run.config.seed}": (len(run.data), run.data_score()) for run in runs[:1]}
    if len(set(facts.values())) > 1:
        words = ", ".join(f"{name} {size} transitions of score {score:.6g}" for name, (size, score) in facts.items())
        raise UserError(words, "are not of the same data", "give its --dataset_dir, or other seeds")


def _train_to_the_end(runs: Sequence[ChainRun]) -> dict[str, dict[str, Any]]:
    """Train and finish; `seed_k` -> what finished.json holds, of each run that has not failed."""
    began, before = time.perf_counter(), sum(run.step for run in runs)
    print(f"{runs[0].describe()}; seeds {', '.join(str(run.config.seed) for run in runs)} at once")
    train(runs)
    summaries = {}
    for run in runs:
        with _mark_failed(run):
            if not run.failed:
                summaries[f"seed_{run.config.seed}"] = run.finish()
    updates, seconds = sum(run.step for run in runs), time.perf_counter() - began
    if summaries:
        folders = ", ".join(str(run.run_dir) for run in runs if not run.failed)
        print(f"{part_of(updates, updates - before)} updates in {seconds:.0f} seconds; outputs in {folders}")
    return summaries


@contextlib.contextmanager
def _mark_failed(run: ChainRun) -> Iterator[None]:
    """Mark a run that cannot go on as failed and warn; the other seeds keep training."""
    try:
        yield
    except UserError as error:
        run.failed = True
        warn(f"{run.prefix}{error}")


def train(runs: Sequence[ChainRun]) -> None:
    """Bring runs to max_timesteps: those that are behind first, then all. Those that cannot go on are left behind."""
    total = runs[0].config.max_timesteps
    with progress(total, runs[0].config.env, initial=min(run.step for run in runs), unit="update") as bar:
        while going := [run for run in runs if not run.failed and run.step < total]:
            step = min(run.step for run in going)
            until = min((run.step for run in going if run.step > step), default=total)
            group = [run for run in going if run.step == step]
            update = make_update(group)
            while group[0].step < until and not any(run.failed for run in group):
                for run in group:
                    run.agent.anneal(run.step / total)
                for run, info in zip(group, update(), strict=True):
                    with _mark_failed(run):
                        run.record(info, bar)
                bar.update()


def make_update(runs: Sequence[ChainRun]) -> Callable[[], list[dict[str, torch.Tensor]]]:
    """One update of each run, all at the same step: on a GPU branches of one captured graph, where a run's would be."""
    first, updates = runs[0], [run.update for run in runs]
    if not first.is_captured():
        return lambda: [update() for update in updates]
    generators = [generator for run in runs for generator in run.generators()]
    return GraphedStep(SideBySide(updates, first.device), generators)


def _report_seeds(summaries: dict[str, dict[str, Any]]) -> None:
    if not summaries:
        return
    print(f"Last checkpoints of {len(summaries)} seeds, mean (lowest to highest):")
    for name in next(iter(summaries.values())):
        if name.startswith("actor_") and name.endswith("/score"):
            actor, mode, _ = name.split("/")
            scores = np.array([summary[name] for summary in summaries.values()])
            spread = f"{scores.mean():.3f} ({scores.min():.3f} to {scores.max():.3f})"
            print(f"  Actor {actor.removeprefix('actor_')} - {mode.capitalize()}: D4RL score: {spread}")
