"""Minimal filtering: F(2,2) and F(2,3), two neighbouring results of 2 or 3 taps for 3 or 4 products.

For y[q] = sum over j of x[q+j] * g[j], the results y[0] and y[1] are, with the points 0, infinity, -1 (and 1),

    2 taps: z = (x0+x1)*g0, (x1+x2)*g1, x1*(g1-g0);                                         y = z0+z2, z1-z2
    3 taps: z = (x0-x2)*g0, (x3-x1)*g2, (x2-x1)*(g0-g1+g2)/2, (x1+x2)*(g0+g1+g2)/2;         y = z0+z2+z3, z1-z2+z3

so y[0] depends on none but x0 to x1 (or x2), and y[1] on none but x1 to x2 (or x3), even where sums cancel. A single
tap has the first two points, x0*g0 and x1*g0, so that taps of several phases can be added up point by point.

Source: S. Winograd, Arithmetic Complexity of Computations, SIAM 1980; for convolutional networks A. Lavin and S. Gray,
arXiv:1509.09308.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from gemmconv.lowerings.base import Array
from gemmconv.lowerings.boxes import Range
from gemmconv.lowerings.phases import phases
from gemmconv.problem import Axis

RESULTS = 2
_MOST_TAPS = 3
# What taps are combined to, by their number.
_COMBINED = {
    1: [[1.0]],
    2: [[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]],
    3: [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.5, -0.5, 0.5], [0.5, 0.5, 0.5]],
}


class Line(NamedTuple):
    """Taps of one phase (slot) along the filtered axis, in the order of the rows they need."""

    slot: int
    taps: tuple[int, ...]
    first: int  # the row that the first tap needs for q = 0
    apart: int = 1  # from the row of one tap to the row of the next
    results: int = RESULTS  # that are formed together: one along an axis that is not filtered

    @property
    def points(self) -> int:
        return len(self.taps) + self.results - 1

    @property
    def filters(self) -> int:
        """How many filters the points have: a single tap is the same for all of them."""
        return self.points if len(self.taps) > 1 else 1


def lines_of(axis: Axis, *, gathers: bool = False, results: int = RESULTS) -> tuple[Line, ...]:
    """Return the taps of every phase of an axis, or nothing where minimal filtering gains nothing.

    Many taps of a phase are several lines, whose sums are added up. With `gathers` rows are those that a convolution
    takes.
    """
    longest = max((len(phase.taps) for phase in phases(axis)), default=0)
    if results > 1 and longest < RESULTS:
        return ()
    apart = axis.dilation // math.gcd(axis.dilation, axis.stride) if longest > 1 else 1
    lines = []
    for slot, phase in enumerate(phases(axis)):
        rows, taps = zip(*sorted((shift if gathers else -shift, tap) for tap, shift in phase.taps), strict=True)
        for first, last in _pieces(len(taps)) if results > 1 else [(0, len(taps))]:
            lines.append(Line(slot, taps[first:last], rows[first], apart, results))
    return tuple(lines)


def _pieces(taps: int) -> Iterator[Range]:
    """Yield the pieces in which taps are filtered: of three, or of two rather than of a single one at the end."""
    first = 0
    while first < taps:
        left = taps - first
        last = first + (left if left <= _MOST_TAPS else 2 if left == 4 else _MOST_TAPS)
        yield first, last
        first = last


def combine_rows(x: Sequence[Array], v: Sequence[Array]) -> None:
    """Combine rows of the value, x0, x1, ... of every tile, to rows for each point."""
    if len(v) == RESULTS:
        for to, source in zip(v, x, strict=True):
            np.copyto(to, source)
    elif len(v) == RESULTS + 1:
        np.add(x[0], x[1], out=v[0])
        np.add(x[1], x[2], out=v[1])
        np.copyto(v[2], x[1])
    else:
        np.subtract(x[0], x[2], out=v[0])
        np.subtract(x[3], x[1], out=v[1])
        np.subtract(x[2], x[1], out=v[2])
        np.add(x[1], x[2], out=v[3])


def sums_matrix(first: Line, second: Line, dtype: np.dtype[Any]) -> Array:
    """Return the matrix that combines the sums of points [point, point] to results, and adds one row more to each.

    It holds 0, 1 and -1 only: products with it round no other than additions.
    """
    return _sums_matrix((first.results, first.points), (second.results, second.points), dtype)


def points_matrix(first: Line, second: Line, dtype: np.dtype[Any]) -> Array:
    """Return the matrix that combines the results [result, result] of a tile to points: `sums_matrix` turned."""
    return _points_matrix((first.results, first.points), (second.results, second.points), dtype)


def taps_matrix(first: Line, second: Line, dtype: np.dtype[Any]) -> Array:
    """Return the matrix that combines the taps [tap, tap] of two lines, in the order of their rows, to filters."""
    return _taps_matrix(len(first.taps), len(second.taps), dtype)


def gradient_matrix(first: Line, second: Line, dtype: np.dtype[Any]) -> Array:
    """Return the matrix that combines the gradients of points' filters to those of taps: `taps_matrix` turned."""
    return _gradient_matrix(len(first.taps), len(second.taps), dtype)


@lru_cache(maxsize=64)
def _sums_matrix(first: tuple[int, int], second: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    along = []
    for n, points in (first, second):
        of_line = np.eye(n, points, dtype=dtype)
        of_line[:, n:] = np.array([[1, 1], [-1, 1]])[:n, : points - n]
        along.append(of_line)
    both = np.kron(*along)
    return _constant(np.concatenate([both, np.ones((len(both), 1), dtype)], axis=1))


@lru_cache(maxsize=64)
def _points_matrix(first: tuple[int, int], second: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    return _constant(_sums_matrix(first, second, dtype)[:, :-1].T)


@lru_cache(maxsize=64)
def _taps_matrix(first: int, second: int, dtype: np.dtype[Any]) -> Array:
    return _constant(np.kron(*(np.array(_COMBINED[taps], dtype) for taps in (first, second))))


@lru_cache(maxsize=64)
def _gradient_matrix(first: int, second: int, dtype: np.dtype[Any]) -> Array:
    return _constant(_taps_matrix(first, second, dtype).T)


def _constant(array: Array) -> Array:
    """Return a contiguous array that recorded steps may keep."""
    found = np.ascontiguousarray(array)
    found.flags.writeable = False
    return found
