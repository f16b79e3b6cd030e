"""What was asked: the checked, frozen description of a transposed convolution, without any array.

Every rule about shapes and every text that refuses one is in this module, so that both can be tested from numbers
alone. Convolution, transposed convolution and the filter's gradient are three products over one relation between a
coarse and a fine grid; `Axis` is that relation along one direction, `Problem` is three of them with batch, channels,
dtype and layout. This module imports nothing of the package and never sees data.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

SPATIAL = ("depth", "height", "width")
LAYOUTS = ("NDHWC", "NCDHW")
PADDINGS = ("SAME", "VALID")
Role = Literal["coarse", "fine", "filter"]
# First operand, second operand, result.
OPERATIONS: dict[str, tuple[Role, Role, Role]] = {
    "conv3d_transpose": ("coarse", "filter", "fine"),
    "conv3d": ("fine", "filter", "coarse"),
    "conv3d_backprop_filter": ("fine", "coarse", "filter"),
}


@dataclass(frozen=True)
class Axis:
    """The relation of a coarse and a fine grid along one direction.

    Tap ``a`` carries coarse position ``i`` to fine position ``i * stride + a * dilation - lo``. What falls outside
    ``[0, fine)`` is dropped. ``lo`` is the padding before; the padding after is what ``fine`` implies, of either sign.
    """

    coarse: int
    fine: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    lo: int = 0

    @property
    def extent(self) -> int:
        """Fine positions from a kernel's first tap to its last, K."""
        return extent(self.kernel, self.dilation)

    @property
    def tiles(self) -> bool:
        """Whether no fine position is reached twice."""
        return self.extent <= self.stride or self.kernel <= 1

    @property
    def covers(self) -> bool:
        """Whether every fine position is reached, given that `tiles` holds."""
        inside = self.lo >= 0 and self.fine + self.lo <= self.coarse * self.stride
        return self.extent == self.stride and self.coarse > 0 and inside

    def taps_of(self, coarse: int, start: int, stop: int) -> tuple[int, int]:
        """Return the range of taps that carry a coarse position into the fine interval [start, stop)."""
        base = coarse * self.stride - self.lo
        first = max(0, -((base - start) // self.dilation))
        last = min(self.kernel, (stop - 1 - base) // self.dilation + 1)
        return first, max(first, last)


@dataclass(frozen=True)
class Problem:
    """One operation on arrays of given shapes: hashable, so that plans can be cached by it.

    The transposed convolution scatters a coarse array over a fine one, the convolution gathers a coarse array from a
    fine one, and the filter's gradient correlates the two; all three relate them by the same axes and the same filter
    [kd, kh, kw, channels of the fine array in a group, channels of the coarse array].

    ``cin`` and ``cout`` are the channels of *one* group of the coarse and of the fine array, named for the transposed
    convolution, whose input is coarse. ``dtype`` is the result's. Axes are depth, height and width in either layout.
    """

    operation: str
    batch: int
    cin: int
    cout: int
    axes: tuple[Axis, Axis, Axis]
    dtype: np.dtype[Any]
    layout: str = "NDHWC"
    groups: int = 1

    @property
    def coarse(self) -> tuple[int, int, int]:
        d, h, w = self.axes
        return d.coarse, h.coarse, w.coarse

    @property
    def fine(self) -> tuple[int, int, int]:
        d, h, w = self.axes
        return d.fine, h.fine, w.fine

    @property
    def kernel(self) -> tuple[int, int, int]:
        d, h, w = self.axes
        return d.kernel, h.kernel, w.kernel

    @property
    def pitch(self) -> int:
        """Channels of all groups of the coarse array: from position to position with channels last."""
        return self.cin * self.groups

    @cached_property
    def coarse_shape(self) -> tuple[int, ...]:
        return in_layout(self.layout, self.batch, self.coarse, self.cin * self.groups)

    @cached_property
    def fine_shape(self) -> tuple[int, ...]:
        return in_layout(self.layout, self.batch, self.fine, self.cout * self.groups)

    @cached_property
    def filter_shape(self) -> tuple[int, ...]:
        return (*self.kernel, self.cout, self.cin * self.groups)

    @property
    def roles(self) -> tuple[Role, Role, Role]:
        """What the first operand, the second and the result are."""
        return OPERATIONS[self.operation]

    @property
    def names(self) -> tuple[str, str]:
        """What the operands are called."""
        first, second, _ = self.roles
        named = {"fine": "input", "coarse": "value" if first == "coarse" else "out_backprop", "filter": "filter"}
        return named[first], named[second]

    def shape_of(self, role: str) -> tuple[int, ...]:
        """Return the shape of the coarse array, the fine one or the filter."""
        shape: tuple[int, ...] = getattr(self, f"{role}_shape")
        return shape

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        first, second, _ = self.roles
        return self.shape_of(first), self.shape_of(second)

    @property
    def result_shape(self) -> tuple[int, ...]:
        return self.shape_of(self.roles[2])

    @cached_property
    def compute_dtype(self) -> np.dtype[Any]:
        """The dtype sums are formed in: half precisions accumulate in float32."""
        return np.dtype(np.float32) if self.dtype.itemsize == 2 else self.dtype

    @property
    def empty(self) -> bool:
        """Whether there is no product to form, so that the result is empty or has no sums."""
        return 0 in self.coarse_shape or 0 in self.filter_shape or 0 in self.fine_shape

    @cached_property
    def flops(self) -> int:
        """FLOPs of all products, coarse-sized (2*N*D*H*W*Cin*Cout*kd*kh*kw a group); complex ones count four times."""
        real = 2 * self.batch * math.prod(self.coarse) * self.cin * self.cout * math.prod(self.kernel) * self.groups
        return real * (4 if self.dtype.kind == "c" else 1)


def extent(kernel: int, dilation: int) -> int:
    """Return the fine positions a dilated kernel spans: max(0, (k-1)*dilation + 1)."""
    return max(0, (kernel - 1) * dilation + 1)


def in_layout(layout: str, batch: int, spatial: Sequence[int], channels: int) -> tuple[int, ...]:
    """Return batch, three spatial sizes and channels in the layout's order."""
    return (batch, *spatial, channels) if layout == "NDHWC" else (batch, channels, *spatial)


def reachable(coarse: int, kernel: int, stride: int, dilation: int, padding: str) -> tuple[int, int]:
    """Return the smallest and the largest fine size of an axis: TensorFlow's rule for conv3d, inverted."""
    span = extent(kernel, dilation)
    if coarse == 0:
        return (0, 0) if padding == "SAME" else (0, max(0, span - 1))
    if padding == "SAME":
        return (coarse - 1) * stride + 1, coarse * stride
    return (coarse - 1) * stride + span, coarse * stride + span - 1


def inferred(coarse: int, kernel: int, stride: int, dilation: int, padding: str) -> int:
    """Return the fine size taken where the caller names none; for a kernel of 1 or more it is Keras'."""
    largest = reachable(coarse, kernel, stride, dilation, padding)[1]
    if padding == "SAME":
        return coarse * stride
    return max(0, min((coarse - 1) * stride + max(stride, extent(kernel, dilation)), largest))


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
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise ValueError(f"{text} must be one-dimensional, got an array of shape {values.shape}")
    if isinstance(values, str | bytes | Mapping | Set | np.generic) or not hasattr(values, "__getitem__"):
        raise TypeError(f"{text} must be a sequence of integers, got {values!r} of type {type(values).__name__}")
    items = list(values)
    for i, item in enumerate(items):
        if isinstance(item, list | tuple) or (isinstance(item, np.ndarray) and item.ndim > 0):
            raise ValueError(f"{text} must be one-dimensional, but {text.rpartition(' ')[2]}[{i}] is {item!r}")
    return tuple(integer(f"{text}[{i}]", item) for i, item in enumerate(items))


def steps(function: str, name: str, value: Any, layout: str) -> tuple[int, int, int]:
    """Return strides or dilations, given in any of TensorFlow's forms, as (depth, height, width)."""
    text = f"{function}: {name}"
    if value is None:
        return 1, 1, 1
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, str | bytes) or not hasattr(value, "__getitem__") or isinstance(value, np.generic):
        numbers: tuple[int, ...] = (integer(text, value),)
    else:
        numbers = integers(text, value)
    if len(numbers) not in (1, 3, 5):
        raise ValueError(
            f"{text} should be of length 1, 3 or 5. Received: {name}={list(numbers)} of length {len(numbers)}"
        )
    if (least := min(numbers)) < 1:
        raise ValueError(f"{text}={list(numbers)} must be at least 1 everywhere, got {least}")
    if len(numbers) == 5:
        channel = layout.index("C")
        if numbers[0] != 1 or numbers[channel] != 1:
            raise ValueError(
                f"{text}={list(numbers)} must be 1 for batch and channels, entries 0 and {channel} of {layout}, "
                f"got {numbers[0]} and {numbers[channel]}"
            )
        numbers = numbers[1:4] if layout == "NDHWC" else numbers[2:5]
    first, *rest = numbers
    return (first, rest[0], rest[1]) if rest else (first, first, first)


def one_of(function: str, name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return a string argument that must be one of a few; case matters, as in TensorFlow."""
    names = " or ".join(map(repr, allowed))
    if not isinstance(value, str):
        raise TypeError(f"{function}: {name} must be {names}, got {value!r} of type {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{function}: {name} must be {names}, got {value!r}")
    return str(value)


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
) -> Problem:
    """Check the arguments of TensorFlow's conv3d_transpose and return what they ask for.

    Raises ValueError or TypeError, naming the function, the argument, what was got and the rule with its numbers.
    """
    layout = "NDHWC" if data_format is None else one_of(function, "data_format", data_format, LAYOUTS)
    padding = one_of(function, "padding", padding, PADDINGS)
    asked = None
    if output_shape is not None:
        if (isinstance(output_shape, np.ndarray) and output_shape.ndim == 0) or isinstance(
            output_shape, int | np.integer
        ):
            raise ValueError(f"{function}: output_shape must be 5 integers, got the scalar {output_shape!r}")
        asked = integers(f"{function}: output_shape", output_shape)
    return _checked(
        function,
        tuple(value_shape),
        tuple(filter_shape),
        asked,
        steps(function, "strides", strides, layout),
        padding,
        layout,
        steps(function, "dilations", dilations, layout),
        dtype,
    )


@lru_cache(maxsize=1024)
def _checked(
    function: str,
    value_shape: tuple[int, ...],
    filter_shape: tuple[int, ...],
    output_shape: tuple[int, ...] | None,
    strides: tuple[int, int, int],
    padding: str,
    layout: str,
    dilations: tuple[int, int, int],
    dtype: np.dtype[Any],
) -> Problem:
    if len(value_shape) != 5:
        raise ValueError(f"{function}: value must be 5-D ({layout}), got {len(value_shape)}-D, shape {value_shape}")
    if len(filter_shape) != 5:
        raise ValueError(
            f"{function}: filter must be 5-D (depth, height, width, output channels, input channels), "
            f"got {len(filter_shape)}-D, shape {filter_shape}"
        )
    channel = layout.index("C")
    cin, cout = value_shape[channel], filter_shape[3]
    coarse = value_shape[1:4] if layout == "NDHWC" else value_shape[2:5]
    if filter_shape[4] != cin:
        raise ValueError(
            f"{function}: filter has {filter_shape[4]} input channels (filter.shape[4] of {filter_shape}), "
            f"but value has {cin} (value.shape[{channel}] of {value_shape}, {layout}); they must be equal"
        )
    relation = list(zip(coarse, filter_shape[:3], strides, dilations, strict=True))
    if output_shape is None:
        fine = tuple(inferred(*axis, padding) for axis in relation)
    else:
        fine = _asked(function, value_shape, cout, output_shape, relation, strides, padding, layout, dilations)
    axes = []
    for (n, k, s, d), o in zip(relation, fine, strict=True):
        lo = max(0, (n - 1) * s + extent(k, d) - o) // 2 if padding == "SAME" else 0
        axes.append(Axis(n, o, k, s, d, lo))
    problem = Problem("conv3d_transpose", value_shape[0], cin, cout, (axes[0], axes[1], axes[2]), dtype, layout)
    for name, shape in (("value", value_shape), ("filter", filter_shape), ("output_shape", problem.fine_shape)):
        # NumPy refuses such sizes too, but counts zero-sized axes as one while it does so.
        size = math.prod(max(1, n) for n in shape) * problem.compute_dtype.itemsize
        if size > sys.maxsize:
            raise ValueError(
                f"{function}: {name} {shape} of {dtype} takes {size} bytes, more than the address space's {sys.maxsize}"
            )
    return problem


def _asked(
    function: str,
    value_shape: tuple[int, ...],
    cout: int,
    output_shape: tuple[int, ...],
    relation: list[tuple[int, int, int, int]],
    strides: tuple[int, int, int],
    padding: str,
    layout: str,
    dilations: tuple[int, int, int],
) -> tuple[int, ...]:
    """Return the spatial sizes of an explicit output_shape after checking all five entries."""
    text = f"{function}: output_shape"
    if len(output_shape) != 5:
        raise ValueError(
            f"{text} must be 5 integers, the whole shape in {layout} order, "
            f"got {len(output_shape)}: {list(output_shape)}"
        )
    for i, size in enumerate(output_shape):
        if size < 0:
            raise ValueError(f"{text}[{i}]={size} is negative, sizes are at least 0")
    if output_shape[0] != value_shape[0]:
        raise ValueError(
            f"{text}[0]={output_shape[0]} is not the batch of value, {value_shape[0]} (value.shape[0]); "
            "they must be equal"
        )
    channel = layout.index("C")
    if output_shape[channel] != cout:
        raise ValueError(
            f"{text}[{channel}]={output_shape[channel]} is not the number of output channels of filter, {cout} "
            f"(filter.shape[3]); they must be equal"
        )
    first = layout.index("D")
    fine = output_shape[first : first + 3]
    for i, (name, axis, o) in enumerate(zip(SPATIAL, relation, fine, strict=True)):
        low, high = reachable(*axis, padding)
        if not low <= o <= high:
            n, k, s, d = axis
            dilated = f", dilation {d}" if d > 1 else ""
            kernel = f", kernel {k}{dilated}" if padding == "VALID" or n == 0 else ""
            allowed = f"allow {low} to {high}" if low < high else f"allow only {low}"
            raise ValueError(
                f"{text}[{first + i}]={o} is out of reach: "
                f"input {name} {n}{kernel}, stride {s} and padding {padding!r} {allowed}"
            )
    return fine
