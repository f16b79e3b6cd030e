"""The process of one contender: `python -m bench.worker IN OUT`, two pipes' descriptors. It answers request by request.

It is started, stopped, woken and ended by process.py. Anything that a contender raises becomes an answer.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import wire

Answer = dict[str, Any]
CHOICE_SECONDS = 0.5  # how long a contender's ways of calling it are compared
EXTRA_SECONDS = 0.4  # how long calls into a given array, and calls under the profiler, are measured


class Worker:
    """What a process holds from one request to the next: a contender, and the call of the layer it is at."""

    def __init__(self) -> None:
        self.contender: Any = None
        self.call: Any = None
        self.job: Any = None
        self.facts: Answer = {}

    def start(self, spec: Answer, workers: int) -> Answer:
        """Load the contender."""
        import threadpoolctl

        from bench.contenders import Spec, load

        self.facts = {"spec": spec, "workers": workers}
        self.contender = load(Spec(**spec), workers)
        pools = [
            {key: pool.get(key) for key in ("user_api", "internal_api", "version", "architecture", "num_threads")}
            | {"library": "/".join(Path(pool["filepath"]).parts[-2:])}
            for pool in threadpoolctl.threadpool_info()
        ]
        return {"versions": self.contender.versions, "pools": pools, "cpus": _cpus()}

    def prepare(
        self,
        layer: Answer,
        dtype: str,
        layout: str,
        end_to_end: bool,
        seed: int,
        reference: str | None,
        largest: float,
        choice: int | None = None,
    ) -> Answer:
        """Make the operands, choose the fastest way to call (or take a choice), compare its result."""
        from bench.contenders.base import Job
        from bench.layers import Layer
        from bench.reference import operands

        self.call = self.job = None  # frees the last layer's memory
        found = Layer.from_dict(layer)
        first, second = operands(found, dtype, layout, seed)
        first.flags.writeable = second.flags.writeable = False
        self.job = Job(found, first, second, dtype, layout, self.facts["workers"], end_to_end)
        self.facts |= {"reference": reference, "largest": largest}
        calls = list(enumerate(self.contender.calls(self.job)))
        ways, most = (calls, 5) if choice is None else ([calls[choice]], 1)
        choice, self.call, first_s, seconds = _fastest(ways, most)
        answer = {"choice": choice, "layout": self.call.layout, "note": self.call.note}
        answer |= {"first_call_seconds": first_s, "seconds": seconds}
        return answer | self._check(self.call.run())

    def visit(self, calls: int, warm_s: float) -> Answer:
        """Warm up, then time calls."""
        run = self.call.run
        gc.collect()
        gc.disable()
        _warm_up(warm_s, run)
        seconds = [_timed(run) for _ in range(calls)]
        gc.enable()
        return {"seconds": seconds}

    def finish(self, warm_s: float) -> Answer:
        """After the last visit: is the result still right, what do fresh pages cost, where does the time go."""
        answer = self._check(self.call.run())
        if self.call.run_into is not None:
            answer["first_touch"] = self._first_touch(warm_s)
        if self.facts["spec"]["kind"] == "gemmconv":
            answer["phases"] = self._phases(warm_s)
        return answer

    def memory(self, layer: Answer, dtype: str, layout: str, end_to_end: bool, seed: int) -> Answer:
        """Peak resident memory of a layer's first call, beyond what is there before it and beyond its result."""
        from bench.contenders.base import Job
        from bench.layers import Layer, suite
        from bench.reference import operands

        measured = Layer.from_dict(layer)
        # A tiny call first: libraries load what they need.
        for found in (suite("tiny", measured.op)[0], measured):
            job = Job(found, *operands(found, dtype, layout, seed), dtype, layout, self.facts["workers"], end_to_end)
            call = self.contender.calls(job)[0]
            base = resident_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            result = call.result(call.run())
            peak = resident_bytes("VmHWM") - base - result.nbytes
        return {"peak_bytes": max(0, peak), "layout": call.layout}

    def reference(self, layer: Answer, dtype: str, seed: int, path: str) -> Answer:
        """Compute the float64 result of a layer into a file that others map."""
        import numpy as np

        from bench.layers import Layer
        from bench.reference import reference

        result = reference(Layer.from_dict(layer), dtype, seed)
        np.save(path, result)
        return {"largest": float(np.abs(result).max(initial=0.0))}

    def roofs(self, workers: int, l2_bytes: int, memory_bytes: int) -> Answer:
        """Measure this machine's roofs."""
        from bench.contenders.roof import machine_roofs

        return dict(machine_roofs(workers, l2_bytes, memory_bytes))

    def calibrate(self, seconds: float, threads: int) -> Answer:
        """Measure the constants of gemmconv's cost model."""
        from bench.calibrate import measure

        return {"constants": measure(seconds, threads)}

    def latency(self) -> Answer:
        """Measure a tiny call, and how long plans take to be made."""
        from bench.startup import latency, planning

        return {"seconds": latency(), "planning": planning()}

    def config(self) -> Answer:
        """What gemmconv finds of the machine and of the libraries."""
        import gemmconv

        return gemmconv.show_config(mode="dicts") or {}

    def _check(self, result: Any) -> Answer:
        """Compare one result of `run` with the reference; a contender that has none, such as a roof, is right."""
        import numpy as np

        from bench.reference import check

        if self.facts["reference"] is None:
            return {"status": "ok", "error": None}
        job = self.job
        expected = np.load(self.facts["reference"], mmap_mode="r")
        found = check(self.call.result(result), expected, self.facts["largest"], job.layer, job.dtype, job.layout)
        return {"status": found.status, "error": found.error, "detail": found.detail}

    def _first_touch(self, warm_s: float) -> Answer:
        """Calls into new arrays and into one that is there, in turn."""
        import numpy as np

        from bench.reference import dtype_named

        out = np.zeros(self.call.out_shape, dtype_named(self.job.dtype))
        new, given = _alternate(warm_s, self.call.run, lambda: self.call.run_into(out))
        return {"new_seconds": new, "given_seconds": given}

    def _phases(self, warm_s: float) -> Answer:
        """Calls without and with gemmconv's profiler, in turn, and what it says of those with it."""
        import gemmconv

        profile = getattr(gemmconv, "profile", None)
        if profile is None:
            return {"status": "missing", "detail": "this version of gemmconv has no profile()"}
        worker_seconds: list[float] = []
        phases: dict[str, list[float]] = {}

        def profiled() -> Any:
            with profile() as found:
                result = self.call.run()
            worker_seconds.append(found.worker_seconds)
            for name, seconds in found.seconds.items():
                phases.setdefault(name, []).append(seconds)
            return result

        plain, under = _alternate(warm_s, self.call.run, profiled)
        worker_seconds = worker_seconds[-len(under) :]  # the calls before were the warm-up
        phases = {name: seconds[-len(under) :] for name, seconds in phases.items()}
        medians = {name: statistics.median(seconds) for name, seconds in phases.items()}
        share = statistics.median(
            sum(parts) / total for *parts, total in zip(*phases.values(), worker_seconds, strict=True) if total
        )
        return {
            "status": "ok",
            "worker_seconds": medians,
            "total_worker_seconds": statistics.median(worker_seconds),
            "accounted_share": share,
            "plain_seconds": plain,
            "profiled_seconds": under,
        }


