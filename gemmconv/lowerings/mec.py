"""MEC: columns of two axes' taps, where neighbouring lines make up the third's, for all groups in a few small products.

im2col copies a value once for each tap. Memory-efficient convolution (Cho and Brand, ICML 2017) copies it for the taps
of two axes: the columns of a line, [tap, channel, position], lie behind those of the line before, and what a position
reaches along the free axis is the columns of neighbouring lines, one matrix with no further copy. Positions are what
BLAS' kernels have in vectors here, and the few channels of a group's result what they form at once. Small products that
are not packed are as fast with four of these as with many, so groups need no zeros between them, and those of many
groups and lines are formed in one step.

Values are copied once to a grid with channels first and zeros around them, one for each phase that is gathered; taps
are starts of runs in it. A transposed convolution is one such problem for each phase of its result. Of few channels
neighbouring results are rows of a product too (stacked.py). Sums have the lines of the grid, and what is between lines
is not stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gemmconv.blas import small_products
from gemmconv.lowerings.base import Array, CannotLowerError, Operands, Usual, Workspace, aligned, canonical, five, order
from gemmconv.lowerings.boxes import Bounds, Cut, Range, digit, each, evenly, located
from gemmconv.lowerings.copies import copy, need_finite, store
from gemmconv.lowerings.cost import (
    SMALLEST_BUFFER,
    apart_s,
    best_that_fits,
    cleared_s,
    copy_s,
    few_channels_s,
    pass_s,
    turned_s,
)
from gemmconv.lowerings.phases import Along, Run, slots, unreached
from gemmconv.lowerings.products import LARGEST, unpacked
from gemmconv.lowerings.stacked import Stacked
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# How the axes may be taken: the free one, in which blocks are cut first, and the two behind it, lines along the last.
_ORDERS = ((0, 1, 2), (1, 0, 2))
# Into how many parts the free axis is cut that are weighed, and how many positions of a line a block has about.
_PARTS = (1, 2, 4, 8, 16, 32, 64)
_POSITIONS = (256, 1024)
# Positions of a product: a multiple of BLAS' vectors, at most.
_VECTOR, _MOST = 16, 512
# Phases of a transposed convolution: of more each is small, and planning them takes longer than they do.
_MOST_PHASES = 64
# Rows of a product up to which neighbouring results are stacked: BLAS forms fewer than four in the time of four.
_STACKED = 4
# Values of a line that are turned in one inner loop, at most, as the cost model sees it.
FEW = 8


class Product(NamedTuple):
    """The taps of a product on each axis, the line of its columns that each begins at, where its weights are packed."""

    run: Run
    start: int  # positions of the next axis
    taps: tuple[list[int], list[int]]
    weights: slice
    shape: tuple[int, ...]


class Pair(NamedTuple):
    """A slot of both other axes: runs of the grid that columns are, and the products of each slot of the free axis."""

    slots: tuple[int, int]
    copies: list[tuple[int, int, int]]  # phase, and start on either axis
    products: list[list[Product]]


# How the axes are read and written: the free one, the next, of which results may be stacked, and the last.
Axes = tuple[Along, Along | Stacked, Along]


class Sizes(NamedTuple):
    """Of a block: positions of its free axis and the next, lines of its grid, their length, and that of its columns.

    And of these the positions of the sums.
    """

    free: int
    behind: int
    lines: int
    line: int
    columns: int
    row: int


@lru_cache(maxsize=128)
def _pairs(along: Axes, groups: int, rows: int, channels: int, split: bool) -> list[Pair]:
    """Return what every block of such a schedule does, whatever its size."""
    found, at = [], 0
    free, behind, last = along
    for c, b in product(range(len(last.taps)), range(len(behind.taps))):
        of_b, of_c = behind.taps[b], last.taps[c]
        # With taps apart, slots of the next axis have the same columns.
        copies = [(phase, 0, start) for phase, start, _ in of_c]
        starts = [(start, [tap]) for _, start, tap in of_b]
        if not split:
            copies = [(i * len(last.offsets) + j, m, n) for (i, m, _), (j, n, _) in product(of_b, of_c)]
            starts = [(0, [tap for _, _, tap in of_b])] * (len(of_b) > 0)
        products: list[list[Product]] = []
        for runs in free.runs:
            products.append([])
            for run, (start, taps) in product(runs, starts) if copies else []:
                shape = groups, rows, len(run.taps) * len(copies) * channels
                weights = slice(at, at + math.prod(shape))
                products[-1].append(Product(run, start, (taps, [tap for _, _, tap in of_c]), weights, shape))
                at = weights.stop
        found.append(Pair((b, c), copies, products))
    return found


@dataclass(frozen=True)
class Mec(Usual):
    """A schedule; see the module. `problem` has `own_groups` of the one that was asked as one, by their own filters."""

    problem: Problem
    own_groups: int
    taken: tuple[int, int, int]  # the order of the axes, the free one first
    along: Axes  # in this order
    cuts: tuple[Cut, Cut]  # of the free axis and the next
    split: bool  # whether taps of the next axis are starts in the columns too, each a product that is added

    wants_finite_filter = True

    @cached_property
    def channels(self) -> tuple[int, int]:
        """Channels of a group, of the operand and of the result."""
        coarse, fine = self.problem.cin // self.own_groups, self.problem.cout // self.own_groups
        return (fine, coarse) if self.along[0].gathers else (coarse, fine)

    @property
    def rows(self) -> int:
        """Rows of a product: of each stacked result its channels; a single one is doubled, or NumPy takes a vector."""
        return max(2, self.stacked * self.channels[1])

    @property
    def stacked(self) -> int:
        """How many neighbouring results of the next axis are rows of one product."""
        behind = self.along[1]
        return behind.rows if isinstance(behind, Stacked) else 1

    @property
    def reads_beyond(self) -> int:
        behind = self.along[1]
        return behind.beyond if isinstance(behind, Stacked) else 1

    @property
    def count(self) -> int:
        return self.problem.batch * math.prod(map(len, self.cuts))

    @property
    def digits(self) -> list[list[Bounds]]:
        cut = zip(self.taken, self.along, self.cuts, strict=False)
        return [
            digit(0, each(self.problem.batch)),
            *(digit(1 + i, [along.span(q) for q in of_axis]) for i, along, of_axis in cut),
        ]

    @cached_property
    def pairs(self) -> list[Pair]:
        """What every block does."""
        return _pairs(self.along, self.own_groups, self.rows, self.channels[0], self.split)

    @property
    def steps(self) -> int:
        """Copies to the columns of a block."""
        return sum(len(pair.copies) for pair in self.pairs if not (self.split and pair.slots[0]))

    @cached_property
    def copied(self) -> int:
        """The most taps whose columns lie beside each other."""
        return max((len(pair.copies) for pair in self.pairs), default=0)

    @cached_property
    def products(self) -> list[Product]:
        """All products of a block."""
        return [one for pair in self.pairs for of_slot in pair.products for one in of_slot]

    @cached_property
    def adds(self) -> bool:
        """Whether some sums are those of several products."""
        return any(len(of_slot) > 1 for pair in self.pairs for of_slot in pair.products)

    @cached_property
    def deep(self) -> int:
        """The largest k of a product."""
        return max((one.shape[2] for one in self.products), default=0)

    @cached_property
    def tile(self) -> int:
        """The most positions of a product."""
        most = small_products() * 7 // 8 // max(1, self.rows * self.deep) if unpacked(self.problem) else _MOST
        return max(_VECTOR, min(_MOST, most // _VECTOR * _VECTOR))

    @property
    def largest_product(self) -> int:
        size = self.rows * self.deep * self.tile
        return LARGEST if unpacked(self.problem) and size <= small_products() else size

    def sizes(self, free: int, behind: int) -> Sizes:
        """Return the sizes of a block."""
        line = self.along[2].count + self.along[2].reach
        positions = (behind - 1) * line + self.along[2].count
        tiles = -(-positions // self.tile)
        row = tiles * -(-positions // (tiles * _VECTOR)) * _VECTOR
        columns = row + self.split * -(-self.along[1].reach * line // _VECTOR) * _VECTOR
        return Sizes(free, behind, free + self.along[0].reach, line, columns, row)

    def shapes(self, sizes: Sizes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of a block's grid, [phase of the copied axes, free phase, line, group, channel, position].

        And of its columns, [free phase, group, line, tap * channel, position], and its sums, [group, line, row,
        position].
        """
        (_, behind, last), (taken, _), phases = self.along, self.channels, self.phases
        # Runs need positions behind the last line.
        runs = last.reach + sizes.columns + (0 if self.split else behind.reach * sizes.line)
        plane = max((sizes.behind + behind.reach) * sizes.line, runs)
        plane = -(-plane // _VECTOR) * _VECTOR
        grid = phases[1] * phases[2], phases[0], sizes.lines, self.own_groups, taken, plane
        columns = phases[0], self.own_groups, sizes.lines, self.copied * taken, sizes.columns
        return grid, columns, (self.own_groups, sizes.free, self.rows, sizes.row)

    @cached_property
    def workspace_bytes(self) -> int:
        sizes = self.sizes(*(cut.longest for cut in self.cuts))
        grid, columns, sums = map(math.prod, self.shapes(sizes))
        return sum(aligned(n * self.problem.compute_dtype.itemsize) for n in (grid, columns, sums, sums * self.adds))

    @property
    def phases(self) -> tuple[int, int, int]:
        """Phases of the grid along each axis."""
        free, behind, last = (len(along.offsets) for along in self.along)
        return free, behind, last

    @property
    def packed_values(self) -> int:
        return sum(math.prod(one.shape) for one in self.products)

    def pack(self, filter: Array, packed: Array) -> None:
        """Lay the taps of each product out as [group, row, tap, channel], with zeros where a row reads nothing."""
        coarse, fine = filter.shape[4] // self.own_groups, filter.shape[3]
        weights = filter.reshape(*filter.shape[:3], fine, self.own_groups, coarse)
        axes = [order(self.problem.axes)[i] for i in self.taken]
        weights = weights.transpose(4, *((5, *axes, 3) if self.along[0].gathers else (3, *axes, 5)))
        behind = self.along[1]
        if self.stacked == 1 and self.channels[1] < self.rows:
            weights = np.broadcast_to(weights, (self.own_groups, self.rows, *weights.shape[2:]), subok=True)
        if self.stacked > 1:
            packed[...] = 0
        for one in self.products:
            a, b, c = (_as_slice(taps) for taps in (one.run.taps, *one.taps))
            taps = weights[:, :, a][:, :, :, :, c]
            groups, rows, free, _, *others = taps.shape
            to = packed[one.weights].reshape(groups, self.stacked, rows, free, len(one.taps[0]), *others)
            of_rows = behind.weights if isinstance(behind, Stacked) else [(slice(None), b)]
            for row, (at, of_row) in enumerate(of_rows):
                copy(to[:, row, :, :, at], taps[:, :, :, of_row])

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        sizes = self.sizes(*(max(1, round(cut.size / len(cut))) for cut in self.cuts))
        _, _, sums = map(math.prod, self.shapes(sizes))
        (_, given), last = self.channels, self.along[2]
        total = self.filled_s(sizes)
        apart = last.axis.stride > 1 and not last.gathers
        lines, tiles = self.own_groups * sizes.free, -(-sizes.row // self.tile)
        packed = self.largest_product > LARGEST
        for one in self.products:
            total += few_channels_s(lines * tiles, sizes.row / tiles, self.rows, one.shape[2], packed=packed)
        total += len(self.products) * pass_s(sums, sizes.row)
        slots = len(self.pairs) * len(self.along[0].runs)
        stored = self.stacked * lines * sizes.behind * last.count * given
        run = given if given > 1 else self.own_groups
        store_s = self.lines_s(stored, run, last.count, given, apart=apart, back=True)
        store_s += stored * apart_s(self.problem, machine) if apart else 0.0
        cleared = cleared_s(self.problem) if self.gaps else 0
        return self.count * (total + slots * store_s) + cleared

    def filled_s(self, sizes: Sizes) -> float:
        """Return the time to fill a block's grid, with zeros first, and its columns."""
        grid, columns, _ = map(math.prod, self.shapes(sizes))
        last, steps = self.along[2], self.steps
        total = copy_s(grid, grid) + copy_s(columns * steps / max(1, self.copied), sizes.columns, steps=steps)
        phases, line = math.prod(self.phases), -(-last.given // last.step)
        phase_s = self.lines_s(grid / phases, min(FEW, line), line, self.channels[0], apart=last.step > 1)
        return total + phases * phase_s

    def lines_s(
        self, values: float, run: int, line: int, channels: int, *, apart: bool = False, back: bool = False
    ) -> float:
        """Return the time to copy lines to the grid or `back` from the sums; `apart` says that they skip positions."""
        if self.problem.layout == "NDHWC":
            return turned_s(values, run, self.own_groups * channels, back=back)
        return copy_s(values, line, spilled=True, strided=apart)

    @cached_property
    def gaps(self) -> bool:
        """Whether there are positions of the result that no tap reaches."""
        axes = (along for along in self.along if not along.gathers and isinstance(along, Along))
        return any(unreached(along.axis, along.of_axis) for along in axes)

    @property
    def reason(self) -> str:
        row = self.sizes(*(cut.longest for cut in self.cuts)).row
        small = "small products" if self.largest_product == LARGEST else "products"
        return f"{small} of {self.deep} taps and channels with {min(self.tile, row)} positions"

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        batch, cut = located(index, self.cuts)
        spans = [*cut, (0, self.along[2].count)]
        block = Block(self, self.sizes(*(stop - start for start, stop in cut)), workspace)
        self.fill(block, operands.value, batch, spans)
        output = self.seen(operands.output, of_result=True)[batch]
        start = operands.start((0, self.own_groups * self.channels[1]))
        if self.gaps:
            output[*(slice(*along.span(q)) for along, q in zip(self.along, spans, strict=True))] = start
        output = output.reshape(*output.shape[:3], self.own_groups, self.channels[1])
        if isinstance(start, np.ndarray):
            start = start.reshape(self.own_groups, 1, 1, -1, 1)
        free, behind, last = (along.places(q) for along, q in zip(self.along, spans, strict=True))
        for pair, step in zip(self.pairs, block.steps, strict=True):
            for to, source in step.copies:
                np.copyto(to, source)
            workspace.mark("pack")
            b, c = pair.slots
            if (self.stacked == 1 and b not in behind) or c not in last:
                continue
            for a, (q, fine) in free.items():
                if not pair.products[a]:
                    block.sums[...] = 0
                for i, (one, columns) in enumerate(zip(pair.products[a], step.columns[a], strict=True)):
                    weights = operands.packed[one.weights].reshape(self.own_groups, 1, 1, *one.shape[1:])
                    np.matmul(weights, columns, out=block.tiles[min(i, 1)])
                    if i:
                        np.add(block.sums, block.spare, out=block.sums)
                if self.stacked > 1:
                    need_finite(block.found)
                # Of zero too, for its sign: products that underflow give -0.0.
                np.add(block.found, start, out=block.found)
                workspace.mark("gemm")
                for row, (q_b, fine_b) in behind.items() if self.stacked > 1 else [(0, behind[b])]:
                    store(output[fine, fine_b, last[c][1]], block.lines[row][q, q_b, last[c][0]])
                workspace.mark("store")

    def seen(self, array: Array, *, of_result: bool = False) -> Array:
        """View an array as [batch, free axis, next, last, channel]."""
        problem, coarse = self.problem, self.along[0].gathers == of_result
        axes = canonical(problem.axes)
        sizes = [axis.coarse if coarse else axis.fine for axis in axes]
        seen = five(problem.layout, array, problem.batch, sizes, problem.cin if coarse else problem.cout)
        return seen.transpose(0, *(1 + i for i in self.taken), 4)

    def fill(self, block: Block, value: Array, batch: int, spans: Sequence[Range]) -> None:
        """Copy the lines that a block needs to its grid, with zeros around them."""
        value = self.seen(value)[batch]
        value = value.reshape(*value.shape[:3], self.own_groups, self.channels[0])
        block.grid[...] = 0
        offsets = product(*(along.offsets for along in (*self.along[1:], self.along[0])))
        copies = []
        for cells, (b, c, a) in zip(block.cells, offsets, strict=True):
            along = zip(self.along, (a, b, c), spans, cells.shape, strict=False)
            to, source = zip(*(of.met(offset, q, size) for of, offset, (q, _), size in along), strict=True)
            if cells[to].size:
                copies.append((cells[to], source))
        for cells, source in copies:
            np.copyto(cells, value[source], casting="unsafe")


class Step(NamedTuple):
    """Of a pair: how its columns are copied, and what the products of each slot of the free axis take of them."""

    copies: list[tuple[Array, Array]]
    columns: list[list[Array]]


class Block:
    """What blocks of some sizes see of a workspace."""

    def __init__(self, of: Mec, sizes: Sizes, workspace: Workspace) -> None:
        shape, columns_shape, sums_shape = of.shapes(sizes)
        self.grid = workspace.take(*shape)
        columns = workspace.take(math.prod(columns_shape))
        self.sums = workspace.take(*sums_shape)
        self.spare = workspace.take(*sums_shape) if of.adds else self.sums
        # [group, line, stacked result, channel, position]
        by_row = self.sums.reshape(*sums_shape[:2], of.stacked, -1, sizes.row)
        self.found = by_row[:, :, :, : of.channels[1]]
        wide = of.along[1].reach + sizes.behind
        # [line, position of the next axis, of the last, group, channel] of each phase
        cells = self.grid[..., : wide * sizes.line].reshape(-1, *shape[2:5], wide, sizes.line)
        self.cells = list(cells.transpose(0, 1, 4, 5, 2, 3))
        self.lines = [by_position(of, sizes, self.found[:, :, row]) for row in range(of.stacked)]
        tiles = -(-sizes.row // of.tile)
        of_tiles = (*sums_shape[:3], tiles, sizes.row // tiles)
        self.tiles = [array.reshape(of_tiles).swapaxes(2, 3) for array in (self.sums, self.spare)]
        self.steps = [self._step(of, pair, sizes, columns, tiles) for pair in of.pairs]

    def _step(self, of: Mec, pair: Pair, sizes: Sizes, columns: Array, tiles: int) -> Step:
        phases, lines, groups, taken, _ = self.grid.shape[1:]
        shape = phases, groups, lines, len(pair.copies), taken, sizes.columns
        by_tap = columns[: math.prod(shape)].reshape(shape)
        copies = []
        for i, (phase, start_b, start_c) in enumerate(pair.copies):
            start = start_b * sizes.line + start_c
            source = self.grid[phase, ..., start : start + sizes.columns].swapaxes(1, 2)
            copies.append((by_tap[:, :, :, i], source))
        if of.split and pair.slots[0]:
            copies = []
        _, of_group, of_line, _, of_row, item = by_tap.strides
        each = sizes.row // tiles
        found = [
            [
                as_strided(
                    by_tap[one.run.phase, :, one.run.start :, ..., one.start * sizes.line :],
                    (groups, sizes.free, tiles, one.shape[2], each),
                    (of_group, of_line, each * item, of_row, item),
                    subok=True,
                )
                for one in of_slot
            ]
            for of_slot in pair.products
        ]
        return Step(copies, found)


def by_position(of: Mec, sizes: Sizes, lines: Array) -> Array:
    """View lines [group, line, channel, position] as [line, position of the next axis, of the last, group, channel]."""
    by_group, by_line, by_channel, item = lines.strides
    shape = sizes.free, sizes.behind, of.along[2].count, of.own_groups, of.channels[1]
    return as_strided(lines, shape, (by_line, sizes.line * item, item, by_group, by_channel), subok=True)


def _as_slice(taps: Sequence[int]) -> slice | Sequence[int]:
    """Return taps as a slice, of which NumPy makes no copy, if they are apart alike."""
    return evenly(taps) if len({b - a for a, b in pairwise(taps)}) < 2 else taps


def _stacked(axis: Axis, gathers: bool, channels: int) -> list[Stacked]:
    """Return the ways to stack neighbouring results of some channels each; none where they read far from each other."""
    if axis.dilation > 1 or (gathers and axis.stride > axis.kernel):
        return []
    each = 1 if gathers else axis.stride
    most = min(_STACKED // channels, axis.coarse if gathers else axis.fine)
    return [Stacked(axis, gathers, rows) for rows in range(each, most + 1, each) if rows > 1]


def candidates(problem: Problem) -> list[Mec]:
    """Return the schedules that are weighed, for each free axis and number of groups together; none for many phases."""
    gathers = problem.operation == "conv3d"
    axes = [Along(axis, slots(axis, tiled=False), gathers) for axis in canonical(problem.axes)]
    if math.prod(len(along.taps) for along in axes) > _MOST_PHASES:
        return []

    def made(together: int, taken: tuple[int, int, int], parts: int, positions: int) -> Iterator[Mec]:
        channels = together * problem.cin, together * problem.cout
        of = replace(problem, groups=problem.groups // together, cin=channels[0], cout=channels[1])
        free, behind, last = axes[taken[0]], axes[taken[1]], axes[taken[2]]
        split = [False, True] if len(behind.offsets) == 1 else [False]
        # Taps that read other phases are not starts in the same columns.
        ways: list[tuple[Along | Stacked, bool]] = [(behind, adds) for adds in split]
        ways += [(one, False) for one in stacks[taken[1]]]
        for one, adds in ways:
            cut = Cut(one.count, max(1, positions // max(1, last.count)))
            yield Mec(of, together, taken, (free, one, last), (Cut(free.count, -(-free.count // parts)), cut), adds)

    stacks = [_stacked(along.axis, gathers, problem.cin if gathers else problem.cout) for along in axes]
    groups = [n for n in range(1, problem.groups + 1) if problem.groups % n == 0]
    every = product(groups, _ORDERS, _PARTS, _POSITIONS)
    return [one for choice in every if choice[2] <= max(1, axes[choice[1][0]].count) for one in made(*choice)]


def schedule(problem: Problem, machine: Machine) -> Mec:
    """Choose a schedule for a problem by cost, or raise CannotLowerError where its blocks are too large."""
    others = "'im2col' and 'auto'" if problem.operation == "conv3d" else "'col2im' and 'auto'"
    text = f"{problem.operation}: algorithm='mec' cannot do this problem:"
    every = candidates(problem)
    if not every:
        raise CannotLowerError(f"{text} its result has more than {_MOST_PHASES} phases; {others} can")
    return best_that_fits(every, machine, f"{text} its blocks", others)
