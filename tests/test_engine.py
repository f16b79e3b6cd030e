"""The engine from inside: both orders of work and all blocks give the oracle's bits, and no product is formed twice."""

import ast
import contextvars
import ctypes
import dataclasses
import itertools
import math
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import oracle
import pytest
import threadpoolctl
from oracle import dtype_named, integers, same_bits

import gemmconv
from gemmconv import blas, plan_conv3d_transpose, threads
from gemmconv.arguments import conv3d_transpose_problem
from gemmconv.lowerings import (
    LOWERINGS,
    CannotLowerError,
    Operands,
    Workspace,
    base,
    by_planes,
    by_rows,
    by_taps,
    columns,
    cost,
    kn2row,
    products,
    winograd,
)
from gemmconv.lowerings.boxes import Box, Cut
from gemmconv.lowerings.columns import Columns
from gemmconv.lowerings.phases import slots
from gemmconv.machine import Machine
from gemmconv.plan import make_plan
from gemmconv.problem import Axis, Problem, reachable

ORDERS = {
    "by_taps": by_taps.schedule,
    "by_rows": by_rows.schedule,
    "by_planes": by_planes.schedule,
    "kn2row": kn2row.schedule,
    "winograd": winograd.schedule,
}
COL2IM = ("by_taps", "by_rows", "by_planes")
TINY_CACHE, SMALL_CACHE, CACHE = 64, 4096, 1 << 20


def random_problem(rng, dtype="float32"):
    """Return a random problem of a few thousand cells, one in three with a kernel that is a multiple of the stride."""
    n, k, s, d = (rng.integers(1, high, 3) for high in (7, 6, 4, 4))
    if rng.random() < 1 / 3:
        k, d = s * rng.integers(1, 3, 3), np.ones(3, int)
    padding = str(rng.choice(["SAME", "VALID"]))
    layout = str(rng.choice(["NDHWC", "NCDHW"]))
    axes = [tuple(map(int, axis)) for axis in zip(n, k, s, d, strict=True)]
    o = [int(rng.integers(low, high + 1)) for low, high in (reachable(*axis, padding) for axis in axes)]
    batch, cin, cout = int(rng.integers(1, 4)), int(rng.integers(1, 6)), int(rng.choice([1, 2, 3, 8, 9, 17, 33, 40]))
    return conv3d_transpose_problem(
        oracle.caller_order([batch, *map(int, n), cin], layout),
        (*map(int, k), cout, cin),
        oracle.caller_order([batch, *o, cout], layout),
        s.tolist(),
        padding,
        layout,
        d.tolist(),
        np.dtype(dtype_named(dtype)),
    )


def plan_of(problem, order, l2_bytes, workers=2):
    """Return a plan that does a problem in a given order of work, as on a machine with another cache, or None."""
    machine = Machine(2, l2_bytes, 1 << 24)
    plan = make_plan.__wrapped__(problem, machine, "col2im", workers)
    try:
        return dataclasses.replace(plan, schedule=ORDERS[order](problem, machine))
    except CannotLowerError:
        if order == "by_planes":
            assert problem.axes[2].fine > problem.axes[2].coarse or max(problem.kernel) > 1
            return None
        if order == "winograd" and l2_bytes >= CACHE:
            assert not winograd.candidates(problem)
            return None
        assert order not in COL2IM  # not in so small a cache
        return plan_of(problem, order, 8 * l2_bytes, workers)


def expected(problem, value, filter):
    """Return the oracle's result for a problem."""
    strides, dilations = ([getattr(axis, name) for axis in problem.axes] for name in ("stride", "dilation"))
    padding = "SAME"
    for axis in problem.axes:
        low, high = reachable(axis.coarse, axis.kernel, axis.stride, axis.dilation, "SAME")
        lo = max(0, (axis.coarse - 1) * axis.stride + axis.extent - axis.fine) // 2
        if not low <= axis.fine <= high or lo != axis.lo:
            padding = "VALID"
    return oracle.conv3d_transpose(value, filter, problem.fine_shape, strides, padding, problem.layout, dilations)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(4))
