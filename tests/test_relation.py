"""The engine against relation.py: three operations, groups, bias, any padding, every algorithm that can do a problem.

Whole numbers have one result in any order of summation, so all algorithms must give the oracle's bits, on any machine
and any number of workers. `_no_zeros_by_luck` fills new memory with NaN and gives small problems to all workers.
"""

import dataclasses
import itertools
import math
import threading
import types

import numpy as np
import oracle
import pytest
import relation
from oracle import dtype_named, frozen, integers, rounded, same_bits
from test_lowerings import UNIT, _no_zeros_by_luck, check_cells, told  # noqa: F401  the first is a fixture
from test_random import flavoured, random_out

from gemmconv import calls
from gemmconv.lowerings import CannotLowerError, im2col, products, winograd_conv
from gemmconv.machine import Machine
from gemmconv.plan import ALGORITHMS, make_plan
from gemmconv.problem import Axis, Problem

OPERATIONS = ["conv3d_transpose", "conv3d", "conv3d_backprop_filter"]
COMPLETE = {"conv3d_transpose": "col2im", "conv3d": "im2col", "conv3d_backprop_filter": "im2col"}
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
LAYOUTS = ["NDHWC", "NCDHW"]
NARROWER = {"float32": "float16", "float64": "float32", "complex64": "float32", "complex128": "float64"}
FLAVOURS = ["plain", "plain", "fortran", "permuted", "strided", "reversed", "unaligned", "constant"]
ONE = Axis(1, 1, 1)
# No axis is empty or reaches nothing: kernel 3, 4 at stride 2, dilated, cut and open ends, kernel below the stride.
GEOMETRIES = [
    (Axis(5, 5, 3, 1, 1, 1), Axis(4, 4, 3, 1, 1, 1), Axis(6, 6, 3, 1, 1, 1)),
    (Axis(3, 6, 4, 2, 1, 1), Axis(2, 4, 4, 2, 1, 1), Axis(4, 9, 4, 2, 1, 0)),
    (Axis(4, 5, 2, 1, 3, 1), Axis(3, 4, 3, 2, 1, 2), Axis(3, 12, 2, 3, 2, -2)),
    (ONE, Axis(7, 9, 3, 1, 1, -1), Axis(6, 3, 3, 1, 1, 4)),
    (ONE, ONE, Axis(5, 11, 1, 2, 1, 0)),
    (Axis(2, 4, 2, 2), Axis(2, 4, 2, 2), Axis(3, 6, 2, 2)),
    (Axis(2, 2, 1), Axis(3, 3, 1), Axis(4, 4, 1)),
]
CHANNELS = [(1, 4, 5), (3, 1, 1), (2, 3, 5)]  # groups, cin, cout


def plans(problem, workers=1, l2_bytes=None):
    """Return the plans of all algorithms that can do a problem, by the name asked for."""
    found = {}
    for name in ALGORITHMS[problem.operation]:
        try:
            if l2_bytes is None:
                found[name] = calls.plan("asked", problem, name, workers)
            else:
                found[name] = make_plan.__wrapped__(problem, Machine(2, l2_bytes, 1 << 24), name, workers)
        except CannotLowerError:
            assert name not in ("auto", COMPLETE[problem.operation])
    return found


def drawn(rng, monkeypatch, problem, workers=1, l2_bytes=1 << 20):
    """Return plans as above whose schedules are drawn from all that are compared, whatever they cost."""
    with monkeypatch.context() as patch:
        for where in ("plan", "lowerings.cost", "lowerings.tiling"):
            patch.setattr(f"gemmconv.{where}.total_s", lambda *_: rng.random() + 0.1)
        return plans(problem, workers, l2_bytes)


def run(plan, first, second, bias=None, out=None):
    """Return what a plan gives for arrays of three spatial axes."""
    return plan.execute("asked", first, second, out, bias=bias)


def operands(rng, problem, largest=8, biased=None):
    """Return both operands and a bias or None, whole numbers in arrays that can be written to."""
    first, second, _ = (integers(rng, shape, problem.dtype, largest).copy() for shape in relation.shapes(problem))
    biased = rng.random() < 0.5 if biased is None else biased
    if not biased or problem.operation == "conv3d_backprop_filter":
        return first, second, None
    return first, second, integers(rng, channels_of_result(problem), problem.dtype, largest).copy()


def channels_of_result(problem):
    """Return how many numbers a bias has."""
    return problem.groups * (problem.cout if problem.operation == "conv3d_transpose" else problem.cin)


def without_ones(array, role, layout, rank):
    """Return an array of three spatial axes with the last `rank` of them."""
    first = 0 if role == "filter" else layout.index("D")
    return array.reshape([n for i, n in enumerate(array.shape) if not first <= i < first + 3 - rank])


def random_axis(rng, kind):
    """Return an axis: 'unit' and 'usual' as layers have them, 'any' with any padding on both sides; sizes of zero."""
    n = int(rng.choice([0, 1, 2, 3, 4, 5, 7, 11, 40], p=[0.02, 0.14, 0.14, 0.18, 0.2, 0.13, 0.1, 0.05, 0.04]))
    if kind == "one":
        return ONE
    if kind != "any":
        k, s = int(rng.integers(1, 6)), int(rng.integers(1, 3))
        k, s = (max(1, k - 2), 1) if kind == "unit" else (k, s)
        lo, hi = (int(cut) for cut in rng.integers(-(rng.random() < 0.2) * 3, k, 2))
        return Axis(n, max(0, (n - 1) * s + k - lo - hi), k, s, 1, lo)
    k = int(rng.choice([0, 1, 2, 3, 4, 5], p=[0.04, 0.2, 0.26, 0.3, 0.12, 0.08]))
    s, d = int(rng.integers(1, 5)), int(rng.choice([1, 2, 3, 4, 6]))
    lo = int(rng.choice([-40, 40]) if rng.random() < 0.03 else rng.integers(-5, 10))
    last = (n - 1) * s + oracle.extent(k, d) - lo
    return Axis(n, max(0, last + int(rng.choice([0, 0, 1, -1, -3, 4, 15]))), k, s, d, lo)


