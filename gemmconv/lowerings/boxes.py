"""Boxes of arrays, intervals of their axes, and how both are cut: the arithmetic of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Range = tuple[int, int]
Index = tuple[Any, ...]
# What a block writes of the result, on some of its axes: batch, depth, height, width and channels, as 0 to 4.
Bounds = tuple[tuple[int, Range], ...]


def digit(axis: int, spans: Iterable[Range]) -> list[Bounds]:
    """Return the digit of blocks that write these intervals along an axis of the result."""
    return [((axis, span),) for span in spans]


def each(size: int) -> list[Range]:
    """Return the intervals of single positions."""
    return [(i, i + 1) for i in range(size)]


def evenly(taps: Sequence[int]) -> slice:
    """Return a slice of taps that are evenly apart, up or down."""
    step = taps[1] - taps[0] if len(taps) > 1 else 1
    stop = taps[-1] + (1 if step > 0 else -1)
    return slice(taps[0], stop if stop >= 0 else None, step)


class Box(NamedTuple):
    """Rows of the value: ranges of batch entries and of coarse positions in depth, height and width."""

    batch: Range
    depth: Range
    height: Range
    width: Range

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        b, d, h, w = self
        return b[1] - b[0], d[1] - d[0], h[1] - h[0], w[1] - w[0]

    def hull(self, whole: tuple[int, int, int, int]) -> Box:
        """Return the smallest contiguous run of rows that holds this box, in a grid of rows of the sizes `whole`.

        Inside the first direction in which the box is longer than one, a run holds whole rows and planes.
        """
        found = []
        inner = False
        for (start, stop), size in zip(self, whole, strict=True):
            found.append((0, size) if inner else (start, stop))
            inner = inner or stop - start > 1
        return Box(*found)

    def within(self, hull: Box) -> tuple[slice, slice, slice, slice]:
        """Return where this box lies in an array of the hull's sizes."""
        b, d, h, w = (slice(mine[0] - its[0], mine[1] - its[0]) for mine, its in zip(self, hull, strict=True))
        return b, d, h, w


class Cut(Sequence[Range]):
    """[0, size) cut into as few ranges of at most `chunk` as can be, as even as can be, made as they are asked for."""

    __slots__ = ("parts", "size")

    def __init__(self, size: int, chunk: int) -> None:
        self.size, self.parts = size, max(1, -(-size // max(1, chunk)))

    def __len__(self) -> int:
        return self.parts

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.parts:
            raise IndexError(f"range {index} of {self.parts}")
        return self.size * index // self.parts, self.size * (index + 1) // self.parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cut) and (self.size, self.parts) == (other.size, other.parts)

    def __hash__(self) -> int:
        return hash((self.size, self.parts))

    def __repr__(self) -> str:
        return f"Cut({self.size} in {self.parts})"

    def around(self, position: int) -> Range:
        """Return the range that holds a position."""
        found: Range = self[((position + 1) * self.parts - 1) // self.size]
        return found

    @property
    def longest(self) -> int:
        """The length of the longest range."""
        return -(-self.size // self.parts)

    @property
    def shortest(self) -> int:
        """The length of the shortest range."""
        return self.size // self.parts


def located(index: int, cuts: Sequence[Cut]) -> tuple[int, list[Range]]:
    """Return the ranges that the last digits of a block's index stand for, and the digits before them."""
    found: list[Range] = []
    for cut in reversed(cuts):
        index, at = divmod(index, len(cut))
        found.insert(0, cut[at])
    return index, found
