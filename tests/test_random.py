"""Thousands of seeded random problems against the oracle: whole numbers and bit equality, and floats with a bound.

Whole numbers with |v| <= 8 make sums that float32 holds exactly, so any order of summation, block size, layout, number
of workers or route through the code must give the same bits. A failure prints the whole problem with its seed.
"""

import contextlib
import dataclasses
import itertools
import threading

import numpy as np
import oracle
import pytest
from oracle import dtype_named, frozen, integers, same_bits

from gemmconv import conv3d_transpose, plan_conv3d_transpose

CHUNK = 250
NUMPY_DTYPES = ["float16", "float32", "float64", "complex64", "complex128"]
FLAVOURS = ["plain", "plain", "fortran", "permuted", "strided", "reversed", "swapped", "unaligned", "constant", "list"]
FLAVOURS += ["array_like"]


class ArrayLike:
    """Something that NumPy can turn into an array and that is none itself."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype=dtype, copy=copy)


def flavoured(rng, array, flavour):
    """Return the same numbers in an object whose memory looks otherwise; 'constant' alone changes numbers."""
    if flavour == "list":
        return array.tolist()
    if flavour == "array_like":
        return ArrayLike(array)
    if flavour == "fortran":
        result = np.asfortranarray(array)
    elif flavour == "permuted":
        order = rng.permutation(array.ndim)
        result = np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    elif flavour == "strided":
        steps = [int(step) for step in rng.integers(1, 4, array.ndim)]
        buffer = np.full([size * step + 1 for size, step in zip(array.shape, steps, strict=True)], 77, array.dtype)
        result = buffer[tuple(slice(0, size * step, step) for size, step in zip(array.shape, steps, strict=True))]
        result[...] = array
    elif flavour == "reversed":
        turn = tuple(slice(None, None, int(step)) for step in rng.choice([1, -1], array.ndim))
        result = array[turn].copy()[turn]
    elif flavour == "swapped":
        result = array.astype(array.dtype.newbyteorder())
    elif flavour == "unaligned":
        buffer = np.empty(array.nbytes + 1, np.uint8)
        result = buffer[1:].view(array.dtype).reshape(array.shape)
        result[...] = array
    elif flavour == "constant":
        axes = rng.random(array.ndim) < 0.5
        first = array[tuple(slice(0, 1) if axis else slice(None) for axis in axes)]
        result = np.broadcast_to(first, array.shape) if array.size else array
    else:
        result = array.copy()
    return frozen(result) if rng.random() < 0.5 else result


def contents(array):
    """Return the numbers of a list or an array_like as an array."""
    return np.asarray(array.array if isinstance(array, ArrayLike) else array)


@dataclasses.dataclass
class Problem:
    """One call, with all there is to say about it."""

    seed: tuple
    value: object
    filter: object
    flavours: tuple
    extra: dict
    dtype: np.dtype = None
    want: np.ndarray = None

    def __str__(self):
        """Return the problem as text, enough to build it again."""
        value, filter_ = contents(self.value), contents(self.filter)
        extra = ", ".join(f"{name}={number!r}" for name, number in self.extra.items())
        return (
            f"seed {self.seed}\n"
            f"value  {value.shape} {value.dtype.name} {self.flavours[0]} strides {value.strides}\n"
            f"filter {filter_.shape} {filter_.dtype.name} {self.flavours[1]} strides {filter_.strides}\n"
            f"{extra}\nresult {self.want.shape} {self.dtype.name}"
        )


def axis_of(rng):
    """Return sizes n, k, s, dilation of one axis: zero, small, k < s, k = s, dilations that divide s or do not."""
    n = int(rng.choice([0, 1, 2, 3, 4, 5], p=[0.03, 0.15, 0.27, 0.27, 0.18, 0.1]))
    s = int(rng.integers(1, 5))
    k = s if rng.random() < 0.2 else int(rng.choice([0, 1, 2, 3, 4, 5], p=[0.03, 0.22, 0.25, 0.3, 0.12, 0.08]))
    dilation = 1 if rng.random() < 0.45 else int(rng.choice([s, 2 * s, 2, 3, 4, 5]))
    return n, k, s, dilation


def per_axis(rng, numbers, data_format):
    """Return three numbers in one of the forms that strides and dilations take."""
    five = oracle.caller_order([1, *numbers, 1], data_format)
    forms = [numbers, tuple(numbers), np.array(numbers), five, tuple(five), np.array(five, np.int32)]
    if len(set(numbers)) == 1:
        forms += [numbers[0], numbers[:1], (np.int64(numbers[0]),), *[None] * (numbers[0] == 1)]
    return forms[rng.integers(len(forms))]


def random_problem(seed, dtypes):
    """Return a random problem with its exact result."""
    rng = np.random.default_rng(seed)
    while True:
        axes = [axis_of(rng) for _ in range(3)]
        n, k, s, dilation = ([axis[i] for axis in axes] for i in range(4))
        padding = str(rng.choice(["SAME", "VALID"]))
        if rng.random() < 0.15:
            o = None
            biggest = [oracle.inferred_size(*axis, padding) for axis in axes]
        else:
            ranges = [oracle.reachable_sizes(*axis, padding) for axis in axes]
            # A kernel of no cells asks for n*s - s to n*s - 1, which for n = 0 begins below zero.
            o = biggest = [int(rng.integers(max(low, 0), high + 1)) for low, high in ranges]
        batch = int(rng.choice([0, 1, 2, 3], p=[0.02, 0.5, 0.3, 0.18]))
        cin = int(rng.choice([0, 1, 2, 3, 4, 5, 7, 8, 16, 19], p=[0.03, 0.17, *[0.1] * 8]))
        cout = 0 if rng.random() < 0.02 else int(rng.integers(1, 34))
        taps = int(np.prod(k))
        if np.prod(biggest) * batch * cout < 30000 and np.prod(n) * batch * taps * max(cin, cout) < 150000:
            break
    data_format = str(rng.choice(["NDHWC", "NCDHW"]))
    left = dtype_named(rng.choice(dtypes))
    right = left if rng.random() < 0.8 else dtype_named(rng.choice(dtypes))
    value = integers(rng, oracle.caller_order([batch, *n, cin], data_format), left)
    filter_ = integers(rng, [*k, cout, cin], right)
    arrays, flavours = [], []
    for array in (value, filter_):
        flavour = str(rng.choice(FLAVOURS))
        if flavour == "list" and array.size == 0:
            flavour = "reversed"  # a nested list has no shape beyond its first empty axis
        if flavour == "swapped" and array.dtype.name == "bfloat16":
            flavour = "permuted"  # ml_dtypes has no byte-swapped dtype
        arrays.append(flavoured(rng, array, flavour))
        flavours.append(flavour)
    own = [
        None if flavour == "list" else array.dtype for flavour, array in zip(flavours, (value, filter_), strict=True)
    ]
    listed = np.complex64 if "c" in (left.kind, right.kind) else np.float32
    # A list takes the other's dtype; complex numbers in a list make that complex.
    known = [dtype for dtype in own if dtype is not None]
    kinds = (
        [np.complex64]
        if any(o is None and a.dtype.kind == "c" for o, a in zip(own, (value, filter_), strict=True))
        else []
    )
    dtype = np.result_type(*known, *kinds) if known else np.dtype(listed)
    extra = {"padding": padding, "data_format": data_format}
    extra["strides"] = per_axis(rng, s, data_format)
    extra["dilations"] = per_axis(rng, dilation, data_format)
    if o is not None:
        shape = oracle.caller_order([batch, *o, cout], data_format)
        extra["output_shape"] = [shape, tuple(shape), np.array(shape), np.array(shape, np.uint16)][rng.integers(4)]
    problem = Problem(seed, *arrays, tuple(flavours), extra, dtype)
    problem.want = oracle.rounded(oracle.conv3d_transpose(contents(arrays[0]), contents(arrays[1]), **extra), dtype)
    return problem


def random_out(rng, problem):
    """Return an array of garbage that can take the result: any memory layout, any dtype that it can be cast to."""
    dtype = problem.dtype
    if rng.random() < 0.2:
        wider = [wide for wide in map(np.dtype, NUMPY_DTYPES) if np.can_cast(dtype, wide, "safe")]
        dtype = wider[rng.integers(len(wider))] if wider else dtype
    garbage = np.full(problem.want.shape, np.nan, dtype)
    flavour = str(rng.choice(["plain", "fortran", "permuted", "strided", "reversed", "swapped", "unaligned"]))
    if flavour == "swapped" and dtype.name == "bfloat16":
        flavour = "plain"
    out = flavoured(rng, garbage, flavour)
    out.flags.writeable = True
    return out


@contextlib.contextmanager
def told(problem):
    """Add the whole problem to whatever goes wrong inside."""
    try:
        yield
    except BaseException as error:
        error.add_note(str(problem))
        raise


def check(problem, rng):
    """Compare every way of asking for the result with the oracle, bit by bit."""
    x, f, extra, want = problem.value, problem.filter, problem.extra, problem.want
    before = [contents(x).tobytes(), contents(f).tobytes()]
    workers = [None, 1, 2][rng.integers(3)]
    names = [("value", "filter"), ("input", "filters"), ("value", "filters")][rng.integers(3)]
    y = conv3d_transpose(**dict(zip(names, (x, f), strict=True)), **extra, workers=workers)
    assert type(y) is np.ndarray
    assert y.flags.c_contiguous
    assert y.shape == want.shape, f"shape {y.shape}, not {want.shape}"
    assert y.dtype == want.dtype, f"dtype {y.dtype}, not {want.dtype}"
    assert same_bits(y, want), f"workers={workers}: {np.sum(y != want)} of {y.size} cells differ"

    out = random_out(rng, problem)
    assert conv3d_transpose(x, f, **extra, out=out, workers=2) is out
    written = np.ascontiguousarray(out).astype(
        out.dtype.newbyteorder("=") if out.dtype.name != "bfloat16" else out.dtype
    )
    assert same_bits(written, want.astype(written.dtype)), f"out {out.dtype} {out.strides}, workers=2"

    plan = plan_conv3d_transpose(
        contents(x).shape, contents(f).shape, **extra, dtype=problem.dtype, algorithm="col2im", workers=1
    )
    assert plan.output_shape == want.shape
    for _ in range(2):
        if rng.random() < 0.5:
            assert same_bits(plan(x, f), want), "plan"
        else:
            out = random_out(rng, dataclasses.replace(problem, dtype=problem.dtype))
            assert plan(x, f, out=out) is out
            written = np.ascontiguousarray(out)
            assert (written == want).all(), f"plan, out {out.dtype} {out.strides}"
    assert before == [contents(x).tobytes(), contents(f).tobytes()], "an input was modified"


@pytest.mark.parametrize("seed", range(8))
def test_random_problems(seed):
    """Whole numbers in all dtypes of NumPy's own, alone and mixed."""
    for index in range(CHUNK):
        problem = random_problem((seed, index), NUMPY_DTYPES)
        with told(problem):
            check(problem, np.random.default_rng((seed, index, 1)))