def random_channels(rng):
    """Return groups, cin and cout: one group, few groups, depthwise with and without a multiplier, zeros."""
    few, some = [1, 2, 3, 4, 5, 8], [1, 2, 3, 4, 7, 8, 9, 16, 17, 33]
    kind = rng.choice(["one", "few", "depthwise", "multiplied", "3x5", "zero"], p=[0.35, 0.22, 0.2, 0.15, 0.05, 0.03])
    if kind == "zero":
        return [int(rng.integers(1, 4)), *((0, 3), (3, 0), (0, 0))[rng.integers(3)]]
    groups, cin, cout = {
        "one": (1, rng.choice(some), rng.choice(some)),
        "few": (rng.integers(2, 6), rng.choice(few), rng.choice(few)),
        "depthwise": (rng.choice([2, 3, 8, 13, 16, 33, 64]), 1, 1),
        "multiplied": (rng.choice([2, 3, 7, 8, 16]), *rng.permuted([1, rng.integers(2, 5)])),
        "3x5": (rng.integers(2, 8), 3, 5),
    }[str(kind)]
    return [int(groups), int(cin), int(cout)]


def random_problem(rng, operation, dtype):
    """Return a small problem and its rank."""
    rank = int(rng.choice([1, 2, 3], p=[0.1, 0.2, 0.7]))
    while True:
        kinds = ["unit"] * 3 if rng.random() < 0.3 else rng.choice(["unit", "usual", "any"], 3, p=[0.2, 0.3, 0.5])
        if rng.random() < 0.15:
            kinds[rng.integers(3)] = "one"
        axes = (*[ONE] * (3 - rank), *(random_axis(rng, kind) for kind in kinds[:rank]))
        batch = int(rng.choice([0, 1, 2, 3], p=[0.02, 0.5, 0.3, 0.18]))
        groups, cin, cout = random_channels(rng)
        problem = Problem(operation, batch, cin, cout, axes, dtype, str(rng.choice(LAYOUTS)), groups)
        first, second, to = (math.prod(shape) for shape in relation.shapes(problem))
        if problem.flops < 1e6 and max(first, second, to) < 20_000:
            return problem, rank


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_oracle_is_the_definition(operation):
    """relation.py against loops over single numbers, in Python's integers."""
    rng = np.random.default_rng(600)
    several = 0
    for _ in range(400):
        problem, _ = random_problem(rng, operation, np.dtype(np.float64))
        if problem.flops > 1500:
            continue
        several += problem.groups > 1
        first, second, bias = operands(rng, problem)
        g, ci, co = problem.groups, problem.cin, problem.cout
        roles = relation.OPERATIONS[operation]
        want = np.zeros(relation.shapes(problem)[2], object)
        arrays = dict(zip(roles, (first, second, want), strict=True))
        # Views, so that writing to them writes to `want`.
        coarse, fine = (oracle.channels_last(arrays[role], problem.layout) for role in ("coarse", "fine"))
        kernel = arrays["filter"]
        positions = itertools.product(*(range(axis.coarse) for axis in problem.axes))
        taps = list(itertools.product(*(range(axis.kernel) for axis in problem.axes)))
        channels = list(itertools.product(range(problem.batch), range(g), range(ci), range(co)))
        for i, a in itertools.product(positions, taps):
            p = [x.stride * j + x.dilation * b - x.lo for x, j, b in zip(problem.axes, i, a, strict=True)]
            if any(not 0 <= j < x.fine for x, j in zip(problem.axes, p, strict=True)):
                continue
            for n, group, c, f in channels:
                at = {"coarse": (coarse, (n, *i, group * ci + c)), "fine": (fine, (n, *p, group * co + f))}
                at["filter"] = kernel, (*a, f, group * ci + c)
                (x, u), (y, v), (z, t) = (at[role] for role in roles)
                z[t] += int(x[u]) * int(y[v])
        if bias is not None:
            oracle.channels_last(want, problem.layout)[...] += bias.astype(int)
        with told(problem):
            assert same_bits(relation.result(problem, first, second, bias), want.astype(float))
    assert several > 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_oracles_agree(layout):
    """relation.py and oracle.py, which takes paddings by TensorFlow's names and knows two of the operations."""
    rng = np.random.default_rng(601)
    for _ in range(100):
        n, k, s, d = ([int(i) for i in rng.integers(1, 5, 3)] for _ in range(4))
        padding = str(rng.choice(["SAME", "VALID"]))
        ends = [oracle.reachable_sizes(*axis, padding) for axis in zip(n, k, s, d, strict=True)]
        o = [int(rng.integers(low, high + 1)) for low, high in ends]
        axes = tuple(
            Axis(*axis, oracle.low_padding(axis[0], axis[2], axis[3], axis[4], axis[1], padding))
            for axis in zip(n, o, k, s, d, strict=True)
        )
        problem = Problem("conv3d_transpose", 2, 2, 3, axes, np.dtype(float), layout)
        value, filter, _ = operands(rng, problem)
        image = integers(rng, problem.fine_shape, float)
        extra = {"strides": s, "padding": padding, "data_format": layout, "dilations": d}
        want = oracle.conv3d_transpose(value, filter, problem.fine_shape, **extra)
        assert same_bits(relation.result(problem, value, filter), want)
        forward = dataclasses.replace(problem, operation="conv3d")
        assert same_bits(relation.result(forward, image, filter), oracle.conv3d(image, filter, n, **extra))


