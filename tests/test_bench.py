"""Every command of `python -m bench` at toy size, good and bad contenders, and the exit statuses."""

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import scipy.stats

from gemmconv.lowerings import cost

ROOT = Path(__file__).parents[1]
HERE = f"{ROOT / 'tests' / 'bench_contenders.py'}:"
QUICK = ("--quick", "--rounds", "3", "--workers", "1")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="The bench stops processes, which Windows cannot.")


def bench(*arguments, status=0, cwd=ROOT, **environ):
    """Run `python -m bench` and return what it prints, on both streams; its exit status is checked."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows_of(document):
    """Rows by contender and layer."""
    return {(row["contender"].rpartition(":")[2], row["layer"]): row for row in document["rows"]}


@pytest.fixture(scope="module")
def speed(tmp_path_factory):
    """A result of a good run, its path, and what was printed."""
    path = tmp_path_factory.mktemp("speed") / "result.json"
    against = f"gemmconv,gemmconv:col2im,numpy,torch,{HERE}right"
    text = bench(
        "run", "--suite", "tiny", "--only", "k3s2,odd", "--against", against, *QUICK, "--launches", "2", "--json", path,
        OPENBLAS_CORETYPE="Haswell",
    )  # fmt: skip
    return json.loads(path.read_text()), path, text


def test_rows_have_what_was_measured(speed):
    """For each layer and contender: raw times, their median, rates, the error, and the contender's own."""
    found, _, text = speed
    assert found["schema"] == "gemmconv-bench"
    assert found["schema_version"] == 1
    rows = rows_of(found)
    names = {"gemmconv", "gemmconv#2", "col2im", "numpy", "right"}
    assert set(rows) == {(name, layer) for name in names for layer in ("tiny_k3s2", "tiny_odd")}
    for (name, layer), row in rows.items():
        assert row["status"] == "ok"
        assert 0 < row["error_fraction"] < 1e-6
        assert len(row["visits_seconds"]) == row["visits"] == 6
        assert row["launch_of_visit"] == [0, 0, 0, 1, 1, 1]
        assert {len(calls) for calls in row["visits_seconds"]} == {row["calls_a_visit"]}
        medians = [np.median(calls) for calls in row["visits_seconds"]]
        assert row["median_seconds"] == pytest.approx(np.median(medians))
        assert row["gflops"] == pytest.approx(row["flops"] / row["median_seconds"] / 1e9)
        assert row["roof_share"] == pytest.approx(row["gflops"] / row["roof_gflops"])
        assert ("first_touch" in row) == (name != "numpy")
        assert ("phases" in row) == (name in ("gemmconv", "gemmconv#2", "col2im"))
        assert layer in text
    assert rows["gemmconv", "tiny_k3s2"]["flops"] == 2 * 8 * 16 * 16 * 27
    assert rows["gemmconv", "tiny_k3s2"]["bytes"] == 4 * (8 * 16 + 27 * 16 * 16 + 64 * 16)


def test_the_environment_is_inside(speed):
    """Removed variables, libraries and roofs; nothing of this machine's folders."""
    found, _, text = speed
    environment = found["environment"]
    set_here = {"OPENBLAS_L2_SIZE"} & set(os.environ)
    assert environment["removed_variables"] == ["OPENBLAS_CORETYPE", *set_here]
    assert "removed for all contenders: OPENBLAS_CORETYPE" in text
    assert environment["machine"]["cpu_model"]
    assert environment["roofs"][0]["sgemm_gflops"] > 0
    assert environment["others"]["sentences"] is not None
    for contender in found["contenders"]:
        if contender["status"] == "ok":
            assert all(pool["num_threads"] == 1 for pool in contender["pools"] if pool["user_api"] == "blas")
    missing = [c["detail"] for c in found["contenders"] if c["status"] == "missing"]
    if missing:
        assert "torch was not measured: not installed: torch" in text
    assert str(ROOT) not in json.dumps(environment)


