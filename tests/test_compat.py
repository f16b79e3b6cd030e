"""gemmconv.compat against the definitions in compat_cases.py; tests/peers compares it with the frameworks."""

import inspect
import subprocess
import sys

import compat_cases
import numpy as np
import pytest
from compat_cases import ONNX_REFUSALS, TORCH_EMPTY, TORCH_REFUSALS, with_arrays
from oracle import dtype_named, frozen, integers, same_bits

import gemmconv.compat.onnx
import gemmconv.compat.torch
from gemmconv import conv3d_transpose
from gemmconv.compat.onnx import conv, conv_transpose

CHUNK = 250
TORCH, ONNX = gemmconv.compat.torch, gemmconv.compat.onnx
FRAMEWORKS = {
    "torch": (TORCH, compat_cases.torch_case, compat_cases.by_torch),
    "onnx": (ONNX, compat_cases.onnx_case, compat_cases.by_onnx),
}


class ArrayLike:
    """Something that NumPy can turn into an array and that is none itself."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype=dtype, copy=copy)


class TestRandom:
    @pytest.mark.parametrize("framework", FRAMEWORKS)
    @pytest.mark.parametrize("chunk", range(8))
    def test_the_definition(self, framework, chunk):
        """2000 calls of each framework: whole numbers bit for bit, normal ones to rounding."""
        module, draw, expect = FRAMEWORKS[framework]
        for index in range(CHUNK * chunk, CHUNK * (chunk + 1)):
            case = draw(0, index)
            expected = expect(case)
            got = getattr(module, case.function)(**case.arguments, workers=1 + index % 2)
            array = next(iter(case.arguments.values()))
            assert got.shape == expected.shape, case
            assert got.dtype == array.dtype, case
            assert got.flags.c_contiguous
            if case.exact:
                assert np.array_equal(got, expected), case
            else:
                part = 1e-14 if got.dtype == np.float64 else 2e-6
                largest = np.abs(expected).max()
                assert np.abs(got - expected).max() <= case.bound(part, expected) * largest, case

    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_the_calls_have_everything(self, framework):
        """Features that must meet in one call are among those drawn."""
        draw = FRAMEWORKS[framework][1]
        found = {feature for index in range(CHUNK) for feature in draw(0, index).features}
        common = {
            "1-D",
            "2-D",
            "3-D",
            "transposed",
            "convolution",
            "groups",
            "depthwise",
            "bias",
            "dilated and strided",
        }
        torch = {"groups, output padding and dilation", "unbatched", "same", "valid", "float64", "complex64"}
        onnx = {"asymmetric pads", "output_shape", "SAME_UPPER", "SAME_LOWER", "VALID", "kernel smaller than stride"}
        assert found >= common | {"torch": torch, "onnx": onnx}[framework]

    def test_the_oracle_by_hand(self):
        """The loops over taps against numbers that were added by hand."""
        x, w = np.array([[[1.0, 2.0]]]), np.array([[[1.0, 10.0, 100.0]]])
        scattered = compat_cases.layer(x, w, None, 1, [2], [1], [0], [5], True)
        assert scattered.tolist() == [[[1, 10, 102, 20, 200]]]
        assert compat_cases.layer(x, w, np.array([0.5]), 1, [2], [1], [1], [3], True).tolist() == [
            [[10.5, 102.5, 20.5]]
        ]
        gathered = compat_cases.layer(scattered, w, None, 1, [2], [1], [0], [2], False)
        assert gathered.tolist() == [[[1 + 100 + 10200, 102 + 200 + 20000]]]
        groups = compat_cases.layer(
            np.array([[[1.0], [2.0]]]), np.array([[[3.0]], [[5.0]]]), None, 2, [1], [1], [0], [1], True
        )
        assert groups.tolist() == [[[3], [10]]]


class TestTorch:
    @pytest.mark.parametrize(("function", "given", "error", "text"), TORCH_REFUSALS)
    def test_refused(self, function, given, error, text):
        """What PyTorch refuses, by name and with the numbers; the peers' script shows that PyTorch refuses it."""
        with pytest.raises(error, match=rf"\Acompat\.torch\.{function}: .*{text}"):
            getattr(TORCH, function)(**with_arrays(given))

    @pytest.mark.parametrize(("function", "given", "shape"), TORCH_EMPTY)
    def test_empty_batch(self, function, given, shape):
        """An empty batch gives an empty result of the shape it would have."""
        assert getattr(TORCH, function)(**with_arrays(given)).shape == shape

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_signatures(self, rank):
        """PyTorch's names, order and defaults; gemmconv's own arguments by keyword only."""
        own = ["out=None", "algorithm='auto'", "workers=None"]
        first = ["input", "weight", "bias=None", "stride=1", "padding=0"]
        for function, more in (
            (f"conv_transpose{rank}d", ["output_padding=0", "groups=1", "dilation=1"]),
            (f"conv{rank}d", ["dilation=1", "groups=1"]),
        ):
            parameters = inspect.signature(getattr(TORCH, function)).parameters.values()
            assert [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters] == [
                *first,
                *more,
                *own,
            ]
            assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == ["out", "algorithm", "workers"]

    def test_weights_are_the_transpose_of_tensorflows(self):
        """[Cin, Cout, kd, kh, kw] there is [kd, kh, kw, Cout, Cin] here."""
        rng = np.random.default_rng(0)
        x, w = integers(rng, (2, 3, 2, 3, 4), "f4"), integers(rng, (3, 5, 2, 3, 1), "f4")
        ours = conv3d_transpose(
            x, w.transpose(2, 3, 4, 1, 0), strides=2, padding="VALID", data_format="NCDHW", output_shape=[2, 5, 4, 7, 7]
        )
        assert same_bits(TORCH.conv_transpose3d(x, w, stride=2), ours)

    @pytest.mark.parametrize("number", [2, np.int64(2), np.array(2), (2,), [2, 2], np.array([2, 2]), range(2, 3)])
    def test_forms_of_a_number(self, number):
        """One integer, a sequence of one, or one for each axis."""
        x, w = np.ones((1, 2, 3, 3), np.float32), np.ones((2, 1, 3, 3), np.float32)
        assert TORCH.conv_transpose2d(x, w, stride=number).shape == (1, 1, 7, 7)
        assert TORCH.conv_transpose2d(x, w, stride=4, output_padding=number).shape == (1, 1, 13, 13)
        assert TORCH.conv2d(x, w.transpose(1, 0, 2, 3), padding=number).shape == (1, 1, 5, 5)

    def test_refused_beyond_torch(self):
        """What PyTorch takes and gemmconv does not: integers, and channels that are none."""
        whole = np.ones((1, 2, 4), np.int64)
        with pytest.raises(TypeError, match=r"input has dtype int64.*\.astype\(np\.float32\)"):
            TORCH.conv1d(whole, whole)
        with pytest.raises(TypeError, match="bias has dtype int64"):
            TORCH.conv1d(whole.astype("f4"), whole.astype("f4"), np.ones(1, np.int64))
        with pytest.raises(ValueError, match=r"weight must not be empty, got shape \(3, 0, 2\)"):
            TORCH.conv1d(np.ones((1, 0, 4), np.float32), np.ones((3, 0, 2), np.float32))

    @pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
    def test_unbatched_out(self, function):
        """`out` has the shape of the result, with N or without; a refused one is not touched."""
        rng = np.random.default_rng(0)
        x, w, b = integers(rng, (3, 5, 4), "f4"), integers(rng, (3, 3, 2, 2), "f4"), integers(rng, (3,), "f4")
        call = getattr(TORCH, function)
        expected = call(x[np.newaxis], w, b)
        out = np.empty(expected.shape[1:], np.float32)
        assert call(x, w, b, out=out) is out
        assert same_bits(out, expected[0])
        wide = np.full(expected.shape[:0:-1], 7.0).T
        assert call(x, w, b, out=wide[:, ::1]) is not out
        assert np.array_equal(wide, expected[0])
        out[...] = 7
        with pytest.raises(ValueError, match=r"out has shape \(1, 3, .*, but the result has \(3, "):
            call(x, w, b, out=out[np.newaxis])
        assert (out == 7).all()


