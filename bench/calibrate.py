"""`calibrate`: the constants of gemmconv/lowerings/cost.py, measured on this machine; nothing is changed.

Each constant is taken from calls like those that lowerings make, alone or in a small fit to some of them, all with
operands that are warm in a core's cache unless their name says otherwise. Half of the constants of cost.py are
measured: the rates of products, steps, additions and copies. The others are corrections for special ways of reading or
turning values, from scripts, and `_BLOCK_S`, the time of Python around a block's steps, which differs from lowering to
lowering.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.optimize

from bench.contenders.roof import Together, hold_blas
from gemmconv.blas import Gemm
from gemmconv.lowerings import cost
from gemmconv.machine import this_machine

Array = np.ndarray[Any, Any]
MEASURES = 80  # about as many calls are timed
REPEATS = 5  # of each, of which the fastest counts
SPILLED_BYTES = 1 << 26
RUNS = (64, 128, 256, 1024)  # values of an inner loop
SHORT_RUNS = (4, 8, 16, 32)
STEPS = 500  # of a thread, one after the other


def shipped() -> dict[str, float]:
    """The constants as they are in cost.py, by name."""
    return {name: float(value) for name, value in vars(cost).items() if isinstance(value, int | float)}


def measure(seconds: float, threads: int) -> dict[str, float]:
    """The constants by name, measured in about so many seconds; steps are taken by so many threads at once."""
    hold_blas()

    def best_s(run: Callable[[], Any]) -> float:
        timer = timeit.Timer(run)
        timer.timeit(1)
        number = max(1, int(seconds / MEASURES / REPEATS / max(1e-7, timer.timeit(1))))
        return min(timer.repeat(REPEATS, number)) / number

    cached = this_machine().l2_bytes // 32  # values: two arrays of them are a quarter of the cache
    found = products(best_s)
    found |= steps(best_s, threads)
    found |= additions(best_s, cached)
    return found | copies(best_s, cached)


BestS = Callable[[Callable[[], Any]], float]


def gemm_call(m: int, n: int, k: int) -> Callable[[], None]:
    """A product of float32 whose second operand lies as a filter does."""
    a, b, c = (np.ones(size, np.float32) for size in (m * k, n * k, m * n))
    gemm = Gemm(a.dtype)
    x, w, y = (array.ctypes.data for array in (a, b, c))
    return lambda held=(a, b, c): gemm(m, n, k, x, k, False, w, k, True, y, n)  # type: ignore[misc]


def products(best_s: BestS) -> dict[str, float]:
    """A rate and half sizes, from products of many sizes; the rates of small products and of vectors."""
    sizes = [(m, n, k) for m in (16, 64, 256, 1024) for n in (16, 64, 256) for k in (16, 64, 256)]
    alone_s = best_s(gemm_call(1, 1, 1))
    measured = np.array([best_s(gemm_call(*size)) for size in sizes])

    def error(parameters: Array) -> Array:
        halves = np.array(sizes) + np.exp(parameters[1:])
        found: Array = np.log((alone_s + 2 * halves.prod(axis=1) / np.exp(parameters[0])) / measured)
        return found

    start = np.log([cost._GEMM_FLOPS_PER_S, cost._HALF_M, cost._HALF_N, cost._HALF_K])
    rate, m, n, k = np.exp(scipy.optimize.least_squares(error, start).x)
    found = {"_GEMM_FLOPS_PER_S": rate, "_HALF_M": m, "_HALF_N": n, "_HALF_K": k}
    pieces, filters = np.ones((4, 64, 96, 32), np.float32), np.ones((4, 1, 32, 32), np.float32)
    out = np.empty_like(pieces)
    found["_SMALL_FLOPS_PER_S"] = 2 * out.size * 32 / best_s(lambda: np.matmul(pieces, filters, out=out))
    side = round((SPILLED_BYTES // 4) ** 0.5)
    return found | {"_STREAMED_VALUE_S": best_s(gemm_call(1, side, side)) / side**2}


def steps(best_s: BestS, threads: int) -> dict[str, float]:
    """Steps that do next to nothing, on threads that wait for each other."""

    def many(step: Callable[[], Any]) -> Callable[[], None]:
        def work() -> None:
            for _ in range(STEPS):
                step()

        return work

    def addition() -> Callable[[], Any]:
        x, y = np.ones((8, 8), np.float32), np.ones((8, 8), np.float32)
        return lambda: np.add(x[1:5, 1:5], y[1:5, 1:5], y[1:5, 1:5])

    found = {}
    for name, make in (("_STEP_S", lambda: gemm_call(4, 4, 4)), ("_PASS_STEP_S", addition)):
        together = Together([many(make()) for _ in range(threads)])
        found[name] = best_s(together) / STEPS
        together.close()
    return found


def additions(best_s: BestS, cached: int) -> dict[str, float]:
    """A value and an inner loop, long and short, and values that are apart on both sides."""
    found: dict[str, float] = {}
    for names, runs, buffer in (
        (("_VALUE_S", "_RUN_S"), RUNS, cost.SMALLEST_BUFFER),
        (("_BUFFERED_VALUE_S", "_BUFFERED_RUN_S"), SHORT_RUNS, np.getbufsize()),
    ):
        usual = np.setbufsize(buffer)
        found |= dict(zip(names, fitted(best_s, runs, cached, lambda x, y: np.add(x, y, y)), strict=True))
        np.setbufsize(usual)
    columns, cells = np.ones((cached // 64, 64), np.float32).T, np.ones((64, cached // 32), np.float32)[:, ::2]
    return found | {"SCATTERED_VALUE_S": best_s(lambda: np.add(columns, cells, cells)) / columns.size}


def copies(best_s: BestS, cached: int) -> dict[str, float]:
    """A value and an inner loop, values that are apart on one side, and what memory costs more than cache."""
    value_s, run_s = fitted(best_s, RUNS, cached, lambda x, y: np.copyto(y, x))
    x, y = np.ones((cached // 64, 64), np.float32), np.ones((64, cached // 64), np.float32)
    strided_s = best_s(lambda: np.copyto(y, x.T)) / x.size
    source = np.ones(cached, np.float32)
    target = np.ones((max(1, SPILLED_BYTES // source.nbytes), cached), np.float32)
    spilled_s = best_s(lambda: np.copyto(target, source)) / target.size - value_s
    names = "_COPIED_VALUE_S", "_COPIED_RUN_S", "_STRIDED_VALUE_S", "SPILLED_VALUE_S"
    return dict(zip(names, (value_s, run_s, strided_s, max(0.0, spilled_s)), strict=True))


def fitted(best_s: BestS, runs: Sequence[int], cached: int, call: Callable[[Array, Array], Any]) -> tuple[float, float]:
    """Seconds of a value and of an inner loop, from calls on rows that are apart; what a call costs is fitted too."""
    counts, seconds = [], []
    for run in runs:
        for values in (cached // 4, cached):
            x, y = (np.ones((values // run, 2 * run), np.float32)[:, :run] for _ in range(2))
            counts.append((1, x.size, len(x)))
            seconds.append(best_s(lambda x=x, y=y: call(x, y)))  # type: ignore[misc]
    # Relative errors count, and nothing takes less than no time.
    shares = np.array(counts) / np.array(seconds)[:, None]
    scale = shares.max(axis=0)
    _, value_s, run_s = scipy.optimize.nnls(shares / scale, np.ones(len(shares)))[0] / scale
    return float(value_s), float(run_s)
