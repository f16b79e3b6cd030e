"""The family on Dask arrays: lazy, a chunk of the result a task, each with the window of the operands that it needs.

Each function takes what the one of its name in gemmconv takes, with Dask arrays for operands, and `chunks` instead of
`out`. The checks, texts and plans are those; the plan is made once, from shapes, and cut in parts (`Plan.part`). The
graph has one layer over the chunks of the result. No other module imports Dask, which is an extra of the package.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.utils import parse_bytes

from gemmconv import nn
from gemmconv.arrays import Unread
from gemmconv.calls import Described, lowered, ones
from gemmconv.plan import Plan

Array = np.ndarray[Any, Any]
Slices = tuple[slice, ...]

_TEXT = """`gemmconv.{name}` for Dask arrays: a lazy result, one task a chunk of it.

Takes what `gemmconv.{name}` takes, but for `out`; operands may be Dask arrays or what that one takes.

Parameters
----------
chunks : optional
    Of the result, as `dask.array.normalize_chunks` takes them. None lets the plan say: boxes that with their windows
    take up to Dask's ``array.chunk-size``, cut where parts have the bits of the whole (`Plan.cuts`).
workers : int
    Threads of a task, 1 by default, since Dask runs a task on each of its own.

Returns
-------
dask.array.Array
    Of the shape and dtype that `gemmconv.{name}` gives.

Raises
------
ValueError, TypeError
    As `gemmconv.{name}`, when the array is made; also if a chunk size of an operand is unknown.
"""


@dataclass(frozen=True)
class Gather:
    """How a window is put together from the chunks it meets: its shape, and of each chunk what goes where."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[Slices, Slices], ...]  # of the window, of the chunk

    def __call__(self, chunks: Sequence[Any]) -> Array:
        if len(chunks) == 1 and self.pieces[0][1] == tuple(slice(0, n) for n in np.shape(chunks[0])):
            return np.asarray(chunks[0])
        window = None
        for (to, of), chunk in zip(self.pieces, chunks, strict=True):
            part = np.asarray(chunk)[of]
            if window is None:
                window = np.empty(self.shape, part.dtype)
            window[to] = part
        assert window is not None
        return window


@dataclass(frozen=True)
class Task:
    """A chunk of a result: a box of a plan's, and how its windows are gathered."""

    plan: Plan
    box: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    gathers: tuple[Gather, Gather]

    def __call__(self, first: Sequence[Any], second: Sequence[Any]) -> Array:
        part = self.plan.part(self.box)
        windows = [gather(chunks) for gather, chunks in zip(self.gathers, (first, second), strict=True)]
        shapes = ([span.stop - span.start for span in window] for window in part.windows)
        x, w = (window.reshape(shape) for window, shape in zip(windows, shapes, strict=True))
        return part(x, w).reshape(self.shape)


