"""Every fact and number that the contract states about results, one test each."""

import inspect
import itertools
import threading
import warnings

import numpy as np
import oracle
import pytest
from oracle import dtype_named, frozen, integers, same_bits

import gemmconv
from gemmconv import conv3d_transpose, plan_conv3d_transpose

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
CHANNELS = [(1, 1), (1, 4), (3, 1), (2, 3), (8, 16), (17, 33)]
ERROR_MODES = ["ignore", "warn", "raise", "call"]


def ones(*shape, dtype=np.float32):
    """Return read-only ones."""
    return frozen(np.ones(shape, dtype))


def filled(shape, number, dtype):
    """Return a read-only array of one number."""
    array = np.empty(shape, dtype)
    array[...] = number
    return frozen(array)


def row(numbers, axis, dtype=np.float32):
    """Return numbers along one of D, H, W of an array with five axes, all others of size 1."""
    shape = [1] * 5
    shape[axis] = len(numbers)
    return frozen(np.array(numbers, dtype).reshape(shape))


def no_negative_zero(array):
    """Return whether every zero of an array, and every zero part of a complex one, is +0.0."""
    parts = [array.real, array.imag] if array.dtype.kind == "c" else [array]
    return not any((np.signbit(part.astype(np.float64)) & (part == 0)).any() for part in parts)


class TestSignature:
    """The ten names of TensorFlow, their order and their defaults."""

    def test_ten_names_and_their_defaults(self):
        """`value` has a default, which TensorFlow's has not; all else is TensorFlow's."""
        parameters = list(inspect.signature(conv3d_transpose).parameters.values())
        assert [(p.name, p.default) for p in parameters[:10]] == [
            ("value", None),
            ("filter", None),
            ("output_shape", None),
            ("strides", None),
            ("padding", "SAME"),
            ("data_format", "NDHWC"),
            ("name", None),
            ("input", None),
            ("filters", None),
            ("dilations", None),
        ]
        assert {p.kind for p in parameters[:10]} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}

    def test_own_arguments_are_keyword_only(self):
        """`out`, `algorithm` and `workers` follow, by keyword alone."""
        own = list(inspect.signature(conv3d_transpose).parameters.values())[10:]
        assert {"out", "algorithm", "workers"} <= {p.name for p in own}
        assert {p.kind for p in own} == {inspect.Parameter.KEYWORD_ONLY}
        assert {p.name: p.default for p in own}["out"] is None

    def test_plan_signature(self):
        """The plan takes shapes in the same order and has neither name nor aliases."""
        parameters = list(inspect.signature(plan_conv3d_transpose).parameters.values())
        names = ["value_shape", "filter_shape", "output_shape", "strides", "padding", "data_format", "dilations"]
        assert [p.name for p in parameters[:7]] == names
        assert [p.default for p in parameters[2:7]] == [None, None, "SAME", "NDHWC", None]
        own = {p.name: p for p in parameters[7:]}
        assert set(own) >= {"dtype", "algorithm", "workers"}
        assert {p.kind for p in own.values()} == {inspect.Parameter.KEYWORD_ONLY}
        assert (own["dtype"].default, own["algorithm"].default, own["workers"].default) == (np.float32, "auto", None)

    def test_ten_positional_arguments(self):
        """All ten may be given by position, None where they are not wanted."""
        x, w = integers(np.random.default_rng(1), (1, 2, 3, 2, 2), "f4"), ones(2, 2, 2, 3, 2)
        want = oracle.conv3d_transpose(x, w, [1, 4, 6, 4, 3], 2, "SAME", "NDHWC", [1, 2, 1]).astype("f4")
        shape, dilations = [1, 4, 6, 4, 3], [1, 2, 1]
        by_position = conv3d_transpose(x, w, shape, 2, "SAME", "NDHWC", "layer/1", None, None, dilations)
        by_alias = conv3d_transpose(None, None, shape, 2, "SAME", "NDHWC", None, x, w, dilations)
        assert same_bits(by_position, want)
        assert same_bits(by_alias, want)

    @pytest.mark.parametrize("names", list(itertools.product(["value", "input"], ["filter", "filters"])), ids="-".join)
    def test_aliases(self, names):
        """`input` stands for `value`, `filters` for `filter`, in every combination."""
        x, w = ones(1, 2, 2, 2, 1), ones(1, 1, 1, 1, 1)
        assert same_bits(conv3d_transpose(**dict(zip(names, (x, w), strict=True))), x)

    def test_defaults_are_stride_1_same(self):
        """Without further arguments the result has value's spatial size."""
        rng = np.random.default_rng(2)
        x, w = integers(rng, (2, 3, 4, 2, 3), "f4"), integers(rng, (3, 2, 3, 4, 3), "f4")
        want = oracle.conv3d_transpose(x, w, [2, 3, 4, 2, 4]).astype("f4")
        assert same_bits(conv3d_transpose(x, w), want)
        assert same_bits(conv3d_transpose(x, w, data_format=None, name=""), want)

    def test_padding_and_layout_may_be_str_subclasses(self):
        """np.str_ is a str."""
        x, w = ones(1, 2, 2, 2, 1), ones(1, 1, 1, 1, 1)
        result = conv3d_transpose(x, w, padding=np.str_("SAME"), data_format=np.str_("NDHWC"))
        assert same_bits(result, x)


