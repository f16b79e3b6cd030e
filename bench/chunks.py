"""`chunks`: what cutting a result costs, in one call, in threads of Dask and in processes of Dask, as chunks shrink.

Run as a process of its own, `python -m bench.chunks EDGE ROUNDS`, it prints a row of JSON for each size of chunks: the
median seconds of each route, in rounds that take each in turn. Routes compute the same up-sampling on the same cores:

- direct: one call of the plan, into an array that is there
- boxes: `compute_stored`, one box after the other, each by all cores
- threads: `gemmconv.dask` on Dask's threads, a task a core, stored into an array
- file: `compute_stored` from a .npy file to a .npy file
- processes: `gemmconv.dask` on a LocalCluster with a process a core, from a .npy file to a .npy file
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import distributed
import numpy as np

import gemmconv
import gemmconv.dask
from gemmconv.files import NpyFile
from gemmconv.machine import usable_cores

CIN, COUT, KERNEL, STRIDE = 16, 8, 4, 2
# Chunks have an edge of the result's, of half of it, and so on.
HALVINGS = 4
Array = np.ndarray[Any, Any]


def geometry(edge: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of value and filter whose result has an edge of `edge`."""
    return (1, *(edge // STRIDE,) * 3, CIN), (*(KERNEL,) * 3, COUT, CIN)


def factor_read(edge: int, chunk: int) -> float:
    """The formula: bytes of windows over bytes of the value.

    A chunk [o, o + c) of an axis needs coarse positions ceil((o + lo - K + 1) / s) to floor((o + c - 1 + lo) / s), as
    far as there are such; the factor is the product over axes of their sum over n.
    """
    n, lo = edge // STRIDE, (KERNEL - STRIDE) // 2
    read = 0
    for o in range(0, edge, chunk):
        last = min(o + chunk, edge) - 1
        read += min(n - 1, (last + lo) // STRIDE) - max(0, -((KERNEL - 1 - o - lo) // STRIDE)) + 1
    return float((read / n) ** 3)


def load(block: Array, path: str, block_info: Any = None) -> Array:
    """Read a chunk of a .npy file: where it is that a worker needs it."""
    (place,) = [info["array-location"] for key, info in block_info.items() if key == 0]
    return np.array(np.load(path, mmap_mode="r")[tuple(slice(*span) for span in place)])


def save(block: Array, path: str, block_info: Any = None) -> Array:
    """Write a chunk to a .npy file."""
    out = np.load(path, mmap_mode="r+")
    out[tuple(slice(*span) for span in block_info[0]["array-location"])] = block
    return np.zeros((1,) * block.ndim, np.int8)


class Routes:
    """The routes for one size of chunks; each is a function that computes the whole result."""

    def __init__(self, edge: int, folder: Path, client: distributed.Client) -> None:
        shape, filter = geometry(edge)
        rng = np.random.default_rng(1)
        self.value = rng.standard_normal(shape, np.float32)
        self.filter = rng.standard_normal(filter, np.float32)
        self.plan = gemmconv.plan_conv3d_transpose(shape, filter, strides=STRIDE)
        self.out = np.zeros(self.plan.output_shape, np.float32)
        self.source, self.target = folder / "value.npy", folder / "out.npy"
        np.save(self.source, self.value)
        np.save(self.target, self.out)
        self.client = client

    def of(self, chunk: int) -> dict[str, Callable[[], object]]:
        """The functions by name."""
        plan, out = self.plan, self.out
        sizes = (1, chunk, chunk, chunk, COUT)
        chunks = da.core.normalize_chunks(sizes, plan.output_shape)
        coarse = (1, *(max(1, chunk // STRIDE),) * 3, CIN)
        lazy = gemmconv.dask.conv3d_transpose(
            da.from_array(self.value, chunks=coarse), self.filter, strides=STRIDE, chunks=sizes
        )
        empty = da.zeros(self.value.shape, chunks=coarse, dtype=np.float32)
        read = empty.map_blocks(load, str(self.source), dtype=np.float32)
        far = gemmconv.dask.conv3d_transpose(read, self.filter, strides=STRIDE, chunks=sizes)
        written = far.map_blocks(save, str(self.target), dtype=np.int8, chunks=(1,) * 5)

        def in_boxes(value: Any, target: Any) -> object:
            return gemmconv.compute_stored(plan, value, self.filter, target, chunks=chunks)

        return {
            "direct": lambda: plan(self.value, self.filter, out=out),
            "boxes": lambda: in_boxes(self.value, out),
            "threads": lambda: lazy.store(out, lock=False, scheduler="threads", num_workers=usable_cores()),
            "file": lambda: in_boxes(NpyFile(self.source), NpyFile(self.target, writable=True)),
            "processes": lambda: self.client.compute(written).result(),
        }

    def read_bytes(self, chunk: int) -> int:
        """Bytes of the windows of all chunks."""
        windows = (part.windows[0] for part in self._parts(chunk))
        return sum(math.prod(int(span.stop - span.start) for span in window) for window in windows) * 4

    def more_memory(self, chunk: int) -> int:
        """Peak bytes of a chunk in the middle beyond its window and itself, as Python traces memory."""
        parts = list(self._parts(chunk))
        part = parts[len(parts) // 2]
        one = gemmconv.plan_conv3d_transpose(*geometry(self.out.shape[1]), strides=STRIDE, workers=1).part(part.bounds)
        window = self.value[one.windows[0]].copy()
        gemmconv.clear_cache()
        tracemalloc.start()
        result = one(window, self.filter)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak - result.nbytes

    def _parts(self, chunk: int) -> Iterator[Any]:
        chunks = da.core.normalize_chunks((1, chunk, chunk, chunk, COUT), self.plan.output_shape)
        return (self.plan.part(box) for box in self.plan.boxes(chunks))


def rows(edge: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each size of chunks."""
    cores = usable_cores()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(dask.config.set({"distributed.worker.memory.target": False}))
        cluster = stack.enter_context(
            distributed.LocalCluster(
                n_workers=cores, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0
            )
        )
        routes = Routes(edge, folder, stack.enter_context(distributed.Client(cluster)))
        for chunk in (edge >> i for i in range(HALVINGS)):
            found: dict[str, list[float]] = {}
            functions = routes.of(chunk)
            for turn, (name, run) in itertools.product(range(rounds + 1), functions.items()):
                start = time.perf_counter()
                run()
                if turn:  # the first is for warming up
                    found.setdefault(name, []).append(time.perf_counter() - start)
            size = routes.plan.problem.dtype.itemsize
            yield {
                "chunk": chunk,
                "chunk_bytes": chunk**3 * COUT * size,
                "tasks": math.ceil(edge / chunk) ** 3,
                "seconds": {name: statistics.median(each) for name, each in found.items()},
                "read": routes.read_bytes(chunk) / routes.value.nbytes,
                "read_by_formula": factor_read(edge, chunk),
                "more_bytes": routes.more_memory(chunk),
                "equal": bool(np.allclose(np.load(routes.target, mmap_mode="r")[0, 0], routes.out[0, 0], atol=1e-3)),
            }


def main(arguments: Sequence[str]) -> None:
    """Print the rows."""
    for row in rows(*map(int, arguments)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
