"""Facts about the machine: held kernels by a table, cgroups and caches from fake files, cores from a real affinity."""

import json
import os
import platform
import subprocess
import sys

import pytest

from gemmconv import config, machine

AVX512 = ("pni", "sse4_2", "avx", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl")
AVX2 = AVX512[:5]
PHI = AVX512[:6]
CORETYPE = "OPENBLAS_CORETYPE"


@pytest.mark.parametrize(
    ("variable", "value", "architecture", "flags", "held", "able"),
    [
        (CORETYPE, "Haswell", "Haswell", AVX512, "holds OpenBLAS at Haswell kernels (AVX2)", "AVX-512"),
        (CORETYPE, "haswell", "Haswell", AVX512, "holds OpenBLAS at Haswell kernels (AVX2)", "AVX-512"),
        (CORETYPE, "Zen", "Zen", AVX512, "holds OpenBLAS at Zen kernels (AVX2)", "AVX-512"),
        # A build without Zen kernels takes Haswell's for them.
        (CORETYPE, "Zen", "Haswell", AVX512, "holds OpenBLAS at Haswell kernels (AVX2)", "AVX-512"),
        (CORETYPE, "Sandybridge", "Sandybridge", AVX512, "holds OpenBLAS at Sandybridge kernels (AVX)", "AVX-512"),
        (CORETYPE, "Sandybridge", "Sandybridge", AVX2, "holds OpenBLAS at Sandybridge kernels (AVX)", "AVX2"),
        (
            CORETYPE,
            "Sandybridge",
            "Sandybridge",
            PHI,
            "holds OpenBLAS at Sandybridge kernels (AVX)",
            "AVX2",
        ),
        (CORETYPE, "Nehalem", "Nehalem", AVX2[:3], "holds OpenBLAS at Nehalem kernels (SSE4.2)", "AVX"),
        (CORETYPE, "Prescott", "Prescott", AVX2[:2], "holds OpenBLAS at Prescott kernels (SSE3)", "SSE4.2"),
        ("BLIS_ARCH_TYPE", "haswell", "haswell", AVX512, "holds BLIS at haswell kernels (AVX2)", "AVX-512"),
        ("MKL_ENABLE_INSTRUCTIONS", "AVX2", None, AVX512, "asks MKL for AVX2 kernels", "AVX-512"),
        ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2", None, AVX2, "asks MKL for SSE4.2 kernels", "AVX2"),
        ("MKL_DEBUG_CPU_TYPE", "5", None, AVX512, "asks MKL for AVX2 kernels", "AVX-512"),
        ("MKL_CBWR", "AVX2,STRICT", None, AVX512, "asks MKL for AVX2 kernels", "AVX-512"),
        ("MKL_CBWR", "BRANCH=AVX", None, AVX2, "asks MKL for AVX kernels", "AVX2"),
    ],
)
def test_a_variable_that_holds_kernels_is_named(variable, value, architecture, flags, held, able):
    api = {"OPENBLAS": "openblas", "BLIS": "blis", "MKL": "mkl"}[variable.split("_")[0]]
    sentence = machine.held_kernels(architecture, api, environ={variable: value}, flags=flags)
    advice = f"Unset {variable} before Python starts."
    assert sentence == f"{variable}={value} {held}; this CPU can run {able}. {advice}"


@pytest.mark.parametrize(
    ("environ", "api", "architecture", "flags"),
    [
        pytest.param({}, "openblas", "Haswell", AVX512, id="older kernels, but no variable's doing"),
        pytest.param({CORETYPE: "Haswell"}, "openblas", "Haswell", AVX2, id="all the CPU has"),
        pytest.param({CORETYPE: "SkylakeX"}, "openblas", "SkylakeX", AVX512, id="newest"),
        pytest.param({CORETYPE: "SkylakeX"}, "openblas", "SkylakeX", (*AVX512, "amx_bf16"), id="bfloat16 aside"),
        pytest.param({CORETYPE: "Haswell"}, "openblas", "SkylakeX", AVX512, id="set after the library was loaded"),
        pytest.param({CORETYPE: "Core99"}, "openblas", "Haswell", AVX512, id="no core of that name"),
        pytest.param({CORETYPE: ""}, "openblas", "Haswell", AVX512, id="empty"),
        pytest.param({CORETYPE: "SkylakeX"}, "openblas", "Haswell", AVX512, id="asked for more than the build has"),
        pytest.param({CORETYPE: "Haswell"}, "openblas", "SomethingNew", AVX512, id="kernels of unknown age"),
        pytest.param({CORETYPE: "Haswell"}, "openblas", "Haswell", (), id="flags unknown"),
        pytest.param({CORETYPE: "ARMV8"}, "openblas", "armv8", ("asimd", "sve"), id="not x86"),
        pytest.param({CORETYPE: "Haswell"}, "blis", "zen3", AVX512, id="another library's variable"),
        pytest.param({"OPENBLAS_VERBOSE": "2"}, "openblas", "Haswell", AVX512, id="verbose holds nothing"),
        pytest.param({"MKL_CBWR": "AUTO"}, "mkl", None, AVX512, id="MKL's own choice"),
        pytest.param({"MKL_ENABLE_INSTRUCTIONS": "AVX512_E1"}, "mkl", None, AVX512, id="MKL's newest"),
    ],
)
def test_no_warning_where_no_variable_holds_anything(environ, api, architecture, flags):
    assert machine.held_kernels(architecture, api, environ=environ, flags=flags) is None


def test_numpy_features_that_are_disabled_and_there_are_named():
    environ = {"NPY_DISABLE_CPU_FEATURES": "AVX512F,AVX2 AVX512_ICL SSE42"}
    assert machine.held_numpy(environ=environ, flags=AVX2) == (
        "NPY_DISABLE_CPU_FEATURES='AVX512F,AVX2 AVX512_ICL SSE42' asks NumPy's loops to do without AVX2, "
        "which this CPU has. Unset NPY_DISABLE_CPU_FEATURES before Python starts."
    )
    assert "do without AVX512F, AVX2, AVX512_ICL," in machine.held_numpy(environ=environ, flags=AVX512)
    assert machine.held_numpy(environ={"NPY_DISABLE_CPU_FEATURES": "AVX512F"}, flags=AVX2) is None
    assert machine.held_numpy(environ={}, flags=AVX512) is None


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs  rw,mode=755\n"  # an empty source
    "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)


@pytest.mark.parametrize(
    ("group", "mounts", "files", "quota"),
    [
        pytest.param("", "", {}, None, id="no /proc"),
        pytest.param("0::/\n", V2_MOUNT, {}, None, id="v2, no controller"),
        pytest.param("0::/a/b\n", V2_MOUNT, {"a/b/cpu.max": "max 100000\n"}, None, id="v2, no limit"),
        pytest.param("0::/a/b\n", V2_MOUNT, {"a/b/cpu.max": "150000 100000\n"}, 1.5, id="v2, its own"),
        pytest.param(
            "0::/a/b\n", V2_MOUNT, {"a/b/cpu.max": "400000 100000", "a/cpu.max": "50000 100000"}, 0.5, id="v2, parent's"
        ),
        pytest.param("0::/\n", V2_MOUNT, {"cpu.max": "200000 100000\n"}, 2.0, id="v2, in a namespace"),
        pytest.param("0::/../x\n", V2_MOUNT, {"cpu.max": "200000 100000\n"}, 2.0, id="v2, outside its namespace"),
        pytest.param(
            "3:cpuset:/\n1:cpu,cpuacct:/job\n0::/\n",
            V1_MOUNTS.format(root="/"),
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"},
            2.5,
            id="v1",
        ),
        pytest.param(
            "1:cpu,cpuacct:/job\n",
            V1_MOUNTS.format(root="/"),
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"},
            None,
            id="v1, no limit",
        ),
        pytest.param(
            "1:cpu,cpuacct:/docker/0a1b/job\n",
            V1_MOUNTS.format(root="/docker/0a1b"),
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            0.5,
            id="v1, a container's part mounted",
        ),
        pytest.param(
            "2:cpuset:/job\n",
            V1_MOUNTS.format(root="/"),
            {"cpuset/job/cpu.cfs_quota_us": "50000\n", "cpuset/job/cpu.cfs_period_us": "100000\n"},
            None,
            id="v1, another controller's",
        ),
    ],
)
def test_quota_is_the_least_of_the_cgroup_and_those_above(tmp_path, group, mounts, files, quota):
    if group:
        _write(tmp_path / "proc/self/cgroup", group)
        _write(tmp_path / "proc/self/mountinfo", mounts)
    for name, text in files.items():
        _write(tmp_path / "sys/fs/cgroup" / name, text)
    assert machine.cgroup_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"), [(8, None, 8), (8, 2.0, 2), (8, 2.1, 3), (8, 0.2, 1), (2, 6.0, 2), (1, None, 1)]
)
def test_usable_cores_are_affinity_and_quota_rounded_up(monkeypatch, affinity, quota, cores):
    monkeypatch.setattr(machine, "affinity_cores", lambda: affinity)
    monkeypatch.setattr(machine, "_quota", lambda: quota)
    assert machine.usable_cores() == cores
    assert machine.this_machine().cores == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_usable_cores_follow_the_affinity():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.affinity_cores() == machine.usable_cores() == machine.this_machine().cores == 1
    finally:
        os.sched_setaffinity(0, before)
    assert machine.affinity_cores() == len(before)
    assert 1 <= machine.usable_cores() <= len(before)


