"""Array arguments: what is taken, in which dtype, and what `out` must be.

Refuses whatever NumPy would silently unmask, compute, truncate or narrow. This module looks at arrays and dtypes only;
shapes are problem.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemmconv import results
from gemmconv.quiet import quiet

Array = np.ndarray[Any, np.dtype[Any]]

SUPPORTED = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
_PYTHON_NUMBERS = (int, float, complex)
# Asking a dtype for its name takes longer than a small product.
_NATIVE = frozenset(np.dtype(name) for name in SUPPORTED if name != "bfloat16")


def operands(
    function: str, first: Any, second: Any, names: tuple[str, str] = ("value", "filter")
) -> tuple[Array, Array, np.dtype[Any]]:
    """Return both operands as arrays, unconverted, and the dtype of the result: `np.result_type` of the two.

    Nested lists of Python numbers take the other operand's dtype; two of them give float32, complex64 if complex.
    """
    if type(first) is type(second) is np.ndarray and first.dtype == second.dtype and first.dtype in _NATIVE:
        return first, second, first.dtype
    given = (first, second)
    found = [_array(function, name, operand) for name, operand in zip(names, given, strict=True)]
    if all(is_weak for _, is_weak in found):
        is_complex = any(array.dtype.kind == "c" for array, _ in found)
        dtype = np.dtype(np.complex64 if is_complex else np.float32)
        x, w = (_weak(function, name, operand, dtype) for name, operand in zip(names, given, strict=True))
        return x, w, dtype
    one, other = (array for array, _ in found)
    if found[0][1]:
        one = _weak(function, names[0], first, _with_kind(_supported(function, names[1], other), one))
    elif found[1][1]:
        other = _weak(function, names[1], second, _with_kind(_supported(function, names[0], one), other))
    return one, other, common(function, one, other, names)


def single(function: str, name: str, given: Any) -> Array:
    """Return a function's only operand as an array of a native dtype: float32 for nested lists of Python numbers."""
    array, is_weak = _array(function, name, given)
    if is_weak:
        return _weak(function, name, given, _with_kind(np.dtype(np.float32), array))
    return array.astype(_supported(function, name, array), copy=False, subok=False)


def operand(function: str, name: str, given: Any, dtype: np.dtype[Any]) -> Array:
    """Return one operand as an array, unconverted, which must not make results of another dtype than `dtype`."""
    array, is_weak = _array(function, name, given)
    if is_weak:
        array = _weak(function, name, given, _with_kind(dtype, array))
    mine = _supported(function, name, array)
    found = "nothing" if {mine.name, dtype.name} == {"float16", "bfloat16"} else np.result_type(mine, dtype)
    if found != dtype:
        raise TypeError(f"{function}: {name} of {mine} gives {found}, but the plan was made for {dtype}")
    return array


def common(function: str, first: Array, second: Array, names: tuple[str, str] = ("value", "filter")) -> np.dtype[Any]:
    """Return the dtype of the result for two arrays."""
    dtypes = _supported(function, names[0], first), _supported(function, names[1], second)
    if dtypes[0] == dtypes[1]:
        return dtypes[0]
    if {dtype.name for dtype in dtypes} == {"float16", "bfloat16"}:
        raise TypeError(
            f"{function}: {names[0]} of {dtypes[0]} and {names[1]} of {dtypes[1]} have no common dtype; "
            "convert both to one, for example with .astype(np.float32)"
        )
    return np.result_type(*dtypes)


def supported_dtype(function: str, dtype: Any) -> np.dtype[Any]:
    """Return a dtype argument as a native dtype, or raise the TypeError that names the supported ones."""
    try:
        found = None if dtype is None else np.dtype(dtype)  # to NumPy None is float64
    except TypeError:
        raise TypeError(f"{function}: dtype must be one of {', '.join(SUPPORTED)}, got {dtype!r}") from None
    if found is None or found.name not in SUPPORTED:
        raise TypeError(f"{function}: dtype must be one of {', '.join(SUPPORTED)}, got {found}")
    native: np.dtype[Any] = found if found.isnative else found.newbyteorder("=")
    return native


