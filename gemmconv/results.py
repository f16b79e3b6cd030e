"""Memory of large results, used again once nothing refers to a result or a view of it any more.

For: `empty`, from which every new result comes, every packed filter and what its packing needs, and `clear`. It must
not know what a result is of. malloc returns an array of 32 MiB or more to the system when it is dropped, a smaller one
too if nothing is behind it on the heap, and the next one begins with fresh pages, which the system clears first: for a
layer that is bounded by writing its output up to half of the time. So some of that memory is kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# glibc's malloc, DEFAULT_MMAP_THRESHOLD: it returns what is larger to the system until larger ones have been returned,
# which those that are kept never are.
LEAST_BYTES = 1 << 17
# Of memory that is idle, and of how many results. A result takes it if that is at most a quarter larger than itself.
MOST_IDLE_BYTES = 128 << 20
_MOST_IDLE = 32
_LARGER = 1.25

# By identity, the first to become idle first. No lock: single operations on a dict are atomic, so that a fork, an
# interrupt or a result that is dropped in the middle of any of them cannot leave one behind.
_idle: dict[int, Array] = {}


class _Lease:
    """What NumPy makes a result of. Results and their views refer to it; when none is left the memory becomes idle."""

    __slots__ = ("__array_interface__", "_memory")

    def __init__(self, memory: Array) -> None:
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self, idle: dict[int, Array] = _idle, most: int = MOST_IDLE_BYTES, many: int = _MOST_IDLE) -> None:
        # Defaults, since the module's names may be gone when Python exits.
        memory = getattr(self, "_memory", None)  # none if an interrupt came before
        if memory is None or memory.nbytes > most:
            return
        idle[id(memory)] = memory
        while len(idle) > many or sum(kept.nbytes for kept in list(idle.values())) > most:
            try:
                idle.pop(next(iter(idle)))
            except (KeyError, StopIteration, RuntimeError):  # another thread has taken or left some
                continue


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return a new C-contiguous array whose values are arbitrary."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_BYTES:
        return np.empty(shape, dtype)
    memory = _taken(size)
    if memory is None:
        memory = np.empty(shape, dtype).reshape(-1).view(np.uint8)
    return np.asarray(_Lease(memory))[:size].view(dtype).reshape(shape)


def clear() -> bool:
    """Free the memory that is idle; whether there was any."""
    found = bool(_idle)
    _idle.clear()
    return found


def _taken(size: int) -> Array | None:
    """Take idle memory for so many bytes, the last to become idle that fits."""
    for key, memory in reversed(list(_idle.items())):
        if size <= memory.nbytes <= size * _LARGER and _idle.pop(key, None) is not None:
            return memory
    return None
