"""`run --memory`: peak resident memory beyond operands and result, each layer in a fresh process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.measure import Options, Row, Seat, Tell, settings
from bench.results import SCHEMA, SCHEMA_VERSION, Document


def measure_memory(options: Options, tell: Tell) -> tuple[list[Row], list[Row]]:
    """Return what is said of the contenders, and a row for each of them, layer and number of workers."""
    contenders: list[Row] = []
    rows: list[Row] = []
    for workers in options.workers:
        seats = [
            Seat(spec, workers, options.keep_env, options.op) for spec in options.contenders if spec.kind != "sgemm"
        ]
        for seat in seats:
            for layer in options.layers:
                tell(f"{workers} worker(s): {seat.spec.name}, {layer.name}")
                if not seat.sit() and seat.status == "missing":
                    break
                answer = seat.ask(
                    "memory",
                    options.timeout_s,
                    layer=layer.to_dict(),
                    dtype=options.dtype,
                    layout=options.layout,
                    end_to_end=options.end_to_end,
                    seed=options.seed,
                )
                rows.append({"layer": layer.name, "contender": seat.spec.name, "workers": workers} | answer)
                seat.close()
            contenders.append(seat.describe())
    return contenders, rows


def memory_document(
    options: Options, contenders: Sequence[Row], rows: Sequence[Row], environment: Mapping[str, Any]
) -> Document:
    """Put together what the pass found."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "kind": "memory",
        "settings": settings(options),
        "conventions": {
            "peak_bytes": "the high-water mark of resident memory during a layer's first call, after a tiny one, "
            "less what was resident before it and less the result"
        },
        "environment": dict(environment),
        "layers": [layer.to_dict() for layer in options.layers],
        "contenders": list(contenders),
        "rows": list(rows),
    }