def disguised(rng, array, problem):
    """Return an operand of about the same numbers in another memory layout, or in a dtype that is narrower."""
    if rng.random() < 0.1 and problem.dtype.name in NARROWER:
        array = array.real.astype(NARROWER[problem.dtype.name])
    flavour = str(rng.choice([*FLAVOURS, "swapped"] if array.dtype.name != "bfloat16" else FLAVOURS))
    return flavoured(rng, array, flavour)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_random_problems(operation, dtype, monkeypatch):
    """Each algorithm as it is planned here, and with a schedule drawn from those it compares, on another machine.

    Then compute() with operands and `out` of any memory layout, and with one to three spatial axes.
    """
    dtype = dtype_named(dtype)
    rng = np.random.default_rng([602, OPERATIONS.index(operation), DTYPES.index(dtype.name)])
    count, many = dict.fromkeys(ALGORITHMS[operation], 0), dict.fromkeys(ALGORITHMS[operation], 0)
    for i in range(150 if dtype == np.float32 else 120):
        problem, rank = random_problem(rng, operation, dtype)
        first, second, bias = operands(rng, problem)
        want = rounded(relation.result(problem, first, second, bias), dtype)
        machine = int(rng.choice([64, 4096, 1 << 16, 1 << 20]))
        made = [*plans(problem, 1 + i % 2).items(), *drawn(rng, monkeypatch, problem, 2 - i % 2, machine).items()]
        for name, plan in made:
            count[name] += plan.blocks > 0
            many[name] += plan.blocks > 2
            with told(i, name, plan.workers, plan.machine, plan.schedule, problem, bias is not None):
                assert str(plan)
                assert same_bits(run(plan, first, second, bias), want)
                if bias is None and i % 3 == 0:
                    assert same_bits(plan(first, second), want)
                    if operation != "conv3d_backprop_filter":
                        assert same_bits(plan._with(second)(first), want)
                        assert i % 12 or same_bits(plan.prepare(second)(first), want)

        name = str(rng.choice(list(plans(problem))))
        first, second = disguised(rng, first, problem), disguised(rng, second, problem)
        if bias is not None:
            bias = flavoured(rng, bias, str(rng.choice(FLAVOURS)))
        before = first.tobytes(), second.tobytes(), None if bias is None else bias.tobytes()
        want = rounded(relation.result(problem, first, second, bias), dtype)
        roles = relation.OPERATIONS[operation]
        low = [without_ones(a, r, problem.layout, rank) for a, r in zip((first, second, want), roles, strict=True)]
        extra = {"rank": rank, "bias": bias, "algorithm": name}
        out = random_out(rng, types.SimpleNamespace(dtype=dtype, want=low[2]))
        with told(i, name, problem, rank, first.strides, second.strides, bias, out.dtype, out.strides):
            for workers in (1, 2):
                y = calls.compute("asked", problem, *low[:2], workers=workers, **extra)
                assert type(y) is np.ndarray
                assert y.flags.c_contiguous
                assert y.flags.writeable
                assert same_bits(y, low[2]), workers
            assert calls.compute("asked", problem, *low[:2], out=out, **extra) is out
            native = out.dtype if out.dtype.name == "bfloat16" else out.dtype.newbyteorder("=")
            assert same_bits(np.ascontiguousarray(out).astype(native), low[2].astype(native))
            assert before == (first.tobytes(), second.tobytes(), None if bias is None else bias.tobytes())
    assert min(count.values()) > 20, count
    assert min(many.values()) > 1, many


