"""What every lowering shares: a worker's workspace, the operands, what a schedule is, and how problems are seen.

A lowering turns a Problem into a Schedule: a fixed number of blocks, each a box of the output that no other block
writes, and a method that runs one of them in a given workspace. It parses no arguments and chooses no other lowering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np

from gemmconv.blas import Gemm, largest_integer
from gemmconv.lowerings.boxes import Bounds, Range
from gemmconv.machine import Machine
from gemmconv.problem import Axis, Problem
from gemmconv.profile import Clock

Array = np.ndarray[Any, np.dtype[Any]]
# From each index of an array to the next, in values: [batch, depth, height, width, channel], or of a filter its axes.
Steps = tuple[int, int, int, int, int]

ALIGNMENT = 64


def aligned(size: int) -> int:
    """Round a number of bytes up to whole cache lines."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _aligned_bytes(size: int) -> Array:
    raw = np.empty(size + ALIGNMENT, np.uint8)
    return raw[-raw.ctypes.data % ALIGNMENT :][:size]


class Workspace:
    """Memory of one worker for one call, handed out from the start for each block, its GEMM, and its clock if any."""

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self._memory = _aligned_bytes(size)
        self.at = address(self._memory)
        self.used = 0
        self._operands: Operands | None = None
        self.addresses: list[int] = []  # of the operands, and what lies between their values
        self.strides: list[tuple[int, ...]] = []
        self.held: dict[str, Hashable] = {}
        self.bound: dict[int, Any] = {}  # what tape.py keeps
        self._beside = np.empty(0, np.uint8)
        self.size = size
        self.gemm = Gemm(dtype)
        self.clock: Clock | None = None

    def begin(self, operands: Operands) -> None:
        """Begin a block; what is held of other operands than before is forgotten."""
        if operands is not self._operands:
            self._operands = operands
            self.addresses = [address(array) for array in operands.arrays]
            self.strides = [array.strides for array in operands.arrays]
            self.held.clear()

    def reset(self) -> None:
        """Forget what was taken; whatever holds it must not be used any more."""
        self.used = 0

    def hold(self, place: str, key: Hashable, fill: Callable[[], None]) -> None:
        """Fill a place, unless a block of this call has filled it for the same key, and no other one since."""
        if self.held.get(place) != key:
            fill()
            self.held[place] = key

    def scratch(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return a new array for values between two steps, beside the memory that counts."""
        return np.empty(shape, dtype)

    def beside(self, size: int) -> Array:
        """Return bytes for values between two steps of a recorded block: for all blocks the same while they suffice."""
        if self._beside.size < size:
            # What has been bound to the former ones keeps them: as they double, no more than the last ones.
            self._beside = _aligned_bytes(max(size, 2 * self._beside.size))
        return self._beside[:size]

    def buffer(self, values: int) -> None:
        """Set the size of the buffer in which NumPy casts, for the rest of a block."""
        np.setbufsize(values)

    def mark(self, phase: str) -> None:
        """Say that a phase has ended."""
        if self.clock:
            self.clock(phase)

    def release(self) -> None:
        """Forget the operands of the last call, which would stay alive."""
        self._operands = self.clock = None
        self.held.clear()

    def take(self, *shape: int) -> Array:
        """Return an uninitialised array of the GEMM's dtype, aligned to a cache line."""
        size = math.prod(shape) * self.gemm.itemsize
        start, self.used = self.used, self.used + aligned(size)
        return self._memory[start : start + size].view(self.gemm.dtype).reshape(shape)


class Operands(NamedTuple):
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

    @property
    def arrays(self) -> list[Array]:
        """All of them."""
        arrays = [self.value, self.filter, self.output, self.packed]
        return arrays if self.bias is None else [*arrays, self.bias]

    def start(self, channels: Range, behind: int = 0) -> Array | int:
        """Return what sums of some channels of the result begin with: 0, or the bias with `behind` axes behind it.

        Where taps are seen as channels the bias repeats, as it does in `bias`.
        """
        if self.bias is None:
            return 0
        return self.bias[slice(*channels)].reshape(-1, *[1] * behind)


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
        """The largest m*n*k of a product for which BLAS may use several threads; 0 if none is formed."""

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

    def pack_part(self, filter: Array, packed: Array, part: int, parts: int, workspace: Workspace) -> None:
        """Do one of so many parts of what `pack` does, with a workspace that no block uses meanwhile."""


@cache
def packs_in_parts(schedule: type) -> bool:
    """Whether schedules of a class pack in parts; to ask a protocol takes longer than a small product."""
    return issubclass(schedule, PackedInParts)


def pack_part(schedule: Schedule, filter: Array, packed: Array, part: int, parts: int, workspace: Workspace) -> None:
    """Do one of so many parts of what a schedule's `pack` does; a single one is all of it."""
    if packs_in_parts(type(schedule)):
        cast(PackedInParts, schedule).pack_part(filter, packed, part, parts, workspace)
    else:
        schedule.pack(filter, packed)


@runtime_checkable
class OfGroups(Protocol):
    """A schedule that does several groups by their own filters: it takes the filter as it is given."""

    @property
    def own_groups(self) -> int:
        """How many are one of its problem."""


@runtime_checkable
class InShares(Protocol):
    """A schedule whose blocks form shares of the result, which are added up in the order of their indices.

    Blocks of a share follow each other. Shares are in the problem's dtype, which is that of the sums.
    """

    @property
    def shares(self) -> int:
        """How many; 1 if blocks form the result."""


class Usual:
    """What most schedules are."""

    __slots__ = ()

    @property
    def wants_finite_filter(self) -> bool:
        return False

    @property
    def wants_finite_value(self) -> bool:
        return False

    @property
    def whole_behind(self) -> int:
        return 3

    @property
    def reads_beyond(self) -> int:
        return 1


class AsItLies(Usual):
    """For schedules that use the filter as it lies."""

    __slots__ = ()

    @property
    def packed_values(self) -> int:
        return 0

    def pack(self, filter: Array, packed: Array) -> None:
        """Do nothing."""


def address(array: Array) -> int:
    """Return where an array's memory is; `array.ctypes` takes twice as long."""
    at: int = array.__array_interface__["data"][0]
    return at


def laid(array: Array, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]) -> Array:
    """Return values of a contiguous array, from a byte on, with other strides; `as_strided` takes longer."""
    found = type(array)(shape, array.dtype, array, offset, strides)
    found.__array_finalize__(array)
    return found


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


def must_widen(problem: Problem) -> bool:
    """Whether operands cannot be used as they lie: half precisions, and distances that BLAS' integers cannot hold."""
    return problem.dtype != problem.compute_dtype or too_far(problem)


def too_far(problem: Problem) -> bool:
    """Whether coarse rows with channels first are further apart than BLAS' integers can say."""
    return problem.layout == "NCDHW" and math.prod(problem.coarse) > largest_integer(problem.compute_dtype)