class TestOnnx:
    @pytest.mark.parametrize(("function", "given", "error", "text"), ONNX_REFUSALS)
    def test_refused(self, function, given, error, text):
        """What ONNX Runtime refuses, by name and with the numbers."""
        with pytest.raises(error, match=rf"\Acompat\.onnx\.{function}: .*{text}"):
            getattr(ONNX, function)(**with_arrays(given))

    def test_signatures(self):
        """The standard's names and defaults, attributes by keyword only."""
        attributes = {"auto_pad": "NOTSET", "dilations": None, "group": 1, "kernel_shape": None}
        own = {"out": None, "algorithm": "auto", "workers": None}
        for function, more in (
            (conv_transpose, ["output_padding", "output_shape", "pads", "strides"]),
            (conv, ["pads", "strides"]),
        ):
            parameters = inspect.signature(function).parameters.values()
            assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["X", "W", "B"]
            named = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
            assert named == attributes | dict.fromkeys(more) | own
            assert list(named) == [*attributes, *more, *own]

    @pytest.mark.parametrize(
        ("attributes", "expected"),
        [
            # The sum of the pads is odd: 2*2 + 3 - 6.
            ({"kernel": 3, "strides": [2], "auto_pad": "SAME_UPPER"}, [1, 2, 5, 4, 9, 6]),
            ({"kernel": 3, "strides": [2], "auto_pad": "SAME_LOWER"}, [2, 5, 4, 9, 6, 9]),
            ({"kernel": 3, "strides": [2], "output_shape": [6], "auto_pad": "SAME_UPPER"}, [1, 2, 5, 4, 9, 6]),
            # All but SAME_UPPER cut more at the beginning, and pads do not matter beside output_shape.
            ({"kernel": 3, "strides": [2], "output_shape": [6]}, [2, 5, 4, 9, 6, 9]),
            ({"kernel": 3, "strides": [2], "output_shape": [6], "auto_pad": "VALID"}, [2, 5, 4, 9, 6, 9]),
            ({"kernel": 3, "strides": [2], "output_shape": [6], "pads": [0, 2]}, [2, 5, 4, 9, 6, 9]),
            ({"kernel": 3, "strides": [2], "output_shape": [2]}, [4, 9]),
            # output_padding takes part in the sum of the pads: 2*2 + 1 + 3 - 6.
            (
                {"kernel": 3, "strides": [2], "output_padding": [1], "auto_pad": "SAME_UPPER"},
                [2, 5, 4, 9, 6, 9],
            ),
            # The kernel is smaller than the stride: the size is n*stride by the text, and pads are not negative.
            ({"kernel": 1, "strides": [2], "auto_pad": "SAME_UPPER"}, [1, 0, 2, 0, 3, 0]),
            ({"kernel": 1, "strides": [4], "auto_pad": "SAME_LOWER"}, [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]),
            ({"kernel": 2, "strides": [4], "auto_pad": "SAME_UPPER"}, [1, 2, 0, 0, 2, 4, 0, 0, 3, 6, 0, 0]),
            ({"kernel": 1, "strides": [4], "output_shape": [12]}, [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]),
            # An end less than the dilation, which ONNX Runtime does not take.
            ({"kernel": 2, "strides": [1], "dilations": [2], "output_padding": [1]}, [1, 2, 5, 4, 6, 0]),
            ({"kernel": 2, "strides": [1], "dilations": [2], "output_shape": [6]}, [1, 2, 5, 4, 6, 0]),
        ],
    )
    def test_sizes_and_pads(self, attributes, expected):
        """Where the output begins and ends, on one axis with X = 1, 2, 3 and W = 1, 2, ..., with and without a bias."""
        x, w = np.array([[[1, 2, 3]]], np.float32), np.arange(1.0, 1 + attributes["kernel"], dtype=np.float32)
        given = {name: value for name, value in attributes.items() if name != "kernel"}
        assert conv_transpose(x, w[np.newaxis, np.newaxis], **given).tolist() == [[expected]]
        biased = conv_transpose(x, w[np.newaxis, np.newaxis], np.float32([0.5]), **given)
        assert biased.tolist() == [[[value + 0.5 for value in expected]]]

    def test_same_of_a_convolution(self):
        """ceil(n / stride) positions; the odd zero at the end or at the beginning; with a dilation too."""
        x, w = np.array([[[1, 2, 3, 4]]], np.float32), np.array([[[1, 10, 100]]], np.float32)
        assert conv(x, w, strides=[2], auto_pad="SAME_UPPER").tolist() == [[[321, 43]]]
        assert conv(x, w, strides=[2], auto_pad=b"SAME_UPPER").tolist() == [[[321, 43]]]  # as a model's attributes are
        assert conv(x, w, strides=[2], auto_pad="SAME_LOWER").tolist() == [[[210, 432]]]
        assert conv(x, w, dilations=[2], auto_pad="SAME_UPPER").tolist() == [[[310, 420, 31, 42]]]
        assert conv(x, w[:, :, :1], strides=[3], auto_pad="SAME_UPPER").tolist() == [[[1, 4]]]

    def test_empty(self):
        """An empty batch, no channels, an empty axis where the output is not."""
        none = np.ones((0, 1, 3), np.float32)
        assert conv_transpose(none, np.ones((1, 2, 3), np.float32)).shape == (0, 2, 5)
        assert conv(none, np.ones((2, 1, 3), np.float32)).shape == (0, 2, 1)
        assert conv(np.ones((1, 1, 4), np.float32), np.ones((0, 1, 3), np.float32)).shape == (1, 0, 2)
        empty = np.ones((1, 0, 3), np.float32)
        bias = np.float32([1, 2])
        assert conv(empty, np.ones((2, 0, 3), np.float32), bias).tolist() == [[[1], [2]]]
        assert conv_transpose(empty, np.ones((0, 2, 1), np.float32), bias).tolist() == [[[1] * 3, [2] * 3]]
        assert conv(np.ones((1, 1, 0), np.float32), np.ones((2, 1, 3), np.float32), bias, pads=[2, 2]).tolist() == [
            [[1, 1], [2, 2]]
        ]


