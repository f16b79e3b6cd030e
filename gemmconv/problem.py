"""What was asked: the checked, frozen description of a transposed convolution, without any array.

Convolution, transposed convolution and the filter's gradient are three products over one relation between a coarse and
a fine grid; `Axis` is that relation along one direction, `Problem` is three of them with batch, channels, dtype and
layout. TensorFlow's rules for sizes are functions of numbers; arguments.py reads and refuses. This module imports
nothing of the package and never sees data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

SPATIAL = ("depth", "height", "width")
# By the number of spatial axes; the first of each is the default.
LAYOUTS = {1: ("NWC", "NCW"), 2: ("NHWC", "NCHW"), 3: ("NDHWC", "NCDHW")}
PADDINGS = ("SAME", "VALID")
# Of one axis: a word, or the positions before and after.
Padding = str | tuple[int, int]
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
    ``prepared`` says that the filter is packed once for many calls, so that what packing takes does not count.
    """

    operation: str
    batch: int
    cin: int
    cout: int
    axes: tuple[Axis, Axis, Axis]
    dtype: np.dtype[Any]
    layout: str = "NDHWC"
    groups: int = 1
    prepared: bool = False

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

    @cached_property
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
    """Return batch, spatial sizes and channels in the layout's order."""
    return (batch, *spatial, channels) if layout.endswith("C") else (batch, channels, *spatial)


def spatial_part(layout: str, items: Sequence[Any]) -> tuple[Any, ...]:
    """Return those of the items, one for each axis of the layout, that belong to spatial axes."""
    return tuple(items[1:-1] if layout.endswith("C") else items[2:])


def _cut(padding: Padding) -> int:
    """Return the positions that are taken away whatever the sizes."""
    return 0 if isinstance(padding, str) else sum(padding)


def gathered(fine: int, kernel: int, stride: int, dilation: int, padding: Padding) -> int:
    """Return the coarse size of an axis: TensorFlow's rule for convolutions."""
    if padding == "SAME":
        return -(-fine // stride)
    return max(0, (fine + _cut(padding) - extent(kernel, dilation)) // stride + 1)


def reachable(coarse: int, kernel: int, stride: int, dilation: int, padding: Padding) -> tuple[int, int]:
    """Return the smallest and the largest fine size of an axis: the same rule, inverted. There may be none."""
    span = extent(kernel, dilation) - _cut(padding)
    if coarse == 0:
        return (0, 0) if padding == "SAME" else (0, max(0, span - 1))
    if padding == "SAME":
        return (coarse - 1) * stride + 1, coarse * stride
    return max(0, (coarse - 1) * stride + span), coarse * stride + span - 1


def inferred(coarse: int, kernel: int, stride: int, dilation: int, padding: Padding) -> int:
    """Return the fine size taken where the caller names none; for a kernel of 1 or more it is Keras'."""
    largest = reachable(coarse, kernel, stride, dilation, padding)[1]
    if padding == "SAME":
        return coarse * stride
    whole = (coarse - 1) * stride + max(stride, extent(kernel, dilation))
    return max(0, min(whole - _cut(padding), largest))


def axis_of(coarse: int, fine: int, kernel: int, stride: int, dilation: int, padding: Padding) -> Axis:
    """Return the relation of two sizes that belong together; 'SAME' has the smaller half of its padding before."""
    if padding == "SAME":
        lo = max(0, (coarse - 1) * stride + extent(kernel, dilation) - fine) // 2
    else:
        lo = 0 if isinstance(padding, str) else padding[0]
    return Axis(coarse, fine, kernel, stride, dilation, lo)
