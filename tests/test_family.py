"""Convolutions, the filter's gradient and fewer dimensions by TensorFlow's names, and im2col and col2im.

Their results are held to loops written from the definitions, exactly, on whole numbers; their refusals to the numbers
that a text must name.
"""

import inspect
import itertools
import re

import numpy as np
import pytest
from oracle import dtype_named, frozen, integers, same_bits

import gemmconv
from gemmconv import blas

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
LAYOUTS = {1: ["NWC", "NCW"], 2: ["NHWC", "NCHW"], 3: ["NDHWC", "NCDHW"]}
EVERY_LAYOUT = [(rank, layout) for rank in LAYOUTS for layout in LAYOUTS[rank]]
CONVOLVED = {1: gemmconv.conv1d, 2: gemmconv.conv2d, 3: gemmconv.conv3d}
TRANSPOSED = {1: gemmconv.conv1d_transpose, 2: gemmconv.conv2d_transpose, 3: gemmconv.conv3d_transpose}


# The definitions. Arrays are channels last, a padding is 'SAME', 'VALID' or (before, after).


def coarse_size(n, k, s, d, padding):
    """Return how many positions a convolution's result has where its input has n: those whose taps all fit."""
    if padding == "SAME":
        return -(-n // s)
    before, after = (0, 0) if padding == "VALID" else padding
    reach = max(0, (k - 1) * d + 1)
    return sum(1 for i in range(n + before + after + 1) if i * s + reach <= n + before + after)


def padding_before(n, k, s, d, padding):
    """Return the zeros before an axis of n positions."""
    if padding == "SAME":
        return max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n) // 2
    return 0 if padding == "VALID" else padding[0]


def meetings(fine, kernel, strides, dilations, paddings):
    """Yield every tap with every coarse position and the fine position it meets, where that is one."""
    axes = list(zip(fine, kernel, strides, dilations, paddings, strict=True))
    coarse = [coarse_size(*axis) for axis in axes]
    before = [padding_before(*axis) for axis in axes]
    for tap in np.ndindex(*kernel):
        for at in np.ndindex(*coarse):
            met = tuple(i * s + a * d - lo for i, s, a, d, lo in zip(at, strides, tap, dilations, before, strict=True))
            if all(0 <= place < n for place, n in zip(met, fine, strict=True)):
                yield tap, (slice(None), *at), (slice(None), *met)


def convolution(z, w, relation, groups=1):
    """Return conv1d to conv3d: w is [k.., channels of z in a group, Cout]."""
    coarse = [coarse_size(*axis) for axis in zip(z.shape[1:-1], w.shape[:-2], *relation, strict=True)]
    y = np.zeros((z.shape[0], *coarse, w.shape[-1]), np.result_type(z, w, np.float64))
    for tap, at, met in meetings(z.shape[1:-1], w.shape[:-2], *relation):
        for g in range(groups):
            mine, its = block(g, groups, z.shape[-1]), block(g, groups, w.shape[-1])
            y[at][:, its] += z[met][:, mine].astype(y.dtype) @ w[tap][:, its]
    return y


def transposition(x, w, fine, relation):
    """Return conv1d_transpose to conv3d_transpose of `fine` positions: w is [k.., Cout, channels of x]."""
    y = np.zeros((x.shape[0], *fine, w.shape[-2]), np.result_type(x, w, np.float64))
    for tap, at, met in meetings(fine, w.shape[:-2], *relation):
        y[met] += x[at].astype(y.dtype) @ w[tap].T
    return y


def filter_gradient(z, g, shape, relation, groups=1):
    """Return the gradient of a convolution of z, whose result's is g, for the filter."""
    w = np.zeros(shape, np.result_type(z, g, np.float64))
    for tap, at, met in meetings(z.shape[1:-1], shape[:-2], *relation):
        for i in range(groups):
            mine, its = block(i, groups, z.shape[-1]), block(i, groups, shape[-1])
            w[tap][:, its] += z[met][:, mine].T.astype(w.dtype) @ g[at][:, its]
    return w


