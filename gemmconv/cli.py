"""The command line, `python -m gemmconv`: info, plan, run and demo.

This module turns words into calls of the public functions and refusals into one line and an exit status: 0 done, 1 the
demo's result is wrong, 2 refused, 130 interrupted. It must not compute or check what the library computes and checks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

_BAR_AFTER_S = 2.0
_BAR_EVERY_S = 0.1
# The demo's calls behind its first, and seconds after which none begins.
_DEMO_CALLS, _DEMO_S = 20, 2.0


class _RefusedError(Exception):
    """What ends a command with one line on stderr and status 2."""


@contextlib.contextmanager
def _refusing(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Turn expected exceptions into a refusal. What is not expected is a bug and keeps its traceback."""
    try:
        yield
    except kinds as error:
        raise _RefusedError(f"{about}{error}" if str(error) else f"{about}{type(error).__name__}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"gemmconv: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` is the process' arguments by default."""
    try:
        args = _parser().parse_args(argv)
        status: int = args.command(args)
        sys.stdout.flush()
        return status
    except _RefusedError as error:
        print(f"gemmconv: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gemmconv: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `| head`: nobody reads on; keep the interpreter's last flush from failing too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # SIGPIPE, which Windows has no name for


def _info(args: argparse.Namespace) -> int:
    from gemmconv.config import show_config

    if args.json:
        print(json.dumps(show_config(mode="dicts"), indent=2))
    else:
        show_config()
    return 0


def _plan(args: argparse.Namespace) -> int:
    with _refusing(TypeError, ValueError, ImportError, about=f"--dtype {args.dtype}: "):
        dtype = _dtype(args.dtype)
    print(_planned(args, args.value_shape, args.filter_shape, dtype))
    return 0


def _dtype(name: Any) -> np.dtype[Any]:
    if name == "bfloat16":  # not NumPy's own; whoever names it has asked for ml_dtypes
        import ml_dtypes

        name = ml_dtypes.bfloat16
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


def _planned(args: argparse.Namespace, value: Sequence[int], filter: Sequence[int], dtype: np.dtype[Any]) -> Any:
    import gemmconv

    with _refusing(ValueError, TypeError):
        return gemmconv.plan_conv3d_transpose(
            value,
            filter,
            args.output_shape,
            args.strides,
            args.padding,
            args.data_format,
            args.dilations,
            dtype=dtype,
            algorithm=args.algorithm,
            workers=args.workers,
        )


def _run(args: argparse.Namespace) -> int:
    from gemmconv import arrays, files
    from gemmconv.newfile import map_reserved, new_file
    from gemmconv.stored import boxes_for, stored_chunks, without_data

    value, filter = _open(args.value), _load(args.filter)
    with _refusing(TypeError, about=f"{args.value}, {args.filter}: "):
        dtype = arrays.common("conv3d_transpose", without_data(value), without_data(filter))
    plan = _planned(args, value.shape, filter.shape, dtype)
    to_zarr = files.is_zarr(args.output)
    with _refusing(ValueError, about=f"--memory {args.memory}: "):
        chunks = boxes_for(plan, args.memory, (value.dtype, filter.dtype), args.chunks and _fitting(plan, args.chunks))
    if to_zarr or any(len(of_axis) > 1 for of_axis in chunks) or stored_chunks(value):
        time_s = _run_in_boxes(args, plan, value, filter, chunks)
    else:
        if args.chunks:
            raise _RefusedError(
                f"--chunks {','.join(map(str, args.chunks))} is for a Zarr array, {args.output} is none"
            )
        value = _load(args.value)
        with _refusing(OSError, MemoryError, about=f"{args.output}: "), new_file(Path(args.output), args.force) as path:
            out = map_reserved(path, dtype, plan.output_shape)
            time_s = _timed(plan, value, filter, out)
            out.flush()
            del out  # unmapped before it is renamed, which Windows insists on
    print(f"{args.output}: {dtype.name} {list(plan.output_shape)}, {plan.algorithm}, {_speed(plan, time_s)}")
    return 0


def _fitting(plan: Any, chunks: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of stored chunks, at most those of the result."""
    if len(chunks) != len(plan.output_shape) or min(chunks) < 1:
        raise _RefusedError(f"--chunks {','.join(map(str, chunks))} must be {len(plan.output_shape)} positive integers")
    return tuple(max(1, min(chunk, size)) for chunk, size in zip(chunks, plan.output_shape, strict=True))


def _run_in_boxes(
    args: argparse.Namespace, plan: Any, value: Any, filter: np.ndarray[Any, Any], chunks: Sequence[Sequence[int]]
) -> float:
    """Compute the result box by box, or what is left of it; return the time in seconds."""
    from gemmconv import __version__, files
    from gemmconv.journal import resumable
    from gemmconv.stored import compute_stored

    to_zarr, dtype, shape = files.is_zarr(args.output), plan.dtype, plan.output_shape
    what = {
        "value": files.identity(Path(args.value)),
        "filter": files.identity(Path(args.filter)),
        "problem": repr(plan.problem),
        "machine": [repr(plan.machine), plan.algorithm],
        "version": __version__,
    }
    # The stored chunks of a Zarr array are all of one size: the boxes', unless others are asked for.
    stored = _fitting(plan, args.chunks) if args.chunks else tuple(max(1, *of_axis) for of_axis in chunks)
    if to_zarr and not args.chunks:
        chunks = [[min(n, size - at) for at in range(0, size, n)] or [0] for size, n in zip(shape, stored, strict=True)]

    def make(path: Path) -> None:
        if to_zarr:
            files.make_zarr(path, shape, dtype, stored)
        else:
            files.make_npy(path, shape, dtype)

    start = time.perf_counter()
    try:
        with (
            _refusing(OSError, ValueError, MemoryError, ImportError, about=f"{args.output}: "),
            resumable(
                Path(args.output), what, [list(of_axis) for of_axis in chunks], make, force=args.force, folder=to_zarr
            ) as made,
            _Bar() as bar,
        ):
            out = files.open_zarr(made.path, writable=True) if to_zarr else files.NpyFile(made.path, writable=True)
            if made.done:
                print(f"going on: {len(made.done)} boxes of {args.output} are done", file=sys.stderr)
            compute_stored(
                plan, value, filter, out, chunks=made.chunks, done=made.done, finished=made.finished, progress=bar
            )
    except KeyboardInterrupt:
        print(f"gemmconv: {args.output}.part holds what is done; the same command goes on with it", file=sys.stderr)
        raise
    return time.perf_counter() - start


def _open(name: str) -> Any:
    """Open a .npy file or a Zarr array, to be read in boxes."""
    from gemmconv import files

    if not files.is_zarr(name):
        _load(name)  # what is wrong with it
        return files.NpyFile(Path(name))
    with (
        _refusing(ImportError, about=f"{name} needs zarr (pip install zarr): "),
        _refusing(OSError, ValueError, KeyError, about=f"{name} cannot be read: "),
    ):
        return files.open_zarr(Path(name))


def _memory(text: str) -> int:
    """Return a number of bytes, with K, M, G or T for powers of 1024."""
    factor = 1024 ** ("KMGT".find(text[-1:].upper()) + 1)
    try:
        return int(float(text[:-1] if factor > 1 else text) * factor)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, like 500M or 2G") from None


def _timed(plan: Any, value: np.ndarray[Any, Any], filter: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> float:
    """Run the plan under a progress bar; return the time in seconds."""
    start = time.perf_counter()
    with _Bar() as bar, _refusing(MemoryError, about="out of memory: "):
        plan(value, filter, out=out, progress=bar)
    return time.perf_counter() - start


def _speed(plan: Any, time_s: float) -> str:
    return f"{time_s:.3g} s, {plan.flops / max(time_s, 1e-9) / 1e9:.3g} GFLOP/s"


def _load(name: str) -> np.ndarray[Any, Any]:
    """Map a .npy file for reading."""
    with _refusing(OSError, ValueError, EOFError, about=f"{name} cannot be read: "):
        with open(name, "rb") as file:
            start = file.read(6)
        if start != b"\x93NUMPY":
            hint = ", but an .npz: save the arrays in it one by one" if start[:2] == b"PK" else ""
            raise _RefusedError(f"{name} is not a .npy file{hint}")
        array: np.ndarray[Any, Any] = np.load(name, mmap_mode="r", allow_pickle=False)
    if array.dtype.kind == "V" and array.dtype.names is None:
        raise _RefusedError(
            f"{name} holds raw {array.dtype.itemsize}-byte items (dtype {array.dtype.str!r}): a .npy file does not "
            "keep the names of bfloat16 and other types that are not NumPy's own, so they are not supported here; "
            "save .astype(np.float32) instead"
        )
    return array


class _Bar:
    """A progress bar on stderr, for a person who watches and has waited for a while; called from worker threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched = sys.stderr.isatty()
        self._start = self._last = time.monotonic()
        self._done, self._drawn = 0, False

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._watched or now - self._start < _BAR_AFTER_S or now - self._last < _BAR_EVERY_S:
            return
        with self._lock:
            self._last = now
            self._done = done = max(self._done, done)  # threads may come here in another order than they finished
            left_s = (now - self._start) * (total - done) / max(done, 1)
            filled = 40 * done // max(total, 1)
            text = f"[{'#' * filled}{'.' * (40 - filled)}] {100 * done // max(total, 1)} %, {left_s:.0f} s left"
            self._write(f"\r{text:<70}")
            self._drawn = True

    def __exit__(self, *exception: object) -> None:
        if self._drawn:
            self._write(f"\r{'':70}\r")

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:  # the terminal was closed: a bar is no reason to stop
            self._watched = self._drawn = False


def _demo(args: argparse.Namespace) -> int:
    from gemmconv import demo

    if args.picture:
        with _refusing(ImportError, about="--picture needs matplotlib (pip install matplotlib): "):
            from matplotlib.figure import Figure

            figure = Figure(figsize=(9, 6), layout="constrained")
        known = sorted(figure.canvas.get_supported_filetypes())
        if not Path(args.picture).parent.is_dir():
            raise _RefusedError(f"--picture {args.picture}: there is no folder {Path(args.picture).parent}")
        if Path(args.picture).suffix[1:].lower() not in known:
            raise _RefusedError(f"--picture {args.picture}: the name must end in one of .{', .'.join(known)}")
    volume = _volume(args)
    # A transposed convolution sees zeros beyond the ends. One voxel of the border's own values there makes every cell
    # of the volume an interpolation; the result's cells that belong to the added voxels are cut off.
    value = np.pad(volume, 1, mode="edge")[None, ..., None]
    taps = np.array([1, 3, 3, 1], np.float32) / 4
    filter = np.einsum("i,j,k->ijk", taps, taps, taps)[..., None, None]
    options = argparse.Namespace(output_shape=None, strides=2, padding="SAME", data_format="NDHWC", dilations=None)
    options.algorithm, options.workers = "auto", args.workers
    plan = _planned(options, value.shape, filter.shape, value.dtype)
    print(f"up-sampling {list(volume.shape)} two-fold by a transposed convolution with the trilinear kernel\n{plan}")
    with _refusing(MemoryError, about="out of memory: "):
        out = np.empty(plan.output_shape, np.float32)
    print(f"first call: {_speed(plan, _timed(plan, value, filter, out))}")
    # What a block does is recorded in the first calls of a plan.
    times, end_s = [_timed(plan, value, filter, out)], time.monotonic() + _DEMO_S
    while len(times) < _DEMO_CALLS and time.monotonic() < end_s:
        times.append(_timed(plan, value, filter, out))
    print(f"fastest of {len(times)} more: {_speed(plan, min(times))}")
    result = out[0, 2:-2, 2:-2, 2:-2, 0]
    error, largest = demo.largest_error(volume, result), float(abs(volume).max())
    # Eight products a cell, whose weights are exact and sum to 1: direct sums stay below 9 * 2**-24 of the largest
    # value; four times that leaves room for the transforms of minimal filtering.
    bound = 36 * 2.0**-24 * largest
    print(f"largest error against interpolation in float64: {error:.3g} (allowed {bound:.3g}), all {result.size} cells")
    if args.picture:
        demo.draw(figure, volume, result)
        with _refusing(OSError, about=f"--picture {args.picture}: "):
            figure.savefig(args.picture)
        print(f"{args.picture}: the middle slices, before and after")
    else:
        print("--picture FILE.png draws the middle slices, before and after")
    if not error <= bound:
        print("gemmconv: error: the result is wrong beyond rounding", file=sys.stderr)
        return 1
    return 0


def _volume(args: argparse.Namespace) -> np.ndarray[Any, Any]:
    from gemmconv import demo

    if args.input is None:
        if args.size < 1:
            raise _RefusedError(f"--size {args.size} must be at least 1")
        with _refusing(MemoryError, ValueError, about=f"--size {args.size}: "):
            return demo.phantom(args.size)
    array = _load(args.input)
    if array.ndim != 3 or array.size == 0 or array.dtype.kind not in "biuf":
        raise _RefusedError(f"{args.input} must be a 3-D array of real numbers, got {array.dtype} {list(array.shape)}")
    with np.errstate(over="ignore"):
        volume = array.astype(np.float32)
    if not np.isfinite(volume).all():
        raise _RefusedError(f"{args.input} must hold finite float32 numbers: NaN or Inf cannot be compared")
    return volume


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        text = f"{text!r} is not integers with commas between them, like 1,16,16,16,128"
        raise argparse.ArgumentTypeError(text) from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m gemmconv", description="3-D transposed convolutions on a CPU as matrix products.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what gemmconv found here: versions, CPU, caches, BLAS, kernels, threads")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(command=_info)

    convolution = _Parser(add_help=False)
    convolution.add_argument("--strides", type=_integers, metavar="S", help="1, 3 or 5 integers, as 1,2,2 (default 1)")
    convolution.add_argument("--output-shape", type=_integers, metavar="N,D,H,W,C", help="(default: inferred)")
    convolution.add_argument("--padding", default="SAME", help="SAME (default) or VALID")
    convolution.add_argument("--data-format", default="NDHWC", help="NDHWC (default) or NCDHW")
    convolution.add_argument("--dilations", type=_integers, metavar="D", help="as --strides (default 1)")
    convolution.add_argument("--algorithm", default="auto", help="auto (default) or a lowering's name")
    convolution.add_argument("--workers", type=int, metavar="N", help="threads; negative counts from the end")

    plan = commands.add_parser("plan", parents=[convolution], help="how shapes would be computed, and why")
    plan.add_argument("value_shape", type=_integers, metavar="VALUE", help="shape, like 1,16,16,16,128")
    plan.add_argument("filter_shape", type=_integers, metavar="FILTER", help="D,H,W,Cout,Cin, like 4,4,4,64,128")
    plan.add_argument("--dtype", default="float32", help="of the result (default float32)")
    plan.set_defaults(command=_plan)

    run = commands.add_parser("run", parents=[convolution], help="conv3d_transpose from files to a file, of any size")
    run.add_argument("value", metavar="VALUE", help="a .npy file or a .zarr array")
    run.add_argument("filter", metavar="FILTER.npy", help="D,H,W,Cout,Cin")
    run.add_argument(
        "--output", required=True, metavar="OUT", help=".npy or .zarr, written under this name when it is complete"
    )
    run.add_argument("--force", action="store_true", help="replace an existing OUT, and what is left of an earlier run")
    run.add_argument(
        "--memory", type=_memory, default=_memory("256M"), metavar="BYTES",
        help="for what is read, computed and written at once, as 500M or 2G (default 256M)",
    )  # fmt: skip
    run.add_argument("--chunks", type=_integers, metavar="N,D,H,W,C", help="stored chunks of a .zarr (default: boxes)")
    run.set_defaults(command=_run)

    demo = commands.add_parser("demo", help="up-sample a volume two-fold, timed and checked")
    source = demo.add_mutually_exclusive_group()
    source.add_argument("--input", metavar="VOLUME.npy", help="3-D, real (default: a head phantom)")
    source.add_argument("--size", type=int, default=64, metavar="N", help="edge of the phantom in voxels (default 64)")
    demo.add_argument("--workers", type=int, metavar="N", help="threads; negative counts from the end")
    demo.add_argument("--picture", metavar="FILE.png", help="draw slices into this file; needs matplotlib")
    demo.set_defaults(command=_demo)
    return parser
