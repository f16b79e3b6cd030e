"""Drawings of a results file, each of one of them, made without a display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.layers import SWEEP_BASE, Layer
from bench.results import Document, op_of

# Okabe and Ito's colours, which differ for all kinds of sight, with markers that differ in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#777777")
MARKERS = "osD^vP*Xh"
# The parts of gemmconv's time, from the bottom of a stack up; others that a profile may have come after them.
PHASES = ("gemm", "pack", "col2im", "store", "wait", "overhead")
PHASE_TITLES = {"pack": "packing, padding", "gemm": "GEMM", "store": "copy-out", "wait": "waiting"}


def draw_all(found: Document, stem: Path, kind: str) -> list[Path]:
    """Draw all that a result has data for; return the files, which begin with `stem`."""
    matplotlib.use("agg")
    style: dict[Any, Any] = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "svg.hashsalt": "gemmconv", "figure.dpi": 110, "axes.titlesize": 10, "axes.titleweight": "bold",
    }  # fmt: skip
    drawings: dict[str, Callable[[Document], Figure | None]]
    drawings = {"relative": relative, "roofline": roofline, "phases": phases}
    for workers in found["settings"]["workers"]:
        drawings[f"sweep-{workers}"] = partial(sweep, workers=workers)
    paths = []
    with matplotlib.rc_context(style):
        for name, draw in drawings.items():
            figure = draw(found) if found["kind"] == "speed" else None
            if figure is not None:
                path = stem.with_name(f"{stem.name}-{name}.{kind}")
                figure.savefig(path, metadata={"Date": None} if kind == "svg" else None)
                paths.append(path)
    return paths


def _figure(width: float, height: float, columns: int, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def _caption(found: Document) -> str:
    machine = found["environment"].get("machine", {})
    settings = found["settings"]
    text = f"{machine.get('cpu_model')}, {machine.get('usable_cores')} cores"
    text += f"; {op_of(found)}, {settings['dtype']}, {settings['layout']}"
    return text + (", end to end" if settings["end_to_end"] else "")


def _layers(found: Document) -> list[str]:
    return [layer["name"] for layer in found["layers"]]


def _plain(value: float, _: object = None) -> str:
    return f"{value:g}"


def relative(found: Document) -> Figure | None:
    """Speed relative to each contender: a row a layer, a mark a contender with its interval, a line at 1."""
    subject = found["settings"]["subject"]
    counts = [n for n in found["settings"]["workers"] if any(r["workers"] == n for r in found["ratios"])]
    if not counts:
        return None
    names = [n for n in found["settings"]["against"] if any(r["contender"] == n for r in found["ratios"])]
    labels = _layers(found)
    rows = [*labels, "geometric mean"]
    height = 1.6 + 0.3 * len(rows)
    figure, axes = _figure(5.2 * len(counts) + 1, height, len(counts), sharey=True, sharex=True)
    ratios = [r["ratio"] for r in found["ratios"]]
    low, high = min(*ratios, 0.8) / 1.15, max(*ratios, 1.25) * 1.15
    for ax, workers in zip(axes, counts, strict=True):
        ax.axvspan(low, 1, color="#f7e9e2", zorder=0)
        ax.axvline(1, color="black", linewidth=1.2)
        ax.axhline(len(labels) - 0.5, color="#999999", linewidth=0.8)
        for i, name in enumerate(names):
            shift = (i - (len(names) - 1) / 2) * 0.72 / max(1, len(names))
            points = [
                (labels.index(r["layer"]), r)
                for r in found["ratios"]
                if (r["contender"], r["workers"]) == (name, workers)
            ]
            points += [
                (len(labels), s) for s in found["summaries"] if (s["contender"], s["workers"]) == (name, workers)
            ]
            if not points:
                continue
            x = np.array([row["ratio"] for _, row in points])
            lows = np.array([row["low"] or row["ratio"] for _, row in points])
            highs = np.array([row["high"] or row["ratio"] for _, row in points])
            ax.errorbar(
                x, [place + shift for place, _ in points], xerr=[x - lows, highs - x], linestyle="none", label=name,
                color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=4.5, elinewidth=1,
            )  # fmt: skip
        for place in range(0, len(rows), 2):
            ax.axhspan(place - 0.5, place + 0.5, color="#000000", alpha=0.035, zorder=0, linewidth=0)
        _log_ticks(ax, low, high)
        ax.set_title(f"{workers} worker{'s' if workers > 1 else ''}")
        ax.set_yticks(range(len(rows)), rows)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(f"time of the other / time of {subject}")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(7, len(names)), frameon=False
    )
    figure.suptitle(f"Speed of {subject} relative to others: right of 1 it is faster\n{_caption(found)}", fontsize=10)
    return figure


def _log_ticks(ax: Axes, low: float, high: float) -> None:
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    choices = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100, 200, 500, 1000]
    ax.set_xticks([c for c in choices if low <= c <= high])
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)


def roofline(found: Document) -> Figure | None:
    """The subject's layers under measured ceilings: a copy's bandwidth in memory and in L2, and sgemm's rate."""
    roofs = {roof["workers"]: roof for roof in found["environment"].get("roofs", ())}
    subject = found["settings"]["subject"]
    mine = [row for row in found["rows"] if row["contender"] == subject and "gflops" in row]
    counts = [n for n in found["settings"]["workers"] if n in roofs and any(row["workers"] == n for row in mine)]
    if not counts:
        return None
    figure, axes = _figure(6.4 * len(counts), 5.6, len(counts), sharey=True)
    intensities = [row["flops"] / row["bytes"] for row in mine]
    tops = [roof["sgemm_gflops"] for roof in roofs.values()]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 3, 200)
    labelled = []
    for ax, workers in zip(axes, counts, strict=True):
        roof = roofs[workers]
        top = roof["sgemm_gflops"]
        for key, colour, text in (
            ("copy_memory_gb_per_s", "#D55E00", "copy in memory"),
            ("copy_l2_gb_per_s", "#E69F00", "copy in L2"),
        ):
            speed = roof[key]
            ax.plot(x, np.minimum(top, speed * x), color=colour, label=f"{text}: {speed:.0f} GB/s")
        ax.axhline(top, color="black", linewidth=1.2, label=f"sgemm: {top:.0f} GFLOP/s")
        rows = [row for row in mine if row["workers"] == workers]
        places = {row["layer"]: (row["flops"] / row["bytes"], row["gflops"]) for row in rows}
        ax.plot(*zip(*places.values(), strict=True), "o", color="#0072B2", markersize=4.5, label=subject)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(x[0], x[-1])
        ax.set_ylim(min(row["gflops"] for row in mine) / 1.7, max(tops) * 1.5)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(_plain))
            axis.set_minor_formatter(NullFormatter())
        ax.grid(color="#e5e5e5", linewidth=0.6)
        labelled.append((ax, places))
        ax.set_title(f"{workers} worker{'s' if workers > 1 else ''}")
        ax.set_xlabel("FLOP a byte of operands and result, each moved once")
        ax.legend(loc="lower right", frameon=False, fontsize=8)
    axes[0].set_ylabel("GFLOP/s (input-sized count)")
    figure.suptitle(f"Roofline of {subject}, ceilings as measured\n{_caption(found)}", fontsize=10)
    figure.draw_without_rendering()  # from here on it is known where on the page things are
    for ax, places in labelled:
        _label_points(ax, places)
    return figure


