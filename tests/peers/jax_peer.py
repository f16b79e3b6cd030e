"""Compare gemmconv with JAX: a convolution of the input dilated by the stride, with the filter flipped."""

from __future__ import annotations

import sys

import jax
import numpy as np
from common import Problem, Report, draw_problems, finish_problems, named_dtype, parse_arguments

DTYPES = ("float32", "float32", "float64", "float16", "bfloat16", "complex64", "complex128")


def compute(problem: Problem, value: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Half precisions are widened before and rounded after, so that this side too rounds once."""
    padding = []
    for axis in problem.axes:
        dilated = (axis.n - 1) * axis.s + 1 if axis.n else 0
        front = axis.span - 1 - axis.pad_front(problem.padding)
        padding.append((front, axis.o - dilated - front + axis.span - 1))
    narrow = value.dtype
    if narrow.itemsize == 2:
        value, weights = value.astype(np.float32), weights.astype(np.float32)
    result = jax.lax.conv_general_dilated(
        value,
        weights[::-1, ::-1, ::-1],
        window_strides=(1, 1, 1),
        padding=padding,
        lhs_dilation=problem.strides,
        rhs_dilation=problem.dilations,
        dimension_numbers=("NDHWC", "DHWOI", "NDHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    with np.errstate(over="ignore"):
        return np.asarray(result).astype(named_dtype(problem.dtype))


def explain(problem: Problem, message: str) -> str | None:
    """What JAX is known to refuse."""
    return "a size of 0" if problem.is_empty else None


def main() -> int:
    """Run the problems of the command line."""
    arguments = parse_arguments(__doc__, problems=200)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    report = Report("JAX", jax.__version__)
    for problem in draw_problems(arguments, DTYPES, empties=True):
        report.check(problem, compute, (TypeError, ValueError, jax.errors.JaxRuntimeError), explain)
    return finish_problems(
        report, arguments, 0.9, ("dilated and strided", "k < s", "NCDHW", "layer", "empty", "float16", "bfloat16")
    )


if __name__ == "__main__":
    sys.exit(main())
