"""col2im of whole lines at a time: columns [tap, row] of many lines are added as one run, whatever the width.

As `by_rows`, for few output channels, where inner loops as long as a line would be too short. Lines of the sums are as
long as lines of the value, so the columns of one tap and plane are added in a single run, shifted by lines and by
positions. What such a shift carries over the end of a line is set to zero before. Blocks are planes, or some lines of
them, with all slots and output channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from gemmconv.lowerings.base import (
    Array,
    AsItLies,
    CannotLowerError,
    Operands,
    Workspace,
    aligned,
    canonical,
    five,
    must_widen,
    simplified,
)
from gemmconv.lowerings.boxes import Bounds, Box, Cut, Index, Range, digit, each, located
from gemmconv.lowerings.by_rows import axis_steps, chunks, groups, lines_never_packed, meetings, pieces, sample
from gemmconv.lowerings.columns import Buffers, Columns, Piece, columns_values, formed_s
from gemmconv.lowerings.copies import store
from gemmconv.lowerings.cost import SMALLEST_BUFFER, best, copy_s, pass_s
from gemmconv.lowerings.phases import Slots, places, slots, unreached
from gemmconv.lowerings.products import LARGEST
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Filter rows and rows of the value of one GEMM, and lines of a block, that are weighed.
_MOST_TAPS = 1024
_ROWS = (256, 512, 1024, 2048, 4096)
_LINES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
_PACK_SHARE = 0.25
_L2_SHARE = 0.75


class Block(NamedTuple):
    """A box of the output: batch entry, q of the slots in depth and height."""

    batch: int
    depth: Range
    height: Range


class Product(NamedTuple):
    """One GEMM: its rows, the pieces of the filter, the shape of its columns, what to clear and what to add to what."""

    rows: Box
    pieces: list[Piece]
    shape: tuple[int, ...]  # taps in depth, height and width, channels, planes, lines, positions
    wraps: list[Index]
    moves: list[tuple[Index, Index]]


class Program(NamedTuple):
    """What a block does: the shape of its sums, its GEMMs, its region of the output, and where sums are stored."""

    shape: tuple[int, ...]  # slots in depth, height and width, channels, planes, lines, positions
    products: list[Product]
    region: Index
    stores: list[tuple[Index, Index]]


class Seen(NamedTuple):
    """What a program sees of a workspace: its sums, for each GEMM what to clear and to add to what; what is stored."""

    sums: Array
    folds: list[tuple[list[Array], list[tuple[Array, Array]]]]
    stored: list[Array]


@dataclass(frozen=True, slots=True)
class ByPlanes(AsItLies):
    """A schedule; see the module."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    slots: tuple[Slots, Slots, Slots]
    gaps: bool
    cuts: tuple[Cut, Cut]  # of q in depth and height
    rows: int  # the most rows of a GEMM
    taps: int  # the most filter rows of a GEMM
    widens: bool
    depth: int

    @property
    def count(self) -> int:
        return self.problem.batch * math.prod(map(len, self.cuts))

    @property
    def digits(self) -> list[list[Bounds]]:
        along = enumerate(zip(self.axes, self.slots, self.cuts, strict=False), 1)
        spatial = [digit(i, [of_axis.span(axis, q) for q in cut]) for i, (axis, of_axis, cut) in along]
        return [digit(0, each(self.problem.batch)), *spatial]

    def block(self, index: int) -> Block:
        """Return a block."""
        batch, (depth, height) = located(index, self.cuts)
        return Block(batch, depth, height)

    @property
    def largest_product(self) -> int:
        if lines_never_packed(self.problem, self.axes[2], self.rows, self.taps, tap_major=True):
            return LARGEST
        return self.rows * self.taps * self.depth

    @property
    def workspace_bytes(self) -> int:
        item = self.problem.compute_dtype.itemsize
        sums = math.prod(self._sums_shape(*(cut.longest for cut in self.cuts)))
        columns = columns_values(self.problem, self.rows, self.taps, self.depth, self.widens)
        return sum(aligned(values * item) for values in (*columns, sums))

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core: blocks in the middle, times the number of blocks; see cost.py."""
        problem, (_, _, w) = self.problem, self.axes
        spilled = self.workspace_bytes > machine.l2_bytes * _L2_SHARE
        kernel = problem.cout * math.prod(axis.kernel for axis in self.axes)
        moves = math.prod(max(1, len(of_axis.moves)) for of_axis in self.slots)
        total = 0.0
        along = (sample(*part) for part in zip(self.axes, self.slots, self.cuts, strict=False))
        for d, h in product(*along):
            rows = d.rows * h.rows * w.coarse
            columns = d.taps * h.taps * w.kernel * problem.cout
            calls = max(1.0, rows / self.rows)
            parts = max(-(-columns // self.taps), d.taps if h.taps < self.axes[1].kernel else 1)
            adds = max(1.0, moves * columns / kernel)
            lines = max(1.0, min(h.rows, self.rows / w.coarse))
            time_s = calls * parts * formed_s(problem, rows / calls, columns / parts, tap_major=True, spilled=spilled)
            time_s += calls * adds * pass_s(rows / calls * columns / adds, lines * w.coarse, spilled=spilled)
            total += time_s * d.share * h.share * problem.batch
        stores = self.count * max(1, math.prod(len(of_axis.offsets) for of_axis in self.slots))
        values = math.prod(problem.fine_shape) / stores
        strided = (problem.cout > 1 and problem.layout == "NDHWC") or w.stride > 1
        return total + stores * copy_s(values, w.coarse, spilled=True, strided=strided)

    @property
    def reason(self) -> str:
        widened = ", widened block by block" if self.widens else ""
        return (
            f"a GEMM of up to {self.taps} taps times output channels for up to {self.rows} rows; "
            f"columns added as runs of lines{widened}"
        )

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        problem = self.problem
        program = self._made(self.block(index))
        workspace.reset()
        buffers = self._buffers(workspace)
        seen = self._seen(program, buffers, workspace)
        columns = Columns(buffers, self.axes, operands)
        seen.sums[...] = operands.start((0, problem.cout), 3)
        for gemm, (wraps, additions) in zip(program.products, seen.folds, strict=True):
            workspace.mark("overhead")
            columns.form(columns.locate(gemm.rows), gemm.pieces, math.prod(gemm.shape[4:]))
            workspace.mark("gemm")
            for cells in wraps:
                cells[...] = 0
            for cells, column in additions:
                np.add(cells, column, cells)
            workspace.mark("col2im")
        output = five(problem.layout, operands.output, problem.batch, [axis.fine for axis in self.axes], problem.cout)
        if self.gaps:
            output[program.region] = operands.start((0, problem.cout))
        for source, (_, to) in zip(seen.stored, program.stores, strict=True):
            store(output[to], source)
        workspace.mark("store")

    def _buffers(self, workspace: Workspace) -> Buffers:
        return Buffers(self.problem, workspace, self.rows, self.taps, self.depth, tap_major=True, widens=self.widens)

    def _seen(self, program: Program, buffers: Buffers, workspace: Workspace) -> Seen:
        """Return what the steps of a program see of a workspace, for which Python takes longer than for small steps."""
        sums = workspace.take(*program.shape)
        lines = sums.reshape(*program.shape[:5], program.shape[5] * program.shape[6])
        folds = []
        for gemm in program.products:
            column = buffers.columns[: math.prod(gemm.shape)].reshape(gemm.shape)
            of_lines = column.reshape(*gemm.shape[:5], gemm.shape[5] * gemm.shape[6])
            additions = [(lines[to].squeeze(), of_lines[source].squeeze()) for source, to in gemm.moves]
            folds.append(([column[wrap] for wrap in gemm.wraps], additions))
        return Seen(sums, folds, [sums[source].transpose(1, 2, 3, 0) for source, _ in program.stores])

    def _made(self, block: Block) -> Program:
        (d, h, w), (of_d, of_h, of_w) = self.axes, self.slots
        whole = (self.problem.batch, d.coarse, h.coarse, w.coarse)
        batch = (block.batch, block.batch + 1)
        products: list[Product] = []
        steps = product(axis_steps(d, of_d.span(d, block.depth)), axis_steps(h, of_h.span(h, block.height)))
        for step_d, step_h in steps:
            for taps in groups((step_d.taps, step_h.taps, (0, w.kernel)), self.taps // self.problem.cout):
                boxes = chunks(Box(batch, step_d.rows, step_h.rows, (0, w.coarse)), whole, self.rows, 1)
                products.extend(self._product(block, box, taps) for box in boxes)
        spans = (block.depth, block.height, (0, of_w.count))
        along = [list(places(*part)) for part in zip(self.axes, self.slots, spans, strict=True)]
        region = (block.batch, *(slice(*s.span(a, q)) for a, s, q in zip(self.axes, self.slots, spans, strict=True)))
        stores = [
            ((d_.slot, h_.slot, w_.slot, slice(None), d_.q, h_.q, w_.q), (block.batch, d_.fine, h_.fine, w_.fine))
            for d_, h_, w_ in product(*along)
        ]
        shape = self._sums_shape(block.depth[1] - block.depth[0], block.height[1] - block.height[0])
        return Program(shape, products, region, stores)

    def _product(self, block: Block, box: Box, taps: tuple[Range, Range, Range]) -> Product:
        """Return one GEMM, whole lines of rows with a box of taps, and where its columns are added."""
        (_, h, w), (of_d, of_h, _) = self.axes, self.slots
        cout, width = self.problem.cout, w.coarse
        many = tuple(stop - start for start, stop in taps)
        lines = (block.height[1] - block.height[0]) * width
        every = slice(None)
        along_w = list(self._along_w(taps[2]))
        wraps: list[Index] = [
            (every, every, at, every, every, every, slice(width - shift, None) if shift > 0 else slice(-shift))
            for at, _, shift in along_w
            if shift
        ]
        moves: list[tuple[Index, Index]] = []
        along_d = meetings(of_d, taps[0], box.depth, block.depth)
        along_h = meetings(of_h, taps[1], box.height, block.height)
        for (from_d, to_d), (from_h, to_h), (at, slot, shift) in product(along_d, along_h, along_w):
            # Runs of whole lines, but for what the shift would carry out of the sums, which is zero.
            start, stop = to_h[1].start * width + shift, to_h[1].stop * width + shift
            low, high = max(0, -start), max(0, stop - lines)
            source = slice(from_h[1].start * width + low, from_h[1].stop * width - high)
            moves.append(
                (
                    (from_d[0], from_h[0], at, every, from_d[1], source),
                    (to_d[0], to_h[0], slot, every, to_d[1], slice(start + low, stop - high)),
                )
            )
        found = pieces(taps, (h.kernel, w.kernel), cout)
        return Product(box, found, (*many, cout, *box.sizes[1:]), wraps, moves)

    def _along_w(self, taps: Range) -> Iterator[tuple[slice, slice, int]]:
        """Yield which of some taps of width reach which slots, and their shift."""
        for move in self.slots[2].moves:
            first, last = max(move.tap, taps[0]), min(move.tap + move.many, taps[1])
            if first < last:
                slot = move.slot + first - move.tap
                yield slice(first - taps[0], last - taps[0]), slice(slot, slot + last - first), move.shift

    def _sums_shape(self, depth: int, height: int) -> tuple[int, ...]:
        d, h, w = (len(of_axis.offsets) for of_axis in self.slots)
        return d, h, w, self.problem.cout, depth, height, self.axes[2].coarse


def schedule(problem: Problem, machine: Machine) -> ByPlanes:
    """Choose the blocks for a problem by cost, or raise CannotLowerError where lines of the output are longer."""
    problem = simplified(problem)
    axes = canonical(problem.axes)
    of_axes = slots(axes[0], tiled=False), slots(axes[1], tiled=False), slots(axes[2], tiled=False)
    width = axes[2].coarse
    reach = max((abs(shift) for shift in of_axes[2].shifts), default=0)
    if of_axes[2].count > width or reach >= width or width > _ROWS[-1]:
        raise CannotLowerError(f"{problem.operation}: lines of {width} positions cannot hold those of the sums")
    gaps = any(unreached(axis, of_axis) for axis, of_axis in zip(axes, of_axes, strict=True))
    taps = min(max(1, _MOST_TAPS // problem.cout), math.prod(axis.kernel for axis in axes)) * problem.cout
    widens = must_widen(problem)
    item = problem.compute_dtype.itemsize

    def candidate(lines: int, rows: int) -> ByPlanes:
        depth = problem.cin
        if widens:
            depth = min(depth, max(1, int(machine.l2_bytes * _PACK_SHARE) // item // max(rows, taps)))
        d = Cut(of_axes[0].count, max(1, lines // of_axes[1].count))
        h = Cut(of_axes[1].count, min(lines, of_axes[1].count))
        return ByPlanes(problem, axes, of_axes, gaps, (d, h), rows, taps, widens, depth)

    every = of_axes[0].count * of_axes[1].count
    most = math.prod(axis.coarse for axis in axes)
    lines = sorted({min(n, every) for n in _LINES})
    rows = sorted({min(max(n, width), most) for n in _ROWS})
    return best([candidate(n, m) for n in lines for m in rows], machine)
