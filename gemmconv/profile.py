"""Where the time of calls goes: a clock of phases, off unless somebody looks.

`profile()` collects what the calls of its `with` block spent on each phase, in worker-seconds. The engine asks
`current()` once a call; a worker of a profiled call has a `Clock`, of any other call None. This module knows nothing of
plans and lowerings, and imports nothing of the package.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PHASES = ("pack", "gemm", "col2im", "store", "wait", "overhead")


class Profile:
    """Time of calls by phase.

    Attributes
    ----------
    seconds : dict of str to float
        Worker-seconds by phase. 'pack': bringing rows or the filter into the order that GEMM takes, zeros around them
        included; 'gemm': products, and in col2im the widening of half precisions for them; 'col2im': adding columns,
        and in winograd combining sums to results; 'store': writing results into the output; 'wait': workers
        without a block, before their first and after their last; 'overhead': all else, such as checking arguments,
        allocating the output and the steps between the others.
    worker_seconds : float
        Wall-clock time of the calls times their workers, of which `seconds` are the parts.
    calls : int
        Calls that have ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.worker_seconds = 0.0
        self.calls = 0
        self._lock = threading.Lock()

    def add(self, seconds: dict[str, float], workers: int, call_s: float, copy_s: float) -> None:
        """Add one call: its phases, and what is none of them for all its workers, a last copy of the result apart."""
        rest = workers * (call_s - copy_s) - sum(seconds.values())
        with self._lock:
            for phase, time_s in (*seconds.items(), ("store", workers * copy_s), ("overhead", rest)):
                self.seconds[phase] += time_s
            self.worker_seconds += workers * call_s
            self.calls += 1


class Clock:
    """The phases of one worker: a call of it ends a phase, which began where the one before ended."""

    __slots__ = ("last", "seconds")

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def start(self) -> None:
        """Begin a phase; what has passed since the last one is nobody's."""
        self.last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


_current: ContextVar[Profile | None] = ContextVar("gemmconv_profile", default=None)


def current() -> Profile | None:
    """Return the profile that calls of this thread and context are to be added to."""
    return _current.get()


@contextmanager
def profile() -> Iterator[Profile]:
    """Collect where the calls in a `with` block spend their time, in this thread and context only.

    Yields
    ------
    Profile
        Filled as calls end.

    Examples
    --------
    >>> import numpy as np
    >>> import gemmconv
    >>> x, w = np.ones((1, 8, 8, 8, 16), np.float32), np.ones((3, 3, 3, 16, 16), np.float32)
    >>> with gemmconv.profile() as p:
    ...     y = gemmconv.conv3d_transpose(x, w, strides=2)
    >>> p.calls, sorted(p.seconds) == sorted(["pack", "gemm", "col2im", "store", "wait", "overhead"])
    (1, True)
    >>> sum(p.seconds.values()) >= 0.95 * p.worker_seconds
    True
    """
    found = Profile()
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)
