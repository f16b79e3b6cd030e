"""`python -m bench`: gemmconv against the obvious NumPy version, its memory, its latency and its import time.

Runs are interleaved, figures are medians, ratios carry a bootstrapped 95 % interval. The process starts itself again
without the variables that choose OpenBLAS' kernels, unless --keep-env is given, so that BLAS picks its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

KERNEL_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
TINY = ((1, 2, 2, 2, 16), (3, 3, 3, 16, 16))
# Layers beyond the models', where a careless engine needs the most memory.
EXTREMES = {
    "1-D, 10^6 samples": ((1, 1, 1, 1_000_000, 16), (1, 1, 3, 16, 16), 2, "NDHWC"),
    "1-D, 10^6 samples, NCDHW": ((1, 16, 1, 1, 1_000_000), (1, 1, 3, 16, 16), 2, "NCDHW"),
    "1-D along depth": ((1, 1_000_000, 1, 1, 16), (3, 1, 1, 16, 16), 2, "NDHWC"),
    "plane of 1024 x 1024": ((1, 1, 1024, 1024, 8), (1, 4, 4, 8, 8), 2, "NDHWC"),
    "plane of 1024 x 1024, NCDHW, 1 channel": ((1, 8, 1, 1024, 1024), (1, 4, 4, 1, 8), 2, "NCDHW"),
    "filter of 64 MiB": ((1, 2, 2, 2, 512), (4, 4, 4, 512, 512), 2, "NDHWC"),
}


def speed(args: argparse.Namespace) -> None:
    """Compare with the obvious version, layer by layer."""
    import numpy as np
    import threadpoolctl

    from bench.layers import layers, obvious

    rng = np.random.default_rng(0)
    chosen = [layer for layer in layers() if args.only is None or args.only in layer.name]
    print("GFLOP/s count 2*N*D*H*W*Cin*Cout*kd*kh*kw, cropped products included; ratio: NumPy's time over gemmconv's")
    for workers in args.workers:
        logs = []
        print(f"\n{workers} worker(s)")
        print(f"{'layer':<16}{'NumPy':>11}{'GFLOP/s':>9}{'gemmconv':>11}{'GFLOP/s':>9}  ratio (95 %)")
        for layer in chosen:
            value, filter = layer.operands()
            plan = layer.plan()
            with threadpoolctl.threadpool_limits(workers):
                expected = obvious(layer, plan, value, filter)
            error = np.abs(layer.gemmconv(value, filter, workers) - expected).max() / np.abs(expected).max()
            if error > 1e-5:
                sys.exit(f"{layer.name}: results differ by {error:.1e} of the largest output")
            del expected
            times = np.empty((2, args.rounds))
            plain = partial(obvious, layer, plan, value, filter)
            ours = partial(layer.gemmconv, value, filter, workers)
            for i in range(args.rounds):
                time.sleep(args.pause)
                with threadpoolctl.threadpool_limits(workers):
                    plain()  # so that caches and threads are warm
                    times[0, i] = seconds(plain)
                time.sleep(args.pause)
                ours()
                times[1, i] = seconds(ours)
            medians = np.median(times, axis=1)
            drawn = rng.integers(args.rounds, size=(2000, args.rounds))
            ratios = np.median(times[0][drawn], axis=1) / np.median(times[1][drawn], axis=1)
            low, high = np.percentile(ratios, [2.5, 97.5])
            ratio = medians[0] / medians[1]
            logs.append(np.log(ratio))
            rates = plan.flops / medians / 1e9
            print(
                f"{layer.name:<16}{medians[0] * 1e3:8.2f} ms{rates[0]:9.1f}{medians[1] * 1e3:8.2f} ms{rates[1]:9.1f}"
                f"  {ratio:5.2f} ({low:.2f} to {high:.2f})",
                flush=True,
            )
        print(f"geometric mean of the ratios: {np.exp(np.mean(logs)):.2f}")


def memory(args: argparse.Namespace) -> None:
    """Measure peak resident memory beyond operands and result, each layer in a fresh process after a small call."""
    from bench.layers import Layer, layers

    cases = list(layers())
    for name, (value, filter, stride, layout) in EXTREMES.items():
        strides = tuple(stride if k > 1 else 1 for k in filter[:3])
        cases.append(Layer(name, value, filter, None, strides, (1, 1, 1), data_format=layout))
    worst = 0.0
    for layer in cases:
        if args.only is not None and args.only not in layer.name:
            continue
        call = f"print(peak({layer!r}, {max(args.workers)}))"
        code = f"from bench.__main__ import peak; from bench.layers import Layer; {call}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        worst = max(worst, float(done.stdout))
        print(f"{layer.name:<40}{float(done.stdout):8.1f} MiB beyond value, filter and output", flush=True)
    print(f"largest: {worst:.1f} MiB, {max(args.workers)} workers")


def peak(layer: object, workers: int) -> float:
    """Return the MiB that a call of a layer adds at its peak, beyond operands and result."""
    import numpy as np

    import gemmconv
    from bench.layers import Layer

    assert isinstance(layer, Layer)
    gemmconv.conv3d_transpose(*(np.ones(s, np.float32) for s in TINY), strides=2)
    base = resident("VmRSS")
    operands = layer.operands()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    result = layer.gemmconv(*operands, workers)
    held = sum(array.nbytes for array in (*operands, result))
    return (resident("VmHWM") - base - held) / 2**20


def resident(key: str) -> int:
    """Return a size in bytes from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status: memory can be measured on Linux only")


