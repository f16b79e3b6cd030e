"""What comes back, in which dtype, where it is written, and what happens to the arrays that went in."""

import array
import itertools
import subprocess
import sys
import warnings

import numpy as np
import oracle
import pytest
from oracle import dtype_named, frozen, integers, same_bits

from gemmconv import conv3d_transpose, plan_conv3d_transpose

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


class Tagged(np.ndarray):
    """A subclass that fails if anyone computes with it as it is."""

    def __array_finalize__(self, other):
        self.tag = getattr(other, "tag", "mine")

    def __array_ufunc__(self, *arguments, **options):
        raise AssertionError("a ufunc was called on the subclass")

    def __array_function__(self, *arguments, **options):
        raise AssertionError("a NumPy function was called on the subclass")


class Named(np.ndarray):
    """A subclass with nothing of its own but its name."""


class ArrayLike:
    """Something with __array__ that is no array."""

    def __init__(self, data):
        self.data = data

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, dtype=dtype, copy=copy)


class Interface:
    """Something with __array_interface__."""

    def __init__(self, data):
        self.data = data
        self.__array_interface__ = data.__array_interface__


def pair(data_format="NDHWC", value="f4", filter="f4", seed=0):
    """Return value and filter of a problem with gaps, overlaps and cut edges, and the rest of its arguments."""
    rng = np.random.default_rng(seed)
    x = integers(rng, oracle.caller_order([2, 2, 3, 4, 3], data_format), value)
    f = integers(rng, (3, 2, 1, 5, 3), filter)
    return x, f, {"strides": [2, 1, 2], "data_format": data_format}


def exact(x, f, extra, dtype):
    """Return what the oracle says, in the result's dtype."""
    return oracle.rounded(oracle.conv3d_transpose(x, f, **extra), dtype)


def square(rng, dtype="f4"):
    """Return value and filter whose result at stride 1 has value's shape."""
    return integers(rng, (2, 3, 4, 5, 3), dtype).copy(), integers(rng, (3, 3, 3, 3, 3), dtype)


class TestResult:
    """A new C-contiguous ndarray in data_format order."""

    @pytest.mark.parametrize("planned", [False, True], ids=["function", "plan"])
    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_new_and_contiguous(self, dtype, data_format, planned):
        """Own memory, writeable, aligned, native."""
        dtype = dtype_named(dtype)
        x, f, extra = pair(data_format, dtype, dtype)
        want = exact(x, f, extra, dtype)
        if planned:
            y = plan_conv3d_transpose(x.shape, f.shape, **extra, dtype=dtype)(x, f)
        else:
            y = conv3d_transpose(x, f, **extra)
        assert type(y) is np.ndarray
        assert y.flags.c_contiguous
        assert y.flags.writeable
        assert y.flags.aligned
        assert y.dtype.byteorder == dtype.byteorder
        assert same_bits(y, want)
        assert not np.shares_memory(y, x)
        assert not np.shares_memory(y, f)

    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    def test_identity_is_a_copy(self, data_format):
        """A kernel of a single 1 returns the numbers of value and not its memory."""
        x = np.arange(24, dtype=np.float32).reshape(oracle.caller_order([1, 2, 3, 4, 1], data_format))
        y = conv3d_transpose(x, frozen(np.ones((1, 1, 1, 1, 1), np.float32)), data_format=data_format)
        assert same_bits(y, x)
        assert not np.shares_memory(x, y)

    def test_calls_do_not_share_memory(self):
        """A second call leaves the first one's result alone."""
        x, f, extra = pair()
        first = conv3d_transpose(x, f, **extra)
        kept = first.copy()
        second = conv3d_transpose(-x, f, **extra)
        assert not np.shares_memory(first, second)
        assert same_bits(first, kept)

    @pytest.mark.parametrize("which", ["value", "filter", "both"])
    def test_subclasses(self, which):
        """Subclasses are taken as the arrays they are, and the result is a plain ndarray."""
        x, f, extra = pair()
        want = exact(x, f, extra, "f4")
        left = x.view(Tagged) if which != "filter" else x
        right = f.view(Tagged) if which != "value" else f
        y = conv3d_transpose(left, right, **extra)
        assert type(y) is np.ndarray
        assert same_bits(y, want)

    def test_memmap_operands(self, tmp_path):
        """A read-only memmap is an array like another."""
        x, f, extra = pair()
        np.save(tmp_path / "x.npy", x)
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        y = conv3d_transpose(mapped, f, **extra)
        assert type(y) is np.ndarray
        assert same_bits(y, exact(x, f, extra, "f4"))

    def test_array_likes(self):
        """__array__, __array_interface__, buffers, lists of arrays, tuples."""
        x, f, extra = pair()
        want = exact(x, f, extra, "f4")
        buffer = memoryview(array.array("f", x.ravel().tolist())).cast("B").cast("f", x.shape)
        nested = tuple(tuple(map(tuple, block)) for block in x.tolist())
        for like in [ArrayLike(x), Interface(x), memoryview(x), buffer, list(x), [list(block) for block in x], nested]:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                y = conv3d_transpose(like, f, **extra)
            assert same_bits(y, want), type(like)
        assert same_bits(conv3d_transpose(x, list(f), **extra), want)

    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_inputs_are_not_modified(self, dtype, data_format):
        """Writeable operands keep every bit, -0.0 and NaN included."""
        dtype = dtype_named(dtype)
        x, f, extra = pair(data_format, dtype, dtype)
        x, f = x.copy(), f.copy()
        x[x == 0], f[f == 0] = -0.0, -0.0
        x.flat[7] = np.nan
        before = x.tobytes(), f.tobytes()
        for workers in (1, 2):
            conv3d_transpose(x, f, **extra, workers=workers)
        assert before == (x.tobytes(), f.tobytes())
        assert x.flags.writeable
        assert f.flags.writeable

    def test_lists_are_not_modified(self):
        """Nor is a list."""
        x, f, extra = pair()
        left, right = x.tolist(), f.tolist()
        conv3d_transpose(left, right, **extra)
        assert (left, right) == (x.tolist(), f.tolist())


