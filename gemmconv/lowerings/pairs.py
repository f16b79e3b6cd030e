"""Pairs of neighbouring results: minimal filtering of a convolution along axes of any stride and dilation.

Two neighbouring sums y0, y1 of a convolution with taps g0, g1 (, g2) take 3 or 4 products where there are 4 or 6. With
x0, x1, ... the fine values that they need, and the points 1, -1, 0 and infinity,

    2 taps: z = x1*(g1-g0), (x0+x1)*g0, (x1+x2)*g1;                                            y = z0+z1, z2-z0
    3 taps: z = (x1+x2)*(g0+g1+g2)/2, (x2-x1)*(g0-g1+g2)/2, (x0-x2)*g0, (x3-x1)*g2;            y = z0+z1+z2, z0-z1+z3

so that y0 depends on none but x0 and x1 (and x2), and y1 on none but x1 and x2 (and x3), even where sums cancel. With a
stride the taps of each residue of the fine positions are such a filter, and all residues add to the same two sums.
Longer filters are cut in pieces of two and three taps. An axis on which no two taps meet in a cell is not in pairs.

Source: S. Winograd, Arithmetic Complexity of Computations, SIAM 1980; for convolutional networks A. Lavin and S. Gray,
arXiv:1509.09308.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from gemmconv.lowerings.base import Array
from gemmconv.problem import Axis

# Points, and their signs in y0 and y1. A piece of fewer taps has the last of them.
ONE, MINUS, ZERO, INFINITY = range(4)
SIGNS = {ONE: (1, 1), MINUS: (1, -1), ZERO: (1, 0), INFINITY: (0, 1)}
# By the number of taps: which of x0, x1, ... each point takes, and with what sign.
TAKES: dict[int, dict[int, tuple[tuple[int, int], ...]]] = {
    1: {ZERO: ((0, 1),), INFINITY: ((1, 1),)},
    2: {MINUS: ((1, 1),), ZERO: ((0, 1), (1, 1)), INFINITY: ((1, 1), (2, 1))},
    3: {ONE: ((1, 1), (2, 1)), MINUS: ((2, 1), (1, -1)), ZERO: ((0, 1), (2, -1)), INFINITY: ((3, 1), (1, -1))},
}
ALONE: dict[int, tuple[tuple[int, int], ...]] = {ZERO: ((0, 1),)}


class Piece(NamedTuple):
    """One to three neighbouring taps of every residue of a family, and how many cells they begin behind its first."""

    taps: tuple[tuple[int, ...], ...]  # by residue, in the order of their cells
    behind: int


class Family(NamedTuple):
    """Residues of the fine positions modulo the stride that as many taps reach."""

    residues: tuple[int, ...]
    shifts: tuple[int, ...]  # by residue, from a coarse position to the first q it takes
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Scheme:
    """How an axis is filtered.

    Coarse position i is in tile t at place j, as ``i = (t*pair + j)*apart + r`` with r below `apart`. Cell u of a
    residue is fine position ``q*stride + residue`` of ``q = u*apart + r + shift``; it is in tile u // pair.
    """

    axis: Axis
    pair: int  # coarse positions of a tile, 2 or 1
    apart: int  # from a coarse position to the next whose cells are beside its own
    tiles: int
    families: tuple[Family, ...]

    @cached_property
    def points(self) -> list[int]:
        """All points, in order; those of any piece are the last of them."""
        return max((self.points_of(piece) for family in self.families for piece in family.pieces), key=len)

    def points_of(self, piece: Piece) -> list[int]:
        """The points of a piece, in order."""
        return sorted(self._takes(piece))

    def takes(self, piece: Piece, point: int) -> list[tuple[int, int, int]]:
        """Return what cells a point takes: which of a tile's, how many tiles on, and the sign."""
        return [(*divmod(cell + piece.behind, self.pair)[::-1], sign) for cell, sign in self._takes(piece)[point]]

    def _takes(self, piece: Piece) -> dict[int, tuple[tuple[int, int], ...]]:
        return TAKES[len(piece.taps[0])] if self.pair == 2 else ALONE

    @property
    def rows(self) -> int:
        """Rows of a point."""
        return self.tiles * self.apart

    def length(self, family: Family) -> int:
        """Return how many tiles of cells there are, with those behind the last coarse position."""
        if self.pair == 1:
            return self.tiles
        return self.tiles + max((len(piece.taps[0]) + piece.behind) // 2 for piece in family.pieces)

    def places(self, family: Family, residue: int, which: int, r: int) -> tuple[slice, slice]:
        """Return which tiles of one cell are inside the fine grid, and where."""
        axis = self.axis
        first = (which * self.apart + r + family.shifts[residue]) * axis.stride + family.residues[residue]
        step = self.pair * self.apart * axis.stride
        start = max(0, -(first // step))
        stop = min(self.length(family), -((first - axis.fine) // step))
        if start >= stop:
            return slice(0, 0), slice(0, 0)
        begin = first + start * step
        return slice(start, stop), slice(begin, begin + (stop - start - 1) * step + 1, step)


def scheme(axis: Axis) -> Scheme:
    """Return how an axis is filtered."""
    by_residue: dict[int, list[tuple[int, int]]] = {}
    for tap in range(axis.kernel):
        shift, residue = divmod(tap * axis.dilation - axis.lo, axis.stride)
        by_residue.setdefault(residue, []).append((shift, tap))
    alike: dict[int, list[int]] = {}
    for residue in sorted(by_residue):
        alike.setdefault(len(by_residue[residue]), []).append(residue)
    families = []
    for many, found in alike.items():
        pieces, at = [], 0
        while at < many:
            size = _size(many - at)
            taps = (tuple(tap for _, tap in by_residue[residue][at : at + size]) for residue in found)
            pieces.append(Piece(tuple(taps), at))
            at += size
        shifts = tuple(by_residue[residue][0][0] for residue in found)
        families.append(Family(tuple(found), shifts, tuple(pieces)))
    pair = 2 if max(alike) > 1 else 1
    apart = axis.dilation // math.gcd(axis.dilation, axis.stride) if pair == 2 else 1
    return Scheme(axis, pair, apart, -(-axis.coarse // (pair * apart)), tuple(families))


def _size(taps: int) -> int:
    """Return how many of so many taps the first piece has."""
    return taps if taps < 4 else 2 if taps == 4 else 3


class Term(NamedTuple):
    """A piece of both axes at one point of the second, for a point of the first."""

    family: int  # a pair of families
    pieces: tuple[Piece, Piece]
    point: int


@dataclass(frozen=True)
class Pairs:
    """Two filtered axes, of which the second is faster in memory."""

    a: Scheme
    b: Scheme

    @cached_property
    def families(self) -> list[tuple[Family, Family]]:
        return list(product(self.a.families, self.b.families))

    @cached_property
    def residues(self) -> list[int]:
        """Pairs of residues of each pair of families."""
        return [len(f.residues) * len(g.residues) for f, g in self.families]

    @cached_property
    def stages(self) -> list[tuple[int, list[Term]]]:
        """The points of the first axis, and their terms: those of a piece of the first axis follow each other."""
        return [
            (
                point,
                [
                    Term(i, (p, r), of_b)
                    for i, (f, g) in enumerate(self.families)
                    for p in f.pieces
                    if point in self.a.points_of(p)
                    for r in g.pieces
                    for of_b in self.b.points_of(r)
                ],
            )
            for point in self.a.points
        ]

    @property
    def rows(self) -> int:
        """Rows of a point, at one position of the third axis."""
        return self.a.rows * self.b.rows

    def cells(self, families: int) -> Iterator[tuple[tuple[int, ...], tuple[slice, slice], tuple[slice, slice]]]:
        """Yield the cells of a pair of families: which, residues and places between tiles; which tiles; and where."""
        f, g = self.families[families]
        for i, x, r in product(range(self.a.pair), range(len(f.residues)), range(self.a.apart)):
            to_a, from_a = self.a.places(f, x, i, r)
            for j, y, s in product(range(self.b.pair), range(len(g.residues)), range(self.b.apart)):
                to_b, from_b = self.b.places(g, y, j, s)
                if to_a.start < to_a.stop and to_b.start < to_b.stop:
                    yield (i, j, x, y, r, s), (to_a, to_b), (from_a, from_b)


def combine_taps(g: Sequence[Array], point: int, to: Array) -> None:
    """Combine the taps of a piece to the filter of a point."""
    if point in (ZERO, INFINITY):
        np.copyto(to, g[0 if point == ZERO else -1], casting="unsafe")
    elif len(g) == 2:
        np.subtract(g[1], g[0], out=to, dtype=to.dtype)
    else:
        np.add(g[0], g[2], out=to, dtype=to.dtype)
        if point == ONE:
            to += g[1]
        else:
            to -= g[1]
        to *= to.dtype.type(0.5)


def combine_cells(cells: Array, takes: Sequence[tuple[int, int, int]], to: Array) -> None:
    """Combine cells, by which of a tile's along the first axis, to the rows of a point; tiles are the last but one."""
    tiles = to.shape[-2]
    first, *others = (cells[which][..., on : on + tiles, :] for which, on, _ in takes)
    if not others:
        np.copyto(to, first)
    for other, (_, _, sign) in zip(others, takes[1:], strict=True):
        (np.add if sign > 0 else np.subtract)(first, other, out=to)


def add_points(sums: Array, points: Sequence[int]) -> None:
    """Add the sums of points, along the first axis, to the last two of them, which become the results of a pair."""
    for of_point, point in zip(sums[:-2], points, strict=False):
        sums[-2] += of_point
        (np.add if SIGNS[point][1] > 0 else np.subtract)(sums[-1], of_point, out=sums[-1])
