"""What the compat modules share: arguments with channels first, as PyTorch and ONNX have them, become a problem.

Both frameworks have the same arrays. A transposed convolution has an input [N, Cin, *sizes] and weights
[Cin, Cout/groups, *kernel], a convolution has weights [Cout, Cin/groups, *kernel]. In either the weights' first axis
counts the channels of the coarse array and the second those of one group of the fine array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemmconv import arrays, calls
from gemmconv.arguments import check_bytes, integers
from gemmconv.arrays import Array
from gemmconv.problem import SPATIAL, Axis, Problem, extent


@dataclass(frozen=True)
class Names:
    """What a framework calls the arguments that both have."""

    x: str
    w: str
    b: str
    groups: str


def operands(function: str, names: Names, x: Any, w: Any, b: Any) -> tuple[Array, Array, Array | None]:
    """Return input, weights and bias as arrays of one dtype, which both frameworks demand."""
    x, w, dtype = arrays.operands(function, x, w, (names.x, names.w))
    if b is not None:
        _, b, _ = arrays.operands(function, w, b, (names.w, names.b))
    for name, array in ((names.x, x), (names.w, w), (names.b, b)):
        if array is not None and _native(array) != _native(x):
            raise TypeError(
                f"{function}: {name} has dtype {array.dtype}, but {names.x} has {x.dtype}; they must be equal, "
                f"convert one with .astype"
            )
    return x, w, None if b is None else arrays.converted(b, dtype)


def _native(array: Array) -> np.dtype[Any]:
    return array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")


@dataclass(frozen=True)
class Layer:
    """The operands of one call, checked against each other; `x` has a batch axis, which the caller's may lack."""

    function: str
    names: Names
    transposed: bool
    x: Array
    w: Array
    b: Array | None
    groups: int
    batched: bool = True

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        x, w, text, groups = self.names.x, self.names.w, f"{self.function}: ", f"{self.names.groups}={self.groups}"
        if self.w.ndim != self.x.ndim:
            raise ValueError(
                f"{text}{w} must be {self.rank + 2}-D (two axes of channels and {self.rank} spatial), "
                f"got {self.w.ndim}-D, shape {self.w.shape}"
            )
        if 0 in self.kernel:
            raise ValueError(f"{text}{w} must have a kernel of at least 1 everywhere, got shape {self.w.shape}")
        if self.groups < 1:
            raise ValueError(f"{text}{groups} must be at least 1")
        first, second = self.w.shape[:2]
        if first % self.groups:
            channels = "input" if self.transposed else "output"
            raise ValueError(f"{text}{groups} must divide the {first} {channels} channels of {w}, shape {self.w.shape}")
        taken, made = (first, second * self.groups) if self.transposed else (second * self.groups, first)
        if self.x.shape[1] != taken:
            raise ValueError(
                f"{text}{w} of shape {self.w.shape} and {groups} take {taken} input channels, "
                f"but {x} has {self.x.shape[1]} ({x} of shape {self.x.shape}); they must be equal"
            )
        if self.b is not None and self.b.shape != (made,):
            raise ValueError(
                f"{text}{self.names.b} must be of shape ({made},), one number for each output channel, "
                f"got shape {self.b.shape}"
            )

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return self.x.ndim - 2

    @property
    def sizes(self) -> tuple[int, ...]:
        """The spatial sizes of the input."""
        return tuple(self.x.shape[2:])

    @property
    def kernel(self) -> tuple[int, ...]:
        """The spatial sizes of the weights."""
        return tuple(self.w.shape[2:])

    def numbers(self, name: str, value: Any, least: int, *lengths: int) -> tuple[int, ...]:
        """Return a sequence of integers, none of them below `least`, that has one of a few lengths."""
        text = f"{self.function}: {name}"
        given = integers(text, value)
        if len(given) not in lengths:
            allowed = " or ".join(map(str, sorted(set(lengths))))
            raise ValueError(f"{text} must be of length {allowed}, got {len(given)}: {list(given)}")
        if min(given) < least:
            raise ValueError(f"{text}={list(given)} must be at least {least} everywhere, got {min(given)}")
        return given

    def check_output_padding(self, added: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> None:
        """Refuse what is not less than the stride or the dilation of its axis; both frameworks have this rule."""
        for more, s, d in zip(added, strides, dilations, strict=True):
            if more >= max(s, d):
                raise ValueError(
                    f"{self.function}: output_padding={list(added)} must be less than the stride or the dilation of "
                    f"its axis, got {more} beside stride {s} and dilation {d}"
                )

    def compute(
        self,
        strides: Sequence[int],
        dilations: Sequence[int],
        before: Sequence[int],
        after: Sequence[int],
        *,
        out: Any,
        **how: Any,
    ) -> np.ndarray[Any, Any]:
        """Compute the layer, padded `before` and `after` on each spatial axis; `how` goes to `calls.compute`.

        The output of a transposed convolution is what its taps reach, less the padding. `after` may be negative there.
        """
        axes = []
        numbers = zip(SPATIAL[-self.rank :], self.sizes, self.kernel, strides, dilations, before, after, strict=True)
        for name, n, k, s, d, lo, hi in numbers:
            span = extent(k, d)
            size = (n - 1) * s + span - lo - hi if self.transposed else (n + lo + hi - span) // s + 1
            if size < 1:
                raise ValueError(self._no_output(name, n, k, s, d, lo, hi, size))
            axes.append(Axis(n, size, k, s, d, lo) if self.transposed else Axis(size, n, k, s, d, lo))
        one = Axis(1, 1, 1)
        d, h, w = [one] * (3 - self.rank) + axes
        asked = Problem(
            "conv3d_transpose" if self.transposed else "conv3d",
            self.x.shape[0],
            self.w.shape[0] // self.groups,
            self.w.shape[1],
            (d, h, w),
            _native(self.x),
            "NCDHW",
            self.groups,
        )
        check_bytes(self.function, "the result", asked.result_shape, asked.dtype)
        target = out
        if out is not None and not self.batched:
            shape = calls.lowered(asked, asked.roles[2], self.rank)[1:]
            target = arrays.check_out(self.function, out, shape, asked.dtype)[np.newaxis]
        weights = self.w.transpose(*range(2, self.w.ndim), 1, 0)
        result = calls.compute(self.function, asked, self.x, weights, rank=self.rank, bias=self.b, out=target, **how)
        if out is not None:
            return out  # type: ignore[no-any-return]
        return result if self.batched else result[0]

    def _no_output(self, axis: str, n: int, k: int, s: int, d: int, lo: int, hi: int, size: int) -> str:
        span = f"kernel {k}" if d == 1 else f"kernel {k}, dilation {d}, so {extent(k, d)} with its gaps"
        if self.transposed:
            return (
                f"{self.function}: the output {axis} would be {size}, it must be at least 1: "
                f"input {axis} {n}, {span}, stride {s}, cut by {lo} before and {hi} after"
            )
        return (
            f"{self.function}: the kernel does not fit the padded input {axis}, {n + lo + hi}: "
            f"input {axis} {n}, padded by {lo} before and {hi} after, {span}"
        )