class TestArrays:
    CALLS = (TORCH.conv_transpose2d, TORCH.conv2d, conv_transpose, conv)

    @pytest.mark.parametrize("call", CALLS)
    def test_anything_like_an_array(self, call):
        """Lists, other memory orders and byte orders, and what NumPy can convert give the same bits."""
        rng = np.random.default_rng(0)
        x, w, b = integers(rng, (2, 3, 4, 5), "f4"), integers(rng, (3, 3, 2, 3), "f4"), integers(rng, (3,), "f4")
        expected = call(x, w, b)
        for turn in (
            np.asfortranarray,
            ArrayLike,
            np.ndarray.tolist,
            lambda array: array.astype(">f4"),
            lambda array: np.repeat(array, 2, axis=0)[::2],
            lambda array: array[::-1].copy()[::-1],
        ):
            assert same_bits(call(turn(x), turn(w), turn(b)), expected)
            assert same_bits(call(x, w, turn(b)), expected)
        assert same_bits(call(x, w.tolist(), b), expected)

    @pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("call", CALLS)
    def test_dtypes(self, call, name):
        """The result has the dtype of the operands; sums of half precisions are formed in float32."""
        dtype = dtype_named(name)
        rng = np.random.default_rng(0)
        x, w, b = (frozen(rng.integers(-2, 3, shape).astype(dtype)) for shape in ((1, 2, 4, 4), (2, 2, 2, 2), (2,)))
        got = call(x, w, b)
        assert got.dtype == dtype
        assert np.array_equal(got.astype(float), call(*(array.astype(np.float64) for array in (x, w, b))))

    @pytest.mark.parametrize("call", CALLS)
    def test_out(self, call):
        """The result is written where it was asked for, also to a wider dtype."""
        x, w = np.ones((1, 2, 4, 4), np.float32), np.ones((2, 2, 2, 2), np.float32)
        expected = call(x, w, workers=2, algorithm="auto")
        for dtype in (np.float32, np.float64):
            out = np.empty(expected.shape, dtype)
            assert call(x, w, out=out) is out
            assert np.array_equal(out, expected)
        with pytest.raises(ValueError, match=r"compat\.\w+\.\w+: out has shape \(1, 2, 4, 4\), but the result has"):
            call(x, w, out=np.empty((1, 2, 4, 4), np.float32))

    def test_beyond_the_address_space(self):
        """Before anything is allocated."""
        x, w = np.ones((1, 1, 2), np.float32), np.ones((1, 1, 1), np.float32)
        with pytest.raises(
            ValueError, match=r"\(1, 1, 1, 1, 2305843009213693953\) of float32 takes 9223372036854775812 by"
        ):
            TORCH.conv_transpose1d(x, w, stride=2**61)

    @pytest.mark.parametrize("module", [TORCH, ONNX])
    def test_all(self, module):
        """`__all__` holds the public functions, and each has a docstring with an example."""
        public = {name for name, found in vars(module).items() if inspect.isfunction(found) and name[0] != "_"}
        assert {name for name in public if getattr(module, name).__module__ == module.__name__} == set(module.__all__)
        for name in module.__all__:
            assert ">>>" in inspect.getdoc(getattr(module, name))

    def test_no_framework_is_imported(self):
        """Neither by the modules nor by a call."""
        code = (
            "import sys, numpy as np, gemmconv.compat.onnx as o, gemmconv.compat.torch as t\n"
            "x = np.ones((1, 1, 3), np.float32); t.conv1d(x, x); o.conv(x, x)\n"
            "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
