"""col2im: GEMM into a column buffer in cache, folded into the output by vectorized additions.

The lowering the package is named for: always complete, always selectable. It has two orders of work with the same
products: a tap at a time for whole blocks (`by_taps`), and all taps at a time for some rows (`by_rows`).
"""

from __future__ import annotations

from gemmconv.lowerings import by_rows, by_taps
from gemmconv.lowerings.base import Schedule
from gemmconv.lowerings.cost import best
from gemmconv.machine import Machine
from gemmconv.problem import Problem


def schedule(problem: Problem, machine: Machine) -> Schedule:
    """Return how col2im does a problem: in the order of work that is estimated to be better."""
    found: list[Schedule] = [by_taps.schedule(problem, machine), by_rows.schedule(problem, machine)]
    return best(found, machine)
