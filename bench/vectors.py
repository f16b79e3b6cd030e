"""`vectors`: a suite as files, for engines without Python: .npy arrays, and one JSON with the parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.contenders.base import packed, relaid
from bench.layers import Layer
from bench.reference import BOUNDS, operands, reference

VECTORS_VERSION = 1


def write_vectors(layers: Sequence[Layer], folder: Path, dtype: str, layout: str, seed: int) -> Path:
    """Write value, filter and float64 result of each layer; return the path of the index, which is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for layer in layers:
        value, filter = operands(layer, dtype, layout, seed)
        result = packed(relaid(reference(layer, dtype, seed), "NDHWC", layout))
        files = {}
        for name, array in (("value", value), ("filter", filter), ("result", result)):
            files[name] = f"{layer.name}.{name}.npy"
            np.save(folder / files[name], array)
        entries.append(
            layer.to_dict()
            | {
                "files": files,
                "padding_before": layer.before,
                "padding_after": layer.behind,
                "value_shape": value.shape,
                "filter_shape": filter.shape,
                "output_shape": result.shape,
                "largest_result": float(np.abs(result).max(initial=0.0)),
            }
        )
    about = (
        "result[b, i*stride + a*dilation - padding_before, co] += sum over ci of value[b, i, ci] * filter[a, co, ci] "
        "on each of depth, height and width; a negative padding_after counts output cells that no tap reaches: zeros. "
        "Filters are [kd, kh, kw, Cout, Cin] in both layouts. A result is right if no cell differs by more than "
        "error_bound times largest_result."
    )
    index = {
        "schema": "gemmconv-vectors",
        "schema_version": VECTORS_VERSION,
        "about": about,
        "dtype": dtype,
        "data_format": layout,
        "seed": seed,
        "error_bound": BOUNDS[dtype],
        "layers": entries,
    }
    path = folder / "index.json"
    path.write_text(json.dumps(index, indent=1) + "\n")
    return path
