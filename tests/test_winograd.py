"""Minimal filtering: every choice of axes and blocks, with small products and by GEMM, whatever the BLAS is.

Whole numbers have one result in any order of summation, and minimal filtering combines them with halves and sums only.
"""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import relation
from oracle import integers, rounded, same_bits
from test_lowerings import UNIT, _no_zeros_by_luck, check_cells, told  # noqa: F401  the first is a fixture
from test_relation import LAYOUTS, ONE, operands, run

from gemmconv import running, threads
from gemmconv.lowerings import (
    base,
    by_taps,
    minimal,
    products,
    tape,
    tiling,
    winograd,
    winograd_conv,
    winograd_gradient,
)
from gemmconv.lowerings.base import Operands, Workspace
from gemmconv.lowerings.phases import one_phase
from gemmconv.machine import Machine
from gemmconv.plan import Plan
from gemmconv.problem import Axis, Problem

MODULES = {"conv3d_transpose": winograd, "conv3d": winograd_conv}
EVERY = MODULES | {"conv3d_backprop_filter": winograd_gradient}
# The largest product that OpenBLAS does not pack, where it has kernels for it.
SMALL = 1_000_000
MACHINE = Machine(2, 1 << 20, 1 << 25)
# One to three taps a phase: stride 1, 2 and 3, dilated, cut and open ends, kernels up to the stride; and four and five,
# which are cut to pieces.
AXES = [
    Axis(5, 5, 3, 1, 1, 1),
    Axis(3, 6, 4, 2, 1, 1),
    Axis(5, 10, 3, 2, 1, 0),
    Axis(4, 9, 5, 2, 1, 1),
    Axis(7, 9, 3, 1, 2, 1),
    Axis(4, 6, 3, 1, 1, 0),
    Axis(6, 3, 3, 1, 1, 4),
    Axis(4, 16, 7, 3, 1, -2),
    Axis(4, 15, 3, 2, 2, 1),
    Axis(3, 5, 2, 3, 1, 1),
    Axis(9, 12, 2, 1, 3, 0),
    Axis(7, 14, 2, 2, 1, 0),
    ONE,
]
LONG = [Axis(5, 6, 5, 1, 1, 2), Axis(4, 9, 7, 2, 1, 3)]


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    """Say that BLAS does not pack small products, whatever it does: else there is nothing to test, nor to draw."""
    monkeypatch.setattr(products, "small_products", lambda: SMALL)
    products.tile.cache_clear()
    yield
    products.tile.cache_clear()


@pytest.fixture(params=[0, 6000, SMALL])
def _small(request, monkeypatch, _known):
    """Set the largest product that BLAS is said not to pack: none, or rows are in one piece, or several and a rest.

    Filters are packed by all workers, however small.
    """
    for module in (products, winograd_gradient):
        monkeypatch.setattr(module, "small_products", lambda: request.param)
    if request.param == 6000:
        monkeypatch.setattr(winograd_gradient, "_FEWEST_ROWS", 1)
        monkeypatch.setattr(winograd_gradient, "_MOST_ROWS", 7)
    monkeypatch.setattr(running, "_LARGE_FILTER", 0)
    products.tile.cache_clear()


def drawn_problem(rng, operation, dtype="float32", layout="NDHWC", biggest=2):
    axes = tuple((AXES + LONG)[i] for i in rng.integers(len(AXES + LONG), size=3))
    cin, cout = (int(n) for n in rng.choice([1, 3, 16, 32, 128], 2, p=[0.2, 0.2, 0.3, 0.25, 0.05]))
    return Problem(operation, int(rng.integers(1, biggest + 1)), cin, cout, axes, np.dtype(dtype), layout)


def plan_of(problem, schedule, workers=2):
    return Plan(problem, MACHINE, "winograd", "winograd", workers, schedule)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "complex64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", EVERY)
