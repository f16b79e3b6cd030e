"""A convolution of stride 1 as the transposed convolution it equals, of the mirrored filter.

Tap a gathers y[i + a*dilation - lo] for position i, so y[j] reaches i = j - a*dilation + lo. With a' = k-1-a that is
j + a'*dilation - lo' for lo' = (k-1)*dilation - lo: the scatter of a transposed convolution.
"""

from __future__ import annotations

from dataclasses import replace

from gemmconv.problem import Axis, Problem


def twin(problem: Problem) -> Problem:
    """Return the transposed convolution that equals a convolution of stride 1."""
    d, h, w = (_twin(axis) for axis in problem.axes)
    return replace(problem, operation="conv3d_transpose", cin=problem.cout, cout=problem.cin, axes=(d, h, w))


def _twin(axis: Axis) -> Axis:
    return Axis(axis.fine, axis.coarse, axis.kernel, 1, axis.dilation, (axis.kernel - 1) * axis.dilation - axis.lo)