def test_every_block_size_gives_the_oracles_bits(order, seed, monkeypatch):
    """Whole numbers, in caches of 64 bytes to 1 MiB."""
    monkeypatch.setattr("gemmconv.lowerings.tiling._POSITIONS", (8, 64, 512))
    rng = np.random.default_rng([seed, 11])
    cut = 0
    for i in range(60):
        problem = random_problem(rng, "float32" if i % 4 else "float16" if i % 8 else "complex64")
        value, filter = (integers(rng, s, problem.dtype) for s in (problem.coarse_shape, problem.filter_shape))
        if problem.dtype == np.float16:
            value, filter = value % 2, filter % 2
        exact = oracle.rounded(expected(problem, value, filter), problem.dtype)
        for l2_bytes in (TINY_CACHE, SMALL_CACHE, CACHE):
            plan = plan_of(problem, order, l2_bytes)
            if plan is None:
                continue
            cut += plan.blocks > 4
            assert same_bits(plan(value, filter), exact), (i, l2_bytes, plan.schedule)
    assert cut > (30 if order in COL2IM else 2), "the small caches must cut problems into blocks"


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_slots_that_are_neighbours_are_stored_in_one_copy(dtype, monkeypatch):
    """Where they are all in the output, with the bits of a copy for each."""
    rng = np.random.default_rng([19, *map(ord, dtype)])
    copies = []
    for _ in range(120):
        problem = random_problem(rng, dtype)
        value, filter = (integers(rng, s, problem.dtype, 2) for s in (problem.coarse_shape, problem.filter_shape))
        found = []
        for most in (0, 1 << 20):
            monkeypatch.setattr(by_rows, "_FEW_CELLS", most)
            plan = plan_of(problem, "by_rows", CACHE)
            found.append(plan(value, filter))
        assert same_bits(*found)
        programs = [plan.schedule._made(plan.schedule.block(index)) for index in range(plan.schedule.count)]
        copies += [len(program.stores) for program in programs if program.tiles]
    assert len(copies) > 4
    assert set(copies) == {1}


@pytest.mark.parametrize("positions", [1, 3, 7, 20])
@pytest.mark.parametrize("order", ["kn2row", "winograd"])
def test_blocks_of_few_positions_give_the_oracles_bits(order, positions, monkeypatch):
    """Blocks cut along width too, shorter than what taps reach, with one channel so that taps are joined along k."""
    monkeypatch.setattr(kn2row, "_POSITIONS", (positions,))
    monkeypatch.setattr("gemmconv.lowerings.tiling._POSITIONS", (positions,))
    rng = np.random.default_rng([positions, 18])
    cut = 0
    for i in range(80):
        problem = random_problem(rng, "float32" if i % 3 else "float64")
        plan = plan_of(problem, order, CACHE)
        if plan is None:
            continue
        value, filter = (integers(rng, s, problem.dtype) for s in (problem.coarse_shape, problem.filter_shape))
        cut += len(plan.schedule.cuts[2 if order == "kn2row" else 3]) > 1
        assert same_bits(plan(value, filter), oracle.rounded(expected(problem, value, filter), problem.dtype)), i
    assert cut > 5 or positions > 7


def test_width_blocks_shorter_than_the_taps_reach(monkeypatch):
    """Taps joined along k that land in a block with some of their shifts only."""
    monkeypatch.setattr(kn2row, "_POSITIONS", (32,))
    value, filter = np.ones((1, 1, 1, 40, 1), np.float32), np.ones((1, 1, 33, 8, 1), np.float32)
    problem = conv3d_transpose_problem(value.shape, filter.shape, None, None, "VALID", None, None, np.dtype(np.float32))
    plan = plan_of(problem, "kn2row", CACHE)
    assert len(plan.schedule.cuts[2]) > 1
    assert len(plan.schedule.panels[0][0].deep) == 33
    assert same_bits(plan(value, filter), oracle.rounded(expected(problem, value, filter), np.float32))


@pytest.mark.parametrize("order", COL2IM)
def test_no_product_is_formed_twice(order, monkeypatch):
    """Each row of the value meets each row of the filter at most once, and every cell of the output is stored once."""
    formed = []

    def form(self, rows, pieces, ld):
        formed.append((rows.hull, list(pieces)))
        self.buffer[...] = 0

    monkeypatch.setattr(Columns, "form", form)
    rng = np.random.default_rng(12)
    for i in range(150):
        problem = random_problem(rng)
        plan = plan_of(problem, order, (TINY_CACHE, SMALL_CACHE, CACHE)[i % 3])
        if plan is None:
            continue
        formed.clear()
        out = np.full(problem.fine_shape, np.nan, np.float32)
        plan(np.zeros(problem.coarse_shape, np.float32), np.zeros(problem.filter_shape, np.float32), out)
        assert not np.isnan(out).any(), plan.schedule
        met = np.zeros(
            (problem.batch, *(a.coarse for a in plan.schedule.axes), math.prod(problem.filter_shape[:4])), int
        )
        for hull, pieces in formed:
            for piece in pieces:
                met[(*(slice(*r) for r in hull), slice(piece.first, piece.first + piece.rows))] += 1
        assert met.max(initial=0) <= 1, plan.schedule


@pytest.fixture
def unpacked(monkeypatch):
    """Set the largest product that BLAS is said not to pack."""

    def largest(size):
        monkeypatch.setattr(products, "small_products", lambda: size)
        products.tile.cache_clear()

    yield largest
    products.tile.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["NDHWC", "NCDHW"])