def test_random_choices_give_the_oracles_bits(operation, layout, dtype):
    """Random problems, two of their schedules for each choice of axes, with and without a bias."""
    rng = np.random.default_rng([1, *map(ord, operation + layout + dtype)])
    chosen, several, done = set(), 0, 0
    while done < 14 or len(chosen) < 6:
        problem = drawn_problem(rng, operation, dtype, layout)
        found = EVERY[operation].candidates(problem)
        done += bool(found)
        first, second, bias = operands(rng, problem, largest=2 if dtype == "float16" else 5)
        want = rounded(relation.result(problem, first, second, bias), dtype)
        for along, those in itertools.groupby(found, key=lambda schedule: schedule.along):
            for schedule in rng.permuted(np.array([*those, None], object)[:-1])[:2]:
                several += schedule.count > 1
                chosen.add(along)
                with told(problem, schedule):
                    assert same_bits(run(plan_of(problem, schedule), first, second, bias), want)
    # Half precisions and complex numbers have no shares.
    assert several > 5 or (operation not in MODULES and dtype in ("float16", "complex64"))


@pytest.fixture
def _buffer():
    """Set NumPy's buffer back: blocks that are run without a pool set it in this thread."""
    size = np.getbufsize()
    yield
    np.setbufsize(size)


def check_blocks(rng, problem, schedule):
    """Check that blocks write what their digits say: each cell once, all of a block's cells, and no other.

    Their memory holds NaN before, and they add a bias if it is drawn.
    """
    shapes = relation.shapes(problem)
    along = base.order(problem.axes)
    steps = tuple(
        base.steps_of(problem.layout, role == "filter", shape, along)
        for role, shape in zip(problem.roles, shapes, strict=True)
    )
    last = problem.layout == "NDHWC"
    axes = (0, *(2 - last + i for i in along), 4 if last else 1)
    first, second = (integers(rng, shape, "float32") for shape in shapes[:2])
    bias = np.arange(1, 1 + shapes[2][axes[4]], dtype=np.float32) if rng.integers(2) else None
    packed, output = np.full(schedule.packed_values, np.nan, np.float32), np.empty(shapes[2], np.float32)
    schedule.pack(second, packed)
    assert not np.isnan(packed).any()
    workspace = Workspace(schedule.workspace_bytes, problem.compute_dtype)
    workspace._memory.view(np.float32)[...] = np.nan
    written = np.zeros(shapes[2], int)
    for index, values in enumerate(itertools.product(*schedule.digits)):
        output[...] = np.nan
        schedule.run(index, Operands(first, second, output, packed, steps, bias), workspace)
        box = [slice(None)] * 5
        for axis, (start, stop) in itertools.chain(*values):
            box[axes[axis]] = slice(start, stop)
        here = ~np.isnan(output)
        with told(problem, schedule, index):
            assert here[tuple(box)].all()
            assert here.sum() == here[tuple(box)].sum()
        written += here
    assert (written == 1).all()


@pytest.mark.usefixtures("_buffer", "_small")
@pytest.mark.parametrize("operation", MODULES)
def test_blocks_write_what_their_digits_say(operation):
    """Some of random problems with several blocks."""
    rng = np.random.default_rng([2, *map(ord, operation)])
    looked_at = 0
    while looked_at < 12:
        problem = drawn_problem(rng, operation)
        found = MODULES[operation].candidates(problem)
        if found:
            schedule = found[rng.integers(len(found))]
            looked_at += schedule.count > 1
            check_blocks(rng, problem, schedule)


