"""Products of matrices formed of small ones that BLAS does not pack, many in one step.

GEMM copies both operands to panels before it multiplies, which pays for large ones. OpenBLAS has other kernels for
small products of some processors: they read operands where they are, and are faster than the packed ones while a part
of B stays in cache. Here a product is cut in as many as they take. NumPy forms those of a stack in one call, but does
not add to what is there: where k is cut the parts are added afterwards. For other processors GEMM forms the same
stacks in a call for each (`ByGemm`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gemmconv.blas import Gemm, serial_products, small_products
from gemmconv.lowerings.base import Array, address
from gemmconv.lowerings.boxes import Cut
from gemmconv.problem import Problem

# What schedules say is their largest product if all are formed here: BLAS never uses several threads for small ones.
LARGEST = 1
# Rows of a product, if there can be so many; its columns, and the most that are not cut, in vectors of BLAS' kernels.
_ROWS, _COLUMNS, _UNCUT, _VECTOR = 12, 32, 64, 16
# Columns of tiles, the best first: kernels form 32 at once, and 16 that are left over take two thirds of their time.
_TILES = (64, 32, 48, 16)
# The rows that kernels form at once, of few columns or of more; others take twice as long. A step in products.
_UNIT, _TALL, _WIDE_VECTORS, _STEP = 6, 4, 48, 400_000
# Bytes of B that stay in cache while all rows are multiplied: one with more is cut along k, in lines as they lie, to a
# least depth, and then to columns. Bytes of parts that are formed in one step.
_KEPT, _PANEL, _LEAST = 1 << 19, 1 << 18, 128
_PARTS = 1 << 18
# The most lines of an A whose columns are its lines, which may lie where they push each other out of the caches. Such
# products are added to sums, so parts of k have memory in any case, and k is cut rather than the columns of B.
_MOST_LINES = 1024
# The axes of a matrix in tiles.
_TILES_NDIM = 3
# Products of lines of both operands: OpenBLAS has unpacked ones of up to 1200 results and of 32 values or more. Tiles
# have fewer, as they can be one row and one column longer. Long lines make them small, which many rows do not bear.
_RESULTS, _FEWEST, _WIDE = 1024, 8, 128
_SHORTEST, _LONG, _LONGEST, _MANY = 32, 800, 2048, 128


class Tile(NamedTuple):
    """The sizes m, n and k of small products."""

    rows: int
    columns: int
    depth: int


def unpacked(problem: Problem) -> bool:
    """Whether BLAS is known to form small products of a problem's values without packing."""
    return small_products() > 0 and problem.compute_dtype.kind == "f"