@pytest.mark.parametrize("order", COL2IM)
def test_rows_as_columns_of_the_filter(order, layout, dtype, unpacked, monkeypatch):
    """Products that are not packed, whatever the BLAS: few rows that are turned, and rows with channels first."""
    formed = []
    form = Columns._form_across

    def counted(self, value, piece, ld):
        formed.append(self._buffers.tap_major)
        form(self, value, piece, ld)

    monkeypatch.setattr(Columns, "_form_across", counted)
    rng = np.random.default_rng(19)
    shapes = [
        ((2, 3, 4), 4, 2, 70, 300),
        ((1, 2, 2), 3, 1, 2, 2000),
        ((3, 3, 7), 3, 2, 300, 111),
        ((4, 5, 6), 3, 2, 3, 9),
    ]
    for (n, k, s, cout, cin), l2_bytes, size in itertools.product(shapes, (1 << 16, CACHE), (5000, 1_000_000)):
        unpacked(size)
        coarse = (1, *n, cin) if layout == "NDHWC" else (1, cin, *n)
        problem = conv3d_transpose_problem(coarse, (k, k, k, cout, cin), None, s, "SAME", layout, 1, np.dtype(dtype))
        plan = plan_of(problem, order, l2_bytes)
        if plan is None:
            continue
        value, filter = (integers(rng, shape, problem.dtype) for shape in (coarse, problem.filter_shape))
        assert same_bits(plan(value, filter), oracle.rounded(expected(problem, value, filter), problem.dtype))
    if layout == "NCDHW":
        assert set(formed) == (set() if order == "by_taps" else {True})
    else:
        assert set(formed) == {order != "by_taps"} | ({False} if order == "by_rows" else set())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [3000, 40_000, 1_000_000])
def test_products_of_lines_of_both_operands(size, dtype, unpacked, monkeypatch):
    """Every cell is the whole sum, whatever the sizes are cut to; lines may be apart, and cells of the result too.

    All are products that OpenBLAS does not pack: of matrices, not vectors, and within its two limits.
    """
    unpacked(size)
    matmul, sizes = np.matmul, []

    def noted(left, right, out):
        sizes.append((left.shape[-2], right.shape[-1], left.shape[-1]))
        return matmul(left, right, out=out)

    monkeypatch.setattr(np, "matmul", noted)
    rng = np.random.default_rng(23)
    for m, n in [(2, 2), (2, 700), (700, 2), (3, 129), (33, 33), (17, 1000), (1000, 17), (64, 256), (131, 65)]:
        for k in (32, 47, 300, 900):
            a, b = (integers(rng, (2 * rows, k + 3), np.dtype(dtype))[::2, :k] for rows in (m, n))
            out = np.full((m, n + 5), np.nan, dtype)
            products.multiply_lines(a, b, out[:, 2:-3])
            assert np.array_equal(out[:, 2:-3], a.astype(np.int64) @ b.T.astype(np.int64))
            assert np.isnan(out[:, :2]).all()
            assert np.isnan(out[:, -3:]).all()
    assert all(min(m, n) > 1 and m * n <= 1200 for m, n, _ in sizes)
    if size == 1_000_000:
        assert max(m * n * k for m, n, k in sizes) <= size


@pytest.mark.parametrize("order", ["by_taps", "by_rows", "by_planes"])
def test_columns_of_lines(order, unpacked, monkeypatch):
    """Columns of lines of value and filter as they lie, in either order; a schedule that says so packs no product."""
    unpacked(1_000_000)
    formed, form = [], Columns._form_lines

    def counted(self, rows, piece, ld):
        formed.append(self._buffers.tap_major)
        form(self, rows, piece, ld)

    monkeypatch.setattr(Columns, "_form_lines", counted)
    rng, never = np.random.default_rng(29), 0
    shapes = [
        ((3, 4, 5), 4, 2, 24, 200),
        ((2, 7, 9), 4, 2, 2, 64),
        ((3, 5, 3), 3, 2, 70, 130),
        ((2, 30, 40), 3, 1, 2, 96),
    ]
    for (n, k, s, cout, cin), l2_bytes, batch in itertools.product(shapes, (1 << 16, CACHE), (1, 3)):
        value, filter = integers(rng, (batch, *n, cin), np.float32), integers(rng, (k, k, k, cout, cin), np.float32)
        problem = conv3d_transpose_problem(value.shape, filter.shape, None, s, "SAME", "NDHWC", 1, value.dtype)
        plan = plan_of(problem, order, l2_bytes)
        if plan is None:
            continue
        before = len(formed)
        with monkeypatch.context() as held:
            packs_none = plan.schedule.largest_product == products.LARGEST
            if packs_none:
                held.setattr("gemmconv.blas.Gemm.__call__", None)
            got = plan(value, filter)
        never += packs_none and len(formed) > before
        assert same_bits(got, oracle.rounded(expected(problem, value, filter), problem.dtype))
    assert set(formed) == {"by_taps": {False}, "by_rows": {False, True}, "by_planes": {True}}[order]
    assert never > 3


def test_no_product_of_a_vector_is_left():
    """Intervals cover everything, all of one length but the last, which is at most one longer and never 1."""
    for size, each in itertools.product(range(1, 40), range(1, 40)):
        found = [
            length for start, stop, many in products.alike(size, each) for length in [(stop - start) // many] * many
        ]
        assert sum(found) == size
        assert set(found[:-1]) <= {each}
        assert found[-1] <= each + 1
        assert 1 not in found or 1 in (size, each)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["NDHWC", "NCDHW"])
