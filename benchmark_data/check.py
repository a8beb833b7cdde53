"""`python make_dataset.py --check DATASET`: is this file what its layout says, and do its rows follow from one another?

DATASET is a dataset id, or the path of a file or folder that is named as its benchmark names it:

    OGBench mazes   antmaze-medium-navigate-v0.npz, or its -val.npz
    D4RL            hopper_medium-v2.hdf5
    walker study    the folder walker_walk-td3-medium

First the benchmark's own loader must accept the file. Then the simulator takes recorded actions from recorded states,
and must arrive at the recorded next observations. docs/checking.md says how faults show, and which do not.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmark_data.recorded import BENCHMARKS, FAULT, Data, read
from dataset_files import Dataset
from offline_data import DATASETS
from utils import UserError, counted, did_you_mean

SAMPLE, TRIED = 2000, 200  # rows that the simulator steps from; ends among them, and rows tried with other actions
DIFFERS = 1e-2  # a row that misses by more is wrong
FEW = 0.005  # share of rows that may be, where a contact begins or ends
FAR = 5  # how many times more a wrong pairing misses, where no row agrees

# Every benchmark's official file or folder by its name. A single task's is its maze's.
OFFICIAL = {
    Path(file).name: dataset
    for dataset in DATASETS.values()
    if not dataset.local and type(dataset) in BENCHMARKS
    for file in dataset.files
}


def find(given: str | Path, dataset_dir: str | Path | None = None) -> tuple[Dataset, Path, Path]:
    """The dataset of an id or path, its file or folder, and their --dataset_dir. Raises UserError for neither."""
    path, name = Path(given), str(given)
    if name in DATASETS and not path.exists():
        path = DATASETS[name].paths(dataset_dir)[0]
        if not path.exists():
            raise UserError(f"{name}: not at {path}; `python make_dataset.py --list` says how to get it")
    if not path.exists():
        hint = did_you_mean(name, DATASETS)
        raise UserError(f"{path}: no such file or folder, and no dataset id{hint}")
    dataset = DATASETS.get(name) or OFFICIAL.get(path.absolute().name)
    if dataset is None:
        raise UserError(
            f"{path}: no dataset's file or folder is called so, and what it should hold is unknown; rename it as "
            "`python make_dataset.py --list` has it"
        )
    folder = path.absolute().parents[len(Path(dataset.files[0]).parts) - 1]
    if folder.name == "local":
        return DATASETS.get(f"local/{dataset.name}", dataset), path, folder.parent
    return dataset, path, folder


def check_manifest(data: Data, dataset_dir: Path) -> None:
    if not data.dataset.local:
        return
    manifest, path = data.dataset.manifest(dataset_dir), data.dataset.manifest_path(dataset_dir)
    if manifest is None:
        data.fault(f"no manifest {path.name} beside it that fits: loaders refuse it; make it again with --overwrite")
    elif changed := data.dataset.changed(manifest, dataset_dir):
        data.fault(changed)


def check_lengths(data: Data) -> None:
    odd = data.lengths > data.limit if data.d4rl else data.lengths != data.limit
    if odd.any():
        rule = f"beyond the time limit of {data.limit:,}" if data.d4rl else f"others {data.limit:,}"
        data.fault(
            f"an episode has {data.lengths[odd][0]:,} rows, {rule}, from {data.at(data.starts[odd])}: an end is in the "
            "wrong row, or rows are lost"
        )


def check_following(data: Data) -> None:
    """Where next_observations is not the next row's observation an episode must end, and nowhere else."""
    if data.next_observations is None:
        return
    here, there = data.next_observations[:-1], data.observations[1:]
    breaks = (np.abs(here - there) > 1e-4 + 1e-4 * np.abs(there)).any(axis=1)  # float32 rounding at most
    inside = ~data.ends[:-1]
    if breaks[inside].mean() > 0.5:
        what = "next_observations are not the observations of the next rows"
        data.fault(f"{what}: rows are shuffled, or next_observations shifted; take the original file")
        data.next_observations = None
        return
    missing, extra = np.flatnonzero(breaks & inside), np.flatnonzero(~breaks & ~inside)
    if len(missing) and "replay" in data.dataset.id and not data.dataset.local:
        tail = "as in D4RL's own replay files; loaders end episodes there"
        data.note(f"the row after {data.at(missing)} does not follow from it, {tail}")
    elif len(missing):
        data.fault(f"the row after {data.at(missing)} does not follow from it, and no flag ends the episode")
    if len(extra):
        data.fault(f"misplaced episode end: {data.at(extra)} has a flag, but the episode goes on in the next row")


def check_replay(data: Data) -> str:
    """From sampled rows the simulator must reach the next ones, with the file's rewards. Returns how near it came."""
    rows = np.arange(len(data.ends)) if data.next_observations is not None else np.flatnonzero(~data.ends)
    rows, states = _known_states(data, np.union1d(_sample(rows, SAMPLE), _sample(rows[data.ends[rows]], TRIED)))
    if len(rows) == 0:
        return "not possible: the file has no states that its observations show"
    reached, rewards = data.simulator.step(states, data.actions[rows])
    misses = _distance(reached, data.next(rows))
    wrong = ~(misses < DIFFERS)
    if wrong.mean() > FEW:
        _say_what_is_wrong(data, rows[wrong], states[wrong], misses[wrong], len(rows))
    else:
        _check_rewards(data, rows, rewards)
    return f"{len(rows):,} rows; the simulator misses the next observation by {np.nanmedian(misses):.0e} (median)"