@pytest.mark.usefixtures("_buffer", "_small")
def test_shares_of_a_gradient_add_up():
    """Each with a memory of NaN before; random problems in one share and in several."""
    rng, looked_at = np.random.default_rng(9), set()
    while len(looked_at) < 3:
        problem = drawn_problem(rng, "conv3d_backprop_filter")
        first, second, _ = operands(rng, problem, largest=3)
        want = rounded(relation.result(problem, first, second), "float32")
        steps = tuple(
            base.steps_of(problem.layout, role == "filter", array.shape, base.order(problem.axes))
            for role, array in zip(problem.roles, (first, second, want), strict=True)
        )
        for schedule in winograd_gradient.candidates(problem)[::9]:
            looked_at.add(schedule.shares)
            workspace = Workspace(schedule.workspace_bytes, problem.compute_dtype)
            shares = np.full((schedule.shares, *want.shape), np.nan, np.float32)
            for index, share in enumerate(shares):
                workspace._memory.view(np.float32)[...] = np.nan
                schedule.run(index, Operands(first, second, share, None, steps, None), workspace)
            with told(problem, schedule):
                assert same_bits(sum(shares), want)


@pytest.mark.usefixtures("_buffer")
def test_memory_for_small_products_of_a_gradient(monkeypatch):
    """Random problems with products of a few rows at most: all that are formed in one step fit."""
    rng, steps_of_lines = np.random.default_rng(12), set()

    def fit(rows, points, sums, each, memory):
        (*stack, many, k), n = rows.shape, points.shape[-1]
        steps_of_lines.add(stack[2] > 1)
        assert math.prod(stack) * max(pieces for *_, pieces in products.alike(many, each)) * k * n <= memory.size

    monkeypatch.setattr(winograd_gradient, "_add_small", fit)
    for _ in range(100):
        problem = dataclasses.replace(drawn_problem(rng, "conv3d_backprop_filter"), cin=2, cout=3)
        found = winograd_gradient.candidates(problem)
        if found:
            schedule, most = found[rng.integers(len(found))], int(rng.integers(2, 12))
            monkeypatch.setattr(winograd_gradient.WinogradGradient, "_most_rows", lambda *_, most=most: most)
            with told(problem, schedule, most):
                run(plan_of(problem, schedule, 1), *operands(rng, problem)[:2])
    assert steps_of_lines == {False, True}
    # Lines of a single tap follow each other.
    axes = Axis(7, 7, 1, 1, 1, 0), Axis(7, 14, 2, 2, 1, 0), Axis(9, 9, 3, 1, 1, 1)
    problem = Problem("conv3d_backprop_filter", 1, 2, 3, axes, np.dtype(np.float32), "NDHWC")
    schedule = next(s for s in winograd_gradient.candidates(problem) if s.along == (3,))
    for u, v, most in itertools.product(range(1, 5), range(1, 40), range(2, 12)):
        monkeypatch.setattr(winograd_gradient.WinogradGradient, "_most_rows", lambda *_, most=most: most)
        memory = np.empty(schedule._found_values((4, 1, u, v, 1, 1, 2)), np.float32)
        for points, *_, k, n in schedule.sums_shapes:
            rows, sums = np.empty((4, 1, 1, u * v, k)), np.empty((4, 1, 1, u * v, n))
            fit(rows, sums, points, products.even_length(u * v, most), memory)


@pytest.mark.usefixtures("_small")
def test_bits_of_a_gradients_shares_do_not_depend_on_workers():
    """Normal data."""
    rng, looked_at = np.random.default_rng(10), 0
    while looked_at < 6:
        problem = drawn_problem(rng, "conv3d_backprop_filter")
        found = [s for s in winograd_gradient.candidates(problem) if s.shares > 1]
        if found:
            looked_at += 1
            schedule = found[rng.integers(len(found))]
            first, second = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem)[:2])
            one, *others = (run(plan_of(problem, schedule, workers), first, second) for workers in (1, 2, 3))
            with told(problem, schedule):
                assert all(same_bits(one, other) for other in others)