def converted(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return an operand C-contiguous, aligned and native in a dtype: itself, or one converted copy."""
    if array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative:
        return array if type(array) is np.ndarray else array.view(np.ndarray)
    return _required(np.asarray(array), dtype)


@quiet
def _required(array: Array, dtype: np.dtype[Any]) -> Array:
    return np.require(array, dtype, ("C", "A"))


class Unread(np.ndarray[Any, Any]):
    """Stands for an operand of which just shape and dtype are known; `source` is what will be read for it."""

    source: Any

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: np.dtype[Any], source: Any) -> Unread:
        """Return one for a source; it takes no memory, and cannot be computed with."""
        found = np.broadcast_to(np.empty((), dtype), shape).view(cls)
        found.source = source
        return found


class _Placed:
    """What NumPy makes an array of that begins before the memory it holds."""

    __slots__ = ("__array_interface__", "held")

    def __init__(self, held: Array, at: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.held = held  # alive as long as arrays made of this
        self.__array_interface__ = {
            "data": (at, False), "shape": shape, "strides": strides, "typestr": f"|V{held.itemsize}", "version": 3,
        }  # fmt: skip


def placed(window: Array, origin: Sequence[int], shape: tuple[int, ...]) -> Array:
    """Return an array of the shape of a whole in which a C-contiguous window of it lies where it belongs.

    Only indices inside the window may be read or written: there is no memory for the others.
    """
    strides = [window.itemsize] * window.ndim
    for i in range(window.ndim - 2, -1, -1):
        strides[i] = strides[i + 1] * window.shape[i + 1]
    at = window.__array_interface__["data"][0] - sum(i * step for i, step in zip(origin, strides, strict=True))
    return np.asarray(_Placed(window, at, shape, tuple(strides))).view(window.dtype)


def check_out(function: str, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Check that results can be written into `out`, without touching it; return it as a plain ndarray."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"{function}: out must be a numpy.ndarray, got {type(out).__module__}.{type(out).__qualname__}")
    if out.shape != shape:
        raise ValueError(f"{function}: out has shape {out.shape}, but the result has {shape}; they must be equal")
    is_number = out.dtype.kind in "fc" or out.dtype.name in SUPPORTED
    if not is_number or not np.can_cast(dtype, out.dtype, "safe"):
        raise TypeError(f"{function}: out has dtype {out.dtype}, to which the result's {dtype} cannot be cast safely")
    if not out.flags.writeable:
        raise ValueError(f"{function}: out is read-only, but the result of shape {shape} is to be written into it")
    return out.view(np.ndarray)


def into(
    function: str, out: Array | None, operands: Sequence[Array], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[Array | None, Array, list[Array]]:
    """Return `out` checked, an array to compute in, which is `out` if it can be, and the operands converted."""
    target = None if out is None else check_out(function, out, shape, dtype)
    native = [converted(array, dtype) for array in operands]
    if target is None or not target.flags.carray or target.dtype != dtype:
        return target, results.empty(shape, dtype), native
    return target, target, [array.copy() if np.may_share_memory(array, target) else array for array in native]


def _array(function: str, name: str, given: Any) -> tuple[Array, bool]:
    """Return an argument as an array, and whether it is nested lists of Python numbers, with no dtype of its own."""
    if isinstance(given, np.ndarray) and not isinstance(given, np.ma.MaskedArray):
        return given, False
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(f"{function}: {name} is a masked array, whose mask would be lost; call .filled(0) on it first")
    if hasattr(given, "__dask_graph__"):
        # Of all that is named here TensorFlow's functions begin so, and gemmconv.dask has just those.
        takes = f"gemmconv.dask.{function} takes it, or " if function.startswith("conv") else ""
        raise TypeError(
            f"{function}: {name} is a lazy array ({type(given).__qualname__}), which is not computed silently; "
            f"{takes}call .compute() on it first"
        )
    if given is None:
        raise TypeError(f"{function}: {name} is required, got None")
    leaves = set(_leaf_types(function, name, given)) if isinstance(given, list | tuple) else {type(given)}
    if bool in leaves:
        raise TypeError(f"{function}: {name} holds bools; use numbers, or an array with .astype(np.float32)")
    weak = leaves <= set(_PYTHON_NUMBERS)
    if weak:
        dtype = np.complex128 if complex in leaves else np.float64
        return _weak(function, name, given, np.dtype(dtype)), True
    try:
        return np.asarray(given), False
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{function}: {name} cannot be made an array: {error}") from error


def _leaf_types(function: str, name: str, given: list[Any] | tuple[Any, ...]) -> set[type]:
    found: set[type] = set()
    for item in given:
        if isinstance(item, list | tuple):
            found |= _leaf_types(function, name, item)
        elif isinstance(item, np.ma.MaskedArray) or hasattr(item, "__dask_graph__"):
            _array(function, name, item)
        else:
            found.add(type(item))
    return found


def _weak(function: str, name: str, given: Any, dtype: np.dtype[Any]) -> Array:
    try:
        return _cast(given, dtype)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{function}: {name} cannot be made an array of {dtype}: {error}") from error


@quiet
def _cast(given: Any, dtype: np.dtype[Any]) -> Array:
    return np.asarray(given, dtype)


def _with_kind(dtype: np.dtype[Any], weak: Array) -> np.dtype[Any]:
    """Return the dtype that Python numbers take beside an array of `dtype`; complex ones make it complex."""
    if weak.dtype.kind == "c" and dtype.kind != "c":
        return np.dtype(np.complex128 if dtype == np.float64 else np.complex64)
    return dtype


def _supported(function: str, name: str, array: Array) -> np.dtype[Any]:
    dtype = array.dtype
    if dtype in _NATIVE and dtype.isnative:
        return dtype
    text = f"{function}: {name}"
    if dtype.name in SUPPORTED:
        return dtype if dtype.isnative else dtype.newbyteorder("=")
    if dtype.kind in "iub":
        raise TypeError(f"{text} has dtype {dtype}; integers and bools are not taken, convert with .astype(np.float32)")
    if dtype.kind == "O":
        raise TypeError(f"{text} is an array of Python objects; convert with .astype(np.float32)")
    raise TypeError(f"{text} has dtype {dtype}; supported are {', '.join(SUPPORTED)}")
