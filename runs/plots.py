"""Pictures of a run: training curves, and values with proposals over the maze. Written as PNG, without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = dict[str, list[float]]  # columns of metrics.csv, nan where a row has no value (`runs.metrics.read_metrics`)
FEW = 20  # values of a curve up to which each has a dot: of one alone a line shows nothing


@dataclass
class Panel:
    """Curves, each a column of a run's metrics with its matplotlib style, and horizontal lines."""

    title: str
    ylabel: str
    curves: Sequence[tuple[Metrics, str, dict]]
    levels: Sequence[tuple[float, dict]] = ()
    log: bool = False
    ylim: tuple[float, float] | None = None
    note: str = ""  # under the x axis


def _new_figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure  # late, since most that a command does draws nothing

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, wrap=True)
    return figure


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _save(figure: Figure, path: str | Path) -> None:
    write_bytes_atomic(path, _png(figure))


def _draw(axis: Axes, panel: Panel, x: str) -> None:
    """Curves, with a dot at each value where there are few.

    Dotted curves are not in the legend: the panel's note says what they are. A value that has no place on the axis is
    left out.
    """
    axis.set_yscale("log" if panel.log else "linear")
    if not panel.log:
        axis.ticklabel_format(axis="y", useOffset=False)
    for metrics, column, style in panel.curves:
        values = np.asarray(metrics.get(column, []), dtype=float)
        known = np.isfinite(values) & ((values > 0) | (not panel.log))
        if np.any(known):
            dots = {"marker": "."} if known.sum() <= FEW else {}
            axis.plot(np.asarray(metrics[x])[known], values[known], **dots | style)
    for level, style in panel.levels:
        axis.axhline(level, linewidth=1, **style)
    axis.set(title=panel.title, ylabel=panel.ylabel)
    if panel.ylim is not None:
        axis.set_ylim(panel.ylim)
    axis.grid(alpha=0.3)
    if named := [line for line in axis.get_legend_handles_labels()[0] if line.get_linestyle() != ":"]:
        axis.legend(handles=named, fontsize=6.5, ncols=min(math.ceil(len(named) / 4), 3))


