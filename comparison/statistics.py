"""Means, interquartile means and intervals over seeds, as rliable defines them (Agarwal et al., 2021).

The interquartile mean is the mean of the middle half of all scores. An interval holds the middle 95% of a statistic
over 10,000 bootstrap draws of seeds, each dataset (stratum) drawn by itself. A few seeds give few different draws, so
that it is rather too narrow. Two seeds give no more than their range, which is written as one, and one gives nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

DRAWS = 10_000  # of the bootstrap
LEAST_SEEDS = 3  # for an interval; of two seeds a bootstrap's ends are the two scores
IQM_SEEDS = 4  # of fewer, the interquartile mean is the mean


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: without the lowest and highest quarter, each rounded down.

    Of fewer than four scores nothing is left out, and it is their mean.
    """
    ordered = np.sort(scores, axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return np.asarray(scores).mean(-1)


def bootstrap_interval(
    strata: Iterable[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a statistic of all scores, seeds drawn with replacement within each stratum.

    Args:
        strata: scores [seeds] of each dataset.
        statistic: of the last axis of an array.

    Returns the ends, nan where a stratum has fewer than two seeds.
    """
    generator, drawn = np.random.default_rng(seed), []
    for scores in map(np.asarray, strata):
        if len(scores) < 2:
            return math.nan, math.nan
        drawn.append(scores[generator.integers(len(scores), size=(draws, len(scores)))])
    low, high = np.percentile(statistic(np.concatenate(drawn, axis=1)), [2.5, 97.5])
    return float(low), float(high)


def score_range(strata: Iterable[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """The statistic of every stratum's lowest score, and of every one's highest: no draw of seeds lies beyond them."""
    strata = [np.asarray(scores) for scores in strata]
    low, high = (np.concatenate([np.full(len(s), end(s)) for s in strata]) for end in (np.min, np.max))
    return float(statistic(low)), float(statistic(high))


def t_half_width(values: Iterable[float]) -> float:
    """Half the 95% t-interval of a mean; nan for fewer than two values."""
    from scipy.stats import t as student  # late: it takes a third of a second, and --help does without

    found = np.asarray(list(values))
    if len(found) < 2:
        return math.nan
    return float(student.ppf(0.975, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))


def paired_interval(gains: np.ndarray) -> tuple[float, float]:
    """95% t-interval of a mean gain over seeds; nan with fewer than three, or where all are the same.

    Equal gains say that scores move in steps, as antmaze's do, not that nothing varies. With three seeds a bootstrap
    would be far too sure.
    """
    if len(gains) < LEAST_SEEDS or np.ptp(gains) == 0:
        return math.nan, math.nan
    center, half = float(np.mean(gains)), t_half_width(gains)
    return center - half, center + half


def across_seeds(runs: list[dict[str, list[float]]], column: str) -> dict[str, np.ndarray]:
    """A column of every seed's metrics where all logged it: x, mean, and the ends of its interval, [T] each.

    The ends are bootstrap intervals of the mean, 500 draws; nan with one seed.
    """
    pairs = [zip(run["step"], run.get(column, []), strict=False) for run in runs]
    tables = [{step: value for step, value in found if math.isfinite(value)} for found in pairs]
    steps = sorted(set.intersection(*map(set, tables)))
    values = np.array([[table[step] for step in steps] for table in tables])
    low = high = np.full(len(steps), math.nan)
    if len(runs) > 1 and steps:
        rows = np.random.default_rng(0).integers(len(runs), size=(500, len(runs)))
        low, high = np.percentile(values[rows].mean(1), [2.5, 97.5], axis=0)
    return {"x": np.array(steps, dtype=float), "mean": values.mean(0), "low": low, "high": high}