class TestDtype:
    """np.result_type(value, filter), and lists that have none of their own."""

    @pytest.mark.parametrize(
        ("left", "right"),
        [pair for pair in itertools.product(DTYPES, DTYPES) if set(pair) != {"float16", "bfloat16"}],
    )
    def test_two_arrays(self, left, right):
        """Never narrowed, whichever operand is the wider."""
        left, right = dtype_named(left), dtype_named(right)
        x, f, extra = pair(value=left, filter=right)
        y = conv3d_transpose(x, f, **extra)
        assert y.dtype == np.result_type(x, f)
        assert same_bits(y, exact(x, f, extra, np.result_type(left, right)))

    @pytest.mark.parametrize(
        ("wide", "narrow", "tiny"), [("f8", "f4", 2.0**-40), ("c16", "c8", 2.0**-40), ("f4", "f2", 2.0**-20)]
    )
    def test_wide_numbers_survive(self, wide, narrow, tiny):
        """A bit that only the wider dtype holds is in the result, and the narrow operand is not narrowed further."""
        x, f = np.full((1, 2, 2, 2, 1), 1 + tiny, wide), np.ones((1, 1, 1, 1, 1), narrow)
        assert same_bits(conv3d_transpose(x, f), x)
        assert same_bits(conv3d_transpose(f, x[:, :1, :1, :1].copy()), x[:, :1, :1, :1])

    @pytest.mark.parametrize("swapped", ["value", "filter", "both"])
    @pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "bfloat16"])
    def test_byte_swapped(self, dtype, swapped):
        """Swapped operands give a native result."""
        x, f, extra = pair(value=dtype, filter=dtype)
        want, other = exact(x, f, extra, dtype), np.dtype(dtype).newbyteorder()
        y = conv3d_transpose(
            x.astype(other) if swapped != "filter" else x, f.astype(other) if swapped != "value" else f, **extra
        )
        assert y.dtype.isnative
        assert same_bits(y, want)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", [int, float])
    def test_one_list(self, kind, dtype):
        """A list of Python numbers takes the other operand's dtype, on either side."""
        dtype = dtype_named(dtype)
        x, f, extra = pair(value=dtype, filter=dtype)
        want = exact(x, f, extra, dtype)
        if dtype.kind == "c":
            x, f = frozen(x.real.astype(dtype)), frozen(f.real.astype(dtype))
            want = exact(x, f, extra, dtype)
        listed = [oracle.wide(operand).real.astype(kind).tolist() for operand in (x, f)]
        assert same_bits(conv3d_transpose(listed[0], f, **extra), want)
        assert same_bits(conv3d_transpose(x, listed[1], **extra), want)

    @pytest.mark.parametrize(
        ("dtype", "want"),
        [("float16", "c8"), ("float32", "c8"), ("float64", "c16"), ("complex64", "c8"), ("complex128", "c16")],
    )
    def test_one_complex_list(self, dtype, want):
        """Complex numbers in a list are not narrowed to a real dtype."""
        x, f, extra = pair(value=dtype, filter="c16")
        y = conv3d_transpose(x, f.tolist(), **extra)
        assert same_bits(y, exact(x, f, extra, want))

    @pytest.mark.parametrize(
        ("kinds", "want"), [("ff", "f4"), ("ii", "f4"), ("if", "f4"), ("cf", "c8"), ("ic", "c8"), ("cc", "c8")]
    )
    def test_two_lists(self, kinds, want):
        """Two lists give float32, or complex64."""
        types = {"f": "f8", "i": "i8", "c": "c16"}
        x, f, extra = pair(value=types[kinds[0]], filter=types[kinds[1]])
        y = conv3d_transpose(x.tolist(), f.tolist(), **extra)
        assert same_bits(y, exact(x, f, extra, want))

    def test_list_keeps_the_digits_of_the_other_dtype(self):
        """A Python float goes to float64 without a detour through float32."""
        y = conv3d_transpose([[[[[0.1]]]]], np.ones((1, 1, 1, 1, 1)))
        assert same_bits(y, np.full((1, 1, 1, 1, 1), 0.1))

    def test_list_of_arrays_has_a_dtype(self):
        """Arrays in a list are not Python numbers: float64 ones are not narrowed to the other's float32."""
        x, f, extra = pair(value="f8")
        for listed in (list(x), [list(block) for block in x]):
            assert same_bits(conv3d_transpose(listed, f, **extra), exact(x, f, extra, "f8"))

    @pytest.mark.parametrize("number", [2**53, 2**63, 2**70, -(2**100)], ids=lambda number: f"{float(number):.0e}")
    def test_python_integers_have_no_size(self, number):
        """Integers that fit no integer dtype are numbers still."""
        y = conv3d_transpose([[[[[number, -1]]]]], frozen(np.array([[[[[1, 0]]]]], np.float32)))
        assert same_bits(y, np.full((1, 1, 1, 1, 1), number, np.float32))

    def test_ml_dtypes_is_not_imported(self):
        """Nobody who has no bfloat16 pays for it."""
        code = (
            "import sys, numpy as np, gemmconv\n"
            "x = np.ones((1, 2, 2, 2, 1), np.float16)\n"
            "gemmconv.conv3d_transpose(x, x[:, :1, :1, :1], strides=2)\n"
            "gemmconv.plan_conv3d_transpose((1, 2, 2, 2, 1), (1, 1, 1, 1, 1))\n"
            "assert 'ml_dtypes' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def layouts(shape, dtype):
    """Yield the name and the array of several ways to have memory for a result."""
    yield "contiguous", np.full(shape, np.nan, dtype)
    yield "fortran", np.full(shape, np.nan, dtype, order="F")
    yield "reversed", np.full(shape, np.nan, dtype)[::-1, :, ::-1, ::-1, ::-1]
    yield "every-second", np.full([2 * size for size in shape], np.nan, dtype)[::2, 1::2, ::2, 1::2, ::2]
    yield "window", np.full([size + 2 for size in shape], np.nan, dtype)[(slice(1, -1),) * 5]
    yield "transposed", np.full(shape[::-1], np.nan, dtype).T
    unaligned = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 1, np.uint8)[1:].view(dtype).reshape(shape)
    yield "unaligned", unaligned