def panels_figure(title: str, panels: Sequence[Panel], x: str, xlabel: str, columns: int) -> Figure:
    """A figure of panels, at most so many in a row, over a column of the metrics."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _new_figure(min(14, max(8.8, 4.4 * columns)), 3.2 * rows, title)  # the title is long
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, x)
        axis.set_xlabel(f"{xlabel}{panel.note}")
    return figure


def _plot_panels(
    path: str | Path, title: str, panels: Sequence[Panel], columns: int = 4, x: str = "step", xlabel: str = "update"
) -> None:
    _save(panels_figure(title, panels, x, xlabel, columns), path)


LOSS_NAMES = {  # column of metrics.csv -> name of the loss
    "critic_loss": "Critic",
    "v_loss": "V",
    "state_loss": "State",
    "reward_loss": "Reward",
    "infonce_loss": "InfoNCE",
    "alignment_loss": "Alignment",
}
UNDER = {  # under the curves that may seem to fail
    "infonce_loss": "\ntrain rises while the bank of negatives fills",
    "alignment_loss": "\nminus a cosine: -1 is the best",
}


def plot_training_curves(metrics: Metrics, path: str | Path, title: str) -> None:
    """OPSO's pretraining: the six losses, train and validation, and the two diagnostics, against updates.

    path: the PNG to write. title: the dataset id and seed; so that the picture cannot be taken for another's.
    """
    metrics = metrics | {"code_std_100": [100 * value for value in metrics.get("code_std", [])]}

    def curve(column: str, label: str, colour: str, **style) -> tuple[Metrics, str, dict]:
        return metrics, column, {"label": label, "color": f"tab:{colour}"} | style

    panels = [
        Panel(
            f"{name} loss",
            "loss",
            [curve(column, "train", "blue"), curve(f"val_{column}", "validation", "orange", marker=".")],
            note=UNDER.get(column, ""),
        )
        for column, name in LOSS_NAMES.items()
    ]
    spearman = [curve("value_distance_spearman", "all pairs", "green", marker=".")]
    spearman += [curve("value_distance_spearman_far", "far half", "olive", marker=".")]
    panels.append(Panel("V with -distance", "Spearman's correlation", spearman))
    codes = [curve("code_rank", "effective rank", "red", marker=".")]
    codes += [curve("code_std_100", "100 x std", "purple", marker=".")]
    panels.append(Panel("Codes", "effective rank, 100 x std", codes))
    _plot_panels(path, title, panels)


def _binned(xy: np.ndarray, values: np.ndarray, extent: tuple, size: float) -> np.ndarray:
    """Mean of values [n, ...] in square cells of side `size` over extent -> [rows, columns, ...], nan where empty."""
    from scipy.stats import binned_statistic_2d

    left, right, bottom, top = extent
    cells = round((top - bottom) / size), round((right - left) / size)
    found = binned_statistic_2d(xy[:, 1], xy[:, 0], values.T, "mean", cells, [(bottom, top), (left, right)]).statistic
    return np.moveaxis(found, 0, -1) if values.ndim > 1 else found


def _draw_maze(axis, maze, title: str, start: np.ndarray, goal: np.ndarray) -> None:
    """The walls, and where episodes start and end."""
    walls = np.where(maze.maze_map == 1, 1.0, np.nan)
    axis.imshow(walls, origin="lower", extent=maze.extent, cmap="gray", vmin=0, vmax=2)
    axis.plot(*start, "o", color="tab:cyan", markeredgecolor="black", markersize=9, label="start")
    axis.plot(*goal, "*", color="red", markeredgecolor="black", markersize=15, label="goal")
    axis.set(title=title, xticks=[], yticks=[])


MAP_ARROWS = {  # of `opso.diagnostics.value_map` -> colour, name, and how many a cell's side
    "uphill": ("black", "towards higher V", 2),
    "proposals": ("white", "where the proposer leads", 1),
}
UNSEEN = "0.85"  # grey of the floor that no held-out state visited


def plot_value_maps(maze, xy: np.ndarray, maps: list[dict], path: str | Path, title: str) -> None:
    """V(z, z_g) over the maze for each evaluation goal, with the way that V shows and where the proposer leads.

    maze: `opso.maze.Maze`. xy: [n, 2] positions of held-out states. maps: for each goal `name`, `start_xy`, `goal_xy`,
    `value` [n], and the MAP_ARROWS [n, 2].
    """
    rows = -(-len(maps) // 3)
    figure = _new_figure(14, 4.6 * rows, title)
    left, right, bottom, top = extent = maze.extent
    axes = figure.subplots(rows, 3).ravel()
    for axis in axes[len(maps) :]:
        axis.axis("off")
    values = [_binned(xy, entry["value"], extent, maze.unit / 8) for entry in maps]
    limits = {"vmin": min(map(np.nanmin, values)), "vmax": max(map(np.nanmax, values))}
    for axis, entry, value in zip(axes, maps, values, strict=False):
        picture = axis.imshow(value, origin="lower", extent=extent, **limits)
        axis.set_facecolor(UNSEEN)
        for name, (colour, label, number) in MAP_ARROWS.items():
            size = maze.unit / number
            x, y = np.meshgrid(np.arange(left, right, size) + size / 2, np.arange(bottom, top, size) + size / 2)
            arrows = _binned(xy, entry[name], extent, size)
            arrows = arrows / np.maximum(np.linalg.norm(arrows, axis=-1, keepdims=True), 1e-9)
            seen = np.isfinite(arrows[..., 0])
            where = (x[seen], y[seen], *arrows[seen].T)
            axis.quiver(*where, color=colour, scale=22, width=0.008, headwidth=4.5, pivot="mid")
            axis.plot([], [], color=colour, marker=r"$\rightarrow$", linestyle="", markersize=15, label=label)
        axis.plot([], [], "s", color=UNSEEN, markeredgecolor="black", markersize=12, label="no held-out state")
        _draw_maze(axis, maze, entry["name"], entry["start_xy"], entry["goal_xy"])
    figure.colorbar(picture, ax=axes, shrink=0.8, label="V(z, z_g), about discount^(steps to the goal - 1)")
    legend = {"loc": "lower right", "bbox_to_anchor": (0.86, 0.2), "fontsize": 14, "facecolor": "0.6"}
    figure.legend(*axis.get_legend_handles_labels(), **legend)
    _save(figure, path)


ONLINE_CURVES = {  # column of metrics.csv -> title and y label
    "train_loss": ("Inverse dynamics model", "training loss"),
    "success_rate": ("Success", "success rate"),
    "episode_reward": ("Reward", "reward of an episode"),
    "epsilon": ("Exploration", "probability (epsilon)"),
    "action_noise": ("Action noise", "standard deviation"),
    "goal_biased_share": ("Goal-biased exploration", "part of the exploration"),
    "v_loss": ("V", "loss"),
    "critic_loss": ("Critic", "loss"),
}


def plot_online_curves(metrics: Metrics, path: str | Path, title: str) -> None:
    """What the online stage logs, against environment steps; the evaluated success beside that of acting episodes."""
    panels = []
    for column, names in ONLINE_CURVES.items():
        acting = {"color": "tab:blue", "marker": "."}
        if column == "success_rate":
            acting |= {"label": "acting, with exploration"}
            evaluated = {"color": "tab:green", "marker": "o", "label": "evaluation, five tasks"}
            curves = [(metrics, column, acting), (metrics, "eval/success_rate", evaluated)]
            panels.append(Panel(*names, curves, ylim=(-0.02, 1.02)))
        elif np.isfinite(metrics.get(column, [])).sum() > 1:  # an agent without episodes of its own has one or none
            panels.append(Panel(*names, [(metrics, column, acting)]))
    _plot_panels(path, title, panels, x="env_steps", xlabel="environment steps")


def plot_paths(maze, panels: list[dict], path: str | Path, title: str) -> None:
    """Evaluation episodes over the maze, a panel a task, and the subgoals that the first of them aimed at.

    panels: for each task `name`, `paths` (of [T, 2] positions), `success` (of bool), `goal_xy`, `subgoals` [S, 2].
    """
    figure = _new_figure(14, 9.2, title)
    axes = figure.subplots(2, 3).ravel()
    axes[-1].axis("off")
    for axis, panel in zip(axes, panels, strict=False):
        for xy, reached in zip(panel["paths"], panel["success"], strict=True):
            axis.plot(*xy.T, color="tab:green" if reached else "tab:red", linewidth=0.8, alpha=0.6)
        axis.scatter(*panel["subgoals"].T, s=14, color="tab:blue", zorder=3, label="subgoals of one episode")
        _draw_maze(axis, maze, panel["name"], panel["paths"][0][0], panel["goal_xy"])
        axis.plot([], [], color="tab:green", label="reached the goal")
        axis.plot([], [], color="tab:red", label="did not")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower right", bbox_to_anchor=(0.9, 0.2), fontsize=14)
    _save(figure, path)


def chain_panels(runs: Sequence[Metrics], actors: int, data_score: float) -> list[Panel]:
    """Scores and diagnostics of a chain's runs against updates, one colour an actor and a line a run.

    data_score: mean score of the dataset's own episodes, a dashed line.
    """

    def curves(column: str, first: int = 0, words: str = "", line: str = "-", **style) -> list[tuple]:
        """A column's curves of every actor from `first` on; words stand behind the actor in the legend."""
        found = []
        for actor in range(first, actors):
            look = {"color": f"C{actor % 10}", "linestyle": line, "linewidth": 1 if len(runs) > 1 else 1.5} | style
            labels = [{"label": f"actor {actor}{words}"}] + [{}] * (len(runs) - 1)
            own = zip(runs, labels, strict=True)
            found += [(metrics, column.format(actor), look | label) for metrics, label in own]
        return found

    runs = [metrics | _energy_saved(metrics, actors) for metrics in runs]
    scores = curves("eval/actor_{}/deterministic/score", marker=".")
    if len(runs) == 1:
        scores += curves("eval/actor_{}/stochastic/score", words=", stochastic", line=":", marker=".")
    dotted = "\ndotted: stochastic" * (len(runs) == 1)
    data = {"color": "black", "linestyle": "--", "label": "the data"}
    distances = curves("chain/actor_{}/distance")
    distances += curves("chain/actor_{}/floor", 1, ", floor", ":")  # the data has none
    first = min(actors - 1, 1)  # a step from the data is of another size, and would flatten the others
    zero, note = [(0.0, {"color": "black"})], "\nactor 0's step is from the data: left out" * first
    if "chain/actor_0/energy" in runs[0]:  # of pogo_main.py's chains
        saved = curves("chain/actor_{}/energy_saved", first)
        step = Panel("Energy saved by the step", "energy (above 0: it pays)", saved, zero, note=note)
    else:
        step = Panel("Q gained by the step", "Q", curves("chain/actor_{}/q_gain", first), zero, note=note)
    critics = [(metrics, "critic_loss", {"color": "black"}) for metrics in runs]
    return [
        Panel("Score", "score", scores, [(data_score, data)], note=dotted),
        Panel("Q of each actor", "Q", curves("chain/actor_{}/q")),
        Panel("Distance to the one before", "distance", distances, log=True, note="\ndotted: floor" * first),
        step,
        Panel("Spread of samples", "standard deviation", curves("chain/actor_{}/spread")),
        Panel("Critics", "loss", critics, log=True),
    ]