class TestOracle:
    """The oracle against the Definition cell by cell, and against the forward convolution."""

    @pytest.mark.parametrize("padding", ["SAME", "VALID"])
    def test_oracle_is_the_definition(self, padding):
        """Every term of the sum by itself, in Python."""
        rng = np.random.default_rng(3)
        n, k, s, dil = (2, 3, 1), (3, 2, 2), (2, 1, 3), (1, 2, 2)
        x, w = integers(rng, (2, *n, 2), "f8"), integers(rng, (*k, 3, 2), "f8")
        axes = list(zip(n, k, s, dil, strict=True))
        for o in itertools.product(*[oracle.reachable_sizes(*axis, padding) for axis in axes]):
            y = np.zeros((2, *o, 3))
            spans = [max(0, (k_ - 1) * dil_ + 1) for k_, dil_ in zip(k, dil, strict=True)]
            lo = [max(0, (n[j] - 1) * s[j] + spans[j] - o[j]) // 2 if padding == "SAME" else 0 for j in range(3)]
            for i in itertools.product(*map(range, n)):
                for a in itertools.product(*map(range, k)):
                    cell = tuple(i[j] * s[j] + a[j] * dil[j] - lo[j] for j in range(3))
                    if all(0 <= cell[j] < o[j] for j in range(3)):
                        for b, co, ci in itertools.product(range(2), range(3), range(2)):
                            y[(b, *cell, co)] += x[(b, *i, ci)] * w[(*a, co, ci)]
            assert same_bits(oracle.conv3d_transpose(x, w, [2, *o, 3], s, padding, None, dil), y)

    @pytest.mark.parametrize("padding", ["SAME", "VALID"])
    def test_reachable_sizes_are_those_that_conv3d_maps_back(self, padding):
        """An output size is reachable if and only if the forward convolution of it has n cells; s of them are."""
        for n, k, s, dil in itertools.product(range(1, 6), range(6), range(1, 5), range(1, 4)):
            span = oracle.extent(k, dil)
            shrink = span - 1 if padding == "VALID" else 0
            sizes = [o for o in range(60) if -((shrink - o) // s) == n]
            low, high = oracle.reachable_sizes(n, k, s, dil, padding)
            assert sizes == list(range(max(low, 0), high + 1))
            assert high - low + 1 == s
            assert low <= oracle.inferred_size(n, k, s, dil, padding) <= high

    @pytest.mark.parametrize("padding", ["SAME", "VALID"])
    def test_inferred_size_is_that_of_keras(self, padding):
        """Keras' Conv3DTranspose: SAME n*s, VALID n*s + max(K - s, 0), for a kernel of at least one cell."""
        for n, k, s, dil in itertools.product(range(6), range(1, 6), range(1, 5), range(1, 4)):
            grown = max(oracle.extent(k, dil) - s, 0) if padding == "VALID" else 0
            assert oracle.inferred_size(n, k, s, dil, padding) == n * s + grown


class TestNumbers:
    """The numeric examples."""

    def test_ones_stride_1(self):
        """A cell with 3, 2, 1, 0 interior axes is 81, 54, 36, 24."""
        y = conv3d_transpose(ones(2, 5, 6, 4, 3), ones(3, 3, 3, 2, 3), [2, 5, 6, 4, 2], strides=[1] * 5, padding="SAME")
        assert (y.shape, y.dtype) == ((2, 5, 6, 4, 2), np.float32)
        for cell in np.ndindex(y.shape):
            interior = sum(0 < i < o - 1 for i, o in zip(cell[1:4], y.shape[1:4], strict=True))
            assert y[cell] == [24, 36, 54, 81][interior], cell

    def test_ones_stride_2(self):
        """By the number of axes with i even and 0 < i < o-1: 24, 12, 6, 3 for 3, 2, 1, 0."""
        x, f = ones(2, 5, 6, 4, 3), ones(3, 3, 3, 2, 3)
        y = conv3d_transpose(x, f, [2, 10, 12, 8, 2], strides=[1, 2, 2, 2, 1], padding="SAME")
        assert (y.shape, y.dtype) == ((2, 10, 12, 8, 2), np.float32)
        for cell in np.ndindex(y.shape):
            double = sum(i % 2 == 0 and 0 < i < o - 1 for i, o in zip(cell[1:4], y.shape[1:4], strict=True))
            assert y[cell] == [3, 6, 12, 24][double], cell

    def test_zero_depth(self):
        """A depth of 0 in value and output_shape is no error."""
        x, f = frozen(np.zeros((10, 0, 2, 3, 3), np.float32)), ones(3, 3, 3, 3, 3)
        y = conv3d_transpose(x, f, [10, 0, 2, 3, 3], strides=(1, 1, 1))
        assert (y.shape, y.dtype) == ((10, 0, 2, 3, 3), np.float32)

    def test_channels_first(self):
        """NCDHW 1..8 with a one-cell kernel and stride 2 leaves gaps of zero."""
        x = frozen(np.arange(1, 9, dtype=np.float32).reshape(1, 1, 2, 2, 2))
        y = conv3d_transpose(x, ones(1, 1, 1, 1, 1), [1, 1, 3, 3, 3], 2, "VALID", "NCDHW")
        want = [1, 0, 2, 0, 0, 0, 3, 0, 4] + [0] * 9 + [5, 0, 6, 0, 0, 0, 7, 0, 8]
        assert same_bits(y, np.array(want, np.float32).reshape(1, 1, 3, 3, 3))

    def test_kernel_equal_to_stride(self):
        """With k = s = 2 there is one tap a cell, and three channels: every cell is 3."""
        y = conv3d_transpose(ones(2, 4, 4, 4, 3), ones(2, 2, 2, 5, 3), [2, 8, 8, 8, 5], strides=2)
        assert same_bits(y, np.full((2, 8, 8, 8, 5), 3, np.float32))

    @pytest.mark.parametrize("axis", [1, 2, 3])
    @pytest.mark.parametrize(("size", "want"), [(3, [10, 102, 20]), (4, [1, 10, 102, 20])])
    def test_same_depends_on_the_output_size(self, axis, size, want):
        """n=2, k=3, s=2: lo is 1 for o=3 and 0 for o=4."""
        f = frozen(np.moveaxis(row([1, 10, 100], 1).reshape(3, 1, 1, 1, 1), 0, axis - 1).copy())
        strides, shape = [1] * 5, [1] * 5
        strides[axis], shape[axis] = 2, size
        y = conv3d_transpose(row([1, 2], axis), f, shape, strides, "SAME")
        assert same_bits(y, row(want, axis))

    @pytest.mark.parametrize("axis", [1, 2, 3])
    @pytest.mark.parametrize(
        ("size", "padding", "want"),
        [
            (6, "SAME", [1, 0, 0, 2, 0, 0]),
            (5, "SAME", [1, 0, 0, 2, 0]),
            (4, "SAME", [1, 0, 0, 2]),
            (6, "VALID", [1, 0, 0, 2, 0, 0]),
            (4, "VALID", [1, 0, 0, 2]),
        ],
    )
    def test_gaps_stay_zero(self, axis, size, padding, want):
        """Where k < s, lo is 0, and what no tap reaches is +0.0, whatever `out` held before."""
        strides, shape = [1] * 5, [1] * 5
        strides[axis], shape[axis] = 3, size
        arguments = (row([1, 2], axis), ones(1, 1, 1, 1, 1), shape, strides, padding)
        assert same_bits(conv3d_transpose(*arguments), row(want, axis))
        assert same_bits(conv3d_transpose(*arguments, out=np.full(shape, np.nan, np.float32)), row(want, axis))

    def test_filter_is_not_flipped(self):
        """One input cell under VALID gives the filter itself, output channels before input channels."""
        f = integers(np.random.default_rng(4), (2, 3, 4, 5, 2), "f4")
        for channel in range(2):
            x = np.zeros((1, 1, 1, 1, 2), np.float32)
            x[..., channel] = 1
            assert np.array_equal(conv3d_transpose(frozen(x), f, padding="VALID")[0], f[..., channel])

    @pytest.mark.parametrize("channels", [262144, 65536])
    def test_the_largest_sums_that_are_exact(self, channels):
        """262144 products of 8 with 8 make 2**24, which float32 holds."""
        x, f = filled((1, 1, 1, 2, channels), 8, np.float32), filled((1, 1, 1, 1, channels), -8, np.float32)
        assert (conv3d_transpose(x, f) == -64.0 * channels).all()

    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    @pytest.mark.parametrize("padding", ["SAME", "VALID"])
    def test_inferred_output_shape(self, data_format, padding):
        """output_shape=None is SAME n*s and VALID min((n-1)*s + max(s, K), the largest reachable size)."""
        rng = np.random.default_rng(5)
        for n, k, s, dil in itertools.product(range(4), range(5), range(1, 5), range(1, 4)):
            x = integers(rng, oracle.caller_order([2, n, 2, 1, 3], data_format), "f4")
            f = integers(rng, (k, 2, 1, 2, 3), "f4")
            extra = {"strides": [s, 1, 2], "padding": padding, "data_format": data_format, "dilations": [dil, 2, 1]}
            want = oracle.conv3d_transpose(x, f, **extra).astype("f4")
            assert want.shape[oracle.caller_order([0, 1, 2, 3, 4], data_format).index(1)] == (
                n * s
                if padding == "SAME"
                else min((n - 1) * s + max(s, oracle.extent(k, dil)), oracle.reachable_sizes(n, k, s, dil, padding)[1])
            )
            assert plan_conv3d_transpose(x.shape, f.shape, **extra).output_shape == want.shape, (n, k, s, dil)
            assert same_bits(conv3d_transpose(x, f, **extra), want), (n, k, s, dil)

    @pytest.mark.parametrize(
        ("value_shape", "filter_shape", "output_shape", "padding"),
        [
            ((0, 2, 2, 2, 3), (3, 3, 3, 4, 3), (0, 4, 4, 4, 4), "SAME"),
            ((2, 2, 2, 2, 3), (3, 3, 3, 0, 3), (2, 4, 4, 4, 0), "SAME"),
            ((2, 2, 2, 2, 0), (3, 3, 3, 4, 0), (2, 4, 4, 4, 4), "SAME"),
            ((2, 2, 2, 2, 0), (3, 3, 3, 0, 0), (2, 4, 4, 4, 0), "SAME"),
            ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0), "SAME"),
            ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0), "VALID"),
            ((2, 2, 2, 0, 3), (3, 3, 3, 4, 3), (2, 3, 4, 0, 4), "SAME"),
            ((2, 0, 2, 2, 3), (3, 3, 3, 4, 3), (2, 0, 5, 5, 4), "VALID"),
            ((2, 0, 2, 2, 3), (3, 3, 3, 4, 3), (2, 1, 5, 5, 4), "VALID"),
            ((2, 0, 2, 2, 3), (3, 3, 3, 4, 3), (2, 2, 5, 6, 4), "VALID"),
            ((2, 2, 2, 0, 3), (3, 3, 5, 4, 3), (2, 5, 5, 4, 4), "VALID"),
            ((2, 2, 2, 2, 3), (3, 0, 3, 4, 3), (2, 4, 3, 4, 4), "SAME"),
            ((2, 2, 2, 2, 3), (0, 3, 3, 4, 3), (2, 3, 5, 6, 4), "VALID"),
            ((2, 2, 2, 2, 3), (0, 0, 0, 4, 3), (2, 2, 3, 2, 4), "VALID"),
            ((2, 1, 2, 2, 3), (0, 3, 3, 4, 3), (2, 0, 5, 6, 4), "VALID"),
        ],
    )
    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    def test_nothing_to_add_up(self, value_shape, filter_shape, output_shape, padding, data_format):
        """Batch, channels, input or kernel of size 0 give an empty or all-zero result, new or in `out`."""
        x = ones(*oracle.caller_order(value_shape, data_format))
        shape = oracle.caller_order(output_shape, data_format)
        want = np.zeros(shape, np.float32)
        arguments = (x, ones(*filter_shape), shape, 2, padding, data_format)
        assert same_bits(conv3d_transpose(*arguments), want)
        out = np.full(shape, np.nan, np.float32)
        assert conv3d_transpose(*arguments, out=out) is out
        assert same_bits(out, want)

    @pytest.mark.parametrize("huge", [2**20, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70])
    def test_huge_strides_and_dilations(self, huge):
        """Sizes that nothing has to be allocated for may be as large as they like."""
        rng = np.random.default_rng(6)
        x, f = integers(rng, (1, 1, 2, 3, 2), "f4"), integers(rng, (3, 3, 1, 2, 2), "f4")
        # D: one input cell, so any stride. H: only the tap in the middle lands. W: the one tap has nothing to dilate.
        extra = {"strides": [huge, 1, 1], "dilations": [1, huge, huge]}
        y = conv3d_transpose(x, f, [1, 2, 2, 3, 2], **extra)
        assert same_bits(y, oracle.conv3d_transpose(x, f, [1, 2, 2, 3, 2], **extra).astype("f4"))
        assert y.any()


