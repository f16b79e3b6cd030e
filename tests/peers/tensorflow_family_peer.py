"""Compare the rest of the family with TensorFlow: conv1d to conv3d, their transposes, and the filter's gradient.

Random problems of small whole numbers must agree bit for bit. Where TensorFlow refuses a problem that its documentation
allows, the reason is counted by name. TensorFlow picks its set of CPU kernels when it is loaded (`--mode`).
"""

from __future__ import annotations

import importlib
import inspect
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import LARGEST_INTEGER, Report, difference, finish_problems, parse_arguments
from tensorflow_peer import ONEDNN_SWITCH

LAYOUTS = {1: ("NWC", "NCW"), 2: ("NHWC", "NCHW"), 3: ("NDHWC", "NCDHW")}
# Function, spatial axes, whether it takes explicit paddings.
FUNCTIONS = {
    "conv3d": (3, False),
    "conv3d_backprop_filter_v2": (3, False),
    "conv2d": (2, True),
    "conv2d_transpose": (2, True),
    "conv1d": (1, False),
    "conv1d_transpose": (1, False),
    "conv_transpose": (0, False),
}


@dataclass(frozen=True)
class Case:
    """One call: the function, what it is given, and what of it a reason for a refusal may depend on."""

    index: int
    function: str
    arguments: dict[str, Any]
    layout: str
    padding: str
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    coarse: tuple[int, ...]
    beyond: tuple[int, ...]  # positions of kernels beyond the input, which SAME pads, where not negative

    def __str__(self) -> str:
        shown = {name: a.shape if isinstance(a, np.ndarray) else a for name, a in self.arguments.items()}
        return f"{self.index}: {self.function}({', '.join(f'{name}={given}' for name, given in shown.items())})"

    @property
    def features(self) -> list[str]:
        """What the report counts."""
        found = [self.function, self.padding, self.layout]
        found += ["dilated"] * (max(self.dilations) > 1) + ["strided"] * (max(self.strides) > 1)
        return found + ["grouped"] * (self.groups > 1)


def in_order(layout: str, items: list[Any]) -> list[Any]:
    """Items for N, the spatial axes and C, in the layout's order."""
    return items if layout.endswith("C") else [items[0], items[-1], *items[1:-1]]


