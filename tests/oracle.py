"""The definition of conv3d_transpose in float64, a loop over taps that anyone can check by eye.

It must not import or copy anything of the package. Arithmetic is float64, or complex128 if an operand is complex; sizes
are Python integers of any magnitude. Every function takes what the package takes, and nothing here refuses anything.
The last functions are not reference but what the test modules share.
"""

import itertools
import operator

import numpy as np
import pytest


def extent(kernel, dilation):
    """Return K, the cells that a dilated kernel spans."""
    return max(0, (kernel - 1) * dilation + 1)


def reachable_sizes(size, kernel, stride, dilation, padding):
    """Return the smallest and the largest output size of an axis with `size` input cells."""
    span = extent(kernel, dilation)
    if padding == "SAME":
        return (0, 0) if size == 0 else ((size - 1) * stride + 1, size * stride)
    return (0, max(0, span - 1)) if size == 0 else ((size - 1) * stride + span, size * stride + span - 1)


def inferred_size(size, kernel, stride, dilation, padding):
    """Return the output size of an axis that ``output_shape=None`` stands for."""
    largest = reachable_sizes(size, kernel, stride, dilation, padding)[1]
    if padding == "SAME":
        return size * stride
    return min((size - 1) * stride + max(stride, extent(kernel, dilation)), largest)


def low_padding(size, kernel, stride, dilation, output, padding):
    """Return lo, the cells cut off in front of an axis of `output` cells."""
    if padding == "VALID":
        return 0
    return max(0, (size - 1) * stride + extent(kernel, dilation) - output) // 2


def three(argument, data_format="NDHWC"):
    """Return strides or dilations for D, H and W from None, an int, or 1, 3 or 5 of them."""
    if argument is None:
        return [1, 1, 1]
    if hasattr(argument, "__index__") and np.ndim(argument) == 0:
        return [operator.index(argument)] * 3
    numbers = [operator.index(number) for number in argument]
    if len(numbers) == 5:
        return numbers[2:] if data_format == "NCDHW" else numbers[1:4]
    return numbers * 3 if len(numbers) == 1 else numbers


def channels_last(array, data_format="NDHWC"):
    """Return a view of a five-dimensional array as N, D, H, W, C."""
    return np.moveaxis(array, 1, -1) if data_format == "NCDHW" else array


def caller_order(array, data_format="NDHWC"):
    """Return an N, D, H, W, C array, or a list of five such things, in the caller's order."""
    if isinstance(array, np.ndarray):
        return np.moveaxis(array, -1, 1) if data_format == "NCDHW" else array
    n, d, h, w, c = array
    return [n, c, d, h, w] if data_format == "NCDHW" else [n, d, h, w, c]


def wide(array):
    """Return an array as float64, or as complex128 if it is complex."""
    array = np.asarray(array)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def conv3d_transpose(
    value, filter, output_shape=None, strides=None, padding="SAME", data_format="NDHWC", dilations=None
):
    """Return y of the Definition: y[b, i*s + a*dilation - lo, co] += sum over ci of x[b, i, ci] * w[a, co, ci]."""
    data_format = data_format or "NDHWC"
    x, w = channels_last(wide(value), data_format), wide(filter)
    sizes, kernel = x.shape[1:4], w.shape[:3]
    steps, dilation = three(strides, data_format), three(dilations, data_format)
    if output_shape is None:
        outputs = [inferred_size(*axis, padding) for axis in zip(sizes, kernel, steps, dilation, strict=True)]
    else:
        output_shape = [operator.index(size) for size in output_shape]
        outputs = output_shape[2:] if data_format == "NCDHW" else output_shape[1:4]
    lows = [low_padding(*axis, padding) for axis in zip(sizes, kernel, steps, dilation, outputs, strict=True)]
    y = np.zeros([x.shape[0], *outputs, w.shape[3]], np.result_type(x, w))
    with np.errstate(all="ignore"):
        for tap in itertools.product(*map(range, kernel)):
            fine, coarse = [], []
            for axis in range(3):
                pairs = [(i * steps[axis] + tap[axis] * dilation[axis] - lows[axis], i) for i in range(sizes[axis])]
                pairs = [(cell, i) for cell, i in pairs if 0 <= cell < outputs[axis]]
                fine.append(np.array([cell for cell, _ in pairs], np.intp))
                coarse.append(np.array([i for _, i in pairs], np.intp))
            batch = np.arange(x.shape[0])
            # One tap sends every i to a cell of its own, so += on an index meets no cell twice.
            y[np.ix_(batch, *fine)] += x[np.ix_(batch, *coarse)] @ w[tap].T
    return caller_order(y, data_format)


def conv3d(image, filter, sizes, strides=None, padding="SAME", data_format="NDHWC", dilations=None):
    """Return TensorFlow's conv3d of `image` [N, o.., Cout] with `filter` [k.., Cout, Cin]: [N, sizes.., Cin].

    It pads the image with zeros and slices it, tap by tap: it shares no index arithmetic with conv3d_transpose above.
    """
    z, w = channels_last(wide(image), data_format), wide(filter)
    steps, dilation = three(strides, data_format), three(dilations, data_format)
    result = np.zeros([z.shape[0], *sizes, w.shape[4]], np.result_type(z, w))
    if 0 in sizes:
        return caller_order(result, data_format)
    pads = [(0, 0)]
    for n, k, s, dil, o in zip(sizes, w.shape[:3], steps, dilation, z.shape[1:4], strict=True):
        total = max(0, (n - 1) * s + extent(k, dil) - o) if padding == "SAME" else 0
        pads.append((total // 2, total - total // 2 + s))
    z = np.pad(z, [*pads, (0, 0)])
    for tap in itertools.product(*map(range, w.shape[:3])):
        window = [
            slice(a * dil, a * dil + (n - 1) * s + 1, s)
            for a, dil, n, s in zip(tap, dilation, sizes, steps, strict=True)
        ]
        result += z[(slice(None), *window)] @ w[tap]
    return caller_order(result, data_format)


def rounded(exact, dtype):
    """Return a float64 reference in `dtype`: float16 and bfloat16 by way of float32, negative zeros as +0.0."""
    dtype = np.dtype(dtype)
    with np.errstate(all="ignore"):
        if dtype.kind != "c" and dtype.itemsize == 2:
            exact = exact.astype(np.float32)
        return exact.astype(dtype) + dtype.type(0)


def same_bits(left, right):
    """Return whether two arrays agree in shape, dtype and every bit, so that -0.0 is not +0.0."""
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def dtype_named(name):
    """Return a dtype by name; skip the test if it is bfloat16 and ml_dtypes is not there."""
    if name == "bfloat16":
        reason = "bfloat16 is a dtype of ml_dtypes, which is not installed, so there is no such array to test with"
        return np.dtype(pytest.importorskip("ml_dtypes", reason=reason).bfloat16)
    return np.dtype(name)


def frozen(array):
    """Return the array, made read-only."""
    array.flags.writeable = False
    return array


def integers(rng, shape, dtype, largest=8):
    """Return a read-only array of whole numbers, |v| <= largest; complex has them in both parts."""
    dtype = np.dtype(dtype)
    data = rng.integers(-largest, largest + 1, shape)
    if dtype.kind == "c":
        data = data + 1j * rng.integers(-largest, largest + 1, shape)
    return frozen(np.asarray(data).astype(dtype))
