"""The chart of a dataset in report.html."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from comparison.statistics import across_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (  # label of the y axis, column of metrics.csv, scale
    ("score", "eval/actor_{}/deterministic/score", "linear"),
    ("Q", "chain/actor_{}/q", "linear"),
    ("energy won by the step", "chain/actor_{}/energy_won", "linear"),
    ("distance moved", "chain/actor_{}/distance", "log"),
    ("spread of samples", "chain/actor_{}/spread", "log"),
)


def draw(axis: Axes, group: Any, column: str) -> bool:
    """A column's curves over updates, one an actor with the band of its interval; whether there is one."""
    drawn = False
    for actor in range(group.actors):
        curve = across_seeds([result.metrics for result in group.results], column.format(actor))
        if np.any(curve["mean"] != 0):  # 0 has no place on a logarithmic axis
            marker = "o" if len(curve["x"]) < 10 else ""
            axis.plot(curve["x"], curve["mean"], color=f"C{actor}", marker=marker, markersize=3)
            axis.fill_between(curve["x"], curve["low"], curve["high"], color=f"C{actor}", alpha=0.16, linewidth=0)
            drawn = True
    return drawn


def dataset_chart(groups: list) -> str:
    """An <img> of a dataset's curves: a column for each list of weights, a row for each of PANELS."""
    from matplotlib.figure import Figure  # late, as --help draws nothing
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(0.8 + 3 * len(groups), 0.8 + 1.7 * len(PANELS)), layout="constrained")
    axes = figure.subplots(len(PANELS), len(groups), sharex=True, sharey="row", squeeze=False)
    for row, (name, column, scale) in zip(axes, PANELS, strict=True):
        drawn = [draw(axis, group, column) for axis, group in zip(row, groups, strict=True)]
        for axis, group, any_line in zip(row, groups, drawn, strict=True):
            axis.set_yscale(scale)
            axis.grid(alpha=0.3)
            if not any_line:
                axis.text(0.5, 0.5, "0, or not logged", ha="center", transform=axis.transAxes, color="0.5")
            elif name == "score":
                data = group.mean(lambda result: result.summary["data_score"])
                axis.axhline(data, color="0.4", linestyle="--", linewidth=1)
            elif name.startswith("energy"):
                axis.axhline(0, color="0.4", linewidth=1)
        row[0].set_ylabel(name)
    for axis, group in zip(axes[0], groups, strict=True):
        axis.set_title(f"w2_weights {group.run.label}", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("updates")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.align_ylabels()
    actors = range(max(group.actors for group in groups))
    keys = [Line2D([], [], color=f"C{actor}", label=f"actor {actor}") for actor in actors]
    keys.append(Line2D([], [], color="0.4", linestyle="--", linewidth=1, label="the data"))
    figure.legend(handles=keys, loc="outside upper left", ncols=min(len(keys), 2 + 3 * (len(groups) > 1)), fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, transparent=True)
    words, width = html.escape(f"curves of {groups[0].run.dataset}"), round(96 * figure.get_figwidth())
    picture = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{words}" width="{width}" src="data:image/png;base64,{picture}">'
