"""gemmconv itself, and the obvious version in NumPy that it must beat."""

from __future__ import annotations

import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.contenders import PREPARED
from bench.contenders.base import Call, Job, Unsupported, commit_of, packed, signature
from bench.layers import CONV, FILTER_GRADIENT, TRANSPOSE, Layer
from bench.reference import Array

# The public functions with TensorFlow's signatures, by operation and spatial axes.
FUNCTIONS = {
    (TRANSPOSE, 3): "conv3d_transpose",
    (TRANSPOSE, 2): "conv2d_transpose",
    (CONV, 3): "conv3d",
    (CONV, 2): "conv2d",
    (FILTER_GRADIENT, 3): "conv3d_backprop_filter_v2",
}


class Gemmconv:
    """gemmconv, called as a user does, in the layout that the problem is posed in.

    What no function with TensorFlow's signature can say is asked of `gemmconv.calls`, where all front ends end.
    """

    def __init__(self, algorithm: str = "auto") -> None:
        import gemmconv

        self.algorithm = algorithm
        self.versions = {name: version(name) for name in ("numpy", "scipy")} | {
            "gemmconv": gemmconv.__version__,
            "python": sys.version,
            "commit": commit_of(Path(gemmconv.__file__).parent) or "none",
        }

    def calls(self, job: Job) -> list[Call]:
        """One way: the lowering is the plan's choice, or the one that was named."""
        import gemmconv
        from gemmconv import calls

        layer, asked = job.layer, problem_of(job)
        if self.algorithm == PREPARED:
            return [prepared(job, asked)]
        try:
            plan = calls.plan("bench", asked, self.algorithm, job.workers)
        except ValueError as refusal:  # a lowering that cannot do every problem says so, and is no worse for it
            if self.algorithm == "auto":
                raise
            raise Unsupported(str(refusal)) from refusal
        options: dict[str, Any] = {"algorithm": self.algorithm, "workers": job.workers}
        name = FUNCTIONS.get((layer.op, layer.rank))
        if name is None or (layer.groups > 1 and layer.op == TRANSPOSE):
            call = partial(calls.compute, "bench", asked, job.first, job.second, rank=layer.rank, **options)
        else:
            arguments, keywords = signature(job)
            call = partial(getattr(gemmconv, name), *arguments, **keywords, **options)
        into, shape = (lambda out: call(out=out)), layer.result_shape(job.layout)
        return [Call(job.layout, call, lambda result: result, into, shape, plan.algorithm)]


def prepared(job: Job, asked: Any) -> Call:
    """A call with the value alone, of a filter that was prepared before."""
    from gemmconv import calls

    held = calls.plan("bench", asked, workers=job.workers).prepare(job.second.reshape(asked.filter_shape))
    shape = job.layer.result_shape(job.layout)

    def call(out: Array | None = None) -> Array:
        lifted = None if out is None else out.reshape(asked.result_shape)
        return held(job.first.reshape(asked.operand_shapes[0]), lifted).reshape(shape)

    return Call(job.layout, call, lambda result: result, lambda out: call(out), shape, held.plan.algorithm)


def problem_of(job: Job) -> Any:
    """The job as gemmconv's `Problem`."""
    from gemmconv.problem import Axis, Problem

    layer = job.layer.volume()
    d, h, w = (
        Axis(n, o, k, s, dilation, lo)
        for n, o, k, s, dilation, lo in zip(
            layer.input, layer.output, layer.kernel, layer.strides, layer.dilations, layer.before, strict=True
        )
    )
    cin, cout = layer.cin // layer.groups, layer.cout // layer.groups
    return Problem(layer.op, layer.batch, cin, cout, (d, h, w), job.first.dtype, job.layout, layer.groups)


class Obvious:
    """The obvious version: columns of all taps at once, one GEMM, and a strided copy or addition for each tap."""

    def __init__(self) -> None:
        self.versions = {"numpy": np.__version__}

    def calls(self, job: Job) -> list[Call]:
        """One way, channels last."""
        if job.dtype in ("float16", "bfloat16"):
            raise Unsupported(f"NumPy has no GEMM of {job.dtype}")
        if job.end_to_end:

            def end_to_end() -> Array:
                return packed(job.posed(obvious(job.layer, *job.operands("NDHWC")), "NDHWC"))

            return [Call("NDHWC", end_to_end, lambda result: result)]
        call = partial(obvious, job.layer, *job.operands("NDHWC"))
        return [Call("NDHWC", call, lambda result: job.posed(result, "NDHWC"))]


def obvious(layer: Layer, first: Array, second: Array) -> Array:
    """A few lines of NumPy for each operation, channels last; matrices are stacked by groups."""
    groups, grid = layer.groups, (layer.batch, *layer.input)
    taps = list(np.ndindex(layer.kernel))
    fine = np.zeros((layer.batch, *layer.room, layer.cout), first.dtype)

    def rows(array: Array) -> Array:
        """A row a position of the coarse grid, of [..., channels of all groups]."""
        split = array.reshape(layer.rows, -1, groups, array.shape[-1] // groups)
        return np.moveaxis(split, 2, 0).reshape(groups, layer.rows, -1)

    def joined(array: Array, *leading: int) -> Array:
        """Matrices as [*leading, channels of all groups]."""
        return np.moveaxis(array.reshape(groups, *leading, -1), 0, -2).reshape(*leading, -1)

    if layer.op != FILTER_GRADIENT:
        filter = np.moveaxis(second.reshape(-1, groups, layer.cin // groups), 1, 0)
    if layer.op == TRANSPOSE:
        columns = joined(rows(first) @ filter.swapaxes(1, 2), *grid, len(taps))
        for i, tap in enumerate(taps):
            fine[layer.reached(tap)] += columns[..., i, :]
        return fine[layer.kept].copy()
    fine[layer.kept] = first
    columns = rows(np.stack([fine[layer.reached(tap)] for tap in taps], -2))
    if layer.op == CONV:
        return joined(columns @ filter, *grid)
    return joined(columns.swapaxes(1, 2) @ rows(second), *layer.kernel, layer.cout // groups)
