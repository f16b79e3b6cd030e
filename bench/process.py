"""Workers as the bench sees them: started in an environment of their own, stopped while others are timed, ended."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from bench import wire
from bench.contenders import Spec

ROOT = Path(__file__).parents[1]
# What changes the kernels that a BLAS picks on its own; taken away unless --keep-env.
REMOVED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)  # fmt: skip
START_SECONDS = 120.0


class Lost(Exception):  # noqa: N818 - a result of the contender's, not an error of the bench
    """A worker was lost: `status` is 'hung' or 'died'."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def environment(workers: int, keep: bool, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a contender: thread counts set, the choosers of kernels removed."""
    found = dict(os.environ if environ is None else environ)
    for name in () if keep else REMOVED:
        found.pop(name, None)
    return found | dict.fromkeys(THREAD_VARIABLES, str(workers))


def pinned_cpus(workers: int) -> list[int] | None:
    """The CPUs that contenders with so many workers are pinned to: the last ones; None where it cannot be done."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    return usable[-workers:]


class Process:
    """One worker process in a session of its own, so that whatever it starts is stopped and ended with it."""

    def __init__(self, workers: int, keep_env: bool = False, python: str = sys.executable) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        down, self._requests = os.pipe()
        self._answers, up = os.pipe()
        cpus = pinned_cpus(workers)

        def prepare() -> None:  # in the child, before it becomes Python again
            if cpus is not None:
                os.sched_setaffinity(0, cpus)
            if sys.platform == "linux":  # a stopped worker must not outlive a bench that is killed
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

        self._process = subprocess.Popen(
            [python, "-m", "bench.worker", str(down), str(up)],
            cwd=None,
            env=environment(workers, keep_env) | {"PYTHONPATH": _python_path()},
            pass_fds=(down, up),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=prepare,
        )
        os.close(down)
        os.close(up)
        self.alive = True
        self._stopped = False

    def ask(self, do: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; a worker that is lost is ended, and raises Lost."""
        self.resume()
        try:
            wire.send(self._requests, {"do": do} | arguments)
            return wire.receive(self._answers, timeout_s)
        except wire.Late:
            self.close()
            raise Lost("hung", f"no answer to '{do}' in {timeout_s:g} s") from None
        except wire.Closed:
            status, tail = self._ending(), self._tail()
            self.close()
            raise Lost("died", f"the process {status} during '{do}'{tail}") from None

    def stop(self) -> None:
        """Stop the process and all it has started, and wait until it is."""
        if self.alive and not self._stopped:
            self._signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            self._stopped = True

    def resume(self) -> None:
        """Let it go on."""
        if self.alive and self._stopped:
            self._signal(signal.SIGCONT)
            self._stopped = False

    def close(self) -> None:
        """End it and all it has started."""
        if self.alive:
            self.alive = False
            self._signal(signal.SIGKILL)
            self._process.wait()
            os.close(self._requests)
            os.close(self._answers)
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _ending(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its pipes"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def _tail(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"; its last words: {lines[-1][:200]}" if lines else ""


class Member(Process):
    """A contender's process, with what it said when it started."""

    def __init__(self, spec: Spec, workers: int, keep_env: bool = False) -> None:
        super().__init__(workers, keep_env, spec.python)
        start = time.perf_counter()
        self.hello = self.ask("start", START_SECONDS, spec=dataclasses.asdict(spec), workers=workers)
        self.start_seconds = time.perf_counter() - start
        self.stop()


def _python_path() -> str:
    """The checkout in front, so that workers find this bench wherever the command was given."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