def _sample(rows: np.ndarray, size: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).choice(rows, min(size, len(rows)), replace=False))


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Largest difference in each row, [n]; infinite where one is not known."""
    return np.nan_to_num(np.abs(one - other).max(axis=1), nan=np.inf)


def _known_states(data: Data, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of the rows whose state is known, and the states: what the observations show, else the file's."""
    if data.simulator.padding is not None:
        states = data.simulator.rebuild(data.observations[rows])
    elif data.states is not None:
        states = data.states[rows]
    else:
        return rows[:0], np.zeros(0)
    known = np.isfinite(states).all(axis=1)
    return rows[known], states[known]


def _say_what_is_wrong(data: Data, rows: np.ndarray, states: np.ndarray, misses: np.ndarray, sampled: int) -> None:
    """Of rows that do not agree: right but of another MuJoCo, shifted, negated, or none of these."""
    where = f"in {len(rows):,} of {sampled:,} sampled rows, first {data.at(rows[:1])}"
    some = _sample(np.arange(len(rows)), TRIED)
    rows, states, right, last = rows[some], states[some], np.median(misses[some]), len(data.actions) - 1
    pairings = {
        "actions are shifted: the action of a row stands one row late": data.actions[np.minimum(rows + 1, last)],
        "actions are shifted: the action of a row stands one row early": data.actions[np.maximum(rows - 1, 0)],
        "actions are negated": -data.actions[rows],
    }
    others = {
        name: np.median(_distance(data.simulator.step(states, actions)[0], data.next(rows)))
        for name, actions in pairings.items()
    }
    best = min(others, key=others.get)
    if FAR * others[best] < right:
        data.fault(f"{best}, {where}; take the original file")
    elif FAR * right < others[best] and len(misses) > sampled / 20:
        data.note(
            f"the simulator misses the next row by {right:.1g} (median) with its own action, by {others[best]:.1g} and "
            "more with others: right rows, of another version of MuJoCo"
        )
    else:
        what = "rows are shuffled, changed, another robot's or another maze's"
        data.fault(f"the simulator does not reach the next row {where}: {what}")


def _check_rewards(data: Data, rows: np.ndarray, rewards: np.ndarray) -> None:
    if data.rewards is None or data.goals:  # the goals of official antmazes are not in their files
        return
    misses = np.abs(data.rewards[rows] - rewards)
    wrong = ~(misses < DIFFERS)
    if wrong.mean() > FEW:
        data.fault(
            f"rewards are not the simulator's, by {np.median(misses[wrong]):.2g} in {wrong.sum():,} of {len(rows):,} "
            f"sampled rows, first {data.at(rows[wrong][:1])}: shifted, scaled or another task's"
        )


@dataclass
class Report:
    """What `check` found: faults spoil training or are refused by a loader, notes are worth knowing."""

    name: str
    facts: dict[str, str]
    findings: list[tuple[str, str]]  # fault or note, and a sentence

    @property
    def faults(self) -> list[str]:
        return [what for severity, what in self.findings if severity == FAULT]

    def text(self) -> str:
        verdict = counted(len(self.faults), "fault") if self.faults else "good"
        facts = [f"  {name:<14}{text}" for name, text in self.facts.items()]
        findings = sorted(self.findings, key=lambda finding: finding[0] != FAULT)
        blocks = [[f"{self.name}: {verdict}"], facts, [f"  {kind:<6}{what}" for kind, what in findings]]
        return "\n\n".join("\n".join(block) for block in blocks if block)


def describe(data: Data) -> dict[str, str]:
    lengths, low, high = data.lengths, data.actions.min(), data.actions.max()
    each = f"{lengths.min():,} to {lengths.max():,} rows, median {np.median(lengths):,.0f}"
    facts = {
        "dataset": data.dataset.id,
        "rows": f"{len(data.ends):,}",
        "episodes": f"{len(lengths):,}, {each}",
        "ends": ", ".join(f"{int(flag.sum()):,} {name}" for name, flag in data.flags.items()),
        "actions": f"{data.actions.shape[1]} numbers, {low:.4g} to {high:.4g}",
    }
    returns = data.returns()
    if returns is not None and len(returns):
        quantiles = " ".join(f"{value:,.1f}" for value in np.quantile(returns, [0, 0.25, 0.5, 0.75, 1]))
        facts["returns"] = f"mean {returns.mean():,.1f}, std {returns.std():,.1f}; min, quartiles, max: {quantiles}"
    return facts


def check(given: str | Path, dataset_dir: str | Path | None = None) -> Report:
    """Check a dataset by its id, file or folder. Raises UserError for what is none; faults do not raise."""
    dataset, path, dataset_dir = find(given, dataset_dir)
    try:
        data = read(path, dataset)
    except UserError as error:
        file = error.where.removeprefix(str(path)).lstrip("/\\")  # of a folder
        return Report(str(path), {}, [(FAULT, ": ".join(filter(None, (file, error.fault))))])
    facts = describe(data)
    check_manifest(data, dataset_dir)
    check_lengths(data)
    check_following(data)
    facts["replay"] = check_replay(data)
    return Report(str(path), facts, data.findings)


def run_check(given: str | Path, dataset_dir: str | Path | None = None) -> int:
    """Check a path or a dataset id and print the report. Returns the exit code: 1 where faults are."""
    report = check(given, dataset_dir)
    print(report.text())
    return 1 if report.faults else 0