def _lazy(function: Callable[..., Any]) -> Callable[..., da.Array]:
    """Return a function of the family for Dask arrays."""
    name = function.__name__
    signature = inspect.signature(function)
    given = [p for p in signature.parameters.values() if p.name not in ("out", "workers")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    mine = [inspect.Parameter("chunks", keyword, default=None), inspect.Parameter("workers", keyword, default=1)]
    mine_too = signature.replace(parameters=[*given, *mine], return_annotation="da.Array")

    @functools.wraps(function)
    def lazy(*args: Any, **kwargs: Any) -> da.Array:
        bound = mine_too.bind(*args, **kwargs).arguments
        chunks = bound.pop("chunks", None)
        arguments = {key: _unread(name, key, value) for key, value in bound.items()}
        made = function(**({"workers": 1} | arguments))
        if not isinstance(made, Described):  # no operand was lazy
            return da.from_array(made, chunks=-1 if chunks is None else chunks)
        return _array(name, made, chunks)

    lazy.__signature__ = mine_too  # type: ignore[attr-defined]
    lazy.__doc__ = _TEXT.format(name=name)
    lazy.__module__ = __name__
    return lazy


def _unread(function: str, name: str, given: Any) -> Any:
    """Return a Dask array as an operand of which just shape and dtype are known."""
    if not isinstance(given, da.Array):
        return given
    if isinstance(given._meta, np.ma.MaskedArray):
        raise TypeError(f"{function}: {name} is a masked array, whose mask would be lost; call da.ma.filled first")
    if any(np.isnan(size) for size in given.shape):
        raise ValueError(
            f"{function}: {name} has chunks of unknown sizes, shape {given.shape}; "
            "call .compute_chunk_sizes() on it first"
        )
    return Unread.of(given.shape, given.dtype, given)


def _array(name: str, made: Described, chunks: Any) -> da.Array:
    """Return the lazy result of a plan."""
    plan, rank = made.plan, made.rank
    problem = plan.problem
    shape = lowered(problem, problem.roles[2], rank)
    absent = [set(ones(problem, role, rank)) for role in problem.roles]
    if chunks is None:
        whole = plan.chunks(parse_bytes(dask.config.get("array.chunk-size")))
        chunks = tuple(of_axis for i, of_axis in enumerate(whole) if i not in absent[2])
    chunks = da.core.normalize_chunks(chunks, shape, dtype=plan.dtype)
    operands = [_operand(array, role) for array, role in zip(made.operands, problem.roles, strict=False)]
    token = f"gemmconv-{name}-{tokenize(plan.problem, plan.requested, plan.machine, plan.workers, chunks, operands)}"
    borders = [[0, *itertools.accumulate(of_axis)] for of_axis in chunks]
    layer: dict[Any, Any] = {}
    for index in itertools.product(*(range(len(of_axis)) for of_axis in chunks)):
        spans = [(borders[axis][i], borders[axis][i + 1]) for axis, i in enumerate(index)]
        of_caller = iter(spans)
        box = tuple((0, 1) if i in absent[2] else next(of_caller) for i in range(5))
        windows = plan.part(box).windows
        gathers, keys = [], []
        for array, window, without in zip(operands, windows, absent, strict=False):
            gather, of_array = _gather(array, [span for i, span in enumerate(window) if i not in without])
            gathers.append(gather)
            keys.append(of_array)
        task = Task(plan, box, tuple(b - a for a, b in spans), (gathers[0], gathers[1]))
        layer[(token, *index)] = (task, *keys)
    graph = HighLevelGraph.from_collections(token, layer, dependencies=operands)
    return da.Array(graph, token, chunks, meta=np.empty((0,) * len(shape), plan.dtype))


def _operand(array: Any, role: str) -> da.Array:
    """Return an operand as a Dask array; a filter in one chunk, since each task needs it as a whole."""
    lazy = array.source if isinstance(array, Unread) else da.from_array(np.asarray(array), chunks=-1)
    return lazy.rechunk(-1) if role == "filter" else lazy


def _gather(array: da.Array, window: Sequence[slice]) -> tuple[Gather, list[tuple[Any, ...]]]:
    """Return how a window is put together from an array's chunks, and the keys of those."""
    along: list[list[tuple[int, slice, slice]]] = []
    for of_axis, span in zip(array.chunks, window, strict=True):
        found, start = [], 0
        for i, size in enumerate(of_axis):
            first, last = max(span.start, start), min(span.stop, start + size)
            if first < last or (i == 0 and span.start == span.stop):  # an empty window has its dtype from a chunk
                last = max(first, last)
                found.append((i, slice(first - span.start, last - span.start), slice(first - start, last - start)))
            start += size
        along.append(found)
    shape = tuple(span.stop - span.start for span in window)
    pieces, keys = [], []
    for parts in itertools.product(*along):
        pieces.append((tuple(to for _, to, _ in parts), tuple(of for _, _, of in parts)))
        keys.append((array.name, *(i for i, _, _ in parts)))
    return Gather(shape, tuple(pieces)), keys


conv3d_transpose = _lazy(nn.conv3d_transpose)
conv3d = _lazy(nn.conv3d)
conv3d_backprop_filter_v2 = _lazy(nn.conv3d_backprop_filter_v2)
conv2d_transpose = _lazy(nn.conv2d_transpose)
conv1d_transpose = _lazy(nn.conv1d_transpose)
conv_transpose = _lazy(nn.conv_transpose)
conv2d = _lazy(nn.conv2d)
conv1d = _lazy(nn.conv1d)

__all__ = [
    "conv1d",
    "conv1d_transpose",
    "conv2d",
    "conv2d_transpose",
    "conv3d",
    "conv3d_backprop_filter_v2",
    "conv3d_transpose",
    "conv_transpose",
]