FAR = [
    Axis(3, 5000, 2, 1, 1, 0),  # fine positions that nothing reaches
    Axis(3, 5000, 2, 1, 1, -4000),
    Axis(5000, 3, 2, 1, 1, 0),  # coarse positions that reach nothing
    Axis(5000, 3, 3, 1, 1, 2500),
    Axis(4, 6, 3, 2, 1, -100),  # nothing meets
    Axis(4, 6, 3, 2, 1, 100),
    Axis(4, 6, 3, 2, 1, -5),  # one pair
    Axis(4, 6, 3, 2, 1, 8),
    Axis(5, 9, 3, 1000, 1, 0),
    Axis(5, 9, 3, 1000, 1, 2000),
    Axis(5, 9, 3, 1, 1000, 1003),
    Axis(2, 5, 2, 10**12, 1, 10**12 - 2),
    Axis(2, 5, 2, 1, 10**12, 10**12 - 2),
    Axis(2, 5, 2, 1, 1, -(10**12)),
    Axis(1, 5, 2, 10**20, 1, 0),  # beyond any integer of the machine
    Axis(3, 5, 1, 1, 10**20, 0),
    Axis(10, 12, 700, 1, 1, 350),  # most taps meet nothing
    Axis(1, 700, 700, 1, 1, 0),
    Axis(1, 1, 700, 1, 1, 77),
    Axis(9, 1, 3, 1, 1, 4),
]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_axes_that_reach_far_or_nowhere(operation, place):
    """Paddings, strides, dilations and sizes of any magnitude and sign, beside axes of size two and one."""
    rng = np.random.default_rng([603, place])
    for i, axis in enumerate(FAR):
        axes = [Axis(2, 2, 2, 1, 1, 0), ONE, ONE]
        axes = (*axes[:place], axis, *axes[place:2])
        groups, cin, cout = ((1, 2, 3), (3, 1, 1), (2, 2, 1))[i % 3]
        problem = Problem(operation, 1 + i % 2, cin, cout, axes, np.dtype(np.float32), LAYOUTS[i % 2], groups)
        for biased, l2_bytes in ((False, None), (True, 4096)):
            first, second, bias = operands(rng, problem, biased=biased)
            want = rounded(relation.result(problem, first, second, bias), problem.dtype)
            for name, plan in plans(problem, 2, l2_bytes).items():
                with told(name, l2_bytes, problem, biased):
                    assert same_bits(run(plan, first, second, bias), want)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_sizes_of_zero(operation, groups):
    """Any size can be zero, alone or with another: the result is empty, the bias, or +0.0."""
    empties = 0
    field = {"batch": 2, "cin": 2, "cout": 3}
    grid = {"coarse": 2, "fine": 3, "kernel": 2}
    places = [*field, *itertools.product(range(3), grid)]
    rng = np.random.default_rng(604)
    for zeros in [*itertools.combinations(places, 1), *itertools.combinations(places, 2)]:
        sizes = {name: 0 if name in zeros else size for name, size in field.items()}
        axes = tuple(Axis(*(0 if (i, name) in zeros else size for name, size in grid.items())) for i in range(3))
        dtype, layout = dtype_named(DTYPES[rng.integers(6)]), LAYOUTS[rng.integers(2)]
        problem = Problem(operation, **sizes, axes=axes, dtype=dtype, layout=layout, groups=groups)
        for biased in (False, True):
            first, second, bias = operands(rng, problem, biased=biased)
            if bias is not None and bias.size:
                bias[0] = -0.0
            for array in (first, second):
                array[...] = np.nan
            shape = relation.shapes(problem)[2]
            want = np.zeros(shape, dtype)
            if bias is not None:
                oracle.channels_last(want, layout)[...] += bias
            empties += want.size == 0
            for name in plans(problem):
                with told(name, problem, biased):
                    extra = {"bias": bias, "algorithm": name}
                    assert same_bits(calls.compute("asked", problem, first, second, **extra), want)
                    out = np.full([*shape[:-1], 2 * shape[-1]], np.nan, dtype)[..., ::2]
                    assert calls.compute("asked", problem, first, second, out=out, **extra) is out
                    assert same_bits(np.ascontiguousarray(out), want)
    assert empties > 20


def problems(operation, dtype, geometry):
    """Return problems of one geometry in both layouts with all kinds of channels."""
    return [
        Problem(operation, 2, cin, cout, geometry, dtype, layout, groups)
        for (groups, cin, cout), layout in itertools.product(CHANNELS, LAYOUTS)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_nan_and_inf_reach_what_their_taps_reach(operation, dtype, monkeypatch):
    """Single cells and whole groups of both operands and of the bias; 0 * Inf among the products. Nothing warns."""
    dtype = dtype_named(dtype)
    rng = np.random.default_rng([605, DTYPES.index(dtype.name)])
    untouched = 0
    for geometry, places in itertools.product(GEOMETRIES, ["first", "second", "first second", "group", "bias second"]):
        problem = problems(operation, dtype, geometry)[rng.integers(6)]
        first, second, bias = operands(rng, problem, 4)
        for place in places.split():
            array = {"first": first, "second": second, "group": second, "bias": first if bias is None else bias}[place]
            corner = rng.random() < 0.4
            cell = [int(rng.choice([0, n - 1]) if corner else rng.integers(n)) for n in array.shape]
            if place == "group":
                role = relation.OPERATIONS[operation][1]
                size = problem.cin if role != "fine" else problem.cout
                group = int(rng.integers(problem.groups))
                channel = -1 if role == "filter" else problem.layout.index("C")
                cell = [slice(None)] * 5
                cell[channel] = slice(group * size, group * size + size)
            array[tuple(cell)] = rng.choice([np.nan, np.inf, -np.inf])
        want = rounded(relation.result(problem, first, second, bias), dtype)
        untouched += np.isfinite(want).any()
        for name, plan in [*plans(problem).items(), *drawn(rng, monkeypatch, problem, 2).items()]:
            with told(name, places, plan.schedule, problem, bias):
                out = np.empty(want.shape, np.complex128 if dtype.kind == "c" else np.float64)
                with np.errstate(all="raise"):
                    got = run(plan, first, second, bias, out if name == "auto" else None)
                check_cells(got, want.astype(got.dtype))
    assert untouched > 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_overflow_gives_inf_where_the_sum_overflows(operation, dtype, monkeypatch):
    """Whole numbers times a power of two: exact where no partial sum can overflow, Inf where all terms have a sign.

    Where terms cancel, a partial sum may overflow in one order and not in another: not finite, or exact.
    """
    dtype = dtype_named(dtype)
    rng = np.random.default_rng([606, DTYPES.index(dtype.name)])
    power = {"float16": 13, "float64": 1021, "complex128": 1021}.get(dtype.name, 125)
    top = {"float64": 1024, "complex128": 1024}.get(dtype.name, 128)  # half precisions are summed in float32
    infinite = 0
    for geometry, huge, share in itertools.product(GEOMETRIES, (0, 1), (0.05, 1)):
        problem = problems(operation, dtype, geometry)[rng.integers(6)]
        *pair, bias = operands(rng, problem, 4)
        if dtype.kind != "c" and rng.random() < 0.5:
            pair = [np.abs(array) for array in pair]
            bias = None if bias is None else np.abs(bias)
        pair[huge] = (pair[huge] * (rng.random(pair[huge].shape) < share)).astype(dtype)
        wide = np.complex128 if dtype.kind == "c" else np.float64
        if bias is not None and dtype == np.float16:
            bias = np.minimum(bias, 3)  # 4 * 2**13 is not finite in sums of 8 * 2**13
        exact = relation.result(problem, *pair, bias)
        most = relation.result(
            problem, *(np.abs(oracle.wide(a)) for a in pair), None if bias is None else np.abs(oracle.wide(bias))
        )
        pair[huge] = (pair[huge].astype(wide) * 2.0**power).astype(dtype)
        bias = None if bias is None else (bias.astype(wide) * 2.0**power).astype(dtype)
        assert np.isfinite(pair[huge]).all()
        with np.errstate(all="ignore"):
            want = rounded(exact * 2.0**power, dtype)
        safe = most < 2.0 ** (top - power)
        sure = safe | (np.abs(exact) == most) if dtype.kind != "c" else safe
        infinite += (sure & np.isinf(want)).any()
        for name, plan in [*plans(problem, 2).items(), *drawn(rng, monkeypatch, problem).items()]:
            with told(name, huge, share, plan.schedule, problem, bias):
                with np.errstate(all="raise"):
                    got = run(plan, *pair, bias)
                assert same_bits(got[sure], want[sure])
                finite = np.isfinite(got)
                assert same_bits(got[finite], want[finite])
    assert infinite > 5 or dtype.kind == "c"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_zeros_are_positive(operation, dtype, monkeypatch):
    """From negative zeros, products that underflow, sums that a bias cancels or that round to zero; bias -0.0 too.

    By the contract a zero result is +0.0. A sum begins at +0.0, and +0.0 + -0.0 is +0.0, as is v - v.
    """
    dtype = dtype_named(dtype)
    tiny = {"float16": 6e-8, "float64": 1e-200, "complex128": 1e-200}.get(dtype.name, 1e-30)
    cases = [(-0.0, 1), (-0.0, -1), (1, -0.0), (-0.0, -0.0), (tiny, -tiny), (-tiny, tiny), (-tiny, -tiny)]
    rng = np.random.default_rng(607)
    for geometry in GEOMETRIES:
        problem = problems(operation, dtype, geometry)[rng.integers(6)]
        made = drawn(rng, monkeypatch, problem, 2)
        want = np.zeros(relation.shapes(problem)[2], dtype)
        for (a, b), zero in itertools.product(cases, (None, 0.0, -0.0)):
            first, second, bias = operands(rng, problem, biased=zero is not None)
            for array, number in ((first, a), (second, b), (bias, zero)):
                if array is not None and dtype.kind == "c":
                    array.real = array.imag = number
                elif array is not None:
                    array[...] = number
            for name, plan in made.items():
                with told(name, a, b, plan.schedule, problem, bias):
                    with np.errstate(all="raise"):
                        got = run(plan, first, second, bias)
                    assert same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS[:2])