@pytest.mark.parametrize(("lo", "combined"), [(0, 1), (1, 4)])
def test_rows_of_several_phases_are_combined_once(lo, combined):
    """Where both phases of an axis take the same rows, or not: each of four with two filtered axes."""
    axes = tuple(Axis(6, 14 - lo, 4, 2, 1, lo) for _ in range(3))
    problem = Problem("conv3d_transpose", 1, 16, 16, axes, np.dtype(np.float32), "NDHWC")
    for schedule in winograd.candidates(problem):
        if len(schedule.along) == 2:
            workspace = Workspace(schedule.workspace_bytes, problem.compute_dtype)
            views = schedule._views(schedule.made(schedule.block(0)).layout, workspace)
            assert sum(bool(stage.rows) for stage in views.stages) == combined


@pytest.mark.parametrize("small", [0, SMALL])
@pytest.mark.parametrize("operation", MODULES)
def test_single_blocks_as_parts(operation, small, monkeypatch):
    """The bits of the whole from windows that hold all that is read, of axes with rows far apart too."""
    monkeypatch.setattr(products, "small_products", lambda: small)
    rng = np.random.default_rng([6, *map(ord, operation)])
    looked_at = 0
    while looked_at < 40:
        problem = drawn_problem(rng, operation)
        found = [s for s in MODULES[operation].candidates(problem) if s.count > 1]
        if not found:
            continue
        schedule = found[rng.integers(len(found))]
        looked_at += 1
        plan = plan_of(problem, schedule)
        along = (0, *(1 + i for i in base.order(problem.axes)), 4)
        first, second = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem)[:2])
        whole = plan(first, second)
        for index, values in enumerate(itertools.product(*schedule.digits)):
            box = [(0, size) for size in plan.output_shape]
            for axis, span in itertools.chain(*values):
                box[along[axis]] = span
            if any(start >= stop for start, stop in box):
                continue
            part = plan.part(box)
            window = part.windows[0]
            if index < 3:
                assert part.on_blocks
                assert same_bits(part(first[window], second[part.windows[1]]), whole[part.box])
            program = schedule.made(schedule.block(index))
            sources = program.sources if operation == "conv3d_transpose" else [program.source]
            for source in sources:
                for axis, of_axis in zip(schedule.order, source, strict=True):
                    held = window[along[axis]]
                    with told(schedule, index, axis):
                        assert held.start <= of_axis.start
                        assert of_axis.stop <= held.stop


@pytest.mark.parametrize(("operation", "small"), [*itertools.product(MODULES, (0, SMALL)), ("by_taps", SMALL)])
def test_a_filter_is_packed_in_parts(operation, small, monkeypatch):
    """As many as there are tiles, fewer, and more: together they write what the whole is, each value once."""
    monkeypatch.setattr(products, "small_products", lambda: small)
    monkeypatch.setattr(by_taps, "best", lambda found, _: next(s for s in found if s.turned))
    rng = np.random.default_rng([5, *map(ord, operation)])
    for channels in (16, 64, 192):
        of = "conv3d_transpose" if operation == "by_taps" else operation
        problem = Problem(of, 1, channels, channels, tuple(AXES[:3]), np.dtype(np.float32), "NDHWC")
        found = [by_taps.schedule(problem, MACHINE)] if of != operation else MODULES[of].candidates(problem)
        filter = rng.standard_normal(problem.filter_shape, np.float32)
        for schedule in found[::11]:
            whole = np.full(schedule.packed_values, np.nan, np.float32)
            workspace = Workspace(schedule.workspace_bytes, whole.dtype)
            schedule.pack(filter, whole)
            assert not np.isnan(whole).any()
            for parts in (2, 3, 5):
                together, times = np.full_like(whole, np.nan), np.zeros(whole.shape, int)
                for part in rng.permutation(parts):
                    alone = np.full_like(whole, np.nan)
                    schedule.pack_part(filter, alone, int(part), parts, workspace)
                    times += ~np.isnan(alone)
                    together = np.where(np.isnan(alone), together, alone)
                assert (times == 1).all()
                assert same_bits(together, whole)