class TestAdjoint:
    """sum(conv3d_transpose(x) * z) == sum(x * conv3d(z)), exactly for whole numbers, without conjugation."""

    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    @pytest.mark.parametrize("padding", ["SAME", "VALID"])
    @pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
    def test_adjoint(self, dtype, padding, data_format):
        """Different sizes, kernels, strides and dilations on each axis, and every corner of the reachable sizes."""
        rng = np.random.default_rng(7)
        for n, k, s, dil in [
            ((3, 2, 4), (3, 1, 2), (2, 1, 3), (1, 1, 1)),
            ((2, 4, 3), (2, 3, 4), (1, 3, 2), (2, 3, 1)),
            ((1, 3, 2), (5, 2, 3), (4, 2, 1), (1, 2, 3)),
        ]:
            x = integers(rng, oracle.caller_order([2, *n, 3], data_format), dtype)
            f = integers(rng, (*k, 4, 3), dtype)
            axes = list(zip(n, k, s, dil, strict=True))
            for o in itertools.product(*[oracle.reachable_sizes(*axis, padding) for axis in axes]):
                shape = oracle.caller_order([2, *o, 4], data_format)
                z = oracle.wide(integers(rng, shape, dtype))
                y = conv3d_transpose(x, f, shape, s, padding, data_format, dilations=dil)
                back = oracle.conv3d(z, f, n, s, padding, data_format, dil)
                assert (y * z).sum() == (x * back).sum()

    def test_no_conjugation(self):
        """1j times 1j is -1."""
        x, f = filled((1, 1, 1, 1, 1), 1j, np.complex64), filled((1, 1, 1, 1, 1), 1j, np.complex64)
        assert conv3d_transpose(x, f).item() == -1


