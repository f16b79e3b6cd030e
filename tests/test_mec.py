"""MEC: every order of the axes, groups together, cut and way to add taps, whatever the BLAS and the cost model.

Whole numbers have one result in any order of summation.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import relation
from oracle import rounded, same_bits
from test_lowerings import UNIT, check_cells, told
from test_relation import LAYOUTS, ONE, operands, run
from test_winograd import AXES, MACHINE, _buffer, check_blocks, plan_of  # noqa: F401  one is a fixture

from gemmconv import running
from gemmconv.lowerings import CannotLowerError, base, mec, mec_gradient, products
from gemmconv.machine import Machine
from gemmconv.plan import make_plan
from gemmconv.problem import Axis, Problem

TWO = ("conv3d_transpose", "conv3d")
GROUPS = [(1, 3, 2), (2, 3, 4), (4, 4, 4), (3, 1, 2), (6, 2, 1), (8, 1, 1), (2, 17, 16)]


@pytest.fixture(params=[3000, 1_000_000])
def _small(request, monkeypatch):
    """Set the largest product that BLAS is said not to pack: lines are in several tiles, or in one."""
    monkeypatch.setattr(mec, "small_products", lambda: request.param)
    monkeypatch.setattr(mec, "_POSITIONS", (4, 256))  # blocks of one line in which some slots are, and others are not
    monkeypatch.setattr(mec_gradient, "_RESULTS", request.param // 100)
    monkeypatch.setattr(products, "small_products", lambda: request.param)
    products.tile.cache_clear()
    yield
    products.tile.cache_clear()


def drawn_problem(rng, operation, dtype="float32", layout="NDHWC", several=False):
    axes = tuple(AXES[i] for i in rng.integers(len(AXES), size=3))
    groups, cin, cout = GROUPS[rng.integers(several, len(GROUPS))]
    return Problem(operation, int(rng.integers(1, 3)), cin, cout, axes, np.dtype(dtype), layout, groups)


def several_of(rng, problem, most):
    """Return some schedules of a problem."""
    found = mec.candidates(problem)
    return [found[i] for i in rng.permutation(len(found))[:most]]


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "complex64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", TWO)
def test_random_choices_give_the_oracles_bits(operation, layout, dtype):
    """Random problems, some of their schedules each, with and without a bias."""
    rng = np.random.default_rng([1, *map(ord, operation + layout + dtype)])
    seen = {name: set() for name in ("taken", "split", "together", "blocks", "tiles", "adds", "stacked")}
    for _ in range(12):
        problem = drawn_problem(rng, operation, dtype, layout)
        first, second, bias = operands(rng, problem, largest=2 if problem.dtype.itemsize == 2 else 5)
        want = rounded(relation.result(problem, first, second, bias), dtype)
        for schedule in several_of(rng, problem, 3):
            sizes = schedule.sizes(*(cut.longest for cut in schedule.cuts))
            seen["taken"].add(schedule.taken)
            seen["split"].add(schedule.split)
            seen["together"].add(schedule.own_groups > 1)
            seen["blocks"].add(schedule.count > problem.batch)
            seen["tiles"].add(sizes.row > schedule.tile)
            seen["adds"].add(schedule.adds)
            seen["stacked"].add(schedule.stacked > 1)
            with told(problem, schedule):
                assert same_bits(run(plan_of(problem, schedule), first, second, bias), want)
    assert all(len(found) == 2 for name, found in seen.items() if name != "tiles"), seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", [*TWO, "conv3d_backprop_filter"])
def test_stacked_results_have_the_oracles_bits(operation, layout):
    """As many rows as there are ways, of every axis: results that end within a stack, taps that meet few positions."""
    rng = np.random.default_rng([13, *map(ord, operation + layout)])
    axes = [axis for axis in (*AXES, Axis(3, 10, 2, 4, 1, 1), Axis(7, 7, 1, 1, 1, 0)) if axis.dilation == 1]
    seen = set()
    for stacked, (groups, cin, cout) in itertools.product(axes, [(3, 1, 1), (2, 2, 1), (2, 1, 2), (1, 1, 2)]):
        problem = Problem(operation, 2, cin, cout, (ONE, stacked, AXES[0]), np.dtype(np.float32), layout, groups)
        first, second, bias = operands(rng, problem, biased=operation in TWO)
        want = rounded(relation.result(problem, first, second, bias), "float32")
        found = mec.candidates(problem) if operation in TWO else mec_gradient.schedules(problem)
        every = [(s, s if operation in TWO else s.of) for s in found]
        for schedule, of in [(s, of) for s, of in every if of.stacked > 1 and of.taken == (0, 1, 2)][::5]:
            seen.add((of.stacked, of.along[1].results % of.stacked > 0, of.along[1].step > 1))
            with told(problem, schedule):
                assert same_bits(run(plan_of(problem, schedule), first, second, bias), want)
    assert {rows for rows, *_ in seen} == {2, 3, 4}
    assert {ends for _, ends, _ in seen} == {False, True}
    assert {apart for *_, apart in seen} == ({False, True} if operation == "conv3d_transpose" else {True})


def test_what_is_stacked():
    """Results of few channels, up to four rows; of a transposed convolution whole strides; none of dilated axes."""

    def rows(operation, channels, axis):
        cin, cout = (5, channels) if operation == "conv3d_transpose" else (channels, 5)
        problem = Problem(operation, 1, cin, cout, (ONE, axis, AXES[0]), np.dtype(np.float32), "NDHWC", 2)
        return {schedule.stacked for schedule in mec.candidates(problem) if schedule.taken == (0, 1, 2)}

    two, apart = Axis(8, 16, 4, 2, 1, 1), Axis(8, 8, 3, 1, 2, 2)
    assert [rows("conv3d", n, two) for n in (1, 2, 3)] == [{1, 2, 3, 4}, {1, 2}, {1}]
    assert [rows("conv3d_transpose", n, two) for n in (1, 2, 3)] == [{1, 2, 4}, {1, 2}, {1}]
    assert [rows(operation, 1, apart) for operation in TWO] == [{1}, {1}]
    assert rows("conv3d", 1, Axis(2, 4, 4, 2, 1, 1)) == {1, 2}  # no more than there are results
    far = Axis(3, 200_000_001, 1, 100_000_000, 1, 0)
    assert [rows(operation, 1, far) for operation in TWO] == [{1}, {1}]


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "complex64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_the_oracles_bits(layout, dtype):
    """Random problems, some of their schedules each; those of several batch entries, blocks and pieces among them."""
    rng = np.random.default_rng([8, *map(ord, layout + dtype)])
    seen = {name: set() for name in ("taken", "split", "together", "blocks", "pieces", "stacked")}
    for _ in range(12):
        problem = drawn_problem(rng, "conv3d_backprop_filter", dtype, layout)
        first, second, _ = operands(rng, problem, largest=1 if problem.dtype.itemsize == 2 else 5, biased=False)
        want = rounded(relation.result(problem, first, second), dtype)
        found = mec_gradient.schedules(problem)
        for schedule in [found[i] for i in rng.permutation(len(found))[:3]]:
            seen["taken"].add(schedule.of.taken)
            seen["split"].add(schedule.of.split)
            seen["together"].add(schedule.own_groups > 1)
            seen["blocks"].add(schedule.of.count > problem.batch)
            seen["pieces"].add(schedule.pieces(schedule.of.deep) > 1)
            seen["stacked"].add(schedule.of.stacked > 1)
            with told(problem, schedule):
                assert same_bits(run(plan_of(problem, schedule), first, second), want)
    assert all(len(found) == 2 for name, found in seen.items() if name != "pieces"), seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_taps_that_meet_nothing(layout):
    """Are 0 in a gradient, whatever was in the memory, and give zeros or the bias in results."""
    rng = np.random.default_rng(11)
    axes = Axis(3, 4, 5, 1, 3, 1), Axis(4, 4, 3, 1, 1, 1), Axis(3, 3, 4, 2, 2, -1)
    for operation in (*TWO, "conv3d_backprop_filter"):
        problem = Problem(operation, 1, 2, 3, axes, np.dtype(np.float32), layout, 4)
        first, second, bias = operands(rng, problem, biased=operation in TWO)
        want = rounded(relation.result(problem, first, second, bias), "float32")
        found = mec.candidates(problem) if operation in TWO else mec_gradient.schedules(problem)
        for schedule in found[::9]:
            out = np.full(want.shape, 77, np.float32)
            plan = plan_of(problem, schedule)
            assert same_bits(plan.execute("asked", first, second, out, bias=bias), want)


def test_single_channels_are_no_vectors():
    """NumPy would form products of a vector otherwise, with bits that depend on the steps between its values."""
    problem = Problem("conv3d", 1, 1, 1, (AXES[0], AXES[1], AXES[2]), np.dtype(np.float32), "NDHWC", 6)
    assert {schedule.rows for schedule in mec.candidates(problem)} == {2, 3, 4}
    gradient = dataclasses.replace(problem, operation="conv3d_backprop_filter")
    assert {schedule.of.rows for schedule in mec_gradient.schedules(gradient)} == {2, 3, 4}


def test_what_is_not_weighed():
    """More phases than 64; pieces of a gradient of more channels than a product that is not packed has results."""
    many = Problem("conv3d_transpose", 1, 2, 2, (ONE, Axis(3, 27, 9, 9, 1, 0), Axis(3, 27, 9, 9, 1, 0)),
                   np.dtype(np.float32), "NDHWC", 4)  # fmt: skip
    with pytest.raises(CannotLowerError, match="its result has more than 64 phases; 'col2im' and 'auto' can"):
        mec.schedule(many, MACHINE)
    wide = Problem("conv3d_backprop_filter", 1, 1040, 4, (ONE, AXES[0], AXES[0]), np.dtype(np.float32), "NDHWC", 2)
    (one, *_) = mec_gradient.schedules(wide)
    assert [one.pieces(k) for k in (1, 36, 521)] == [1, 1, 1]
    first, second, _ = operands(np.random.default_rng(12), wide, biased=False)
    assert same_bits(run(plan_of(wide, one), first, second), rounded(relation.result(wide, first, second), "float32"))


def test_gradients_of_groups_are_parts():
    """Single groups from windows of both operands have the bits of the whole; more workers change none."""
    rng = np.random.default_rng(9)
    looked_at = 0
    for _ in range(12):
        problem = drawn_problem(rng, "conv3d_backprop_filter", several=True)
        found = mec_gradient.schedules(problem)
        schedule = found[rng.integers(len(found))]
        plan = plan_of(problem, schedule)
        first, second = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem)[:2])
        whole = plan(first, second)
        assert same_bits(plan_of(problem, schedule, workers=1)(first, second), whole)
        each = schedule.problem.cin
        for group in range(schedule.problem.groups):
            part = plan.part([(0, size) for size in plan.output_shape[:4]] + [(group * each, (group + 1) * each)])
            with told(problem, schedule, group):
                assert part.on_blocks
                assert same_bits(part(first[part.windows[0]], second[part.windows[1]]), whole[part.box])
                looked_at += schedule.problem.groups > 1
    assert looked_at > 5


def test_gradients_of_what_is_not_finite():
    """Zeros between lines would spread it, so another lowering does it."""
    rng = np.random.default_rng(10)
    for _ in range(12):
        problem = drawn_problem(rng, "conv3d_backprop_filter", several=True)
        found = mec_gradient.schedules(problem)
        plan = plan_of(problem, found[rng.integers(len(found))])
        for bad in (np.inf, np.nan):
            first, second, _ = operands(rng, problem, largest=2, biased=False)
            array = (first, second)[rng.integers(2)]
            array[tuple(rng.integers(array.shape))] = bad
            with told(problem, plan.schedule, bad), np.errstate(all="raise"):
                check_cells(run(plan, first, second), rounded(relation.result(problem, first, second), "float32"))


def test_tiles_are_what_blas_does_not_pack(monkeypatch):
    """All positions, or as many as fit, in multiples of its vectors; where it packs all, products may have threads."""
    problem = Problem("conv3d", 1, 4, 4, (Axis(6, 6, 3, 1, 1, 1), Axis(20, 20, 3, 1, 1, 1), Axis(30, 30, 3, 1, 1, 1)),
                      np.dtype(np.float32), "NDHWC", 8)  # fmt: skip
    (found,) = (s for s in mec.candidates(problem) if (s.own_groups, s.taken, s.split) == (8, (0, 1, 2), False)
                and [len(cut) for cut in s.cuts] == [1, 1])  # fmt: skip
    for most, tile in ((1_000_000, 512), (30_000, 48), (2000, 16), (0, 512)):
        monkeypatch.setattr(mec, "small_products", lambda most=most: most)
        monkeypatch.setattr(products, "small_products", lambda most=most: most)
        fresh = mec.Mec(found.problem, found.own_groups, found.taken, found.along, found.cuts, found.split)
        assert fresh.tile == tile
        assert fresh.sizes(6, 20).row % fresh.tile == 0 or fresh.sizes(6, 20).row < 2 * fresh.tile * 20
        fits = 0 < 4 * 108 * tile <= most
        assert fresh.largest_product == (1 if fits else 4 * 108 * tile)


@pytest.mark.usefixtures("_buffer")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", TWO)
def test_blocks_write_what_their_digits_say(operation, layout):
    """Those of random problems that do all groups at once, with several blocks."""
    rng = np.random.default_rng([2, *map(ord, operation + layout)])
    looked_at = 0
    while looked_at < 14:
        problem = drawn_problem(rng, operation, layout=layout)
        schedules = [s for s in several_of(rng, problem, 40) if s.own_groups == problem.groups and s.count > 1]
        for schedule in schedules[:2]:
            looked_at += 1
            check_blocks(rng, problem, schedule)


class Watched:
    """NumPy, with copies from an array whose memory is watched: none may begin in it and end elsewhere."""

    def __init__(self):
        self.memory = None
        self.within = 0

    def __getattr__(self, name):
        return getattr(np, name)

    def copyto(self, to, source, **extra):
        if self.memory is not None and isinstance(source, np.ndarray) and source.size:
            (low, high), (start, stop) = (np.lib.array_utils.byte_bounds(array) for array in (self.memory, source))
            if start < high and low < stop:
                assert low <= start
                assert stop <= high
                self.within += 1
        np.copyto(to, source, **extra)


@pytest.fixture(name="watched")
def _watched(monkeypatch):
    """Watch the copies of blocks of a few lines."""
    watched = Watched()
    monkeypatch.setattr(mec, "np", watched)
    monkeypatch.setattr(mec, "_POSITIONS", (4, 256))
    return watched


def check_parts(rng, problem, schedule, watched, most):
    """Check that some blocks have the bits of the whole, from windows that hold all that is read; return how many."""
    plan = plan_of(problem, schedule)
    along = (0, *(1 + i for i in base.order(problem.axes)), 4)
    first, second = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem)[:2])
    whole = plan(first, second)
    channels = plan.output_shape[4] // schedule.problem.groups
    looked_at = 0
    for index, values in enumerate(itertools.product(*schedule.digits)):
        group = int(rng.integers(schedule.problem.groups))
        box = [(0, size) for size in plan.output_shape[:4]] + [(group * channels, (group + 1) * channels)]
        for axis, span in itertools.chain(*values):
            box[along[axis]] = span
        if index >= most or any(start >= stop for start, stop in box):
            continue
        looked_at += 1
        part = plan.part(box)
        with told(problem, schedule, index):
            assert part.on_blocks
            watched.memory = first[part.windows[0]].copy()
            assert same_bits(part(watched.memory, second[part.windows[1]]), whole[part.box])
            watched.memory = None
    return looked_at


@pytest.mark.parametrize("operation", TWO)
def test_blocks_as_parts(operation, watched):
    """Of random problems, behind paddings of several strides too."""
    rng = np.random.default_rng([6, *map(ord, operation)])
    looked_at = 0
    while looked_at < 100:
        problem = drawn_problem(rng, operation, several=True)
        if rng.integers(2):
            axes = list(problem.axes)
            axes[rng.integers(3)] = Axis(7, 14, 9, 2, 1, 4)
            problem = dataclasses.replace(problem, axes=tuple(axes))
        for schedule in several_of(rng, problem, 2):
            looked_at += check_parts(rng, problem, schedule, watched, 4)
    assert watched.within >= looked_at


@pytest.mark.parametrize("operation", TWO)
def test_stacked_blocks_as_parts(operation, watched):
    """They read whole steps of the operand, where there are some behind what the last results need too."""
    rng = np.random.default_rng([14, *map(ord, operation)])
    looked_at = 0
    for axis in (Axis(30, 30, 3, 1, 1, 1), Axis(5, 40, 3, 1, 1, 0), Axis(40, 5, 3, 1, 1, 0), Axis(9, 40, 4, 2, 1, 1)):
        problem = Problem(operation, 1, 1, 1, (ONE, axis, AXES[0]), np.dtype(np.float32), "NDHWC", 2)
        stacked = [s for s in mec.candidates(problem) if s.stacked > 1 and s.taken == (0, 1, 2) and len(s.cuts[1]) > 1]
        for schedule in stacked:
            looked_at += check_parts(rng, problem, schedule, watched, 100)
    assert looked_at > 100
    assert watched.within > looked_at


@pytest.mark.parametrize("operation", TWO)
def test_what_is_not_finite_stays_where_it_belongs(operation):
    """In a value also between lines; a filter with Inf or NaN is left to another lowering."""
    rng = np.random.default_rng(4)
    for _ in range(30):
        problem = drawn_problem(rng, operation, several=True)
        (schedule,) = several_of(rng, problem, 1)
        plan = plan_of(problem, schedule)
        for bad in (np.inf, -np.inf, np.nan):
            first, second, _ = operands(rng, problem, largest=2, biased=False)
            array = (first, second)[rng.integers(2)]
            array[tuple(rng.integers(array.shape))] = bad
            with told(problem, schedule, bad), np.errstate(all="raise"):
                check_cells(run(plan, first, second), rounded(relation.result(problem, first, second), "float32"))


@pytest.mark.parametrize("operation", TWO)
def test_zeros_are_positive(operation):
    """Products that underflow to -0.0 give +0.0, with and without a bias of zeros."""
    for channels in (4, 1):
        problem = Problem(
            operation, 1, channels, channels, (AXES[0], AXES[1], AXES[0]), np.dtype(np.float32), "NDHWC", 3
        )
        shapes = relation.shapes(problem)
        first, second = np.full(shapes[0], 1e-30, np.float32), np.full(shapes[1], -1e-30, np.float32)
        found = mec.candidates(problem)[::5]
        assert any(schedule.stacked > 1 for schedule in found) == (channels == 1)
        for schedule, bias in itertools.product(found, (None, np.zeros(3 * channels, np.float32))):
            y = run(plan_of(problem, schedule), first, second, bias)
            assert not np.signbit(y).any()
            assert (y == 0).all()


@pytest.mark.parametrize("operation", TWO)
def test_rounding(operation):
    """Normal data: within the rounding of a direct sum, as test_lowerings.test_rounding_of_normal_data argues."""
    rng = np.random.default_rng(3)
    axes = Axis(8, 8, 3, 1, 1, 1), Axis(7, 14, 4, 2, 1, 1), Axis(6, 11, 3, 2, 1, 1)
    for channels in (16, 1):
        problem = Problem(operation, 1, channels, channels, axes, np.dtype(np.float32), "NDHWC", 4)
        first, second = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem)[:2])
        exact = relation.result(problem, first, second)
        most = relation.result(problem, np.abs(first), np.abs(second))
        terms = relation.result(problem, np.ones_like(first), np.ones_like(second))
        for schedule in mec.candidates(problem)[::7]:
            error = np.abs(run(plan_of(problem, schedule), first, second) - exact)
            few = channels == 1  # terms: no more than the worst case, as errors do not cancel
            assert (error <= (terms if few else np.sqrt(terms)) * UNIT * most * (1 + few * 1e-6)).all()


@pytest.mark.parametrize("operation", TWO)
def test_stacked_results_that_are_not_finite(operation, monkeypatch):
    """Zeros meet values, so another lowering does those; a bias of Inf does not matter. Twice, as steps are kept."""
    rng = np.random.default_rng(15)
    problem = Problem(operation, 1, 1, 1, (ONE, AXES[0], AXES[0]), np.dtype(np.float32), "NDHWC", 3)
    gave_way = []
    complete = running._complete
    monkeypatch.setattr(running, "_complete", lambda *asked: gave_way.append(asked) or complete(*asked))
    for schedule in [s for s in mec.candidates(problem) if s.stacked > 1][::4]:
        first, second, _ = operands(rng, problem, largest=2, biased=False)
        bias = np.array([-np.inf, 1, 2], np.float32)
        plan = plan_of(problem, schedule)
        for bad in (1, np.nan, 1, np.inf):
            first[0, 0, 2, 2, 1] = bad
            gave_way.clear()
            with told(problem, schedule, bad), np.errstate(all="raise"):
                want = rounded(relation.result(problem, first, second, bias), "float32")
                check_cells(run(plan, first, second, bias), want)
                assert bool(gave_way) == (not np.isfinite(bad))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiny_groups_are_done_by_it(layout):
    """Where BLAS has products that it does not pack; without groups it is weighed, but depthwise is not."""
    three = Axis(8, 8, 3, 1, 1, 1), Axis(28, 28, 3, 1, 1, 1), Axis(28, 28, 3, 1, 1, 1)
    problem = Problem("conv3d_transpose", 1, 4, 4, three, np.dtype(np.float32), layout, 32)
    plan = make_plan.__wrapped__(problem, Machine(2, 1 << 20, 1 << 25), "auto", 2)
    assert set(dict(plan.estimates)) == {"col2im", "kn2row", "winograd", "mec", "depthwise"}
    gradient = dataclasses.replace(problem, operation="conv3d_backprop_filter")
    if products.unpacked(problem):
        assert plan.algorithm == "mec"
        assert make_plan.__wrapped__(gradient, MACHINE, "auto", 2).algorithm == "mec"
    single = Problem("conv3d_transpose", 1, 4, 4, (ONE, *three[1:]), np.dtype(np.float32), layout)
    estimates = dict(make_plan.__wrapped__(single, MACHINE, "auto", 2).estimates)
    assert set(estimates) == {"col2im", "kn2row", "winograd", "mec"}