def _fastest(calls: Sequence[tuple[int, Any]], most: int) -> tuple[int, Any, float, float]:
    """The fastest of a few ways and its number, the seconds of its first call and the median of `most` warm ones."""
    found = []
    for number, call in calls:
        first = _timed(call.run)
        seconds = [_timed(call.run)]
        while len(seconds) < most and sum(seconds) < CHOICE_SECONDS / len(calls):
            seconds.append(_timed(call.run))
        found.append((statistics.median(seconds), first, number, call))
    median_s, first_s, number, call = min(found, key=lambda item: item[0])
    return number, call, first_s, median_s


def _warm_up(seconds: float, *runs: Callable[[], Any]) -> None:
    """Make calls in turn, one of each at least, until the seconds are over."""
    end = time.perf_counter() + seconds
    while True:
        for run in runs:
            run()
        if time.perf_counter() >= end:
            return


def _alternate(warm_s: float, *runs: Callable[[], Any]) -> list[list[float]]:
    """Seconds of calls that are made in turn, after some that are not counted."""
    _warm_up(warm_s, *runs)
    slowest = max(_timed(run) for run in runs)
    rounds = max(3, min(15, round(EXTRA_SECONDS / len(runs) / slowest)))
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for seconds, run in zip(found, runs, strict=True):
            seconds.append(_timed(run))
    return found


def _timed(run: Callable[[], Any]) -> float:
    """Seconds of one call; what it returns is freed after."""
    start = time.perf_counter_ns()
    result = run()
    end = time.perf_counter_ns()
    del result
    return (end - start) / 1e9


def _refusal(error: Exception) -> Answer:
    """What is said of an exception: its type, its first line, and where it was raised."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    if type(error).__name__ == "Unsupported":
        return {"status": "unsupported", "detail": text}
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return {"status": "raised", "detail": f"{type(error).__name__}{': ' if text else ''}{text}{where}"}


def resident_bytes(key: str) -> int:
    """A size from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status: memory can be measured on Linux only")


def _cpus() -> list[int] | None:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def serve(requests: int, answers: int) -> None:
    """Answer requests until the other side closes."""
    worker = Worker()
    while True:
        try:
            request = wire.receive(requests)
        except wire.Closed:
            return
        method = request.pop("do")
        try:
            answer = {"status": "ok"} | getattr(worker, method)(**request)
        # Whatever a contender raises is its result, reported with its type; MemoryError and the like included.
        except Exception as error:
            answer = _refusal(error)
            traceback.print_exc()  # into the log, of which the bench shows the end if the process dies
        wire.send(answers, answer)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
