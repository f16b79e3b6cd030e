"""Blocks are recorded once and played back: what Python works out between two steps is worked out once.

Between the NumPy and BLAS calls of a block a schedule slices, counts and looks up, which takes as long as a small step,
and holds Python's lock meanwhile, so that other workers wait. All of it follows from the problem but for where the
operands of a call are. So the second time a block is run its calls are recorded, a few blocks in each call, with where
their arrays lie in the operands and in the worker's memory; from then on just these calls are made. Schedules know
nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from gemmconv.blas import Integers, memory_at
from gemmconv.lowerings.base import Operands, Schedule, Workspace, address, aligned, pack_part
from gemmconv.lowerings.recorder import CannotRecordError, Recorder, Recording, bounds_of
from gemmconv.lowerings.steps import Place, Step, Tape, located

# The most steps of a schedule that are kept, of about 2 KB each, and of all schedules in a workspace; and of how many
# blocks it is known whether they are like others.
MOST_STEPS = 4096
_MOST_BOUND = 1 << 14
_MOST_BLOCKS = 1 << 14
# The most bytes that packing may make for itself beside a workspace: each worker would keep them.
_MOST_MADE = 1 << 18
# After so many a call records no further block, as recording a step takes longer than the step: 20 microseconds. With
# one for each so many FLOP a call takes up to twice as long.
STEPS_A_CALL = 256
_FLOPS_A_STEP = 5_000_000

Call = tuple[Callable[..., Any], list[Any]]
Does = Callable[[Operands, Workspace], None]


class Tapes:
    """Runs the blocks of a schedule, and keeps recordings of those it has run before."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._recordings: dict[Hashable, Recording | None] = {}
        self._tapes: dict[Hashable, Tape] = {}
        self._left = MOST_STEPS
        self._now = STEPS_A_CALL
        self._plays_packing = True
        self._busy = False  # a block is recorded, for which another worker that records would wait in Python's lock

    def begin(self, flops: int = 0) -> None:
        """Begin a call of so many FLOP, which may record some blocks more."""
        self._now = max(STEPS_A_CALL, flops // _FLOPS_A_STEP)
        self._busy = False

    def run(self, block: int, operands: Operands, workspace: Workspace) -> None:
        """Compute one block of the output."""
        key = block if operands.bias is None else ~block
        self._do(key, partial(self._schedule.run, block), operands, workspace)

    def pack(self, part: int, parts: int, operands: Operands, workspace: Workspace) -> None:
        """Pack one of so many parts of the filter."""
        if self._plays_packing:
            key = part, parts, operands.bias is None
            self._do(key, partial(self._pack, part, parts), operands, workspace)
        else:
            self._pack(part, parts, operands, workspace)

    def _pack(self, part: int, parts: int, operands: Operands, workspace: Workspace) -> None:
        pack_part(self._schedule, operands.filter, operands.packed, part, parts, workspace)

    def _do(self, key: Hashable, does: Does, operands: Operands, workspace: Workspace) -> None:
        found = self._recordings.get(key)
        workspace.begin(operands)
        if found is not None and found.tape.strides == workspace.strides:
            play(found, workspace)
        elif found is None and key in self._recordings and self._may_record(key) and _lie_apart(operands):
            self._record(key, does, operands, workspace)
        else:
            does(operands, workspace)
            if self._left > 0 and len(self._recordings) < _MOST_BLOCKS:
                self._recordings.setdefault(key, None)

    def _may_record(self, key: Hashable) -> bool:
        # For parts of the filter the others wait in any case.
        return min(self._left, self._now) > 0 and (isinstance(key, tuple) or not self._busy)

    def _record(self, key: Hashable, does: Does, operands: Operands, workspace: Workspace) -> None:
        self._busy = True
        recorder = Recorder(workspace, operands, self._left)
        try:
            does(recorder.operands, recorder)
        except CannotRecordError:
            self._give_up(key)
            does(operands, workspace)
        else:
            self._now -= len(recorder.steps)
            if recorder.left < 0:
                self._give_up(key)
                return
            found = recorder.recording()
            if isinstance(key, tuple) and sum(found.tape.made) > _MOST_MADE:
                self._give_up(key)
                return
            alike = found.tape.key
            tape = self._tapes.get(alike)
            if tape is None:
                tape = self._tapes.setdefault(alike, found.tape.joined())
                self._left -= found.tape.size
            self._recordings[key] = found._replace(tape=tape)
        finally:
            self._busy = False
            recorder.close()

    def _give_up(self, key: Hashable) -> None:
        """Record no more: of packing, or of blocks, though tests know of no schedule whose blocks cannot be."""
        if isinstance(key, tuple):
            self._plays_packing = False
        else:
            self._left = 0

    def run_once(self, block: int, operands: Operands, workspace: Workspace) -> None:
        """Compute one block of operands that do not lie as others will, and of the output."""
        workspace.begin(operands)
        self._schedule.run(block, operands, workspace)


def _lie_apart(operands: Operands) -> bool:
    """Whether it follows from an address which operand it is of."""
    bounds = sorted(bounds_of(array) for array in operands.arrays if array.size)
    return all(stop <= start for (_, stop), (start, _) in pairwise(bounds))


def play(recording: Recording, workspace: Workspace) -> None:
    """Make the recorded calls of a block for the operands that a workspace has begun with."""
    tape = recording.tape
    bound: Bound | None = workspace.bound.get(id(tape))
    if bound is None or bound.tape is not tape:
        if sum(other.size for other in workspace.bound.values()) + tape.size > _MOST_BOUND:
            workspace.bound.clear()
        bound = workspace.bound[id(tape)] = Bound(tape, workspace)
    bound.play(recording, workspace)


class Bound:
    """A tape's calls for one workspace: their arguments, and which of them are where the operands are."""

    def __init__(self, tape: Tape, workspace: Workspace) -> None:
        self.tape, self.size = tape, tape.size
        operands = len(tape.strides)
        starts = [0, *accumulate(map(aligned, tape.made))]
        self.made = workspace.beside(starts[-1])
        made = [address(self.made) + start for start in starts[:-1]]
        self._memory: list[Any] = [workspace.at, *[None] * operands, *made]
        self._patches: list[list[tuple[list[Any], int, Place]]] = [[] for _ in range(operands)]
        self._at = [0] * operands
        self._keys: list[Hashable] = []
        self._integers: list[Integers] = []
        self.calls = [self._bind(one, workspace) for one in tape.steps]

    def _bind(self, one: Step, workspace: Workspace) -> Call:
        if one.inside is not None:
            calls = [self._bind(other, workspace) for other in one.inside]
            return _refill, [workspace.held, self._keys, *one.arguments, calls]
        function, arguments = one.function, list(one.arguments)
        if function is None:
            self._integers.append(Integers())
            function, arguments = workspace.gemm.call(self._integers[-1], *arguments)
        for i, argument in enumerate(arguments):
            if isinstance(argument, Place):
                base = self._memory[argument.memory]
                if base is None:
                    self._patches[argument.memory - 1].append((arguments, i, argument))
                else:
                    arguments[i] = located(base, memory_at(base), argument)
        return function, arguments

    def play(self, recording: Recording, workspace: Workspace) -> None:
        at = [*map(int.__add__, workspace.addresses, recording.first)]
        if at != self._at:
            for of_operand, was, now in zip(self._patches, self._at, at, strict=True):
                if was != now:
                    memory = memory_at(now)
                    for arguments, j, place in of_operand:
                        arguments[j] = located(now, memory, place)
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
