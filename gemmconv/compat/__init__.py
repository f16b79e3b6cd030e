"""Convolutions under the names, layouts and rules of other frameworks, on NumPy arrays.

`gemmconv.compat.torch` has the functions of ``torch.nn.functional``, `gemmconv.compat.onnx` the operators of ONNX. Both
turn a call into the problem that describes it; neither imports the framework it is named for.
"""
