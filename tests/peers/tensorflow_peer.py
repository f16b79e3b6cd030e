"""Compare gemmconv with TensorFlow: signature, results and refusals.

TensorFlow has two sets of CPU kernels and picks one when it is loaded: `--mode onednn` and `--mode reference`. The
reference kernels have neither dilation nor NCDHW.
"""

from __future__ import annotations

import inspect
import os
import platform
import sys
from typing import Any

import numpy as np
from common import Problem, Report, draw_problems, finish_problems, parse_arguments

DTYPES = ("float32", "float32", "float32", "float64")
ONEDNN_SWITCH = {"onednn": "1", "reference": "0"}


def ones(*shape: int) -> np.ndarray:
    """A float32 array of ones."""
    return np.ones(shape, np.float32)


# A call that both accept, and what each refusal changes in it.
ACCEPTED: dict[str, Any] = {
    "value": ones(1, 2, 2, 2, 3),
    "filter": ones(3, 3, 3, 4, 3),
    "output_shape": [1, 4, 4, 4, 4],
    "strides": 2,
    "padding": "SAME",
    "dilations": None,
    "data_format": "NDHWC",
}
REFUSED: dict[str, dict[str, Any]] = {
    "value and input": {"input": ones(1, 2, 2, 2, 3)},
    "filter and filters": {"filters": ones(3, 3, 3, 4, 3)},
    "no value": {"value": None},
    "no filter": {"filter": None},
    "value of rank 4": {"value": ones(2, 2, 2, 3)},
    "value of rank 6": {"value": ones(1, 1, 2, 2, 2, 3)},
    "filter of rank 4": {"filter": ones(3, 3, 4, 3)},
    "filter of rank 6": {"filter": ones(1, 3, 3, 3, 4, 3)},
    "output_shape of floats": {"output_shape": [1.0, 4.0, 4.0, 4.0, 4.0]},
    "output_shape of bools": {"output_shape": [True] * 5},
    "output_shape a string": {"output_shape": "14444"},
    "batch of output_shape": {"output_shape": [2, 4, 4, 4, 4]},
    "Cout of output_shape": {"output_shape": [1, 4, 4, 4, 5]},
    "Cin of value": {"value": ones(1, 2, 2, 2, 2)},
    "Cin of value, twice the filter's": {"value": ones(1, 2, 2, 2, 6)},
    "depth above reach": {"output_shape": [1, 5, 4, 4, 4]},
    "depth below reach": {"output_shape": [1, 2, 4, 4, 4]},
    "height above reach": {"output_shape": [1, 4, 5, 4, 4]},
    "width above reach": {"output_shape": [1, 4, 4, 9, 4]},
    "depth below reach, VALID": {"padding": "VALID", "output_shape": [1, 4, 5, 5, 4]},
    "depth above reach, VALID": {"padding": "VALID", "output_shape": [1, 7, 5, 5, 4]},
    "no strides": {"strides": []},
    "2 strides": {"strides": [2, 2]},
    "4 strides": {"strides": [1, 2, 2, 2]},
    "6 strides": {"strides": [1, 2, 2, 2, 1, 1]},
    "no dilations": {"dilations": []},
    "2 dilations": {"dilations": [1, 1]},
    "4 dilations": {"dilations": [1, 1, 1, 1]},
    "6 dilations": {"dilations": [1] * 6},
    "stride 0": {"strides": 0},
    "stride 0 in D": {"strides": [1, 0, 2, 2, 1]},
    "stride -1": {"strides": -1},
    "stride -2 in H": {"strides": [2, -2, 2]},
    "dilation 0": {"dilations": 0},
    "dilation 0 in D": {"dilations": [1, 0, 1, 1, 1]},
    "dilation -1": {"dilations": -1},
    "stride 2 in N": {"strides": [2, 2, 2, 2, 1]},
    "stride 2 in C": {"strides": [1, 2, 2, 2, 2]},
    "strides a string": {"strides": "2"},
    "padding in lower case": {"padding": "same"},
    "padding FULL": {"padding": "FULL"},
    "padding EXPLICIT": {"padding": "EXPLICIT"},
    "padding None": {"padding": None},
    "padding a number": {"padding": 1},
    "padding a list": {"padding": [[0, 0]] * 5},
    "data_format NHWC": {"data_format": "NHWC"},
    "data_format in lower case": {"data_format": "ndhwc"},
    "data_format empty": {"data_format": ""},
    "data_format a number": {"data_format": 5},
    "int32 arrays": {"value": ones(1, 2, 2, 2, 3).astype(np.int32), "filter": ones(3, 3, 3, 4, 3).astype(np.int32)},
    "bool arrays": {"value": ones(1, 2, 2, 2, 3).astype(bool), "filter": ones(3, 3, 3, 4, 3).astype(bool)},
    "int32 filter": {"filter": ones(3, 3, 3, 4, 3).astype(np.int32)},
    "longdouble": {
        "value": ones(1, 2, 2, 2, 3).astype(np.longdouble),
        "filter": ones(3, 3, 3, 4, 3).astype(np.longdouble),
    },
    "nested lists of unlike length": {"value": [[1], [1, 2]]},
    "nested lists of strings": {"value": [[[[["a"]]]]]},
}
# The oneDNN kernels abort the process on these, or accept them.
REFUSED_BY_REFERENCE_ONLY: dict[str, dict[str, Any]] = {
    "output_shape of length 0": {"output_shape": []},
    "output_shape of length 3": {"output_shape": [4, 4, 4]},
    "output_shape of length 4": {"output_shape": [1, 4, 4, 4]},
    "output_shape of length 6": {"output_shape": [1, 4, 4, 4, 4, 1]},
    "output_shape 2-D": {"output_shape": [[1, 4, 4, 4, 4]]},
    "output_shape a number": {"output_shape": 4},
    "negative depth": {"output_shape": [1, -4, 4, 4, 4]},
    "negative batch": {"output_shape": [-1, 4, 4, 4, 4]},
    "batch 0 for 1": {"output_shape": [0, 4, 4, 4, 4]},
    "depth 0": {"output_shape": [1, 0, 4, 4, 4]},
    "dilation 2 in N": {"dilations": [2, 1, 1, 1, 1]},
    "dilation 2 in C": {"dilations": [1, 1, 1, 1, 2]},
    "huge stride": {"strides": [1, 2**40, 2, 2, 1]},
    "huge output": {"strides": 2**20, "output_shape": [1, 2**21, 2**21, 2**21, 4]},
    "Cout mismatch in an empty batch": {"value": ones(0, 2, 2, 2, 3), "output_shape": [0, 4, 4, 4, 5]},
}
# What both say.
SHARED_TEXTS = {
    "2 strides": "strides should be of length 1, 3 or 5",
    "4 dilations": "dilations should be of length 1, 3 or 5",
}


