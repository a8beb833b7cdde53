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
    from matplotlib.figure import Figure

Metrics = dict[str, list[float]]  # columns of metrics.csv, nan where a row has no value (`runs.metrics.read_metrics`)


@dataclass
class Panel:
    """Curves over the rows of a metrics.csv, each with its matplotlib style, and horizontal lines."""

    title: str
    ylabel: str
    curves: Sequence[tuple[Sequence[float], dict]]
    levels: Sequence[tuple[float, dict]] = ()
    log: bool = False
    ylim: tuple[float, float] | None = None
    note: str = ""  # under the x axis


def _new_figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure  # late, since most that a command does draws nothing

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _save(figure: Figure, path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_bytes_atomic(path, buffer.getvalue())


def _plot_panels(
    path: str | Path, title: str, panels: Sequence[Panel], x: Sequence[float], xlabel: str, columns: int = 4
) -> None:
    """A picture of panels, at most so many in a row, over the same x."""
    columns, x = min(columns, len(panels)), np.asarray(x, dtype=float)
    rows = math.ceil(len(panels) / columns)
    figure = _new_figure(min(14, 4.4 * columns), 3.2 * rows, title)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes, panels, strict=False):
        for values, style in panel.curves:
            known = np.isfinite(values)
            if np.any(known):
                axis.plot(x[known], np.asarray(values)[known], **style)
        for level, style in panel.levels:
            axis.axhline(level, linewidth=1, **style)
        axis.set(title=panel.title, ylabel=panel.ylabel, xlabel=f"{xlabel}{panel.note}")
        axis.set(yscale="log" if panel.log else "linear", ylim=panel.ylim)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    _save(figure, path)


LOSS_NAMES = {  # column of metrics.csv -> name of the loss
    "critic_loss": "Critic",
    "v_loss": "V",
    "state_loss": "State",
    "reward_loss": "Reward",
    "infonce_loss": "InfoNCE",
    "alignment_loss": "Alignment",
}
WHY_IT_RISES = {  # under the curves that do not fall
    "infonce_loss": "\ntrain rises while the bank of negatives fills",
    "alignment_loss": "\nrises: it weighs 0.1 and yields to the others (--beta_a)",
}


def plot_training_curves(metrics: Metrics, path: str | Path, title: str) -> None:
    """OPSO's pretraining: the six losses, train and validation, and the two diagnostics, against updates.

    Args:
        metrics: of the run.
        path: the PNG to write.
        title: the dataset id and seed; it stands on the picture, so that it cannot be taken for another's.
    """

    def curve(column: str, label: str, colour: str, **style) -> tuple[Sequence[float], dict]:
        return metrics.get(column, []), {"label": label, "color": f"tab:{colour}"} | style

    panels = [
        Panel(
            f"{name} loss",
            "loss",
            [curve(column, "train", "blue"), curve(f"val_{column}", "validation", "orange", marker=".")],
            note=WHY_IT_RISES.get(column, ""),
        )
        for column, name in LOSS_NAMES.items()
    ]
    spearman = [curve("value_distance_spearman", "all pairs", "green", marker=".")]
    spearman += [curve("value_distance_spearman_far", "far half", "olive", marker=".")]
    panels.append(Panel("V with -distance", "Spearman's correlation", spearman, ylim=(-0.1, 1.02)))
    deviation = 100 * np.asarray(metrics.get("code_std", []))
    codes = [curve("code_rank", "effective rank", "red", marker=".")]
    codes += [(deviation, {"label": "100 x std", "color": "tab:purple", "marker": "."})]
    panels.append(Panel("Codes", "effective rank, 100 x std", codes))
    _plot_panels(path, title, panels, metrics["step"], "update")


def _binned(xy: np.ndarray, values: np.ndarray, extent: tuple, size: float) -> np.ndarray:
    """Mean of values [n, ...] in square cells of side `size` over extent -> [rows, columns, ...], nan where empty."""
    left, right, bottom, top = extent
    columns, rows = round((right - left) / size), round((top - bottom) / size)
    j = np.clip(((xy[:, 0] - left) / size).astype(int), 0, columns - 1)
    i = np.clip(((xy[:, 1] - bottom) / size).astype(int), 0, rows - 1)
    total = np.zeros((rows, columns, *values.shape[1:]))
    count = np.zeros((rows, columns))
    np.add.at(total, (i, j), values)
    np.add.at(count, (i, j), 1)
    count[count == 0] = np.nan
    return total / count.reshape(rows, columns, *[1] * (values.ndim - 1))


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


