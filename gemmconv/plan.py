"""How a problem is done: the choice of a lowering, and its cost in numbers; running.py does it.

A plan is a pure function of (problem, machine, algorithm, workers) and the BLAS, made once and cached. It parses no
arguments of the public functions, and knows nothing of how a lowering works.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise, product
from typing import Any

import numpy as np

from gemmconv import arrays, cutting, parts, profile, results, running
from gemmconv.arguments import integer, integers
from gemmconv.arrays import Array
from gemmconv.lowerings import GROUPS_ONLY, LOWERINGS, OF_GROUPS, CannotLowerError, Schedule
from gemmconv.lowerings.boxes import Bounds
from gemmconv.lowerings.cost import total_s
from gemmconv.machine import Machine
from gemmconv.part import Part, bounds_of
from gemmconv.problem import Problem
from gemmconv.running import Packed, Progress

# Names that `algorithm` takes, by operation.
ALGORITHMS = {operation: ("auto", *found) for operation, found in LOWERINGS.items()}

# Plans that are kept: those of 85 layers that are trained, with two gradients each.
_MOST_PLANS = 256
# Another worker is worth waking for this much work, about 0.1 ms.
_WORKER_FLOPS = 8_000_000
_WORKER_BYTES = 1_000_000
# Groups of fewer channels than this are done together too, with zeros between them, up to so many.
_FEW_CHANNELS, _MOST_TOGETHER = 32, 64


@dataclass(frozen=True)
class Plan:
    """The decision of how one problem is done; call it with arrays to do it.

    A plan is immutable and can be called any number of times, from any number of threads at once: each call in flight
    has workspaces of its own. `str()` of it is a report.

    Attributes
    ----------
    problem : Problem
        What was asked.
    machine : Machine
        The cores and caches it was made for.
    algorithm : str
        The lowering that was chosen.
    requested : str
        The `algorithm` argument it was chosen for.
    workers : int
        The most threads a call uses.
    estimates : tuple of (str, float or None)
        The lowerings that were compared, each with its estimated seconds on one core, or None if it cannot do this
        problem.
    """

    problem: Problem
    machine: Machine
    algorithm: str
    requested: str
    workers: int
    schedule: Schedule | None
    estimates: tuple[tuple[str, float | None], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return make_plan, (self.problem, self.machine, self.requested, self.workers)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the result, in the layout's order."""
        return self.problem.result_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the result."""
        return self.problem.dtype

    @property
    def reason(self) -> str:
        """Why this lowering, and what it will do, in words."""
        if self.schedule is None:
            return "no product to form: the result is empty, or holds no sums"
        why = "asked for by name" if self.requested == self.algorithm else "estimated to be the fastest"
        together = self.problem.groups // self.schedule.problem.groups
        how = "as one" if running.adds_groups(self.schedule, self.problem) else "together"
        groups = f", {together} groups {how}" if together > 1 else ""
        return f"{self.algorithm}, {why}: {self.schedule.reason}{groups}"

    @property
    def flops(self) -> int:
        """FLOPs: 2*N*D*H*W*Cin*Cout*kd*kh*kw, input-sized, products that are cropped away counted; complex 4 times."""
        return self.problem.flops

    @property
    def bytes_moved(self) -> int:
        """Bytes of value, filter and result, each once: the least that memory must move. Columns stay in cache."""
        shapes = self.problem.operand_shapes[0], self.problem.operand_shapes[1], self.problem.result_shape
        return sum(map(math.prod, shapes)) * self.problem.dtype.itemsize

    @property
    def blocks(self) -> int:
        """Boxes the output is cut into, whatever the number of workers."""
        return 0 if self.schedule is None else self.schedule.count * self.schedule.problem.groups

    @cached_property
    def feeds(self) -> int:
        """Workers that the blocks can keep busy, on any machine."""
        work = max(self.flops // _WORKER_FLOPS, self.bytes_moved // _WORKER_BYTES)
        return max(1, min(self.blocks, work))

    @cached_property
    def _needs(self) -> running.Needs | None:
        return None if self.schedule is None else running.needs(self.schedule)

    @property
    def used_workers(self) -> int:
        """Threads that a call uses."""
        return min(self.workers, self.feeds)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace of one call: columns, sums and rows of its workers, packed filter and shares if any."""
        if self.schedule is None:
            return 0
        return self.schedule.workspace_bytes * self.used_workers + self.packed_bytes + self.shared_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes of shares of the result that are added up; 0 where blocks form the result."""
        if self.schedule is None:
            return 0
        return running.shared_bytes(self.schedule, math.prod(self.output_shape) * self.dtype.itemsize)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the filter as a call packs it; 0 where it is used as it lies."""
        if self.schedule is None:
            return 0
        of = self.schedule.problem
        made = self.schedule.packed_values * of.groups
        if running.adds_groups(self.schedule, self.problem):
            made += math.prod(of.filter_shape)
        return made * self.problem.compute_dtype.itemsize

    def __str__(self) -> str:
        p = self.problem
        kernel, strides, dilations, before = zip(*((a.kernel, a.stride, a.dilation, a.lo) for a in p.axes), strict=True)
        (first, second), groups = p.names, f" in {p.groups} groups" if p.groups > 1 else ""
        intensity = self.flops / max(1, self.bytes_moved)
        rows = {
            "operation": f"{p.operation} of {p.dtype} in {p.layout}{groups}",
            first: f"{p.operand_shapes[0]}",
            second: f"{p.operand_shapes[1]}{', packed once for many calls' if p.prepared else ''}",
            "output": f"{p.result_shape}",
            "kernel": f"{_by(kernel)}, strides {_by(strides)}, dilations {_by(dilations)}, padded before {_by(before)}",
            "algorithm": self.algorithm,
            "reason": self.reason,
            "blocks": f"{self.blocks}, enough for {self.feeds} workers, run by {self.used_workers}",
            "estimates": ", ".join(f"{name} {_ms(time_s)}" for name, time_s in self.estimates) or "none",
            "workspace": f"{self.workspace_bytes / 2**20:.2f} MiB, {self.packed_bytes / 2**20:.2f} MiB a packed filter",
            "work": f"{self.flops / 1e9:.4g} GFLOP",
            "memory": f"{self.bytes_moved / 2**20:.4g} MiB read and written, {intensity:.3g} FLOP a byte",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}} {text}" for name, text in rows.items())

    def __call__(self, value: Any, filter: Any, out: Array | None = None, *, progress: Progress | None = None) -> Array:
        """Compute the result for arrays of the plan's shapes.

        Parameters
        ----------
        value, filter : array_like
            Of the problem's `operand_shapes`, and of dtypes whose common one is the plan's.
        out : ndarray, optional
            Where to write the result: the plan's `output_shape`, and a dtype to which the plan's casts safely.
        progress : callable, optional
            Called as ``progress(done, total)`` after each block, from worker threads. It starts again, with another
            total, in the rare case that results are not finite which another lowering may form.

        Returns
        -------
        ndarray
            `out`, or a new C-contiguous array.

        Raises
        ------
        ValueError, TypeError
            If an argument does not fit the plan; nothing was touched.
        """
        name = f"plan of {self.problem.operation}"
        x, w = self.operands(name, value, filter, self.problem.operand_shapes)
        return self.execute(name, x, w, out, progress)

    def plan_of(self, problem: Problem) -> Plan:
        """Return a plan as this one of another problem, by another lowering where this one's cannot."""
        try:
            return make_plan(problem, self.machine, self.requested, self.workers)
        except CannotLowerError:
            return make_plan(problem, self.machine, "auto", self.workers)

    def operands(self, name: str, value: Any, filter: Any, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
        """Check both operands."""
        x, w, dtype = arrays.operands(name, value, filter, self.problem.names)
        for argument, array, shape in zip(self.problem.names, (x, w), shapes, strict=True):
            self._check(name, argument, array, shape)
        if dtype != self.dtype:
            first, second = self.problem.names
            raise TypeError(
                f"{name}: {first} of {x.dtype} and {second} of {w.dtype} give {dtype}, "
                f"but the plan was made for {self.dtype}"
            )
        return [x, w]

    def prepare(self, filter: Any) -> Prepared:
        """Take a filter once, for many values: what calls do with the filter beforehand is done here.

        Parameters
        ----------
        filter : array_like
            Of the problem's `filter_shape`. It is copied, so later changes to it have no effect.

        Returns
        -------
        Prepared
            Call it as ``prepared(value, out=None)``. Results have the bits of the calls of `Prepared.plan`, which may
            take another lowering or other blocks than this plan, since packing the filter does not count for it.

        Raises
        ------
        ValueError, TypeError
            If the filter does not fit the plan.

        Examples
        --------
        >>> import numpy as np
        >>> from gemmconv import plan_conv3d_transpose
        >>> plan = plan_conv3d_transpose([1, 4, 4, 4, 3], [2, 2, 2, 5, 3], strides=2)
        >>> layer = plan.prepare(np.ones((2, 2, 2, 5, 3), np.float32))
        >>> layer(np.ones((1, 4, 4, 4, 3), np.float32)).sum()
        np.float32(7680.0)
        """
        name = f"plan of {self.problem.operation}"
        w = arrays.operand(name, self.problem.names[1], filter, self.dtype)
        self._check(name, self.problem.names[1], w, self.problem.operand_shapes[1])
        kept = arrays.converted(w, self.problem.dtype).copy()
        return make_plan(replace(self.problem, prepared=True), self.machine, self.requested, self.workers)._with(kept)

    def _with(self, filter: Array) -> Prepared:
        """Return this plan with a filter that nobody changes."""
        packed = None if self.schedule is None else running.pack(self.schedule, self.problem, filter)
        return Prepared(self, filter, packed)

    def part(self, box: Any) -> Part:
        """Take a box of the result by itself: what it needs of the operands, and how it is computed from that alone.

        Parameters
        ----------
        box : sequence of 5 slices or pairs
            For each axis of `output_shape` the first index and the one behind the last. Slices may leave either out.

        Returns
        -------
        Part
            ``part.windows`` are the boxes of the operands that it needs; call it with those windows. Where the box
            begins and ends at `cuts`, its results have the bits that they have in the whole, otherwise the same values
            up to rounding.

        Raises
        ------
        ValueError, TypeError
            If the box is not one of the result.

        Examples
        --------
        >>> import numpy as np
        >>> from gemmconv import plan_conv3d_transpose
        >>> value = np.ones((1, 100, 4, 4, 3), np.float32)
        >>> filter = np.ones((3, 3, 3, 2, 3), np.float32)
        >>> plan = plan_conv3d_transpose(value.shape, filter.shape, strides=2)
        >>> part = plan.part([slice(None), (40, 60), slice(None), slice(None), slice(None)])
        >>> part.windows[0][1], part.output_shape
        (slice(19, 30, None), (1, 20, 8, 8, 2))
        >>> np.array_equal(part(value[part.windows[0]], filter), plan(value, filter)[part.box])
        True
        """
        return Part(self, bounds_of(f"plan of {self.problem.operation}", box, self.output_shape))

    @cached_property
    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of the result where boxes may begin and end to hold whole blocks, from 0 to its size."""
        found = cutting.cuts(self.problem, self._groups, self._digits)
        return parts.by_axis(self.problem.layout, self.problem.roles[2], found)

    @cached_property
    def _digits(self) -> list[list[Bounds]]:
        return [] if self.schedule is None else cutting.digits(self.problem, self.schedule)

    @property
    def _groups(self) -> int:
        return 1 if self.schedule is None else self.schedule.problem.groups

    def chunks(self, most_bytes: int, borders: Sequence[Sequence[int]] | None = None) -> tuple[tuple[int, ...], ...]:
        """Cut the result in boxes each of which, with what it needs of the operands but the filter, takes few bytes.

        The batch is cut first, then the spatial axes, the longest first, since neighbouring boxes both need what lies
        at their border, and channels last, since all channels of the first operand are needed for each.

        Parameters
        ----------
        most_bytes : int
            Bytes of a box and of its windows together, in the plan's dtype; a filter is not counted.
        borders : sequence of 5 sequences of int, optional
            Where boxes may begin and end on each axis of the result; `cuts` by default, so that parts have the bits of
            the whole.

        Returns
        -------
        tuple of tuples of int
            For each axis of the result the lengths of the pieces, one after the other, as Dask takes chunks.

        Raises
        ------
        ValueError
            If the smallest boxes that may be take more.

        Examples
        --------
        >>> from gemmconv import plan_conv3d_transpose
        >>> plan = plan_conv3d_transpose((1, 64, 64, 64, 16), (2, 2, 2, 8, 16), strides=2)
        >>> len(plan.chunks(64 << 20)[1]), all(plan.part(box).on_blocks for box in plan.boxes(plan.chunks(64 << 20)))
        (2, True)
        """
        most = integer(f"plan of {self.problem.operation}: most_bytes", most_bytes)
        at = [sorted({0, size, *own}) for size, own in zip(self.output_shape, borders or self.cuts, strict=True)]
        role = self.problem.roles[2]
        batch, *spatial, _ = parts.by_meaning(self.problem.layout, role, range(len(at)))
        found, taken = cutting.pieces(at, [] if role == "filter" else [batch], spatial, self._taken, most)
        if taken > most:
            raise ValueError(
                f"plan of {self.problem.operation}: the smallest boxes of the result {self.output_shape} take {taken} "
                f"bytes with what they need of the operands, more than {most}"
            )
        return tuple(tuple(b - a for a, b in pairwise(of_axis)) for of_axis in found)

    def boxes(self, chunks: Sequence[Sequence[int]]) -> Iterator[tuple[slice, ...]]:
        """Return the boxes of the result that `chunks` describes, as `chunks()` returns it, the last axis fastest."""
        name, axes = f"plan of {self.problem.operation}", len(self.output_shape)
        if not isinstance(chunks, Sequence) or len(chunks) != axes:
            raise ValueError(f"{name}: chunks must be {axes} sequences of lengths, one for each axis, got {chunks!r}")
        chunks = [integers(f"{name}: chunks[{i}]", of_axis) for i, of_axis in enumerate(chunks)]
        spans = [[slice(b - n, b) for n, b in zip(of_axis, accumulate(of_axis), strict=True)] for of_axis in chunks]
        return product(*spans)

    def _taken(self, box: Sequence[tuple[int, int]]) -> int:
        """Return the bytes of a box of the result and its windows."""
        part = self.part(box)
        taken = math.prod(part.output_shape)
        for role, window in zip(self.problem.roles, part.windows, strict=False):
            taken += 0 if role == "filter" else math.prod(span.stop - span.start for span in window)
        return taken * self.problem.dtype.itemsize

    def blocks_in(self, box: parts.Box) -> cutting.Indices | None:
        """Return the indices of the blocks that make up a box of the result, or None where it cuts through some."""
        if self.schedule is None:
            return None
        where = parts.by_meaning(self.problem.layout, self.problem.roles[2], self.cuts)
        return cutting.blocks_in(box, where, self._groups, self._digits)

    def _check(self, name: str, argument: str, array: Array, shape: tuple[int, ...]) -> None:
        if array.shape != shape:
            raise ValueError(f"{name}: {argument} has shape {array.shape}, but the plan was made for {shape}")

    def execute(
        self,
        function: str,
        value: Array,
        filter: Array,
        out: Array | None,
        progress: Progress | None = None,
        packed: Packed | None = None,
        bias: Array | None = None,
    ) -> Array:
        """Compute the result for checked operands; `function` is named where `out` is refused."""
        begun: list[bool] = []
        try:
            return self._execute(function, value, filter, out, progress, packed, bias, begun)
        except MemoryError:
            # Blocks may have written to `out`, which may be an operand, and `progress` may have raised it.
            if begun or not results.clear():
                raise
        return self._execute(function, value, filter, out, progress, packed, bias, begun)

    def _execute(
        self,
        function: str,
        value: Array,
        filter: Array,
        out: Array | None,
        progress: Progress | None,
        packed: Packed | None,
        bias: Array | None,
        begun: list[bool],
    ) -> Array:
        start_s = time.perf_counter()
        looking, problem = profile.current(), self.problem
        target, result, operands = arrays.into(function, out, [value, filter], problem.result_shape, problem.dtype)
        seconds = None
        if self.schedule is None:
            at = problem.layout.index("C")
            result[...] = 0 if bias is None else bias.reshape(-1, *[1] * (4 - at)) + problem.dtype.type(0)
        else:
            seconds = running.run(
                self.schedule,
                problem,
                self.machine,
                self.used_workers,
                operands[0],
                operands[1],
                result,
                needed=self._needs,
                bias=bias,
                packed=packed,
                progress=progress,
                begun=begun,
            )
        copy_s = time.perf_counter()
        if target is not None and target is not result:
            np.copyto(target, result)
        if looking:
            end_s = time.perf_counter()
            looking.add(seconds or {}, self.used_workers, end_s - start_s, end_s - copy_s)
        return result if out is None else out


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan with its filter, to be called with values; `Plan.prepare` makes it.

    Like a plan it can be called from any number of threads at once.

    Attributes
    ----------
    plan : Plan
        By which values are computed: that of the problem with its filter packed before.
    filter : ndarray
        A copy of the filter, in the plan's dtype.
    packed : Packed or None
        The filter as the schedule takes it; None if there is no product to form.
    """

    plan: Plan
    filter: Array
    packed: Packed | None

    def __reduce__(self) -> tuple[Any, ...]:  # packed anew: another BLAS may have another schedule
        return Plan._with, (self.plan, self.filter)

    def __call__(self, value: Any, out: Array | None = None, *, progress: Progress | None = None) -> Array:
        """Compute the result for a value, with the bits that `plan` gives for it and the filter.

        Parameters
        ----------
        value : array_like
            Of the problem's first operand shape, and of a dtype that gives results of the plan's.
        out, progress
            As in a call of the plan.

        Returns
        -------
        ndarray
            `out`, or a new C-contiguous array.

        Raises
        ------
        ValueError, TypeError
            If an argument does not fit the plan; nothing was touched.
        """
        name = f"plan of {self.plan.problem.operation}"
        argument = self.plan.problem.names[0]
        x = arrays.operand(name, argument, value, self.plan.dtype)
        self.plan._check(name, argument, x, self.plan.problem.operand_shapes[0])
        return self.plan.execute(name, x, self.filter, out, progress, self.packed)


def _ms(time_s: float | None) -> str:
    return "cannot" if time_s is None else f"{time_s * 1e3:.3g} ms"


def _by(numbers: Any) -> str:
    return "x".join(map(str, numbers))


@lru_cache(maxsize=_MOST_PLANS)
def make_plan(problem: Problem, machine: Machine, algorithm: str, workers: int) -> Plan:
    """Return the plan for a problem; `algorithm` is 'auto' or the name of a lowering."""
    if problem.empty:
        first = next(iter(LOWERINGS[problem.operation]))
        return Plan(problem, machine, first if algorithm == "auto" else algorithm, algorithm, workers, None)
    found: dict[str, Schedule] = {}
    costs: dict[str, float | None] = {}
    possible = [name for name in LOWERINGS[problem.operation] if problem.groups > 1 or name not in GROUPS_ONLY]
    for name in possible if algorithm == "auto" else (algorithm,):
        made: list[Schedule] = []
        refusals: list[CannotLowerError] = []
        for asked in [problem] if name in OF_GROUPS else _as_groups(problem):
            try:
                made.append(LOWERINGS[problem.operation][name](asked, machine))
            except CannotLowerError as error:
                refusals.append(error)
        if not made and algorithm != "auto":
            raise refusals[0]
        if made:
            found[name] = min(made, key=lambda schedule: total_s(schedule, machine))
        costs[name] = total_s(found[name], machine) if made else None
    chosen = min(found, key=lambda name: costs[name] or 0.0)
    return Plan(problem, machine, chosen, algorithm, workers, found[chosen], tuple(costs.items()))


def _as_groups(problem: Problem) -> list[Problem]:
    """Return a problem with its groups one by one, and with ever more of them as one."""
    found = [problem]
    if problem.operation != "conv3d_backprop_filter" and min(problem.cin, problem.cout) < _FEW_CHANNELS:
        for n in range(2, problem.groups + 1):
            channels = n * max(problem.cin, problem.cout)
            if problem.groups % n == 0 and channels <= _MOST_TOGETHER:
                found.append(replace(problem, groups=problem.groups // n, cin=n * problem.cin, cout=n * problem.cout))
    return found


def clear_cache() -> None:
    """Forget all cached plans, and free idle workspaces and the memory kept of large results that were dropped.

    Plans that the caller holds stay usable, and calls in flight keep their workspaces.

    Examples
    --------
    >>> import gemmconv
    >>> gemmconv.clear_cache()
    """
    make_plan.cache_clear()
    running.clear_idle()
