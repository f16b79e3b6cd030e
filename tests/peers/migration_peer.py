"""Check what docs/migration.md says of Keras and JAX: their layers' weights and sizes in gemmconv's terms."""

from __future__ import annotations

import itertools
import sys

import numpy as np
from common import Report, difference, parse_arguments

import gemmconv
from gemmconv.compat import onnx

RNG = np.random.default_rng(1)


def whole(*shape: int) -> np.ndarray:
    """Return small whole numbers."""
    return RNG.integers(-4, 5, shape).astype(np.float32)


def compare(report: Report, what: object, got: np.ndarray, expected: object) -> None:
    """Count one comparison of whole numbers."""
    wrong, _ = difference(got, np.asarray(expected), exact=True, bound=0.0)
    report.require(wrong is None, f"{what}: {wrong}")
    report.compared += 1


def keras() -> int:
    """Conv3DTranspose, without an output padding and with those that TensorFlow can compute."""
    import tensorflow

    report = Report("Keras, migration", tensorflow.keras.__version__)
    x, bias = whole(1, 3, 4, 2, 3), whole(5)
    for k, s, padding, added in itertools.product((1, 2, 3, 4), (1, 2, 3), ("same", "valid"), (None, 0, 1, 2)):
        if added is not None and added >= s:
            continue
        n = np.array([3, 4, 2])
        sizes = (n - 1) * s + k + (added or 0) - (2 * (k // 2) if padding == "same" else 0)
        layer = tensorflow.keras.layers.Conv3DTranspose(5, k, s, padding, output_padding=added)
        layer.build(x.shape)
        kernel = whole(k, k, k, 5, 3)
        layer.set_weights([kernel, bias])
        try:
            got = gemmconv.conv3d_transpose(
                x, kernel, None if added is None else [1, *sizes, 5], s, padding.upper(), workers=1
            )
        except ValueError:
            try:
                layer(x)
            except Exception as error:  # Keras has TensorFlow's errors in various classes of its own
                report.refused[type(error).__name__] += 1
            else:
                report.require(False, f"gemmconv refuses {(k, s, padding, added)}, and Keras does not")
            continue
        compare(report, (k, s, padding, added), got + bias, layer(x))
    return report.finish(minimum=60)


def jax() -> int:
    """lax.conv_transpose of both kinds, and lax.conv_general_dilated as a convolution and as a transposed one."""
    import jax as package
    from jax import lax

    report = Report("JAX, migration", package.__version__)
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    x = whole(1, 3, 4, 2, 3)
    for k, s, d, padding in itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2), ("SAME", "VALID")):
        given = ((s,) * 3, padding, (d,) * 3, numbers)
        for turned in (False, True):
            rhs = whole(k, k, k, 5, 3) if turned else whole(k, k, k, 3, 5)
            filter = rhs if turned else rhs[::-1, ::-1, ::-1].swapaxes(3, 4)
            expected = lax.conv_transpose(x, rhs, *given, transpose_kernel=turned)
            got = gemmconv.conv3d_transpose(x, filter, None, s, padding, dilations=d, workers=1)
            compare(report, (k, s, d, padding, turned), got, expected)
    lhs = whole(2, 4, 5, 6)
    for k, s, d, (lo, hi) in itertools.product((1, 2, 3), (1, 2, 3), (1, 2), ((0, 0), (1, 0), (0, 2))):
        how = {"strides": [s, s], "dilations": [d, d]}
        rhs, span = whole(6, 2, k, k), (k - 1) * d + 1
        expected = lax.conv_general_dilated(
            lhs, rhs, (s, s), [(lo, hi)] * 2, rhs_dilation=(d, d), feature_group_count=2
        )
        got = onnx.conv(lhs, rhs, pads=[lo, lo, hi, hi], group=2, **how)
        compare(report, (k, s, d, lo, hi), got, expected)
        if span > max(lo, hi):
            rhs, pads = whole(6, 4, k, k), [span - 1 - lo, span - 1 - hi]
            expected = lax.conv_general_dilated(
                lhs, rhs, (1, 1), [(lo, hi)] * 2, lhs_dilation=(s, s), rhs_dilation=(d, d)
            )
            if 0 in expected.shape:
                continue
            weights = rhs[:, :, ::-1, ::-1].swapaxes(0, 1)
            got = onnx.conv_transpose(lhs, weights, pads=[pads[0]] * 2 + [pads[1]] * 2, **how)
            compare(report, (k, s, d, lo, hi, "transposed"), got, expected)
    return report.finish(minimum=170)


def main() -> int:
    """Run one of the frameworks."""
    arguments = parse_arguments(__doc__, 0, framework={"choices": ("keras", "jax"), "required": True})
    return keras() if arguments.framework == "keras" else jax()


if __name__ == "__main__":
    sys.exit(main())
