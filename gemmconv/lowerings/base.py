"""What every lowering shares: its operands, a worker's workspace, and the runs of rows that one GEMM can take.

A lowering turns a Problem into a Schedule: a fixed number of blocks, each a box of the output that no other block
writes, and a method that runs one of them in a given workspace. It parses no arguments and chooses no other lowering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from gemmconv.blas import Gemm, largest_integer, small_products
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
# Few rows, and the least of a filter, in values, that is large beside them; and filter rows of a product, at least.
_FEW_ROWS, _LARGE, _LEAST = 64, 1 << 15, 8
# Rows of a product that is not packed, if there can be so many, and columns below which they are not cut for that.
_ENOUGH_ROWS, _NARROW = 32, 32


def aligned(size: int) -> int:
    """Round a number of bytes up to whole cache lines."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Workspace:
    """Memory of one worker for one call, handed out from the start for each block, its GEMM, and its clock if any."""

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        raw = np.empty(size + _ALIGNMENT, np.uint8)
        self._memory = raw[-raw.ctypes.data % _ALIGNMENT :][:size]
        self.used = 0
        self._kept: tuple[Operands, Any, int] | None = None
        self.size = size
        self.gemm = Gemm(dtype)
        self.clock: Clock | None = None

    def reset(self) -> None:
        """Forget what was taken; whatever holds it must not be used any more."""
        self.used = 0

    def once(self, operands: Operands, make: Callable[[], T]) -> T:
        """Return what `make` makes of an empty workspace, with what that took: made for the first block of a call."""
        if self._kept is None or self._kept[0] is not operands:
            self.reset()
            made = make()
            self._kept = operands, made, self.used
        _, found, self.used = self._kept
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
        """The largest m*n*k of any GEMM; 0 if there is none: then groups done as one take the filter as it is."""

    @property
    def reason(self) -> str:
        """What was decided and why, in words."""

    def time_s(self, machine: Machine) -> float:
        """Return the estimated time on one core, to compare schedules."""

    def pack(self, filter: Array, packed: Array) -> None:
        """Copy a filter into `packed`, of `packed_values` in the dtype of the sums."""

    def run(self, index: int, operands: Operands, workspace: Workspace) -> None:
        """Compute one block of the output."""


class AsItLies:
    """For schedules that use the filter as it lies, and form just the products that land."""

    __slots__ = ()
    packed_values = 0
    wants_finite_filter = False
    wants_finite_value = False
    whole_behind = 3

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


class Piece(NamedTuple):
    """Consecutive rows of the filter, seen as [kd*kh*kw*Cout, Cin], and the first of their columns."""

    first: int
    rows: int
    column: int


class Rows(NamedTuple):
    """A contiguous run of rows in memory: `m` of them, or with channels first `ld` apart from channel to channel."""

    hull: Box
    m: int
    address: int
    ld: int


