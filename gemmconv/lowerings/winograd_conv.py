"""A convolution with minimal filtering along one or two axes.

As winograd.py does it for the transposed convolution, with all phases of the fine array on the side of the rows: those
with as many taps on each axis are a family. Their cells lie side by side as one channel axis, each from its own first
row on, so that a tap of the axes that are not filtered is a run of rows of all of them, and one product. The products
of all families are added to the sums point by point, since single and two taps have the first points of three. More
than three are cut to such.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, groupby, product
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gemmconv.lowerings.base import Array, Operands, Workspace, aligned, canonical
from gemmconv.lowerings.boxes import Bounds, Cut, Index, digit, evenly
from gemmconv.lowerings.copies import copy
from gemmconv.lowerings.cost import SMALLEST_BUFFER, combined_taps_s, copy_s, in_pieces_s, pass_s, step_s
from gemmconv.lowerings.minimal import Line, combine_rows, lines_of
from gemmconv.lowerings.phases import one_phase, phases
from gemmconv.lowerings.tiling import (
    Block,
    Combining,
    Output,
    Product,
    Rows,
    Tiling,
    beyond,
    channel_cuts,
    combined,
    combining_s,
    cuts_of,
    fastest,
    order_of,
    pack_lines,
    seen,
    strands,
    sums_memory,
    tile_size,
)
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# What a cell costs beside the copy of its values: the view of the box has more axes than others.
_CELL_S = 2e-9

Lines = tuple[Line, ...]


class _Axes(NamedTuple):
    u: Lines
    v: Lines
    a: Lines
    b: Lines


class Family(_Axes):
    """The phases of each axis that as many taps reach."""

    @cached_property
    def size(self) -> int:
        """How many phases lie side by side."""
        return math.prod(map(len, self))

    @cached_property
    def points(self) -> tuple[int, int]:
        return self.a[0].points, self.b[0].points

    @cached_property
    def taps(self) -> tuple[int, int]:
        """Taps of the axes that are not filtered."""
        return len(self.u[0].taps), len(self.v[0].taps)


class Layout(NamedTuple):
    """What blocks of the same sizes do with a workspace."""

    sums: tuple[int, ...]
    shapes: list[list[tuple[int, ...]]]  # of each family: cells, and rows combined along one axis and both
    box: tuple[int, ...]  # sizes of the positions that all cells hold
    inside: Index  # of the box, what lies in the value
    results: list[Index]  # that are stored


class Program(NamedTuple):
    """What a block does."""

    layout: Layout
    source: Index  # of the value, what is in the box
    stores: list[Index]  # in the output, of the results


class FamilyRows(NamedTuple):
    """The rows of a family."""

    fills: list[tuple[Array, Array]]  # of the cells, of the box
    combined: list[Rows]
    taps: list[Array]  # those that each tap takes

    def fill(self) -> None:
        """Combine them."""
        for to, source in self.fills:
            np.copyto(to, source)
        for of_axis in self.combined:
            combine_rows(*of_axis)


class BlockRows(NamedTuple):
    """The rows of all families."""

    cleared: list[Array]  # of the box, what lies beyond the value
    inside: Array
    families: list[FamilyRows]

    def open(self, value: Array) -> None:
        """Copy what the box holds of the value."""
        for beyond_value in self.cleared:
            beyond_value[...] = 0
        copy(self.inside, value)


class Views(NamedTuple):
    """The arrays of a layout."""

    rows: BlockRows
    products: list[list[Product]]  # of each family's taps
    combines: Combining
    stored: list[Array]


@dataclass(frozen=True)
class WinogradConv(Tiling):
    """A schedule; see the module, and Winograd for the four axes."""

    problem: Problem
    along: tuple[int, ...]  # the filtered axes
    axes: tuple[Axis, Axis, Axis, Axis]  # as they are read: the fine positions of one phase, if taps reach no other
    read: tuple[range, range, range, range]  # those positions
    families: tuple[Family, ...]  # the first has the most points
    first: tuple[int, ...]  # the fine positions where the box of the first block begins
    behind: tuple[tuple[int, ...], ...]  # of each family, how far behind these its last rows begin
    cuts: tuple[Cut, Cut, Cut, Cut, Cut]  # of positions, of tiles and of the channels
    columns: int

    @property
    def reads_beyond(self) -> int:
        return beyond(line for family in self.families for lines in family[2:] for line in lines)

    @property
    def units(self) -> tuple[int, int, int, int]:
        """By how many positions blocks are cut."""
        return 1, 1, tile_size(self.families[0].a[0]), tile_size(self.families[0].b[0])

    @property
    def digits(self) -> list[list[Bounds]]:
        found = []
        for of, axis, cut, each in zip(self.order, self.axes, self.cuts, self.units, strict=False):
            found.append(digit(of, ((each * p, min(axis.coarse, each * q)) for p, q in cut)))
        return [*found, digit(4, self.cuts[4])]

    @property
    def packed_shapes(self) -> list[tuple[int, ...]]:
        """Of each family: [point, point, tap, tap, tile, phase and cout, column]."""
        cout, (tiles, columns) = self.problem.cout, self.tiles
        return [(f.a[0].filters, f.b[0].filters, *f.taps, tiles, f.size * cout, columns) for f in self.families]

    @property
    def _packed_apart(self) -> tuple[int, int]:
        return self.problem.cout, 1

    @cached_property
    def workspace_bytes(self) -> int:
        sizes = [cut.longest for cut in self.cuts]
        values = self._memory([self._shapes(family, sizes) for family in self.families], self.sums(sizes))
        return max(self._packing_bytes, sum(aligned(n * self.problem.compute_dtype.itemsize) for n in values))

    def _memory(self, shapes: Any, sums: Any) -> list[int]:
        """Return the values of memory for cells and products that are added, rows of one axis, of both, box and sums.

        Cells are done with when there are products; results are there at last. With a single family the box is when
        rows are combined along the second axis, and rows of one axis are when there are sums.
        """
        cells, along_a, along_b = (max(math.prod(shape) for shape in of) for of in zip(*shapes, strict=True))
        box, of_sums = math.prod(self._box(shapes)) * self.problem.cout, math.prod(sums_memory(sums))
        cells = max(cells, math.prod(sums))
        if len(shapes) == 1 and along_a and along_b:
            return [cells, max(along_a, of_sums), max(along_b, box)]
        return [cells, along_a, along_b, box, of_sums]

    def sums(self, sizes: Any) -> Any:
        """Return the shape of the sums of a block of so many positions, tiles and channels."""
        u, v, a, b, channels = sizes
        first = self.families[0]
        return (*first.points, u, v, a * first.a[0].apart, b * first.b[0].apart, channels)

    def _shapes(self, family: Family, sizes: Any) -> Any:
        """Return the shapes of a family's cells, and of rows combined along one axis and both."""
        u, v, a, b, _ = sizes
        rows = tuple(n + (len(lines[0].taps) - 1) * lines[0].apart for n, lines in zip((u, v), family, strict=False))
        lines = family.a[0], family.b[0]
        n_a, n_b = (n * line.apart for n, line in zip((a, b), lines, strict=True))
        l_a, l_b = ((n + (line.points - 1) // line.results) * line.apart for n, line in zip((a, b), lines, strict=True))
        (r_a, r_b), (p_a, p_b), values = (
            (line.results for line in lines),
            family.points,
            family.size * self.problem.cout,
        )
        return [
            (r_a, r_b, *rows, l_a, l_b, values),
            (p_a, r_b, *rows, n_a, l_b, values) if r_a > 1 else (0,),
            (p_a, p_b, *rows, n_a, n_b, values) if r_b > 1 else (0,),
        ]

    def _box(self, shapes: Any) -> Any:
        """Return how many fine positions cells of such shapes hold, of all families."""
        found = [0] * 4
        for family, behind, (cells, *_) in zip(self.families, self.behind, shapes, strict=True):
            for i, (axis, lines, last) in enumerate(zip(self.axes, family, behind, strict=True)):
                rows = cells[2 + i] * lines[0].results
                found[i] = max(found[i], last + axis.stride * (rows - 1) + 1)
        return tuple(found)

    @property
    def reason(self) -> str:
        return f"{self.described('minimal filtering', small=self.columns > 0)}, filter packed"

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        problem = self.problem
        strided = problem.layout == "NCDHW"
        sizes = [cut.size / len(cut) for cut in self.cuts]
        sums = math.prod(self.sums(sizes)[2:])
        total, steps = self.filled_s(), 6
        for number, family in enumerate(self.families):
            points, taps, k = math.prod(family.points), math.prod(family.taps), family.size * problem.cout
            lines = sizes[0] if family.taps[1] > 1 else 1
            total += self._products_s(taps, taps - (number == 0), points, points, sums / sizes[4], lines, k)
        first = self.families[0]
        results = math.prod(lines[0].results for lines in first[2:])
        total += combining_s(first.a[0], first.b[0], sums)
        total += copy_s(results * sums, sizes[4], steps=0, spilled=True, strided=strided)
        steps += math.prod(self.units) + 4
        taps_s = combined_taps_s(problem, self.packed_values, turned=False)
        return self.count * (total + steps * step_s(short=True)) + taps_s

    @cached_property
    def _mean(self) -> tuple[int, list[Any]]:
        """Values of the box and shapes of a block of mean size."""
        sizes = [cut.size / len(cut) for cut in self.cuts]
        shapes = [self._shapes(family, sizes) for family in self.families]
        return math.prod(self._box(shapes)) * self.problem.cout, shapes

    def filled_s(self) -> float:
        """Return the time to fill and combine the rows of a block of mean size."""
        cout, (box, shapes) = self.problem.cout, self._mean
        run = cout if self.problem.groups > 1 else box
        total = copy_s(box, run, steps=0, spilled=True, strided=self.problem.layout == "NCDHW")
        total += box * in_pieces_s(self.problem, cout)
        for family, (cells, along_a, rows) in zip(self.families, shapes, strict=True):
            total += (sum(family.points) + 1) * step_s(short=True)
            total += copy_s(math.prod(cells), cout, steps=0, spilled=True) + math.prod(cells) / cout * _CELL_S
            for shape, run in ((along_a, math.prod(along_a[5:])), (rows, math.prod(rows[5:]))):
                if len(shape) > 1:
                    total += pass_s(math.prod(shape), run)
        return total

    def pack_part(self, filter: Array, packed: Array, part: int, parts: int, workspace: Workspace) -> None:
        """Combine taps along both filtered axes; a part is some of the rows."""
        problem, arrays = self.problem, self._packed(packed)
        cout, (tiles, columns) = problem.cout, self.tiles
        taps = filter.reshape(1, *(axis.kernel for axis in canonical(problem.axes)), cout, tiles, columns)
        taps = taps.transpose(*self.order, 5, 4, 6)
        for rows, _ in self.pieces(part, parts):
            for family, to in zip(self.families, arrays, strict=True):
                of_phases = ([evenly(line.taps) for line in lines] for lines in product(*family))
                phases_of = [taps[u, v, a, b, :, rows] for u, v, a, b in of_phases]
                of_points = to.reshape(*to.shape[:5], family.size, cout, columns)[..., rows, :]
                workspace.reset()
                pack_lines((family.a[0], family.b[0]), phases_of, of_points, workspace, turns=False)

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        block = self.block(index)
        program = self.made(block)
        views = self._views(program.layout, workspace)
        value, output, filters = self._opened(operands)
        tiles = self.tiles_of(block.channels)
        views.rows.open(value[program.source])
        for family, products, filter in zip(views.rows.families, views.products, filters, strict=True):
            family.fill()
            workspace.mark("pack")
            for multiply, tap in zip(products, filter, strict=True):
                multiply(tap[..., tiles, :, :, :])
            workspace.mark("gemm")
        views.combines(operands.start(block.channels))
        workspace.mark("col2im")
        Output(self.problem, output, block.channels).write(program.stores, views.stored)
        workspace.mark("store")

    def _opened(self, operands: Operands) -> tuple[Array, Array, list[list[Array]]]:
        """Return the value and the output with axes in order, and of each family the filter of every tap."""
        value, output = self._in_order(operands)
        filters = [
            [filter[:, :, i, j, np.newaxis, :, np.newaxis] for i, j in product(*map(range, family.taps))]
            for family, filter in zip(self.families, self._packed(operands.packed), strict=True)
        ]
        return value, output, filters

    def _views(self, layout: Layout, workspace: Workspace) -> Views:
        memory = [workspace.take(values) for values in self._memory(layout.shapes, layout.sums)]
        rows, of_sums = self.rows_of(layout, memory), memory[1] if len(memory) == 3 else memory[4]
        sums = of_sums[: math.prod(layout.sums)].reshape(layout.sums)
        gemm = None if self.columns else workspace.gemm
        products = []
        for number, (family, of_family) in enumerate(zip(self.families, rows.families, strict=True)):
            to = sums[: family.points[0], : family.points[1]]
            products.append([
                Product(gemm, taken, to, self.columns, memory[0], adds=number > 0 or i > 0)
                for i, taken in enumerate(of_family.taps)
            ])  # fmt: skip
        first = self.families[0]
        combining = Combining(of_sums, layout.sums[2:], (first.a[0], first.b[0]), memory[0])
        stored = [seen(self.problem, combining.results[at]) for at in layout.results]
        return Views(rows, products, combining, stored)

    def memory(self, layout: Layout) -> list[int]:
        """Return the values of memory that `rows_of` takes."""
        found = self._memory(layout.shapes, layout.sums)
        return found if len(found) == 3 else found[:4]

    def rows_of(self, layout: Layout, memory: list[Array]) -> BlockRows:
        """Return what is filled, in the memory for cells, rows of one axis, of both, and box."""
        cout, of_box = self.problem.cout, memory[2] if len(memory) == 3 else memory[3]
        # It lies as the value does, so that runs of it are copied.
        natural = (layout.box[self.order.index(i)] for i in range(4))
        box = of_box[: math.prod(layout.box) * cout].reshape(*natural, cout).transpose(*self.order, 4)
        families = []
        for number, family in enumerate(self.families):
            shape = layout.shapes[number][0]
            cells = memory[0][: math.prod(shape)].reshape(shape)
            rows, combines = cells, []
            for axis, (line, *_) in enumerate(family[2:]):
                rows, of_axis = combined(rows, (line,), line, axis, layout.sums[4 + axis], memory[1 + axis])
                combines += of_axis
            taps = [rows[:, :, *of_tap] for of_tap in _taken(family, layout.sums[2:4])]
            families.append(FamilyRows(list(self._fills(family, cells, box, of_box)), combines, taps))
        return BlockRows(list(_outside(box, layout.inside)), box[layout.inside], families)

    def _fills(self, family: Family, cells: Array, box: Array, flat: Array) -> Iterator[tuple[Array, Array]]:
        """Yield cells of a family, and of the box what they are filled with: all phases that begin evenly apart.

        `flat` is the memory of the box.
        """
        item, cout = box.itemsize, self.problem.cout
        steps = [step // item for step in box.strides]
        shape, at = [], []  # how often, and how far apart
        for number, (axis, (line, *_)) in enumerate(zip(self.axes, family, strict=True)):
            step, tile = axis.stride * steps[number], tile_size(line)
            shape += [cells.shape[2 + number] // line.apart, line.apart] if number > 1 else [cells.shape[2 + number], 1]
            at += [step * tile, step] if number > 1 else [step, 0]
        for number, lines in ((1, family.b), (0, family.a)):
            shape.insert(0, lines[0].results)
            at.insert(0, self.axes[2 + number].stride * lines[0].apart * steps[2 + number])
        cells = cells.reshape(*shape, *map(len, family), cout)
        starts = (
            [_start(axis, line) - first for line in lines]
            for axis, lines, first in zip(self.axes, family, self.first, strict=True)
        )
        at = [0 if size == 1 else step for size, step in zip(shape, at, strict=True)]  # however large a stride is
        for runs in product(*map(_even_runs, starts)):
            first = sum(start * step for (_, start, _), step in zip(runs, steps, strict=False))
            apart = [each * step for (*_, each), step in zip(runs, steps, strict=False)]
            which: Index = (..., *(phases_of for phases_of, *_ in runs), slice(None))
            to = cells[which]
            yield to, as_strided(flat[first:], to.shape, [step * item for step in (*at, *apart, 1)], subok=True)

    def made(self, block: Block) -> Program:
        """Return what a block does."""
        sizes = [stop - start for start, stop in block]
        shapes = [self._shapes(family, sizes) for family in self.families]
        box = self._box(shapes)
        inside, source = [], []
        of_axes = zip(self.axes, self.read, self.first, self.units, box, block[:4], strict=True)
        for axis, read, first, unit, size, (start, _) in of_axes:
            origin = first + axis.stride * unit * start
            begins, ends = max(0, origin), max(0, origin, min(axis.fine, origin + size))
            inside.append(slice(begins - origin, ends - origin))
            at = read[begins:ends]
            source.append(slice(at[0], at[-1] + 1, at.step) if at else slice(0, 0))
        along = []
        for axis, lines, tiles in zip(self.axes[2:], self.families[0][2:], block[2:4], strict=True):
            first = tile_size(lines[0]) * tiles[0]
            found = strands(lines[0], first, axis.coarse, tiles[1] - tiles[0])
            along.append([(which, places, slice(i[0], i[-1] + 1, i.step)) for which, places, i in found])
        every = slice(None)
        both = list(product(*along))
        results = [(which_a, which_b, every, every, at_a, at_b) for (which_a, at_a, _), (which_b, at_b, _) in both]
        stores = [(slice(*block.u), slice(*block.v), to_a, to_b) for (*_, to_a), (*_, to_b) in both]
        return Program(Layout(self.sums(sizes), shapes, box, tuple(inside), results), tuple(source), stores)


def _taken(family: Family, sizes: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield the rows along u and v that each tap takes for so many sums."""
    (u, v), apart = sizes, [lines[0].apart for lines in family[:2]]
    for i, j in product(*map(range, family.taps)):
        yield slice(i * apart[0], i * apart[0] + u), slice(j * apart[1], j * apart[1] + v)


def _start(axis: Axis, line: Line) -> int:
    """Return the fine position of a line's first row for the first position of the result."""
    return line.first * axis.stride + phases(axis)[line.slot].offset


def _outside(box: Array, inside: Index) -> Iterator[Array]:
    """Yield what of a box is not inside, in slabs."""
    for axis, (of, size) in enumerate(zip(inside, box.shape, strict=False)):
        for slab in (slice(0, of.start), slice(of.stop, size)):
            if slab.start < slab.stop:
                yield box[*inside[:axis], slab]


def _even_runs(starts: list[int]) -> list[tuple[slice, int, int]]:
    """Return runs of starts that are evenly apart: which, the first of them, and how far apart they are."""
    found, first = [], 0
    while first < len(starts):
        stop = first + 1
        step = starts[stop] - starts[first] if stop < len(starts) else 0
        while stop < len(starts) and starts[stop] - starts[stop - 1] == step:
            stop += 1
        found.append((slice(first, stop), starts[first], step))
        first = stop
    return found


def schedule(problem: Problem, machine: Machine) -> WinogradConv:
    """Choose axes and blocks for a problem by cost, or raise CannotLowerError where no axis can be filtered."""
    return fastest(candidates(problem), problem, machine, "no two taps meet in a cell", "im2col")


def candidates(problem: Problem) -> list[WinogradConv]:
    """Return schedules for every choice of one or two filtered axes."""
    axes, read = zip(*map(one_phase, (Axis(problem.batch, problem.batch, 1), *canonical(problem.axes))), strict=True)
    if not all(phases(axis) for axis in axes):
        return []
    plain = [_families(lines_of(axis, gathers=True, results=1)) for axis in axes]
    filtered = [_families(lines_of(axis, gathers=True)) for axis in axes]
    found = []
    for along in (*combinations((1, 2, 3), 1), *combinations((1, 2, 3), 2)):
        order = order_of(along)
        every = [filtered[i] if i in along else plain[i] for i in order]
        families = tuple(Family(*lines) for lines in product(*every))
        if not families:
            continue
        u, v, a, b = in_order = tuple(axes[i] for i in order)
        of_u, of_v, of_a, of_b = (read[i] for i in order)
        starts = [
            [[_start(axis, line) for line in lines] for axis, lines in zip(in_order, family, strict=True)]
            for family in families
        ]
        first = tuple(min(map(min, of_axis)) for of_axis in zip(*starts, strict=True))
        behind = tuple(tuple(max(at) - n for at, n in zip(each, first, strict=True)) for each in starts)
        fixed = problem, along, (u, v, a, b), (of_u, of_v, of_a, of_b), families, first, behind
        deepest = max(family.size for family in families) * problem.cout
        channels = channel_cuts(problem, problem.cin, deepest)
        steps = (1, 1, tile_size(families[0].a[0]), tile_size(families[0].b[0]))
        for cuts, (cut, columns) in product(cuts_of([axis.coarse for axis in (u, v, a, b)], steps), channels):
            found.append(WinogradConv(*fixed, (*cuts, cut), columns))
    return found


def _families(lines: Lines) -> list[Lines]:
    """Return the lines of an axis by their number of taps, the most first."""
    by_taps = sorted(lines, key=lambda line: -len(line.taps))
    return [tuple(found) for _, found in groupby(by_taps, key=lambda line: len(line.taps))]
