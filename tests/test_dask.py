"""gemmconv.dask: lazy, right without computing, equal to the direct call, and on processes that may die."""

import os
import pickle
import re
import signal
import time

import dask
import dask.array as da
import numpy as np
import pytest
import zarr

import gemmconv
from gemmconv import dask as lazy
from gemmconv.compat import onnx, torch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

RNG = np.random.default_rng(17)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


X, W, Z = normal(2, 10, 9, 8, 6), normal(4, 3, 4, 5, 6), normal(2, 20, 18, 16, 5)
# Function, operands by name, further arguments, chunks of the first lazy operand and of the result.
CASES = {
    "conv3d_transpose": ({"value": X, "filter": W}, {"strides": 2}, (1, 4, 9, 3, 4), (1, 7, 6, 9, 2)),
    "conv3d_transpose, NCDHW": (
        {"input": X.transpose(0, 4, 1, 2, 3), "filters": W},
        {"strides": [1, 1, 2, 2, 2], "data_format": "NCDHW", "dilations": 2, "padding": "VALID"},
        (1, 2, 3, 4, 5),
        (2, 3, 8, 9, 10),
    ),
    "conv3d": ({"input": Z, "filter": W}, {"strides": 2, "padding": "SAME"}, (1, 7, 7, 7, 3), (1, 4, 9, 3, 4)),
    "conv3d_backprop_filter_v2": (
        {"input": Z, "out_backprop": X},
        {"filter_sizes": W.shape, "strides": 2, "padding": "SAME"},
        (1, 7, 7, 7, 3),
        (2, 3, 4, 2, 4),
    ),
    "conv2d_transpose": (
        {"value": X[0], "filter": W[0]},
        {"strides": 2, "padding": [[0, 0], [1, 2], [0, 1], [0, 0]]},
        (3, 5, 8, 6),
        (4, 7, 5, 5),
    ),
    "conv2d": (
        {"input": Z[0], "filter": normal(3, 3, 1, 10)},
        {"strides": 2, "padding": "VALID"},
        (7, 5, 16, 5),
        (9, 3, 4, 3),
    ),
    "conv1d_transpose": (
        {"input": X[0, 0], "filters": W[0, 0]},
        {"output_shape": [9, 16, 5], "strides": 2},
        4,
        (2, 7, 5),
    ),
    "conv_transpose": (
        {"input": X[0, 0], "filters": W[0, 0]},
        {"output_shape": [9, 16, 5], "strides": 2},
        4,
        (2, 7, 5),
    ),
    "conv1d": ({"value": Z[0, 0], "filters": W[0, 0]}, {"stride": 2, "padding": "SAME"}, (5, 9, 5), (4, 3, 6)),
}


def direct(case):
    operands, more, _, _ = CASES[case]
    return getattr(gemmconv, case.partition(",")[0])(**operands, **more)


def made(case, chunks, given=None):
    operands, more, of_first, _ = CASES[case]
    first, *rest = operands.items()
    arguments = {first[0]: da.from_array(first[1], chunks=given or of_first)}
    arguments |= {key: da.from_array(a, chunks=4) if a.ndim == X.ndim else a for key, a in rest}
    return getattr(lazy, case.partition(",")[0])(**arguments, **more, chunks=chunks)


@pytest.mark.parametrize("case", CASES)
def test_cut_where_the_plan_says_the_bits_are_the_direct_calls(case, monkeypatch):
    monkeypatch.setattr(gemmconv.calls, "this_machine", lambda: gemmconv.machine.Machine(2, 1 << 15, 1 << 20))
    gemmconv.clear_cache()
    want = direct(case)
    with dask.config.set({"array.chunk-size": "48KiB", "scheduler": "synchronous"}):
        try:
            found = made(case, None)
        except ValueError as error:  # a block's windows take more
            least = re.search(r"take (\d+) bytes", str(error))[1]
            with dask.config.set({"array.chunk-size": f"{least}B"}):
                found = made(case, None)
        assert found.dtype == want.dtype
        assert found.compute().tobytes() == want.tobytes()
    gemmconv.clear_cache()


@pytest.mark.parametrize("case", CASES)
def test_cut_anywhere_it_agrees_to_rounding(case):
    want = direct(case)
    found = made(case, CASES[case][3])
    assert found.chunks == da.core.normalize_chunks(CASES[case][3], want.shape)
    assert found.npartitions > 3
    assert np.allclose(found.compute(scheduler="threads"), want, atol=1e-3)


