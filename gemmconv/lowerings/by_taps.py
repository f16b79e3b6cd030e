"""col2im a tap at a time: one GEMM for each tap and block, its columns added where that tap lands.

Filter-stationary: a block is a box of output positions of one residue in depth and height. For each tap the GEMM takes
the rows of the value that land in the block, so no product is formed twice, and writes [row, Cout] columns; adding
them is one shift of whole rows. Sums stay in an accumulator in cache, stored once. Where nothing overlaps (a kernel no
larger than its stride) there is no accumulator: columns are stored as the rows they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np

from gemmconv.blas import reads_matrix
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
from gemmconv.lowerings.columns import Buffers, Columns, Piece, columns_values, formed_s, never_packed, turn
from gemmconv.lowerings.copies import copy, store
from gemmconv.lowerings.cost import (
    ENOUGH_BLOCKS,
    SCATTERED_VALUE_S,
    SHORT_RUN,
    SMALLEST_BUFFER,
    TURNED_VALUE_S,
    best,
    copy_s,
    packing_s,
    pass_s,
)
from gemmconv.lowerings.phases import Phase, landing, phases, slots, tileable, tiles, unreached
from gemmconv.lowerings.products import LARGEST, tile_columns, unpacked
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Accumulator and columns must leave room in the L2 cache for operands; a share of it for widened ones.
_L2_SHARE = 0.75
_PACK_SHARE = 0.5
# Cuts along Cout that are weighed; GEMM wants 16 columns at the least.
_PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)
_FEW_CHANNELS = 16


class Block(NamedTuple):
    """A box of the output: batch entries, q of the phases in depth, height and width, output channels."""

    batch: Range
    depth: Range
    height: Range
    width: Range
    channels: Range
    pairs: tuple[tuple[int, int], ...]  # phases of depth and height


class Step(NamedTuple):
    """One GEMM: its rows, the pieces of the filter, its columns as an array, and which are added to what."""

    rows: Box
    pieces: list[Piece]
    width: int  # columns
    shape: tuple[int, ...]
    moves: list[tuple[Index, int, Index]]  # of the columns, phase of W, of that phase


class Landed(NamedTuple):
    """With how many of an axis' positions its taps land in the output: the fewest, and the part of all."""

    fewest: int
    part: float


