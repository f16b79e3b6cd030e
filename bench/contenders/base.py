"""What a contender is: something that offers one or more ways to call itself on a layer."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.layers import FILTER_GRADIENT, TRANSPOSE, Layer
from bench.reference import Array, relaid


class Unsupported(Exception):  # noqa: N818 - not an error of anyone
    """A contender cannot do what was asked, by its documentation: said in the results, not counted as a failure."""


@dataclass(frozen=True)
class Job:
    """What one contender computes: operands in the posed `layout`, and how it may be called.

    With `end_to_end`, calls take these operands and give an array in `layout`; without it, a contender may convert
    both, outside of the timing, to what it likes best. Filters are TensorFlow's in each layout.
    """

    layer: Layer
    first: Array
    second: Array
    dtype: str
    layout: str
    workers: int
    end_to_end: bool = False

    def operands(self, layout: str, onnx: bool = False) -> list[Array]:
        """Both operands, packed, in a layout; with `onnx`, filters are as PyTorch and ONNX have them.

        Those are [coarse channels, fine channels of a group, kd, kh, kw] in transposed and in forward convolutions.
        """
        found = []
        for role, array in zip(self.layer.roles, (self.first, self.second), strict=False):
            view = relaid(array, self.layout, layout) if role != "filter" else array
            found.append(packed(np.moveaxis(view, (-1, -2), (0, 1)) if role == "filter" and onnx else view))
        return found

    def posed(self, result: Array, layout: str, onnx: bool = False) -> Array:
        """A result in a layout, in the one that the problem was posed in, as a view."""
        if self.layer.roles[2] == "filter":
            return np.moveaxis(result, (0, 1), (-1, -2)) if onnx else result
        return relaid(result, layout, self.layout)

    def format(self, layout: str) -> str:
        """TensorFlow's name of a layout: that of planes has no depth."""
        return layout if self.layer.rank == 3 else layout.replace("D", "")


@dataclass(frozen=True)
class Call:
    """One way to compute a layer.

    `run` is what is timed, `result` makes an array in the posed layout of what it returned, outside of the timing.
    `run_into`, where there is one, writes into an array of the shape of `out_shape`, so that no page is fresh.
    """

    layout: str
    run: Callable[[], Any]
    result: Callable[[Any], Array]
    run_into: Callable[[Array], Any] | None = None
    out_shape: tuple[int, ...] = ()
    note: str = ""


class Contender(Protocol):
    """Loaded once in a process of its own; makes calls for one layer after the other."""

    versions: dict[str, str]

    def calls(self, job: Job) -> Sequence[Call]:
        """The ways to compute a layer, of which the fastest is measured; raises Unsupported where there is none."""


def signature(job: Job) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of TensorFlow's function for a job, in the posed layout: positional ones, and keywords.

    Strides and dilations have one number an axis. Groups show in the shapes of a forward convolution only.
    """
    layer = job.layer
    if layer.groups > 1 and layer.op == TRANSPOSE:
        raise Unsupported("TensorFlow's conv3d_transpose has no groups")
    options = {
        "strides": layer.strides,
        "padding": layer.padding,
        "data_format": job.format(job.layout),
        "dilations": layer.dilations,
    }
    if layer.op == TRANSPOSE:
        options["output_shape"] = layer.result_shape(job.layout)
    sizes = [layer.shape("filter")] if layer.op == FILTER_GRADIENT else []
    return [job.first, *sizes, job.second], options


def commit_of(directory: Path) -> str | None:
    """The commit that a directory is of, and whether it was changed since; None outside of a checkout."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def packed(array: Array) -> Array:
    """A C-contiguous array of the same numbers: the array itself if it is one."""
    return np.ascontiguousarray(array)


def only_float32(job: Job, *others: str) -> None:
    """Raise Unsupported for a dtype that a contender has not."""
    allowed = ("float32", *others)
    if job.dtype not in allowed:
        raise Unsupported(f"{job.dtype} is not measured here, only {', '.join(allowed)}")
