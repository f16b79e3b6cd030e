"""Run the ConvTranspose cases of ONNX's own backend tests that TensorFlow's signature can express.

A case with one or two spatial axes gets axes of size 1 in front. A case is expressed where one padding, SAME or VALID,
has the case's offset and output size on every axis.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import onnx
from common import Axis, Report, difference, reachable

TOTAL = 11
EXPRESSED = {
    "test_convtranspose": "VALID",
    "test_convtranspose_1d": "VALID",
    "test_convtranspose_3d": "VALID",
    "test_convtranspose_autopad_same": "SAME",
    "test_convtranspose_dilations": "VALID",
    "test_convtranspose_kernel_shape": "VALID",
    "test_convtranspose_output_shape": "VALID",
    "test_convtranspose_pad": "VALID",
}
NOT_EXPRESSED = {
    "test_convtranspose_group_2": "2 groups",
    "test_convtranspose_group_2_image_3": "2 groups",
    "test_convtranspose_pads": "no padding has these offsets and sizes: (1, 7), (2, 3)",
}


def collect() -> list[Any]:
    """The cases; making those of other operators warns."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return collect_testcases("ConvTranspose")


def offsets(attributes: dict[str, Any], axes: list[Axis]) -> list[int]:
    """Where each axis' output starts, in cells after the first that a tap reaches (ConvTranspose, opset 22)."""
    auto_pad = attributes.get("auto_pad", b"NOTSET").decode()
    if auto_pad in ("NOTSET", "VALID") and "output_shape" not in attributes:
        return list(attributes.get("pads", [0] * len(axes)))[: len(axes)]
    beyond = attributes.get("output_padding", [0] * len(axes))
    total = [max(0, axis.full + more - axis.o) for axis, more in zip(axes, beyond, strict=True)]
    return [cut // 2 if auto_pad == "SAME_UPPER" else cut - cut // 2 for cut in total]


def expression(case: Any) -> tuple[str | None, str, dict[str, Any]]:
    """The padding that expresses a case, why there is none, and the arguments."""
    (node,) = case.model.graph.node
    ((inputs, (expected,)),) = case.data_sets
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("group", 1) != 1:
        return None, f"{attributes['group']} groups", {}
    if len(inputs) != 2:
        return None, "a bias", {}
    value, weights = inputs
    rank = value.ndim - 2
    strides = list(attributes.get("strides", [1] * rank))
    dilations = list(attributes.get("dilations", [1] * rank))
    axes = [
        Axis(*sizes)
        for sizes in zip(value.shape[2:], weights.shape[2:], strides, dilations, expected.shape[2:], strict=True)
    ]
    wanted = offsets(attributes, axes)
    missing = (1,) * (3 - rank)
    arguments = {
        "value": value.reshape(*value.shape[:2], *missing, *value.shape[2:]),
        "filter": weights.reshape(*weights.shape[:2], *missing, *weights.shape[2:]).transpose(2, 3, 4, 1, 0),
        "output_shape": [*expected.shape[:2], *missing, *expected.shape[2:]],
        "strides": [*missing, *strides],
        "dilations": [*missing, *dilations],
        "data_format": "NCDHW",
    }
    for padding in ("VALID", "SAME"):
        fits = [
            axis.o in reachable(padding, *axis[:4]) and axis.pad_front(padding) == first
            for axis, first in zip(axes, wanted, strict=True)
        ]
        if all(fits):
            return padding, "", arguments | {"padding": padding}
    places = ", ".join(str((first, axis.o)) for axis, first in zip(axes, wanted, strict=True))
    return None, f"no padding has these offsets and sizes: {places}", {}


def main() -> int:
    """Run every case that can be expressed; which ones those are is fixed above."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    import gemmconv

    report = Report("ONNX node tests", onnx.__version__)
    cases = collect()
    report.require(len(cases) == TOTAL, f"ONNX has {len(cases)} cases of ConvTranspose, not {TOTAL}")
    expressed, others = {}, {}
    for case in cases:
        operators = [node.op_type for node in case.model.graph.node]
        report.require(operators == ["ConvTranspose"], f"{case.name} is a model of {operators}")
        padding, reason, arguments = expression(case)
        if padding is None:
            others[case.name] = reason
            continue
        expressed[case.name] = padding
        expected = case.data_sets[0][1][0]
        for algorithm in ("auto", "col2im"):
            got = gemmconv.conv3d_transpose(**arguments, algorithm=algorithm)
            wrong, _ = difference(got.reshape(expected.shape), expected, exact=True, bound=0.0)
            report.require(wrong is None, f"{case.name}, algorithm {algorithm}: {wrong}")
        report.compared += 1
    report.require(expressed == EXPRESSED, f"the expressed cases are {expressed}, not {EXPRESSED}")
    report.require(others == NOT_EXPRESSED, f"the cases not expressed are {others}, not {NOT_EXPRESSED}")
    report.refused.update(others.values())
    report.more |= {"total": len(cases), "expressed": expressed, "not_expressed": others}
    return report.finish(minimum=len(EXPRESSED))


if __name__ == "__main__":
    sys.exit(main())
