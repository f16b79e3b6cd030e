"""Results box by box, from and to arrays that need not fit in memory: memory maps, Zarr arrays, HDF5 datasets.

Whatever has a shape and a dtype and gives and takes boxes by slices will do; no library for files is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from gemmconv import arrays, results
from gemmconv.arguments import integer
from gemmconv.plan import Plan
from gemmconv.running import Progress

DEFAULT_MEMORY_BYTES = 1 << 28

Chunks = tuple[tuple[int, ...], ...]


def compute_stored(
    plan: Plan,
    value: Any,
    filter: Any,
    out: Any,
    *,
    memory: int = DEFAULT_MEMORY_BYTES,
    chunks: Sequence[Sequence[int]] | None = None,
    done: Collection[int] = (),
    finished: Callable[[int], object] | None = None,
    progress: Progress | None = None,
) -> Any:
    """Compute a plan's result box by box, reading the windows that a box needs and writing the box.

    Parameters
    ----------
    plan : Plan
        Of any operation.
    value, filter : array_like, or stored arrays
        The operands: arrays, or objects with `shape` and `dtype` that give an ndarray for a tuple of slices, as memory
        maps, Zarr arrays and HDF5 datasets do. A filter is read once, as a whole.
    out : ndarray or stored array
        Takes boxes by ``out[slices] = array``, of the plan's `output_shape` and a dtype to which the plan's casts
        safely. A box never holds a part of one of its stored chunks (`out.shards`, else `out.chunks`), so that
        processes can write at once and each chunk is written once.
    memory : int
        Bytes for the windows and results of a box, the workspace, and the filter if it is one.
    chunks : sequence of 5 sequences of int, optional
        The lengths of the boxes along each axis of the result, instead of those that `memory` leads to.
    done : collection of int
        Numbers of boxes, in the order of ``plan.boxes(chunks)``, that are skipped: those of an earlier call.
    finished : callable, optional
        Called with the number of each box when it is written.
    progress : callable, optional
        Called as ``progress(done, total)`` with thousandths of boxes, from worker threads.

    Returns
    -------
    out

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit, no boxes are small enough, or two of `chunks` would share a stored chunk; nothing
        was written.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmconv import compute_stored, plan_conv3d_transpose
    >>> value, filter = np.ones((1, 8, 64, 64, 16), np.float32), np.ones((2, 2, 2, 8, 16), np.float32)
    >>> plan = plan_conv3d_transpose(value.shape, filter.shape, strides=2)
    >>> out = np.empty(plan.output_shape, np.float32)  # or np.lib.format.open_memmap(...), zarr.create_array(...)
    >>> np.array_equal(compute_stored(plan, value, filter, out, memory=32 << 20), plan(value, filter))
    True
    """
    name = "compute_stored"
    of_first, of_second = (
        _stored(name, *named, plan.dtype) for named in zip(plan.problem.names, (value, filter), strict=True)
    )
    for argument, array, shape in zip(
        plan.problem.names, (of_first, of_second), plan.problem.operand_shapes, strict=True
    ):
        if tuple(array.shape) != shape:
            raise ValueError(f"{name}: {argument} has shape {tuple(array.shape)}, but the plan was made for {shape}")
    if (dtype := arrays.common(name, without_data(of_first), without_data(of_second))) != plan.dtype:
        raise TypeError(f"{name}: the operands give {dtype}, but the plan was made for {plan.dtype}")
    if tuple(out.shape) != plan.output_shape:
        raise ValueError(f"{name}: out has shape {tuple(out.shape)}, but the result has {plan.output_shape}")
    if not np.can_cast(plan.dtype, out.dtype, "safe"):
        raise TypeError(f"{name}: out has dtype {out.dtype}, to which the result's {plan.dtype} cannot be cast safely")
    for argument, array in zip(plan.problem.names, (of_first, of_second), strict=True):
        if all(isinstance(x, np.ndarray) for x in (array, out)) and np.may_share_memory(array, out):
            raise ValueError(f"{name}: out shares memory with {argument}, which is read after boxes are written")
    if chunks is None:
        chunks = boxes_for(plan, memory, (of_first.dtype, of_second.dtype), stored_chunks(out))
    _check_chunks(name, plan, chunks, stored_chunks(out))
    whole = np.asarray(of_second[...]) if plan.problem.roles[1] == "filter" else None
    boxes = list(plan.boxes(chunks))
    before: tuple[int, ...] | None = None
    for number, box in enumerate(boxes):
        if number in done:
            continue
        part = plan.part(box)
        if part.output_shape != before:  # memory of other boxes would be there beside that of this one
            results.clear()
            before = part.output_shape
        first = np.asarray(of_first[part.windows[0]])
        second = whole if whole is not None else np.asarray(of_second[part.windows[1]])
        out[box] = part(first, second, progress=_share(progress, number, len(boxes)))
        if finished is not None:
            finished(number)
    results.clear()
    return out


def boxes_for(plan: Plan, memory: int, dtypes: Sequence[np.dtype[Any]], stored: Sequence[int] | None = None) -> Chunks:
    """Return chunks of the result that `memory` is enough for, on stored chunks and, if they can be, on the cuts."""
    problem = plan.problem
    memory = integer("memory, in bytes,", memory)
    fixed = plan.workspace_bytes
    if problem.roles[1] == "filter":  # as it is read, and in the plan's dtype
        fixed += math.prod(problem.filter_shape) * (
            dtypes[1].itemsize + (dtypes[1] != plan.dtype) * plan.dtype.itemsize
        )
    # Windows of another dtype are there twice.
    share = max(1 + (dtype.itemsize / plan.dtype.itemsize if dtype != plan.dtype else 0) for dtype in dtypes)
    if memory <= fixed:
        raise ValueError(f"memory={memory} bytes are not enough: workspace and filter alone take {fixed}")
    most = int((memory - fixed) / share)
    multiples = [range(0, size, chunk) for size, chunk in zip(plan.output_shape, stored or [1] * 5, strict=True)]
    common = [sorted({*of_axis} & {*cuts}) for of_axis, cuts in zip(multiples, plan.cuts, strict=True)]
    try:
        return plan.chunks(most, common)
    except ValueError:  # then bits depend on where boxes begin and end
        return plan.chunks(most, multiples)


def without_data(array: Any) -> np.ndarray[Any, Any]:
    """Return an empty array of the dtype and rank of a stored one, for checks."""
    return np.empty([0] * len(array.shape), array.dtype)


def stored_chunks(out: Any) -> tuple[int, ...] | None:
    """Return the sizes of what an array's storage reads and writes as one, or None if it has no such."""
    for name in ("shards", "chunks"):
        found = getattr(out, name, None)
        if isinstance(found, tuple) and found and all(isinstance(n, int) for n in found):
            return found
    return None


