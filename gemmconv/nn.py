"""TensorFlow's names and signatures: each function is a docstring, the checking of arguments, a plan and its call."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemmconv import arguments, arrays, calls
from gemmconv.plan import Plan


def conv3d_transpose(
    value: Any = None,
    filter: Any = None,
    output_shape: Any = None,
    strides: Any = None,
    padding: str = "SAME",
    data_format: str | None = "NDHWC",
    name: str | None = None,
    input: Any = None,
    filters: Any = None,
    dilations: Any = None,
    *,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """The transpose of `conv3d`, its gradient with respect to the input: `tf.compat.v1.nn.conv3d_transpose`.

    With x = `value` [N, D, H, W, Cin] and w = `filter` [kd, kh, kw, Cout, Cin], for every position i and tap a, on each
    of the three axes::

        y[b, i*stride + a*dilation - lo, co] += sum over ci of x[b, i, ci] * w[a, co, ci]

    Terms outside the output are dropped, cells that nothing reaches are 0. With K = (k-1)*dilation + 1, lo is 0 for
    'VALID' and max(0, (n-1)*stride + K - o) // 2 for 'SAME', which depends on the output size o that is asked for.

    Parameters
    ----------
    value : array_like, 5-D
        The input, in `data_format` order: [N, D, H, W, Cin] or [N, Cin, D, H, W].
    filter : array_like, 5-D
        [kd, kh, kw, Cout, Cin], output channels before input channels, whatever the layout.
    output_shape : sequence of 5 ints, optional
        The shape of the result in `data_format` order. On each axis of n >= 1 input positions, 'SAME' allows
        (n-1)*stride + 1 to n*stride and 'VALID' (n-1)*stride + K to n*stride + K - 1. None infers n*stride for 'SAME'
        and (n-1)*stride + max(stride, K), at most the largest that is allowed, for 'VALID'.
    strides, dilations : int or sequence of 1, 3 or 5 ints, optional
        At least 1; one for all axes, three for D, H, W, or five in `data_format` order with 1 for N and C. None is 1.
    padding : {'SAME', 'VALID'}
    data_format : {'NDHWC', 'NCDHW'}, optional
    name : str, optional
        Accepted for compatibility, without effect.
    input, filters : array_like, optional
        Other names for `value` and `filter`.
    out : ndarray, optional
        Where to write the result: of its shape, and of a dtype to which its dtype casts safely. If the call fails or is
        interrupted in mid-run, `out` may be partly written; a refused call leaves it as it was.
    algorithm : {'auto', 'col2im', 'kn2row', 'winograd', 'mec', 'depthwise'}
        The lowering. 'auto' takes the one that is estimated to be the fastest; 'col2im' can do every problem, 'mec' is
        meant for groups of few channels, and 'depthwise' can do those of one. Whole numbers give the same bits with
        each, as long as their sums are exact; other data the same up to rounding.
    workers : int, optional
        Threads to use, at most the usable cores; negative numbers count from the end. None takes `set_workers`' value,
        else as many as BLAS is allowed. The result has the same bits for any number.

    Returns
    -------
    ndarray
        `out`, or a new C-contiguous array in `data_format` order of dtype ``np.result_type(value, filter)``: float16,
        bfloat16 (ml_dtypes'), float32, float64, complex64 or complex128. Half precisions are summed in float32 and
        rounded once. Nested lists of Python numbers take the other operand's dtype; two of them give float32.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above, or the lowering that was asked for cannot do this problem. The text names the
        argument, the value and the rule with its numbers; nothing was computed and `out` not touched.

    References
    ----------
    TensorFlow 2.21, ``tf.compat.v1.nn.conv3d_transpose``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv import conv3d_transpose
    >>> x = np.array([1, 2], np.float32).reshape(1, 1, 1, 2, 1)
    >>> w = np.array([1, 10, 100], np.float32).reshape(1, 1, 3, 1, 1)
    >>> conv3d_transpose(x, w, [1, 1, 1, 4, 1], strides=(1, 1, 2)).ravel()
    array([  1.,  10., 102.,  20.], dtype=float32)
    """
    value = _one_given("conv3d_transpose", "value", value, "input", input)
    filter = _one_given("conv3d_transpose", "filter", filter, "filters", filters)
    how: dict[str, Any] = {"out": out, "algorithm": algorithm, "workers": workers}
    return _transposed(
        3, "conv3d_transpose", value, filter, output_shape, strides, padding, data_format, dilations, **how
    )


def plan_conv3d_transpose(
    value_shape: Any,
    filter_shape: Any,
    output_shape: Any = None,
    strides: Any = None,
    padding: str = "SAME",
    data_format: str | None = "NDHWC",
    dilations: Any = None,
    *,
    dtype: Any = np.float32,
    algorithm: str = "auto",
    workers: int | None = None,
) -> Plan:
    """Decide how a `conv3d_transpose` of given shapes is done, without any array.

    Parameters
    ----------
    value_shape, filter_shape : sequence of 5 ints
        Shapes of the operands, as `conv3d_transpose` takes them.
    output_shape, strides, padding, data_format, dilations, algorithm
        As in `conv3d_transpose`.
    dtype : dtype_like
        The dtype of the result.
    workers : int, optional
        As in `conv3d_transpose`, resolved here and kept by the plan.

    Returns
    -------
    Plan
        With `output_shape`, `algorithm`, `reason`, `flops` (FLOPs), `bytes_moved` and `workspace_bytes` (bytes). Print
        it for a report, call it as ``plan(value, filter, out=None)`` for results.

    Raises
    ------
    ValueError, TypeError
        As `conv3d_transpose`.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv import plan_conv3d_transpose
    >>> plan = plan_conv3d_transpose([1, 8, 8, 8, 32], [3, 3, 3, 16, 32], strides=2)
    >>> plan.output_shape, plan.flops
    ((1, 16, 16, 16, 16), 14155776)
    >>> plan(np.ones((1, 8, 8, 8, 32), np.float32), np.ones((3, 3, 3, 16, 32), np.float32))[0, 8, 8, 8, 0]
    np.float32(256.0)
    """
    function = "plan_conv3d_transpose"
    asked = arguments.conv3d_transpose_problem(
        _sizes(function, "value_shape", value_shape),
        _sizes(function, "filter_shape", filter_shape),
        output_shape,
        strides,
        padding,
        data_format,
        dilations,
        arrays.supported_dtype(function, dtype),
        function=function,
    )
    return calls.plan(function, asked, algorithm, workers)


def conv3d(
    input: Any,
    filter: Any = None,
    strides: Any = None,
    padding: str | None = None,
    data_format: str | None = "NDHWC",
    dilations: Any = (1, 1, 1, 1, 1),
    name: str | None = None,
    filters: Any = None,
    *,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """3-D convolution, in the sense of cross-correlation: `tf.compat.v1.nn.conv3d`.

    With z = `input` [N, D, H, W, Cin] and w = `filter` [kd, kh, kw, Cin, Cout], for every position i of the result, on
    each of the three axes::

        y[b, i, co] = sum over taps a and channels ci of z[b, i*stride + a*dilation - lo, ci] * w[a, ci, co]

    Terms outside the input are zero. With n input positions and K = (k-1)*dilation + 1, 'SAME' gives ceil(n/stride)
    positions and lo = max(0, (ceil(n/stride)-1)*stride + K - n) // 2, 'VALID' max(0, ceil((n-K+1)/stride)) and lo = 0.

    Parameters
    ----------
    input : array_like, 5-D
        In `data_format` order: [N, D, H, W, Cin] or [N, Cin, D, H, W].
    filter : array_like, 5-D
        [kd, kh, kw, Cin, Cout], whatever the layout. With [kd, kh, kw, Cin/groups, Cout] the convolution is grouped:
        each group of the output channels sees one group of the input's.
    strides : int or sequence of 1, 3 or 5 ints
        As in `conv3d_transpose`; required.
    padding : {'SAME', 'VALID'}
        Required.
    data_format, dilations, name
        As in `conv3d_transpose`.
    filters : array_like, optional
        Another name for `filter`.
    out, workers
        As in `conv3d_transpose`.
    algorithm : {'auto', 'im2col', 'kn2row', 'winograd', 'mec', 'depthwise'}
        As in `conv3d_transpose`, but for 'im2col', which can do every problem.

    Returns
    -------
    ndarray
        `out`, or a new C-contiguous array in `data_format` order; its dtype as in `conv3d_transpose`.

    Raises
    ------
    ValueError, TypeError
        As `conv3d_transpose`.

    References
    ----------
    TensorFlow 2.21, ``tf.compat.v1.nn.conv3d``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv import conv3d
    >>> z = np.array([1, 2, 3, 4, 5], np.float32).reshape(1, 1, 1, 5, 1)
    >>> w = np.array([1, 10, 100], np.float32).reshape(1, 1, 3, 1, 1)
    >>> conv3d(z, w, strides=(1, 1, 2), padding="SAME").ravel()
    array([210., 432.,  54.], dtype=float32)
    """
    function = "conv3d"
    filter = _one_given(function, "filter", filter, "filters", filters)
    how: dict[str, Any] = {"out": out, "algorithm": algorithm, "workers": workers}
    _required(function, "strides", strides)
    return _convolved(3, function, input, filter, strides, padding, data_format, dilations, **how)


def conv3d_backprop_filter_v2(
    input: Any,
    filter_sizes: Any,
    out_backprop: Any,
    strides: Any,
    padding: str,
    data_format: str | None = "NDHWC",
    dilations: Any = (1, 1, 1, 1, 1),
    name: str | None = None,
    *,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """The gradient of `conv3d` with respect to the filter: `tf.raw_ops.Conv3DBackpropFilterV2`.

    With z = `input`, g = `out_backprop` and lo as in `conv3d`::

        w[a, ci, co] = sum over b and positions i of z[b, i*stride + a*dilation - lo, ci] * g[b, i, co]

    It is the gradient of `conv3d_transpose` as well: give that one's gradient as `input`, its value as `out_backprop`.

    Parameters
    ----------
    input : array_like, 5-D
        What was convolved, in `data_format` order.
    filter_sizes : sequence of 5 ints
        The filter's shape: [kd, kh, kw, Cin, Cout], or [kd, kh, kw, Cin/groups, Cout].
    out_backprop : array_like, 5-D
        The gradient of the convolution's result, in that one's shape.
    strides, padding, data_format, dilations, name
        Those of the convolution; strides and padding are required.
    out, workers
        As in `conv3d_transpose`.
    algorithm : {'auto', 'im2col', 'winograd', 'mec'}
        As in `conv3d`.

    Returns
    -------
    ndarray
        `out`, or a new C-contiguous array of shape `filter_sizes`; its dtype as in `conv3d_transpose`.

    Raises
    ------
    ValueError, TypeError
        As `conv3d_transpose`; also if `out_backprop` does not have the size that the rule of `conv3d` gives.

    References
    ----------
    TensorFlow 2.21, ``tf.raw_ops.Conv3DBackpropFilterV2``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv import conv3d_backprop_filter_v2
    >>> z = np.array([1, 2, 3, 4, 5], np.float32).reshape(1, 1, 1, 5, 1)
    >>> g = np.array([1, 10, 100], np.float32).reshape(1, 1, 1, 3, 1)
    >>> conv3d_backprop_filter_v2(z, [1, 1, 3, 1, 1], g, (1, 1, 2), "SAME").ravel()
    array([420., 531.,  42.], dtype=float32)
    """
    function = "conv3d_backprop_filter_v2"
    _required(function, "strides", strides)
    z, g, dtype = arrays.operands(function, input, out_backprop, ("input", "out_backprop"))
    asked = arguments.conv3d_backprop_filter_problem(
        z.shape, filter_sizes, g.shape, strides, padding, data_format, dilations, dtype, function=function
    )
    return calls.compute(function, asked, z, g, out=out, algorithm=algorithm, workers=workers)


def plan_conv3d(
    input_shape: Any,
    filter_shape: Any,
    strides: Any,
    padding: str,
    data_format: str | None = "NDHWC",
    dilations: Any = None,
    *,
    dtype: Any = np.float32,
    algorithm: str = "auto",
    workers: int | None = None,
) -> Plan:
    """Decide how a `conv3d` of given shapes is done, without any array; as `plan_conv3d_transpose`.

    Parameters
    ----------
    input_shape, filter_shape : sequence of 5 ints
        Shapes of the operands, as `conv3d` takes them.
    strides, padding, data_format, dilations, algorithm
        As in `conv3d`.
    dtype, workers
        As in `plan_conv3d_transpose`.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError, TypeError
        As `conv3d`.

    Examples
    --------
    >>> from gemmconv import plan_conv3d
    >>> plan_conv3d([1, 16, 16, 16, 8], [3, 3, 3, 8, 32], 2, "SAME").output_shape
    (1, 8, 8, 8, 32)
    """
    function = "plan_conv3d"
    _required(function, "strides", strides)
    shapes = _sizes(function, "input_shape", input_shape), _sizes(function, "filter_shape", filter_shape)
    supported = arrays.supported_dtype(function, dtype)
    asked = arguments.conv3d_problem(*shapes, strides, padding, data_format, dilations, supported, function=function)
    return calls.plan(function, asked, algorithm, workers)


def plan_conv3d_backprop_filter_v2(
    input_shape: Any,
    filter_sizes: Any,
    out_backprop_shape: Any,
    strides: Any,
    padding: str,
    data_format: str | None = "NDHWC",
    dilations: Any = None,
    *,
    dtype: Any = np.float32,
    algorithm: str = "auto",
    workers: int | None = None,
) -> Plan:
    """Decide how a `conv3d_backprop_filter_v2` of given shapes is done; as `plan_conv3d_transpose`.

    Parameters
    ----------
    input_shape, out_backprop_shape : sequence of 5 ints
        Shapes of the operands, as `conv3d_backprop_filter_v2` takes them.
    filter_sizes, strides, padding, data_format, dilations, algorithm
        As in that one.
    dtype, workers
        As in `plan_conv3d_transpose`.

    Returns
    -------
    Plan
        Call it as ``plan(input, out_backprop, out=None)``.

    Raises
    ------
    ValueError, TypeError
        As `conv3d_backprop_filter_v2`.

    Examples
    --------
    >>> from gemmconv import plan_conv3d_backprop_filter_v2
    >>> plan_conv3d_backprop_filter_v2([1, 8, 8, 8, 4], [3, 3, 3, 4, 6], [1, 4, 4, 4, 6], 2, "SAME").output_shape
    (3, 3, 3, 4, 6)
    """
    function = "plan_conv3d_backprop_filter_v2"
    _required(function, "strides", strides)
    first, second = (
        _sizes(function, name, shape)
        for name, shape in (("input_shape", input_shape), ("out_backprop_shape", out_backprop_shape))
    )
    supported = arrays.supported_dtype(function, dtype)
    asked = arguments.conv3d_backprop_filter_problem(
        first, filter_sizes, second, strides, padding, data_format, dilations, supported, function=function
    )
    return calls.plan(function, asked, algorithm, workers)


def conv2d_transpose(
    value: Any = None,
    filter: Any = None,
    output_shape: Any = None,
    strides: Any = None,
    padding: Any = "SAME",
    data_format: str | None = "NHWC",
    name: str | None = None,
    input: Any = None,
    filters: Any = None,
    dilations: Any = None,
    *,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """`conv3d_transpose` in two dimensions, with explicit paddings: `tf.compat.v1.nn.conv2d_transpose`.

    Parameters
    ----------
    value, input : array_like, 4-D
        [N, H, W, Cin] or [N, Cin, H, W]; one of the two names.
    filter, filters : array_like, 4-D
        [kh, kw, Cout, Cin]; one of the two names.
    output_shape : sequence of 4 ints, optional
        As in `conv3d_transpose`. With explicit paddings (n-1)*stride + K - before - after is the smallest size on an
        axis, and the largest is stride - 1 more. None infers (n-1)*stride + max(stride, K) - before - after, at most
        the largest.
    strides, dilations : int or sequence of 1, 2 or 4 ints, optional
    padding : {'SAME', 'VALID'} or sequence of 4 pairs of ints
        Pairs are positions cut off before and after, for each axis of `data_format`, [0, 0] for N and C.
    data_format : {'NHWC', 'NCHW'}, optional
    name, out, algorithm, workers
        As in `conv3d_transpose`.

    Returns
    -------
    ndarray
        As from `conv3d_transpose`.

    Raises
    ------
    ValueError, TypeError
        As `conv3d_transpose`.

    References
    ----------
    TensorFlow 2.21, ``tf.compat.v1.nn.conv2d_transpose``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv import conv2d_transpose
    >>> x, w = np.ones((1, 8, 8, 3), np.float32), np.ones((4, 4, 5, 3), np.float32)
    >>> conv2d_transpose(x, w, strides=2, padding=[[0, 0], [1, 1], [1, 1], [0, 0]]).shape
    (1, 16, 16, 5)
    """
    function = "conv2d_transpose"
    value = _one_given(function, "value", value, "input", input)
    filter = _one_given(function, "filter", filter, "filters", filters)
    how: dict[str, Any] = {"out": out, "algorithm": algorithm, "workers": workers}
    return _transposed(2, function, value, filter, output_shape, strides, padding, data_format, dilations, **how)


def conv1d_transpose(
    input: Any,
    filters: Any,
    output_shape: Any,
    strides: Any,
    padding: str = "SAME",
    data_format: str | None = "NWC",
    dilations: Any = None,
    name: str | None = None,
    *,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """`conv3d_transpose` in one dimension: `tf.compat.v1.nn.conv1d_transpose`.

    Parameters
    ----------
    input : array_like, 3-D
        [N, W, Cin] or [N, Cin, W].
    filters : array_like, 3-D
        [kw, Cout, Cin].
    output_shape : sequence of 3 ints or None
        As in `conv3d_transpose`.
    strides, dilations : int or sequence of 1 or 3 ints, or None
    padding : {'SAME', 'VALID'}
    data_format : {'NWC', 'NCW'}, optional
    name, out, algorithm, workers
        As in `conv3d_transpose`.

    Returns
    -------
    ndarray
        As from `conv3d_transpose`.

    Raises
    ------
    ValueError, TypeError
        As `conv3d_transpose`.

    References
    ----------
    TensorFlow 2.21, ``tf.compat.v1.nn.conv1d_transpose``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv import conv1d_transpose
    >>> x = np.array([1, 2], np.float32).reshape(1, 2, 1)
    >>> w = np.array([1, 10, 100], np.float32).reshape(3, 1, 1)
    >>> conv1d_transpose(x, w, [1, 4, 1], 2).ravel()
    array([  1.,  10., 102.,  20.], dtype=float32)
    """
    how: dict[str, Any] = {"out": out, "algorithm": algorithm, "workers": workers}
    names = ("input", "filters")
    return _transposed(
        1, "conv1d_transpose", input, filters, output_shape, strides, padding, data_format, dilations, names, **how
    )


def conv_transpose(
    input: Any,
    filters: Any,
    output_shape: Any,
    strides: Any,
    padding: Any = "SAME",
    data_format: str | None = None,
    dilations: Any = None,
    name: str | None = None,
    *,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """The transposed convolution in as many dimensions as `output_shape` has: `tf.nn.conv_transpose`.

    Parameters
    ----------
    input, filters : array_like, 3-D to 5-D
        As in `conv1d_transpose`, `conv2d_transpose` or `conv3d_transpose`.
    output_shape : sequence of 3, 4 or 5 ints
        The whole shape of the result; its length says which of the three is meant.
    strides, padding, data_format, dilations
        As in that one. A `data_format` of None is channels last.
    name, out, algorithm, workers
        As in `conv3d_transpose`.

    Returns
    -------
    ndarray
        As from `conv3d_transpose`.

    Raises
    ------
    ValueError, TypeError
        As `conv3d_transpose`.

    References
    ----------
    TensorFlow 2.21, ``tf.nn.conv_transpose``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv import conv_transpose
    >>> conv_transpose(np.ones((1, 4, 4, 3)), np.ones((2, 2, 5, 3)), [1, 8, 8, 5], 2).shape
    (1, 8, 8, 5)
    """
    function = "conv_transpose"
    shape = arguments.integers(f"{function}: output_shape", output_shape)
    if len(shape) not in (3, 4, 5):
        raise ValueError(f"{function}: output_shape must be of length 3, 4 or 5, got {len(shape)}: {list(shape)}")
    how: dict[str, Any] = {"out": out, "algorithm": algorithm, "workers": workers}
    names = ("input", "filters")
    return _transposed(
        len(shape) - 2, function, input, filters, shape, strides, padding, data_format, dilations, names, **how
    )


def conv2d(
    input: Any,
    filter: Any = None,
    strides: Any = None,
    padding: Any = None,
    use_cudnn_on_gpu: bool | None = True,
    data_format: str | None = "NHWC",
    dilations: Any = (1, 1, 1, 1),
    name: str | None = None,
    filters: Any = None,
    *,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """`conv3d` in two dimensions, with explicit paddings: `tf.compat.v1.nn.conv2d`.

    Parameters
    ----------
    input : array_like, 4-D
        [N, H, W, Cin] or [N, Cin, H, W].
    filter, filters : array_like, 4-D
        [kh, kw, Cin, Cout], or [kh, kw, Cin/groups, Cout] for groups; one of the two names.
    strides, dilations : int or sequence of 1, 2 or 4 ints, optional
    padding : {'SAME', 'VALID'} or sequence of 4 pairs of ints
        Required. Pairs are zeros before and after, for each axis of `data_format`, [0, 0] for N and C; then an axis has
        max(0, ceil((n + before + after - K + 1)/stride)) positions.
    use_cudnn_on_gpu : bool, optional
        Accepted for compatibility, without effect.
    data_format : {'NHWC', 'NCHW'}, optional
    name, out, algorithm, workers
        As in `conv3d`.

    Returns
    -------
    ndarray
        As from `conv3d`.

    Raises
    ------
    ValueError, TypeError
        As `conv3d`.

    References
    ----------
    TensorFlow 2.21, ``tf.compat.v1.nn.conv2d``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv import conv2d
    >>> z, w = np.ones((1, 16, 16, 6), np.float32), np.ones((4, 4, 2, 9), np.float32)  # three groups
    >>> conv2d(z, w, 2, [[0, 0], [1, 1], [1, 1], [0, 0]]).shape
    (1, 8, 8, 9)
    """
    filter = _one_given("conv2d", "filter", filter, "filters", filters)
    how: dict[str, Any] = {"out": out, "algorithm": algorithm, "workers": workers}
    return _convolved(2, "conv2d", input, filter, strides, padding, data_format, dilations, **how)


def conv1d(
    value: Any = None,
    filters: Any = None,
    stride: Any = None,
    padding: str | None = None,
    use_cudnn_on_gpu: bool | None = None,
    data_format: str | None = None,
    name: str | None = None,
    input: Any = None,
    dilations: Any = None,
    *,
    out: np.ndarray[Any, Any] | None = None,
    algorithm: str = "auto",
    workers: int | None = None,
) -> np.ndarray[Any, Any]:
    """`conv3d` in one dimension: `tf.compat.v1.nn.conv1d`.

    Parameters
    ----------
    value, input : array_like, 3-D
        [N, W, Cin] or [N, Cin, W]; one of the two names.
    filters : array_like, 3-D
        [kw, Cin, Cout], or [kw, Cin/groups, Cout] for groups.
    stride, dilations : int or sequence of 1 or 3 ints, optional
    padding : {'SAME', 'VALID'}
        Required.
    use_cudnn_on_gpu : bool, optional
        Accepted for compatibility, without effect.
    data_format : {'NWC', 'NCW'}, optional
    name, out, algorithm, workers
        As in `conv3d`.

    Returns
    -------
    ndarray
        As from `conv3d`.

    Raises
    ------
    ValueError, TypeError
        As `conv3d`.

    References
    ----------
    TensorFlow 2.21, ``tf.compat.v1.nn.conv1d``.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv import conv1d
    >>> z = np.array([1, 2, 3, 4, 5], np.float32).reshape(1, 5, 1)
    >>> w = np.array([1, 10, 100], np.float32).reshape(3, 1, 1)
    >>> conv1d(z, w, 2, "VALID").ravel()
    array([321., 543.], dtype=float32)
    """
    function = "conv1d"
    value = _one_given(function, "value", value, "input", input)
    _required(function, "filters", filters)
    how: dict[str, Any] = {"out": out, "algorithm": algorithm, "workers": workers}
    names = ("value", "filters", "stride")
    return _convolved(1, function, value, filters, stride, padding, data_format, dilations, names, **how)


def _transposed(
    rank: int,
    function: str,
    value: Any,
    filter: Any,
    output_shape: Any,
    strides: Any,
    padding: Any,
    data_format: Any,
    dilations: Any,
    names: tuple[str, str] = ("value", "filter"),
    **how: Any,
) -> np.ndarray[Any, Any]:
    """Compute a transposed convolution in `rank` dimensions; `names` are the operands' for the caller."""
    x, w, dtype = arrays.operands(function, value, filter, names)
    shapes = x.shape, w.shape, output_shape
    asked = arguments.conv3d_transpose_problem(
        *shapes, strides, padding, data_format, dilations, dtype, function=function, names=names, rank=rank
    )
    return calls.compute(function, asked, x, w, rank=rank, **how)


def _convolved(
    rank: int,
    function: str,
    input: Any,
    filter: Any,
    strides: Any,
    padding: Any,
    data_format: Any,
    dilations: Any,
    names: tuple[str, str, str] = ("input", "filter", "strides"),
    **how: Any,
) -> np.ndarray[Any, Any]:
    """Compute a convolution in `rank` dimensions; `names` are the caller's, of the operands and the strides."""
    z, w, dtype = arrays.operands(function, input, filter, names[:2])
    asked = arguments.conv3d_problem(
        z.shape, w.shape, strides, padding, data_format, dilations, dtype, function=function, names=names, rank=rank
    )
    return calls.compute(function, asked, z, w, rank=rank, **how)


def _sizes(function: str, name: str, shape: Any) -> tuple[int, ...]:
    """Return the shape of an operand that is not there."""
    sizes = arguments.integers(f"{function}: {name}", shape)
    if sizes and min(sizes) < 0:
        raise ValueError(f"{function}: {name}={list(sizes)} has negative sizes, they are at least 0")
    return sizes


def _required(function: str, name: str, given: Any) -> None:
    """Refuse None where TensorFlow has it as a default only because of the order of its arguments."""
    if given is None:
        raise TypeError(f"{function}: {name!r} is required, got None")


def _one_given(function: str, name: str, given: Any, alias: str, other: Any) -> Any:
    """Return the one of two arguments that was given."""
    if given is not None and other is not None:
        raise ValueError(f"{function}: {name!r} and its alias {alias!r} are both given; specify one of them")
    if given is None and other is None:
        raise TypeError(f"{function}: {name!r} (or its alias {alias!r}) is required, neither is given")
    return other if given is None else given
