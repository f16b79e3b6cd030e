"""TensorFlow's names and signatures: each function is a docstring, the checking of arguments, a plan and its call."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemmconv import arrays, calls, problem
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
    algorithm : {'auto', 'col2im', 'kn2row', 'winograd'}
        The lowering. 'auto' takes the one that is estimated to be the fastest; 'col2im' can do every problem. Whole
        numbers give the same bits with each, as long as their sums are exact; other data the same up to rounding.
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
    function = "conv3d_transpose"
    x, w, dtype = arrays.operands(
        function,
        _one_given(function, "value", value, "input", input),
        _one_given(function, "filter", filter, "filters", filters),
    )
    asked = problem.conv3d_transpose_problem(
        x.shape, w.shape, output_shape, strides, padding, data_format, dilations, dtype, function=function
    )
    return calls.compute(function, asked, x, w, out=out, algorithm=algorithm, workers=workers)


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
    shapes = []
    for name, shape in (("value_shape", value_shape), ("filter_shape", filter_shape)):
        sizes = problem.integers(f"{function}: {name}", shape)
        if sizes and min(sizes) < 0:
            raise ValueError(f"{function}: {name}={list(sizes)} has negative sizes, they are at least 0")
        shapes.append(sizes)
    asked = problem.conv3d_transpose_problem(
        shapes[0],
        shapes[1],
        output_shape,
        strides,
        padding,
        data_format,
        dilations,
        arrays.supported_dtype(function, dtype),
        function=function,
    )
    return calls.plan(function, asked, algorithm, workers)


def _one_given(function: str, name: str, given: Any, alias: str, other: Any) -> Any:
    """Return the one of two arguments that was given."""
    if given is not None and other is not None:
        raise ValueError(f"{function}: {name!r} and its alias {alias!r} are both given; specify one of them")
    if given is None and other is None:
        raise TypeError(f"{function}: {name!r} (or its alias {alias!r}) is required, neither is given")
    return other if given is None else given
