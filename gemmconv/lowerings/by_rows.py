"""col2im some rows at a time: one GEMM of a few hundred rows with all the taps that land in the block.

Row-stationary, for few output channels, where one tap alone makes a thin GEMM, and for problems so small that the
number of steps decides. Columns lie [tap, row], so that the additions' inner loops are as long as a row. Rows near a
block's border are taken with just the taps that land inside, so no product is formed twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple, TypeVar

import numpy as np

from gemmconv.lowerings.base import (
    Array,
    AsItLies,
    Operands,
    Workspace,
    aligned,
    canonical,
    five,
    must_widen,
    simplified,
)
from gemmconv.lowerings.boxes import Bounds, Box, Cut, Index, Range, digit, located
from gemmconv.lowerings.columns import Buffers, Columns, Piece, columns_values, formed_s, never_packed
from gemmconv.lowerings.copies import as_items, item_size, store
from gemmconv.lowerings.cost import SHORT_RUN, SMALLEST_BUFFER, best, copy_s, pass_s
from gemmconv.lowerings.phases import Place, Slots, places, slots, unreached
from gemmconv.lowerings.products import LARGEST
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

_FEW_ROWS, _MOST_ROWS = 16, 4096
_MOST_TAPS = 1024  # filter rows of one GEMM, unless all columns are few
_MOST_COLUMNS = 65536
_FEW_VALUES = 256  # of an accumulator: blocks are not cut below this
# Positions of a block up to which all are stored in one copy, whose inner loops are short.
_FEW_CELLS = 1024
_L2_SHARE = 0.75
_COLUMNS_SHARE = 1.0
_PACK_SHARE = 0.25

T = TypeVar("T")


class Block(NamedTuple):
    """A box of the output: batch entries, and q of the slots in depth, height and width."""

    batch: Range
    depth: Range
    height: Range
    width: Range


class Step(NamedTuple):
    """Coarse positions of one axis, and the taps that carry them into a block."""

    rows: Range
    taps: Range


class Product(NamedTuple):
    """One GEMM: its rows, the pieces of the filter, m and n, its columns as an array, and where they are added."""

    rows: Box
    pieces: list[Piece]
    m: int
    n: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    moves: list[tuple[Index, Index]]  # of the columns, of the sums


class Program(NamedTuple):
    """What a block does: the shape of its sums, its GEMMs, its region of the output, and where sums are stored.

    With `tiles`, [batch, q, slot, q, slot, q, slot], they are all stored at once, in the region seen so.
    """

    shape: tuple[int, ...]
    products: list[Product]
    region: Index
    stores: list[tuple[Index, Index]]
    tiles: tuple[int, ...]


class Seen(NamedTuple):
    """What a program sees of a workspace: its sums, and for each GEMM where columns are added; what is stored."""

    sums: Array
    additions: list[list[tuple[Array, Array]]]
    item_size: int  # of the items that channels are stored as, or 0
    stored: list[Array]


@dataclass(frozen=True, slots=True)
class ByRows(AsItLies):
    """A schedule; see the module."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    slots: tuple[Slots, Slots, Slots]
    gaps: bool
    cuts: tuple[Cut, ...]  # of batch, and q in depth, height and width
    rows: int  # the most rows of a GEMM
    taps: int  # the most filter rows of a GEMM
    channels_last: bool  # whether columns and accumulators are, or rows
    widens: bool  # whether operands are widened, `depth` input channels at a time, instead of used as they lie
    depth: int

    @property
    def count(self) -> int:
        return math.prod(map(len, self.cuts))

    @property
    def digits(self) -> list[list[Bounds]]:
        along = enumerate(self._by_axis(self.cuts[1:]), 1)
        spatial = [digit(i, [of_axis.span(axis, q) for q in cut]) for i, (axis, of_axis, cut) in along]
        return [digit(0, self.cuts[0]), *spatial]

    def block(self, index: int) -> Block:
        """Return a block."""
        _, spans = located(index, self.cuts)
        return Block(*spans)

    @property
    def largest_product(self) -> int:
        if len(self.cuts[3]) == 1 and lines_never_packed(
            self.problem, self.axes[2], self.rows, self.taps, not self.channels_last
        ):
            return LARGEST
        return self.rows * self.taps * self.depth

    @property
    def workspace_bytes(self) -> int:
        item = self.problem.compute_dtype.itemsize
        sums = math.prod(self._sums_shape([cut.longest for cut in self.cuts]))
        columns = columns_values(self.problem, self.rows, self.taps, self.depth, self.widens)
        return sum(aligned(values * item) for values in (*columns, sums))

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core: blocks in the middle, times the number of blocks; see cost.py."""
        problem = self.problem
        run = self._run
        spilled = self.workspace_bytes > machine.l2_bytes * _L2_SHARE
        total = 0.0
        for d, h, w in product(*(sample(*parts) for parts in self._by_axis(self.cuts[1:]))):
            rows = self.cuts[0].longest * d.rows * h.rows * w.rows
            calls = max(1.0, rows / self.rows)
            taps = d.taps * h.taps * w.taps
            _, kh, kw = [axis.kernel for axis in self.axes]
            parts = d.taps * h.taps if w.taps < kw else d.taps if h.taps < kh else 1  # pieces of the filter
            parts = max(parts, -(-taps * problem.cout // self.taps))
            time_s = formed_s(
                problem,
                rows / calls,
                taps * problem.cout / parts,
                tap_major=not self.channels_last,
                spilled=spilled,
            )
            time_s *= calls * parts
            adds = math.prod(self._moves) / math.prod(problem.kernel) * taps
            time_s += calls * adds * pass_s(rows / calls * problem.cout * taps / adds, min(run, rows), spilled=spilled)
            total += time_s * len(self.cuts[0]) * d.share * h.share * w.share
        scattered = problem.cout > 1 and self.channels_last != (problem.layout == "NDHWC")
        scattered = scattered or (self.axes[2].stride > 1 and not self.channels_last)
        stores = self.count * max(1, math.prod(len(slots.offsets) for slots in self.slots))
        values = math.prod(problem.fine_shape) / stores
        return total + stores * copy_s(values, run, spilled=True, strided=scattered)

    @property
    def reason(self) -> str:
        widened = ", widened block by block" if self.widens else ""
        return (
            f"a GEMM of up to {self.taps} taps times output channels for up to {self.rows} rows; "
            f"columns added along {'channels' if self.channels_last else 'rows'}{widened}"
        )

    @property
    def _run(self) -> int:
        """The length of inner loops."""
        return self.problem.cout if self.channels_last else self.axes[2].coarse

    @property
    def _moves(self) -> tuple[int, ...]:
        return tuple(max(1, len(slots.moves)) for slots in self.slots)

    def _by_axis(self, parts: Sequence[T]) -> Iterator[tuple[Axis, Slots, T]]:
        return zip(self.axes, self.slots, parts, strict=True)

    def _steps(self, block: Block) -> Iterator[tuple[Step, ...]]:
        """Yield which rows meet a block with which taps, axis by axis."""
        return product(*(axis_steps(axis, slots.span(axis, q)) for axis, slots, q in self._by_axis(block[1:])))

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        if self._run >= SHORT_RUN:
            workspace.buffer(SMALLEST_BUFFER)
        problem = self.problem
        program = self._made(self.block(index))
        workspace.reset()
        buffers = self._buffers(workspace)
        seen = self._seen(program, buffers, workspace)
        columns = Columns(buffers, self.axes, operands)
        seen.sums[...] = operands.start((0, problem.cout), 7)
        for gemm, additions in zip(program.products, seen.additions, strict=True):
            workspace.mark("overhead")
            columns.form(columns.locate(gemm.rows), gemm.pieces, gemm.n if self.channels_last else gemm.m)
            workspace.mark("gemm")
            for cells, column in additions:
                np.add(cells, column, cells)
            workspace.mark("col2im")
        output = five(problem.layout, operands.output, problem.batch, [axis.fine for axis in self.axes], problem.cout)
        if self.gaps:
            output[program.region] = operands.start((0, problem.cout))
        if seen.item_size:
            output = as_items(output, seen.item_size)
        for source, (_, to) in zip(seen.stored, program.stores, strict=True):
            cells = output[to]
            if program.tiles:
                cells = cells.reshape(*program.tiles, *cells.shape[4:])
            if seen.item_size:
                np.copyto(cells, source)
            else:
                store(cells, source)
        workspace.mark("store")

    def _buffers(self, workspace: Workspace) -> Buffers:
        tap_major = not self.channels_last
        return Buffers(
            self.problem, workspace, self.rows, self.taps, self.depth, tap_major=tap_major, widens=self.widens
        )

    def _seen(self, program: Program, buffers: Buffers, workspace: Workspace) -> Seen:
        """Return what the steps of a program see of a workspace, for which Python takes longer than for small steps."""
        if self.channels_last:
            sums = workspace.take(*program.shape[1:], program.shape[0]).transpose(7, 0, 1, 2, 3, 4, 5, 6)
        else:
            sums = workspace.take(*program.shape)
        additions = []
        for gemm in program.products:
            column = buffers.columns[: gemm.m * gemm.n].reshape(gemm.shape).transpose(gemm.order)
            additions.append([(sums[to].squeeze(), column[source].squeeze()) for source, to in gemm.moves])
        size = item_size(self.problem, self.problem.cout) if self.channels_last else 0
        last = sums.transpose(1, 2, 3, 4, 5, 6, 7, 0)
        last = as_items(last, size) if size else last
        if program.tiles:
            stored = [last.transpose(0, 2, 1, 4, 3, 6, 5, *range(7, last.ndim))]
        else:
            stored = [last[(*source[1:], ...)] for source, _ in program.stores]
        return Seen(sums, additions, size, stored)

    def _made(self, block: Block) -> Program:
        outer = 1 if self.problem.layout == "NCDHW" else 0
        depth, height, width = (axis.coarse for axis in self.axes)
        whole = (self.problem.batch, depth, height, width)
        products: list[Product] = []
        for d, h, w in self._steps(block):
            for taps in groups((d.taps, h.taps, w.taps), self.taps // self.problem.cout):
                boxes = chunks(Box(block.batch, d.rows, h.rows, w.rows), whole, self.rows, outer)
                products.extend(self._product(block, box, taps) for box in boxes)
        parts = list(self._by_axis(block[1:]))
        region = (slice(*block.batch), *(slice(*slots.span(axis, q)) for axis, slots, q in parts))
        stores: list[tuple[Index, Index]] = []
        of_axes = [list(places(*part)) for part in parts]
        for d_, h_, w_ in product(*of_axes):
            source = (slice(None), slice(None), d_.slot, d_.q, h_.slot, h_.q, w_.slot, w_.q)
            stores.append((source, (slice(*block.batch), d_.fine, h_.fine, w_.fine)))
        shape = self._sums_shape([stop - start for start, stop in block])
        tiles: tuple[int, ...] = ()
        if (
            len(stores) > 1
            and math.prod(shape[1:]) <= _FEW_CELLS
            and all(map(tiled, of_axes, shape[2::2], shape[3::2]))
        ):
            spans = [slice(found[0].fine.start, found[-1].fine.stop) for found in of_axes]
            stores = [((), (slice(*block.batch), *spans))]
            tiles = shape[1], shape[3], shape[2], shape[5], shape[4], shape[7], shape[6]
        return Program(shape, products, region, stores, tiles)

    def _product(self, block: Block, box: Box, taps: tuple[Range, Range, Range]) -> Product:
        """Return one GEMM, a contiguous box of rows with a box of taps, and where its columns are added."""
        _, h, w = self.axes
        cout = self.problem.cout
        many = tuple(stop - start for start, stop in taps)
        # Seen as [channel, batch, tap d, row d, tap h, row h, tap w, row w], whatever lies innermost.
        if self.channels_last:
            shape, order = (*box.sizes, *many, cout), (7, 0, 4, 1, 5, 2, 6, 3)
        else:
            shape, order = (*many, cout, *box.sizes), (3, 4, 0, 5, 1, 6, 2, 7)
        batch = slice(box.batch[0] - block.batch[0], box.batch[1] - block.batch[0])
        along = (
            meetings(slots, tap, rows, q)
            for (_, slots, q), tap, rows in zip(self._by_axis(block[1:]), taps, box[1:], strict=True)
        )
        every = slice(None)
        moves = [
            ((every, every, *from_d, *from_h, *from_w), (every, batch, *to_d, *to_h, *to_w))
            for (from_d, to_d), (from_h, to_h), (from_w, to_w) in product(*along)
        ]
        found = pieces(taps, (h.kernel, w.kernel), cout)
        return Product(box, found, math.prod(box.sizes), math.prod(many) * cout, shape, order, moves)

    def _sums_shape(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of an accumulator: output channels, batch, then slots and q of each axis."""
        d, h, w = (len(slots.offsets) for slots in self.slots)
        return self.problem.cout, sizes[0], d, sizes[1], h, sizes[2], w, sizes[3]


