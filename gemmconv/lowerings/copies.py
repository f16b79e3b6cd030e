"""Copies between operands, workspaces and the output: short runs as items, transposed matrices, rounded sums."""

from __future__ import annotations

import numpy as np

from gemmconv.lowerings.base import ALIGNMENT, Array, NotFiniteError
from gemmconv.lowerings.recorder import step
from gemmconv.problem import Problem
from gemmconv.quiet import quiet

# Bytes of a run that NumPy copies faster as one item.
_SHORT_BYTES = 512
# Bytes between lines of which half a first cache holds a few only.
CONFLICT = 2048
# By the bytes of a value: integers with its bits, and Inf of either sign as such.
_BITS = {4: (np.int32, np.uint32), 8: (np.int64, np.uint64)}
_INFINITE = {4: (0x7F800000, 0xFF800000), 8: (0x7FF0000000000000, 0xFFF0000000000000)}
# Bytes of an array of which most comes from memory, and of what a cache reads of it at a time.
_FAR, _LINE = 1 << 23, 64


@quiet
def is_finite(array: Array) -> bool:
    """Whether no value is Inf or NaN; False too where only their sum overflows."""
    dtype = np.float32 if array.dtype.itemsize == 2 else array.dtype
    return bool(np.isfinite(np.add.reduce(array, axis=None, dtype=dtype)))


def need_finite(*arrays: Array) -> None:
    """Raise NotFiniteError unless one of some arrays of sums, of one dtype, is finite: no value is Inf or NaN.

    The largest of its bits are found twice as fast as a sum, where they are in cache: as integers with a sign, positive
    Inf and NaN are above all others, and without one negative ones are.
    """
    if any(array.size == 0 for array in arrays):
        return
    real = [part for array in arrays for part in ((array.real, array.imag) if array.dtype.kind == "c" else (array,))]
    bits = [array.view(kind) for array in real for kind in _BITS[array.itemsize]]
    _need_below(len(bits) // len(arrays), *_INFINITE[real[0].itemsize], *bits)


@step
def _need_below(each: int, inf: int, negative_inf: int, *bits: Array) -> None:
    """Raise NotFiniteError unless the bits of some array, of which so many follow each other, are below."""
    for first in range(0, len(bits), each):
        for i in range(first, first + each, 2):
            if np.maximum.reduce(bits[i], None) >= inf or np.maximum.reduce(bits[i + 1], None) >= negative_inf:
                break
        else:
            return
    raise NotFiniteError


def copy(to: Array, source: Array) -> None:
    """Copy values to another array of the same shape, perhaps of another dtype, short runs of them as items."""
    size = source.shape[-1] * source.itemsize
    short = source.ndim > 1 and source.shape == to.shape and source.itemsize < size and to.dtype == source.dtype
    if short and size <= _SHORT_BYTES and to.strides[-1] == source.strides[-1] == source.itemsize:
        np.copyto(as_items(to, size), as_items(source, size))
    else:
        np.copyto(to, source, casting="unsafe")


def copy_turned(to: Array, source: Array) -> None:
    """Copy matrices to transposed ones: of the two last axes of `to` and `source`.

    Lines that begin at the same few places in their pages push each other out of the first cache: they are copied apart
    before.
    """
    if source.strides[-2] % CONFLICT:
        np.copyto(to, source.swapaxes(-1, -2), casting="unsafe")
        return
    lines, size = source.shape[-2:]
    apart = np.empty((lines, size + ALIGNMENT // to.itemsize), to.dtype)[:, :size]
    for index in np.ndindex(source.shape[:-2]):
        np.copyto(apart, source[index], casting="unsafe")
        np.copyto(to[index], apart.T)


def is_far(array: Array) -> bool:
    """Whether an array is so large that much of it comes from memory, or from a cache that all cores share."""
    return array.nbytes >= _FAR


def read_ahead(matrix: Array) -> None:
    """Bring the lines of a matrix to the cache in the order in which they lie, as memory is read fastest.

    Products of few rows read it in pieces, and would wait for each.
    """
    np.bitwise_or.reduce(matrix.view(np.uint8)[:, ::_LINE], axis=None, out=np.empty((), np.uint8))


def item_size(problem: Problem, channels: int) -> int:
    """Return the bytes of so many channels where they are copied faster as one item, else 0.

    NumPy's innermost loop is then along the axis before.
    """
    size = channels * problem.dtype.itemsize
    beside = problem.layout == "NDHWC" and problem.dtype == problem.compute_dtype
    return size if beside and channels > 1 and size <= _SHORT_BYTES else 0


def as_items(array: Array, size: int) -> Array:
    """View contiguous values of the last axis as one item."""
    found: Array = array.view(f"V{size}")[..., 0]
    return found


def store(output: Array, result: Array) -> None:
    """Write sums into the output, rounding half precisions once; a sum that rounds to zero becomes +0.0."""
    copy(output, result)
    if output.dtype.itemsize == 2:
        _no_negative_zeros(output.view(np.uint16))


@step
def _no_negative_zeros(bits: Array) -> None:
    np.copyto(bits, 0, where=bits == 0x8000)