@pytest.mark.parametrize("seed", range(100, 102))
def test_random_bfloat16(seed):
    """The same with bfloat16, mixed with all that it has a common dtype with."""
    dtype_named("bfloat16")
    others = ["float32", "float64", "complex64", "complex128"]
    for index in range(CHUNK):
        problem = random_problem((seed, index), ["bfloat16"] * 12 + others)
        with told(problem):
            check(problem, np.random.default_rng((seed, index, 1)))


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_every_size_of_an_axis(stride, padding, axis):
    """All reachable output sizes of all small sizes, kernels and dilations along one axis."""
    rng = np.random.default_rng(axis)
    for n, k, dilation in itertools.product(range(5), range(6), range(1, 6)):
        low, high = oracle.reachable_sizes(n, k, stride, dilation, padding)
        for o in range(max(low, 0), high + 1):
            shapes = [[1, 1, 2, 1, 2], [1, 1, 1, 2, 2], [1, 1, 2, 1, 2], [1] * 5, [1] * 5]
            shapes[0][axis], shapes[1][axis - 1], shapes[2][axis], shapes[3][axis], shapes[4][axis] = (
                n,
                k,
                o,
                stride,
                dilation,
            )
            if axis == 2:
                shapes[0][3] = shapes[2][3] = 2
            x, f = integers(rng, shapes[0], "f4"), integers(rng, shapes[1], "f4")
            extra = {"output_shape": shapes[2], "strides": shapes[3], "padding": padding, "dilations": shapes[4]}
            want = oracle.rounded(oracle.conv3d_transpose(x, f, **extra), "f4")
            with told(Problem((axis,), x, f, ("plain", "plain"), extra, np.dtype("f4"), want)):
                assert same_bits(conv3d_transpose(x, f, **extra), want)


