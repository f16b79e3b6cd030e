"""PyTorch, TensorFlow and JAX: each with its operands as it likes them, in float32 arithmetic."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bench.contenders.base import Call, Contender, Job, Unsupported, only_float32, packed
from bench.layers import CONV, TRANSPOSE, Layer
from bench.reference import Array


class Torch(Contender):
    """`torch.nn.functional`'s convolutions under inference_mode, in contiguous and in channels-last memory.

    The filter's gradient is what `torch.nn.grad.conv3d_weight` calls.
    """

    def __init__(self, workers: int) -> None:
        import torch

        torch.set_num_threads(workers)
        torch.backends.mkldnn.allow_tf32 = False
        self.versions = {"torch": torch.__version__}

    def calls(self, job: Job) -> list[Call]:
        """Both memory formats of both operands; NDHWC is PyTorch's channels_last_3d, NHWC its channels_last."""
        import torch

        only_float32(job, "float64")
        run = (torch_transpose if job.layer.op == TRANSPOSE else torch_forward)(job.layer)
        last = "channels_last_3d" if job.layer.rank == 3 else "channels_last"
        formats = {"contiguous": torch.contiguous_format, last: getattr(torch, last)}

        def made(chosen: tuple[str, ...]) -> list[Any]:
            arrays = zip(job.operands("NCDHW", onnx=True), chosen, strict=True)
            return [torch.from_numpy(a).contiguous(memory_format=formats[name]) for a, name in arrays]

        def end_to_end(chosen: tuple[str, ...]) -> Array:
            with torch.inference_mode():
                return packed(job.posed(run(*made(chosen)).numpy(), "NCDHW", onnx=True))

        def timed(operands: list[Any]) -> Any:
            with torch.inference_mode():
                return run(*operands)

        found = []
        for chosen in itertools.product(formats, repeat=2):
            name = f"{chosen[0]}, {'filter ' if job.layer.roles[1] == 'filter' else ''}{chosen[1]}"
            if job.end_to_end:
                found.append(Call(name, partial(end_to_end, chosen), lambda result: result))
                continue
            call = partial(timed, made(chosen))
            found.append(Call(name, call, lambda result: job.posed(result.numpy(), "NCDHW", onnx=True)))
        return found


def torch_transpose(layer: Layer) -> Callable[[Any, Any], Any]:
    """PyTorch's transposed convolution of a layer, of its arrays and filters."""
    import torch

    function = getattr(torch.nn.functional, f"conv_transpose{layer.rank}d")
    # PyTorch has no padding behind: cut less there by output_padding, or compute more and cut it.
    more = [max(0, lo - hi) for lo, hi in zip(layer.before, layer.behind, strict=True)]
    if any(m >= max(s, d) for m, s, d in zip(more, layer.strides, layer.dilations, strict=True)):
        raise Unsupported("output_padding must be smaller than either stride or dilation")
    kept = (..., *(slice(0, o) for o in layer.output))
    cut = any(hi > lo for lo, hi in zip(layer.before, layer.behind, strict=True))

    def run(x: Any, w: Any) -> Any:
        y = function(x, w, None, layer.strides, layer.before, more, layer.groups, layer.dilations)
        return y[kept] if cut else y

    return run