@pytest.mark.parametrize("size", [6000, 1_000_000])
def test_columns_of_a_filter_in_tiles(size, layout, dtype, unpacked, monkeypatch):
    """A tap at a time from a filter that is packed, whatever the BLAS: rows in even pieces or not, channels cut."""
    unpacked(size)
    monkeypatch.setattr(by_taps, "best", lambda found, _: rng.choice([s for s in found if s.turned] or found))
    formed = set()
    multiply = columns.multiply_tiles

    def counted(a, tiles, out):
        rows = size // math.prod(tiles.shape[1:])
        formed.update([("rows", len(a) > rows), ("left", len(a) % min(len(a), rows) > 0), ("tiles", len(tiles) > 1)])
        multiply(a, tiles, out)

    monkeypatch.setattr(columns, "multiply_tiles", counted)
    rng = np.random.default_rng([20, size])
    for n, k, s, cout, cin in [
        ((5, 6, 7), 3, 2, 16, 3),
        ((4, 5, 5), 2, 2, 64, 10),
        ((3, 9, 8), 4, 2, 17, 16),
        ((6, 5, 7), 3, 1, 48, 1),
        ((2, 5, 4), 3, 2, 192, 7),
    ]:
        for _ in range(4):
            coarse = (2, *n, cin) if layout == "NDHWC" else (2, cin, *n)
            problem = conv3d_transpose_problem(
                coarse, (k, k, k, cout, cin), None, s, "SAME", layout, 1, np.dtype(dtype)
            )
            plan = plan_of(problem, "by_taps", int(rng.choice([SMALL_CACHE, CACHE])))
            if plan.schedule.turned:
                assert plan.packed_bytes == math.prod(problem.filter_shape) * problem.dtype.itemsize
            value, filter = (integers(rng, shape, problem.dtype) for shape in (coarse, problem.filter_shape))
            exact = oracle.rounded(expected(problem, value, filter), problem.dtype)
            assert same_bits(plan(value, filter), exact)
            assert same_bits(plan._with(filter)(value), exact)
    assert formed >= {("rows", size == 6000), ("rows", False), ("left", False), ("tiles", True)}
    assert (("left", True) in formed) == (size == 6000)


@pytest.mark.parametrize("order", ORDERS)
def test_workers_do_not_change_bits(order):
    """Normal data, one and two workers, alone and while other threads compute."""
    rng = np.random.default_rng(13)
    stop = threading.Event()

    def load():
        a = np.ones((2, 8, 8, 8, 16), np.float32)
        w = np.ones((3, 3, 3, 16, 16), np.float32)
        while not stop.is_set():
            gemmconv.conv3d_transpose(a, w, strides=2)

    problem = conv3d_transpose_problem(
        (2, 9, 10, 11, 24), (4, 3, 4, 40, 24), None, (2, 1, 2), "SAME", None, None, np.dtype(np.float32)
    )
    value, filter = (rng.standard_normal(s, np.float32) for s in (problem.coarse_shape, problem.filter_shape))
    plans = [plan_of(problem, order, CACHE, workers) for workers in (1, 2)]
    assert plans[0].schedule == plans[1].schedule
    first = plans[0](value, filter)
    others = [threading.Thread(target=load) for _ in range(2)]
    for alone in (True, False):
        if not alone:
            for thread in others:
                thread.start()
        for plan in plans * 3:
            assert same_bits(plan(value, filter), first)
    stop.set()
    for thread in others:
        thread.join()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Threads can be placed on Linux only.")
def test_workers_have_cpus_of_their_own():
    """Two workers on disjoint CPUs, one on any, and the caller's affinity as it was."""
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("One CPU cannot be divided.")
    for workers in (2, 1, 2):
        seen = [set(), set()]
        threads.run(lambda i, slot: (seen[slot].update(os.sched_getaffinity(0)), time.sleep(0.005)), 20, workers)  # noqa: B023
        if workers == 2 and seen[1]:
            assert not seen[0] & seen[1]
            assert seen[0] | seen[1] == mine
        else:
            assert seen[0] == mine
    assert os.sched_getaffinity(0) == mine


