"""A convolution of stride 1 as the transposed convolution it equals, of the mirrored filter.

Tap a gathers y[i + a*dilation - lo] for position i, so y[j] reaches i = j - a*dilation + lo. With a' = k-1-a that is
j + a'*dilation - lo' for lo' = (k-1)*dilation - lo: the scatter of a transposed convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from gemmconv.lowerings.base import CannotLowerError, Schedule
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem

S = TypeVar("S", bound=Schedule)


def turned(schedule: Callable[[Problem, Machine], S]) -> Callable[[Problem, Machine], S]:
    """Return `schedule` for convolutions: it schedules their twins, whose filter running.py mirrors."""

    def for_twin(problem: Problem, machine: Machine) -> S:
        strides = [axis.stride for axis in problem.axes]
        if max(strides) > 1:
            raise CannotLowerError(
                f"{problem.operation}: algorithm='winograd' cannot do this problem: only strides of 1 make it a "
                f"transposed convolution, got {'x'.join(map(str, strides))}; 'im2col' and 'auto' can"
            )
        other = twin(problem)
        try:
            return schedule(other, machine)
        except CannotLowerError as error:
            text = str(error).replace(other.operation, problem.operation).replace("'col2im'", "'im2col'")
            raise CannotLowerError(text) from None

    return for_twin


def twin(problem: Problem) -> Problem:
    """Return the transposed convolution that equals a convolution of stride 1."""
    d, h, w = (_twin(axis) for axis in problem.axes)
    return replace(problem, operation="conv3d_transpose", cin=problem.cout, cout=problem.cin, axes=(d, h, w))


def _twin(axis: Axis) -> Axis:
    return Axis(axis.fine, axis.coarse, axis.kernel, 1, axis.dilation, (axis.kernel - 1) * axis.dilation - axis.lo)