def test_ratios_are_of_rounds_and_lie_in_their_intervals(speed):
    """Interquartile means of the rounds' ratios; those of the same function are near 1."""
    found, _, _ = speed
    rows = {(row["contender"], row["layer"]): row for row in found["rows"]}
    for ratio in found["ratios"]:
        other, mine = (rows[name, ratio["layer"]]["visits_seconds"] for name in (ratio["contender"], "gemmconv"))
        logs = [math.log(statistics.median(a) / statistics.median(b)) for a, b in zip(other, mine, strict=True)]
        assert ratio["ratio"] == pytest.approx(math.exp(scipy.stats.trim_mean(logs, 0.25)))
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert {s["contender"] for s in found["summaries"]} >= {"gemmconv#2", "gemmconv:col2im", "numpy"}
    again = next(s for s in found["summaries"] if s["contender"] == "gemmconv#2")
    assert 0.7 < again["ratio"] < 1.4


def test_compare(speed, tmp_path):
    """0 for the same, 1 for slower, 2 for wrong, for other machines and for what is no result; --force.

    Times are made steady: how far apart those are that were measured is the machine's affair.
    """
    found, path, _ = speed

    def changed(name, change):
        copy = json.loads(json.dumps(found))
        change(copy)
        target = tmp_path / f"{name}.json"
        target.write_text(json.dumps(copy))
        return target

    def slower(copy):
        for row in copy["rows"]:
            row["visits_seconds"] = [[1.5 * s for s in calls] for calls in row["visits_seconds"]]

    def steady(copy):
        for row in copy["rows"]:
            usual = row["median_seconds"]
            row["visits_seconds"] = [[usual for _ in calls] for calls in row["visits_seconds"]]

    assert "geometric mean: 1.00" in bench("compare", path, path)
    before = changed("steady", steady)
    found = json.loads(before.read_text())
    slow = changed("slower", slower)
    assert "REGRESSION" in bench("compare", before, slow, status=1)
    assert "REGRESSION" not in bench("compare", before, slow, "--fail-over", "60%")
    assert "REGRESSION" not in bench("compare", slow, before)

    other = changed("other", lambda copy: copy["environment"]["machine"].update(cpu_model="Z80"))
    text = bench("compare", path, other, status=2)
    assert "cpu_model was" in text
    assert "is 'Z80'" in text
    assert "compared by force: cpu_model" in bench("compare", path, other, "--force")

    wrong = changed(
        "wrong", lambda copy: copy["rows"][0].update(status="wrong", detail="1 of 8 cells", visits_seconds=[])
    )
    wrong_subject = json.loads(wrong.read_text())["rows"][0]["contender"]
    bench("compare", path, wrong, "--contender", wrong_subject, status=2)
    assert "MISSING" in bench("compare", path, changed("few", lambda copy: copy["rows"].pop(0)), status=2)
    versions = changed("version", lambda copy: copy.update(schema_version=2))
    assert "schema version 2, this bench reads 1" in bench("compare", path, versions, status=2)
    assert "its schema is not 'gemmconv-bench'" in bench("compare", path, ROOT / "bench/workloads.json", status=2)
    assert "No such file" in bench("compare", path, tmp_path / "none.json", status=2)


def test_report(speed):
    """What the run printed, and of another contender with the ratios turned."""
    found, path, text = speed
    assert bench("report", path) in text
    turned = bench("report", path, "--subject", "numpy")
    assert "time of others / time of numpy" in turned
    (ours,) = (row["ratio"] for row in found["summaries"] if (row["contender"], row["workers"]) == ("numpy", 1))
    (theirs,) = re.findall(r"gemmconv +\S +1 +\S +2 +\S +(\d+\.\d\d)", turned)
    assert float(theirs) == pytest.approx(1 / ours, abs=0.01)
    refused = bench("report", path, "--subject", "nobody", status=2)
    assert "the result has no contender 'nobody'; it has " in refused


