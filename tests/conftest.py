"""Packing and some blocks of a fifth of all problems are recorded too, and played back elsewhere: `tape_checked`."""

from zlib import crc32

import numpy as np
import pytest

from gemmconv.lowerings import Operands, Workspace, recorder, tape

SENTINEL = 0xA5
AS_IT_IS = tape.Tapes._do


def moved(array: np.ndarray, *, empty: bool = False) -> np.ndarray:
    """Return a copy with the same strides, or what is recognised as never written."""
    if array.size == 0:
        return array
    first, stop = recorder.bounds_of(array)
    at = array.__array_interface__["data"][0] - first
    memory = np.full(stop - first, SENTINEL, np.uint8)
    found = np.ndarray(array.shape, array.dtype, memory, at, array.strides)
    if not empty:
        found[...] = array
    return found


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape, -1)


@pytest.fixture(autouse=True)
def tape_checked(monkeypatch):
    """Have packing and two blocks recorded, and played with all they take lying elsewhere, to the same bits."""

    def do(self, key, does, operands, workspace):
        count, packs = self._schedule.count, isinstance(key, tuple)
        block = key if packs or key >= 0 else ~key
        if not (packs or block in {count // 3, count - 1}) or crc32(repr(self._schedule.problem).encode()) % 5:
            AS_IT_IS(self, key, does, operands, workspace)
            return
        workspace.begin(operands)
        to = "packed" if packs else "output"
        first = operands._replace(**{to: moved(getattr(operands, to), empty=True)})
        recording = recorder.Recorder(workspace, first, most=1 << 30)
        try:
            does(recording.operands, recording)
        except recorder.CannotRecordError:
            if not packs:  # taps that are not evenly apart are copied by an index
                raise
            AS_IT_IS(self, key, does, operands, workspace)
            return
        written = (bits(getattr(first, to)) != SENTINEL).any(axis=-1)
        np.copyto(getattr(operands, to), getattr(first, to), where=written)
        value, filter, output, packed = (moved(array, empty=array is getattr(operands, to)) for array in operands[:4])
        second = Operands(
            value, filter, output, packed, operands.steps, None if operands.bias is None else moved(operands.bias)
        )
        other = Workspace(workspace.size, workspace.gemm.dtype)
        other._memory[:] = SENTINEL
        other.begin(second)
        played = recording.recording()
        played = played._replace(tape=played.tape.joined())
        bound = other.bound[id(played.tape)] = tape.Bound(played.tape, other)
        bound.made[:] = SENTINEL
        assert played.tape.strides == other.strides
        tape.play(played, other)
        found, want = (bits(getattr(of, to)) for of in (second, first))
        assert np.array_equal(found, want), "a tape gives other bits than its block"

    monkeypatch.setattr(tape.Tapes, "_do", do)
    return AS_IT_IS
