"""The steps of a block, recorded once and played back: what Python works out between two steps is worked out once.

Between the NumPy and BLAS calls of a block a schedule slices, counts and looks up, which takes as long as a small step,
and holds Python's lock meanwhile, so that other workers wait. All of it follows from the problem but for where the
operands of a call are. So the second time a block is run its calls are recorded, a few blocks in each call, with where
their arrays lie in the operands and in the worker's memory; from then on just these calls are made.

Schedules know nothing of this. What they get to record is a workspace and operands of arrays of a class of their own,
`Traced`, which NumPy tells of each call that takes one. Views of such arrays are of the same class. A call that returns
a new array cannot be recorded, and raises CannotRecordError; nor can a decision by values, so functions that
decide something are steps as a whole (`step`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial, wraps
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from gemmconv.blas import Gemm, Integers, memory_at
from gemmconv.lowerings.base import Array, Operands, Schedule, Workspace, address

# The most steps of a schedule that are kept, of about 1 KB each, and of all schedules in a workspace; and of how many
# blocks it is known whether they are like others.
MOST_STEPS = 4096
# After so many a call records no further block, as recording a step takes longer than the step.
STEPS_A_CALL = 256
_MOST_BOUND = 1 << 14
_MOST_BLOCKS = 1 << 14
# What calls of NumPy return views only.
_VIEWS = {np.moveaxis, np.expand_dims}

# Calls that may be joined, and along how many axes.
_JOINED, _AXES = {np.copyto, np.add, np.subtract}, 2
# Calls whose arrays may have fewer axes, and how many of the last axes stay as they are.
_COALESCED: dict[Any, int] = {np.copyto: 0, np.add: 0, np.subtract: 0, np.multiply: 0, np.matmul: 2}
# How many solutions NumPy may try to find out whether two arrays meet; its stubs know of no such number.
_WORK: Any = 1000
# Bytes of items that are long enough to be copied two at a time.
_LONG_ITEM = 64

Call = tuple[Callable[..., Any], list[Any]]


class CannotRecordError(TypeError):
    """A block does what would be of the values that were there while it was recorded."""


class _Place(NamedTuple):
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


class _Step(NamedTuple):
    """A call; of `function` None it is GEMM, and `inside` are the steps that fill what it holds."""

    function: Callable[..., Any] | None
    arguments: list[Any]
    inside: list[_Step] | None = None


class Traced(np.ndarray[Any, np.dtype[Any]]):
    """An array of which each call is recorded that takes it."""

    recorder: Recorder | None = None

    def __array_finalize__(self, array: Any) -> None:
        self.recorder = getattr(array, "recorder", None)

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple[Any, ...] = (), **others: Any
    ) -> Any:
        if not out:
            raise CannotRecordError(f"{ufunc.__name__} makes a new array, which cannot be recorded")
        function = ufunc if method == "__call__" else getattr(ufunc, method)
        if method == "reduce":
            inputs = (*inputs, others.pop("axis", 0), others.pop("dtype", None))
        if any(isinstance(value, np.ndarray) for value in others.values()):
            raise CannotRecordError(f"{ufunc.__name__} with {', '.join(others)} cannot be recorded")
        if others:
            function = partial(function, **others)
        _recorder((*inputs, *out)).do(function, (*inputs, *out), target=-1)
        return out[0]

    def __array_function__(self, function: Any, types: Any, arguments: Any, others: Any) -> Any:
        if function in _VIEWS:
            return super().__array_function__(function, types, arguments, others)
        if function is not np.copyto:
            raise CannotRecordError(f"{function.__name__} cannot be recorded")
        casting = others.pop("casting", "same_kind")
        if others:
            raise CannotRecordError(f"copyto with {', '.join(others)} cannot be recorded")
        _recorder(arguments).do(np.copyto, (*arguments, casting), target=0)
        return None

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if not isinstance(found, np.ndarray):
            self._refuse()
        return found

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise CannotRecordError("what one value decides, or is set to, cannot be recorded")

    __bool__ = __float__ = __int__ = __index__ = _refuse
    item = fill = put = sort = partition = _refuse

    def __setitem__(self, index: Any, values: Any) -> None:
        cells = self[index]
        recorder = _recorder((self,))
        if isinstance(cells, np.ndarray) and recorder.holds(cells):
            recorder.do(np.copyto, (cells, values, "unsafe"), target=0)
        else:
            recorder.do(partial(_set, index), (self, values), target=0)


def _set(index: Any, array: Array, values: Any) -> None:
    array[index] = values


def _recorder(arguments: Sequence[Any]) -> Recorder:
    found = next((a.recorder for a in arguments if isinstance(a, Traced)), None)
    if found is None:
        raise CannotRecordError("nothing is recorded here")
    return found


def step(function: Callable[..., None]) -> Callable[..., None]:
    """Have a function of arrays, that returns nothing, recorded as one step."""

    @wraps(function)
    def call(*arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Traced):
                _recorder(arguments).do(function, arguments)
                return
        function(*arguments)

    return call


class Recorder(Workspace):
    """A worker's workspace while a block's steps are recorded, which are made at the same time."""

    def __init__(self, workspace: Workspace, operands: Operands, most: int = MOST_STEPS) -> None:
        self.of = workspace
        self.left = most  # steps; of more nothing is recorded
        self._memory, self.size, self.used = workspace._memory, workspace.size, 0
        self.steps: list[_Step] = []
        self.marks: list[tuple[int, str]] = []
        arrays = operands.arrays
        self._bounds = [_bounds(array) for array in (self._memory, *arrays)]
        self._made: list[Array] = []
        self._keys: list[Hashable] = []
        value, filter, output, packed, *bias = map(self.traced, arrays)
        self.operands = Operands(value, filter, output, packed, operands.steps, *bias)
        self._gemm = workspace.gemm
        self.gemm = _RecordedGemm(self)

    def traced(self, array: Array) -> Traced:
        """Return an array as one of which calls are recorded."""
        found = array.view(Traced)
        found.recorder = self
        return found

    def take(self, *shape: int) -> Array:
        return self.traced(super().take(*shape))

    def scratch(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        found = super().scratch(shape, dtype)
        self._know(found)
        return self.traced(found)

    def mark(self, phase: str) -> None:
        self.marks.append((len(self.steps), phase))
        self.of.mark(phase)

    def buffer(self, values: int) -> None:
        self.do(np.setbufsize, (values,))

    def hold(self, place: str, key: Hashable, fill: Callable[[], None]) -> None:
        before, self.steps = self.steps, []
        fill()
        inside, self.steps = self.steps, before
        self.of.held[place] = key
        self._add(_Step(_refill, [place, len(self._keys)], inside))
        self._keys.append(key)

    def do(self, function: Callable[..., Any], arguments: Sequence[Any], target: int | None = None) -> None:
        """Make a call and record it; `target` is which argument it writes."""
        function(*(a.view(np.ndarray) if isinstance(a, Traced) else a for a in arguments))
        last = None if target is None else target % len(arguments)
        placed = [self._place(a, i == last) if isinstance(a, np.ndarray) else a for i, a in enumerate(arguments)]
        self._add(_Step(function, placed))

    def multiply(self, arguments: list[Any]) -> None:
        """Call GEMM, and record it with its addresses as places."""
        self._gemm(*arguments)
        placed = [self._at(a) if i in (3, 6, 9) else a for i, a in enumerate(arguments)]
        self._add(_Step(None, placed))

    def _add(self, one: _Step) -> None:
        self.left -= 1
        if self.left >= 0:
            self.steps.append(one)

    def close(self) -> None:
        """Let go of what refers to this object, so that operands do not wait for the collector."""
        del self.operands, self.gemm

    def _place(self, array: Array, written: bool) -> Any:
        if array.size == 0:
            return np.ndarray(array.shape, array.dtype)
        if not array.flags.writeable and not isinstance(array, Traced):
            return array  # a constant
        at = address(array)
        found = self._in_memory(at)
        if found is None:
            if isinstance(array, Traced) or not written:
                raise CannotRecordError("an array's values were copied by no step, which cannot be recorded")
            # What a step makes for later ones: each worker has memory of its own for it.
            root = array
            while isinstance(root.base, np.ndarray):
                root = root.base
            self._know(root)
            found = len(self._bounds) - 1, at - self._bounds[-1][0]
        return _Place(*found, array.shape, array.dtype, array.strides)

    def _know(self, made: Array) -> None:
        self._made.append(made)
        self._bounds.append(_bounds(made))

    def holds(self, array: Array) -> bool:
        """Whether an array is a view of an operand or of the workspace, not a copy."""
        return self._in_memory(address(array)) is not None

    def _at(self, at: int) -> _Place:
        found = self._in_memory(at)
        if found is None:
            raise CannotRecordError("GEMM of other memory cannot be recorded")
        return _Place(*found)

    def _in_memory(self, at: int) -> tuple[int, int] | None:
        for i, (start, stop) in enumerate(self._bounds):
            if start <= at < stop:
                return i, at - start
        return None

    def recording(self) -> Recording:
        """Return what was recorded, each call by itself."""
        arrays = self.operands.arrays
        lowest: list[list[int]] = [[] for _ in self._bounds]
        for one in _every(self.steps):
            for a in one.arguments:
                if isinstance(a, _Place):
                    lowest[a.memory].append(a.lowest)
        first = [min(of, default=0) for of in lowest[1 : 1 + len(arrays)]]
        steps = [_moved(one, [0, *first]) for one in self.steps]
        tape = Tape(steps, self.marks, [array.nbytes for array in self._made], [array.strides for array in arrays])
        return Recording(tape, first, self._keys)


class _RecordedGemm(Gemm):
    """What schedules see as GEMM while they are recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        of = recorder.of.gemm
        self.dtype, self.itemsize, self.largest = of.dtype, of.itemsize, of.largest

    def __call__(
        self, m: int, n: int, k: int, a: int, lda: int, a_transposed: bool, b: int, ldb: int, b_transposed: bool,
        c: int, ldc: int, accumulate: bool = False,
    ) -> None:  # fmt: skip
        self._recorder.multiply([m, n, k, a, lda, a_transposed, b, ldb, b_transposed, c, ldc, accumulate])


