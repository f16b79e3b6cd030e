"""What `python -m gemmconv demo` computes with and checks against: a phantom, an interpolation, a picture.

The check must not share code with what it checks, so nothing of the package is imported here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# (intensity, half axes W, H, D, centre W, H, D, degrees about D), of a cube from -1 to 1: the modified Shepp-Logan head
# as M. Schabel's phantom3d has it.
_ELLIPSOIDS = (
    (1.0, 0.6900, 0.920, 0.810, 0.00, 0.0000, 0.00, 0),
    (-0.8, 0.6624, 0.874, 0.780, 0.00, -0.0184, 0.00, 0),
    (-0.2, 0.1100, 0.310, 0.220, 0.22, 0.0000, 0.00, -18),
    (-0.2, 0.1600, 0.410, 0.280, -0.22, 0.0000, 0.00, 18),
    (0.1, 0.2100, 0.250, 0.410, 0.00, 0.3500, -0.15, 0),
    (0.1, 0.0460, 0.046, 0.050, 0.00, 0.1000, 0.25, 0),
    (0.1, 0.0460, 0.046, 0.050, 0.00, -0.1000, 0.25, 0),
    (0.1, 0.0460, 0.023, 0.050, -0.08, -0.6050, 0.00, 0),
    (0.1, 0.0230, 0.023, 0.020, 0.00, -0.6060, 0.00, 0),
    (0.1, 0.0230, 0.046, 0.020, 0.06, -0.6050, 0.00, 0),
)


def phantom(size: int) -> np.ndarray[Any, Any]:
    """A cube of float32 with ten ellipsoids in it, sampled at the centres of its voxels."""
    at = (np.arange(size) + 0.5) * (2 / size) - 1
    z, y, x = at[:, None, None], at[:, None], at
    volume = np.zeros((size, size, size), np.float32)
    for intensity, a, b, c, x0, y0, z0, degrees in _ELLIPSOIDS:
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        along, across = (x - x0) * cos + (y - y0) * sin, (y - y0) * cos - (x - x0) * sin
        volume[(along / a) ** 2 + (across / b) ** 2 + ((z - z0) / c) ** 2 <= 1] += intensity
    return volume


def _doubled(x: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    """Twice the samples along an axis by linear interpolation between half-pixel centres, constant beyond the ends."""
    x = np.moveaxis(x, axis, 0)
    y = np.empty((2 * len(x), *x.shape[1:]))
    y[0::2] = 0.75 * x + 0.25 * np.concatenate([x[:1], x[:-1]])
    y[1::2] = 0.75 * x + 0.25 * np.concatenate([x[1:], x[-1:]])
    return np.moveaxis(y, 0, axis)


def largest_error(volume: np.ndarray[Any, Any], result: np.ndarray[Any, Any]) -> float:
    """The largest difference from the interpolation in float64, formed in slabs so that it fits beside the result."""
    largest = []
    for start in range(0, len(volume), 16):
        stop = min(start + 16, len(volume))
        low, high = max(0, start - 1), min(stop + 1, len(volume))
        exact = _doubled(_doubled(_doubled(volume[low:high].astype(np.float64), 0), 1), 2)
        difference = abs(exact[2 * (start - low) : 2 * (stop - low)] - result[2 * start : 2 * stop])
        largest.append(difference.max())
    return float(np.max(largest))  # NaN if any is, which max() would lose


def draw(figure: Any, volume: np.ndarray[Any, Any], result: np.ndarray[Any, Any]) -> None:
    """Draw the middle slices across D, H and W, before and after, into a matplotlib figure."""
    axes = figure.subplots(2, 3)
    for row, array in zip(axes, (volume, result), strict=True):
        for i, panel in enumerate(row):
            panel.imshow(array.take(array.shape[i] // 2, axis=i), cmap="gray", origin="lower")
            panel.set(title=f"{list(array.shape)}, middle {'DHW'[i]}", xticks=[], yticks=[])
