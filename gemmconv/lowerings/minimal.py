"""Minimal filtering: F(2,2) and F(2,3), two neighbouring results of 2 or 3 taps for 3 or 4 products.

For y[q] = sum over j of x[q+j] * g[j], the results y[0] and y[1] are, with the points 0, 1, (-1,) and infinity,

    2 taps: z = (x0-x1)*g0, x1*(g0+g1), (x2-x1)*g1;                y = z0+z1, z1+z2
    3 taps: z = (x0-x2)*g0, (x1+x2)*(g0+g1+g2)/2, (x2-x1)*(g0-g1+g2)/2, (x1-x3)*g2;    y = z0+z1+z2, z1-z2-z3

so y[0] depends on none but x0 to x1 (or x2), and y[1] on none but x1 to x2 (or x3), even where sums cancel.

Source: S. Winograd, Arithmetic Complexity of Computations, SIAM 1980; for convolutional networks A. Lavin and S. Gray,
arXiv:1509.09308.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from gemmconv.lowerings.base import Array
from gemmconv.lowerings.phases import phases
from gemmconv.problem import Axis

RESULTS = 2
_MOST_TAPS = 3


class Line(NamedTuple):
    """The taps of one phase (slot) along the filtered axis, in the order of the rows they need."""

    slot: int
    taps: tuple[int, ...]
    first: int  # the row that the first tap needs for q = 0
    apart: int = 1  # from the row of one tap to the row of the next
    results: int = RESULTS  # that are formed together: one along an axis that is a single point

    @property
    def points(self) -> int:
        return len(self.taps) + self.results - 1

    @property
    def filters(self) -> int:
        """How many filters the points have: a single tap is the same for all of them."""
        return self.points if len(self.taps) > 1 else 1


def lines_of(axis: Axis) -> tuple[Line, ...] | None:
    """Return the taps of every phase of an axis, or None where minimal filtering does not fit them or gains nothing.

    Taps of all phases are as far apart.
    """
    found = []
    for i, phase in enumerate(phases(axis)):
        taps = sorted((-shift, tap) for tap, shift in phase.taps)
        found.append((i, tuple(tap for _, tap in taps), [row for row, _ in taps]))
    steps = {b - a for _, _, rows in found for a, b in pairwise(rows)}
    if len(steps) != 1 or max(len(taps) for _, taps, _ in found) > _MOST_TAPS:
        return None
    (apart,) = steps
    return tuple(Line(i, taps, rows[0], apart) for i, taps, rows in found)


def combine_taps(g: Sequence[Array], u: Array) -> None:
    """Combine taps, in the order of their rows, to a filter for each point; a single tap stays as it is."""
    np.copyto(u[0], g[0], casting="unsafe")
    if len(g) == 1:
        return
    np.copyto(u[-1], g[-1], casting="unsafe")
    np.add(u[0], u[-1], out=u[1])
    if len(g) == 3:
        u[1] *= 0.5
        half = g[1].astype(u.dtype) * u.dtype.type(0.5)
        np.subtract(u[1], half, out=u[2])
        u[1] += half


def combine_rows(x: Sequence[Array], v: Sequence[Array]) -> None:
    """Combine rows of the value, x0, x1, ... of every tile, to rows for each point."""
    if len(v) == RESULTS:
        for to, source in zip(v, x, strict=True):
            np.copyto(to, source)
        return
    a, b, c = x[:3]
    if len(v) == 3:
        np.subtract(a, b, out=v[0])
        np.copyto(v[1], b)
        np.subtract(c, b, out=v[2])
        return
    d = x[3]
    np.subtract(a, c, out=v[0])
    np.add(b, c, out=v[1])
    np.subtract(c, b, out=v[2])
    np.subtract(b, d, out=v[3])


def combine_sums(z: Sequence[Array]) -> None:
    """Combine the sums of the points to the two results of every tile, in place of the first two."""
    if len(z) <= RESULTS:
        return
    z[0] += z[1]
    if len(z) == 3:
        z[1] += z[2]
        return
    z[0] += z[2]
    z[1] -= z[2]
    z[1] -= z[3]
