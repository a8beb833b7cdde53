"""The picture of a checked dataset: paths over its maze, or histograms of returns and episode lengths."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import UserError, write_bytes_atomic

if TYPE_CHECKING:
    from benchmark_data.recorded import Data

PATHS, POINTS = 300, 200_000  # most that are drawn


def draw(data: Data, path: Path, verdict: str) -> None:
    """Write a PNG. Raises UserError where it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    returns = data.returns()
    figure = Figure(figsize=(13, 6), layout="constrained")
    figure.suptitle(f"{data.dataset.id}: {len(data.ends):,} rows, {len(data.starts):,} episodes, {verdict}")
    left, right = figure.subplots(1, 2)
    if data.simulator.maze is not None:
        draw_paths(data, left)
    else:
        left.hist(returns, bins=40, color="tab:blue")
        left.set(xlabel="return of an episode", ylabel="episodes")
    right.hist(data.lengths, bins=40, color="tab:gray")
    right.set(xlabel="rows an episode", ylabel="episodes")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    try:
        write_bytes_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"--picture {path}: cannot write there ({error.strerror}); choose another") from None


def draw_paths(data: Data, axis: Any) -> None:
    """Up to PATHS episodes as thin lines over the walls."""
    from matplotlib.collections import LineCollection

    walls = np.where(data.simulator.maze.maze_map == 1, 1.0, np.nan)
    axis.imshow(walls, origin="lower", extent=data.simulator.maze.extent, cmap="gray", vmin=0, vmax=2)
    chosen = np.unique(np.linspace(0, len(data.starts) - 1, PATHS).astype(int))
    every = max(1, int(data.lengths[chosen].sum()) // POINTS)
    starts, lengths = data.starts[chosen], data.lengths[chosen]
    lines = [data.observations[a : a + n : every, :2] for a, n in zip(starts, lengths, strict=True)]
    axis.add_collection(LineCollection(lines, linewidths=0.4, colors="tab:blue", alpha=0.5))
    axis.plot(*data.observations[starts, :2].T, ".", color="black", markersize=3, label="start")
    axis.set_title(f"{len(chosen)} of {len(data.starts):,} episodes")
    axis.legend(loc="upper right", fontsize=8)
