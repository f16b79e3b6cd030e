"""`vectors`: a suite as files, for engines without Python: .npy arrays, and one JSON with the parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.contenders.base import packed
from bench.layers import CONV, FILTER_GRADIENT, TRANSPOSE, Layer
from bench.reference import bound_of, operands, reference, relaid

VECTORS_VERSION = 2
# Names of the operands, and the definition.
NAMES = {TRANSPOSE: ("value", "filter"), CONV: ("input", "filter"), FILTER_GRADIENT: ("input", "out_backprop")}
RULES = {
    TRANSPOSE: "result[b, i*stride + a*dilation - padding_before, co] += sum over ci of value[b, i, ci] * "
    "filter[a, co, ci]",
    CONV: "result[b, i, ci] += sum over co of input[b, i*stride + a*dilation - padding_before, co] * filter[a, co, ci]",
    FILTER_GRADIENT: "result[a, co, ci] += sum over b and i of input[b, i*stride + a*dilation - padding_before, co] * "
    "out_backprop[b, i, ci]",
}


def write_vectors(layers: Sequence[Layer], folder: Path, dtype: str, layout: str, seed: int) -> Path:
    """Write operands and float64 result of each layer; return the path of the index, which is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for layer in layers:
        exact = reference(layer, dtype, seed)
        if layer.roles[2] != "filter":
            exact = packed(relaid(exact, "NDHWC", layout))
        arrays = dict(zip((*NAMES[layer.op], "result"), (*operands(layer, dtype, layout, seed), exact), strict=True))
        files = {}
        for name, array in arrays.items():
            files[name] = f"{layer.name}.{name}.npy"
            np.save(folder / files[name], array)
        entries.append(
            layer.to_dict()
            | {f"{name}_shape": array.shape for name, array in arrays.items()}
            | {
                "files": files,
                "padding_before": layer.before,
                "padding_after": layer.behind,
                "largest_result": float(np.abs(exact).max(initial=0.0)),
                "error_bound": bound_of(layer, dtype),
            }
        )
    about = (
        f"{RULES[layers[0].op]} on each of the spatial axes; a negative padding_after counts output cells that no tap "
        "reaches. Sizes are those of the transposed convolution, from 'input' with cin channels to 'output' with cout; "
        "filters are [kd, kh, kw, Cout of a group, Cin] in both layouts. A result is right if no cell differs by more "
        "than error_bound times largest_result."
    )
    index = {
        "schema": "gemmconv-vectors",
        "schema_version": VECTORS_VERSION,
        "about": about,
        "op": layers[0].op,
        "dtype": dtype,
        "data_format": layout,
        "seed": seed,
        "layers": entries,
    }
    path = folder / "index.json"
    path.write_text(json.dumps(index, indent=1) + "\n")
    return path
