"""ONNX's operators Conv and ConvTranspose on NumPy arrays, by the text of the standard, without onnx or a runtime.

>>> import numpy as np
>>> from gemmconv.compat import onnx
>>> X = np.ones((1, 3, 4, 4), np.float32)  # [N, C, H, W]
>>> W = np.ones((3, 5, 3, 3), np.float32)  # [C, M/group, kh, kw]
>>> onnx.conv_transpose(X, W, strides=[2, 2], pads=[1, 1, 0, 0]).shape
(1, 5, 8, 8)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemmconv.arguments import integer, one_of
from gemmconv.compat._layer import Layer, Names, operands
from gemmconv.problem import extent

__all__ = ["conv", "conv_transpose"]

_NAMES = Names("X", "W", "B", "group")
_PADS = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")


def conv_transpose(
    X: Any,  # noqa: N803 - the standard's names
    W: Any,  # noqa: N803
    B: Any = None,  # noqa: N803
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """Apply ONNX's ConvTranspose-22, with one to three spatial axes.

    For every position i and tap a, on each axis and in each group::

        Y[b, m, i*stride + a*dilation - begin] += sum over c of X[b, c, i] * W[c, m, a]

    An axis of n positions becomes one of (n-1)*stride + output_padding + (k-1)*dilation + 1 - begin - end. If the size
    is given instead, by `output_shape` or as n*stride by 'SAME_UPPER' and 'SAME_LOWER', begin and end follow from it:
    their sum is (n-1)*stride + output_padding + (k-1)*dilation + 1 - size, half of it each. The odd one goes to the end
    for 'SAME_UPPER' and else to the beginning.

    Parameters
    ----------
    X : array_like
        [N, C, *sizes], 3-D to 5-D.
    W : array_like
        [C, M/group, *kernel], of X's dtype.
    B : array_like, optional
        [M], of X's dtype.
    auto_pad : {'NOTSET', 'SAME_UPPER', 'SAME_LOWER', 'VALID'}
    dilations, strides : sequence of ints, optional
        One for each spatial axis, at least 1. None is 1.
    group : int
    kernel_shape : sequence of ints, optional
        The kernel's sizes, which must be those of W.
    output_padding : sequence of ints, optional
        What is added at the end of each axis: at least 0, and less than the stride or the dilation. None is 0.
    output_shape : sequence of ints, optional
        The spatial sizes of Y, at least 1 and at most what the largest output padding makes. `pads` are ignored then.
    pads : sequence of ints, optional
        What is cut: the beginning of each axis, then the end of each, at least 0. Only with 'NOTSET'. None is 0.
    out, algorithm, workers : optional
        As in `gemmconv.conv3d_transpose`.

    Returns
    -------
    ndarray
        `out`, or a new C-contiguous array [N, M, *sizes] of X's dtype: float16, bfloat16, float32 or float64.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above, or no output is left. Nothing was computed.

    Notes
    -----
    Where a size is beyond what the taps reach, as with 'SAME_UPPER' and a kernel smaller than the stride, the sum of
    begin and end is negative by the equation, while pads are at least 0 by their definition. The definition is
    followed: begin and end are 0, and zeros (and the bias) fill the end, so the size is what was asked for. There ONNX
    Runtime gives a smaller output for 'SAME_UPPER' and 'SAME_LOWER', and onnx's reference evaluator has negative pads.
    ONNX Runtime also refuses some sizes that the text allows: see docs/migration.md.

    References
    ----------
    ONNX 1.23, operator ConvTranspose, version 22.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv.compat.onnx import conv_transpose
    >>> X, W = np.float32([[[1, 2]]]), np.float32([[[1, 10, 100]]])
    >>> conv_transpose(X, W, strides=[2])
    array([[[  1.,  10., 102.,  20., 200.]]], dtype=float32)
    >>> conv_transpose(X, W, strides=[2], auto_pad="SAME_UPPER")
    array([[[  1.,  10., 102.,  20.]]], dtype=float32)
    >>> conv_transpose(X, W, strides=[2], auto_pad="SAME_LOWER")
    array([[[ 10., 102.,  20., 200.]]], dtype=float32)
    """
    layer = _layer("conv_transpose", True, X, W, B, group, kernel_shape)
    steps, dilated = _each(layer, "strides", strides, 1), _each(layer, "dilations", dilations, 1)
    added = _each(layer, "output_padding", output_padding, 0)
    layer.check_output_padding(added, steps, dilated)
    auto_pad = _auto_pad(layer, auto_pad)
    begins, ends = _pads(layer, auto_pad, pads)
    reached = [(n - 1) * s + extent(k, d) for n, s, k, d in zip(layer.sizes, steps, layer.kernel, dilated, strict=True)]
    if output_shape is not None:
        sizes: Sequence[int] = layer.numbers("output_shape", output_shape, 1, layer.rank)
        _check_reach(layer, sizes, reached, steps, dilated)
    elif auto_pad.startswith("SAME"):
        sizes = [n * s for n, s in zip(layer.sizes, steps, strict=True)]
    else:
        ends = [hi - more for hi, more in zip(ends, added, strict=True)]
        return layer.compute(steps, dilated, begins, ends, out=out, algorithm=algorithm, workers=workers)
    begins = [_begin(auto_pad, r + more - o) for r, more, o in zip(reached, added, sizes, strict=True)]
    ends = [r - lo - o for r, lo, o in zip(reached, begins, sizes, strict=True)]
    return layer.compute(steps, dilated, begins, ends, out=out, algorithm=algorithm, workers=workers)


def conv(
    X: Any,  # noqa: N803 - the standard's names
    W: Any,  # noqa: N803
    B: Any = None,  # noqa: N803
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """Apply ONNX's Conv-22, with one to three spatial axes.

    On each axis and in each group, for every position i::

        Y[b, m, i] = B[m] + sum over c and taps a of X[b, c, i*stride + a*dilation - begin] * W[m, c, a]

    An axis of n positions becomes one of (n + begin + end - (k-1)*dilation - 1) // stride + 1. With 'SAME_UPPER' and
    'SAME_LOWER' it becomes one of ceil(n / stride) and is padded by as little as that needs, half of it at each end.
    The odd one goes to the end for 'SAME_UPPER' and to the beginning for 'SAME_LOWER'.

    Parameters
    ----------
    X : array_like
        [N, C, *sizes], 3-D to 5-D.
    W : array_like
        [M, C/group, *kernel], of X's dtype.
    B : array_like, optional
        [M], of X's dtype.
    auto_pad : {'NOTSET', 'SAME_UPPER', 'SAME_LOWER', 'VALID'}
    dilations, strides : sequence of ints, optional
        One for each spatial axis, at least 1. None is 1.
    group : int
    kernel_shape : sequence of ints, optional
        The kernel's sizes, which must be those of W.
    pads : sequence of ints, optional
        Zeros put around X: the beginning of each axis, then the end of each, at least 0. Only with 'NOTSET'. None is 0.
    out, algorithm, workers : optional
        As in `gemmconv.conv3d`.

    Returns
    -------
    ndarray
        `out`, or a new C-contiguous array [N, M, *sizes] of X's dtype: float16, bfloat16, float32 or float64.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above, or the kernel is larger than an axis with its padding. Nothing was computed.

    Notes
    -----
    'SAME_UPPER' and 'SAME_LOWER' are computed as the text has them. ONNX Runtime refuses them with a dilation, and has
    negative pads for some kernels smaller than the stride.

    References
    ----------
    ONNX 1.23, operator Conv, version 22.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv.compat.onnx import conv
    >>> X, W = np.float32([[[1, 2, 3, 4]]]), np.float32([[[1, 10, 100]]])
    >>> conv(X, W, np.float32([0.5]), pads=[1, 0])
    array([[[210.5, 321.5, 432.5]]], dtype=float32)
    >>> conv(X, W, strides=[2], auto_pad="SAME_UPPER"), conv(X, W, strides=[2], auto_pad="SAME_LOWER")
    (array([[[321.,  43.]]], dtype=float32), array([[[210., 432.]]], dtype=float32))
    """
    layer = _layer("conv", False, X, W, B, group, kernel_shape)
    steps, dilated = _each(layer, "strides", strides, 1), _each(layer, "dilations", dilations, 1)
    auto_pad = _auto_pad(layer, auto_pad)
    begins, ends = _pads(layer, auto_pad, pads)
    if auto_pad.startswith("SAME"):
        axes = zip(layer.sizes, steps, layer.kernel, dilated, strict=True)
        total = [max(0, (-(-n // s) - 1) * s + extent(k, d) - n) for n, s, k, d in axes]
        begins = [_begin(auto_pad, zeros) for zeros in total]
        ends = [zeros - begin for zeros, begin in zip(total, begins, strict=True)]
    return layer.compute(steps, dilated, begins, ends, out=out, algorithm=algorithm, workers=workers)


def _layer(name: str, transposed: bool, x: Any, w: Any, b: Any, group: Any, kernel_shape: Any) -> Layer:
    function = f"compat.onnx.{name}"
    x, w, b = operands(function, _NAMES, x, w, b)
    if x.ndim not in (3, 4, 5):
        raise ValueError(
            f"{function}: X must be 3-D to 5-D (N, C and 1 to 3 spatial axes), got {x.ndim}-D, shape {x.shape}"
        )
    if x.dtype.kind == "c":
        raise TypeError(f"{function}: X has dtype {x.dtype}, but the standard has this operator for real numbers only")
    layer = Layer(function, _NAMES, transposed, x, w, b, integer(f"{function}: group", group))
    if kernel_shape is not None:
        given = layer.numbers("kernel_shape", kernel_shape, 1, layer.rank)
        if given != layer.kernel:
            raise ValueError(
                f"{function}: kernel_shape={list(given)} is not the kernel of W, {list(layer.kernel)} "
                f"(W.shape[2:] of {w.shape}); they must be equal"
            )
    return layer


def _each(layer: Layer, name: str, value: Any, least: int) -> Sequence[int]:
    """Return one integer for each spatial axis; all are the least one if there is no value."""
    return (least,) * layer.rank if value is None else layer.numbers(name, value, least, layer.rank)


def _auto_pad(layer: Layer, given: Any) -> str:
    """Return a checked `auto_pad`; strings of a model's attributes are bytes."""
    text = given.decode("ascii", "replace") if isinstance(given, bytes) else given
    return one_of(layer.function, "auto_pad", text, _PADS)


def _pads(layer: Layer, auto_pad: str, pads: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return the explicit pads at the beginning and the end of each axis."""
    if pads is None:
        return (0,) * layer.rank, (0,) * layer.rank
    if auto_pad != "NOTSET":
        raise ValueError(f"{layer.function}: pads and auto_pad={auto_pad!r} are both given; pads need 'NOTSET'")
    given = layer.numbers("pads", pads, 0, 2 * layer.rank)
    return given[: layer.rank], given[layer.rank :]


def _check_reach(
    layer: Layer, sizes: Sequence[int], reached: Sequence[int], steps: Sequence[int], dilated: Sequence[int]
) -> None:
    """Refuse an output_shape that no output padding could make: it would be that of a larger input."""
    for size, reach, s, d in zip(sizes, reached, steps, dilated, strict=True):
        if size > reach + max(s, d) - 1:
            raise ValueError(
                f"{layer.function}: output_shape={list(sizes)} is out of reach: the taps reach {reach}, and stride {s} "
                f"and dilation {d} allow up to {reach + max(s, d) - 1}, got {size}"
            )


def _begin(auto_pad: str, total: int) -> int:
    """Return the part of the padding that goes to the beginning; pads are not negative, whatever their sum."""
    total = max(0, total)
    return total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
