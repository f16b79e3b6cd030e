"""ONNX Runtime and OpenVINO: a model of one operator with its filter as a constant, as such engines are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.contenders.base import Call, Contender, Job, only_float32, packed
from bench.layers import TRANSPOSE

CONSTANT = "the filter is a constant of the model, prepared before"


def model(job: Job) -> bytes:
    """The layer as an ONNX model, NCDHW: cuts are pads, cells that no tap reaches are output_padding."""
    import onnx
    from onnx import helper

    layer = job.layer
    filter = job.operands("NCDHW", onnx=True)[1]
    attributes = {
        "kernel_shape": layer.kernel,
        "strides": layer.strides,
        "dilations": layer.dilations,
        "group": layer.groups,
        "pads": [*layer.before, *(max(0, hi) for hi in layer.behind)],
    }
    if layer.op == TRANSPOSE:
        attributes["output_padding"] = [max(0, -hi) for hi in layer.behind]
    kind = onnx.TensorProto.FLOAT
    node = helper.make_node("ConvTranspose" if layer.op == TRANSPOSE else "Conv", ["x", "w"], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", kind, layer.shape(layer.roles[0], "NCDHW"))],
        [helper.make_tensor_value_info("y", kind, layer.result_shape("NCDHW"))],
        [helper.make_tensor("w", kind, filter.shape, filter.tobytes(), raw=True)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(made.SerializeToString())


def calls(job: Job, run: Callable[[Any], Any], note: str) -> list[Call]:
    """The one way of an engine whose arrays are NCDHW."""
    layout = job.format("NCDHW")
    if job.end_to_end:

        def timed() -> Any:
            return packed(job.posed(run(job.operands("NCDHW")[0]), "NCDHW"))

        return [Call(layout, timed, lambda result: result, note=note)]
    value = job.operands("NCDHW")[0]
    return [Call(layout, lambda: run(value), lambda result: job.posed(result, "NCDHW"), note=note)]


class OnnxRuntime(Contender):
    """`InferenceSession.run` on the CPU provider; its arena gives the memory of an earlier result to the next."""

    def __init__(self, workers: int) -> None:
        import onnxruntime

        self.versions = {"onnxruntime": onnxruntime.__version__}
        self._workers = workers

    def calls(self, job: Job) -> list[Call]:
        """NCDHW, the operator's only layout."""
        import onnxruntime

        only_float32(job)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._workers
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model(job), options, providers=["CPUExecutionProvider"])
        return calls(job, lambda x: session.run(None, {"x": x})[0], CONSTANT)


class OpenVino(Contender):
    """A compiled model's `infer` with float32 arithmetic, for latency; it writes into a tensor of its own."""

    def __init__(self, workers: int) -> None:
        import openvino

        self.versions = {"openvino": openvino.__version__}
        self._core = openvino.Core()
        self._settings = {
            "INFERENCE_NUM_THREADS": workers,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }

    def calls(self, job: Job) -> list[Call]:
        """NCDHW, as ONNX has it."""
        only_float32(job)
        request = self._core.compile_model(
            self._core.read_model(model(job)), "CPU", self._settings
        ).create_infer_request()
        note = f"{CONSTANT}; the result's memory is used again"
        return calls(job, lambda x: request.infer([x], share_inputs=True, share_outputs=True)[0], note)


ENGINES: dict[str, Callable[[int], Contender]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}
