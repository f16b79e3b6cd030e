"""An axis seen as phases: the fine positions of one residue modulo the stride, on which every tap is a plain shift.

Within a phase, tap ``a`` of coarse position ``i`` lands on ``q = i + shift``; ``q`` stands for fine position
``q * stride + offset``. Where the kernel is a multiple of the stride and not dilated, the taps of one multiple land
side by side, so a whole axis is one phase of tiles: `stride` neighbouring fine positions, its lanes, behind each ``q``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from gemmconv.lowerings.boxes import Range
from gemmconv.problem import Axis

_MOST_LANES = 16


@dataclass(frozen=True, slots=True)
class Phase:
    """Fine positions ``q * stride + offset`` (and the `lanes` - 1 that follow each) for q in [0, count)."""

    offset: int
    count: int
    taps: tuple[tuple[int, int], ...]  # (first tap of the filter, shift)


@lru_cache(maxsize=64)
def phases(axis: Axis) -> tuple[Phase, ...]:
    """Return the phases that any tap reaches, each with its taps that land somewhere."""
    taps: dict[int, list[tuple[int, int]]] = {}
    for tap in range(axis.kernel):
        shift, residue = divmod(tap * axis.dilation - axis.lo, axis.stride)
        taps.setdefault(residue, []).append((tap, shift))
    found = (_phase(axis, residue, taps[residue]) for residue in sorted(taps))
    return tuple(phase for phase in found if phase.taps)


def one_phase(axis: Axis) -> tuple[Axis, range]:
    """Return the fine positions of a phase as an axis of stride 1, and which they are, if taps reach no other phase.

    Otherwise the axis and all positions.
    """
    if axis.kernel > 1 and axis.dilation % axis.stride:
        return axis, range(axis.fine)
    read = range(-axis.lo % axis.stride, axis.fine, axis.stride)
    dilation, lo = max(1, axis.dilation // axis.stride), -(-axis.lo // axis.stride)
    return Axis(axis.coarse, len(read), axis.kernel, 1, dilation, lo), read


def tiles(axis: Axis) -> tuple[Phase, ...]:
    """Return the one phase of an axis whose kernel is a multiple of its stride: `stride` lanes behind each q."""
    base, before = divmod(axis.lo, axis.stride)
    return (_phase(axis, -before, [(t * axis.stride, t - base) for t in range(axis.kernel // axis.stride)]),)


def tileable(axis: Axis) -> bool:
    """Whether `tiles` applies; not for so many lanes that columns of a few rows would not fit a cache."""
    return 1 < axis.stride <= _MOST_LANES and axis.dilation == 1 and axis.kernel % axis.stride == 0


def _phase(axis: Axis, offset: int, taps: list[tuple[int, int]]) -> Phase:
    count = max(0, -((offset - axis.fine) // axis.stride))
    landing = [(tap, shift) for tap, shift in taps if max(0, -shift) < min(axis.coarse, count - shift)]
    return Phase(offset, count, tuple(landing))


def landing(axis: Axis, phase: Phase, shift: int, q: Range) -> Range:
    """Return the coarse positions that a tap carries into q's interval of a phase."""
    start = max(0, q[0] - shift)
    return start, max(start, min(axis.coarse, min(q[1], phase.count) - shift))


@dataclass(frozen=True, slots=True)
class Move:
    """`many` consecutive taps that carry coarse position i to q = i + shift, in consecutive slots."""

    tap: int
    many: int
    slot: int
    shift: int


@dataclass(frozen=True, slots=True)
class Slots:
    """An axis as slots: fine positions ``q * stride + offset`` for each offset, all with q in [0, count)."""

    offsets: tuple[int, ...]
    count: int
    moves: tuple[Move, ...]

    @property
    def shifts(self) -> Range:
        """The smallest and the largest shift."""
        found = [move.shift for move in self.moves]
        return min(found, default=0), max(found, default=0)

    @property
    def reach(self) -> int:
        """How many more coarse positions than q an interval of q needs."""
        return self.shifts[1] - self.shifts[0]

    def within(self, slots: Range) -> list[Move]:
        """Return the moves into some of the slots."""
        found = []
        for move in self.moves:
            first, last = max(move.slot, slots[0]), min(move.slot + move.many, slots[1])
            if first < last:
                found.append(Move(move.tap + first - move.slot, last - first, first, move.shift))
        return found

    def span(self, axis: Axis, q: Range) -> Range:
        """Return the fine positions that an interval of q covers, gaps included."""
        first = min(self.offsets[0], 0) if self.offsets else 0
        return max(0, q[0] * axis.stride + first), min(axis.fine, q[1] * axis.stride + first)