@dataclass(frozen=True, slots=True)
class ByTaps(AsItLies):
    """A schedule; see the module. `direct` says that columns are stored without an accumulator."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    phases: tuple[tuple[Phase, ...], tuple[Phase, ...], tuple[Phase, ...]]
    landed: tuple[Landed, Landed, Landed]  # on each axis
    lanes: int
    joined: bool  # whether one GEMM takes all taps of W, not those of a tile or a single one
    direct: bool
    gaps: bool
    cuts: tuple[Cut, ...]  # of batch, q in depth, height and width, and output channels
    groups: tuple[tuple[tuple[int, int], ...], ...]  # pairs of phases that blocks do together
    rows: int  # the most rows of a GEMM
    widens: bool  # whether operands are widened, `depth` input channels at a time, instead of used as they lie
    depth: int
    turned: int  # the columns of the tiles of a filter that is packed, for products that BLAS does not pack; or 0
    gathers: bool  # whether the rows that land are copied: joined, those of all taps of W

    @property
    def count(self) -> int:
        return math.prod(map(len, self.cuts)) * len(self.groups)

    @property
    def digits(self) -> list[list[Bounds]]:
        batch, *q, channels = self.cuts
        spans = zip(self.axes, self._before, q, strict=True)
        spatial = [
            digit(i, [(max(0, a * axis.stride + o), min(axis.fine, b * axis.stride + o)) for a, b in cut])
            for i, (axis, o, cut) in enumerate(spans, 1)
        ]
        groups: list[Bounds] = [()] * len(self.groups)
        return [digit(0, batch), *spatial, digit(4, channels), groups]

    @property
    def packed_values(self) -> int:
        return math.prod(self.problem.kernel) * self.problem.cout * self.problem.cin if self.turned else 0

    def pack(self, filter: Array, packed: Array) -> None:
        """Turn the filter."""
        turn(filter, packed, self.turned, 0, 1)

    def pack_part(self, filter: Array, packed: Array, part: int, parts: int, workspace: Workspace) -> None:
        """Turn some tiles of the filter."""
        turn(filter, packed, self.turned, part, parts)

    @property
    def whole_behind(self) -> int:
        return next((i for i, cut in enumerate(self.cuts[:3]) if cut.longest > 1), 3)

    @property
    def _before(self) -> tuple[int, int, int]:
        """Fine positions by which a block's region begins before its first q."""
        return 0, 0, self.phases[2][0].offset if self.lanes > 1 else 0

    def block(self, index: int) -> Block:
        """Return a block; those of the same rows follow each other."""
        index, group = divmod(index, len(self.groups))
        _, (batch, depth, height, width, channels) = located(index, self.cuts)
        return Block(batch, depth, height, width, channels, self.groups[group])

    @property
    def channels(self) -> int:
        """The most output channels of a block."""
        return self.cuts[4].longest

    @property
    def taps(self) -> int:
        """Taps of one GEMM."""
        return self.axes[2].kernel if self.joined else self.lanes

    @property
    def largest_product(self) -> int:
        # The fewest rows of a product are a whole line, or what lands of one, unless lines are cut.
        fewest = self.axes[2].coarse if len(self.cuts[3]) == 1 else 1
        if self.gathers and fewest > 1:
            fewest = self.landed[2].fewest
        taps = self.cuts[4].shortest, self.taps * self.channels
        if self.turned or never_packed(self.problem, (fewest, self.rows), taps, False, self.gathers):
            return LARGEST
        if self.rows == 1 and not self.widens and reads_matrix(self.problem.dtype, taps[0], self.depth, True):
            return LARGEST
        return self.rows * self.taps * self.channels * self.depth

    @property
    def workspace_bytes(self) -> int:
        item = self.problem.compute_dtype.itemsize
        n = self.taps * self.channels
        columns = columns_values(self.problem, self.rows, n, self.depth, self.widens, self.turned, self.gathers)
        return sum(aligned(values * item) for values in (*columns, self._sums))

    @property
    def _sums(self) -> int:
        """The most values of an accumulator."""
        return 0 if self.direct else len(self.phases[2]) * self.lanes * math.prod(cut.longest for cut in self.cuts)

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core; see cost.py."""
        problem, (d, h, w) = self.problem, self.axes
        n = self.taps * self.channels
        boxes = math.prod(map(len, self.cuts))
        pieces = 1 if len(self.cuts[4]) == 1 else self.taps
        gemms = boxes * d.kernel * h.kernel * w.kernel // self.taps
        coarse = problem.batch * d.coarse * h.coarse * w.coarse
        rows = min(self.rows, coarse * len(self.cuts[4]) / boxes)
        formed = rows * self._formed
        spilled = self.workspace_bytes > machine.l2_bytes * _L2_SHARE
        scattered = problem.layout == "NCDHW"
        row = self.cuts[3].longest * self.lanes * self.channels
        # A row of the output is contiguous where all its lanes, phases and channels are stored together.
        stored = row if w.stride == self.lanes and len(self.cuts[4]) == 1 else self.channels
        steps = gemms * self.taps // self.lanes
        of_rows = partial(formed_s, problem, formed, tap_major=False, turned=self.turned, gathers=self.gathers)
        total = gemms * pieces * of_rows(n / pieces, spilled=spilled)
        if self.gathers:
            copied = copy_s(formed * problem.cin, problem.cin, steps=2, spilled=True, strided=scattered)
            total += max(self.count, boxes * self._gathers) * copied
        total += packing_s(problem, self.packed_values * TURNED_VALUE_S)
        if self.direct:
            if scattered:
                return total + steps * rows * self.lanes * self.channels * SCATTERED_VALUE_S
            return total + steps * pass_s(rows * self.lanes * self.channels, stored, spilled=True)
        run = self.channels if self.joined else row
        total += steps * pass_s(rows * self.lanes * self.channels, run, spilled=spilled)
        stores = max(1, boxes * math.prod(map(len, self.phases)))
        values = math.prod(problem.fine_shape) / stores
        return total + stores * (copy_s(values, stored, strided=scattered, spilled=True) + copy_s(values, row))

    @property
    def _formed(self) -> float:
        """The part of the products of all rows that is formed: of hulls, those of the rows between are too."""
        lines = 2 if self.joined else 3  # all taps of W take the same rows
        return math.prod(of.part for of in self.landed[: lines if self.gathers else min(2, self.whole_behind)])

    @property
    def _gathers(self) -> int:
        """How often rows are gathered for a box of the output: not anew for the next tap if the same rows land."""
        kernels = [axis.kernel for axis in self.axes]
        kernels[2] //= self.taps
        cut = [i for i, of in enumerate(self.landed) if of.part < 1]
        return math.prod(kernels[: max(cut, default=-1) + 1])

    @property
    def reason(self) -> str:
        channels = f", {self.channels} of {self.problem.cout} output channels" if len(self.cuts[4]) > 1 else ""
        fold = "columns stored as rows, nothing overlaps" if self.direct else "columns added tap by tap"
        packed = ", widened block by block" if self.widens else ", filter packed" if self.turned else ""
        together = f"; {len(self.groups[0])} phases a block" if len(self.groups[0]) > 1 else ""
        taps = f"{self.axes[2].kernel} taps" if self.joined else "tap"
        gathered = " gathered" if self.gathers else ""
        return f"a GEMM for each {taps}, up to {self.rows}{gathered} rows{channels}; {fold}{packed}{together}"

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        if (self.channels if self.joined else self.axes[2].coarse * self.lanes * self.channels) >= SHORT_RUN:
            workspace.buffer(SMALLEST_BUFFER)
        block = self.block(index)
        problem, axes = self.problem, self.axes
        output = five(problem.layout, operands.output, problem.batch, [axis.fine for axis in axes], problem.cout)
        output = output[slice(*block.batch), ..., slice(*block.channels)]
        start = operands.start(block.channels)
        if self.gaps:
            spans = zip(axes, block[1:4], self._before, strict=True)
            output[:, *(slice(max(0, q[0] * a.stride + o), q[1] * a.stride + o) for a, q, o in spans)] = start
        workspace.reset()
        buffers = Buffers(
            problem,
            workspace,
            self.rows,
            self.taps * self.channels,
            self.depth,
            tap_major=False,
            widens=self.widens,
            turned=self.turned,
            gathers=self.gathers,
        )
        columns = Columns(buffers, axes, operands)
        sums = None if self.direct else workspace.take(*self._sums_shape(block))
        for d, h in block.pairs:
            depth, height = self.phases[0][d], self.phases[1][h]
            if sums is None:
                targets = self._rows_of(output, block, depth, height)
            else:
                targets = list(sums)
                sums[...] = start
            for step in self._steps(block, depth, height):
                workspace.mark("overhead")
                columns.form(columns.locate(step.rows), step.pieces, step.width)
                workspace.mark("gemm")
                column = columns.buffer[: math.prod(step.shape)].reshape(step.shape)
                for source, phase, to in step.moves:
                    cells = targets[phase][to]
                    if not self.direct:
                        np.add(column[source], cells, cells)
                        continue
                    # Where nothing overlaps a zero is added for its sign: products that underflow give -0.0.
                    stored = column[source]
                    np.add(stored, start, stored if problem.groups > 1 else cells)
                    if problem.groups > 1:  # short runs are copied faster than added to
                        copy(cells, stored)
                workspace.mark("store" if self.direct else "col2im")
            if sums is not None:
                self._store(output, block, depth, height, sums)
                workspace.mark("store")

    def _steps(self, block: Block, depth: Phase, height: Phase) -> Iterator[Step]:
        """Yield the steps of a pair of phases: the columns of each tap, and where they are added."""
        d, h, w = self.axes
        sizes = (self.problem.batch, d.coarse, h.coarse, w.coarse)
        channels, cout = block.channels[1] - block.channels[0], self.problem.cout
        cut = len(self.cuts[3]) > 1  # then blocks are pieces of single rows
        along_w = [(i, *tap) for i, phase in enumerate(self.phases[2]) for tap in self._along(2, phase, block.width)]
        along_h = self._along(1, height, block.height)
        # Joined, every tap meets the rows of all of them: what does not land must fall outside of the output.
        groups = [along_w] if self.joined and along_w and not cut else [[one] for one in along_w]
        every = slice(None)
        for tap_d, at_d, to_d in self._along(0, depth, block.depth):
            for tap_h, at_h, to_h in along_h:
                first = (tap_d * h.kernel + tap_h) * w.kernel * cout + block.channels[0]
                for group in groups:
                    # From the first to the last tap that lands in the block.
                    start = min(tap for _, tap, _, _ in group)
                    taps = max(tap for _, tap, _, _ in group) + self.lanes - start
                    at_w = min(at[0] for _, _, at, _ in group), max(at[1] for _, _, at, _ in group)
                    box = Box(block.batch, at_d, at_h, at_w)
                    hull = box
                    if not self.gathers:
                        hull = (box if cut else box._replace(width=(0, w.coarse))).hull(sizes)
                    # As it lies, the filter's rows of several taps follow each other with all their channels only.
                    each = taps if channels == cout else 1
                    found = [
                        Piece(first + (start + j) * cout, channels * each, j * channels) for j in range(0, taps, each)
                    ]
                    shape = (*hull.sizes, taps // self.lanes, self.lanes, channels)
                    moves = []
                    for i, tap, at, to_w in group:
                        inside = box._replace(width=at).within(hull)
                        moves.append(((*inside, (tap - start) // self.lanes), i, (every, to_d, to_h, to_w)))
                    yield Step(hull, found, taps * channels, shape, moves)

    def _along(self, axis: int, phase: Phase, q: Range) -> list[tuple[int, Range, slice]]:
        """Return for each tap of a phase that lands in an interval of q: the tap, which rows, and to where."""
        found = []
        for tap, shift in phase.taps:
            start, stop = landing(self.axes[axis], phase, shift, q)
            if start < stop:
                found.append((tap, (start, stop), slice(start + shift - q[0], stop + shift - q[0])))
        return found

    def _rows_of(self, output: Array, block: Block, depth: Phase, height: Phase) -> list[Array]:
        """Return the output's cells of a block and pair, as [batch, d, h, w, lane, channel] for each phase of W."""
        part = self._part(output, block, depth, height)
        w = self.axes[2]
        found = []
        for phase in self.phases[2]:
            start, stop = block.width[0] * w.stride + phase.offset, block.width[1] * w.stride
            if self.lanes > 1:  # splitting an axis in two never copies
                tiled = (block.width[1] - block.width[0], self.lanes)
                found.append(part[:, :, :, start:stop].reshape(*part.shape[:3], *tiled, part.shape[4]))
            else:
                found.append(part[:, :, :, start : stop : w.stride, np.newaxis])
        return found

    def _store(self, output: Array, block: Block, depth: Phase, height: Phase, sums: Array) -> None:
        """Store the accumulated sums of a block and pair."""
        part = self._part(output, block, depth, height)
        w = self.axes[2]
        for phase, result in zip(self.phases[2], sums, strict=True):
            cells = result.reshape(*result.shape[:3], -1, result.shape[5])[:, : part.shape[1], : part.shape[2]]
            start = block.width[0] * w.stride + phase.offset
            step = w.stride if self.lanes == 1 else 1
            before = max(0, -start)
            to = part[:, :, :, start + before : start + before + (cells.shape[3] - before) * step : step]
            store(to, cells[:, :, :, before : before + to.shape[3]])

    def _part(self, output: Array, block: Block, depth: Phase, height: Phase) -> Array:
        """Return the output's planes and rows that a block owns in one pair of phases."""
        d, h, _ = self.axes
        return output[
            :,
            block.depth[0] * d.stride + depth.offset : block.depth[1] * d.stride : d.stride,
            block.height[0] * h.stride + height.offset : block.height[1] * h.stride : h.stride,
        ]

    def _sums_shape(self, block: Block) -> tuple[int, ...]:
        batch, depth, height, width, channels = (stop - start for start, stop in block[:5])
        return len(self.phases[2]), batch, depth, height, width, self.lanes, channels


