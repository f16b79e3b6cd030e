"""The roofs: what sgemm reaches at a layer's sizes, and what a machine's GEMM and copies reach at their best.

The GEMM is the one that gemmconv calls, `gemmconv.blas.Gemm`, with BLAS at one thread and one call a worker at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import threadpoolctl

from bench.contenders.base import Call, Contender, Job
from bench.layers import CONV, FILTER_GRADIENT, TRANSPOSE, Layer

MOST_ROWS, MOST_COLUMNS = 1024, 2048
# A timed roof is as many products as take a millisecond or more, so that the meeting of threads does not count.
BATCH_FLOPS, MOST_REPEATS = 2e8, 1000


def sizes(layer: Layer) -> tuple[int, int, int]:
    """m, n, k of a layer's roof, those of one group: see SIZES."""
    rows, columns = min(layer.rows, MOST_ROWS), min(layer.taps * layer.cout // layer.groups, MOST_COLUMNS)
    cin = layer.cin // layer.groups
    if layer.op == TRANSPOSE:
        return rows, columns, cin
    return (columns, cin, rows) if layer.op == FILTER_GRADIENT else (rows, cin, columns)


# The matrices are positions by channels of the input grid, and by taps and output channels.
SIZES = {
    TRANSPOSE: "k = Cin, n = min(kd*kh*kw*Cout, 2048), m = min(N*D*H*W, 1024)",
    CONV: "k = min(kd*kh*kw*Cout, 2048), n = Cin, m = min(N*D*H*W, 1024)",
    FILTER_GRADIENT: "k = min(N*D*H*W, 1024), n = Cin, m = min(kd*kh*kw*Cout, 2048)",
}


class Together:
    """The same work on several threads at once; a call takes as long as the last of them."""

    def __init__(self, works: list[Callable[[], None]]) -> None:
        self._works = works
        self._start, self._end = (threading.Barrier(len(works)) for _ in range(2))
        self._stop = False
        for work in works[1:]:
            threading.Thread(target=self._follow, args=(work,), daemon=True).start()

    def __call__(self) -> None:
        self._start.wait()
        self._works[0]()
        self._end.wait()

    def _follow(self, work: Callable[[], None]) -> None:
        while True:
            self._start.wait()
            if self._stop:
                return
            work()
            self._end.wait()

    def close(self) -> None:
        """Let the threads end."""
        self._stop = True
        self._start.wait()


def products(m: int, n: int, k: int, dtype: np.dtype[Any], repeats: int, op: str = TRANSPOSE) -> Callable[[], None]:
    """A worker's part: the same product again and again, with operands of its own that lie as the operation's do."""
    from gemmconv.blas import Gemm

    a_lies, b_lies = op == FILTER_GRADIENT, op == TRANSPOSE  # as [k, m], as [n, k]
    lda, ldb = m if a_lies else k, k if b_lies else n
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(size).astype(dtype) for size in (m * k, n * k))
    c = np.zeros((m, n), dtype)
    gemm = Gemm(dtype)
    arrays = a, b, c  # what the addresses below belong to

    def work() -> None:
        x, w, y = (array.ctypes.data for array in arrays)
        for _ in range(repeats):
            gemm(m, n, k, x, lda, a_lies, w, ldb, b_lies, y, n)

    return work


def hold_blas() -> None:
    """Hold every BLAS of this process at one thread, for good."""
    threadpoolctl.threadpool_limits(1, user_api="blas")


class Sgemm(Contender):
    """A layer's roof, measured in the rounds as contenders are; its seconds are those of one product a worker."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self._running: Together | None = None

    def calls(self, job: Job) -> list[Call]:
        """One way; `note` says how many products a call does."""
        if self._running is not None:
            self._running.close()
        m, n, k = sizes(job.layer)
        dtype = np.dtype(np.float32) if job.first.dtype.itemsize == 2 else job.first.dtype
        hold_blas()
        # From the sizes alone, so that every process does as many.
        repeats = max(1, min(MOST_REPEATS, round(BATCH_FLOPS / (2 * m * n * k))))
        self._running = Together([products(m, n, k, dtype, repeats, job.layer.op) for _ in range(job.workers)])
        return [Call(f"m={m}, n={n}, k={k}", self._running, np.asarray, note=str(repeats))]


def machine_roofs(workers: int, l2_bytes: int, memory_bytes: int, rounds: int = 7) -> dict[str, float]:
    """The best of a few rounds: GFLOP/s of a large sgemm, and GB/s (read and written) of copies in L2 and in memory."""
    hold_blas()
    size = 1024
    single = np.dtype(np.float32)
    seconds = _best([products(size, size, size, single, 1) for _ in range(workers)], rounds)
    found = {"sgemm_gflops": workers * 2 * size**3 / seconds / 1e9}
    for name, total, repeats in (
        ("copy_l2_gb_per_s", l2_bytes // 2, 200),
        ("copy_memory_gb_per_s", memory_bytes // workers, 1),
    ):
        count = max(1, total // 8)  # float32, half of the bytes read and half written
        copies = [_copies(np.ones(count, np.float32), np.zeros(count, np.float32), repeats) for _ in range(workers)]
        seconds = _best(copies, rounds if repeats > 1 else 3)
        found[name] = workers * repeats * count * 8 / seconds / 1e9
    return found


def _copies(source: np.ndarray[Any, Any], target: np.ndarray[Any, Any], repeats: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(repeats):
            np.copyto(target, source)

    return work


def _best(works: list[Callable[[], None]], rounds: int) -> float:
    together = Together(works)
    together()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        together()
        seconds.append(time.perf_counter() - start)
    together.close()
    return min(seconds)
