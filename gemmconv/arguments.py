"""From the arguments of TensorFlow's functions to a Problem, or to the text that refuses them.

Every rule about shapes and every such text is in this module and in the sizes of problem.py, so that both can be tested
from numbers alone. Of the package it imports problem.py only; it never sees data.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from typing import Any

import numpy as np

from gemmconv.problem import (
    LAYOUTS,
    PADDINGS,
    SPATIAL,
    Axis,
    Padding,
    Problem,
    axis_of,
    gathered,
    in_layout,
    inferred,
    reachable,
    spatial_part,
)


def integer(text: str, value: Any) -> int:
    """Return an integer argument as an int; `text` names it in the TypeError. Bools are no integers here."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{text} must be an integer, got the bool {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{text} must be an integer, got {value!r} of type {type(value).__name__}") from None


def integers(text: str, values: Any) -> tuple[int, ...]:
    """Return a one-dimensional sequence of integers as a tuple; `text` names the argument in the errors."""
    if type(values) in (tuple, list) and all(type(item) is int for item in values):
        return tuple(values)
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise ValueError(f"{text} must be one-dimensional, got an array of shape {values.shape}")
    if isinstance(values, str | bytes | Mapping | Set | np.generic) or not hasattr(values, "__getitem__"):
        raise TypeError(f"{text} must be a sequence of integers, got {values!r} of type {type(values).__name__}")
    items = list(values)
    for i, item in enumerate(items):
        if isinstance(item, list | tuple) or (isinstance(item, np.ndarray) and item.ndim > 0):
            raise ValueError(f"{text} must be one-dimensional, but {text.rpartition(' ')[2]}[{i}] is {item!r}")
    return tuple(integer(f"{text}[{i}]", item) for i, item in enumerate(items))


def steps(function: str, name: str, value: Any, layout: str) -> tuple[int, ...]:
    """Return strides or dilations, given in any of TensorFlow's forms, one for each spatial axis."""
    text, rank = f"{function}: {name}", len(layout) - 2
    if value is None:
        return (1,) * rank
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, str | bytes) or not hasattr(value, "__getitem__") or isinstance(value, np.generic):
        numbers: tuple[int, ...] = (integer(text, value),)
    else:
        numbers = integers(text, value)
    if len(numbers) not in (1, rank, rank + 2):
        lengths = f"1, {rank} or {rank + 2}" if rank > 1 else "1 or 3"
        raise ValueError(
            f"{text} should be of length {lengths}. Received: {name}={list(numbers)} of length {len(numbers)}"
        )
    if (least := min(numbers)) < 1:
        raise ValueError(f"{text}={list(numbers)} must be at least 1 everywhere, got {least}")
    if len(numbers) == rank + 2:
        channel = layout.index("C")
        if numbers[0] != 1 or numbers[channel] != 1:
            raise ValueError(
                f"{text}={list(numbers)} must be 1 for batch and channels, entries 0 and {channel} of {layout}, "
                f"got {numbers[0]} and {numbers[channel]}"
            )
        return spatial_part(layout, numbers)
    return numbers * rank if len(numbers) == 1 else numbers


def paddings(function: str, value: Any, layout: str, *, explicit: bool = False) -> tuple[Padding, ...]:
    """Return the padding of each spatial axis; `explicit` allows a list of pairs, one for each axis of the layout."""
    if not explicit or not isinstance(value, list | tuple | np.ndarray):
        also = f", or a list of {len(layout)} pairs" if explicit else ""
        return (one_of(function, "padding", value, PADDINGS, also),) * (len(layout) - 2)
    text = f"{function}: padding"
    pairs = [integers(f"{text}[{i}]", pair) for i, pair in enumerate(value)]
    if len(pairs) != len(layout):
        raise ValueError(
            f"{text} must have {len(layout)} pairs, one for each axis of {layout}, got {len(pairs)}: {value!r}"
        )
    for i, pair in enumerate(pairs):
        if len(pair) != 2:
            raise ValueError(f"{text}[{i}] must be 2 integers, before and after, got {len(pair)}: {list(pair)}")
        if min(pair) < 0:
            raise ValueError(f"{text}[{i}]={list(pair)} must be at least 0, got {min(pair)}")
        if layout[i] in "NC" and pair != (0, 0):
            raise ValueError(f"{text}[{i}]={list(pair)} must be [0, 0] for batch and channels, axis {i} of {layout}")
    return spatial_part(layout, pairs)


def one_of(function: str, name: str, value: Any, allowed: Sequence[str], also: str = "") -> str:
    """Return a string argument that must be one of a few; case matters, as in TensorFlow."""
    names = " or ".join(map(repr, allowed)) + also
    if not isinstance(value, str):
        raise TypeError(f"{function}: {name} must be {names}, got {value!r} of type {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{function}: {name} must be {names}, got {value!r}")
    return str(value)


