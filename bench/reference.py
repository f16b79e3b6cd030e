"""Operands, the float64 result that every contender is compared with, and the comparison.

The reference forms one tap at a time, in float64, on an uncropped fine grid; its rules come from layers.py. The tests
compare it with the loop over positions in tests/oracle.py. It imports nothing of gemmconv.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.layers import CONV, TRANSPOSE, Layer

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
# Products of a cell above which the bound grows with the root of their number, as the error of a plain sum does beside
# its result: a filter's gradient sums over all positions, and frameworks do so in float32 one after the other.
MANY_PRODUCTS = 2**15


def bound_of(layer: Layer, dtype: str) -> float:
    """The largest difference that passes, as a part of the largest result."""
    return BOUNDS[dtype] * math.sqrt(max(1.0, layer.products / MANY_PRODUCTS))


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype of a name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


def operands(layer: Layer, dtype: str, layout: str = "NDHWC", seed: int = 0) -> tuple[Array, Array]:
    """Seeded normal operands, C-contiguous in the layout; both layouts hold the same numbers."""
    rng = np.random.default_rng(seed)

    def normal(role: str) -> Array:
        shape = layer.shape(role)
        kind = np.dtype(np.float64 if dtype in ("float64", "complex128") else np.float32)
        drawn = rng.standard_normal(shape, kind)  # type: ignore[arg-type]
        if dtype.startswith("complex"):
            drawn = drawn + 1j * rng.standard_normal(shape, kind)  # type: ignore[arg-type, assignment]
        array = drawn.astype(dtype_named(dtype), copy=False)
        return array if role == "filter" else np.ascontiguousarray(relaid(array, "NDHWC", layout))

    return normal(layer.roles[0]), normal(layer.roles[1])


def relaid(array: Array, have: str, want: str) -> Array:
    """A view of an array of any number of spatial axes in another layout."""
    if have == want:
        return array
    return np.moveaxis(array, -1, 1) if want == "NCDHW" else np.moveaxis(array, 1, -1)


def reference(layer: Layer, dtype: str, seed: int = 0) -> Array:
    """The result in float64 (complex128), channels last."""
    wide = np.complex128 if dtype.startswith("complex") else np.float64
    given = [array.astype(wide) for array in operands(layer, dtype, seed=seed)]
    arrays = dict(zip(layer.roles, [*given, np.zeros(layer.result_shape(), wide)], strict=True))
    fine = np.zeros((layer.batch, *layer.room, layer.cout), wide)
    fine[layer.kept] = arrays["fine"]
    groups, grid = layer.groups, (layer.batch, *layer.input)

    def stacked(array: Array) -> Array:
        """Rows of the coarse grid, a matrix a group."""
        return array.reshape(layer.rows, groups, -1).swapaxes(0, 1)

    x, sums = stacked(arrays["coarse"]), np.zeros((groups, layer.rows, layer.cin // groups), wide)
    for tap in itertools.product(*map(range, layer.kernel)):
        at = layer.reached(tap)
        w = arrays["filter"][tap].reshape(-1, groups, layer.cin // groups).swapaxes(0, 1)  # a view
        if layer.op == TRANSPOSE:
            fine[at] += (x @ w.swapaxes(1, 2)).swapaxes(0, 1).reshape(*grid, layer.cout)
        elif layer.op == CONV:
            sums += stacked(fine[at]) @ w
        else:
            w[...] = stacked(fine[at]).swapaxes(1, 2) @ x
    if layer.op == CONV:
        return np.ascontiguousarray(sums.swapaxes(0, 1)).reshape(layer.result_shape())
    return np.ascontiguousarray(fine[layer.kept]) if layer.op == TRANSPOSE else arrays["filter"]


@dataclass(frozen=True)
class Verdict:
    """What the comparison found: `error` is the largest difference over the largest result."""

    status: str
    error: float | None
    detail: str = ""


def check(result: Any, expected: Array, largest: float, layer: Layer, dtype: str, layout: str) -> Verdict:
    """Compare a whole result with the reference, part by part; NaN is wrong wherever it is."""
    if not isinstance(result, np.ndarray):
        return Verdict("wrong", None, f"the result is no array but {type(result).__name__}")
    if result.shape != layer.result_shape(layout):
        return Verdict("wrong", None, f"the result has shape {result.shape}, not {layer.result_shape(layout)}")
    if result.dtype != dtype_named(dtype):
        return Verdict("wrong", None, f"the result has dtype {result.dtype}, not {dtype}")
    if layer.roles[2] != "filter":
        result = relaid(result, layout, "NDHWC")
    worst, bad, part = 0.0, 0, bound_of(layer, dtype)
    bound = part * largest
    for index in np.ndindex(result.shape[:2]):
        difference = np.subtract(result[index], expected[index], dtype=expected.dtype)
        most = float(np.abs(difference).max(initial=0.0))
        worst = max(worst, math.inf if math.isnan(most) else most)
        if not most <= bound:  # NaN too
            bad += int(np.count_nonzero(~(np.abs(difference) <= bound)))
    error = worst / largest if largest else worst
    if bad:
        share = bad / math.prod(result.shape)
        text = f"{bad} of {result.size} cells ({share:.2%}) differ by more than {part:.0e} of the largest"
        return Verdict("wrong", error if math.isfinite(error) else None, f"{text}, at most by {error:.1e}")
    return Verdict("ok", error)
