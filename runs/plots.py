"""Pictures of a run: training curves, and values with proposals over the maze. Written as PNG, without a display."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OFFLINE_LOSSES = {  # column of metrics.csv -> name of the curve
    "critic_loss": "Critic",
    "v_loss": "V",
    "state_loss": "State",
    "reward_loss": "Reward",
    "infonce_loss": "InfoNCE",
    "alignment_loss": "Alignment",
}
WHY_IT_RISES = {  # under the curves that do not fall
    "infonce_loss": "train rises while the bank of negatives fills",
    "alignment_loss": "rises: it weighs 0.1 and yields to the others (--beta_a)",
}


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # late, since most that a command does draws nothing

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_bytes_atomic(path, buffer.getvalue())


def _curve(axis, steps: np.ndarray, values: list[float], **style) -> None:
    values = np.asarray(values, dtype=float)
    known = np.isfinite(values)
    if known.any():
        axis.plot(steps[known], values[known], **style)


def plot_training_curves(metrics: dict[str, list[float]], path: str | Path, title: str) -> None:
    """The six losses, train and validation, and the two diagnostics, against updates.

    Args:
        metrics: columns of metrics.csv, nan where a row has no value (`runs.metrics.read_metrics`).
        path: the PNG to write.
        title: the dataset id and seed; it stands on the picture, so that it cannot be taken for another's.
    """
    figure = _new_figure(14, 6.4)
    figure.suptitle(title)
    axes = figure.subplots(2, 4).ravel()
    steps = np.asarray(metrics["step"], dtype=float)
    for axis, (column, name) in zip(axes, OFFLINE_LOSSES.items(), strict=False):
        _curve(axis, steps, metrics.get(column, []), label="train", color="tab:blue", linewidth=1)
        _curve(axis, steps, metrics.get(f"val_{column}", []), label="validation", color="tab:orange", marker=".")
        axis.set_title(f"{name} loss")
        axis.legend(fontsize=8)
    _curve(axes[6], steps, metrics.get("value_distance_spearman", []), label="all pairs", color="tab:green", marker=".")
    _curve(
        axes[6], steps, metrics.get("value_distance_spearman_far", []), label="far half", color="tab:olive", marker="."
    )
    axes[6].set_title("Spearman of V with -distance")
    axes[6].set_ylim(-0.1, 1.02)
    axes[6].legend(fontsize=8)
    _curve(axes[7], steps, metrics.get("code_rank", []), label="effective rank", color="tab:red", marker=".")
    axes[7].set_title("Codes: rank, 100 x std")
    _curve(
        axes[7],
        steps,
        [100 * v for v in metrics.get("code_std", [])],
        label="100 x std",
        color="tab:purple",
        marker=".",
    )
    axes[7].legend(fontsize=8)
    for axis, column in zip(axes, [*OFFLINE_LOSSES, "", ""], strict=True):
        axis.set_xlabel(f"update\n{WHY_IT_RISES[column]}" if column in WHY_IT_RISES else "update")
        axis.grid(alpha=0.3)
    _save(figure, path)


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
    figure = _new_figure(14, 4.6 * rows)
    figure.suptitle(title)
    left, right, bottom, top = extent = maze.extent
    axes = figure.subplots(rows, 3).ravel()
    for axis in axes[len(maps) :]:
        axis.axis("off")
    walls = np.where(maze.maze_map == 1, 1.0, np.nan)
    values = [_binned(xy, entry["value"], extent, maze.unit / 8) for entry in maps]
    limits = {"vmin": min(map(np.nanmin, values)), "vmax": max(map(np.nanmax, values))}
    for axis, entry, value in zip(axes, maps, values, strict=False):
        picture = axis.imshow(value, origin="lower", extent=extent, **limits)
        axis.set_facecolor("0.85")  # floor that no held-out state visited
        axis.imshow(walls, origin="lower", extent=extent, cmap="gray", vmin=0, vmax=2)
        for name, (colour, label, number) in MAP_ARROWS.items():
            size = maze.unit / number
            x, y = np.meshgrid(np.arange(left, right, size) + size / 2, np.arange(bottom, top, size) + size / 2)
            arrows = _binned(xy, entry[name], extent, size)
            arrows = arrows / np.maximum(np.linalg.norm(arrows, axis=-1, keepdims=True), 1e-9)
            seen = np.isfinite(arrows[..., 0])
            where = (x[seen], y[seen], *arrows[seen].T)
            axis.quiver(*where, color=colour, scale=22, width=0.008, headwidth=4.5, pivot="mid")
            axis.plot([], [], color=colour, marker=r"$\rightarrow$", linestyle="", markersize=15, label=label)
        axis.plot(*entry["start_xy"], "o", color="tab:cyan", markeredgecolor="black", markersize=9, label="start")
        axis.plot(*entry["goal_xy"], "*", color="red", markeredgecolor="black", markersize=15, label="goal")
        axis.set_title(entry["name"])
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(picture, ax=axes, shrink=0.8, label="V(z, z_g), about discount^(steps to the goal - 1)")
    legend = {"loc": "lower right", "bbox_to_anchor": (0.86, 0.2), "fontsize": 14, "facecolor": "0.6"}
    figure.legend(*axis.get_legend_handles_labels(), **legend)
    _save(figure, path)


ONLINE_CURVES = {  # column of metrics.csv -> name of the curve
    "train_loss": "Train loss (inverse dynamics)",
    "success_rate": "Success rate",
    "episode_reward": "Episode reward",
    "epsilon": "Epsilon",
    "action_noise": "Action noise",
    "goal_biased_share": "Goal-biased exploration",
    "v_loss": "V loss",
    "critic_loss": "Critic loss",
}


def plot_online_curves(metrics: dict[str, list[float]], path: str | Path, title: str) -> None:
    """What the online stage logs, against environment steps; the evaluated success beside that of the acting episodes.

    Args: as in `plot_training_curves`.
    """
    # Without episodes of its own, half of the curves have no point.
    found = {"success_rate"} | {column for column in metrics if np.isfinite(metrics[column]).any()}
    shown = [(column, name) for column, name in ONLINE_CURVES.items() if column in found]
    rows = math.ceil(len(shown) / 4)
    figure = _new_figure(14, 3.2 * rows)
    figure.suptitle(title)
    steps = np.asarray(metrics["env_steps"], dtype=float)
    for axis, (column, name) in zip(
        figure.subplots(rows, min(len(shown), 4), squeeze=False).ravel(), shown, strict=False
    ):
        _curve(axis, steps, metrics.get(column, []), color="tab:blue", marker=".", label="acting, with exploration")
        if column == "success_rate":
            evaluated = metrics.get("eval/success_rate", [])
            _curve(axis, steps, evaluated, color="tab:green", marker="o", label="evaluation, five tasks")
            axis.set_ylim(-0.02, 1.02)
            axis.legend(fontsize=8, loc="center right")  # away from 0 and 1, where the points lie
        axis.set_title(name)
        axis.set_xlabel("environment steps")
        axis.grid(alpha=0.3)
    _save(figure, path)


def plot_paths(maze, panels: list[dict], path: str | Path, title: str) -> None:
    """Evaluation episodes over the maze, a panel a task, and the subgoals that the first of them aimed at.

    Args:
        maze: `opso.maze.Maze`.
        panels: for each task `name`, `paths` (of [T, 2] positions), `success` (of bool), `goal_xy`, `subgoals` [S, 2].
        path, title: as in `plot_training_curves`.
    """
    figure = _new_figure(14, 9.2)
    figure.suptitle(title)
    axes = figure.subplots(2, 3).ravel()
    axes[-1].axis("off")
    walls = np.where(maze.maze_map == 1, 1.0, np.nan)
    for axis, panel in zip(axes, panels, strict=False):
        axis.imshow(walls, origin="lower", extent=maze.extent, cmap="gray", vmin=0, vmax=2)
        for xy, reached in zip(panel["paths"], panel["success"], strict=True):
            axis.plot(*xy.T, color="tab:green" if reached else "tab:red", linewidth=0.8, alpha=0.6)
        axis.scatter(*panel["subgoals"].T, s=14, color="tab:blue", zorder=3, label="subgoals of one episode")
        axis.plot(*panel["paths"][0][0], "o", color="tab:cyan", markeredgecolor="black", markersize=9, label="start")
        axis.plot(*panel["goal_xy"], "*", color="red", markeredgecolor="black", markersize=15, label="goal")
        axis.plot([], [], color="tab:green", label="reached the goal")
        axis.plot([], [], color="tab:red", label="did not")
        axis.set_title(panel["name"])
        axis.set_xticks([])
        axis.set_yticks([])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower right", bbox_to_anchor=(0.9, 0.2), fontsize=14)
    _save(figure, path)


def plot_chain_curves(
    metrics: dict[str, list[float]], path: str | Path, title: str, actors: int, data_score: float
) -> None:
    """A chain's scores and diagnostics against updates, one colour an actor.

    Args:
        metrics, path, title: as in `plot_training_curves`.
        actors: how many the chain has.
        data_score: mean score of the dataset's own episodes, a dashed line.
    """
    figure = _new_figure(14, 6.4)
    figure.suptitle(title)
    axes = figure.subplots(2, 3).ravel()
    steps, colours = np.asarray(metrics["step"], dtype=float), [f"C{number % 10}" for number in range(actors)]
    energy = "chain/actor_0/energy" in metrics  # of pogo_main.py's chains
    for number, colour in enumerate(colours):
        chain, name = f"chain/actor_{number}", f"actor {number}"
        promised = metrics.get(f"{chain}/q_gain", [])
        for mode, style in (("deterministic", "-"), ("stochastic", ":")):
            values = metrics.get(f"eval/actor_{number}/{mode}/score", [])
            _curve(axes[0], steps, values, color=colour, linestyle=style, marker=".", label=f"{name}, {mode}")
        _curve(axes[1], steps, metrics.get(f"{chain}/q", []), color=colour, label=name)
        _curve(axes[2], steps, metrics.get(f"{chain}/distance", []), color=colour, label=name)
        if number > 0:  # the data has no floor
            floor = metrics.get(f"{chain}/floor", [])
            _curve(axes[2], steps, floor, color=colour, linestyle=":", label=f"{name}, floor")
        gain = np.subtract(metrics[f"{chain}/energy_before"], metrics[f"{chain}/energy"]) if energy else promised
        _curve(axes[3], steps, gain, color=colour, label=name)
        _curve(axes[4], steps, metrics.get(f"{chain}/spread", []), color=colour, label=name)
    axes[0].axhline(data_score, color="black", linestyle="--", linewidth=1, label="the data's episodes")
    axes[3].axhline(0, color="black", linewidth=1)
    _curve(axes[5], steps, metrics.get("critic_loss", []), color="black", label="both critics")
    step = "Energy saved by the step (above 0: it pays)" if energy else "Q gained by the step"
    names = ("D4RL score", "Q of each actor", "Distance to the one before", step, "Spread of samples", "Critic loss")
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    if energy:
        axes[3].set_xlabel(
            "update; actor 0's step is from the data itself,\nbelow whose energy a narrower policy does not get"
        )
    for axis in (axes[2], axes[5]):
        axis.set_yscale("log")
    _save(figure, path)


def plot_study_curves(
    metrics: dict[str, list[float]], path: str | Path, title: str, data_returns: dict[str, float]
) -> None:
    """A walker run's returns in each task, and what else it logs, against updates.

    Args:
        metrics, path, title: as in `plot_training_curves`.
        data_returns: task -> mean return of the data's episodes, dashed lines.
    """
    others = [name for name in metrics if name != "step" and not name.startswith("eval/")][:7]
    rows, columns = math.ceil((len(others) + 1) / 4), min(len(others) + 1, 4)
    figure = _new_figure(3.5 * columns, 3.2 * rows)
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    steps = np.asarray(metrics["step"], dtype=float)
    for number, (task, mean) in enumerate(data_returns.items()):
        colour = f"C{number}"
        _curve(axes[0], steps, metrics.get(f"eval/{task}/return", []), color=colour, marker=".", label=task)
        axes[0].axhline(mean, color=colour, linestyle="--", linewidth=1, label=f"the data's, {task}")
    axes[0].legend(fontsize=8)
    for axis, name in zip(axes[1:], others, strict=False):
        _curve(axis, steps, metrics[name], color="black")
    for axis, name in zip(axes, ("Return, agent in training", *others), strict=False):
        axis.set_title(name)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    for axis in axes[len(others) + 1 :]:
        axis.axis("off")
    _save(figure, path)
