"""kn2row for convolutions of few rows: a tap at a time, with just the rows whose values lie inside the fine array.

Where an array is small beside its kernel, much of im2col's columns is zeros around it: of 4 x 4 x 4 positions with 4
taps and a stride of 2 along each axis, a third. Here the fine values that a tap reaches are copied, one row for each
position, multiplied with its filter by products that BLAS does not pack, and added to the sums of these positions.
Nothing is padded, so Inf and NaN reach what they reach by definition. A block is a run of rows of the result, and may
have a share of the taps, as im2col's may.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from gemmconv.lowerings import gather
from gemmconv.lowerings.base import (
    AsItLies,
    CannotLowerError,
    Operands,
    Schedule,
    Workspace,
    aligned,
    canonical,
    five,
)
from gemmconv.lowerings.boxes import Bounds, Box, Cut, Index, digit, located
from gemmconv.lowerings.copies import copy, is_far, read_ahead, store
from gemmconv.lowerings.cost import SMALLEST_BUFFER, best, copy_s, pass_s, read_s, total_s, unpacked_s
from gemmconv.lowerings.im2col import row_cuts, share_counts
from gemmconv.lowerings.phases import reached
from gemmconv.lowerings.products import LARGEST, multiply, parts_of, parts_values, unpacked
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

# Rows of a block that are weighed.
_ROWS = (32, 64, 128, 256, 512, 1024)
# The most taps: each is a step of its own.
_MOST_TAPS = 1024


class Step(NamedTuple):
    """A tap of a block: its number, its rows, the fine values that it reaches, and the sums that they are added to."""

    tap: int
    rows: int
    source: Index
    to: Index


@dataclass(frozen=True, slots=True)
class Landed(AsItLies):
    """A schedule; see the module."""

    problem: Problem
    axes: tuple[Axis, Axis, Axis]
    cuts: tuple[Cut, Cut, Cut, Cut]  # of batch, depth, height and width of the result
    shares: int  # of the taps

    @property
    def count(self) -> int:
        return self.shares * math.prod(map(len, self.cuts))

    @property
    def digits(self) -> list[list[Bounds]]:
        return [[()] * self.shares, *(digit(i, cut) for i, cut in enumerate(self.cuts))]

    def block(self, index: int) -> tuple[int, Box]:
        """Return a block: its share, and its rows."""
        share, spans = located(index, self.cuts)
        return share, Box(*spans)

    @property
    def rows(self) -> int:
        """The most rows of a block."""
        return math.prod(cut.longest for cut in self.cuts)

    @property
    def largest_product(self) -> int:
        return LARGEST

    @property
    def workspace_bytes(self) -> int:
        return sum(aligned(n * self.problem.compute_dtype.itemsize) for n in self._sizes)

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """The values of the sums, of the rows of a tap, of its products and of parts of them."""
        rows, (k, n), item = self.rows, (self.problem.cout, self.problem.cin), self.problem.compute_dtype.itemsize
        return rows * n, rows * k, rows * n, parts_values(rows, n, k, item)

    @property
    def landed(self) -> float:
        """The part of the rows of all taps that is inside the fine array."""
        found = 1.0
        for axis in self.axes:
            every = [reached(axis, tap, (0, axis.coarse))[0] for tap in range(axis.kernel)]
            found *= sum(rows.stop - rows.start for rows in every) / (axis.coarse * axis.kernel)
        return found

    @property
    def reason(self) -> str:
        shares = f", in {self.shares} shares of the taps" if self.shares > 1 else ""
        return f"small products of a tap and the rows inside the array, up to {self.rows}{shares}"

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        problem, (k, n) = self.problem, (self.problem.cout, self.problem.cin)
        every, blocks = problem.batch * math.prod(problem.coarse), math.prod(map(len, self.cuts))
        rows = every / blocks * self.landed
        parts = parts_of(self.rows, n, k, problem.compute_dtype.itemsize, False)
        each = copy_s(rows * k, k, spilled=True) + pass_s(rows * n, n) + read_s(k * n)
        each += unpacked_s(rows, n, k, parts, apart=problem.pitch)
        stored = copy_s(every * n, n, steps=2 * blocks, spilled=True)
        added = copy_s(2 * every * n, n) if self.shares > 1 else 0.0
        return blocks * math.prod(problem.kernel) * each + self.shares * (stored + added)

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        problem, (k, n) = self.problem, (self.problem.cout, self.problem.cin)
        share, rows = self.block(index)
        fine = five(problem.layout, operands.value, problem.batch, [axis.fine for axis in self.axes], k)
        filter, far = operands.filter.reshape(-1, k, n), is_far(operands.filter)
        found, values, made, parts = map(workspace.take, self._sizes)
        sums = found[: math.prod(rows.sizes) * n].reshape(*rows.sizes, n)
        sums[...] = 0 if share else operands.start((0, n))
        for tap, m, source, to in self._steps(index):
            workspace.mark("overhead")
            x, of_tap, y = values[: m * k].reshape(m, k), filter[tap], made[: m * n].reshape(m, n)
            inside = fine[source]
            copy(x.reshape(inside.shape), inside)
            workspace.mark("pack")
            if far:
                read_ahead(of_tap)
            multiply(x, of_tap, y, parts)
            workspace.mark("gemm")
            cells = sums[to]
            np.add(cells, y.reshape(cells.shape), cells)
            workspace.mark("col2im")
        output = five(problem.layout, operands.output, problem.batch, [axis.coarse for axis in self.axes], n)
        store(output[tuple(slice(*r) for r in rows)], sums)
        workspace.mark("store")

    def _steps(self, index: int) -> Iterator[Step]:
        """Yield the taps of a block that reach anything."""
        share, (batch, *rows) = self.block(index)
        taps = list(enumerate(product(*(range(axis.kernel) for axis in self.axes))))
        for i, tap in taps[len(taps) * share // self.shares : len(taps) * (share + 1) // self.shares]:
            to, source = zip(*map(reached, self.axes, tap, rows), strict=True)
            many = (batch[1] - batch[0]) * math.prod(span.stop - span.start for span in to)
            if many:
                yield Step(i, many, (slice(*batch), *source), (slice(None), *to))


def candidates(problem: Problem) -> list[Landed]:
    """Return schedules of all cuts of rows in which no product is one of a vector."""
    axes = canonical(problem.axes)
    taps, every = math.prod(problem.kernel), problem.batch * math.prod(problem.coarse)
    if problem.layout != "NDHWC" or not unpacked(problem) or problem.dtype != problem.compute_dtype:
        return []
    if taps > _MOST_TAPS or problem.cin == 1 or problem.cout == 1:
        return []
    found = []
    for rows in sorted({min(n, every) for n in _ROWS}):
        cuts = row_cuts(problem, axes, rows)
        fewest = math.prod(_fewest(axis, cut) for axis, cut in zip(axes, cuts[1:], strict=True)) * cuts[0].shortest
        if fewest > 1:
            found += [Landed(problem, axes, cuts, shares) for shares in share_counts(problem)]
    return found


def _fewest(axis: Axis, cut: Cut) -> int:
    """Return with how many positions of a block a tap that reaches any reaches them at the least."""
    found = []
    for rows in (reached(axis, tap, (0, axis.coarse))[0] for tap in range(axis.kernel)):
        # What a tap reaches follows each other: but for the first block and the last it is all of a block.
        ends = (cut.around(at) for at in (rows.start, rows.stop - 1) if rows.start < rows.stop)
        found += [min(stop, rows.stop) - max(start, rows.start) for start, stop in ends]
    return min(cut.shortest, *found) if found else 0


def schedule(problem: Problem, machine: Machine) -> Schedule:
    """Return how kn2row does a convolution: so, or line by line."""
    found: list[Schedule] = []
    if made := candidates(problem):
        found.append(best(made, machine))
    try:
        found.append(gather.schedule(problem, machine))
    except CannotLowerError:
        if not found:
            raise
    return min(found, key=lambda s: total_s(s, machine))
