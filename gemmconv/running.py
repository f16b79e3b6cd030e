"""The running of a schedule: its filter packed, workspaces for its workers, its blocks on threads, its time by phase.

Workspaces are kept for later calls. This module chooses nothing but what follows from data: a schedule that would
spread Inf or NaN gives way to col2im.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from gemmconv import profile, threads
from gemmconv.arrays import Array
from gemmconv.blas import serial_products
from gemmconv.lowerings import LOWERINGS, NotFiniteError, Operands, Schedule, Workspace
from gemmconv.machine import Machine, usable_cores
from gemmconv.problem import Problem

Progress = Callable[[int, int], None]

# No lock: single operations on a dict and a deque are atomic, so a fork or an interrupt cannot leave one behind.
_idle: dict[np.dtype[Any], deque[Workspace]] = {}


class Packed(NamedTuple):
    """What a schedule makes of a filter, empty if it is used as it lies, and whether the schedule can use it."""

    values: Array
    usable: bool


def pack(schedule: Schedule, problem: Problem, filter: Array) -> Packed:
    """Bring a filter into the order that a schedule wants."""
    values = np.empty(schedule.packed_values, problem.compute_dtype)
    with np.errstate(all="ignore"):
        if values.size:
            schedule.pack(filter, values)
        # Zeros around the value times Inf or NaN would be NaN where no tap reaches. An overflow here costs time only.
        looked_at = values if values.size else filter
        usable = not schedule.wants_finite_filter or bool(np.isfinite(np.add.reduce(looked_at, axis=None)))
    return Packed(values, usable)


def run(
    schedule: Schedule,
    problem: Problem,
    machine: Machine,
    workers: int,
    value: Array,
    filter: Array,
    result: Array,
    *,
    packed: Packed | None = None,
    progress: Progress | None = None,
) -> dict[str, float] | None:
    """Compute a result for converted operands; return the worker-seconds by phase if the call is looked at."""
    looking = profile.current()
    pack_s = time.perf_counter()
    if packed is None:
        packed = pack(schedule, problem, filter)
    pack_s = time.perf_counter() - pack_s
    if not packed.usable:
        schedule = _complete(problem, machine)
    operands = Operands(value, filter, result, packed.values)
    workspaces = _acquire(workers, schedule.workspace_bytes, problem.compute_dtype)
    clocks = [profile.Clock() if looking else None for _ in workspaces]
    for workspace, clock in zip(workspaces, clocks, strict=True):
        workspace.clock = clock
    done = itertools.count(1)

    def task(index: int, slot: int) -> None:
        clock = clocks[slot]
        if clock:
            clock.start()
        schedule.run(index, operands, workspaces[slot])
        if progress is not None:
            progress(next(done), schedule.count)
        if clock:
            clock("overhead")

    run_s = time.perf_counter()
    limit = schedule.largest_product > serial_products()
    finite = True
    try:
        threads.run(task, schedule.count, len(workspaces), limit_blas=limit)
    except NotFiniteError:  # NaN, Inf or an overflow, which minimal filtering would spread
        finite = False
    run_s = time.perf_counter() - run_s
    _release(workspaces)
    if not finite:
        packed = Packed(np.empty(0, problem.compute_dtype), False)
        return run(_complete(problem, machine), problem, machine, workers, value, filter, result, packed=packed,
                   progress=progress)  # fmt: skip
    return _account([clock for clock in clocks if clock], pack_s, run_s) if looking else None


def _account(clocks: Sequence[profile.Clock], pack_s: float, run_s: float) -> dict[str, float]:
    """Return worker-seconds by phase: packing counts for all workers, and what no clock has seen is waiting."""
    seconds = dict.fromkeys(profile.PHASES, 0.0)
    for clock in clocks:
        for phase, time_s in clock.seconds.items():
            seconds[phase] += time_s
    seconds["wait"] += len(clocks) * run_s - sum(seconds.values())
    seconds["pack"] += len(clocks) * pack_s
    return seconds


@lru_cache(maxsize=64)
def _complete(problem: Problem, machine: Machine) -> Schedule:
    """Return the schedule of the lowering that is right for all data."""
    return LOWERINGS["col2im"](problem, machine)


def clear_idle() -> None:
    """Free idle workspaces, and forget the schedules that others gave way to."""
    _complete.cache_clear()
    _idle.clear()


def _acquire(number: int, size: int, dtype: np.dtype[Any]) -> list[Workspace]:
    """Take idle workspaces that are large enough, and make the others."""
    found: list[Workspace] = []
    idle = _idle.get(dtype)
    while idle and len(found) < number:
        try:
            workspace = idle.pop()
        except IndexError:  # another thread took the last
            break
        if workspace.size >= size:
            found.append(workspace)
    return found + [Workspace(size, dtype) for _ in range(number - len(found))]


def _release(workspaces: list[Workspace]) -> None:
    """Keep workspaces for later calls of their dtype, at most one for each usable core."""
    dtype = workspaces[0].gemm.dtype
    for workspace in workspaces:
        workspace.release()
    _idle.setdefault(dtype, deque(maxlen=usable_cores())).extend(workspaces)
