"""col2im some rows at a time: one GEMM of a few hundred rows with all the taps that land in the block.

Row-stationary, for few output channels, where one tap alone makes a thin GEMM, and for problems so small that the
number of steps decides. Columns lie [tap, row], so that the additions' inner loops are as long as a row. Rows near a
block's border are taken with just the taps that land inside, so no product is formed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np

from gemmconv.lowerings.base import (
    Array,
    Box,
    Columns,
    Operands,
    Piece,
    Range,
    Workspace,
    aligned,
    canonical,
    five,
    longest,
    must_widen,
    split,
    store,
)
from gemmconv.lowerings.cost import SHORT_RUN, SMALLEST_BUFFER, best, gemm_s, pass_s
from gemmconv.lowerings.phases import Phase, gaps, landing, phases
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

_FEW_ROWS, _MOST_ROWS = 16, 2048
_MOST_TAPS = 1024  # filter rows of one GEMM
_FEW_CELLS = 512  # of an accumulator, for each output channel
_L2_SHARE = 0.75
_COLUMNS_SHARE = 0.4
_PACK_SHARE = 0.25


class Block(NamedTuple):
    """A box of the output: batch entries, fine positions in depth and height, q of the phases in width."""

    batch: Range
    depth: Range
    height: Range
    width: Range


class Step(NamedTuple):
    """Coarse positions of one axis, and the taps that carry them into a block."""

    rows: Range
    taps: Range


@dataclass(frozen=True, slots=True)
class ByRows:
    """A schedule; see the module."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    phases: tuple[Phase, ...]  # of width
    gaps: bool
    cuts: tuple[list[Range], ...]  # of batch, fine positions in depth and height, q in width
    rows: int  # the most rows of a GEMM
    taps: int  # the most filter rows of a GEMM
    widens: bool  # whether operands are widened, `depth` input channels at a time, instead of used as they lie
    depth: int

    @property
    def count(self) -> int:
        return math.prod(map(len, self.cuts))

    def block(self, index: int) -> Block:
        """Return a block."""
        spans = []
        for cut in reversed(self.cuts):
            index, i = divmod(index, len(cut))
            spans.append(cut[i])
        width, height, depth, batch = spans
        return Block(batch, depth, height, width)

    @property
    def largest_product(self) -> int:
        return self.rows * self.taps * self.depth

    @property
    def workspace_bytes(self) -> int:
        item = self.problem.compute_dtype.itemsize
        sums = self.problem.cout * len(self.phases) * math.prod(map(longest, self.cuts))
        widened = (self.rows * self.depth, self.taps * self.depth) if self.widens else ()
        return sum(aligned(values * item) for values in (self.rows * self.taps, sums, *widened))

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core: a block in the middle, times the number of blocks; see cost.py."""
        problem, width = self.problem, self.axes[2].coarse
        spilled = self.workspace_bytes > machine.l2_bytes * _L2_SHARE
        block = self.block(self.count // 2)
        total = 0.0
        for d, h, w in self._steps(block):
            rows = math.prod(stop - start for start, stop in (block.batch, d.rows, h.rows, w.rows))
            taps = math.prod(stop - start for start, stop in (d.taps, h.taps, w.taps))
            calls = -(-rows // self.rows)
            cuts = -(-taps * problem.cout // self.taps)
            total += calls * cuts * gemm_s(rows / calls, taps * problem.cout / cuts, problem.cin)
            total += calls * taps * pass_s(rows / calls * problem.cout, min(width, rows), spilled=spilled)
        scattered = problem.layout == "NDHWC" and problem.cout > 1
        values = math.prod(problem.output_shape) / self.count
        phases = max(1, len(self.phases))
        total += phases * pass_s(values / phases, width, spilled=spilled, strided=scattered or self.axes[2].stride > 1)
        return total * self.count

    @property
    def reason(self) -> str:
        widened = ", widened block by block" if self.widens else ""
        return (
            f"a GEMM of up to {self.taps} taps times output channels for up to {self.rows} rows; "
            f"columns added along rows{widened}"
        )

    def _steps(self, block: Block) -> Iterator[tuple[Step, ...]]:
        """Yield which rows meet a block with which taps, axis by axis."""
        return product(*(axis_steps(axis, span) for axis, span in zip(self.axes, self._spans(block), strict=True)))

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        if self.axes[2].coarse >= SHORT_RUN:
            np.setbufsize(SMALLEST_BUFFER)
        workspace.reset()
        block = self.block(index)
        problem, axes = self.problem, self.axes
        columns = Columns(problem, axes, operands, workspace, self.depth, self.rows if self.widens else 0, self.taps)
        buffer = workspace.take(self.rows * self.taps)
        sums = workspace.take(*self._sums_shape(block))
        sums[...] = 0
        outer = 1 if problem.layout == "NCDHW" else 0
        for d, h, w in self._steps(block):
            for taps in groups((d.taps, h.taps, w.taps), self.taps // problem.cout):
                for box in chunks(Box(block.batch, d.rows, h.rows, w.rows), columns.sizes, self.rows, outer):
                    self._add(block, box, taps, columns, buffer, sums)
        output = five(problem.layout, operands.output, problem.batch, [axis.fine for axis in axes], problem.cout)
        output = output[slice(*block.batch), slice(*block.depth), slice(*block.height)]
        if self.gaps:
            output[:, :, :, slice(*self._spans(block)[2])] = 0
        stride = axes[2].stride
        for phase, result in zip(self.phases, sums.transpose(4, 1, 2, 3, 5, 0), strict=True):
            to = output[:, :, :, block.width[0] * stride + phase.offset : block.width[1] * stride : stride]
            store(to, result[:, :, :, : to.shape[3]])

    def _add(
        self, block: Block, box: Box, taps: tuple[Range, Range, Range], columns: Columns, buffer: Array, sums: Array
    ) -> None:
        """Form the columns of a contiguous box of rows with a box of taps, and add each where it lands."""
        d, h, w = self.axes
        cout, m = self.problem.cout, math.prod(box.sizes)
        many = [stop - start for start, stop in taps]
        columns.form(box, pieces(taps, (h.kernel, w.kernel), cout), buffer, m, tap_major=True)
        column = buffer[: math.prod(many) * cout * m].reshape(*many, cout, *box.sizes)
        sums = sums[:, box.batch[0] - block.batch[0] : box.batch[1] - block.batch[0]]
        for a in range(many[0]):
            from_d, to_d = meeting(d, taps[0][0] + a, box.depth, block.depth)
            for b in range(many[1]):
                from_h, to_h = meeting(h, taps[1][0] + b, box.height, block.height)
                for i, phase in enumerate(self.phases):
                    for tap, shift in phase.taps:
                        start, stop = landing(w, phase, shift, block.width)
                        start, stop = max(start, box.width[0]), min(stop, box.width[1])
                        c = tap - taps[2][0]
                        if start >= stop or not 0 <= c < many[2]:
                            continue
                        part = column[a, b, c, :, :, from_d, from_h, start - box.width[0] : stop - box.width[0]]
                        first = shift - block.width[0]
                        to = sums[:, :, to_d, to_h, i, start + first : stop + first]
                        np.add(to, part, out=to)

    def _spans(self, block: Block) -> tuple[Range, Range, Range]:
        """Return the block's fine positions in depth, height and width."""
        width = self.axes[2]
        start, stop = block.width
        return block.depth, block.height, (start * width.stride, min(stop * width.stride, width.fine))

    def _sums_shape(self, block: Block) -> tuple[int, ...]:
        batch, depth, height, width = (stop - start for start, stop in block)
        return self.problem.cout, batch, depth, height, len(self.phases), width