class Tape(NamedTuple):
    """Recorded steps, for operands anywhere and any workspace."""

    steps: list[_Step]
    marks: list[tuple[int, str]]
    made: list[int]  # bytes of what steps make for later ones
    strides: list[tuple[int, ...]]  # of the operands

    @property
    def size(self) -> int:
        """Its steps, those that are made if something else is held too."""
        return sum(1 for _ in _every(self.steps))

    @property
    def key(self) -> Hashable:
        """What tapes have in common that are alike."""
        return *map(_key, self.steps), *self.marks, *self.made, *self.strides

    def joined(self) -> Tape:
        """Return a tape that does the same in fewer calls (`_together`) that begin sooner (`_coalesced`)."""
        steps: list[_Step] = []
        marks: list[tuple[int, str]] = []
        begin = 0
        for end, phase in [*self.marks, (len(self.steps), "")]:
            steps += map(_coalesced, _together(self.steps[begin:end]))
            marks.append((len(steps), phase))
            begin = end
        return self._replace(steps=steps, marks=marks[:-1])


class Recording(NamedTuple):
    """A block: its tape, which it may share, from which byte of each operand on, and what it holds for what."""

    tape: Tape
    first: list[int]
    keys: list[Hashable]

    def fits(self, workspace: Workspace) -> bool:
        """Whether a call's operands lie as the recorded ones did."""
        return workspace.strides == self.tape.strides

    def play(self, workspace: Workspace) -> None:
        """Make the recorded calls for the operands that a workspace has begun with."""
        bound: _Bound | None = workspace.bound.get(id(self.tape))
        if bound is None or bound.tape is not self.tape:
            if sum(other.size for other in workspace.bound.values()) + self.tape.size > _MOST_BOUND:
                workspace.bound.clear()
            bound = workspace.bound[id(self.tape)] = _Bound(self.tape, workspace)
        bound.play(self, workspace)


