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
from typing import NamedTuple

import numpy as np

from gemmconv.lowerings.base import Array
from gemmconv.lowerings.phases import slots
from gemmconv.problem import Axis

RESULTS = 2


class Line(NamedTuple):
    """The taps of one slot along the filtered axis, in the order of the rows they need."""

    slot: int
    taps: tuple[int, ...]
    first: int  # the row that the first tap needs for q = 0

    @property
    def points(self) -> int:
        return len(self.taps) + 1


def lines_of(axis: Axis) -> tuple[Line, ...] | None:
    """Return the taps of every slot of an axis, or None where minimal filtering does not fit them or gains nothing."""
    of_axis = slots(axis, tiled=False)
    found = []
    for slot in range(len(of_axis.offsets)):
        taps = sorted((-move.shift, move.tap) for move in of_axis.within((slot, slot + 1)))
        rows = [row for row, _ in taps]
        if len(taps) not in (2, 3) or rows != list(range(rows[0], rows[0] + len(rows))):
            return None
        found.append(Line(slot, tuple(tap for _, tap in taps), rows[0]))
    return tuple(found) or None


def combine_taps(g: Sequence[Array], u: Array) -> None:
    """Combine taps, in the order of their rows, to a filter for each point."""
    np.copyto(u[0], g[0], casting="unsafe")
    np.copyto(u[-1], g[-1], casting="unsafe")
    np.add(u[0], u[-1], out=u[1])
    if len(g) == 3:
        u[1] *= 0.5
        half = g[1].astype(u.dtype) * u.dtype.type(0.5)
        np.subtract(u[1], half, out=u[2])
        u[1] += half


def combine_rows(x: Array, v: Sequence[Array]) -> None:
    """Combine rows of the value, along the first axis, to rows for each point."""
    tiles = len(v[0])
    a, b, c = (x[i : i + 2 * tiles - 1 : 2] for i in range(3))
    if len(v) == 3:
        np.subtract(a, b, out=v[0])
        np.copyto(v[1], b)
        np.subtract(c, b, out=v[2])
        return
    d = x[3 : 3 + 2 * tiles - 1 : 2]
    np.subtract(a, c, out=v[0])
    np.add(b, c, out=v[1])
    np.subtract(c, b, out=v[2])
    np.subtract(b, d, out=v[3])


def combine_sums(z: Sequence[Array]) -> None:
    """Combine the sums of the points to the two results of every tile, in place of the first two."""
    z[0] += z[1]
    if len(z) == 3:
        z[1] += z[2]
        return
    z[0] += z[2]
    z[1] -= z[2]
    z[1] -= z[3]
