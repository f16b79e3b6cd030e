"""Transposed convolutions and their kin as matrix products: GEMM into a column buffer, col2im into the output.

>>> import numpy as np
>>> import gemmconv
>>> x = np.ones((1, 4, 4, 4, 3), np.float32)  # [N, D, H, W, Cin]
>>> w = np.ones((2, 2, 2, 5, 3), np.float32)  # [kd, kh, kw, Cout, Cin]
>>> gemmconv.conv3d_transpose(x, w, strides=2).shape
(1, 8, 8, 8, 5)
"""

from gemmconv.columns import col2im, im2col
from gemmconv.config import show_config
from gemmconv.nn import (
    conv1d,
    conv1d_transpose,
    conv2d,
    conv2d_transpose,
    conv3d,
    conv3d_backprop_filter_v2,
    conv3d_transpose,
    conv_transpose,
    plan_conv3d,
    plan_conv3d_backprop_filter_v2,
    plan_conv3d_transpose,
)
from gemmconv.plan import Plan, clear_cache
from gemmconv.profile import profile
from gemmconv.stored import compute_stored
from gemmconv.threads import get_workers, set_workers

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "clear_cache",
    "col2im",
    "compute_stored",
    "conv1d",
    "conv1d_transpose",
    "conv2d",
    "conv2d_transpose",
    "conv3d",
    "conv3d_backprop_filter_v2",
    "conv3d_transpose",
    "conv_transpose",
    "get_workers",
    "im2col",
    "plan_conv3d",
    "plan_conv3d_backprop_filter_v2",
    "plan_conv3d_transpose",
    "profile",
    "set_workers",
    "show_config",
]
