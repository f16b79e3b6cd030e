"""Results as tables on a terminal. It derives nothing: results.py did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.compare import Comparison
from bench.results import Document, Row, best_framework, by_fastest_calls, failures, op_of, roof_share, scaling

PLAIN_WIDTH = 170  # where the output is no terminal


def console(stderr: bool = False) -> Console:
    """A console; into a file or a pipe it is wide enough for the tables."""
    made = Console(stderr=stderr, highlight=False, emoji=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, emoji=False, width=PLAIN_WIDTH)


def interval_text(row: Mapping[str, Any]) -> str:
    """A ratio with its interval."""
    if row["low"] is None:
        return f"{row['ratio']:.2f}"
    return f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})"


def seconds_text(seconds: float) -> str:
    """A time with a unit that fits."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def print_speed(found: Document, out: Console) -> None:
    """Tables of a speed run: a row a layer, what it comes to, and everything that went wrong or is doubtful."""
    subject, against = found["settings"]["subject"], found["settings"]["against"]
    rows = {(row["workers"], row["layer"], row["contender"]): row for row in found["rows"]}
    ratios = {(row["workers"], row["layer"], row["contender"]): row for row in found["ratios"]}
    others = [name for name in against if any(name == row["contender"] for row in found["rows"])]
    percent = f"{found['settings']['confidence']:.0%}"
    for workers in found["settings"]["workers"]:
        mine = escape(subject)
        meaning = f"time of others / time of {mine} ({percent} interval), above 1 {mine} is faster"
        table = Table(title=f"{op_of(found)}, {workers} worker(s): {meaning}")
        for name in ("layer", subject, "spread", "GFLOP/s", "of roof"):
            table.add_column(escape(name), justify="left" if name == "layer" else "right")
        for name in others:
            table.add_column(escape(name), justify="right")
        for layer in (layer["name"] for layer in found["layers"]):
            own = rows.get((workers, layer, subject))
            if own is None:
                continue
            cells = [layer, *_own_cells(own)]
            for name in others:
                ratio, row = ratios.get((workers, layer, name)), rows.get((workers, layer, name))
                cells.append(_ratio_cell(ratio, row))
            table.add_row(*cells)
        out.print(table)
    if found["summaries"]:
        out.print(_summary_table(found["summaries"], percent))
    for workers in found["settings"]["workers"]:
        best = best_framework(found["ratios"], workers)
        if best is not None:
            out.print(
                f"against the fastest of {', '.join(best['contenders'])} on each layer, {workers} worker(s): "
                f"{best['ratio']:.2f}, worst {best['worst_layer']} {best['worst_ratio']:.2f}; "
                f"by the fastest calls {by_fastest_calls(found, workers):.2f}"
            )
    for workers in found["settings"]["workers"]:
        share, gain = roof_share(found, workers), scaling(found, workers) if workers > 1 else None
        texts = [] if share is None else [f"median share of the roof {share:.0%}"]
        if gain is not None:
            into = "" if gain["into"] is None else f" ({gain['into']:.2f} with out=)"
            texts.append(f"{gain['ratio']:.2f} times as fast as with 1 on layers above 1 GFLOP{into}")
            if gain["near"] is not None:
                texts.append(f"90 % and more of what the roofs gain on {gain['near']} of {gain['layers']} of them")
        if texts:
            out.print(f"{escape(subject)}, {workers} worker(s): {', '.join(texts)}")
    for name in ("flops", "roof", "interval"):
        out.print(f"{name}: {found['conventions'][name]}", style="dim")
    _print_doubts(found, out)


def _own_cells(row: Row) -> list[str]:
    if "median_seconds" not in row:
        return [f"[red]{row['status']}[/red]", "", "", ""]
    share = row["roof_share"]
    return [
        seconds_text(row["median_seconds"]),
        f"{row['spread_fraction']:.1%}",
        f"{row['gflops']:.1f}",
        "" if share is None else f"{share:.0%}",
    ]