class _Bound:
    """A tape's calls for one workspace: their arguments, and which of them are where the operands are."""

    def __init__(self, tape: Tape, workspace: Workspace) -> None:
        self.tape, self.size = tape, tape.size
        operands = len(tape.strides)
        self._made = [np.empty(size, np.uint8) for size in tape.made]
        self._memory: list[Any] = [workspace.at, *[None] * operands, *map(address, self._made)]
        self._patches: list[list[tuple[list[Any], int, _Place]]] = [[] for _ in range(operands)]
        self._at = [0] * operands
        self._keys: list[Hashable] = []
        self._integers: list[Integers] = []
        self.calls = [self._bind(one, workspace) for one in tape.steps]

    def _bind(self, one: _Step, workspace: Workspace) -> Call:
        function, arguments = one.function, list(one.arguments)
        if function is None:
            self._integers.append(Integers())
            function, arguments = workspace.gemm.call(self._integers[-1], *arguments)
        for i, argument in enumerate(arguments):
            if isinstance(argument, _Place):
                base = self._memory[argument.memory]
                if base is None:
                    self._patches[argument.memory - 1].append((arguments, i, argument))
                else:
                    arguments[i] = _located(base, memory_at(base), argument)
        if one.inside is not None:
            calls = [self._bind(other, workspace) for other in one.inside]
            return _refill, [workspace.held, self._keys, *arguments, calls]
        return function, arguments

    def play(self, recording: Recording, workspace: Workspace) -> None:
        at = [*map(int.__add__, workspace.addresses, recording.first)]
        if at != self._at:
            for of_operand, was, now in zip(self._patches, self._at, at, strict=True):
                if was != now:
                    memory = memory_at(now)
                    for arguments, j, place in of_operand:
                        arguments[j] = _located(now, memory, place)
            self._at = at
        self._keys[:] = recording.keys
        done = 0
        for count, phase in self.tape.marks if workspace.clock else ():
            for function, arguments in self.calls[done:count]:
                function(*arguments)
            done = count
            workspace.mark(phase)
        for function, arguments in self.calls[done:] if done else self.calls:
            function(*arguments)