@pytest.mark.parametrize("seed", range(12))
def test_larger_problems(seed):
    """Sizes beyond one block, one panel and one thread's share."""
    rng = np.random.default_rng((200, seed))
    n = [int(i) for i in rng.integers(4, 13, 3)]
    k, s, dilation = ([int(i) for i in rng.integers(1, top, 3)] for top in (4, 4, 3))
    batch, cin, cout = int(rng.integers(1, 4)), int(rng.integers(1, 80)), int(rng.integers(1, 80))
    dtype = ["float32", "float32", "float64", "complex64", "float16"][seed % 5]
    data_format = ["NDHWC", "NCDHW"][seed % 2]
    x = integers(rng, oracle.caller_order([batch, *n, cin], data_format), dtype)
    f = integers(rng, [*k, cout, cin], dtype)
    extra = {
        "strides": s,
        "padding": ["SAME", "VALID"][seed // 2 % 2],
        "data_format": data_format,
        "dilations": dilation,
    }
    want = oracle.rounded(oracle.conv3d_transpose(x, f, **extra), dtype)
    with told(Problem((200, seed), x, f, ("plain", "plain"), extra, np.dtype(dtype), want)):
        for workers in (1, 2, 3):
            assert same_bits(conv3d_transpose(x, f, **extra, workers=workers), want), f"workers={workers}"


def test_threads_of_the_caller():
    """Several threads call one plan, and the function, at the same time, each with data of its own."""
    rng = np.random.default_rng(300)
    plan = plan_conv3d_transpose((2, 4, 5, 6, 8), (3, 3, 3, 9, 8), strides=2, workers=2)
    tasks = [(integers(rng, (2, 4, 5, 6, 8), "f4"), integers(rng, (3, 3, 3, 9, 8), "f4")) for _ in range(4)]
    wants = [oracle.conv3d_transpose(x, f, strides=2).astype("f4") for x, f in tasks]
    agreed = []

    def target(index):
        x, f = tasks[index]
        agreed.extend(same_bits(plan(x, f), wants[index]) for _ in range(10))
        agreed.extend(same_bits(conv3d_transpose(x, f, strides=2, workers=2), wants[index]) for _ in range(10))

    threads = [threading.Thread(target=target, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agreed == [True] * 80


BOUNDS = {"float32": 1e-6, "complex64": 1e-6, "float64": 4e-15, "complex128": 4e-15}


@pytest.mark.parametrize("geometry", [(1, 1), (2, 1), (1, 2), (2, 3)], ids=["plain", "strided", "dilated", "both"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *BOUNDS])
def test_normal_data(dtype, geometry):
    """Normally distributed numbers, 1728 products a cell: 1e-6 of the largest output in float32.

    float16 and bfloat16 differ from that by one rounding. The bound of float64 allows for the oracle's own error.
    """
    dtype, (stride, dilation) = dtype_named(dtype), geometry
    rng = np.random.default_rng(400)

    def normal(*shape):
        real = rng.standard_normal(shape)
        return frozen((real + 1j * rng.standard_normal(shape) if dtype.kind == "c" else real).astype(dtype))

    x, f = normal(2, 5, 6, 7, 64), normal(3, 3, 3, 24, 64)
    want = oracle.conv3d_transpose(x, f, None, stride, dilations=dilation)
    y = conv3d_transpose(x, f, None, stride, dilations=dilation)
    assert y.dtype == dtype
    error = np.abs(oracle.wide(y) - want)
    if dtype.itemsize == 2:
        half_ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype.name]
        assert (error <= half_ulp * np.abs(want) + 2e-6 * np.abs(want).max()).all()
    else:
        assert error.max() <= BOUNDS[dtype.name] * np.abs(want).max()
