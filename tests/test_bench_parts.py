"""What `python -m bench` is made of: geometry, the reference, statistics on toy numbers, processes, the schema."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np
import oracle
import pytest

import gemmconv

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import compare, contenders, environment, layers, measure, process, reference, results, statistics  # noqa: E402
from bench.contenders import own, roof  # noqa: E402
from bench.statistics import Interval, Series  # noqa: E402

SPEC = contenders.Spec("x", "file", str(ROOT / "tests/bench_contenders.py"), "right", "x")


def test_the_models_are_those_of_the_file():
    """Twenty of them, each with a source."""
    found = layers.suite("models")
    assert len(found) == len({layer.name for layer in found}) == 20
    assert all(layer.source for layer in found)
    by_name = {layer.name: layer for layer in found}
    assert by_name["gan3d_g1"].result_shape() == (1, 4, 4, 4, 512)
    assert by_name["brain_odd"].result_shape("NCDHW") == (1, 32, 37, 44, 37)
    assert by_name["dilated_256"].output == (12, 13, 13)
    assert by_name["k3s1_32"].flops() == 2 * 10 * 100 * 100 * 32 * 32 * 27


def test_suites_of_planes_and_of_groups():
    """Each layer with its source; grouped ones beside others of the same FLOPs."""
    planes, groups = layers.suite("planes"), layers.suite("groups")
    assert all(layer.source for layer in planes + groups)
    assert {layer.rank for layer in planes} == {2}
    by_name = {layer.name: layer for layer in planes + groups}
    assert by_name["dcgan_1_b64"].result_shape("NCDHW") == (64, 512, 8, 8)
    assert by_name["unet_up1"].shape("filter") == (2, 2, 512, 1024)
    assert by_name["unet_up4"].volume().shape("coarse") == (1, 1, 196, 196, 128)
    assert by_name["kb72_groups"].shape("filter") == (3, 5, 7, 16, 32)
    for name in ("g4_16", "g4_32"):
        assert len({by_name[name + twin].flops() for twin in ("", "_batch", "_dense")}) == 1
    assert sum(layer.groups == layer.cin == layer.cout for layer in groups) == 2


EVERY = [x for name in layers.SUITES for x in layers.suite(name)]


@pytest.mark.parametrize("layer", EVERY, ids=lambda layer: layer.name)
def test_geometry_is_the_contracts(layer):
    """Worked out twice: offsets, shapes, FLOPs and bytes are those of gemmconv's plan. JSON loses nothing."""
    group = dataclasses.replace(
        layer.volume(), cin=layer.cin // layer.groups, cout=layer.cout // layer.groups, groups=1
    )
    plan = gemmconv.plan_conv3d_transpose(
        group.shape("coarse"), group.shape("filter"), group.result_shape(), group.strides, group.padding, "NDHWC",
        group.dilations,
    )  # fmt: skip
    axes = plan.problem.axes[3 - layer.rank :]
    assert layer.before == tuple(axis.lo for axis in axes)
    ends = tuple((a.coarse - 1) * a.stride + a.extent - a.lo - a.fine for a in axes)
    assert layer.behind == ends
    assert (layer.flops(), layer.bytes()) == (plan.flops * layer.groups, plan.bytes_moved * layer.groups)
    assert layers.Layer.from_dict(json.loads(json.dumps(layer.to_dict()))) == layer


