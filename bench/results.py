"""The results file: what a run found as one JSON document, and the reading of it.

Raw seconds of every call are in it, and all that is derived from them is derived here, so that a reader can do it
again. Names carry their units. SCHEMA_VERSION changes with every change that a reader could trip over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import statistics
from bench.contenders.roof import SIZES, sizes
from bench.layers import TRANSPOSE, Layer
from bench.measure import Options, settings
from bench.reference import dtype_named
from bench.statistics import Interval, Series

Row = dict[str, Any]
Document = dict[str, Any]
SCHEMA = "gemmconv-bench"
SCHEMA_VERSION = 1
CONVENTIONS = {
    "flops": "2*N*D*H*W*Cin*Cout*kd*kh*kw/groups with the input sizes and channels of the transposed convolution, "
    "whatever the operation; cropped products counted; complex ones 4 times",
    "roof": "sgemm at {}, sizes of the transposed convolution and channels of a group, warm, one call a worker at "
    "once, BLAS at one thread",
    "bytes": "operands and result, each once",
    "ratio": "the interquartile mean of the rounds' ratios of contender to subject: above 1 the subject is faster",
    "interval": "bootstrap over rounds, both sides by the same ones, with the deviation from launch to launch added, "
    "if there are several",
    "median_seconds": "the median of the visits' medians; a visit is warmed up, then timed for a few calls",
    "spread_fraction": "the interquartile range of the visits' medians over their median",
    "error_fraction": "the largest difference from the float64 result over its largest magnitude; what is above "
    "error_bound, times the root of products a cell / 32768 where there are more, is wrong",
}
# Layers whose work several workers should share well.
_LARGE_FLOPS = 1e9
_NEAR = 0.9
FRAMEWORKS = ("torch", "tensorflow", "onnxruntime", "openvino", "jax")
# Statuses of a row: all but 'ok' and 'unsupported' are failures of the contender.
FAILURES = ("wrong", "raised", "hung", "died", "given up")


def op_of(found: Document) -> str:
    """The operation that a result is of; the first results do not say it."""
    return str(found["settings"].get("op", TRANSPOSE))


def series_of(row: Row) -> Series:
    """A row's visits."""
    return Series(row["visits_seconds"], row["launch_of_visit"])


def document(
    options: Options, contenders: Sequence[Row], measured: Sequence[Row], environment: Mapping[str, Any]
) -> Document:
    """Put together what a run found."""
    layers = {layer.name: layer for layer in options.layers}
    roofs = [
        _roof(row, layers[row["layer"]]) for row in measured if row["contender"] == "sgemm" and row["status"] == "ok"
    ]
    of_layer = {(roof["layer"], roof["workers"]): roof["gflops"] for roof in roofs}
    itemsize = dtype_named(options.dtype).itemsize
    rows = []
    for row in measured:
        if row["contender"] != "sgemm":
            layer = layers[row["layer"]]
            flops = layer.flops(options.dtype.startswith("complex"))
            rows.append(_row(row, flops, layer.bytes(itemsize), of_layer.get((row["layer"], row["workers"]))))
    ratios, summaries = compare_all(rows, options.subject.name, options.confidence)
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "kind": "speed",
        "settings": settings(options),
        "conventions": CONVENTIONS | {"roof": CONVENTIONS["roof"].format(SIZES[options.op])},
        "environment": dict(environment),
        "layers": [layer.to_dict() for layer in options.layers],
        "contenders": list(contenders),
        "rows": rows,
        "layer_roofs": roofs,
        "ratios": ratios,
        "summaries": summaries,
    }


def _roof(row: Row, layer: Layer) -> Row:
    m, n, k = sizes(layer)
    products, seconds = int(row["note"]), series_of(row).median
    return {
        "layer": row["layer"],
        "workers": row["workers"],
        "m": m,
        "n": n,
        "k": k,
        "products": products,
        "median_seconds": seconds / products,
        "gflops": row["workers"] * 2 * m * n * k * products / seconds / 1e9,
        "spread_fraction": series_of(row).spread,
    }


