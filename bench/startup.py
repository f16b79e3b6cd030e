"""Small measurements: how long a tiny call takes, how long plans take to be made, and how long the import does."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.process import ROOT, environment

CALLS = 1000
PACKAGES = ("numpy, scipy.linalg, threadpoolctl", "gemmconv")


def latency() -> dict[str, float]:
    """Median seconds of a tiny call, by the function and by a plan, in this process."""
    import numpy as np

    import gemmconv

    shapes = (1, 2, 2, 2, 16), (3, 3, 3, 16, 16)
    value, filter = (np.ones(shape, np.float32) for shape in shapes)
    plan = gemmconv.plan_conv3d_transpose(*shapes, strides=2)
    calls: dict[str, Callable[[], object]] = {
        "conv3d_transpose": lambda: gemmconv.conv3d_transpose(value, filter, strides=2),
        "plan": lambda: plan(value, filter),
    }
    found = {}
    for name, call in calls.items():
        call()
        seconds = []
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        found[name] = statistics.median(seconds)
    return found


def planning() -> dict[str, list[float]]:
    """Seconds to make the plan of each layer of the models suite anew, by operation, in this process."""
    import gemmconv
    from bench.layers import CONV, FILTER_GRADIENT, TRANSPOSE, suite

    found: dict[str, list[float]] = {op: [] for op in (TRANSPOSE, CONV, FILTER_GRADIENT)}
    for op, seconds in found.items():
        for layer in suite("models", op):
            coarse, fine, filter = (layer.shape(role) for role in ("coarse", "fine", "filter"))
            options: dict[str, Any] = {"strides": layer.strides, "padding": layer.padding, "dilations": layer.dilations}
            gemmconv.clear_cache()
            start = time.perf_counter()
            if op == TRANSPOSE:
                gemmconv.plan_conv3d_transpose(coarse, filter, fine, **options)
            elif op == CONV:
                gemmconv.plan_conv3d(fine, filter, **options)
            else:
                gemmconv.plan_conv3d_backprop_filter_v2(fine, filter, coarse, **options)
            seconds.append(time.perf_counter() - start)
    return found


def imports(rounds: int) -> dict[str, float]:
    """Median seconds of importing what gemmconv needs, and of importing gemmconv, in fresh processes in turn."""
    # With bytecode, as pip installs packages; the first round, not counted, writes it for a checkout.
    variables = {k: v for k, v in environment(1, keep=False).items() if k != "PYTHONDONTWRITEBYTECODE"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [variables.get("PYTHONPATH")])])
    seconds: dict[str, list[float]] = {names: [] for names in PACKAGES}
    for _ in range(rounds + 1):
        for names, found in seconds.items():
            code = f"import time; t = time.perf_counter(); import {names}; print(time.perf_counter() - t)"
            done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, check=True)
            found.append(float(done.stdout))
    return {names: statistics.median(found[1:]) for names, found in seconds.items()}