def draw_case(seed: int, index: int) -> Case:
    """The case of this number; each function has its turn."""
    rng = np.random.default_rng([seed, index])
    function = list(FUNCTIONS)[index % len(FUNCTIONS)]
    rank, explicit = FUNCTIONS[function]
    rank = rank or int(rng.integers(1, 4))
    explicit = (explicit or (function, rank) == ("conv_transpose", 2)) and bool(rng.integers(2))
    layout = LAYOUTS[rank][rng.integers(2)]
    kernel, strides, dilations = ([int(n) for n in rng.integers(1, top, rank)] for top in (5, 4, 4))
    if rng.integers(2):
        dilations = [1] * rank
    padding: Any = ("SAME", "VALID")[rng.integers(2)]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    fine = [int(rng.integers(max(1, span - 2), span + 9)) for span in spans]
    pairs = [(0, 0)] * rank
    if explicit:
        pairs = [(int(rng.integers(0, k + 1)), int(rng.integers(0, k + 1))) for k in kernel]
        padding = in_order(layout, [[0, 0], *map(list, pairs), [0, 0]])
    whole = [n + sum(pair) for n, pair in zip(fine, pairs, strict=True)]
    if padding == "SAME":
        coarse = [-(-n // s) for n, s in zip(fine, strides, strict=True)]
    else:
        coarse = [max(0, (n - span) // s + 1) for n, span, s in zip(whole, spans, strides, strict=True)]
    beyond = [(n - 1) * s + span - o for n, s, span, o in zip(coarse, strides, spans, whole, strict=True)]
    batch, cin, cout = (int(n) for n in rng.integers(1, 6, 3))
    groups = int(rng.integers(2, 4)) if "transpose" not in function and rng.integers(4) == 0 else 1

    def integers(shape: list[int]) -> np.ndarray:
        return rng.integers(-LARGEST_INTEGER, LARGEST_INTEGER + 1, shape).astype(np.float32)

    fine_shape = in_order(layout, [batch, *fine, cin * groups])
    coarse_shape = in_order(layout, [batch, *coarse, cout * groups])
    filter_shape = [*kernel, cin, cout * groups]
    spelled = in_order(layout, [1, *strides, 1])
    arguments: dict[str, Any] = {"padding": padding, "data_format": layout}
    arguments["dilations"] = in_order(layout, [1, *dilations, 1])
    arguments["stride" if function == "conv1d" else "strides"] = spelled
    weights = "filters" if function in ("conv1d", "conv1d_transpose", "conv_transpose") else "filter"
    if function == "conv3d_backprop_filter_v2":
        arguments |= {"input": integers(fine_shape), "filter_sizes": filter_shape}
        arguments["out_backprop"] = integers(coarse_shape)
    elif "transpose" in function:
        arguments |= {"input": integers(coarse_shape), weights: integers(filter_shape), "output_shape": fine_shape}
    else:
        arguments |= {"input": integers(fine_shape), weights: integers(filter_shape)}
    return Case(
        index,
        function,
        arguments,
        layout,
        "explicit" if explicit else padding,
        tuple(strides),
        tuple(dilations),
        groups,
        tuple(coarse),
        tuple(beyond),
    )


def check_signatures(report: Report, theirs: dict[str, Any], module: Any) -> None:
    """TensorFlow's names, their order and their defaults, lists as tuples; gemmconv's own are keyword-only."""
    for name, function in theirs.items():
        expected = [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
        expected = [(n, tuple(default) if isinstance(default, list) else default) for n, default in expected]
        ours = inspect.signature(getattr(module, name)).parameters.values()
        found = [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY]
        report.require(found == expected, f"{name}: the arguments are {found}, TensorFlow's {expected}")


def crashes(case: Case, mode: str) -> bool:
    """Whether the reference kernels may end the process: gradients of empty results, which `check` must not ask for."""
    return mode == "reference" and 0 in case.coarse


def explain(case: Case, message: str) -> str | None:
    """What TensorFlow is known to refuse."""
    if "size would be negative" in message and 0 in case.coarse:
        return "a result with no position, by more than a stride"
    if case.groups > 1 and case.function.startswith("conv3d") and ("same" in message or "must match" in message):
        return "groups in three dimensions"
    if "NHWC" in message or "NDHWC" in message:
        return None if case.layout.endswith("C") else "channels first, not by oneDNN"
    if "dilat" in message and max(case.dilations) > 1:
        return "dilation, not by oneDNN"
    return None


def conv3d_by_definition(case: Case) -> np.ndarray:
    """Sums over slices of the input with zeros around, which SAME has half before, in float64."""
    z, w = case.arguments["input"].astype(np.float64), case.arguments["filter"].astype(np.float64)
    z = z if case.layout.endswith("C") else np.moveaxis(z, 1, -1)
    pads = [max(0, over) if case.padding == "SAME" else 0 for over in case.beyond]
    z = np.pad(z, [(0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)])
    y = np.zeros((z.shape[0], *case.coarse, w.shape[-1]))
    for tap in np.ndindex(*w.shape[:3]):
        along = zip(tap, case.coarse, case.strides, case.dilations, strict=True)
        y += z[:, *(slice(a * d, a * d + (n - 1) * s + 1, s) for a, n, s, d in along)] @ w[tap]
    return y if case.layout.endswith("C") else np.moveaxis(y, -1, 1)


def excused(case: Case, mode: str, expected: np.ndarray, got: np.ndarray) -> str | None:
    """Where TensorFlow's result is known not to be the definition's; gemmconv's must be that."""
    if mode == "onednn" and got.size == 0 and expected.shape == case.arguments["input"].shape:
        return "an empty result is returned in the shape of the input"
    if case.function != "conv3d" or case.groups > 1 or min(case.beyond) >= 0 or got.size == 0:
        return None
    if got.shape != expected.shape or not (got == conv3d_by_definition(case)).all():
        return None
    if mode == "reference" and case.padding == "SAME":
        return "SAME of conv3d pads by a negative number where the kernel is smaller than the stride"
    if mode == "onednn" and case.padding == "VALID":
        return "a rare VALID of conv3d that leaves positions over is not the definition's, nor the reference kernels'"
    return None


def check(report: Report, case: Case, theirs: Any, ours: Any, errors: tuple[type[Exception], ...], mode: str) -> None:
    """Compare one case."""
    if crashes(case, mode):
        report.refused["an empty side, which may end the process"] += 1
        return
    try:
        expected = theirs(**case.arguments).numpy()
    except errors as error:
        reason = explain(case, str(error))
        if reason is None:
            report.require(False, f"TensorFlow refuses: {str(error)[:400]}; {case}")
        else:
            report.refused[reason] += 1
        return
    try:
        got = ours(**case.arguments)
    except (TypeError, ValueError) as error:
        report.require(False, f"gemmconv refuses: {error}; {case}")
        return
    wrong, _ = difference(got, expected, True, 0.0)
    if wrong:
        reason = excused(case, mode, expected, got)
        report.require(reason is not None, f"{wrong}; {case}")
        report.refused[reason or ""] += 1
        return
    report.compared += 1
    report.features.update(case.features)


def main() -> int:
    """Run the signatures and the problems of the command line."""
    mode_option = {"choices": list(ONEDNN_SWITCH), "default": "onednn", "help": "which CPU kernels (%(default)s)"}
    arguments = parse_arguments(__doc__, problems=2100, mode=mode_option)
    mode = arguments.mode
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = ONEDNN_SWITCH[mode]
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    import gemmconv

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    # The op is exported in capitals, its function with TensorFlow's names is not.
    gradient = importlib.import_module("tensorflow.python.ops.gen_nn_ops").conv3d_backprop_filter_v2
    theirs = {name: getattr(tf.compat.v1.nn, name, gradient) for name in FUNCTIONS}
    errors = (tf.errors.OpError, TypeError, ValueError, AttributeError)
    report = Report(f"TensorFlow's family ({mode})", tf.__version__)
    for index in range(arguments.problems) if arguments.only is None else [arguments.only]:
        case = draw_case(arguments.seed, index)
        check(report, case, theirs[case.function], getattr(gemmconv, case.function), errors, mode)
    if arguments.only is None:
        check_signatures(report, theirs, gemmconv)
    full = mode == "onednn" and platform.machine() in ("x86_64", "AMD64")
    features = [*FUNCTIONS, "SAME", "VALID", "explicit", "strided", "grouped"]
    features += ["dilated", *(layout for layouts in LAYOUTS.values() for layout in layouts)] if full else []
    return finish_problems(report, arguments, 0.6 if full else 0.15, features)


if __name__ == "__main__":
    sys.exit(main())
