"""The running of a schedule: its filter packed, workspaces for its workers, its blocks on threads, its time by phase.

A schedule does one group; here it is run for all of them. It may be of another problem than was asked, of equal result:
several groups as one, with zeros in the filter between them. Workspaces are kept for later calls. This module chooses
nothing but what follows from data: a schedule that would spread Inf or NaN gives way to one that is right for all data.
"""

from __future__ import annotations

import _thread
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from gemmconv import profile, results, threads
from gemmconv.arrays import Array, placed
from gemmconv.blas import serial_products
from gemmconv.lowerings import COMPLETE, NotFiniteError, Operands, Schedule, Workspace
from gemmconv.lowerings.base import InShares, OfGroups, Steps, order, pack_part, packs_in_parts, steps_of
from gemmconv.lowerings.copies import is_finite
from gemmconv.lowerings.tape import Tapes
from gemmconv.machine import Machine, usable_cores
from gemmconv.problem import Problem, Role
from gemmconv.quiet import quiet

Progress = Callable[[int, int], None]
# Bytes of a packed filter of which each worker does a part.
_LARGE_FILTER = 1 << 21
# The most blocks that are handed out by size: of more of them a last one is no large part.
_FEW_BLOCKS = 64

# No lock: single operations on a dict and a deque are atomic, so a fork or an interrupt cannot leave one behind.
_idle: dict[np.dtype[Any], deque[Workspace]] = {}


class Excerpt(NamedTuple):
    """Some blocks of a schedule for windows of its arrays: where those begin in the wholes, on the axes of each."""

    blocks: Sequence[int]
    first: tuple[int, ...]
    second: tuple[int, ...]
    result: tuple[int, ...]


class Packed(NamedTuple):
    """What a schedule makes of a second operand: as its problem has it, packed for each group, and if it can use it."""

    second: Array
    values: Array
    usable: bool


def pack(schedule: Schedule, problem: Problem, second: Array) -> Packed:
    """Bring a filter into the order that a schedule wants; the coarse operand of a gradient stays as it is."""
    packing = Packing(schedule, problem, second)
    packing.do()
    return packing.packed()


