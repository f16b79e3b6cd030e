"""An axis whose neighbouring results are rows of one product, for results of a single channel or a few.

BLAS forms four rows in the time of one. Results ``q * rows + row`` read the operand from ``q * step`` on, and what one
of them reads and another one does not is multiplied by 0: a product then has `rows` times the rows, and of what they
read together far less is copied than of what each reads by itself. The operand lies in `step` phases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from gemmconv.lowerings.boxes import Range, evenly
from gemmconv.lowerings.phases import met
from gemmconv.problem import Axis


@dataclass(frozen=True)
class Stacked:
    """An axis without dilation as it is read and written; of a transposed convolution `rows` is a multiple of stride.

    It can be asked as `phases.Along`, but the taps of its only slot are positions that are read, of all rows.
    """

    axis: Axis
    gathers: bool
    rows: int

    @cached_property
    def step(self) -> int:
        """Positions of the operand from those of a q to those of the next."""
        return self.rows * self.axis.stride if self.gathers else self.rows // self.axis.stride

    @property
    def given(self) -> int:
        """Positions of the operand."""
        return self.axis.fine if self.gathers else self.axis.coarse

    @property
    def results(self) -> int:
        """Positions of the result."""
        return self.axis.coarse if self.gathers else self.axis.fine

    @property
    def count(self) -> int:
        """Positions q."""
        return -(-self.results // self.rows)

    @cached_property
    def _reads(self) -> list[list[tuple[int, int]]]:
        """Of each row its taps and what they read, counted from the first position of q."""
        axis, found = self.axis, []
        for row in range(self.rows):
            if self.gathers:
                found.append([(tap, row * axis.stride + tap - axis.lo) for tap in range(axis.kernel)])
            else:
                fine = ((tap, row + axis.lo - tap) for tap in range(axis.kernel))
                found.append([(tap, at // axis.stride) for tap, at in fine if at % axis.stride == 0])
        return found

    @cached_property
    def _span(self) -> Range:
        """The first position that any row reads, and the one behind the last."""
        every = [at for of_row in self._reads for _, at in of_row]
        return min(every), max(every) + 1

    @cached_property
    def _low(self) -> int:
        return self._span[0] // self.step

    @cached_property
    def reach(self) -> int:
        """How many more positions a phase of the grid has than q."""
        return (self._span[1] - 1) // self.step - self._low

    @property
    def beyond(self) -> int:
        """How many strides or rows of the operand blocks read at most that no result of theirs needs."""
        return 2 * (self.rows if self.gathers else self.step)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where the phases of the grid lie in the operand."""
        return tuple(sorted({at % self.step for at in range(*self._span)}))

    @cached_property
    def taps(self) -> list[list[tuple[int, int, int]]]:
        """Of the only slot what it reads: the phase of the grid, from where, and which it is."""
        first, stop = self._span
        phase = {offset: i for i, offset in enumerate(self.offsets)}
        return [[(phase[at % self.step], at // self.step - self._low, at - first) for at in range(first, stop)]]

    @cached_property
    def weights(self) -> list[tuple[slice, slice]]:
        """Of each row which of those have a tap, and which taps."""
        first = self._span[0]
        found = []
        for of_row in self._reads:
            by_place = sorted((at - first, tap) for tap, at in of_row)
            places, taps = zip(*by_place, strict=True) if by_place else ((), ())
            found.append((evenly(places), evenly(taps)) if by_place else (slice(0), slice(0)))
        return found

    def met(self, offset: int, q: int, size: int) -> tuple[slice, slice]:
        """As `phases.Along.met`."""
        return met(self.step, self.given, offset, q + self._low, size)

    def places(self, q: Range) -> dict[int, tuple[slice, slice]]:
        """Return of each row in the result which positions of a block are, and where."""
        found = {}
        for row in range(self.rows):
            stop = min(q[1], -((row - self.results) // self.rows))
            if q[0] < stop:
                found[row] = slice(0, stop - q[0]), slice(q[0] * self.rows + row, stop * self.rows, self.rows)
        return found

    def span(self, q: Range) -> Range:
        """Return what a block covers of the result."""
        return q[0] * self.rows, min(self.results, q[1] * self.rows)
