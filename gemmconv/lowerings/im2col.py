"""im2col: a convolution as one GEMM for some rows, of the column buffer with the filter as it lies.

A block is a run of rows of the result, with some of its channels. Its windows of the fine array are copied to columns
in cache, some taps at a time, and each GEMM adds the products of those to the rows; with channels first it forms
[channel, row] from columns [tap, row]. Rows are written where they stay, but for half precisions and complex numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from gemmconv.blas import small_products
from gemmconv.lowerings.base import (
    Array,
    Bounds,
    Box,
    Cut,
    Operands,
    Range,
    Workspace,
    address,
    canonical,
    digit,
    five,
    store,
    too_far,
)
from gemmconv.lowerings.by_rows import groups
from gemmconv.lowerings.cost import SMALLEST_BUFFER, best, copy_s, gemm_s, streamed_s, unpacked_s
from gemmconv.lowerings.windows import Taps, Windows, grid_values, inside, workspace_bytes
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Rows of a block and cuts of the channels that are weighed; channels are not cut below _WIDE.
_ROWS = (32, 64, 128, 256, 512, 1024, 2048)
_PARTS = (1, 2, 4, 8, 16, 32)
_WIDE = 32
# Of the L2 cache: columns, and the grid of values they are copied from.
_COLUMNS_SHARE, _GRID_SHARE = 0.4, 1.0
# Rows for which the filter is not packed, and the most channels of such a product.
_FEW_ROWS, _FEW_CHANNELS = 128, 256
# Blocks of whole planes of the result that are weighed too, by how many of them there are.
_BLOCKS = range(2, 9)


class Block(NamedTuple):
    """A run of rows of the result, and some of its channels."""

    rows: Box
    channels: Range


@dataclass(frozen=True, slots=True)
class Im2Col:
    """A schedule; see the module."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    cuts: tuple[Cut, Cut, Cut, Cut]  # of batch, depth, height and width of the result
    channels: Cut
    taps: tuple[Taps, ...]  # of the GEMMs of a block
    grid: int  # values

    @property
    def packs(self) -> bool:
        """Whether the filter is widened."""
        return self.problem.dtype != self.problem.compute_dtype

    @property
    def count(self) -> int:
        return math.prod(map(len, self.cuts)) * len(self.channels)

    @property
    def digits(self) -> list[list[Bounds]]:
        return [*(digit(i, cut) for i, cut in enumerate(self.cuts)), digit(4, self.channels)]

    whole_behind = 3
    wants_finite_value = False

    def block(self, index: int) -> Block:
        """Return a block; those of the same rows follow each other."""
        index, channels = divmod(index, len(self.channels))
        spans: list[Range] = []
        for cut in reversed(self.cuts):
            index, i = divmod(index, len(cut))
            spans.append(cut[i])
        width, height, depth, batch = spans
        return Block(Box(batch, depth, height, width), self.channels[channels])

    @property
    def rows(self) -> int:
        """The most rows of a block."""
        return math.prod(cut.longest for cut in self.cuts)

    @property
    def deep(self) -> int:
        """The most taps of a GEMM."""
        return max(math.prod(stop - start for start, stop in box) for box in self.taps)

    @property
    def direct(self) -> bool:
        """Whether sums are formed in the result; BLAS multiplies by a complex 1, which makes zeros of either sign."""
        return not self.packs and self.problem.dtype.kind == "f" and not too_far(self.problem)

    @property
    def largest_product(self) -> int:
        return self.rows * self.channels.longest * self.deep * self.problem.cout

    @property
    def workspace_bytes(self) -> int:
        sums = 0 if self.direct else self.rows * self.channels.longest
        columns = self.rows * self.deep * self.problem.cout
        return workspace_bytes((self.grid, columns, sums), self.problem.compute_dtype.itemsize)

    @property
    def wants_finite_filter(self) -> bool:
        return not all(inside(axis) for axis in self.axes)

    @property
    def packed_values(self) -> int:
        return math.prod(self.problem.kernel) * self.problem.cout * self.problem.cin if self.packs else 0

    def pack(self, filter: Array, packed: Array) -> None:
        """Widen the filter."""
        np.copyto(packed.reshape(filter.shape), filter, casting="unsafe")

    @property
    def reason(self) -> str:
        channels = f", {self.channels.longest} of {self.problem.cin} channels" if len(self.channels) > 1 else ""
        widened = ", filter widened" if self.packs else ""
        columns = f"columns of {self.deep} taps times {self.problem.cout} channels"
        return f"{columns} for up to {self.rows} rows{channels}{widened}"

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        problem, w = self.problem, self.axes[2]
        rows = problem.batch * math.prod(problem.coarse) / math.prod(map(len, self.cuts))
        n, cut = problem.cin / len(self.channels), len(self.channels) > 1
        streamed = math.prod(problem.filter_shape) * problem.compute_dtype.itemsize > machine.l2_bytes
        total = 0.0
        for box in self.taps:
            taps = math.prod(stop - start for start, stop in box)
            values = rows * taps * problem.cout
            if self.grid or not self.wants_finite_filter:
                run = columns_run(problem, w, box[2])
                total += copy_s(values, run, spilled=True, strided=strided(problem, w))
            else:  # tap by tap, after zeros
                run = columns_run(problem, w, (0, 1))
                total += copy_s(values, run, steps=4 * taps, spilled=True, strided=strided(problem, w))
                total += copy_s(values, values)
            k = taps * problem.cout
            pieces = math.prod(map(len, self._pieces(round(rows), round(n), k)))
            total += unpacked_s(pieces, rows, n, k) if pieces > 1 else gemm_s(rows, n, k)
            total += streamed_s(n * k, n if cut else math.inf) if streamed else 0.0
        positions = grid_values(self.axes, [cut.longest for cut in self.cuts[1:]], problem.kernel)
        total += copy_s(min(self.grid, self.cuts[0].longest * positions * problem.cout), w.fine, spilled=True)
        values = rows * n
        return self.count * (total + copy_s(values, problem.cin, steps=1 if self.direct else 2, spilled=True))

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        np.setbufsize(SMALLEST_BUFFER)
        problem, gemm, clock = self.problem, workspace.gemm, workspace.clock
        item, channels_first = gemm.itemsize, problem.layout == "NCDHW"
        windows = workspace.once(
            operands,
            lambda: Windows(
                problem, self.axes, operands.value, workspace, self.rows * self.deep * problem.cout, self.grid
            ),
        )
        rows, channels = self.block(index)
        m, n = math.prod(rows.sizes), channels[1] - channels[0]
        output = five(problem.layout, operands.output, problem.batch, [axis.coarse for axis in self.axes], problem.cin)
        output = output[(*(slice(*r) for r in rows), slice(*channels))]
        if self.direct:
            sums, ld = output, operands.steps[2][4 if channels_first else 3]
        else:
            sums = five(problem.layout, workspace.take(m * n), rows.sizes[0], rows.sizes[1:], n)
            ld = m if channels_first else n
        sums[...] = operands.start(channels)
        to = address(sums)
        taps = operands.packed if self.packs else operands.filter
        ld_taps = problem.cin if self.packs else problem.pitch
        taps_at = address(taps) + channels[0] * item
        _, kh, kw = (axis.kernel for axis in self.axes)
        opened = windows.open(rows, self.window)
        for box in self.taps:
            if clock:
                clock("overhead")
            windows.copy(rows, box, opened)
            if clock:
                clock("pack")
            k = math.prod(stop - start for start, stop in box) * problem.cout
            (d, _), (h, _), (w, _) = box
            at = taps_at + ((d * kh + h) * kw + w) * problem.cout * ld_taps * item
            if channels_first:
                gemm(n, m, k, at, ld_taps, True, windows.address, m, False, to, ld, True)
            else:
                for a, b in product(*self._pieces(m, n, k)):
                    gemm(
                        m, b[1] - b[0], a[1] - a[0], windows.address + a[0] * item, k, False,
                        at + (a[0] * ld_taps + b[0]) * item, ld_taps, False, to + b[0] * item, ld, True,
                    )  # fmt: skip
            if clock:
                clock("gemm")
        if not self.direct:
            if problem.dtype.kind == "c":
                sums += 0
            store(output, sums)
        if clock:
            clock("store")

    def _pieces(self, m: int, n: int, k: int) -> tuple[Cut, Cut]:
        """Cut k and n in products so small that BLAS does not pack them, if there are few rows; else in one."""
        few = m <= _FEW_ROWS and self.problem.layout == "NDHWC" and self.problem.compute_dtype.kind == "f"
        if not few or m * n * k <= small_products() or not small_products():
            return Cut(k, k), Cut(n, n)
        columns = Cut(n, _FEW_CHANNELS)
        return Cut(k, small_products() // (m * columns.longest)), columns

    @property
    def window(self) -> Taps:
        """All taps."""
        d, h, w = (axis.kernel for axis in self.axes)
        return (0, d), (0, h), (0, w)


def columns_run(problem: Problem, w: Axis, taps: Range) -> float:
    """Return the length of inner loops when columns are copied."""
    if problem.layout == "NCDHW":
        return w.coarse
    return problem.cout * (taps[1] - taps[0] if w.dilation == 1 else 1)


def strided(problem: Problem, w: Axis) -> bool:
    """Whether values that are copied to columns are not beside each other."""
    return problem.layout == "NCDHW" and w.stride > 1


def row_cuts(problem: Problem, axes: Sequence[Axis], rows: int) -> tuple[Cut, Cut, Cut, Cut]:
    """Cut the result's positions in runs of rows that follow each other in memory."""
    d, h, w = (axis.coarse for axis in axes)
    # With channels first the rows of another batch entry are elsewhere.
    batch = 1 if problem.layout == "NCDHW" else max(1, rows // (d * h * w))
    chunks = (batch, max(1, rows // (h * w)), max(1, rows // w), rows)
    b, d_, h_, w_ = (Cut(n, min(n, chunk)) for n, chunk in zip((problem.batch, d, h, w), chunks, strict=True))
    return b, d_, h_, w_


def tap_boxes(axes: Sequence[Axis], most: int) -> tuple[Taps, ...]:
    """Cut the taps in boxes of at most `most` whose rows of the filter follow each other."""
    d, h, w = (axis.kernel for axis in axes)
    return tuple(groups(((0, d), (0, h), (0, w)), most))


def schedule(problem: Problem, machine: Machine) -> Im2Col:
    """Choose the blocks for a problem, by the cost of every cut of rows and channels."""
    axes = canonical(problem.axes)
    item = problem.compute_dtype.itemsize
    columns = int(machine.l2_bytes * _COLUMNS_SHARE) // item
    most = int(machine.l2_bytes * _GRID_SHARE) // item
    d, h, w = (axis.coarse for axis in axes)
    every = problem.batch * d * h * w

    def candidate(rows: int, parts: int) -> Im2Col:
        cuts = row_cuts(problem, axes, rows)
        longest = [cut.longest for cut in cuts]
        channels = Cut(problem.cin, -(-problem.cin // parts))
        taps = tap_boxes(axes, max(1, columns // (math.prod(longest) * problem.cout)))
        grid = longest[0] * grid_values(axes, longest[1:], problem.kernel) * problem.cout
        return Im2Col(problem, axes, cuts, channels, taps, grid if grid <= most else 0)

    planes = [-(-n // blocks) * each for n, each in ((problem.batch, d * h * w), (d, h * w)) for blocks in _BLOCKS]
    parts = [n for n in _PARTS if n == 1 or problem.cin >= n * _WIDE]
    return best([candidate(r, n) for r in sorted({min(n, every) for n in (*_ROWS, *planes)}) for n in parts], machine)