@lru_cache(maxsize=1024)
def tile(m: int, n: int, k: int, item: int, columns: int = 0, *, turned: bool = False) -> Tile:
    """Return the sizes of small products for one of m by n by k of values of `item` bytes.

    B lies in tiles of `columns`, or as a matrix if that is 0. With `turned` the columns of A are its lines.
    """
    most, few = _most(), min(m, _ROWS)
    deepest = min(k, _MOST_LINES) if turned else k
    if not columns:
        if n * k * item > _KEPT:
            deepest = min(deepest, max(_LEAST, _PANEL // (n * item)))
        columns = n if n <= _UNCUT and (turned or few * n * deepest <= most) else min(n, _COLUMNS)
    depth = even_length(k, max(1, min(deepest, most // (few * columns))))
    return Tile(rows_each(m, max(2, most // (columns * depth)), columns, n * depth), columns, depth)


def even_length(size: int, most: int) -> int:
    """Return the length of parts of at most so many; of equal ones, which are formed in one step, if few more do."""
    parts = -(-size // most)
    return -(-size // next((p for p in range(parts, 2 * parts) if size % p == 0), parts))


@lru_cache(maxsize=4096)
def rows_each(m: int, most: int, columns: int, values: int) -> int:
    """Return of how many rows products are to be formed, at most so many, where each row has so many products.

    Rows that are left over in a product, and rows that are left over behind the last one and need a step of their own.
    """
    if m <= most:
        return m
    unit = _TALL if columns > _WIDE_VECTORS else _UNIT

    def rows_s(each: int) -> int:
        left = m % each
        return m + m // each * (each % unit) + left % unit + (_STEP // values if left else 0)

    return min(range(most, most // 2, -1), key=rows_s)


def parts_of(m: int, n: int, k: int, item: int, adds: bool, columns: int = 0, *, turned: bool = False) -> int:
    """Return in how many parts a product is formed that are added; `adds` says that it is added to what is there."""
    parts = -(-k // tile(m, n, k, item, columns, turned=turned).depth)
    return parts if adds or parts > 1 else 0


def parts_values(
    m: int, n: int, k: int, item: int, adds: bool = False, columns: int = 0, *, turned: bool = False
) -> int:
    """Return the values that such parts take, as many as are formed in one step."""
    n = n if columns else min(n, _widest(item))
    return m * n * min(parts_of(m, n, k, item, adds, columns, turned=turned), max(1, _PARTS // (m * n * item)))


def multiply(a: Array, b: Array, out: Array, parts: Array, *, adds: bool = False, turned: bool = False) -> None:
    """Form the product of a [m, k] and b [k, n] in out [m, n], or add it to what is there; m and n are not 1.

    b may lie in tiles, [tile, k, column]. `parts` has `parts_values` of memory. With `turned` a's columns are lines.
    """
    (m, k), n, item = a.shape, out.shape[1], out.itemsize
    widest = n if b.ndim == _TILES_NDIM else _widest(item)
    if n > widest:
        for first, last in Cut(n, widest):
            multiply(a, b[:, first:last], out[:, first:last], parts, adds=adds, turned=turned)
        return
    sizes = tile(m, n, k, item, b.shape[2] if b.ndim == _TILES_NDIM else 0, turned=turned)
    if not adds and sizes.depth >= k:
        _form(a, b, out[np.newaxis], sizes)
        return
    most, whole = len(parts) // (m * n), k // sizes.depth
    spans = [(start, min(whole, start + most)) for start in range(0, whole, most)]
    for start, stop in [*spans, *[(whole, whole + 1)] * (whole * sizes.depth < k)]:
        found = parts[: (stop - start) * m * n].reshape(-1, m, n)
        span = slice(start * sizes.depth, stop * sizes.depth)
        _form(a[:, span], b[..., span, :], found, sizes)
        if not adds:
            np.add.reduce(found, axis=0, out=out)
            adds = True
            continue
        for part in found:
            np.add(out, part, out)


def lines_fit(m: int, n: int, k: int) -> bool:
    """Whether BLAS is known to form a product of m lines and n lines of k values without packing, in small ones."""
    return min(m, n) > 1 and _SHORTEST <= k <= (_LONG if m > _MANY else _LONGEST)


def multiply_lines(a: Array, b: Array, out: Array) -> None:
    """Form the product of each line of a [m, k] with each line of b [n, k] in out [m, n]; m and n are not 1."""
    (m, k), n = a.shape, b.shape[0]
    results = min(_RESULTS, _most() // k)
    most = max(1, min(_WIDE, results // _FEWEST) // _VECTOR)
    columns = _VECTOR * next((c for c in range(most, most // 2, -1) if n % (c * _VECTOR) == 0), most)
    columns = min(n, columns)
    rows = rows_each(m, max(2, results // columns), _UNCUT, n * k)
    for n0, n1, c in alike(n, columns):
        right = b[n0:n1].reshape(c, 1, -1, k).transpose(0, 1, 3, 2)
        for m0, m1, r in alike(m, rows):
            to = out[m0:m1, n0:n1].reshape(r, -1, c, (n1 - n0) // c).transpose(2, 0, 1, 3)
            np.matmul(a[m0:m1].reshape(r, -1, k), right, out=to)


def _widest(item: int) -> int:
    """Return the columns of B beyond which lines of the least depth are cut."""
    return _PANEL // (_LEAST * item)


def _form(a: Array, b: Array, out: Array, sizes: Tile) -> None:
    """Form products of as many parts of k as `out` has, of the same depth."""
    (m, k), n, p = a.shape, out.shape[2], len(out)
    for n0, n1, c in alike(n, sizes.columns):
        if b.ndim == _TILES_NDIM:
            right = b.reshape(c, p, k // p, -1).swapaxes(0, 1)[:, :, np.newaxis]
        else:
            right = b[:, n0:n1].reshape(p, k // p, c, -1).transpose(0, 2, 1, 3)[:, :, np.newaxis]
        for m0, m1, r in alike(m, sizes.rows):
            left = a[m0:m1].reshape(r, -1, p, k // p).transpose(2, 0, 1, 3)[:, np.newaxis]
            to = out[:, m0:m1, n0:n1].reshape(p, r, -1, c, (n1 - n0) // c).transpose(0, 3, 1, 2, 4)
            np.matmul(left, right, out=to)


def tile_columns(cut: Cut, k: int) -> int:
    """Return the columns of the tiles of a matrix whose columns are cut so and that lies [tile, k, column]; or 0."""
    whole = (cut.size,) if len(cut) == 1 and _VECTOR <= cut.size <= _UNCUT else ()
    columns: int
    for columns in (*whole, *_TILES):
        if all(stop % columns == 0 for _, stop in cut) and _ROWS * columns * k <= _most():
            return columns
    return 0


class ByGemm:
    """As `Tiled`, by GEMM: a call for each of a stack, which may add to what is there."""

    __slots__ = ("_a", "_adds", "_gemm", "_out")

    def __init__(self, gemm: Gemm, a: Array, out: Array, *, adds: bool) -> None:
        self._gemm, self._a, self._out, self._adds = gemm, a, out, adds

    def __call__(self, tiles: Array) -> None:
        (*stack, m, k), (many, _, _, n), item = self._a.shape, tiles.shape[-4:], self._a.itemsize
        filters = np.broadcast_to(tiles[..., 0, :, :], (*stack, many, k, n), subok=True)
        lda, ldc = (array.strides[-2] // item if m > 1 else array.shape[-1] for array in (self._a, self._out))
        for at in np.ndindex(*stack):
            a, out = address(self._a[at]), address(self._out[at])
            for i, tile in enumerate(filters[at]):
                self._gemm(m, n, k, a, lda, False, address(tile), n, False, out + i * n * item, ldc, self._adds)


class Tiled:
    """The product of a [m, k] and a matrix [tile, k, column] in out [m, tile * column], of arrays that stay in place.

    Stacks of them, where all have the same axes in front. It is called with the matrix as [..., tile, 1, k, column].
    """

    __slots__ = ("_a", "_out", "_steps")

    def __init__(self, a: Array, columns: int, out: Array) -> None:
        (m, k), (*stack, _, n) = a.shape[-2:], out.shape
        self._a, self._out = a, out
        self._steps: list[tuple[Array, Array]] = []
        if m == 1:
            return
        each = rows_each(m, max(1, _most() // (columns * k)), columns, math.prod(stack) * n * k)
        for start, stop, many in alike(m, each):
            left = a[..., start:stop, :].reshape(*stack, 1, many, -1, k)
            to = out[..., start:stop, :].reshape(*stack, many, -1, n // columns, columns)
            self._steps.append((left, to.swapaxes(-2, -3).swapaxes(-3, -4)))

    def __call__(self, tiles: Array) -> None:
        for left, to in self._steps:
            np.matmul(left, tiles, to)
        if not self._steps:  # a single row, but not as a vector; see `alike`
            rows, twice = (
                np.empty((*array.shape[:-2], 2, array.shape[-1]), array.dtype) for array in (self._a, self._out)
            )
            np.copyto(rows, self._a)
            Tiled(rows, tiles.shape[-1], twice)(tiles)
            np.copyto(self._out, twice[..., :1, :])


def multiply_tiles(a: Array, tiles: Array, out: Array) -> None:
    """Form the product of a [m, k] and a matrix [tile, k, column] in out [m, tile * column], or of stacks of them."""
    Tiled(a, tiles.shape[-1], out)(tiles[..., np.newaxis, :, :])


def multiply_few(a: Array, b: Array, out: Array) -> None:
    """Form the product of a small matrix a [m, k] and b [k, ..., n] in out [m, ..., n]; m and n are not 1."""
    n, kind = b.shape[-1], a.dtype.kind
    most = (_most() if kind == "f" else 0) or serial_products(kind) or n * a.size
    for start, stop, many in alike(n, even_length(n, most // a.size)):
        right, to = (array[..., start:stop].reshape(*array.shape[:-1], many, -1) for array in (b, out))
        np.matmul(a, np.moveaxis(right, 0, -2), out=np.moveaxis(to, 0, -2))


def largest_rows(columns: int, k: int) -> int:
    """Return the most rows of a product with so many columns and this depth, that can be one row longer."""
    return max(2, _most() // (columns * k) - 1)


def _most() -> int:
    """Return the largest product that is cut: some are formed with one row and one column more."""
    return small_products() * 7 // 8


def alike(size: int, each: int) -> Iterator[tuple[int, int, int]]:
    """Yield the start, the stop and the number of intervals of length `each`, and of what is left.

    That is never 1, unless the size or `each` is: NumPy forms products of a vector otherwise, with bits that depend on
    the steps between its values, and BLAS may use several threads. The last interval is one longer instead.
    """
    even = size - size % each
    if size - even == 1 < size:
        even -= each
    for start, stop, many in ((0, even, even // each), (even, size, 1)):
        if start < stop:
            yield start, stop, many
