"""Every BLAS of the process held to one thread of its own while calls run, and its number restored behind them.

For threads.py, which holds and restores on pool threads only, since an interrupt can cut the main thread off after any
bytecode.
It must not start a thread, set an environment variable, or leave a number changed once no call runs. It imports nothing
of the package.

What cannot be helped: a `threadpool_limits` that another thread enters while a call runs takes our 1 for the number to
restore; one that another thread has entered before may keep BLAS from being held (`threads.run` warns); and after a
call within one of its own a thread no longer owns its limit (threadpoolctl >= 3.8), which others can change then.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import scipy.linalg.cython_blas  # the BLAS that gemmconv calls has to be loaded before it is looked for
import threadpoolctl

# What the path of a library begins with that SciPy's wheel brings: scipy.libs/... or scipy/.dylibs/...
_SCIPY = os.path.realpath(os.path.dirname(scipy.__file__))

_forks = 0


def count_fork() -> None:
    """To be called in a forked child, and in its parent."""
    global _forks
    _forks += 1


class Limit:
    """All BLAS pools held to one thread while `calls` is not 0; entered and left on pool threads."""

    def __init__(self) -> None:
        self.lock: Any = threading.RLock()  # its release by a thread that does not hold it is an error, not a release
        self.pools: list[BlasPool] = []
        self.never = ""  # why no BLAS can be limited
        self.loaded = False
        self.calls = self.changes = 0

    def search(self, index: int, slot: int) -> None:
        """Find the libraries; a task, for a pool thread."""
        with self.lock:  # no fork meanwhile: the search may hold a lock of the dynamic linker
            if self.loaded:
                return
            found = [BlasPool(controller) for controller in threadpoolctl.ThreadpoolController().lib_controllers]
            self.pools = [pool for pool in found if pool.api == "blas"]
            built = scipy.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {}).get("name", "unknown")
            if not self.pools or built.lower() == "accelerate":
                self.never = f"SciPy's BLAS ('{built}') is none that threadpoolctl can limit"
            if any(getattr(pool.controller, "threading_layer", "") == "openmp" for pool in self.pools):
                # OpenBLAS before 0.3.34 takes its number from OpenMP's of the calling thread.
                self.pools += [pool for pool in found if pool.api == "openmp"]
            self.loaded = True

    def allowed(self) -> int:
        """Threads that SciPy's BLAS is allowed, or was when the first of the calls began that are running."""
        if self.never:
            return 1
        pools = [pool for pool in self.pools if pool.api == "blas"]
        return max(pool.allowed_now(self) for pool in [pool for pool in pools if pool.is_scipys] or pools)

    def enter(self, begins: bool) -> list[str]:
        """Hold every pool as the calling thread sees it; the reasons why some cannot be. `begins`: a `leave` follows.

        Every worker has to: MKL's number and OpenMP's belong to the thread. There it stays 1, the thread being ours.
        """
        with self.lock:
            if begins:
                for pool in self.pools if self.calls == 0 else ():
                    pool.allowed = pool.threads()
                self.calls += 1
                self.changes += 1
            return [problem for pool in self.pools if (problem := pool.hold())]

    def leave(self) -> None:
        with self.lock:
            try:
                for pool in self.pools if self.calls == 1 else ():
                    pool.restore()
            finally:
                self.changes += 1
                self.calls -= 1

    def reset(self) -> None:
        """In a forked child, where no call is running."""
        self.lock._at_fork_reinit()
        for pool in self.pools:
            pool.restore()
        self.calls = 0


class BlasPool:
    """The thread pool of one library. `before` is the number to restore, None while nothing is to be restored."""

    def __init__(self, controller: Any) -> None:
        self.controller = controller
        self.api: str = controller.user_api
        self.name = os.path.basename(controller.filepath)
        self.is_scipys = os.path.realpath(controller.filepath).startswith(_SCIPY)
        self.before: int | None = None
        self.allowed: int | None = None
        self.problem = ""
        self.forks = 0

    def threads(self) -> int | None:
        number = self.controller.num_threads
        return None if number is None else int(number)

    def set(self, number: int) -> None:
        if self.forks == _forks or not hasattr(os, "sched_setaffinity"):
            self.controller.set_num_threads(number)
            return
        # OpenBLAS ends its threads before a fork and starts new ones in here, which inherit the CPUs of this thread.
        cpus, self.forks = os.sched_getaffinity(0), _forks
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))  # the main thread's
        try:
            self.controller.set_num_threads(number)
        finally:
            os.sched_setaffinity(0, cpus)

    def allowed_now(self, limit: Limit) -> int:
        # Lock-free: a call that began or ended in between shows in `changes`, one that runs all the while in `calls`.
        changes, number = limit.changes, self.threads()
        if number == 1 and (limit.calls or limit.changes != changes):
            number = self.allowed
        return number or 1

    def hold(self) -> str:
        number, free, self.problem = self.threads(), self.before is None, ""
        if number == 1:
            return ""
        if free:
            self.before = number  # before it is set: a fork must find it
        self.set(1)
        after = self.threads()
        if after != 1:
            owned = ": another thread has limited it" if hasattr(self.controller, "clear_controlling_thread") else ""
            self.problem = f"{self.name} stays at {after} after it was set to 1{owned}"
            self.before = None if free else self.before
        return self.problem

    def restore(self) -> None:
        if self.before is not None:
            # threadpoolctl >= 3.8 silently ignores every thread but the one that set the 1, which may be another one.
            self.give_up(force=True)
            if self.threads() == 1:
                self.set(self.before)
            self.give_up(force=True)  # else no other thread could ever set a limit
            self.before = None

    def give_up(self, force: bool) -> None:
        if hasattr(self.controller, "clear_controlling_thread"):
            self.controller.clear_controlling_thread(force=force)