def _energy_saved(metrics: Metrics, actors: int) -> Metrics:
    """What each step of a chain saves of its energy, where that is logged."""
    names = [f"chain/actor_{actor}/energy" for actor in range(actors)]
    logged = [name for name in names if f"{name}_before" in metrics]
    return {f"{name}_saved": list(np.subtract(metrics[f"{name}_before"], metrics[name])) for name in logged}


def plot_chain_curves(metrics: Metrics, path: str | Path, title: str, actors: int, data_score: float) -> None:
    _plot_panels(path, title, chain_panels([metrics], actors, data_score), columns=3)


def chart_png(title: str, chains: Sequence[tuple[str, Sequence[Metrics], int, float]]) -> bytes:
    """A row of panels for each chain: its name, metrics of its runs, actors and score of the data."""
    panels = []
    for name, *chain in chains:
        own = chain_panels(*chain)[:5]
        own[0].title = f"{name}: {own[0].title}"
        panels += own
    return _png(panels_figure(title, panels, "step", "update", 5))


def plot_study_curves(metrics: Metrics, path: str | Path, title: str, data_returns: dict[str, float]) -> None:
    """A walker run's returns in each task, and what else it logs, against updates.

    data_returns: task -> mean return of the data's episodes, dashed lines.
    """
    curves, levels = [], []
    for number, (task, mean) in enumerate(data_returns.items()):
        colour = {"color": f"C{number}"}
        curves.append((metrics, f"eval/{task}/return", colour | {"marker": ".", "label": task}))
        levels.append((mean, colour | {"linestyle": "--", "label": f"the data's, {task}"}))
    others = [name for name in metrics if name != "step" and not name.startswith("eval/")][:7]
    panels = [Panel("Agent in training", "return", curves, levels)]
    panels += [
        Panel(name, "loss" if "loss" in name else "mean", [(metrics, name, {"color": "black"})]) for name in others
    ]
    _plot_panels(path, title, panels)
