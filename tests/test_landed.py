"""Products of just the rows that land or lie inside, shares of the taps, and the order of blocks of unlike sizes."""

import dataclasses

import numpy as np
import pytest
import relation
from oracle import rounded, same_bits
from test_lowerings import told
from test_relation import operands, run
from test_winograd import MACHINE, _buffer, _known, check_blocks, plan_of  # noqa: F401  two are fixtures

from gemmconv import blas, running
from gemmconv.lowerings import by_planes, by_rows, by_taps, columns, copies, im2col, landed, products
from gemmconv.lowerings.boxes import Cut
from gemmconv.plan import make_plan
from gemmconv.problem import Axis, Problem

# Axes with a border on either side, both and none, taps that reach nothing, and strides and dilations.
AXES = [
    Axis(4, 8, 4, 2, 1, 1), Axis(4, 8, 3, 2, 1, 0), Axis(5, 5, 3, 1, 1, 1), Axis(3, 3, 5, 1, 2, 4),
    Axis(6, 9, 2, 1, 3, -1), Axis(4, 12, 3, 3, 1, 0), Axis(1, 1, 1), Axis(4, 3, 5, 1, 3, 1), Axis(3, 9, 2, 4, 1, -2),
]  # fmt: skip
CHANNELS = [(2, 3), (16, 5), (7, 32)]


def drawn_problem(rng, operation, dtype, groups=1, layout="NDHWC"):
    axes = tuple(AXES[i] for i in rng.integers(len(AXES), size=3))
    cin, cout = CHANNELS[rng.integers(len(CHANNELS))]
    return Problem(operation, int(rng.integers(1, 4)), cin, cout, axes, np.dtype(dtype), layout, groups)


@pytest.fixture(params=[True, False])
def _far(request, monkeypatch):
    """Take every filter for one that comes from memory and is worth shares, or none."""
    read = []

    def read_ahead(matrix):
        read.append(matrix.shape)
        copies.read_ahead(matrix)

    for module in (columns, landed):
        monkeypatch.setattr(module, "is_far", lambda array: request.param)
        monkeypatch.setattr(module, "read_ahead", read_ahead)
    monkeypatch.setattr(columns, "_AHEAD", 64)
    monkeypatch.setattr(im2col, "_LARGE_FILTER", 0)
    yield
    assert bool(read) == (request.param and request.node.callspec.params["dtype"] != "complex64")


