"""`python make_dataset.py --check DATASET`: is this file what its layout says, and do its rows belong together?

DATASET is the id of one that is here, a folder with one in it, or the path of a file or folder in one of three layouts,
generated here, official, or anybody's:

    OGBench mazes   .npz    observations, actions, terminals, optional qpos, qvel
    D4RL            .hdf5   observations, actions, rewards, terminals, optional timeouts, next_observations, infos/*
    walker study    folder  collected_data/<name>/ or its data/, or one episode_<index>_<steps>.npz of it

Other readers stop at the first fault; this one reads what can be read and reports everything. A fault is something
that trains an agent on what never happened, or that a loader refuses. A note is worth knowing and harms nothing.

Rows are compared with what bodies can do, so that a file shows its faults without the simulator that made it:

    moves       from row t to t + 1 a coordinate moves by the time step times its velocity, or at most so far
    rewards     of a running robot follow its velocity; the walker's are recomputed from its physics
    infos       of a running robot are the state that its observation shows
    actions     row t's action explains the change that follows it better than its neighbours' actions do

Thresholds lie well above what 900,000 rows of good data show, and planted faults well beyond them; the figures stand
beside each.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import d4rl_utils
import dmc_utils
import ogbench_utils
from benchmark_data import check_moves, check_rows, overview
from benchmark_data.check_files import EPISODE_NAME, FAULT, LAYOUT_NAMES, Data, Finding, only_dataset, open_data
from benchmark_data.check_robots import RUNNER_STEPS
from dataset_files import sha256
from offline_data import DATASETS
from utils import UserError, write_bytes_atomic

WIDTH = 100  # columns of the printed report

# In the order of the report. Each takes Data and yields findings; it yields none where it does not apply.
CHECKS: tuple[Callable[[Data], Iterator[Finding]], ...] = (
    check_moves.mark_resets,
    check_rows.check_finite,
    check_rows.check_actions,
    check_rows.check_ends,
    check_rows.check_lengths,
    check_moves.check_continuity,
    check_rows.check_falls,
    check_rows.check_walls,
    check_rows.check_runner_rewards,
    check_rows.check_goal_rewards,
    check_rows.check_action_rows,
    check_rows.check_walker_rows,
    check_rows.check_walker_physics,
    check_rows.check_walker_actions,
    check_rows.check_extra,
    check_rows.check_repeats,
)


# ----------------------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What `check` found. The file is good when there is no fault."""

    name: str
    facts: list[tuple[str, str]]
    findings: list[Finding]
    picture: Path | None = None

    @property
    def good(self) -> bool:
        return all(finding.severity != FAULT for finding in self.findings)

    @property
    def verdict(self) -> str:
        faults = sum(finding.severity == FAULT for finding in self.findings)
        return "good" if not faults else f"{faults} fault{'s' * (faults > 1)}"

    def text(self) -> str:
        """The table and the findings, at most WIDTH columns wide."""
        lines = [f"{self.name}: {self.verdict}", ""]
        facts = self.facts + ([("picture", str(self.picture))] if self.picture else [])
        lines += [_wrapped(f"  {label:<14}", text) for label, text in facts]
        ordered = sorted(self.findings, key=lambda finding: finding.severity != FAULT)
        lines += [""] * bool(ordered) + [_wrapped(f"  {finding.severity:<6}", finding.line()) for finding in ordered]
        return "\n".join(lines)


def _wrapped(label: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_long_words=False)


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """Findings of the same words as one, with the first place and the number of all."""
    merged: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = (finding.severity, finding.what)
        merged[key] = replace(merged[key], count=merged[key].count + finding.count) if key in merged else finding
    return list(merged.values())


