"""The command line: `python -m bench env|run|compare|plot|vectors|calibrate|latency|import|chunks`. Parses, prints."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import contenders, layers
from bench.layers import Layer
from bench.measure import Options, Tell
from bench.reference import DTYPES

FINE, REGRESSION, WRONG = 0, 1, 2
INTERRUPTED = 130
QUICK_STRIDE = 3  # --quick measures every third layer of a suite
USUAL = ["numpy", "torch", "tensorflow", "onnxruntime", "openvino"]


class Refused(Exception):  # noqa: N818
    """Arguments that cannot be done; the text says why."""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    main = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure convolutions and their gradients: gemmconv, other libraries, and your own functions.",
        epilog="Exit status: 0 fine, 1 a regression, 2 a wrong result or bad arguments. See docs/benchmarks.md.",
    )
    commands = main.add_subparsers(dest="command", required=True)

    env = commands.add_parser("env", help="describe the machine, libraries and variables, and measure its roofs")
    env.add_argument("--workers", type=_counts, help="numbers of workers whose roofs are measured (all)")
    env.add_argument("--json", type=Path, metavar="OUT")
    env.add_argument("--keep-env", action="store_true", help="keep OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE")
    env.set_defaults(run=run_env)

    run = commands.add_parser("run", help="measure contenders on a suite of layers")
    _add_suite(run)
    run.add_argument(
        "--against", type=_names, default=USUAL, metavar="A,B",
        help=f"contenders: {contenders.FORMS} (default: {','.join(USUAL)})",
    )  # fmt: skip
    run.add_argument("--subject", default="gemmconv", help="what ratios are of, any contender (gemmconv)")
    run.add_argument("--workers", type=_counts, help="numbers of threads, such as 1,2 (1 and all usable cores)")
    run.add_argument("--end-to-end", action="store_true", help="conversions of layouts are part of what is timed")
    run.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    run.add_argument("--json", type=Path, metavar="OUT", help="write the results, raw times included")
    run.add_argument(
        "--quick", action="store_true", help="every third layer, few short rounds, one launch: a first look"
    )
    run.add_argument("--minutes", type=_positive, help="about how long the rounds may take (5; 1.4 with --quick)")
    run.add_argument("--launches", type=_count, help="times that all processes are started anew (3; 1 with --quick)")
    run.add_argument("--rounds", type=_count, help="rounds of each launch (as many as the minutes allow, 2 to 7)")
    run.add_argument("--confidence", type=_fraction, default=0.95, help="of the intervals (95%%)")
    run.add_argument("--timeout", type=_positive, default=60.0, help="seconds after which a contender hangs (60)")
    run.add_argument("--keep-env", action="store_true", help="keep OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE")
    run.set_defaults(run=run_run)

    compare = commands.add_parser("compare", help="compare a result with an earlier one of the same machine")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--fail-over", type=_fraction, default=0.05, metavar="5%", help="slower by more fails (5%%)")
    compare.add_argument("--contender", help="whose rows are compared (the subject's)")
    compare.add_argument("--force", action="store_true", help="compare results of different machines all the same")
    compare.set_defaults(run=run_compare)

    report = commands.add_parser("report", help="print a result again, of any of its contenders")
    report.add_argument("result", type=Path)
    report.add_argument("--subject", help="what ratios are of (that of the run)")
    report.set_defaults(run=run_report)

    plot = commands.add_parser("plot", help="draw a result")
    plot.add_argument("result", type=Path)
    plot.add_argument("--output", type=Path, metavar="FOLDER", help="where to (beside the result)")
    plot.add_argument("--format", choices=("svg", "png"), default="svg")
    plot.set_defaults(run=run_plot)

    vectors = commands.add_parser("vectors", help="write operands and float64 results as .npy and JSON")
    vectors.add_argument("output", type=Path)
    _add_suite(vectors)
    vectors.set_defaults(run=run_vectors)

    calibrate = commands.add_parser("calibrate", help="measure the constants of gemmconv's cost model on this machine")
    calibrate.add_argument("--seconds", type=_positive, default=20.0, help="about how long to measure (20)")
    calibrate.add_argument("--keep-env", action="store_true", help="keep OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE")
    calibrate.set_defaults(run=run_calibrate)
    chunks = commands.add_parser("chunks", help="measure what cutting a result in chunks costs, with Dask and without")
    chunks.add_argument("--edge", type=_count, default=256, help="of the result, in voxels (256: 512 MiB)")
    chunks.add_argument("--rounds", type=_count, default=3, help="of which medians are taken (3)")
    chunks.add_argument("--json", type=Path, metavar="OUT")
    chunks.add_argument("--keep-env", action="store_true", help="keep OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE")
    chunks.set_defaults(run=run_chunks)
    latency = commands.add_parser("latency", help="measure a tiny call of gemmconv, and the making of plans")
    latency.add_argument("--keep-env", action="store_true", help="keep OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE")
    latency.set_defaults(run=run_latency, timeout=60.0)
    imports = commands.add_parser("import", help="measure the import of gemmconv against that of what it needs")
    imports.add_argument("--rounds", type=_count, default=15)
    imports.set_defaults(run=run_imports)
    return main


def _add_suite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--suite", choices=list(layers.SUITES), default="models")
    command.add_argument("--op", choices=list(layers.OPS), default=layers.TRANSPOSE, help="what its layers do")
    command.add_argument("--only", type=_names, metavar="A,B", help="layers whose name contains one of these")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--layout", choices=layers.LAYOUTS, default="NDHWC", help="in which the problem is posed")
    command.add_argument("--seed", type=int, default=0)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def _positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return float(text)


def _counts(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: workers are at least 1")
    return found


def _fraction(text: str) -> float:
    number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no part of 1: write 5% or 0.05")
    return number


def chosen_layers(args: argparse.Namespace) -> list[Layer]:
    """The layers of a suite that were asked for."""
    found = layers.suite(args.suite, args.op)
    if getattr(args, "quick", False) and args.only is None:
        found = found[::QUICK_STRIDE]
    kept = [layer for layer in found if args.only is None or any(word in layer.name for word in args.only)]
    if not kept:
        raise Refused(f"--only {','.join(args.only)}: the suite {args.suite} has {', '.join(x.name for x in found)}")
    return kept


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers(given: list[int] | None) -> list[int]:
    cores = _cores()
    if given is None:
        return sorted({1, cores})
    if max(given) > cores:
        raise Refused(f"--workers {max(given)}: this process may use {cores} core(s)")
    return list(dict.fromkeys(given))


def options_of(args: argparse.Namespace) -> Options:
    """What a run was asked for, checked."""
    try:
        subject, *against = contenders.parse_all([args.subject, *args.against], args.op)
    except ValueError as error:
        raise Refused(str(error)) from error
    minutes = args.minutes or (1.4 if args.quick else 5.0)
    launches = args.launches or (1 if args.quick else 3)
    return Options(
        suite=args.suite,
        layers=chosen_layers(args),
        subject=subject,
        against=against,
        workers=_workers(args.workers),
        op=args.op,
        dtype=args.dtype,
        layout=args.layout,
        end_to_end=args.end_to_end,
        seed=args.seed,
        launches=launches,
        rounds=args.rounds,
        budget_s=minutes * 60,
        visit_s=0.02 if args.quick else Options.visit_s,
        warm_s=0.03 if args.quick else Options.warm_s,
        timeout_s=args.timeout,
        confidence=args.confidence,
        keep_env=args.keep_env,
    )


def run_env(args: argparse.Namespace) -> int:
    """Describe the machine."""
    from bench import environment, report

    found = environment.describe(_workers(args.workers or list(range(1, _cores() + 1))), args.keep_env)
    report.print_environment(found, report.console())
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return FINE


def run_run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    from bench import environment, measure, memory, report, results

    options = options_of(args)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise Refused(f"--json {args.json}: there is no folder {args.json.parent}")
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    start = time.monotonic()
    with progress() as tell:
        tell("the machine and its roofs")
        facts = environment.describe(options.workers, options.keep_env, roofs=not args.memory, quick=args.quick)
        others = environment.Others()
        function = memory.measure_memory if args.memory else measure.measure
        contenders_, rows = function(options, tell)
        facts |= {"others": others.report(), "begun_utc": begun, "run_seconds": time.monotonic() - start}
    out = report.console()
    if args.memory:
        found = memory.memory_document(options, contenders_, rows, facts)
        report.print_memory(found, out)
    else:
        found = results.document(options, contenders_, rows, facts)
        report.print_speed(found, out)
    if args.json is not None:
        results.write(found, args.json)
    return WRONG if results.failures(found["rows"]) else FINE


def run_compare(args: argparse.Namespace) -> int:
    """Compare two files."""
    from bench import compare, report, results

    try:
        before, after = results.read(args.before), results.read(args.after)
    except ValueError as error:
        raise Refused(str(error)) from error
    reasons = compare.differences(before, after)
    if reasons and (not args.force or before["kind"] != "speed" or after["kind"] != "speed"):
        raise Refused(f"the results cannot be compared (--force does it all the same): {'; '.join(reasons)}")
    found = compare.compare(before, after, args.fail_over, args.contender)
    if not found.changes and not found.broken:
        raise Refused("the results have no row in common")
    out = report.console()
    for reason in reasons:
        out.print(f"compared by force: {reason}", style="yellow")
    report.print_comparison(found, args.fail_over, out)
    return found.status


def run_report(args: argparse.Namespace) -> int:
    """Print a file."""
    from bench import report, results

    try:
        found = results.read(args.result)
        if args.subject is not None and found["kind"] != "speed":
            raise ValueError(f"{args.result} is of {found['kind']}, which has no ratios")
        if found["kind"] == "speed":
            found = results.seen_from(found, args.subject or found["settings"]["subject"])
    except ValueError as error:
        raise Refused(str(error)) from error
    (report.print_speed if found["kind"] == "speed" else report.print_memory)(found, report.console())
    return WRONG if results.failures(found["rows"]) else FINE


def run_plot(args: argparse.Namespace) -> int:
    """Draw a file."""
    from bench import plots, results

    try:
        found = results.read(args.result)
    except ValueError as error:
        raise Refused(str(error)) from error
    folder = args.output or args.result.parent
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw_all(found, folder / args.result.stem, args.format)
    if not drawn:
        raise Refused(f"{args.result} has nothing to draw")
    for path in drawn:
        print(path)
    return FINE


def run_vectors(args: argparse.Namespace) -> int:
    """Write a suite's vectors."""
    from bench.vectors import write_vectors

    print(write_vectors(chosen_layers(args), args.output, args.dtype, args.layout, args.seed))
    return FINE


