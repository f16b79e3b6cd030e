"""What `python -m bench` is made of: geometry, the reference, statistics on toy numbers, processes, the schema."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import oracle
import pytest

import gemmconv

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import contenders, environment, layers, process, reference, results, statistics  # noqa: E402
from bench.contenders import own  # noqa: E402
from bench.statistics import Interval, Series  # noqa: E402

SPEC = contenders.Spec("x", "file", str(ROOT / "tests/bench_contenders.py"), "right", "x")


def test_the_models_are_those_of_the_file():
    """Twenty of them, each with a source."""
    found = layers.models()
    assert len(found) == len({layer.name for layer in found}) == 20
    assert all(layer.source for layer in found)
    by_name = {layer.name: layer for layer in found}
    assert by_name["gan3d_g1"].output_shape() == (1, 4, 4, 4, 512)
    assert by_name["brain_odd"].output_shape("NCDHW") == (1, 32, 37, 44, 37)
    assert by_name["dilated_256"].output == (12, 13, 13)
    assert by_name["k3s1_32"].flops() == 2 * 10 * 100 * 100 * 32 * 32 * 27


@pytest.mark.parametrize("layer", [x for name in layers.SUITES for x in layers.suite(name)], ids=lambda x: x.name)
def test_geometry_is_the_contracts(layer):
    """Worked out twice: offsets, shapes, FLOPs and bytes are those of gemmconv's plan. JSON loses nothing."""
    plan = gemmconv.plan_conv3d_transpose(
        layer.value_shape(), layer.filter_shape, layer.output_shape(), layer.strides, layer.padding, "NDHWC",
        layer.dilations,
    )  # fmt: skip
    axes = plan.problem.axes
    assert layer.before == tuple(axis.lo for axis in axes)
    ends = tuple((a.coarse - 1) * a.stride + a.extent - a.lo - a.fine for a in axes)
    assert layer.behind == ends
    assert (layer.flops(), layer.bytes()) == (plan.flops, plan.bytes_moved)
    assert layers.Layer.from_dict(json.loads(json.dumps(layer.to_dict()))) == layer


@pytest.mark.parametrize("layer", layers.tiny(), ids=lambda layer: layer.name)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_reference_and_obvious_are_right(layer, dtype):
    """What contenders are compared with, and what ratios are taken against, are held to the oracle."""
    value, filter = reference.operands(layer, dtype, seed=3)
    exact = oracle.conv3d_transpose(
        value, filter, layer.output_shape(), layer.strides, layer.padding, "NDHWC", layer.dilations
    )
    found = reference.reference(layer, dtype, seed=3)
    largest = np.abs(exact).max()
    assert np.abs(found - exact).max() <= 1e-14 * largest
    assert np.abs(own.obvious(layer, value, filter) - exact).max() <= reference.BOUNDS[dtype] / 5 * largest
    other, _ = reference.operands(layer, dtype, "NCDHW", seed=3)
    assert np.array_equal(np.moveaxis(other, 1, -1), value)


def test_sweep_changes_one_size_at_a_time():
    """The base stands in every one of the six."""
    found = layers.sweep()
    assert [axis for axis, _ in found[0].sweep] == list(layers.SWEEPS)
    for axis, sizes in layers.SWEEPS.items():
        assert sorted(size for layer in found for name, size in layer.sweep if name == axis) == sorted(sizes)


def series(rng, center, noise, launches=(0, 0, 0, 1, 1, 1, 2, 2, 2), placement=0.0):
    """Visits with noise of their own, and of their launch."""
    shifts = rng.normal(0, placement, max(launches) + 1)
    return Series([[center * math.exp(rng.normal(shifts[i], noise))] for i in launches], launches)


def test_median_and_spread():
    """Of the visits' medians, so that a long visit does not weigh more."""
    found = Series([[1, 1, 9], [2], [3, 3, 3, 3], [4], [5]], [0] * 5)
    assert found.median == 3
    assert found.spread == pytest.approx(2 / 3)


