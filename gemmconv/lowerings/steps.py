"""The calls of a block as data: where their arrays lie, and how they become fewer and begin sooner.

Arrays are places: an offset in one of a few memories, which are a worker's, those of the operands, and what steps make
for later ones. So calls that do the same elsewhere are equal, and those that follow each other can be one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemmconv.blas import memory_at

# Calls that may be joined, and along how many axes.
_JOINED, _AXES = {np.copyto, np.add, np.subtract}, 2
# Calls whose arrays may have fewer axes, and how many of the last axes stay as they are.
_COALESCED: dict[Any, int] = {np.copyto: 0, np.add: 0, np.subtract: 0, np.multiply: 0, np.matmul: 2}
# How many solutions NumPy may try to find out whether two arrays meet; its stubs know of no such number.
_WORK: Any = 1000
# Bytes of items that are long enough to be copied two at a time.
_LONG_ITEM = 64
# Rows of these zeros, which stay in L2, are copied, and the fewest bytes of one.
_ZEROS, _FEWEST_ZEROS = np.zeros(1 << 18, np.uint8), 1 << 15
_ZEROS.flags.writeable = False


class Place(NamedTuple):
    """Where an array lies: in which memory, at which byte. `shape` is None where it is an address that GEMM takes."""

    memory: int
    offset: int
    shape: tuple[int, ...] | None = None
    dtype: Any = None
    strides: tuple[int, ...] = ()

    @property
    def lowest(self) -> int:
        """Its first byte; it may lie backwards."""
        steps = zip(self.shape or (), self.strides, strict=True)
        return self.offset + sum(min(0, (size - 1) * stride) for size, stride in steps)


class Step(NamedTuple):
    """A call; of `function` None it is GEMM, or with `inside` the steps that fill a place that holds something else."""

    function: Callable[..., Any] | None
    arguments: list[Any]
    inside: list[Step] | None = None


class Tape(NamedTuple):
    """Recorded steps, for operands anywhere and any workspace."""

    steps: list[Step]
    marks: list[tuple[int, str]]
    made: list[int]  # bytes of what steps make for later ones
    strides: list[tuple[int, ...]]  # of the operands

    @property
    def size(self) -> int:
        """Its steps, those that are made if something else is held too."""
        return sum(1 for _ in every(self.steps))

    @property
    def key(self) -> Hashable:
        """What tapes have in common that are alike."""
        return *map(_key, self.steps), *self.marks, *self.made, *self.strides

    def joined(self) -> Tape:
        """Return a tape that does the same in fewer calls (`_together`) that begin sooner (`_coalesced`)."""
        steps: list[Step] = []
        marks: list[tuple[int, str]] = []
        begin = 0
        for end, phase in [*self.marks, (len(self.steps), "")]:
            steps += map(_coalesced, _together(self.steps[begin:end]))
            marks.append((len(steps), phase))
            begin = end
        return self._replace(steps=steps, marks=marks[:-1])


def located(base: int, memory: Any, place: Place) -> Any:
    if place.shape is None:
        return base + place.offset
    return np.ndarray(place.shape, place.dtype, memory, place.offset, place.strides)


def every(steps: Iterable[Step]) -> Iterator[Step]:
    for one in steps:
        yield one
        yield from every(one.inside or ())


def moved(one: Step, first: Sequence[int]) -> Step:
    """Return a step whose offsets count from some bytes of the first memories on."""
    arguments = [
        a._replace(offset=a.offset - first[a.memory]) if isinstance(a, Place) and a.memory < len(first) else a
        for a in one.arguments
    ]
    return Step(one.function, arguments, None if one.inside is None else [moved(of, first) for of in one.inside])


def _together(steps: Iterable[Step]) -> list[Step]:
    """Join calls that follow each other, are alike but for where their arrays lie, evenly apart, and do not meet."""
    found = list(steps)
    for _ in range(_AXES):
        before, found = found, []
        run: list[Step] = []
        of_run: tuple[int, ...] = ()
        for one in before:
            if (
                run
                and (apart := _apart(run[-1], one))
                and (len(run) == 1 or apart == of_run)
                and _are_free(run[0], one)
            ):
                of_run = apart
                run.append(one)
                continue
            found += [_joined(run, of_run)] if len(run) > 1 else run
            run, of_run = [one], ()
        found += [_joined(run, of_run)] if len(run) > 1 else run
    return found


def _apart(one: Step, other: Step) -> tuple[int, ...]:
    """Return how many bytes the arrays of two calls lie apart if they can be joined."""
    if one.function is not other.function or one.function not in _JOINED:
        return ()
    pairs = list(zip(one.arguments, other.arguments, strict=True))
    places = [(a, b) for a, b in pairs if isinstance(a, Place) and isinstance(b, Place)]
    others = [(a, b) for a, b in pairs if not (isinstance(a, Place) and isinstance(b, Place))]
    alike = all(a._replace(offset=0) == b._replace(offset=0) for a, b in places) and all(a is b for a, b in others)
    if not alike or len({len(a.shape or ()) for a, _ in places}) > 1:
        return ()
    found = tuple(b.offset - a.offset for a, b in places)
    to = places[_written(one)][0]
    inner = min((abs(n) for size, n in zip(to.shape or (), to.strides, strict=True) if size > 1), default=0)
    # Not where the new axis would be the innermost loop, of few values.
    return found if to.dtype.itemsize >= _LONG_ITEM or abs(found[_written(one)]) >= inner else ()


def _written(one: Step) -> int:
    """Return which of its arrays a call that may be joined writes."""
    return 0 if one.function is np.copyto else -1


def _are_free(one: Step, other: Step) -> bool:
    """Whether neither of two calls writes what the other reads or writes."""
    places = [[a for a in of.arguments if isinstance(a, Place)] for of in (one, other)]
    written = [of[_written(one)] for of in places]
    return not any(_meet(written[i], a) for i in (0, 1) for a in places[1 - i])


def _meet(one: Place, other: Place) -> bool:
    if one.memory != other.memory:
        return False
    base = 1 << 40  # of no memory: just addresses are looked at
    a, b = (located(base, memory_at(base), place) for place in (one, other))
    try:
        return np.shares_memory(a, b, max_work=_WORK)
    except np.exceptions.TooHardError:
        return True


def _joined(run: list[Step], apart: tuple[int, ...]) -> Step:
    arguments, steps = [], iter(apart)
    for a in run[0].arguments:
        if isinstance(a, Place):
            a = a._replace(shape=(len(run), *(a.shape or ())), strides=(next(steps), *a.strides))
        arguments.append(a)
    return Step(run[0].function, arguments)


def _coalesced(one: Step) -> Step:
    """Return a call of arrays that have as few axes as possible, since NumPy looks at each before it begins."""
    places = [a for a in one.arguments if isinstance(a, Place)]
    kept = _COALESCED.get(one.function)
    if kept is None or len({len(a.shape or ()) for a in places}) > 1:
        return one
    if any(isinstance(a, np.ndarray) and a.ndim > kept for a in one.arguments):
        return one
    # Of each array the sizes and strides of its axes, from the last one on.
    axes = [list(zip((a.shape or ())[::-1], a.strides[::-1], strict=True)) for a in places]
    found = [of[:kept] for of in axes]
    for outer in zip(*(of[kept:] for of in axes), strict=True):
        if all(size == 1 for size, _ in outer):
            continue
        if len(found[0]) > kept and all(map(_follow, outer, (of[-1] for of in found))):
            for of, (size, _) in zip(found, outer, strict=True):
                of[-1] = of[-1][0] * size, of[-1][1]
        else:
            for of, axis in zip(found, outer, strict=True):
                of.append(axis)
    sizes = iter(found)
    arguments = list(one.arguments)
    for i, a in enumerate(arguments):
        if isinstance(a, Place):
            of = next(sizes)[::-1]
            arguments[i] = a._replace(shape=tuple(n for n, _ in of), strides=tuple(n for _, n in of))
    return _cleared(Step(one.function, arguments))


def _cleared(one: Step) -> Step:
    """Return a call that sets long runs to 0 as one that copies zeros, which takes half of the time and less.

    What a copy of so many bytes writes is not read from memory before.
    """
    to, value, *others = one.arguments
    if one.function is not np.copyto or type(value) is not int or value != 0 or not to.shape:
        return one
    *sizes, run = to.shape
    *apart, beside = to.strides
    item = to.dtype.itemsize
    most, fewest = _ZEROS.size // item, _FEWEST_ZEROS // item
    row = next((run // n for n in range(max(1, -(-run // most)), run // fewest + 1) if run % n == 0), 0)
    if row == 0 or beside != item:
        return one
    to = to._replace(shape=(*sizes, run // row, row), strides=(*apart, row * item, item))
    return Step(np.copyto, [to, _ZEROS[: row * item].view(to.dtype), *others])


def _follow(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    """Whether two axes of an array, of sizes and strides, are one of as many values."""
    return outer[0] == inner[0] == 1 or (outer[0] > 1 < inner[0] and outer[1] == inner[0] * inner[1])


def _key(one: Step) -> Hashable:
    arguments = (id(a) if isinstance(a, np.ndarray) else a for a in one.arguments)
    return one.function, *arguments, *map(_key, one.inside or ())
