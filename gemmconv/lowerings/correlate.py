"""kn2row for the filter's gradient: GEMMs of lines as they lie, transposed, with the coarse lines, added up over runs.

A block is some taps of depth and height with all of width, and some coarse channels: a piece of the gradient that no
other block writes. It walks over all lines, a run of them at a time. The coarse lines are copied once, with zeros
behind each; for each tap of depth and height the fine lines it meets are copied, with zeros around them. The row of a
coarse position is then the run of kw * channels values its taps of width reach, so no columns are made; BLAS takes no
rows that overlap, so a GEMM takes every second or third. Rows that run over the end of a line meet the zeros behind
coarse lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from gemmconv.blas import Gemm
from gemmconv.lowerings.base import (
    Array,
    AsItLies,
    CannotLowerError,
    Operands,
    Workspace,
    address,
    aligned,
    canonical,
    five,
)
from gemmconv.lowerings.boxes import Bounds, Cut, Range, digit
from gemmconv.lowerings.copies import copy, store
from gemmconv.lowerings.cost import SMALLEST_BUFFER, best_that_fits, copy_s, gemm_s
from gemmconv.lowerings.im2col import tap_boxes
from gemmconv.lowerings.phases import reached
from gemmconv.lowerings.windows import Taps
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Positions of a run and cuts of the coarse channels that are weighed; channels are not cut below _WIDE.
_POSITIONS = (128, 256, 512, 1024, 2048, 4096)
_PARTS = (1, 2, 4, 8)
_WIDE = 32


@dataclass(frozen=True, slots=True)
class Correlate(AsItLies):
    """A schedule; see the module. `filter` of the operands is the coarse array."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    cuts: tuple[Cut, Cut]  # of depth and height of the coarse array
    channels: Cut
    taps: tuple[Taps, ...]  # of blocks
    line: int  # fine positions of a line as it is copied

    wants_finite_filter = True
    wants_finite_value = True
    whole_behind = 0  # every row is read
    reads_beyond = 0

    @property
    def count(self) -> int:
        return len(self.taps) * len(self.channels)

    @property
    def digits(self) -> list[list[Bounds]]:
        return [[tuple(enumerate(box)) for box in self.taps], digit(4, self.channels)]

    def block(self, index: int) -> tuple[Taps, Range]:
        """Return a block: its taps and channels."""
        taps, channels = divmod(index, len(self.channels))
        return self.taps[taps], self.channels[channels]

    @property
    def pitch(self) -> int:
        """Rows from line to line."""
        return self.line // self.axes[2].stride

    @property
    def along_w(self) -> tuple[int, int]:
        """Taps of width of one GEMM, and how many rows apart those are that do not overlap."""
        w = self.axes[2]
        taps = w.kernel if w.dilation == 1 else 1
        return taps, -(-taps // w.stride)

    @property
    def lines(self) -> int:
        """The most lines of a run."""
        return math.prod(cut.longest for cut in self.cuts)

    @property
    def in_place(self) -> bool:
        """Whether sums are formed in the result."""
        return self.problem.dtype.kind == "f" and self.problem.dtype == self.problem.compute_dtype

    def values(self, lines: int) -> int:
        """Return the values of so many fine lines, with those that rows run over their end."""
        return (lines * self.line + self.axes[2].extent) * self.problem.cout

    @property
    def largest_product(self) -> int:
        rows = self.lines * self.pitch
        return rows * self.channels.longest * self.along_w[0] * self.problem.cout

    @property
    def workspace_bytes(self) -> int:
        n, item = self.channels.longest, self.problem.compute_dtype.itemsize
        deep = max(math.prod(stop - start for start, stop in box) for box in self.taps)
        sums = 0 if self.in_place else deep * self.problem.cout * n
        sizes = self.values(self.lines), self.lines * self.pitch * n, sums
        return sum(aligned(values * item) for values in sizes)

    @property
    def reason(self) -> str:
        channels = f", {self.channels.longest} of {self.problem.cin} channels" if len(self.channels) > 1 else ""
        return f"{self.along_w[0]} taps of width at a time, {self.lines} lines as they lie{channels}"

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for runs of mean size; see cost.py."""
        problem, w = self.problem, self.axes[2]
        runs = problem.batch * math.prod(map(len, self.cuts))
        lines = problem.batch * math.prod(problem.coarse) / max(1, w.coarse) / runs
        n = problem.cin / len(self.channels)
        taps, apart = self.along_w
        pairs = math.prod(axis.kernel for axis in self.axes[:2])
        run = problem.cout * (w.fine if problem.groups == 1 else 1)
        each = copy_s(2 * self.values(int(lines)), run, steps=2, spilled=True)
        rows = lines * self.pitch
        # Products of the taps of height, of the same rows, are as fast as one for all of them.
        high = self.axes[1].kernel
        each += -(-w.kernel // taps) * apart * gemm_s(high * taps * problem.cout, n, rows / apart) / high
        total = pairs * each * len(self.channels)
        return runs * (total + self.count * copy_s(rows * n, n * (w.coarse if problem.groups == 1 else 1), steps=2))

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        problem, gemm, w = self.problem, workspace.gemm, self.axes[2]
        box, channels = self.block(index)
        n, item = channels[1] - channels[0], workspace.gemm.itemsize
        fine = five(problem.layout, operands.value, problem.batch, [a.fine for a in self.axes], problem.cout)
        coarse = five(problem.layout, operands.filter, problem.batch, [a.coarse for a in self.axes], problem.cin)
        output = operands.output.reshape(*(axis.kernel for axis in self.axes), problem.cout, problem.cin)
        (d0, d1), (h0, h1), _ = box
        output = output[d0:d1, h0:h1, :, :, slice(*channels)]
        values, rows = workspace.take(self.values(self.lines)), workspace.take(self.lines * self.pitch * n)
        sums = output if self.in_place else workspace.take(*output.shape)
        ld = operands.steps[2][3] if self.in_place else n
        sums[...] = 0
        for batch, depth, height in product(range(problem.batch), *self.cuts):
            sizes = depth[1] - depth[0], height[1] - height[0]
            many = sizes[0] * sizes[1]
            by_row = rows[: many * self.pitch * n].reshape(*sizes, self.pitch, n)
            by_row[:, :, w.coarse :] = 0
            copy(by_row[:, :, : w.coarse], coarse[batch, slice(*depth), slice(*height), :, slice(*channels)])
            for a, b in product(range(d0, d1), range(h0, h1)):
                lands = self._fill(values, fine[batch], a, b, depth, height)
                workspace.mark("pack")
                if lands:
                    to = address(sums[a - d0, b - h0])
                    self._multiply(gemm, many * self.pitch, n, address(values), address(rows), to, ld, item)
                workspace.mark("gemm")
        if not self.in_place:
            if problem.dtype.kind == "c":
                sums += 0  # BLAS multiplies by a complex 1, which makes zeros of either sign
            store(output, sums)
        workspace.mark("store")

    def _multiply(self, gemm: Gemm, m: int, n: int, values: int, rows: int, to: int, ld: int, item: int) -> None:
        """Add the products of all rows for the taps of width, every `apart`-th row at a time."""
        (taps, apart), w, cf = self.along_w, self.axes[2], self.problem.cout
        for c in range(0, w.kernel, taps):
            for i in range(min(apart, m)):
                at = values + (i * w.stride + c * w.dilation) * cf * item
                gemm(taps * cf, n, (m - i + apart - 1) // apart, at, apart * w.stride * cf, True,
                     rows + i * n * item, apart * n, False, to + c * cf * ld * item, ld, True)  # fmt: skip

    def _fill(self, values: Array, fine: Array, a: int, b: int, depth: Range, height: Range) -> bool:
        """Copy the fine lines that coarse ones meet with a tap, with zeros around them; whether there are any."""
        (d, h, w), cf = self.axes, self.problem.cout
        lines = (depth[1] - depth[0]) * (height[1] - height[0])
        values[lines * self.line * cf : self.values(lines)] = 0
        cells = values[: lines * self.line * cf].reshape(depth[1] - depth[0], -1, self.line, cf)
        # A line begins at fine position -lo.
        first = max(0, -w.lo)
        last = max(first, min(w.fine, self.line - w.lo))
        (to_d, from_d), (to_h, from_h) = reached(d, a, depth), reached(h, b, height)
        part = cells[to_d, to_h, first + w.lo : last + w.lo]
        if part.shape != cells.shape:
            cells[...] = 0
        if part.size:
            copy(part, fine[from_d, from_h, first:last])
        return part.size > 0


def schedule(problem: Problem, machine: Machine) -> Correlate:
    """Choose the blocks for a problem, by the cost of every cut of positions, taps and channels."""
    text = f"{problem.operation}: algorithm='kn2row' cannot do this problem:"
    if problem.layout != "NDHWC":
        raise CannotLowerError(f"{text} it needs channels last, got {problem.layout}; 'im2col' and 'auto' can")
    axes = canonical(problem.axes)
    _, h, w = axes
    line = w.stride * -(-((w.coarse - 1) * w.stride + w.extent) // w.stride)

    def candidates() -> Iterator[Correlate]:
        parts = [n for n in _PARTS if n == 1 or problem.cin >= n * _WIDE]
        boxes = {tap_boxes(axes, most) for most in (math.prod(problem.kernel), h.kernel * w.kernel, w.kernel)}
        every = math.prod(problem.coarse)
        for positions, taps, n in product(sorted({min(p, every) for p in _POSITIONS}), sorted(boxes), parts):
            height = Cut(h.coarse, min(h.coarse, max(1, positions // w.coarse)))
            depth = Cut(axes[0].coarse, max(1, positions // (h.coarse * w.coarse)))
            yield Correlate(problem, axes, (depth, height), Cut(problem.cin, -(-problem.cin // n)), taps, line)

    return best_that_fits(list(candidates()), machine, f"{text} the lines of a run", "'im2col' and 'auto'")
