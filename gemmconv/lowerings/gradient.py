"""The filter's gradient as GEMMs of the transposed column buffer with the coarse array, added up over runs of rows.

A block is a box of taps with some coarse channels: a piece of the gradient that no other block writes. It walks over
all rows, a run at a time: their windows are copied to columns in cache (as im2col does, for these taps alone), and a
GEMM adds the products with the coarse rows to the gradient, or to sums that are stored there at the end. Where the
gradient is small and rows are many, a block may have a share of the rows: each forms a gradient of its own, and those
are added up. The order of the sums does not depend on the workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gemmconv.lowerings.base import Array, AsItLies, Operands, Workspace, address, canonical, five, must_widen
from gemmconv.lowerings.boxes import Bounds, Box, Cut, Range, digit
from gemmconv.lowerings.copies import store
from gemmconv.lowerings.cost import (
    SHORT_RUN,
    SMALLEST_BUFFER,
    SPILLED_VALUE_S,
    best,
    copy_s,
    gemm_s,
    in_pieces_s,
    unpacked_s,
)
from gemmconv.lowerings.im2col import columns_run, orders, row_cuts, sizes_of, strided, tap_boxes
from gemmconv.lowerings.products import LARGEST, multiply, parts_values, unpacked
from gemmconv.lowerings.windows import Taps, Windows, grid_values, inside, phases_apart, rearranges, workspace_bytes
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Rows of a GEMM and cuts of the coarse channels that are weighed; channels are not cut below _WIDE.
_ROWS = (64, 128, 256, 512, 1024, 2048, 4096)
_PARTS = (1, 2, 4, 8, 16)
# Shares of the rows that are weighed, unless they would take more bytes.
_SHARES, _MOST_SHARED = (1, 4, 8), 1 << 22
_WIDE = 32
# Boxes of taps, unless larger ones do not fit the cache.
_MOST_BOXES = 1024
# Of the L2 cache: columns, and the grid of values they are copied from.
_COLUMNS_SHARE, _GRID_SHARE = 0.75, 1.0


@dataclass(frozen=True, slots=True)
class Gradient(AsItLies):
    """A schedule; see the module. `filter` of the operands is the coarse array."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    cuts: tuple[Cut, Cut, Cut, Cut]  # of batch, depth, height and width of the coarse array
    channels: Cut
    taps: tuple[Taps, ...]  # of blocks
    grid: int  # values
    tap_major: bool  # whether columns lie [tap, channel, row], not [row, tap, channel]
    unpacked: bool  # whether products are formed of small ones that BLAS does not pack
    shares: int = 1  # of the rows

    @property
    def wants_finite_filter(self) -> bool:
        return not all(inside(axis) for axis in self.axes)

    @property
    def count(self) -> int:
        return self.shares * len(self.taps) * len(self.channels)

    @property
    def digits(self) -> list[list[Bounds]]:
        return [[()] * self.shares, [tuple(enumerate(box)) for box in self.taps], digit(4, self.channels)]

    whole_behind = 0  # every row is read
    reads_beyond = 0

    def block(self, index: int) -> tuple[int, Taps, Range]:
        """Return a block: its share, taps and channels."""
        index, channels = divmod(index, len(self.channels))
        share, taps = divmod(index, len(self.taps))
        return share, self.taps[taps], self.channels[channels]

    @property
    def rows(self) -> int:
        """The most rows of a GEMM."""
        return math.prod(cut.longest for cut in self.cuts)

    @property
    def deep(self) -> int:
        """The most taps of a block."""
        return max(sizes.taps for sizes in sizes_of(self.taps))

    @property
    def widens(self) -> bool:
        """Whether rows of the coarse array are widened, and sums not formed in the result."""
        return must_widen(self.problem)

    @property
    def direct(self) -> bool:
        """Whether sums are formed in the result.

        BLAS multiplies by a complex 1, which makes zeros of either sign; and additions in short runs of channels, with
        others between them, take longer than a copy.
        """
        short = self.channels.longest < min(SHORT_RUN, self.problem.pitch)
        return self.problem.dtype.kind == "f" and not self.widens and not short

    @property
    def largest_product(self) -> int:
        taps = min(sizes.taps for sizes in sizes_of(self.taps))
        if min(taps * self.problem.cout, self.channels.shortest) > 1 and self.unpacked:
            return LARGEST
        return self.rows * self.channels.longest * self.deep * self.problem.cout

    @property
    def workspace_bytes(self) -> int:
        problem, n = self.problem, self.channels.longest
        columns = self.rows * self.deep * problem.cout
        sums = 0 if self.direct else self.deep * problem.cout * n
        values = self.grid, columns, sums, self._parts, self.widens * self.rows * n
        return workspace_bytes(values, problem.compute_dtype.itemsize)

    @property
    def _parts(self) -> int:
        """The values that parts of unpacked products take."""
        k, item = self.deep * self.problem.cout, self.problem.compute_dtype.itemsize
        turned = not self.tap_major
        return parts_values(k, self.channels.longest, self.rows, item, True, turned=turned) if self.unpacked else 0

    @property
    def reason(self) -> str:
        channels = f", {self.channels.longest} of {self.problem.cin} channels" if len(self.channels) > 1 else ""
        shares = f", in {self.shares} shares of the rows" if self.shares > 1 else ""
        columns = f"columns of {self.deep} taps times {self.problem.cout} channels"
        return f"{columns}, {self.rows} rows at a time{channels}{shares}"

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for runs of rows of mean size; see cost.py."""
        problem, w = self.problem, self.axes[2]
        runs = math.prod(map(len, self.cuts))
        rows = problem.batch * math.prod(problem.coarse) / runs
        n = problem.cin / len(self.channels)
        # Each box of taps reads the coarse array.
        far = math.prod(problem.coarse_shape) * problem.compute_dtype.itemsize > machine.l2_bytes
        total, moved = 0.0, rearranges(problem, w, self.tap_major)
        for many, taps, boxes in sizes_of(self.taps):
            k = taps * problem.cout
            each = copy_s(
                rows * k,
                columns_run(problem, w, many[2], self.tap_major),
                spilled=not self.grid,
                strided=strided(w, self.tap_major, self.grid),
            )
            if self.unpacked:
                each += unpacked_s(k, n, rows, 1, apart=problem.pitch, turned=not self.tap_major)
            else:
                each += gemm_s(k, n, rows)
            each += rows * n * (SPILLED_VALUE_S * far + in_pieces_s(problem, problem.cin))
            if self.grid:
                positions = self.cuts[0].longest * grid_values(self.axes, [cut.longest for cut in self.cuts[1:]], many)
                each += copy_s(positions * problem.cout, w.fine, spilled=True, strided=moved)
                each += positions * problem.cout * in_pieces_s(problem, problem.cout)
            total += boxes * runs * each
        added = self.shares * math.prod(problem.filter_shape) if self.shares > 1 else 0
        return total * len(self.channels) + copy_s(2 * added, problem.cin, spilled=True)

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        problem, gemm = self.problem, workspace.gemm
        channels_first, item = problem.layout == "NCDHW", gemm.itemsize
        windows, parts = self._memory(workspace)
        share, taps, channels = self.block(index)
        n = channels[1] - channels[0]
        (d0, d1), (h0, h1), (w0, w1) = taps
        kernel = [axis.kernel for axis in self.axes]
        k = math.prod(stop - start for start, stop in taps) * problem.cout
        output = operands.output.reshape(*kernel, problem.cout, problem.cin)
        output = output[d0:d1, h0:h1, w0:w1, :, slice(*channels)]
        coarse = [axis.coarse for axis in self.axes]
        by_row = five(problem.layout, operands.filter, problem.batch, coarse, problem.cin)[..., slice(*channels)]
        sums = output if self.direct else workspace.take(k, n)
        ld_sums = operands.steps[2][3] if self.direct else n
        sums[...] = 0
        to = address(sums)
        wide = workspace.take(self.rows * n) if self.widens else None
        runs = list(product(*self.cuts))
        mine = slice(len(runs) * share // self.shares, len(runs) * (share + 1) // self.shares)
        for batch, depth, height, width in runs[mine]:
            rows = Box(batch, depth, height, width)
            m = math.prod(rows.sizes)
            workspace.mark("overhead")
            windows.copy(rows, taps, windows.open(operands.value, rows, taps))
            part = by_row[tuple(slice(*r) for r in rows)]
            ld = operands.steps[1][4 if channels_first else 3]
            if wide is not None:
                widened = five(problem.layout, wide[: m * n], rows.sizes[0], rows.sizes[1:], n)
                np.copyto(widened, part, casting="unsafe")
                part, ld = widened, m if channels_first else n
            workspace.mark("pack")
            if self.unpacked and min(k, n) > 1:
                columns = windows.buffer[: m * k]
                by_tap = columns.reshape(k, m) if self.tap_major else columns.reshape(m, k).T
                multiply(
                    by_tap,
                    part.reshape(m, n),
                    as_strided(sums, (k, n), (ld_sums * item, item), subok=True),
                    parts,
                    adds=True,
                    turned=not self.tap_major,
                )
            elif channels_first:
                gemm(k, n, m, windows.address, m, False, address(part), ld, True, to, ld_sums, True)
            else:
                columns_ld, lie_by_row = m if self.tap_major else k, not self.tap_major
                gemm(k, n, m, windows.address, columns_ld, lie_by_row, address(part), ld, False, to, ld_sums, True)
            workspace.mark("gemm")
        if not self.direct:
            if problem.dtype.kind == "c":
                sums += 0  # BLAS multiplies by a complex 1, which makes zeros of either sign
            store(output, sums.reshape(output.shape))
        workspace.mark("store")

    def _memory(self, workspace: Workspace) -> tuple[Windows, Array]:
        columns = self.rows * self.deep * self.problem.cout
        windows = Windows(self.problem, self.axes, workspace, columns, self.grid, self.tap_major)
        return windows, workspace.take(self._parts)


def schedule(problem: Problem, machine: Machine) -> Gradient:
    """Choose the blocks for a problem, by the cost of every cut of taps, channels and rows."""
    axes = canonical(problem.axes)
    item = problem.compute_dtype.itemsize
    columns = int(machine.l2_bytes * _COLUMNS_SHARE) // item
    most = int(machine.l2_bytes * _GRID_SHARE) // item
    every = problem.batch * math.prod(problem.coarse)
    kernel = math.prod(problem.kernel)

    def made(rows: int, taps: int, tap_major: bool) -> Iterator[Gradient]:
        cuts = row_cuts(problem, axes, rows)
        boxes = tap_boxes(axes, taps)
        longest = [cut.longest for cut in cuts]
        grid, apart = 0, phases_apart(axes[2], tap_major)
        for sizes in sizes_of(boxes):
            values = longest[0] * grid_values(axes, longest[1:], sizes.sizes, apart) * problem.cout
            grid = max(grid, values if values <= most else 0)
        of_rows = sorted({min(n, math.prod(map(len, cuts))) for n in most_shares})
        for n, small, shares in product(parts, ways, of_rows):
            channels = Cut(problem.cin, -(-problem.cin // n))
            yield Gradient(problem, axes, cuts, channels, boxes, grid, tap_major, small, shares)

    formed = math.prod(problem.filter_shape) * item
    full_precision = problem.dtype.kind == "f" and not must_widen(problem)
    most_shares = [n for n in _SHARES if n == 1 or (full_precision and n * formed <= _MOST_SHARED)]
    parts = [n for n in _PARTS if n == 1 or problem.cin >= n * _WIDE]
    # With channels first BLAS has no good kernel for the operands of small products.
    ways = [False, True] if problem.layout == "NDHWC" and unpacked(problem) else [False]
    found: list[Gradient] = []
    for rows in sorted({min(n, every) for n in _ROWS}):
        most_taps = max(1, columns // (rows * problem.cout))
        wanted = {kernel, axes[1].kernel * axes[2].kernel, axes[2].kernel, 1}
        of_taps = {n for n in wanted if n <= most_taps and kernel <= n * _MOST_BOXES} or {min(kernel, most_taps)}
        for taps, tap_major in product(sorted(of_taps), orders(problem, axes[2])):
            found += made(rows, taps, tap_major)
    return best(found, machine)
