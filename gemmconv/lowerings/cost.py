"""What steps cost, in seconds on one core: a few measured constants, used to compare schedules, never to predict.

Only ratios matter: all were measured on one AVX-512 core, float32, and other machines and dtypes move together.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Protocol, TypeVar

from gemmconv.blas import serial_products
from gemmconv.lowerings.base import CannotLowerError
from gemmconv.lowerings.copies import CONFLICT
from gemmconv.machine import Machine
from gemmconv.problem import Problem

# GEMM: the rate of large products between other work, and the sizes of m, n and k at which half of it is reached.
_GEMM_FLOPS_PER_S = 135e9
_HALF_M, _HALF_N, _HALF_K = 31, 11, 9
# Small products one after the other in a single step, without packing, and the k at which half of it is reached.
_SMALL_FLOPS_PER_S, _SMALL_HALF_K = 138e9, 6
# Of small products whose rows are in vectors: the m at which half of it is reached, the n up to which it takes as long
# as for that, and what a value of rows costs more that BLAS packs.
_SMALL_HALF_M, _FEWEST_CHANNELS, _PACKED_POSITION_S = 24, 4, 0.2e-9
# The same for products of lines of both operands, and the m and n at which half of it is reached.
_LINES_FLOPS_PER_S, _LINES_HALF_MN, _LINES_HALF_K = 138e9, 2, 32
# What such products take more where lines push each other out of the first cache, and where no operand's lines begin
# with cache lines.
_CONFLICTING, _MISALIGNED = 1.1, 1.1
# What small products of a matrix B as it lies take more than of one packed to tiles: where its lines are longer than
# those of a tile, where it does not stay in cache, and where they are a page apart.
_TILE_VALUES, _LONG_LINES, _KEPT_VALUES, _NOT_KEPT, _PAGE, _PAGES_APART = 64, 1.15, 1 << 17, 1.4, 4096, 1.3
# What they take more of a matrix A whose columns are its lines, where it has more of them than stay in the first cache.
_KEPT_LINES, _LINES_NOT_KEPT = 512, 1.1
# A value of rows that GEMM packs to form columns [tap, row], of few taps.
_PACKED_ROW_S = 0.55e-9
# A value of a matrix that is read once, from memory.
_STREAMED_VALUE_S = 0.25e-9
# A value of a filter that small products read once, and one of so many that they come from memory, unless those are
# read ahead.
_READ_VALUE_S, _FAR_VALUE_S, _FAR_VALUES = 0.1e-9, 0.45e-9, 1 << 21
# A step in Python: one GEMM call, and one addition or copy with the slices it needs. Of several blocks more than of a
# single one: a thread whose step ends while another one is in Python sleeps 10 to 35 microseconds in a virtual machine,
# more often where all steps are short.
_STEP_ALONE_S, _PASS_STEP_ALONE_S = 1.5e-6, 1e-6
_STEP_S, _PASS_STEP_S, _SHORT_STEP_S = 5e-6, 3e-6, 7e-6
# A value added, and what each inner loop of NumPy costs beside its values: in cache, and through the ufunc buffer,
# which joins short loops.
_VALUE_S, _RUN_S = 0.085e-9, 26e-9
_BUFFERED_VALUE_S, _BUFFERED_RUN_S = 0.35e-9, 5e-9
# A value multiplied and added to a sum by einsum, and each of its inner loops.
_WEIGHED_VALUE_S, _WEIGHED_RUN_S = 0.17e-9, 22e-9
# A value copied, and each inner loop of copies.
_COPIED_VALUE_S, _COPIED_RUN_S = 0.08e-9, 3.5e-9
# What a value costs more that comes from memory or goes there, and one that is not beside the next on one of the sides.
SPILLED_VALUE_S = 0.15e-9
_STRIDED_VALUE_S = 0.6e-9
# One of lines that are turned, channels last to channels first and back, each inner loop, and what a value costs more
# where others in its cache line, or the next, are not used; pieces of whole lines cost nothing.
_TURNED_LINE_VALUE_S, _TURNED_BACK_VALUE_S, _TURNED_RUN_S = 0.55e-9, 0.35e-9, 2.8e-9
_ALONE_VALUE_S, _LINE_VALUES, _PIECE_VALUES = 0.1e-9, 32, 16
# What a value costs more that is stored apart from the next position's, and goes to memory. Of a result that takes so
# much of the last cache nothing goes there before the next call stores it again; that takes so much, all of it. What a
# cache has beyond so many bytes is taken to be others'.
_APART_VALUE_S, _KEPT_SHARE, _LOST_SHARE = 1.5e-9, 1 / 8, 5 / 8
_MOST_L3_BYTES = 32 << 20
# A value of an operand that is looked at for Inf and NaN, before the blocks and by one worker.
_LOOKED_AT_VALUE_S = 0.15e-9
# A value of a filter that is turned, before the blocks; large filters by all workers.
TURNED_VALUE_S = 1.4e-9
# A value of taps that are combined for minimal filtering, copied or turned first, and one of the points' filters.
_COPIED_TAP_S, _TURNED_TAP_S, _COMBINED_TAP_S = 0.2e-9, 1.0e-9, 0.8e-9
# What a run costs more that is read from memory, beyond any cache, and does not follow the one before.
_FAR_RUN_S = 60e-9
# A value added with neither side in inner loops that are beside each other, as columns stored with channels first.
SCATTERED_VALUE_S = 3e-9
# NumPy copies loops shorter than its ufunc buffer through it, in blocks of the buffer's size, and that costs more than
# the addition, unless loops are very short: lowerings set the smallest buffer that NumPy takes for all others.
SHORT_RUN = 64
SMALLEST_BUFFER = 16
# A block in Python, beside its steps.
_BLOCK_S, _BLOCK_ALONE_S = 30e-6, 10e-6
# Blocks that cannot be divided evenly leave workers idle: how many workers machines have, and how often, as a guess.
_WORKERS = ((1, 0.4), (2, 0.4), (4, 0.2))
# What several workers take to begin and to end together.
_TOGETHER_S = 100e-6
# Blocks are made of single phases of depth and height while there are fewer boxes than this.
ENOUGH_BLOCKS = 16
# The most workspace of a worker, in L2 caches.
_MOST_WORKSPACE = 4


class Costed(Protocol):
    """What has a cost: a schedule."""

    @property
    def problem(self) -> Problem: ...

    @property
    def wants_finite_filter(self) -> bool: ...

    @property
    def wants_finite_value(self) -> bool: ...

    @property
    def count(self) -> int: ...

    @property
    def workspace_bytes(self) -> int: ...

    def time_s(self, machine: Machine) -> float: ...


S = TypeVar("S", bound=Costed)


class _Alone(threading.local):
    """Whether the block that is weighed is the only one, so that no other thread takes steps."""

    yes = False


_alone = _Alone()


def step_s(*, short: bool = False) -> float:
    """Return what a step in Python takes beside its work; `short` says that it is one of many short ones."""
    return _STEP_ALONE_S if _alone.yes else _SHORT_STEP_S if short else _STEP_S


def _pass_step_s() -> float:
    return _PASS_STEP_ALONE_S if _alone.yes else _PASS_STEP_S


def gemm_s(m: float, n: float, k: float, *, spilled: bool = False, tap_major: bool = False) -> float:
    """Return the time of one GEMM call; `spilled` says that it adds to sums that are not in cache.

    With `tap_major` it forms columns [n, m].
    """
    if m == 1 and n * k > serial_products():  # as gemv
        return step_s() + n * k * _STREAMED_VALUE_S
    added = m * n * SPILLED_VALUE_S * spilled + m * k * _PACKED_ROW_S * tap_major
    return step_s() + added + 2 * (m + _HALF_M) * (n + _HALF_N) * (k + _HALF_K) / _GEMM_FLOPS_PER_S


def unpacked_s(m: float, n: float, k: float, parts: int = 0, *, apart: int = 0, turned: bool = False) -> float:
    """Return the time of a product that is not packed, in one step and one more for each part that is added.

    `apart` are values from line to line of B as it lies, of four bytes; 0 if it is packed to tiles. With `turned` the
    columns of A are its lines.
    """
    product_s = 2 * m * n * (k + _SMALL_HALF_K) / _SMALL_FLOPS_PER_S
    product_s *= _LINES_NOT_KEPT if turned and k > _KEPT_LINES else 1
    if apart:
        product_s *= _NOT_KEPT if n * k > _KEPT_VALUES else _LONG_LINES if apart > _TILE_VALUES else 1
        product_s *= 1 if apart * 4 % _PAGE else _PAGES_APART
    return (2 + parts) * step_s() + parts * m * n * 3 * _VALUE_S + product_s


def lines_s(m: float, n: float, k: int, *, steps: int = 1, aligned: bool = False) -> float:
    """Return the time of a product of m lines and n lines of a filter, as they lie.

    With `aligned` the m lines begin with cache lines.
    """
    products = (m + _LINES_HALF_MN) * (n + _LINES_HALF_MN) * (k + _LINES_HALF_K)
    products *= (1 if k * 4 % CONFLICT else _CONFLICTING) * (1 if aligned else _MISALIGNED)
    return steps * step_s() + read_s(n * k) + 2 * products / _LINES_FLOPS_PER_S


def read_s(values: float, whole: int = 0) -> float:
    """Return the time to read values of a filter for small products; `whole` values if it is not read ahead."""
    return values * (_FAR_VALUE_S if whole >= _FAR_VALUES else _READ_VALUE_S)


def packed_lines_s(values: float) -> float:
    """Return what it costs more to form products of so many values of lines if BLAS packs them."""
    return values * _PACKED_POSITION_S


def few_channels_s(products: float, m: float, n: float, k: float, *, packed: bool) -> float:
    """Return the time of products of n channels with m positions, which are in vectors, in one step.

    With `packed` BLAS has no kernels that read the positions where they lie.
    """
    flops = 2 * (m + _SMALL_HALF_M) * max(n, _FEWEST_CHANNELS) * (k + _SMALL_HALF_K)
    return step_s() + products * (flops / _SMALL_FLOPS_PER_S + m * k * _PACKED_POSITION_S * packed)


def streamed_s(values: float, run: float) -> float:
    """Return what it costs more to read values in runs from memory, beyond any cache."""
    return values * (SPILLED_VALUE_S + _FAR_RUN_S / run)


def few_s(m: float, n: float, k: float) -> float:
    """Return the time of a product with few rows, which are turned, and what is formed turned back."""
    turned = m * n * _STRIDED_VALUE_S
    return 2 * step_s() + read_s(n * k) + turned + 2 * m * n * k / _SMALL_FLOPS_PER_S


def small_s(m: float, n: float, k: float, *, spilled: bool = False) -> float:
    """Return the time of small products that together are m by n by k, in one step, and of adding them to sums."""
    added = m * n * (2 * _VALUE_S + spilled * SPILLED_VALUE_S)
    return 2 * step_s() + added + 2 * m * n * (k + _SMALL_HALF_K) / _SMALL_FLOPS_PER_S


def pass_s(values: float, run: float, *, spilled: bool = False) -> float:
    """Return the time to add values in inner loops of `run` values."""
    value_s, run_s = (_BUFFERED_VALUE_S, _BUFFERED_RUN_S) if run < SHORT_RUN else (_VALUE_S, _RUN_S)
    return _pass_step_s() + values * (value_s + run_s / max(1, run) + spilled * SPILLED_VALUE_S)


def weighed_s(values: float, run: float, *, steps: int = 1) -> float:
    """Return the time to multiply values by weights and add them up, in inner loops of `run` values."""
    return steps * _pass_step_s() + values * (_WEIGHED_VALUE_S + _WEIGHED_RUN_S / max(1, run))


def copy_s(values: float, run: float, *, steps: int = 1, spilled: bool = False, strided: bool = False) -> float:
    """Return the time to copy values in `steps` copies with inner loops of `run` values."""
    each = _STRIDED_VALUE_S if strided else _COPIED_VALUE_S + _COPIED_RUN_S / max(1, run)
    return steps * _pass_step_s() + values * (each + spilled * SPILLED_VALUE_S)


def turned_s(values: float, run: float, beside: float, *, back: bool = False) -> float:
    """Return the time to turn lines of values, `beside` channels of a position, in inner loops of `run` values.

    Channels are last before, or with `back` after it.
    """
    value_s = _TURNED_BACK_VALUE_S if back else _TURNED_LINE_VALUE_S
    return _pass_step_s() + values * (value_s + _TURNED_RUN_S / max(1, run) + _in_line_s(beside))


def _in_line_s(beside: float) -> float:
    """Return what a value costs more of which so many channels are used in a cache line, where there are others."""
    return _ALONE_VALUE_S * _LINE_VALUES / beside if beside < _LINE_VALUES else 0.0


def in_pieces_s(problem: Problem, channels: int) -> float:
    """Return what a value costs more of so many channels of a group that lie between those of others."""
    between = problem.groups > 1 and problem.layout == "NDHWC" and channels < _PIECE_VALUES
    return _in_line_s(channels) if between else 0.0


def apart_s(problem: Problem, machine: Machine) -> float:
    """Return what a value of a transposed convolution's result costs more, stored apart from the next position's."""
    size = math.prod(problem.fine_shape) * problem.dtype.itemsize
    share = size / max(1, min(machine.l3_bytes, _MOST_L3_BYTES))
    return _APART_VALUE_S * min(1.0, max(0.0, (share - _KEPT_SHARE) / (_LOST_SHARE - _KEPT_SHARE)))


def packing_s(problem: Problem, time_s: float) -> float:
    """Return what packing the filter counts in a call's time."""
    return 0.0 if problem.prepared else time_s