def schedule(problem: Problem, machine: Machine) -> ByTaps:
    """Choose the blocks for a problem, by the cost of every cut of rows and of output channels."""
    problem = simplified(problem)
    axes = canonical(problem.axes)
    d, h, w = axes
    tiled = tileable(w)
    found = (phases(d), phases(h), tiles(w) if tiled else phases(w))
    landed = _landed(d, found[0]), _landed(h, found[1]), _landed(w, found[2])
    lanes = w.stride if tiled else 1
    counts = (-(-d.fine // d.stride), -(-h.fine // h.stride), found[2][0].count if tiled else -(-w.fine // w.stride))
    widens = must_widen(problem)
    exact = not tiled or (found[2][0].offset == 0 and counts[2] * lanes == w.fine)
    direct = all(axis.tiles for axis in axes) and exact and not widens
    gaps = any(unreached(axis, slots(axis, tiled=False)) for axis in axes[: 2 if tiled else 3])
    if direct:
        gaps = gaps or not all(axis.covers for axis in axes)
    pairs = [(i, j) for i in range(len(found[0])) for j in range(len(found[1]))]
    pairs.sort(key=lambda pair: -len(found[0][pair[0]].taps) * len(found[1][pair[1]].taps))

    def made(rows: int) -> Iterator[ByTaps]:
        batch = 1 if problem.layout == "NCDHW" else max(1, rows // math.prod(counts))
        chunks = (max(1, rows // (counts[1] * counts[2])), max(1, rows // counts[2]), rows)
        cuts = [
            Cut(problem.batch, batch),
            *(Cut(n, min(n, chunk)) for n, chunk in zip(counts, chunks, strict=True)),
        ]
        boxes = math.prod(map(len, cuts))
        groups = [tuple(pairs)] if boxes >= ENOUGH_BLOCKS or gaps or not pairs else [(pair,) for pair in pairs]
        chunk = [cut.longest for cut in cuts]
        if len(cuts[3]) == 1:  # hulls hold whole lines then, even where fewer positions land
            chunk[3] = w.coarse
        most = largest_hull(chunk, (problem.batch, d.coarse, h.coarse, w.coarse))
        for (channels, joined, turned), gathers in product(ways, (False, True) if may_gather else (False,)):
            depth = problem.cin
            if widens:
                share = int(machine.l2_bytes * _PACK_SHARE) // problem.compute_dtype.itemsize
                depth = min(depth, max(1, share // max(most, (w.kernel if joined else lanes) * channels)))
            cut = (*cuts, Cut(problem.cout, channels))
            how = widens, depth, turned, gathers
            yield ByTaps(problem, axes, found, landed, lanes, joined, direct, gaps, cut, tuple(groups), most, *how)

    positions = problem.batch * math.prod(counts)
    rows = [positions] + [2**i for i in range(4, 13) if 2**i < positions]
    channels = [Cut(problem.cout, -(-problem.cout // parts)).longest for parts in _PARTS]
    # BLAS' kernels want whole vectors of columns.
    channels = sorted({c for c in channels if c % _FEW_CHANNELS == 0} | {channels[0]})
    # Filter rows of all taps of W follow each other where output channels are not cut.
    wide = [(channels[-1], True)] if not tiled and w.kernel > 1 else []
    shapes = [*((c, False) for c in channels), *wide]
    ways = [(*shape, 0) for shape in shapes]
    if unpacked(problem) and not widens:
        turned = ((*shape, tile_columns(Cut(problem.cout, shape[0]), problem.cin)) for shape in shapes)
        ways += [way for way in turned if way[2]]
    # For products of lines: rows with channels first are turned as they are gathered, others begin with cache lines.
    may_gather = not widens and (unpacked(problem) or problem.layout == "NCDHW" or min(of.part for of in landed) < 1)
    return best([one for n in rows for one in made(n)], machine)


def _landed(axis: Axis, of_axis: Sequence[Phase]) -> Landed:
    every = [landing(axis, phase, shift, (0, phase.count)) for phase in of_axis for _, shift in phase.taps]
    found = [stop - start for start, stop in every]
    return Landed(min(found, default=1), sum(found) / max(1, axis.coarse * len(found)))


def largest_hull(chunk: Sequence[int], whole: tuple[int, int, int, int]) -> int:
    """Return the most rows of the hull of a box of at most `chunk` rows, in a grid of the sizes `whole`."""
    rows = 1
    for size, limit in zip(whole, chunk, strict=True):
        rows *= size if rows > 1 else min(size, limit)
    return rows