@pytest.mark.parametrize(
    ("op", "algorithm", "roof"), [("conv3d", "im2col", [60, 5, 72]), ("conv3d_backprop_filter", "im2col", [72, 5, 60])]
)
def test_operations(speed, tmp_path, op, algorithm, roof):
    """Others than the transposed convolution: right, with their own roof, drawn, and not compared with another's."""
    path = tmp_path / "result.json"
    against = f"gemmconv:{algorithm},gemmconv:prepared,numpy,onnxruntime,{HERE}right_{op}"
    arguments = ("--suite", "tiny", "--only", "line,odd", *QUICK, "--layout", "NCDHW", "--json", path)
    text = bench("run", "--op", op, "--against", against, *arguments)
    found = json.loads(path.read_text())
    rows = rows_of(found)
    for name in ("gemmconv", algorithm, "numpy", f"right_{op}"):
        for layer in ("tiny_line", "tiny_odd"):
            assert rows[name, layer]["status"] == "ok"
            assert 0 < rows[name, layer]["error_fraction"] < 1e-6
    assert found["settings"]["op"] == {layer["op"] for layer in found["layers"]}.pop() == op
    assert f"{op}, 1 worker(s)" in text
    if op == "conv3d_backprop_filter":
        assert f"onnxruntime was not measured: it has no {op}" in text
        assert f"gemmconv:prepared was not measured: {op} has no filter to prepare" in text
    else:
        assert rows["prepared", "tiny_odd"]["status"] == "ok"
    assert [found["layer_roofs"][0][key] for key in "mnk"] == roof  # of tiny_odd
    assert len(bench("plot", path).split()) >= 2
    assert f"op was 'conv3d_transpose' and is '{op}'" in bench("compare", speed[1], path, status=2)


@pytest.mark.parametrize(("suite", "only"), [("planes", "dcgan_4_b1"), ("groups", "depthwise_up,resnext_3")])
@pytest.mark.parametrize("op", ["conv3d_transpose", "conv3d", "conv3d_backprop_filter"])
def test_planes_and_groups(tmp_path, suite, only, op):
    """Arrays of two spatial axes, and filters of groups."""
    path = tmp_path / "result.json"
    arguments = ("--suite", suite, "--only", only, "--quick", "--rounds", "1", "--workers", "1", "--json", path)
    bench("run", "--op", op, "--against", "numpy", *arguments)
    rows = rows_of(json.loads(path.read_text()))
    assert len(rows) == 2 * len(only.split(","))
    assert all(row["status"] == "ok" for row in rows.values())