def _stored(function: str, name: str, given: Any, dtype: np.dtype[Any]) -> Any:
    """Return an operand that can be asked for windows."""
    refused = isinstance(given, np.ma.MaskedArray) or hasattr(given, "__dask_graph__")
    if not refused and all(hasattr(given, attribute) for attribute in ("shape", "dtype", "__getitem__")):
        return given
    return arrays.operand(function, name, given, dtype)


def _check_chunks(function: str, plan: Plan, chunks: Sequence[Sequence[int]], stored: Sequence[int] | None) -> None:
    """Check that chunks make up the result and share none of the stored chunks."""
    sums = tuple(sum(of_axis) for of_axis in chunks)
    if sums != plan.output_shape or any(n < 0 for of_axis in chunks for n in of_axis):
        raise ValueError(f"{function}: chunks add up to {sums}, but the result has shape {plan.output_shape}")
    for axis, of_axis in enumerate(chunks if stored is not None else ()):
        at = 0
        for length in of_axis[:-1]:
            at += length
            if stored is not None and at % stored[axis] and 0 < at < sums[axis]:
                raise ValueError(
                    f"{function}: two boxes would share a chunk of out: they meet at {at} on axis {axis}, "
                    f"and its chunks of {stored[axis]} begin at multiples of that"
                )


def _share(progress: Progress | None, number: int, total: int) -> Progress | None:
    """Return the progress of one box."""
    if progress is None:
        return None

    def of_box(done: int, blocks: int) -> None:
        progress(number * 1000 + done * 1000 // max(1, blocks), total * 1000)

    return of_box
