"""im2col: a convolution as one GEMM for some rows, of the column buffer with the filter as it lies.

A block is a run of rows of the result, with some of its channels. Its windows of the fine array are copied to columns
in cache, some taps at a time, and their products are added to the rows, in one GEMM or in many that BLAS does not pack.
Columns lie [row, tap], or [tap, row] with channels first, where [channel, row] is formed, and where channels are few:
then whole lines are copied. Rows are written where they stay, but for half precisions and complex numbers. Where rows
are few and taps many, blocks have a share of the taps: each forms a result of its own, and those are added up.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product
from typing import NamedTuple

import numpy as np

from gemmconv.blas import reads_matrix
from gemmconv.lowerings.base import Array, Operands, Usual, Workspace, address, canonical, five, too_far
from gemmconv.lowerings.boxes import Bounds, Box, Cut, Range, digit, located
from gemmconv.lowerings.by_rows import groups
from gemmconv.lowerings.copies import need_finite, store
from gemmconv.lowerings.cost import (
    SHORT_RUN,
    SMALLEST_BUFFER,
    SPILLED_VALUE_S,
    best,
    copy_s,
    gemm_s,
    in_pieces_s,
    packing_s,
    streamed_s,
    unpacked_s,
)
from gemmconv.lowerings.products import LARGEST, multiply, parts_of, parts_values, unpacked
from gemmconv.lowerings.windows import (
    Taps,
    Windows,
    grid_values,
    inside,
    phases_apart,
    rearranges,
    workspace_bytes,
)
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Rows of a block and cuts of the channels that are weighed; channels are not cut below _WIDE.
_ROWS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_PARTS = (1, 2, 4, 8, 16, 32)
_WIDE = 32
# Of the L2 cache: columns that GEMM packs, those of products that are not packed, which read them once, with a cost
# above a share; and the grid of values they are copied from.
_COLUMNS_SHARE, _UNPACKED_SHARE, _SPILLED_SHARE, _GRID_SHARE = 0.4, 2.0, 0.5, 2.0
# Values of a row that are copied in one run, up to which columns of whole lines are weighed too.
_SHORT = 32
# Blocks of whole planes of the result that are weighed too, by how many of them there are.
_BLOCKS = range(2, 9)
# Shares of the taps that are weighed too, the most bytes that they take, and the fewest of a filter: less is done
# before a second worker has begun. In how many pieces the taps of a share are copied.
_SHARES, _MOST_SHARED, _LARGE_FILTER = 2, 1 << 18, 1 << 23
_PIECES = (1, 2, 4)
# Columns of tiles of a filter that has more.
_TILE = 32


class Block(NamedTuple):
    """A run of rows of the result, and some of its channels, from a share of the taps."""

    share: int
    rows: Box
    channels: Range


@dataclass(frozen=True, slots=True)
class Im2Col(Usual):
    """A schedule; see the module."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    cuts: tuple[Cut, Cut, Cut, Cut]  # of batch, depth, height and width of the result
    channels: Cut
    taps: tuple[Taps, ...]  # of the GEMMs of a block
    grid: int  # values
    tap_major: bool  # whether columns lie [tap, channel, row], not [row, tap, channel]
    unpacked: bool  # whether products are formed of small ones that BLAS does not pack
    shares: int = 1  # of the taps
    tiles: int = 0  # columns of the tiles that the filter is packed in, [tile, tap and channel, column]; or 0

    @property
    def widens(self) -> bool:
        """Whether the filter is widened."""
        return self.problem.dtype != self.problem.compute_dtype

    @property
    def count(self) -> int:
        return self.shares * math.prod(map(len, self.cuts)) * len(self.channels)

    @property
    def digits(self) -> list[list[Bounds]]:
        rows = [digit(i, cut) for i, cut in enumerate(self.cuts)]
        return [[()] * self.shares, *rows, digit(4, self.channels)]

    def block(self, index: int) -> Block:
        """Return a block; those of the same rows follow each other."""
        share, (*rows, channels) = located(index, (*self.cuts, self.channels))
        return Block(share, Box(*rows), channels)

    @property
    def rows(self) -> int:
        """The most rows of a block."""
        return math.prod(cut.longest for cut in self.cuts)

    @property
    def deep(self) -> int:
        """The most taps of a GEMM."""
        return max(sizes.taps for sizes in sizes_of(self.taps))

    def _share(self, index: int) -> tuple[Taps, ...]:
        """Return the boxes of taps of a share: as many taps as in the others, if boxes allow."""
        ends = list(accumulate(_many([box]) for box in self.taps))
        start, stop = (bisect_right(ends, ends[-1] * i // self.shares) for i in (index, index + 1))
        return self.taps[start:stop]

    @property
    def direct(self) -> bool:
        """Whether sums are formed in the result."""
        return _is_direct(self.problem)

    @property
    def largest_product(self) -> int:
        least = min(math.prod(cut.shortest for cut in self.cuts), self.channels.shortest)
        if least > 1 and self.unpacked:
            return LARGEST
        if self.rows == 1 and self.problem.layout == "NDHWC":
            n, k = self.channels.shortest, min(_many([box]) for box in self.taps) * self.problem.cout
            if reads_matrix(self.problem.compute_dtype, n, k, False):
                return LARGEST
        return self.rows * self.channels.longest * self.deep * self.problem.cout

    @property
    def workspace_bytes(self) -> int:
        sums = 0 if self.direct else self.rows * self.channels.longest
        columns = self.rows * self.deep * self.problem.cout
        return workspace_bytes((self.grid, columns, self._parts, sums), self.problem.compute_dtype.itemsize)

    @property
    def _parts(self) -> int:
        """The values that parts of unpacked products take."""
        if not self.unpacked:
            return 0
        item = self.problem.compute_dtype.itemsize
        deep = [sizes.taps * self.problem.cout for sizes in sizes_of(self.taps)]
        return max(parts_values(*self._sizes, k, item, len(self.taps) > 1, self.tiles) for k in deep)

    @property
    def _sizes(self) -> tuple[int, int]:
        """The most rows and columns of an unpacked product."""
        m, n = self.rows, self.channels.longest
        return (n, m) if self.problem.layout == "NCDHW" else (m, n)

    @property
    def padded(self) -> bool:
        """Whether zeros around the fine array are multiplied with the filter: with NaN or Inf in it they are NaN."""
        return not all(inside(axis) for axis in self.axes)

    @property
    def packed_values(self) -> int:
        return self._lines * self.problem.cin if self.widens or self.tiles else 0

    @property
    def _lines(self) -> int:
        """The lines of the filter, each of a tap and a channel."""
        return math.prod(self.problem.kernel) * self.problem.cout

    def pack(self, filter: Array, packed: Array) -> None:
        """Widen the filter, or copy it to tiles."""
        self._pack(filter, packed, slice(None))

    def pack_part(self, filter: Array, packed: Array, part: int, parts: int, workspace: Workspace) -> None:
        """Do one of so many parts of that."""
        lines = self._lines
        self._pack(filter, packed, slice(lines * part // parts, lines * (part + 1) // parts))

    def _pack(self, filter: Array, packed: Array, lines: slice) -> None:
        columns = self.tiles or self.problem.cin
        to = packed.reshape(-1, self._lines, columns)[:, lines]
        np.copyto(to, filter.reshape(self._lines, -1, columns)[lines].swapaxes(0, 1), casting="unsafe")

    @property
    def reason(self) -> str:
        channels = f", {self.channels.longest} of {self.problem.cin} channels" if len(self.channels) > 1 else ""
        widened = ", filter widened" if self.widens else f", filter in tiles of {self.tiles}" if self.tiles else ""
        columns = f"columns of {self.deep} taps times {self.problem.cout} channels"
        shares = f", in {self.shares} shares of the taps" if self.shares > 1 else ""
        return f"{columns} for up to {self.rows} rows{channels}{shares}{widened}"

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        problem, w = self.problem, self.axes[2]
        rows = problem.batch * math.prod(problem.coarse) / math.prod(map(len, self.cuts))
        n, cut = problem.cin / len(self.channels), len(self.channels) > 1
        blocks, shared = self.count / self.shares, problem.batch * math.prod(problem.coarse) * problem.cin * self.shares
        item = problem.compute_dtype.itemsize
        streamed = math.prod(problem.filter_shape) * item > machine.l2_bytes
        total = 0.0
        # The largest share, as often as there are shares.
        share = self.taps if self.shares == 1 else max((self._share(i) for i in range(self.shares)), key=_many)
        for (*_, width), taps, boxes in sizes_of(share):
            each, values = 0.0, rows * taps * problem.cout
            if self.grid or not self.padded:
                run = columns_run(problem, w, width, self.tap_major)
                each += copy_s(values, run, spilled=not self.grid, strided=strided(w, self.tap_major, self.grid))
            else:  # tap by tap, after zeros
                run = columns_run(problem, w, 1, self.tap_major)
                each += copy_s(values, run, steps=4 * taps, spilled=True, strided=strided(w, self.tap_major))
                each += copy_s(values, values)
            k = taps * problem.cout
            if min(rows, n) > 1 and self.unpacked:
                parts = parts_of(*self._sizes, k, item, len(self.taps) > 1, self.tiles)
                lies = problem.layout == "NDHWC" and not self.tiles
                each += unpacked_s(rows, n, k, parts, apart=problem.pitch if lies else 0)
                if values * item > machine.l2_bytes * _SPILLED_SHARE:
                    each += values * SPILLED_VALUE_S
            else:
                each += gemm_s(rows, n, k, spilled=rows * n * item > machine.l2_bytes * _SPILLED_SHARE)
            if streamed and (cut or rows > 1):
                each += streamed_s(n * k, n if cut else math.inf)
            total += self.shares * boxes * each
        if self.padded or rearranges(problem, w, self.tap_major):
            total += self.shares * copy_s(
                self.grid, w.fine, spilled=True, strided=rearranges(problem, w, self.tap_major)
            )
            total += self.shares * self.grid * in_pieces_s(problem, problem.cout)
        stored = copy_s(rows * n, problem.cin, steps=1 if self.direct else 2, spilled=True)
        added = copy_s(2 * shared, problem.cin) if self.shares > 1 else 0.0
        packing = packing_s(problem, copy_s(2 * self.packed_values, self.tiles)) if self.tiles else 0.0
        return blocks * total + self.count * stored + added + packing

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        problem, gemm = self.problem, workspace.gemm
        item, channels_first = gemm.itemsize, problem.layout == "NCDHW"
        windows, parts = self._memory(workspace)
        share, rows, channels = self.block(index)
        m, n = math.prod(rows.sizes), channels[1] - channels[0]
        output = five(problem.layout, operands.output, problem.batch, [axis.coarse for axis in self.axes], problem.cin)
        output = output[(*(slice(*r) for r in rows), slice(*channels))]
        if self.direct:
            sums, ld = output, operands.steps[2][4 if channels_first else 3]
        else:
            sums = five(problem.layout, workspace.take(m * n), rows.sizes[0], rows.sizes[1:], n)
            ld = m if channels_first else n
        start = 0 if share else operands.start(channels)
        small = min(m, n) > 1 and self.unpacked
        if not small:
            sums[...] = start
        to = address(sums)
        flat = sums.reshape(m, n)  # rows follow each other, so this is a view
        _, kh, kw = (axis.kernel for axis in self.axes)
        taps = operands.packed if self.packed_values else operands.filter
        if self.tiles:
            taps = taps.reshape(-1, self._lines, self.tiles)[slice(*(n // self.tiles for n in channels))]
        else:
            taps = taps.reshape(-1, problem.cin)[:, slice(*channels)]
        opened = windows.open(operands.value, rows, self.window)
        for i, box in enumerate(self._share(share)):
            workspace.mark("overhead")
            windows.copy(rows, box, opened)
            workspace.mark("pack")
            k = math.prod(stop - start for start, stop in box) * problem.cout
            (d, _), (h, _), (w, _) = box
            first = ((d * kh + h) * kw + w) * problem.cout
            if small:
                filter, columns = taps[..., first : first + k, :], windows.buffer[: m * k]
                by_row = columns.reshape(k, m).T if self.tap_major else columns.reshape(m, k)
                if channels_first:
                    multiply(filter.T, by_row.T, flat.T, parts, adds=i > 0)
                else:
                    multiply(by_row, filter, flat, parts, adds=i > 0)
            else:
                at, ld_taps = address(taps[first:]), taps.strides[0] // item
                if channels_first:
                    gemm(n, m, k, at, ld_taps, True, windows.address, m, False, to, ld, True)
                else:
                    ld_row = m if self.tap_major else k
                    gemm(m, n, k, windows.address, ld_row, self.tap_major, at, ld_taps, False, to, ld, True)
            workspace.mark("gemm")
        if small:
            # Of zero too, for its sign: products that underflow give -0.0.
            np.add(sums, start, sums)
        if self.padded:
            need_finite(sums, taps)
        if not self.direct:
            if problem.dtype.kind == "c":
                sums += 0
            store(output, sums)
        workspace.mark("store")

    def _memory(self, workspace: Workspace) -> tuple[Windows, Array]:
        columns = self.rows * self.deep * self.problem.cout
        windows = Windows(self.problem, self.axes, workspace, columns, self.grid, self.tap_major)
        return windows, workspace.take(self._parts)

    @property
    def window(self) -> Taps:
        """All taps."""
        d, h, w = (axis.kernel for axis in self.axes)
        return (0, d), (0, h), (0, w)


def _many(boxes: Sequence[Taps]) -> int:
    """Return the taps of some boxes."""
    return sum(math.prod(stop - start for start, stop in box) for box in boxes)


def share_counts(problem: Problem) -> list[int]:
    """Return in how many shares of the taps the result of a convolution may be formed."""
    item = problem.compute_dtype.itemsize
    shared = _SHARES * problem.batch * math.prod(problem.coarse) * problem.cin * item
    large = math.prod(problem.filter_shape) * item >= _LARGE_FILTER and math.prod(problem.kernel) >= _SHARES
    # Groups are blocks of their own.
    return [1, _SHARES] if problem.groups == 1 and large and shared <= _MOST_SHARED else [1]


def _is_direct(problem: Problem) -> bool:
    """Whether sums can be formed in the result; BLAS multiplies by a complex 1, which makes zeros of either sign.

    Passes over short runs of channels, with other groups' between them, take longer than a copy.
    """
    short = problem.groups > 1 and problem.layout == "NDHWC" and problem.cin < SHORT_RUN
    plain = problem.dtype.kind == "f" and problem.dtype == problem.compute_dtype
    return plain and not short and not too_far(problem)


def columns_run(problem: Problem, w: Axis, taps: int, tap_major: bool) -> float:
    """Return the length of inner loops when columns of so many taps along width are copied."""
    return w.coarse if tap_major else problem.cout * (taps if w.dilation == 1 else 1)


def strided(w: Axis, tap_major: bool, grid: int = 0) -> bool:
    """Whether values that are copied to columns are not beside each other: in a grid those of a line are."""
    return tap_major and w.stride > 1 and not grid


def orders(problem: Problem, w: Axis) -> list[bool]:
    """Return whether columns are weighed that lie [tap, channel, row], or [row, tap, channel], or both."""
    if problem.layout == "NCDHW":
        return [True]
    return [False, True] if columns_run(problem, w, w.kernel, False) <= _SHORT else [False]


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


class Sizes(NamedTuple):
    """The sizes of a box of taps, how many these are, and how many boxes have these sizes."""

    sizes: tuple[int, ...]
    taps: int
    boxes: int


@lru_cache(maxsize=256)
def sizes_of(boxes: tuple[Taps, ...]) -> tuple[Sizes, ...]:
    """Return the sizes of boxes of taps."""
    found = Counter(tuple(stop - start for start, stop in box) for box in boxes)
    return tuple(Sizes(sizes, math.prod(sizes), many) for sizes, many in found.items())


def schedule(problem: Problem, machine: Machine) -> Im2Col:
    """Choose the blocks for a problem, by the cost of every cut of rows and channels."""
    axes = canonical(problem.axes)
    item = problem.compute_dtype.itemsize
    columns = [int(machine.l2_bytes * share) // item for share in (_COLUMNS_SHARE, _UNPACKED_SHARE)]
    most = int(machine.l2_bytes * _GRID_SHARE) // item
    d, h, w = (axis.coarse for axis in axes)
    every = problem.batch * d * h * w

    def candidate(
        rows: int, parts: int, tap_major: bool, small: bool, tiles: int, shares: int = 1, pieces: int = 1
    ) -> Im2Col:
        cuts = row_cuts(problem, axes, rows)
        longest = [cut.longest for cut in cuts]
        channels = Cut(problem.cin, -(-problem.cin // parts))
        most_taps = min(
            columns[small] // (math.prod(longest) * problem.cout), math.prod(problem.kernel) // (shares * pieces)
        )
        taps = tap_boxes(axes, max(1, most_taps))
        apart = phases_apart(axes[2], tap_major)
        grid = longest[0] * grid_values(axes, longest[1:], problem.kernel, apart) * problem.cout
        grid = grid if grid <= most else 0
        if math.prod(cut.shortest for cut in cuts) == 1 or any(stop % max(1, tiles) for _, stop in channels):
            tiles = 0
        return Im2Col(problem, axes, cuts, channels, taps, grid, tap_major, small, shares, tiles)

    planes = [-(-n // blocks) * each for n, each in ((problem.batch, d * h * w), (d, h * w)) for blocks in _BLOCKS]
    parts = [n for n in _PARTS if n == 1 or problem.cin >= n * _WIDE]
    every_rows = sorted({min(n, every) for n in (*_ROWS, *planes)})
    formed = [(False, 0)]
    if unpacked(problem):
        formed.append((True, 0))
        if problem.layout == "NDHWC" and problem.cin > _TILE:
            formed.append((True, _TILE))
    ways = [(order, *way) for order, way in product(orders(problem, axes[2]), formed)]
    found = [candidate(r, n, *way) for r in every_rows for n in parts for way in ways]
    for shares in share_counts(problem)[1:] if _is_direct(problem) else ():
        found += [candidate(every, 1, *way, shares, pieces) for way in ways for pieces in _PIECES]
    return best(found, machine)
