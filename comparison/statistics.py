"""Means and intervals over seeds: Student's for one dataset, rliable's bootstrap (Agarwal et al., 2021) for several.

The interquartile mean is the mean of the middle half of all scores. A bootstrap interval holds the middle 95% of a
statistic over 10,000 draws of seeds, each dataset (stratum) drawn by itself.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np

DRAWS = 10_000  # of the bootstrap
LEAST_SEEDS = 3  # for an interval; two have a range


def mean(scores: np.ndarray) -> np.ndarray:
    return scores.mean(-1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: without the lowest and highest quarter, each rounded down."""
    from scipy.stats import trim_mean  # late: it takes a third of a second, and --help does without

    return trim_mean(scores, 0.25, axis=-1)


def bootstrap_interval(
    strata: Iterable[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a statistic of all scores; seeds are drawn with replacement in each stratum.

    strata: scores [seeds] of each dataset. statistic: of the last axis of an array.
    """
    generator = np.random.default_rng(seed)
    drawn = [scores[generator.integers(len(scores), size=(draws, len(scores)))] for scores in map(np.asarray, strata)]
    low, high = np.percentile(statistic(np.concatenate(drawn, axis=1)), [2.5, 97.5])
    return float(low), float(high)


def t_half_width(values: Iterable[float]) -> float:
    """Half the 95% t-interval of a mean of at least two values."""
    from scipy.stats import t as student

    found = np.asarray(list(values))
    return float(student.ppf(0.975, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))


def cell_text(scores: Iterable[float], planned: int, digits: int = 1, sign: str = "") -> str:
    """Mean and 95% t-interval of scores [seeds]; of two seeds their range, of one its score with a star.

    Scores that are all the same have no interval. The number of seeds is added where more were planned.
    """
    found, form = list(scores), f"{sign}.{digits}f"
    n, center = len(found), math.fsum(found) / len(found)
    if n == 1:
        return f"{center:{form}} *"
    if n < LEAST_SEEDS:
        return f"{center:{form}} ({min(found):{form}} to {max(found):{form}})"
    more = f" ({n} of {planned} seeds)" if n < planned else ""
    width = "" if min(found) == max(found) else f" ± {t_half_width(found):.{digits}f}"
    return f"{center:{form}}{width}{more}"