@pytest.mark.parametrize("layer", EVERY, ids=lambda layer: layer.name)
def test_forward_twins_have_tensorflows_sizes(layer):
    """The convolution of an array of the output's shape gives the input's, and pads as much in front."""
    for n, o, k, s, lo in zip(layer.input, layer.output, layer.spans, layer.strides, layer.before, strict=True):
        if layer.padding == "SAME":
            assert n == -(-o // s)
            assert lo == max(0, (n - 1) * s + k - o) // 2
        else:
            assert (n, lo) == (-(-(o - k + 1) // s), 0)
    for op, shapes in (
        ("conv3d", ("fine", "filter", "coarse")),
        ("conv3d_backprop_filter", ("fine", "coarse", "filter")),
    ):
        twin = dataclasses.replace(layer, op=op)
        assert twin.result_shape("NCDHW") == layer.shape(shapes[2], "NCDHW")
        assert (twin.flops(), twin.bytes()) == (layer.flops(), layer.bytes())


def by_oracle(layer, first, second):
    """A transposed or forward convolution as the oracle has it, group by group, planes as volumes."""
    found, volume = [], layer.volume()
    arrays = [a.reshape(volume.shape(role)) for a, role in zip((first, second), layer.roles, strict=False)]
    geometry = volume.strides, volume.padding, "NDHWC", volume.dilations
    for parts in zip(*(np.split(array, layer.groups, -1) for array in arrays), strict=True):
        if layer.op == "conv3d":
            found.append(oracle.conv3d(*parts, volume.input, *geometry))
        else:
            shape = layer.batch, *volume.output, layer.cout // layer.groups
            found.append(oracle.conv3d_transpose(*parts, shape, *geometry))
    return np.concatenate(found, -1).reshape(layer.result_shape())


SMALL = [
    *layers.tiny(),
    layers.make("plane", 2, [5, 4], 6, 4, [3, 2], [2, 3]),
    layers.make("groups", 2, [2, 3, 4], 6, 9, 3, 2, groups=3),
    layers.make("depthwise", 1, [4, 3], 5, 5, 3, [1, 2], groups=5, padding="VALID"),
]


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("op", layers.OPS)
def test_reference_and_obvious_are_right(layer, dtype, op):
    """What contenders are compared with, and what ratios are taken against, are held to the oracle."""
    layer = dataclasses.replace(layer, op=op)
    first, second = reference.operands(layer, dtype, seed=3)
    found = reference.reference(layer, dtype, seed=3)
    assert found.shape == layer.result_shape()
    largest = np.abs(found).max()
    if op == "conv3d_backprop_filter":  # by its definition: what a change of the filter changes in sum(conv3d * second)
        rng = np.random.default_rng(4)
        for change in rng.integers(-8, 9, (3, *layer.shape("filter"))):
            moved = by_oracle(dataclasses.replace(layer, op="conv3d"), first, change) * second
            assert abs((found * change).sum() - moved.sum()) <= 1e-13 * np.abs(moved).sum()
    else:
        assert np.abs(found - by_oracle(layer, first, second)).max() <= 1e-14 * largest
    assert np.abs(own.obvious(layer, first, second) - found).max() <= reference.BOUNDS[dtype] / 5 * largest
    other, _ = reference.operands(layer, dtype, "NCDHW", seed=3)
    assert np.array_equal(np.moveaxis(other, 1, -1), first)


def test_roofs_are_the_products_of_an_operation():
    """Those of one group, with the long sizes cut."""
    layer = layers.make("x", 1, 16, 96, 64, 3, groups=2)
    asked = {op: roof.sizes(dataclasses.replace(layer, op=op)) for op in layers.OPS}
    assert asked == {
        "conv3d_transpose": (1024, 27 * 32, 48),
        "conv3d": (1024, 48, 27 * 32),
        "conv3d_backprop_filter": (27 * 32, 48, 1024),
    }
    for op in layers.OPS:
        roof.products(5, 4, 3, np.dtype(np.float32), 1, op)()


def test_sweep_changes_one_size_at_a_time():
    """The base stands in every one of the six."""
    found = layers.sweep()
    assert [axis for axis, _ in found[0].sweep] == list(layers.SWEEPS)
    for axis, sizes in layers.SWEEPS.items():
        assert sorted(size for layer in found for name, size in layer.sweep if name == axis) == sorted(sizes)


def test_drawn_layers_are_within_their_limits():
    """The same each time, of more than one kind each."""
    found = layers.drawn()
    assert found == layers.drawn()
    assert len({layer.name for layer in found}) == layers.DRAWN
    low, high = layers.DRAWN_FLOPS
    assert all(low <= layer.flops() <= high for layer in found)
    assert all(layer.batch * layer.cout * math.prod(layer.output) <= layers.DRAWN_OUTPUT for layer in found)
    for of in ("batch", "cin", "cout", "kernel", "strides", "dilations", "padding"):
        assert len({getattr(layer, of) for layer in found}) > 1


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


def test_bounds_grow_with_long_sums():
    """As the error of a plain sum, beyond what any forward layer has."""
    layer = layers.make("x", 1, [32, 64, 64], 8, 4, 2, 2)
    for op, products in (("conv3d_transpose", 64), ("conv3d", 32), ("conv3d_backprop_filter", 2**17)):
        asked = dataclasses.replace(layer, op=op)
        assert asked.products == products
        assert reference.bound_of(asked, "float32") == (2e-5 if products == 2**17 else 1e-5)


def test_contenders_are_read():
    """Forms of all kinds; the same one twice gets two names."""
    here = str(ROOT / "tests/bench_contenders.py")
    specs = contenders.parse_all(["gemmconv", "gemmconv:auto", "gemmconv", "numpy", "os.path:join", f"{here}:right"])
    assert [spec.name for spec in specs] == [
        "gemmconv", "gemmconv#2", "gemmconv#3", "numpy", "os.path:join", "bench_contenders.py:right",
    ]  # fmt: skip
    assert [spec.kind for spec in specs] == ["gemmconv"] * 3 + ["numpy", "module", "file"]


def test_contenders_have_operations_or_say_not():
    """ONNX has no operator for the filter's gradient, the C interface is of one operation; algorithms differ."""
    engine, library = contenders.Spec("", "openvino", "", "", ""), contenders.Spec("", "library", "", "", "")
    assert engine.missing("conv3d_backprop_filter") == "it has no conv3d_backprop_filter"
    assert "it has" not in engine.missing("conv3d")
    assert (library.missing("conv3d_transpose"), library.missing("conv3d")) == ("", "it has no conv3d")
    assert contenders.parse("gemmconv:im2col", "conv3d").what == "im2col"
    assert contenders.parse("gemmconv:prepared").name == "gemmconv:prepared"
    with pytest.raises(ValueError, match="gemmconv has no conv3d_transpose algorithm 'im2col', it has auto, col2im, "):
        contenders.parse("gemmconv:im2col")


def asked(spec):
    """What a contender's process says when it starts, and of a tiny layer."""
    with process.Member(spec, 1) as member:
        layer = dataclasses.asdict(layers.suite("tiny")[0])
        said = member.ask("prepare", 60, layer=layer, dtype="float32", layout="NDHWC", end_to_end=False, seed=0,
                          reference=None, largest=1.0)  # fmt: skip
        return member.hello, said


def test_gemmconv_of_another_checkout(tmp_path):
    """Its code is measured, by this bench; names do not tell where it lies."""
    other = tmp_path / "before"
    shutil.copytree(ROOT / "gemmconv", other / "gemmconv")
    (other / "bench").mkdir()
    (other / "bench/__init__.py").write_text("raise ImportError('not this one')")
    init = other / "gemmconv/__init__.py"
    init.write_text(f"{init.read_text()}\n__version__ = '0.0.before'\n")
    specs = contenders.parse_all([f"gemmconv@{other}", f"gemmconv@{other}:kn2row"])
    assert [(spec.name, spec.what, spec.text) for spec in specs] == [
        ("gemmconv@before", "auto", "gemmconv@before"),
        ("gemmconv@before:kn2row", "kn2row", "gemmconv@before:kn2row"),
    ]
    for spec in specs:
        hello, said = asked(spec)
        assert (hello["status"], hello["versions"]["gemmconv"]) == ("ok", "0.0.before")
        assert said["status"] == "ok"
    assert said["note"] == "kn2row"
    assert asked(contenders.parse("gemmconv"))[0]["versions"]["gemmconv"] == gemmconv.__version__
    subprocess.run("git init -q . && git -c user.name=a -c user.email=a commit -q --allow-empty -m a",
                   cwd=other, shell=True, check=True)  # fmt: skip
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=other, check=True, capture_output=True, text=True).stdout
    assert asked(specs[0])[0]["versions"]["commit"] == head[:10]


def test_places_of_gemmconv_are_read(tmp_path):
    """A path may have a colon, `auto` is what is meant without it, and a checkout that is an environment is itself."""
    other = tmp_path / "a:b"
    (other / "gemmconv").mkdir(parents=True)
    (other / "gemmconv/__init__.py").touch()
    (other / "bin").mkdir()
    (other / "bin/python").touch()
    for text, what in (("", "auto"), (":auto", "auto"), (":mec", "mec")):
        spec = contenders.parse(f"gemmconv@{other}{text}")
        assert (spec.where, spec.what, spec.python) == (str(other), what, sys.executable)
        assert spec.name == ("gemmconv@a:b" if what == "auto" else "gemmconv@a:b:mec")
    for place in ("", ":mec", f"{other}:", str(tmp_path), f"{tmp_path}:mec", f"{tmp_path}/none"):
        with pytest.raises(ValueError, match="is neither a checkout of gemmconv nor a virtual environment"):
            contenders.parse(f"gemmconv@{place}")


def test_results_do_not_tell_where_a_checkout_lies(tmp_path):
    """What Python says of a module that is not there names its file."""
    (tmp_path / "gemmconv").mkdir()
    (tmp_path / "gemmconv/__init__.py").write_text("__version__ = '0'")
    layer = dataclasses.asdict(layers.suite("tiny")[0])
    asks = {"layer": layer, "dtype": "float32", "layout": "NDHWC", "end_to_end": False, "seed": 0, "reference": None}
    seat = measure.Seat(contenders.parse(f"gemmconv@{tmp_path}"), 1, keep_env=False)
    assert seat.sit()
    detail = seat.ask("prepare", 60, largest=1.0, **asks)["detail"]
    seat.close()
    assert f"({tmp_path.name}/gemmconv/__init__.py)" in detail
    assert str(tmp_path) not in detail
    (tmp_path / "gemmconv/__init__.py").write_text("raise ValueError(__file__)")
    assert not seat.sit()
    assert f"ValueError: {tmp_path.name}/gemmconv/__init__.py" in seat.detail
    assert str(tmp_path) not in seat.detail


def test_gemmconv_by_another_interpreter(tmp_path, monkeypatch):
    """A virtual environment's runs this checkout's code with its own libraries."""
    monkeypatch.setenv("PYTHONPATH", str(Path(np.__file__).parents[1]))
    venv.create(tmp_path / "other", symlinks=True)
    (site,) = (tmp_path / "other/lib").glob("python*/site-packages")
    (site / "mark.pth").write_text("import sys; sys.version = sys.version.removesuffix(' another') + ' another'")
    spec = contenders.parse(f"gemmconv@{tmp_path / 'other'}")
    assert (spec.name, spec.python) == ("gemmconv@other", str(tmp_path / "other/bin/python"))
    hello, said = asked(spec)
    assert (hello["status"], said["status"]) == ("ok", "ok")
    assert hello["versions"]["python"] == f"{sys.version} another"
    assert hello["versions"]["gemmconv"] == gemmconv.__version__
    assert contenders.parse("gemmconv").python == sys.executable


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


def test_results_of_different_operations_are_not_compared():
    """A result that names none is of the transposed convolution, as the first were."""
    old = document(kind="speed")
    new, other = (document(kind="speed", settings={"op": op}) for op in ("conv3d_transpose", "conv3d"))
    assert compare.differences(old, new) == []
    assert compare.differences(old, other) == ["op was 'conv3d_transpose' and is 'conv3d'"]


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


def test_shares_and_scaling():
    """By hand: the median share of the roof, the fastest call of all, and layers above 1 GFLOP with several workers."""

    def row(layer, contender, workers, flops, *visits):
        return {
            "layer": layer, "contender": contender, "workers": workers, "flops": flops, "roof_share": 0.25 * workers,
            "visits_seconds": [list(visit) for visit in visits], "median_seconds": visits[0][0],
        }  # fmt: skip

    found = {"settings": {"subject": "mine"}, "rows": [
        row("a", "mine", 1, 2e9, [4.0, 2.0], [3.0]), row("a", "torch", 1, 2e9, [8.0], [1.0, 9.0]),
        row("a", "jax", 1, 2e9, [3.0]), row("b", "mine", 1, 3e9, [9.0]), row("b", "torch", 1, 3e9, [18.0]),
        row("c", "mine", 1, 9e8, [5.0]), row("a", "mine", 2, 2e9, [2.0]), row("b", "mine", 2, 3e9, [4.5]),
        row("c", "mine", 2, 9e8, [5.0]), {"layer": "d", "contender": "mine", "workers": 2, "status": "hung"},
    ]}  # fmt: skip
    assert results.by_fastest_calls(found, 1) == pytest.approx(math.sqrt(0.5 * 2))
    assert results.by_fastest_calls(found, 2) is None
    assert [results.roof_share(found, workers) for workers in (1, 2, 3)] == [0.25, 0.5, None]
    gain = {"ratio": pytest.approx(2), "into": None, "near": None, "layers": 2}
    assert results.scaling(found, 2) == gain
    assert results.scaling(found, 3) is None
    # a gains 2 where its roofs gain 2.2, b 2 where they gain 2.3; with out= 1 and 4.
    roofs = {("a", 1): 1.0, ("b", 1): 1.0, ("a", 2): 2.2, ("b", 2): 2.3}
    given = {("a", 1): [3.0, 4.0, 9.0], ("b", 1): [4.0], ("a", 2): [4.0], ("b", 2): [1.0]}
    for one in found["rows"]:
        key = one["layer"], one["workers"]
        one["roof_gflops"] = roofs.get(key)
        one["first_touch"] = {"given_seconds": given.get(key, [1.0])}
    assert results.scaling(found, 2) == gain | {"into": pytest.approx(2), "near": 1}


@pytest.mark.parametrize(("edge", "chunk"), [(16, 16), (16, 4), (24, 5), (10, 1)])
def test_what_chunks_read_is_counted_by_the_definition(edge, chunk):
    """Kernel 4, stride 2, one cell cut off on each side: coarse position i reaches 2i - 1 to 2i + 2."""
    from bench.chunks import factor_read

    read = 0
    for start in range(0, edge, chunk):
        cells = range(start, min(edge, start + chunk))
        read += sum(any(2 * i - 1 + tap in cells for tap in range(4)) for i in range(edge // 2))
    assert factor_read(edge, chunk) == pytest.approx((read / (edge // 2)) ** 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_names_of_contenders_are_printed_as_they_are(capsys):
    """Not as emoji: k.so:seven names a symbol."""
    from bench import report

    for stderr in (False, True):
        report.console(stderr).print("k.so:seven: mine.py:fire:")
    assert "".join(capsys.readouterr()) == "k.so:seven: mine.py:fire:\n" * 2


def test_chunks_are_measured(monkeypatch, capsys):
    """All routes give the result, in rows of ever smaller chunks."""
    from bench import chunks, report

    monkeypatch.setattr(chunks, "HALVINGS", 2)
    rows = list(chunks.rows(16, 1))
    assert [row["chunk"] for row in rows] == [16, 8]
    assert all(row["equal"] for row in rows)
    assert all(row["read"] == pytest.approx(row["read_by_formula"]) for row in rows)
    assert all(set(row["seconds"]) == {"direct", "boxes", "threads", "file", "processes"} for row in rows)
    report.print_chunks(rows, report.console())
    assert "8^3" in capsys.readouterr().out