def latency(args: argparse.Namespace) -> None:
    """Measure a tiny call, by the function and by a plan."""
    import numpy as np

    import gemmconv

    value, filter = (np.ones(s, np.float32) for s in TINY)
    plan = gemmconv.plan_conv3d_transpose(*TINY, strides=2)
    calls = {
        "conv3d_transpose": lambda: gemmconv.conv3d_transpose(value, filter, strides=2),
        "plan": lambda: plan(value, filter),
    }
    for name, call in calls.items():
        call()
        print(f"{name:<20}{np.median([seconds(call) for _ in range(1000)]) * 1e6:8.1f} us, median of 1000")


def imports(args: argparse.Namespace) -> None:
    """Measure the import of gemmconv against the import of what it depends on, in fresh processes in turn."""
    import numpy as np

    packages = ("numpy, scipy.linalg, threadpoolctl", "gemmconv")
    # With bytecode, as pip installs packages; the first round, not counted, writes it for a checkout.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times = np.empty((2, max(args.rounds, 5)))
    for i in range(-1, times.shape[1]):
        for j, names in enumerate(packages):
            code = f"import time; t = time.perf_counter(); import {names}; print(time.perf_counter() - t)"
            done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=True)
            times[j, i] = float(done.stdout)
    first, second = np.median(times, axis=1)
    print(f"import {packages[0]}: {first * 1e3:.0f} ms; import {packages[1]}: {second * 1e3:.0f} ms")
    print(f"ratio {second / first:.2f}")


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes, its result freed after."""
    start = time.perf_counter()
    result = call()
    end = time.perf_counter()
    del result
    return end - start


def main(argv: Sequence[str] | None = None) -> None:
    """Run one measurement."""
    measures = {"speed": speed, "memory": memory, "latency": latency, "import": imports}
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("measure", choices=measures)
    parser.add_argument("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    # OpenBLAS' threads spin for 2^28 cycles after work, and would take a core from whoever is timed next.
    parser.add_argument("--pause", type=float, default=0.15, help="seconds before either is timed")
    parser.add_argument("--only", help="layers whose name contains this")
    parser.add_argument("--keep-env", action="store_true", help=f"keep {', '.join(KERNEL_VARIABLES)}")
    args = parser.parse_args(argv)
    held = [name for name in KERNEL_VARIABLES if name in os.environ]
    if held and not args.keep_env:
        environ = {name: value for name, value in os.environ.items() if name not in held}
        print(f"removed from the environment: {', '.join(held)}", flush=True)
        command = [sys.executable, "-m", "bench", *(sys.argv[1:] if argv is None else argv)]
        sys.exit(subprocess.run(command, env=environ, check=False).returncode)
    measures[args.measure](args)


if __name__ == "__main__":
    main()
