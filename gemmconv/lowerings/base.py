"""What every lowering shares: its operands, a worker's workspace, and boxes of rows.

A lowering turns a Problem into a Schedule: a fixed number of blocks, each a box of the output that no other block
writes, and a method that runs one of them in a given workspace. It parses no arguments and chooses no other lowering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from gemmconv.blas import Gemm, largest_integer
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem
from gemmconv.profile import Clock

Array = np.ndarray[Any, np.dtype[Any]]
Range = tuple[int, int]
Index = tuple[Any, ...]
# From each index of an array to the next, in values: [batch, depth, height, width, channel], or of a filter its axes.
Steps = tuple[int, int, int, int, int]
# What a block writes of the result, on some of its axes: batch, depth, height, width and channels, as 0 to 4.
Bounds = tuple[tuple[int, Range], ...]
T = TypeVar("T")

_ALIGNMENT = 64
# Bytes of a run that NumPy copies faster as one item.
_SHORT_BYTES = 512
# Bytes between lines of which half a first cache holds a few only.
_CONFLICT = 2048
# Of how many keys a workspace keeps views.
_MOST_VIEWS = 64


def aligned(size: int) -> int:
    """Round a number of bytes up to whole cache lines."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Workspace:
    """Memory of one worker for one call, handed out from the start for each block, its GEMM, and its clock if any."""

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        raw = np.empty(size + _ALIGNMENT, np.uint8)
        self._memory = raw[-raw.ctypes.data % _ALIGNMENT :][:size]
        self.used = 0
        self._kept: tuple[Operands, Any] | None = None
        self._views: dict[int, tuple[object, Any, int]] = {}
        self.size = size
        self.gemm = Gemm(dtype)
        self.clock: Clock | None = None

    def reset(self) -> None:
        """Forget what was taken; whatever holds it must not be used any more."""
        self.used = 0

    def once(self, operands: Operands, make: Callable[[], T]) -> T:
        """Return what `make` makes of the operands of a call, for its first block; it takes nothing."""
        if self._kept is None or self._kept[0] is not operands:
            self._kept = operands, make()
        found: T = self._kept[1]
        return found

    def views(self, key: object, make: Callable[[], T]) -> T:
        """Return what `make` makes of an empty workspace for a key, with what that took.

        It is kept for later calls, for which making it would take longer than many a step, so it holds no operand.
        """
        kept = self._views.get(id(key))
        if kept is None or kept[0] is not key:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            self.reset()
            made = make()
            kept = self._views[id(key)] = key, made, self.used
        found: T
        _, found, self.used = kept
        return found

    def release(self) -> None:
        """Forget the operands of the last call, which would stay alive."""
        self._kept = self.clock = None

    def take(self, *shape: int) -> Array:
        """Return an uninitialised array of the GEMM's dtype, aligned to a cache line."""
        size = math.prod(shape) * self.gemm.itemsize
        start, self.used = self.used, self.used + aligned(size)
        return self._memory[start : start + size].view(self.gemm.dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class Operands:
    """The arrays of one group of one call, native, in the problem's dtype and layout: two operands and the result.

    They are C-contiguous but for channels of other groups between theirs, or windows of such arrays seen at their place
    in the whole; `steps` says what lies between their values, on axes in a schedule's order. `value` is the first
    operand: the coarse array of a transposed convolution, the fine one otherwise. `filter` is the second, for the
    filter's gradient the coarse array. `packed` is what a schedule's `pack` made of the filter, in the dtype of the
    sums; it is empty without one. `bias` is in that dtype too.
    """

    value: Array
    filter: Array
    output: Array
    packed: Array
    steps: tuple[Steps, Steps, Steps]
    bias: Array | None = None

    def start(self, channels: Range, behind: int = 0) -> Array | int:
        """Return what sums of some channels of the result begin with: 0, or the bias with `behind` axes behind it.

        Where taps are seen as channels the bias repeats.
        """
        if self.bias is None:
            return 0
        found: Array = np.resize(self.bias, channels[1])[channels[0] :]
        return found.reshape(-1, *[1] * behind)


class CannotLowerError(ValueError):
    """A lowering cannot do a problem; its text says why and what can."""


class NotFiniteError(ArithmeticError):
    """A block's results are not finite where another lowering's may be; it has written nothing that will stay."""


class Schedule(Protocol):
    """How one lowering does one group of a problem."""

    @property
    def problem(self) -> Problem:
        """What it does; for a single group with taps perhaps seen as channels."""

    @property
    def count(self) -> int:
        """The number of blocks."""

    @property
    def digits(self) -> Sequence[Sequence[Bounds]]:
        """What the digits of a block's index say, slowest first: of each of its values what such blocks write.

        Bounds may be empty, where all blocks with this value write the same.
        """

    @property
    def whole_behind(self) -> int:
        """The first of batch, depth, height and width along which rows are taken as they lie with what is between.

        Behind it whole lines and planes of the first operand are read.
        """

    @property
    def reads_beyond(self) -> int:
        """How many rows of the first operand, or strides, a block may read beyond those that its taps reach."""

    @property
    def workspace_bytes(self) -> int:
        """What one worker needs."""

    @property
    def packed_values(self) -> int:
        """The size of the packed filter, 0 where the filter is used as it lies."""

    @property
    def wants_finite_filter(self) -> bool:
        """Whether zeros are multiplied with the filter, so that Inf and NaN in it would spread."""

    @property
    def wants_finite_value(self) -> bool:
        """Whether zeros are multiplied with the first operand."""

    @property
    def largest_product(self) -> int:
        """The largest m*n*k of a product for which BLAS may use several threads; 0 if none is formed.

        Then groups done as one take the filter as it is.
        """

    @property
    def reason(self) -> str:
        """What was decided and why, in words."""

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, to compare schedules."""

    def pack(self, filter: Array, packed: Array) -> None:
        """Copy a filter into `packed`, of `packed_values` in the dtype of the sums."""

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        """Compute one block of the output."""


@runtime_checkable
class PackedInParts(Protocol):
    """A schedule whose filter several workers can pack at once."""

    def pack_part(self, filter: Array, packed: Array, part: int, parts: int) -> None:
        """Do one of so many parts of what `pack` does."""


@runtime_checkable
class InShares(Protocol):
    """A schedule whose blocks form shares of the result, which are added up in the order of their indices.

    Blocks of a share follow each other. Shares are in the problem's dtype, which is that of the sums.
    """

    @property
    def shares(self) -> int:
        """How many; 1 if blocks form the result."""


class AsItLies:
    """For schedules that use the filter as it lies, and form just the products that land."""

    __slots__ = ()
    wants_finite_filter = False
    wants_finite_value = False
    reads_beyond = 1

    @property
    def packed_values(self) -> int:
        return 0

    @property
    def whole_behind(self) -> int:
        return 3

    def pack(self, filter: Array, packed: Array) -> None:
        """Do nothing."""


def digit(axis: int, spans: Iterable[Range]) -> list[Bounds]:
    """Return the digit of blocks that write these intervals along an axis of the result."""
    return [((axis, span),) for span in spans]


def each(size: int) -> list[Range]:
    """Return the intervals of single positions."""
    return [(i, i + 1) for i in range(size)]


class Box(NamedTuple):
    """Rows of the value: ranges of batch entries and of coarse positions in depth, height and width."""

    batch: Range
    depth: Range
    height: Range
    width: Range

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        b, d, h, w = self
        return b[1] - b[0], d[1] - d[0], h[1] - h[0], w[1] - w[0]

    def hull(self, whole: tuple[int, int, int, int]) -> Box:
        """Return the smallest contiguous run of rows that holds this box, in a grid of rows of the sizes `whole`.

        Inside the first direction in which the box is longer than one, a run holds whole rows and planes.
        """
        found = []
        inner = False
        for (start, stop), size in zip(self, whole, strict=True):
            found.append((0, size) if inner else (start, stop))
            inner = inner or stop - start > 1
        return Box(*found)

    def within(self, hull: Box) -> tuple[slice, slice, slice, slice]:
        """Return where this box lies in an array of the hull's sizes."""
        b, d, h, w = (slice(mine[0] - its[0], mine[1] - its[0]) for mine, its in zip(self, hull, strict=True))
        return b, d, h, w


def address(array: Array) -> int:
    """Return where an array's memory is; `array.ctypes` takes twice as long."""
    at: int = array.__array_interface__["data"][0]
    return at


@lru_cache(maxsize=256)
def steps_of(layout: str, filter: bool, shape: tuple[int, ...], order: tuple[int, ...]) -> Steps:
    """Return the steps of a C-contiguous array of a shape in the layout's order, its spatial axes in another order."""
    behind = [1] * 5
    for i in (3, 2, 1, 0):
        behind[i] = behind[i + 1] * shape[i + 1]
    if filter:
        a, b, c = (behind[i] for i in order)
        return a, b, c, behind[3], 1
    first = 1 if layout == "NDHWC" else 2
    d, h, w = (behind[first + i] for i in order)
    return behind[0], d, h, w, 1 if first == 1 else behind[1]


def five(layout: str, array: Array, batch: int, spatial: Sequence[int], channels: int) -> Array:
    """View a contiguous array as [batch, d, h, w, channels], whatever its layout."""
    if layout == "NDHWC":
        return array.reshape(batch, *spatial, channels)
    return array.reshape(batch, channels, *spatial).transpose(0, 2, 3, 4, 1)


@lru_cache(maxsize=256)
def order(axes: tuple[Axis, Axis, Axis]) -> tuple[int, ...]:
    """Return the order in which schedules take axes: those of size one first.

    Moving them changes no address, and makes the longest runs innermost.
    """
    return tuple(sorted(range(3), key=lambda i: not axes[i].coarse == axes[i].fine == axes[i].kernel == 1))


def canonical(axes: tuple[Axis, Axis, Axis]) -> tuple[Axis, Axis, Axis]:
    """Return equivalent axes that are easier: those of size one in front, and no overlap where there is one position.

    The taps of a single coarse position land apart, whatever its stride, so it can be one under which nothing overlaps.
    """
    d, h, w = (
        replace(axis, stride=axis.extent) if axis.coarse == 1 and axis.stride < axis.extent else axis
        for axis in (axes[i] for i in order(axes))
    )
    return d, h, w


def simplified(problem: Problem) -> Problem:
    """Return an equal problem on the same memory: taps of a single position that fill the output are channels of it."""
    single = all(a.coarse == 1 and a.fine == a.kernel and a.lo == 0 and a.dilation == 1 for a in problem.axes)
    if not single or problem.layout != "NDHWC" or problem.groups > 1:
        return problem
    point = Axis(1, 1, 1)
    return replace(problem, cout=math.prod(problem.kernel) * problem.cout, axes=(point, point, point))


class Cut(Sequence[Range]):
    """[0, size) cut into as few ranges of at most `chunk` as can be, as even as can be, made as they are asked for."""

    __slots__ = ("parts", "size")

    def __init__(self, size: int, chunk: int) -> None:
        self.size, self.parts = size, max(1, -(-size // max(1, chunk)))

    def __len__(self) -> int:
        return self.parts

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.parts:
            raise IndexError(f"range {index} of {self.parts}")
        return self.size * index // self.parts, self.size * (index + 1) // self.parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cut) and (self.size, self.parts) == (other.size, other.parts)

    def __hash__(self) -> int:
        return hash((self.size, self.parts))

    def __repr__(self) -> str:
        return f"Cut({self.size} in {self.parts})"

    @property
    def longest(self) -> int:
        """The length of the longest range."""
        return -(-self.size // self.parts)

    @property
    def shortest(self) -> int:
        """The length of the shortest range."""
        return self.size // self.parts


def located(index: int, cuts: Sequence[Cut]) -> tuple[int, list[Range]]:
    """Return the ranges that the last digits of a block's index stand for, and the digits before them."""
    found: list[Range] = []
    for cut in reversed(cuts):
        index, at = divmod(index, len(cut))
        found.insert(0, cut[at])
    return index, found


def must_widen(problem: Problem) -> bool:
    """Whether operands cannot be used as they lie: half precisions, and distances that BLAS' integers cannot hold."""
    return problem.dtype != problem.compute_dtype or too_far(problem)


def too_far(problem: Problem) -> bool:
    """Whether coarse rows with channels first are further apart than BLAS' integers can say."""
    return problem.layout == "NCDHW" and math.prod(problem.coarse) > largest_integer(problem.compute_dtype)


def is_finite(array: Array) -> bool:
    """Whether no value is Inf or NaN; False too where only their sum overflows."""
    dtype = np.float32 if array.dtype.itemsize == 2 else array.dtype
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.add.reduce(array, axis=None, dtype=dtype)))


def copy(to: Array, source: Array) -> None:
    """Copy values to another array of the same shape, perhaps of another dtype, short runs of them as items."""
    size = source.shape[-1] * source.itemsize
    short = source.ndim > 1 and source.shape == to.shape and source.itemsize < size and to.dtype == source.dtype
    if short and size <= _SHORT_BYTES and to.strides[-1] == source.strides[-1] == source.itemsize:
        np.copyto(as_items(to, size), as_items(source, size))
    else:
        np.copyto(to, source, casting="unsafe")


def copy_turned(to: Array, source: Array) -> None:
    """Copy matrices to transposed ones: of the two last axes of `to` and `source`.

    Lines that begin at the same few places in their pages push each other out of the first cache: they are copied apart
    before.
    """
    if source.strides[-2] % _CONFLICT:
        np.copyto(to, source.swapaxes(-1, -2), casting="unsafe")
        return
    lines, size = source.shape[-2:]
    apart = np.empty((lines, size + _ALIGNMENT // to.itemsize), to.dtype)[:, :size]
    for index in np.ndindex(source.shape[:-2]):
        np.copyto(apart, source[index], casting="unsafe")
        np.copyto(to[index], apart.T)


def item_size(problem: Problem, channels: int) -> int:
    """Return the bytes of so many channels where they are copied faster as one item, else 0.

    NumPy's innermost loop is then along the axis before.
    """
    size = channels * problem.dtype.itemsize
    beside = problem.layout == "NDHWC" and problem.dtype == problem.compute_dtype
    return size if beside and channels > 1 and size <= _SHORT_BYTES else 0


def as_items(array: Array, size: int) -> Array:
    """View contiguous values of the last axis as one item."""
    found: Array = array.view(f"V{size}")[..., 0]
    return found


def store(output: Array, result: Array) -> None:
    """Write sums into the output, rounding half precisions once; a sum that rounds to zero becomes +0.0."""
    copy(output, result)
    if output.dtype.itemsize == 2:
        bits = output.view(np.uint16)
        np.copyto(bits, 0, where=bits == 0x8000)