@pytest.mark.parametrize("small", [0, SMALL])
@pytest.mark.parametrize("operation", MODULES)
def test_a_filter_is_packed_in_pieces(operation, small, monkeypatch):
    """Of fewer bytes than a row of a single tap has, of a few of them, or in one piece."""
    monkeypatch.setattr(products, "small_products", lambda: small)
    rng = np.random.default_rng(11)
    for cin, cout in ((16, 64), (64, 16), (33, 5)):
        problem = Problem(operation, 1, cin, cout, tuple(AXES[:3]), np.dtype(np.float32), "NDHWC")
        filter = integers(rng, problem.filter_shape, "float32")
        for schedule in MODULES[operation].candidates(problem)[::11]:
            found = []
            for most in (4, 4096, 1 << 30):
                monkeypatch.setattr(tiling, "_PACKED_TOGETHER", most)
                found.append(np.full(schedule.packed_values, np.nan, np.float32))
                schedule.pack(filter, found[-1])
            assert np.isfinite(found[0]).all()
            assert same_bits(found[0], found[1])
            assert same_bits(found[0], found[2])


@pytest.mark.skipif("OPENBLAS_CORETYPE" not in os.environ, reason="BLAS has chosen its kernels by itself already")
def test_parts_of_a_filter_with_the_kernels_that_blas_would_choose():
    """Where those pack no small products, workers combine parts of a filter, whose rounding may not depend on them."""
    chosen = {name: of for name, of in os.environ.items() if not name.startswith("OPENBLAS_")}
    tests = f"{__file__}::{test_a_filter_is_packed_in_parts.__name__}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        env=chosen,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_an_axis_of_one_phase_reads_the_same_positions():
    """Random axes with any padding: each tap of each coarse position, or none where it falls beside the fine array."""
    rng, thinned = np.random.default_rng(8), 0
    for _ in range(3000):
        coarse, kernel, stride, dilation = (int(n) for n in rng.integers(1, 7, 4))
        axis = Axis(coarse, int(rng.integers(15)), kernel, stride, dilation, int(rng.integers(-7, 10)))
        found, read = one_phase(axis)
        thinned += found.stride < stride
        for i, tap in itertools.product(range(coarse), range(kernel)):
            at = i * stride + tap * dilation - axis.lo
            q = i * found.stride + tap * found.dilation - found.lo
            want = at if 0 <= at < axis.fine else None
            assert (read[q] if 0 <= q < found.fine else None) == want, (axis, found)
        assert found.fine == len(read)
    assert thinned > 500


@pytest.mark.parametrize("taps", [*itertools.product((1, 2, 3), repeat=2)])
@pytest.mark.parametrize("alone", [False, True])
def test_matrices_combine_as_additions_do(taps, alone):
    """Sums of points to results, with what is added to each, and taps to filters, along both axes; halves are exact."""
    rng = np.random.default_rng([7, *taps])
    first, second = (minimal.Line(0, tuple(range(n)), 0) for n in taps)
    if alone:
        first = minimal.Line(0, (0,), 0, results=1)
    sums = rng.integers(-9, 10, (first.points, second.points, 5)).astype("f4")
    start = rng.integers(-9, 10, 5).astype("f4")
    matrix = minimal.sums_matrix(first, second, sums.dtype)
    found = matrix @ np.concatenate([sums.reshape(-1, 5), start[np.newaxis]])
    _combine_sums(sums.swapaxes(0, 1))
    of_second = sums[:, : second.results]
    _combine_sums(of_second)
    assert np.array_equal(found.reshape(first.results, -1, 5), of_second[: first.results] + start)
    g = 4 * rng.integers(-9, 10, (len(first.taps), len(second.taps), 5)).astype("f4")
    both = _combined_taps(_combined_taps(g).swapaxes(0, 1)).swapaxes(0, 1)
    matrix = minimal.taps_matrix(first, second, g.dtype)
    assert np.array_equal(matrix @ g.reshape(-1, 5), both.reshape(-1, 5))