def test_whole_numbers_are_equal_wherever_it_is_cut():
    x, w = (RNG.integers(-4, 5, a.shape).astype(np.float32) for a in (X, W))
    for chunks in ((1, 7, 6, 9, 2), (2, 20, 1, 16, 5), -1, {1: 3}, "auto"):
        found = lazy.conv3d_transpose(da.from_array(x, chunks=(2, 3, 4, 5, 6)), w, strides=2, chunks=chunks)
        assert np.array_equal(found.compute(), gemmconv.conv3d_transpose(x, w, strides=2))


def test_nothing_is_computed_before_it_is_asked_for():
    """Shape, chunks, dtype and meta come from shapes alone, and the graph is one layer on top of its operands."""

    def fail(block):
        raise AssertionError("computed")

    x = da.from_array(X, chunks=(1, 5, 9, 8, 6)).map_blocks(fail, dtype=X.dtype, meta=np.empty((0,) * 5, X.dtype))
    w = da.from_array(W, chunks=-1)
    found = lazy.conv3d_transpose(x, w, strides=2, chunks=(1, 4, 18, 16, 5))
    assert found.shape == (2, 20, 18, 16, 5)
    assert found.chunks == ((1, 1), (4,) * 5, (18,), (16,), (5,))
    assert type(found._meta) is np.ndarray
    assert found._meta.shape == (0,) * 5
    assert found.dtype == np.float32
    layers = set(found.dask.layers) - set(x.dask.layers) - set(w.dask.layers)
    assert layers == {found.name}
    assert len(found.dask.layers[found.name]) == 10
    assert found.dask.dependencies[found.name] == {x.name, w.name}
    with pytest.raises(AssertionError, match="computed"):
        found.compute(scheduler="synchronous")


def test_the_same_question_has_the_same_name():
    x = da.from_array(X, chunks=5)
    asked = [lazy.conv3d_transpose(x, W, strides=2, chunks=9).name for _ in range(2)]
    asked += [lazy.conv3d_transpose(x, W, strides=s, chunks=c).name for s, c in ((1, 9), (2, 8))]
    asked.append(lazy.conv3d_transpose(x, W + 1, strides=2, chunks=9).name)
    assert asked[0] == asked[1]
    assert len(set(asked)) == 4


def test_a_task_reads_what_it_needs():
    """The first planes of the result need the first planes of the value, not the rest."""
    seen = []

    def look(block, block_info=None):
        seen.append(block_info[0]["chunk-location"][1])
        return block

    x = da.from_array(X, chunks=(2, 2, 9, 8, 6)).map_blocks(look, dtype=X.dtype, meta=np.empty((0,) * 5, X.dtype))
    found = lazy.conv3d_transpose(x, W, strides=2, chunks=(2, 4, 18, 16, 5))[:, :4]
    assert np.allclose(
        found.compute(scheduler="synchronous"), gemmconv.conv3d_transpose(X, W, strides=2)[:, :4], atol=1e-4
    )
    assert set(seen) <= {0, 1}


def test_one_worker_a_task_unless_told_otherwise():
    for workers, more in ((1, {}), (2, {"workers": 2})):
        found = lazy.conv3d_transpose(da.from_array(X, chunks=5), W, strides=2, chunks=9, **more)
        task = pickle.loads(pickle.dumps(_task(found)))
        assert task.plan.workers == min(workers, gemmconv.machine.usable_cores())


def _task(array):
    """The task of an array's first chunk."""
    node = next(iter(dict(array.dask.layers[array.name]).values()))
    return node[0] if isinstance(node, tuple) else node.func


def test_refusals():
    x = da.from_array(X, chunks=5)
    with pytest.raises(ValueError, match=r"^conv3d_transpose: value has chunks of unknown sizes.*compute_chunk_sizes"):
        lazy.conv3d_transpose(x[x[:, 0, 0, 0, 0] > 0], W)
    with pytest.raises(ValueError, match=r"^conv3d_transpose: filter has 6 input channels"):
        lazy.conv3d_transpose(x[..., :5], W)
    with pytest.raises(TypeError, match="integers and bools are not taken"):
        lazy.conv3d_transpose(x.astype(int), W)
    with pytest.raises(TypeError, match="unexpected keyword argument 'out'"):
        lazy.conv3d_transpose(x, W, out=np.empty((2, 10, 9, 8, 5), np.float32))
    with pytest.raises(ValueError, match="algorithm"):
        lazy.conv3d_transpose(x, W, algorithm="magic")


def test_masks_are_not_lost():
    masked = da.from_array(np.ma.array(X, mask=True), chunks=5)
    with pytest.raises(TypeError, match=r"^conv3d_transpose: value is a masked array, whose mask would be lost"):
        lazy.conv3d_transpose(masked, W)


