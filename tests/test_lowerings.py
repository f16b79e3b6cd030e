"""Every lowering on the same problems: bits, NaN and Inf, zeros, rounding, prepared filters, reports and profiles.

Whole numbers have one result in any order of summation, and minimal filtering combines them with halves and sums only,
so all lowerings must give the oracle's bits. Memory that NumPy hands out is filled with NaN here, so that a cell that
is read before it is written shows; and small problems are shared by as many workers as are asked for.
"""

import contextlib
import itertools
import math
import re
import threading
import time
from dataclasses import replace

import numpy as np
import oracle
import pytest
from oracle import dtype_named, integers, same_bits

import gemmconv
from gemmconv import conv3d_transpose, plan_conv3d_transpose
from gemmconv.lowerings import GROUPS_ONLY, LOWERINGS, CannotLowerError
from gemmconv.machine import Machine
from gemmconv.plan import make_plan

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
LAYOUTS = ["NDHWC", "NCDHW"]
WITHOUT_GROUPS = [name for name in LOWERINGS["conv3d_transpose"] if name not in GROUPS_ONLY]
# n, k, s, dilation, padding: each with neighbouring taps in all phases, so that minimal filtering can do it.
GEOMETRIES = [
    ((5, 6, 3), (3, 3, 3), (1, 1, 1), (1, 1, 1), "SAME"),
    ((4, 3, 5), (4, 4, 4), (2, 2, 2), (1, 1, 1), "SAME"),
    ((4, 5, 2), (5, 2, 2), (2, 1, 1), (1, 1, 1), "VALID"),
    ((2, 7, 3), (2, 3, 1), (1, 1, 3), (2, 1, 1), "SAME"),
    ((1, 8, 7), (1, 3, 3), (1, 1, 1), (1, 1, 2), "VALID"),
    ((6, 1, 4), (6, 1, 3), (3, 1, 2), (1, 1, 1), "SAME"),
]


@pytest.fixture(autouse=True)
def _no_zeros_by_luck(monkeypatch):
    """Fill new memory with NaN, make workspaces anew, and give small problems to all workers."""
    empty = np.empty

    def garbage(*args, **kwargs):
        array = empty(*args, **kwargs)
        if array.dtype.kind in "fcV" and array.dtype.names is None:
            array[...] = np.nan
        elif array.dtype.kind == "u" and array.dtype.itemsize == 1:
            array[...] = 255  # NaN in every float that it is viewed as
        return array

    gemmconv.clear_cache()
    monkeypatch.setattr(np, "empty", garbage)
    monkeypatch.setattr("gemmconv.plan._WORKER_FLOPS", 1)
    yield
    gemmconv.clear_cache()


@contextlib.contextmanager
def told(*what):
    """Add the problem to whatever goes wrong inside."""
    try:
        yield
    except BaseException as error:
        error.add_note(repr(what))
        raise


def plans_of(value, filter, workers=1, l2_bytes=None, **extra):
    """Return the plans of all lowerings that can do a problem, by name; with 'auto'."""
    found = {}
    for name in ("auto", *WITHOUT_GROUPS):
        ask = {"dtype": np.result_type(value, filter), "algorithm": name, "workers": workers, **extra}
        try:
            plan = plan_conv3d_transpose(value.shape, filter.shape, **ask)
            if l2_bytes:
                plan = make_plan(plan.problem, Machine(2, l2_bytes, 1 << 24), name, workers)
        except CannotLowerError:
            assert name not in ("auto", "col2im")
        else:
            found[name] = plan
    assert {"auto", "col2im"} <= set(found)
    return found


def operands(geometry, dtype, layout, seed, cin=3, cout=5, largest=4):
    """Return value, filter and further arguments of a geometry, in writable arrays of whole numbers."""
    n, k, s, dilation, padding = geometry
    rng = np.random.default_rng(seed)
    value = integers(rng, oracle.caller_order([2, *n, cin], layout), dtype, largest).copy()
    filter = integers(rng, [*k, cout, cin], dtype, largest).copy()
    return value, filter, {"strides": s, "dilations": dilation, "padding": padding, "data_format": layout}


