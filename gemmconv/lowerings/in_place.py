"""col2im where columns are the output: a kernel as large as its stride, channels last.

Nothing overlaps then and nothing is cut off, so the taps of width and the channels of one coarse position lie side by
side in the output, and a line of positions is a matrix of it. The small products of all lines of a block and all taps
of depth and height are formed there in one step (products.py), of a filter that was turned to tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gemmconv.lowerings.base import Array, AsItLies, CannotLowerError, Operands, Workspace, canonical, five
from gemmconv.lowerings.boxes import Bounds, Cut, Range, digit, located
from gemmconv.lowerings.columns import turn
from gemmconv.lowerings.cost import (
    SMALLEST_BUFFER,
    SPILLED_VALUE_S,
    TURNED_VALUE_S,
    best,
    packing_s,
    pass_s,
    unpacked_s,
)
from gemmconv.lowerings.products import LARGEST, largest_rows, tile_columns, unpacked
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Of the L2 cache: blocks of the output that are weighed.
_SHARES = (0.5, 1.0, 2.0)


class Block(NamedTuple):
    """A box of rows of the value, with whole lines."""

    batch: Range
    depth: Range
    height: Range


@dataclass(frozen=True, slots=True)
class InPlace(AsItLies):
    """A schedule; see the module."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    cuts: tuple[Cut, Cut, Cut]  # of batch, depth and height of the value
    columns: int  # of the filter's tiles

    largest_product = LARGEST

    @property
    def count(self) -> int:
        return math.prod(map(len, self.cuts))

    @property
    def digits(self) -> list[list[Bounds]]:
        batch, *spatial = self.cuts
        spans = zip((1, 2), self.axes, spatial, strict=False)
        return [
            digit(0, batch),
            *(digit(i, ((axis.stride * p, axis.stride * q) for p, q in cut)) for i, axis, cut in spans),
        ]

    def block(self, index: int) -> Block:
        """Return a block."""
        _, spans = located(index, self.cuts)
        return Block(*spans)

    @property
    def packed_values(self) -> int:
        return math.prod(self.problem.filter_shape)

    def pack(self, filter: Array, packed: Array) -> None:
        """Turn the filter."""
        turn(filter, packed, self.columns, 0, 1)

    def pack_part(self, filter: Array, packed: Array, part: int, parts: int, workspace: Workspace) -> None:
        """Turn some tiles of the filter."""
        turn(filter, packed, self.columns, part, parts)

    @property
    def workspace_bytes(self) -> int:
        return 0

    @property
    def _lanes(self) -> int:
        """Taps of width times channels."""
        return self.axes[2].kernel * self.problem.cout

    @property
    def _values(self) -> int:
        """The most values that a block writes."""
        rows = math.prod(cut.longest for cut in self.cuts) * self.axes[2].coarse
        return rows * math.prod(self.problem.kernel) * self.problem.cout

    @property
    def reason(self) -> str:
        rows = math.prod(cut.longest for cut in self.cuts) * self.axes[2].coarse
        return f"nothing overlaps: products of all taps formed in the output, {rows} rows together, filter packed"

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        values = math.prod(self.problem.fine_shape)
        spilled = self._values * self.problem.compute_dtype.itemsize > machine.l2_bytes
        rows = values / self._lanes / self.count
        each = unpacked_s(rows, self._lanes, self.problem.cin) + pass_s(values / self.count, values, spilled=spilled)
        return (
            packing_s(self.problem, self.packed_values * TURNED_VALUE_S) + values * SPILLED_VALUE_S + self.count * each
        )

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        problem, (d, h, w) = self.problem, self.axes
        box = tuple(slice(*span) for span in self.block(index))
        value = five(problem.layout, operands.value, problem.batch, (d.coarse, h.coarse, w.coarse), problem.cin)[box]
        cells = operands.output.reshape(problem.batch, d.coarse, d.kernel, h.coarse, h.kernel, w.coarse, -1)
        cells = cells[box[0], box[1], :, box[2]]
        tiles = operands.packed.reshape(d.kernel, h.kernel, -1, problem.cin, self.columns)
        # [depth tap, height tap, tile, batch, depth, height, row, column]
        to = cells.reshape(*cells.shape[:-1], -1, self.columns).transpose(2, 4, 6, 0, 1, 3, 5, 7)
        right = tiles[:, :, :, np.newaxis, np.newaxis, np.newaxis]
        for start, stop in Cut(w.coarse, largest_rows(self.columns, problem.cin)):
            np.matmul(value[..., start:stop, :], right, to[..., start:stop, :])
        workspace.mark("gemm")
        # Zero is added for its sign: products that underflow give -0.0.
        np.add(cells, operands.start((0, self._lanes)), cells)
        workspace.mark("store")


def schedule(problem: Problem, machine: Machine) -> InPlace:
    """Choose the blocks for a problem by cost, or raise CannotLowerError."""
    axes = canonical(problem.axes)
    columns = tile_columns(Cut(axes[2].kernel * problem.cout, axes[2].kernel * problem.cout), problem.cin)
    fits = all(a.kernel == a.stride and a.dilation == 1 and a.lo == 0 and a.fine == a.coarse * a.stride for a in axes)
    plain = problem.layout == "NDHWC" and problem.dtype == problem.compute_dtype and problem.groups == 1
    # A line that is a single row would be a vector.
    if not (fits and plain and unpacked(problem) and columns and axes[2].coarse > 1):
        raise CannotLowerError(f"{problem.operation}: columns are not the output, or BLAS packs small products")
    d, h, w = (axis.coarse for axis in axes)
    line = math.prod(problem.kernel) * problem.cout * w * problem.compute_dtype.itemsize
    found = []
    for share in _SHARES:
        lines = max(1, int(share * machine.l2_bytes) // line)
        cuts = Cut(problem.batch, max(1, lines // (d * h))), Cut(d, max(1, lines // h)), Cut(h, lines)
        found.append(InPlace(problem, axes, cuts, columns))
    return best(found, machine)
