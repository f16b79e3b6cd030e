"""The two halves of the lowering as functions: im2col gathers columns from an array, col2im adds them back.

Plain NumPy, one strided copy or addition for each tap and all columns in memory at once: for those who measure a fold
or an accelerator of their own. The engine's own lowerings form columns in blocks and use nothing of this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import numpy as np

from gemmconv import arguments, arrays, problem
from gemmconv.arrays import Array
from gemmconv.problem import Axis
from gemmconv.quiet import quiet

Index = tuple[Any, ...]


def im2col(
    array: Any,
    kernel: Any,
    strides: Any = 1,
    padding: Any = "VALID",
    data_format: str | None = None,
    dilations: Any = 1,
) -> np.ndarray[Any, Any]:
    """Gather what each tap of a kernel sees from each position of a convolution's result.

    In one dimension, channels last, with lo as in `conv3d` and zeros outside the array::

        columns[b, i, a, c] = array[b, i*stride + a*dilation - lo, c]

    Parameters
    ----------
    array : array_like, 3-D to 5-D
        In `data_format` order.
    kernel : int or sequence of 1 to 3 ints
        Its sizes; one for each spatial axis, or one for all.
    strides, dilations
        As in `conv3d`, or `conv2d` and `conv1d` in fewer dimensions.
    padding : {'SAME', 'VALID'} or sequence of pairs of ints
        Pairs are zeros before and after, for each axis of `data_format`, [0, 0] for N and C.
    data_format : str, optional
        'NDHWC', 'NCDHW', 'NHWC', 'NCHW', 'NWC' or 'NCW'. None is channels last.

    Returns
    -------
    ndarray
        New: [N, *coarse*, *kernel*, C] with channels last, else [N, C, *kernel*, *coarse*], where *coarse* are
        the sizes of the convolution's result.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; dtypes are those of `conv3d_transpose`.

    Examples
    --------
    >>> import numpy as np
    >>> import gemmconv
    >>> gemmconv.im2col(np.array([[[1], [2], [3], [4], [5]]], np.float32), 3, 2, "SAME")[0, :, :, 0]
    array([[0., 1., 2.],
           [2., 3., 4.],
           [4., 5., 0.]], dtype=float32)

    The convolution is one product:

    >>> z, w = np.ones((2, 8, 8, 3)), np.ones((4, 4, 3, 5))
    >>> y = gemmconv.im2col(z, (4, 4), 2, "SAME").reshape(2, 4, 4, -1) @ w.reshape(-1, 5)
    >>> bool((y == gemmconv.conv2d(z, w, 2, "SAME")).all())
    True
    """
    function = "im2col"
    z = arrays.single(function, "array", array)
    layout = _layout(function, "array", z.shape, 1, data_format)
    axes = _axes(function, problem.spatial_part(layout, z.shape), kernel, strides, padding, layout, dilations)
    shape = _columns_shape(layout, z.shape[0], z.shape[layout.index("C")], axes)
    arguments.check_bytes(function, "result", shape, z.dtype)
    columns = np.zeros(shape, z.dtype)
    for at, from_ in _taps(axes, layout):
        columns[at] = z[from_]
    return columns


def col2im(
    columns: Any,
    spatial: Any,
    kernel: Any,
    strides: Any = 1,
    padding: Any = "VALID",
    data_format: str | None = None,
    dilations: Any = 1,
) -> np.ndarray[Any, Any]:
    """Add columns where `im2col` of the same arguments would take them from: its adjoint.

    In one dimension, channels last::

        array[b, i*stride + a*dilation - lo, c] += columns[b, i, a, c]

    Parameters
    ----------
    columns : array_like, 4-D, 6-D or 8-D
        [N, *coarse*, *kernel*, C] with channels last, else [N, C, *kernel*, *coarse*].
    spatial : int or sequence of 1 to 3 ints
        The fine sizes, those of the result; one for each spatial axis, or one for all.
    kernel, strides, padding, data_format, dilations
        As in `im2col`.

    Returns
    -------
    ndarray
        New: [N, *spatial*, C] or [N, C, *spatial*], zero where nothing is added. Half precisions are summed in float32
        and rounded once.

    Raises
    ------
    ValueError, TypeError
        As `im2col`; also if the columns' shape is not the one that `im2col` makes from an array of these sizes.

    Examples
    --------
    >>> import numpy as np
    >>> import gemmconv
    >>> columns = np.array([[1, 10, 100], [2, 20, 200]], np.float32).reshape(1, 2, 3, 1)
    >>> gemmconv.col2im(columns, 4, 3, 2, "SAME").ravel()
    array([  1.,  10., 102.,  20.], dtype=float32)

    The transposed convolution is a product and this:

    >>> x, w = np.ones((2, 4, 4, 3)), np.ones((4, 4, 5, 3))
    >>> products = (x @ w.reshape(-1, 3).T).reshape(2, 4, 4, 4, 4, 5)
    >>> y = gemmconv.col2im(products, (8, 8), (4, 4), 2, "SAME")
    >>> bool((y == gemmconv.conv2d_transpose(x, w, [2, 8, 8, 5], 2)).all())
    True
    """
    function = "col2im"
    given = arrays.single(function, "columns", columns)
    layout = _layout(function, "columns", given.shape, 2, data_format)
    sizes = _sizes(function, "spatial", spatial, len(layout) - 2)
    axes = _axes(function, sizes, kernel, strides, padding, layout, dilations)
    batch, channels = given.shape[0], given.shape[-1 if layout.endswith("C") else 1]
    if given.shape != (wanted := _columns_shape(layout, batch, channels, axes)):
        raise ValueError(
            f"{function}: columns has shape {given.shape}, but an array of spatial sizes {sizes} in {layout} gives "
            f"{wanted} for kernel {tuple(a.kernel for a in axes)}, strides {tuple(a.stride for a in axes)}, dilations "
            f"{tuple(a.dilation for a in axes)} and padding {padding!r}; they must be equal"
        )
    shape = problem.in_layout(layout, batch, sizes, channels)
    arguments.check_bytes(function, "result", shape, given.dtype)
    result = np.zeros(shape, np.float32 if given.dtype.itemsize == 2 else given.dtype)
    return _folded(result, given, _taps(axes, layout))


@quiet
def _folded(result: Array, columns: Array, taps: Iterable[tuple[Index, Index]]) -> Array:
    """Add columns to a result where their taps land, and round it to their dtype."""
    for from_, at in taps:
        result[at] += columns[from_]
    return result.astype(columns.dtype, copy=False)


def _layout(function: str, name: str, shape: tuple[int, ...], each: int, data_format: Any) -> str:
    """Return the layout of an array that has `each` axes for each spatial one."""
    known = [layout for layouts in problem.LAYOUTS.values() for layout in layouts]
    named = None if data_format is None else arguments.one_of(function, "data_format", data_format, known)
    ranks = {each * rank + 2: rank for rank in problem.LAYOUTS if named is None or rank == len(named) - 2}
    if len(shape) not in ranks:
        wanted = " or ".join(f"{axes}-D" for axes in ranks) + ("" if named is None else f" for {named}")
        raise ValueError(f"{function}: {name} must be {wanted}, got {len(shape)}-D, shape {shape}")
    return arguments.layout_of(function, named, ranks[len(shape)])


def _sizes(function: str, name: str, value: Any, rank: int) -> tuple[int, ...]:
    """Return an argument that holds one size for each of `rank` axes, or one for all."""
    text = f"{function}: {name}"
    single = not hasattr(value, "__getitem__") or isinstance(value, np.generic)
    sizes = (arguments.integer(text, value),) * rank if single else arguments.integers(text, value)
    if len(sizes) != rank:
        raise ValueError(f"{text} must be an integer or {rank} of them, one for each spatial axis, got {list(sizes)}")
    if min(sizes) < 0:
        raise ValueError(f"{text}={list(sizes)} must be at least 0 everywhere, got {min(sizes)}")
    return sizes


def _axes(
    function: str, fine: tuple[int, ...], kernel: Any, strides: Any, padding: Any, layout: str, dilations: Any
) -> list[Axis]:
    """Return the relation of the array's positions to those of the columns."""
    taps = _sizes(function, "kernel", kernel, len(fine))
    strides = arguments.steps(function, "strides", strides, layout)
    dilations = arguments.steps(function, "dilations", dilations, layout)
    pads = arguments.paddings(function, padding, layout, explicit=True)
    relation = zip(fine, taps, strides, dilations, pads, strict=True)
    return [problem.axis_of(problem.gathered(*axis), *axis) for axis in relation]


