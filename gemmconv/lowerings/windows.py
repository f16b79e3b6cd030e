"""im2col of a box of rows: for every coarse position the fine values its taps reach, side by side in a column buffer.

What convolution and the filter's gradient share. A box whose windows lie inside the fine array is copied from it as it
is, all taps in one step; others are first copied to a grid with zeros around them, or tap by tap where that grid would
be large. This module chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from numpy.lib.stride_tricks import as_strided

from gemmconv.lowerings.base import Array, Box, Range, Workspace, address, aligned, copy, five
from gemmconv.problem import Axis, Problem

Taps = tuple[Range, Range, Range]


class Windows:
    """Fills `buffer` with the columns of boxes of rows and taps, in the dtype of the sums.

    Columns lie [row, tap, channel], or with channels first [tap, channel, row].
    """

    def __init__(
        self, problem: Problem, axes: Sequence[Axis], fine: Array, workspace: Workspace, columns: int, grid: int
    ) -> None:
        self._problem, self._axes = problem, axes
        self._fine = five(problem.layout, fine, problem.batch, [axis.fine for axis in axes], problem.cout)
        self._grid = workspace.take(grid)
        self.buffer = workspace.take(columns)
        self.address = address(self.buffer)

    def open(self, rows: Box, taps: Taps) -> tuple[Array, tuple[int, ...]] | None:
        """Return an array that holds all values these rows and taps need, and the fine position where it begins.

        None if that would be too large; what the grid held before is lost.
        """
        spans = [span(axis, r, t) for axis, r, t in zip(self._axes, rows[1:], taps, strict=True)]
        fine = self._fine[slice(*rows.batch)]
        if all(start >= 0 and stop <= axis.fine for axis, (start, stop) in zip(self._axes, spans, strict=True)):
            return fine, (0, 0, 0)
        sizes = [stop - start for start, stop in spans]
        many = fine.shape[0] * math.prod(sizes) * fine.shape[4]
        if many > self._grid.size:
            return None
        grid = five(self._problem.layout, self._grid[:many], fine.shape[0], sizes, fine.shape[4])
        grid[...] = 0
        inside = [(max(0, a), min(axis.fine, b)) for axis, (a, b) in zip(self._axes, spans, strict=True)]
        if all(a < b for a, b in inside):
            to = [slice(a - start, b - start) for (a, b), (start, _) in zip(inside, spans, strict=True)]
            copy(grid[:, *to], fine[:, *(slice(a, b) for a, b in inside)])
        return grid, tuple(start for start, _ in spans)

    def copy(self, rows: Box, taps: Taps, opened: tuple[Array, tuple[int, ...]] | None) -> None:
        """Fill the buffer with the columns of a box of rows and a box of taps, from what `open` returned."""
        many = [stop - start for start, stop in taps]
        channels = self._problem.cout
        size = math.prod(rows.sizes) * math.prod(many) * channels
        # Seen as [batch, row d, h, w, tap d, h, w, channel] in either layout.
        if self._problem.layout == "NDHWC":
            columns = self.buffer[:size].reshape(*rows.sizes, *many, channels)
        else:
            columns = self.buffer[:size].reshape(*many, channels, *rows.sizes).transpose(4, 5, 6, 7, 0, 1, 2, 3)
        if opened is None:
            self._copy_taps(rows, taps, columns)
            return
        array, origin = opened
        first = [
            r[0] * axis.stride + t[0] * axis.dilation - axis.lo - start
            for axis, r, t, start in zip(self._axes, rows[1:], taps, origin, strict=True)
        ]
        b, *along, c = array.strides
        # The step along a single row or tap is never taken, and may be larger than any address.
        by_row = [n * a.stride * (size > 1) for n, a, size in zip(along, self._axes, rows.sizes[1:], strict=True)]
        by_tap = [n * a.dilation * (size > 1) for n, a, size in zip(along, self._axes, many, strict=True)]
        corner = array[:, *(slice(at, None) for at in first)]
        copy(columns, as_strided(corner, columns.shape, (b, *by_row, *by_tap, c)))

    def _copy_taps(self, rows: Box, taps: Taps, columns: Array) -> None:
        columns[...] = 0
        fine = self._fine[slice(*rows.batch)]
        for tap in product(*(range(*t) for t in taps)):
            to, source = [], []
            for axis, a, (start, stop) in zip(self._axes, tap, rows[1:], strict=True):
                shift = a * axis.dilation - axis.lo
                first = max(start, -(shift // axis.stride))
                last = max(first, min(stop, (axis.fine - 1 - shift) // axis.stride + 1))
                to.append(slice(first - start, last - start))
                at = first * axis.stride + shift
                source.append(slice(at, at + (last - first) * axis.stride, axis.stride) if first < last else slice(0))
            d, h, w = (a - start for a, (start, _) in zip(tap, taps, strict=True))
            copy(columns[..., d, h, w, :][:, *to], fine[:, *source])


def span(axis: Axis, rows: Range, taps: Range) -> Range:
    """Return the fine positions, outside of the array too, that some rows reach with some taps."""
    first = rows[0] * axis.stride + taps[0] * axis.dilation - axis.lo
    return first, first + (rows[1] - rows[0] - 1) * axis.stride + (taps[1] - taps[0] - 1) * axis.dilation + 1


def inside(axis: Axis) -> bool:
    """Whether all windows of an axis lie inside the fine array, so that none has zeros."""
    start, stop = span(axis, (0, axis.coarse), (0, axis.kernel))
    return start >= 0 and stop <= axis.fine


def grid_values(axes: Sequence[Axis], rows: Sequence[int], taps: Sequence[int]) -> int:
    """Return the positions of a grid for so many rows and taps along each axis."""
    return math.prod((n - 1) * a.stride + (k - 1) * a.dilation + 1 for a, n, k in zip(axes, rows, taps, strict=True))


def workspace_bytes(values: Sequence[int], item: int) -> int:
    """Return the bytes of arrays of so many values."""
    return sum(aligned(n * item) for n in values)