def block(group, groups, channels):
    """Return the slice of a group's channels."""
    return slice(group * channels // groups, (group + 1) * channels // groups)


# What the tests share.


def in_layout(array, layout):
    """Return a channels-last array, or a list of sizes, in the layout's order."""
    if isinstance(array, np.ndarray):
        return array if layout.endswith("C") else np.moveaxis(array, -1, 1)
    return list(array) if layout.endswith("C") else [array[0], array[-1], *array[1:-1]]


def channels_last(array, layout):
    """Return an array of a layout with its channels last, contiguous."""
    return np.ascontiguousarray(array if layout.endswith("C") else np.moveaxis(array, 1, -1))


def draw(rng, rank, layout, explicit=False):
    """Return random sizes, the relation (strides, dilations, paddings), and padding as it is given to a function."""
    fine = [int(rng.integers(1, 8 if rank < 3 else 6)) for _ in range(rank)]
    kernel, strides, dilations = ([int(n) for n in rng.integers(1, top, rank)] for top in (4, 4, 3))
    padding = str(rng.choice(["SAME", "VALID"]))
    paddings = [padding] * rank
    if explicit:
        paddings = [tuple(map(int, rng.integers(0, 4, 2))) for _ in range(rank)]
        padding = [[0, 0], *map(list, paddings), [0, 0]]
        padding = padding if layout.endswith("C") else [padding[0], padding[-1], *padding[1:-1]]
    return fine, kernel, (strides, dilations, paddings), padding


def convolve(rank, z, w, relation, padding, layout, **more):
    """Call conv1d, conv2d or conv3d."""
    return CONVOLVED[rank](
        in_layout(z, layout), w, relation[0], padding, data_format=layout, dilations=relation[1], **more
    )


def transpose(rank, x, w, shape, relation, padding, layout, **more):
    """Call conv1d_transpose, conv2d_transpose or conv3d_transpose."""
    return TRANSPOSED[rank](
        in_layout(x, layout),
        w,
        in_layout(shape, layout),
        relation[0],
        padding,
        data_format=layout,
        dilations=relation[1],
        **more,
    )


def cases(seed, count, ranks=(1, 2, 3)):
    """Yield random problems in all layouts; those of two dimensions have explicit paddings half of the time."""
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        rank = ranks[index % len(ranks)]
        layout = LAYOUTS[rank][index // len(ranks) % 2]
        yield index, rng, rank, layout, *draw(rng, rank, layout, rank == 2 and rng.integers(2))


SIGNATURES = """
conv3d(input, filter=None, strides=None, padding=None, data_format='NDHWC', dilations=(1, 1, 1, 1, 1), name=None,
    filters=None)
conv3d_backprop_filter_v2(input, filter_sizes, out_backprop, strides, padding, data_format='NDHWC',
    dilations=(1, 1, 1, 1, 1), name=None)
conv2d_transpose(value=None, filter=None, output_shape=None, strides=None, padding='SAME', data_format='NHWC',
    name=None, input=None, filters=None, dilations=None)
conv1d_transpose(input, filters, output_shape, strides, padding='SAME', data_format='NWC', dilations=None, name=None)
conv2d(input, filter=None, strides=None, padding=None, use_cudnn_on_gpu=True, data_format='NHWC',
    dilations=(1, 1, 1, 1), name=None, filters=None)
conv1d(value=None, filters=None, stride=None, padding=None, use_cudnn_on_gpu=None, data_format=None, name=None,
    input=None, dilations=None)
conv_transpose(input, filters, output_shape, strides, padding='SAME', data_format=None, dilations=None, name=None)
"""


class TestSignatures:
    """TensorFlow's names, their order and their defaults; gemmconv's own are keyword-only."""

    @pytest.mark.parametrize(
        "text", re.findall(r"^(\w+\(.*?\))$", SIGNATURES, re.M | re.S), ids=lambda t: t.split("(")[0]
    )
    def test_signature(self, text):
        """As the contract has it, and `out`, `algorithm` and `workers` after that."""
        name, _, rest = re.sub(r"\s+", " ", text).partition("(")
        signature = inspect.signature(getattr(gemmconv, name))
        parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        theirs = inspect.Signature([p for p in parameters if p not in own])
        assert str(theirs) == f"({rest}"
        assert [(p.name, p.default) for p in own] == [("out", None), ("algorithm", "auto"), ("workers", None)]
        assert name in gemmconv.__all__

    def test_what_has_no_effect(self):
        """`name` and `use_cudnn_on_gpu`."""
        z, w = frozen(np.ones((1, 5, 5, 2), "f4")), frozen(np.ones((3, 3, 2, 4), "f4"))
        want = gemmconv.conv2d(z, w, 1, "SAME")
        assert same_bits(gemmconv.conv2d(z, w, 1, "SAME", False, name="layer"), want)
        want = gemmconv.conv1d(z[0], w[0], 1, "SAME")
        assert same_bits(gemmconv.conv1d(z[0], w[0], 1, "SAME", True, name="layer"), want)

    def test_other_names_of_operands(self):
        """`input`, `filters` and `value`, as in TensorFlow."""
        z, w = frozen(np.ones((1, 5, 5, 5, 2), "f4")), frozen(np.ones((3, 3, 3, 2, 4), "f4"))
        assert same_bits(gemmconv.conv3d(z, filters=w, strides=1, padding="SAME"), gemmconv.conv3d(z, w, 1, "SAME"))
        assert same_bits(gemmconv.conv2d(z[0], filters=w[0], padding="SAME"), gemmconv.conv2d(z[0], w[0], 1, "SAME"))
        assert same_bits(
            gemmconv.conv1d(input=z[0, 0], filters=w[0, 0], padding="SAME"),
            gemmconv.conv1d(z[0, 0], w[0, 0], 1, "SAME"),
        )
        x, v = frozen(np.ones((1, 5, 5, 4), "f4")), w[0]
        assert same_bits(gemmconv.conv2d_transpose(input=x, filters=v), gemmconv.conv2d_transpose(x, v))


class TestDefinition:
    """Random problems of whole numbers against the loops, bit for bit."""

    @pytest.mark.parametrize("seed", range(4))
    def test_convolution(self, seed):
        """With groups that the filter's shape says, in every rank and layout."""
        for index, rng, rank, layout, fine, kernel, relation, padding in cases(seed, 60):
            groups = int(rng.integers(1, 4))
            cin, cout = (groups * int(n) for n in rng.integers(1, 4, 2))
            z = integers(rng, (2, *fine, cin), "f4")
            w = integers(rng, (*kernel, cin // groups, cout), "f4")
            want = convolution(z, w, relation, groups).astype("f4")
            got = channels_last(convolve(rank, z, w, relation, padding, layout), layout)
            assert same_bits(got, want), f"{seed=} {index=} {layout} {fine} {kernel} {relation} {groups=}"

    @pytest.mark.parametrize("seed", range(4))
    def test_transposition(self, seed):
        """Every fine size is a reachable one of the coarse size that the convolution makes of it."""
        for index, rng, rank, layout, fine, kernel, relation, padding in cases(10 + seed, 60):
            cin, cout = (int(n) for n in rng.integers(1, 5, 2))
            coarse = [coarse_size(*axis) for axis in zip(fine, kernel, *relation, strict=True)]
            x, w = integers(rng, (2, *coarse, cin), "f4"), integers(rng, (*kernel, cout, cin), "f4")
            want = transposition(x, w, fine, relation).astype("f4")
            got = channels_last(transpose(rank, x, w, [2, *fine, cout], relation, padding, layout), layout)
            assert same_bits(got, want), f"{seed=} {index=} {layout} {fine} {kernel} {relation}"

    @pytest.mark.parametrize("seed", range(4))
    def test_filter_gradient(self, seed):
        """With groups, too."""
        for index, rng, _, layout, fine, kernel, relation, padding in cases(20 + seed, 30, ranks=(3,)):
            groups = int(rng.integers(1, 4))
            cin, cout = (groups * int(n) for n in rng.integers(1, 4, 2))
            coarse = [coarse_size(*axis) for axis in zip(fine, kernel, *relation, strict=True)]
            z, g = integers(rng, (2, *fine, cin), "f4"), integers(rng, (2, *coarse, cout), "f4")
            shape = (*kernel, cin // groups, cout)
            want = filter_gradient(z, g, shape, relation, groups).astype("f4")
            got = gemmconv.conv3d_backprop_filter_v2(
                in_layout(z, layout), shape, in_layout(g, layout), relation[0], padding, layout, relation[1]
            )
            assert same_bits(got, want), f"{seed=} {index=} {layout} {fine} {kernel} {relation} {groups=}"

    @pytest.mark.parametrize("name", DTYPES)
    @pytest.mark.parametrize(("rank", "layout"), EVERY_LAYOUT)
    def test_dtypes(self, rank, layout, name):
        """All six of the package, in every function."""
        rng, dtype = np.random.default_rng(rank), dtype_named(name)
        relation = ([2] * rank, [1] * rank, ["SAME"] * rank)
        fine, kernel, coarse = [5] * rank, [3] * rank, [3] * rank
        z, w = integers(rng, (1, *fine, 2), dtype, 1), integers(rng, (*kernel, 2, 3), dtype, 1)
        x = integers(rng, (1, *coarse, 3), dtype, 1)
        exact = np.complex128 if dtype.kind == "c" else np.float64
        results = [
            (convolve(rank, z, w, relation, "SAME", layout), convolution(z.astype(exact), w.astype(exact), relation)),
            (
                transpose(rank, x, w, [1, *fine, 2], relation, "SAME", layout),
                transposition(x.astype(exact), w.astype(exact), fine, relation),
            ),
        ]
        if rank == 3:
            got = gemmconv.conv3d_backprop_filter_v2(
                in_layout(z, layout), w.shape, in_layout(x, layout), 2, "SAME", layout
            )
            assert same_bits(got, filter_gradient(z.astype(exact), x.astype(exact), w.shape, relation).astype(dtype))
        for got, want in results:
            assert same_bits(channels_last(got, layout), want.astype(dtype))

    def test_common_dtype(self):
        """The result has the common dtype of both operands, lists of numbers the other's."""
        z, w = np.ones((1, 3, 1), "f2"), np.ones((1, 1, 1), "f8")
        assert gemmconv.conv1d(z, w, 1, "SAME").dtype == np.float64
        assert gemmconv.conv1d(z, [[[1]]], 1, "SAME").dtype == np.float16
        assert gemmconv.conv1d([[[1]]], [[[1j]]], 1, "SAME").dtype == np.complex64
        z, w = z.reshape(1, 1, 1, 3, 1), w.reshape(1, 1, 1, 1, 1)
        assert gemmconv.conv3d_backprop_filter_v2(z, [1, 1, 1, 1, 1], z.tolist(), 1, "SAME").dtype == np.float16

    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_same_bits_for_any_number_of_workers(self, workers):
        """And for normal data, where the order of sums shows."""
        rng = np.random.default_rng(3)
        z, w = rng.standard_normal((2, 24, 24, 32), np.float32), rng.standard_normal((3, 3, 32, 48), np.float32)
        y = gemmconv.conv2d(z, w, 1, "SAME", workers=workers)
        assert same_bits(y, gemmconv.conv2d(z, w, 1, "SAME"))
        assert same_bits(
            gemmconv.conv2d_transpose(y, w, strides=2, workers=workers), gemmconv.conv2d_transpose(y, w, strides=2)
        )


class TestDispatch:
    """conv_transpose."""

    @pytest.mark.parametrize(("rank", "layout"), EVERY_LAYOUT)
    def test_by_the_length_of_output_shape(self, rank, layout):
        """In each layout, with strides of one, rank or rank + 2 numbers."""
        rng = np.random.default_rng(1)
        x, w = integers(rng, (2, *[3] * rank, 4), "f4"), integers(rng, (*[3] * rank, 5, 4), "f4")
        shape = in_layout([2, *[6] * rank, 5], layout)
        want = TRANSPOSED[rank](in_layout(x, layout), w, shape, 2, data_format=layout)
        for strides in (2, [2] * rank, in_layout([1, *[2] * rank, 1], layout)):
            assert same_bits(gemmconv.conv_transpose(in_layout(x, layout), w, shape, strides, data_format=layout), want)
        if layout.endswith("C"):
            assert same_bits(gemmconv.conv_transpose(x, w, np.array(shape), 2), want)

    @pytest.mark.parametrize("shape", [[], [8, 8], [1] * 6])
    def test_other_lengths(self, shape):
        """Are refused."""
        with pytest.raises(ValueError, match=rf"conv_transpose: output_shape .*3, 4 or 5.*\b{len(shape)}\b"):
            gemmconv.conv_transpose(np.ones((1, 4, 1)), np.ones((1, 1, 1)), shape, 2)

    @pytest.mark.parametrize("shape", [None, 5, "111"])
    def test_no_shape(self, shape):
        """It says which function is meant, so it must be there."""
        with pytest.raises(TypeError, match=r"conv_transpose: output_shape"):
            gemmconv.conv_transpose(np.ones((1, 4, 1)), np.ones((1, 1, 1)), shape, 2)


def takes(x, w, size, strides, padding, dilations):
    """Return whether conv2d_transpose takes a height; if not, its text must name it and the input's."""
    try:
        y = gemmconv.conv2d_transpose(x, w, [1, size, 1, 1], strides, padding, dilations=dilations)
    except ValueError as error:
        wanted = f"output_shape[1]={size} is out of reach: input height {x.shape[1]},"
        if wanted not in str(error):
            raise
        return False
    return y.shape == (1, size, 1, 1)


class TestSizes:
    """The rules, from both sides."""

    @pytest.mark.parametrize("padding", ["SAME", "VALID"])
    def test_convolution(self, padding):
        """The ceilings of TensorFlow's documentation."""
        for n, k, s, d in itertools.product(range(1, 8), range(1, 4), range(1, 4), range(1, 3)):
            span = (k - 1) * d + 1
            want = -(-n // s) if padding == "SAME" else max(0, -(-(n - span + 1) // s))
            got = gemmconv.conv1d(np.ones((1, n, 1)), np.ones((k, 1, 1)), s, padding, dilations=d)
            assert got.shape == (1, want, 1) == (1, coarse_size(n, k, s, d, padding), 1)

    @pytest.mark.parametrize("padding", ["SAME", "VALID", (0, 0), (1, 0), (0, 2), (2, 3)], ids=str)
    def test_transposition_takes_just_the_sizes_that_map_back(self, padding):
        """A size is accepted if and only if the convolution makes n positions of it; the inferred one is among them."""
        given = padding if isinstance(padding, str) else [[0, 0], list(padding), [0, 0], [0, 0]]
        for n, k, s, d in itertools.product(range(1, 4), range(1, 4), range(1, 4), range(1, 3)):
            x, w = np.ones((1, n, 1, 1)), np.ones((k, 1, 1, 1))
            taken = [o for o in range(n * s + k * d + 2) if takes(x, w, o, [s, 1], given, [d, 1])]
            assert taken == [o for o in range(n * s + k * d + 2) if coarse_size(o, k, s, d, padding) == n]
            if taken:
                inferred = gemmconv.conv2d_transpose(x, w, None, [s, 1], given, dilations=[d, 1]).shape[1]
                assert inferred in taken

    @pytest.mark.parametrize("pair", [(0, 0), (1, 1), (0, 1), (2, 0)])
    def test_inferred_with_explicit_paddings(self, pair):
        """(n-1)*s + max(s, K) - before - after, which is Keras' for padding of a kind."""
        x, w = np.ones((1, 5, 4, 1)), np.ones((4, 3, 1, 1))
        y = gemmconv.conv2d_transpose(x, w, strides=[2, 3], padding=[[0, 0], pair, (0, 0), (0, 0)])
        assert y.shape == (1, 8 + 4 - sum(pair), 9 + 3, 1)

    def test_words_are_explicit_paddings_too(self):
        """VALID is no padding, SAME the halves."""
        rng = np.random.default_rng(5)
        z, w = integers(rng, (1, 6, 7, 2), "f4"), integers(rng, (3, 4, 2, 3), "f4")
        none, same = np.zeros((4, 2), int), ((0, 0), (1, 1), [1, 2], np.array([0, 0]))
        assert same_bits(gemmconv.conv2d(z, w, 1, none), gemmconv.conv2d(z, w, 1, "VALID"))
        assert same_bits(gemmconv.conv2d(z, w, 1, same), gemmconv.conv2d(z, w, 1, "SAME"))
        y = gemmconv.conv2d(z, w, 1, "SAME")
        shape = (1, 6, 7, 2)
        want = gemmconv.conv2d_transpose(y, w, shape, 1)
        assert same_bits(gemmconv.conv2d_transpose(y, w, shape, 1, same), want)


class TestAdjoint:
    """The three operations are each other's gradients: sums of products of whole numbers agree exactly."""

    @pytest.mark.parametrize("seed", range(3))
    def test_three_dimensions(self, seed):
        """<conv3d(z, w), g> = <z, conv3d_transpose(g, w)> = <conv3d_backprop_filter(z, g), w>."""
        for index, rng, _, layout, fine, kernel, relation, padding in cases(30 + seed, 40, ranks=(3,)):
            cin, cout = (int(n) for n in rng.integers(1, 6, 2))
            z, w = integers(rng, (2, *fine, cin), "f8"), integers(rng, (*kernel, cin, cout), "f8")
            y = convolve(3, z, w, relation, padding, layout)
            g = integers(rng, y.shape, "f8")
            x = gemmconv.conv3d_transpose(
                g, w, in_layout([2, *fine, cin], layout), relation[0], padding, layout, dilations=relation[1]
            )
            v = gemmconv.conv3d_backprop_filter_v2(
                in_layout(z, layout), w.shape, g, relation[0], padding, layout, relation[1]
            )
            products = (y * g).sum(), (in_layout(z, layout) * x).sum(), (v * w).sum()
            assert products[0] == products[1] == products[2], f"{seed=} {index=} {layout} {fine} {kernel} {relation}"

    @pytest.mark.parametrize("seed", range(3))
    def test_one_and_two_dimensions(self, seed):
        """With explicit paddings, too."""
        for index, rng, rank, layout, fine, kernel, relation, padding in cases(40 + seed, 60, ranks=(1, 2)):
            z, w = integers(rng, (2, *fine, 3), "f8"), integers(rng, (*kernel, 3, 4), "f8")
            y = convolve(rank, z, w, relation, padding, layout)
            g = integers(rng, y.shape, "f8")
            x = transpose(rank, channels_last(g, layout), w, [2, *fine, 3], relation, padding, layout)
            assert (y * g).sum() == (in_layout(z, layout) * x).sum(), f"{seed=} {index=} {layout} {fine} {relation}"

    def test_grouped(self):
        """The filter's gradient in groups, with the same numbers."""
        rng = np.random.default_rng(6)
        z, w = integers(rng, (2, 5, 5, 5, 12), "f8"), integers(rng, (3, 3, 3, 4, 6), "f8")
        y = gemmconv.conv3d(z, w, 2, "SAME")
        g = integers(rng, y.shape, "f8")
        assert (gemmconv.conv3d_backprop_filter_v2(z, w.shape, g, 2, "SAME") * w).sum() == (y * g).sum()


class TestOut:
    """Results written where the caller wants them."""

    @pytest.mark.parametrize(("rank", "layout"), EVERY_LAYOUT)
    def test_out(self, rank, layout):
        """Plain, a view with steps, and of a wider dtype."""
        rng = np.random.default_rng(7)
        z, w = integers(rng, (2, *[4] * rank, 2), "f4"), integers(rng, (*[3] * rank, 2, 3), "f4")
        x, shape, relation = integers(rng, (2, *[2] * rank, 3), "f4"), [2, *[4] * rank, 2], ([2] * rank, [1] * rank)
        for call in (
            lambda **more: convolve(rank, z, w, relation, "SAME", layout, **more),
            lambda **more: transpose(rank, x, w, shape, relation, "SAME", layout, **more),
        ):
            want = call()
            plain, stepped = np.full_like(want, np.nan), np.full((*want.shape[:-1], 2 * want.shape[-1]), np.nan, "f4")
            wide, view = np.full(want.shape, np.nan, "c16"), stepped[..., ::2]
            for out in (plain, view, wide):
                assert call(out=out) is out
                assert (out == want).all()
            assert np.isnan(stepped[..., 1::2]).all()

    def test_out_of_the_gradient(self):
        """It has the filter's shape."""
        z, g = np.ones((1, 4, 4, 4, 2), "f4"), np.ones((1, 2, 2, 2, 3), "f4")
        out = np.empty((3, 3, 3, 2, 3))
        assert gemmconv.conv3d_backprop_filter_v2(z, out.shape, g, 2, "SAME", out=out) is out
        assert out.max() == 8

    def test_out_that_overlaps_an_operand(self):
        """As for conv3d_transpose."""
        rng = np.random.default_rng(8)
        z, w = integers(rng, (1, 6, 6, 3), "f4"), integers(rng, (3, 3, 3, 3), "f4")
        want, mine = gemmconv.conv2d(z, w, 1, "SAME"), z.copy()
        assert gemmconv.conv2d(mine, w, 1, "SAME", out=mine) is mine
        assert same_bits(mine, want)

    @pytest.mark.parametrize(
        ("out", "error", "needles"),
        [
            (np.ones((1, 5, 5, 4), "f4"), ValueError, [r"\(1, 5, 5, 4\)", r"\(1, 5, 5, 3\)"]),
            (np.ones((1, 5, 1, 5, 3), "f4"), ValueError, [r"\(1, 5, 1, 5, 3\)", r"\(1, 5, 5, 3\)"]),
            (np.ones((1, 5, 5, 3), "f2"), TypeError, ["float16", "float32"]),
            ([1.0], TypeError, ["list"]),
            (frozen(np.ones((1, 5, 5, 3), "f4")), ValueError, ["read-only"]),
        ],
    )
    def test_refused(self, out, error, needles):
        """Shapes are those of the caller's dimensions."""
        z, w = np.ones((1, 5, 5, 2), "f4"), np.ones((3, 3, 2, 3), "f4")
        with pytest.raises(error) as caught:
            gemmconv.conv2d(z, w, 1, "SAME", out=out)
        for needle in [r"\Aconv2d: out\b", *needles]:
            assert re.search(needle, str(caught.value))
        assert not isinstance(out, np.ndarray) or (out == 1).all()


class TestEmpties:
    """Consistent shapes with zeros in them give empty results or zeros."""

    @pytest.mark.parametrize(("rank", "layout"), EVERY_LAYOUT)
    @pytest.mark.parametrize("what", ["batch", "fine", "channels", "result channels", "kernel"])
    @pytest.mark.parametrize("padding", ["SAME", "VALID"])
    def test_empty(self, rank, layout, what, padding):
        """A zero in each of the sizes."""
        sizes = dict.fromkeys(["batch", "fine", "channels", "result channels", "kernel"], 3) | {what: 0}
        fine, kernel = [sizes["fine"], *[3] * (rank - 1)], [sizes["kernel"], *[3] * (rank - 1)]
        relation = [2] * rank, [1] * rank, [padding] * rank
        z = np.ones((sizes["batch"], *fine, sizes["channels"]), "f4")
        w = np.ones((*kernel, sizes["channels"], sizes["result channels"]), "f4")
        got = channels_last(convolve(rank, z, w, relation, padding, layout), layout)
        assert got.shape == (sizes["batch"], *map(coarse_size, fine, kernel, *relation), sizes["result channels"])
        assert not got.any()
        assert same_bits(got, convolution(z, w, relation).astype("f4"))
        back = transpose(rank, got, w, z.shape, relation, padding, layout)
        assert channels_last(back, layout).shape == z.shape
        assert not back.any()
        if rank == 3:
            v = gemmconv.conv3d_backprop_filter_v2(
                in_layout(z, layout), w.shape, in_layout(got, layout), 2, padding, layout
            )
            assert v.shape == w.shape
            assert not v.any()

    def test_a_kernel_larger_than_the_input(self):
        """VALID has no position then, where TensorFlow refuses what would be negative."""
        assert gemmconv.conv1d(np.ones((1, 2, 1)), np.ones((5, 1, 1)), 1, "VALID").shape == (1, 0, 1)


def number(value):
    """Return a regex for a number that is not part of another."""
    return rf"(?<![\w.]){re.escape(str(value))}(?![\w]|\.\d)"


def ones(*shape):
    """Return read-only float32 ones."""
    return frozen(np.ones(shape, np.float32))


# For each function a call that works, whose numbers differ; then changes that are refused, and what the text names.
BASES = {
    "conv3d": {"input": ones(2, 5, 6, 7, 4), "filter": ones(3, 3, 3, 4, 9), "strides": 2, "padding": "SAME"},
    "conv3d_backprop_filter_v2": {
        "input": ones(2, 5, 6, 7, 4),
        "filter_sizes": [3, 3, 3, 4, 9],
        "out_backprop": ones(2, 3, 3, 4, 9),
        "strides": 2,
        "padding": "SAME",
    },
    "conv2d": {"input": ones(2, 6, 7, 4), "filter": ones(3, 3, 4, 9), "strides": 2, "padding": "SAME"},
    "conv1d": {"value": ones(2, 7, 4), "filters": ones(3, 4, 9), "stride": 2, "padding": "SAME"},
    "conv2d_transpose": {
        "value": ones(2, 3, 4, 7),
        "filter": ones(3, 3, 5, 7),
        "output_shape": [2, 6, 8, 5],
        "strides": 2,
    },
    "conv1d_transpose": {
        "input": ones(2, 4, 7),
        "filters": ones(3, 5, 7),
        "output_shape": [2, 8, 5],
        "strides": 2,
    },
    "conv_transpose": {
        "input": ones(2, 4, 7),
        "filters": ones(3, 5, 7),
        "output_shape": [2, 8, 5],
        "strides": 2,
    },
}
V, T = ValueError, TypeError
REFUSED = [
    ("conv3d", {"filters": ones(1, 1, 1, 4, 9)}, V, ["'filter'", "'filters'"]),
    ("conv3d", {"filter": None}, T, ["'filter'", "'filters'"]),
    ("conv3d", {"strides": None}, T, ["'strides'", "None"]),
    ("conv3d", {"padding": None}, T, ["padding", "None", "SAME", "VALID"]),
    ("conv3d", {"padding": [[0, 0]] * 5}, T, ["padding", "SAME", "VALID"]),
    ("conv3d", {"padding": "EXPLICIT"}, V, ["padding", "EXPLICIT"]),
    ("conv3d", {"data_format": "NHWC"}, V, ["data_format", "NDHWC", "NCDHW", "'NHWC'"]),
    ("conv3d", {"input": ones(5, 6, 7, 4)}, V, ["input must be 5-D", "NDHWC", "4-D", r"\(5, 6, 7, 4\)"]),
    ("conv3d", {"filter": ones(3, 3, 4, 9)}, V, ["filter must be 5-D", "depth", "4-D", r"\(3, 3, 4, 9\)"]),
    ("conv3d", {"filter": ones(3, 3, 3, 3, 9)}, V, [r"filter.* 3 .*filter\.shape\[3\]", r"4 \(input\.shape\[4\]"]),
    ("conv3d", {"filter": ones(3, 3, 3, 5, 9)}, V, ["5 must divide 4"]),
    ("conv3d", {"filter": ones(3, 3, 3, 0, 9)}, V, ["0 must divide 4"]),
    ("conv3d", {"input": ones(2, 5, 6, 7, 0)}, V, ["4 must divide 0"]),
    ("conv3d", {"filter": ones(3, 3, 3, 2, 9)}, V, ["2 groups", r"9 output channels \(filter\.shape\[4\]\)"]),
    ("conv3d", {"data_format": "NCDHW"}, V, [r"5 \(input\.shape\[1\]", "NCDHW", "4 must divide 5"]),
    ("conv3d", {"strides": [2, 2]}, V, [r"strides should be of length 1, 3 or 5\. Received", r"\[2, 2\]"]),
    ("conv3d", {"strides": [2, 1, 1, 1, 1]}, V, ["strides", "batch and channels", "NDHWC", number(2)]),
    ("conv3d", {"dilations": (1, 1, 1, 1, 3)}, V, ["dilations", "batch and channels", number(3)]),
    ("conv3d", {"dilations": 0}, V, ["dilations", number(0), "at least 1"]),
    ("conv3d", {"dilations": 1.5}, T, ["dilations", r"1\.5"]),
    ("conv3d", {"algorithm": "col2im"}, V, ["algorithm", "'col2im'", "'im2col'"]),
    ("conv3d", {"workers": 0}, V, ["workers", number(0)]),
    ("conv3d", {"input": np.ones((2, 5, 6, 7, 4), int)}, T, ["input", "int64", r"astype\(np\.float32\)"]),
    ("conv3d", {"filter": np.ma.array(np.ones((3, 3, 3, 4, 9)))}, T, ["filter", "mask"]),
    ("conv3d_backprop_filter_v2", {"filter_sizes": [2**21] * 3 + [4, 9]}, V, ["filter_sizes", "address space"]),
    (
        "conv2d",
        {"padding": [[0, 0], [2**62, 0], [0, 0], [0, 0]]},
        V,
        [r"conv2d: result \(2, 2305843009213693954, 3, 9\)", "address space"],
    ),
    ("conv3d_backprop_filter_v2", {"strides": None}, T, ["'strides'"]),
    ("conv3d_backprop_filter_v2", {"filter_sizes": [3, 3, 3, 4]}, V, [r"filter_sizes must be 5 integers", number(4)]),
    ("conv3d_backprop_filter_v2", {"filter_sizes": 3}, V, [r"filter_sizes must be 5 integers", "scalar 3"]),
    ("conv3d_backprop_filter_v2", {"filter_sizes": None}, T, [r"filter_sizes", "None"]),
    ("conv3d_backprop_filter_v2", {"filter_sizes": [3, 3, 3.0, 4, 9]}, T, [r"filter_sizes\[2\]", r"3\.0"]),
    ("conv3d_backprop_filter_v2", {"filter_sizes": [3, -3, 3, 4, 9]}, V, [r"filter_sizes\[1\]=-3"]),
    ("conv3d_backprop_filter_v2", {"filter_sizes": [3, 3, 3, 3, 9]}, V, [r"3 .*filter_sizes\[3\]", "3 must divide 4"]),
    ("conv3d_backprop_filter_v2", {"filter_sizes": [3, 3, 3, 2, 9]}, V, ["2 groups", r"9 .*filter_sizes\[4\]"]),
    (
        "conv3d_backprop_filter_v2",
        {"filter_sizes": [3, 3, 3, 4, 8]},
        V,
        [r"out_backprop\.shape\[4\]=9", r"8 \(filter_sizes\[4\]\)"],
    ),
    ("conv3d_backprop_filter_v2", {"out_backprop": ones(3, 3, 4, 9)}, V, ["out_backprop must be 5-D", "4-D"]),
    (
        "conv3d_backprop_filter_v2",
        {"out_backprop": ones(1, 3, 3, 4, 9)},
        V,
        [r"out_backprop\.shape\[0\]=1", r"2 \(input\.shape\[0\]\)"],
    ),
    (
        "conv3d_backprop_filter_v2",
        {"out_backprop": ones(2, 3, 4, 4, 9)},
        V,
        [r"out_backprop\.shape\[2\]=4", "input height 6", "stride 2", "'SAME'", "only 3"],
    ),
    (
        "conv3d_backprop_filter_v2",
        {"padding": "VALID", "dilations": [1, 2, 1]},
        V,
        [r"out_backprop\.shape\[1\]=3", "input depth 5", "kernel 3", "stride 2", "'VALID'", "only 2"],
    ),
    ("conv3d_backprop_filter_v2", {"out_backprop": np.ones((2, 3, 3, 4, 9), int)}, T, ["out_backprop", "int64"]),
    ("conv3d_backprop_filter_v2", {"padding": [[0, 0]] * 5}, T, ["padding", "SAME"]),
    ("conv3d_backprop_filter_v2", {"algorithm": "kn2row"}, V, ["algorithm", "'kn2row'", "'im2col'"]),
    ("conv2d", {"padding": None}, T, ["padding", "None", "'SAME'", "4 pairs"]),
    ("conv2d", {"padding": "EXPLICIT"}, V, ["padding", "EXPLICIT", "4 pairs"]),
    ("conv2d", {"padding": 1}, T, ["padding", number(1), "4 pairs"]),
    ("conv2d", {"padding": [[1, 1], [1, 1]]}, V, ["padding", "4 pairs", "NHWC", "got 2"]),
    ("conv2d", {"padding": [1, 1]}, T, [r"padding\[0\]", number(1)]),
    ("conv2d", {"padding": [[0, 0], [1, 1, 1], [1, 1], [0, 0]]}, V, [r"padding\[1\]", "2 integers", "got 3"]),
    ("conv2d", {"padding": [[0, 0], [1, 1], [1, -1], [0, 0]]}, V, [r"padding\[2\]=\[1, -1\]", "at least 0"]),
    ("conv2d", {"padding": [[0, 0], [1, 1], [1, 1.5], [0, 0]]}, T, [r"padding\[2\]\[1\]", r"1\.5"]),
    ("conv2d", {"padding": [[0, 0], [0, 0], [1, 1], [0, 2]]}, V, [r"padding\[3\]=\[0, 2\]", r"\[0, 0\]", "NHWC"]),
    ("conv2d", {"padding": [[3, 0], [0, 0], [1, 1], [0, 0]]}, V, [r"padding\[0\]=\[3, 0\]", r"\[0, 0\]"]),
    ("conv2d", {"strides": [2, 2, 2]}, V, [r"strides should be of length 1, 2 or 4\. Received", "of length 3"]),
    ("conv2d", {"strides": [1, 2, 2, 3]}, V, ["strides", "batch and channels", "entries 0 and 3 of NHWC", number(3)]),
    ("conv2d", {"input": ones(2, 1, 6, 7, 4)}, V, [r"input must be 4-D \(NHWC\)", "5-D"]),
    ("conv2d", {"filter": ones(3, 4, 9)}, V, [r"filter must be 4-D \(height, width", "3-D"]),
    ("conv2d", {"filter": ones(3, 3, 3, 9)}, V, [r"filter\.shape\[2\]", r"input\.shape\[3\]", "3 must divide 4"]),
    ("conv2d", {"data_format": "NDHWC"}, V, ["data_format", "NHWC", "NCHW"]),
    ("conv1d", {"value": None}, T, ["'value'", "'input'"]),
    ("conv1d", {"input": ones(2, 7, 4)}, V, ["'value'", "'input'"]),
    ("conv1d", {"filters": None}, T, ["'filters'"]),
    ("conv1d", {"padding": [[0, 0]] * 3}, T, ["padding", "SAME"]),
    ("conv1d", {"stride": [1, 2]}, V, [r"stride should be of length 1 or 3\. Received: stride=", "of length 2"]),
    ("conv1d", {"stride": -1}, V, ["stride", number(-1)]),
    ("conv1d", {"value": ones(7, 4)}, V, [r"value must be 3-D \(NWC\)", "2-D"]),
    ("conv1d", {"filters": ones(3, 3, 9)}, V, [r"filters\.shape\[1\]", r"value\.shape\[2\]", "3 must divide 4"]),
    ("conv1d", {"data_format": "NHWC"}, V, ["data_format", "'NWC'", "'NCW'"]),
    ("conv2d_transpose", {"output_shape": [2, 9, 8, 5]}, V, [r"output_shape\[1\]=9", "input height 3", "5 to 6"]),
    (
        "conv2d_transpose",
        {"data_format": "NCHW", "value": ones(2, 7, 3, 4), "output_shape": [2, 5, 6, 4]},
        V,
        [r"output_shape\[3\]=4", "input width 4", "stride 2", "'SAME'", "7 to 8"],
    ),
    (
        "conv2d_transpose",
        {"padding": [[0, 0], [1, 0], [0, 1], [0, 0]], "dilations": 2},
        V,
        [r"output_shape\[1\]=6", "input height 3", "kernel 3, dilation 2", r"padding \[1, 0\]", "8 to 9"],
    ),
    (
        "conv2d_transpose",
        {"padding": [[0, 0], [9, 9], [0, 1], [0, 0]], "output_shape": None},
        V,
        ["input height 3", r"padding \[9, 9\]", "no size"],
    ),
    ("conv2d_transpose", {"output_shape": [2, 1, 6, 8, 5]}, V, ["output_shape must be 4 integers", "NHWC", "got 5"]),
    ("conv2d_transpose", {"output_shape": [1, 6, 8, 5]}, V, [r"output_shape\[0\]=1", r"2 \(value\.shape\[0\]\)"]),
    ("conv2d_transpose", {"output_shape": [2, 6, 8, 4]}, V, [r"output_shape\[3\]=4", r"5 \(filter\.shape\[2\]\)"]),
    ("conv2d_transpose", {"filter": ones(3, 3, 5, 6)}, V, [r"6 .*filter\.shape\[3\]", r"7 \(value\.shape\[3\]"]),
    ("conv2d_transpose", {"algorithm": "im2col"}, V, ["algorithm", "'im2col'", "'col2im'"]),
    ("conv1d_transpose", {"padding": [[0, 0]] * 3}, T, ["padding", "SAME"]),
    ("conv1d_transpose", {"output_shape": [2, 9, 5]}, V, [r"output_shape\[1\]=9", "input width 4", "7 to 8"]),
    ("conv1d_transpose", {"filters": ones(3, 5, 6)}, V, [r"6 .*filters\.shape\[2\]", r"7 \(input\.shape\[2\]"]),
    ("conv1d_transpose", {"input": [[[True]]]}, T, ["input", "bools"]),
    ("conv_transpose", {"input": ones(2, 4, 4, 7)}, V, [r"input must be 3-D \(NWC\)", "4-D"]),
    ("conv_transpose", {"output_shape": [2, 9, 5]}, V, [r"output_shape\[1\]=9", "input width 4", "7 to 8"]),
    ("conv_transpose", {"data_format": "NHWC"}, V, ["data_format", "'NWC'"]),
]


class TestRefusals:
    """What each text names; nothing is touched."""

    @pytest.mark.parametrize("name", BASES)
    def test_the_base_works(self, name):
        """What the cases differ from is accepted."""
        assert getattr(gemmconv, name)(**BASES[name]).any()

    @pytest.mark.parametrize(
        ("name", "changes", "error", "needles"), REFUSED, ids=[f"{i}-{case[0]}" for i, case in enumerate(REFUSED)]
    )
    def test_refused(self, name, changes, error, needles):
        """Under the caller's names and in his dimensions."""
        out = np.full(getattr(gemmconv, name)(**BASES[name]).shape, 5.5)
        with pytest.raises(error) as caught:
            getattr(gemmconv, name)(**(BASES[name] | {"out": out} | changes))
        for needle in [rf"\A{name}: ", *needles]:
            assert re.search(needle, str(caught.value)), f"{str(caught.value)!r} does not match {needle!r}"
        assert (out == 5.5).all()


class TestColumns:
    """im2col and col2im."""

    @pytest.mark.parametrize("seed", range(3))
    def test_im2col_is_the_definition(self, seed):
        """Each column is what the tap meets, zero where it meets nothing."""
        for index, rng, rank, layout, fine, kernel, relation, padding in cases(50 + seed, 60):
            z = integers(rng, (2, *fine, 3), "f4")
            coarse = [coarse_size(*axis) for axis in zip(fine, kernel, *relation, strict=True)]
            want = np.zeros((2, *coarse, *kernel, 3), "f4")
            for tap, at, met in meetings(fine, kernel, *relation):
                want[(*at, *tap)] = z[met]
            if not layout.endswith("C"):
                want = np.moveaxis(want, -1, 1)  # [N, C, coarse, kernel]
                order = [0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank)]
                want = np.ascontiguousarray(want.transpose(order))
            got = gemmconv.im2col(in_layout(z, layout), kernel, relation[0], padding, layout, relation[1])
            assert got.flags.c_contiguous
            assert same_bits(got, want), f"{seed=} {index=} {layout} {fine} {kernel} {relation}"

    @pytest.mark.parametrize("seed", range(3))
    def test_col2im_is_the_adjoint(self, seed):
        """Sums of products of whole numbers agree."""
        for index, rng, _, layout, fine, kernel, relation, padding in cases(60 + seed, 60):
            z = integers(rng, in_layout([2, *fine, 3], layout), "f8")
            columns = gemmconv.im2col(z, kernel, relation[0], padding, layout, relation[1])
            other = integers(rng, columns.shape, "f8")
            back = gemmconv.col2im(other, fine, kernel, relation[0], padding, layout, relation[1])
            assert back.shape == z.shape
            assert (back * z).sum() == (columns * other).sum(), f"{seed=} {index=} {layout} {fine} {kernel} {relation}"

    @pytest.mark.parametrize("seed", range(2))
    def test_products_with_columns_are_the_functions(self, seed):
        """A convolution is im2col and a product, its transpose a product and col2im."""
        for index, rng, rank, layout, fine, kernel, relation, padding in cases(70 + seed, 40):
            z, w = integers(rng, (2, *fine, 3), "f4"), integers(rng, (*kernel, 3, 4), "f4")
            args = kernel, relation[0], padding, layout, relation[1]
            columns = gemmconv.im2col(in_layout(z, layout), *args)
            y = convolve(rank, z, w, relation, padding, layout)
            taps = int(np.prod(kernel))
            if layout.endswith("C"):
                product = columns.reshape(*y.shape[:-1], taps * 3) @ w.reshape(taps * 3, 4)
                back = (y @ w.reshape(taps * 3, 4).T).reshape(columns.shape)
            else:
                matrix = np.moveaxis(w, -2, 0).reshape(3 * taps, 4)  # channels before taps, as in the columns
                positions = int(np.prod(y.shape[2:]))
                product = (matrix.T @ columns.reshape(2, 3 * taps, positions)).reshape(y.shape)
                back = (matrix @ y.reshape(2, 4, positions)).reshape(columns.shape)
            assert same_bits(product + np.float32(0), y), f"{seed=} {index=}"
            shape = in_layout([2, *fine, 3], layout)
            want = gemmconv.conv_transpose(y, w, shape, relation[0], padding, layout, relation[1])
            assert same_bits(gemmconv.col2im(back, fine, *args), want), f"{seed=} {index=}"

    @pytest.mark.parametrize("name", DTYPES)
    def test_dtypes(self, name):
        """The array's own; halves are summed in float32: 2048 + 1 + 1 is 2050 there, and 2048 in float16."""
        dtype = dtype_named(name)
        z = integers(np.random.default_rng(0), (1, 5, 2), dtype, 2)
        columns = gemmconv.im2col(z, 3)
        assert columns.dtype == dtype
        assert (columns[0, 2] == z[0, 2:5]).all()
        tall = np.array([[0, 0, 1], [0, 1, 0], [2048, 0, 0]]).astype(dtype).reshape(1, 3, 3, 1)
        back = gemmconv.col2im(tall, 5, 3)
        assert back.dtype == dtype
        assert back[0, 2, 0] == np.array(2050).astype(dtype)

    def test_forms_of_arguments(self):
        """One number for all axes, arrays, lists of numbers, foreign byte order, no axes reordered by None."""
        z = integers(np.random.default_rng(1), (2, 6, 7, 3), "f4")
        want = gemmconv.im2col(z, (3, 3), (2, 2), "SAME", "NHWC", (1, 1))
        assert same_bits(gemmconv.im2col(z, 3, 2, "SAME"), want)
        assert same_bits(gemmconv.im2col(z, np.array([3, 3]), [1, 2, 2, 1], "SAME"), want)
        assert same_bits(gemmconv.im2col(z.astype(">f4"), [3, 3], 2, "SAME"), want)
        assert same_bits(gemmconv.im2col(z.tolist(), np.int64(3), 2, [[0, 0], [0, 1], [1, 1], [0, 0]]), want)
        assert same_bits(
            gemmconv.col2im(want, (6, 7), 3, 2, "SAME"), gemmconv.col2im(want, [6, 7], [3, 3], 2, "SAME", "NHWC")
        )

    @pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (2, 5, 0), (2, 2, 2)])
    def test_empties(self, shape):
        """Zeros in the sizes, and kernels of nothing or larger than the array."""
        for kernel in (0, 1, 3):
            columns = gemmconv.im2col(np.ones(shape, "f4"), kernel)
            assert columns.shape == (shape[0], coarse_size(shape[1], kernel, 1, 1, "VALID"), kernel, shape[2])
            assert gemmconv.col2im(columns, shape[1], kernel).shape == shape

    @pytest.mark.parametrize(
        ("call", "error", "needles"),
        [
            (lambda: gemmconv.im2col(ones(3), 2), V, ["array must be 3-D or 4-D or 5-D", "1-D", r"\(3,\)"]),
            (lambda: gemmconv.im2col(ones(1, 5, 1), 2, data_format="NHWC"), V, ["array must be 4-D for NHWC", "3-D"]),
            (lambda: gemmconv.im2col(ones(1, 5, 1), 2, data_format="NXC"), V, ["data_format", "'NXC'", "'NWC'"]),
            (lambda: gemmconv.im2col(ones(1, 5, 1), [2, 2]), V, ["kernel", "1 of them", r"\[2, 2\]"]),
            (lambda: gemmconv.im2col(ones(1, 5, 1), -2), V, ["kernel", number(-2), "at least 0"]),
            (lambda: gemmconv.im2col(ones(1, 5, 1), 2.0), T, ["kernel", r"2\.0"]),
            (lambda: gemmconv.im2col(ones(1, 5, 1), None), T, ["kernel", "None"]),
            (lambda: gemmconv.im2col(ones(1, 5, 1), 2, [1, 1]), V, ["strides should be of length 1 or 3"]),
            (lambda: gemmconv.im2col(ones(1, 5, 1), 2, dilations=0), V, ["dilations", number(0)]),
            (lambda: gemmconv.im2col(ones(1, 5, 1), 2, padding="same"), V, ["padding", "'same'", "3 pairs"]),
            (lambda: gemmconv.im2col(ones(1, 5, 1), 2, padding=[[0, 0]]), V, ["padding", "3 pairs", "got 1"]),
            (lambda: gemmconv.im2col(np.ones((1, 5, 1), int), 2), T, ["array", "int64"]),
            (
                lambda: gemmconv.im2col(ones(1, 5, 1), 2, padding=[[0, 0], [2**62, 0], [0, 0]]),
                V,
                ["result", "address space"],
            ),
            (lambda: gemmconv.col2im(ones(1, 5, 1), 4, 3), V, ["columns must be 4-D or 6-D or 8-D", "3-D"]),
            (
                lambda: gemmconv.col2im(ones(1, 2, 3, 1), 4, 3, 2),
                V,
                [r"columns has shape \(1, 2, 3, 1\)", r"\(4,\)", r"\(1, 1, 3, 1\)", r"strides \(2,\)", "'VALID'"],
            ),
            (lambda: gemmconv.col2im(ones(1, 2, 3, 1), [4, 4], 3), V, ["spatial", "1 of them", r"\[4, 4\]"]),
            (lambda: gemmconv.col2im(ones(1, 2, 3, 1), -4, 3), V, ["spatial", number(-4)]),
        ],
    )
    def test_refused(self, call, error, needles):
        """With the numbers."""
        with pytest.raises(error) as caught:
            call()
        for needle in [r"\A(im2col|col2im): ", *needles]:
            assert re.search(needle, str(caught.value)), f"{str(caught.value)!r} does not match {needle!r}"


def test_rows_further_apart_than_blas_can_say(monkeypatch):
    """Channels first, with distances from channel to channel that BLAS' integers do not hold: copied, and right."""
    rng = np.random.default_rng(77)
    x, w = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((1, 2, 300, 400), (3, 3, 2, 5)))
    g = rng.integers(-4, 5, (1, 5, 1, 300, 400)).astype(np.float32)
    settings = {"strides": 1, "padding": "SAME"}
    conv = {"data_format": "NCHW", "algorithm": "im2col", **settings}
    gradient = (x[:, :, None], (1, 3, 3, 2, 5), g, 1, "SAME", "NCDHW")
    expected = gemmconv.conv2d(x, w, **conv), gemmconv.conv3d_backprop_filter_v2(*gradient)
    monkeypatch.setattr(blas._path(np.dtype(np.float32)), "largest", 100_000)
    gemmconv.clear_cache()
    try:
        assert np.array_equal(gemmconv.conv2d(x, w, **conv), expected[0])
        assert np.array_equal(gemmconv.conv3d_backprop_filter_v2(*gradient), expected[1])
    finally:
        monkeypatch.undo()
        gemmconv.clear_cache()


def test_a_lowering_that_cannot_do_groups_as_one_does_them_one_by_one():
    """32 groups as one would not fit, one group does."""
    y = gemmconv.conv2d(np.ones((1, 8, 20000, 64), np.float32), np.ones((3, 3, 1, 64), np.float32), 1, "SAME",
                        algorithm="kn2row")  # fmt: skip
    assert y[0, 4, 10000].tolist() == [9] * 64


def test_what_a_lowering_cannot_do_is_said_of_the_function_that_was_called():
    x, w = np.ones((1, 9, 9, 2), np.float32), np.ones((3, 3, 2, 2), np.float32)
    text = "no two taps meet in a cell, got kernel 1x3x3, strides 1x3x3, dilations 1x1x1; 'im2col' and 'auto' can"
    with pytest.raises(ValueError, match=f"^conv2d: algorithm='winograd' cannot do this problem: {text}"):
        gemmconv.conv2d(x, w, 3, "SAME", algorithm="winograd")


@pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
def test_plans_of_the_family_give_what_the_functions_give(data_format):
    """The same bits, shapes, dtypes and refusals."""
    rng = np.random.default_rng(41)
    sizes = ((2, 7, 6, 5, 4), (3, 2, 3, 2, 6), (2, 4, 3, 3, 6))
    shapes = [(s[0], s[4], *s[1:4]) if data_format == "NCDHW" and s is not sizes[1] else s for s in sizes]
    z, w, g = (rng.standard_normal(shape) for shape in shapes)
    how = {"strides": 2, "padding": "SAME", "data_format": data_format}
    plan = gemmconv.plan_conv3d(z.shape, w.shape, dtype=np.float64, **how)
    assert plan(z, w).tobytes() == gemmconv.conv3d(z, w, **how).tobytes()
    plan = gemmconv.plan_conv3d_backprop_filter_v2(z.shape, w.shape, g.shape, dtype=np.float64, **how)
    want = gemmconv.conv3d_backprop_filter_v2(z, w.shape, g, **how)
    assert plan(z, g).tobytes() == want.tobytes()
    assert plan.output_shape == want.shape


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        ("plan_conv3d", ((1, 4, 4, 4, -1), (1, 1, 1, 1, 1), 1, "SAME"), r"input_shape=\[1, 4, 4, 4, -1\] has negative"),
        ("plan_conv3d", ((1, 4, 4, 4, 3), (1, 1, 1, 2, 1), 1, "SAME"), "2 must divide 3, into groups"),
        ("plan_conv3d", ((1, 4, 4, 4), (1, 1, 1, 2, 1), 1, "SAME"), "input must be 5-D"),
        (
            "plan_conv3d_backprop_filter_v2",
            ((1, 4, 4, 4, 2), (1, 1, 1, 2, 3), (1, 4, 4, 5, 3), 1, "SAME"),
            r"out_backprop\.shape\[3\]=5 is out of reach",
        ),
        (
            "plan_conv3d_backprop_filter_v2",
            ((1, 4, 4, 4, 2), (1, 1, 1, 2, 3), (1, 4, 4, -4, 3), 1, "SAME"),
            r"out_backprop_shape=\[1, 4, 4, -4, 3\] has negative sizes",
        ),
    ],
)
def test_plans_of_the_family_refuse(function, arguments, text):
    with pytest.raises(ValueError, match=f"^{function}: .*{text}|^{function}: {text}"):
        getattr(gemmconv, function)(*arguments)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        ("plan_conv3d", ((1, 4, 4, 4, 2), (1, 1, 1, 2, 1))),
        ("plan_conv3d_backprop_filter_v2", ((1, 4, 4, 4, 2), (1, 1, 1, 2, 3), (1, 4, 4, 4, 3))),
    ],
)
def test_plans_of_the_family_refuse_none(function, shapes):
    """For strides as the functions do, and as a dtype, which to NumPy is float64."""
    with pytest.raises(TypeError, match=f"^{function}: 'strides' is required, got None"):
        getattr(gemmconv, function)(*shapes, None, "SAME")
    with pytest.raises(TypeError, match=f"^{function}: dtype must be one of .*, got None"):
        getattr(gemmconv, function)(*shapes, 1, "SAME", dtype=None)


def test_plans_name_the_operands_of_their_operation():
    """In texts as in reports."""
    z, w, g = (np.ones(shape, np.float32) for shape in ((1, 4, 4, 4, 2), (1, 1, 1, 2, 3), (1, 4, 4, 4, 3)))
    forward = gemmconv.plan_conv3d(z.shape, w.shape, 1, "SAME")
    gradient = gemmconv.plan_conv3d_backprop_filter_v2(z.shape, w.shape, g.shape, 1, "SAME")
    with pytest.raises(TypeError, match="input of float64 and filter of float32 give float64"):
        forward(z.astype(float), w)
    with pytest.raises(TypeError, match="input of float32 and out_backprop of float64 give float64"):
        gradient(z, g.astype(float))
    with pytest.raises(ValueError, match=r"input has shape \(1, 4, 4, 4, 3\)"):
        forward.prepare(w)(g)
    with pytest.raises(ValueError, match=r"out_backprop has shape \(1, 1, 1, 2, 3\)"):
        gradient.prepare(w)
    assert same_bits(gradient.prepare(g)(z), gradient(z, g))
    for plan in (forward, gradient):
        lines = str(plan).splitlines()
        assert len({len(line) - len(line.partition(" ")[2].lstrip()) for line in lines}) == 1
