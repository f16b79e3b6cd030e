"""Facts about the machine: usable cores, caches, vector units, the BLAS libraries loaded and the kernels they run.

For the plan, which is a pure function of (problem, machine, workers), and for `show_config()`. This module reads and
reports; it must not set anything, choose anything, or import anything of the package. Caches, CPU and quota come from
Linux's /proc and /sys; elsewhere the caches are `DEFAULT_L2_BYTES` and `DEFAULT_L3_BYTES`, the flags unknown.
"""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import threadpoolctl

DEFAULT_L2_BYTES = 1 << 20
DEFAULT_L3_BYTES = 16 << 20

# Flags, as /proc/cpuinfo spells them, that decide which GEMM kernels a CPU can run.
VECTOR_FLAGS = (
    "sse3", "pni", "sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx_vnni",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "bf16", "sve",
    "sve2", "sme", "vsx", "rvv",
)  # fmt: skip

# Variables that limit threads or choose kernels; shown where they are set.
VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OPENBLAS_DEFAULT_NUM_THREADS", "MKL_NUM_THREADS",
    "MKL_DYNAMIC", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_THREAD_LIMIT", "OMP_DYNAMIC", "OMP_PROC_BIND",
    "OMP_PLACES", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME", "PYTHON_CPU_COUNT",
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_BLOCK_FACTOR", "OPENBLAS_THREAD_TIMEOUT", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "MKL_THREADING_LAYER", "MKL_INTERFACE_LAYER", "BLIS_ARCH_TYPE",
    "FLEXIBLAS", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES",
)  # fmt: skip

# The generations of x86 kernels in one order for every BLAS. Within one, float32 and float64 run alike: what Cooperlake
# and Sapphirerapids add to SkylakeX is bfloat16, which gemmconv never hands to BLAS.
GENERATIONS = ("SSE3", "SSE4.2", "AVX", "AVX2", "AVX-512")
_FLAGS_OF = (frozenset[str](), {"sse4_2"}, {"avx"}, {"avx2", "fma"}, {"avx512f", "avx512dq", "avx512bw", "avx512vl"})
_OPENBLAS = (
    "generic prescott core2 penryn dunnington atom nano athlon opteron opteron_sse3 barcelona bobcat",
    "nehalem",
    "sandybridge bulldozer piledriver steamroller",
    "haswell zen excavator",
    "skylakex cooperlake sapphirerapids",
)
_BLIS = ("generic penryn", "", "sandybridge bulldozer piledriver steamroller", "haswell excavator zen zen2 zen3",
         "knl skx zen4 zen5")  # fmt: skip
_MKL_INSTRUCTIONS = ("compatible sse2 sse3 ssse3", "sse4_1 sse4_2", "avx", "avx2 avx2_e1",
                     "avx512 avx512_mic avx512_mic_e1 avx512_e1 avx512_e2 avx512_e3 avx512_e4 avx512_e5")  # fmt: skip
_MKL_CPU_TYPE = ("", "", "", "5", "")  # undocumented; 5 is the one whose meaning is known

# (threadpoolctl's internal_api, the variable, what its values mean), in the order they are looked at.
_HOLDERS = (
    ("openblas", "OPENBLAS_CORETYPE", _OPENBLAS),
    ("mkl", "MKL_ENABLE_INSTRUCTIONS", _MKL_INSTRUCTIONS),
    ("mkl", "MKL_DEBUG_CPU_TYPE", _MKL_CPU_TYPE),
    ("mkl", "MKL_CBWR", _MKL_INSTRUCTIONS),
    ("blis", "BLIS_ARCH_TYPE", _BLIS),
)


@dataclass(frozen=True)
class Machine:
    """What a plan may depend on: usable `cores`, `l2_bytes` of one core, and `l3_bytes` shared by all."""

    cores: int
    l2_bytes: int
    l3_bytes: int


def this_machine() -> Machine:
    """The machine as this process may use it now; cores follow the affinity, the caches are read once."""
    return Machine(usable_cores(), *_caches())


def usable_cores() -> int:
    """CPUs this process may use: its affinity now, at most its cgroup's quota rounded up, at least 1."""
    quota = _quota()
    return affinity_cores() if quota is None else max(1, min(affinity_cores(), math.ceil(quota)))