class Packing:
    """How a filter is brought into the order that a schedule wants, which so many workers may do, each a part of it."""

    def __init__(self, schedule: Schedule, problem: Problem, second: Array, workers: int = 1) -> None:
        of = schedule.problem
        self._schedule, self._looked_at = schedule, schedule.wants_finite_filter
        if problem.roles[1] == "filter" and adds_groups(schedule, problem):
            second, self._looked_at = merged(second, problem.groups, problem.groups // of.groups), True
        self._second = second
        self._values = results.empty((of.groups, schedule.packed_values), problem.compute_dtype)
        self.needed = self._values.size > 0
        in_parts = self._values.nbytes >= _LARGE_FILTER and packs_in_parts(type(schedule))
        self._parts = workers if in_parts else 1
        self._left = iter(range(self._parts))  # next() is atomic
        self._done = itertools.count(1)
        self._ready = _thread.allocate_lock()  # held until all parts are done, or one has failed
        self._ready.acquire()
        self._failed = False

    @quiet
    def do(self, part: int = 0, parts: int = 1, workspace: Workspace | None = None) -> None:
        """Do one of so many parts."""
        for group, to in enumerate(self._values if self.needed else ()):
            filter = of_group(self._schedule.problem, "filter", self._second, group)
            if workspace is None:
                self._schedule.pack(filter, to)
            else:
                pack_part(self._schedule, filter, to, part, parts, workspace)

    def join(self, does: Callable[[int, int], None]) -> bool:
        """Do the parts that nobody has begun, wait for the others, and return whether all are done.

        `does` packs one of so many parts. Whoever fails lets the others go on, which must do nothing then.
        """
        try:
            for part in self._left:
                does(part, self._parts)
                if next(self._done) == self._parts:
                    if not self._usable():
                        raise NotFiniteError
                    self._ready.release()
        except BaseException:
            self._failed = True
            with suppress(RuntimeError):  # another one has failed before
                self._ready.release()
            raise
        with self._ready:
            return not self._failed

    def packed(self, *, later: bool = False) -> Packed:
        """Return the operand, and what it is or, `later`, will be packed to, or else a worker raises NotFiniteError."""
        return Packed(self._second, self._values, later or self._usable())

    def _usable(self) -> bool:
        # Zeros of the padding times Inf or NaN would be NaN where no tap reaches. An overflow here costs time only.
        return not self._looked_at or is_finite(self._values if self.needed else self._second)


def adds_groups(schedule: Schedule, problem: Problem) -> bool:
    """Whether a schedule does several groups as one, with zeros in the filter between them."""
    return schedule.problem.groups != problem.groups and not isinstance(schedule, OfGroups)


def merged(filter: Array, groups: int, together: int) -> Array:
    """Return the filter with which `together` groups are done as one: theirs on the diagonal, zeros elsewhere."""
    *kernel, fine, coarse = filter.shape
    parts = filter.reshape(*kernel, fine, groups // together, together, coarse // groups)
    found = np.zeros((*kernel, together, fine, *parts.shape[4:]), filter.dtype)
    for i in range(together):
        found[..., i, :, :, i, :] = parts[..., i, :]
    return found.reshape(*kernel, together * fine, coarse)


def of_group(problem: Problem, role: Role, array: Array, group: int) -> Array:
    """Return the channels of one group of an array."""
    if problem.groups == 1:
        return array
    channels = problem.cout if role == "fine" else problem.cin
    mine = slice(group * channels, (group + 1) * channels)
    return array[:, mine] if problem.layout == "NCDHW" and role != "filter" else array[..., mine]


class Needs(NamedTuple):
    """What a schedule needs, which takes longer to ask for than a small product: `blocks` are those of all groups."""

    blocks: Sequence[int]
    workspace_bytes: int
    limit_blas: bool
    shares: int
    tapes: Tapes


def needs(schedule: Schedule) -> Needs:
    """Return what a schedule needs."""
    limit = schedule.largest_product > serial_products(schedule.problem.compute_dtype.kind)
    return Needs(largest_first(schedule), schedule.workspace_bytes, limit, shares_of(schedule), Tapes(schedule))


def largest_first(schedule: Schedule) -> Sequence[int]:
    """Return the blocks of all groups in the order in which they are handed out: a range if they are alike.

    Where they are few and of unlike sizes, large ones come first, or one worker would be left with one at the end.
    Those of several phases have unlike numbers of taps.
    """
    groups, count = schedule.problem.groups, schedule.count
    if 1 < count <= _FEW_BLOCKS:
        digits = [[math.prod(stop - start for _, (start, stop) in bounds) for bounds in of] for of in schedule.digits]
        sizes = [math.prod(size) for size in itertools.product(*digits)]
        phases = shares_of(schedule) == 1 and any(len(of) > 1 and not any(of) for of in schedule.digits)
        if phases or max(sizes) > min(sizes):
            blocks = sorted(range(count), key=sizes.__getitem__, reverse=True)
            return [block * groups + group for block in blocks for group in range(groups)]
    return range(groups * count)


def shares_of(schedule: Schedule) -> int:
    """Return how many shares of the result a schedule forms, which are added up; 1 if it forms the result."""
    return schedule.shares if isinstance(schedule, InShares) else 1


def shared_bytes(schedule: Schedule, result_bytes: int) -> int:
    """Return the bytes of a result's shares; 0 if blocks form the result."""
    shares = shares_of(schedule)
    return shares * result_bytes if shares > 1 else 0


def run(
    schedule: Schedule,
    problem: Problem,
    machine: Machine,
    workers: int,
    first: Array,
    second: Array,
    result: Array,
    *,
    needed: Needs | None = None,
    bias: Array | None = None,
    packed: Packed | None = None,
    progress: Progress | None = None,
    excerpt: Excerpt | None = None,
    begun: list[bool] | None = None,
) -> dict[str, float] | None:
    """Compute a result for converted operands; return the worker-seconds by phase if the call is looked at.

    With an excerpt the operands and the result are windows, and NotFiniteError says that other lowerings must do them.
    `begun` gets an item before the first block.
    """

    def give_way() -> dict[str, float] | None:
        if excerpt is not None:
            raise NotFiniteError
        complete = _complete(problem, machine)
        return run(
            complete, problem, machine, workers, first, second, result, bias=bias, progress=progress, begun=begun
        )

    looking = profile.current()
    pack_s = time.perf_counter()
    shared: Packing | None = None
    if packed is None:
        packing = Packing(schedule, problem, second, workers)
        shared = packing if packing.needed else None
        packed = packing.packed(later=shared is not None)
    adds_zeros = schedule.wants_finite_value or adds_groups(schedule, problem)
    if not packed.usable or (adds_zeros and not is_finite(first)):
        return give_way()
    pack_s = time.perf_counter() - pack_s
    # What a plan needs is known, and others are not run again; windows differ from call to call.
    again = needed is not None and excerpt is None
    needed = needed or needs(schedule)
    outputs = [result] if needed.shares == 1 else [*np.empty((needed.shares, *result.shape), result.dtype)]
    shares = _of_shares(schedule, problem, [first, packed.second, *outputs], packed.values, bias, excerpt)
    groups = len(shares[0])
    of_share = len(needed.blocks) // groups // needed.shares
    blocks = needed.blocks if excerpt is None else excerpt.blocks
    count = len(blocks)
    workspaces = _acquire(min(workers, count), needed.workspace_bytes, problem.compute_dtype)
    clocks = [profile.Clock() if looking else None for _ in workspaces]
    for workspace, clock in zip(workspaces, clocks, strict=True):
        workspace.clock = clock
    needed.tapes.begin(problem.flops)
    run_block = needed.tapes.run if again else needed.tapes.run_once
    done = itertools.count(1)

    def do_part(packing: Packing, part: int, parts: int, slot: int) -> None:
        if again:
            for operands in shares[0]:
                needed.tapes.pack(part, parts, operands, workspaces[slot])
        else:
            packing.do(part, parts, workspaces[slot])

    def task(index: int, slot: int) -> None:
        clock = clocks[slot]
        if clock:
            clock.start()
        if shared:
            if not shared.join(partial(do_part, shared, slot=slot)):
                return
            if clock:
                clock("pack")
        block, group = divmod(blocks[index], groups)  # groups next to each other share cache lines and pages
        run_block(block, shares[block // of_share][group], workspaces[slot])
        if progress is not None:
            progress(next(done), count)
        if clock:
            clock("overhead")

    if begun is not None:
        begun.append(True)
    run_s = time.perf_counter()
    finite = True
    try:
        alike = isinstance(blocks, range)
        threads.run(task, count, len(workspaces), limit_blas=needed.limit_blas, alike=alike)
    except NotFiniteError:  # NaN, Inf or an overflow, which minimal filtering and stacked results would spread
        finite = False
    run_s = time.perf_counter() - run_s
    _release(workspaces)
    if not finite:
        return give_way()
    if needed.shares > 1:
        _add_up(outputs, result)
    return _account([clock for clock in clocks if clock], pack_s, run_s) if looking else None


@quiet
def _add_up(shares: Sequence[Array], result: Array) -> None:
    """Add shares of a result one after the other: a reduction's order would depend on the shape."""
    np.add(shares[0], shares[1], result)
    for share in shares[2:]:
        np.add(result, share, result)


def _of_shares(
    schedule: Schedule,
    problem: Problem,
    wholes: list[Array],
    packed: Array,
    bias: Array | None,
    excerpt: Excerpt | None,
) -> list[list[Operands]]:
    """Return the operands of each share and group, of both operands and the outputs of all shares."""
    along = order(schedule.problem.axes)
    x, w, y = (
        steps_of(problem.layout, role == "filter", array.shape, along)
        for role, array in zip(problem.roles, wholes[:3], strict=True)
    )
    if excerpt is not None:
        shapes = problem.operand_shapes[0], wholes[1].shape, problem.result_shape
        if problem.roles[1] != "filter":
            shapes = shapes[0], problem.operand_shapes[1], shapes[2]
        outputs = len(wholes) - 2
        at = [excerpt.first, excerpt.second, *[excerpt.result] * outputs]
        every_shape = [*shapes[:2], *shapes[2:] * outputs]
        wholes = [placed(*part) for part in zip(wholes, at, every_shape, strict=True)]
    return [_by_group(schedule.problem, [*wholes[:2], to], packed, (x, w, y), bias) for to in wholes[2:]]


def _by_group(
    problem: Problem, wholes: Sequence[Array], packed: Array, steps: tuple[Steps, Steps, Steps], bias: Array | None
) -> list[Operands]:
    """Return the operands of each group; a bias of -0.0 counts as +0.0, as every zero result does."""
    biases = None
    if bias is not None:
        biases = (bias.astype(problem.compute_dtype) + problem.compute_dtype.type(0)).reshape(problem.groups, -1)
        # It repeats where taps are seen as channels: all of them, or those of one axis.
        channels = max(problem.kernel) * (problem.cout if problem.roles[2] == "fine" else problem.cin)
        biases = np.tile(biases, -(-channels // biases.shape[1]))
    if problem.groups == 1:
        first, second, to = wholes
        return [Operands(first, second, to, packed[0], steps, None if biases is None else biases[0])]
    found = []
    for group in range(problem.groups):
        arrays = zip(problem.roles, wholes, strict=True)
        value, filter, output = (of_group(problem, role, array, group) for role, array in arrays)
        own = None if biases is None else biases[group]
        found.append(Operands(value, filter, output, packed[group], steps, own))
    return found


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
    """Return the schedule of the lowering that is right for all data, whose filter is packed in the call."""
    return COMPLETE[problem.operation](replace(problem, prepared=False), machine)


def clear_idle() -> None:
    """Free idle workspaces and memory of results, and forget the schedules that others gave way to."""
    _complete.cache_clear()
    _idle.clear()
    results.clear()


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
            found.insert(0, workspace)  # in the order in which they were released: each of the slot it was of
    return found + [Workspace(size, dtype) for _ in range(number - len(found))]


def _release(workspaces: list[Workspace]) -> None:
    """Keep workspaces for later calls of their dtype, at most one for each usable core."""
    dtype = workspaces[0].gemm.dtype
    for workspace in workspaces:
        workspace.release()
    idle = _idle.get(dtype)
    if idle is None:
        idle = _idle.setdefault(dtype, deque(maxlen=usable_cores()))
    idle.extend(workspaces)
