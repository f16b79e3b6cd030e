"""A convolution with minimal filtering along two axes of any stride, or of one as its transposed twin has it.

A block's cells of the fine array are combined, axis by axis, to the rows of a point, and the taps of both axes to a
filter of a point (pairs.py says how). GEMM adds their products to the sums of the point: along the third axis, the
slowest of the rows, a tap is a run of rows. The sums of all points are added to the two results of each tile. Only
halves and sums occur, so small whole numbers stay exact, and a result depends on no value but those its own taps take.
What rounding does is in docs/how-it-works.md. Results that are not finite are left to another lowering, as in
winograd.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any, NamedTuple

import numpy as np

from gemmconv import results
from gemmconv.lowerings import filtered_conv, winograd
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
)
from gemmconv.lowerings.boxes import Bounds, Cut, Index, Range, digit, each, located
from gemmconv.lowerings.copies import copy, need_finite, store
from gemmconv.lowerings.cost import SMALLEST_BUFFER, best, copy_s, gemm_s, packing_s, pass_s, total_s
from gemmconv.lowerings.pairs import SIGNS, Pairs, Piece, Term, add_points, combine_cells, combine_taps, scheme
from gemmconv.lowerings.phases import Slots, places, slots
from gemmconv.lowerings.turned import twin
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Rows of a point in a block, and cuts of the result's channels that are weighed; they are not cut below _WIDE.
_ROWS = (64, 128, 256, 512, 1024, 2048)
_PARTS = (1, 2, 4, 8)
_WIDE = 32
_L2_SHARE = 0.75


class Block(NamedTuple):
    """A box of the result: batch entry, positions of the third axis, channels."""

    batch: int
    along: Range
    channels: Range


class Step(NamedTuple):
    """Taps of the third axis in one GEMM: first row of the sums, first q, rows, first tap and slot, and how many."""

    row: int
    q: int
    rows: int
    tap: int
    slot: int
    many: int


class Program(NamedTuple):
    """What a block does: the q of the third axis that it reads, its cells and where they are, and its GEMMs."""

    q: Range
    cells: list[tuple[int, Index, Index]]  # which families, of their cells, of the fine array
    steps: list[Step]


@dataclass(frozen=True, slots=True)
class Paired(Usual):
    """A schedule; see the module."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    along: int  # the third axis: 0 for depth to 2 for width
    slots: Slots  # of the third axis
    pairs: Pairs  # the other axes
    cuts: tuple[Cut, Cut]  # of the third axis and of the channels

    wants_finite_filter = True

    @property
    def count(self) -> int:
        return self.problem.batch * len(self.cuts[0]) * len(self.cuts[1])

    @property
    def digits(self) -> list[list[Bounds]]:
        along, channels = self.cuts
        return [digit(0, each(self.problem.batch)), digit(self.along + 1, along), digit(4, channels)]

    def block(self, index: int) -> Block:
        """Return a block; those of the same rows follow each other."""
        batch, spans = located(index, self.cuts)
        return Block(batch, *spans)

    @property
    def kernel(self) -> int:
        """Taps of the third axis."""
        return self.axes[self.along].kernel

    @property
    def lanes(self) -> int:
        return len(self.slots.offsets)

    @property
    def largest_product(self) -> int:
        lanes = max((move.many for move in self.slots.moves), default=1)
        k = lanes * max(self.pairs.residues) * self.problem.cout
        return self.cuts[0].longest * self.pairs.rows * k * self.cuts[1].longest

    @property
    def packed_values(self) -> int:
        residues = sum(self.pairs.residues[term.family] for _, terms in self.pairs.stages for term in terms)
        return self.kernel * residues * self.problem.cout * self.problem.cin

    @property
    def workspace_bytes(self) -> int:
        here, item = self.cuts[0].longest, self.problem.compute_dtype.itemsize
        cells, line, rows, sums = self._sizes(min(self.slots.count, here + self.slots.reach), here)
        values = [*cells, line, rows, sums * len(self.pairs.b.points), sums * self.pairs.a.pair * self.pairs.b.pair]
        return sum(aligned(n * item) for n in values)

    def _sizes(self, q: int, here: int) -> tuple[list[int], int, int, int]:
        """Return the values of the cells of each pair of families, of a line and the rows of a point, of its sums."""
        (a, b), columns = (self.pairs.a, self.pairs.b), q * self.lanes * self.problem.cout
        both = zip(self.pairs.families, self.pairs.residues, strict=True)
        of_b = [b.pair * b.length(g) * b.apart * residues * columns for (_, g), residues in both]
        cells = [a.pair * a.length(f) * a.apart * n for (f, _), n in zip(self.pairs.families, of_b, strict=True)]
        rows = self.pairs.rows * max(self.pairs.residues) * columns
        return cells, a.rows * max(of_b), rows, here * self.pairs.rows * self.cuts[1].longest

    @property
    def reason(self) -> str:
        names = [name for i, name in enumerate(("depth", "height", "width")) if i != self.along]
        of_axes = zip(names, (self.pairs.a, self.pairs.b), strict=True)
        filtered = " and ".join(name for name, of_axis in of_axes if of_axis.pair > 1)
        channels = f", {self.cuts[1].longest} of {self.problem.cin} channels" if len(self.cuts[1]) > 1 else ""
        rows = self.cuts[0].longest * self.pairs.rows
        return f"minimal filtering along {filtered}, GEMMs of up to {rows} rows{channels}, filter packed"

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core; see cost.py."""
        problem, (a, b) = self.problem, (self.pairs.a, self.pairs.b)
        spilled = self.workspace_bytes > machine.l2_bytes * _L2_SHARE
        strided = problem.layout == "NCDHW"
        cout, n = problem.cout, problem.cin / len(self.cuts[1])
        here = self.axes[self.along].coarse / len(self.cuts[0])
        q = min(self.slots.count, here + self.slots.reach)
        rows, columns = here * self.pairs.rows, q * self.lanes * cout
        total = packing = 0.0
        for (f, g), residues in zip(self.pairs.families, self.pairs.residues, strict=True):
            values = a.pair * a.length(f) * a.apart * b.pair * b.length(g) * b.apart * residues * columns
            steps = a.pair * a.apart * b.pair * b.apart * residues * self.lanes
            total += copy_s(values, cout, steps=steps, spilled=True, strided=strided) + copy_s(values, values)
        for point, terms in self.pairs.stages:
            for (i, p), of_p in groupby(terms, key=_of_first):
                line = (
                    a.rows * b.pair * b.length(self.pairs.families[i][1]) * b.apart * self.pairs.residues[i] * columns
                )
                total += len(a.takes(p, point)) * pass_s(line, line / q / a.tiles, spilled=spilled)
                for term in of_p:
                    k = self.pairs.residues[i] * cout
                    made = self.pairs.rows * self.pairs.residues[i] * columns
                    total += len(b.takes(term.pieces[1], term.point)) * pass_s(made, b.rows * k, spilled=spilled)
                    total += sum(gemm_s(rows, n, k * move.many, spilled=spilled) for move in self.slots.moves)
                    packing += 2 * copy_s(self.kernel * self.pairs.residues[i] * cout * problem.cin, n, spilled=True)
            total += (2 * len(b.points) + 2) * pass_s(rows * n, rows * n, spilled=spilled)
        total += copy_s(rows * a.pair * b.pair * n, n, steps=a.pair * b.pair, spilled=True, strided=strided)
        return total * self.count + packing_s(problem, packing)

    def pack(self, filter: Array, packed: Array) -> None:
        """Combine the taps of both filtered axes, and lay them out as [channels, term, tap of the third axis, ...]."""
        cin = self.problem.cin
        each_channel, before = self.packed_values // cin, 0
        for made in self._filters(filter, packed.dtype):
            size = made.size // cin
            for start, stop in self.cuts[1]:
                to = packed[start * each_channel + before * (stop - start) :][: size * (stop - start)]
                np.copyto(to.reshape(*made.shape[:4], stop - start), made[..., start:stop])
            before += size

    def _filters(self, filter: Array, dtype: np.dtype[Any]) -> Iterator[Array]:
        """Yield the filter of each term, as [tap of the third axis, residue, residue, cout, cin]."""
        taps = filter.reshape(*(axis.kernel for axis in self.axes), self.problem.cout, self.problem.cin)
        taps = np.moveaxis(taps, self.along, 0)
        for point, terms in self.pairs.stages:
            for (_, p), of_p in groupby(terms, key=_of_first):
                lines = results.empty((self.kernel, len(p.taps), *taps.shape[2:]), dtype)
                for i, of_residue in enumerate(p.taps):
                    combine_taps([taps[:, tap] for tap in of_residue], point, lines[:, i])
                for term in of_p:
                    of_b = term.pieces[1].taps
                    made = results.empty((self.kernel, len(p.taps), len(of_b), *taps.shape[3:]), dtype)
                    for i, of_residue in enumerate(of_b):
                        combine_taps([lines[:, :, tap] for tap in of_residue], term.point, made[:, :, i])
                    yield made

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        problem, (a, b), item = self.problem, (self.pairs.a, self.pairs.b), workspace.gemm.itemsize
        block = self.block(index)
        program = self._made(block)
        here, n = block.along[1] - block.along[0], block.channels[1] - block.channels[0]
        q, cout = program.q[1] - program.q[0], problem.cout
        sizes = self._sizes(q, here)
        cells = self._cells(program, operands, [workspace.take(size) for size in sizes[0]], q)
        all_lines, all_rows = workspace.take(sizes[1]), workspace.take(sizes[2])
        row = self.pairs.rows * n
        sums = workspace.take(len(b.points), here * row)
        results = workspace.take(a.pair, b.pair, here * row)
        results.reshape(-1, n)[...] = operands.start(block.channels)
        workspace.mark("pack")
        rows_at, sums_at, q_values = address(all_rows), address(sums), self.pairs.rows * self.lanes
        packed_at = address(operands.packed) + block.channels[0] * (self.packed_values // problem.cin) * item
        for point, terms in self.pairs.stages if program.steps else ():
            sums[...] = 0
            for (i, p), of_p in groupby(terms, key=_of_first):
                (_, g), k = self.pairs.families[i], self.pairs.residues[i] * cout
                shape = b.pair, q, a.tiles, a.apart * b.length(g) * b.apart * self.lanes * k
                lines = all_lines[: math.prod(shape)].reshape(shape)
                combine_cells(cells[i], a.takes(p, point), lines)
                lines = lines.reshape(b.pair, q * a.rows, b.length(g), -1)
                rows = all_rows[: q * self.pairs.rows * self.lanes * k].reshape(q * a.rows, b.tiles, -1)
                for term in of_p:
                    combine_cells(lines, b.takes(term.pieces[1], term.point), rows)
                    workspace.mark("pack")
                    of_point = sums_at + b.points.index(term.point) * here * row * item
                    for step in program.steps:
                        workspace.gemm(
                            step.rows * self.pairs.rows, n, step.many * k,
                            rows_at + (step.q * q_values + step.slot) * k * item, self.lanes * k, False,
                            packed_at + step.tap * k * n * item, n, False, of_point + step.row * row * item, n, True,
                        )  # fmt: skip
                    packed_at += self.kernel * k * n * item
                    workspace.mark("gemm")
            if b.pair > 1:
                add_points(sums, b.points)
            for result, sign in zip(results, SIGNS[point], strict=False):
                if sign:
                    (np.add if sign > 0 else np.subtract)(result, sums[-b.pair :], out=result)
            workspace.mark("col2im")
        if problem.dtype.kind == "c":
            results += 0  # BLAS multiplies by a complex 1, which makes zeros of either sign
        need_finite(results)
        self._store(block, operands, results.reshape(a.pair, b.pair, here, a.tiles, a.apart, b.tiles, b.apart, n))
        workspace.mark("store")

    def _cells(self, program: Program, operands: Operands, arrays: list[Array], q: int) -> list[Array]:
        """Fill the cells of all families, with zeros beyond the fine array: [which of a, ..., tile of a, the rest]."""
        problem, (a, b) = self.problem, (self.pairs.a, self.pairs.b)
        value = five(problem.layout, operands.value, problem.batch, [axis.fine for axis in self.axes], problem.cout)
        value = np.moveaxis(value, self.along + 1, 1)
        shaped = []
        for (f, g), array in zip(self.pairs.families, arrays, strict=True):
            array[...] = 0
            shape = a.pair, b.pair, q, a.length(f), a.apart, b.length(g), b.apart, self.lanes
            shaped.append(array.reshape(*shape, len(f.residues), len(g.residues), problem.cout))
        for i, to, source in program.cells:
            copy(shaped[i][to], value[source])
        return [array.reshape(*array.shape[:4], math.prod(array.shape[4:])) for array in shaped]

    def _store(self, block: Block, operands: Operands, results: Array) -> None:
        problem, (a, b) = self.problem, (self.pairs.a, self.pairs.b)
        output = five(problem.layout, operands.output, problem.batch, [axis.coarse for axis in self.axes], problem.cin)
        output = np.moveaxis(output[block.batch, ..., slice(*block.channels)], self.along, 0)[slice(*block.along)]
        for i, j, r, s in product(range(a.pair), range(b.pair), range(a.apart), range(b.apart)):
            to = output[:, i * a.apart + r :: a.pair * a.apart, j * b.apart + s :: b.pair * b.apart]
            store(to, results[i, j, :, : to.shape[1], r, : to.shape[2], s])

    def _made(self, block: Block) -> Program:
        here, (first, last) = block.along, self.slots.shifts
        start = max(0, here[0] + first)
        q = start, max(start, min(self.slots.count, here[1] + last))
        steps = []
        for move in self.slots.moves:
            begin, end = max(here[0], q[0] - move.shift), min(here[1], q[1] - move.shift)
            if begin < end:
                steps.append(
                    Step(begin - here[0], begin + move.shift - q[0], end - begin, move.tap, move.slot, move.many)
                )
        cells = [
            (k, (i, j, place.q, to_a, r, to_b, s, place.slot, x, y), (block.batch, place.fine, *source))
            for k in range(len(self.pairs.families))
            for (i, j, x, y, r, s), (to_a, to_b), source in self.pairs.cells(k)
            for place in places(self.axes[self.along], self.slots, q)
        ]
        return Program(q, cells, steps)


def _of_first(term: Term) -> tuple[int, Piece]:
    """What the terms have in common that take the same line of the first axis."""
    return term.family, term.pieces[0]


def schedule(problem: Problem, machine: Machine) -> Schedule:
    """Choose between GEMM along two axes, or along one as the twin has it, and small products by cost.

    Raise CannotLowerError where no taps can be filtered.
    """
    item = problem.compute_dtype.itemsize
    of_tiles = filtered_conv.candidates(problem, machine)
    found: list[Schedule] = [s for s in of_tiles if s.packed_values * item <= winograd.MOST_PACKED]
    if all(axis.stride == 1 for axis in problem.axes):
        with suppress(CannotLowerError):
            found.append(winograd.schedule(twin(problem), machine))
    try:
        found.append(paired(problem, machine))
    except CannotLowerError:
        if not found:
            raise
    return min(found, key=lambda s: total_s(s, machine))


def paired(problem: Problem, machine: Machine) -> Paired:
    """Choose the axes and blocks for a problem by cost, or raise CannotLowerError where nothing can be filtered."""
    axes = canonical(problem.axes)
    of_axes = [scheme(axis) for axis in axes]
    found: list[Paired] = []
    for along in range(3):
        a, b = (of_axis for i, of_axis in enumerate(of_axes) if i != along)
        if a.pair == b.pair == 1:
            continue
        of_axis, pairs = slots(axes[along]), Pairs(a, b)
        for parts, rows in product(_PARTS, _ROWS):
            if parts == 1 or problem.cin >= parts * _WIDE:
                cuts = Cut(axes[along].coarse, max(1, rows // pairs.rows)), Cut(problem.cin, -(-problem.cin // parts))
                found.append(Paired(problem, axes, along, of_axis, pairs, cuts))
    text = f"{problem.operation}: algorithm='winograd' cannot do this problem:"
    if not found:
        kernel, strides, dilations = (
            "x".join(str(getattr(axis, name)) for axis in problem.axes) for name in ("kernel", "stride", "dilation")
        )
        raise CannotLowerError(
            f"{text} no two taps meet in a cell, got kernel {kernel}, strides {strides}, dilations {dilations}; "
            "'im2col' and 'auto' can"
        )
    return best(winograd.affordable(found, machine, text, "im2col"), machine)