def affinity_cores() -> int:
    """CPUs in this process' affinity mask (all of the machine's where there are no masks)."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13: knows PYTHON_CPU_COUNT and -X cpu_count as well
        return int(os.process_cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """CPU time a second that the cgroups allow, in CPUs: the least of this process' group and all above it, v1 or v2.

    None where nothing limits it. `root` is where /proc and /sys are, for tests.
    """
    quotas = [quota for group in _cgroups(root) if (quota := _group_quota(group)) is not None]
    return min(quotas, default=None)


def _cgroups(root: Path) -> Iterator[Path]:
    """Folders of the groups that may limit this process, its own first, up to the mount points."""
    paths = {}  # controllers, '' for v2 -> the group's path
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths[controllers] = path
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # 36 35 98:0 /mounted-part /mount-point options [tags] - type source super-options (proc(5))
        fields, _, rest = line.partition(" - ")
        mounted, mount_point = fields.split()[3:5]
        kind, *_, options = rest.split()
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller is None or (controller and controller not in options.split(",")):
            continue
        top = root / mount_point.lstrip("/")
        for path in (path for controllers, path in paths.items() if controller in controllers.split(",")):
            # In a container the mount may show only a part of the hierarchy, and the path may lie outside of it.
            inside = Path(path).is_relative_to(mounted) and ".." not in Path(path).parts
            group = top / Path(path).relative_to(mounted) if inside else top
            yield group
            while group != top:
                group = group.parent
                yield group


def _group_quota(group: Path) -> float | None:
    if text := _read(group / "cpu.max"):
        quota, period = text.split()
    else:
        quota, period = _read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()
    if quota in ("", "max", "-1") or period in ("", "0"):
        return None
    return int(quota) / int(period)


@functools.cache
def _quota() -> float | None:
    return cgroup_quota()


def cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> tuple[int, int]:
    """Bytes of one core's share of L2 and of the shared L3, of the first CPU; a default for what cannot be read.

    The first CPU and not one of the affinity mask's, so that blocks, and with them bits, do not depend on the mask.
    """
    found = {2: DEFAULT_L2_BYTES, 3: DEFAULT_L3_BYTES}
    threads_a_core = _cpu_list(_read(cpus / "cpu0/topology/thread_siblings_list")) or 1
    for index in sorted((cpus / "cpu0/cache").glob("index[0-9]*")):
        level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
        size_bytes = _size(size)
        if level not in ("2", "3") or kind == "Instruction" or size_bytes == 0:
            continue
        if level == "2":  # several cores may share one; the threads of one core do not count
            size_bytes //= max(1, _cpu_list(_read(index / "shared_cpu_list")) // threads_a_core)
        found[int(level)] = size_bytes
    return found[2], found[3]


_caches = functools.cache(cache_bytes)


def _size(text: str) -> int:
    """'1024K' in bytes; 0 if it is none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    digits = text.rstrip("KMG")
    return int(digits) * units.get(text[-1], 1) if digits.isdigit() else 0


def _cpu_list(text: str) -> int:
    """How many CPUs '0-3,8' names; 0 for an empty one."""
    bounds = [part.split("-") for part in text.strip().split(",") if part]
    return sum(int(pair[-1]) - int(pair[0]) + 1 for pair in bounds)


def _read(path: Path) -> str:
    """The file's text, '' where there is none to read (another system, or a sandbox that hides it)."""
    try:
        return path.read_text()
    except OSError:
        return ""


