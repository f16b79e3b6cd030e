"""Compare gemmconv with PyTorch's conv_transpose3d."""

from __future__ import annotations

import sys

import numpy as np
import torch
from common import Problem, Report, draw_problems, finish_problems, parse_arguments

DTYPES = ("float32", "float32", "float64", "complex64")


def explain(problem: Problem, message: str) -> str | None:
    """PyTorch refuses sizes of 0 other than the batch, each in other words."""
    return "a size of 0" if problem.is_empty else None


def compute(problem: Problem, value: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """PyTorch cuts the same at both ends: its padding is the smaller half, the one cell more is cropped here."""
    front = [axis.pad_front(problem.padding) for axis in problem.axes]
    total = [axis.total_cut(problem.padding) for axis in problem.axes]
    behind = [axis.o - (axis.full - cut) for axis, cut in zip(problem.axes, total, strict=True)]
    result = torch.nn.functional.conv_transpose3d(
        torch.from_numpy(np.moveaxis(value, -1, 1).copy()),
        torch.from_numpy(weights.transpose(4, 3, 0, 1, 2).copy()),
        stride=problem.strides,
        padding=front,
        output_padding=behind,
        dilation=problem.dilations,
    )
    d, h, w = problem.output_sizes
    return np.moveaxis(result.numpy()[:, :, :d, :h, :w], 1, -1)


def main() -> int:
    """Run the problems of the command line."""
    arguments = parse_arguments(__doc__, problems=600)
    torch.set_num_threads(1)
    report = Report("PyTorch", torch.__version__)
    for problem in draw_problems(arguments, DTYPES, empties=True):
        report.check(problem, compute, (RuntimeError,), explain)
    return finish_problems(report, arguments, 0.9, ("dilated and strided", "k < s", "NCDHW", "layer", "float64"))


if __name__ == "__main__":
    sys.exit(main())