def _fake_caches(cpus, caches, siblings="0\n"):
    _write(cpus / "cpu0/topology/thread_siblings_list", siblings)
    for i, (level, kind, size, shared) in enumerate(caches):
        folder = cpus / f"cpu0/cache/index{i}"
        for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
            _write(folder / name, f"{text}\n")


L1 = [("1", "Data", "32K", "0"), ("1", "Instruction", "32K", "0")]


@pytest.mark.parametrize(
    ("siblings", "caches", "l2_bytes", "l3_bytes"),
    [
        pytest.param(
            "0", [("2", "Unified", "512K", "0"), ("3", "Unified", "8M", "0-7")], 512 << 10, 8 << 20, id="own L2"
        ),
        pytest.param("0,8", [("2", "Unified", "2048K", "0,8")], 2 << 20, None, id="two threads of a core"),
        pytest.param("0", [("2", "Unified", "4096K", "0-3")], 1 << 20, None, id="four cores share"),
        pytest.param("0-1", [("2", "Unified", "4096K", "0-3")], 2 << 20, None, id="two cores of two threads share"),
        pytest.param(
            "0", [("2", "Data", "256K", "0"), ("2", "Instruction", "1M", "0")], 256 << 10, None, id="split L2"
        ),
        pytest.param("0", [("3", "Unified", "32768K", "0-1,4-5")], None, 32 << 20, id="no L2 shown"),
        pytest.param("0", [("2", "Unified", "", "0"), ("3", "Unified", "0K", "0")], None, None, id="sizes not shown"),
        pytest.param("", [("2", "Unified", "256K", "")], 256 << 10, None, id="sharing not shown"),
    ],
)
def test_caches_are_one_cores_share(tmp_path, siblings, caches, l2_bytes, l3_bytes):
    _fake_caches(tmp_path, L1 + caches, siblings)
    expected = (l2_bytes or machine.DEFAULT_L2_BYTES, l3_bytes or machine.DEFAULT_L3_BYTES)
    assert machine.cache_bytes(tmp_path) == expected


