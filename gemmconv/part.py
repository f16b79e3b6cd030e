"""A part of a plan's result: a box of it, computed from the windows of the operands that it needs.

A box of whole blocks is made by the plan's own blocks, so every product has the sizes it has in the whole, and results
have the same bits. Any other box is a problem of its own (parts.py), with a plan of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gemmconv import arrays, profile, running
from gemmconv.arguments import integers
from gemmconv.arrays import Array
from gemmconv.lowerings import NotFiniteError
from gemmconv.lowerings.base import order
from gemmconv.parts import Box, Piece, by_axis, by_meaning, hull, pieces
from gemmconv.problem import Role
from gemmconv.running import Excerpt, Progress


@dataclass(frozen=True, eq=False)
class Part:
    """A box of a plan's result, to be computed from windows of the operands; `Plan.part` makes it.

    Like a plan it can be called from any number of threads at once, and it can be pickled: what it becomes in another
    process is made there, once for each plan.

    Attributes
    ----------
    plan : Plan
        What it is a part of.
    bounds : tuple of 5 pairs
        The box: first index and the one behind the last on each axis of the result.
    """

    plan: Any  # a Plan, whose module imports this one
    bounds: tuple[tuple[int, int], ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return Part, (self.plan, self.bounds)

    @property
    def box(self) -> tuple[slice, ...]:
        """The box as slices of the whole result."""
        return tuple(slice(*span) for span in self.bounds)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the part, in the layout's order."""
        return tuple(stop - start for start, stop in self.bounds)

    @property
    def on_blocks(self) -> bool:
        """Whether it is made of whole blocks, so that finite results have the bits they have in the whole."""
        return self._blocks is not None

    @cached_property
    def windows(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The boxes of the two operands that it needs, as slices of the wholes; a filter is needed as a whole."""
        layout, roles = self.plan.problem.layout, self.plan.problem.roles
        first, second = (
            tuple(slice(*span) for span in by_axis(layout, role, self._windows[role])) for role in roles[:2]
        )
        return first, second

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace of one call, as `Plan.workspace_bytes`."""
        if self._blocks is None:
            return max((plan.workspace_bytes for _, plan in self._plans), default=0)
        schedule = self.plan.schedule
        assert schedule is not None
        shared = running.shared_bytes(schedule, math.prod(self.output_shape) * self.plan.dtype.itemsize)
        taken: int = schedule.workspace_bytes * min(self.plan.workers, len(self._blocks)) + self.plan.packed_bytes
        return taken + shared

    def __call__(self, value: Any, filter: Any, out: Array | None = None, *, progress: Progress | None = None) -> Array:
        """Compute the part from windows of the operands.

        Parameters
        ----------
        value, filter : array_like
            ``value[part.windows[0]]`` and ``filter[part.windows[1]]`` of the operands of the whole.
        out : ndarray, optional
            Where to write it, as ``whole[part.box]``: of `output_shape`, and a dtype to which the plan's casts safely.
        progress : callable, optional
            As in a call of the plan.

        Returns
        -------
        ndarray
            `out`, or a new C-contiguous array.

        Raises
        ------
        ValueError, TypeError
            If an argument does not fit the part; nothing was touched.
        """
        plan, problem = self.plan, self.plan.problem
        name = f"part of {problem.operation}"
        operands = plan.operands(name, value, filter, [_sizes(window) for window in self.windows])
        target, result, operands = arrays.into(name, out, operands, self.output_shape, problem.dtype)
        if not self._on_blocks(operands, result, progress):
            for piece, of_piece in self._plans:
                inside = [self._inside(role, piece.boxes[role]) for role in problem.roles]
                x, w = (array[at] for array, at in zip(operands, inside[:2], strict=True))
                of_piece.execute(name, x, w, result[inside[2]], progress)
        if target is not None and target is not result:
            np.copyto(target, result)
        return result if out is None else out

    def _on_blocks(self, operands: list[Array], result: Array, progress: Progress | None) -> bool:
        """Run the whole's blocks, and return whether that gave a result: not if it is none of them, or not finite."""
        schedule, blocks = self.plan.schedule, self._blocks
        if schedule is None or blocks is None:
            return False
        first, second, origin = ([span.start for span in at] for at in (*self.windows, self.box))
        excerpt = Excerpt(blocks.tolist(), tuple(first), tuple(second), tuple(origin))
        workers = max(1, min(self.plan.workers, len(blocks)))
        start_s, looking = time.perf_counter(), profile.current()
        try:
            seconds = running.run(
                schedule, self.plan.problem, self.plan.machine, workers, operands[0], operands[1], result,
                needed=self.plan._needs, progress=progress, excerpt=excerpt,
            )  # fmt: skip
        except NotFiniteError:
            return False
        if looking:
            looking.add(seconds or {}, workers, time.perf_counter() - start_s, 0.0)
        return True

    @cached_property
    def _box(self) -> Box:
        b, d, h, w, c = by_meaning(self.plan.problem.layout, self.plan.problem.roles[2], self.bounds)
        return b, d, h, w, c

    @cached_property
    def _blocks(self) -> np.ndarray[Any, Any] | None:
        found = self.plan.blocks_in(self._box) if 0 not in self.output_shape else None
        return found if found is not None and len(found) else None

    @cached_property
    def _plans(self) -> list[tuple[Piece, Any]]:
        """Its pieces with plans of their own."""
        made = pieces(self.plan.problem, self._box) if 0 not in self.output_shape else []
        return [(piece, self.plan.plan_of(piece.problem)) for piece in made]

    @cached_property
    def _windows(self) -> dict[Role, Box]:
        """The boxes of the operands by role and by meaning."""
        problem = self.plan.problem
        made = pieces(problem, self._box)
        found: dict[Role, Box] = {}
        for role in problem.roles[:2]:
            if role == "filter":
                a, b, c, d, e = ((0, size) for size in problem.filter_shape)
                found[role] = a, b, c, d, e
            else:
                found[role] = hull([piece.boxes[role] for piece in made])
                if self._blocks is not None:
                    found[role] = self._widened(role, found[role])
        return found

    def _widened(self, role: Role, window: Box) -> Box:
        """Return the window that whole blocks read: more where they copy lines of all phases, or rows as they lie."""
        problem, schedule = self.plan.problem, self.plan.schedule
        assert schedule is not None
        sizes = by_meaning(problem.layout, problem.roles[0], problem.shape_of(role))
        result = by_meaning(problem.layout, problem.roles[2], self.plan.output_shape)
        spans = dict(enumerate(window))
        for at, i in enumerate(order(schedule.problem.axes), 1):
            start, stop = window[1 + i]
            size = sizes[1 + i]
            more = schedule.reads_beyond * (problem.axes[i].stride if role == "fine" else 1)
            whole = at > schedule.whole_behind or self._box[1 + i] == (0, result[1 + i]) or start == stop
            spans[1 + i] = (0, size) if whole else (max(0, start - more), min(size, stop + more))
        groups = schedule.problem.groups
        taken, given = result[4] // groups, sizes[4] // groups
        if problem.roles[2] == "filter" and role == "coarse":
            return spans[0], spans[1], spans[2], spans[3], window[4]
        first, last = self._box[4][0] // taken, -(-self._box[4][1] // taken)
        return spans[0], spans[1], spans[2], spans[3], (first * given, last * given)

    def _inside(self, role: Role, box: Box) -> tuple[slice, ...]:
        """Return where a box of an array lies in the window of it, or in the part."""
        problem = self.plan.problem
        outer = self._box if role == problem.roles[2] else self._windows[role]
        spans = [slice(a - start, b - start) for (a, b), (start, _) in zip(box, outer, strict=True)]
        return by_axis(problem.layout, role, spans)


def _sizes(window: Sequence[slice]) -> tuple[int, ...]:
    return tuple(span.stop - span.start for span in window)


def bounds_of(name: str, box: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return a box of an array of a shape as pairs."""
    if isinstance(box, str | bytes) or not isinstance(box, Sequence | np.ndarray):
        raise TypeError(f"{name}: box must be a sequence of {len(shape)} slices or pairs, got {box!r}")
    if len(box) != len(shape):
        raise ValueError(
            f"{name}: box must have {len(shape)} slices or pairs, one for each axis of {shape}, got {len(box)}"
        )
    found = []
    for i, (span, size) in enumerate(zip(box, shape, strict=True)):
        text = f"{name}: box[{i}]"
        if isinstance(span, slice):
            if span.step not in (None, 1):
                raise ValueError(f"{text} must have a step of 1, got {span}")
            span = 0 if span.start is None else span.start, size if span.stop is None else span.stop
        pair = integers(text, span)
        if len(pair) != 2:
            raise ValueError(f"{text} must be 2 integers, first and behind the last, got {len(pair)}: {list(pair)}")
        start, stop = pair
        if not 0 <= start <= stop <= size:
            raise ValueError(f"{text}={list(pair)} must be an interval within 0 and {size}, axis {i} of {shape}")
        found.append((start, stop))
    return tuple(found)