def definition(value, filter, strides, dilations, padding, data_format):
    """Return the oracle's result by single products: no matrix product that may treat 0 * Inf or sums its own way."""
    x = oracle.channels_last(oracle.wide(value), data_format)
    one = np.zeros((1, 1, 1, filter.shape[3], 1))
    result = oracle.conv3d_transpose(np.zeros_like(x[..., :1]), np.resize(one, (*filter.shape[:4], 1)),
                                     None, strides, padding, None, dilations)  # fmt: skip
    y = np.zeros(result.shape, x.dtype)
    with np.errstate(all="ignore"):
        for tap in itertools.product(*map(range, filter.shape[:3])):
            pairs = []
            for n, k, s, a, d, o in zip(x.shape[1:4], filter.shape, strides, tap, dilations, y.shape[1:4]):  # noqa: B905
                lo = oracle.low_padding(n, k, s, d, o, padding)
                pairs.append([(i * s + a * d - lo, i) for i in range(n) if 0 <= i * s + a * d - lo < o])
            for (od, d), (oh, h), (ow, w) in itertools.product(*pairs):
                y[:, od, oh, ow] += (x[:, d, h, w, None, :] * oracle.wide(filter[tap])).sum(-1)
    return oracle.caller_order(y, data_format)


def check_cells(got, want):
    """Compare bits where `want` is finite, and NaN, +Inf and -Inf elsewhere; of complex numbers only finite or not."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    finite = np.isfinite(want)
    assert (np.isfinite(got) == finite).all(), f"{np.sum(np.isfinite(got) != finite)} of {got.size} cells"
    assert same_bits(got[finite], want[finite])
    if want.dtype.kind != "c":
        assert (np.isnan(got) == np.isnan(want)).all()
        assert (got[~finite & ~np.isnan(want)] == want[~finite & ~np.isnan(want)]).all()


def random_problem(rng, dtype):
    """Return value, filter and further arguments: one in two with an axis that minimal filtering can do."""
    while True:
        n = [int(i) for i in rng.choice([1, 2, 3, 4, 5, 7, 11], 3, p=[0.25, 0.15, 0.15, 0.15, 0.15, 0.1, 0.05])]
        k, s, d = ([int(i) for i in rng.integers(1, top, 3)] for top in (6, 4, 4))
        if rng.random() < 0.5:
            d = [1 if rng.random() < 0.8 else i for i in d]
            axis = int(rng.integers(2))
            s[axis], d[axis] = min(s[axis], 2), 1
            k[axis] = min(5, s[axis] * int(rng.integers(2, 4)))
        if rng.random() < 0.05:
            (n, k)[rng.integers(2)][rng.integers(3)] = 0
        padding, layout = str(rng.choice(["SAME", "VALID"])), str(rng.choice(LAYOUTS))
        ends = [oracle.reachable_sizes(*axis, padding) for axis in zip(n, k, s, d, strict=True)]
        o = [int(rng.integers(max(low, 0), high + 1)) for low, high in ends]
        batch = int(rng.choice([0, 1, 2, 3], p=[0.02, 0.6, 0.28, 0.1]))
        cin, cout = (int(rng.choice([1, 2, 3, 4, 9, 16, 33, 65])) for _ in range(2))
        cin = 0 if rng.random() < 0.02 else cin
        if math.prod(n) * math.prod(k) * batch * cin * cout < 3e6 and math.prod(o) * cout * batch < 2e5:
            break
    extra = {"strides": s, "dilations": d, "padding": padding, "data_format": layout}
    if rng.random() < 0.8:
        extra["output_shape"] = oracle.caller_order([batch, *o, cout], layout)
    value = integers(rng, oracle.caller_order([batch, *n, cin], layout), dtype, 4)
    return value, integers(rng, [*k, cout, cin], dtype, 4), extra


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_problems(dtype, monkeypatch):
    """Kernels of 1 to 5, strides of 1 to 3, large and small caches, one and two workers: the oracle's bits."""
    monkeypatch.setattr("gemmconv.lowerings.tiling._POSITIONS", (8, 64))  # several blocks of small problems
    rng = np.random.default_rng([500, DTYPES.index(dtype)])
    count, many = dict.fromkeys(WITHOUT_GROUPS, 0), dict.fromkeys(WITHOUT_GROUPS, 0)
    for i in range(110):
        value, filter, extra = random_problem(rng, dtype_named(dtype))
        want = oracle.rounded(oracle.conv3d_transpose(value, filter, **extra), dtype_named(dtype))
        l2_bytes = (None, 1 << 16, 1 << 18)[i % 3]
        for name, plan in plans_of(value, filter, 1 + i % 2, l2_bytes, **extra).items():
            count[plan.algorithm] += plan.blocks > 0
            many[plan.algorithm] += plan.blocks > 2
            with told(i, name, plan):
                assert same_bits(plan(value, filter), want)
                assert same_bits(plan.prepare(filter)(value), want)
                out = np.full([*want.shape[:-1], 2 * want.shape[-1]], np.nan, want.dtype)[..., ::2]
                for target in (out, np.full_like(want, np.nan)):
                    assert plan(value, filter, target) is target
                    assert same_bits(np.ascontiguousarray(target), want)
    assert min(count.values()) >= 20, count
    assert min(many.values()) >= 4, many


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tap_lands(layout):
    """One position of two taps, dilated by 3, falls beside an output of one cell on both sides: zeros."""
    geometry = (4, 4, 1), (3, 3, 2), (1, 1, 1), (1, 1, 3), "SAME"
    value, filter, extra = operands(geometry, "float32", layout, 514)
    value[...] = np.nan
    for name in ("auto", *WITHOUT_GROUPS):
        with contextlib.suppress(CannotLowerError):
            assert not conv3d_transpose(value, filter, algorithm=name, **extra).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WITHOUT_GROUPS)