def test_caches_have_defaults_where_nothing_can_be_read(tmp_path):
    assert machine.cache_bytes(tmp_path) == (1 << 20, 16 << 20)


def test_this_machine_is_hashable_equal_and_quick_to_ask():
    first, second = machine.this_machine(), machine.this_machine()
    assert first == second
    assert hash(first) == hash(second)
    assert first != machine.Machine(first.cores, first.l2_bytes // 2, first.l3_bytes)
    assert first.cores >= 1
    assert 0 < first.l2_bytes < first.l3_bytes
    with pytest.raises(AttributeError):
        first.cores = 3


@pytest.mark.parametrize(
    ("cpuinfo", "model", "flags"),
    [
        (
            "processor\t: 0\nmodel name\t: Chip 9\nflags\t\t: fpu pni avx2 fma zzz\n\nmodel name\t: Chip 8\n",
            "Chip 9",
            ["pni", "fma", "avx2"],
        ),
        ("processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\n", None, ["asimd", "sve"]),
        ("", None, []),
    ],
)
def test_cpu_from_cpuinfo(tmp_path, cpuinfo, model, flags):
    _write(tmp_path / "cpuinfo", cpuinfo)
    found = machine.cpu(tmp_path / "cpuinfo")
    assert found["model"] == (model or platform.processor() or "unknown")
    assert found["flags"] == flags
    assert found["machine"] == platform.machine()


def test_config_is_json_and_holds_what_is_set(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    found = json.loads(json.dumps(machine.config()))
    assert found["versions"]["python"] == platform.python_version()
    assert found["machine"]["usable_cores"] == machine.usable_cores()
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert "OPENBLAS_CORETYPE" not in found["variables"]
    for library in found["libraries"]:
        assert library["internal_api"]
        assert library["num_threads"] >= 1


def test_format_config_aligns_and_nests():
    facts = {
        "versions": {"gemmconv": "1.0", "numpy": "2.0"},
        "cpu": {"flags": ["avx", "avx2"], "none": [], "deep": {"a": True, "bc": ""}},
        "machine": {"l2_bytes": 3 << 19, "l3_bytes": 1536},
        "libraries": [{"api": "x", "n": 1}, {"api": "y", "n": 2}],
        "variables": {},
        "warnings": ["one sentence", "another"],
    }
    assert config.format_config(facts).splitlines() == [
        "versions:",
        "  gemmconv  1.0",
        "  numpy     2.0",
        "cpu:",
        "  flags  avx avx2",
        "  none   none",
        "  deep:",
        "    a   yes",
        "    bc  none",
        "machine:",
        "  l2_bytes  1572864 (1.5 MiB)",
        "  l3_bytes  1536 (1.5 KiB)",
        "libraries:",
        "  - api  x",
        "    n    1",
        "  - api  y",
        "    n    2",
        "variables:",
        "  none",
        "warnings:",
        "  - one sentence",
        "  - another",
    ]


def test_show_config_prints_or_returns(capsys):
    assert config.show_config() is None
    text = capsys.readouterr().out
    found = config.show_config(mode="dicts")
    assert capsys.readouterr().out == ""
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["versions", "cpu", "machine", "blas", "threads", "libraries", "variables", "warnings"]
    assert [line[:-1] for line in text.splitlines() if not line.startswith(" ")] == list(found)
    # Some library is behind the path taken, unless none is known to threadpoolctl (Accelerate).
    assert not found["libraries"] or any(library["used"] in (True, None) for library in found["libraries"])
    with pytest.raises(ValueError, match=r"show_config: mode='text' is unknown: 'stdout' prints, 'dicts'"):
        config.show_config(mode="text")


@pytest.mark.parametrize(
    ("filepath", "libraries", "path", "used"),
    [
        ("/x/site-packages/scipy.libs/libscipy_openblas-1.so", 2, "scipy.linalg.cython_blas", True),
        ("/x/site-packages/numpy.libs/libscipy_openblas64_-1.so", 2, "scipy.linalg.cython_blas", False),
        ("/x/site-packages/numpy.libs/libscipy_openblas64_-1.so", 2, "numpy.matmul", True),
        ("/x/site-packages/scipy/.dylibs/libscipy_openblas.dylib", 2, "scipy.linalg.cython_blas", True),
        ("/usr/lib/libopenblas.so.0", 1, "scipy.linalg.cython_blas", True),
        ("/home/scipy/lib/libopenblas.so.0", 2, "scipy.linalg.cython_blas", None),
    ],
)
def test_the_library_behind_the_path_is_marked(filepath, libraries, path, used):
    assert config._is_used(filepath, libraries, {"float32": {"path": path}}) is used


def test_a_real_openblas_held_by_its_variable_is_reported():
    code = "import json, gemmconv.config as c; print(json.dumps(c.show_config(mode='dicts')))"
    environ = {**os.environ, "OPENBLAS_CORETYPE": "Nehalem"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if {library["architecture"] for library in found["libraries"]} != {"Nehalem"}:
        pytest.skip("no OpenBLAS here that has kernels for several x86 CPUs")
    if "avx" not in found["cpu"]["flags"]:
        pytest.skip("this CPU's flags are unknown, or it has no AVX to be kept from")
    (warning,) = [line for line in found["warnings"] if "OPENBLAS_CORETYPE" in line]
    assert warning.startswith("OPENBLAS_CORETYPE=Nehalem holds OpenBLAS at Nehalem kernels (SSE4.2); this CPU can")
    assert found["variables"]["OPENBLAS_CORETYPE"] == "Nehalem"
