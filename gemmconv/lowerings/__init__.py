"""Ways to lower a problem to GEMM: one module each, with `schedule(problem, machine)`; plan.py chooses among them."""

from __future__ import annotations

from collections.abc import Callable

from gemmconv.lowerings import col2im
from gemmconv.lowerings.base import Operands, Schedule, Workspace
from gemmconv.machine import Machine
from gemmconv.problem import Problem

LOWERINGS: dict[str, Callable[[Problem, Machine], Schedule]] = {"col2im": col2im.schedule}

__all__ = ["LOWERINGS", "Operands", "Schedule", "Workspace"]