def run_calibrate(args: argparse.Namespace) -> int:
    """Print constants as measured beside those that are shipped."""
    from bench import calibrate, report
    from bench.process import Process

    threads = min(2, _cores())
    with Process(threads, args.keep_env) as process:
        answer = process.ask("calibrate", 60 + 5 * args.seconds, seconds=args.seconds, threads=threads)
    if answer["status"] != "ok":
        raise Refused(answer["detail"])
    report.print_constants(calibrate.shipped(), answer["constants"], report.console())
    return FINE


def run_latency(args: argparse.Namespace) -> int:
    """Print how long a tiny call takes, and plans to be made."""
    from bench import startup
    from bench.process import Process

    with Process(1, args.keep_env) as process:
        answer = process.ask("latency", args.timeout)
    if answer["status"] != "ok":
        raise Refused(answer["detail"])
    for name, seconds in answer["seconds"].items():
        print(f"{name:<24}{seconds * 1e6:8.1f} us, median of {startup.CALLS}")
    for name, of_layers in answer["planning"].items():
        mean_ms, most_ms = statistics.fmean(of_layers) * 1e3, max(of_layers) * 1e3
        print(f"{name:<24}{mean_ms:8.1f} ms to plan a layer, mean of {len(of_layers)} of models; {most_ms:.1f} at most")
    return FINE