def _ratio_cell(ratio: Row | None, row: Row | None) -> str:
    if ratio is not None:
        text = interval_text(ratio)
        if ratio["high"] is not None and ratio["high"] < 1:
            return f"[red]{text}[/red]"
        return f"[green]{text}[/green]" if ratio["low"] is not None and ratio["low"] > 1 else text
    if row is None:
        return ""
    if "median_seconds" in row:
        return seconds_text(row["median_seconds"])
    return row["status"] if row["status"] == "unsupported" else f"[red]{row['status']}[/red]"


def _summary_table(summaries: Sequence[Row], percent: str) -> Table:
    table = Table(title=f"Geometric means of the ratios ({percent} intervals), and where the other is faster")
    for name in (
        "against",
        "workers",
        "rows",
        "geometric mean",
        "worst row",
        "interval has 1",
        "median width",
        "others faster in",
    ):
        table.add_column(name, justify="right" if name in ("workers", "rows", "geometric mean") else "left")
    for row in summaries:
        width = row["median_width_fraction"]
        lost = row["lost_layers"]
        table.add_row(
            escape(row["contender"]),
            str(row["workers"]),
            str(row["rows"]),
            interval_text(row),
            f"{row['worst_layer']} {row['worst_ratio']:.2f}",
            f"{row['contain_one']} of {row['rows']}",
            "" if width is None else f"{width:.1%}",
            f"{len(lost)} ({row['lost_surely']} surely): {', '.join(lost)}" if lost else "none",
        )
    return table


def _print_doubts(found: Document, out: Console) -> None:
    """What is missing, what failed, what is noisy, and what holds a contender back."""
    for name, detail in sorted({(c["name"], c["detail"]) for c in found["contenders"] if c["status"] == "missing"}):
        out.print(f"{escape(name)} was not measured: {escape(detail)}")
    print_failures(found, out)
    noisy = [(row, note) for row in found["rows"] for note in row.get("noise", ())]
    for row, note in noisy:
        out.print(
            f"noise: {row['layer']}, {escape(row['contender'])}, {row['workers']} worker(s): {note}", style="yellow"
        )
    print_warnings(found["environment"], out)


