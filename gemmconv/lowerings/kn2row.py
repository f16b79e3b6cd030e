"""kn2row: GEMM with beta = 1 straight into accumulators, where every tap is a shift of rows; nothing is folded.

A block is a box of q of the phases (phases.py) and some output channels. Its rows of the value are copied once into a
grid with zeros around it, so that the shift of any tap is another start in that grid. For each move, the taps that
shift alike, a GEMM adds the products of the shifted rows to the accumulators of the slots those taps reach; slots that
lie side by side make it wider. The accumulators are then stored. A dilation costs nothing. The zeros around the grid
do, so this is for rows that are long beside the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np

from gemmconv.blas import Gemm
from gemmconv.lowerings.base import (
    Array,
    Operands,
    Usual,
    Workspace,
    address,
    aligned,
    canonical,
    five,
    must_widen,
    simplified,
)
from gemmconv.lowerings.boxes import Bounds, Cut, Index, Range, digit, each, located
from gemmconv.lowerings.copies import store
from gemmconv.lowerings.cost import (
    SMALLEST_BUFFER,
    best_that_fits,
    copy_s,
    gemm_s,
    packing_s,
)
from gemmconv.lowerings.grids import Panel, Sizes, as_rows, fill, panels, side_by_side
from gemmconv.lowerings.phases import Slots, places, slots, unreached
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Positions of a block and cuts of the output channels that are weighed; channels are not cut below _WIDE.
_POSITIONS = (32, 64, 128, 256, 512, 1024, 2048)
_PARTS = (1, 2, 4, 8, 16, 32, 64)
_WIDE = 64
_L2_SHARE = 0.75


class Block(NamedTuple):
    """A box of the output: batch entry, q in depth, height and width, slots of depth, output channels."""

    batch: int
    depth: Range
    height: Range
    width: Range
    group: int  # of slots of depth
    channels: Range


class Program(NamedTuple):
    """What a block does, in rows of its grid and indices of its arrays."""

    sizes: Sizes
    in_place: tuple[int, ...] | None  # where its grid is in the value, if it is a run of rows as they lie
    inside: tuple[slice, ...]  # of the grid, for `rows` of the value
    rows: Index
    products: list[tuple[int, int, int, int]]  # panel, first row of the grid, first row of the sums, rows
    region: Index  # of the output
    stores: list[tuple[Index, Index, int]]  # of the sums, of the output, slots of width that are stored together


@dataclass(frozen=True, slots=True)
class Kn2Row(Usual):
    """A schedule; see the module."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    slots: tuple[Slots, Slots, Slots]
    gaps: bool
    cuts: tuple[Cut, Cut, Cut]  # of q in depth, height and width
    groups: tuple[Range, ...]  # of slots of depth, that blocks do together
    panels: tuple[tuple[Panel, ...], ...]  # of each group
    channels: Cut
    packs: bool  # whether the filter is copied, panel by panel, or used as it lies

    @property
    def count(self) -> int:
        return self.problem.batch * math.prod(map(len, self.cuts)) * len(self.groups) * len(self.channels)

    @property
    def digits(self) -> list[list[Bounds]]:
        boxes = (map(partial(s.span, a), cut) for s, a, cut in zip(self.slots, self.axes, self.cuts, strict=True))
        depth, height, width = (digit(i, spans) for i, spans in enumerate(boxes, 1))
        groups: list[Bounds] = [()] * len(self.groups)
        return [digit(0, each(self.problem.batch)), depth, height, width, groups, digit(4, self.channels)]

    def block(self, index: int) -> Block:
        """Return a block; those of the same rows follow each other."""
        index, channels = divmod(index, len(self.channels))
        index, group = divmod(index, len(self.groups))
        batch, (depth, height, width) = located(index, self.cuts)
        return Block(batch, depth, height, width, group, self.channels[channels])

    @property
    def largest_product(self) -> int:
        taps = max((panel.taps for panel in self._all_panels), default=0)
        return self._largest.rows * taps * self.channels.longest * self.problem.cin

    @property
    def workspace_bytes(self) -> int:
        item, most = self.problem.compute_dtype.itemsize, self._largest
        return aligned(most.grid_rows * self.problem.cin * item) + aligned(most.rows * self._columns * item)

    @property
    def packed_values(self) -> int:
        return sum(panel.taps for panel in self._all_panels) * self.problem.cout * self.problem.cin * self.packs

    wants_finite_filter = True

    @property
    def _all_panels(self) -> tuple[Panel, ...]:
        return tuple(panel for group in self.panels for panel in group)

    @property
    def _columns(self) -> int:
        """The most columns of the sums of a block."""
        slots = max(stop - start for start, stop in self.groups) * len(self.slots[1].offsets)
        return slots * len(self.slots[2].offsets) * self.channels.longest

    @property
    def _largest(self) -> Sizes:
        return self.sizes([cut.longest for cut in self.cuts])

    def sizes(self, q: Sequence[int]) -> Sizes:
        """Return the sizes of a block's grid and sums; a single plane needs no rows of height beside its own."""
        depth, height, width = (size + of_axis.reach for size, of_axis in zip(q, self.slots, strict=True))
        pitch = height if q[0] > 1 else q[1]
        return Sizes((depth, height, width), depth * height * width + self.slots[2].reach, pitch, q[0] * pitch * width)

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        problem, axes = self.problem, self.axes
        q = [cut.size / len(cut) for cut in self.cuts]
        boxes = problem.batch * math.prod(map(len, self.cuts)) * len(self.channels)
        h, w = q[1] + self.slots[1].reach * (q[0] > 1), q[2] + self.slots[2].reach
        # Rows whose shift leaves the value are left out along depth, and along height in single planes.
        landing = min(1, axes[0].coarse / self.slots[0].count)
        landing *= min(1, axes[1].coarse / self.slots[1].count) if q[0] == 1 else 1
        rows = q[0] * h * w
        spilled = self.workspace_bytes > machine.l2_bytes * _L2_SHARE
        channels = problem.cout / len(self.channels)
        total = boxes * self.products_s(rows * landing, spilled=spilled)
        total += boxes * len(self.groups) * copy_s(rows * self._columns, rows)
        if any(of_axis.reach for of_axis in self.slots):
            grid = math.prod(size + of_axis.reach for size, of_axis in zip(q, self.slots, strict=True))
            total += boxes * len(self.groups) * copy_s(2 * grid * problem.cin, w * problem.cin)
        stores = self.count * max(1, self._columns // self.channels.longest // self.lanes)
        values = math.prod(problem.fine_shape) / stores
        run = channels * self.lanes
        total += stores * copy_s(values, run, spilled=True, strided=problem.layout == "NCDHW" and axes[2].stride > 1)
        packed = self.packed_values
        steps = math.prod(problem.kernel) if packed else 0
        return total + packing_s(problem, copy_s(packed, problem.cin * problem.cout, steps=steps))

    def products_s(self, rows: float, *, spilled: bool) -> float:
        """Return the estimated time of one product for each panel."""
        channels = self.problem.cout / len(self.channels)
        return sum(
            len(p.deep) * gemm_s(rows / len(p.deep), p.wide * channels, len(p.deep) * self.problem.cin, spilled=spilled)
            for p in self._all_panels
        )

    @property
    def reason(self) -> str:
        taps = max((panel.wide for panel in self._all_panels), default=0)
        packed = ", filter packed" if self.packs else ""
        return f"GEMMs of up to {taps} taps and {self._largest.rows} rows added straight to the sums of phases{packed}"

    @property
    def lanes(self) -> int:
        """Slots of width that lie side by side in the output."""
        slots = len(self.slots[2].offsets)
        return slots if slots == self.axes[2].stride else 1

    def pack(self, filter: Array, packed: Array) -> None:
        """Copy the filter into the order in which GEMMs take it: channels of a block, panels, taps."""
        problem = self.problem
        taps = filter.reshape(*(axis.kernel for axis in self.axes), problem.cout, problem.cin)
        total = packed.size // (problem.cout * problem.cin)
        for start, stop in self.channels:
            part = packed[start * total * problem.cin : stop * total * problem.cin].reshape(total, -1, problem.cin)
            for panel in self._all_panels:
                to = part[panel.first : panel.first + panel.taps]
                to = to.reshape(*panel.many, stop - start, len(panel.deep), problem.cin)
                for i, box in enumerate(panel.boxes()):
                    np.copyto(to[..., i, :], taps[(*box, slice(start, stop))], casting="unsafe")

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        problem, gemm, cin = self.problem, workspace.gemm, self.problem.cin
        block = self.block(index)
        program = self._made(block)
        channels = block.channels[1] - block.channels[0]
        sizes, group = program.sizes, self.groups[block.group]
        lanes = (group[1] - group[0], len(self.slots[1].offsets), len(self.slots[2].offsets))
        columns = math.prod(lanes) * channels
        sums = workspace.take(sizes.rows * columns)
        channels_first, item = problem.layout == "NCDHW", gemm.itemsize
        # Sums that begin with 0 end as +0.0 where products are -0.0.
        if channels_first:
            sums.reshape(-1, channels, sizes.rows)[...] = operands.start(block.channels, 1)
        else:
            sums.reshape(-1, channels)[...] = operands.start(block.channels)
        if program.in_place is None:
            grid, ld = workspace.take(sizes.grid_rows * cin), sizes.grid_rows if channels_first else cin
            coarse = [axis.coarse for axis in self.axes]
            value = five(problem.layout, operands.value, problem.batch, coarse, cin)[program.rows]
            fill(as_rows(problem, grid), sizes.grid, program.inside, value)
            source = address(grid)
        else:
            steps = operands.steps[0]
            ld = steps[4] if channels_first else steps[3]
            offset = sum(at * step for at, step in zip(program.in_place, steps, strict=False))
            source = address(operands.value) + offset * item
        workspace.mark("pack")
        to = address(sums)
        taps = operands.packed if self.packs else operands.filter
        per_channel = taps.size // (problem.cout * cin) if self.packs else 1
        taps_at = address(taps) + block.channels[0] * per_channel * cin * item
        self.multiply(gemm, block.group, channels, program.products, source, ld, to, sizes.rows, taps_at)
        workspace.mark("gemm")
        if problem.dtype.kind == "c":
            sums += 0  # BLAS multiplies by a complex 1, which makes zeros of either sign
        shape = (block.depth[1] - block.depth[0], sizes.pitch, sizes.grid[2])
        if channels_first:
            by_row = np.moveaxis(sums.reshape(*lanes, channels, *shape), (4, 5, 6), (0, 1, 2))
        else:
            by_row = sums.reshape(*shape, *lanes, channels)
        output = five(problem.layout, operands.output, problem.batch, [axis.fine for axis in self.axes], problem.cout)
        output = output[block.batch, ..., slice(*block.channels)]
        if self.gaps:
            output[program.region] = operands.start(block.channels)
        for where, cells, together in program.stores:
            target = output[cells]
            # Splitting an axis in two never copies.
            store(target.reshape(*target.shape[:2], -1, together, target.shape[3]), by_row[where])
        workspace.mark("store")

    def multiply(
        self, gemm: Gemm, group: int, channels: int, products: Sequence[tuple[int, int, int, int]],
        grid_at: int, grid_ld: int, sums_at: int, sums_rows: int, taps_at: int,
    ) -> None:  # fmt: skip
        """Add the products of a block to its sums; `grid_ld` lies from row to row, or with channels first from channel
        to channel.
        """
        cin, item = self.problem.cin, gemm.itemsize
        first_slot = self.groups[group][0]
        high, wide = len(self.slots[1].offsets), len(self.slots[2].offsets)
        columns = (self.groups[group][1] - first_slot) * high * wide * channels
        transposed = self.problem.layout == "NCDHW"
        for number, shifted, row, m in products:
            panel = self.panels[group][number]
            n, deep = panel.wide * channels, len(panel.deep)
            d, h, w = panel.slot
            column = (((d - first_slot) * high + h) * wide + w) * channels
            at = taps_at + self._offset(panel, channels) * cin * item
            if transposed:
                gemm(n, m, cin, at, cin, False, grid_at + shifted * item, grid_ld, False,
                     sums_at + (column * sums_rows + row) * item, sums_rows, True)  # fmt: skip
                continue
            # Every deep-th row with the rows that follow it: BLAS takes no rows that overlap.
            for i in range(deep):
                source, to = grid_at + (shifted + i) * grid_ld * item, sums_at + ((row + i) * columns + column) * item
                every, k = (m - i + deep - 1) // deep, deep * cin
                gemm(every, n, k, source, deep * grid_ld, False, at, k, True, to, deep * columns, True)

    def _offset(self, panel: Panel, channels: int) -> int:
        """Return the first row of a panel in the filter."""
        if self.packs:
            return panel.first * channels
        _, h, w = (axis.kernel for axis in self.axes)
        return ((panel.tap[0] * h + panel.tap[1]) * w + panel.tap[2]) * self.problem.cout

    def _made(self, block: Block) -> Program:
        spans = block[1:4]
        sizes = self.sizes([stop - start for start, stop in spans])
        inside: list[slice] = []
        rows: list[slice] = []
        for axis, of_axis, (start, stop) in zip(self.axes, self.slots, spans, strict=True):
            low, high = of_axis.shifts
            origin = start - high
            first, last = max(0, origin), min(axis.coarse, stop - low)
            inside.append(slice(first - origin, max(first, last) - origin))
            rows.append(slice(first, max(first, last)))
        region = tuple(
            slice(*of_axis.span(axis, q)) for axis, of_axis, q in zip(self.axes, self.slots, spans, strict=True)
        )
        products = []
        for number, panel in enumerate(self.panels[block.group]):
            found = self.product(panel, spans, sizes)
            if found is not None:
                products.append((number, *found))
        in_place = self._in_place(block.batch, rows, sizes)
        where: Index = (block.batch, *rows)
        return Program(sizes, in_place, tuple(inside), where, products, region, list(self._stores(block)))

    def _in_place(self, batch: int, rows: Sequence[slice], sizes: Sizes) -> tuple[int, ...] | None:
        """Return where a block's grid begins in the value, or None if it is not there as it is."""
        if must_widen(self.problem) or any(of_axis.reach for of_axis in self.slots):
            return None
        coarse = [axis.coarse for axis in self.axes]
        found = [row.stop - row.start for row in rows]
        whole = [n == size for n, size in zip(found, coarse, strict=True)]
        if tuple(found) != sizes.grid or not (whole[2] or found[:2] == [1, 1]) or not (whole[1] or found[0] == 1):
            return None
        return batch, *(int(row.start) for row in rows)

    def product(self, panel: Panel, spans: Sequence[Range], sizes: Sizes) -> tuple[int, int, int] | None:
        """Return the first row of a panel's product in the grid and in the sums, and how many rows it has, if any."""
        (_, height, width), pitch = sizes.grid, sizes.pitch
        lands = []
        for axis, shift, (start, stop) in zip(self.axes, panel.shift, spans, strict=True):
            # Joined along k are shifts of width down to this one.
            least = shift - len(panel.deep) + 1 if axis is self.axes[2] else shift
            lands.append((max(start, least) - start, min(stop, axis.coarse + shift) - start))
        (d0, d1), (h0, h1), (w0, w1) = lands
        if d0 >= d1 or h0 >= h1 or w0 >= w1:
            return None
        if d1 - d0 > 1:  # planes follow each other, with the rows between them
            h0, h1 = 0, spans[1][1] - spans[1][0]
        before = [of_axis.shifts[1] - shift for of_axis, shift in zip(self.slots, panel.shift, strict=True)]
        grid_row = ((d0 + before[0]) * height + h0 + before[1]) * width + before[2]
        return grid_row, (d0 * pitch + h0) * width, ((d1 - d0 - 1) * pitch + h1 - h0) * width

    def _stores(self, block: Block) -> Iterator[tuple[Index, Index, int]]:
        """Yield which sums are stored together, where in the output, and how many slots of width they are."""
        group = self.groups[block.group]
        along = [list(places(axis, s, q)) for axis, s, q in zip(self.axes, self.slots, block[1:4], strict=True)]
        for d, h in product(*along[:2]):
            if group[0] <= d.slot < group[1]:
                for w, q, fine, together in side_by_side(self.axes[2], self.slots[2], along[2], self.problem.layout):
                    where = (d.q, h.q, q, d.slot - group[0], h.slot, slice(w, w + together))
                    yield where, (d.fine, h.fine, fine), together


def schedule(problem: Problem, machine: Machine) -> Kn2Row:
    """Choose the blocks for a problem, by the cost of every cut of positions, slots of depth and output channels."""
    problem = simplified(problem)
    axes = canonical(problem.axes)
    of_axes = slots(axes[0]), slots(axes[1]), slots(axes[2])
    counts = [of_axis.count for of_axis in of_axes]
    gaps = any(unreached(axis, of_axis) for axis, of_axis in zip(axes, of_axes, strict=True))
    deep = len(of_axes[0].offsets)
    groupings = {((0, deep),), tuple((i, i + 1) for i in range(deep))} if deep > 1 and not gaps else {((0, deep),)}

    # With channels first the rows of a tap are not beside those of the next.
    cin = problem.cin if problem.layout == "NDHWC" else 0

    def candidate(positions: int, groups: tuple[Range, ...], parts: int) -> Kn2Row:
        chunks = (positions // (counts[1] * counts[2]), positions // counts[2], positions)
        d, h, w = (Cut(n, min(n, max(1, chunk))) for n, chunk in zip(counts, chunks, strict=True))
        channels = Cut(problem.cout, -(-problem.cout // parts))
        of_groups: list[tuple[Panel, ...]] = []
        first = 0
        for group in groups:
            of_groups.append(tuple(panels(of_axes, group, channels.longest, cin, first)))
            first += sum(panel.taps for panel in of_groups[-1])
        every = [panel for of_group in of_groups for panel in of_group]
        packs = (
            problem.dtype != problem.compute_dtype
            or problem.groups > 1
            or any(
                panel.many[0] * panel.many[1] * len(panel.deep) > 1 or (panel.many[2] > 1 and len(channels) > 1)
                for panel in every
            )
        )
        return Kn2Row(problem, axes, of_axes, gaps, (d, h, w), groups, tuple(of_groups), channels, packs)

    every = math.prod(counts)
    positions = sorted({min(n, every) for n in _POSITIONS})
    parts = [n for n in _PARTS if n == 1 or problem.cout >= n * _WIDE]
    found = [candidate(n, g, p) for n in positions for g in sorted(groupings) for p in parts]
    reach = "x".join(str(of_axis.reach) for of_axis in of_axes)
    text = f"{problem.operation}: algorithm='kn2row' cannot do this problem: taps reach {reach} rows, so that a "
    return best_that_fits(found, machine, f"{text}block's rows", "'col2im' and 'auto'")
