"""The layers that are measured, and the obvious NumPy version they are measured against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gemmconv

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layer:
    """One transposed convolution: a name, and the arguments of `gemmconv.plan_conv3d_transpose`."""

    name: str
    value_shape: tuple[int, ...]
    filter_shape: tuple[int, ...]
    output_shape: tuple[int, ...] | None
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: str = "SAME"
    data_format: str = "NDHWC"

    def plan(self, **options: Any) -> gemmconv.Plan:
        """Return gemmconv's plan for this layer."""
        return gemmconv.plan_conv3d_transpose(
            self.value_shape, self.filter_shape, self.output_shape, self.strides, self.padding, self.data_format,
            self.dilations, **options,
        )  # fmt: skip

    def operands(self) -> tuple[Array, Array]:
        """Return seeded normal float32 operands."""
        rng = np.random.default_rng(0)
        return rng.standard_normal(self.value_shape, np.float32), rng.standard_normal(self.filter_shape, np.float32)

    def gemmconv(self, value: Array, filter: Array, workers: int) -> Array:
        """Call gemmconv as a user does."""
        return gemmconv.conv3d_transpose(
            value, filter, self.output_shape, self.strides, self.padding, self.data_format,
            dilations=self.dilations, workers=workers,
        )  # fmt: skip


def layers() -> list[Layer]:
    """Return the layers of public models."""

    def three(size: Any) -> tuple[int, ...]:
        return tuple(size) if isinstance(size, list) else (size,) * 3

    found = []
    for w in json.loads(Path(__file__).with_name("workloads.json").read_text())["layers"]:
        output = (w["batch"], *three(w["output"]), w["cout"]) if "output" in w else None
        found.append(
            Layer(
                w["name"],
                (w["batch"], *three(w["input"]), w["cin"]),
                (*three(w["kernel"]), w["cout"], w["cin"]),
                output,
                three(w["strides"]),
                three(w.get("dilations", 1)),
                w.get("padding", "SAME"),
            )
        )
    return found


def obvious(layer: Layer, plan: gemmconv.Plan, value: Array, filter: Array) -> Array:
    """The obvious version: one GEMM for all taps, a strided addition for each into an uncropped output, a crop."""
    columns = (value.reshape(-1, value.shape[-1]) @ filter.reshape(-1, filter.shape[-1]).T).reshape(
        *value.shape[:4], *filter.shape[:4]
    )
    axes = plan.problem.axes
    full = [max((a.coarse - 1) * a.stride + a.extent, a.lo + a.fine) for a in axes]
    y = np.zeros((value.shape[0], *full, filter.shape[3]), np.float32)
    for taps in np.ndindex(filter.shape[:3]):
        at = [t * a.dilation for t, a in zip(taps, axes, strict=True)]
        to = [slice(p, p + (a.coarse - 1) * a.stride + 1, a.stride) for p, a in zip(at, axes, strict=True)]
        y[:, to[0], to[1], to[2]] += columns[:, :, :, :, taps[0], taps[1], taps[2]]
    crop = [slice(a.lo, a.lo + a.fine) for a in axes]
    return y[:, crop[0], crop[1], crop[2]].copy()
