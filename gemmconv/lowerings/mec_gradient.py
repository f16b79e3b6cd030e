"""The filter's gradient with the columns of mec.py: products of lines, as they lie, of groups of few channels.

The columns of a line, [tap, channel, position], meet the coarse line, [channel, position], in one product over the
positions; with the columns of the lines behind it, for all taps of the free axis. BLAS has products of lines of both
operands that it does not pack. Those of many lines and groups are formed in one step and added up. Between lines the
coarse grid has zeros, so both operands must be finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from gemmconv.blas import small_products
from gemmconv.lowerings.base import Array, AsItLies, Operands, Workspace, aligned, order
from gemmconv.lowerings.boxes import Bounds, Range, digit
from gemmconv.lowerings.copies import store
from gemmconv.lowerings.cost import SMALLEST_BUFFER, best_that_fits, lines_s, packed_lines_s, pass_s
from gemmconv.lowerings.mec import FEW, Block, Mec, Sizes, by_position, candidates
from gemmconv.lowerings.products import LARGEST, unpacked
from gemmconv.lowerings.stacked import Stacked
from gemmconv.machine import Machine
from gemmconv.problem import Problem

# Results of a product of lines that BLAS does not pack.
_RESULTS = 1024
# Columns below which products are not cut.
_FEWEST = 4


@dataclass(frozen=True)
class MecGradient(AsItLies):
    """A schedule; see the module. `of` is the convolution whose columns are taken; all its blocks are one here."""

    problem: Problem
    of: Mec

    wants_finite_filter = True
    wants_finite_value = True
    whole_behind = 0  # every row is read
    reads_beyond = 0
    count = 1

    @property
    def own_groups(self) -> int:
        """Groups that are one of the problem."""
        return self.of.own_groups

    @property
    def digits(self) -> list[list[Bounds]]:
        return [digit(4, [(0, self.problem.cin)])]

    def pieces(self, k: int) -> int:
        """Return into how many products of equal size the columns of one are cut; 1 where BLAS packs them."""
        if not unpacked(self.problem):
            return 1
        fewest = -(-k * self.of.rows // _RESULTS)
        return next((n for n in range(fewest, k // _FEWEST + 1) if k % n == 0), 1)

    @property
    def largest_product(self) -> int:
        of = self.of
        size = of.rows * of.tile * max((one.shape[2] // self.pieces(one.shape[2]) for one in of.products), default=0)
        return LARGEST if unpacked(self.problem) and size <= small_products() else size

    def _values(self, sizes: Sizes) -> tuple[int, int, int]:
        """Return the values of coarse lines, of the sums of a product for each line, and of all sums."""
        of, tiles = self.of, -(-sizes.row // self.of.tile)
        coarse = of.own_groups * sizes.free * of.rows
        return coarse * sizes.row, coarse * tiles * of.deep, of.packed_values

    @cached_property
    def workspace_bytes(self) -> int:
        of = self.of
        sizes = of.sizes(*(cut.longest for cut in of.cuts))
        more = sum(aligned(n * self.problem.compute_dtype.itemsize) for n in self._values(sizes))
        return of.workspace_bytes + more

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, for blocks of mean size; see cost.py."""
        of = self.of
        sizes = of.sizes(*(max(1, round(cut.size / len(cut))) for cut in of.cuts))
        coarse, _, _ = self._values(sizes)
        lines, tiles = of.own_groups * sizes.free, -(-sizes.row // of.tile)
        line = of.along[2].axis.coarse
        total = of.filled_s(sizes) + of.lines_s(coarse, min(FEW, line), line, of.channels[1])
        packed = self.largest_product > LARGEST
        for one in of.products:
            pieces = self.pieces(one.shape[2])
            product_s = lines_s(of.rows, one.shape[2] / pieces, sizes.row // tiles, steps=0, aligned=True)
            each = lines * tiles * pieces * product_s
            if packed:
                each += lines * packed_lines_s(one.shape[2] * sizes.row)
            values = lines * tiles * of.rows * one.shape[2]
            total += each + 2 * pass_s(values, of.rows * one.shape[2])
        return of.count * total

    @property
    def reason(self) -> str:
        return f"products of lines of columns of {self.of.deep} taps and channels"

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        of = self.of
        workspace.reset()
        views = _Views(self, workspace)
        views.sums[...] = 0
        summed = workspace.scratch(views.sums.shape, views.sums.dtype)
        for batch, free, behind in product(range(self.problem.batch), *of.cuts):
            spans = [free, behind, (0, of.along[2].count)]
            block = views.of(of.sizes(free[1] - free[0], behind[1] - behind[0]))
            of.fill(block.block, operands.value, batch, spans)
            self._fill(block, operands.filter, batch, spans)
            for step in block.block.steps:
                for to, source in step.copies:
                    np.copyto(to, source)
            workspace.mark("pack")
            for one, (columns, found) in zip(of.products, block.products, strict=True):
                np.matmul(block.coarse, columns, out=found)
                sums = views.sums[one.weights].reshape(found.shape[0], *found.shape[3:])
                np.add.reduce(found, axis=(1, 2), out=summed[one.weights].reshape(sums.shape))
                np.add(sums, summed[one.weights].reshape(sums.shape), out=sums)
            workspace.mark("gemm")
        self._store(views.sums, operands.output, workspace)
        workspace.mark("store")

    def _fill(self, block: _Block, coarse: Array, batch: int, spans: list[Range]) -> None:
        """Copy the coarse lines of a block, with zeros between them."""
        of = self.of
        free, behind, last = spans
        coarse = of.seen(coarse, of_result=True)[batch][slice(*free), :, slice(*last)]
        by_group = coarse.reshape(*coarse.shape[:3], of.own_groups, of.channels[1])
        block.lines[...] = 0
        for row, (q, at) in of.along[1].places(behind).items():
            np.copyto(block.positions[row][:, q], by_group[:, at], casting="unsafe")

    def _store(self, sums: Array, output: Array, workspace: Workspace) -> None:
        """Store the sums of each product in the taps it is of; those that meet nothing are 0."""
        of, (taken, given) = self.of, self.of.channels
        kernel, groups, behind = output.shape[:3], of.own_groups, of.along[1]
        taps = output.reshape(*kernel, taken, groups, given)
        output[...] = 0
        axes = [order(self.problem.axes)[i] for i in of.taken]
        taps = taps.transpose(*axes, 4, 5, 3)  # [free tap, next, last, group, coarse channel, fine channel]
        for one in of.products:
            pieces = self.pieces(one.shape[2])
            found = sums[one.weights].reshape(groups, pieces, of.rows, -1).swapaxes(1, 2)[:, : of.stacked * given]
            together = workspace.scratch(found.shape, found.dtype)
            np.copyto(together, found)
            sizes = [len(of_axis) for of_axis in (one.run.taps, *one.taps)]
            found = together.reshape(groups, of.stacked, given, *sizes, taken).transpose(1, 3, 4, 5, 0, 2, 6)
            where = np.ix_(one.run.taps, *one.taps)
            if isinstance(behind, Stacked):
                # What neighbouring results have of a tap is added up.
                where = np.ix_(one.run.taps, range(kernel[axes[1]]), one.taps[1])
                by_tap = workspace.scratch((sizes[0], kernel[axes[1]], *found.shape[3:]), found.dtype)
                by_tap[...] = 0
                for row, (at, of_row) in enumerate(behind.weights):
                    np.add(by_tap[:, of_row], found[row, :, at], out=by_tap[:, of_row])
                found = by_tap[np.newaxis]
            rounded = workspace.scratch(found.shape[1:], output.dtype)
            store(rounded, found[0])
            taps[where] = rounded


class _Block:
    """What blocks of some sizes see of a workspace: that of the convolution, coarse lines, and of each product."""

    def __init__(self, of: MecGradient, sizes: Sizes, workspace: Workspace) -> None:
        mec = of.of
        self.block = Block(mec, sizes, workspace)
        tiles = -(-sizes.row // mec.tile)
        each = sizes.row // tiles
        groups, free, rows = mec.own_groups, sizes.free, mec.rows
        self.lines = workspace.take(groups, free, rows, sizes.row)
        parts = workspace.take(groups * free * rows * tiles * mec.deep)
        given = mec.channels[1]
        self.positions = [
            by_position(mec, sizes, self.lines[:, :, row * given : (row + 1) * given]) for row in range(mec.stacked)
        ]
        # [group, line, tile, 1, row, position]
        self.coarse = self.lines.reshape(groups, free, rows, tiles, 1, each).transpose(0, 1, 3, 4, 2, 5)
        self.products: list[tuple[Array, Array]] = []
        columns = [array for step in self.block.steps for of_slot in step.columns for array in of_slot]
        for one, array in zip(mec.products, columns, strict=True):
            pieces = of.pieces(one.shape[2])
            # Columns are [group, line, tile, k, position].
            cut = array.reshape(*array.shape[:3], pieces, -1, each).swapaxes(-1, -2)
            shape = groups, free, tiles, pieces, rows, one.shape[2] // pieces
            self.products.append((cut, parts[: math.prod(shape)].reshape(shape)))


class _Views:
    """The sums, and behind them what is seen of the rest by the sizes of blocks."""

    def __init__(self, of: MecGradient, workspace: Workspace) -> None:
        self._of, self._workspace = of, workspace
        self.sums = workspace.take(of.of.packed_values)
        self._found: dict[Sizes, _Block] = {}

    def of(self, sizes: Sizes) -> _Block:
        """Return what a block sees."""
        found = self._found.get(sizes)
        if found is None:
            self._workspace.reset()
            self._workspace.take(self.sums.size)
            found = self._found[sizes] = _Block(self._of, sizes, self._workspace)
        return found


def schedules(problem: Problem) -> list[MecGradient]:
    """Return the schedules that are weighed: those of the convolution."""
    found = candidates(replace(problem, operation="conv3d"))
    return [MecGradient(replace(one.problem, operation=problem.operation), one) for one in found]


def schedule(problem: Problem, machine: Machine) -> MecGradient:
    """Choose a schedule for a problem by cost, or raise CannotLowerError where its blocks are too large."""
    text = f"{problem.operation}: algorithm='mec' cannot do this problem: its blocks"
    return best_that_fits(schedules(problem), machine, text, "'im2col' and 'auto'")