def slots(axis: Axis, *, tiled: bool = True) -> Slots:
    """Return an axis as slots: the lanes of its tiles where it has them and they are wanted, otherwise its phases."""
    if tiled and tileable(axis):
        (tile,) = tiles(axis)
        moves = tuple(Move(tap, axis.stride, 0, shift) for tap, shift in tile.taps)
        return Slots(tuple(tile.offset + lane for lane in range(axis.stride)), tile.count, moves)
    found = phases(axis)
    single = sorted((tap, i, shift) for i, phase in enumerate(found) for tap, shift in phase.taps)
    joined: list[Move] = []
    for tap, slot, shift in single:
        last = joined[-1] if joined else None
        if last and (tap, slot, shift) == (last.tap + last.many, last.slot + last.many, last.shift):
            joined[-1] = Move(last.tap, last.many + 1, last.slot, shift)
        else:
            joined.append(Move(tap, 1, slot, shift))
    return Slots(tuple(phase.offset for phase in found), -(-axis.fine // axis.stride), tuple(joined))


def unreached(axis: Axis, of_axis: Slots) -> bool:
    """Whether some fine position belongs to none of the slots."""
    return len(of_axis.offsets) < min(axis.stride, axis.fine)


class Place(NamedTuple):
    """A slot of an axis in a block: which q of it are inside the output, and where they are."""

    slot: int
    q: slice
    fine: slice


def places(axis: Axis, slots: Slots, q: Range) -> Iterator[Place]:
    """Yield the slots of an axis in an interval of q."""
    for slot, offset in enumerate(slots.offsets):
        start = max(q[0], -(offset // axis.stride))
        stop = min(q[1], -((offset - axis.fine) // axis.stride))
        if start < stop:
            first = start * axis.stride + offset
            fine = slice(first, first + (stop - start - 1) * axis.stride + 1, axis.stride)
            yield Place(slot, slice(start - q[0], stop - q[0]), fine)


def met(step: int, end: int, offset: int, first: int, size: int) -> tuple[slice, slice]:
    """Return which of `size` positions of a grid, from `first` on, hold an operand's values, and where those are.

    The grid holds the positions ``i * step + offset`` of the operand's `end`.
    """
    start = min(first + size, max(first, -(offset // step)))
    stop = max(start, min(first + size, -((offset - end) // step)))
    source = slice(max(0, start * step + offset), max(0, stop * step + offset), step)
    return slice(start - first, stop - first), source


def reached(axis: Axis, tap: int, rows: Range) -> tuple[slice, slice]:
    """Return which of some coarse positions a tap carries into the fine array, counted from the first, and to where."""
    shift = tap * axis.dilation - axis.lo
    start = max(rows[0], -(shift // axis.stride))
    stop = max(start, min(rows[1], (axis.fine - 1 - shift) // axis.stride + 1))
    if start == stop:
        return slice(0, 0), slice(0, 0)
    first = start * axis.stride + shift
    return slice(start - rows[0], stop - rows[0]), slice(first, first + (stop - start) * axis.stride, axis.stride)


class Run(NamedTuple):
    """Taps of the free axis that read lines next to each other: their phase, the first line, and which they are."""

    phase: int
    start: int
    taps: tuple[int, ...]


@dataclass(frozen=True)
class Along:
    """An axis as it is read and written."""

    axis: Axis
    of_axis: Slots
    gathers: bool

    @property
    def count(self) -> int:
        """Positions of a slot."""
        return self.axis.coarse if self.gathers else self.of_axis.count

    @cached_property
    def shifts(self) -> Range:
        """The smallest and the largest shift."""
        return self.of_axis.shifts

    @cached_property
    def reach(self) -> int:
        """How many more positions the grid has."""
        return self.of_axis.reach

    @property
    def given(self) -> int:
        """Positions of the operand."""
        return self.axis.fine if self.gathers else self.axis.coarse

    @property
    def step(self) -> int:
        """Positions of the operand from one of a phase of the grid to the next."""
        return self.axis.stride if self.gathers else 1

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the phases of the grid lie in the operand."""
        return self.of_axis.offsets or (0,) if self.gathers else (0,)

    @cached_property
    def taps(self) -> list[list[tuple[int, int, int]]]:
        """Of each slot its taps: the phase of the grid that each reads, from where, and which it is."""
        low, high = self.shifts
        found: list[list[tuple[int, int, int]]] = [[] for _ in ((0,) if self.gathers else self.of_axis.offsets)]
        for move in self.of_axis.moves:
            for i in range(move.many):
                if self.gathers:
                    found[0].append((move.slot + i, move.shift - low, move.tap + i))
                else:
                    found[move.slot + i].append((0, high - move.shift, move.tap + i))
        return [sorted(of_slot) for of_slot in found]

    @cached_property
    def runs(self) -> list[list[Run]]:
        """Of each slot its taps in runs."""
        found = []
        for of_slot in self.taps:
            runs: list[Run] = []
            for phase, start, tap in of_slot:
                last = runs[-1] if runs else None
                if last and (phase, start) == (last.phase, last.start + len(last.taps)):
                    runs[-1] = Run(phase, last.start, (*last.taps, tap))
                else:
                    runs.append(Run(phase, start, (tap,)))
            found.append(runs)
        return found

    def met(self, offset: int, q: int, size: int) -> tuple[slice, slice]:
        """Return which of `size` positions of the grid of a block that begins at q hold values, and where those are."""
        first = q + self.shifts[0] if self.gathers else q - self.shifts[1]
        return met(self.step, self.given, offset, first, size)

    def places(self, q: Range) -> dict[int, tuple[slice, slice]]:
        """Return of each slot in the result which positions of a block are, and where."""
        if self.gathers:
            return {0: (slice(0, q[1] - q[0]), slice(*q))}
        return {place.slot: (place.q, place.fine) for place in places(self.axis, self.of_axis, q)}

    def span(self, q: Range) -> Range:
        """Return what a block covers of the result."""
        return q if self.gathers else self.of_axis.span(self.axis, q)