BAD = {
    "wrong_cell": ("wrong", r"1 of \d+ cells .* differ by more than 1e-05 of the largest, at most by 1\.0e-03"),
    "not_a_number": ("wrong", "1 of .* cells"),
    "half_precision": ("wrong", "cells"),
    "wrong_later": ("wrong", "cells"),
    "wrong_shape": ("wrong", r"shape \(2, 8, 7, 8, 4\), not \(2, 8, 8, 8, 4\)"),
    "wrong_dtype": ("wrong", "dtype float64, not float32"),
    "a_list": ("wrong", "dtype float64, not float32"),
    "raises": ("raised", r"ArithmeticError: carry the one \(bench_contenders.py, line \d+\)"),
    "hangs": ("hung", "no answer to 'prepare' in 2 s"),
    "killed": ("died", "was killed by SIGKILL during 'prepare'"),
    "exits": ("died", "exited with status 7 during 'prepare'"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """All of the bad at once, and two that are good, on a layer."""
    path = tmp_path_factory.mktemp("bad") / "result.json"
    against = ",".join(["numpy", *(HERE + name for name in BAD)])
    arguments = ("--suite", "tiny", "--only", "k2s2", *QUICK, "--timeout", "2", "--json", path)
    text = bench("run", "--against", against, *arguments, status=2)
    return rows_of(json.loads(path.read_text())), text


@pytest.mark.parametrize("name", BAD)
def test_bad_contenders_cost_only_their_own_rows(bad, name):
    """What they did is said, and the others have their times."""
    rows, text = bad
    status, detail = BAD[name]
    row = rows[name, "tiny_k2s2"]
    assert row["status"] == status
    assert re.search(detail, row["detail"])
    assert "median_seconds" not in row
    assert f"{status.upper()}: bench_contenders.py:{name}: " in text
    for good in ("gemmconv", "numpy"):
        assert rows[good, "tiny_k2s2"]["median_seconds"] > 0


@pytest.mark.parametrize(
    "arguments",
    [("--rounds", "0"), ("--rounds", "-3"), ("--launches", "0"), ("--launches", "-1"), ("--minutes", "0")],
)
def test_counts_below_one_are_refused(arguments):
    bench("run", "--suite", "tiny", *arguments, status=2)


def test_a_contender_that_was_lost_starts_again(tmp_path):
    """It hangs on one layer, and is measured on the next."""
    path = tmp_path / "result.json"
    arguments = ("--suite", "tiny", "--only", "k2s2,line", *QUICK, "--timeout", "2", "--json", path)
    bench("run", "--against", f"{HERE}hangs_once", *arguments, status=2)
    rows = rows_of(json.loads(path.read_text()))
    assert rows["hangs_once", "tiny_k2s2"]["status"] == "hung"
    assert rows["hangs_once", "tiny_line"]["status"] == "ok"
    assert rows["hangs_once", "tiny_line"]["median_seconds"] > 0


def test_a_users_file_as_the_documents_say(tmp_path):
    """From another folder, in one command, in float64 end to end."""
    shutil.copy(ROOT / "bench/examples/loop.py", tmp_path / "mine.py")
    text = bench(
        "run", "--against", "mine.py:conv", "--suite", "tiny", "--only", "odd", *QUICK, "--dtype", "float64",
        "--end-to-end", cwd=tmp_path,
    )  # fmt: skip
    assert re.search(r"tiny_odd.* us .*\d\.\d\d \(\d", text)


def test_a_c_file(tmp_path):
    """The example, compiled with the system's compiler, in both layouts; other dtypes are said to be unsupported."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("There is no C compiler to compile bench/examples/direct.c with.")
    library = tmp_path / "direct.so"
    source = ROOT / "bench/examples/direct.c"
    flags = ["-O2", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'bench'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True, timeout=60)
    for layout in ("NDHWC", "NCDHW"):
        path = tmp_path / f"{layout}.json"
        arguments = ("--suite", "tiny", "--only", "odd,gaps", *QUICK, "--layout", layout, "--json", path)
        bench("run", "--against", f"{library}:direct", *arguments)
        rows = rows_of(json.loads(path.read_text()))
        assert [row["status"] for (name, _), row in rows.items() if name == "direct"] == ["ok"] * 2
    text = bench(
        "run", "--against", f"{library}:direct", "--suite", "tiny", "--only", "odd", *QUICK, "--dtype", "float64"
    )
    assert "unsupported" in text
    planes = ("--suite", "planes", "--only", "dcgan_4_b1", *QUICK)
    assert re.search(r"dcgan_4_b1.* [um]s .*\d\.\d\d \(\d", bench("run", "--against", f"{library}:direct", *planes))
    text = bench("run", "--against", f"{library}:direct", "--op", "conv3d", "--suite", "tiny", "--only", "odd", *QUICK)
    assert "direct.so:direct was not measured: it has no conv3d" in text
    text = bench("run", "--against", f"{library}:indirect", "--suite", "tiny", "--only", "odd", *QUICK, status=2)
    assert "undefined symbol: indirect" in text

    refuses = tmp_path / "refuses.c"
    refuses.write_text(
        '#include "gemmconv_bench.h"\ngemmconv_bench_kernel refuses;\n'
        "int refuses(const struct gemmconv_bench_problem *p, const float *x, const float *w, float *y) {\n"
        "    (void)x, (void)w, (void)y;\n    return p->version == GEMMCONV_BENCH_VERSION ? 3 : 0;\n}\n"
    )
    subprocess.run([compiler, *flags, str(refuses), "-o", str(tmp_path / "refuses.so")], check=True, timeout=60)
    arguments = ("--suite", "tiny", "--only", "odd", *QUICK)
    text = bench("run", "--against", f"{tmp_path / 'refuses.so'}:refuses", *arguments, status=2)
    assert "RAISED: refuses.so:refuses: RuntimeError: refuses returned 3" in text


@pytest.mark.skipif(sys.platform != "linux", reason="Memory is read from /proc, which only Linux has.")
def test_memory(tmp_path):
    """What a layer of 8 MB takes beyond operands and result is some MiB, not nothing."""
    path = tmp_path / "memory.json"
    arguments = ("--memory", "--only", "unetr_bottom", "--workers", "1", "--json", path)
    text = bench("run", "--against", f"numpy,{HERE}raises", *arguments, status=2)
    rows = rows_of(json.loads(path.read_text()))
    assert 0 < rows["gemmconv", "unetr_bottom"]["peak_bytes"] < 100 * 2**20
    # The obvious version's columns of all taps are 216 x 8 x 128 floats.
    assert rows["numpy", "unetr_bottom"]["peak_bytes"] > 0.8 * 4 * 216 * 8 * 128
    assert rows["raises", "unetr_bottom"]["status"] == "raised"
    assert "peak memory beyond operands and result" in text


def test_env(tmp_path):
    """The machine, every BLAS with its kernels and threads, variables with what they hold back, roofs."""
    path = tmp_path / "env.json"
    text = bench("env", "--workers", "1", "--keep-env", "--json", path, OPENBLAS_CORETYPE="Nehalem")
    assert "OPENBLAS_CORETYPE" in text
    assert "copy in memory GB/s" in text
    found = json.loads(path.read_text())
    assert found["variables"]["OPENBLAS_CORETYPE"] == "Nehalem"
    architectures = {library["architecture"] for library in found["blas_libraries"]}
    if "Nehalem" in architectures and "avx2" in found["machine"]["vector_flags"]:
        assert any("OPENBLAS_CORETYPE=Nehalem holds OpenBLAS at Nehalem" in sentence for sentence in found["warnings"])
    removed = bench("env", "--workers", "1", OPENBLAS_CORETYPE="Nehalem")
    assert "kernels Nehalem" not in removed
    assert "removed for all contenders: OPENBLAS_CORETYPE" in removed


def test_plot(speed, tmp_path):
    """One file for each drawing that a result has data for; those of the sweep only from the sweep."""
    _, path, _ = speed
    printed = bench("plot", path, "--output", tmp_path / "plots", "--format", "png").split()
    kinds = {Path(name).stem.removeprefix("result-") for name in printed}
    assert {"relative", "roofline"} <= kinds <= {"relative", "roofline", "phases"}
    for name in printed:
        assert Path(name).read_bytes().startswith(b"\x89PNG")
    sweep = tmp_path / "sweep.json"
    bench("run", "--suite", "sweep", "--only", "stride_4,base", "--against", "numpy", *QUICK, "--json", sweep)
    printed = bench("plot", sweep).split()
    assert str(tmp_path / "sweep-sweep-1.svg") in printed
    assert (tmp_path / "sweep-sweep-1.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("layout", ["NDHWC", "NCDHW"])
@pytest.mark.parametrize(
    ("op", "names"),
    [
        ("conv3d_transpose", ("value", "filter")),
        ("conv3d", ("input", "filter")),
        ("conv3d_backprop_filter", ("input", "out_backprop")),
    ],
)
def test_vectors(tmp_path, layout, op, names):
    """Files that say all there is to say: an engine that reads nothing else gets them right."""
    bench("vectors", tmp_path, "--suite", "tiny", "--layout", layout, "--op", op)
    index = json.loads((tmp_path / "index.json").read_text())
    assert len(index["layers"]) == 6
    assert index["op"] == op
    for layer in index["layers"]:
        arrays = {name: np.load(tmp_path / layer["files"][name]) for name in (*names, "result")}
        assert all(list(array.shape) == layer[f"{name}_shape"] for name, array in arrays.items())
        first, second, result = arrays.values()
        assert (first.dtype, second.dtype, result.dtype) == (np.float32, np.float32, np.float64)
        geometry = layer["strides"], layer["padding"], layout, layer["dilations"]
        if op == "conv3d_transpose":
            exact = oracle.conv3d_transpose(first, second, layer["result_shape"], *geometry)
        elif op == "conv3d":
            exact = oracle.conv3d(first, second, layer["input"], *geometry)
        else:  # of one tap and pair of channels, all but which are zeros in a filter
            one = np.zeros(result.shape)
            one[..., 0, 1] = 1
            exact = (oracle.conv3d(first, one, layer["input"], *geometry) * second).sum()
            result = result[..., 0, 1].sum()
        assert np.allclose(result, exact, rtol=0, atol=1e-13 * layer["largest_result"])


def test_calibrate():
    """Every constant that is measured, beside the shipped one; the shipped ones stay."""
    text = bench("calibrate", "--seconds", "0.1")
    found = re.findall(r"(\w+) +│ +([\d.e+-]+) │ +([\d.e+-]+) │ +([\d.]+) │", text)
    assert len(found) == 17
    for name, shipped, measured, ratio in found:
        assert float(shipped) == pytest.approx(getattr(cost, name), rel=0.005)
        assert float(ratio) == pytest.approx(float(measured) / float(shipped), abs=0.01, rel=0.01)  # both are rounded
        assert float(measured) > 0 or name == "SPILLED_VALUE_S"


def test_latency_and_import():
    """Two medians each, and a ratio; how long plans take, for each operation; the variables are removed."""
    said = bench("latency")
    assert len(re.findall(r"[\d.]+ us, median of 1000", said)) == 2
    plans = re.findall(r"^(\w+) +([\d.]+) ms to plan a layer, mean of 20 of models; ([\d.]+) at most$", said, re.M)
    assert [name for name, *_ in plans] == ["conv3d_transpose", "conv3d", "conv3d_backprop_filter"]
    assert all(0 < float(mean) < float(most) for _, mean, most in plans)
    assert re.search(r"^ratio \d\.\d\d$", bench("import", "--rounds", "1"), re.M)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["run", "--against", "scipy"],
            "scipy: no such contender; it is one of gemmconv, gemmconv:ALGORITHM, gemmconv:prepared, numpy",
        ),
        (["run", "--against", "gemmconv:fft"], "gemmconv has no conv3d_transpose algorithm 'fft', it has auto, "),
        (["run", "--against", "none.py:f"], "there is no file none.py"),
        (["run", "--against", "none.so:f"], "there is no file none.so"),
        (["run", "--only", "nothing"], "--only nothing: the suite models has nnunet_l2"),
        (["run", "--op", "conv2d"], "invalid choice: 'conv2d'"),
        (["run", "--workers", "4096"], "--workers 4096: this process may use "),
        (["run", "--workers", "0"], "workers are at least 1"),
        (["run", "--confidence", "95"], "95 is no part of 1"),
        (["run", "--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["walk"], "invalid choice: 'walk'"),
    ],
)
def test_bad_arguments(arguments, text):
    """Status 2 and a sentence, before anything is measured."""
    assert text in bench(*arguments, status=2)


def test_a_module_that_is_not_there():
    """It is its own failure only."""
    text = bench("run", "--against", "no_such_module:f", "--suite", "tiny", "--only", "line", *QUICK, status=2)
    assert "ModuleNotFoundError: No module named 'no_such_module'" in text
    assert re.search(r"tiny_line .* us", text)