def torch_forward(layer: Layer) -> Callable[[Any, Any], Any]:
    """PyTorch's convolution of a layer, or its filter's gradient."""
    import torch

    function = getattr(torch.nn.functional, f"conv{layer.rank}d")
    # PyTorch pads alike in front and behind: what SAME pads more behind is a copy of the input.
    more = [max(0, hi - lo) for lo, hi in zip(layer.before, layer.behind, strict=True)]
    pads = [pad for size in reversed(more) for pad in (0, size)]
    filter_shape = (layer.cin, layer.cout // layer.groups, *layer.kernel)

    def run(x: Any, second: Any) -> Any:
        if any(more):
            x = torch.nn.functional.pad(x, pads)
        if layer.op == CONV:
            return function(x, second, None, layer.strides, layer.before, layer.dilations, layer.groups)
        _, gradient, _ = torch.ops.aten.convolution_backward(
            second, x, second.new_empty(1).expand(filter_shape), None, layer.strides, layer.before, layer.dilations,
            False, [0] * layer.rank, layer.groups, (False, True, False),
        )  # fmt: skip
        return gradient

    return run


class TensorFlow(Contender):
    """`tf.nn.conv3d_transpose` and its relatives with oneDNN's kernels, eager and as a graph."""

    def __init__(self, workers: int) -> None:
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(workers)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self.versions = {"tensorflow": tf.__version__}

    def calls(self, job: Job) -> list[Call]:
        """Channels last, the only layout of all its kernels on a CPU."""
        import tensorflow as tf

        only_float32(job, "float64")
        layer, layout = job.layer, job.format("NDHWC")
        if layer.groups > 1 and (layer.op, layer.rank) != (CONV, 2):
            raise Unsupported("on a CPU it has groups of conv2d only")
        steps, dilations = [1, *layer.strides, 1], [1, *layer.dilations, 1]
        gradients = {3: tf.raw_ops.Conv3DBackpropFilterV2, 2: tf.raw_ops.Conv2DBackpropFilter}

        def function(first: Any, second: Any) -> Any:
            if layer.op == TRANSPOSE:
                transpose = getattr(tf.nn, f"conv{layer.rank}d_transpose")
                return transpose(first, second, layer.result_shape(), steps, layer.padding, layout, dilations)
            if layer.op == CONV:
                return getattr(tf.nn, f"conv{layer.rank}d")(first, second, steps, layer.padding, layout, dilations)
            return gradients[layer.rank](
                input=first, filter_sizes=layer.result_shape(), out_backprop=second, strides=steps,
                padding=layer.padding, data_format=layout, dilations=dilations,
            )  # fmt: skip

        def end_to_end(call: Callable[[Any, Any], Any]) -> Array:
            return packed(job.posed(call(*map(tf.constant, job.operands("NDHWC"))).numpy(), "NDHWC"))

        found = []
        # Operands of the graph are arguments, so that they cannot be folded into constants.
        for name, call in ((f"{layout}, graph", tf.function(function)), (f"{layout}, eager", function)):
            if job.end_to_end:
                found.append(Call(name, partial(end_to_end, call), lambda result: result))
                continue
            first, second = map(tf.constant, job.operands("NDHWC"))
            run = lambda call=call, x=first, w=second: call(x, w).numpy()  # noqa: E731 - .numpy() waits, and copies nothing
            found.append(Call(name, run, lambda result: job.posed(result, "NDHWC")))
        return found


class Jax(Contender):
    """`jax.lax.conv_general_dilated`, compiled; for a transposed convolution, of the input dilated by the stride.

    The filter's gradient is the transpose of the convolution, which is linear in its filter.
    """

    def __init__(self, workers: int) -> None:
        if workers == 1:
            flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
        self.versions = {"jax": jax.__version__}

    def calls(self, job: Job) -> list[Call]:
        """Both layouts."""
        import jax

        layer = job.layer
        if layer.groups > 1 and layer.op == TRANSPOSE:
            raise Unsupported("its groups of a transposed convolution would need filters in another order")
        ends = list(zip(layer.before, layer.behind, strict=True))
        kernel_format = job.format("DHWOI" if layer.op == TRANSPOSE else "DHWIO")
        options: dict[str, Any] = {"rhs_dilation": layer.dilations, "precision": jax.lax.Precision.HIGHEST}
        if layer.op == TRANSPOSE:
            # The dilated input has (n-1)*s + 1 cells; K-1 more before and behind give every cell that a tap reaches.
            padding = [(span - 1 - lo, span - 1 - hi) for span, (lo, hi) in zip(layer.spans, ends, strict=True)]
            options |= {"window_strides": (1,) * layer.rank, "padding": padding, "lhs_dilation": layer.strides}
        else:
            options |= {"window_strides": layer.strides, "padding": ends, "feature_group_count": layer.groups}

        def compiled(layout: str) -> Callable[[Any, Any], Any]:
            numbers = job.format(layout), kernel_format, job.format(layout)
            convolution = partial(jax.lax.conv_general_dilated, dimension_numbers=numbers, **options)
            filter = jax.ShapeDtypeStruct(layer.shape("filter"), job.first.dtype)

            def gradient(x: Any, g: Any) -> Any:
                return jax.linear_transpose(partial(convolution, x), filter)(g)[0]

            jitted: Callable[[Any, Any], Any] = jax.jit(convolution if layer.roles[1] == "filter" else gradient)
            return jitted

        def operands(layout: str) -> list[Array]:
            first, second = job.operands(layout)
            flipped = packed(second[(slice(None, None, -1),) * layer.rank]) if layer.op == TRANSPOSE else second
            return [first, flipped]

        def end_to_end(call: Callable[[Any, Any], Any], layout: str) -> Array:
            return packed(job.posed(np.asarray(call(*operands(layout))), layout))

        found = []
        for layout in ("NDHWC", "NCDHW"):
            call = compiled(layout)
            if job.end_to_end:
                found.append(Call(layout, partial(end_to_end, call, layout), lambda result: result))
                continue
            x, w = map(jax.device_put, operands(layout))
            run = lambda call=call, x=x, w=w: call(x, w).block_until_ready()  # noqa: E731
            found.append(Call(layout, run, lambda result, layout=layout: job.posed(np.asarray(result), layout)))  # type: ignore[misc]
        return found


FRAMEWORKS: dict[str, Callable[[int], Contender]] = {"torch": Torch, "tensorflow": TensorFlow, "jax": Jax}
