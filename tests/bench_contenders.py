"""What a user may bring to the bench: functions with TensorFlow's signature that are right, wrong, or do worse."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, wherever the bench is run

import gemmconv


def right(value, filter, output_shape, strides, padding, data_format, dilations, workers, out=None):
    """As a user's function should be; `workers` and `out` are given because it has parameters of these names."""
    return gemmconv.conv3d_transpose(
        value, filter, output_shape, strides, padding, data_format, dilations=dilations, workers=workers, out=out
    )


def right_conv3d(input, filter, strides, padding, data_format, dilations, workers, out=None):
    """The same of conv3d."""
    return gemmconv.conv3d(input, filter, strides, padding, data_format, dilations, workers=workers, out=out)


def right_conv3d_backprop_filter(input, filter_sizes, out_backprop, strides, padding, data_format, dilations):
    """The same of the filter's gradient."""
    return gemmconv.conv3d_backprop_filter_v2(
        input, filter_sizes, out_backprop, strides, padding, data_format, dilations
    )


def a_list(value, filter, **arguments):
    """NumPy makes an array of it, of the wrong dtype."""
    return gemmconv.conv3d_transpose(value, filter, **arguments).tolist()


def wrong_cell(value, filter, **arguments):
    """One cell is off by a thousandth of the largest."""
    y = gemmconv.conv3d_transpose(value, filter, **arguments)
    y[0, -1, -1, -1, -1] += np.abs(y).max() / 1000
    return y


def not_a_number(value, filter, **arguments):
    """One cell was never written."""
    y = gemmconv.conv3d_transpose(value, filter, **arguments)
    y[0, 0, 0, 0, 0] = np.nan
    return y


def half_precision(value, filter, **arguments):
    """Float32 in name only."""
    y = gemmconv.conv3d_transpose(value.astype(np.float16), filter.astype(np.float16), **arguments)
    return y.astype(np.float32)


calls = 0


def wrong_later(value, filter, **arguments):
    """Right when it is checked, and for some time after."""
    global calls
    calls += 1
    y = gemmconv.conv3d_transpose(value, filter, **arguments)
    return y if calls < 10 else y + 1


def wrong_shape(value, filter, **arguments):
    """A row is missing."""
    return gemmconv.conv3d_transpose(value, filter, **arguments)[:, :, 1:]


def wrong_dtype(value, filter, **arguments):
    """Wider than was asked."""
    return gemmconv.conv3d_transpose(value.astype(np.float64), filter, **arguments)


def raises(value, filter, **arguments):
    """An exception of its own."""
    raise ArithmeticError("carry the one")


def hangs(value, filter, **arguments):
    """For ever."""
    print("this goes to the log")
    while True:
        time.sleep(1)


def killed(value, filter, **arguments):
    """As by the kernel, out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def exits(value, filter, **arguments):
    """Without a word to anyone."""
    os._exit(7)


def hangs_once(value, filter, **arguments):
    """On one layer of two: the other has its row."""
    if len(value) == 2:
        time.sleep(60)
    return gemmconv.conv3d_transpose(value, filter, **arguments)
