"""The recording of a block's calls, which are made at the same time.

What schedules get to record is a workspace and operands of arrays of a class of their own, `Traced`, which NumPy tells
of each call that takes one. Views of such arrays are of the same class. A call that returns a new array cannot be
recorded, and raises CannotRecordError; nor can a decision by values, so functions that decide something are steps as a
whole (`step`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import numpy as np

from gemmconv.blas import Gemm
from gemmconv.lowerings.base import Array, Operands, Workspace, address
from gemmconv.lowerings.steps import Place, Step, Tape, every, moved

# What calls of NumPy return views only.
_VIEWS = {np.moveaxis, np.expand_dims, np.broadcast_to}


class CannotRecordError(TypeError):
    """A block does what would be of the values that were there while it was recorded."""


class Recording(NamedTuple):
    """A block: its tape, which it may share, from which byte of each operand on, and what it holds for what."""

    tape: Tape
    first: list[int]
    keys: list[Hashable]


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

    def __init__(self, workspace: Workspace, operands: Operands, most: int) -> None:
        self.of = workspace
        self.left = most  # steps; of more nothing is recorded
        self._memory, self.size, self.used = workspace._memory, workspace.size, 0
        self.steps: list[Step] = []
        self.marks: list[tuple[int, str]] = []
        arrays = operands.arrays
        self._bounds = [bounds_of(array) for array in (self._memory, *arrays)]
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
        self._add(Step(None, [place, len(self._keys)], inside))
        self._keys.append(key)

    def do(self, function: Callable[..., Any], arguments: Sequence[Any], target: int | None = None) -> None:
        """Make a call and record it; `target` is which argument it writes."""
        function(*(a.view(np.ndarray) if isinstance(a, Traced) else a for a in arguments))
        last = None if target is None else target % len(arguments)
        placed = [self._place(a, i == last) if isinstance(a, np.ndarray) else a for i, a in enumerate(arguments)]
        self._add(Step(function, placed))

    def multiply(self, arguments: list[Any]) -> None:
        """Call GEMM, and record it with its addresses as places."""
        self._gemm(*arguments)
        placed = [self._at(a) if i in (3, 6, 9) else a for i, a in enumerate(arguments)]
        self._add(Step(None, placed))

    def _add(self, one: Step) -> None:
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
        return Place(*found, array.shape, array.dtype, array.strides)

    def _know(self, made: Array) -> None:
        self._made.append(made)
        self._bounds.append(bounds_of(made))

    def holds(self, array: Array) -> bool:
        """Whether an array is a view of an operand or of the workspace, not a copy."""
        return self._in_memory(address(array)) is not None

    def _at(self, at: int) -> Place:
        found = self._in_memory(at)
        if found is None:
            raise CannotRecordError("GEMM of other memory cannot be recorded")
        return Place(*found)

    def _in_memory(self, at: int) -> tuple[int, int] | None:
        for i, (start, stop) in enumerate(self._bounds):
            if start <= at < stop:
                return i, at - start
        return None

    def recording(self) -> Recording:
        """Return what was recorded, each call by itself."""
        arrays = self.operands.arrays
        lowest: list[list[int]] = [[] for _ in self._bounds]
        for one in every(self.steps):
            for a in one.arguments:
                if isinstance(a, Place):
                    lowest[a.memory].append(a.lowest)
        first = [min(of, default=0) for of in lowest[1 : 1 + len(arrays)]]
        steps = [moved(one, [0, *first]) for one in self.steps]
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


def bounds_of(array: Array) -> tuple[int, int]:
    if array.size == 0:
        return 0, 0
    first = last = address(array)
    for size, stride in zip(array.shape, array.strides, strict=True):
        first, last = first + min(0, (size - 1) * stride), last + max(0, (size - 1) * stride)
    return first, last + array.itemsize
