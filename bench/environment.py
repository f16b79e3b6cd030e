"""What the measurements depend on: the machine, versions, libraries, variables, measured roofs, and who else works.

gemmconv's own account (`show_config`) is asked of a fresh process, in the environment that contenders get.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.contenders.base import commit_of
from bench.process import REMOVED, THREAD_VARIABLES, Process

PREFIXES = (
    "OPENBLAS_", "GOTO_", "MKL_", "OMP_", "GOMP_", "KMP_", "ONEDNN_", "DNNL_", "NPY_", "NVPL_", "BLIS_", "VECLIB_",
    "ATEN_", "TF_ENABLE_", "TF_NUM_", "TF_XLA_", "XLA_", "ORT_", "OV_", "JAX_", "MALLOC_",
    "GLIBC_TUNABLES", "LD_PRELOAD", "PYTHONMALLOC",
)  # fmt: skip
PACKAGES = (
    "numpy", "scipy", "threadpoolctl", "torch", "tensorflow", "tensorflow-cpu", "onnxruntime", "onnx", "openvino",
    "jax", "jaxlib", "ml_dtypes", "matplotlib", "rich",
)  # fmt: skip
# Values that hold a contender below AVX-512 where the CPU has it: prefixes of the value, in lower case.
_OLDER = {
    "ONEDNN_MAX_CPU_ISA": ("sse41", "avx2", "avx"),
    "DNNL_MAX_CPU_ISA": ("sse41", "avx2", "avx"),
    "ATEN_CPU_CAPABILITY": ("default", "avx2"),
}
MOST_COPY_BYTES = 1 << 30
BUSY_SHARE, STEAL_SHARE = 0.05, 0.02


def describe(workers: Iterable[int], keep_env: bool, roofs: bool = True, quick: bool = False) -> dict[str, Any]:
    """All of it, as JSON takes it; `workers` are the counts whose roofs are measured, on less memory if quick."""
    counts = sorted(set(workers))
    with Process(max(counts), keep_env) as process:
        config = process.ask("config", 120)
    config.pop("status")
    for library in config["libraries"]:
        library["filepath"] = "/".join(Path(library["filepath"]).parts[-2:])
    found: dict[str, Any] = {
        "machine": {
            "cpu_model": config["cpu"]["model"],
            "architecture": config["cpu"]["machine"],
            "vector_flags": config["cpu"]["flags"],
            **config["machine"],
            "caches": _caches(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            "virtual_machine": _virtual_machine(),
            "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {"python": platform.python_version(), "gemmconv": config["versions"]["gemmconv"]} | _versions(),
        "blas_libraries": config["libraries"],
        "gemmconv_blas": config["blas"],
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
        "removed_variables": [] if keep_env else [name for name in REMOVED if name in os.environ],
        "set_variables": list(THREAD_VARIABLES),
        "commit": commit_of(Path(__file__).parent),
        "warnings": config["warnings"] + held(os.environ, config["cpu"]["flags"]),
    }
    copied = MOST_COPY_BYTES // (8 if quick else 1)
    found["roofs"] = [measure_roofs(count, found["machine"], keep_env, copied) for count in counts] if roofs else []
    return found


def measure_roofs(workers: int, machine: Mapping[str, Any], keep_env: bool, most_bytes: int) -> dict[str, Any]:
    """GFLOP/s of a large sgemm and GB/s of copies, at one number of workers, in a fresh process."""
    # Beyond the L3 cache by a factor, unless it is larger than a machine's whole memory can show.
    size = min(4 * machine["l3_bytes"], most_bytes, machine["memory_bytes"] // 4)
    with Process(workers, keep_env) as process:
        answer = process.ask("roofs", 120, workers=workers, l2_bytes=machine["l2_bytes"], memory_bytes=size)
    if answer.pop("status") != "ok":
        raise RuntimeError(f"the roofs could not be measured: {answer['detail']}")
    return {"workers": workers, "copy_memory_bytes": size} | answer


def held(environ: Mapping[str, str], flags: Sequence[str]) -> list[str]:
    """Sentences about variables that hold a peer's kernels below what the CPU has; BLAS' are gemmconv's to know."""
    found = []
    for name, older in _OLDER.items():
        value = environ.get(name, "").strip().lower()
        if "avx512f" in flags and value.startswith(older) and not value.startswith("avx512"):
            found.append(f"{name}={environ[name]} holds its library below AVX-512, which this CPU has. Unset it.")
    if environ.get("TF_ENABLE_ONEDNN_OPTS") == "0":
        found.append("TF_ENABLE_ONEDNN_OPTS=0 turns oneDNN off in TensorFlow; this bench turns it on.")
    return found


def machine_of(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for two results to be compared."""
    keys = ("cpu_model", "architecture", "usable_cores", "l2_bytes", "l3_bytes")
    return {key: environment.get("machine", {}).get(key) for key in keys}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _caches() -> list[str]:
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index[0-9]*")):
        level, kind, size, shared = (_read(f"{index}/{name}") for name in ("level", "type", "size", "shared_cpu_list"))
        found.append(f"L{level} {kind} {size}, CPUs {shared}")
    return found


def _virtual_machine() -> str | None:
    """What hides the hardware, where that can be seen."""
    if "hypervisor" in (_read("/proc/cpuinfo") or "").split():
        return _read("/sys/class/dmi/id/sys_vendor") or "yes"
    return None


@dataclass
class Others:
    """Who else took the CPUs while a run went on, from the kernel's accounts; only Linux has them."""

    start_s: float = field(default_factory=time.monotonic)
    ticks: dict[str, int] = field(default_factory=lambda: _ticks())
    mine_s: float = field(default_factory=lambda: _own_seconds())

    def report(self) -> dict[str, Any]:
        """Shares of all CPUs' time: other processes' and the hypervisor's, and what is suspicious about them."""
        now, hertz = _ticks(), os.sysconf("SC_CLK_TCK")
        if not now:
            return {"others_share": None, "steal_share": None, "sentences": []}
        seconds = {key: (now[key] - self.ticks[key]) / hertz for key in now}
        whole = (time.monotonic() - self.start_s) * (os.cpu_count() or 1)
        others = max(0.0, seconds["busy"] - (_own_seconds() - self.mine_s)) / whole
        steal = seconds["steal"] / whole
        sentences = []
        if others > BUSY_SHARE:
            sentences.append(f"other processes took {others:.0%} of the CPUs' time: close them and run again")
        if steal > STEAL_SHARE:
            sentences.append(f"the hypervisor took {steal:.0%} of the CPUs' time: the machine is shared")
        return {"others_share": others, "steal_share": steal, "sentences": sentences}


def _ticks() -> dict[str, int]:
    """Clock ticks of all CPUs since the start: busy (user, nice, system, interrupts) and stolen (proc(5))."""
    if sys.platform != "linux":
        return {}
    fields = [int(word) for word in (_read("/proc/stat") or "cpu 0 0 0 0 0 0 0 0").splitlines()[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    return {"busy": user + nice + system + irq + softirq, "steal": steal}


def _own_seconds() -> float:
    """CPU seconds of this process and of those it has ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