def test_large_problems(name, layout):
    """Many blocks of usual size: function, plan and prepared layer, on one and two workers."""
    for i, (n, k, s, cin, cout) in enumerate(
        [
            ((9, 10, 11), 3, 1, 40, 70),
            ((10, 20, 17), 4, 2, 65, 3),
            ((3, 40, 39), 2, 1, 1, 130),
            ((12, 11, 9), 5, 2, 33, 24),
        ]
    ):
        geometry = n, (k, k, k), (s, s, s), (1, 1, 1), ("SAME", "VALID")[i % 2]
        value, filter, extra = operands(geometry, "float32", layout, [501, i], cin, cout)
        want = oracle.conv3d_transpose(value, filter, None, **extra).astype(np.float32) + np.float32(0)
        for workers in (1, 2):
            with told(geometry, cin, cout, workers):
                assert same_bits(conv3d_transpose(value, filter, algorithm=name, workers=workers, **extra), want)
                plan = plans_of(value, filter, workers, **extra)[name]
                assert plan.used_workers == workers
                assert same_bits(plan(value, filter), want)
                assert same_bits(plan.prepare(filter)(value), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nan_and_inf_reach_what_their_taps_reach(geometry, dtype, layout):
    """Single cells at corners, at borders and inside, of value, filter or both, with 0 * Inf among the products."""
    dtype = dtype_named(dtype)
    for i, places in enumerate(["value", "filter", "value value", "value filter", "filter filter", "value", "value"]):
        value, filter, extra = operands(geometry, dtype, layout, [502, i])
        rng = np.random.default_rng([503, i])
        for place in places.split():
            array = {"value": value, "filter": filter}[place]
            corner = rng.random() < 0.4
            cell = tuple(int(rng.choice([0, m - 1]) if corner else rng.integers(m)) for m in array.shape)
            array[cell] = rng.choice([np.nan, np.inf, -np.inf])
        want = oracle.rounded(definition(value, filter, **extra), dtype)
        for (name, plan), workers in itertools.product(plans_of(value, filter, 2, **extra).items(), (1, 2)):
            with told(name, places, workers, plan), np.errstate(all="raise"):
                got = conv3d_transpose(value, filter, algorithm=name, workers=workers, **extra)
                prepared = plan.prepare(filter)(value)
            with told(name, places, workers, plan):
                check_cells(got, want)
                check_cells(prepared, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_huge_numbers_overflow_where_their_sum_does(geometry, dtype, layout):
    """Whole numbers times a power of two: exact where no partial sum can overflow, Inf where all products have a sign.

    Where products cancel, a partial sum may overflow in one order and not in another: not finite, or exact.
    """
    dtype = dtype_named(dtype)
    power = {"float16": 13, "float64": 1021, "complex128": 1021}.get(dtype.name, 125)
    top = {"float64": 1024, "complex128": 1024}.get(dtype.name, 128)  # half precisions are summed in float32
    for i, (huge, share, lowest) in enumerate(
        itertools.product((0, 1), (0.05, 1), (-4, 0) if dtype.kind != "c" else (-4,))
    ):
        value, filter, extra = operands(geometry, dtype, layout, [504, i])
        rng = np.random.default_rng([505, i])
        pair = [value, filter]
        pair = [np.maximum(a, a.dtype.type(lowest)) if lowest == 0 else a for a in pair]
        pair[huge] = (pair[huge] * (rng.random(pair[huge].shape) < share)).astype(dtype)
        exact = oracle.conv3d_transpose(*pair, None, **extra)
        most = oracle.conv3d_transpose(*(np.abs(oracle.wide(a)) for a in pair), None, **extra)
        pair[huge] = (pair[huge].astype(np.complex128 if dtype.kind == "c" else float) * 2.0**power).astype(dtype)
        assert np.isfinite(pair[huge]).all()
        with np.errstate(all="ignore"):
            scaled = exact.astype(np.result_type(exact)) * 2.0**power
            want = oracle.rounded(scaled, dtype)
        safe = most < 2.0 ** (top - power)
        sure = safe | (np.abs(exact) == most) if dtype.kind != "c" else safe
        for name, plan in plans_of(*pair, 2, **extra).items():
            with told(name, huge, share, lowest, plan):
                with np.errstate(all="raise"):
                    got, prepared = plan(*pair), plan.prepare(pair[1])(pair[0])
                for y in (got, prepared):
                    assert same_bits(y[sure], want[sure])
                    finite = np.isfinite(y)
                    assert same_bits(y[finite], want[finite])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_zeros_are_positive(geometry, dtype, layout):
    """From negative zeros, from products that underflow, and from sums that round to zero as half precisions."""
    dtype = dtype_named(dtype)
    tiny = {"float16": 6e-8, "float64": 1e-200, "complex128": 1e-200}.get(dtype.name, 1e-30)
    for a, b in [(-0.0, 1), (-0.0, -1), (1, -0.0), (-0.0, -0.0), (tiny, -tiny), (-tiny, tiny), (-tiny, -tiny)]:
        value, filter, extra = operands(geometry, dtype, layout, 506)
        for array, number in ((value, a), (filter, b)):
            if dtype.kind == "c":
                array.real, array.imag = number, number
            else:
                array[...] = number
        want = oracle.rounded(oracle.conv3d_transpose(value, filter, None, **extra), dtype) * 0
        for name, plan in plans_of(value, filter, 2, **extra).items():
            with told(name, a, b, plan):
                with np.errstate(all="raise"):
                    got = plan(value, filter)
                assert same_bits(got, np.abs(want).astype(dtype))


def normal(seed, *shapes):
    """Return normally distributed float32 arrays."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


UNIT = 2.0**-24  # unit roundoff of float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rounding_of_normal_data(geometry, layout):
    """Relative to sum |x||w| of each cell: sqrt(K) roundings of a direct sum of K products, twice that filtered.

    At worst each of K sums rounds by u = 2**-24, but signs of errors are random. Minimal filtering forms sums of 2 rows
    and of 3 taps before and of 3 products after, each of which is about sqrt(2) to sqrt(3) times as large.
    Signs of data are random too: partial sums are of sqrt(K) terms, and the mean error is below u/2 of sum |x||w|.
    """
    n, k, s, dilation, padding = geometry
    value, filter = normal(507, oracle.caller_order([2, *n, 64], layout), [*k, 24, 64])
    extra = {"strides": s, "dilations": dilation, "padding": padding, "data_format": layout}
    exact = oracle.conv3d_transpose(value, filter, None, **extra)
    most = oracle.conv3d_transpose(np.abs(value), np.abs(filter), None, **extra)
    terms = oracle.conv3d_transpose(np.ones_like(value), np.ones_like(filter), None, **extra)
    for name, plan in plans_of(value, filter, 2, **extra).items():
        factor = 2 if plan.algorithm == "winograd" else 1
        error = np.abs(plan(value, filter) - exact)
        with told(name, np.max(error / np.maximum(most, 1e-30)) / UNIT):
            assert (error <= factor * np.sqrt(terms) * UNIT * most).all()
            assert np.sqrt(np.mean((error / np.maximum(most, 1e-30)) ** 2)) <= factor * UNIT / 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_huge_elements_disturb_no_cell_beyond_their_taps(geometry, layout):
    """One element of 1e6 to 1e12: elsewhere, the error is bounded by the cell's own data.

    Direct sums: K * u * sum |x||w|, for any data. Minimal filtering mixes the taps of a cell with each other, so its
    bound takes the largest tap for each: 4 * K * u * sum |x| max|w|, over the x that the cell's taps reach.
    """
    n, k, s, dilation, padding = geometry
    extra = {"strides": s, "dilations": dilation, "padding": padding, "data_format": layout}
    value, filter = normal(508, oracle.caller_order([2, *n, 4], layout), [*k, 24, 4])
    largest = np.broadcast_to(np.abs(filter).max((0, 1, 2)), filter.shape)
    plans = plans_of(value, filter, 2, **extra)
    rng = np.random.default_rng(509)
    taps = 4 * math.prod(k)
    for huge in (1e6, -1e9, 1e12, 1e12):
        x = value.copy()
        x[tuple(rng.integers(x.shape))] = huge
        exact = oracle.conv3d_transpose(x, filter, None, **extra)
        bounds = [oracle.conv3d_transpose(np.abs(x), np.abs(w), None, **extra) for w in (filter, largest)]
        for name, plan in plans.items():
            filtered = plan.algorithm == "winograd"
            with told(name, huge):
                bound = (4 if filtered else 1) * taps * UNIT * bounds[filtered]
                assert (np.abs(plan(x, filter) - exact) <= bound).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_however_asked_for(dtype, layout):
    """Normal data: function, plan and prepared layer, one and two workers, any memory; filters are taken once."""
    dtype = dtype_named(dtype)
    for geometry in [((9, 10, 11), (3, 3, 3), (1, 1, 1), (1, 1, 1), "SAME"), GEOMETRIES[1]]:
        shapes = oracle.caller_order([2, *geometry[0], 24], layout), [*geometry[1], 70, 24]
        value, filter, other = (a.astype(dtype) for a in normal(510, *shapes, shapes[0]))
        if dtype.kind == "c":
            value, filter = (a + a.dtype.type(1j) * a[::-1] for a in (value, filter))
        extra = dict(zip(("strides", "dilations", "padding"), geometry[2:], strict=True), data_format=layout)
        for name, two in plans_of(value, filter, 2, **extra).items():
            one = plans_of(value, filter, 1, **extra)[name]
            with told(name, two):
                first = one(value, filter)
                assert first.dtype == dtype
                for workers in (1, 2):
                    asked = {"algorithm": name, "workers": workers, **extra}
                    assert same_bits(conv3d_transpose(value, filter, **asked), first)
                changing = filter.copy()
                layers = [plan.prepare(array) for plan in (one, two) for array in (np.asfortranarray(filter), changing)]
                changing[...] = 77
                want = layers[0].plan(value, filter)
                for layer in layers:
                    assert not same_bits(layer(other), want)
                    out = np.empty(first.shape[::-1], dtype).T
                    assert layer(value, out=out) is out
                    assert same_bits(layer(value), want)
                    assert same_bits(np.ascontiguousarray(out), want)
                assert layers[2].plan.packed_bytes in (0, layers[2].packed.values.nbytes)


def test_packing_does_not_count_for_a_prepared_filter():
    """Wherever the filter is packed the estimate is lower by it, whatever is taken then; the rest is the plan's."""
    for shape in ((4, 4, 4, 16, 32), (3, 3, 3, 32, 32), (2, 2, 2, 32, 32)):
        for name in (*WITHOUT_GROUPS, "auto"):
            try:
                plan = plan_conv3d_transpose((1, 8, 8, 8, 32), shape, strides=2, algorithm=name)
            except ValueError:
                continue
            layer = plan.prepare(np.ones(shape, np.float32))
            assert layer.plan.problem == replace(plan.problem, prepared=True)
            assert (layer.plan.requested, layer.plan.workers) == (plan.requested, plan.workers)
            before, after = (dict(p.estimates)[p.algorithm] for p in (plan, layer.plan))
            assert after < before if plan.packed_bytes else after <= before
            again = layer.plan.prepare(np.ones(shape, np.float32))
            assert again.plan is layer.plan


@pytest.mark.parametrize("name", WITHOUT_GROUPS)
def test_prepared_layers_refuse(name):
    """Shapes and dtypes that are not the plan's, before `out` is touched."""
    plan = plan_conv3d_transpose((2, 5, 6, 3, 4), (3, 3, 3, 5, 4), algorithm=name)
    value, filter = np.ones((2, 5, 6, 3, 4), np.float32), np.ones((3, 3, 3, 5, 4), np.float32)
    start = "^plan of conv3d_transpose: "
    with pytest.raises(ValueError, match=start + r"filter has shape \(3, 3, 3, 4, 5\), .* for \(3, 3, 3, 5, 4\)$"):
        plan.prepare(filter.reshape(3, 3, 3, 4, 5))
    with pytest.raises(TypeError, match=start + "filter of float64 gives float64, .* for float32$"):
        plan.prepare(filter.astype(np.float64))
    layer, out = plan.prepare(filter.tolist()), np.full(plan.output_shape, 77, np.float32)
    frozen, wrong = oracle.frozen(out.copy()), np.full((2, 5, 6, 3, 6), 77, np.float32)
    for exception, text, x, target in [
        (
            ValueError,
            r"value has shape \(2, 5, 6, 4, 3\), .* for \(2, 5, 6, 3, 4\)$",
            value.reshape(2, 5, 6, 4, 3),
            out,
        ),
        (TypeError, "value of complex64 gives complex64, .* for float32$", value.astype(np.complex64), out),
        (TypeError, "value has dtype bool; .*astype", value.astype(bool), out),
        (TypeError, "value of complex64 gives complex64, .* for float32$", (value * 1j).tolist(), out),
        (ValueError, r"out has shape \(2, 5, 6, 3, 6\), but the result has \(2, 5, 6, 3, 5\)", value, wrong),
        (TypeError, "out has dtype float16, .* float32 cannot", value, out.astype(np.float16)),
        (ValueError, "out is read-only", value, frozen),
    ]:
        with pytest.raises(exception, match=start + text):
            layer(x, target)
        assert (target == 77).all()
    assert same_bits(layer(value.tolist(), out), plan(value, filter))
    assert same_bits(layer(value.astype(np.float16)), out)  # as the plan takes it: the common dtype is float32


@pytest.mark.parametrize("given", ["int64", "longdouble"])
def test_prepare_names_the_filter(given):
    """Where it is the filter that is refused."""
    plan = plan_conv3d_transpose((1, 2, 2, 2, 1), (2, 2, 2, 1, 1))
    with pytest.raises(TypeError, match=f"^plan of conv3d_transpose: filter has dtype {np.dtype(given)}[;,]"):
        plan.prepare(np.ones((2, 2, 2, 1, 1), given))


@pytest.mark.parametrize(
    ("kernel", "strides"), [((1, 1, 1), (1, 1, 1)), ((2, 3, 1), (2, 3, 1)), ((1, 2, 2), (1, 4, 3))]
)
def test_winograd_says_what_it_cannot(kernel, strides):
    """No axis with several taps a phase: kernel and strides are in the text, and 'auto' computes it."""
    value, filter = np.ones((1, 6, 6, 6, 2), np.float32), np.ones((*kernel, 3, 2), np.float32)
    auto = plan_conv3d_transpose(value.shape, filter.shape, strides=strides)
    for ask in (conv3d_transpose, plan_conv3d_transpose):
        arguments = (value, filter) if ask is conv3d_transpose else (value.shape, filter.shape)
        with pytest.raises(CannotLowerError) as caught:
            ask(*arguments, strides=strides, algorithm="winograd")
        sizes = "got kernel {}x{}x{}, strides {}x{}x{}, dilations 1x1x1".format(*kernel, *strides)
        assert re.search(f"{sizes}; 'col2im' and 'auto' can$", str(caught.value))
    assert dict(auto.estimates)["winograd"] is None
    want = oracle.conv3d_transpose(value, filter, strides=strides)
    assert same_bits(auto(value, filter), want.astype(np.float32))


def test_winograd_says_that_a_filter_is_too_large():
    """Every axis has 3 taps: the text names the bytes of the packed filter, 4 points * 9 taps * 512 * 512 * 4."""
    with pytest.raises(CannotLowerError, match=f"{4 * 9 * 512 * 512 * 4} bytes"):
        plan_conv3d_transpose((1, 4, 4, 4, 512), (3, 3, 3, 512, 512), algorithm="winograd")


def test_winograd_packs_no_more_than_it_may():
    """An axis whose packed filter is too large is left out, whatever it costs."""
    plan = plan_conv3d_transpose((1, 32, 3, 16, 1024), (2, 3, 1, 1024, 1024), algorithm="winograd")
    assert 0 < plan.packed_bytes <= 32 << 20


def test_kn2row_says_what_it_cannot():
    """Taps that reach further than a block's rows can be held, with what they reach, take and may take."""
    value, filter = np.ones((1, 1, 1, 40_000, 64), np.float32), np.ones((1, 1, 2, 2, 64), np.float32)
    extra = {"dilations": [1, 1, 39_999]}
    auto = plan_conv3d_transpose(value.shape, filter.shape, **extra)
    with pytest.raises(ValueError, match=r"^conv3d_transpose: algorithm='kn2row' cannot.*'auto' can$") as caught:
        conv3d_transpose(value, filter, algorithm="kn2row", **extra)
    found = re.search(r"reach 0x0x(\d+) rows, .* take (\d+) bytes, more than (\d+);", str(caught.value))
    assert isinstance(caught.value, CannotLowerError)
    reach, taken, most = map(int, found.groups())
    assert reach == 39_999
    assert taken >= reach * 64 * 4
    assert taken > most
    assert most % auto.machine.l2_bytes == 0
    assert dict(auto.estimates)["kn2row"] is None
    assert same_bits(auto(value, filter), oracle.conv3d_transpose(value, filter, **extra).astype(np.float32))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", WITHOUT_GROUPS)
def test_profile_adds_up(name, workers):
    """Phases of calls, plans, layers and of calls that start again, and nothing of other threads or other times."""
    value, filter = normal(511, (1, 16, 16, 16, 32), (3, 3, 3, 32, 32))
    plan = plan_conv3d_transpose(value.shape, filter.shape, algorithm=name, workers=workers)
    layer, bad = plan.prepare(filter), value.copy()
    bad[0, 3, 3, 3, 3] = np.inf
    plan(value, filter)
    with gemmconv.profile() as outer:
        plan(value, filter)
        with gemmconv.profile() as inner:
            layer(value)
            conv3d_transpose(value, filter, algorithm=name, workers=workers)
        threads = [threading.Thread(target=plan, args=(value, filter)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with gemmconv.profile() as spoilt:
            layer(bad)
        with pytest.raises(ValueError, match=r"shape \(1, 16, 16, 16, 31\)"):
            plan(value[..., :31], filter)
    with gemmconv.profile() as empty:
        pass
    layer(value)
    assert [outer.calls, inner.calls, spoilt.calls, empty.calls] == [1, 2, 1, 0]
    assert empty.worker_seconds == sum(empty.seconds.values()) == 0
    for found in (outer, inner, spoilt):
        assert set(found.seconds) == {"pack", "gemm", "col2im", "store", "wait", "overhead"}
        assert min(found.seconds.values()) >= 0, found.seconds
        assert 0.95 * found.worker_seconds <= sum(found.seconds.values()) <= 1.005 * found.worker_seconds
        assert found.seconds["gemm"] > 0
        assert found.seconds["store"] + found.seconds["col2im"] > 0


@pytest.mark.parametrize("layout_of_out", ["as it is", "transposed"])
def test_profile_knows_all_of_a_call(layout_of_out):
    """Also where `out` is not contiguous, so that the result is copied; calls without products count too."""
    value, filter = normal(513, (1, 24, 24, 24, 16), (2, 2, 2, 16, 16))
    plan = plan_conv3d_transpose(value.shape, filter.shape, strides=2, workers=1)
    out = np.ones(plan.output_shape[::-1], np.float32).T if layout_of_out == "transposed" else plan(value, filter)
    known = []
    for _ in range(10):  # the thread may be put aside between two readings of the clock
        with gemmconv.profile() as found:
            start_s = time.perf_counter()
            plan(value, filter, out)
            took_s = time.perf_counter() - start_s
        assert found.worker_seconds <= took_s
        known.append(found.worker_seconds / took_s)
    assert max(known) >= 0.9
    with gemmconv.profile() as found:
        conv3d_transpose(value[:0], filter)
    assert found.calls == 1


def test_reports_list_the_candidates():
    """Every lowering with its estimate or 'cannot'; 'auto' takes the smallest, a forced one lists itself."""
    rng = np.random.default_rng(512)
    chosen = set()
    shapes = [random_problem(rng, "float32") for _ in range(40)]
    shapes += [operands(GEOMETRIES[0][:1] + g[1:], "float32", "NDHWC", 1, 128, 128) for g in GEOMETRIES[:2]]
    for value, filter, extra in shapes:
        for name, plan in plans_of(value, filter, **extra).items():
            line = re.search(r"^estimates +(.*)$", str(plan), re.M)[1]
            assert re.search(rf"^algorithm +{plan.algorithm}$", str(plan), re.M)
            assert plan.requested == name
            if not plan.blocks:
                continue
            costs = dict(plan.estimates)
            assert list(costs) == (list(WITHOUT_GROUPS) if name == "auto" else [name])
            assert [part.split()[0] for part in line.split(", ")] == list(costs)
            for part, cost in zip(line.split(", "), costs.values(), strict=True):
                said = part.split()[1]
                assert said == "cannot" if cost is None else math.isclose(float(said), cost * 1e3, rel_tol=0.01)
            able = {lowering: cost for lowering, cost in costs.items() if cost is not None}
            assert min(able.values()) > 0
            assert plan.algorithm == min(able, key=able.get)
            assert f"{plan.packed_bytes / 2**20:.2f} MiB a packed filter" in str(plan)
            chosen.add(plan.algorithm)
    assert chosen == set(WITHOUT_GROUPS)


@pytest.mark.parametrize("operation", sorted(LOWERINGS))
def test_docstrings_name_the_algorithms_that_there_are(operation):
    function = {"conv3d_backprop_filter": "conv3d_backprop_filter_v2"}.get(operation, operation)
    named = re.search(r"algorithm : \{(.*)\}", getattr(gemmconv, function).__doc__)
    assert named[1].split(", ") == [repr(name) for name in ("auto", *LOWERINGS[operation])]