def _columns_shape(layout: str, batch: int, channels: int, axes: list[Axis]) -> tuple[int, ...]:
    coarse, kernel = [axis.coarse for axis in axes], [axis.kernel for axis in axes]
    return (batch, *coarse, *kernel, channels) if layout.endswith("C") else (batch, channels, *kernel, *coarse)


def _taps(axes: list[Axis], layout: str) -> Iterator[tuple[Index, Index]]:
    """Yield, for each tap, where its columns lie and which of the array's positions they are."""
    every = slice(None)
    for tap in product(*(range(axis.kernel) for axis in axes)):
        coarse, fine = zip(*map(_met, axes, tap), strict=True)
        if layout.endswith("C"):
            yield (every, *coarse, *tap), (every, *fine)
        else:
            yield (every, every, *tap, *coarse), (every, every, *fine)


def _met(axis: Axis, tap: int) -> tuple[slice, slice]:
    """Return the coarse positions that a tap carries into the fine grid, and where it carries them."""
    shift = tap * axis.dilation - axis.lo
    first = max(0, -(shift // axis.stride))
    last = max(first, min(axis.coarse, (axis.fine - 1 - shift) // axis.stride + 1))
    start = first * axis.stride + shift
    return slice(first, last), slice(start, start + (last - first) * axis.stride, axis.stride)