def _refill(
    held: dict[str, Hashable], keys: Sequence[Hashable], place: str, number: int, calls: Sequence[Call]
) -> None:
    """Fill a place of a workspace, unless it holds that already."""
    if held.get(place) != keys[number]:
        for function, arguments in calls:
            function(*arguments)
        held[place] = keys[number]


def _located(base: int, memory: Any, place: _Place) -> Any:
    if place.shape is None:
        return base + place.offset
    return np.ndarray(place.shape, place.dtype, memory, place.offset, place.strides)


def _every(steps: Iterable[_Step]) -> Iterator[_Step]:
    for one in steps:
        yield one
        yield from _every(one.inside or ())


def _moved(one: _Step, first: Sequence[int]) -> _Step:
    """Return a step whose offsets count from some bytes of the first memories on."""
    arguments = [
        _Place(a.memory, a.offset - first[a.memory], a.shape, a.dtype, a.strides)
        if isinstance(a, _Place) and a.memory < len(first)
        else a
        for a in one.arguments
    ]
    return _Step(one.function, arguments, None if one.inside is None else [_moved(of, first) for of in one.inside])


def _together(steps: Iterable[_Step]) -> list[_Step]:
    """Join calls that follow each other, are alike but for where their arrays lie, evenly apart, and do not meet."""
    found = list(steps)
    for _ in range(_AXES):
        before, found = found, []
        run: list[_Step] = []
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


def _apart(one: _Step, other: _Step) -> tuple[int, ...]:
    """Return how many bytes the arrays of two calls lie apart if they can be joined."""
    if one.function is not other.function or one.function not in _JOINED:
        return ()
    pairs = list(zip(one.arguments, other.arguments, strict=True))
    places = [(a, b) for a, b in pairs if isinstance(a, _Place) and isinstance(b, _Place)]
    others = [(a, b) for a, b in pairs if not (isinstance(a, _Place) and isinstance(b, _Place))]
    alike = all(a._replace(offset=0) == b._replace(offset=0) for a, b in places) and all(a is b for a, b in others)
    if not alike or len({len(a.shape or ()) for a, _ in places}) > 1:
        return ()
    found = tuple(b.offset - a.offset for a, b in places)
    to = places[_written(one)][0]
    inner = min((abs(n) for size, n in zip(to.shape or (), to.strides, strict=True) if size > 1), default=0)
    # Not where the new axis would be the innermost loop, of few values.
    return found if to.dtype.itemsize >= _LONG_ITEM or abs(found[_written(one)]) >= inner else ()


def _written(one: _Step) -> int:
    """Return which of its arrays a call that may be joined writes."""
    return 0 if one.function is np.copyto else -1


def _are_free(one: _Step, other: _Step) -> bool:
    """Whether neither of two calls writes what the other reads or writes."""
    places = [[a for a in of.arguments if isinstance(a, _Place)] for of in (one, other)]
    written = [of[_written(one)] for of in places]
    return not any(_meet(written[i], a) for i in (0, 1) for a in places[1 - i])


