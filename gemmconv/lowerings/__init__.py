"""Ways to lower a problem to GEMM: one module each, with `schedule(problem, machine)`; plan.py chooses among them."""

from __future__ import annotations

from collections.abc import Callable

from gemmconv.lowerings import (
    col2im,
    depthwise,
    exact,
    gradient,
    im2col,
    kn2row,
    landed,
    mec,
    mec_gradient,
    winograd,
    winograd_conv,
    winograd_gradient,
)
from gemmconv.lowerings.base import CannotLowerError, NotFiniteError, Operands, Schedule, Workspace
from gemmconv.machine import Machine
from gemmconv.problem import Problem

# By operation; each raises CannotLowerError for a problem it cannot do.
LOWERINGS: dict[str, dict[str, Callable[[Problem, Machine], Schedule]]] = {
    "conv3d_transpose": {
        "col2im": col2im.schedule,
        "kn2row": kn2row.schedule,
        "winograd": winograd.schedule,
        "mec": mec.schedule,
        "depthwise": depthwise.schedule,
    },
    "conv3d": {
        "im2col": im2col.schedule,
        "kn2row": landed.schedule,
        "winograd": winograd_conv.schedule,
        "mec": mec.schedule,
        "depthwise": depthwise.schedule,
    },
    "conv3d_backprop_filter": {
        "im2col": gradient.schedule,
        "winograd": winograd_gradient.schedule,
        "mec": mec_gradient.schedule,
    },
}
# Those that do groups by their own filters, and those that do nothing else: without groups they are not told of.
OF_GROUPS, GROUPS_ONLY = {"mec", "depthwise"}, {"depthwise"}
# What can do every problem of an operation with any data.
COMPLETE: dict[str, Callable[[Problem, Machine], Schedule]] = {
    "conv3d_transpose": col2im.schedule, "conv3d": exact.schedule, "conv3d_backprop_filter": exact.schedule,
}  # fmt: skip

__all__ = [
    "COMPLETE",
    "GROUPS_ONLY",
    "LOWERINGS",
    "OF_GROUPS",
    "CannotLowerError",
    "NotFiniteError",
    "Operands",
    "Schedule",
    "Workspace",
]