@pytest.mark.usefixtures("_far", "_buffer")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_convolutions_have_the_oracles_bits(dtype, groups, monkeypatch):
    """Random problems in blocks of several sizes, with shares of the taps and without; each block by itself."""
    monkeypatch.setattr(landed, "_ROWS", (2, 9, 64))
    rng = np.random.default_rng([1, groups, *map(ord, dtype)])
    shares, blocks = set(), set()
    for _ in range(25):
        problem = drawn_problem(rng, "conv3d", dtype, groups)
        first, second, bias = operands(rng, problem)
        want = rounded(relation.result(problem, first, second, bias), dtype)
        for schedule in landed.candidates(problem):
            shares.add(schedule.shares)
            blocks.add(min(2, schedule.count // schedule.shares))
            with told(problem, schedule):
                assert same_bits(run(plan_of(problem, schedule), first, second, bias), want)
                if schedule.shares == groups == 1 and dtype == "float32":
                    check_blocks(rng, problem, schedule)
    assert shares == ({1, 2} if groups == 1 else {1})
    assert blocks == {1, 2}


def test_the_fewest_positions_that_a_tap_reaches():
    """Of every block, found one by one."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        coarse, fine, kernel, chunk = (int(n) for n in rng.integers(1, 12, size=4))
        stride, dilation, lo = (int(n) for n in rng.integers((1, 1, -9), (4, 4, 10)))
        axis, cut = Axis(coarse, fine, kernel, stride, dilation, lo), Cut(coarse, chunk)
        rows = [[(i * stride + tap * dilation - lo) in range(fine) for i in range(coarse)] for tap in range(kernel)]
        every = [sum(of_tap[start:stop]) for of_tap in rows for start, stop in cut]
        assert landed._fewest(axis, cut) <= min((n for n in every if n), default=0)
        whole = all(any(of_tap) for of_tap in rows) and len(cut) == 1
        assert not whole or landed._fewest(axis, cut) == min(every)


def test_not_finite_values_reach_what_they_reach():
    """Nothing is padded: NaN and Inf of either operand are where the definition has them."""
    rng = np.random.default_rng(2)
    axes = Axis(4, 8, 4, 2, 1, 1), Axis(5, 5, 3, 1, 1, 1), Axis(5, 5, 3, 1, 1, 1)
    problem = Problem("conv3d", 2, 8, 4, axes, np.dtype(np.float32), "NDHWC")
    for special in (np.nan, np.inf):
        first, second, _ = operands(rng, problem, biased=False)
        first[1, 0, 2, 3], second[3, 0, 1, 2, 5] = special, special
        want = rounded(relation.result(problem, first, second), "float32")
        assert 0 < np.isfinite(want).sum() < want.size
        for schedule in landed.candidates(problem):
            got = run(plan_of(problem, schedule), first, second, None)
            assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize(
    "change", [{"layout": "NCDHW"}, {"dtype": np.dtype("complex64")}, {"dtype": np.dtype("float16")}, {"cin": 1}]
)
def test_what_it_leaves_to_others(change):
    """Layouts and dtypes without such products, and products of vectors."""
    problem = Problem("conv3d", 1, 8, 4, (AXES[0],) * 3, np.dtype(np.float32), "NDHWC")
    assert landed.candidates(problem)
    assert not landed.candidates(dataclasses.replace(problem, **change))
    one = dataclasses.replace(problem, axes=(Axis(1, 3, 3),) * 3)
    assert not landed.candidates(one)


@pytest.mark.usefixtures("_far")
@pytest.mark.parametrize("layout", ["NDHWC", "NCDHW"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_gathered_rows_have_the_oracles_bits(layout, dtype, monkeypatch):
    """Transposed convolutions a tap at a time, forced to gather: every way to form the columns of few rows or many."""
    gathered, formed = [], set()

    def best(found, machine):
        gathered[:] = [schedule for schedule in found if schedule.gathers]
        return found[0]

    def told_of(name):
        was = getattr(columns.Columns, name)

        def call(self, *args, **kwargs):
            formed.add(name)
            return was(self, *args, **kwargs)

        monkeypatch.setattr(columns.Columns, name, call)

    for name in ("_form_lines", "_form_across", "_multiply"):
        told_of(name)
    monkeypatch.setattr(by_taps, "best", best)
    rng = np.random.default_rng([3, *map(ord, layout + dtype)])
    kinds = set()
    for _ in range(25):
        problem = drawn_problem(rng, "conv3d_transpose", dtype, layout=layout)
        if rng.integers(2):  # a large filter beside its few rows
            problem = dataclasses.replace(problem, batch=1, cin=256, cout=160, axes=(AXES[0], *problem.axes[1:]))
        by_taps.schedule(problem, MACHINE)
        first, second, bias = operands(rng, problem)
        want = rounded(relation.result(problem, first, second, bias), dtype)
        for i in rng.permutation(len(gathered))[:4]:
            schedule = gathered[i]
            kinds |= {("joined", schedule.joined), ("turned", schedule.turned > 0), ("blocks", schedule.count > 1)}
            with told(problem, schedule):
                assert same_bits(run(plan_of(problem, schedule), first, second, bias), want)
                if not schedule.joined:  # no row is formed in vain
                    for block in map(schedule.block, range(schedule.count)):
                        for d, h in block.pairs:
                            for step in schedule._steps(block, schedule.phases[0][d], schedule.phases[1][h]):
                                for source, *_ in step.moves:
                                    assert source[:4] == tuple(slice(0, n) for n in step.rows.sizes)
    assert {("joined", True), ("joined", False), ("blocks", True)} <= kinds
    assert (("turned", True) in kinds) == (dtype != "complex64")
    real = {"_form_lines"} | ({"_form_across"} if layout == "NDHWC" else set())
    assert formed >= {"_multiply"} | (set() if dtype == "complex64" else real)


@pytest.mark.parametrize("layout", ["NDHWC", "NCDHW"])
def test_shares_of_the_taps(layout, monkeypatch):
    """im2col adds them up, the bias once; any number of workers gives the same bits, with NaN where it belongs."""
    rng = np.random.default_rng([4, *map(ord, layout)])
    monkeypatch.setattr(im2col, "best", lambda found, machine: next(s for s in found[::-1] if s.shares > 1))
    monkeypatch.setattr(im2col, "_LARGE_FILTER", 0)
    uneven = set()
    for number in range(20):
        problem = drawn_problem(rng, "conv3d", "float32", layout=layout)
        if np.prod(problem.kernel) == 1:
            continue
        schedule = im2col.schedule(problem, MACHINE)
        first, second, bias = operands(rng, problem, biased=True)
        if number % 4 == 0:
            second.flat[rng.integers(second.size)] = np.nan
        want = rounded(relation.result(problem, first, second, bias), "float32")
        plans = [dataclasses.replace(plan_of(problem, schedule), workers=workers) for workers in (1, 2, 3)]
        for plan in plans:
            with told(problem, schedule, plan.workers):
                assert np.array_equal(run(plan, first, second, bias), want, equal_nan=True)
        first, second = (rng.standard_normal(array.shape, np.float32) for array in (first, second))
        one, *others = (run(plan, first, second, bias) for plan in plans)
        assert all(same_bits(one, other) for other in others)
        taps = [im2col._many(schedule._share(share)) for share in range(2)]
        assert sum(taps) == np.prod(problem.kernel)
        uneven.add(max(taps) / min(taps))
    assert max(uneven) <= 2


def test_shares_are_even_and_for_large_filters_of_one_group():
    """Of 27 taps 12 and 15; small filters are done sooner than a second worker begins, groups are blocks anyway."""
    axes = (Axis(1, 3, 3),) * 3
    problem = Problem("conv3d", 1, 512, 512, axes, np.dtype(np.float32), "NDHWC")
    schedule = im2col.schedule(problem, MACHINE)
    assert [im2col._many(schedule._share(share)) for share in range(schedule.shares)] == [12, 15]
    assert im2col.share_counts(problem) == [1, 2]
    for change in ({"cin": 32}, {"groups": 2}, {"batch": 256}, {"axes": (Axis(1, 1, 1),) * 3}):
        assert im2col.share_counts(dataclasses.replace(problem, **change)) == [1]


@pytest.mark.parametrize("layout", ["NDHWC", "NCDHW"])
@pytest.mark.parametrize("operation", ["conv3d_transpose", "conv3d"])
def test_a_row_beside_a_large_filter_needs_no_blas(operation, layout, monkeypatch):
    """Where NumPy reads the filter, BLAS is not held to one thread, and not called; elsewhere it is held."""
    axes = (Axis(1, 4, 4),) * 3
    problem = Problem(operation, 1, 40, 30, axes, np.dtype(np.float32), layout)
    first, second, _ = operands(np.random.default_rng(6), problem, biased=False)
    want = rounded(relation.result(problem, first, second), "float32")
    products_of_rows = []
    blas.Gemm(problem.dtype)  # which tests itself when it is first made
    was = blas.Gemm.__call__

    def call(self, m, n, k, *args):
        products_of_rows.append(m == 1 and blas.reads_matrix(self.dtype, n, k, args[5]))
        was(self, m, n, k, *args)

    monkeypatch.setattr(blas.Gemm, "__call__", call)
    for far in (1 << 10, 1 << 30):
        monkeypatch.setattr(blas, "_FAR", far)
        schedules = {"conv3d_transpose": by_taps.schedule, "conv3d": im2col.schedule}
        schedule = schedules[operation](problem, MACHINE)
        products_of_rows.clear()
        assert same_bits(run(plan_of(problem, schedule), first, second, None), want)
        without = far == 1 << 10 and (operation, layout) != ("conv3d", "NCDHW")
        assert products_of_rows
        assert all(products_of_rows) == without
        assert (schedule.largest_product == products.LARGEST) == without


def test_large_blocks_are_handed_out_first():
    """Each once, those of a group after those of the one before; in their order where all are alike, or many.

    A range says that they are alike, which those of several phases are not, though they write as much.
    """
    problem = Problem("conv3d", 1, 8, 4, (Axis(7, 7, 3, 1, 1, 1),) * 3, np.dtype(np.float32), "NDHWC", 2)
    schedule = im2col.schedule(problem, MACHINE)
    cuts = im2col.row_cuts(problem, problem.axes, 2 * 49)
    uneven = dataclasses.replace(schedule, cuts=cuts, shares=1)
    assert [stop - start for start, stop in cuts[1]] == [1, 2, 2, 2]
    assert list(running.largest_first(uneven)) == [2, 3, 4, 5, 6, 7, 0, 1]
    alike = dataclasses.replace(uneven, cuts=im2col.row_cuts(problem, problem.axes, 49))
    assert running.largest_first(alike) == range(14)
    many = dataclasses.replace(uneven, cuts=im2col.row_cuts(problem, problem.axes, 2))
    assert many.count > 64
    assert running.largest_first(many) == range(2 * many.count)
    phases = Problem("conv3d_transpose", 1, 64, 32, (Axis(4, 8, 3, 2, 1, 1),) * 3, np.dtype(np.float32), "NDHWC")
    assert running.largest_first(by_taps.schedule(phases, MACHINE)) == [0, 1, 2, 3]


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("module", [by_planes, by_rows])
def test_rows_of_a_large_value_are_read_ahead(module, monkeypatch):
    """Some at a time, before the products of their lines with those of the filter; each row once for a filter."""
    read = []

    def read_ahead(matrix):
        read.append(matrix.shape)
        copies.read_ahead(matrix)

    monkeypatch.setattr(columns, "read_ahead", read_ahead)
    monkeypatch.setattr(columns, "_sooner_by_lines", lambda m, n, k, *_: products.lines_fit(m, n, k))
    monkeypatch.setattr(columns, "_AHEAD", 17 * 32 * 4)
    axes = Axis(3, 6, 4, 2, 1, 1), Axis(5, 10, 4, 2, 1, 1), Axis(17, 17, 3, 1, 1, 1)
    problem = Problem("conv3d_transpose", 2, 32, 3, axes, np.dtype(np.float32), "NDHWC")
    first, second, _ = operands(np.random.default_rng(7), problem, biased=False)
    want = rounded(relation.result(problem, first, second), "float32")
    for far in (0, first.nbytes + 1):
        monkeypatch.setattr(columns, "_FAR_VALUE", far)
        read.clear()
        schedule = module.schedule(problem, MACHINE)
        assert same_bits(run(plan_of(problem, schedule), first, second, None), want)
        assert all(columns == 32 and rows <= 17 for rows, columns in read)
        assert (sum(rows for rows, _ in read) >= first.size // 32) == (far == 0)
        assert bool(read) == (far == 0)


def test_reading_ahead_takes_lines_of_any_step():
    """Of whole matrices and of some of their columns, and changes nothing; a large array is far."""
    matrix = np.arange(12 * 40, dtype=np.float32).reshape(12, 40)
    for part in (matrix, matrix[:, 3:30], matrix[::2]):
        before = part.copy()
        copies.read_ahead(part)
        assert np.array_equal(part, before)
    assert not copies.is_far(matrix)
    assert copies.is_far(np.empty(1 << 23, np.uint8))


def test_few_rows_beside_a_large_kernel_are_done_so():
    """A third of the products would be with zeros: the model sees it for both operations."""
    axes = (Axis(4, 8, 4, 2, 1, 1),) * 3
    for operation, kind in (("conv3d", "Landed"), ("conv3d_transpose", "ByTaps")):
        problem = Problem(operation, 1, 512, 256, axes, np.dtype(np.float32), "NDHWC")
        plan = make_plan(problem, MACHINE, "auto", 2)
        assert type(plan.schedule).__name__ == kind
        assert "gathered" in plan.reason or kind == "Landed"