def _row(row: Row, flops: int, bytes_: int, roof_gflops: float | None) -> Row:
    facts = {key: row.get(key) for key in ("layer", "contender", "workers", "status", "detail", "layout", "note")}
    facts |= {"error_fraction": row.get("error"), "flops": flops, "bytes": bytes_}
    facts |= {"visits_seconds": row.get("visits_seconds", []), "launch_of_visit": row.get("launch_of_visit", [])}
    if row["status"] != "ok" or not facts["visits_seconds"]:
        return facts
    series = series_of(facts)
    facts |= {
        "median_seconds": series.median,
        "spread_fraction": series.spread,
        "visits": len(series.visits),
        "calls_a_visit": row["calls"],
        "first_call_seconds": row["first_call_seconds"],
        "gflops": flops / series.median / 1e9,
        "roof_gflops": roof_gflops,
        "roof_share": None if roof_gflops is None else flops / series.median / 1e9 / roof_gflops,
        "noise": statistics.noise(series),
    }
    return facts | {key: row[key] for key in ("first_touch", "phases") if key in row}


def compare_all(rows: Sequence[Row], subject: str, confidence: float) -> tuple[list[Row], list[Row]]:
    """Ratios of every other contender to the subject, and for each and each number of workers what they come to."""
    ok = {(row["layer"], row["contender"], row["workers"]): row for row in rows if "median_seconds" in row}
    pairs: dict[tuple[str, int], dict[str, statistics.Pair]] = {}
    for (layer, name, workers), row in ok.items():
        mine = ok.get((layer, subject, workers))
        if name != subject and mine is not None and mine["launch_of_visit"] == row["launch_of_visit"]:
            pairs.setdefault((name, workers), {})[layer] = series_of(row), series_of(mine)
    ratios: list[Row] = []
    summaries: list[Row] = []
    for (name, workers), found in pairs.items():
        deviation = statistics.launch_deviation(list(found.values()))
        intervals = {layer: statistics.ratio(pair, confidence, deviation) for layer, pair in found.items()}
        for layer, interval in intervals.items():
            ratios.append({"layer": layer, "contender": name, "workers": workers} | interval_row(interval))
        mean = statistics.geometric_mean(list(found.values()), confidence, deviation)
        worst = min(intervals, key=lambda layer: intervals[layer].estimate)
        widths = sorted(interval.width for interval in intervals.values() if interval.width is not None)
        summaries.append(
            {"contender": name, "workers": workers, "rows": len(intervals)}
            | interval_row(mean)
            | {
                "worst_layer": worst,
                "worst_ratio": intervals[worst].estimate,
                "lost_layers": [layer for layer, interval in intervals.items() if interval.estimate < 1],
                "lost_surely": sum((i.high or math.inf) < 1 for i in intervals.values()),
                "won_surely": sum((i.low or 0) > 1 for i in intervals.values()),
                "contain_one": sum(i.contains_one for i in intervals.values()),
                "median_width_fraction": widths[len(widths) // 2] if widths else None,
                "launch_deviation_fraction": deviation,
            }
        )
    return ratios, summaries


def best_framework(ratios: Sequence[Row], workers: int) -> Row | None:
    """What the subject comes to against the fastest framework of each layer, None if fewer than two were measured."""
    of_layer: dict[str, list[float]] = {}
    names: set[str] = set()
    for row in ratios:
        if row["workers"] == workers and row["contender"] in FRAMEWORKS:
            of_layer.setdefault(row["layer"], []).append(row["ratio"])
            names.add(row["contender"])
    if len(names) < 2:
        return None
    best = {layer: min(found) for layer, found in of_layer.items()}
    worst = min(best, key=lambda layer: best[layer])
    mean = _mean(list(best.values()))
    return {"contenders": sorted(names), "ratio": mean, "worst_layer": worst, "worst_ratio": best[worst]}


def by_fastest_calls(found: Document, workers: int) -> float | None:
    """What the subject comes to against the fastest framework of each layer, by the fastest call of each.

    Medians count what a noisy machine does to threads that sleep and not to those that spin; this does not.
    """
    fastest: dict[str, list[float]] = {}
    own: dict[str, float] = {}
    for row in found["rows"]:
        if row["workers"] == workers and "median_seconds" in row:
            seconds = min(map(min, row["visits_seconds"]))
            if row["contender"] == found["settings"]["subject"]:
                own[row["layer"]] = seconds
            elif row["contender"] in FRAMEWORKS:
                fastest.setdefault(row["layer"], []).append(seconds)
    return _mean([min(fastest[layer]) / own[layer] for layer in own if layer in fastest])


def roof_share(found: Document, workers: int) -> float | None:
    """The median over layers of the subject's share of its roof."""
    shares = [row["roof_share"] for row in _own(found, workers).values() if row.get("roof_share") is not None]
    return float(np.median(shares)) if shares else None


def scaling(found: Document, workers: int) -> Row | None:
    """How many times as fast the subject is as with one worker, on layers above 1 GFLOP; None if there are none.

    The geometric mean `ratio`, that of calls `into` an array that is there, and how many of `layers` gain at least
    `_NEAR` of what their roofs do (`near`): None where calls into arrays or roofs were not measured.
    """
    one, many = _own(found, 1), _own(found, workers)
    pairs = [(one[layer], row) for layer, row in many.items() if layer in one and row["flops"] > _LARGE_FLOPS]
    if not pairs:
        return None
    gains = [a["median_seconds"] / b["median_seconds"] for a, b in pairs]
    into: list[float] = []
    if all("first_touch" in row for pair in pairs for row in pair):
        given = [[np.median(row["first_touch"]["given_seconds"]) for row in pair] for pair in pairs]
        into = [float(a / b) for a, b in given]
    near = None
    if all(row.get("roof_gflops") for pair in pairs for row in pair):
        roofs = [b["roof_gflops"] / a["roof_gflops"] for a, b in pairs]
        near = sum(gain >= _NEAR * roof for gain, roof in zip(gains, roofs, strict=True))
    return {"ratio": _mean(gains), "into": _mean(into), "near": near, "layers": len(pairs)}


def seen_from(found: Document, subject: str) -> Document:
    """Return a result of a speed run with the ratios of another of its contenders."""
    names = {row["contender"] for row in found["rows"]}
    if subject not in names:
        raise ValueError(f"the result has no contender {subject!r}; it has {', '.join(sorted(names))}")
    if subject == found["settings"]["subject"]:
        return found
    against = [found["settings"]["subject"], *found["settings"]["against"]]
    ratios, summaries = compare_all(found["rows"], subject, found["settings"]["confidence"])
    settings = found["settings"] | {"subject": subject, "against": [name for name in against if name != subject]}
    return found | {"settings": settings, "ratios": ratios, "summaries": summaries}


def _own(found: Document, workers: int) -> dict[str, Row]:
    """The subject's rows with a time, by layer."""
    rows = (row for row in found["rows"] if row["contender"] == found["settings"]["subject"])
    return {row["layer"]: row for row in rows if row["workers"] == workers and "median_seconds" in row}


def _mean(ratios: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def interval_row(interval: Interval) -> Row:
    """An interval as JSON has it."""
    return {"ratio": interval.estimate, "low": interval.low, "high": interval.high}


def failures(rows: Iterable[Row]) -> list[Row]:
    """Rows of contenders that were wrong, raised, hung or died."""
    return [row for row in rows if row["status"] in FAILURES]


def write(document: Document, path: Path) -> None:
    """Write a document; numbers that JSON has not are refused."""
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


_NEEDED = {
    "settings": dict,
    "conventions": dict,
    "environment": dict,
    "layers": list,
    "contenders": list,
    "rows": list,
}


def read(path: Path) -> Document:
    """Read a document of this schema and version; a ValueError says what else the file is."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no result of this bench: its schema is not {SCHEMA!r}")
    if found["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {found['schema_version']}, this bench reads {SCHEMA_VERSION}")
    for key, kind in _NEEDED.items():
        if not isinstance(found.get(key), kind):
            raise ValueError(f"{path} lacks {key!r}")
    for number, row in enumerate(found["rows"]):
        lacking = {"layer", "contender", "workers", "status"} - set(row)
        if lacking:
            raise ValueError(f"{path}: rows[{number}] lacks {', '.join(sorted(lacking))}")
    return dict(found)
