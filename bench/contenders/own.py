"""gemmconv itself, and the obvious version in NumPy that it must beat."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from bench.contenders.base import Call, Job, Unsupported, packed, posed, relaid
from bench.layers import Layer
from bench.reference import Array


class Gemmconv:
    """`gemmconv.conv3d_transpose`, called as a user does, in the layout that the problem is posed in."""

    def __init__(self, algorithm: str = "auto") -> None:
        import gemmconv

        self._function = gemmconv.conv3d_transpose
        self._plan = gemmconv.plan_conv3d_transpose
        self.algorithm = algorithm
        self.versions = {"gemmconv": gemmconv.__version__}

    def calls(self, job: Job) -> list[Call]:
        """One way: the lowering is the plan's choice, or the one that was named."""
        layer = job.layer
        arguments = (layer.output_shape(job.layout), layer.strides, layer.padding, job.layout)
        options: dict[str, Any] = {
            "dilations": layer.dilations,
            "algorithm": self.algorithm,
            "workers": job.workers,
        }
        try:
            plan = self._plan(
                layer.value_shape(job.layout), layer.filter_shape, *arguments, dtype=job.value.dtype, **options
            )
        except ValueError as refusal:  # a lowering that cannot do every problem says so, and is no worse for it
            if self.algorithm == "auto":
                raise
            raise Unsupported(str(refusal)) from refusal
        call = partial(self._function, job.value, job.filter, *arguments, **options)
        return [
            Call(
                job.layout,
                call,
                lambda result: result,
                lambda out: call(out=out),
                layer.output_shape(job.layout),
                f"{plan.algorithm}",
            )
        ]


class Obvious:
    """The obvious version: one GEMM for all taps, a strided addition for each into an uncropped output, a crop."""

    def __init__(self) -> None:
        self.versions = {"numpy": np.__version__}

    def calls(self, job: Job) -> list[Call]:
        """One way, channels last."""
        if job.dtype in ("float16", "bfloat16"):
            raise Unsupported(f"NumPy has no GEMM of {job.dtype}")
        value = packed(relaid(job.value, job.layout, "NDHWC"))
        if job.end_to_end:
            return [Call("NDHWC", lambda: self._end_to_end(job), lambda result: result)]
        return [
            Call("NDHWC", partial(obvious, job.layer, value, job.filter), lambda result: posed(job, result, "NDHWC"))
        ]

    @staticmethod
    def _end_to_end(job: Job) -> Array:
        result = obvious(job.layer, packed(relaid(job.value, job.layout, "NDHWC")), job.filter)
        return packed(posed(job, result, "NDHWC"))


def obvious(layer: Layer, value: Array, filter: Array) -> Array:
    """Twenty lines of NumPy, NDHWC."""
    columns = (value.reshape(-1, layer.cin) @ filter.reshape(-1, layer.cin).T).reshape(
        *value.shape[:4], *filter.shape[:4]
    )
    room = [max(f, lo + o) for f, lo, o in zip(layer.full, layer.before, layer.output, strict=True)]
    y = np.zeros((layer.batch, *room, layer.cout), value.dtype)
    for taps in np.ndindex(layer.kernel):
        first = [tap * step for tap, step in zip(taps, layer.dilations, strict=True)]
        d, h, w = (slice(p, p + (n - 1) * s + 1, s) for p, n, s in zip(first, layer.input, layer.strides, strict=True))
        y[:, d, h, w] += columns[:, :, :, :, taps[0], taps[1], taps[2]]
    d, h, w = (slice(lo, lo + o) for lo, o in zip(layer.before, layer.output, strict=True))
    return y[:, d, h, w].copy()
