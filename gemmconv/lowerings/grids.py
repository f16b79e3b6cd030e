"""What kn2row is made of: grids of rows, the taps of one GEMM, slots of width that are stored together.

A grid holds a block's rows of the value, with zeros around them, so that every tap is a shift. This module chooses
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

from gemmconv.lowerings.base import Array
from gemmconv.lowerings.boxes import Range
from gemmconv.lowerings.copies import copy
from gemmconv.lowerings.phases import Move, Place, Slots
from gemmconv.problem import Axis, Problem

# Slots of height and depth are joined in one GEMM up to this many columns: beyond it GEMM hardly gains, and the
# filter would be copied for nothing.
_ENOUGH_COLUMNS = 256
# Taps are joined along k up to this length: beyond it GEMM hardly gains.
_DEEP = 256


class Panel(NamedTuple):
    """The taps of one GEMM: `many` consecutive ones on each axis, and the first slot each of them reaches."""

    tap: tuple[int, int, int]
    many: tuple[int, int, int]
    slot: tuple[int, int, int]
    shift: tuple[int, int, int]
    first: int  # taps of panels before this one, where the filter is packed
    deep: tuple[int, ...]  # first taps of width that are joined along k, for neighbouring rows

    @property
    def wide(self) -> int:
        """Taps side by side, in the columns of one GEMM."""
        return math.prod(self.many)

    @property
    def taps(self) -> int:
        return self.wide * len(self.deep)

    def boxes(self) -> Iterator[tuple[slice, slice, slice]]:
        """Yield the taps of the filter, for one of the rows after the other."""
        d, h = (slice(tap, tap + many) for tap, many in zip(self.tap[:2], self.many, strict=False))
        for tap in self.deep:
            yield d, h, slice(tap, tap + self.many[2])


class Sizes(NamedTuple):
    """A block's grid, its rows with those that shifts run over its end, and of its sums the rows of a plane and all."""

    grid: tuple[int, int, int]
    grid_rows: int
    pitch: int  # lines of a plane of the sums
    rows: int


def as_rows(problem: Problem, grid: Array) -> Array:
    """View a grid as [row, channel], in either layout."""
    return grid.reshape(problem.cin, -1).T if problem.layout == "NCDHW" else grid.reshape(-1, problem.cin)


def fill(rows: Array, sizes: tuple[int, int, int], inside: tuple[slice, ...], value: Array) -> None:
    """Copy a box of the value into the rows of a grid, with zeros around it."""
    used = math.prod(sizes)
    rows[used:] = 0
    box = rows[:used].reshape(*sizes, rows.shape[1])
    part = box[inside]
    if part.shape != box.shape:
        box[...] = 0
    copy(part, value)


def side_by_side(
    axis: Axis, of_axis: Slots, found: Sequence[Place], layout: str
) -> Iterator[tuple[int, slice, slice, int]]:
    """Yield places of width: first slot, q, fine positions, slots; all slots as one where they fill the output.

    Not with channels first, where NumPy's inner loops would be along the slots.
    """
    slots = len(of_axis.offsets)
    if layout == "NDHWC" and slots > 1 and slots == axis.stride and len(found) == slots:
        start, stop = max(place.q.start for place in found), min(place.q.stop for place in found)
        if start < stop:
            first = found[0].fine.start + (start - found[0].q.start) * axis.stride
            yield 0, slice(start, stop), slice(first, first + (stop - start) * axis.stride), slots
            for place in found:
                for a, b in ((place.q.start, start), (stop, place.q.stop)):
                    if a < b:
                        first = place.fine.start + (a - place.q.start) * axis.stride
                        fine = slice(first, first + (b - a - 1) * axis.stride + 1, axis.stride)
                        yield place.slot, slice(a, b), fine, 1
            return
    for place in found:
        yield place.slot, place.q, place.fine, 1


def panels(of_axes: Sequence[Slots], group: Range, channels: int, cin: int, first: int) -> list[Panel]:
    """Return the GEMMs of a group of slots of depth: moves, joined as long as their columns are neighbours and few.

    Moves of width that reach the same slots from neighbouring rows are joined along k; not for a `cin` of 0.
    """
    found: list[Panel] = []
    depth, height, width = of_axes
    inner = len(height.offsets), len(width.offsets)
    along_w: list[tuple[Move, tuple[int, ...]]] = [(move, (move.tap,)) for move in width.moves]
    by_row = sorted(width.moves, key=lambda move: -move.shift)
    same = {(move.slot, move.many) for move in by_row}
    neighbours = all(a.shift == b.shift + 1 for a, b in pairwise(by_row))
    if 0 < cin * len(by_row) <= _DEEP and len(by_row) > 1 and len(same) == 1 and neighbours:
        along_w = [(by_row[0], tuple(move.tap for move in by_row))]
    for d, h, (w, deep) in product(depth.within(group), height.moves, along_w):
        join_h = w.many == inner[1] and w.many * channels < _ENOUGH_COLUMNS
        join_d = join_h and h.many == inner[0] and w.many * h.many * channels < _ENOUGH_COLUMNS
        many = (d.many if join_d else 1, h.many if join_h else 1, w.many)
        for i, j in product(range(0, d.many, many[0]), range(0, h.many, many[1])):
            tap, slot = (d.tap + i, h.tap + j, w.tap), (d.slot + i, h.slot + j, w.slot)
            found.append(Panel(tap, many, slot, (d.shift, h.shift, w.shift), first, deep))
            first += found[-1].taps
    return found