def tiled(found: Sequence[Place], slots: int, count: int) -> bool:
    """Whether an axis' slots are neighbours behind each of its positions, all of them in the output."""
    alike = all(
        place.q == slice(0, count) and place.fine.start == found[0].fine.start + i and place.fine.step == slots
        for i, place in enumerate(found)
    )
    return len(found) == slots and alike


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


def lines_never_packed(problem: Problem, w: Axis, rows: int, taps: int, tap_major: bool) -> bool:
    """Whether columns of whole lines are all formed without packing, of at most so many rows and rows of the filter."""
    fewest = w.coarse if w.coarse <= rows else 1, w.kernel * problem.cout if w.kernel * problem.cout <= taps else 1
    return never_packed(problem, (fewest[0], rows), (fewest[1], taps), tap_major)


class Sampled(NamedTuple):
    rows: int
    taps: int
    share: float  # how many steps of an axis it stands for


def sample(axis: Axis, slots: Slots, cut: Cut) -> list[Sampled]:
    """Return the steps of a few neighbouring intervals, as many as phases, in the middle of an axis."""
    few = min(len(cut), axis.stride)
    start = (len(cut) - few) // 2
    found = (step for i in range(start, start + few) for step in axis_steps(axis, slots.span(axis, cut[i])))
    alike = Counter((s.rows[1] - s.rows[0], s.taps[1] - s.taps[0]) for s in found)
    return [Sampled(rows, taps, many * len(cut) / few) for (rows, taps), many in alike.items()]


