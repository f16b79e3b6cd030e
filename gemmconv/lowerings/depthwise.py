"""No GEMM: each tap multiplies whole runs of lines and adds them, where a result's channel sees one channel only.

A product of matrices of one row and one column is none. With as many groups as channels the values of neighbouring
channels and positions are multiplied by weights beside each other. A block's lines are copied to a grid with zeros
around them, one for each phase where fine lines are gathered, so that every tap is another start in it. The starts of
taps of a phase are evenly apart, so NumPy's einsum adds all of them up in one step, a row of about two thousand values
at a time, for which weights are repeated. Sums have the lines of the grid, and what is between lines is not stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from gemmconv.lowerings.base import Array, CannotLowerError, Operands, Usual, Workspace, aligned, canonical, five
from gemmconv.lowerings.boxes import Bounds, Cut, Range, digit, each, evenly, located
from gemmconv.lowerings.copies import copy, store
from gemmconv.lowerings.cost import SMALLEST_BUFFER, best_that_fits, copy_s, pass_s, weighed_s
from gemmconv.lowerings.phases import Along, slots, unreached
from gemmconv.lowerings.recorder import step
from gemmconv.machine import Machine
from gemmconv.problem import Problem

# Positions of a block that are weighed, and values of a row of weights.
_POSITIONS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_LONG_ROW = 2048


class Taps(NamedTuple):
    """Taps of an axis that read the same phase of the grid, evenly apart: which, and from where."""

    phase: int
    which: slice
    start: int
    apart: int
    many: int


@dataclass(frozen=True, slots=True)
class Depthwise(Usual):
    """A schedule; see the module. `problem` has all groups as one, and the filter is taken as it is given."""

    problem: Problem
    own_groups: int
    along: tuple[Along, Along, Along]
    gaps: bool
    cuts: tuple[Cut, Cut, Cut]  # of q in depth, height and width: positions of a convolution's result
    repeats: int  # channels of the result that see the same channel

    wants_finite_filter = True
    largest_product = 0

    @property
    def gathers(self) -> bool:
        """Whether it is a convolution."""
        return self.problem.operation == "conv3d"

    @property
    def channels(self) -> int:
        """Channels of the result, and of the grid."""
        return self.problem.cin if self.gathers else self.problem.cout

    @property
    def count(self) -> int:
        return self.problem.batch * math.prod(map(len, self.cuts))

    @property
    def digits(self) -> list[list[Bounds]]:
        found = [digit(0, each(self.problem.batch))]
        for i, (along, cut) in enumerate(zip(self.along, self.cuts, strict=True), 1):
            found.append(digit(i, map(along.span, cut)))
        return found

    def block(self, index: int) -> tuple[int, tuple[Range, Range, Range]]:
        """Return a block: batch entry and q."""
        batch, (depth, height, width) = located(index, self.cuts)
        return batch, (depth, height, width)

    @property
    def _together(self) -> int:
        """Rows of sums that meet one row of weights."""
        return max(1, _LONG_ROW // self.channels) if self.problem.layout == "NDHWC" else 1

    def grid(self, q: Sequence[int]) -> tuple[int, int, int]:
        """Return the positions of a phase of the grid of a block."""
        d, h, w = (n + along.reach for n, along in zip(q, self.along, strict=True))
        return d, h, w

    def rows(self, q: Sequence[int]) -> tuple[int, int]:
        """Return the rows of the sums of a slot, and of a phase of the grid with those that runs need behind it."""
        depth, height, width = self.grid(q)
        lines = (q[0] - 1) * height + q[1]
        rows = -(-lines * width // self._together) * self._together
        return rows, depth * height * width + rows - lines * width + self.along[2].reach

    @property
    def _many(self) -> tuple[int, int]:
        """Phases of the grid, and slots of the sums."""
        phases, many = zip(*((len(along.offsets), len(along.taps)) for along in self.along), strict=True)
        return math.prod(phases), max(1, math.prod(many))

    @property
    def workspace_bytes(self) -> int:
        (rows, grid), (phases, many) = self.rows([cut.longest for cut in self.cuts]), self._many
        item = self.problem.compute_dtype.itemsize
        return sum(aligned(n * self.channels * item) for n in (phases * grid, many * rows, rows))

    @property
    def packed_values(self) -> int:
        return math.prod(self.problem.kernel) * self.channels * self._together

    def pack(self, filter: Array, packed: Array) -> None:
        """Lay the weights of each tap out by the result's channels, as often as they meet a row of sums."""
        taps = math.prod(self.problem.kernel)
        of_tap = filter.reshape(taps, *filter.shape[3:])
        weights = of_tap if self.gathers else of_tap.swapaxes(1, 2)
        to = packed.reshape(taps, self._together, self.channels)
        np.copyto(to, weights.reshape(taps, 1, self.channels), casting="unsafe")

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core; see cost.py."""
        longest = [cut.longest for cut in self.cuts]
        (rows, grid), (phases, many) = self.rows(longest), self._many
        values = rows * self.channels
        run = self.channels * self._together if self.problem.layout == "NDHWC" else rows
        steps = sum(math.prod(map(len, of_slots)) for of_slots in product(*map(self._taps, self.along)))
        taps = math.prod(sum(map(len, along.taps)) for along in self.along)
        # Runs so long are as fast from the cache behind L2.
        total = weighed_s(taps * values, run, steps=steps) + max(0, steps - many) * pass_s(values, run)
        strided = self.problem.layout == "NCDHW" and self.along[2].axis.stride > 1
        line = self.channels if self.along[2].axis.stride > 1 else self.channels * longest[2]
        filled, stored = phases * grid * self.channels, many * values
        total += copy_s(filled, filled) + copy_s(filled, line, steps=phases, spilled=True, strided=strided)
        total += copy_s(stored, line, steps=many, spilled=True, strided=strided)
        return self.count * total

    @property
    def reason(self) -> str:
        rows, _ = self.rows([cut.longest for cut in self.cuts])
        return f"runs of {rows} rows times the weights of their taps, added up"

    def _taps(self, along: Along) -> list[list[Taps]]:
        """Return of each slot of an axis the taps that land somewhere, together those that one step takes."""
        # Of lines of one channel einsum would take neighbouring taps, not positions, for its inner loop.
        alone = along is self.along[2] and self.problem.layout == "NCDHW"
        found = []
        for taps in along.taps:
            parts = [[tap] for tap in taps] if alone else [list(part) for _, part in groupby(taps, key=itemgetter(0))]
            columns = [tuple(zip(*part, strict=True)) for part in parts]
            found.append([
                Taps(phases[0], evenly(which), starts[0], starts[1] - starts[0] if len(starts) > 1 else 0, len(starts))
                for phases, starts, which in columns
            ])  # fmt: skip
        return found

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.buffer(SMALLEST_BUFFER)
        workspace.reset()
        problem, channels = self.problem, self.channels
        channels_first = problem.layout == "NCDHW"
        batch, spans = self.block(index)
        q = [stop - start for start, stop in spans]
        (rows, length), (phases, many) = self.rows(q), self._many
        # With channels first [channel, row], otherwise [row, channel].
        shapes = [(n, channels, m) if channels_first else (n, m, channels) for n, m in ((phases, length), (many, rows))]
        grid, sums = (workspace.take(*shape) for shape in shapes)
        products = workspace.take(*shapes[1][1:])
        self._fill(grid, operands.value, batch, spans)
        workspace.mark("pack")
        weights = operands.packed.reshape(*(along.axis.kernel for along in self.along), -1)
        # [channel, tap, row], or [rows, tap, row and channel].
        weights = np.moveaxis(weights, -1, 0)[..., np.newaxis] if channels_first else weights[np.newaxis]
        for slot, of_slots in enumerate(product(*map(self._taps, self.along))):
            # Sums of products that are -0.0 are +0.0, as they begin with 0.
            begun = operands.bias is not None or not all(of_slots)
            if begun:
                sums[slot] = operands.start((0, channels), 1 if channels_first else 0)
            for taps in product(*of_slots):
                windows = self._windows(grid, rows, q, taps)
                to = products if begun else sums[slot]
                weigh(windows, weights[:, *(along.which for along in taps)], to.reshape(len(windows), -1))
                if begun:
                    np.add(sums[slot], products, out=sums[slot])
                begun = True
        workspace.mark("gemm")
        self._store(sums, operands, batch, spans)
        workspace.mark("store")

    def _windows(self, grid: Array, rows: int, q: Sequence[int], taps: Sequence[Taps]) -> Array:
        """View a phase of the grid as what taps read of it: [channel, tap, row], or [rows, tap, row and channel]."""
        phases = [len(along.offsets) for along in self.along]
        source = grid[np.ravel_multi_index([of.phase for of in taps], phases)]
        _, height, width = self.grid(q)
        apart = height * width, width, 1  # rows
        if self.problem.layout == "NCDHW":
            row, inner, outer = 1, rows, (self.channels, source.shape[1])
        else:
            row, inner = self.channels, self._together * self.channels
            outer = rows // self._together, inner
        start = sum(of.start * n for of, n in zip(taps, apart, strict=True))
        steps = (outer[1], *(of.apart * n * row for of, n in zip(taps, apart, strict=True)), 1)
        shape, strides = (outer[0], *(of.many for of in taps), inner), [n * source.itemsize for n in steps]
        return np.lib.stride_tricks.as_strided(source.reshape(-1)[start * row :], shape, strides, subok=True)

    def _by_position(self, rows: Array, sizes: Sequence[int]) -> Array:
        """View rows as [depth, height, width, channel]."""
        used = math.prod(sizes)
        if self.problem.layout == "NCDHW":
            return np.moveaxis(rows[:, :used].reshape(-1, *sizes), 0, 3)
        return rows[:used].reshape(*sizes, -1)

    def _fill(self, grid: Array, value: Array, batch: int, spans: Sequence[Range]) -> None:
        """Copy the lines that a block needs to its grid, with zeros around them."""
        problem, sizes = self.problem, self.grid([stop - start for start, stop in spans])
        given = problem.cout if self.gathers else problem.cin
        array = five(problem.layout, value, problem.batch, [along.given for along in self.along], given)[batch]
        grid[...] = 0
        for rows, at in zip(grid, product(*(along.offsets for along in self.along)), strict=True):
            met = zip(self.along, at, spans, sizes, strict=True)
            to, source = zip(*(along.met(offset, q, size) for along, offset, (q, _), size in met), strict=True)
            target = self._by_position(rows, sizes)[to]
            if 0 not in target.shape:
                part = array[source][tuple(slice(n) for n in target.shape[:3])]
                repeated = target.reshape(*target.shape[:3], given, self.repeats)
                copy(*((target, part) if self.repeats == 1 else (repeated, part[..., None])))

    def _store(self, sums: Array, operands: Operands, batch: int, spans: Sequence[Range]) -> None:
        """Store the sums where they belong."""
        problem = self.problem
        sizes = [stop - start for start, stop in spans]
        _, height, width = self.grid(sizes)
        result = [along.axis.coarse if self.gathers else along.axis.fine for along in self.along]
        output = five(problem.layout, operands.output, problem.batch, result, self.channels)[batch]
        if self.gaps:
            region = tuple(slice(*along.span(q)) for along, q in zip(self.along, spans, strict=True))
            output[region] = operands.start((0, self.channels))
        many = [len(along.taps) for along in self.along]
        places = (along.places(q).items() for along, q in zip(self.along, spans, strict=True))
        for (i, (q_d, d)), (j, (q_h, h)), (k, (q_w, w)) in product(*places):
            lines = self._lines(sums[(i * many[1] + j) * many[2] + k], sizes, height, width)
            store(output[d, h, w], lines[q_d, q_h, q_w])

    def _lines(self, rows: Array, q: Sequence[int], height: int, width: int) -> Array:
        """View the sums of a slot as [depth, height, width, channel], without what lies between lines."""
        item = rows.itemsize
        row, channel = (item, rows.strides[0]) if self.problem.layout == "NCDHW" else (rows.strides[0], item)
        strides = height * width * row, width * row, row, channel
        return np.lib.stride_tricks.as_strided(rows, (*q, self.channels), strides, subok=True)


@step
def weigh(windows: Array, weights: Array, sums: Array) -> None:
    """Write the sums of what taps read, [outer, tap, tap, tap, inner], times their weights."""
    np.einsum("oabci,oabci->oi", windows, weights, out=sums)


def schedule(problem: Problem, machine: Machine) -> Depthwise:
    """Choose the blocks for a problem by cost, or raise CannotLowerError where channels see more than one."""
    gathers = problem.operation == "conv3d"
    seen, repeats = (problem.cout, problem.cin) if gathers else (problem.cin, problem.cout)
    text = f"{problem.operation}: algorithm='depthwise' cannot do this problem:"
    others = "'im2col' and 'auto'" if gathers else "'col2im' and 'auto'"
    if problem.groups == 1 or seen > 1:
        raise CannotLowerError(
            f"{text} it needs several groups of one channel, got {problem.groups} of {seen}; {others} can"
        )
    whole = replace(problem, groups=1, cin=problem.pitch, cout=problem.cout * problem.groups)
    depth, height, width = (Along(axis, slots(axis, tiled=False), gathers) for axis in canonical(problem.axes))
    along = depth, height, width
    counts = [of.count for of in along]
    gaps = not gathers and any(unreached(of.axis, of.of_axis) for of in along)

    def candidate(positions: int) -> Depthwise:
        chunks = (positions // (counts[1] * counts[2]), positions // counts[2], positions)
        d, h, w = (Cut(n, min(n, max(1, chunk))) for n, chunk in zip(counts, chunks, strict=True))
        return Depthwise(whole, problem.groups, along, gaps, (d, h, w), repeats)

    found = [candidate(n) for n in sorted({min(n, math.prod(counts)) for n in _POSITIONS})]
    return best_that_fits(found, machine, f"{text} its blocks", others)
