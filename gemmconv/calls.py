"""From a checked problem to its result: the one way in which every front end runs the engine.

Arrays of one or two spatial axes are seen as such of three, whose first have size one; nothing is copied for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gemmconv import arrays, threads
from gemmconv.arguments import one_of
from gemmconv.arrays import Array
from gemmconv.lowerings import CannotLowerError
from gemmconv.machine import this_machine
from gemmconv.plan import ALGORITHMS, Plan, make_plan
from gemmconv.problem import Problem


def plan(function: str, asked: Problem, algorithm: str = "auto", workers: int | None = None) -> Plan:
    """Return the plan of a problem; `function` is named where an argument is refused."""
    algorithm = one_of(function, "algorithm", algorithm, ALGORITHMS[asked.operation])
    try:
        return make_plan(asked, this_machine(), algorithm, threads.resolve_workers(workers, function))
    except CannotLowerError as error:  # in the name of the caller's function
        raise CannotLowerError(f"{function}: {str(error).partition(': ')[2]}") from None


class Described(NamedTuple):
    """What would be computed of operands that are not read yet."""

    plan: Plan
    rank: int
    operands: tuple[Array, Array]


def compute(
    function: str,
    asked: Problem,
    first: Array,
    second: Array,
    *,
    rank: int = 3,
    bias: Array | None = None,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """Return the result for operands of `rank` spatial axes, which `asked` describes with three.

    `bias` is one number for each channel of the result, in its dtype.
    """
    made = plan(function, asked, algorithm, workers)
    if isinstance(first, arrays.Unread) or isinstance(second, arrays.Unread):
        return Described(made, rank, (first, second))  # type: ignore[return-value]  # just for gemmconv.dask, which asks for it
    if rank == 3:
        return made.execute(function, first, second, out, bias=bias)
    x, w = (array.reshape(shape) for array, shape in zip((first, second), asked.operand_shapes, strict=True))
    shape = lowered(asked, asked.roles[2], rank)
    target = None if out is None else arrays.check_out(function, out, shape, asked.dtype)
    lifted = None if target is None else np.expand_dims(target, ones(asked, asked.roles[2], rank))
    result = made.execute(function, x, w, lifted, bias=bias)
    return result.reshape(shape) if out is None else out


def ones(asked: Problem, role: str, rank: int) -> tuple[int, ...]:
    """Return which axes of an array have size one since its problem has fewer than three spatial axes."""
    first = 0 if role == "filter" else 1 if asked.layout == "NDHWC" else 2
    return tuple(range(first, first + 3 - rank))


def lowered(asked: Problem, role: str, rank: int) -> tuple[int, ...]:
    """Return the shape that an array has for the caller."""
    without = ones(asked, role, rank)
    return tuple(size for i, size in enumerate(asked.shape_of(role)) if i not in without)
