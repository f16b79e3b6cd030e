"""The filter's gradient in shares of the rows: exact, in parts too, and no setting of workers changes a bit."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import relation
from oracle import rounded, same_bits
from test_lowerings import told
from test_relation import LAYOUTS, operands, run

from gemmconv.lowerings import gradient, products
from gemmconv.lowerings.boxes import Cut
from gemmconv.machine import Machine
from gemmconv.plan import make_plan
from gemmconv.problem import Axis, Problem

MACHINE = Machine(2, 1 << 14, 1 << 20)
AXES = [Axis(5, 5, 3, 1, 1, 1), Axis(4, 8, 2, 2), Axis(3, 6, 4, 2, 1, 1), Axis(7, 9, 3, 1, 2, 1), Axis(1, 1, 1)]


def plans(rng, dtype, workers=2):
    """Yield random problems with plans in every number of shares that their rows allow."""
    while True:
        axes = tuple(AXES[i] for i in rng.integers(len(AXES), size=3))
        groups = int(rng.choice([1, 1, 2]))
        cin, cout = (int(n) for n in rng.choice([1, 3, 8, 17], 2))
        layout = str(rng.choice(LAYOUTS))
        problem = Problem(
            "conv3d_backprop_filter", int(rng.integers(1, 4)), cin, cout, axes, np.dtype(dtype), layout, groups
        )
        plan = make_plan.__wrapped__(problem, MACHINE, "im2col", workers)
        if plan.schedule is None or plan.schedule.problem.groups != groups:
            continue
        cuts = gradient.row_cuts(plan.schedule.problem, plan.schedule.axes, 4)
        grid = gradient.grid_values(
            plan.schedule.axes, [cut.longest for cut in cuts[1:]], problem.kernel, problem.axes[2].stride
        )
        for shares in range(1, 1 + min(5, math.prod(map(len, cuts)))):
            grid_values = cuts[0].longest * grid * plan.schedule.problem.cout
            cut = dataclasses.replace(plan.schedule, cuts=cuts, grid=grid_values, shares=shares)
            yield problem, dataclasses.replace(plan, schedule=cut)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_definitions_bits(dtype):
    """Whole numbers; a share has some of the rows, and all of them the result."""
    rng = np.random.default_rng([1, *map(ord, dtype)])
    several = 0
    for problem, plan in itertools.islice(plans(rng, dtype), 150):
        first, second, _ = operands(rng, problem, largest=5)
        with told(problem, plan.schedule):
            assert same_bits(run(plan, first, second), rounded(relation.result(problem, first, second, None), dtype))
        several += plan.schedule.shares > 1
        assert (
            plan.shared_bytes
            == (plan.schedule.shares > 1) * plan.schedule.shares * math.prod(plan.output_shape) * problem.dtype.itemsize
        )
    assert several > 60


@pytest.fixture
def _small(monkeypatch):
    """Say that BLAS does not pack small products, whatever it does."""
    monkeypatch.setattr(products, "small_products", lambda: 100**3)
    products.tile.cache_clear()
    yield
    products.tile.cache_clear()


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("layout", "small"), [("NDHWC", False), ("NDHWC", True), ("NCDHW", False)], ids=["gemm", "small", "channels first"]
)
@pytest.mark.parametrize(
    ("groups", "cin", "parts", "direct"),
    [(1, 8, 1, True), (1, 96, 2, False), (1, 128, 2, True), (2, 17, 1, False), (2, 96, 1, True), (2, 96, 2, False)],
)
def test_sums_in_short_runs_are_formed_elsewhere(groups, cin, parts, direct, layout, small):
    """Runs of fewer than 64 channels with others between them, in the rows of the result; whole numbers."""
    axes = Axis(3, 6, 3, 2, 1, 0), Axis(4, 4, 3, 1, 1, 1), Axis(5, 10, 2, 2)
    problem = Problem("conv3d_backprop_filter", 2, cin, 6, axes, np.dtype(np.float32), layout, groups)
    plan = make_plan.__wrapped__(problem, MACHINE, "im2col", 2)
    cut = dataclasses.replace(plan.schedule, channels=Cut(cin, -(-cin // parts)), unpacked=small)
    assert (cut.problem.groups, cut.direct) == (groups, direct)
    first, second, _ = operands(np.random.default_rng(5), problem, largest=5)
    want = rounded(relation.result(problem, first, second, None), "float32")
    for workers in (1, 2):
        assert same_bits(run(dataclasses.replace(plan, schedule=cut, workers=workers), first, second), want)


def test_workers_change_no_bit():
    rng = np.random.default_rng(2)
    for problem, plan in itertools.islice(plans(rng, "float32"), 60):
        first, second = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem)[:2])
        found = [dataclasses.replace(plan, workers=workers)(first, second) for workers in (1, 2)]
        with told(problem, plan.schedule):
            assert same_bits(*found)


def test_parts_on_the_cuts_have_the_bits_of_the_whole():
    rng = np.random.default_rng(3)
    several = 0
    for problem, plan in itertools.islice(plans(rng, "float32"), 80):
        first, second = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem)[:2])
        whole = plan(first, second)
        box = []
        for at in plan.cuts:
            start, stop = sorted(rng.choice(len(at), 2, replace=False))
            box.append((at[start], at[stop]))
        part = plan.part(box)
        several += plan.schedule.shares > 1 and part.output_shape != whole.shape
        with told(problem, plan.schedule, box):
            assert part.on_blocks
            assert same_bits(part(first[part.windows[0]].copy(), second[part.windows[1]].copy()), whole[part.box])
    assert several > 10


def test_a_single_value_has_the_bits_of_the_whole():
    """Shares are added one after the other, whatever the shape of the part."""
    problem = Problem("conv3d_backprop_filter", 1, 1, 1, (Axis(20, 20, 1),) * 3, np.dtype(np.float32), "NDHWC", 2)
    plan = make_plan.__wrapped__(problem, MACHINE, "im2col", 2)
    schedule = plan.schedule
    cuts = gradient.row_cuts(schedule.problem, schedule.axes, 400)
    plan = dataclasses.replace(plan, schedule=dataclasses.replace(schedule, cuts=cuts, shares=8))
    for seed in range(6):
        rng = np.random.default_rng([4, seed])
        first, second = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem)[:2])
        whole = plan(first, second)
        for group in range(2):
            part = plan.part([(0, 1)] * 4 + [(group, group + 1)])
            assert part.on_blocks
            assert same_bits(part(first[part.windows[0]], second[part.windows[1]]), whole[part.box])


def test_a_large_gradient_is_formed_at_once():
    """Shares that would take more than a bound are not weighed, nor those of halves: their sums are elsewhere."""
    axes = Axis(16, 16, 3, 1, 1, 1), Axis(16, 16, 3, 1, 1, 1), Axis(16, 16, 3, 1, 1, 1)
    small = Problem("conv3d_backprop_filter", 1, 4, 4, axes, np.dtype(np.float32), "NDHWC")
    assert gradient.schedule(small, Machine(2, 1 << 20, 1 << 24)).shares > 1
    for change in ({"cin": 512, "cout": 512}, {"dtype": np.dtype(np.float16)}):
        assert gradient.schedule(dataclasses.replace(small, **change), Machine(2, 1 << 20, 1 << 24)).shares == 1
