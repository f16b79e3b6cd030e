"""Worker threads, how many of them, and how the blocks of a call are dealt to them.

For: `run`, which executes the blocks of a call; `resolve_workers`, `set_workers` and `get_workers` behind every
`workers` argument; `describe` for `show_config()`. It must not know what a task computes, call BLAS, set an environment
variable, or leave a setting of the process changed once no call runs. Of the package it imports `limit`, which holds
BLAS to one thread, and `machine`.

An interrupt can cut the main thread off after any bytecode. So settings are made and restored on pool threads; a caller
only waits, can be cut off anywhere (`_drive`), and takes no lock that a pool thread needs: `with lock` itself is not
safe from an interrupt in every version of Python.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar
from operator import index as as_index
from queue import Empty, SimpleQueue
from typing import Any, SupportsIndex

import numpy as np

from gemmconv.limit import Limit, count_fork
from gemmconv.machine import usable_cores

Task = Callable[[int, int], None]

# A pool thread that others wait for leaves a call after this time, between two indices, and queues up again.
SLICE_S = 0.01

_workers: ContextVar[int | None] = ContextVar("gemmconv_workers", default=None)
_in_task: ContextVar[bool] = ContextVar("gemmconv_in_task", default=False)

# Copied for every task. NumPy >= 2 keeps error state and buffer size in a context variable.
_context = Context()
_context.run(np.seterr, all="ignore")
_context.run(_in_task.set, True)


def get_workers() -> int:
    """Workers that `workers=None` stands for here: `set_workers`' number, else BLAS' own, at most the usable cores."""
    chosen = _workers.get()
    if chosen is None:
        _load()
    return max(1, min(_limit.allowed() if chosen is None else chosen, usable_cores()))


@contextmanager
def set_workers(workers: SupportsIndex) -> Iterator[None]:
    """Default number of workers in a `with` block, in this thread and context only, as `scipy.fft.set_workers`.

    Parameters
    ----------
    workers : int
        As any function's `workers`: at least 1, or negative to count from the end (-1: all usable cores). Not None.

    Examples
    --------
    >>> import gemmconv
    >>> with gemmconv.set_workers(1):
    ...     gemmconv.get_workers()
    1
    """
    token = _workers.set(_checked(workers, "set_workers", "an integer"))
    try:
        yield
    finally:
        _workers.reset(token)


def resolve_workers(workers: SupportsIndex | None, function: str = "gemmconv") -> int:
    """Threads to use for a `workers` argument, from 1 to the usable cores; `function` is named in errors.

    None is `get_workers()`; -1 all usable cores, -2 one less, ...; more than the usable cores is all of them.
    """
    return get_workers() if workers is None else _checked(workers, function, "an integer or None")


def _checked(workers: SupportsIndex, function: str, rule: str) -> int:
    try:
        if isinstance(workers, bool | np.bool_):
            raise TypeError
        number = as_index(workers)
    except TypeError:
        raise TypeError(f"{function}: workers must be {rule}, got {workers!r} ({type(workers).__name__})") from None
    cores = usable_cores()
    if number == 0 or number < -cores:
        raise ValueError(
            f"{function}: workers={number} is out of range: it must be at least 1, or -{cores} to -1 to count from the "
            f"end of the {cores} cores this process may use (affinity and cgroup quota)"
        )
    return min(number, cores) if number > 0 else cores + 1 + number


def run(task: Task, count: int, workers: int, *, limit_blas: bool = True, alike: bool = True) -> None:
    """Call `task(index, slot)` once for every index in range(count), by up to `workers` threads.

    A task runs in a context of its own in which NumPy ignores floating point errors. Tasks that are at work at the same
    time have different slots, from 0 to workers - 1. A slot is the same thread's from call to call, as far as possible,
    and so is its share of the indices: what they have written is in the cache of its CPU. If tasks are `alike` shares
    are as large as each other, and indices in them follow each other; otherwise a share is the first index or the
    second and so on, and the others are handed out in order. Last, the ends of shares that are left.

    With `limit_blas` every loaded BLAS is held to one thread until the call ends; without it a single worker is the
    calling thread.

    The first exception of a task, or of the wait (an interrupt), stops the handing out of indices; it is raised when
    every task has ended and every setting is restored. RuntimeError: a task called this.

    RuntimeWarning: a BLAS cannot be held to one thread, and the call has one worker. It is given before the first task,
    so that none runs if warnings are errors, or after the last one if somebody changed the number in the meantime.
    """
    if _in_task.get():
        raise RuntimeError("gemmconv: a task of a running call must not start another one: it could wait for itself")
    workers = min(workers, count)
    if workers < 1:
        return
    if workers == 1 and not limit_blas:
        for index in range(count):
            _context.copy().run(task, index, 0)
        return
    _load()
    if not limit_blas:
        call = _drive(_Call(task, count, workers, limited=False, alike=alike))
    else:
        if _limit.never and workers > 1:
            _warn(workers, [_limit.never])
            workers = 1
        call = _held(task, count, workers, alike)
        if call.refused:
            _warn(workers, call.problems)
            call = _drive(_Call(task, count, 1, tolerant=True))
    error, call.error = call.error, None
    if error is not None:
        try:
            raise error
        finally:
            del error  # else the traceback, which holds this frame, would keep the task's arrays for the collector
    if call.problems and not call.tolerant:
        _warn(workers, call.problems)


def describe() -> dict[str, Any]:
    """Facts for `show_config()`, JSON-able. Holds BLAS for a moment to see whether it can be held."""
    _load()
    if not _in_task.get():
        _held(_nothing, 1, 1, True)
    return {
        "workers": get_workers(),
        "pool_threads": _pool.size,
        "limit": _limit.never or "one BLAS thread while a call runs",
        "held": [{"library": pool.name, "threads": pool.threads(), "problem": pool.problem} for pool in _limit.pools],
    }


def _load() -> None:
    if not _limit.loaded:
        # On a pool thread: a callback in threadpoolctl 3.5 swallows an interrupt, and would find only some pools.
        call = _drive(_Call(_limit.search, 1, 1, limited=False))
        if call.error is not None:
            raise call.error


def _nothing(index: int, slot: int) -> None:
    pass


def _warn(workers: int, problems: list[str]) -> None:
    level, frame = 1, sys._getframe()  # the first frame outside of the package is the one to blame
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "gemmconv":
        level, frame = level + 1, frame.f_back
    text = f"gemmconv: 1 worker instead of {workers}" if workers > 1 else "gemmconv: more threads than the 1 worker"
    text = f"{text}, as BLAS could not be held to one thread: {'; '.join(problems)}"
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def _held(task: Task, count: int, workers: int, alike: bool) -> _Call:
    call = _drive(_Call(task, count, workers, alike=alike))
    if call.refused:
        # From threadpoolctl 3.8 on only the thread that set a limit may change it. If that is this one, it waits here.
        for pool in _limit.pools:
            pool.give_up(force=False)
        call = _drive(_Call(task, count, workers, alike=alike))
    return call


class _Call:
    """One call of `run`: what its workers share. A token (call, number) lets one pool thread at a time work."""

    def __init__(
        self, task: Task, count: int, workers: int, *, limited: bool = True, tolerant: bool = False, alike: bool = True
    ) -> None:
        self.task = task
        self.workers = min(workers, _pool.fit(workers))
        self.shares = _shares(count, self.workers, alike)  # of each slot, and of all
        self.free = set(range(self.workers))  # slots
        self.cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.limited, self.tolerant = limited, tolerant
        self.started = self.held = self.refused = self.opened = False
        self.closed = False  # no index is handed out any more
        self.ended = self.finished = False  # the last worker is about to leave; it has left
        self.active = 0  # threads inside of serve()
        self.problems: list[str] = []
        self.error: BaseException | None = None
        self.lock = _thread.allocate_lock()  # of the pool threads
        self.ready = _thread.allocate_lock()  # held until the first token has set the limit, or has given up
        self.ready.acquire()
        self.done = _thread.allocate_lock()  # what the caller waits on; an Event can stay locked when interrupted
        self.done.acquire()

    def cpus_of(self, thread: int) -> list[int]:
        """CPUs for a pool thread: disjoint sets for as many threads as the call has workers, all of them for one.

        Left alone, Linux wakes a thread on the CPU of the one that wakes it, as passing on the GIL does all the time,
        and two workers share one CPU for tens of milliseconds while the other idles.
        """
        apart = 1 < self.workers <= len(self.cpus)
        return self.cpus[thread % self.workers :: self.workers] if apart else self.cpus

    def serve(self, token: int, thread: int) -> None:
        """Work on indices until there are none, or until others wait: on a pool thread."""
        with self.lock:
            self.active += 1  # before `closed` is read: _settle() sets that and then reads this
            own = thread % self.workers
            slot = own if own in self.free else min(self.free)
            self.free.remove(slot)
        again = False
        try:
            if not self.closed and self._ready(token):
                again = self._work(slot)
                self.closed |= not again
        except BaseException as error:  # run() raises it
            self.closed = True
            self.error = self.error or error
        self.free.add(slot)  # before there is another token
        if token == 0:
            self._open()
        if again:
            _pool.submit(self, token)
        with self.lock:
            self.active -= 1
            last = self.closed and self.active == 0 and not self.ended
            self.ended |= last
        if last:
            self.task = _nothing  # a token that is left in the queue must not keep arrays alive
            try:
                if self.held:
                    _limit.leave()
            finally:
                self.finished = True
                self.done.release()

    def _ready(self, token: int) -> bool:
        if token > 0:
            with self.ready:
                pass
            if self.closed or not self.started:
                return False
        if token > 0 or self.started:
            problems = _limit.enter(begins=False) if self.limited and not self.tolerant else []
            self.problems = self.problems or problems
            return token == 0 or not problems  # the first one goes on in any case
        self.started = True
        if self.limited:
            self.held = True
            self.problems = _limit.enter(begins=True)
            if self.problems and not self.tolerant:
                self.refused = self.closed = True
                return False
        self._open()
        return True

    def _open(self) -> None:
        """Let the others begin; called by whoever has the first token."""
        if not self.opened:
            self.opened = True
            self.ready.release()

    def _work(self, slot: int) -> bool:
        task, waiting, end_s = self.task, _pool.tokens.qsize, time.perf_counter() + SLICE_S
        while (index := self._taken(slot)) is not None:
            _context.copy().run(task, index, slot)
            if self.closed:
                break
            if waiting() and time.perf_counter() > end_s:
                return True
        return False

    def _taken(self, slot: int) -> int | None:
        """Take the next index of a slot's share or of all slots', or the last one of the longest share."""
        shares = self.shares
        with self.lock:
            for of in (slot, self.workers):
                if shares[of]:
                    index, shares[of] = shares[of][0], shares[of][1:]
                    return index
            of = max(range(self.workers), key=lambda i: len(shares[i]))
            if not shares[of]:
                return None
            index, shares[of] = shares[of][-1], shares[of][:-1]
            return index


def _shares(count: int, workers: int, alike: bool) -> list[range]:
    """Return intervals of indices, one for each worker and one of which all take the next; see `run`."""
    each, longer = divmod(count, workers) if alike else (1, 0)
    starts = [min(count, i * each + min(i, longer)) for i in range(workers + 1)]
    return list(map(range, starts, [*starts[1:], count]))


class _Pool:
    """The threads of all calls. They are started when a token finds all others busy, and never end."""

    def __init__(self) -> None:
        self.tokens: SimpleQueue[tuple[_Call, int]] = SimpleQueue()
        self.lock = _thread.allocate_lock()  # of the pool threads
        self.most = self.size = self.busy = 0

    def fit(self, workers: int) -> int:
        if workers > self.most:
            self.most = max(self.most, usable_cores())
        return self.most

    def submit(self, call: _Call, token: int) -> None:
        self.tokens.put((call, token))
        if self.busy >= self.size:
            self._grow()

    def _grow(self) -> None:
        if self.size >= self.most:
            return
        try:
            # Not threading.Thread, whose start() waits on an Event. Such a thread does not keep Python from exiting.
            _thread.start_new_thread(self._loop, ())
        except RuntimeError:
            # The system's limit, or the main thread has ended (Python 3.12). Threads that are there will do it, else
            # this one, but not where an interrupt could break the limit.
            if self.size > 0:
                return
            if threading.current_thread() is threading.main_thread():
                raise
            self._drain()

    def _drain(self) -> None:
        while True:
            try:
                call, token = self.tokens.get_nowait()
            except Empty:
                return
            call.serve(token, 0)

    def _loop(self) -> None:
        with self.lock:
            if self.size >= self.most:
                return
            number = self.size
            self.size += 1
        threading.current_thread().name = "gemmconv"
        if threading.gettrace() is not None:  # a debugger's or a coverage tool's, that threading.Thread would set
            sys.settrace(threading.gettrace())
        cpus: list[int] = []
        try:
            while True:
                call, token = self.tokens.get()
                with self.lock:
                    self.busy += 1
                if cpus != (cpus := call.cpus_of(number)):
                    with suppress(OSError):  # the CPUs this process may use have just changed: any will do
                        os.sched_setaffinity(0, cpus)
                if not self.tokens.empty():  # together with submit()'s look at `busy` no token is left unseen
                    self._grow()
                call.serve(token, number)
                with self.lock:
                    self.busy -= 1
        finally:
            with self.lock:
                self.size -= 1


def _drive(call: _Call) -> _Call:
    """Have the call done; the calling thread may be interrupted anywhere in here."""
    try:
        for token in range(call.workers):  # all at once, since waking a thread takes longer than setting the limit
            _pool.submit(call, token)
        while not call.finished:
            call.done.acquire()
    except BaseException:
        try:
            _settle(call)
        finally:
            _settle(call)  # in case an interrupt hit the one above outside of its own try
        raise
    return call


def _settle(call: _Call) -> None:
    """Return when no task of the call runs nor ever will and no setting is held, however many interrupts arrive."""
    while True:
        try:
            call.closed = True  # whoever enters serve() from now on finds it closed; who is inside counts as active
            while (call.active or call.held) and not call.finished:
                call.done.acquire()
            return
        except BaseException:  # the first interrupt is the one that _drive() raises
            continue


_limit = Limit()
_pool = _Pool()


def _after_fork() -> None:
    global _pool
    _pool = _Pool()
    count_fork()
    _limit.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=count_fork)
    # The lock is taken before, so that no other thread is inside threadpoolctl, which has a lock of its own that a
    # child would inherit locked. Methods of C, so that no interrupt can come between the lock and its release.
    os.register_at_fork(before=_limit.lock.acquire, after_in_parent=_limit.lock.release, after_in_child=_after_fork)
