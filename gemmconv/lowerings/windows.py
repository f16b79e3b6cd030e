"""im2col of a box of rows: for every coarse position the fine values its taps reach, side by side in a column buffer.

What convolution and the filter's gradient share. A box whose windows lie inside the fine array is copied from it as it
is, all taps in one step; others are first copied to a grid with zeros around them, or tap by tap where that grid would
be large. This module chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gemmconv.lowerings.base import Array, Workspace, address, aligned, five
from gemmconv.lowerings.boxes import Box, Index, Range
from gemmconv.lowerings.copies import copy
from gemmconv.lowerings.phases import reached
from gemmconv.problem import Axis, Problem

Taps = tuple[Range, Range, Range]


class Opened(NamedTuple):
    """What holds the values of some windows, [batch, d, h, phase, w, channel], and the fine position where it begins.

    Values of width lie apart by their phase: their position modulo the number of phases, which is 1 or the stride.
    """

    array: Array
    origin: tuple[int, int, int]
    whole: bool = True  # whether it holds all values: else those that are missing are 0


class Opening(NamedTuple):
    """How a grid is filled."""

    opened: Opened
    outside: list[Array]  # what is 0
    copies: list[tuple[Array, Index]]  # of the fine array


class Windows:
    """Fills `buffer` with the columns of boxes of rows and taps, in the dtype of the sums.

    Columns lie [row, tap, channel], or with `tap_major` [tap, channel, row]: then values are first copied to a grid
    with channels first and phases of width apart, if that is not how they lie, so that rows are copied as whole lines.
    """

    def __init__(
        self, problem: Problem, axes: Sequence[Axis], workspace: Workspace, columns: int, grid: int, tap_major: bool
    ) -> None:
        self._problem, self._axes, self._tap_major = problem, axes, tap_major
        self._grid = workspace.take(grid)
        self.buffer = workspace.take(columns)
        self.address = address(self.buffer)

    def open(self, fine: Array, rows: Box, taps: Taps) -> Opened:
        """Return what holds the values of the first operand that these rows and taps need.

        What the grid held before is lost. Where it would be too large the operand itself is returned.
        """
        fine = five(self._problem.layout, fine, self._problem.batch, [a.fine for a in self._axes], self._problem.cout)
        opening = self._opening(rows, taps)
        if isinstance(opening, bool):
            return Opened(fine[slice(*rows.batch), :, :, np.newaxis], (0, 0, 0), opening)
        for part in opening.outside:
            part[...] = 0
        for to, source in opening.copies:
            copy(to, fine[source])
        return opening.opened

    def _opening(self, rows: Box, taps: Taps) -> Opening | bool:
        """Return how a grid is filled, or without one whether windows lie inside the fine array."""
        spans = [span(axis, r, t) for axis, r, t in zip(self._axes, rows[1:], taps, strict=True)]
        whole = all(start >= 0 and stop <= axis.fine for axis, (start, stop) in zip(self._axes, spans, strict=True))
        if whole and not rearranges(self._problem, self._axes[2], self._tap_major):
            return True
        apart = phases_apart(self._axes[2], self._tap_major)
        d, h, w = (stop - start for start, stop in spans)
        sizes = rows.sizes[0], d, h, apart, -(-w // apart), self._problem.cout
        many = math.prod(sizes)
        if many > self._grid.size:
            return whole
        if self._tap_major:
            grid = self._grid[:many].reshape(sizes[0], sizes[5], *sizes[1:5]).transpose(0, 2, 3, 4, 5, 1)
        else:
            grid = self._grid[:many].reshape(sizes)
        opened = Opened(grid, (spans[0][0], spans[1][0], spans[2][0]))
        inside = [(max(0, a), min(axis.fine, b)) for axis, (a, b) in zip(self._axes, spans, strict=True)]
        if any(a >= b for a, b in inside):
            return Opening(opened, [grid], [])
        to_d, to_h, to_w = (slice(a - start, b - start) for (a, b), start in zip(inside, opened.origin, strict=True))
        from_d, from_h, (from_w, stop_w) = slice(*inside[0]), slice(*inside[1]), inside[2]
        outside = [grid[:, : to_d.start], grid[:, to_d.stop :], grid[:, to_d, : to_h.start], grid[:, to_d, to_h.stop :]]
        copies: list[tuple[Array, Index]] = []
        for phase in range(apart):
            line = grid[:, to_d, to_h, phase]
            first = (phase - to_w.start) % apart  # of the values inside, the first in the phase
            at, length = (to_w.start + first) // apart, len(range(from_w + first, stop_w, apart))
            outside += [line[:, :, :, :at], line[:, :, :, at + length :]]
            where = slice(*rows.batch), from_d, from_h, slice(from_w + first, stop_w, apart)
            copies.append((line[:, :, :, at : at + length], where))
        return Opening(opened, [part for part in outside if part.size], copies)

    def copy(self, rows: Box, taps: Taps, opened: Opened) -> None:
        """Fill the buffer with the columns of a box of rows and a box of taps, from what `open` returned."""
        for to, source in self._columns(rows, taps, opened):
            copy(to, source)

    def _columns(self, rows: Box, taps: Taps, opened: Opened) -> list[tuple[Array, Array]]:
        """Return the columns of some windows, and where they are copied from."""
        many = [stop - start for start, stop in taps]
        channels = self._problem.cout
        size = math.prod(rows.sizes) * math.prod(many) * channels
        # Seen as [batch, row d, h, w, tap d, h, w, channel] in either order.
        if self._tap_major:
            columns = self.buffer[:size].reshape(*many, channels, *rows.sizes).transpose(4, 5, 6, 7, 0, 1, 2, 3)
        else:
            columns = self.buffer[:size].reshape(*rows.sizes, *many, channels)
        if not opened.whole:
            columns[...] = 0
            return self._by_tap(rows, taps, columns, opened.array[:, :, :, 0])
        array = opened.array
        d, h, w = (
            r[0] * axis.stride + t[0] * axis.dilation - axis.lo - start
            for axis, r, t, start in zip(self._axes, rows[1:], taps, opened.origin, strict=True)
        )
        of_b, of_d, of_h, _, of_w, of_c = array.strides
        apart, (_, _, width) = array.shape[3], self._axes
        # Taps of width that are so many apart lie in the same phase.
        each = apart // math.gcd(apart, width.dilation)
        # The step along a single row or tap is never taken, and may be larger than any address.
        steps = [
            n * a.stride * (size > 1) for n, a, size in zip((of_d, of_h), self._axes, rows.sizes[1:], strict=False)
        ]
        steps += [of_w * (width.stride // apart) * (rows.sizes[3] > 1)]
        steps += [n * a.dilation * (size > 1) for n, a, size in zip((of_d, of_h), self._axes, many, strict=False)]
        found = []
        for tap in range(min(each, many[2])):
            at = w + tap * width.dilation
            to = columns[..., tap::each, :]
            by_tap = of_w * (each * width.dilation // apart) * (to.shape[6] > 1)
            corner = array[:, d:, h:, at % apart, at // apart :]
            found.append((to, as_strided(corner, to.shape, (of_b, *steps, by_tap, of_c), subok=True)))
        return found

    def _by_tap(self, rows: Box, taps: Taps, columns: Array, fine: Array) -> list[tuple[Array, Array]]:
        """Return the columns of every tap whose values lie inside the fine array, and where those are."""
        found = []
        for tap in product(*(range(*t) for t in taps)):
            to, source = zip(*map(reached, self._axes, tap, rows[1:]), strict=True)
            d, h, w = (a - start for a, (start, _) in zip(tap, taps, strict=True))
            found.append((columns[..., d, h, w, :][:, *to], fine[:, *source]))
        return found


def span(axis: Axis, rows: Range, taps: Range) -> Range:
    """Return the fine positions, outside of the array too, that some rows reach with some taps."""
    first = rows[0] * axis.stride + taps[0] * axis.dilation - axis.lo
    return first, first + (rows[1] - rows[0] - 1) * axis.stride + (taps[1] - taps[0] - 1) * axis.dilation + 1


def inside(axis: Axis) -> bool:
    """Whether all windows of an axis lie inside the fine array, so that none has zeros."""
    start, stop = span(axis, (0, axis.coarse), (0, axis.kernel))
    return start >= 0 and stop <= axis.fine


def phases_apart(width: Axis, tap_major: bool) -> int:
    """Return how many phases of width lie apart in a grid."""
    return width.stride if tap_major else 1


def rearranges(problem: Problem, width: Axis, tap_major: bool) -> bool:
    """Whether values are copied to a grid even where all windows lie inside the fine array."""
    return tap_major and (width.stride > 1 or problem.layout == "NDHWC")


def grid_values(axes: Sequence[Axis], rows: Sequence[int], taps: Sequence[int], apart: int = 1) -> int:
    """Return the positions of a grid for so many rows and taps along each axis."""
    d, h, w = ((n - 1) * a.stride + (k - 1) * a.dilation + 1 for a, n, k in zip(axes, rows, taps, strict=True))
    return d * h * -(-w // apart) * apart


def workspace_bytes(values: Sequence[int], item: int) -> int:
    """Return the bytes of arrays of so many values."""
    return sum(aligned(n * item) for n in values)
