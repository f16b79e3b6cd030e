"""A user's own function with TensorFlow's signature: --against bench/examples/loop.py:conv."""

import numpy as np


def conv(value, filter, output_shape, strides, padding, data_format, dilations):
    assert data_format == "NDHWC"
    n, k, s, d, o = np.array([value.shape[1:4], filter.shape[:3], strides, dilations, output_shape[1:4]])
    full = (n - 1) * s + (k - 1) * d + 1
    before = np.maximum(0, full - o) // 2 if padding == "SAME" else 0 * o
    y = np.zeros([len(value), *np.maximum(full, before + o), filter.shape[3]], value.dtype)
    for tap in np.ndindex(*k):
        at = [slice(*bounds) for bounds in zip(tap * d, tap * d + (n - 1) * s + 1, s, strict=True)]
        y[:, at[0], at[1], at[2]] += value @ filter[tap].T
    cut = [slice(lo, lo + size) for lo, size in zip(before, o, strict=True)]
    return y[:, cut[0], cut[1], cut[2]].copy()
