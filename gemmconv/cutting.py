"""Where a result may be cut: along the blocks of its schedule, and in boxes that take few bytes.

Numbers of a problem and its schedule only; plan.py has the methods, part.py computes a box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from gemmconv.lowerings import Schedule
from gemmconv.lowerings.base import order
from gemmconv.lowerings.boxes import Bounds
from gemmconv.parts import Box, by_meaning
from gemmconv.problem import Problem

# Of one axis: where boxes may begin and end, from 0 to its size.
Cuts = tuple[int, ...]
Spans = Sequence[tuple[int, int]]
Indices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def digits(problem: Problem, schedule: Schedule) -> list[list[Bounds]]:
    """Return the digits of a block's index in its group, with bounds on the axes of the result by meaning."""
    of = schedule.problem
    # A schedule has its own order of the spatial axes; a filter has no batch before them.
    first = 0 if problem.roles[2] == "filter" else 1
    names = {0: 0, 4: 4} | {first + i: first + at for i, at in enumerate(order(of.axes))}
    # Taps that are seen as channels are no axis of the result: such a problem is cut along the batch alone.
    known = {0} if of.result_shape[1:-1] != problem.result_shape[1:-1] else set(names)
    return [
        [tuple((names[a], span) for a, span in bounds if a in known) for bounds in digit] for digit in schedule.digits
    ]


def cuts(problem: Problem, groups: int, of_index: Sequence[list[Bounds]]) -> tuple[Cuts, ...]:
    """Return where boxes of whole blocks may begin and end, by meaning; `of_index` are the digits of a block."""
    borders = [{0, size} for size in by_meaning(problem.layout, problem.roles[2], problem.result_shape)]
    for digit in of_index:
        for bounds in digit:
            for axis, (start, stop) in bounds:
                if start < stop:
                    borders[axis] |= {start, stop}
    each = max(borders[4]) // groups
    borders[4] = {g * each + at for g in range(groups) for at in borders[4] if at <= each} | {groups * each}
    return tuple(tuple(sorted(of_axis)) for of_axis in borders)


def blocks_in(box: Box, where: Sequence[Cuts], groups: int, of_index: Sequence[list[Bounds]]) -> Indices | None:
    """Return the indices of the blocks that make up a box of the result, or None where it cuts through some.

    `where` are the result's cuts by meaning, `of_index` the digits of a block in its group.
    """
    if not all({a, b} <= set(at) for (a, b), at in zip(box, where, strict=True)):
        return None
    each = where[4][-1] // groups
    of_index = [*of_index, [()] * groups]
    chosen, channels = [], None
    for place, digit in enumerate(of_index):
        spatial = [[(a, span) for a, span in bounds if a != 4] for bounds in digit]
        of_channels = [[span for a, span in bounds if a == 4] for bounds in digit]
        if any(of_channels):
            channels = place, [span for (span,) in of_channels]
        inside = [all(box[a][0] <= i < j <= box[a][1] for a, (i, j) in bounds) for bounds in spatial]
        chosen.append(np.flatnonzero(inside))
    index = np.zeros([1] * len(of_index), np.int64)
    for values, digit in zip(np.ix_(*chosen), of_index, strict=True):
        index = index * len(digit) + values
    group = np.ix_(*chosen)[-1]
    start, stop = np.array([0]), np.array([each])
    if channels is not None:
        at, spans = channels
        start, stop = (np.array([span[i] for span in spans])[np.ix_(*chosen)[at]] for i in (0, 1))
    whole = (box[4][0] <= group * each + start) & (group * each + stop <= box[4][1])
    found: Indices = index[np.broadcast_to(whole, index.shape)]
    return found


def pieces(
    borders: Sequence[Sequence[int]],
    first: Sequence[int],
    then: Sequence[int],
    taken: Callable[[Spans], int],
    most: int,
) -> tuple[list[list[int]], int]:
    """Cut a result so that no box takes more than `most`, as far as its borders allow; return cuts, and what one takes.

    `first` are the axes that are cut before all others, `then` those of which the longest comes next; the rest follow,
    the last one first. `taken` says what a box takes.
    """
    many = [1] * len(borders)
    while True:
        found = [[at[len(at[1:]) * i // n] for i in range(n + 1)] for at, n in zip(borders, many, strict=True)]
        longest = [max(pairwise(of_axis), key=lambda span: span[1] - span[0]) for of_axis in found]
        takes = taken(longest)
        possible = [i for i, at in enumerate(borders) if many[i] < len(at) - 1]
        if takes <= most or not possible:
            return found, takes
        along = [i for i in first if i in possible] or [i for i in then if i in possible] or possible[-1:]
        axis = max(along, key=lambda i: longest[i][1] - longest[i][0])
        many[axis] = min(2 * many[axis], len(borders[axis]) - 1)