@pytest.mark.parametrize("placement", [0.0, 0.01])
def test_intervals_of_a_against_a_contain_one(placement):
    """As often as they promise, also where processes differ; and they are not so wide that nothing is found."""
    rng = np.random.default_rng(5)
    pairs = [
        (series(rng, 1, 0.004, placement=placement), series(rng, 1, 0.004, placement=placement)) for _ in range(200)
    ]
    deviation = statistics.launch_deviation(pairs)
    assert deviation == pytest.approx(placement * math.sqrt(2), abs=0.005)
    intervals = [statistics.ratio(pair, 0.99, deviation) for pair in pairs]
    assert sum(interval.contains_one for interval in intervals) >= 190
    assert np.median([interval.width for interval in intervals]) < (0.06 if placement else 0.03)
    mean = statistics.geometric_mean(pairs, 0.99, deviation)
    assert mean.contains_one
    assert mean.width < 0.01


def test_what_is_five_percent_slower_is_found():
    """In nearly every row, and by as much in the mean."""
    rng = np.random.default_rng(6)
    pairs = [(series(rng, 1.05, 0.005, placement=0.004), series(rng, 1, 0.005, placement=0.004)) for _ in range(40)]
    deviation = statistics.launch_deviation(pairs)
    assert sum(statistics.ratio(pair, 0.99, deviation).low > 1 for pair in pairs) >= 36
    assert statistics.geometric_mean(pairs, 0.99, deviation).estimate == pytest.approx(1.05, abs=0.005)


def test_pairing_removes_what_both_sides_share():
    """A machine that slows down in mid-run slows both."""
    rng = np.random.default_rng(7)
    drift = np.linspace(1, 2, 12)
    a, b = (Series([[d * math.exp(rng.normal(0, 0.002))] for d in drift], [0] * 12) for _ in range(2))
    together, apart = (statistics.ratio((a, b), 0.99, paired=paired) for paired in (True, False))
    assert together.width < apart.width / 10


def test_too_few_rounds_have_no_interval():
    """Two are too few; and a ratio without an interval claims nothing."""
    pair = Series([[2.0], [2.0]], [0, 0]), Series([[1.0], [1.0]], [0, 0])
    assert statistics.ratio(pair, 0.95) == Interval(2.0, None, None)
    assert statistics.ratio(pair, 0.95).contains_one


def test_noise_is_said():
    """A wide spread and a drift; not what is steady."""
    assert statistics.noise(Series([[1.0], [1.01], [0.99], [1.0]], [0] * 4)) == []
    (drift,) = statistics.noise(Series([[1.0], [1.0], [1.06], [1.06]], [0] * 4))
    assert drift == "second half +6% against the first"
    (wide,) = statistics.noise(Series([[1.0], [1.5], [1.0], [1.0], [1.5], [1.0]], [0] * 6))
    assert wide == "spread 38% of the median"


def test_check_compares_the_whole_array():
    """Any cell counts, and so do its bound, NaN, the shape and the dtype."""
    layer = layers.tiny()[0]
    exact = reference.reference(layer, "float32")
    largest = float(np.abs(exact).max())

    def verdict(result):
        return reference.check(result, exact, largest, layer, "float32", "NDHWC")

    good = exact.astype(np.float32)
    assert verdict(good).status == "ok"
    for place, change in (((0, 0, 0, 0, 0), 2e-5), ((0, 3, 3, 3, 15), -2e-5), ((0, 1, 2, 3, 4), np.nan)):
        bad = good.copy()
        bad[place] += change * largest
        assert verdict(bad).status == "wrong"
        bad[place] = good[place] + 0.5e-5 * largest
        assert verdict(bad).status == "ok"
    assert "dtype float64" in verdict(exact).detail
    assert "shape (1, 4, 4, 4, 15)" in verdict(good[..., 1:]).detail
    assert "no array but list" in verdict(good.tolist()).detail