def _meet(one: _Place, other: _Place) -> bool:
    if one.memory != other.memory:
        return False
    base = 1 << 40  # of no memory: just addresses are looked at
    a, b = (_located(base, memory_at(base), place) for place in (one, other))
    try:
        return np.shares_memory(a, b, max_work=_WORK)
    except np.exceptions.TooHardError:
        return True


def _joined(run: list[_Step], apart: tuple[int, ...]) -> _Step:
    arguments, steps = [], iter(apart)
    for a in run[0].arguments:
        if isinstance(a, _Place):
            a = a._replace(shape=(len(run), *(a.shape or ())), strides=(next(steps), *a.strides))
        arguments.append(a)
    return _Step(run[0].function, arguments)


def _coalesced(one: _Step) -> _Step:
    """Return a call of arrays that have as few axes as possible, since NumPy looks at each before it begins."""
    places = [a for a in one.arguments if isinstance(a, _Place)]
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
        if isinstance(a, _Place):
            of = next(sizes)[::-1]
            arguments[i] = a._replace(shape=tuple(n for n, _ in of), strides=tuple(n for _, n in of))
    return _Step(one.function, arguments)


def _follow(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    """Whether two axes of an array, of sizes and strides, are one of as many values."""
    return outer[0] == inner[0] == 1 or (outer[0] > 1 < inner[0] and outer[1] == inner[0] * inner[1])


def _key(one: _Step) -> Hashable:
    arguments = (id(a) if isinstance(a, np.ndarray) else a for a in one.arguments)
    return one.function, *arguments, *map(_key, one.inside or ())


def _lie_apart(operands: Operands) -> bool:
    """Whether it follows from an address which operand it is of."""
    bounds = sorted(_bounds(array) for array in operands.arrays if array.size)
    return all(stop <= start for (_, stop), (start, _) in pairwise(bounds))


def _bounds(array: Array) -> tuple[int, int]:
    if array.size == 0:
        return 0, 0
    first = last = address(array)
    for size, stride in zip(array.shape, array.strides, strict=True):
        first, last = first + min(0, (size - 1) * stride), last + max(0, (size - 1) * stride)
    return first, last + array.itemsize


class Tapes:
    """Runs the blocks of a schedule, and keeps recordings of those it has run before."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._recordings: dict[int, Recording | None] = {}
        self._tapes: dict[Hashable, Tape] = {}
        self._left = MOST_STEPS
        self._now = STEPS_A_CALL

    def begin(self) -> None:
        """Begin a call, which may record some blocks more."""
        self._now = STEPS_A_CALL

    def run(self, block: int, operands: Operands, workspace: Workspace) -> None:
        """Compute one block of the output."""
        key = block if operands.bias is None else ~block
        found = self._recordings.get(key)
        workspace.begin(operands)
        if found is not None and found.fits(workspace):
            found.play(workspace)
        elif found is None and key in self._recordings and min(self._left, self._now) > 0 and _lie_apart(operands):
            self._record(key, block, operands, workspace)
        else:
            self._schedule.run(block, operands, workspace)
            if self._left > 0 and len(self._recordings) < _MOST_BLOCKS:
                self._recordings.setdefault(key, None)

    def _record(self, key: int, block: int, operands: Operands, workspace: Workspace) -> None:
        recorder = Recorder(workspace, operands, self._left)
        try:
            self._schedule.run(block, recorder.operands, recorder)
        except CannotRecordError:  # tests know of no schedule that does this, but for one the call would be lost
            self._left = 0
            self._schedule.run(block, operands, workspace)
        else:
            self._now -= len(recorder.steps)
            if recorder.left < 0:
                self._left = 0
                return
            found = recorder.recording()
            alike = found.tape.key
            tape = self._tapes.get(alike)
            if tape is None:
                tape = self._tapes.setdefault(alike, found.tape.joined())
                self._left -= found.tape.size
            self._recordings[key] = found._replace(tape=tape)
        finally:
            recorder.close()

    def run_once(self, block: int, operands: Operands, workspace: Workspace) -> None:
        """Compute one block of operands that do not lie as others will, and of the output."""
        workspace.begin(operands)
        self._schedule.run(block, operands, workspace)