class TestOut:
    """The result in an array of the caller's."""

    @pytest.mark.parametrize("planned", [False, True], ids=["function", "plan"])
    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layouts(self, dtype, data_format, planned):
        """Any memory layout, `out` itself is returned, and nothing around it is written."""
        dtype = dtype_named(dtype)
        x, f, extra = pair(data_format, dtype, dtype)
        want = exact(x, f, extra, dtype)
        plan = plan_conv3d_transpose(x.shape, f.shape, **extra, dtype=dtype)
        for name, out in layouts(want.shape, dtype):
            returned = plan(x, f, out=out) if planned else conv3d_transpose(x, f, **extra, out=out)
            assert returned is out, name
            assert same_bits(np.ascontiguousarray(out), want), name
            if name in ("every-second", "window"):
                assert np.isnan(out.base.astype(np.complex128)).sum() == out.base.size - out.size, name

    def test_plan_takes_out_by_position(self):
        """plan(value, filter, out)."""
        x, f, extra = pair()
        want = exact(x, f, extra, "f4")
        out = np.empty(want.shape, np.float32)
        assert plan_conv3d_transpose(x.shape, f.shape, **extra)(x, f, out) is out
        assert same_bits(out, want)

    def test_none_is_no_out(self):
        """out=None is the default."""
        x, f, extra = pair()
        assert same_bits(conv3d_transpose(x, f, **extra, out=None), exact(x, f, extra, "f4"))

    def test_used_twice(self):
        """Nothing is added to what `out` holds."""
        x, f, extra = pair()
        want = exact(x, f, extra, "f4")
        out = np.empty(want.shape, np.float32)
        for _ in range(2):
            conv3d_transpose(x, f, **extra, out=out)
            assert same_bits(out, want)

    @pytest.mark.parametrize(
        ("operands", "dtype"),
        [
            ("float16", "float32"),
            ("float16", "complex128"),
            ("bfloat16", "float32"),
            ("bfloat16", "float64"),
            ("float32", "float64"),
            ("float32", "complex64"),
            ("float32", "longdouble"),
            ("float64", "complex128"),
            ("complex64", "complex128"),
        ],
    )
    def test_safe_casts(self, operands, dtype):
        """`out` holds the result, cast: float16 is rounded first, and a real result has an imaginary part of +0.0."""
        operands = dtype_named(operands)
        rng = np.random.default_rng(1)
        x = integers(rng, (1, 2, 3, 4, 40), operands, largest=8)
        f = integers(rng, (3, 3, 3, 5, 40), operands, largest=8)
        result = conv3d_transpose(x, f, strides=2)
        assert same_bits(result, exact(x, f, {"strides": 2}, operands))
        out = np.full(result.shape, np.nan, dtype)
        assert conv3d_transpose(x, f, strides=2, out=out) is out
        assert np.array_equal(out, result.astype(dtype))
        assert not np.signbit(out.real[out.real == 0]).any()
        assert not np.signbit(out.imag[out.imag == 0]).any()

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
    def test_byte_swapped(self, dtype):
        """The other byte order is a safe cast."""
        x, f, extra = pair(value=dtype, filter=dtype)
        want, other = exact(x, f, extra, dtype), np.dtype(dtype).newbyteorder()
        out = np.full(want.shape, np.nan, other)
        assert conv3d_transpose(x, f, **extra, out=out) is out
        assert out.dtype == other
        assert same_bits(out.astype(dtype), want)

    def test_memmap(self, tmp_path):
        """The result goes to the file."""
        x, f, extra = pair()
        want = exact(x, f, extra, "f4")
        out = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, want.shape)
        assert conv3d_transpose(x, f, **extra, out=out) is out
        out.flush()
        assert same_bits(np.load(tmp_path / "y.npy"), want)

    def test_subclass(self):
        """A subclass is returned as the object it is."""
        x, f, extra = pair()
        want = exact(x, f, extra, "f4")
        out = np.empty(want.shape, np.float32).view(Named)
        assert conv3d_transpose(x, f, **extra, out=out) is out
        assert same_bits(out.view(np.ndarray), want)

    def test_empty(self):
        """An `out` with nothing in it."""
        out = np.empty((0, 2, 2, 2, 3), np.float32)
        x, f = np.ones((0, 2, 2, 2, 1), np.float32), np.ones((1, 1, 1, 3, 1), np.float32)
        assert conv3d_transpose(x, f, out=out) is out


