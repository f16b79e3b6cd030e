"""PyTorch, TensorFlow and JAX: each with its operands as it likes them, in float32 arithmetic."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.contenders.base import Call, Contender, Job, Unsupported, only_float32, packed, posed, relaid
from bench.reference import Array


class Torch(Contender):
    """`torch.nn.functional.conv_transpose3d` under inference_mode, in contiguous and in channels-last memory."""

    def __init__(self, workers: int) -> None:
        import torch

        torch.set_num_threads(workers)
        torch.backends.mkldnn.allow_tf32 = False
        self.versions = {"torch": torch.__version__}

    def calls(self, job: Job) -> list[Call]:
        """Both memory formats of both operands; NDHWC is PyTorch's channels_last_3d."""
        import torch

        only_float32(job, "float64")
        layer = job.layer
        function = torch.nn.functional.conv_transpose3d
        # PyTorch has no padding behind: cut less there by output_padding, or compute more and cut it.
        more = [max(0, lo - hi) for lo, hi in zip(layer.before, layer.behind, strict=True)]
        if any(m >= max(s, d) for m, s, d in zip(more, layer.strides, layer.dilations, strict=True)):
            raise Unsupported("output_padding must be smaller than either stride or dilation")
        sizes = [(slice(0, o)) for o in layer.output]
        cut = any(hi > lo for lo, hi in zip(layer.before, layer.behind, strict=True))

        def run(x: Any, w: Any) -> Any:
            y = function(x, w, None, layer.strides, layer.before, more, 1, layer.dilations)
            return y[:, :, sizes[0], sizes[1], sizes[2]] if cut else y

        def guarded(call: Callable[[], Any]) -> Callable[[], Any]:
            def timed() -> Any:
                with torch.inference_mode():
                    return call()

            return timed

        def end_to_end(x_format: Any, w_format: Any) -> Callable[[], Array]:
            def timed() -> Array:
                x = torch.from_numpy(relaid(job.value, job.layout, "NCDHW")).contiguous(memory_format=x_format)
                w = torch.from_numpy(np.transpose(job.filter, (4, 3, 0, 1, 2))).contiguous(memory_format=w_format)
                return packed(posed(job, run(x, w).numpy(), "NCDHW"))

            return guarded(timed)

        formats = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
        found = []
        for (x_name, x_format), (w_name, w_format) in itertools.product(formats.items(), repeat=2):
            name = f"{x_name}, filter {w_name}"
            if job.end_to_end:
                found.append(Call(name, end_to_end(x_format, w_format), lambda result: result))
                continue
            x = torch.from_numpy(packed(relaid(job.value, job.layout, "NCDHW"))).contiguous(memory_format=x_format)
            w = torch.from_numpy(packed(np.transpose(job.filter, (4, 3, 0, 1, 2)))).contiguous(memory_format=w_format)
            call = guarded(lambda x=x, w=w: run(x, w))  # type: ignore[misc]
            found.append(Call(name, call, lambda result: posed(job, result.numpy(), "NCDHW")))
        return found


class TensorFlow(Contender):
    """`tf.nn.conv3d_transpose` with oneDNN's kernels, eager and as a graph."""

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
        layer = job.layer
        steps, dilations = [1, *layer.strides, 1], [1, *layer.dilations, 1]

        def function(x: Any, w: Any) -> Any:
            return tf.nn.conv3d_transpose(x, w, layer.output_shape(), steps, layer.padding, "NDHWC", dilations)

        graph = tf.function(function)  # operands are arguments, so that they cannot be folded into constants
        found = []
        for name, call in (("NDHWC, graph", graph), ("NDHWC, eager", function)):
            if job.end_to_end:

                def timed(call: Callable[[Any, Any], Any] = call) -> Array:
                    x = packed(relaid(job.value, job.layout, "NDHWC"))
                    return packed(posed(job, call(tf.constant(x), tf.constant(job.filter)).numpy(), "NDHWC"))

                found.append(Call(name, timed, lambda result: result))
                continue
            x, w = tf.constant(packed(relaid(job.value, job.layout, "NDHWC"))), tf.constant(job.filter)
            run = lambda call=call, x=x, w=w: call(x, w).numpy()  # noqa: E731 - .numpy() waits, and copies nothing
            found.append(Call(name, run, lambda result: posed(job, result, "NDHWC")))
        return found


class Jax(Contender):
    """`jax.lax.conv_general_dilated` of the input dilated by the stride, compiled, with a flipped filter."""

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
        # The dilated input has (n-1)*s + 1 cells; K-1 more before and behind give every cell that a tap reaches.
        padding = [
            (span - 1 - lo, span - 1 - hi) for span, lo, hi in zip(layer.spans, layer.before, layer.behind, strict=True)
        ]

        def compiled(layout: str) -> Callable[[Any, Any], Any]:
            def function(x: Any, w: Any) -> Any:
                return jax.lax.conv_general_dilated(
                    x, w, (1, 1, 1), padding, lhs_dilation=layer.strides, rhs_dilation=layer.dilations,
                    dimension_numbers=(layout, "DHWOI", layout), precision=jax.lax.Precision.HIGHEST,
                )  # fmt: skip

            jitted: Callable[[Any, Any], Any] = jax.jit(function)
            return jitted

        def flipped() -> Array:
            return packed(job.filter[::-1, ::-1, ::-1])

        found = []
        for layout in ("NDHWC", "NCDHW"):
            call = compiled(layout)
            if job.end_to_end:

                def timed(call: Callable[[Any, Any], Any] = call, layout: str = layout) -> Array:
                    result = call(packed(relaid(job.value, job.layout, layout)), flipped())
                    return packed(posed(job, np.asarray(result), layout))

                found.append(Call(layout, timed, lambda result: result))
                continue
            x, w = jax.device_put(packed(relaid(job.value, job.layout, layout))), jax.device_put(flipped())
            run = lambda call=call, x=x, w=w: call(x, w).block_until_ready()  # noqa: E731
            found.append(Call(layout, run, lambda result, layout=layout: posed(job, np.asarray(result), layout)))  # type: ignore[misc]
        return found


FRAMEWORKS: dict[str, Callable[[int], Contender]] = {"torch": Torch, "tensorflow": TensorFlow, "jax": Jax}