def groups(taps: tuple[Range, Range, Range], most: int) -> Iterator[tuple[Range, Range, Range]]:
    """Cut a box of taps into boxes of at most `most` taps."""
    cut: list[list[Range]] = []
    inner = [1, 1, 1]
    for i in (1, 0):
        inner[i] = inner[i + 1] * (taps[i + 1][1] - taps[i + 1][0])
    for (start, stop), size in zip(taps, inner, strict=True):
        cut.append([(start + a, start + b) for a, b in Cut(stop - start, max(1, most // size))])
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
        ranges.append([(start + a, start + b) for a, b in Cut(stop - start, length)])
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


def meetings(slots: Slots, taps: Range, rows: Range, q: Range) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Return which taps and rows of a box meet an interval of q together, and the slots and q they land on."""
    found = []
    for move in slots.moves:
        first, last = max(move.tap, taps[0]), min(move.tap + move.many, taps[1])
        start, stop = max(rows[0], q[0] - move.shift), min(rows[1], q[1] - move.shift)
        if first < last and start < stop:
            slot = move.slot + first - move.tap
            found.append(
                (
                    (slice(first - taps[0], last - taps[0]), slice(start - rows[0], stop - rows[0])),
                    (slice(slot, slot + last - first), slice(start + move.shift - q[0], stop + move.shift - q[0])),
                )
            )
    return found


def schedule(problem: Problem, machine: Machine) -> ByRows:
    """Choose the blocks for a problem, by the cost of ever smaller accumulators of whole planes and rows."""
    problem = simplified(problem)
    axes = canonical(problem.axes)
    of_axes = slots(axes[0]), slots(axes[1]), slots(axes[2])
    depth, height, width = (of_axis.count for of_axis in of_axes)
    each = max(1, math.prod(len(of_axis.offsets) for of_axis in of_axes))
    item = problem.compute_dtype.itemsize
    most = max(_MOST_TAPS, _MOST_COLUMNS // (problem.batch * math.prod(problem.coarse)))
    taps = min(max(1, most // problem.cout), math.prod(problem.kernel)) * problem.cout
    rows = max(_FEW_ROWS, min(_MOST_ROWS, int(machine.l2_bytes * _COLUMNS_SHARE) // (taps * item)))
    rows = min(rows, problem.batch * math.prod(problem.coarse))
    widens = must_widen(problem)
    channels = problem.cin
    if widens:
        channels = min(channels, max(1, int(machine.l2_bytes * _PACK_SHARE) // item // max(rows, taps)))
    gaps = any(unreached(axis, of_axis) for axis, of_axis in zip(axes, of_axes, strict=True))

    def candidate(positions: int) -> ByRows:
        batch = 1 if problem.layout == "NCDHW" else max(1, positions // (depth * height * width))
        chunks = (batch, max(1, positions // (height * width)), max(1, positions // width), max(1, positions))
        whole = (problem.batch, depth, height, width)
        cuts = tuple(Cut(n, min(n, chunk)) for n, chunk in zip(whole, chunks, strict=True))
        return ByRows(problem, axes, of_axes, gaps, cuts, rows, taps, problem.cout > axes[2].coarse, widens, channels)

    positions = [problem.batch * depth * height * width]
    while positions[-1] > 1 and positions[-1] * each * problem.cout > _FEW_VALUES:
        positions.append(positions[-1] // 2)
    return best([candidate(n) for n in positions], machine)
