"""col2im: GEMM into a column buffer in cache, folded into the output by vectorized additions.

The lowering the package is named for: always complete, always selectable. It has four orders of work with the same
products: a tap at a time for whole blocks (`by_taps`), all taps at a time for some rows (`by_rows`), the same for whole
lines, which are added as one (`by_planes`), and where nothing overlaps all taps at a time in the output (`in_place`).
"""

from __future__ import annotations

from contextlib import suppress

from gemmconv.lowerings import by_planes, by_rows, by_taps, in_place
from gemmconv.lowerings.base import CannotLowerError, Schedule
from gemmconv.lowerings.cost import best
from gemmconv.machine import Machine
from gemmconv.problem import Problem


def schedule(problem: Problem, machine: Machine) -> Schedule:
    """Return how col2im does a problem: in the order of work that is estimated to be better."""
    found: list[Schedule] = [by_taps.schedule(problem, machine), by_rows.schedule(problem, machine)]
    for other in (by_planes, in_place):
        with suppress(CannotLowerError):
            found.append(other.schedule(problem, machine))
    return best(found, machine)
