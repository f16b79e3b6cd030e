"""PyTorch's convolutions on NumPy arrays: `torch.nn.functional`'s names, layouts, rules and defaults, without torch.

>>> import numpy as np
>>> import gemmconv.compat.torch as F
>>> x = np.ones((1, 3, 4, 4, 4), np.float32)  # [N, Cin, D, H, W]
>>> w = np.ones((3, 5, 2, 2, 2), np.float32)  # [Cin, Cout, kd, kh, kw]
>>> F.conv_transpose3d(x, w, stride=2).shape
(1, 5, 8, 8, 8)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gemmconv.arguments import integer, one_of
from gemmconv.compat._layer import Layer, Names, operands
from gemmconv.problem import extent

__all__ = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]

_NAMES = Names("input", "weight", "bias", "groups")
Result = np.ndarray[Any, Any]


def conv_transpose3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    out: Result | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> Result:
    """Apply a 3-D transposed convolution, as ``torch.nn.functional.conv_transpose3d`` does.

    With x = `input` and w = `weight`, for every position i and tap a, on each of the three axes and in each group::

        y[b, co, i*stride + a*dilation - padding] += sum over ci of x[b, ci, i] * w[ci, co, a]

    An axis of n positions becomes one of (n-1)*stride + (k-1)*dilation + 1 - 2*padding + output_padding.

    Parameters
    ----------
    input : array_like
        [N, Cin, D, H, W], or [Cin, D, H, W] without a batch.
    weight : array_like
        [Cin, Cout/groups, kd, kh, kw], of the input's dtype.
    bias : array_like, optional
        [Cout], of the input's dtype.
    stride, padding, output_padding, dilation : int or sequence of 1 or 3 ints
        For D, H, W. Strides and dilations are at least 1, paddings at least 0; an output padding is less than the
        stride or less than the dilation of its axis.
    groups : int
        The channels of input and output are divided into as many groups, which are convolved apart.
    out : ndarray, optional
        Where to write the result, as in `gemmconv.conv3d_transpose`.
    algorithm, workers : optional
        As in `gemmconv.conv3d_transpose`.

    Returns
    -------
    ndarray
        `out`, or a new C-contiguous array [N, Cout, D, H, W] of the input's dtype, without N if the input has none.

    Raises
    ------
    ValueError, TypeError
        Where PyTorch raises, and for integers, bools and what else gemmconv does not take. Nothing was computed.

    References
    ----------
    PyTorch 2.13, ``torch.nn.functional.conv_transpose3d``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv.compat.torch import conv_transpose3d
    >>> x, w = np.ones((1, 4, 3, 3, 3), np.float32), np.ones((4, 1, 3, 3, 3), np.float32)
    >>> conv_transpose3d(x, w, np.zeros(2, np.float32), stride=2, padding=1, output_padding=1, groups=2).shape
    (1, 2, 6, 6, 6)
    """
    how = {"out": out, "algorithm": algorithm, "workers": workers}
    return _transposed(3, input, weight, bias, stride, padding, output_padding, groups, dilation, **how)


def conv_transpose2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    out: Result | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> Result:
    """Apply a 2-D transposed convolution, as ``torch.nn.functional.conv_transpose2d`` does.

    Parameters
    ----------
    input : array_like
        [N, Cin, H, W] or [Cin, H, W].
    weight : array_like
        [Cin, Cout/groups, kh, kw].
    bias, stride, padding, output_padding, groups, dilation, out, algorithm, workers
        As in `conv_transpose3d`, for H and W.

    Returns
    -------
    ndarray
        [N, Cout, H, W] or [Cout, H, W].

    Raises
    ------
    ValueError, TypeError
        As `conv_transpose3d`.

    References
    ----------
    PyTorch 2.13, ``torch.nn.functional.conv_transpose2d``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv.compat.torch import conv_transpose2d
    >>> conv_transpose2d(np.ones((1, 3, 4, 4), np.float32), np.ones((3, 2, 4, 4), np.float32), None, 2, 1).shape
    (1, 2, 8, 8)
    """
    how = {"out": out, "algorithm": algorithm, "workers": workers}
    return _transposed(2, input, weight, bias, stride, padding, output_padding, groups, dilation, **how)


def conv_transpose1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    out: Result | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> Result:
    """Apply a 1-D transposed convolution, as ``torch.nn.functional.conv_transpose1d`` does.

    Parameters
    ----------
    input : array_like
        [N, Cin, W] or [Cin, W].
    weight : array_like
        [Cin, Cout/groups, kw].
    bias, stride, padding, output_padding, groups, dilation, out, algorithm, workers
        As in `conv_transpose3d`, for W.

    Returns
    -------
    ndarray
        [N, Cout, W] or [Cout, W].

    Raises
    ------
    ValueError, TypeError
        As `conv_transpose3d`.

    References
    ----------
    PyTorch 2.13, ``torch.nn.functional.conv_transpose1d``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv.compat.torch import conv_transpose1d
    >>> conv_transpose1d(np.float32([[1, 2]]), np.float32([[[1, 10, 100]]]), np.float32([0.5]), stride=2)
    array([[  1.5,  10.5, 102.5,  20.5, 200.5]], dtype=float32)
    """
    how = {"out": out, "algorithm": algorithm, "workers": workers}
    return _transposed(1, input, weight, bias, stride, padding, output_padding, groups, dilation, **how)


def conv3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: Result | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> Result:
    """Apply a 3-D convolution, as ``torch.nn.functional.conv3d`` does.

    With x = `input` and w = `weight`, on each of the three axes and in each group, for every position i::

        y[b, co, i] = bias[co] + sum over ci and taps a of x[b, ci, i*stride + a*dilation - padding] * w[co, ci, a]

    An axis of n positions becomes one of (n + 2*padding - (k-1)*dilation - 1) // stride + 1.

    Parameters
    ----------
    input : array_like
        [N, Cin, D, H, W], or [Cin, D, H, W] without a batch.
    weight : array_like
        [Cout, Cin/groups, kd, kh, kw], of the input's dtype.
    bias : array_like, optional
        [Cout], of the input's dtype.
    stride, dilation : int or sequence of 1 or 3 ints
        For D, H, W, at least 1.
    padding : int or sequence of 1 or 3 ints, or {'valid', 'same'}
        Zeros before and after D, H and W. 'valid' is 0; 'same' keeps the sizes, needs strides of 1, and puts the
        smaller half of (k-1)*dilation zeros before.
    groups : int
        The channels of input and output are divided into as many groups, which are convolved apart.
    out, algorithm, workers : optional
        As in `gemmconv.conv3d`.

    Returns
    -------
    ndarray
        `out`, or a new C-contiguous array [N, Cout, D, H, W] of the input's dtype, without N if the input has none.

    Raises
    ------
    ValueError, TypeError
        Where PyTorch raises, and for integers, bools and what else gemmconv does not take. Nothing was computed.

    References
    ----------
    PyTorch 2.13, ``torch.nn.functional.conv3d``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv.compat.torch import conv3d
    >>> x, w = np.ones((1, 4, 6, 6, 6), np.float32), np.ones((2, 2, 3, 3, 3), np.float32)
    >>> conv3d(x, w, stride=2, padding=1, groups=2)[0, :, 1, 1, 1]
    array([54., 54.], dtype=float32)
    """
    how = {"out": out, "algorithm": algorithm, "workers": workers}
    return _convolution(3, input, weight, bias, stride, padding, dilation, groups, **how)


def conv2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: Result | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> Result:
    """Apply a 2-D convolution, as ``torch.nn.functional.conv2d`` does.

    Parameters
    ----------
    input : array_like
        [N, Cin, H, W] or [Cin, H, W].
    weight : array_like
        [Cout, Cin/groups, kh, kw].
    bias, stride, padding, dilation, groups, out, algorithm, workers
        As in `conv3d`, for H and W.

    Returns
    -------
    ndarray
        [N, Cout, H, W] or [Cout, H, W].

    Raises
    ------
    ValueError, TypeError
        As `conv3d`.

    References
    ----------
    PyTorch 2.13, ``torch.nn.functional.conv2d``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv.compat.torch import conv2d
    >>> conv2d(np.ones((3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32), padding="same").shape
    (4, 8, 8)
    """
    how = {"out": out, "algorithm": algorithm, "workers": workers}
    return _convolution(2, input, weight, bias, stride, padding, dilation, groups, **how)


def conv1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: Result | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> Result:
    """Apply a 1-D convolution, as ``torch.nn.functional.conv1d`` does.

    Parameters
    ----------
    input : array_like
        [N, Cin, W] or [Cin, W].
    weight : array_like
        [Cout, Cin/groups, kw].
    bias, stride, padding, dilation, groups, out, algorithm, workers
        As in `conv3d`, for W.

    Returns
    -------
    ndarray
        [N, Cout, W] or [Cout, W].

    Raises
    ------
    ValueError, TypeError
        As `conv3d`.

    References
    ----------
    PyTorch 2.13, ``torch.nn.functional.conv1d``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv.compat.torch import conv1d
    >>> conv1d(np.float32([[1, 2, 3]]), np.float32([[[1, 10]]]), dilation=2)
    array([[31.]], dtype=float32)
    """
    how = {"out": out, "algorithm": algorithm, "workers": workers}
    return _convolution(1, input, weight, bias, stride, padding, dilation, groups, **how)


def _transposed(
    rank: int,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
    **how: Any,
) -> Result:
    layer = _layer(rank, True, input, weight, bias, groups)
    strides, dilations = _each(layer, "stride", stride, 1), _each(layer, "dilation", dilation, 1)
    cut, added = _each(layer, "padding", padding, 0), _each(layer, "output_padding", output_padding, 0)
    layer.check_output_padding(added, strides, dilations)
    return layer.compute(strides, dilations, cut, [c - more for c, more in zip(cut, added, strict=True)], **how)


def _convolution(
    rank: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any, **how: Any
) -> Result:
    layer = _layer(rank, False, input, weight, bias, groups)
    strides, dilations = _each(layer, "stride", stride, 1), _each(layer, "dilation", dilation, 1)
    if not isinstance(padding, str):
        before = after = _each(layer, "padding", padding, 0)
    elif one_of(layer.function, "padding", padding, ("valid", "same")) == "valid":
        before = after = (0,) * rank
    else:
        if max(strides) > 1:
            raise ValueError(f"{layer.function}: padding='same' needs a stride of 1 everywhere, got {list(strides)}")
        total = [extent(k, d) - 1 for k, d in zip(layer.kernel, dilations, strict=True)]
        before = tuple(zeros // 2 for zeros in total)
        after = tuple(zeros - zeros // 2 for zeros in total)
    return layer.compute(strides, dilations, before, after, **how)


def _layer(rank: int, transposed: bool, input: Any, weight: Any, bias: Any, groups: Any) -> Layer:
    function = f"compat.torch.conv{'_transpose' if transposed else ''}{rank}d"
    x, w, b = operands(function, _NAMES, input, weight, bias)
    if x.ndim not in (rank + 1, rank + 2):
        raise ValueError(
            f"{function}: input must be {rank + 2}-D (N, C and {rank} spatial) or {rank + 1}-D (without N), "
            f"got {x.ndim}-D, shape {x.shape}"
        )
    batched = x.ndim == rank + 2
    if w.size == 0:
        raise ValueError(f"{function}: weight must not be empty, got shape {w.shape}")
    if 0 in x.shape[1 if batched else 0 :]:
        raise ValueError(f"{function}: input may be empty in its batch only, got shape {x.shape}")
    groups = integer(f"{function}: groups", groups)
    return Layer(function, _NAMES, transposed, x if batched else x[np.newaxis], w, b, groups, batched)


def _each(layer: Layer, name: str, value: Any, least: int) -> tuple[int, ...]:
    """Return an argument as one integer for each spatial axis; a single one stands for all, as in PyTorch."""
    is_sequence = hasattr(value, "__getitem__") and not isinstance(value, str | bytes) and np.ndim(value) > 0
    sequence = value if is_sequence else (integer(f"{layer.function}: {name}", value),)
    given = layer.numbers(name, sequence, least, 1, layer.rank)
    return given * layer.rank if len(given) == 1 else given