REACH = {
    "stride-1-same": {"n": (3, 4, 2), "k": (3, 2, 3), "o": (3, 4, 2)},
    "stride-2-odd": {"n": (2, 3, 3), "k": (3, 3, 3), "o": (3, 6, 5), "strides": (2, 2, 2)},
    "dilated-beyond-the-edge": {"n": (2, 3, 2), "k": (3, 3, 2), "o": (2, 3, 2), "dilations": (3, 1, 2)},
    "gaps": {"n": (2, 3, 2), "k": (1, 2, 1), "o": (6, 7, 3), "strides": (3, 3, 2)},
    "valid": {"n": (2, 2, 3), "k": (3, 2, 4), "o": (5, 5, 6), "strides": (2, 3, 1), "padding": "VALID"},
    "kernel-is-stride": {"n": (2, 2, 3), "k": (2, 3, 2), "o": (4, 6, 6), "strides": (2, 3, 2)},
}


class TestNotFinite:
    """NaN and Inf reach exactly the cells their taps reach."""

    @staticmethod
    def check(x, f, marks, shape, extra, dtype, label):
        """Compare the cells that are not finite with those that a mark of 1 reaches."""
        reached = oracle.conv3d_transpose(*marks, shape, **extra) != 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = conv3d_transpose(frozen(x), frozen(f), shape, **extra)
        assert np.array_equal(~np.isfinite(y), reached), label
        if dtype.kind != "c":
            want = oracle.rounded(oracle.conv3d_transpose(x, f, shape, **extra), dtype)
            assert np.array_equal(y.astype(np.float64), want.astype(np.float64), equal_nan=True), label

    @pytest.mark.parametrize("reach", list(REACH))
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
    def test_one_cell_of_value(self, dtype, reach, poison):
        """A poisoned input channel reaches its taps' cells in all output channels, also where a weight is 0."""
        dtype, case = dtype_named(dtype), dict(REACH[reach])
        n, k, o = case.pop("n"), case.pop("k"), case.pop("o")
        rng = np.random.default_rng(8)
        f = integers(rng, (*k, 5, 3), dtype, largest=1)
        for cell in [(0, 0, 0, 0, 0), (1, *(i - 1 for i in n), 2), (1, *(i // 2 for i in n), 1)]:
            x, mark = integers(rng, (2, *n, 3), dtype).copy(), np.zeros((2, *n, 3))
            x[cell], mark[cell] = poison, 1
            self.check(x, f, (mark, np.ones((*k, 5, 3))), [2, *o, 5], case, dtype, cell)

    @pytest.mark.parametrize("reach", list(REACH))
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
    def test_one_tap_of_filter(self, dtype, reach, poison):
        """A poisoned weight reaches its own output channel alone, and nothing at all if its tap never lands."""
        dtype, case = dtype_named(dtype), dict(REACH[reach])
        n, k, o = case.pop("n"), case.pop("k"), case.pop("o")
        rng = np.random.default_rng(9)
        x = integers(rng, (2, *n, 3), dtype, largest=1)
        for tap in {(0, 0, 0), tuple(i - 1 for i in k), tuple(i // 2 for i in k)}:
            f, mark = integers(rng, (*k, 5, 3), dtype).copy(), np.zeros((*k, 5, 3))
            f[(*tap, 3, 1)], mark[(*tap, 3, 1)] = poison, 1
            self.check(x, f, (np.ones((2, *n, 3)), mark), [2, *o, 5], case, dtype, tap)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_larger_problem(self, workers):
        """The same with sizes beyond one block of any kernel, channels last and first."""
        rng = np.random.default_rng(10)
        for data_format in ["NDHWC", "NCDHW"]:
            x, f = integers(rng, (2, 7, 9, 8, 19), "f4").copy(), integers(rng, (3, 3, 3, 35, 19), "f4")
            mark = np.zeros(x.shape)
            for cell in [(0, 6, 8, 7, 18), (1, 0, 4, 3, 7)]:
                x[cell], mark[cell] = np.nan, 1
            extra = {"strides": 2, "data_format": data_format}
            reached = oracle.conv3d_transpose(oracle.caller_order(mark, data_format), np.ones(f.shape), None, **extra)
            y = conv3d_transpose(frozen(oracle.caller_order(x, data_format)), f, **extra, workers=workers)
            assert np.array_equal(np.isnan(y), reached != 0)

    def test_taps_that_never_land(self):
        """SAME with n=2, k=3, dilation 3: only the middle tap lands, so NaN in the others is never seen."""
        f = frozen(np.array([np.nan, 2, np.nan], np.float32).reshape(3, 1, 1, 1, 1))
        y = conv3d_transpose(row([1, 2], 1), f, [1, 2, 1, 1, 1], dilations=3)
        assert same_bits(y, row([2, 4], 1))

    def test_no_output_channel_no_nan(self):
        """Cin 0 and an empty kernel are zeros even if the other operand is not finite."""
        nans = filled((1, 2, 2, 2, 3), np.nan, np.float32)
        y = conv3d_transpose(nans, np.zeros((0, 1, 1, 2, 3), np.float32), [1, 2, 2, 2, 2])
        assert same_bits(y, np.zeros((1, 2, 2, 2, 2), np.float32))


class TestZero:
    """A zero result is +0.0."""

    TINY = {  # noqa: RUF012 - a table, never written to
        "float16": [2.0**-18, 2.0**-24],
        "bfloat16": [2.0**-72, 2.0**-100],
        "float32": [1e-30],
        "complex64": [1e-30],
        "float64": [1e-200],
        "complex128": [1e-200],
    }

    @pytest.mark.parametrize("channels", CHANNELS, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("left", "right"), [(-1.0, 0.0), (0.0, -1.0), (-0.0, 1.0), (1.0, -0.0), (-0.0, 0.0)], ids=str
    )
    def test_negative_times_zero(self, dtype, channels, left, right):
        """Products that are all -0.0 add up to +0.0, for one tap a cell and for many, new or in `out`."""
        dtype, (cin, cout) = dtype_named(dtype), channels
        for kernel, stride in [((1, 1, 1), 1), ((3, 2, 3), 1), ((2, 2, 2), 2), ((3, 3, 3), 2)]:
            x, f = filled((2, 2, 3, 2, cin), left, dtype), filled((*kernel, cout, cin), right, dtype)
            y = conv3d_transpose(x, f, strides=stride)
            assert not y.any()
            assert no_negative_zero(y)
            out = filled(y.shape, -0.0, dtype).copy()
            conv3d_transpose(x, f, strides=stride, out=out)
            assert same_bits(out, np.zeros(y.shape, dtype))

    @pytest.mark.parametrize("channels", CHANNELS, ids=str)
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_underflow_from_below(self, dtype, stride, channels):
        """Products too small for the dtype, or for float16 and bfloat16 too small only once rounded, give +0.0."""
        dtype, (cin, cout) = dtype_named(dtype), channels
        for number in self.TINY[dtype.name]:
            for k in [1, 2]:
                x, f = filled((1, 2, 3, 2, cin), -number, dtype), filled((k, k, k, cout, cin), number, dtype)
                for error_mode in ["ignore", "raise"]:
                    with np.errstate(all=error_mode):
                        y = conv3d_transpose(x, f, strides=stride)
                        wider = np.ones(y.shape, np.complex128)
                        conv3d_transpose(x, f, strides=stride, out=wider)
                    assert same_bits(y, np.zeros(y.shape, dtype))
                    assert same_bits(wider, np.zeros(y.shape, np.complex128))

    @pytest.mark.parametrize("channels", CHANNELS, ids=str)
    @pytest.mark.parametrize("dtype", ["complex64", "complex128"])
    def test_complex_parts(self, dtype, channels):
        """Each part of a complex result that is zero is +0.0, also if the other part is not zero."""
        cin, cout = channels
        (tiny,) = self.TINY[dtype]
        pairs = [
            (complex(1, -0.0), complex(1, -0.0)),
            (complex(-0.0, -0.0), complex(1, 1)),
            (complex(0, -1), complex(-0.0, 1)),
            (complex(1, -tiny), complex(tiny, 0)),
            (complex(-tiny, 1), complex(tiny, 0)),
            (complex(-1, 0), complex(0, 0)),
            (complex(1, 1), complex(1, 1)),
            (complex(1, -1), complex(-1, -1)),
        ]
        for left, right in pairs:
            for k in [1, 2]:
                x, f = filled((1, 2, 3, 2, cin), left, dtype), filled((k, k, k, cout, cin), right, dtype)
                assert no_negative_zero(conv3d_transpose(x, f, strides=2)), (left, right)
                assert no_negative_zero(conv3d_transpose(x, f)), (left, right)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_real_value_with_complex_filter(self, dtype):
        """Mixed operands too: a negative real value and an imaginary filter have a real part of +0.0."""
        x, f = filled((1, 2, 2, 2, 3), -1, dtype_named(dtype)), filled((2, 2, 2, 4, 3), 1j, np.complex128)
        y = conv3d_transpose(x, f, strides=2)
        assert same_bits(y, filled(y.shape, -3j, np.complex128) + 0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cancellation(self, dtype):
        """A sum that cancels is +0.0 in either order."""
        for signs in [(1, -1), (-1, 1)]:
            x = np.zeros((1, 2, 2, 2, 2), dtype_named(dtype))
            x[..., 0], x[..., 1] = signs
            y = conv3d_transpose(frozen(x), filled((2, 2, 2, 3, 2), -3, x.dtype))
            assert same_bits(y, np.zeros(y.shape, x.dtype))


class TestErrstate:
    """Overflow, underflow and invalid products are silent, in every thread and under every np.errstate."""

    LARGE = {  # noqa: RUF012 - a table, never written to
        "float16": 6e4,
        "bfloat16": 3e38,
        "float32": 3e38,
        "complex64": 3e38,
        "float64": 1e308,
        "complex128": 1e308,
    }

    def problems(self, dtype, shape=(1, 2, 2, 2, 2), kernel=(3, 3, 3), cout=3):
        """Yield value, filter and a predicate that the whole result must meet."""
        large = self.LARGE[dtype.name]
        x, f = filled(shape, large, dtype), filled((*kernel, cout, shape[-1]), large, dtype)
        yield x, f, np.isposinf
        yield x, filled(f.shape, -large, dtype), np.isneginf
        alternating = x.copy()
        alternating[..., ::2] *= -1
        # Inf, NaN or a finite number, by the order and the fusing of the products: it only has to be silent.
        yield frozen(alternating), f, lambda result: np.ones(result.shape, bool)
        yield filled(shape, np.inf, dtype), filled(f.shape, 0, dtype), np.isnan
        tiny = {"float16": 2.0**-24, "bfloat16": 1e-30}.get(dtype.name, 3 / large)
        yield filled(shape, tiny, dtype), filled(f.shape, -tiny, dtype), np.logical_not

    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize("mode", ERROR_MODES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_modes(self, dtype, mode, workers, capfd):
        """Nothing is raised, warned of, called or printed, and np.geterr() is as before."""
        calls = []
        with warnings.catch_warnings(), np.errstate(all=mode, call=lambda *error: calls.append(error)):
            warnings.simplefilter("error")
            before = np.geterr()
            for x, f, predicate in self.problems(dtype_named(dtype)):
                with np.errstate(all=mode):
                    y = conv3d_transpose(x, f, strides=2, workers=workers)
                    assert np.geterr() == dict.fromkeys(before, mode)
                out = np.zeros(y.shape, y.dtype)
                plan = plan_conv3d_transpose(x.shape, f.shape, strides=2, dtype=x.dtype, workers=workers)
                plan(x, f, out=out)
                with np.errstate(all="ignore"):
                    for result in (y, out):
                        real = result.real if result.dtype.kind == "c" else result
                        assert predicate(real.astype(np.float64)).all(), (x.flat[0], f.flat[0])
            assert np.geterr() == before
        assert calls == []
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_worker_threads(self, dtype):
        """A problem large enough to be shared among threads, started from a thread that raises on any error."""
        dtype, failures = dtype_named(dtype), []

        def target():
            with warnings.catch_warnings(), np.errstate(all="raise"):
                warnings.simplefilter("error")
                for x, f, predicate in self.problems(dtype, (2, 6, 7, 8, 16), (3, 3, 3), 20):
                    y = conv3d_transpose(x, f, strides=2, workers=2)
                    with np.errstate(all="ignore"):
                        real = y.real if dtype.kind == "c" else y
                        if not predicate(real.astype(np.float64)).all():
                            failures.append((x.flat[0], f.flat[0]))

        def reporting():
            try:
                target()
            except (FloatingPointError, RuntimeWarning) as error:
                failures.append(error)

        thread = threading.Thread(target=reporting)
        thread.start()
        thread.join()
        assert failures == []

    def test_numbers_in_lists(self):
        """A Python number that the other operand's float16 cannot hold is inf, as silently."""
        x = [[[[[1e6]]]]]
        with np.errstate(all="raise"):
            y = conv3d_transpose(x, ones(1, 1, 1, 1, 1, dtype=np.float16))
        assert same_bits(y, filled((1, 1, 1, 1, 1), np.inf, np.float16))


class TestHalf:
    """float16 and bfloat16 accumulate in float32 and are rounded once."""

    @pytest.mark.parametrize(("dtype", "channels"), [("float16", 4096), ("bfloat16", 512)])
    def test_over_channels(self, dtype, channels):
        """A sum of ones in the dtype itself would stop at 2048, or at 256."""
        dtype = dtype_named(dtype)
        y = conv3d_transpose(ones(1, 1, 1, 2, channels, dtype=dtype), ones(1, 1, 1, 3, channels, dtype=dtype))
        assert same_bits(y, filled((1, 1, 1, 2, 3), channels, dtype))

    @pytest.mark.parametrize("out", [False, True])
    @pytest.mark.parametrize("channels", [(1, 1), (1, 5), (2, 3)], ids=str)
    @pytest.mark.parametrize(("dtype", "large"), [("float16", 2048), ("bfloat16", 256)])
    def test_over_taps(self, dtype, large, channels, out):
        """One large and 26 small taps: rounding after each tap would lose every small one."""
        dtype, (cin, cout) = dtype_named(dtype), channels
        f = np.ones((3, 3, 3, cout, cin), dtype)
        f[..., 1:] = 0
        for corner in [(0, 0, 0), (2, 2, 2), (1, 1, 1)]:
            g = f.copy()
            g[(*corner, slice(None), 0)] = large
            x = ones(1, 3, 3, 3, cin, dtype=dtype)
            result = np.full((1, 3, 3, 3, cout), np.nan, dtype) if out else None
            y = conv3d_transpose(x, frozen(g), out=result)
            assert (y[0, 1, 1, 1] == large + 26).all(), corner

    @pytest.mark.parametrize(("dtype", "large"), [("float16", 6e4), ("bfloat16", 1e38)])
    def test_intermediate_sums_beyond_the_range(self, dtype, large):
        """Partial sums may leave float16's range and come back."""
        dtype = dtype_named(dtype)
        x = np.ones((1, 1, 1, 1, 3), dtype)
        x[..., 2] = -1
        y = conv3d_transpose(frozen(x), filled((1, 1, 1, 2, 3), large, dtype))
        assert same_bits(y, filled((1, 1, 1, 1, 2), large, dtype))

    @pytest.mark.parametrize(
        ("dtype", "terms", "want"),
        [
            ("float16", [1, 2.0**-11], 1),
            ("float16", [1, 2.0**-11, 2.0**-20], 1 + 2.0**-10),
            ("float16", [1, 3 * 2.0**-11], 1 + 2.0**-9),
            ("float16", [-1, -(2.0**-11), -(2.0**-20)], -1 - 2.0**-10),
            ("float16", [2048, 1, 1, 1], 2052),
            ("float16", [65504, 15], 65504),
            ("float16", [65504, 16], np.inf),
            ("bfloat16", [1, 2.0**-8], 1),
            ("bfloat16", [1, 2.0**-8, 2.0**-20], 1 + 2.0**-7),
            ("bfloat16", [1, 3 * 2.0**-8], 1 + 2.0**-6),
            ("bfloat16", [256, 1, 1, 1], 260),
        ],
    )
    def test_rounding_is_to_nearest_even(self, dtype, terms, want):
        """The float32 sum is rounded to the nearest, ties to even, over channels and over taps alike."""
        dtype = dtype_named(dtype)
        f = frozen(np.array(terms, dtype))
        over_channels = conv3d_transpose(ones(1, 1, 1, 1, len(terms), dtype=dtype), f.reshape(1, 1, 1, 1, -1))
        assert over_channels.item() == want
        over_taps = conv3d_transpose(
            ones(1, len(terms), 1, 1, 1, dtype=dtype), f.reshape(-1, 1, 1, 1, 1), padding="VALID"
        )
        assert over_taps[0, len(terms) - 1].item() == want

    def test_with_float32_nothing_is_rounded(self):
        """float16 with float32 gives the float32 sum."""
        for half in ["float16", "bfloat16"]:
            x = ones(1, 1, 1, 1, 2, dtype=dtype_named(half))
            f = frozen(np.array([1, 2.0**-20], np.float32).reshape(1, 1, 1, 1, 2))
            for left, right in [(x, f), (f.reshape(1, 1, 1, 1, 2), x.reshape(1, 1, 1, 1, 2))]:
                y = conv3d_transpose(left, right)
                assert same_bits(y, filled((1, 1, 1, 1, 1), 1 + 2.0**-20, np.float32))


class TestPlan:
    """What a plan says of a problem."""

    def test_attributes(self):
        """Shapes, counts and sizes, and a text to read."""
        plan = plan_conv3d_transpose([2, 3, 4, 5, 7], (3, 2, 1, 11, 7), strides=[1, 2, 3])
        assert plan.output_shape == (2, 3, 8, 15, 11)
        assert type(plan.output_shape) is tuple
        assert plan.flops == 2 * 2 * (3 * 4 * 5) * 7 * 11 * (3 * 2 * 1)
        for number in (plan.flops, plan.bytes_moved, plan.workspace_bytes):
            assert isinstance(number, int)
            assert number >= 0
        # Everything is read or written once at least.
        assert plan.bytes_moved >= 4 * (2 * 3 * 4 * 5 * 7 + 3 * 2 * 11 * 7 + 2 * 3 * 8 * 15 * 11)
        assert isinstance(plan.reason, str)
        assert plan.reason
        assert plan.algorithm in str(plan)
        assert " at 0x" not in str(plan)

    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    @pytest.mark.parametrize("padding", ["SAME", "VALID"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_flops_count_products_of_the_input(self, dtype, padding, data_format):
        """Two for each real product and its sum, cut edges included; a complex product is four real ones."""
        extra = {"strides": [1, 2, 3], "dilations": [3, 1, 2], "padding": padding, "data_format": data_format}
        value_shape = oracle.caller_order([2, 3, 4, 5, 7], data_format)
        plan = plan_conv3d_transpose(value_shape, (3, 2, 4, 11, 7), **extra, dtype=dtype_named(dtype))
        assert plan.flops == 2 * 2 * (3 * 4 * 5) * 7 * 11 * (3 * 2 * 4) * (4 if "complex" in str(dtype) else 1)

    def test_algorithm(self):
        """The one asked for, or the one chosen."""
        assert plan_conv3d_transpose((1, 2, 2, 2, 1), (1, 1, 1, 1, 1), algorithm="col2im").algorithm == "col2im"
        assert plan_conv3d_transpose((1, 2, 2, 2, 1), (1, 1, 1, 1, 1)).algorithm not in ("", "auto")

    @pytest.mark.parametrize("algorithm", ["auto", "col2im"])
    def test_algorithms_agree(self, algorithm):
        """Both names of `algorithm` compute the same."""
        rng = np.random.default_rng(11)
        x, f = integers(rng, (2, 3, 2, 3, 4), "f4"), integers(rng, (3, 2, 3, 5, 4), "f4")
        want = oracle.conv3d_transpose(x, f, None, 2).astype("f4")
        assert same_bits(conv3d_transpose(x, f, strides=2, algorithm=algorithm), want)
        plan = plan_conv3d_transpose(x.shape, f.shape, strides=2, algorithm=algorithm)
        assert same_bits(plan(x, f), want)

    @pytest.mark.parametrize(
        "shapes",
        [((0, 2, 2, 2, 3), (3, 3, 3, 4, 3)), ((2, 2, 2, 2, 0), (3, 3, 3, 4, 0)), ((1, 2, 2, 2, 3), (0, 3, 3, 4, 3))],
    )
    def test_nothing_to_do(self, shapes):
        """No multiplications, but still a plan with a text."""
        plan = plan_conv3d_transpose(*shapes)
        assert plan.flops == 0
        assert str(plan)
        assert not plan(ones(*shapes[0]), ones(*shapes[1])).any()

    def test_plan_can_be_used_again(self):
        """Each call returns an array of its own, whatever the plan keeps between calls."""
        rng = np.random.default_rng(12)
        plan = plan_conv3d_transpose((1, 3, 3, 3, 4), (3, 3, 3, 5, 4), strides=2)
        pairs = [(integers(rng, (1, 3, 3, 3, 4), "f4"), integers(rng, (3, 3, 3, 5, 4), "f4")) for _ in range(3)]
        results = [plan(x, f) for x, f in pairs]
        for (x, f), y in zip(pairs, results, strict=True):
            assert same_bits(y, oracle.conv3d_transpose(x, f, None, 2).astype("f4"))
        assert not np.shares_memory(results[0], results[1])

    def test_the_package_has_both(self):
        """Both functions are the package's own names."""
        assert {"conv3d_transpose", "plan_conv3d_transpose"} <= set(gemmconv.__all__)
