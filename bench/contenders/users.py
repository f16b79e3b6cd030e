"""Contenders that users bring: Python functions with TensorFlow's signature, and C functions in shared libraries."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.contenders.base import Call, Contender, Job, Unsupported, only_float32, signature
from bench.reference import Array

INTERFACE_VERSION = 1


class Function(Contender):
    """A function with TensorFlow's signature of the operation, as `gemmconv.nn` has them.

    ``conv3d_transpose(value, filter, output_shape=, ...)``, ``conv3d(input, filter, ...)`` or
    ``conv3d_backprop_filter_v2(input, filter_sizes, out_backprop, ...)``, the first two or three by position, with the
    keywords strides, padding, data_format and dilations. A parameter named `workers` is given the number of threads to
    use, and one named `out` makes calls into an array possible. Strides and dilations are an integer an axis.
    """

    def __init__(self, where: str, what: str, is_file: bool) -> None:
        module = _from_file(Path(where)) if is_file else importlib.import_module(where)
        self._function: Callable[..., Any] = getattr(module, what)
        self._parameters = set(inspect.signature(self._function).parameters)
        name = where if not is_file else Path(where).name
        self.versions = {name: str(getattr(module, "__version__", "no version"))}

    def calls(self, job: Job) -> list[Call]:
        """One way: arrays in, something that NumPy makes an array of out."""
        operands, options = signature(job)
        if "workers" in self._parameters:
            options["workers"] = job.workers
        call = partial(_finished, partial(self._function, *operands, **options))
        into = (lambda out: call(out=out)) if "out" in self._parameters else None
        return [Call(job.layout, call, np.asarray, into, job.layer.result_shape(job.layout))]


def _finished(function: Callable[..., Any], **options: Any) -> Any:
    """A call's result once it is computed: JAX's functions return before that."""
    result = function(**options)
    wait = getattr(result, "block_until_ready", None)
    return result if wait is None else wait()


def _from_file(path: Path) -> Any:
    sys.path.insert(0, str(path.parent))  # so that it can import what lies beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


class Problem(ctypes.Structure):
    """`struct gemmconv_bench_problem` of gemmconv_bench.h."""

    _fields_ = (
        ("version", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("cin", ctypes.c_int64),
        ("cout", ctypes.c_int64),
        ("input", ctypes.c_int64 * 3),
        ("output", ctypes.c_int64 * 3),
        ("kernel", ctypes.c_int64 * 3),
        ("stride", ctypes.c_int64 * 3),
        ("dilation", ctypes.c_int64 * 3),
        ("before", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 5),
        ("filter_strides", ctypes.c_int64 * 5),
        ("output_strides", ctypes.c_int64 * 5),
    )


class Library(Contender):
    """A C function of a shared library, with the interface of gemmconv_bench.h."""

    def __init__(self, path: str, symbol: str) -> None:
        self._function = getattr(ctypes.CDLL(path), symbol)
        self._function.restype = ctypes.c_int
        self._function.argtypes = (ctypes.POINTER(Problem), *(ctypes.c_void_p,) * 3)
        self._symbol = symbol
        self.versions = {Path(path).name: f"interface {INTERFACE_VERSION}"}

    def calls(self, job: Job) -> list[Call]:
        """One way: into a new array each time, or into one that is given."""
        only_float32(job)
        layer, channels_last = job.layer.volume(), job.layout == "NDHWC"
        if layer.groups > 1:
            raise Unsupported("the interface has no groups")
        shape = job.layer.result_shape(job.layout)
        problem = Problem(
            INTERFACE_VERSION, job.workers, layer.batch, layer.cin, layer.cout, layer.input, layer.output,
            layer.kernel, layer.strides, layer.dilations, layer.before,
        )  # fmt: skip
        for name, role in (("value_strides", "coarse"), ("filter_strides", "filter"), ("output_strides", "fine")):
            sizes = layer.shape(role, job.layout)
            steps = [int(np.prod(sizes[i + 1 :], dtype=np.int64)) for i in range(5)]
            if role != "filter" and not channels_last:  # always in the order N, D, H, W, C
                steps = [steps[0], *steps[2:], steps[1]]
            setattr(problem, name, (ctypes.c_int64 * 5)(*steps))
        pointer = ctypes.byref(problem)
        value, filter = job.first.ctypes.data, job.second.ctypes.data

        def into(out: Array, held: Job = job) -> Array:  # the addresses are those of its arrays
            status = self._function(pointer, value, filter, out.ctypes.data)
            if status:
                raise RuntimeError(f"{self._symbol} returned {status}, which is not 0")
            return out

        return [Call(job.layout, lambda: into(np.empty(shape, np.float32)), lambda result: result, into, shape)]