def test_workspace_is_what_the_plan_says_and_bounded():
    """For any shape: a block takes exactly its workspace, and a worker at most a few L2 caches."""
    machine = Machine(2, CACHE, 1 << 24)
    shapes = [
        ((1, 1, 1, 1_000_000, 16), (1, 1, 3, 16, 16)),
        ((1, 1_000_000, 1, 1, 1), (3, 1, 1, 1, 1)),
        ((1, 1, 1024, 1024, 8), (1, 4, 4, 8, 8)),
        ((1, 1, 1024, 1024, 4), (1, 9, 9, 1, 4)),
        ((1, 2, 2, 2, 512), (4, 4, 4, 512, 512)),
        ((64, 1, 1, 1, 4096), (2, 2, 2, 4096, 4096)),
        ((1, 4, 4, 4, 100_000), (2, 2, 2, 3, 100_000)),
        ((1, 300, 300, 300, 2), (5, 5, 5, 2, 2)),
        ((1, 20, 1000, 2, 7), (3, 3, 3, 11, 7)),
        ((1, 1, 1, 1, 2), (1, 1, 5000, 40, 2)),
    ]
    for (value, filter), stride, dilation, dtype, layout in itertools.product(
        shapes, (1, 2, 5), (1, 3, 1000), ("float32", "float16", "complex128"), ("NDHWC", "NCDHW")
    ):
        shape = oracle.caller_order(list(value), layout)
        problem = conv3d_transpose_problem(shape, filter, None, stride, "SAME", layout, dilation, np.dtype(dtype))
        for name, schedule in LOWERINGS["conv3d_transpose"].items():
            try:
                used = schedule(problem, machine).workspace_bytes
            except CannotLowerError as error:
                used, text = 0, str(error)
            most = (12 if name == "winograd" else 4) * CACHE
            if used == 0:
                rules = {
                    "kn2row": rf"taps reach \S+ rows, so that a block's rows take \d+ bytes, more than {most};",
                    "winograd": f"got kernel {'x'.join(map(str, filter[:3]))}, strides|blocks take .* more than {most};"
                    "|packed filter takes .* more than 33554432;",
                    "mec": rf"its blocks take \d+ bytes, more than {most};|its result has more than 64 phases;",
                    "depthwise": "it needs several groups of one channel, got 1 of",
                }
                assert re.search(rules[name], text)
            assert used <= most, (name, problem)


def test_a_workspace_that_is_too_small_is_noticed():
    """So that the bound above is on what blocks really take."""
    problem = random_problem(np.random.default_rng(14))
    schedule = plan_of(problem, "by_taps", CACHE).schedule
    shapes = problem.coarse_shape, problem.filter_shape, problem.fine_shape
    along = base.order(problem.axes)
    steps = tuple(base.steps_of(problem.layout, i == 1, shape, along) for i, shape in enumerate(shapes))
    operands = Operands(*(np.ones(s, np.float32) for s in shapes), np.empty(0, np.float32), steps)
    small = Workspace(schedule.workspace_bytes - 64, problem.compute_dtype)

    def run():
        for i in range(schedule.count):
            schedule.run(i, operands, small)

    with pytest.raises(ValueError, match="reshape"):
        contextvars.copy_context().run(run)


@pytest.mark.parametrize("name", ["sgemm", "dgemm", "cgemm", "zgemm"])
def test_fallback_on_matmul(name, monkeypatch):
    """Without SciPy's pointer, with an unknown signature or a wrong BLAS, matmul gives the same whole numbers."""
    dtype = np.dtype({"s": "f4", "d": "f8", "c": "c8", "z": "c16"}[name[0]])
    real = blas.cython_blas.__pyx_capi__[name]

    signatures = {"missing": {}, "unknown": {name: renamed(real, b"void (char *, long double *)")}}
    rng = np.random.default_rng(15)
    problem = random_problem(rng, dtype.name)
    value, filter = (integers(rng, s, dtype) for s in (problem.coarse_shape, problem.filter_shape))
    exact = oracle.rounded(expected(problem, value, filter), dtype)
    reasons = {"missing": f"publishes no {name}", "unknown": "signature this version does not know"}
    for case, capsules in signatures.items():
        monkeypatch.setattr(blas.cython_blas, "__pyx_capi__", capsules)
        monkeypatch.setattr(blas, "_paths", {})
        gemmconv.clear_cache()
        described = blas.describe()[dtype.name]
        assert described["path"] == "numpy.matmul"
        assert reasons[case] in described["reason"]
        for order in ORDERS:
            plan = plan_of(problem, order, SMALL_CACHE)
            assert plan is None or same_bits(plan(value, filter), exact)
    gemmconv.clear_cache()


def renamed(capsule, name, kept=[]):  # noqa: B006  the name must outlive the capsule
    """Return a capsule of the same pointer under another name."""
    kept.append(name)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return new(pointer(capsule, get_name(capsule)), name, None)