def _combine_sums(z):
    """Combine the sums of the points to two results, in place of the first two."""
    if len(z) > 2:
        z[0] += z[2]
        z[1] -= z[2]
    if len(z) > 3:
        z[:2] += z[3]


def _combined_taps(g):
    """Return the filters of the points."""
    if len(g) == 1:
        return g
    if len(g) == 2:
        return np.stack([g[0], g[1], g[1] - g[0]])
    return np.stack([g[0], g[2], (g[0] - g[1] + g[2]) / 2, (g[0] + g[1] + g[2]) / 2])


@pytest.mark.parametrize("large", [0, 1 << 30])
def test_a_filter_that_cannot_be_packed_leaves_out_as_it_was(monkeypatch, large):
    """By two workers, or by one that the other waits for."""
    monkeypatch.setattr(running, "_LARGE_FILTER", large)
    axes = tuple(Axis(16, 16, 3, 1, 1, 1) for _ in range(3))
    problem = Problem("conv3d_transpose", 1, 32, 32, axes, np.dtype(np.float32), "NDHWC")
    schedule = next(s for s in winograd.candidates(problem) if s.count > 2)
    plan, parts = plan_of(problem, schedule), set()
    assert plan.used_workers == 2

    def fails(self, filter, packed, part, of, workspace):
        parts.add((part, of))
        packed[...] = 0
        time.sleep(0.05)
        if part == of - 1:
            raise MemoryError

    monkeypatch.setattr(winograd.Winograd, "pack_part", fails)
    out = np.full(plan.output_shape, 7, np.float32)
    with pytest.raises(MemoryError):
        plan(np.ones((1, 16, 16, 16, 32), np.float32), np.ones((3, 3, 3, 32, 32), np.float32), out=out)
    assert parts == ({(0, 2), (1, 2)} if large == 0 else {(0, 1)})
    assert (out == 7).all()


@pytest.mark.parametrize("large", [0, 1 << 30])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("operation", MODULES)
def test_packing_is_recorded_and_played_with_other_filters(operation, workers, large, tape_checked, monkeypatch):
    """By one worker, or in as many parts as there are workers, each by whoever comes first."""
    rng, packed = np.random.default_rng(6), []
    axes = tuple(Axis(8, 8, 3, 1, 1, 1) for _ in range(3))
    problem = Problem(operation, 1, 32, 32, axes, np.dtype(np.float32), "NDHWC")
    schedule = next(s for s in MODULES[operation].candidates(problem) if s.count > 1)
    plan, pack_part = plan_of(problem, schedule, workers), type(schedule).pack_part

    def counted(self, filter, to, part, parts, workspace):
        packed.append((part, parts))
        pack_part(self, filter, to, part, parts, workspace)

    monkeypatch.setattr(tape.Tapes, "_do", tape_checked)
    monkeypatch.setattr(running, "_LARGE_FILTER", large)
    monkeypatch.setattr(type(schedule), "pack_part", counted)
    for _ in range(6):
        first, second, _ = operands(rng, problem, largest=2, biased=False)
        assert same_bits(run(plan, first, second), relation.result(problem, first, second).astype("f4"))
    parts = workers if large == 0 else 1
    assert sorted(packed) == [(part, parts) for part in range(parts) for _ in range(2)]