def run_chunks(args: argparse.Namespace) -> int:
    """Print what chunks cost."""
    from bench import report
    from bench.process import ROOT, environment

    command = [sys.executable, "-m", "bench.chunks", str(args.edge), str(args.rounds)]
    variables = environment(_cores(), args.keep_env) | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    found = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise Refused("the measurement failed; it needs pip install -e '.[bench,dask]' distributed")
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    report.print_chunks(rows, report.console())
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return FINE if all(row["equal"] for row in rows) else WRONG


def run_imports(args: argparse.Namespace) -> int:
    """Print how long the import takes."""
    from bench import startup

    found = startup.imports(args.rounds)
    for names, seconds in found.items():
        print(f"import {names:<36}{seconds * 1e3:8.1f} ms, median of {args.rounds}")
    needed, whole = found.values()
    print(f"ratio {whole / needed:.2f}")
    return FINE


class progress:  # noqa: N801 - used as a function
    """A context that gives a function to say what is being done, on stderr, in one line where that is a terminal."""

    def __enter__(self) -> Tell:
        from bench import report

        self._status = report.console(stderr=True).status("starting")
        self._terminal = sys.stderr.isatty()
        if self._terminal:
            self._status.start()
        return self._tell

    def _tell(self, text: str) -> None:
        if self._terminal:
            self._status.update(text)

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._status.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        return command(args)
    except Refused as refusal:
        print(f"python -m bench: {refusal}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "matplotlib"):
            raise
        print(f"python -m bench: needs {error.name}: pip install -e '.[bench]'", file=sys.stderr)
    except KeyboardInterrupt:
        print("python -m bench: interrupted", file=sys.stderr)
        return INTERRUPTED
    return WRONG