def test_a_bias_that_cancels_leaves_positive_zeros(operation, dtype):
    """All terms are -1 or 1 and the bias is their sum's negative wherever all taps meet."""
    dtype = dtype_named(dtype)
    for i, (geometry, sign) in enumerate(itertools.product(GEOMETRIES, (1, -1))):
        for problem in problems(operation, dtype, geometry)[i % 3 :: 3]:
            first, second = (np.ones(shape, dtype) for shape in relation.shapes(problem)[:2])
            first *= dtype.type(sign)
            most = np.abs(relation.result(problem, first, second)).max()
            bias = np.full(channels_of_result(problem), -sign * most).astype(dtype)
            want = rounded(relation.result(problem, first, second, bias), dtype)
            assert (want == 0).any()
            for name, plan in plans(problem).items():
                with told(name, problem):
                    assert same_bits(run(plan, first, second, bias), want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("operation", OPERATIONS[:2])
def test_half_precisions_round_a_sum_with_its_bias_once(operation, dtype):
    """Sums that are no half precision numbers by themselves, and some that are too large for float16."""
    dtype = dtype_named(dtype)
    rng = np.random.default_rng(608)
    twice = 0
    for geometry, scale in itertools.product(GEOMETRIES, (1, 16)):
        for problem in problems(operation, dtype, geometry):
            first, second, bias = operands(rng, problem, biased=True)
            first, second = first * dtype.type(scale), second * dtype.type(scale)
            bias = (bias * dtype.type(251 * scale)).astype(dtype)
            want = rounded(relation.result(problem, first, second, bias), dtype)
            sums = rounded(relation.result(problem, first, second), dtype)
            with np.errstate(all="ignore"):
                twice += np.sum(
                    oracle.channels_last(sums, problem.layout) + bias != oracle.channels_last(want, problem.layout)
                )
            for name, plan in plans(problem).items():
                with told(name, problem):
                    assert same_bits(run(plan, first, second, bias), want)
    assert twice > 200


def overlapping(rng, originals, shape, which, step):
    """Return operands and bias with the same numbers, and an array of a shape in the memory of some of them."""
    size, dtype = math.prod(shape), originals[0].dtype
    memory = np.zeros(3 * size + sum(array.size for array in originals if array is not None), dtype)
    out = (memory[: 2 * size : 2] if step == 2 else memory[:size][::step]).reshape(shape)
    arrays, start = list(originals), int(rng.integers(size // 2 + 1))
    for place, array in enumerate(originals):
        if array is not None and which in (place, "all"):
            arrays[place] = memory[start : start + array.size].reshape(array.shape)
            arrays[place][...] = array
            start += array.size
    assert np.may_share_memory(out, memory)
    return *arrays, out


@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_overlaps_operands(operation):
    """`out` in the memory of an operand or of the bias, shifted, reversed or interleaved: as if they were apart."""
    rng = np.random.default_rng(609)
    for i, (geometry, dtype) in enumerate(itertools.product(GEOMETRIES, ("float32", "complex64", "float16"))):
        problem = problems(operation, np.dtype(dtype), geometry)[rng.integers(6)]
        originals = operands(rng, problem, biased=True)
        want = rounded(relation.result(problem, *originals), dtype)
        for name, which, step in itertools.product(plans(problem), (0, 1, 2, "all"), (1, -1, 2)):
            *pair, bias, out = overlapping(rng, originals, want.shape, which, step)
            extra = {"bias": bias, "algorithm": name, "workers": 1 + i % 2, "out": out}
            with told(name, which, step, problem):
                assert calls.compute("asked", problem, *pair, **extra) is out
                assert same_bits(np.ascontiguousarray(out), want)


def test_out_in_the_parts_of_complex_operands():
    """An operand in the imaginary parts of an array, `out` in the real ones of the same; and `out` that is wider."""
    problem = problems("conv3d", np.dtype(np.float32), GEOMETRIES[0])[0]
    first, second, bias = operands(np.random.default_rng(610), problem, biased=True)
    want = rounded(relation.result(problem, first, second, bias), "f4")
    both = np.zeros(first.size + want.size, np.complex64)
    value, out = both.imag[: first.size].reshape(first.shape), both.real[first.size // 2 :][: want.size]
    value[...] = first
    assert not value.flags.c_contiguous
    out = out.reshape(want.shape)
    assert calls.compute("asked", problem, value, second, bias=bias, out=out) is out
    assert same_bits(np.ascontiguousarray(out), want)
    memory = np.zeros(first.nbytes + 8 * want.size, np.uint8)
    value, out = memory[: first.nbytes].view("f4").reshape(first.shape), memory[: 8 * want.size].view("f8")
    value[...] = first
    out = out.reshape(want.shape)
    assert calls.compute("asked", problem, value, second, bias=bias, out=out) is out
    assert same_bits(out, want.astype("f8"))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_refusals_leave_out_untouched(operation, rank):
    """Each names the function, and none has begun to work; shapes are those of the caller's rank."""
    axes = (*[ONE] * (3 - rank), *[Axis(5, 7, 3, 1, 1, 0)] * rank)
    problem = Problem(operation, 2, 2, 3, axes, np.dtype(np.float32), groups=2)
    roles = relation.OPERATIONS[operation]
    rng = np.random.default_rng(611)
    first, second, bias = operands(rng, problem, biased=True)
    want = rounded(relation.result(problem, first, second, bias), "f4")
    first, second, want = (
        without_ones(array, role, "NDHWC", rank) for array, role in zip((first, second, want), roles, strict=True)
    )
    good = np.full(want.shape, 77, np.float32)
    others = [np.full(shape, 77, np.float32) for shape in ((*want.shape, 1), (1, *want.shape), want.shape[::-1])]
    cases = [
        (ValueError, "algorithm must be .*'nonsense'", {"algorithm": "nonsense"}, good),
        (TypeError, "algorithm must be .*None", {"algorithm": None}, good),
        (ValueError, "workers=0", {"workers": 0}, good),
        (TypeError, "workers must be .*True", {"workers": True}, good),
        (TypeError, "out has dtype float16, .* float32 cannot", {}, np.full(want.shape, 77, np.float16)),
        (TypeError, "out has dtype int64, .* float32 cannot", {}, np.full(want.shape, 77, np.int64)),
        (ValueError, "out is read-only", {}, frozen(good.copy())),
        *(
            (ValueError, r"out has shape \({}\), .*".format(", ".join(map(str, array.shape))), {}, array)
            for array in others
        ),
    ]
    for exception, text, extra, out in cases:
        with told(text), pytest.raises(exception, match="^asked: " + text):
            calls.compute("asked", problem, first, second, rank=rank, bias=bias, out=out, **extra)
        assert (out == 77).all()
    able = plans(problem)
    for name in set(ALGORITHMS[operation]) - set(able):
        with pytest.raises(CannotLowerError, match=f"{name}"):
            calls.compute("asked", problem, first, second, rank=rank, bias=bias, out=good, algorithm=name)
        assert (good == 77).all()
    for name in able:
        good[...] = 77
        extra = {"rank": rank, "bias": bias, "algorithm": name}
        assert calls.compute("asked", problem, first, second, out=good, **extra) is good
        assert same_bits(good, want)


LARGE = {
    "dense": (1, 24, 40, (Axis(6, 6, 3, 1, 1, 1), Axis(9, 9, 3, 1, 1, 1), Axis(10, 10, 3, 1, 1, 1))),
    "strided": (4, 16, 24, (Axis(4, 8, 4, 2, 1, 1), Axis(7, 14, 4, 2, 1, 1), Axis(9, 17, 4, 2, 1, 1))),
    "depthwise": (48, 1, 1, (Axis(7, 9, 3, 1, 1, 0), Axis(20, 20, 3, 1, 1, 1), Axis(21, 20, 3, 1, 1, 1))),
    "image": (1, 3, 8, (ONE, Axis(90, 95, 7, 1, 1, 0), Axis(70, 70, 7, 1, 1, 3))),
    "dilated": (2, 33, 5, (Axis(5, 9, 2, 1, 3, -1), Axis(12, 15, 3, 1, 2, 1), Axis(13, 30, 3, 2, 2, 1))),
    "pointwise": (3, 24, 40, (Axis(4, 4, 1), Axis(20, 20, 1), Axis(30, 30, 1))),
    "deep": (1, 256, 96, (Axis(2, 2, 3, 1, 1, 1), Axis(4, 4, 3, 1, 1, 1), Axis(4, 4, 3, 1, 1, 1))),
    "few rows": (1, 300, 70, (Axis(2, 4, 4, 2, 1, 1), Axis(2, 4, 4, 2, 1, 1), Axis(5, 10, 4, 2, 1, 1))),
    "few rows in groups": (2, 200, 40, (ONE, Axis(3, 4, 3, 1, 1, 0), Axis(4, 12, 4, 3, 1, 0))),
}
# Single rows, which need not be GEMM's, and more groups than there are positions.
THIN = {
    "rows": (2, 300, 500, (ONE, ONE, Axis(1, 2, 2, 1, 1, 0))),
    "one row": (1, 900, 700, (ONE, ONE, ONE)),
    "many groups": (700, 1, 2, (ONE, Axis(3, 3, 3, 1, 1, 1), Axis(2, 4, 2, 2, 1, 0))),
    "line": (5, 2, 3, (ONE, ONE, Axis(3000, 3010, 9, 1, 1, -5))),
    "points": (1, 4, 3, (Axis(19, 19, 1), Axis(18, 18, 1), ONE)),
    "column": (3, 4, 1, (Axis(1500, 2999, 3, 2, 1, 1), ONE, ONE)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_workers_do_not_change_bits(operation, case, layout, monkeypatch):
    """Normal data in many blocks: the bits of one worker, within the rounding of a direct sum (twice, if filtered).

    For the bound see test_lowerings.test_rounding_of_normal_data.
    """
    monkeypatch.setattr(im2col, "_LARGE_FILTER", 0)  # shares of the taps where rows are few
    groups, cin, cout, axes = LARGE[case]
    batch = 10 if groups == 1 else 6 if groups < 10 else 2  # so that there are several blocks; many groups are some
    problem = Problem(operation, batch, cin, cout, axes, np.dtype(np.float32), layout, groups)
    rng = np.random.default_rng(612)
    first, second, *_ = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem))
    bias = None if operation == OPERATIONS[2] else rng.standard_normal(channels_of_result(problem), np.float32)
    exact = relation.result(problem, first, second, bias)
    most = relation.result(problem, np.abs(first), np.abs(second), None if bias is None else np.abs(bias))
    terms = (
        1
        + {
            "conv3d_transpose": cin * math.prod(math.ceil(a.kernel / a.stride) for a in axes),
            "conv3d": cout * math.prod(a.kernel for a in axes),
            "conv3d_backprop_filter": batch * math.prod(a.coarse for a in axes),
        }[operation]
    )
    for name, plan in plans(problem, 1).items():
        with told(name, problem):
            y = run(plan, first, second, bias)
            # All positions of a group are one block of mec's gradients, and few positions of minimal filtering's.
            one_block = {"mec", "winograd"} if operation == OPERATIONS[2] and groups == 1 else ()
            assert plan.blocks > 1 or plan.algorithm in one_block
            for workers in (1, 2, 3):
                extra = {"bias": bias, "algorithm": name, "workers": workers}
                assert same_bits(calls.compute("asked", problem, first, second, **extra), y)
                out = np.empty_like(y)
                assert calls.compute("asked", problem, first, second, out=out, **extra) is out
                assert same_bits(out, y)
            factor, sizes = 2 if plan.algorithm == "winograd" else 1, most
            if factor == 2 and operation == OPERATIONS[2]:  # sums of neighbouring taps cancel in it, the largest too
                sizes = most.max((0, 1, 2), keepdims=True)
            assert (np.abs(y - exact) <= factor * np.sqrt(terms) * UNIT * sizes).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "complex64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_convolution_in_products_that_are_not_packed(layout, dtype, monkeypatch):
    """Whatever the BLAS: rows, columns and k in even pieces or not, in one box of taps or several, with a bias."""
    cut, added, tiled = set(), set(), set()
    form, multiply = products._form, im2col.multiply
    monkeypatch.setattr(products, "_STEP", 0)  # so that rows are left over

    def counted(a, b, out, sizes):
        cut.add((a.shape[0] % sizes.rows > 0, out.shape[2] % sizes.columns > 0, len(out) > 1))
        tiled.add(b.ndim == 3)
        form(a, b, out, sizes)

    def noted(a, b, out, parts, *, adds):
        columns = b.shape[2] if b.ndim == 3 else 0
        added.add((adds, a.shape[1] > products.tile(len(a), out.shape[1], a.shape[1], out.itemsize, columns).depth))
        multiply(a, b, out, parts, adds=adds)

    monkeypatch.setattr(products, "_form", counted)
    monkeypatch.setattr(im2col, "multiply", noted)
    monkeypatch.setattr(im2col, "gemm_s", lambda *_, **__: 1.0)
    rng = np.random.default_rng([618, *map(ord, dtype)])

    def clear():
        products.tile.cache_clear()
        products.rows_each.cache_clear()

    for small, case, share, tile in itertools.product(
        (0, 500, 3000, 1_000_000), ("few rows", "few rows in groups", "dense"), (0.02, 2.0), (1 << 30, 8)
    ):
        monkeypatch.setattr(products, "small_products", lambda small=small: small)
        monkeypatch.setattr(im2col, "_UNPACKED_SHARE", share)
        monkeypatch.setattr(im2col, "_TILE", tile)
        clear()
        groups, cin, cout, axes = LARGE[case]
        problem = Problem("conv3d", 1, cin, cout, axes, np.dtype(dtype), layout, groups)
        plan = make_plan.__wrapped__(problem, Machine(2, 1 << 20, 1 << 25), "im2col", 2)
        first, second, bias = operands(rng, problem, largest=2, biased=True)
        assert same_bits(run(plan, first, second, bias), rounded(relation.result(problem, first, second, bias), dtype))
    clear()
    if dtype == "complex64":
        assert not cut
    else:
        assert {rows for rows, *_ in cut} == {False, True}
        assert tiled == ({False, True} if layout == "NDHWC" else {False})
        assert layout == "NCDHW" or {columns for _, columns, _ in cut} == {False, True}
        assert any(parts for *_, parts in cut)
        assert added == set(itertools.product((False, True), repeat=2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("along", range(3))
@pytest.mark.parametrize("taps", [(3, 1, 1), (4, 2, 1), (3, 2, 1), (3, 1, 2), (7, 2, 1), (5, 3, 2)])
def test_pairs_of_results_see_no_more_than_their_taps(taps, along, layout):
    """A convolution filtered along two axes, with its sums along the third: normal data, and data with huge elements.

    The error is bounded by the data that the taps of a cell take: a point sums 2 cells and 3 taps of each axis, and 3
    points sum to a result, so that each product occurs up to 4 times, with the largest taps in place of each.
    """
    kernel, stride, dilation = taps
    axes = [Axis(7, 6 * stride + (kernel - 1) * dilation - 1, kernel, stride, dilation, 1)] * 3
    axes[along] = Axis(5, 5, 3, 1, 1, 1)
    problem = Problem("conv3d", 2, 10, 9, tuple(axes), np.dtype(np.float32), layout)
    machine = Machine(2, 1 << 20, 1 << 25)
    found = [s for s in winograd_conv.candidates(problem) if len(s.along) == 2 and along + 1 not in s.along]
    schedule = min(found, key=lambda s: s.time_s(machine))
    plan = dataclasses.replace(make_plan(problem, machine, "im2col", 2), schedule=schedule)
    rng = np.random.default_rng([617, along])
    first, second, _ = (rng.standard_normal(shape, np.float32) for shape in relation.shapes(problem))
    largest = np.broadcast_to(np.abs(second).max((0, 1, 2)), second.shape)
    for huge in (None, 1e6, -1e9, 1e12):
        x = first.copy()
        if huge is not None:
            x[tuple(rng.integers(x.shape))] = huge
        exact = relation.result(problem, x, second)
        error = np.abs(run(plan, x, second) - exact)
        terms = problem.cout * math.prod(axis.kernel for axis in axes)
        with told(huge, plan.schedule):
            assert (error <= 4 * terms * UNIT * relation.result(problem, np.abs(x), largest)).all()
            if huge is None:
                most = relation.result(problem, np.abs(x), np.abs(second))
                assert (error <= 2 * np.sqrt(terms) * UNIT * most).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*LARGE, *THIN])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_large_whole_numbers(operation, case, layout, monkeypatch):
    """The oracle's bits in blocks of usual size, and in single rows and columns."""
    groups, cin, cout, axes = {**LARGE, **THIN}[case]
    rng = np.random.default_rng(615)
    dtype = np.dtype(
        ["float32", "float16", "float32", "complex64"][([*LARGE, *THIN].index(case) + LAYOUTS.index(layout)) % 4]
    )
    problem = Problem(operation, 1, cin, cout, axes, dtype, layout, groups)
    first, second, bias = operands(rng, problem, biased=True)
    want = rounded(relation.result(problem, first, second, bias), dtype)
    for name, plan in [*plans(problem).items(), *drawn(rng, monkeypatch, problem, 2, 1 << 18).items()]:
        with told(name, plan.schedule, problem):
            assert same_bits(run(plan, first, second, bias), want)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_each_is_the_others_adjoint(dtype):
    """sum(T(x, w) * z) == sum(x * C(z, w)) == sum(w * B(z, x)), without conjugation: whole numbers, exactly."""
    rng = np.random.default_rng(613)
    for _ in range(150):
        problem, _ = random_problem(rng, "conv3d_transpose", np.dtype(dtype))
        by_name = {name: dataclasses.replace(problem, operation=name) for name in OPERATIONS}
        x, w, _ = operands(rng, problem)
        z = integers(rng, relation.shapes(problem)[2], dtype)
        with told(problem):
            y = calls.compute("asked", by_name["conv3d_transpose"], x, w)
            back = calls.compute("asked", by_name["conv3d"], z, w)
            gradient = calls.compute("asked", by_name["conv3d_backprop_filter"], z, x)
            assert (y * z).sum() == (x * back).sum() == (w * gradient).sum()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_threads_share_a_plan(operation):
    """Four threads call one plan at the same time, each with operands and a bias of its own."""
    rng = np.random.default_rng(614)
    problem = Problem(operation, 2, 6, 5, GEOMETRIES[1], np.dtype(np.float32), groups=3)
    tasks = [operands(rng, problem, biased=index > 0) for index in range(4)]
    wants = [rounded(relation.result(problem, *task), "f4") for task in tasks]
    for name, plan in plans(problem, 2, 4096).items():
        agreed = []

        def target(index, plan=plan, agreed=agreed):
            agreed.extend(same_bits(run(plan, *tasks[index]), wants[index]) for _ in range(10))

        threads = [threading.Thread(target=target, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert agreed == [True] * 40, (name, plan)
