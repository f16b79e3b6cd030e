"""Minimal filtering along one or two axes: two neighbouring results for 3 or 4 products instead of 4 or 6.

A block is a box of the output. Its rows of the value are copied to cells, those of even and odd places along a filtered
axis apart, and combined to the rows of each point (minimal.py), for one phase of the filtered axes after the other.
They lie [axes that are not filtered, tiles of those that are, channel]: a tap of the others is a run of rows as they
lie, with nothing between, and small products of all points are formed in one step (products.py), or by GEMM for each
point where BLAS packs them. The sums of the points are combined to results. Only halves and sums occur, so small whole
numbers stay exact, and a result depends on no value but those its own taps reach. What rounding does is in
docs/how-it-works.md. Inf and NaN would spread within a result's own values (Inf - Inf), and so would an overflow in
between: a block with such a result raises NotFiniteError, and the plan starts again without minimal filtering.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, groupby, product
from typing import Any, NamedTuple

import numpy as np

from gemmconv.lowerings.base import Array, Operands, Workspace, aligned, canonical
from gemmconv.lowerings.boxes import Bounds, Cut, Index, Range, digit, evenly
from gemmconv.lowerings.cost import SMALLEST_BUFFER, cleared_s, combined_taps_s, copy_s, pass_s, step_s
from gemmconv.lowerings.minimal import Line, combine_rows, lines_of
from gemmconv.lowerings.phases import Phase, landing, phases, slots, unreached
from gemmconv.lowerings.tiling import (
    Block,
    Combining,
    Output,
    Product,
    Rows,
    Strand,
    Tiling,
    behind,
    beyond,
    channel_cuts,
    combined,
    combining_s,
    cuts_of,
    fastest,
    length_of,
    order_of,
    pack_lines,
    seen,
    strands,
    sums_memory,
    tile_size,
)
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# An axis along which nothing is combined: that of batch entries.
ALONE = (Line(0, (0,), 0, results=1),)


class Tap(NamedTuple):
    """A tap of the axes that are not filtered: which, its rows of each of them, and where they land."""

    tap: tuple[int, int]
    rows: tuple[slice, slice]
    cells: tuple[slice, slice]


class Target(NamedTuple):
    """A phase of the axes that are not filtered: q of each, its taps, and if the first reaches all."""

    sizes: tuple[int, int]
    taps: list[Tap]
    whole: bool


class Layout(NamedTuple):
    """What blocks of the same sizes do with a workspace."""

    shapes: list[tuple[int, ...]]
    padded: bool  # whether cells reach beyond the value
    cells: list[Index]  # that are filled
    targets: list[Target]
    results: list[list[Index]]  # that are stored, of each pair of slots


class Program(NamedTuple):
    """What a block does."""

    layout: Layout
    sources: list[Index]  # of the value, for the cells that are filled
    region: Index | None  # of the output, where there are gaps
    stores: list[list[Index]]  # in the output, of each pair of slots and target


class Pair(NamedTuple):
    """Lines of both filtered axes, and which of all pairs they are."""

    number: int
    lines: tuple[Line, Line]


class Stage(NamedTuple):
    """The arrays of one target and pair of lines."""

    pair: int  # of lines
    rows: list[Rows]  # that are combined, unless those that are there will do
    cleared: Array | None  # the sums, unless the first tap reaches all
    taps: list[tuple[tuple[int, int], Product]]
    combines: Combining | None  # for the last lines of a pair of slots
    stored: list[Array]


class Views(NamedTuple):
    """The arrays of a layout."""

    cells: Array
    filled: list[Array]
    stages: list[Stage]


@dataclass(frozen=True)
class Winograd(Tiling):
    """A schedule; see the module.

    The last two of four axes are filtered. Batch entries are one of them: the second, or the last if a single one is
    filtered.
    """

    problem: Problem
    along: tuple[int, ...]  # the filtered axes
    axes: tuple[Axis, Axis, Axis, Axis]
    lines: tuple[tuple[Line, ...], tuple[Line, ...]]
    phases: tuple[tuple[Phase, ...], tuple[Phase, ...]]
    cuts: tuple[Cut, Cut, Cut, Cut, Cut]  # of q, of tiles and of the channels
    columns: int
    gaps: bool

    @property
    def reads_beyond(self) -> int:
        return beyond(self.lines[0] + self.lines[1])

    @property
    def units(self) -> tuple[int, int, int, int]:
        """By how many q blocks are cut."""
        return 1, 1, tile_size(self.lines[0][0]), tile_size(self.lines[1][0])

    @property
    def digits(self) -> list[list[Bounds]]:
        found = []
        for of, axis, cut, unit in zip(self.order, self.axes, self.cuts, self.units, strict=False):
            of_axis = slots(axis, tiled=False)
            found.append(digit(of, (of_axis.span(axis, (unit * p, unit * q)) for p, q in cut)))
        return [*found, digit(4, self.cuts[4])]

    @property
    def packed_shapes(self) -> list[tuple[int, ...]]:
        """Of each combination of lines: [point, point, tap, tap, tile, cin, column]."""
        tiles, columns = self.tiles
        behind_points = *(axis.kernel for axis in self.axes[:2]), tiles, self.problem.cin, columns
        return [(a.filters, b.filters, *behind_points) for a, b in product(*self.lines)]

    @property
    def _packed_apart(self) -> tuple[int, int]:
        return self.problem.cin, self.axes[0].kernel

    @property
    def workspace_bytes(self) -> int:
        item = self.problem.compute_dtype.itemsize
        shapes = self._shapes([cut.longest for cut in self.cuts], [_most(lines) for lines in self.lines])
        return max(self._packing_bytes, sum(aligned(math.prod(shape) * item) for shape in shapes))

    def _shapes(self, sizes: Sequence[float], points: Sequence[int]) -> Any:
        """Return the shapes of cells, of rows combined along one axis and both, of memory for sums, and of sums.

        Where the last lie are products that are added to sums, and what those are combined to. `sizes` says how many q,
        tiles and channels a block has, `points` how many a line.
        """
        u, v, a, b, channels = sizes
        cin, reach = self.problem.cin, [_reach(of_axis) for of_axis in self.phases]
        rows = min(self.axes[0].coarse, u + reach[0]), min(self.axes[1].coarse, v + reach[1])
        (n_a, l_a), (n_b, l_b) = (_lengths(lines, n) for lines, n in zip(self.lines, (a, b), strict=True))
        (r_a, r_b), (p_a, p_b) = (lines[0].results for lines in self.lines), points
        sums = (p_a, p_b, u, v, n_a, n_b, channels)
        return [
            (r_a, r_b, *rows, l_a, l_b, cin),
            (p_a, r_b, *rows, n_a, l_b, cin) if r_a > 1 else (0,),
            (p_a, p_b, *rows, n_a, n_b, cin) if r_b > 1 else (0,),
            sums_memory(sums),
            sums,
        ]

    @property
    def reason(self) -> str:
        kinds = sorted({len(line.taps) for lines in self.lines for line in lines})
        how = " and ".join(f"F(2,{n})" for n in kinds if n > 1)
        return f"{self.described(how, small=self.columns > 0)}, filter packed"

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        problem = self.problem
        strided = problem.layout == "NCDHW"
        sizes = [cut.size / len(cut) for cut in self.cuts]
        taps = [[len(phase.taps) for phase in of_axis] for of_axis in self.phases]
        landing_share = math.prod(
            min(size, axis.coarse) / size for size, axis in zip(sizes[:2], self.axes, strict=False)
        )
        strands = math.prod(lines[0].results * lines[0].apart for lines in self.lines)
        # Values of a single point.
        cells, along_a, rows, _, sums = map(math.prod, self._shapes(sizes, (1, 1)))
        landed = landing_share * sums
        r_a, r_b = (lines[0].results for lines in self.lines)
        lines = sizes[0] if _cuts_lines(self.axes[1], self.phases[1]) else 1
        total, steps = copy_s(cells, problem.cin, steps=0, spilled=True, strided=strided), strands + 1
        l_b, run_b = (n * problem.cin for n in _lengths(self.lines[1], sizes[3])[::-1])
        held: tuple[Line, ...] = ()
        for of_slots, (p, q) in product(self._pairs, product(*taps)):
            for i, pair in enumerate(of_slots):
                first, second = pair.lines
                points, filters, n = first.points * second.points, first.filters * second.filters, p * q
                axis, held = _differ(held, pair.lines), pair.lines
                if axis == 0 and r_a > 1:
                    total += first.points * pass_s(along_a, l_b)
                    steps += first.points
                if axis < 2 and r_b > 1:
                    total += points * pass_s(rows, run_b)
                    steps += second.points
                total += self._products_s(n, n - (i == 0), points, filters, landed / sizes[4], lines, problem.cin)
            results = r_a * r_b * sums
            total += copy_s(results, sizes[4], steps=0, spilled=True, strided=strided)
            total += combining_s(*of_slots[0].lines, sums) + pass_s(results / 2, results)
            steps += strands + 4
        total += steps * step_s(short=True)
        cleared = cleared_s(problem) if self.gaps else 0
        return self.count * total + cleared + combined_taps_s(problem, self.packed_values, turned=True)

    def pack_part(self, filter: Array, packed: Array, part: int, parts: int, workspace: Workspace) -> None:
        """Turn taps to tiles, and combine them along both axes; a part is some of the input channels."""
        problem, arrays = self.problem, self._packed(packed)
        cin = problem.cin
        taps = filter.reshape(1, *(axis.kernel for axis in canonical(problem.axes)), *self.tiles, cin)
        taps = taps.transpose(*self.order, 4, 5, 6)
        for rows, of_u in self.pieces(part, parts):
            for lines, to in zip(product(*self.lines), arrays, strict=True):
                along_a, along_b = (evenly(line.taps) for line in lines)
                mine, of_points = taps[of_u, :, along_a, along_b, :, :, rows], to[:, :, of_u, :, :, np.newaxis, rows]
                workspace.reset()
                pack_lines(lines, [mine], of_points, workspace, turns=True)

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        block = self.block(index)
        program = self.made(block)
        views = self._views(program.layout, workspace)
        value, output, filters = self._opened(operands)
        mine, start = Output(self.problem, output, block.channels), operands.start(block.channels)
        if program.region is not None:
            mine.array[program.region] = start
        tiles = self.tiles_of(block.channels)
        if program.layout.padded:
            views.cells[...] = 0
        for to, source in zip(views.filled, program.sources, strict=True):
            np.copyto(to, value[source], casting="unsafe")
        stores = iter(program.stores)
        for stage in views.stages:
            for of_axis in stage.rows:
                combine_rows(*of_axis)
            workspace.mark("pack")
            if stage.cleared is not None:
                stage.cleared[...] = 0
            for (i, j), multiply in stage.taps:
                multiply(filters[stage.pair][i][j][..., tiles, :, :, :])
            workspace.mark("gemm")
            if stage.combines is not None:
                stage.combines(start)
                workspace.mark("col2im")
                mine.write(next(stores), stage.stored)
                workspace.mark("store")

    @cached_property
    def _pairs(self) -> list[list[Pair]]:
        """The pairs of lines, those of the same slots together: the first of them has the most points."""
        pairs = [Pair(number, lines) for number, lines in enumerate(product(self.lines[0], self.lines[1]))]
        pairs.sort(key=_slots)
        return [list(of) for _, of in groupby(pairs, key=_slots)]

    def _opened(self, operands: Operands) -> tuple[Array, Array, list[list[list[Array]]]]:
        """Return the value and the output with axes in order, and of each pair of lines the filter of every tap."""
        value, output = self._in_order(operands)
        taps = [range(axis.kernel) for axis in self.axes[:2]]
        filters = [
            [[filter[:, :, i, j, np.newaxis, :, np.newaxis] for j in taps[1]] for i in taps[0]]
            for filter in self._packed(operands.packed)
        ]
        return seen(self.problem, value), output, filters

    def _views(self, layout: Layout, workspace: Workspace) -> Views:
        cells, *arrays = (workspace.take(*shape) for shape in layout.shapes)
        along_a, along_b, sums, found = (array.reshape(-1) for array in arrays)
        gemm = None if self.columns else workspace.gemm
        places = layout.shapes[4][4:6]
        stages: list[Stage] = []
        held: tuple[Line, ...] = ()
        for (pairs, results), target in product(zip(self._pairs, layout.results, strict=True), layout.targets):
            shape = (*(line.points for line in pairs[0].lines), *target.sizes, *layout.shapes[4][4:])
            of_target = sums[: math.prod(shape)].reshape(shape)
            for number, pair in enumerate(pairs):
                first, second = pair.lines
                rows_a, of_a = combined(cells, self.lines[0], first, 0, places[0], along_a)
                rows, of_b = combined(rows_a, self.lines[1], second, 1, places[1], along_b)
                needed = [of_a + of_b, of_b, []][_differ(held, pair.lines)]
                held, to, taps = pair.lines, of_target[: first.points, : second.points], []
                formed = number == 0 and target.whole
                for i, tap in enumerate(target.taps):
                    of_tap = rows[:, :, *tap.rows], to[:, :, *tap.cells]
                    taps.append((tap.tap, Product(gemm, *of_tap, self.columns, found, adds=i > 0 or not formed)))
                cleared = None if number > 0 or target.whole else of_target
                stages.append(Stage(pair.number, needed, cleared, taps, None, []))
            combines = Combining(sums, shape[2:], pairs[0].lines, found)
            stored = [seen(self.problem, combines.results[at]) for at in results]
            stages[-1] = stages[-1]._replace(combines=combines, stored=stored)
        return Views(cells, [seen(self.problem, cells[at]) for at in layout.cells], stages)

    def made(self, block: Block) -> Program:
        """Return what a block does."""
        spans = block[:4]
        sizes = [stop - start for start, stop in (*spans, block.channels)]
        shapes = [list(shape) for shape in self._shapes(sizes, [_most(lines) for lines in self.lines])]
        rows = [_rows_of(axis, of_axis, q) for axis, of_axis, q in zip(self.axes, self.phases, spans, strict=False)]
        for shape in shapes[:3]:
            if len(shape) > 1:
                shape[2:4] = [stop - start for start, stop in rows]
        cells = shapes[0]
        both = list(zip(self.axes[2:], self.lines, spans[2:], strict=True))
        along = [list(_fills(*of, length)) for of, length in zip(both, cells[4:6], strict=True)]
        box, every = (slice(*rows[0]), slice(*rows[1])), slice(None)
        fills = list(product(*along))
        to = [(which_a, which_b, every, every, to_a, to_b) for (which_a, to_a, _), (which_b, to_b, _) in fills]
        sources = [(*box, from_a, from_b) for (*_, from_a), (*_, from_b) in fills]
        filled = (math.prod(cells[2:4]) * length_of(to_a) * length_of(to_b) for *_, to_a, to_b in to)
        padded = sum(filled) < math.prod(cells[:6])
        region = None
        if self.gaps:
            region = tuple(
                slice(*slots(axis, tiled=False).span(axis, (q[0] * unit, q[1] * unit)))
                for axis, q, unit in zip(self.axes, spans, self.units, strict=True)
            )
        made = [self._target(block, of_u, of_v, rows) for of_u, of_v in product(*self.phases)]
        targets = [target for target in made if target is not None]
        pairs = []
        for of_slots in self._pairs:
            of_axes = zip(both, of_slots[0].lines, strict=True)
            pairs.append(list(product(*(_stores(axis, line, tiles) for (axis, _, tiles), line in of_axes))))
        results = [
            [(which_a, which_b, every, every, at_a, at_b) for (which_a, at_a, _), (which_b, at_b, _) in pair]
            for pair in pairs
        ]
        stores = [[(*fine, a, b) for (*_, a), (*_, b) in pair] for pair in pairs for _, fine in targets]
        layout = Layout([tuple(shape) for shape in shapes], padded, to, [target for target, _ in targets], results)
        return Program(layout, sources, region, stores)

    def _target(
        self, block: Block, of_u: Phase, of_v: Phase, rows: Sequence[Range]
    ) -> tuple[Target, tuple[slice, slice]] | None:
        """Return what is done for a phase of the axes that are not filtered, and its fine positions.

        None if it has no q in the block.
        """
        spans = block[:2]
        q = [(start, min(stop, phase.count)) for (start, stop), phase in zip(spans, (of_u, of_v), strict=True)]
        if any(start >= stop for start, stop in q):
            return None
        sizes = q[0][1] - q[0][0], q[1][1] - q[1][0]
        taps: list[Tap] = []
        whole = False
        for (tap_u, shift_u), (tap_v, shift_v) in product(of_u.taps, of_v.taps):
            lands = [
                landing(axis, phase, shift, span)
                for axis, phase, shift, span in zip(self.axes, (of_u, of_v), (shift_u, shift_v), q, strict=False)
            ]
            if any(start >= stop for start, stop in lands):
                continue
            taken_u, taken_v = (slice(p - at, r - at) for (p, r), (at, _) in zip(lands, rows, strict=True))
            begins = shift_u - q[0][0], shift_v - q[1][0]
            cells_u, cells_v = (slice(p + at, r + at) for (p, r), at in zip(lands, begins, strict=True))
            tap = Tap((tap_u, tap_v), (taken_u, taken_v), (cells_u, cells_v))
            if not whole and all(r - p == size for (p, r), size in zip(lands, sizes, strict=True)):
                whole = True
                taps.insert(0, tap)
            else:
                taps.append(tap)
        fine_u, fine_v = (
            slice(start * axis.stride + phase.offset, (stop - 1) * axis.stride + phase.offset + 1, axis.stride)
            for axis, phase, (start, stop) in zip(self.axes, (of_u, of_v), q, strict=False)
        )
        return Target(sizes, taps, whole), (fine_u, fine_v)


def _differ(held: Sequence[Line], lines: Sequence[Line]) -> int:
    """Return the first axis along which two lines take other combined rows than those that are held; 2 for none.

    Lines of several phases may take the same.
    """
    for axis, (one, line) in enumerate(zip(held, lines, strict=False)):
        if (one.first, one.points) != (line.first, line.points):
            return axis
    return len(held)


def _slots(pair: Pair) -> tuple[int, int]:
    first, second = pair.lines
    return first.slot, second.slot


def _most(lines: Sequence[Line]) -> int:
    return max(line.points for line in lines)


def _lengths(lines: tuple[Line, ...], tiles: float) -> tuple[Any, Any]:
    """Return the places along a filtered axis of the rows of a point, and of cells."""
    return tiles * lines[0].apart, (tiles + _extra(lines)) * lines[0].apart


@lru_cache(maxsize=256)
def _extra(lines: tuple[Line, ...]) -> int:
    return max((behind(lines, line) + line.points - 1) // line.results for line in lines)


@lru_cache(maxsize=256)
def _reach(of_axis: tuple[Phase, ...]) -> int:
    """Return how many more rows than q all phases of an axis need."""
    shifts = [shift for phase in of_axis for _, shift in phase.taps]
    return max(shifts) - min(shifts)


def _cuts_lines(axis: Axis, of_axis: Sequence[Phase]) -> bool:
    """Whether some tap carries less than all rows along an axis, or not to all q."""
    return any(shift or phase.count != axis.coarse for phase in of_axis for _, shift in phase.taps)


def _rows_of(axis: Axis, of_axis: Sequence[Phase], q: Range) -> Range:
    """Return the rows that an interval of q needs."""
    shifts = [shift for phase in of_axis for _, shift in phase.taps]
    start = max(0, q[0] - max(shifts))
    return start, max(start, min(axis.coarse, q[1] - min(shifts)))


def _fills(axis: Axis, lines: Sequence[Line], tiles: Range, length: int) -> Iterator[Strand]:
    """Yield which cells are filled, at which places, from which rows of the value."""
    first = min(line.first for line in lines) + tile_size(lines[0]) * tiles[0]
    for which, places, rows in strands(lines[0], first, axis.coarse, length // lines[0].apart):
        yield which, places, slice(rows[0], rows[-1] + 1, rows.step)


def _stores(axis: Axis, line: Line, tiles: Range) -> Iterator[Strand]:
    """Yield which result is stored, of which places, at which fine positions."""
    phase = phases(axis)[line.slot]
    for which, places, q in strands(line, tile_size(line) * tiles[0], phase.count, tiles[1] - tiles[0]):
        fine = (i * axis.stride + phase.offset for i in (q[0], q[-1]))
        yield which, places, slice(next(fine), next(fine) + 1, q.step * axis.stride)


def schedule(problem: Problem, machine: Machine) -> Winograd:
    """Choose axes and blocks for a problem by cost, or raise CannotLowerError where no axis can be filtered."""
    rule = (
        "along some axis several taps must reach the output positions of one residue modulo the stride, from rows that "
        "those of all residues share"
    )
    return fastest(candidates(problem), problem, machine, rule, "col2im")


def candidates(problem: Problem) -> list[Winograd]:
    """Return schedules for every choice of one or two filtered axes."""
    axes = Axis(problem.batch, problem.batch, 1), *canonical(problem.axes)
    of_axes = [phases(axis) for axis in axes]
    if not all(of_axes):
        return []
    lines = [ALONE, *(_shared(lines_of(axis)) for axis in axes[1:])]
    gaps = any(unreached(axis, slots(axis, tiled=False)) for axis in axes)
    channels = channel_cuts(problem, problem.cout, problem.cin)
    found = []
    for along in (*combinations((1, 2, 3), 1), *combinations((1, 2, 3), 2)):
        u, v, a, b = order_of(along)
        of_a, of_b = lines[a], lines[b]
        if not of_a or not of_b:
            continue
        four = axes[u], axes[v], axes[a], axes[b]
        q = [-(-axis.fine // axis.stride) for axis in four]
        for cuts, (cut, columns) in product(cuts_of(q, (1, 1, tile_size(of_a[0]), tile_size(of_b[0]))), channels):
            found.append(Winograd(
                problem, along, four, (of_a, of_b), (of_axes[u], of_axes[v]), (*cuts, cut), columns, gaps
            ))  # fmt: skip
    return found


def _shared(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    """Return the lines of an axis if all can take their rows of the same cells."""
    return lines if all((line.first - lines[0].first) % line.apart == 0 for line in lines) else ()