def layout_of(function: str, data_format: Any, rank: int) -> str:
    """Return the layout that a data_format names; None is channels last."""
    return LAYOUTS[rank][0] if data_format is None else one_of(function, "data_format", data_format, LAYOUTS[rank])


def shape_argument(function: str, name: str, value: Any, layout: str) -> tuple[int, ...]:
    """Return a whole shape that was given as an argument."""
    rank, text = len(layout), f"{function}: {name}"
    if (isinstance(value, np.ndarray) and value.ndim == 0) or isinstance(value, int | np.integer):
        raise ValueError(f"{text} must be {rank} integers, got the scalar {value!r}")
    shape = integers(text, value)
    order = f"the whole shape in {layout} order" if name == "output_shape" else "the whole shape"
    if len(shape) != rank:
        raise ValueError(f"{text} must be {rank} integers, {order}, got {len(shape)}: {list(shape)}")
    for i, size in enumerate(shape):
        if size < 0:
            raise ValueError(f"{text}[{i}]={size} is negative, sizes are at least 0")
    return shape


def check_bytes(function: str, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse an array of more bytes than there are addresses."""
    # NumPy refuses such sizes too, but counts zero-sized axes as one while it does so. Half precisions are widened.
    size = math.prod(max(1, n) for n in shape) * max(4, dtype.itemsize)
    if size > sys.maxsize:
        raise ValueError(
            f"{function}: {name} {shape} of {dtype} takes {size} bytes, more than the address space's {sys.maxsize}"
        )


def conv3d_transpose_problem(
    value_shape: Sequence[int],
    filter_shape: Sequence[int],
    output_shape: Any,
    strides: Any,
    padding: Any,
    data_format: Any,
    dilations: Any,
    dtype: np.dtype[Any],
    *,
    function: str = "conv3d_transpose",
    names: tuple[str, str] = ("value", "filter"),
    rank: int = 3,
) -> Problem:
    """Check the arguments of TensorFlow's transposed convolutions and return what they ask for.

    Raises ValueError or TypeError, naming the function, the argument, what was got and the rule with its numbers.
    """
    layout = layout_of(function, data_format, rank)
    padding = paddings(function, padding, layout, explicit=rank == 2)
    asked = None if output_shape is None else shape_argument(function, "output_shape", output_shape, layout)
    steps_of = steps(function, "strides", strides, layout), steps(function, "dilations", dilations, layout)
    shapes = tuple(value_shape), tuple(filter_shape), asked
    return _checked("conv3d_transpose", function, (*names, "output_shape"), layout, *shapes, *steps_of, padding, dtype)


def conv3d_problem(
    input_shape: Sequence[int],
    filter_shape: Sequence[int],
    strides: Any,
    padding: Any,
    data_format: Any,
    dilations: Any,
    dtype: np.dtype[Any],
    *,
    function: str = "conv3d",
    names: tuple[str, str, str] = ("input", "filter", "strides"),
    rank: int = 3,
) -> Problem:
    """Check the arguments of TensorFlow's convolutions; as `conv3d_transpose_problem`."""
    layout = layout_of(function, data_format, rank)
    padding = paddings(function, padding, layout, explicit=rank == 2)
    steps_of = steps(function, names[2], strides, layout), steps(function, "dilations", dilations, layout)
    shapes = tuple(input_shape), tuple(filter_shape), None
    return _checked("conv3d", function, (*names[:2], "result"), layout, *shapes, *steps_of, padding, dtype)


def conv3d_backprop_filter_problem(
    input_shape: Sequence[int],
    filter_sizes: Any,
    out_backprop_shape: Sequence[int],
    strides: Any,
    padding: Any,
    data_format: Any,
    dilations: Any,
    dtype: np.dtype[Any],
    *,
    function: str = "conv3d_backprop_filter_v2",
) -> Problem:
    """Check the arguments of TensorFlow's gradient of the filter; as `conv3d_transpose_problem`."""
    layout = layout_of(function, data_format, 3)
    padding = paddings(function, padding, layout)
    sizes = shape_argument(function, "filter_sizes", filter_sizes, layout)
    steps_of = steps(function, "strides", strides, layout), steps(function, "dilations", dilations, layout)
    shapes, names = (tuple(input_shape), sizes, tuple(out_backprop_shape)), ("input", "filter_sizes", "out_backprop")
    return _checked("conv3d_backprop_filter", function, names, layout, *shapes, *steps_of, padding, dtype)


@lru_cache(maxsize=1024)
def _checked(
    operation: str,
    function: str,
    names: tuple[str, str, str],
    layout: str,
    data: tuple[int, ...],
    weights: tuple[int, ...],
    asked: tuple[int, ...] | None,
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    padding: tuple[Padding, ...],
    dtype: np.dtype[Any],
) -> Problem:
    """Return the problem of shapes in the caller's order: of value or input, of filter, and of the third array.

    The third is the result, None where it is to be inferred, or `out_backprop`.
    """
    rank, transposed = len(layout) - 2, operation == "conv3d_transpose"
    channels = "output channels, input channels" if transposed else "input channels of a group, output channels"
    for name, shape in zip(names, (data, weights, asked), strict=True):
        if shape is not None and len(shape) != rank + 2:
            axes_of = f"{', '.join(SPATIAL[-rank:])}, {channels}" if name == names[1] else layout
            raise ValueError(f"{function}: {name} must be {rank + 2}-D ({axes_of}), got {len(shape)}-D, shape {shape}")
    groups = _groups(function, names, layout, data, weights, transposed)
    relation = list(zip(spatial_part(layout, data), weights[:rank], strides, dilations, padding, strict=True))
    others = tuple((inferred if transposed else gathered)(*axis) for axis in relation)
    whole = in_layout(layout, data[0], others, weights[-2 if transposed else -1])
    if asked is not None or transposed:
        whole = asked or whole
        ranges = [reachable(*axis) for axis in relation] if transposed else [(size, size) for size in others]
        _check_third(function, names, layout, data[0], weights, whole, relation, ranges)
        others = spatial_part(layout, whole)
    axes = [Axis(1, 1, 1)] * (3 - rank)
    for (size, k, s, d, pads), other in zip(relation, others, strict=True):
        n, o = (size, other) if transposed else (other, size)
        axes.append(axis_of(n, o, k, s, d, pads))
    for name, shape in zip(names, (data, weights, whole), strict=True):
        check_bytes(function, name, shape, dtype)
    full = "NDHWC" if layout.endswith("C") else "NCDHW"
    cin, cout = weights[-1] // groups, weights[-2]
    return Problem(operation, data[0], cin, cout, (axes[0], axes[1], axes[2]), dtype, full, groups)


def _entry(name: str, index: int) -> str:
    """Return how an entry of a shape is written: arguments that are shapes themselves have no `shape`."""
    return f"{name}[{index}]" if name in ("output_shape", "filter_sizes") else f"{name}.shape[{index}]"


def _groups(
    function: str,
    names: tuple[str, str, str],
    layout: str,
    data: tuple[int, ...],
    weights: tuple[int, ...],
    transposed: bool,
) -> int:
    """Return the groups that the channels make: one in transposed convolutions, else what TensorFlow infers."""
    channel, last = layout.index("C"), len(layout) - 1
    place = last if transposed else last - 1
    mine, taken = data[channel], weights[place]
    if mine == taken:
        return 1
    text = (
        f"{function}: {names[1]} has {taken} input channels ({_entry(names[1], place)} of {weights}), "
        f"but {names[0]} has {mine} ({_entry(names[0], channel)} of {data}, {layout}); "
    )
    if transposed:
        raise ValueError(f"{text}they must be equal")
    if mine == 0 or taken == 0 or mine % taken:
        raise ValueError(f"{text}{taken} must divide {mine}, into groups")
    if weights[last] % (mine // taken):
        raise ValueError(
            f"{text}these are {mine // taken} groups, which must divide its {weights[last]} output channels "
            f"({_entry(names[1], last)})"
        )
    return mine // taken


def _check_third(
    function: str,
    names: tuple[str, str, str],
    layout: str,
    batch: int,
    weights: tuple[int, ...],
    whole: tuple[int, ...],
    relation: list[tuple[int, int, int, int, Padding]],
    ranges: list[tuple[int, int]],
) -> None:
    """Check all entries of output_shape, or of the shape of out_backprop."""
    first, second, third = names
    if whole[0] != batch:
        raise ValueError(
            f"{function}: {_entry(third, 0)}={whole[0]} is not the batch of {first}, {batch} ({_entry(first, 0)}); "
            "they must be equal"
        )
    channel, source = layout.index("C"), len(layout) - (2 if third == "output_shape" else 1)
    if whole[channel] != weights[source]:
        raise ValueError(
            f"{function}: {_entry(third, channel)}={whole[channel]} is not the number of output channels of {second}, "
            f"{weights[source]} ({_entry(second, source)}); they must be equal"
        )
    sizes, start = spatial_part(layout, whole), 1 if layout.endswith("C") else 2
    for i, (axis, size, (low, high)) in enumerate(zip(relation, sizes, ranges, strict=True)):
        if not low <= size <= high:
            n, k, s, d, padding = axis
            dilated = f", dilation {d}" if d > 1 else ""
            kernel = f", kernel {k}{dilated}" if padding != "SAME" or n == 0 else ""
            cut = repr(padding) if isinstance(padding, str) else list(padding)
            allowed = f"{low} to {high}" if low < high else f"only {low}" if low == high else "no size"
            raise ValueError(
                f"{function}: {_entry(third, start + i)}={size} is out of reach: "
                f"input {SPATIAL[i - len(sizes)]} {n}{kernel}, stride {s} and padding {cut} allow {allowed}"
            )
