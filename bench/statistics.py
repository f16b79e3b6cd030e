"""Medians, spreads, ratios with intervals, their geometric mean, and signs of noise.

Calls of one visit share what the machine did in those milliseconds, so they count as one observation, their median.
The ratio of two rows is the interquartile mean of the rounds' log ratios: neighbours in time share more than strangers,
a disturbed round is left out, and the mean of the middle half scatters less than the median. Rounds are resampled for
its interval. Rounds of one launch share where the memory of their processes lies, which resampling rounds cannot show:
its part is estimated from all rows of a run together, and added. Nothing here knows of contenders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DRAWS = 4000
FEWEST_ROUNDS = 3
MOST_SPREAD = 0.10
MOST_DRIFT = 0.05


@dataclass(frozen=True)
class Series:
    """One row's visits, a list of seconds each, and the launch that each belongs to."""

    visits: Sequence[Sequence[float]]
    launches: Sequence[int]

    @property
    def medians(self) -> Array:
        """One number for each visit."""
        return np.array([np.median(calls) for calls in self.visits])

    @property
    def median(self) -> float:
        """The median of the visits' medians."""
        return float(np.median(self.medians))

    @property
    def spread(self) -> float:
        """The interquartile range of the visits, as a part of their median."""
        low, middle, high = np.percentile(self.medians, [25, 50, 75])
        return float((high - low) / middle)


Pair = tuple[Series, Series]


def middle(values: Array) -> Array:
    """Return the interquartile mean along the last axis: of what is left without the highest and lowest quarter."""
    without = values.shape[-1] // 4
    found: Array = np.sort(values)[..., without : values.shape[-1] - without].mean(axis=-1)
    return found


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval; `low` and `high` are None where there are too few rounds for one."""

    estimate: float
    low: float | None
    high: float | None

    @property
    def contains_one(self) -> bool:
        """Whether the two sides cannot be told apart."""
        return self.low is None or self.high is None or self.low <= 1 <= self.high

    @property
    def width(self) -> float | None:
        """As a part of the estimate."""
        return None if self.low is None or self.high is None else (self.high - self.low) / self.estimate


def launch_deviation(pairs: Sequence[Pair]) -> float:
    """The standard deviation, from launch to launch, of a log ratio, beyond what its rounds explain.

    For each row, the variance of the launches' means less the variance that a mean of such rounds has. The median of
    the rows is taken, since a few that were hit by someone else's work would decide a mean; a median of variances lies
    below their mean by what Wilson and Hilferty's approximation of chi-squared says.
    """
    beyond, freedom = [], []
    for a, b in pairs:
        logs = np.log(a.medians) - np.log(b.medians)
        groups = [logs[np.equal(a.launches, launch)] for launch in sorted(set(a.launches))]
        if len(groups) < 2 or min(map(len, groups)) < 2:
            continue
        within = np.mean([group.var(ddof=1) / len(group) for group in groups])
        beyond.append(np.var([group.mean() for group in groups], ddof=1) - within)
        freedom.append(len(groups) - 1)
    if not beyond:
        return 0.0
    below = (1 - 2 / (9 * float(np.median(freedom)))) ** 3
    return math.sqrt(max(0.0, float(np.median(beyond)) / below))


def log_ratio(pair: Pair, paired: bool = True) -> float:
    """Return the estimate: of the rounds' log ratios, or of each side alone if they are not `paired`."""
    a, b = (np.log(side.medians) for side in pair)
    return float(middle(a - b) if paired else middle(a) - middle(b))


def log_ratios(pair: Pair, deviation: float = 0.0, paired: bool = True, seed: int = 0) -> Array:
    """Bootstrap draws of `log_ratio`; `deviation` is `launch_deviation`'s, divided here by the launches."""
    a, b = (np.log(side.medians) for side in pair)
    rng = np.random.default_rng(seed)
    first = rng.integers(len(a), size=(DRAWS, len(a)))
    if paired:
        draws = middle((a - b)[first])
    else:
        draws = middle(a[first]) - middle(b[rng.integers(len(b), size=(DRAWS, len(b)))])
    launches = min(len(set(side.launches)) for side in pair)
    return draws + rng.normal(0, deviation / math.sqrt(launches), DRAWS)


def ratio(pair: Pair, confidence: float, deviation: float = 0.0, paired: bool = True) -> Interval:
    """How many times as fast the second is as the first, with a bootstrap interval."""
    return geometric_mean([pair], confidence, deviation, paired)


def geometric_mean(pairs: Sequence[Pair], confidence: float, deviation: float = 0.0, paired: bool = True) -> Interval:
    """The geometric mean of the ratios of some rows; its interval is that of the measurement, for these very rows."""
    estimate = math.exp(sum(log_ratio(pair, paired) for pair in pairs) / len(pairs))
    if min(min(len(a.visits), len(b.visits)) for a, b in pairs) < FEWEST_ROUNDS:
        return Interval(estimate, None, None)
    draws: Array = np.zeros(DRAWS)
    for seed, pair in enumerate(pairs):  # rows are independent of each other
        draws += log_ratios(pair, deviation, paired, seed)
    tail = (1 - confidence) / 2
    low, high = np.exp(np.quantile(draws / len(pairs), [tail, 1 - tail]))
    return Interval(estimate, float(min(low, estimate)), float(max(high, estimate)))


def noise(series: Series) -> list[str]:
    """What is suspicious about a row: a wide spread, or a drift from the first half of the visits to the second."""
    found = []
    values = series.medians
    if len(values) >= 4:
        if (wide := series.spread) > MOST_SPREAD:
            found.append(f"spread {wide:.0%} of the median")
        half = len(values) // 2
        drift = float(np.median(values[-half:]) / np.median(values[:half]) - 1)
        if abs(drift) > MOST_DRIFT:
            found.append(f"second half {drift:+.0%} against the first")
    return found