def _label_points(ax: Axes, places: dict[str, tuple[float, float]]) -> None:
    """Name each point, in a place beside it where no name or point is yet; a thin line leads there if it is far."""
    points = {name: ax.transData.transform(place) for name, place in places.items()}
    taken: list[tuple[float, float, float, float]] = [(p[0] - 4, p[1] - 4, p[0] + 4, p[1] + 4) for p in points.values()]
    around = (1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1.3), (0, -1.3)
    offsets = [(reach * dx, reach * dy) for reach in (7, 18, 30, 44, 60) for dx, dy in around]
    for name, (px, py) in sorted(points.items(), key=lambda item: item[1][0]):
        width, height = 6.2 * len(name), 11.0
        for dx, dy in offsets:
            left = px + dx - (width if dx < 0 else width / 2 if dx == 0 else 0.0)
            box = (left, py + dy - height / 2, left + width, py + dy + height / 2)
            free = all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
            inside = ax.bbox.x0 < box[0] and box[2] < ax.bbox.x1
            if free and inside:
                break
        taken.append(box)
        far = max(abs(dx), abs(dy)) > 12
        ax.annotate(
            name, places[name], xytext=(dx * 72 / ax.figure.dpi, dy * 72 / ax.figure.dpi), textcoords="offset points",
            fontsize=7, va="center", ha="left" if dx > 0 else "right" if dx < 0 else "center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5} if far else None,
        )  # fmt: skip