def print_failures(found: Document, out: Console) -> None:
    """A line for rows that have no result for the same reason."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for row in failures(found["rows"]):
        key = row["status"], row["contender"], str(row["detail"])
        alike.setdefault(key, []).append(f"{row['layer']} ({row['workers']})")
    for (status, name, detail), places in alike.items():
        where = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        out.print(f"{status.upper()}: {name}: {detail}: {where}", style="red", markup=False)


def print_warnings(environment: Mapping[str, Any], out: Console) -> None:
    """Sentences about variables and about others at work."""
    for name in environment["removed_variables"]:
        out.print(f"removed for all contenders: {name} (--keep-env keeps it)", style="yellow")
    for sentence in [*environment["warnings"], *environment.get("others", {}).get("sentences", [])]:
        out.print(f"warning: {escape(sentence)}", style="yellow")


def print_memory(found: Document, out: Console) -> None:
    """A table of peaks."""
    table = Table(title=f"{op_of(found)}: peak memory beyond operands and result, MiB")
    names = [found["settings"]["subject"], *found["settings"]["against"]]
    columns = [(name, workers) for workers in found["settings"]["workers"] for name in names]
    rows = {(row["contender"], row["workers"], row["layer"]): row for row in found["rows"]}
    columns = [column for column in columns if any(column == key[:2] for key in rows)]
    table.add_column("layer")
    for name, workers in columns:
        table.add_column(escape(f"{name}, {workers}"), justify="right")
    for layer in found["layers"]:
        cells = [rows.get((*column, layer["name"])) for column in columns]
        texts = [
            "" if c is None else f"{c['peak_bytes'] / 2**20:.1f}" if c["status"] == "ok" else c["status"] for c in cells
        ]
        table.add_row(layer["name"], *texts)
    out.print(table)
    _print_doubts(found, out)


def print_environment(found: Mapping[str, Any], out: Console) -> None:
    """The environment as text, and its roofs as a table."""
    for part in ("machine", "versions", "variables"):
        out.print(f"{part}:", style="bold")
        for key, value in found[part].items():
            text = " ".join(map(str, value)) if isinstance(value, list) and key != "caches" else value
            if key == "caches":
                text = "; ".join(value)
            elif key.endswith("_bytes") and isinstance(value, int):
                text = f"{value / 2**20:g} MiB"
            out.print(f"  {key:<22} {'unknown' if text is None else text}", markup=False)
        if not found[part]:
            out.print("  none is set")
    out.print("BLAS libraries:", style="bold")
    for library in found["blas_libraries"]:
        out.print(
            f"  {library['filepath']}: {library['internal_api']} {library['version']}, "
            f"kernels {library['architecture']}, "
            f"{library['num_threads']} threads{', used by gemmconv' if library.get('used') else ''}",
            markup=False,
        )
    if found["roofs"]:
        table = Table(title="Measured roofs: best of a few, copies count bytes read and written")
        for name in ("workers", "sgemm GFLOP/s", "copy in L2 GB/s", "copy in memory GB/s"):
            table.add_column(name, justify="right")
        for roof in found["roofs"]:
            numbers = (roof[key] for key in ("sgemm_gflops", "copy_l2_gb_per_s", "copy_memory_gb_per_s"))
            table.add_row(str(roof["workers"]), *(f"{number:.1f}" for number in numbers))
        out.print(table)
    print_warnings(found, out)


def print_comparison(found: Comparison, fail_over: float, out: Console) -> None:
    """A table of changes, and what they come to."""
    table = Table(title=f"Time after / time before; a regression is surely slower and by more than {fail_over:.1%}")
    for name in ("layer", "contender", "workers", "before", "after", "ratio", ""):
        table.add_column(name, justify="left" if name in ("layer", "contender", "") else "right")
    for change in found.changes:
        interval = {"ratio": change.interval.estimate, "low": change.interval.low, "high": change.interval.high}
        table.add_row(
            change.layer,
            escape(change.contender),
            str(change.workers),
            seconds_text(change.before_seconds),
            seconds_text(change.after_seconds),
            interval_text(interval),
            "[red]REGRESSION[/red]" if change.regressed else "",
        )
    out.print(table)
    if found.mean is not None:
        mean = {"ratio": found.mean.estimate, "low": found.mean.low, "high": found.mean.high}
        out.print(f"geometric mean: {interval_text(mean)}")
    for row in found.broken:
        out.print(
            f"{row['status'].upper()}: {row['layer']}, {row['workers']} worker(s): {row['detail']}",
            style="red",
            markup=False,
        )
    for layer, name, workers in found.missing:
        out.print(f"MISSING: {layer}, {name}, {workers} worker(s)", style="red", markup=False)


def print_constants(shipped: Mapping[str, float], measured: Mapping[str, float], out: Console) -> None:
    """Constants of the cost model, as measured beside those that are shipped."""
    table = Table(title="Constants of gemmconv/lowerings/cost.py, in seconds, FLOP/s and sizes")
    for name in ("name", "shipped", "measured", "ratio"):
        table.add_column(name, justify="left" if name == "name" else "right")
    for name, value in measured.items():
        table.add_row(name, f"{shipped[name]:.3g}", f"{value:.3g}", f"{value / shipped[name]:.2f}")
    out.print(table)
    text = "Only ratios between the constants decide what is chosen: one factor for all times changes nothing."
    out.print(f"{text} Nothing was written.", style="dim")


def print_chunks(rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    """What chunks cost: seconds of each route, and how many times those of its like without Dask or chunks."""
    table = Table(title="The same result in ever smaller chunks: seconds of each route, and over the route beside it")
    for name in ("chunk", "MiB", "tasks", *rows[0]["seconds"], "read, formula", "more MiB"):
        table.add_column(name, justify="right")
    like = {"boxes": "direct", "threads": "direct", "processes": "file"}
    for row in rows:
        seconds = row["seconds"]
        times = [
            f"{each:.2f}" + (f" ({each / seconds[like[name]]:.2f})" if name in like else "")
            for name, each in seconds.items()
        ]
        table.add_row(
            f"{row['chunk']}^3", f"{row['chunk_bytes'] / 2**20:.3g}", str(row["tasks"]), *times,
            f"{row['read']:.3f}, {row['read_by_formula']:.3f}", f"{row['more_bytes'] / 2**20:.1f}",
        )  # fmt: skip
    out.print(table)
