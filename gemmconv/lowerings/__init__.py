"""Ways to lower a problem to GEMM: one module each, with `schedule(problem, machine)`; plan.py chooses among them."""

from __future__ import annotations

from collections.abc import Callable

from gemmconv.lowerings import col2im, kn2row, winograd
from gemmconv.lowerings.base import CannotLowerError, NotFiniteError, Operands, Schedule, Workspace
from gemmconv.machine import Machine
from gemmconv.problem import Problem

# Each raises CannotLowerError for a problem it cannot do; col2im can do all.
LOWERINGS: dict[str, Callable[[Problem, Machine], Schedule]] = {
    "col2im": col2im.schedule,
    "kn2row": kn2row.schedule,
    "winograd": winograd.schedule,
}

__all__ = ["LOWERINGS", "CannotLowerError", "NotFiniteError", "Operands", "Schedule", "Workspace"]
