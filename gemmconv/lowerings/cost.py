"""What steps cost, in seconds on one core: a few measured constants, used to compare schedules, never to predict.

Only ratios matter: all were measured on one AVX-512 core, float32, and other machines and dtypes move together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from gemmconv.blas import serial_products
from gemmconv.machine import Machine

# GEMM: the rate of large products, and the sizes of m, n and k at which half of it is reached.
GEMM_FLOPS_PER_S = 100e9
_HALF_M, _HALF_N, _HALF_K = 40, 9, 8
# A value of a matrix that is read once, from memory.
_STREAMED_VALUE_S = 0.4e-9
# A step in Python: one GEMM call, or one addition with the slices it needs.
_STEP_S = 3e-6
# A value added or copied, and what each inner loop of NumPy costs beside its values: in cache; through the ufunc
# buffer, which joins short loops; to or from memory; where neither side is contiguous.
_VALUE_S, _RUN_S = 0.22e-9, 40e-9
_BUFFERED_VALUE_S, _BUFFERED_RUN_S = 0.8e-9, 6e-9
_SPILLED_VALUE_S = 0.15e-9
_STRIDED_VALUE_S = 1.2e-9
# NumPy copies loops shorter than its ufunc buffer through it, in blocks of the buffer's size, and that costs more than
# the addition, unless loops are very short: lowerings set the smallest buffer that NumPy takes for all others.
SHORT_RUN = 64
SMALLEST_BUFFER = 16
# What blocks do is worked out once and kept by a schedule of at most this many steps, about 1 KiB each: for small
# problems working it out takes longer than doing it.
MOST_STEPS_KEPT = 4096
# The last block of a call leaves other workers idle: half a block's time, as a rule.
_IDLE_BLOCKS = 0.5
# Blocks are made of single phases of depth and height while there are fewer boxes than this.
ENOUGH_BLOCKS = 16
# The most workspace of a worker, in L2 caches.
_MOST_WORKSPACE = 4


class Costed(Protocol):
    """What has a cost: a schedule."""

    @property
    def count(self) -> int: ...

    @property
    def workspace_bytes(self) -> int: ...

    def time_s(self, machine: Machine) -> float: ...


S = TypeVar("S", bound=Costed)


def gemm_s(m: float, n: float, k: float) -> float:
    """Return the time of one GEMM call."""
    if m == 1 and n * k > serial_products():  # as gemv
        return _STEP_S + n * k * _STREAMED_VALUE_S
    return _STEP_S + 2 * (m + _HALF_M) * (n + _HALF_N) * (k + _HALF_K) / GEMM_FLOPS_PER_S


def pass_s(values: float, run: float, *, spilled: bool = False, strided: bool = False) -> float:
    """Return the time to add or copy values in inner loops of `run` values."""
    if strided:
        each = _STRIDED_VALUE_S
    elif run < SHORT_RUN:
        each = _BUFFERED_VALUE_S + _BUFFERED_RUN_S / max(1, run)
    else:
        each = _VALUE_S + _RUN_S / run
    return _STEP_S + values * (each + spilled * _SPILLED_VALUE_S)


def best(schedules: Sequence[S], machine: Machine) -> S:
    """Return the fastest schedule, when what is idle while the last block runs is counted in.

    Only those whose workspace is within `_MOST_WORKSPACE` of the L2 cache are considered, where there are any.
    """
    limit = max(_MOST_WORKSPACE * machine.l2_bytes, min(s.workspace_bytes for s in schedules))
    possible = [s for s in schedules if s.workspace_bytes <= limit]
    return min(possible, key=lambda s: s.time_s(machine) * (1 + _IDLE_BLOCKS / s.count))