def test_a_worker_that_fails_before_it_packs_lets_the_other_go_on(monkeypatch):
    axes = tuple(Axis(16, 16, 3, 1, 1, 1) for _ in range(3))
    problem = Problem("conv3d_transpose", 1, 32, 32, axes, np.dtype(np.float32), "NDHWC")
    plan = plan_of(problem, next(s for s in winograd.candidates(problem) if s.count > 2))
    first, second = np.ones((1, 16, 16, 16, 32), np.float32), np.ones((3, 3, 3, 32, 32), np.float32)
    plan(first, second)  # BLAS has been looked for
    context, failed, ended = threads._context, [], []

    class FailsOnce:
        def copy(self):
            if not failed:
                failed.append(True)
                time.sleep(0.02)
                raise ZeroDivisionError
            return context.copy()

    def call():
        with pytest.raises(ZeroDivisionError):
            plan(first, second)
        ended.append(True)

    monkeypatch.setattr(threads, "_context", FailsOnce())
    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(20)
    assert ended


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("along", [1, 2])
@pytest.mark.parametrize("operation", EVERY)
def test_rounding(operation, along):
    """Normal data: within twice the rounding of a direct sum, as test_lowerings.test_rounding_of_normal_data argues."""
    rng = np.random.default_rng([3, along])
    axes = Axis(8, 8, 3, 1, 1, 1), Axis(7, 14, 4, 2, 1, 1), Axis(6, 11, 3, 2, 1, 1)
    problem = Problem(operation, 1, 48, 48, axes, np.dtype(np.float32), "NDHWC")
    first, second = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem)[:2])
    exact = relation.result(problem, first, second)
    most = relation.result(problem, np.abs(first), np.abs(second))
    terms = relation.result(problem, np.ones_like(first), np.ones_like(second))
    for schedule in EVERY[operation].candidates(problem)[::7]:
        if len(schedule.along) == along:
            error = np.abs(run(plan_of(problem, schedule), first, second) - exact)
            # Sums of neighbouring taps cancel in a gradient.
            sizes = most if operation in MODULES else most.max((0, 1, 2), keepdims=True)
            assert (error <= 2 * np.sqrt(terms) * UNIT * sizes).all()
            assert np.sqrt(np.mean((error / most) ** 2)) <= UNIT


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("operation", EVERY)
def test_what_is_not_finite_is_left_to_another_lowering(operation):
    """Inf, NaN, and sums that overflow in between only.

    Such sums of a gradient are of neighbouring taps too, where the huge value may cancel and leave a rounded zero.
    """
    rng = np.random.default_rng(4)
    for _ in range(12):
        problem = drawn_problem(rng, operation)
        found = EVERY[operation].candidates(problem)
        if not found:
            continue
        plan = plan_of(problem, found[rng.integers(len(found))])
        for bad in (np.inf, -np.inf, np.nan, np.finfo(np.float32).max)[: 3 + (operation in MODULES)]:
            first, second, _ = operands(rng, problem, largest=2, biased=False)
            both = np.isinf(bad) or np.isnan(bad)
            for array in (first, second)[: 1 + both * rng.integers(2)]:
                array[tuple(rng.integers(array.shape))] = bad
            if not both:
                # No product overflows, but sums of taps times it do; it counts wherever a tap reaches.
                second = np.where(second < 0, second.dtype.type(-1), second.dtype.type(1))
            with told(problem, plan.schedule, bad), np.errstate(all="ignore"):
                check_cells(run(plan, first, second), rounded(relation.result(problem, first, second), "float32"))


@pytest.mark.usefixtures("_small")
def test_zeros_are_positive():
    """Products that underflow to -0.0 give +0.0, with and without a bias of zeros."""
    for operation, module in EVERY.items():
        problem = Problem(operation, 1, 16, 16, (AXES[0], AXES[1], AXES[0]), np.dtype(np.float32), "NDHWC")
        shapes = relation.shapes(problem)
        first, second = np.full(shapes[0], 1e-30, np.float32), np.full(shapes[1], -1e-30, np.float32)
        for schedule in module.candidates(problem)[::5]:
            for bias in (None, np.zeros(16, np.float32))[: 1 + (operation in MODULES)]:
                y = run(plan_of(problem, schedule), first, second, bias)
                assert not np.signbit(y).any()
                assert (y == 0).all()
                assert math.prod(y.shape) == math.prod(shapes[2])