def test_contenders_are_read():
    """Forms of all kinds; the same one twice gets two names."""
    here = str(ROOT / "tests/bench_contenders.py")
    specs = contenders.parse_all(["gemmconv", "gemmconv:auto", "gemmconv", "numpy", "os.path:join", f"{here}:right"])
    assert [spec.name for spec in specs] == [
        "gemmconv", "gemmconv#2", "gemmconv#3", "numpy", "os.path:join", "bench_contenders.py:right",
    ]  # fmt: skip
    assert [spec.kind for spec in specs] == ["gemmconv"] * 3 + ["numpy", "module", "file"]


def test_environment_of_contenders():
    """Kernel choosers go, unless kept; threads are set whatever was."""
    given = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": "512", "OMP_NUM_THREADS": "9", "OTHER": "1"}
    found = process.environment(2, keep=False, environ=given)
    assert found == {"OTHER": "1"} | dict.fromkeys(process.THREAD_VARIABLES, "2")
    kept = process.environment(1, keep=True, environ=given)
    assert (kept["OPENBLAS_CORETYPE"], kept["OMP_NUM_THREADS"]) == ("Haswell", "1")


def test_variables_that_hold_peers_back():
    """Only below what the CPU has."""
    variables = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx512", "TF_ENABLE_ONEDNN_OPTS": "0"}
    sentences = environment.held(variables, ["avx2", "avx512f"])
    assert len(sentences) == 2
    assert "ONEDNN_MAX_CPU_ISA=AVX2 holds its library below AVX-512" in sentences[0]
    assert environment.held({"ONEDNN_MAX_CPU_ISA": "AVX2"}, ["avx2"]) == []


@pytest.mark.skipif(sys.platform != "linux", reason="A process' state is read from /proc, which only Linux has.")
def test_a_process_is_stopped_while_others_are_timed():
    """All its threads are, from its start on; it is gone when it is closed."""

    def states():
        tasks = Path(f"/proc/{member._process.pid}/task").iterdir()
        return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks}

    with process.Member(SPEC, 1) as member:
        assert member.hello["status"] == "ok"
        assert states() == {"T"}
        member.resume()
        time.sleep(0.05)
        assert "T" not in states()
        member.stop()
        assert states() == {"T"}
    assert not Path(f"/proc/{member._process.pid}").exists()


def document(**changes):
    """The least that is a result."""
    parts = {"settings": {}, "conventions": {}, "environment": {}, "layers": [], "contenders": []}
    row = {"layer": "a", "contender": "b", "workers": 1, "status": "ok"}
    return {"schema": "gemmconv-bench", "schema_version": 1, **parts, "rows": [row]} | changes


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"schema": "other"}, "its schema is not 'gemmconv-bench'"),
        ({"schema_version": 99}, "has schema version 99, this bench reads 1"),
        ({"rows": None}, "lacks 'rows'"),
        ({"rows": [{"layer": "a", "workers": 1}]}, r"rows\[0\] lacks contender, status"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, changes, text):
    """With a sentence; and numbers that JSON has not are never written."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document()))
    assert results.read(path)["rows"][0]["layer"] == "a"
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(ValueError, match=text):
        results.read(path)
    with pytest.raises(ValueError, match="Out of range float"):
        results.write(document(rows=[math.nan]), path)


def test_the_fastest_framework_of_each_layer_is_found():
    """The least ratio of frameworks a layer, NumPy and other numbers of workers left out; none with one framework."""
    ratios = [
        {"layer": layer, "contender": contender, "workers": workers, "ratio": ratio}
        for layer, contender, workers, ratio in [
            ("a", "torch", 1, 2.0),
            ("a", "openvino", 1, 0.5),
            ("a", "numpy", 1, 0.1),
            ("b", "torch", 1, 2.0),
            ("b", "torch", 2, 0.1),
        ]
    ]
    found = results.best_framework(ratios, 1)
    assert found == {"contenders": ["openvino", "torch"], "ratio": 1.0, "worst_layer": "a", "worst_ratio": 0.5}
    assert results.best_framework(ratios, 2) is None