@pytest.mark.parametrize("name", lazy.__all__)
def test_plain_functions_name_the_lazy_one(name):
    """A Dask array is not computed silently."""
    case = next(case for case in CASES if case.partition(",")[0] == name)
    operands, more, _, _ = CASES[case]
    first = next(iter(operands))
    arguments = operands | {first: da.from_array(operands[first], chunks=-1)}
    with pytest.raises(TypeError, match=rf"^{name}: {first} is a lazy array .*gemmconv\.dask\.{name} takes it"):
        getattr(gemmconv, name)(**arguments, **more)


def test_functions_that_have_no_lazy_one_name_none():
    x = da.from_array(np.ones((1, 2, 4), np.float32))
    assert lazy.__all__ == sorted(name for name in gemmconv.__all__ if name.startswith("conv"))
    for call in (
        lambda: gemmconv.im2col(x, 3),
        lambda: onnx.conv(x, np.ones((1, 2, 1), np.float32)),
        lambda: torch.conv1d(x, np.ones((1, 2, 1), np.float32)),
        lambda: gemmconv.plan_conv3d_transpose(X.shape, W.shape)(da.from_array(X), W),
    ):
        with pytest.raises(TypeError, match=r"lazy array \([^()]*\), which is not computed silently; call \.compute"):
            call()


def test_operands_that_are_no_dask_arrays():
    found = lazy.conv3d_transpose(X, W, strides=2, chunks=(1, 20, 18, 16, 5))
    assert isinstance(found, da.Array)
    assert found.chunks[0] == (1, 1)
    assert found.compute().tobytes() == gemmconv.conv3d_transpose(X, W, strides=2).tobytes()
    with_lazy_filter = lazy.conv3d_transpose(X, da.from_array(W, chunks=2), strides=2, chunks=9)
    assert np.allclose(with_lazy_filter.compute(), gemmconv.conv3d_transpose(X, W, strides=2), atol=1e-4)


def test_empty_arrays():
    found = lazy.conv3d_transpose(da.from_array(X[:0], chunks=5), W, strides=2)
    assert found.shape == (0, 20, 18, 16, 5)
    assert found.compute().shape == (0, 20, 18, 16, 5)


# Processes.


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 5}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, protocol="tcp"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_processes_from_and_to_zarr(client, tmp_path):
    """Windows are read by the workers, chunks written by them."""
    x = RNG.standard_normal((1, 24, 24, 24, 8)).astype(np.float32)
    w = normal(3, 3, 3, 8, 8)
    zarr.create_array(str(tmp_path / "x.zarr"), data=x, chunks=(1, 8, 8, 24, 8))
    found = lazy.conv3d_transpose(da.from_zarr(str(tmp_path / "x.zarr")), w, strides=2, chunks=(1, 16, 48, 48, 8))
    da.to_zarr(found, str(tmp_path / "y.zarr"))
    want = gemmconv.conv3d_transpose(x, w, strides=2)
    assert np.allclose(zarr.open_array(str(tmp_path / "y.zarr"), mode="r")[...], want, atol=1e-3)
    on_cuts = lazy.conv3d_transpose(da.from_zarr(str(tmp_path / "x.zarr")), w, strides=2)
    assert on_cuts.compute().tobytes() == want.tobytes()


def test_a_worker_that_is_killed(client, tmp_path):
    """Its chunks are computed again by the other, to the same bits."""
    x = RNG.standard_normal((1, 64, 32, 32, 16)).astype(np.float32)
    w = normal(3, 3, 3, 16, 16)
    want = gemmconv.conv3d_transpose(x, w, strides=2)

    def slowly(block):
        time.sleep(0.15)
        return block

    plan = gemmconv.plan_conv3d_transpose(x.shape, w.shape, strides=2)
    chunks = plan.chunks(4 << 20)
    lazy_x = da.from_array(x, chunks=(1, 4, 32, 32, 16)).map_blocks(slowly, dtype=x.dtype)
    found = lazy.conv3d_transpose(lazy_x, w, strides=2, chunks=chunks)
    assert found.npartitions > 3
    future = client.compute(found)
    victim = next(iter(client.scheduler_info()["workers"].values()))["name"]
    pids = client.run(os.getpid)
    time.sleep(0.4)
    assert not future.done()
    os.kill(next(iter(pids.values())), signal.SIGKILL)
    assert future.result(timeout=60).tobytes() == want.tobytes(), victim