def test_self_test_finds_a_wrong_blas():
    """One that writes beside its columns, and one that gives wrong values."""
    for wrong, what in (
        (lambda c: c.__setitem__((0, 0), 1), "guard cells"),
        (lambda c: c.__setitem__((1, 0), 99), "values"),
    ):

        class Wrong(blas.Gemm):
            def __call__(self, m, n, k, a, lda, a_t, b, ldb, b_t, c, ldc, accumulate=False):
                super().__call__(m, n, k, a, lda, a_t, b, ldb, b_t, c, ldc, accumulate)
                memory = (ctypes.c_float * ((m + 2) * ldc)).from_address(c - ldc * 4)
                wrong(np.frombuffer(memory, np.float32).reshape(m + 2, ldc))  # noqa: B023

        assert what in blas.self_test(Wrong(np.dtype("f4")))
    assert blas.self_test(blas.Gemm(np.dtype("f4"))) == ""


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("name", ["float32", "float64", "complex64", "complex128"])
def test_one_row_goes_by_gemv_or_einsum(name, far, monkeypatch):
    """Products too large for GEMM's serial path, with both layouts of each operand, equal matmul's whole numbers."""
    monkeypatch.setattr(blas, "_FAR", 0 if far else 1 << 40)
    dtype, k, n = np.dtype(name), 30, 10_000
    rng = np.random.default_rng(17)
    a, b = integers(rng, (1, k), dtype), integers(rng, (k, n), dtype)
    for a_transposed, b_transposed in itertools.product((False, True), repeat=2):
        left, right = np.array(a.T if a_transposed else a), np.array(b.T if b_transposed else b, order="C")
        gemm = blas.Gemm(dtype)
        called = []
        gemv = gemm._gemv
        gemm._gemv = lambda *args: called.append(gemv(*args))  # noqa: B023
        c = np.full(n + 2, 77, dtype)
        for accumulate in (False, True):
            gemm(
                1, n, k, left.ctypes.data, left.shape[1], a_transposed, right.ctypes.data, right.shape[1],
                b_transposed, c[1:].ctypes.data, n, accumulate,
            )  # fmt: skip
            assert np.array_equal(c[1:-1], (a @ b)[0] * (1 + accumulate))
            assert (c[[0, -1]] == 77).all()
        # Rows of the second matrix that are long are left to gemv, and complex numbers.
        assert len(called) == (0 if far and b_transposed and dtype.kind == "f" else 2)


@pytest.mark.parametrize("name", ["complex64", "complex128"])
def test_complex_products_are_serial_up_to_fewer_than_real_ones(name):
    """Beyond BLAS would use its threads, which changes bits: a call that forms such products holds it."""
    rng = np.random.default_rng(17)
    plan = plan_conv3d_transpose(
        (1, 7, 2, 4, 16), (3, 3, 3, 8, 16), strides=2, dtype=name, algorithm="col2im", workers=1
    )
    assert blas.serial_products("c") < plan.schedule.largest_product <= max(1, blas.serial_products())
    x, w = (rng.standard_normal((*shape, 2)) @ [1, 1j] for shape in plan.problem.operand_shapes)
    x, w = x.astype(name), w.astype(name)
    with threadpoolctl.threadpool_limits(1, "blas"):
        want = plan(x, w)
    with threadpoolctl.threadpool_limits(2, "blas"):
        assert same_bits(plan(x, w), want)
    for m, n, k in ((16, 64, 32), (32, 32, 32)):
        a, b, c = (np.zeros(size, name) for size in ((m, k), (n, k), (m, n)))
        a[:], b[:] = (rng.standard_normal((*array.shape, 2)) @ [1, 1j] for array in (a, b))
        found = []
        for number in (1, 2):
            with threadpoolctl.threadpool_limits(number, "blas"):
                blas.Gemm(c.dtype)(m, n, k, a.ctypes.data, k, False, b.ctypes.data, k, True, c.ctypes.data, n)
            found.append(c.copy())
        assert same_bits(*found)


def test_data_that_is_not_finite_has_the_same_bits_under_any_number_of_blas_threads():
    """NumPy hands thin products to gemv and dot, for which BLAS has threads early."""
    rng = np.random.default_rng(17)
    plan = gemmconv.plan_conv3d_backprop_filter_v2(
        (1, 2, 200, 300, 1), (2, 3, 3, 1, 1), (1, 2, 200, 300, 1), 1, "SAME", dtype="float64", workers=1
    )
    x, g = (rng.standard_normal(shape) for shape in plan.problem.operand_shapes)
    g[0, 0, 0, 0, 0] = np.inf
    found = []
    for number in (1, 2):
        with threadpoolctl.threadpool_limits(number, "blas"):
            found.append(np.nan_to_num(plan(x, g), nan=1, posinf=2, neginf=3))
    assert same_bits(*found)


def test_memory_that_runs_out_in_a_block_ends_the_call():
    """It is not begun again: `out` may be an operand, which blocks have changed, and `progress` may have raised it."""
    rng = np.random.default_rng(17)
    x, w = integers(rng, (8, 16, 16, 16, 8), np.dtype("f4")), integers(rng, (3, 3, 3, 8, 8), np.dtype("f4"))
    plan = plan_conv3d_transpose(x.shape, w.shape, algorithm="col2im", workers=1)
    want = plan(x, w).copy()
    plan(np.zeros((8, 16, 16, 16, 8), np.float32), w)  # whose memory becomes idle, which might be freed for another try
    calls = []

    def progress(done, total):
        calls.append(done)
        if done == (total + 1) // 2:
            raise MemoryError("of the caller")

    both = x.copy()
    with pytest.raises(MemoryError, match="of the caller"):
        plan(both, w, out=both, progress=progress)
    assert len(calls) == len(set(calls))
    assert same_bits(plan(x, w), want)