def axis_steps(axis: Axis, span: Range) -> list[Step]:
    """Return which coarse positions meet a fine interval with which taps: each pair that meets once, in rectangles.

    For the whole axis that is one rectangle, in which what falls outside is dropped later.
    """
    if span == (0, axis.fine):
        return [Step((0, axis.coarse), (0, axis.kernel))]
    borders = {0, axis.coarse}
    for tap in range(axis.kernel):
        for edge in span:
            borders.add(min(axis.coarse, max(0, -((tap * axis.dilation - axis.lo - edge) // axis.stride))))
    found = []
    cuts = sorted(borders)
    for start, stop in pairwise(cuts):
        taps = axis.taps_of(start, *span)
        if taps[0] < taps[1]:
            found.append(Step((start, stop), taps))
    return found


def groups(taps: tuple[Range, Range, Range], most: int) -> Iterator[tuple[Range, Range, Range]]:
    """Cut a box of taps into boxes of at most `most` taps."""
    cut: list[list[Range]] = []
    inner = [1, 1, 1]
    for i in (1, 0):
        inner[i] = inner[i + 1] * (taps[i + 1][1] - taps[i + 1][0])
    for (start, stop), size in zip(taps, inner, strict=True):
        cut.append([(start + a, start + b) for a, b in split(stop - start, max(1, most // size))])
    yield from product(*cut)


def chunks(box: Box, whole: tuple[int, int, int, int], most: int, outer: int) -> Iterator[Box]:
    """Cut a box into contiguous runs of at most `most` rows; directions before `outer` are never joined."""
    level, inner = 3, 1
    while level > outer and box[level] == (0, whole[level]) and inner * whole[level] <= most:
        inner *= whole[level]
        level -= 1
    ranges: list[list[Range]] = []
    for i, (start, stop) in enumerate(box):
        length = 1 if i < level else max(1, most // inner) if i == level else stop - start
        ranges.append([(start + a, start + b) for a, b in split(stop - start, length)])
    yield from (Box(*found) for found in product(*ranges))


def pieces(taps: tuple[Range, Range, Range], kernel: tuple[int, int], cout: int) -> list[Piece]:
    """Return the contiguous pieces of the filter that hold a box of taps; `kernel` is that of height and width."""
    (d0, d1), (h0, h1), (w0, w1) = taps
    kh, kw = kernel
    many = (h1 - h0) * (w1 - w0) * cout
    if w1 - w0 < kw:
        return [
            Piece(((a * kh + b) * kw + w0) * cout, (w1 - w0) * cout, ((a - d0) * (h1 - h0) + b - h0) * (w1 - w0) * cout)
            for a in range(d0, d1)
            for b in range(h0, h1)
        ]
    if h1 - h0 < kh:
        return [Piece((a * kh + h0) * kw * cout, many, (a - d0) * many) for a in range(d0, d1)]
    return [Piece(d0 * kh * kw * cout, (d1 - d0) * many, 0)]


def meeting(axis: Axis, tap: int, rows: Range, span: Range) -> tuple[slice, slice]:
    """Return which of some coarse positions a tap carries into a fine interval, and where in it they land."""
    base = tap * axis.dilation - axis.lo
    start = max(rows[0], -((base - span[0]) // axis.stride))
    stop = max(start, min(rows[1], -((base - span[1]) // axis.stride)))
    first = start * axis.stride + base - span[0]
    if start == stop:
        return slice(0, 0), slice(0, 0)
    return slice(start - rows[0], stop - rows[0]), slice(
        first, first + (stop - start - 1) * axis.stride + 1, axis.stride
    )


def schedule(problem: Problem, machine: Machine) -> ByRows:
    """Choose the blocks for a problem, by the cost of ever smaller accumulators of whole planes and rows."""
    axes = canonical(problem.axes)
    d, h, w = axes
    of_width = phases(w)
    across = -(-w.fine // w.stride)
    row = across * max(1, len(of_width))
    plane = h.fine * row
    item = problem.compute_dtype.itemsize
    taps = min(max(1, _MOST_TAPS // problem.cout), math.prod(problem.kernel)) * problem.cout
    rows = max(_FEW_ROWS, min(_MOST_ROWS, int(machine.l2_bytes * _COLUMNS_SHARE) // (taps * item)))
    rows = min(rows, problem.batch * math.prod(problem.coarse))
    widens = must_widen(problem)
    depth = problem.cin
    if widens:
        depth = min(depth, max(1, int(machine.l2_bytes * _PACK_SHARE) // item // max(rows, taps)))

    def candidate(cells: int) -> ByRows:
        batch = 1 if problem.layout == "NCDHW" else max(1, cells // (d.fine * plane))
        chunks = (batch, max(1, cells // plane), max(1, cells // row), max(1, cells // max(1, len(of_width))))
        whole = (problem.batch, d.fine, h.fine, across)
        cuts = tuple(split(n, min(n, chunk)) for n, chunk in zip(whole, chunks, strict=True))
        return ByRows(problem, axes, of_width, gaps(w, of_width), cuts, rows, taps, widens, depth)

    cells = [problem.batch * d.fine * plane]
    while cells[-1] > _FEW_CELLS:
        cells.append(cells[-1] // 2)
    return best([candidate(n) for n in cells], machine)
