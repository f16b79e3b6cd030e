"""kn2row with minimal filtering along one axis: two neighbouring results for 3 or 4 products where the sum has 4 or 6.

Winograd's F(2,2) and F(2,3) with the points 0, 1, -1 and infinity, along depth or height. A block's rows are combined
to one grid for each point, the filter's taps along the axis to one filter for each point; kn2row adds the products of
the other taps for each point; and the sums of the points are combined to results in place. Only halves and sums occur,
so small whole numbers stay exact, and a result depends on no value but those its own taps reach. What rounding does is
in docs/how-it-works.md. Inf and NaN would spread within a result's own values (Inf - Inf), and so would an overflow in
between: a block with such a result raises NotFiniteError, and the plan starts again without minimal filtering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gemmconv.lowerings import filtered
from gemmconv.lowerings.base import (
    Array,
    CannotLowerError,
    Operands,
    Schedule,
    Usual,
    Workspace,
    address,
    aligned,
    canonical,
    five,
    simplified,
)
from gemmconv.lowerings.boxes import Bounds, Cut, Index, Range, digit, each, located
from gemmconv.lowerings.copies import need_finite, store
from gemmconv.lowerings.cost import (
    SMALLEST_BUFFER,
    best,
    copy_s,
    most_workspace_bytes,
    packing_s,
    pass_s,
    total_s,
)
from gemmconv.lowerings.grids import as_rows, fill, panels, side_by_side
from gemmconv.lowerings.kn2row import Kn2Row
from gemmconv.lowerings.minimal import RESULTS, Line, combine_rows, combine_sums, combine_taps, lines_of
from gemmconv.lowerings.phases import Move, Slots, places, slots, unreached
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Positions of a block and cuts of the output channels that are weighed; channels are not cut below _WIDE.
_POSITIONS = (64, 128, 256, 512, 1024, 2048)
_PARTS = (1, 2, 4, 8)
_WIDE = 64
_L2_SHARE = 0.75
# The most bytes of a packed filter: with many channels and few rows combining taps costs more than products.
MOST_PACKED = 32 << 20


S = TypeVar("S", bound=Schedule)


class Block(NamedTuple):
    """A box of the output: batch entry, tiles or q in depth and height, slot of the filtered axis, output channels."""

    batch: int
    depth: Range
    height: Range
    line: int
    channels: Range


class Program(NamedTuple):
    """What a block does."""

    grid: tuple[int, int, int]
    inside: tuple[slice, ...]
    rows: Index
    products: list[tuple[int, int, int, int]]
    region: Index | None  # of the output, where there are gaps
    stores: list[tuple[int, Index, Index, int]]  # which of a tile's results, of the sums, of the output, slots


@dataclass(frozen=True, slots=True)
class Winograd(Usual):
    """A schedule; see the module. `inner` does what a point needs, with a trivial axis in place of the filtered one."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    slots: tuple[Slots, Slots, Slots]
    along: int  # the filtered axis: 0 for depth, 1 for height
    lines: tuple[Line, ...]
    cuts: tuple[Cut, Cut]  # of tiles or q in depth and height
    inner: Kn2Row

    wants_finite_filter = True

    @property
    def count(self) -> int:
        return self.problem.batch * math.prod(map(len, self.cuts)) * len(self.lines) * len(self.inner.channels)

    @property
    def digits(self) -> list[list[Bounds]]:
        found = [digit(0, each(self.problem.batch))]
        for i, cut in enumerate(self.cuts):
            many = RESULTS if i == self.along else 1
            spans = (self.slots[i].span(self.axes[i], (many * a, many * b)) for a, b in cut)
            found.append(digit(i + 1, spans))
        lines: list[Bounds] = [()] * len(self.lines)
        return [*found, lines, digit(4, self.inner.channels)]

    def block(self, index: int) -> Block:
        """Return a block; those of the same rows follow each other."""
        index, channels = divmod(index, len(self.inner.channels))
        index, line = divmod(index, len(self.lines))
        batch, (depth, height) = located(index, self.cuts)
        return Block(batch, depth, height, line, self.inner.channels[channels])

    @property
    def largest_product(self) -> int:
        taps = max((panel.taps for panel in self.inner.panels[0]), default=0)
        rows: int = math.prod(self._points([cut.longest for cut in self.cuts]))
        return rows * taps * self.inner.channels.longest * self.problem.cin

    @property
    def workspace_bytes(self) -> int:
        item, cin = self.problem.compute_dtype.itemsize, self.problem.cin
        q = [cut.longest for cut in self.cuts]
        most = max(self.lines, key=lambda line: line.points)
        grid = math.prod(self._grid(q, most)) * cin
        sizes = self.inner.sizes((*q, self.slots[2].count))
        points = aligned(most.points * sizes.grid_rows * cin * item)
        return aligned(grid * item) + points + aligned(most.points * sizes.rows * self._columns * item)

    @property
    def packed_values(self) -> int:
        points = sum(line.points for line in self.lines)
        return points * self._taps * self.problem.cout * self.problem.cin

    @property
    def _taps(self) -> int:
        """Taps of the other axes."""
        return sum(panel.taps for panel in self.inner.panels[0])

    @property
    def _columns(self) -> int:
        lanes = math.prod(len(of_axis.offsets) for of_axis in self.inner.slots)
        return lanes * self.inner.channels.longest

    def _grid(self, q: Sequence[float], line: Line) -> Any:
        """Return the sizes of the box of rows that a block needs, for tiles or q in depth and height."""
        sizes = [n + of_axis.reach for n, of_axis in zip((*q, self.slots[2].count), self.slots, strict=True)]
        sizes[self.along] = RESULTS * q[self.along] + len(line.taps) - 1
        return sizes[0], sizes[1], sizes[2]

    def _points(self, q: Sequence[float]) -> Any:
        """Return the sizes of the grid of one point."""
        return self.inner.sizes((*q, self.slots[2].count)).grid  # type: ignore[arg-type]

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        problem, inner = self.problem, self.inner
        cin = problem.cin
        q = [cut.size / len(cut) for cut in self.cuts]
        spilled = self.workspace_bytes > machine.l2_bytes * _L2_SHARE
        boxes = problem.batch * math.prod(map(len, self.cuts)) * len(inner.channels)
        d, h, w = self._points(q)
        total = 0.0
        for line in self.lines:
            grid = math.prod(self._grid(q, line)) * cin
            values = d * h * w * cin
            sums = q[0] * q[1] * w * self._columns
            rows = q[0] * (h if q[0] > 1 else q[1]) * w
            gemms = line.points * inner.products_s(rows, spilled=spilled)
            total += boxes * (gemms + copy_s(2 * grid, w * cin) + copy_s(line.points * sums, sums))
            # Differences of rows are passes with three arrays, sums are combined in place.
            total += boxes * line.points * 2 * pass_s(values, h * w * cin, spilled=spilled)
            total += boxes * (2 * line.points - 2) * pass_s(sums, sums, spilled=spilled)
        stores = self.count * max(1, self._columns // inner.channels.longest)
        run = problem.cout / len(inner.channels) * inner.lanes
        strided = problem.layout == "NCDHW" and self.axes[2].stride > 1
        each = math.prod(problem.fine_shape) / stores
        total += stores * copy_s(each, run, spilled=True, strided=strided)
        packing = copy_s(2 * self.packed_values, cin * problem.cout, steps=8 * len(inner.panels[0]))
        return total + packing_s(problem, packing)

    @property
    def reason(self) -> str:
        taps = sorted({len(line.taps) for line in self.lines})
        rows = math.prod(self._points([cut.longest for cut in self.cuts]))
        kinds = " and ".join(f"F(2,{n})" for n in taps)
        return f"kn2row with {kinds} along {('depth', 'height')[self.along]}, GEMMs of up to {rows} rows, filter packed"

    def pack(self, filter: Array, packed: Array) -> None:
        """Combine the taps of the filtered axis, and lay them out as GEMMs take them: line, point, channels, panel."""
        problem = self.problem
        taps = filter.reshape(*(axis.kernel for axis in self.axes), problem.cout, problem.cin)
        taps = np.moveaxis(taps, self.along, 0)
        each = self._taps * problem.cout * problem.cin
        at = 0
        for line in self.lines:
            part = packed[at : at + line.points * each].reshape(line.points, each)
            at += part.size
            g = [np.expand_dims(taps[tap], self.along) for tap in line.taps]
            for start, stop in self.inner.channels:
                of_channels = part[:, start * self._taps * problem.cin : stop * self._taps * problem.cin]
                of_channels = of_channels.reshape(line.points, self._taps, stop - start, problem.cin)
                for panel in self.inner.panels[0]:
                    u = of_channels[:, panel.first : panel.first + panel.taps]
                    u = u.reshape(line.points, *panel.many, stop - start, len(panel.deep), problem.cin)
                    for i, box in enumerate(panel.boxes()):
                        combine_taps([x[(*box, slice(start, stop))] for x in g], u[..., i, :])

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        problem, cin, inner = self.problem, self.problem.cin, self.inner
        block = self.block(index)
        program = self._made(block)
        line = self.lines[block.line]
        channels = block.channels[1] - block.channels[0]
        lanes = tuple(len(of_axis.offsets) for of_axis in inner.slots)
        q = [stop - start for start, stop in block[1:3]]
        sizes = inner.sizes((*q, self.slots[2].count))
        columns = math.prod(lanes) * channels
        all_sums = workspace.take(line.points, sizes.rows * columns)
        all_sums[...] = 0  # so that a sum of -0.0 becomes +0.0
        if operands.bias is not None:  # the results of a tile begin with the sums of the first points
            if problem.layout == "NCDHW":
                all_sums[:RESULTS].reshape(RESULTS, -1, channels, sizes.rows)[...] = operands.start(block.channels, 1)
            else:
                all_sums[:RESULTS].reshape(RESULTS, -1, channels)[...] = operands.start(block.channels)
        sums, grids = list(all_sums), list(workspace.take(line.points, sizes.grid_rows * cin))
        coarse = [axis.coarse for axis in self.axes]
        value = five(problem.layout, operands.value, problem.batch, coarse, cin)[program.rows]
        rows = as_rows(problem, workspace.take(math.prod(program.grid) * cin))
        fill(rows, program.grid, program.inside, value)
        x = np.moveaxis(rows.reshape(*program.grid, cin), self.along, 0)
        v = []
        for grid in grids:
            of_point = as_rows(problem, grid)
            used = math.prod(sizes.grid)
            of_point[used:] = 0
            v.append(np.moveaxis(of_point[:used].reshape(*sizes.grid, cin), self.along, 0))
        tiles = len(v[0])
        combine_rows([x[i : i + RESULTS * tiles - 1 : RESULTS] for i in range(line.points)], v)
        workspace.mark("pack")
        item = workspace.gemm.itemsize
        before = sum(other.points for other in self.lines[: block.line]) * self._taps * problem.cout
        first_row = before + block.channels[0] * self._taps
        for point, (grid, z) in enumerate(zip(grids, sums, strict=True)):
            taps_at = address(operands.packed) + (first_row + point * self._taps * problem.cout) * cin * item
            inner.multiply(
                workspace.gemm, 0, channels, program.products, address(grid),
                sizes.grid_rows if problem.layout == "NCDHW" else cin, address(z), sizes.rows, taps_at,
            )  # fmt: skip
        workspace.mark("gemm")
        combine_sums(sums)
        results = sums[:RESULTS]
        for z in results:
            if problem.dtype.kind == "c":
                z += 0  # BLAS multiplies by a complex 1, which makes zeros of either sign
            need_finite(z)
        workspace.mark("col2im")
        shape = (q[0], sizes.pitch, sizes.grid[2])
        output = five(problem.layout, operands.output, problem.batch, [axis.fine for axis in self.axes], problem.cout)
        output = output[block.batch, ..., slice(*block.channels)]
        if program.region is not None:
            output[program.region] = operands.start(block.channels)
        for which, where, cells, together in program.stores:
            if problem.layout == "NCDHW":
                by_row = np.moveaxis(results[which].reshape(*lanes, channels, *shape), (4, 5, 6), (0, 1, 2))
            else:
                by_row = results[which].reshape(*shape, *lanes, channels)
            target = output[cells]
            # Splitting an axis in two never copies.
            store(target.reshape(*target.shape[:2], -1, together, target.shape[3]), by_row[where])
        workspace.mark("store")

    def _made(self, block: Block) -> Program:
        line = self.lines[block.line]
        spans = [block.depth, block.height, (0, self.slots[2].count)]
        grid = self._grid([stop - start for start, stop in spans[:2]], line)
        inside: list[slice] = []
        rows: list[slice] = []
        for i, (axis, of_axis, (start, _)) in enumerate(zip(self.axes, self.slots, spans, strict=True)):
            origin = start * RESULTS + line.first if i == self.along else start - of_axis.shifts[1]
            first, last = max(0, origin), min(axis.coarse, origin + grid[i])
            inside.append(slice(first - origin, max(first, last) - origin))
            rows.append(slice(first, max(first, last)))
        # A point's products: along the filtered axis every tile is there.
        spans_of_point = list(spans)
        spans_of_point[self.along] = (0, spans[self.along][1] - spans[self.along][0])
        sizes = self.inner.sizes([stop - start for start, stop in spans_of_point])
        products = []
        for number, panel in enumerate(self.inner.panels[0]):
            found = self.inner.product(panel, spans_of_point, sizes)
            if found is not None:
                products.append((number, *found))
        stores = [store for which in range(RESULTS) for store in self._stores(block, line, which)]
        region = None
        if any(unreached(axis, of_axis) for axis, of_axis in zip(self.axes, self.slots, strict=True)):
            spans[self.along] = (RESULTS * spans[self.along][0], RESULTS * spans[self.along][1])
            region = tuple(slice(*s.span(a, q)) for a, s, q in zip(self.axes, self.slots, spans, strict=True))
        where: Index = (block.batch, *rows)
        return Program(grid, tuple(inside), where, products, region, stores)

    def _stores(self, block: Block, line: Line, which: int) -> list[tuple[int, Index, Index, int]]:
        """Return where one of the results of every tile is stored."""
        axis, of_axis = self.axes[self.along], self.slots[self.along]
        spans = block.depth, block.height
        start, stop = spans[self.along]
        # Tile t of result `which` is q = t * 2 + which, and so fine position q * stride + offset.
        step = axis.stride * RESULTS
        offset = of_axis.offsets[line.slot] + which * axis.stride
        last = min(stop, -((offset - axis.fine) // step))
        if last <= start:
            return []
        tiles = slice(0, last - start)
        fine = slice(start * step + offset, (last - 1) * step + offset + 1, step)
        other = 1 - self.along
        found = []
        along_w = list(places(self.axes[2], self.slots[2], (0, self.slots[2].count)))
        for place in places(self.axes[other], self.slots[other], spans[other]):
            for w, q, fine_w, together in side_by_side(self.axes[2], self.slots[2], along_w, self.problem.layout):
                taken, put, slot = [tiles, tiles], [fine, fine], [0, 0]
                taken[other], put[other], slot[other] = place.q, place.fine, place.slot
                found.append((which, (*taken, q, *slot, slice(w, w + together)), (*put, fine_w), together))
        return found


def schedule(problem: Problem, machine: Machine) -> Schedule:
    """Choose axes and blocks for a problem by cost, or raise CannotLowerError where no axis can be filtered."""
    kernel, strides, dilations = (
        "x".join(str(getattr(axis, name)) for axis in problem.axes) for name in ("kernel", "stride", "dilation")
    )
    problem = simplified(problem)
    axes = canonical(problem.axes)
    found: list[Winograd] = []
    for along in (0, 1):
        lines = lines_of(axes[along])
        if not lines or any(len(line.taps) == 1 or line.apart > 1 for line in lines):
            continue
        of_axes = [slots(axis, tiled=i != along) for i, axis in enumerate(axes)]
        if len(lines) > 1 and any(unreached(axis, of_axis) for axis, of_axis in zip(axes, of_axes, strict=True)):
            continue  # a block would clear what belongs to others
        for parts, positions in product(_PARTS, _POSITIONS):
            if parts == 1 or problem.cout >= parts * _WIDE:
                found.append(_candidate(problem, axes, of_axes, along, lines, positions, parts))
    text = f"{problem.operation}: algorithm='winograd' cannot do this problem:"
    of_tiles = filtered.candidates(problem, machine)
    if not found and not of_tiles:
        raise CannotLowerError(
            f"{text} the taps that reach output positions of one residue modulo the stride must be 2 or 3 neighbours "
            "along depth or height, or at most 3 evenly apart along some axis where BLAS does not pack small products, "
            f"got kernel {kernel}, strides {strides}, dilations {dilations}; 'col2im' and 'auto' can"
        )
    item = problem.compute_dtype.itemsize
    possible: list[Schedule] = [s for s in of_tiles if s.packed_values * item <= MOST_PACKED]
    try:
        possible.append(best(affordable(found or of_tiles, machine, text, "col2im"), machine))
    except CannotLowerError:
        if not possible:
            raise
    return min(possible, key=lambda s: total_s(s, machine))


def affordable(found: Sequence[S], machine: Machine, text: str, other: str) -> list[S]:
    """Return the schedules that take no more memory than they may, or raise with what the least would take.

    `text` is what the error begins with, and `other` the lowering that it names.
    """
    limit = most_workspace_bytes(machine)
    small_enough = [s for s in found if s.workspace_bytes <= limit]
    if not small_enough:
        least = min(s.workspace_bytes for s in found)
        raise CannotLowerError(f"{text} its blocks take {least} bytes, more than {limit}; '{other}' and 'auto' can")
    item = found[0].problem.compute_dtype.itemsize
    packed = [s for s in small_enough if s.packed_values * item <= MOST_PACKED]
    if not packed:
        packed_bytes = min(s.packed_values for s in small_enough) * item
        raise CannotLowerError(
            f"{text} its packed filter takes {packed_bytes} bytes, more than {MOST_PACKED}; '{other}' and 'auto' can"
        )
    return packed


def _candidate(
    problem: Problem, axes: tuple[Axis, Axis, Axis], of_axes: Sequence[Slots], along: int, lines: tuple[Line, ...],
    positions: int, parts: int,
) -> Winograd:  # fmt: skip
    counts = [of_axis.count for of_axis in of_axes]
    counts[along] = -(-counts[along] // RESULTS)
    channels = Cut(problem.cout, -(-problem.cout // parts))
    height = min(counts[1], max(1, positions // counts[2]))
    depth = min(counts[0], max(1, positions // (counts[1] * counts[2])))
    cuts = Cut(counts[0], depth), Cut(counts[1], height)
    # For a point, the filtered axis is one of independent rows.
    inner_axes, inner_slots = list(axes), list(of_axes)
    inner_axes[along] = Axis(counts[along], counts[along], 1)
    inner_slots[along] = Slots((0,), counts[along], (Move(0, 1, 0, 0),))
    group = (0, len(inner_slots[0].offsets))
    cin = problem.cin if problem.layout == "NDHWC" else 0
    of_point = tuple(panels(inner_slots, group, channels.longest, cin, 0))
    inner = Kn2Row(
        problem, (inner_axes[0], inner_axes[1], inner_axes[2]), (inner_slots[0], inner_slots[1], inner_slots[2]), False,
        (cuts[0], cuts[1], Cut(counts[2], counts[2])), (group,), (of_point,), channels, True,
    )  # fmt: skip
    return Winograd(problem, axes, (of_axes[0], of_axes[1], of_axes[2]), along, lines, cuts, inner)
