"""Parts of a result in numbers: the boxes of the operands that a box of it needs, and the problem it is by itself.

A box is a range for each axis of an array by meaning, whatever its layout: batch, depth, height, width and channels of
a coarse or fine array; depth, height, width, fine channels of a group and coarse channels of a filter. This module sees
no arrays and chooses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

from gemmconv.problem import Axis, Problem, Role

Range = tuple[int, int]
Box = tuple[Range, Range, Range, Range, Range]
T = TypeVar("T")


class Piece(NamedTuple):
    """A part of a result that is a problem of its own: that, and its boxes of the three arrays by role."""

    problem: Problem
    boxes: dict[Role, Box]


def by_meaning(layout: str, role: Role, items: Sequence[T]) -> tuple[T, ...]:
    """Return items that belong to the axes of an array in the order of meaning."""
    return tuple(items) if layout == "NDHWC" or role == "filter" else (items[0], *items[2:], items[1])


def by_axis(layout: str, role: Role, items: Sequence[T]) -> tuple[T, ...]:
    """Return items in the order of meaning in the order of an array's axes."""
    return tuple(items) if layout == "NDHWC" or role == "filter" else (items[0], items[4], *items[1:4])


def coarse_of(axis: Axis, fine: Range, taps: Range) -> Range:
    """Return the coarse positions from the first to the last that some of the taps carry into a fine interval."""
    if fine[0] >= fine[1] or taps[0] >= taps[1]:
        return 0, 0
    first = max(0, -(((taps[1] - 1) * axis.dilation - axis.lo - fine[0]) // axis.stride))
    last = min(axis.coarse, (fine[1] - 1 + axis.lo - taps[0] * axis.dilation) // axis.stride + 1)
    return (first, last) if first < last else (0, 0)


def fine_of(axis: Axis, coarse: Range, taps: Range) -> Range:
    """Return the fine positions from the first to the last that some coarse positions reach with some taps."""
    if coarse[0] >= coarse[1] or taps[0] >= taps[1]:
        return 0, 0
    first = max(0, coarse[0] * axis.stride + taps[0] * axis.dilation - axis.lo)
    last = min(axis.fine, (coarse[1] - 1) * axis.stride + (taps[1] - 1) * axis.dilation - axis.lo + 1)
    return (first, last) if first < last else (0, 0)


def excerpt(axis: Axis, coarse: Range, fine: Range, taps: Range) -> Axis:
    """Return the relation between an interval of coarse positions and one of fine positions, by some of the taps.

    With i = coarse[0] + i', o = fine[0] + o' and a = taps[0] + a', i*s + a*d - lo = o is i'*s + a'*d - lo' = o' for
    lo' = lo + fine[0] - coarse[0]*s - taps[0]*d.
    """
    lo = axis.lo + fine[0] - coarse[0] * axis.stride - taps[0] * axis.dilation
    n, o, k = (stop - start for start, stop in (coarse, fine, taps))
    return Axis(n, o, k, axis.stride, axis.dilation, lo)


def pieces(problem: Problem, box: Box) -> list[Piece]:
    """Return the problems whose results make up a box of the result: several where it holds parts of groups."""
    channels = box[4]
    if problem.groups == 1 or channels[0] >= channels[1]:
        return [_piece(problem, box)]
    each = problem.cout if problem.roles[2] == "fine" else problem.cin
    # A gradient of some fine channels of a group takes channels of each group that are apart from each other.
    apart = problem.roles[2] == "filter" and box[3] != (0, problem.cout)
    borders = {*channels, *(c for c in range(0, each * problem.groups, each) if channels[0] < c < channels[1])}
    cuts: list[int] = []
    for border in sorted(borders):
        # Of neighbouring whole groups just the first and the last border stay.
        if len(cuts) > 1 and not apart and not any(c % each for c in (*cuts[-2:], border)):
            cuts.pop()
        cuts.append(border)
    return [_piece(problem, (*box[:4], (a, b))) for a, b in pairwise(cuts)]


def _piece(problem: Problem, box: Box) -> Piece:
    """Return the piece of a box whose channels lie in one group or are those of whole groups."""
    result = problem.roles[2]
    start, stop = box[4]
    each = problem.cout if result == "fine" else problem.cin
    whole = start % each == 0 and stop % each == 0 if each else True
    first, last = (start // each, -(-stop // each)) if each and start < stop else (0, 1)
    spans = []
    for i, axis in enumerate(problem.axes):
        taps = box[i] if result == "filter" else (0, axis.kernel)
        if result == "coarse":
            coarse = box[1 + i]
            fine = fine_of(axis, coarse, taps)
        else:
            fine = box[1 + i] if result == "fine" else (0, axis.fine)
            coarse = coarse_of(axis, fine, taps)
            fine = fine if result == "fine" else fine_of(axis, coarse, taps)
        spans.append((coarse, fine, taps))
    batch = (0, problem.batch) if result == "filter" else box[0]
    cin, cout = problem.cin, problem.cout
    if result == "fine":
        of_fine, of_coarse = (start, stop), (first * cin, last * cin)
        rows = (0, cout) if whole else (start - first * cout, stop - first * cout)
    else:
        of_coarse = start, stop
        rows = box[3] if result == "filter" else (0, cout)
        of_fine = (first * cout, last * cout) if rows == (0, cout) else (first * cout + rows[0], first * cout + rows[1])
    groups = last - first if whole else 1
    d, h, w = spans
    boxes: dict[Role, Box] = {
        "coarse": (batch, d[0], h[0], w[0], of_coarse),
        "fine": (batch, d[1], h[1], w[1], of_fine),
        "filter": (d[2], h[2], w[2], rows, of_coarse),
    }
    axes = [excerpt(axis, *span) for axis, span in zip(problem.axes, spans, strict=True)]
    made = replace(
        problem,
        batch=batch[1] - batch[0],
        cin=(of_coarse[1] - of_coarse[0]) // groups,
        cout=rows[1] - rows[0],
        axes=(axes[0], axes[1], axes[2]),
        groups=groups,
    )
    return Piece(made, boxes)


def hull(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that holds some boxes; empty ones do not count where there are others."""
    full = [box for box in boxes if all(a < b for a, b in box)] or boxes
    b, d, h, w, c = ((min(r[0] for r in of_axis), max(r[1] for r in of_axis)) for of_axis in zip(*full, strict=True))
    return b, d, h, w, c