def test_gemm_refuses_what_its_integers_cannot_hold():
    """Before any memory is touched, with the numbers."""
    gemm = blas.Gemm(np.dtype("f4"))
    too_many = blas.largest_integer(np.dtype("f4")) + 1
    with pytest.raises(OverflowError, match=f"m=1, n={too_many}, .*integers end at {too_many - 1}"):
        gemm(1, too_many, 1, 0, 1, False, 0, 1, False, 0, too_many)


def test_rows_too_far_apart_for_blas_are_packed(monkeypatch):
    """In NCDHW the leading dimension is the volume: where BLAS' integers cannot hold it, blocks are copied."""
    monkeypatch.setattr("gemmconv.lowerings.base.largest_integer", lambda dtype: 30)
    rng = np.random.default_rng(16)
    widened = 0
    for _ in range(40):
        problem = random_problem(rng)
        value, filter = (integers(rng, s, problem.dtype) for s in (problem.coarse_shape, problem.filter_shape))
        for order in COL2IM:
            plan = plan_of(problem, order, SMALL_CACHE)
            if plan is None:
                continue
            widened += plan.schedule.widens
            assert same_bits(plan(value, filter), oracle.rounded(expected(problem, value, filter), np.float32))
    assert widened > 10


@pytest.mark.parametrize("lo", [-3, 0, 2])
def test_axes_take_any_padding(lo):
    """Negative padding before too, which later operations need: pairs of a small axis, one by one."""
    axis = Axis(coarse=5, fine=9, kernel=3, stride=2, dilation=2, lo=lo)
    pairs = {(i, a): i * 2 + a * 2 - lo for i in range(5) for a in range(3)}
    for start, stop in itertools.combinations(range(10), 2):
        steps = by_rows.axis_steps(axis, (start, stop))
        found = [(i, a) for step in steps for i in range(*step.rows) for a in range(*step.taps)]
        assert len(found) == len(set(found))
        if (start, stop) != (0, 9):
            assert set(found) == {pair for pair, o in pairs.items() if start <= o < stop}
    moved = {
        (i, move.tap + t): (i + move.shift) * 2 + slots(axis).offsets[move.slot + t]
        for move in slots(axis).moves
        for t in range(move.many)
        for i in range(5)
    }
    assert {pair: o for pair, o in moved.items() if 0 <= o < 9} == {p: o for p, o in pairs.items() if 0 <= o < 9}


def test_hulls_are_contiguous_and_hold_their_box():
    """For every box of a small grid."""
    sizes = (2, 3, 2, 3)
    order = np.arange(math.prod(sizes)).reshape(sizes)
    ranges = [list(itertools.combinations(range(n + 1), 2)) for n in sizes]
    for ends in itertools.product(*ranges):
        box = Box(*ends)
        hull = box.hull(sizes)
        rows = order[tuple(slice(*r) for r in hull)]
        assert (np.diff(rows.ravel()) == 1).all()
        assert (rows[box.within(hull)] == order[tuple(slice(*r) for r in box)]).all()
        assert rows.size <= by_taps.largest_hull([b - a for a, b in box], sizes)


def test_cuts_are_even():
    """All of it, once, in ranges that differ by one at the most."""
    for size, chunk in itertools.product(range(30), range(1, 12)):
        cut = Cut(size, chunk)
        ranges = list(cut)
        lengths = [stop - start for start, stop in ranges]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == size
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        assert max(lengths) == cut.longest <= chunk
        assert len(cut) == len(ranges)
        assert max(lengths) - min(lengths) <= 1


def test_cost_grows_with_work():
    """Every estimate is positive and does not fall as sizes grow."""
    assert 0 < cost.gemm_s(1, 1, 1) < cost.gemm_s(10, 1, 1) < cost.gemm_s(10, 10, 1) < cost.gemm_s(10, 10, 10)
    assert 0 < cost.pass_s(10, 10) < cost.pass_s(1000, 10) <= cost.pass_s(1000, 10, spilled=True)


def test_tiles_are_what_kernels_form_at_once(monkeypatch):
    """Tiles of 64 and 32 columns before those of 48, unless these are all; 0 where no tile divides the columns."""
    monkeypatch.setattr(products, "small_products", lambda: 100**3)
    of = {n: products.tile_columns(Cut(n, n), 16) for n in (16, 24, 48, 64, 80, 96, 144, 192, 288, 100)}
    assert of == {16: 16, 24: 24, 48: 48, 64: 64, 80: 16, 96: 32, 144: 48, 192: 64, 288: 32, 100: 0}