def check_manifest(data: Data) -> Iterator[Finding]:
    """Size and SHA-256 of files that a manifest beside them lists. Official files have none, local datasets all do."""
    path, place = _manifest_path(data.path), data.path.absolute()
    if path is None:
        if data.dataset_id.startswith("local/"):
            yield data.fault(
                "incomplete: it lies in a folder local/ without the manifest that make_dataset.py writes last; loaders "
                "refuse it, make it again"
            )
        return
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        listed = {path.parent / name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        named = manifest["id"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield data.fault(f"the manifest {path.name} cannot be read")
        return
    if str(named).removeprefix("local/") == data.dataset_id.removeprefix("local/"):
        data.dataset_id = named  # a copy elsewhere is still what it was
        data.memory["manifest"] = path
    else:
        yield data.fault(f"the manifest {path.name} belongs to {named}")
    inside = {file: entry for file, entry in listed.items() if place == file or place in file.parents}
    if not inside:
        yield data.fault(f"the manifest {path.name} does not list this file")
    for file, (size, digest) in listed.items():
        if not file.is_file():
            yield Finding(FAULT, f"incomplete: a file that the manifest {path.name} lists is missing", file.name)
        elif file in inside and file.stat().st_size != size or sha256(file) != digest:
            yield Finding(FAULT, f"size or SHA-256 is not what the manifest {path.name} says", file.name)


def _manifest_path(path: Path) -> Path | None:
    """The manifest beside a file, a folder, or the folder that an episode lies in."""
    path = path.absolute()
    if EPISODE_NAME.match(path.name):
        path = path.parent
    if path.name == "data":
        path = path.parent
    name = path.name if path.is_dir() else path.stem.removesuffix("-val")
    beside = path.with_name(f"{name}.json")
    return beside if beside.is_file() else None


# ----------------------------------------------------------------------------------------------------------------
# Table and picture
# ----------------------------------------------------------------------------------------------------------------


def describe(data: Data) -> list[tuple[str, str]]:
    """The table's lines: label and text."""
    robot = f", {data.robot.name}" if data.robot else ""
    facts = [("dataset", _identity(data)), ("layout", f"{LAYOUT_NAMES[data.layout]}{robot}")]
    if data.rows == 0:
        return facts
    lengths = data.lengths
    spread = (
        f"{lengths[0]:,} rows each"
        if lengths.min() == lengths.max()
        else f"{lengths.min():,} to {lengths.max():,} rows, median {np.median(lengths):,.0f}"
    )
    cut = cut_rows(data)
    spread += f"; the last one is cut, at {cut:,} rows" if cut else ""
    facts += [("rows", f"{data.rows:,}"), ("episodes", f"{len(lengths):,}, {spread}")]
    flags = [f"{int((data.columns[n] == 1).sum()):,} {n}" for n in ("terminals", "timeouts") if n in data.columns]
    facts += [("ends", ", ".join(flags))] if flags else []
    facts += [("observations", f"{data.columns['observations'].shape[1]} numbers")]
    if "actions" in data.columns:
        actions = data.columns["actions"]
        low, high = (reduce(actions, axis=None) for reduce in (np.fmin.reduce, np.fmax.reduce))
        facts += [("actions", f"{actions.shape[1]} numbers, {low:.4g} to {high:.4g}")]
    returns = episode_returns(data)
    if returns is not None and len(returns):
        quantiles = " ".join(f"{value:,.1f}" for value in np.quantile(returns, [0, 0.25, 0.5, 0.75, 1]))
        spread = f"mean {returns.mean():,.1f}, std {returns.std():,.1f}; min, quartiles, max: {quantiles}"
        of = f"; of the {len(returns):,} whole ones" if cut and len(lengths) > 1 else ""
        facts += [("returns", spread + of)]
    if data.maze is not None and data.robot is not None:
        visited = {tuple(cell) for rows in data.blocks() for cell in _cells(data, rows)}
        free = int((data.maze.maze_map == 0).sum())
        facts += [("maze", f"{len(visited)} of {free} free cells visited")]
    return facts


def _identity(data: Data) -> str:
    """The dataset's id and how it is known."""
    if "manifest" in data.memory:
        return f"{data.dataset_id}, by its manifest"
    if data.dataset_id in known_ids():
        return f"{data.dataset_id}, by its name"
    return f"unknown: {data.dataset_id!r} is no dataset id of --list"


def known_ids() -> tuple[str, ...]:
    """Every id that --list shows."""
    mazes = ogbench_utils.official_ids() + ogbench_utils.GENERATED_IDS
    robots = d4rl_utils.official_ids() + d4rl_utils.GENERATED_IDS
    return mazes + robots + dmc_utils.OFFICIAL_IDS + dmc_utils.GENERATED_IDS


def _cells(data: Data, rows: slice) -> np.ndarray:
    """Distinct free cells of the maze in these rows: [n, 2]."""
    xy = data.columns["observations"][rows, :2]
    xy = xy[np.isfinite(xy).all(axis=1) & (np.abs(xy) < 1e6).all(axis=1)]
    return np.unique(data.maze.xy_to_ij(xy[data.maze.is_free(xy)]).reshape(-1, 2), axis=0)


def episode_returns(data: Data) -> np.ndarray | None:
    """Undiscounted returns of whole episodes, float64, without those that are not finite; None without rewards."""
    if "rewards" not in data.columns:
        return None
    returns = np.add.reduceat(data.columns["rewards"].astype(np.float64), data.starts)
    whole = returns[:-1] if cut_rows(data) and len(returns) > 1 else returns
    return whole[np.isfinite(whole)]


def cut_rows(data: Data) -> int:
    """Rows of the last episode where the file's end cut it; 0 where it is whole.

    D4RL leaves such an end unmarked, make_dataset.py marks it as a timeout: one of a runner before its time limit.
    """
    rows, whole = int(data.lengths[-1]), bool(data.flagged[-1])
    if data.layout == "d4rl" and data.robot is not None and data.robot.reward is not None:
        whole = rows >= RUNNER_STEPS or "terminals" in data.columns and data.columns["terminals"][-1] == 1
    return 0 if whole else rows


def draw(data: Data, path: Path, verdict: str) -> None:
    """Write the picture: paths over the maze, and histograms of returns and episode lengths where rewards are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    returns = episode_returns(data)
    paths = data.robot is not None and data.robot.maze
    panels = [draw_paths] * paths + [draw_returns] * (returns is not None) + [draw_lengths] * (not paths)
    figure = Figure(figsize=(6.5 * len(panels), 6), layout="constrained")
    figure.suptitle(f"{data.dataset_id}: {data.rows:,} rows, {len(data.starts):,} episodes, {verdict}")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(data, axis)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_bytes_atomic(path, buffer.getvalue())


def draw_returns(data: Data, axis: Any) -> None:
    returns = episode_returns(data)
    axis.hist(returns, bins=40, color="tab:blue")
    if len(returns):
        axis.axvline(returns.mean(), color="black", linestyle="--", label=f"mean {returns.mean():,.1f}")
        axis.legend()
    axis.set(xlabel="return of an episode", ylabel="episodes")


def draw_lengths(data: Data, axis: Any) -> None:
    axis.hist(data.lengths, bins=40, color="tab:gray")
    axis.set(xlabel="rows an episode", ylabel="episodes")


def draw_paths(data: Data, axis: Any) -> None:
    """Up to 300 episodes as thin lines over the walls, jumps inside an episode as dashed red ones."""
    from matplotlib.collections import LineCollection

    if data.maze is not None:
        walls = np.where(data.maze.maze_map == 1, 1.0, np.nan)
        axis.imshow(walls, origin="lower", extent=data.maze.extent, cmap="gray", vmin=0, vmax=2)
    chosen = np.unique(np.linspace(0, len(data.starts) - 1, 300).astype(int))
    every = max(1, int(data.lengths[chosen].sum()) // 200_000)
    observations = data.columns["observations"]
    lines = [observations[data.starts[e] : data.starts[e] + data.lengths[e] : every, :2] for e in chosen]
    axis.add_collection(LineCollection(lines, linewidths=0.4, colors="tab:blue", alpha=0.5))
    starts = observations[data.starts[chosen], :2]
    axis.plot(*starts.T, ".", color="black", markersize=3, label="start")
    moves = check_moves.moves_of(data)
    jumps = np.flatnonzero(moves.breaks & ~data.flagged[:-1])[:2000] if moves else []
    if len(jumps):
        segments = np.stack([observations[jumps, :2], observations[jumps + 1, :2]], axis=1)
        axis.add_collection(LineCollection(segments, linewidths=1.0, colors="red", linestyles="dashed", label="jump"))
    axis.set_aspect("equal")
    axis.autoscale_view()
    axis.legend(loc="upper right", fontsize=8)
    axis.set_title(f"{len(chosen)} of {len(data.starts):,} episodes")


# ----------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------


def default_picture(path: Path) -> Path:
    """Where the picture of a dataset goes when no place is given: logs/checks/<name>-<8 digits>.png.

    The digits are of the SHA-256 of the dataset's full path, so that files of the same name in different folders keep
    their own pictures, and a file that is checked again replaces its own.
    """
    path = path.resolve()
    path = path.parent if path.name == "data" else path
    digits = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return Path("logs", "checks", f"{(path.name if path.is_dir() else path.stem)[:100]}-{digits}.png")


def find_dataset(given: str | Path, dataset_dir: str | Path | None = None) -> Path:
    """The file or folder to check: a path that is there, else a dataset id's place in `dataset_dir`.

    A folder of one dataset means that one, and a maze's id its train file. Raises UserError where neither is there,
    and says how to get a known dataset.
    """
    path, name = Path(given), str(given)
    if path.is_dir():
        return only_dataset(path)
    if path.exists():
        return path
    place = DATASETS[name].paths(dataset_dir)[0] if name in DATASETS else None
    if place is None:
        nearest = overview.nearest_id(name, known_ids())
        hint = f"did you mean {nearest}? Give" if nearest else "give"
        raise UserError(
            f"{path}: no such file or folder, and no dataset id; {hint} a dataset's path or id after --check"
        )
    if place.exists():
        return place
    folder = f" --dataset_dir {dataset_dir}" if dataset_dir else ""
    if name.startswith("local/"):
        get = f"make it with `python make_dataset.py --dataset {name}{folder}`"
    else:
        get = "put the official file there; `python make_dataset.py --list` says where it comes from"
    raise UserError(f"{name}: not at {place}; {get}, or give a path after --check")


def check(path: str | Path, picture: str | Path | None = None) -> Report:
    """Check a dataset file or folder.

    Args:
        path: in one of the three layouts, see above.
        picture: the PNG to write; None writes none. Nothing is drawn of a file without readable observations, and a
            picture that cannot be written is said so in the report.

    Raises UserError for a path that is not there, or not a dataset of a known layout. Faults of a dataset do not raise.
    """
    path = Path(path)
    try:
        data = open_data(path)
        findings = list(check_manifest(data))
        # Numbers that are not finite are findings; what NumPy would say of them besides is noise.
        with np.errstate(invalid="ignore", over="ignore"):
            for function in CHECKS if data.rows else ():
                findings += function(data)
            report = Report(str(path), describe(data), _merged(data.findings + findings))
    except MemoryError:
        raise UserError(f"{path}: does not fit in memory; check it on a larger machine") from None
    if picture is not None and data.rows:
        try:
            draw(data, Path(picture), report.verdict)
            report.picture = Path(picture)
        except OSError as error:  # the report is worth more than its picture
            report.facts.append(("picture", f"cannot write {picture} ({error.strerror}); choose another --picture"))
    return report


def run_check(given: str | Path, picture: str | Path | None = None, dataset_dir: str | Path | None = None) -> int:
    """Check a path or a dataset id, print the report, write the picture.

    Returns the exit code: 0 for a good dataset, 1 for one with faults. Raises UserError as `find_dataset` does, and for
    a picture that could not be written, before the work.
    """
    path = find_dataset(given, dataset_dir)
    if picture is not None:
        _require_writable(Path(picture))
    report = check(path, picture or default_picture(path))
    print(report.text())
    return 0 if report.good else 1


def _require_writable(picture: Path) -> None:
    """Raise UserError for a place where no picture can be written, and for a name that may be another file's."""
    if picture.suffix.lower() != ".png":
        raise UserError(f"--picture {picture}: give a name that ends in .png")
    try:
        if picture.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with tempfile.TemporaryFile(dir=next(place for place in picture.absolute().parents if place.exists())):
            pass
    except OSError as error:
        raise UserError(f"--picture {picture}: cannot write there ({error.strerror}); choose another") from None
