"""Operands, the float64 result that every contender is compared with, and the comparison.

The reference forms one tap at a time, in float64, into an uncropped output, and cuts; its rules come from layers.py.
The tests compare it with the loop over positions in tests/oracle.py. It imports nothing of gemmconv.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.layers import Layer

Array = np.ndarray[Any, Any]

# The largest difference from float64 that passes, as a part of the largest result. Sums of up to 768 products a cell
# and taps, and minimal filtering's growth of 4, stay below 3e-6 in float32; bfloat16 or TF32 arithmetic would be above
# 1e-4. Half precisions may be off by two units in the last place.
BOUNDS = {
    "float16": 2.0**-9,
    "bfloat16": 2.0**-6,
    "float32": 1e-5,
    "float64": 1e-13,
    "complex64": 1e-5,
    "complex128": 1e-13,
}
DTYPES = tuple(BOUNDS)


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype of a name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


def operands(layer: Layer, dtype: str, layout: str = "NDHWC", seed: int = 0) -> tuple[Array, Array]:
    """Seeded normal operands, the value C-contiguous in the layout; both layouts hold the same numbers."""
    rng = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...]) -> Array:
        kind = np.dtype(np.float64 if dtype in ("float64", "complex128") else np.float32)
        drawn = rng.standard_normal(shape, kind)  # type: ignore[arg-type]
        if dtype.startswith("complex"):
            drawn = drawn + 1j * rng.standard_normal(shape, kind)  # type: ignore[arg-type, assignment]
        return drawn.astype(dtype_named(dtype), copy=False)

    value, filter = normal(layer.value_shape()), normal(layer.filter_shape)
    if layout == "NCDHW":
        value = np.ascontiguousarray(np.moveaxis(value, -1, 1))
    return value, filter


def reference(layer: Layer, dtype: str, seed: int = 0) -> Array:
    """The result in float64 (complex128), as NDHWC."""
    value, filter = operands(layer, dtype, seed=seed)
    wide = np.complex128 if dtype.startswith("complex") else np.float64
    x, w = value.astype(wide).reshape(-1, layer.cin), filter.astype(wide)
    # Room for outputs that reach beyond the last tap.
    room = [max(f, lo + o) for f, lo, o in zip(layer.full, layer.before, layer.output, strict=True)]
    y = np.zeros((layer.batch, *room, layer.cout), wide)
    for tap in itertools.product(*map(range, layer.kernel)):
        at = [
            slice(a * d, a * d + (n - 1) * s + 1, s)
            for a, d, n, s in zip(tap, layer.dilations, layer.input, layer.strides, strict=True)
        ]
        y[(slice(None), *at)] += (x @ w[tap].T).reshape(layer.batch, *layer.input, layer.cout)
    kept = [slice(lo, lo + o) for lo, o in zip(layer.before, layer.output, strict=True)]
    return np.ascontiguousarray(y[(slice(None), *kept)])


@dataclass(frozen=True)
class Verdict:
    """What the comparison found: `error` is the largest difference over the largest result."""

    status: str
    error: float | None
    detail: str = ""


def check(result: Any, expected: Array, largest: float, layer: Layer, dtype: str, layout: str) -> Verdict:
    """Compare a whole result with the reference, plane by plane; NaN is wrong wherever it is."""
    if not isinstance(result, np.ndarray):
        return Verdict("wrong", None, f"the result is no array but {type(result).__name__}")
    if result.shape != layer.output_shape(layout):
        return Verdict("wrong", None, f"the result has shape {result.shape}, not {layer.output_shape(layout)}")
    if result.dtype != dtype_named(dtype):
        return Verdict("wrong", None, f"the result has dtype {result.dtype}, not {dtype}")
    if layout == "NCDHW":
        result = np.moveaxis(result, 1, -1)
    worst, bad = 0.0, 0
    bound = BOUNDS[dtype] * largest
    for index in np.ndindex(result.shape[:2]):
        difference = np.subtract(result[index], expected[index], dtype=expected.dtype)
        most = float(np.abs(difference).max(initial=0.0))
        worst = max(worst, math.inf if math.isnan(most) else most)
        if not most <= bound:  # NaN too
            bad += int(np.count_nonzero(~(np.abs(difference) <= bound)))
    error = worst / largest if largest else worst
    if bad:
        share = bad / math.prod(result.shape)
        text = f"{bad} of {result.size} cells ({share:.2%}) differ by more than {BOUNDS[dtype]:.0e} of the largest"
        return Verdict("wrong", error if math.isfinite(error) else None, f"{text}, at most by {error:.1e}")
    return Verdict("ok", error)