class Columns:
    """Forms columns, the products of rows of the value and rows of the filter, for one block, in `buffer`.

    Operands in the dtype of the sums are used as they lie. Others are widened, `depth` channels at a time, into arrays
    of the workspace that hold `rows` and `taps`, never as a whole.

    Where the value has few rows and the filter is large, GEMM would spend its time packing the filter. Then products
    small enough to be formed without packing are formed in one step, from the rows turned to columns. With `turned` all
    products are formed so, of the packed filter, [tap, cin, cout].
    """

    def __init__(
        self,
        problem: Problem,
        axes: Sequence[Axis],
        operands: Operands,
        workspace: Workspace,
        rows: int,
        taps: int,
        depth: int,
        widens: bool,
        turned: bool = False,
    ) -> None:
        sizes = [axis.coarse for axis in axes]
        self.buffer = workspace.take(rows * taps)
        self._cin, self._depth, self._widens = problem.cin, depth, widens
        self._pitch = problem.pitch
        self._transposed = problem.layout == "NCDHW"
        self._steps = operands.steps[0]
        self._gemm = workspace.gemm
        self._filter = operands.filter.reshape(-1, problem.cin)
        self._grid = five(problem.layout, operands.value, problem.batch, sizes, problem.cin)
        self._rows = workspace.take(rows * depth if widens else 0)
        self._taps = workspace.take(taps * depth if widens else 0)
        self._held: tuple[Box, int] | None = None
        self._few = few_rows(problem) and not turned
        self._by_tap = operands.packed.reshape(-1, problem.cin, problem.cout) if turned else None
        if self._few:
            self._turned = workspace.take(rows * problem.cin)
            self._across = workspace.take(rows * taps)
        # Asking an array for its address costs about as much as a small addition.
        arrays = (operands.value, operands.filter, self.buffer, self._rows, self._taps)
        self._value_at, self._filter_at, self._buffer_at, self._rows_at, self._taps_at = map(address, arrays)

    def locate(self, hull: Box) -> Rows:
        """Return where a hull's rows are, for any number of calls of `form`."""
        (b, _), (d, _), (h, _), (w, _) = hull
        of_b, of_d, of_h, of_w, of_c = self._steps
        offset = b * of_b + d * of_d + h * of_h + w * of_w
        ld = of_c if self._transposed else of_w
        return Rows(hull, math.prod(hull.sizes), self._value_at + offset * self._gemm.itemsize, ld)

    def form(self, rows: Rows, pieces: Sequence[Piece], ld: int, tap_major: bool) -> None:
        """Form the columns of rows and of pieces of the filter, with `ld` values from line to line.

        Columns lie [row, tap] or, tap_major, [tap, row].
        """
        cin, m = self._cin, rows.m
        if self._by_tap is not None:
            for piece in pieces:
                self._form_turned(self._by_tap, rows, piece, ld)
            return
        if not self._widens:
            for piece in pieces:
                if self._few and m > 1 and piece.rows * cin >= _LARGE:
                    self._form_few(rows, piece, ld, tap_major)
                    continue
                at = self._filter_at + piece.first * self._pitch * self._gemm.itemsize
                self._multiply(m, cin, rows.address, rows.ld, piece, at, self._pitch, ld, tap_major, False)
            return
        for start in range(0, cin, self._depth):
            self._widen(rows.hull, start)
            k = min(self._depth, cin - start)
            for piece in pieces:
                part = self._filter[piece.first : piece.first + piece.rows, start : start + k]
                np.copyto(self._taps[: part.size].reshape(part.shape), part, casting="unsafe")
                ld_rows = m if self._transposed else k
                self._multiply(m, k, self._rows_at, ld_rows, piece, self._taps_at, k, ld, tap_major, start > 0)

    def _multiply(
        self, m: int, k: int, rows: int, ld_rows: int, piece: Piece, taps: int, ld_taps: int,
        ld: int, tap_major: bool, accumulate: bool,
    ) -> None:  # fmt: skip
        gemm = self._gemm
        if tap_major:
            to = self._buffer_at + piece.column * ld * gemm.itemsize
            gemm(piece.rows, m, k, taps, ld_taps, False, rows, ld_rows, not self._transposed, to, ld, accumulate)
        else:
            to = self._buffer_at + piece.column * gemm.itemsize
            gemm(m, piece.rows, k, rows, ld_rows, self._transposed, taps, ld_taps, True, to, ld, accumulate)

    def _form_few(self, rows: Rows, piece: Piece, ld: int, tap_major: bool) -> None:
        """Form the columns of a piece in products that are not packed, as [tap, row]."""
        m, n = rows.m, piece.rows
        turned = self._turn(rows)
        taps = self._filter[piece.first : piece.first + n]
        if tap_major:
            to = self.buffer[piece.column * ld : (piece.column + n) * ld].reshape(n, ld)[:, :m]
        else:
            to = self._across[: n * m].reshape(n, m)
        each = min(n, small_products() // (m * self._cin))
        even = n - n % each
        whole = taps[:even].reshape(-1, each, self._cin)
        np.matmul(whole, turned, out=to[:even].reshape(-1, each, m))
        if even < n:
            np.matmul(taps[even:], turned, out=to[even:])
        if not tap_major:
            np.copyto(self.buffer[: m * ld].reshape(m, ld)[:, piece.column : piece.column + n], to.T)

    def _form_turned(self, by_tap: Array, rows: Rows, piece: Piece, ld: int) -> None:
        """Form the columns of a piece, whole taps or some channels of one, in products that are not packed."""
        m, cin, cout = rows.m, self._cin, by_tap.shape[2]
        tap, first = divmod(piece.first, cout)
        n = min(piece.rows, cout)
        taps = by_tap[tap : tap + piece.rows // n, :, first : first + n]
        columns = unpacked_columns(n, cin)
        each = max(1, m // -(-m * cin * columns // small_products()))
        even = m - m % each
        value = self._grid[tuple(slice(*r) for r in rows.hull)].reshape(m, cin)
        to = self.buffer[: m * ld].reshape(m, ld)[:, piece.column : piece.column + piece.rows]
        shape = len(taps), n // columns, columns
        filter = taps.reshape(len(taps), cin, *shape[1:]).transpose(0, 2, 1, 3)
        for start, stop, pieces in ((0, even, even // each), (even, m, 1)):
            if start < stop:
                part = value[start:stop].reshape(pieces, 1, 1, -1, cin)
                out = to[start:stop].reshape(pieces, -1, *shape).transpose(0, 2, 3, 1, 4)
                np.matmul(part, filter, out=out)

    def _turn(self, rows: Rows) -> Array:
        """Return the rows of a hull as columns, unless they are what is held already."""
        turned = self._turned[: self._cin * rows.m].reshape(self._cin, rows.m)
        if self._held != (rows.hull, 0):
            part = self._grid[tuple(slice(*r) for r in rows.hull)]
            np.copyto(turned, part.reshape(rows.m, self._cin).T)
            self._held = (rows.hull, 0)
        return turned

    def _widen(self, hull: Box, start: int) -> None:
        """Widen the rows of a hull, unless they are what is held already; the layout stays."""
        if self._held == (hull, start):
            return
        part = self._grid[(*(slice(*r) for r in hull), slice(start, min(start + self._depth, self._cin)))]
        layout = "NCDHW" if self._transposed else "NDHWC"
        to = five(layout, self._rows[: part.size], part.shape[0], part.shape[1:4], part.shape[4])
        np.copyto(to, part, casting="unsafe")
        self._held = (hull, start)


def few_rows(problem: Problem) -> bool:
    """Whether a value has so few rows that products with a large filter are formed without packing it."""
    rows = problem.batch * math.prod(problem.coarse)
    return (
        rows <= _FEW_ROWS
        and problem.layout == "NDHWC"
        and problem.compute_dtype.kind == "f"
        and not must_widen(problem)
        and math.prod(problem.filter_shape) >= _LARGE
        and small_products() >= _LEAST * rows * problem.cin
    )


def unpacked_columns(n: int, k: int) -> int:
    """Return the columns of products that are not packed: a part of n that leaves enough rows beside k, if it can."""
    while n % 2 == 0 and n > _NARROW and small_products() < _ENOUGH_ROWS * n * k:
        n //= 2
    return n


def columns_values(problem: Problem, rows: int, taps: int, depth: int, widens: bool, turned: bool = False) -> list[int]:
    """Return the values that `Columns` takes of a workspace, one array after the other."""
    found = [rows * taps]
    if widens:
        found += [rows * depth, taps * depth]
    if few_rows(problem) and not turned:
        found += [rows * problem.cin, rows * taps]
    return found


def address(array: Array) -> int:
    """Return where an array's memory is; `array.ctypes` takes twice as long."""
    at: int = array.__array_interface__["data"][0]
    return at


def steps_of(layout: str, filter: bool, shape: Sequence[int], order: Sequence[int]) -> Steps:
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


def order(axes: Sequence[Axis]) -> list[int]:
    """Return the order in which schedules take axes: those of size one first.

    Moving them changes no address, and makes the longest runs innermost.
    """
    return sorted(range(len(axes)), key=lambda i: not axes[i].coarse == axes[i].fine == axes[i].kernel == 1)


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


def must_widen(problem: Problem) -> bool:
    """Whether operands cannot be used as they lie: half precisions, and distances that BLAS' integers cannot hold."""
    return problem.dtype != problem.compute_dtype or too_far(problem)


def too_far(problem: Problem) -> bool:
    """Whether coarse rows with channels first are further apart than BLAS' integers can say."""
    return problem.layout == "NCDHW" and math.prod(problem.coarse) > largest_integer(problem.compute_dtype)


def copy(to: Array, source: Array) -> None:
    """Copy values to another array of the same shape, perhaps of another dtype.

    Short runs of values on the last axis are copied as items of their own size, which takes half the time: NumPy's
    innermost loop is then along the axis before.
    """
    size = source.shape[-1] * source.itemsize
    short = (
        source.ndim > 1
        and source.shape == to.shape
        and source.itemsize < size <= _SHORT_BYTES
        and to.dtype == source.dtype
    )
    if short and to.strides[-1] == source.strides[-1] == source.itemsize:
        np.copyto(as_items(to, size), as_items(source, size))
    else:
        np.copyto(to, source, casting="unsafe")


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
