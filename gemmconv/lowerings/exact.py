"""Tap by tap with just the rows that land: for convolutions and gradients of operands that are not finite.

im2col multiplies the zeros of the padding with the filter, or with the coarse rows of a gradient, and zero times Inf is
NaN. Here nothing is padded, so Inf and NaN reach what they reach by definition. It is slow, and for such data only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from gemmconv.lowerings.base import Array, AsItLies, Operands, Workspace, aligned, five
from gemmconv.lowerings.boxes import Bounds, Index
from gemmconv.lowerings.copies import store
from gemmconv.lowerings.phases import reached
from gemmconv.machine import Machine
from gemmconv.problem import Problem

# More than any product for which BLAS is known to use one thread.
_ANY = 1 << 62


@dataclass(frozen=True, slots=True)
class Exact(AsItLies):
    """A schedule; see the module. A block is a plane of the result of a convolution, or a tap of a gradient."""

    problem: Problem

    @property
    def gathers(self) -> bool:
        """Whether it is a convolution, not a gradient."""
        return self.problem.operation == "conv3d"

    @property
    def count(self) -> int:
        return self.problem.batch * self.problem.coarse[0] if self.gathers else math.prod(self.problem.kernel)

    @property
    def digits(self) -> list[list[Bounds]]:
        return [[()] * self.count]  # it does parts by themselves

    @property
    def largest_product(self) -> int:
        # NumPy hands products of a single row or column to gemv and dot, for which BLAS has threads much sooner.
        return _ANY

    @property
    def workspace_bytes(self) -> int:
        rows = math.prod(self.problem.coarse[1:]) if self.gathers else self.problem.cout
        return aligned(rows * self.problem.cin * self.problem.compute_dtype.itemsize)

    @property
    def reason(self) -> str:
        return "tap by tap, with the rows that land"

    def time_s(self, machine: Machine) -> float:
        """Return infinity: it is never taken for its speed."""
        return math.inf

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        workspace.reset()
        p = self.problem
        fine = five(p.layout, operands.value, p.batch, p.fine, p.cout)
        if not self.gathers:
            tap = tuple(int(i) for i in np.unravel_index(index, p.kernel))
            coarse = five(p.layout, operands.filter, p.batch, p.coarse, p.cin)
            gradient = workspace.take(p.cout, p.cin)
            gradient[...] = 0
            for b, d in product(range(p.batch), range(p.coarse[0])):
                to, source = self._lands(tap, d)
                x = self._wide(fine[b][source]).reshape(-1, p.cout)
                if x.size:
                    gradient += x.T @ self._wide(coarse[b, d][to]).reshape(-1, p.cin)
            store(operands.output[tap], gradient)
            return
        batch, plane = divmod(index, p.coarse[0])
        sums = workspace.take(*p.coarse[1:], p.cin)
        sums[...] = operands.start((0, p.cin))
        for tap in product(*map(range, p.kernel)):
            to, source = self._lands(tap, plane)
            x = self._wide(fine[batch][source])
            if x.size:
                sums[to] += (x @ self._wide(operands.filter[tap]))[0]
        store(five(p.layout, operands.output, p.batch, p.coarse, p.cin)[batch, plane], sums)

    def _wide(self, array: Array) -> Array:
        """Return a copy without gaps in the dtype of the sums."""
        return np.array(array, self.problem.compute_dtype, order="C")

    def _lands(self, tap: Sequence[int], plane: int) -> tuple[Index, Index]:
        """Return which positions of a coarse plane a tap gathers for, and the fine positions it gathers, if any."""
        rows = (plane, plane + 1), *((0, size) for size in self.problem.coarse[1:])
        to, source = zip(*map(reached, self.problem.axes, tap, rows), strict=True)
        return to[1:], source


def schedule(problem: Problem, machine: Machine) -> Exact:
    """Return the one schedule there is."""
    return Exact(problem)