@functools.cache
def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Mapping[str, Any]:
    """The CPU's `model`, `machine` (x86_64, aarch64, ...) and the vector `flags` it has; no flags means unknown."""
    fields: dict[str, str] = {}
    for line in _read(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    model = fields.get("model name") or fields.get("cpu") or platform.processor() or "unknown"
    words = set(f"{fields.get('flags', '')} {fields.get('features', '')}".split())
    return {"model": model, "machine": platform.machine(), "flags": [flag for flag in VECTOR_FLAGS if flag in words]}


def held_kernels(
    architecture: str | None,
    internal_api: str = "openblas",
    *,
    environ: Mapping[str, str] | None = None,
    flags: Iterable[str] | None = None,
) -> str | None:
    """A sentence if a variable holds a BLAS at older kernels than the CPU has, else None. x86 only.

    `architecture` and `internal_api` are threadpoolctl's: the kernels that run (None where the library does not say:
    MKL) and which BLAS it is: 'openblas', 'mkl' or 'blis'. `environ` and `flags` are this process' and this CPU's.
    """
    environ = os.environ if environ is None else environ
    able = _able(cpu()["flags"] if flags is None else flags)
    for api, variable, generations in _HOLDERS:
        value = environ.get(variable, "").strip()
        asked = _generation(value.removeprefix("BRANCH=").split(",")[0], generations)  # MKL_CBWR=BRANCH=AVX2,STRICT
        if api != internal_api or able is None or asked is None:
            continue
        runs = asked if architecture is None else _generation(architecture, generations)
        # The library read its variable when it was loaded and may have ignored it: what it runs is what counts.
        if runs is not None and max(runs, asked) < able:
            # MKL does not say what it runs, and ignores some of these on some CPUs and in some versions.
            name, generation = _NAMES[api], GENERATIONS[runs]
            held = f"asks {name} for {generation} kernels"
            if architecture is not None:
                held = f"holds {name} at {architecture} kernels ({generation})"
            advice = f"Unset {variable} before Python starts."
            return f"{variable}={value} {held}; this CPU can run {GENERATIONS[able]}. {advice}"
    return None


_NAMES = {"openblas": "OpenBLAS", "mkl": "MKL", "blis": "BLIS"}


def held_numpy(*, environ: Mapping[str, str] | None = None, flags: Iterable[str] | None = None) -> str | None:
    """The same for NumPy's own loops, which fold the columns: NPY_DISABLE_CPU_FEATURES."""
    environ, flags = os.environ if environ is None else environ, set(cpu()["flags"] if flags is None else flags)
    value = environ.get("NPY_DISABLE_CPU_FEATURES", "")
    # Upper case as NumPy spells them; X86_V3 and X86_V4 are the groups that took the single features' place in 2.4.
    needs = {"AVX": "avx", "AVX2": "avx2", "FMA3": "fma", "X86_V3": "avx2", "X86_V4": "avx512f", "SVE": "sve"}
    needs |= dict.fromkeys(("AVX512F", "AVX512_SKX", "AVX512_ICL", "AVX512_SPR"), "avx512f")
    lost = [name for name in value.replace(",", " ").split() if needs.get(name.upper()) in flags]
    if not lost:
        return None
    return (
        f"NPY_DISABLE_CPU_FEATURES={value.strip()!r} asks NumPy's loops to do without {', '.join(lost)}, "
        "which this CPU has. Unset NPY_DISABLE_CPU_FEATURES before Python starts."
    )


def _generation(name: str, generations: tuple[str, ...]) -> int | None:
    found = [i for i, names in enumerate(generations) if name.lower() in names.split()]
    return found[0] if found else None


def _able(flags: Iterable[str]) -> int | None:
    """The newest generation of x86 kernels that a CPU with these flags runs; None if it is not known."""
    words = set(flags)
    able = [i for i, needed in enumerate(_FLAGS_OF) if needed <= words]
    return able[-1] if words & {"sse3", "pni", "sse4_2", "avx"} else None


def config() -> dict[str, Any]:
    """This module's part of `show_config()`, JSON-able: versions, CPU, cores, caches, loaded BLAS, variables, warnings.

    Only libraries that are loaded already are listed: import what uses them first.
    """
    machine, warnings, libraries = this_machine(), [], []
    for found in threadpoolctl.threadpool_info():
        if found["user_api"] != "blas":
            continue
        keys = ("internal_api", "version", "architecture", "threading_layer", "num_threads", "filepath")
        libraries.append({key: found.get(key) for key in keys})
        sentence = held_kernels(found.get("architecture"), found["internal_api"])
        warnings += [sentence] if sentence and sentence not in warnings else []
    sentence = held_numpy()
    warnings += [sentence] if sentence else []
    return {
        "versions": {
            "gemmconv": _version(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "threadpoolctl": threadpoolctl.__version__,
        },
        "cpu": dict(cpu()),
        "machine": {
            "usable_cores": machine.cores,
            "affinity_cores": affinity_cores(),
            "cgroup_quota": _quota(),
            "l2_bytes": machine.l2_bytes,
            "l3_bytes": machine.l3_bytes,
        },
        "libraries": libraries,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "warnings": warnings,
    }


def _version() -> str:
    try:
        return metadata.version("gemmconv")
    except metadata.PackageNotFoundError:
        return "not installed"
