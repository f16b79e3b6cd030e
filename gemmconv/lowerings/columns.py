"""Columns: the products of rows of the value and rows of the filter, in a buffer, for every order of work of col2im.

GEMM takes both operands as they lie, and packs them. Where BLAS has kernels for small products (products.py) it need
not: they take lines of value and filter as they lie, where that is estimated to be faster; a filter that was turned
before; and one as it lies with rows that are its columns: with channels first they are that already, and very few rows
are turned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from gemmconv.lowerings.base import Array, Operands, Workspace, address, five, must_widen
from gemmconv.lowerings.boxes import Box, Cut, Range
from gemmconv.lowerings.copies import copy, copy_turned, is_far, read_ahead
from gemmconv.lowerings.cost import SPILLED_VALUE_S, few_s, gemm_s, lines_s, read_s, unpacked_s
from gemmconv.lowerings.products import lines_fit, multiply, multiply_lines, multiply_tiles, parts_values, unpacked
from gemmconv.problem import Axis, Problem

# Few rows, their most values, and the least of a filter that is large beside them.
_FEW_ROWS, _SMALL, _LARGE = 24, 1 << 17, 1 << 15
# The fewest rows that are columns of a product: a vector of BLAS' kernels.
_VECTOR = 16
# Bytes of a large filter that are read ahead of their products, to stay in the L2 cache until then; and of rows, of a
# value that no cache holds from the layer before.
_AHEAD, _FAR_VALUE = 1 << 19, 1 << 24


class Piece(NamedTuple):
    """Consecutive rows of the filter, seen as [kd*kh*kw*Cout, Cin], and the first of their columns."""

    first: int
    rows: int
    column: int


class Rows(NamedTuple):
    """A contiguous run of rows in memory: `m` of them, or with channels first `ld` apart from channel to channel."""

    hull: Box
    m: int
    address: int
    ld: int


class Buffers:
    """What columns take of a workspace: the columns, and what is widened, turned or added.

    Columns of up to so many rows and rows of the filter lie [row, tap] or, `tap_major`, [tap, row]. With `gathers` the
    rows of any box are copied to `rows`, one beside the other, with channels last whatever the layout.
    """

    def __init__(
        self,
        problem: Problem,
        workspace: Workspace,
        rows: int,
        taps: int,
        depth: int,
        *,
        tap_major: bool,
        widens: bool,
        turned: int = 0,
        gathers: bool = False,
    ) -> None:
        self.problem, self.depth, self.widens, self.turned = problem, depth, widens, turned
        self.gathers = gathers
        self.tap_major = tap_major
        self.gemm, self.hold = workspace.gemm, workspace.hold
        self.columns, self.rows, self.taps, self.turned_rows, self.across, self.parts = map(
            workspace.take, columns_values(problem, rows, taps, depth, widens, turned, gathers)
        )
        # Asking an array for its address costs about as much as a small addition.
        self.columns_at, self.rows_at, self.taps_at = map(address, (self.columns, self.rows, self.taps))
        self.channels_first = problem.layout == "NCDHW" and not gathers
        self.few = few_rows(problem) and not turned
        self.lines = by_lines(problem, rows, taps, tap_major, gathers)
        self.unpacked = self.channels_first and tap_major and not widens and not turned and unpacked(problem)


class Columns:
    """Forms columns of the operands of one call, in `buffer`.

    Operands in the dtype of the sums are used as they lie. Others are widened, `depth` channels at a time, into arrays
    of the workspace that hold `rows` and `taps`, never as a whole. With `turned` the packed filter is used, in tiles
    of so many columns, as `turn` makes them.
    """

    def __init__(self, buffers: Buffers, axes: Sequence[Axis], operands: Operands) -> None:
        self._buffers, self.buffer = buffers, buffers.columns
        self._axes, self._operands = axes, operands
        self._cin, self._pitch = buffers.problem.cin, buffers.problem.pitch
        self._steps = operands.steps[0]
        self._gemm = buffers.gemm
        self._value_at, self._filter_at = address(operands.value), address(operands.filter)

    # GEMM needs addresses only.

    @cached_property
    def _filter(self) -> Array:
        return self._operands.filter.reshape(-1, self._cin)

    @cached_property
    def _grid(self) -> Array:
        problem, sizes = self._buffers.problem, [axis.coarse for axis in self._axes]
        return five(problem.layout, self._operands.value, problem.batch, sizes, problem.cin)

    @cached_property
    def _tiles(self) -> Array:
        return self._operands.packed.reshape(-1, self._cin, self._buffers.turned)

    def locate(self, hull: Box) -> Rows:
        """Return where a hull's rows are, or gathered ones until the next call, for any number of calls of `form`."""
        if self._buffers.gathers:
            return self._gather(hull)
        (b, _), (d, _), (h, _), (w, _) = hull
        of_b, of_d, of_h, of_w, of_c = self._steps
        offset = b * of_b + d * of_d + h * of_h + w * of_w
        ld = of_c if self._buffers.channels_first else of_w
        return Rows(hull, math.prod(hull.sizes), self._value_at + offset * self._gemm.itemsize, ld)

    def _gather(self, box: Box) -> Rows:
        """Copy the rows of a box, unless they are what is held already, and return where they are."""
        self._buffers.hold("rows", box, lambda: copy(self._rows_of(box), self._grid[tuple(slice(*r) for r in box)]))
        return Rows(box, math.prod(box.sizes), self._buffers.rows_at, self._cin)

    def form(self, rows: Rows, pieces: Sequence[Piece], ld: int) -> None:
        """Form the columns of rows and of pieces of the filter, with `ld` values from line to line."""
        cin, m, buffers = self._cin, rows.m, self._buffers
        if buffers.turned:
            value, to, n = self._flat(rows), self.buffer[: m * ld].reshape(m, ld), self._tiles.shape[2]
            for piece in pieces:
                tiles = self._tiles[piece.first // n : (piece.first + piece.rows) // n]
                multiply_tiles(value, tiles, to[:, piece.column : piece.column + piece.rows])
            return
        if not buffers.widens:
            for piece in pieces:
                if buffers.few and _large(m, piece.rows, cin):
                    self._form_across(self._as_columns(rows), piece, ld)
                elif buffers.lines and min(m, piece.rows) > 1:
                    self._form_lines(rows, piece, ld)
                elif buffers.unpacked and m >= _VECTOR and piece.rows > 1:
                    self._form_across(self._flat(rows).T, piece, ld)
                else:
                    at = self._filter_at + piece.first * self._pitch * self._gemm.itemsize
                    self._multiply(m, cin, rows.address, rows.ld, piece, at, self._pitch, ld, False)
            return
        for start in range(0, cin, buffers.depth):
            self._widen(rows.hull, start)
            k = min(buffers.depth, cin - start)
            for piece in pieces:
                part = self._filter[piece.first : piece.first + piece.rows, start : start + k]
                np.copyto(buffers.taps[: part.size].reshape(part.shape), part, casting="unsafe")
                ld_rows = m if buffers.channels_first else k
                self._multiply(m, k, buffers.rows_at, ld_rows, piece, buffers.taps_at, k, ld, start > 0)

    def _multiply(
        self, m: int, k: int, rows: int, ld_rows: int, piece: Piece, taps: int, ld_taps: int,
        ld: int, accumulate: bool,
    ) -> None:  # fmt: skip
        gemm, channels_first = self._gemm, self._buffers.channels_first
        if self._buffers.tap_major:
            to = self._buffers.columns_at + piece.column * ld * gemm.itemsize
            gemm(piece.rows, m, k, taps, ld_taps, False, rows, ld_rows, not channels_first, to, ld, accumulate)
        else:
            to = self._buffers.columns_at + piece.column * gemm.itemsize
            gemm(m, piece.rows, k, rows, ld_rows, channels_first, taps, ld_taps, True, to, ld, accumulate)

    def _form_lines(self, rows: Rows, piece: Piece, ld: int) -> None:
        """Form the columns of rows and of a piece of the filter, both as they lie, without packing."""
        value, (first, n, column), far = self._flat(rows), piece, is_far(self._operands.filter)
        ahead = max(_VECTOR, _AHEAD // (self._cin * value.itemsize))
        if self._buffers.tap_major and not far and self._operands.value.nbytes >= _FAR_VALUE:
            taps, to = self._filter[first : first + n], self.buffer[column * ld : (column + n) * ld].reshape(n, ld)
            for start, stop in Cut(rows.m, ahead):
                read_ahead(value[start:stop])
                multiply_lines(taps, value[start:stop], to[:, start:stop])
            return
        for start, stop in Cut(n, ahead if far else n):
            taps, begin, end = self._filter[first + start : first + stop], column + start, column + stop
            if far:
                read_ahead(taps)
            if self._buffers.tap_major:
                multiply_lines(taps, value, self.buffer[begin * ld : end * ld].reshape(-1, ld)[:, : rows.m])
            else:
                multiply_lines(value, taps, self.buffer[: rows.m * ld].reshape(-1, ld)[:, begin:end])

    def _form_across(self, value: Array, piece: Piece, ld: int) -> None:
        """Form the columns of a piece of the filter as it lies and of rows [cin, row], without packing."""
        m, n = value.shape[1], piece.rows
        taps = self._filter[piece.first : piece.first + n]
        if self._buffers.tap_major:
            to = self.buffer[piece.column * ld : (piece.column + n) * ld].reshape(n, ld)[:, :m]
        else:
            to = self._buffers.across[: n * m].reshape(n, m)
        multiply(taps, value, to, self._buffers.parts)
        if not self._buffers.tap_major:
            np.copyto(self.buffer[: m * ld].reshape(m, ld)[:, piece.column : piece.column + n], to.T)

    def _flat(self, rows: Rows) -> Array:
        """Return the rows of a hull as they lie, or gathered ones, [row, cin]."""
        if self._buffers.gathers:
            return self._rows_of(rows.hull).reshape(rows.m, self._cin)
        return self._grid[tuple(slice(*r) for r in rows.hull)].reshape(rows.m, self._cin)

    def _rows_of(self, box: Box) -> Array:
        """Return where the rows of a box are gathered."""
        values = self._buffers.rows[: math.prod(box.sizes) * self._cin]
        return values.reshape(*box.sizes, self._cin)

    def _as_columns(self, rows: Rows) -> Array:
        """Return the rows of a hull turned to columns, unless they are what is held already."""
        turned = self._buffers.turned_rows[: self._cin * rows.m].reshape(self._cin, rows.m)
        self._buffers.hold("turned", rows.hull, lambda: copy_turned(turned, self._flat(rows)))
        return turned

    def _widen(self, hull: Box, start: int) -> None:
        """Widen the rows of a hull, unless they are what is held already; the layout stays."""

        def fill() -> None:
            part = self._grid[(*(slice(*r) for r in hull), slice(start, min(start + self._buffers.depth, self._cin)))]
            to = self._buffers.rows[: part.size]
            to = five(self._buffers.problem.layout, to, part.shape[0], part.shape[1:4], part.shape[4])
            np.copyto(to, part, casting="unsafe")

        self._buffers.hold("rows", (hull, start), fill)


def few_rows(problem: Problem) -> bool:
    """Whether a value has so few rows that they are turned to be columns of products with a large filter."""
    rows = problem.batch * math.prod(problem.coarse)
    return (
        rows <= _FEW_ROWS
        and rows * problem.cin <= _SMALL
        and problem.layout == "NDHWC"
        and unpacked(problem)
        and not must_widen(problem)
        and math.prod(problem.filter_shape) >= _LARGE
    )


def never_packed(problem: Problem, rows: Range, taps: Range, tap_major: bool, gathers: bool = False) -> bool:
    """Whether columns of such numbers of rows, and of rows of the filter, are all formed without packing."""
    few = few_rows(problem) and _large(rows[0], taps[0], problem.cin)
    return few or (min(rows[0], taps[0]) > 1 and by_lines(problem, rows[1], taps[1], tap_major, gathers))


def by_lines(problem: Problem, rows: int, taps: int, tap_major: bool, gathers: bool = False) -> bool:
    """Whether columns of so many rows, and of rows of the filter, are formed of lines sooner than by GEMM."""
    known = (problem.layout == "NDHWC" or gathers) and unpacked(problem) and not must_widen(problem)
    return known and _sooner_by_lines(rows, taps, problem.cin, tap_major, gathers)


@lru_cache(maxsize=4096)
def _sooner_by_lines(m: int, n: int, k: int, tap_major: bool, aligned: bool) -> bool:
    return lines_fit(m, n, k) and lines_s(m, n, k, aligned=aligned) < gemm_s(m, n, k, tap_major=tap_major)


def _large(rows: int, channels: int, cin: int) -> bool:
    """Whether a piece of the filter is large enough for rows to be turned, and nothing is a vector."""
    return min(rows, channels) > 1 and channels * cin >= _LARGE


def turn(filter: Array, packed: Array, columns: int, part: int, parts: int) -> None:
    """Turn part of a filter to tiles of so many of its rows, [tile, cin, row]."""
    cin = filter.shape[-1]
    tiles = filter.size // (columns * cin)
    mine = slice(tiles * part // parts, tiles * (part + 1) // parts)
    copy_turned(packed.reshape(-1, cin, columns)[mine], filter.reshape(-1, columns, cin)[mine])


def columns_values(
    problem: Problem, rows: int, taps: int, depth: int, widens: bool, turned: int = 0, gathers: bool = False
) -> list[int]:
    """Return the values that `Buffers` takes of a workspace, one array after the other."""
    cin, item, columns = problem.cin, problem.compute_dtype.itemsize, rows * taps
    if widens:
        return [columns, rows * depth, taps * depth, 0, 0, 0]
    if turned:
        return [columns, rows * cin * gathers, *[0] * 4]
    if few_rows(problem):
        return [columns, rows * cin * gathers, 0, rows * cin, columns, parts_values(taps, rows, cin, item)]
    by_columns = problem.layout == "NCDHW" and unpacked(problem) and not gathers
    return [columns, rows * cin * gathers, 0, 0, 0, parts_values(taps, rows, cin, item) if by_columns else 0]


def formed_s(
    problem: Problem,
    m: float,
    n: float,
    *,
    tap_major: bool,
    turned: int = 0,
    spilled: bool = False,
    gathers: bool = False,
) -> float:
    """Return the time to form the columns of m rows and n rows of the filter; `spilled` says that they leave cache."""
    written = m * n * SPILLED_VALUE_S if spilled else 0.0
    read = read_s(n * problem.cin, math.prod(problem.filter_shape) // problem.groups)
    if turned:
        return unpacked_s(m, n, problem.cin) + read + written
    if few_rows(problem) and m > 1:
        return few_s(m, n, problem.cin) + written
    if problem.layout == "NCDHW" and tap_major and m >= _VECTOR and unpacked(problem) and not must_widen(problem):
        return unpacked_s(n, m, problem.cin, apart=math.prod(problem.coarse)) + read + written
    if by_lines(problem, round(m), round(n), tap_major, gathers):
        return lines_s(m, n, problem.cin, aligned=gathers) + written
    return gemm_s(m, n, problem.cin, tap_major=tap_major) + written