class TestOverlap:
    """`out` that shares memory with an input gets the right result all the same."""

    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_out_is_value(self, dtype, workers):
        """In place."""
        x, f = square(np.random.default_rng(2), dtype_named(dtype))
        want = exact(x, f, {}, x.dtype)
        assert conv3d_transpose(x, f, out=x, workers=workers) is x
        assert same_bits(x, want)

    @pytest.mark.parametrize("kernel", [(1, 1, 1), (2, 1, 3)])
    def test_out_is_value_with_small_kernels(self, kernel):
        """In place, also where a product could be written straight to `out`."""
        rng = np.random.default_rng(3)
        x, f = integers(rng, (2, 3, 4, 5, 6), "f4").copy(), integers(rng, (*kernel, 6, 6), "f4")
        want = exact(x, f, {}, "f4")
        conv3d_transpose(x, f, out=x)
        assert same_bits(x, want)

    @pytest.mark.parametrize("view", ["reversed", "transposed", "fortran"])
    def test_views_of_value(self, view):
        """Other strides, the same memory."""
        rng = np.random.default_rng(4)
        x, f = integers(rng, (2, 3, 3, 3, 3), "f4").copy(), integers(rng, (3, 2, 1, 3, 3), "f4")
        want = exact(x, f, {}, "f4")
        out = {
            "reversed": x[::-1, ::-1, :, ::-1],
            "transposed": x.transpose(0, 4, 3, 2, 1),
            "fortran": x.transpose(0, 2, 3, 4, 1),
        }
        conv3d_transpose(x, f, out=out[view])
        assert same_bits(np.ascontiguousarray(out[view]), want)

    @pytest.mark.parametrize("shift", [1, 7, 50, 300])
    @pytest.mark.parametrize("first", ["value", "out"])
    def test_shifted_windows(self, shift, first):
        """Windows of one buffer that overlap in part, either in front."""
        rng = np.random.default_rng(5)
        x, f = square(rng)
        buffer = np.empty(x.size + shift, np.float32)
        low, high = buffer[: x.size].reshape(x.shape), buffer[shift:].reshape(x.shape)
        value, out = (low, high) if first == "value" else (high, low)
        value[...] = x
        conv3d_transpose(value, f, out=out)
        assert same_bits(out.copy(), exact(x, f, {}, "f4"))

    def test_interleaved(self):
        """Bounds that overlap and cells that do not: the input stays as it is."""
        x, f = square(np.random.default_rng(6))
        buffer = np.empty((*x.shape, 2), np.float32)
        value, out = buffer[..., 0], buffer[..., 1]
        value[...] = x
        conv3d_transpose(value, f, out=out)
        assert same_bits(np.ascontiguousarray(out), exact(x, f, {}, "f4"))
        assert same_bits(np.ascontiguousarray(value), x)

    def test_other_dtype(self):
        """A float64 `out` on top of a float32 value."""
        x, f = square(np.random.default_rng(7))
        buffer = np.empty(x.size, np.float64)
        value, out = (
            buffer.view(np.float32)[x.size // 2 : x.size // 2 + x.size].reshape(x.shape),
            buffer.reshape(x.shape),
        )
        value[...] = x
        conv3d_transpose(value, f, out=out)
        assert same_bits(out, exact(x, f, {}, "f8"))

    @pytest.mark.parametrize("which", ["filter", "both"])
    def test_out_is_filter(self, which):
        """A result with the filter's shape, on top of the filter, or of both."""
        rng = np.random.default_rng(8)
        f = integers(rng, (3, 3, 3, 3, 3), "f4").copy()
        x = f if which == "both" else integers(rng, (3, 3, 3, 3, 3), "f4")
        want = exact(x, f, {}, "f4")
        assert conv3d_transpose(x, f, out=f) is f
        assert same_bits(f, want)

    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    def test_plan_and_layouts(self, data_format):
        """The same through a plan, strided and channels first."""
        rng = np.random.default_rng(9)
        shape = oracle.caller_order([2, 3, 4, 5, 3], data_format)
        extra = {"data_format": data_format}
        plan = plan_conv3d_transpose(shape, (2, 3, 2, 3, 3), **extra)
        f = integers(rng, (2, 3, 2, 3, 3), "f4")
        x = integers(rng, shape, "f4").copy()
        want = exact(x, f, extra, "f4")
        assert plan(x, f, out=x) is x
        assert same_bits(x, want)

    def test_overlap_of_broadcast_value(self):
        """A value with strides of 0 on a cell of `out`."""
        f = integers(np.random.default_rng(10), (3, 3, 3, 3, 3), "f4")
        out = np.full((1, 3, 3, 3, 3), np.nan, np.float32)
        out[0, 1, 1, 1, 1] = 2
        x = np.broadcast_to(out[:, 1:2, 1:2, 1:2, 1:2], out.shape)
        want = exact(np.full(out.shape, 2, np.float32), f, {}, "f4")
        conv3d_transpose(x, f, out=out)
        assert same_bits(out, want)