def check_signature(report: Report, theirs: inspect.Signature, ours: inspect.Signature) -> None:
    """TensorFlow's ten names, their order, kinds and defaults; all of gemmconv's own are keyword-only."""
    expected = list(theirs.parameters.values())
    parameters = list(ours.parameters.values())
    first, own = parameters[: len(expected)], parameters[len(expected) :]
    report.require(len(expected) == 10, f"TensorFlow's signature has {len(expected)} names, not ten: {theirs}")
    report.require(
        [(p.name, p.kind) for p in first] == [(p.name, p.kind) for p in expected],
        f"the first names of gemmconv are {[p.name for p in first]}, TensorFlow's {[p.name for p in expected]}",
    )
    # `value` has no default in TensorFlow, and None here so that `input` can be given alone.
    defaults = [None if p.name == "value" and p.default is p.empty else p.default for p in expected]
    report.require([p.default for p in first] == defaults, f"defaults differ: {ours} and {theirs}")
    report.require(all(p.kind is p.KEYWORD_ONLY for p in own), f"gemmconv's own are not all keyword-only: {ours}")
    report.more["signature"] = str(theirs)


def check_refusals(report: Report, theirs: Any, ours: Any, errors: tuple[type[Exception], ...], mode: str) -> None:
    """Where TensorFlow raises, gemmconv raises ValueError or TypeError, and its text names the function."""
    cases = REFUSED if mode == "onednn" else REFUSED | REFUSED_BY_REFERENCE_ONLY
    theirs(**ACCEPTED)
    ours(**ACCEPTED)
    for name, changes in cases.items():
        arguments = ACCEPTED | changes
        shared = SHARED_TEXTS.get(name, "")
        try:
            theirs(**arguments)
        except errors as error:
            report.require(shared in str(error), f"{name}: TensorFlow says {str(error)[:200]!r}, not {shared!r}")
        else:
            report.require(False, f"{name}: TensorFlow accepts")
        try:
            ours(**arguments)
        except (TypeError, ValueError) as error:
            report.require("conv3d_transpose" in str(error), f"{name}: gemmconv's text names no function: {error}")
            report.require(shared in str(error), f"{name}: gemmconv says {str(error)!r}, not {shared!r}")
        else:
            report.require(False, f"{name}: gemmconv accepts")
    report.more["refusals"] = len(cases)


def explain(problem: Problem, message: str) -> str | None:
    """What TensorFlow is known to refuse."""
    if "does not yet support dilation rates" in message and max(problem.dilations) > 1:
        return "dilation without oneDNN"
    if "only supports NDHWC on the CPU" in message and problem.data_format == "NCDHW":
        return "NCDHW without oneDNN"
    return None


def main() -> int:
    """Run the signature, the refusals and the problems of the command line."""
    mode = {"choices": list(ONEDNN_SWITCH), "default": "onednn", "help": "which CPU kernels (%(default)s)"}
    arguments = parse_arguments(__doc__, problems=600, mode=mode)
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = ONEDNN_SWITCH[arguments.mode]
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    import gemmconv

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    function = tf.compat.v1.nn.conv3d_transpose

    def compute(problem: Problem, value: np.ndarray, weights: np.ndarray) -> np.ndarray:
        result = function(**problem.arguments(value, weights)).numpy()
        return np.moveaxis(result, 1, -1) if problem.data_format == "NCDHW" else result

    errors = (tf.errors.OpError, TypeError, ValueError, AttributeError)
    report = Report(f"TensorFlow ({arguments.mode})", tf.__version__)
    for problem in draw_problems(arguments, DTYPES):
        report.check(problem, compute, errors, explain)
    if arguments.only is None:
        check_signature(report, inspect.signature(function), inspect.signature(gemmconv.conv3d_transpose))
        check_refusals(report, function, gemmconv.conv3d_transpose, errors, arguments.mode)
    # TensorFlow's wheels for x86-64 bring oneDNN, whatever the vector extensions of the CPU.
    full = arguments.mode == "onednn" and platform.machine() in ("x86_64", "AMD64")
    features = ("dilated and strided", "k < s", "NCDHW", "layer") if full else ("k < s", "layer")
    return finish_problems(report, arguments, 0.6 if full else 0.15, features)


if __name__ == "__main__":
    sys.exit(main())
