"""Run all cases of ONNX's own backend tests for one operator through gemmconv.compat.onnx.

Collecting the cases of a second operator in the same process gives those of the first again, so each has its own.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import onnx
from common import Report, difference

import gemmconv.compat.onnx

TOTAL = {"ConvTranspose": 11, "Conv": 6}
FUNCTIONS = {"ConvTranspose": gemmconv.compat.onnx.conv_transpose, "Conv": gemmconv.compat.onnx.conv}


def value(attribute: onnx.AttributeProto) -> Any:
    """Return an attribute as the functions take it."""
    found = onnx.helper.get_attribute_value(attribute)
    return found.decode() if isinstance(found, bytes) else found


def main() -> int:
    """Run every case of the operator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operator", choices=TOTAL)
    operator = parser.parse_args().operator
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # making the cases of other operators warns
        cases = collect_testcases(operator)
    report = Report(f"ONNX node tests of {operator}, compat.onnx", onnx.__version__)
    report.require(len(cases) == TOTAL[operator], f"ONNX has {len(cases)} cases of {operator}, not {TOTAL[operator]}")
    names = {case.name for case in cases}
    report.require(len(names) == len(cases), f"some of the cases have the same name: {sorted(names)}")
    for case in cases:
        operators = [node.op_type for node in case.model.graph.node]
        report.require(operators == [operator], f"{case.name} is a model of {operators}")
        attributes = {attribute.name: value(attribute) for attribute in case.model.graph.node[0].attribute}
        for inputs, (expected,) in case.data_sets:
            got = FUNCTIONS[operator](*inputs, **attributes)
            wrong, _ = difference(got, expected, exact=True, bound=0.0)
            report.require(wrong is None, f"{case.name}: {wrong}")
            report.compared += 1
    return report.finish(minimum=TOTAL[operator])


if __name__ == "__main__":
    sys.exit(main())
