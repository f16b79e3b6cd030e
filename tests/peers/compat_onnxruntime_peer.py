"""Compare gemmconv.compat.onnx with ONNX Runtime, a model of one node a call, and show where the two part ways.

ONNX Runtime departs from the text of the standard in the places that `departure` names. There its own result is what
this script expects of it, so that docs/migration.md stays true.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from common import BOUNDS, Report, difference, parse_arguments
from onnxruntime.capi import onnxruntime_pybind11_state as states

import gemmconv.compat.onnx

sys.path.append(str(Path(__file__).parents[1]))
import compat_cases

ERRORS = (states.Fail, states.InvalidArgument, states.InvalidGraph, states.NotImplemented, states.RuntimeException)
OPERATORS = {"conv": "Conv", "conv_transpose": "ConvTranspose"}
FEATURES = (
    *("1-D", "2-D", "3-D", "transposed", "convolution", "bias", "groups", "SAME_UPPER", "SAME_LOWER", "VALID"),
    *("asymmetric pads", "output_shape", "dilated and strided", "kernel smaller than stride", "whole numbers"),
)


def by_peer(function: str, arguments: dict[str, Any]) -> np.ndarray:
    """Run a model of one node."""
    feeds = {name: arguments[name] for name in ("X", "W", "B") if name in arguments}
    attributes = {name: value for name, value in arguments.items() if name not in feeds}
    node = onnx.helper.make_node(OPERATORS[function], list(feeds), ["Y"], **attributes)
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    infos = [onnx.helper.make_tensor_value_info(name, kinds[name], feeds[name].shape) for name in feeds]
    result = onnx.helper.make_tensor_value_info("Y", kinds["X"], None)
    graph = onnx.helper.make_graph([node], "one_node", infos, [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, feeds)[0]
    return found


def departure(case: compat_cases.Case) -> tuple[str, str]:
    """Return where ONNX Runtime departs from the standard in this call, if it does, and what it does there."""
    given = case.arguments
    rank = given["W"].ndim - 2
    strides, dilations = given.get("strides", [1] * rank), given.get("dilations", [1] * rank)
    same = "SAME" in given.get("auto_pad", "NOTSET")
    axes = list(zip(given["X"].shape[2:], given["W"].shape[2:], strides, dilations, strict=True))
    if case.function == "conv":
        if same and max(dilations) > 1:
            return "auto_pad 'SAME' with a dilation", "refuses"
        if same and any((-(-n // s) - 1) * s + k - n < -2 for n, k, s, _ in axes):
            return "auto_pad 'SAME' of a convolution with a kernel smaller than the stride", "other values"
        return "", ""
    reached = [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in axes]
    added = given.get("output_padding", [0] * rank)
    sizes = given.get("output_shape", [1] * rank)
    if any(max(more, o - r) >= s for more, o, r, s in zip(added, sizes, reached, strides, strict=True)):
        return "an end that is longer than the stride allows", "refuses"
    wanted = [n * s for n, _, s, _ in axes]
    if same and "output_shape" not in given and any(r + a < o for r, a, o in zip(reached, added, wanted, strict=True)):
        return "auto_pad 'SAME' with a kernel smaller than the stride", "shorter"
    return "", ""


def main() -> int:
    """Run the calls of the command line."""
    arguments = parse_arguments(__doc__, problems=2000)
    report = Report("ONNX Runtime, compat.onnx", onnxruntime.__version__)
    departed: collections.Counter[str] = collections.Counter()
    for index in range(arguments.problems) if arguments.only is None else [arguments.only]:
        case = compat_cases.onnx_case(arguments.seed, index)
        got = getattr(gemmconv.compat.onnx, case.function)(**case.arguments, workers=(None, 1, 2)[index % 3])
        reason, does = departure(case)
        try:
            expected = by_peer(case.function, case.arguments)
        except ERRORS as error:
            report.require(does == "refuses", f"ONNX Runtime refuses: {str(error)[-400:]}; {case}")
            report.refused[reason] += 1
            continue
        report.require(does != "refuses", f"ONNX Runtime does not refuse {reason}; {case}")
        if does:
            departed[reason] += 1
        if does == "shorter":  # the end of the output is missing
            report.require(expected.size < got.size, f"ONNX Runtime does not depart: {reason}; {case}")
            got = np.ascontiguousarray(got[tuple(map(slice, expected.shape))])
        if does == "other values":
            report.require(expected.shape == got.shape, f"ONNX Runtime departs in more than values: {reason}; {case}")
            continue
        wrong, part = difference(got, expected, case.exact, case.bound(BOUNDS["float32"], expected))
        report.require(wrong is None, f"{wrong}; {case}")
        report.compared += 1
        report.features.update(case.features)
        report.worst["float32"] = max(part, report.worst.get("float32", 0.0))
    for function, given, _, _ in compat_cases.ONNX_REFUSALS:
        try:
            by_peer(function, compat_cases.with_arrays(given))
        except (*ERRORS, TypeError, ValueError) as error:
            report.refused[type(error).__name__] += 1
        else:
            report.require(False, f"ONNX Runtime does not refuse {function}({given})")
    report.more["departed"] = dict(departed)
    return report.finish(int(0.7 * arguments.problems), FEATURES if arguments.problems >= 300 else ())


if __name__ == "__main__":
    sys.exit(main())