def phases(found: Document) -> Figure | None:
    """Where the subject's worker-seconds go, as parts of each layer's, stacked."""
    subject = found["settings"]["subject"]
    rows = [row for row in found["rows"] if row["contender"] == subject and row.get("phases", {}).get("status") == "ok"]
    counts = [n for n in found["settings"]["workers"] if any(row["workers"] == n for row in rows)]
    if not counts:
        return None
    labels = [name for name in _layers(found) if any(row["layer"] == name for row in rows)]
    names = {name for row in rows for name in row["phases"]["worker_seconds"]}
    order = [name for name in PHASES if name in names] + sorted(names - set(PHASES))
    figure, axes = _figure(5.2 * len(counts) + 1, 1.5 + 0.28 * len(labels), len(counts), sharey=True)
    for ax, workers in zip(axes, counts, strict=True):
        at = {row["layer"]: row["phases"] for row in rows if row["workers"] == workers}
        left = np.zeros(len(labels))
        for i, name in enumerate(order):
            parts = np.array(
                [
                    at[label]["worker_seconds"].get(name, 0) / at[label]["total_worker_seconds"] if label in at else 0
                    for label in labels
                ]
            )
            ax.barh(
                labels,
                parts * 100,
                left=left * 100,
                color=COLOURS[i % len(COLOURS)],
                label=PHASE_TITLES.get(name, name),
                height=0.78,
            )
            left += parts
        rest = np.array([max(0.0, 1 - part) if label in at else 0 for label, part in zip(labels, left, strict=True)])
        ax.barh(labels, rest * 100, left=left * 100, color="#dddddd", label="not accounted for", height=0.78)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.set_xlim(0, 100)
        ax.tick_params(axis="y", length=0)
        ax.set_title(f"{workers} worker{'s' if workers > 1 else ''}")
        ax.set_xlabel("% of the workers' time")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(order) + 1, frameon=False)
    figure.suptitle(f"Where the time of {subject} goes\n{_caption(found)}", fontsize=10)
    return figure


def sweep(found: Document, workers: int) -> Figure | None:
    """Time against each size of the sweep, a line a contender; on these axes a power is a straight line."""
    layers = [Layer.from_dict(fields) for fields in found["layers"]]
    places: dict[str, list[tuple[int, str]]] = {}
    for layer in layers:
        for axis, size in layer.sweep:
            places.setdefault(axis, []).append((size, layer.name))
    places = {axis: sorted(points) for axis, points in places.items() if len(points) > 1}
    if not places:
        return None
    names: Sequence[str] = [found["settings"]["subject"], *found["settings"]["against"]]
    times = {
        (r["contender"], r["layer"]): r["median_seconds"] * 1e3
        for r in found["rows"]
        if "median_seconds" in r and r["workers"] == workers
    }
    columns = min(3, len(places))
    figure, axes = _figure(3.9 * columns, 3.1 * -(-len(places) // columns) + 0.9, columns, -(-len(places) // columns))
    for ax in axes[len(places) :]:
        ax.set_visible(False)
    for ax, (axis, points) in zip(axes, places.items(), strict=False):
        for i, name in enumerate(names):
            line = [(size, times[name, layer]) for size, layer in points if (name, layer) in times]
            if line:
                ax.plot(
                    *zip(*line, strict=True), color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                    markersize=4, linewidth=1.8 if i == 0 else 1, zorder=3 if i == 0 else 2, label=name,
                )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        sizes = [size for size, _ in points]
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(_plain))
        low, high = ax.get_ylim()
        if high / low < 30:  # less than two powers of ten have marks of their own
            ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            ax.yaxis.set_minor_formatter(FuncFormatter(_plain))
        else:
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(color="#e5e5e5", linewidth=0.6)
        ax.set_title(axis if axis != "channels" else "channels (Cin = Cout)")
        ax.set_ylabel("ms")
    handles: dict[str, Any] = {}
    for ax in axes[: len(places)]:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), frameon=False
    )
    base = ", ".join(f"{axis} {size}" for axis, size in SWEEP_BASE.items())
    title = f"Cost as one size grows, the others fixed ({base}); {workers} worker{'s' if workers > 1 else ''}"
    figure.suptitle(f"{title}\n{_caption(found)}", fontsize=10)
    return figure
