"""Minimal filtering: what both of its schedules share.

Four axes are done, the last two of them filtered; batch entries are one of them. Arrays lie [point, point, u, v, place,
place, channel], where places are those of tiles; cells, of which rows are combined, have even and odd places of a
filtered axis first in place of points.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, product
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gemmconv.blas import Gemm
from gemmconv.lowerings.base import (
    Array,
    CannotLowerError,
    Operands,
    Schedule,
    Usual,
    Workspace,
    aligned,
    canonical,
    five,
)
from gemmconv.lowerings.boxes import Cut, Index, Range, located
from gemmconv.lowerings.copies import as_items, copy_turned, item_size, need_finite, store
from gemmconv.lowerings.cost import gemm_s, pass_s, read_s, step_s, total_s, unpacked_s
from gemmconv.lowerings.minimal import RESULTS, Line, sums_matrix, taps_matrix
from gemmconv.lowerings.products import LARGEST, ByGemm, Tiled, multiply_few, tile_columns, unpacked
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Positions of a block and cuts of the output channels and the last axis that are weighed; channels are not cut below
# _WIDE.
_POSITIONS = (256, 512, 1024, 2048, 4096)
_PARTS = (1, 2, 4, 8)
_PIECES = (1, 2)
_WIDE = 64
# The most workspace of a worker, in L2 caches: few large steps are faster than all in cache. The most bytes of a packed
# filter: with many channels and few rows combining taps costs more than products.
_MOST_WORKSPACE = 12
_MOST_PACKED = 32 << 20
# Bytes of a filter that are packed together: large steps are faster than small ones in cache.
_PACKED_TOGETHER = 1 << 22

# For each filtered axis the order [which, place, ...] of arrays [which, which, u, v, place, place, channel].
_FIRST = (0, 4, 1, 2, 3, 5, 6), (1, 5, 0, 2, 3, 4, 6)


class Block(NamedTuple):
    """A box of the result: q of two axes, tiles of two more, channels."""

    u: Range
    v: Range
    a: Range
    b: Range
    channels: Range


class Tiling(Usual, ABC):
    """What both schedules have in common."""

    __slots__ = ()

    problem: Problem
    along: tuple[int, ...]  # the filtered axes
    axes: tuple[Axis, Axis, Axis, Axis]
    cuts: tuple[Cut, Cut, Cut, Cut, Cut]  # of q, of tiles and of the channels
    columns: int  # of the filter's tiles for small products, 0 if GEMM forms them

    @property
    def tiles(self) -> tuple[int, int]:
        """How many tiles the filter has, and their columns; of GEMM's one for the channels of a block."""
        columns = self.columns or self.cuts[4].longest
        return self.cuts[4].size // columns, columns

    def tiles_of(self, channels: Range) -> slice:
        """Return the tiles of a block's channels."""
        _, columns = self.tiles
        return slice(channels[0] // columns, channels[1] // columns)

    @property
    @abstractmethod
    def units(self) -> tuple[int, int, int, int]:
        """By how many positions blocks are cut."""

    @property
    def largest_product(self) -> int:
        if self.columns:
            return LARGEST
        return self._rows * self.cuts[4].longest * max(shape[-2] for shape in self.packed_shapes)

    def described(self, how: str, *, small: bool) -> str:
        """Return what was decided: how it filters, and if by small products."""
        names = " and ".join(("depth", "height", "width")[i - 1] for i in self.along)
        rows, channels = self._rows * self._results, self.cuts[4]
        text = f"small products of up to {rows} rows together" if small else f"GEMMs of up to {self._rows} rows"
        cut = f", {channels.longest} of {channels.size} channels" if len(channels) > 1 else ""
        return f"{how} along {names}, {text}{cut}"

    @property
    def _rows(self) -> int:
        """The most rows of a point."""
        q = [cut.longest * unit for cut, unit in zip(self.cuts, self.units, strict=False)]
        return int(math.prod(q) // self._results)

    @property
    def _results(self) -> int:
        """How many results a tile has, for each distance between rows."""
        return 1 << len(self.along)

    def _products_s(self, taps: int, added: int, points: int, filters: int, rows: float, lines: float, k: int) -> float:
        """Return the time of the products of so many taps, some of which are added to sums: of all points, m by n by k.

        `rows` are those of a point, in so many lines with others between them, and so many filters are read.
        """
        n = self.cuts[4].size / len(self.cuts[4])
        if not self.columns:
            return taps * points * lines * gemm_s(rows / lines, n, k)
        each = unpacked_s(points * rows, n, k) + read_s(filters * n * k, self.packed_values) + step_s(short=True)
        return taps * each + added * (pass_s(points * rows * n, points * rows * n) + step_s(short=True))

    @property
    def count(self) -> int:
        return math.prod(map(len, self.cuts))

    @property
    def order(self) -> tuple[int, ...]:
        """The axes in the order in which they lie: 0 for batch entries, 1 to 3 for depth, height and width."""
        return order_of(self.along)

    def block(self, index: int) -> Block:
        """Return a block; those of the same rows follow each other."""
        _, spans = located(index, self.cuts)
        return Block(*spans)

    @property
    @abstractmethod
    def workspace_bytes(self) -> int:
        """What one worker needs."""

    @abstractmethod
    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""

    @property
    @abstractmethod
    def packed_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the parts of the packed filter, one after the other."""

    @cached_property
    def packed_values(self) -> int:
        return sum(map(math.prod, self.packed_shapes))

    def _packed(self, packed: Array) -> list[Array]:
        """Return the parts of the packed filter."""
        shapes = self.packed_shapes
        ends = accumulate(map(math.prod, shapes))
        return [packed[end - math.prod(shape) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)]

    def pack(self, filter: Array, packed: Array) -> None:
        """Pack the whole filter."""
        self.pack_part(filter, packed, 0, 1, Workspace(self._packing_bytes, self.problem.compute_dtype))

    @abstractmethod
    def pack_part(self, filter: Array, packed: Array, part: int, parts: int, workspace: Workspace) -> None:
        """Pack one of so many parts of the filter."""

    @property
    def _filter_bytes(self) -> int:
        return math.prod(self.problem.filter_shape) * self.problem.compute_dtype.itemsize

    @property
    @abstractmethod
    def _packed_apart(self) -> tuple[int, int]:
        """Rows of the filter, and taps, that can be packed one by one."""

    @property
    def _packing_bytes(self) -> int:
        """What a workspace holds of the filter as taps are combined: the largest of its pieces."""
        least = self._filter_bytes // math.prod(self._packed_apart)
        return aligned(min(self._filter_bytes, max(least, _PACKED_TOGETHER)))

    def pieces(self, part: int, parts: int) -> Iterator[tuple[slice, slice]]:
        """Yield rows and taps of one of so many parts of the filter, in pieces that are packed in cache.

        Taps are cut before rows are, which lie together. Packing kernels of BLAS round otherwise at the end of a piece,
        which may not depend on the workers: there the first part is all.
        """
        rows, taps = self._packed_apart
        share = Cut(rows, -(-rows // parts) if self.columns else rows)
        each = self._filter_bytes // (rows * taps)
        if part >= len(share):
            return
        first, last = share[part]
        for start, stop in Cut(last - first, max(1, _PACKED_TOGETHER // each)):
            for p, q in Cut(taps, max(1, _PACKED_TOGETHER // (each * (stop - start)))):
                yield slice(first + start, first + stop), slice(p, q)

    def _in_order(self, operands: Operands) -> tuple[Array, Array]:
        """Return the first operand and the result with axes in order."""
        problem, axes = self.problem, canonical(self.problem.axes)
        coarse, fine = [axis.coarse for axis in axes], [axis.fine for axis in axes]
        wholes = [(coarse, problem.cin), (fine, problem.cout)]
        if problem.operation != "conv3d_transpose":
            wholes.reverse()
        arrays = zip((operands.value, operands.output), wholes, strict=True)
        value, output = (five(problem.layout, array, problem.batch, *whole) for array, whole in arrays)
        return value.transpose(*self.order, 4), output.transpose(*self.order, 4)


T = TypeVar("T", bound=Schedule)


def fastest(found: Sequence[T], problem: Problem, machine: Machine, rule: str, other: str) -> T:
    """Choose by cost, or raise CannotLowerError if nothing fits: `rule` says what taps must be, `other` what can."""
    text = f"{problem.operation}: algorithm='winograd' cannot do this problem:"
    if not found:
        kernel, strides, dilations = (
            "x".join(str(getattr(axis, name)) for axis in problem.axes) for name in ("kernel", "stride", "dilation")
        )
        raise CannotLowerError(
            f"{text} {rule}, got kernel {kernel}, strides {strides}, dilations {dilations}; '{other}' and 'auto' can"
        )

    def within(what: str, most: int, sizes: Sequence[int]) -> list[T]:
        if min(sizes) > most:
            raise CannotLowerError(f"{text} its {what} {min(sizes)} bytes, more than {most}; '{other}' and 'auto' can")
        return [s for s, size in zip(found, sizes, strict=True) if size <= most]

    item = problem.compute_dtype.itemsize
    found = within("packed filter takes", _MOST_PACKED, [s.packed_values * item for s in found])
    found = within("blocks take", _MOST_WORKSPACE * machine.l2_bytes, [s.workspace_bytes for s in found])
    return min(found, key=lambda s: total_s(s, machine))


def channel_cuts(problem: Problem, channels: int, k: int) -> list[tuple[Cut, int]]:
    """Return cuts of the result's channels, each with the columns of tiles for small products; 0 if GEMM forms them."""
    found = []
    for cut in (Cut(channels, -(-channels // n)) for n in _PARTS if n == 1 or channels >= n * _WIDE):
        columns = tile_columns(cut, k) if unpacked(problem) else 0
        if columns or channels % cut.longest == 0:
            found.append((cut, columns))
    return found


class Product:
    """The product of the rows of all points and a tap's filter, in sums or added to what is there.

    Both lie [point, point, u, v, place, place, channel], lines along u and v may be cut. Where BLAS does not pack small
    products those of all points are formed in one step, in `memory` if they are to be added.
    """

    __slots__ = ("_added", "_multiply", "_sums")

    def __init__(self, gemm: Gemm | None, rows: Array, sums: Array, columns: int, memory: Array, *, adds: bool) -> None:
        self._sums, self._added = sums, None
        written = () if adds and gemm is None else (sums,)
        # Where no line is cut the rows of all follow each other.
        lines = 1 if all(map(is_whole, (rows, *written))) else rows.shape[2]
        left, *to = (array.reshape(*array.shape[:2], lines, -1, array.shape[-1]) for array in (rows, *written))
        if gemm is not None:
            self._multiply: Tiled | ByGemm = ByGemm(gemm, left, *to, adds=adds)
            return
        if adds:
            to = [memory[: sums.size].reshape(*left.shape[:-1], sums.shape[-1])]
            self._added = to[0].reshape(sums.shape)
        self._multiply = Tiled(left, columns, *to)

    def __call__(self, tiles: Array) -> None:
        self._multiply(tiles)
        if self._added is not None:
            np.add(self._sums, self._added, self._sums)


def is_whole(array: Array) -> bool:
    """Whether the lines [u, v] of an array follow each other."""
    return bool(array.shape[2] == 1 or array.strides[2] == array.shape[3] * array.strides[3])


class Output:
    """The channels of the result that a block writes, short runs of them as items."""

    __slots__ = ("_items", "_size", "array")

    def __init__(self, problem: Problem, output: Array, channels: Range) -> None:
        self.array = output[..., slice(*channels)]
        self._size = item_size(problem, channels[1] - channels[0])
        self._items = as_items(self.array, self._size) if self._size else self.array

    def write(self, places: Sequence[Index], results: Sequence[Array]) -> None:
        """Store results, which were seen as items before where channels are."""
        for place, found in zip(places, results, strict=True):
            if self._size:
                np.copyto(self._items[place], found)
            else:
                store(self._items[place], found)


def seen(problem: Problem, array: Array) -> Array:
    """Return values of sums or cells as items where the channels of operands and results are copied as such."""
    size = item_size(problem, array.shape[-1])
    return as_items(array, size) if size else array


# Rows of the tiles, and those of the points they are combined to.
Rows = tuple[list[Array], list[Array]]


class Combining:
    """The sums of points [point, point, u, v, ...] and what is added to all results, which a call combines to those.

    They lie in memory one after the other, so that it is a single product with a few rows. What is added is zero at
    least, for its sign, since products that underflow give -0.0. Results that are not finite are left to another
    lowering.
    """

    __slots__ = ("_combines", "_found", "_matrix", "_start", "_sums", "results")

    def __init__(self, memory: Array, shape: tuple[int, ...], lines: tuple[Line, Line], to: Array) -> None:
        first, second = lines
        self._matrix = sums_matrix(first, second, memory.dtype)
        (results, k), n = self._matrix.shape, math.prod(shape)
        self._sums, self._found = memory[: k * n].reshape(k, n), to[: results * n].reshape(results, n)
        self._combines = k > results + 1
        found = self._found if self._combines else self._sums[:-1]
        self.results = found.reshape(first.results, second.results, *shape)
        self._start = self._sums[-1].reshape(shape)

    def __call__(self, start: Array | int) -> None:
        if self._combines:
            self._start[...] = start
            multiply_few(self._matrix, self._sums, self._found)
        else:
            np.add(self.results, start, self.results)
        need_finite(self.results)


def sums_memory(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Return the shape of memory for sums [point, point, ...] and what is added to all results."""
    return shape[0] * shape[1] + 1, *shape[2:]


def combining_s(first: Line, second: Line, sums: float) -> float:
    """Return the time to combine sums, so many of each point: each is read once, each result is written."""
    touched = first.points * second.points + 2 + first.results * second.results
    return pass_s(touched * sums / 2, sums)


# A run of places that are evenly apart: of the cells or results of an axis, the places, and the rows or fine positions.
Strand = tuple[int, slice, slice]


def combined(
    rows: Array, lines: Sequence[Line], line: Line, axis: int, n: int, memory: Array
) -> tuple[Array, list[Rows]]:
    """Return where rows of a line's points lie along one of the filtered axes, and what is combined to them.

    Rows are [which, which, u, v, place, place, channel], and those of points [point, ...] along that axis. Those of a
    single point are what they are combined of.
    """
    if line.results == 1:
        return rows, []
    shape = [*rows.shape]
    shape[axis], shape[4 + axis] = line.points, n
    found = memory[: math.prod(shape)].reshape(shape)
    source, to = (x.transpose(_FIRST[axis]) for x in (rows, found))
    takes = (divmod(behind(lines, line) + i, line.results) for i in range(line.points))
    return found, [([source[which][tile * line.apart :][:n] for tile, which in takes], [*to])]


def pack_lines(lines: Sequence[Line], phases: Sequence[Array], to: Array, workspace: Workspace, *, turns: bool) -> None:
    """Combine the taps of two lines to their points' filters, for phases that have as many.

    Each phase is [tap, tap, line's tap, line's tap, tile, row, column], `to` is [point, point, tap, tap, tile, phase,
    row, column]. With `turns` columns of a phase are its rows.
    """
    first, second = lines
    matrix = taps_matrix(first, second, to.dtype)
    # Taps that are combined one after the other; a single one is there already.
    shape = (len(first.taps), len(second.taps), *to.shape[2:])
    held = to if matrix.size == 1 else workspace.take(*shape)
    for number, taps in enumerate(phases):
        mine = held[..., number, :, :].transpose(2, 3, 0, 1, 4, 5, 6)
        if turns:
            copy_turned(mine, taps)
        else:
            np.copyto(mine, taps, casting="unsafe")
    if matrix.size > 1:
        *axes, number, row, column = to.shape[2:]
        whole = to.strides[5] == row * to.strides[6]
        axes += [number * row * column] if whole else [number, row * column]
        multiply_few(matrix, held.reshape(-1, *axes), to.reshape(len(matrix), *axes))


def beyond(lines: Iterable[Line]) -> int:
    """Return how many rows cells may have that no result needs: the rest of a last tile, and of a last pair of rows."""
    return max((RESULTS + 1) * line.apart - 1 for line in lines)


def tile_size(line: Line) -> int:
    """Return how many q a tile has."""
    return line.results * line.apart


def behind(lines: Sequence[Line], line: Line) -> int:
    """Return how many places the first row of a line is behind that of all, along the axis and `apart`."""
    return (line.first - min(other.first for other in lines)) // line.apart


def length_of(of: slice) -> int:
    return len(range(of.start, of.stop, of.step))


def strands(line: Line, first: int, limit: int, tiles: int) -> Iterator[tuple[int, slice, range]]:
    """Yield which result or cells, the places and the positions of those of a line from `first` on that are in a limit.

    Positions are [0, limit).
    """
    step = tile_size(line)
    for which, place in product(range(line.results), range(line.apart)):
        at = first + which * line.apart + place
        start, stop = max(0, -(at // step)), min(tiles, -((at - limit) // step))
        if start < stop:
            places = slice(start * line.apart + place, (stop - 1) * line.apart + place + 1, line.apart)
            yield which, places, range(at + start * step, at + stop * step, step)


def order_of(along: tuple[int, ...]) -> tuple[int, ...]:
    """Return the order of axes: those that are not filtered before those that are, batch entries second or last."""
    others = tuple(i for i in (1, 2, 3) if i not in along)
    return (*others, *along, 0) if len(along) == 1 else (*others, 0, *along)


def cuts_of(positions: Sequence[int], units: Sequence[int]) -> Iterator[tuple[Cut, Cut, Cut, Cut]]:
    """Yield cuts of boxes of many sizes, along tiles first or along the axes that are not filtered.

    `positions` says how many there are on each axis, `units` how many are in a tile.
    """
    counts = [-(-size // unit) for size, unit in zip(positions, units, strict=True)]
    seen = set()
    for along, pieces, most in product(((0, 1, 3, 2), (3, 2, 1, 0)), _PIECES, _POSITIONS):
        left, chunks = most, [1] * 4
        for i in along:
            whole = -(-counts[i] // pieces) if i == 3 else counts[i]
            chunks[i] = min(whole, max(1, left // units[i]))
            left //= chunks[i] * units[i]
        u, v, a, b = (Cut(count, chunk) for count, chunk in zip(counts, chunks, strict=True))
        if (u, v, a, b) not in seen:
            seen.add((u, v, a, b))
            yield u, v, a, b
