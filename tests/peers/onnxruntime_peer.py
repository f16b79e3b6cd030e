"""Compare gemmconv with ONNX Runtime's ConvTranspose, built as a model of one node a problem."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxruntime
from common import Problem, Report, draw_problems, finish_problems, parse_arguments
from onnxruntime.capi import onnxruntime_pybind11_state as states

DTYPES = ("float32",)
ERRORS = (states.Fail, states.InvalidArgument, states.InvalidGraph, states.NotImplemented, states.RuntimeException)


def attributes(problem: Problem) -> dict[str, object]:
    """Where gemmconv's cut, or the cells nothing reaches, go among ONNX's attributes.

    Every other problem of SAME names the output's size and lets ONNX place the cut (SAME_UPPER puts the smaller half
    in front), the others name both ends.
    """
    cut = [axis.total_cut(problem.padding) for axis in problem.axes]
    beyond = [axis.o - (axis.full - total) for axis, total in zip(problem.axes, cut, strict=True)]
    given: dict[str, object] = {"strides": problem.strides, "dilations": problem.dilations, "group": 1}
    if problem.padding == "SAME" and problem.index % 2 and not any(beyond):
        return given | {"auto_pad": "SAME_UPPER", "output_shape": problem.output_sizes}
    front = [axis.pad_front(problem.padding) for axis in problem.axes]
    behind = [total - first for total, first in zip(cut, front, strict=True)]
    return given | {"pads": [*front, *behind], "output_padding": beyond}


def compute(problem: Problem, value: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Run a model of one node."""
    node = onnx.helper.make_node("ConvTranspose", ["x", "w"], ["y"], **attributes(problem))
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    infos = [onnx.helper.make_tensor_value_info(name, kind, [None] * 5) for name in "xwy"]
    graph = onnx.helper.make_graph([node], "one_node", infos[:2], infos[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.moveaxis(value, -1, 1).copy(), "w": weights.transpose(4, 3, 0, 1, 2).copy()}
    (result,) = session.run(None, feeds)
    return np.moveaxis(result, 1, -1)


def explain(problem: Problem, message: str) -> str | None:
    """ONNX Runtime refuses none of these problems."""
    return None


def main() -> int:
    """Run the problems of the command line."""
    arguments = parse_arguments(__doc__, problems=600)
    report = Report("ONNX Runtime", onnxruntime.__version__)
    for problem in draw_problems(arguments, DTYPES):
        report.check(problem, compute, ERRORS, explain)
    return finish_problems(report, arguments, 0.9, ("dilated and strided", "k < s", "NCDHW", "layer"))


if __name__ == "__main__":
    sys.exit(main())
