"""The filter's gradient with minimal filtering along one or two axes: its convolution, with what it adds up turned.

A convolution's results are combined from points, each the product of combined rows and a combined filter. So the
gradient of a point's filter is the product of the same rows, turned, and what the coarse rows of a tile are combined
to by the same signs; and those of all points are combined to the gradient of the taps once, at the end. Products are
3 of 4 or 4 of 6 for each axis, and no row is copied for every tap. A block walks over the convolution's blocks: over
all of them, or a share. Results that are not finite are left to another lowering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from gemmconv.blas import Gemm, small_products
from gemmconv.lowerings import winograd_conv
from gemmconv.lowerings.base import Array, AsItLies, Operands, Workspace, address, aligned, canonical, five, must_widen
from gemmconv.lowerings.boxes import Bounds, digit, evenly
from gemmconv.lowerings.copies import need_finite, store
from gemmconv.lowerings.cost import (
    SMALLEST_BUFFER,
    SPILLED_VALUE_S,
    copy_s,
    gemm_s,
    in_pieces_s,
    pass_s,
    step_s,
    unpacked_s,
)
from gemmconv.lowerings.minimal import gradient_matrix, points_matrix
from gemmconv.lowerings.products import alike, even_length, multiply_few, unpacked
from gemmconv.lowerings.tiling import fastest, is_whole
from gemmconv.lowerings.winograd_conv import Program, WinogradConv
from gemmconv.machine import Machine
from gemmconv.problem import Problem

# Shares of the rows that are weighed, unless they would take more bytes.
_SHARES, _MOST_SHARED = (1, 2, 4, 8), 1 << 22
# Rows of a product, where BLAS has kernels that do not pack: as many as they take, unless those are too few.
_FEWEST_ROWS, _MOST_ROWS = 64, 1024


@dataclass(frozen=True)
class WinogradGradient(AsItLies):
    """A schedule; see the module. `filter` of the operands is the coarse array."""

    problem: Problem
    of: WinogradConv  # the convolution; GEMM forms its products
    shares: int = 1  # of its blocks

    whole_behind = 0  # every row is read
    reads_beyond = 0

    @property
    def along(self) -> tuple[int, ...]:
        """The filtered axes."""
        return self.of.along

    @property
    def count(self) -> int:
        return self.shares

    @property
    def digits(self) -> list[list[Bounds]]:
        return [[()] * self.shares, digit(4, [(0, self.problem.cin)])]

    @cached_property
    def sums_shapes(self) -> list[tuple[int, ...]]:
        """Of each family: [point's filter, point's filter, tap, tap, phase and fine channel, coarse channel]."""
        problem = self.problem
        return [(f.a[0].filters, f.b[0].filters, *f.taps, f.size * problem.cout, problem.cin) for f in self.of.families]

    @property
    def largest_product(self) -> int:
        return self.of.largest_product

    @property
    def workspace_bytes(self) -> int:
        sizes = [cut.longest for cut in self.of.cuts]
        sums = self.of.sums(sizes)
        values = [*map(math.prod, self.sums_shapes), math.prod(sums), self._taps_values, self._found_values(sums)]
        return self.of.workspace_bytes + sum(aligned(n * self.problem.compute_dtype.itemsize) for n in values)

    def _found_values(self, sums: Sequence[int]) -> int:
        """Return the values of the products of a tap that are formed in one step, of a block with sums of a shape."""
        most = 0
        for family, (*_, k, n) in zip(self.of.families, self.sums_shapes, strict=True):
            if rows := self._most_rows(k, n):
                u = sums[2] if family.taps[1] > 1 else 1  # lines; those of a single tap follow each other
                # `even_length` may make twice as many pieces, but one, as there must be.
                pieces = 2 * -(-(math.prod(sums[2:6]) // u) // rows) - 1
                most = max(most, math.prod(family.points) * u * pieces * k * n)
        return most

    def _most_rows(self, k: int, n: int) -> int:
        """Return of how many rows products are formed that BLAS does not pack; 0 if it packs them, or takes too few."""
        most = small_products() * 7 // 8 // (k * n) if unpacked(self.problem) else 0
        return 0 if most < _FEWEST_ROWS else min(most, _MOST_ROWS)

    @property
    def _taps_values(self) -> int:
        """The values of the gradient of a family's taps, in the order of its sums."""
        taps = (math.prod(len(lines[0].taps) * len(lines) for lines in family) for family in self.of.families)
        return max(taps) * self.problem.cout * self.problem.cin

    @property
    def reason(self) -> str:
        shares = f", in {self.shares} shares of the rows" if self.shares > 1 else ""
        small = any(self._most_rows(*shape[4:]) for shape in self.sums_shapes)
        return f"{self.of.described('minimal filtering', small=small)}{shares}"

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        problem, of = self.problem, self.of
        sizes = [cut.size / len(cut) for cut in of.cuts]
        sums = of.sums(sizes)
        coarse = math.prod(sums)
        rows = math.prod(sums[2:6])
        total: float = of.filled_s() + pass_s(coarse, coarse) + 6 * step_s(short=True)
        total += rows * problem.cin * in_pieces_s(problem, problem.cin)
        for family, (*_, k, n) in zip(of.families, self.sums_shapes, strict=True):
            points, taps = math.prod(family.points), math.prod(family.taps)
            lines = sizes[0] if family.taps[1] > 1 else 1
            # Rows of all points are more than a cache holds.
            total += taps * points * rows * (k + n) * SPILLED_VALUE_S
            if most := self._most_rows(k, n):
                total += taps * (unpacked_s(points * k, n, rows) + 2 * step_s(short=True))
                total += taps * max(lines, rows / most) * pass_s(points * k * n, points * k * n)
            else:
                total += taps * points * lines * gemm_s(k, n, rows / lines)
        values = sum(map(math.prod, self.sums_shapes))
        ends = 2 * copy_s(values, problem.cin, steps=4 * len(of.families), spilled=True)
        added = self.shares * math.prod(problem.filter_shape) if self.shares > 1 else 0
        return of.count * total + self.shares * ends + copy_s(2 * added, problem.cin, spilled=True)

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        of = self.of
        all_sums = [workspace.take(*shape) for shape in self.sums_shapes]
        taps = workspace.take(self._taps_values)
        used = workspace.used
        for sums in all_sums:
            sums[...] = 0
        value, coarse = self._in_order(operands)
        for number in range(of.count * index // self.shares, of.count * (index + 1) // self.shares):
            block = of.block(number)
            program = of.made(block)
            workspace.used = used
            points = self._combined(program, coarse, workspace)
            memory = [workspace.take(values) for values in of.memory(program.layout)]
            rows = of.rows_of(program.layout, memory)
            rows.open(value[program.source])
            found = workspace.take(self._found_values(program.layout.sums))
            for family, sums in zip(rows.families, all_sums, strict=True):
                family.fill()
                workspace.mark("pack")
                for taken, at in zip(family.taps, np.ndindex(*sums.shape[2:4]), strict=True):
                    lines = 1 if is_whole(taken) else taken.shape[2]
                    mine = points[: taken.shape[0], : taken.shape[1]]
                    left, right = (x.reshape(*x.shape[:2], lines, -1, x.shape[-1]) for x in (taken, mine))
                    if most := self._most_rows(*sums.shape[4:]):
                        _add_small(left, right, sums[:, :, *at], even_length(left.shape[3], most), found)
                    else:
                        _add_by_gemm(workspace.gemm, left, right, sums[:, :, *at])
                workspace.mark("gemm")
        self._store(operands, all_sums, taps)
        workspace.mark("store")

    def _in_order(self, operands: Operands) -> tuple[Array, Array]:
        """Return the fine and the coarse array with axes in order."""
        problem, axes, order = self.problem, canonical(self.problem.axes), self.of.order
        fine = five(problem.layout, operands.value, problem.batch, [axis.fine for axis in axes], problem.cout)
        coarse = five(problem.layout, operands.filter, problem.batch, [axis.coarse for axis in axes], problem.cin)
        return fine.transpose(*order, 4), coarse.transpose(*order, 4)

    def _combined(self, program: Program, coarse: Array, workspace: Workspace) -> Array:
        """Return what coarse rows of a block's tiles are combined to: [point, point, u, v, place, place, channel]."""
        first = self.of.families[0]
        lines = first.a[0], first.b[0]
        points = workspace.take(*program.layout.sums)
        used = workspace.used
        cells = workspace.take(*(line.results for line in lines), *program.layout.sums[2:])
        cells[...] = 0
        for at, place in zip(program.layout.results, program.stores, strict=True):
            np.copyto(cells[at], coarse[place], casting="unsafe")
        matrix = points_matrix(*lines, points.dtype)
        multiply_few(matrix, cells.reshape(matrix.shape[1], -1), points.reshape(len(matrix), -1))
        workspace.used = used
        return points

    def _store(self, operands: Operands, all_sums: list[Array], memory: Array) -> None:
        """Combine the gradients of the points' filters to those of the taps, and store them."""
        problem, of = self.problem, self.of
        kernel = [axis.kernel for axis in canonical(problem.axes)]
        output = operands.output.reshape(1, *kernel, problem.cout, problem.cin).transpose(*of.order, 4, 5)
        output[...] = 0  # where no tap lands
        for family, sums in zip(of.families, all_sums, strict=True):
            a, b = family.a[0], family.b[0]
            shape = len(a.taps), len(b.taps), *family.taps, family.size, problem.cout, problem.cin
            taps = memory[: math.prod(shape)].reshape(shape)
            matrix = gradient_matrix(a, b, memory.dtype)
            multiply_few(matrix, sums.reshape(matrix.shape[1], -1), taps.reshape(len(matrix), -1))
            need_finite(taps)
            taps += 0  # BLAS multiplies complex numbers by a complex 1, which makes zeros of either sign
            for number, lines in enumerate(product(*family)):
                at = tuple(evenly(line.taps) for line in lines)
                store(output[at], taps[:, :, :, :, number].transpose(2, 3, 0, 1, 4, 5))


def _add_by_gemm(gemm: Gemm, rows: Array, points: Array, sums: Array) -> None:
    """Add the products of rows, turned, and points [point, point, line, row, channel], each to its filter's sums."""
    (*stack, many, k), n = rows.shape, points.shape[-1]
    for a, b, line in np.ndindex(*stack):
        to = sums[a % len(sums), b % sums.shape[1]]
        left, right = address(rows[a, b, line]), address(points[a, b, line])
        gemm(k, n, many, left, k, True, right, n, False, address(to), n, True)


def _add_small(rows: Array, points: Array, sums: Array, each: int, memory: Array) -> None:
    """As `_add_by_gemm`, in steps of all small products of so many rows, which BLAS does not pack."""
    (*stack, many, k), n = rows.shape, points.shape[-1]
    for first, last, pieces in alike(many, each):
        left, right = (array[..., first:last, :] for array in (rows, points))
        left, right = (array.reshape(*stack, pieces, -1, array.shape[-1]) for array in (left, right))
        shape = *stack[:2], stack[2] * pieces, k, n
        found = memory[: math.prod(shape)].reshape(shape)
        np.matmul(left.swapaxes(-1, -2), right, out=found.reshape(*stack, pieces, k, n))
        for a, b in product(range(0, stack[0], len(sums)), range(0, stack[1], sums.shape[1])):
            of_filters = found[a : a + len(sums), b : b + sums.shape[1]]
            for part in range(shape[2]):
                np.add(sums, of_filters[:, :, part], out=sums)


def schedule(problem: Problem, machine: Machine) -> WinogradGradient:
    """Choose axes and blocks for a problem by cost, or raise CannotLowerError where no axis can be filtered."""
    return fastest(candidates(problem), problem, machine, "no two taps meet in a cell", "im2col")


def candidates(problem: Problem) -> list[WinogradGradient]:
    """Return schedules for every choice of one or two filtered axes, in several numbers of shares."""
    in_place = problem.dtype.kind == "f" and not must_widen(problem)
    formed = math.prod(problem.filter_shape) * problem.compute_dtype.itemsize
    shares = [n for n in _SHARES if n == 1 or (in_place and n * formed <= _MOST_SHARED)]
    convolutions = winograd_conv.candidates(replace(problem, operation="conv3d"))
    whole = [replace(one, columns=0) for one in convolutions if len(one.cuts[4]) == 1]
    return [WinogradGradient(problem, one, n) for one in whole for n in shares if n <= one.count]
