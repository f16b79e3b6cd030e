"""Compare gemmconv.compat.torch with PyTorch: random calls, and calls that PyTorch refuses."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import BOUNDS, Report, difference, parse_arguments

import gemmconv.compat.torch

sys.path.append(str(Path(__file__).parents[1]))
import compat_cases

FEATURES = (
    *("1-D", "2-D", "3-D", "unbatched", "bias", "depthwise", "same", "kernel smaller than stride"),
    *("groups, output padding and dilation", "float64", "complex64", "whole numbers", "normal numbers"),
)


def by_peer(function: str, arguments: dict[str, Any]) -> np.ndarray:
    """Call PyTorch with tensors of the arrays."""
    tensors = {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    result: np.ndarray = getattr(torch.nn.functional, function)(**tensors).numpy()
    return result


def main() -> int:
    """Run the calls of the command line."""
    arguments = parse_arguments(__doc__, problems=4000)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # 'same' with an even kernel warns of a copy
    report = Report("PyTorch, compat.torch", torch.__version__)
    for index in range(arguments.problems) if arguments.only is None else [arguments.only]:
        case = compat_cases.torch_case(arguments.seed, index)
        expected = by_peer(case.function, case.arguments)
        workers = (None, 1, 2)[index % 3]
        got = getattr(gemmconv.compat.torch, case.function)(**case.arguments, workers=workers)
        wrong, part = difference(got, expected, case.exact, case.bound(BOUNDS[expected.dtype.name], expected))
        report.require(wrong is None, f"{wrong}; {case}")
        report.compared += 1
        report.features.update(case.features)
        report.worst[expected.dtype.name] = max(part, report.worst.get(expected.dtype.name, 0.0))
    for function, given, _, _ in compat_cases.TORCH_REFUSALS:
        try:
            by_peer(function, compat_cases.with_arrays(given))
        except (RuntimeError, TypeError, ValueError) as error:
            report.refused[type(error).__name__] += 1
        else:
            report.require(False, f"PyTorch does not refuse {function}({given})")
    for function, given, shape in compat_cases.TORCH_EMPTY:
        got = by_peer(function, compat_cases.with_arrays(given))
        report.require(got.shape == shape, f"PyTorch gives {got.shape} for {function}({given}), not {shape}")
    return report.finish(arguments.problems if arguments.only is None else 0, FEATURES if report.compared > 999 else ())


if __name__ == "__main__":
    sys.exit(main())