def plot_value_maps(maze, xy: np.ndarray, maps: list[dict], path: str | Path, title: str) -> None:
    """V(z, z_g) over the maze for each evaluation goal, with the way that V shows and where the proposer leads.

    Args:
        maze: `opso.maze.Maze`.
        xy: [n, 2] positions of held-out states.
        maps: for each goal `name`, `start_xy`, `goal_xy`, `value` [n], and the MAP_ARROWS [n, 2].
        path, title: as in `plot_training_curves`.
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
        axis.set_facecolor("0.85")  # floor that no held-out state visited
        for name, (colour, label, number) in MAP_ARROWS.items():
            size = maze.unit / number
            x, y = np.meshgrid(np.arange(left, right, size) + size / 2, np.arange(bottom, top, size) + size / 2)
            arrows = _binned(xy, entry[name], extent, size)
            arrows = arrows / np.maximum(np.linalg.norm(arrows, axis=-1, keepdims=True), 1e-9)
            seen = np.isfinite(arrows[..., 0])
            where = (x[seen], y[seen], *arrows[seen].T)
            axis.quiver(*where, color=colour, scale=22, width=0.008, headwidth=4.5, pivot="mid")
            axis.plot([], [], color=colour, marker=r"$\rightarrow$", linestyle="", markersize=15, label=label)
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
    """What the online stage logs, against environment steps; the evaluated success beside that of the acting episodes.

    Args: as in `plot_training_curves`.
    """
    panels = []
    for column, names in ONLINE_CURVES.items():
        values = metrics.get(column, [])
        acting = (values, {"color": "tab:blue", "marker": ".", "label": "acting, with exploration"})
        if column == "success_rate":
            style = {"color": "tab:green", "marker": "o", "label": "evaluation, five tasks"}
            curves = [acting, (metrics.get("eval/success_rate", []), style)]
            panels.append(Panel(*names, curves, ylim=(-0.02, 1.4)))  # the legend has its room above 1
        elif np.isfinite(values).any():  # without episodes of its own, half of the curves have no point
            del acting[1]["label"]
            panels.append(Panel(*names, [acting]))
    _plot_panels(path, title, panels, metrics["env_steps"], "environment steps")


def plot_paths(maze, panels: list[dict], path: str | Path, title: str) -> None:
    """Evaluation episodes over the maze, a panel a task, and the subgoals that the first of them aimed at.

    Args:
        maze: `opso.maze.Maze`.
        panels: for each task `name`, `paths` (of [T, 2] positions), `success` (of bool), `goal_xy`, `subgoals` [S, 2].
        path, title: as in `plot_training_curves`.
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


def plot_chain_curves(metrics: Metrics, path: str | Path, title: str, actors: int, data_score: float) -> None:
    """A chain's scores and diagnostics against updates, one colour an actor.

    Args:
        metrics, path, title: as in `plot_training_curves`.
        actors: how many the chain has.
        data_score: mean score of the dataset's own episodes, a dashed line.
    """

    def curves(column: str, first: int = 0, words: str = "", line: str = "-", **style) -> list[tuple[list, dict]]:
        """A column's curve of every actor from `first` on; words stand behind the actor in the legend."""
        return [
            (
                metrics.get(column.format(number), []),
                {"color": f"C{number % 10}", "linestyle": line, "label": f"actor {number}{words}"} | style,
            )
            for number in range(first, actors)
        ]

    scores = curves("eval/actor_{}/deterministic/score", words=", deterministic", marker=".")
    scores += curves("eval/actor_{}/stochastic/score", words=", stochastic", line=":", marker=".")
    data = {"color": "black", "linestyle": "--", "label": "the data's episodes"}
    distances = curves("chain/actor_{}/distance")
    distances += curves("chain/actor_{}/floor", 1, ", floor", ":")  # the data has none
    zero = [(0.0, {"color": "black"})]
    if "chain/actor_0/energy" in metrics:  # of pogo_main.py's chains
        before, after = curves("chain/actor_{}/energy_before"), curves("chain/actor_{}/energy")
        saved = [(np.subtract(b, a), style) for (b, _), (a, style) in zip(before, after, strict=True)]
        note = "\nactor 0's step is from the data itself,\nbelow whose energy a narrower policy does not get"
        step = Panel("Energy saved by the step", "energy (above 0: it pays)", saved, zero, note=note)
    else:
        step = Panel("Q gained by the step", "Q", curves("chain/actor_{}/q_gain"), zero)
    critics = [(metrics.get("critic_loss", []), {"color": "black", "label": "all critics"})]
    panels = [
        Panel("Score", "D4RL score", scores, [(data_score, data)]),
        Panel("Q of each actor", "Q", curves("chain/actor_{}/q")),
        Panel("Distance to the one before", "distance", distances, log=True),
        step,
        Panel("Spread of samples", "standard deviation", curves("chain/actor_{}/spread")),
        Panel("Critics", "loss", critics, log=True),
    ]
    _plot_panels(path, title, panels, metrics["step"], "update", columns=3)


def plot_study_curves(metrics: Metrics, path: str | Path, title: str, data_returns: dict[str, float]) -> None:
    """A walker run's returns in each task, and what else it logs, against updates.

    Args:
        metrics, path, title: as in `plot_training_curves`.
        data_returns: task -> mean return of the data's episodes, dashed lines.
    """
    curves, levels = [], []
    for number, (task, mean) in enumerate(data_returns.items()):
        colour = {"color": f"C{number}"}
        curves.append((metrics.get(f"eval/{task}/return", []), colour | {"marker": ".", "label": task}))
        levels.append((mean, colour | {"linestyle": "--", "label": f"the data's, {task}"}))
    others = [name for name in metrics if name != "step" and not name.startswith("eval/")][:7]
    panels = [Panel("Agent in training", "return", curves, levels)]
    panels += [
        Panel(name, "loss" if "loss" in name else "mean", [(metrics[name], {"color": "black"})]) for name in others
    ]
    _plot_panels(path, title, panels, metrics["step"], "update")
