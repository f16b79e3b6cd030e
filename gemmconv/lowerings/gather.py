"""kn2row for convolutions: GEMM with beta = 1 on windows of lines, where taps of depth and height are shifts of rows.

A block is some planes or lines of the result, of one batch entry, with some of its channels. The fine lines it needs
are copied once to a grid, with zeros around them, those of one phase of depth and height next to each other. Then the
row of a coarse position is the run of kw * channels values its taps of width reach, and the row of the next position
begins a stride of width later: no columns are made. BLAS takes no rows that overlap, so a GEMM takes every second or
third. Rows where a line ends or between planes are formed and dropped. Where BLAS multiplies small matrices without
packing them, many such products are formed in one step and added after that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from gemmconv.blas import Gemm, small_products
from gemmconv.lowerings.base import (
    Array,
    Operands,
    Usual,
    Workspace,
    address,
    aligned,
    canonical,
    five,
    laid,
)
from gemmconv.lowerings.boxes import Bounds, Cut, Range, digit, each, located
from gemmconv.lowerings.copies import copy, store
from gemmconv.lowerings.cost import SMALLEST_BUFFER, best_that_fits, copy_s, gemm_s, in_pieces_s, small_s
from gemmconv.lowerings.phases import Slots, met, slots
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Positions of a block and cuts of the channels that are weighed; channels are not cut below _WIDE.
_POSITIONS = (64, 128, 256, 512, 1024, 2048, 4096)
_PARTS = (1, 2, 4, 8, 16)
_WIDE = 64
_L2_SHARE = 0.75
# Small products: the most rows of one, the least, and the largest n and k where they are faster, few columns or many.
_PIECE, _SHORT_PIECE = 96, 32
_SMALL = ((32, 512), (64, 128))


class Sizes(NamedTuple):
    """Of a block: its planes, its lines, and the lines of a plane of its grid and sums."""

    planes: int
    lines: int
    pitch: int


@dataclass(frozen=True, slots=True)
class Gather(Usual):
    """A schedule; see the module."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    slots: tuple[Slots, Slots]  # phases of depth and height
    cuts: tuple[Cut, Cut]  # of depth and height of the result
    channels: Cut
    line: int  # fine positions of a line of the grid
    small: bool  # whether products are formed in small pieces, many in one step, and added to the sums after that

    wants_finite_filter = True

    @property
    def count(self) -> int:
        return self.problem.batch * math.prod(map(len, self.cuts)) * len(self.channels)

    @property
    def digits(self) -> list[list[Bounds]]:
        batch = digit(0, each(self.problem.batch))
        return [batch, digit(1, self.cuts[0]), digit(2, self.cuts[1]), digit(4, self.channels)]

    def block(self, index: int) -> tuple[int, Range, Range, Range]:
        """Return a block: batch entry, planes, lines and channels; those of the same rows follow each other."""
        batch, (depth, height, channels) = located(index, (*self.cuts, self.channels))
        return batch, depth, height, channels

    @property
    def rows_of_line(self) -> int:
        """Rows from line to line; the last ones of a line reach into the next."""
        return self.line // self.axes[2].stride

    @property
    def along_w(self) -> tuple[int, int]:
        """Taps of width of one GEMM, and how many rows apart those are that do not overlap."""
        w = self.axes[2]
        taps = w.kernel if w.dilation == 1 else 1
        return taps, -(-taps // w.stride)

    @property
    def in_place(self) -> bool:
        """Whether rows are used where they lie: those of single taps that reach all positions."""
        single = all(a.kernel == a.stride == 1 and a.lo == 0 and a.coarse == a.fine for a in self.axes)
        return single and self.problem.layout == "NDHWC" and not self.packs

    @property
    def packs(self) -> bool:
        """Whether the filter is copied: widened, or without the other groups' channels."""
        return self.problem.dtype != self.problem.compute_dtype or self.problem.groups > 1

    @property
    def packed_values(self) -> int:
        return math.prod(self.problem.kernel) * self.problem.cout * self.problem.cin if self.packs else 0

    def pack(self, filter: Array, packed: Array) -> None:
        """Copy the filter."""
        np.copyto(packed.reshape(filter.shape), filter, casting="unsafe")

    def sizes(self, planes: int, lines: int) -> Sizes:
        """Return the sizes of a block; a single plane needs no lines beside its own in the sums."""
        return Sizes(planes, lines, lines + self.slots[1].reach)

    def rows(self, sizes: Sizes) -> int:
        """Return the rows of the sums of a block."""
        lines = (sizes.planes - 1) * sizes.pitch + sizes.lines
        return lines * self.rows_of_line

    def grid_values(self, sizes: Sizes) -> int:
        """Return the values of a block's grid, with those that windows run over its end."""
        phases = len(self.slots[0].offsets) * len(self.slots[1].offsets)
        lines = phases * (sizes.planes + self.slots[0].reach) * sizes.pitch
        over = self._spare(self.rows(sizes)) * self.axes[2].stride if self.small else 0
        return 0 if self.in_place else (lines * self.line + self.axes[2].extent + over) * self.problem.cout

    @property
    def largest_product(self) -> int:
        rows = self.rows(self.sizes(*(cut.longest for cut in self.cuts)))
        return rows * self.channels.longest * self.along_w[0] * self.problem.cout

    @property
    def workspace_bytes(self) -> int:
        sizes = self.sizes(*(cut.longest for cut in self.cuts))
        n, item = self.channels.longest, self.problem.compute_dtype.itemsize
        rows = self.rows(sizes)
        spare = (rows + self._spare(rows)) * n if self.small else 0
        return sum(aligned(values * item) for values in (self.grid_values(sizes), rows * n, spare))

    def _pieces(self, m: int) -> tuple[int, int]:
        """Return into how many pieces every apart-th of m rows is cut, and how many rows each has."""
        taps, apart = self.along_w
        most = max(1, min(_PIECE, small_products() // (self.channels.longest * taps * self.problem.cout)))
        pieces = -(-m // (apart * most))
        return pieces, -(-m // (apart * pieces))

    def _spare(self, rows: int) -> int:
        """Return how many rows pieces of equal size reach over the end."""
        return self.along_w[1] * (self._pieces(rows)[0] + 1)

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        problem, w = self.problem, self.axes[2]
        planes, lines = (cut.size / len(cut) for cut in self.cuts)
        pitch = lines + self.slots[1].reach
        rows = ((planes - 1) * pitch + lines) * self.rows_of_line
        n = problem.cin / len(self.channels)
        taps, apart = self.along_w
        of_d, of_h = (sum(move.many for move in of_axis.moves) for of_axis in self.slots)
        gemms = of_d * of_h * -(-w.kernel // taps)
        k = taps * problem.cout
        spilled = self.workspace_bytes > machine.l2_bytes * _L2_SHARE
        if self.small:
            total = gemms * small_s(rows, n, k, spilled=spilled)
        else:
            total = gemms * apart * gemm_s(rows / apart, n, k, spilled=spilled)
        if not self.in_place:
            phases = len(self.slots[0].offsets) * len(self.slots[1].offsets)
            values = (planes + self.slots[0].reach) * pitch * self.line * problem.cout
            strided = problem.layout == "NCDHW"
            total += phases * copy_s(values, w.fine * problem.cout, steps=2, spilled=True, strided=strided)
            total += phases * values * in_pieces_s(problem, problem.cout)
        total += copy_s(rows * n, rows * n) + copy_s(planes * lines * w.coarse * n, n, spilled=True)
        return self.count * total

    @property
    def reason(self) -> str:
        how = "small products together" if self.small else "GEMMs"
        rows = self.rows(self.sizes(*(cut.longest for cut in self.cuts)))
        return f"{how} of {self.along_w[0]} taps of width and up to {rows} rows added straight to the sums"

    def _gemms(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Yield the taps of each GEMM, its phases of depth and height, and the planes and lines it is shifted by."""
        (of_d, of_h), w = self.slots, self.axes[2]
        for d, h in product(of_d.moves, of_h.moves):
            for a, b in product(range(d.many), range(h.many)):
                for c in range(0, w.kernel, self.along_w[0]):
                    tap = (((d.tap + a) * self.axes[1].kernel + h.tap + b) * w.kernel) + c
                    shifted = d.shift - of_d.shifts[0], h.shift - of_h.shifts[0]
                    yield tap, c, d.slot + a, h.slot + b, *shifted

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        problem, gemm = self.problem, workspace.gemm
        item, cf = gemm.itemsize, problem.cout
        batch, depth, height, channels = self.block(index)
        n = channels[1] - channels[0]
        sizes = self.sizes(depth[1] - depth[0], height[1] - height[0])
        rows = self.rows(sizes)
        sums = workspace.take(rows, n)
        sums[...] = operands.start(channels)
        if self.in_place:
            grid, (of_b, of_d, of_h, ld, _) = operands.value, operands.steps[0]
            grid_at = address(grid) + (batch * of_b + depth[0] * of_d + height[0] * of_h) * item
        else:
            grid, ld = workspace.take(self.grid_values(sizes)), self.axes[2].stride * cf
            grid_at = address(grid)
            self._fill(grid, operands.value, batch, depth, height, sizes)
        workspace.mark("pack")
        taps, ld_taps = (operands.packed, problem.cin) if self.packs else (operands.filter, problem.pitch)
        planes = sizes.planes + self.slots[0].reach
        for tap, c, d, h, planes_on, lines_on in self._gemms():
            phase = d * len(self.slots[1].offsets) + h
            line = (phase * planes + planes_on) * sizes.pitch + lines_on
            at = (line * self.line + c * self.axes[2].dilation) * cf
            first = (tap * cf * ld_taps + channels[0]) * item
            if self.small:
                self._small(grid, at, taps, first, ld_taps, sums, workspace)
            else:
                self._gemm(gemm, grid_at + at * item, ld, address(taps) + first, ld_taps, sums)
        workspace.mark("gemm")
        if problem.dtype.kind == "c":
            sums += 0  # BLAS multiplies by a complex 1, which makes zeros of either sign
        row, line = n * item, self.rows_of_line * n * item
        shape = sizes.planes, sizes.lines, self.axes[2].coarse, n
        found = laid(sums, shape, 0, (sizes.pitch * line, line, row, item))
        output = five(problem.layout, operands.output, problem.batch, [axis.coarse for axis in self.axes], problem.cin)
        store(output[batch, slice(*depth), slice(*height), :, slice(*channels)], found)
        workspace.mark("store")

    def _gemm(self, gemm: Gemm, grid_at: int, ld: int, taps_at: int, ld_taps: int, sums: Array) -> None:
        """Add the products of all rows with the taps of one GEMM, every `apart`-th row at a time."""
        taps, apart = self.along_w
        (m, n), item = sums.shape, gemm.itemsize
        to, k = address(sums), taps * self.problem.cout
        for i in range(min(apart, m)):
            each = (m - i + apart - 1) // apart
            gemm(each, n, k, grid_at + i * ld * item, apart * ld, False, taps_at, ld_taps, False, to + i * n * item,
                 apart * n, True)  # fmt: skip

    def _small(
        self, grid: Array, at: int, taps: Array, first: int, ld_taps: int, sums: Array, workspace: Workspace
    ) -> None:
        """Form the same products in small pieces, in one step, and add them to the sums."""
        taps_of_w, apart = self.along_w
        (m, n), item, row = sums.shape, sums.itemsize, self.axes[2].stride * self.problem.cout
        pieces, each = self._pieces(m)
        k = taps_of_w * self.problem.cout
        used = workspace.used
        spare = workspace.take(apart * pieces * each, n)
        of_a = (row * item, each * apart * row * item, apart * row * item, item)
        of_c = (n * item, each * apart * n * item, apart * n * item, item)
        a = laid(grid, (apart, pieces, each, k), at * item, of_a)
        b = laid(taps, (k, n), first, (ld_taps * item, item))
        c = laid(spare, (apart, pieces, each, n), 0, of_c)
        np.matmul(a, b, out=c)
        np.add(sums, spare[:m], out=sums)
        workspace.used = used

    def _fill(self, grid: Array, value: Array, batch: int, depth: Range, height: Range, sizes: Sizes) -> None:
        """Copy the fine lines that a block needs, with zeros around them, to its grid."""
        problem, (d, h, w), (of_d, of_h) = self.problem, self.axes, self.slots
        fine = five(problem.layout, value, problem.batch, [axis.fine for axis in self.axes], problem.cout)[batch]
        planes = sizes.planes + of_d.reach
        lines = len(of_d.offsets) * len(of_h.offsets) * planes * sizes.pitch
        grid[lines * self.line * problem.cout :] = 0
        shape = (len(of_d.offsets), len(of_h.offsets), planes, sizes.pitch, self.line, problem.cout)
        cells = grid[: math.prod(shape)].reshape(shape)
        # A line begins at fine position -lo.
        first = max(0, -w.lo)
        last = max(first, min(w.fine, self.line - w.lo))
        to_w, from_w = slice(first + w.lo, last + w.lo), slice(first, last)
        for (i, at_d), (j, at_h) in product(enumerate(of_d.offsets), enumerate(of_h.offsets)):
            to_d, from_d = met(d.stride, d.fine, at_d, depth[0] + of_d.shifts[0], planes)
            to_h, from_h = met(h.stride, h.fine, at_h, height[0] + of_h.shifts[0], sizes.pitch)
            box = cells[i, j]
            part = box[to_d, to_h, to_w]
            if part.shape != box.shape:
                box[...] = 0
            copy(part, fine[from_d, from_h, from_w])


def schedule(problem: Problem, machine: Machine) -> Gather:
    """Choose the blocks for a problem, by the cost of every cut of positions and channels."""
    axes = canonical(problem.axes)
    d, h, w = axes
    of_axes = slots(d, tiled=False), slots(h, tiled=False)
    line = w.stride * -(-((w.coarse - 1) * w.stride + w.extent) // w.stride)

    def candidate(positions: int, parts: int) -> Gather:
        height = Cut(h.coarse, min(h.coarse, max(1, positions // w.coarse)))
        depth = Cut(d.coarse, max(1, positions // (h.coarse * w.coarse)))
        channels = Cut(problem.cin, -(-problem.cin // parts))
        return Gather(problem, axes, of_axes, (depth, height), channels, line, False)

    every = math.prod(problem.coarse)
    parts = [n for n in _PARTS if n == 1 or problem.cin >= n * _WIDE]
    found = [candidate(n, p) for n in sorted({min(n, every) for n in _POSITIONS}) for p in parts]
    found += [replace(plain, small=True) for plain in found if _can_be_small(plain)]
    text = f"{problem.operation}: algorithm='kn2row' cannot do this problem: the lines of a block"
    return best_that_fits(found, machine, text, "'im2col' and 'auto'")


def _can_be_small(plain: Gather) -> bool:
    """Whether products without packing are faster."""
    n, k = plain.channels.longest, plain.along_w[0] * plain.problem.cout
    if plain.in_place or plain.problem.compute_dtype.kind != "f":
        return False
    if any(stop - start != n for start, stop in plain.channels):
        return False
    few = any(n <= most and k <= deepest for most, deepest in _SMALL)
    return few and n * k * _SHORT_PIECE <= small_products()
