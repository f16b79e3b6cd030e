"""col2im where columns are the output: exact, its blocks and parts, and what it leaves to other orders of work."""

import dataclasses
import itertools

import numpy as np
import pytest
import relation
from oracle import integers, rounded, same_bits
from test_lowerings import told
from test_relation import operands, run

from gemmconv.lowerings import CannotLowerError, base, in_place, products
from gemmconv.machine import Machine
from gemmconv.plan import make_plan
from gemmconv.problem import Axis, Problem

pytestmark = pytest.mark.usefixtures("_small")

# Blocks of one line, of some, and of all.
CACHES = (1 << 8, 1 << 13, 1 << 20)


def tiled(size, stride):
    """Return an axis whose taps fill the output side by side."""
    return Axis(size, size * stride, stride, stride)


def drawn_problem(rng, dtype="float32"):
    axes = tuple(tiled(int(rng.integers(1, 8)), int(rng.integers(1, 4))) for _ in range(3))
    cin, cout = int(rng.choice([1, 3, 16, 33])), int(rng.choice([8, 16, 32, 48]))
    return Problem("conv3d_transpose", int(rng.integers(1, 4)), cin, cout, axes, np.dtype(dtype), "NDHWC")


def plans(problem, workers=2):
    """Yield plans in place, as on machines with other caches; none where width has too few lanes or positions."""
    for l2_bytes in CACHES:
        machine = Machine(2, l2_bytes, 1 << 25)
        try:
            schedule = in_place.schedule(problem, machine)
        except CannotLowerError:
            return
        yield dataclasses.replace(make_plan.__wrapped__(problem, machine, "col2im", workers), schedule=schedule)


@pytest.fixture(params=[6000, 1_000_000])
def _small(request, monkeypatch):
    """Set the largest product that BLAS is said not to pack, so that lines are cut in pieces or not."""
    monkeypatch.setattr(products, "small_products", lambda: request.param)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_definitions_bits(dtype):
    """Random problems with and without a bias, in blocks of every size; each block writes what its digits say."""
    rng = np.random.default_rng([1, *map(ord, dtype)])
    counts = []
    while len(counts) < 60:
        problem = drawn_problem(rng, dtype)
        value, filter, bias = operands(rng, problem, largest=5)
        want = rounded(relation.result(problem, value, filter, bias), dtype)
        for plan in plans(problem):
            counts.append(plan.blocks)
            with told(problem, plan.schedule):
                assert same_bits(run(plan, value, filter, bias), want)
    assert 1 in counts
    assert max(counts) > 20


def test_parts_have_the_bits_of_the_whole():
    """Boxes on the cuts, of windows that hold nothing but what they need."""
    rng = np.random.default_rng(2)
    done = 0
    while done < 60:
        problem = drawn_problem(rng)
        value, filter = (rng.standard_normal(s, np.float32) for s in (problem.coarse_shape, problem.filter_shape))
        for plan in plans(problem):
            whole, along = plan(value, filter), (0, *(1 + i for i in base.order(problem.axes)), 4)
            for values in itertools.islice(itertools.product(*plan.schedule.digits), 0, None, 3):
                box = [(0, size) for size in plan.output_shape]
                for axis, span in itertools.chain(*values):
                    box[along[axis]] = span
                part = plan.part(box)
                done += plan.blocks > 1
                with told(problem, plan.schedule, box):
                    assert part.on_blocks
                    windows = value[part.windows[0]].copy(), filter[part.windows[1]].copy()
                    assert same_bits(part(*windows), whole[part.box])


def test_nan_inf_and_small_numbers():
    """What is not finite stays with its row; products that underflow from below give +0.0."""
    problem = Problem("conv3d_transpose", 1, 4, 16, (tiled(3, 2),) * 3, np.dtype(np.float32), "NDHWC")
    rng = np.random.default_rng(3)
    value, filter = (integers(rng, s, "float32").copy() for s in (problem.coarse_shape, problem.filter_shape))
    looked_at = 0
    for plan in plans(problem):
        looked_at += 1
        clean, hit = plan(value, filter), value.copy()
        hit[0, 1, 1, 1, 2] = np.nan
        result = plan(hit, filter)
        assert np.isnan(result[0, 2:4, 2:4, 2:4]).all()
        result[0, 2:4, 2:4, 2:4] = clean[0, 2:4, 2:4, 2:4]
        assert same_bits(result, clean)
        small = plan(np.full_like(value, 1e-30), np.full_like(filter, -1e-30))
        assert same_bits(small, np.zeros_like(small))
    assert looked_at == len(CACHES)


@pytest.mark.parametrize(
    "change",
    [
        {"axes": (tiled(3, 2), tiled(3, 2), Axis(3, 7, 3, 2, 1, 0))},
        {"axes": (tiled(3, 2), tiled(3, 2), Axis(3, 5, 2, 2, 1, 0))},
        {"axes": (tiled(3, 2), tiled(3, 2), Axis(3, 6, 2, 2, 1, 1))},
        {"axes": (tiled(3, 2), tiled(3, 2), Axis(3, 7, 2, 2, 2, 0))},
        {"layout": "NCDHW"},
        {"dtype": np.dtype(np.float16)},
        {"dtype": np.dtype(np.complex64)},
        {"cout": 3},
        {"groups": 2},
    ],
    ids=["overlaps", "cut off", "begins later", "dilated", "layout", "half", "complex", "few lanes", "groups"],
)
def test_others_are_left_to_other_orders(change):
    problem = Problem("conv3d_transpose", 1, 4, 16, (tiled(3, 2),) * 3, np.dtype(np.float32), "NDHWC")
    assert in_place.schedule(problem, Machine(2, 1 << 20, 1 << 25)).count == 1
    with pytest.raises(CannotLowerError):
        in_place.schedule(dataclasses.replace(problem, **change), Machine(2, 1 << 20, 1 << 25))