def cleared_s(problem: Problem) -> float:
    """Return the time to set a group's result to what is at positions that no tap reaches, before others are stored."""
    return math.prod(problem.fine_shape) // problem.groups * (_COPIED_VALUE_S + 2 * SPILLED_VALUE_S)


def combined_taps_s(problem: Problem, combined: int, *, turned: bool) -> float:
    """Return what combining a filter's taps to so many values of points' filters counts in a call's time."""
    values = math.prod(problem.filter_shape) // problem.groups
    return packing_s(problem, values * (_TURNED_TAP_S if turned else _COPIED_TAP_S) + combined * _COMBINED_TAP_S)


def best(schedules: Sequence[S], machine: Machine) -> S:
    """Return the fastest schedule, when what is idle while the last block runs is counted in.

    Only those whose workspace is within `_MOST_WORKSPACE` of the L2 cache are considered, where there are any.
    """
    taken = [s.workspace_bytes for s in schedules]
    limit = max(most_workspace_bytes(machine), min(taken))
    possible = [s for s, n in zip(schedules, taken, strict=True) if n <= limit]
    return min(possible, key=lambda s: total_s(s, machine))


def best_that_fits(schedules: Sequence[S], machine: Machine, text: str, others: str) -> S:
    """As `best`, or raise CannotLowerError where all take more workspace than they may.

    `text` is what the error begins with, up to what it is that takes it, and `others` who can do it.
    """
    found = best(schedules, machine)
    if found.workspace_bytes > (most := most_workspace_bytes(machine)):
        raise CannotLowerError(f"{text} take {found.workspace_bytes} bytes, more than {most}; {others} can")
    return found


def most_workspace_bytes(machine: Machine) -> int:
    """Return how much workspace of a worker is too much."""
    return _MOST_WORKSPACE * machine.l2_bytes


def total_s(schedule: Costed, machine: Machine) -> float:
    """Return the time on one core for all groups, with what workers lose as they begin and at the last blocks."""
    blocks = schedule.count * schedule.problem.groups
    _alone.yes = blocks == 1
    block_s = _BLOCK_ALONE_S if _alone.yes else _BLOCK_S
    one_s = (schedule.time_s(machine) * schedule.problem.groups + blocks * block_s) / blocks
    _alone.yes = False
    before_s = _looked_at(schedule) * _LOOKED_AT_VALUE_S
    return sum(
        share * workers * (before_s + -(-blocks // workers) * one_s + (_TOGETHER_S if min(blocks, workers) > 1 else 0))
        for workers, share in _WORKERS
    )


def _looked_at(schedule: Costed) -> int:
    """Return how many values of the operands a call looks at first."""
    wanted = schedule.wants_finite_value, schedule.wants_finite_filter and not schedule.problem.prepared
    if not any(wanted):
        return 0
    return sum(wants and math.prod(shape) for wants, shape in zip(wanted, schedule.problem.operand_shapes, strict=True))