def test_pieces_of_few_channels_of_a_group_cost_more(monkeypatch):
    """Between those of other groups, where less than a cache line of a position is used; the choice heeds it."""
    axis = Axis(16, 32, 4, 2, 1, 1)
    of = [Problem("conv3d_backprop_filter", 1, 1, 1, (axis, axis, axis), np.dtype(np.float32), layout, groups)
          for layout, groups in (("NDHWC", 64), ("NDHWC", 1), ("NCDHW", 64))]  # fmt: skip
    each = [[cost.in_pieces_s(problem, channels) for channels in (1, 2, 8, 16)] for problem in of]
    assert each[0][0] == 2 * each[0][1] == 8 * each[0][2] > 0 == each[0][3]
    assert each[1:] == [[0] * 4] * 2
    machine = Machine(2, 1 << 20, 32 << 20)
    # im2col would copy each value from a cache line of its own, for each box of taps.
    assert make_plan.__wrapped__(of[0], machine, "auto", 2).algorithm == "mec"
    # Channels of the fine and of the coarse array, and which lowerings' estimates heed them.
    with_pieces, without = [], []
    for operation, fine, coarse, name in (
        ("conv3d", 2, 16, "im2col"), ("conv3d", 2, 16, "kn2row"), ("conv3d", 2, 16, "winograd"),
        ("conv3d_backprop_filter", 2, 16, "im2col"), ("conv3d_backprop_filter", 16, 2, "im2col"),
        ("conv3d_backprop_filter", 2, 16, "winograd"), ("conv3d_backprop_filter", 16, 2, "winograd"),
    ):  # fmt: skip
        problem = Problem(operation, 1, coarse, fine, (axis, axis, axis), np.dtype(np.float32), "NDHWC", 4)
        schedule = LOWERINGS[operation][name](problem, machine)
        with_pieces.append(schedule.time_s(machine))
        with monkeypatch.context() as patch:
            patch.setattr(cost, "_PIECE_VALUES", 0)
            without.append(schedule.time_s(machine))
    assert all(a > b for a, b in zip(with_pieces, without, strict=True))


def test_what_is_stored_apart_costs_as_much_as_goes_to_memory():
    """Nothing up to an eighth of the last cache, all from five eighths on; no more of a cache than others leave."""
    of = [
        Problem("conv3d_transpose", 1, 1, 1, (Axis(1, 1, 1), Axis(1, 1, 1), Axis(n, n, 1)), np.dtype(np.float32))
        for n in (1 << 20, 3 << 20, 5 << 20)
    ]
    most_s = cost.apart_s(of[2], Machine(2, 1 << 20, 32 << 20))
    for l3_bytes in (32 << 20, 480 << 20):
        machine = Machine(2, 1 << 20, l3_bytes)
        assert [cost.apart_s(problem, machine) for problem in of] == [0, most_s / 2, most_s]
    assert [cost.apart_s(problem, Machine(2, 1 << 20, 1)) for problem in of] == [most_s] * 3


def test_plans_are_cached_and_forgotten():
    """Equal questions share a plan until clear_cache; a plan stays usable after it."""
    ask = ((1, 3, 3, 3, 2), (2, 2, 2, 5, 2))
    plan = plan_conv3d_transpose(*ask, strides=2)
    assert plan_conv3d_transpose(*ask, strides=(2, 2, 2)) is plan
    gemmconv.clear_cache()
    assert plan_conv3d_transpose(*ask, strides=2) is not plan
    ones = [np.ones(shape, np.float32) for shape in ask]
    assert (plan(*ones) == 2).all()


def test_the_plans_of_a_large_network_are_kept():
    """200 plans in turn, as training asks for: what is forgotten must not be what is asked for next."""
    gemmconv.clear_cache()
    first, again = ([plan_conv3d_transpose((1, 1, 1, n, 1), (1, 1, 2, 1, 1)) for n in range(1, 201)] for _ in "ab")
    assert all(a is b for a, b in zip(first, again, strict=True))


def test_imports_go_one_way():
    """The cli -> nn, compat, stored -> calls -> plan -> part -> running -> lowerings -> problem, blas, machine."""
    package = Path(gemmconv.__file__).parent
    ranks = {
        "problem": 0, "machine": 0, "blas": 0, "results": 0, "newfile": 0, "demo": 0, "profile": 0, "quiet": 0,
        "limit": 0, "arguments": 1, "arrays": 1, "threads": 1, "parts": 1, "journal": 1, "files": 1, "lowerings": 2,
        "running": 3, "cutting": 3, "part": 4, "plan": 5, "calls": 6, "config": 6, "columns": 6, "stored": 6, "nn": 7,
        "compat": 7, "dask": 8, "__init__": 8, "cli": 9, "__main__": 10,
    }  # fmt: skip
    seen = set()
    for path in sorted(package.rglob("*.py")):
        mine = path.relative_to(package).parts[0].removesuffix(".py")
        seen.add(mine)
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemmconv":
                inner = (node.module or "").split(".")[1:]
                names = [inner[0]] if inner else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gemmconv.")]
            for name in names:
                rank = ranks.get(name, ranks["__init__"])
                inside = name == mine and mine in ("lowerings", "compat")
                assert inside or rank < ranks[mine], f"{path.name} imports gemmconv.{name}"
    assert seen == set(ranks)
