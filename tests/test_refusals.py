"""Every refusal of the contract: its exception, what its text names, and that nothing has been touched.

A text must name the function, the argument, the value got and the numbers of the rule; the words between are free.
"""

import array
import collections
import dataclasses
import fractions
import re

import numpy as np
import oracle
import pytest
from oracle import dtype_named, frozen, integers, same_bits

from gemmconv import conv3d_transpose, plan_conv3d_transpose
from gemmconv.compat import torch

FUNCTION = r"\A[\w ]*conv3d_transpose\b"


class Index:
    """An integer by way of __index__ alone."""

    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number

    def __repr__(self):
        return f"Index({self.number})"


class NoIndex:
    """An __index__ that fails."""

    def __index__(self):
        raise TypeError("no index")

    def __repr__(self):
        return "NoIndex()"


class Lazy:
    """What a dask array looks like from outside; turning it into an array would compute it."""

    def __init__(self, shape):
        self.shape, self.ndim, self.dtype, self.computed = shape, len(shape), np.dtype(np.float32), False

    def __dask_graph__(self):
        return {}

    def __array__(self, dtype=None, copy=None):
        self.computed = True
        return np.zeros(self.shape, self.dtype)


class Flat(list):
    """A sequence that is not a list by type."""


def number(value):
    """Return a regex for a number that is not part of another."""
    return rf"(?<![\w.]){re.escape(str(value))}(?![\w]|\.\d)"


def base(data_format="NDHWC"):
    """Return a call that works. Its numbers differ, so that a text cannot name the wrong one unnoticed."""
    rng = np.random.default_rng(0)
    return {
        "value": integers(rng, oracle.caller_order([2, 3, 4, 5, 7], data_format), "f4"),
        "filter": integers(rng, (3, 3, 3, 11, 7), "f4"),
        "output_shape": oracle.caller_order([2, 6, 8, 10, 11], data_format),
        "strides": 2,
        "data_format": data_format,
    }


@dataclasses.dataclass
class Case:
    """A change of the base call that is refused, the exceptions allowed and the regexes its text must match."""

    name: str
    changes: dict
    error: type | tuple
    needles: list
    data_format: str = "NDHWC"

    def arguments(self):
        """Return the arguments of the whole call."""
        arguments = base(self.data_format) | self.changes
        return {name: given for name, given in arguments.items() if given is not Ellipsis}

    def matches(self, error):
        """Check the text of an exception."""
        text = str(error)
        for needle in [FUNCTION, *self.needles]:
            assert re.search(needle, text, re.IGNORECASE), f"{text!r} does not match {needle!r}"


def zeros(*shape, dtype=np.float32):
    """Return read-only zeros."""
    return frozen(np.zeros(shape, dtype))


def numbers(*values):
    """Return regexes for several numbers."""
    return [number(value) for value in values]


def given(index, size):
    """Return a regex for an entry of output_shape together with the value got for it, so that no two are swapped."""
    return rf"output_shape\[{index}\]\D{{1,12}}{number(size)}"


def output(*shape):
    """Return the change to an output_shape."""
    return {"output_shape": list(shape)}


PAIRS = [
    Case("value-and-input", {"input": base()["value"]}, ValueError, [r"\bvalue\b", r"\binput\b"]),
    Case("filter-and-filters", {"filters": base()["filter"]}, ValueError, [r"\bfilter\b", r"\bfilters\b"]),
    Case("no-value", {"value": ...}, TypeError, [r"\bvalue\b"]),
    Case("value-none", {"value": None}, TypeError, [r"\bvalue\b"]),
    Case("no-filter", {"filter": ...}, TypeError, [r"\bfilter\b"]),
    Case("filters-none", {"filter": ..., "filters": None}, TypeError, [r"\bfilter\b"]),
    Case("nothing", {"filter": ..., "value": ...}, TypeError, [r"\b(value|filter)\b"]),
]

RANKS = [
    Case(f"{name}-rank-{rank}", {name: zeros(*[rank] * rank)}, ValueError, [rf"\b{name}", *numbers(5, rank)])
    for name in ("value", "filter")
    for rank in (1, 2, 3, 4)
]
RANKS += [
    Case("value-rank-6", {"value": zeros(2, 6, 0, 1, 6, 6)}, ValueError, [r"\bvalue", *numbers(5, 6)]),
    Case("filter-rank-6", {"filter": zeros(2, 6, 0, 1, 6, 6)}, ValueError, [r"\bfilter", *numbers(5, 6)]),
    Case("value-rank-0", {"value": np.float32(3)}, ValueError, [r"\bvalue", number(5)]),
    Case("filter-rank-0", {"filter": frozen(np.array(3.0))}, ValueError, [r"\bfilter", number(5)]),
    Case("value-empty-list", {"value": []}, ValueError, [r"\bvalue", number(5)]),
    Case("filter-list-rank-2", {"filter": [[1.0, 2.0]]}, ValueError, [r"\bfilter", *numbers(5, 2)]),
]

SHAPES = [
    Case("length-0", output(), ValueError, ["output_shape", number(5)]),
    Case("length-0-tuple", {"output_shape": ()}, ValueError, ["output_shape", number(5)]),
    Case("length-1", output(2), ValueError, ["output_shape", *numbers(5, 2)]),
    Case("length-3", output(6, 8, 10), ValueError, ["output_shape", *numbers(5, 6, 8, 10)]),
    Case("length-4", output(2, 6, 8, 10), ValueError, ["output_shape", *numbers(5, 2, 6, 8, 10)]),
    Case("length-6", output(2, 6, 8, 10, 11, 1), ValueError, ["output_shape", *numbers(5, 2, 6, 8, 10, 11, 1)]),
    Case(
        "length-3-ndarray", {"output_shape": np.array([6, 8, 10])}, ValueError, ["output_shape", *numbers(5, 6, 8, 10)]
    ),
    Case(
        "2-d-column", {"output_shape": np.array([[2], [6], [8], [10], [11]])}, ValueError, ["output_shape", number(5)]
    ),
    Case("2-d-row", {"output_shape": np.array([[2, 6, 8, 10, 11]])}, ValueError, ["output_shape", number(5)]),
    Case("2-d-square", {"output_shape": np.ones((5, 5), int)}, ValueError, ["output_shape", number(5)]),
    Case("2-d-lists", output([2], [6], [8], [10], [11]), (ValueError, TypeError), ["output_shape"]),
    Case("2-d-list", output([2, 6, 8, 10, 11]), (ValueError, TypeError), ["output_shape"]),
    Case("scalar", {"output_shape": 6}, ValueError, ["output_shape", *numbers(5, 6)]),
    Case("scalar-numpy", {"output_shape": np.int64(6)}, ValueError, ["output_shape", *numbers(5, 6)]),
    Case("scalar-0-d", {"output_shape": np.array(6)}, ValueError, ["output_shape", *numbers(5, 6)]),
    Case("scalar-float", {"output_shape": 6.5}, (ValueError, TypeError), ["output_shape", number(6.5)]),
    Case("negative-batch", output(-2, 6, 8, 10, 11), ValueError, [r"output_shape\[0\]", number(-2)]),
    Case("negative-depth", output(2, -6, 8, 10, 11), ValueError, [r"output_shape\[1\]", number(-6)]),
    Case("negative-channels", output(2, 6, 8, 10, -11), ValueError, [r"output_shape\[4\]", number(-11)]),
    Case("negative-ndarray", {"output_shape": -np.array([2, 6, 8, 10, 11])}, ValueError, ["output_shape", number(-2)]),
    Case("negative-index", output(2, 6, Index(-8), 10, 11), ValueError, [r"output_shape\[2\]", number(-8)]),
    Case("float", output(2, 6, 8.0, 10, 11), TypeError, [r"output_shape\[2\]", number("8.0")]),
    Case("float-numpy", output(2, 6, 8, np.float32(10), 11), TypeError, [r"output_shape\[3\]", number("10.0")]),
    Case("float-0-d", output(2, 6, 8, np.array(10.0), 11), TypeError, ["output_shape", r"\b10\."]),
    Case(
        "float-ndarray", {"output_shape": np.array([2.0, 6, 8, 10, 11])}, TypeError, ["output_shape", r"\b2\.|float64"]
    ),
    Case("float-empty", {"output_shape": np.array([])}, (TypeError, ValueError), ["output_shape"]),
    Case("nan", output(2, float("nan"), 8, 10, 11), TypeError, ["output_shape", "nan"]),
    Case("fraction", output(2, fractions.Fraction(6), 8, 10, 11), TypeError, ["output_shape", number(6)]),
    Case("complex", output(2, 6 + 0j, 8, 10, 11), TypeError, ["output_shape", r"6\+0j"]),
    Case("bool", output(True, 6, 8, 10, 11), TypeError, [r"output_shape\[0\]", "True"]),
    Case("bool-numpy", output(2, 6, 8, 10, np.True_), TypeError, [r"output_shape\[4\]", "True"]),
    Case("bool-ndarray", {"output_shape": np.ones(5, bool)}, TypeError, ["output_shape", "True|bool"]),
    Case("none-entry", output(None, 6, 8, 10, 11), TypeError, ["output_shape", "None"]),
    Case("string", {"output_shape": "26811"}, TypeError, ["output_shape", "26811|'2'"]),
    Case("string-entry", output("2", 6, 8, 10, 11), TypeError, ["output_shape", "'2'"]),
    Case("strings-ndarray", {"output_shape": np.array(list("26811"))}, TypeError, ["output_shape", "'2'|U1"]),
    Case("no-index", output(2, NoIndex(), 8, 10, 11), TypeError, ["output_shape", "NoIndex"]),
    Case("batch", output(3, 6, 8, 10, 11), ValueError, [given(0, 3), number(2), "batch"]),
    Case("batch-0", output(0, 6, 8, 10, 11), ValueError, [given(0, 0), number(2), "batch"]),
    Case("cout", output(2, 6, 8, 10, 12), ValueError, [given(4, 12), number(11), r"\bfilter"]),
    Case("cout-is-cin", output(2, 6, 8, 10, 7), ValueError, [given(4, 7), number(11), r"\bfilter"]),
    Case(
        "cout-ncdhw",
        output(2, 12, 6, 8, 10),
        ValueError,
        [given(1, 12), number(11), r"\bfilter"],
        "NCDHW",
    ),
    Case("batch-ncdhw", output(3, 11, 6, 8, 10), ValueError, [given(0, 3), number(2)], "NCDHW"),
    Case("ndhwc-order-for-ncdhw", output(2, 6, 8, 10, 11), ValueError, [r"output_shape\[[1234]\]"], "NCDHW"),
    Case("ncdhw-order-for-ndhwc", output(2, 11, 6, 8, 10), ValueError, [r"output_shape\[[1234]\]"]),
    Case("cin", {"filter": zeros(3, 3, 3, 11, 6)}, ValueError, [r"\b(value|filter)", *numbers(6, 7)]),
    Case("cin-swapped", {"filter": zeros(3, 3, 3, 7, 11)}, ValueError, [r"\b(value|filter)", *numbers(11, 7)]),
    Case("cin-0", {"filter": zeros(3, 3, 3, 11, 0)}, ValueError, [r"\b(value|filter)", *numbers(0, 7)]),
    Case("cin-layout", {"data_format": "NCDHW"}, ValueError, [r"\b(value|filter)", *numbers(3, 7)]),
]


def reaches():
    """Yield cases of spatial sizes one below and one above the reachable, on each axis, in both layouts."""
    for data_format in ("NDHWC", "NCDHW"):
        for axis, (word, kernel, stride, dilation) in enumerate(
            [("depth", 3, 4, 2), ("height", 2, 3, 5), ("width", 4, 2, 3)]
        ):
            for padding in ("SAME", "VALID"):
                n = 3 + axis
                low, high = oracle.reachable_sizes(n, kernel, stride, dilation, padding)
                fit = [oracle.inferred_size(*sizes, padding) for sizes in [(3, 3, 4, 2), (4, 2, 3, 5), (5, 4, 2, 3)]]
                for size in (low - 1, high + 1, 0, 10 * high):
                    o = [*fit[:axis], size, *fit[axis + 1 :]]
                    changes = {
                        "filter": zeros(3, 2, 4, 11, 7),
                        "output_shape": oracle.caller_order([2, *o, 11], data_format),
                        "strides": [4, 3, 2],
                        "dilations": [2, 5, 3],
                        "padding": padding,
                    }
                    index = axis + (1 if data_format == "NDHWC" else 2)
                    needles = [
                        given(index, size),
                        word,
                        padding,
                        *numbers(n, stride),
                        rf"{number(low)}\D+{number(high)}",
                    ]
                    if padding == "VALID":
                        needles += [f"{number(kernel)}|{number(oracle.extent(kernel, dilation))}"]
                    yield Case(f"{data_format}-{word}-{padding}-{size}", changes, ValueError, needles, data_format)


def reach(name, value_shape, filter_shape, shape, extra, needles):
    """Return the case of a call given by its shapes."""
    changes = {"value": zeros(*value_shape), "filter": zeros(*filter_shape), "output_shape": shape, "strides": 1}
    return Case(name, changes | extra, ValueError, needles)


REACHES = [
    *reaches(),
    reach(
        "the-example",
        (1, 2, 2, 2, 1),
        (3, 3, 3, 1, 1),
        [1, 9, 4, 4, 1],
        {"strides": 2},
        [given(1, 9), "depth", "stride", "SAME", number(2), rf"{number(3)}\D+{number(4)}"],
    ),
    reach("batch-0", (0, 2, 2, 2, 1), (1, 1, 1, 1, 1), [0, 2, 3, 2, 1], {}, [r"output_shape\[2\]", *numbers(3, 2)]),
    reach("cin-0", (1, 2, 2, 2, 0), (1, 1, 1, 1, 0), [1, 2, 2, 1, 1], {}, [r"output_shape\[3\]", *numbers(1, 2)]),
    reach("cout-0", (1, 2, 2, 2, 1), (1, 1, 1, 0, 1), [1, 2, 2, 1, 0], {}, [r"output_shape\[3\]", *numbers(1, 2)]),
    reach("n-0-same", (1, 0, 2, 2, 1), (3, 3, 3, 1, 1), [1, 1, 2, 2, 1], {}, [r"output_shape\[1\]", *numbers(1, 0)]),
    reach(
        "n-0-valid",
        (1, 0, 2, 2, 1),
        (3, 1, 1, 1, 1),
        [1, 5, 2, 2, 1],
        {"padding": "VALID", "dilations": [2, 1, 1]},
        [r"output_shape\[1\]", "VALID", *numbers(5, 0, 4)],
    ),
    reach(
        "n-0-valid-kernel-0",
        (1, 0, 2, 2, 1),
        (0, 1, 1, 1, 1),
        [1, 1, 2, 2, 1],
        {"padding": "VALID"},
        [r"output_shape\[1\]", *numbers(1, 0)],
    ),
    reach(
        "kernel-0-valid",
        (1, 3, 2, 2, 1),
        (0, 1, 1, 1, 1),
        [1, 6, 4, 4, 1],
        {"padding": "VALID", "strides": 2},
        [r"output_shape\[1\]", *numbers(6, 4, 5)],
    ),
    reach(
        "kernel-0-same", (1, 3, 2, 2, 1), (0, 1, 1, 1, 1), [1, 4, 2, 2, 1], {}, [r"output_shape\[1\]", *numbers(4, 3)]
    ),
    reach("empty-batch", (0, 2, 2, 2, 1), (1, 1, 1, 1, 1), [1, 2, 2, 2, 1], {}, [r"output_shape\[0\]", *numbers(1, 0)]),
    reach("empty-cout", (1, 0, 2, 2, 1), (1, 1, 1, 3, 1), [1, 0, 2, 2, 4], {}, [r"output_shape\[4\]", *numbers(4, 3)]),
    reach("empty-cin", (0, 2, 2, 2, 4), (1, 1, 1, 1, 3), [0, 2, 2, 2, 1], {}, [r"\b(value|filter)", *numbers(4, 3)]),
    reach("cin-0-and-3", (1, 2, 2, 2, 0), (1, 1, 1, 1, 3), [1, 2, 2, 2, 1], {}, [r"\b(value|filter)", *numbers(0, 3)]),
]


def per_axis(name):
    """Yield the cases of strides or of dilations."""
    for bad in [[], [2, 2], [2, 2, 2, 2], [1, 2, 2, 2, 1, 1], (), (3, 4), np.array([3, 4]), np.array([], int)]:
        kind = type(bad).__name__
        text = rf"{name} should be of length 1, 3 or 5\. Received:"
        yield Case(f"{name}-{kind}-length-{len(bad)}", {name: bad}, ValueError, [text, *numbers(*bad)])
    for bad, wrong in [
        (0, 0),
        (-3, -3),
        ([0], 0),
        ([2, 0, 2], 0),
        ((2, 2, -7), -7),
        ([1, 2, 0, 2, 1], 0),
        ([0, 2, 2, 2, 1], 0),
        ([1, 2, 2, 2, -1], -1),
        (np.array([2, -2, 2]), -2),
        (np.int8(-5), -5),
        (Index(0), 0),
        (-(2**70), -(2**70)),
    ]:
        yield Case(f"{name}-too-small-{bad}", {name: bad}, ValueError, [rf"\b{name}\b", number(wrong)])
    for bad, layout in [
        ([4, 2, 2, 2, 1], "NDHWC"),
        ([1, 2, 2, 2, 4], "NDHWC"),
        ([4, 1, 2, 2, 2], "NCDHW"),
        ([1, 4, 2, 2, 2], "NCDHW"),
        ([1, 2, 2, 2, 1], "NCDHW"),
        (np.array([2**40, 1, 1, 1, 1]), "NDHWC"),
    ]:
        wrong = max(bad) if max(bad) > 3 else 2
        yield Case(
            f"{name}-not-1-{layout}-{bad}", {name: bad}, ValueError, [rf"\b{name}\b", *numbers(wrong, 1)], layout
        )
    for bad, shown in [
        (2.0, "2.0"),
        (2.5, "2.5"),
        (np.float32(2), "2.0"),
        ([2.0], "2.0"),
        ([2, 2, 2.5], "2.5"),
        ((1, 2, 2, 2, 1.0), "1.0"),
        ([np.float64(2), 2, 2], "2.0"),
        (np.array([2.0, 2.0, 2.0]), "2.0|2\\.|float64"),
        (True, "True"),
        ([True], "True"),
        ([2, True, 2], "True"),
        ([True, 2, 2, 2, 1], "True"),
        (np.True_, "True"),
        ([2, 2, np.True_], "True"),
        (np.ones(3, bool), "True|bool"),
        ("2", "'2'"),
        ("222", "222|'2'"),
        (["2", "2", "2"], "'2'"),
        (np.array(["2", "2", "2"]), "'2'|U1"),
        ([2, None, 2], "None"),
        (2j, "2j"),
        (fractions.Fraction(2), number(2)),
        ([2, NoIndex(), 2], "NoIndex"),
        (NoIndex(), "NoIndex"),
    ]:
        yield Case(f"{name}-type-{bad!r:.40}", {name: bad}, TypeError, [rf"\b{name}", shown])
    yield Case(f"{name}-nested", {name: [[2, 2, 2]]}, (TypeError, ValueError), [rf"\b{name}"])
    yield Case(f"{name}-2-d", {name: np.ones((3, 3), int)}, (TypeError, ValueError), [rf"\b{name}"])


WORDS = [
    *[
        Case(f"padding-{bad}", {"padding": bad}, ValueError, [r"\bpadding\b", f"'{bad}'", "SAME", "VALID"])
        for bad in ("same", "Same", "valid", "FULL", "EXPLICIT", " SAME", "")
    ],
    *[
        Case(
            f"padding-type-{bad!r}",
            {"padding": bad},
            TypeError,
            [r"\bpadding\b", re.escape(f"{bad!r}"), "SAME", "VALID"],
        )
        for bad in (None, 0, 1.5, True, b"SAME", ["SAME"], [[0, 0]] * 5, ("SAME", "SAME"))
    ],
    *[
        Case(f"data_format-{bad}", {"data_format": bad}, ValueError, ["data_format", f"'{bad}'", "NDHWC", "NCDHW"])
        for bad in ("ndhwc", "NHWC", "NCHW", "channels_last", "NDHWC ", "")
    ],
    *[
        Case(
            f"data_format-type-{bad!r}",
            {"data_format": bad},
            TypeError,
            ["data_format", re.escape(f"{bad!r}"), "NDHWC", "NCDHW"],
        )
        for bad in (0, True, b"NDHWC", ["NDHWC"])
    ],
    Case("algorithm", {"algorithm": "depthwise"}, ValueError, ["algorithm", "depthwise", "auto", "col2im"]),
    Case("algorithm-case", {"algorithm": "COL2IM"}, ValueError, ["algorithm", "COL2IM", "auto", "col2im"]),
    Case("algorithm-empty", {"algorithm": ""}, ValueError, ["algorithm", "auto", "col2im"]),
    Case("algorithm-none", {"algorithm": None}, (TypeError, ValueError), ["algorithm", "None", "auto", "col2im"]),
    Case("algorithm-int", {"algorithm": 3}, (TypeError, ValueError), ["algorithm", number(3), "auto", "col2im"]),
    Case("algorithm-list", {"algorithm": ["auto"]}, (TypeError, ValueError), ["algorithm", "auto", "col2im"]),
    Case("workers-0", {"workers": 0}, ValueError, ["workers", number(0)]),
    Case("workers-float", {"workers": 2.0}, TypeError, ["workers", "2.0"]),
    Case("workers-string", {"workers": "2"}, TypeError, ["workers", "'2'"]),
    Case("workers-list", {"workers": [2]}, TypeError, ["workers", r"\[2\]"]),
    Case("workers-no-index", {"workers": NoIndex()}, TypeError, ["workers", "NoIndex"]),
]

SIZES = [
    # 2**40 cells along each axis, each number alone an ordinary one
    reach("bytes", (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), [1, 2**40, 2**40, 2**40, 1], {"strides": 2**40}, [number(2**40)]),
    reach("bytes-inferred", (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), None, {"strides": 2**40}, []),
    reach("int64", (1, 2, 1, 1, 1), (1, 1, 1, 1, 1), [1, 2**63, 1, 1, 1], {"strides": [2**62, 1, 1]}, [number(2**63)]),
    reach("beyond-int64", (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), [1, 2**70, 1, 1, 1], {"strides": 2**70}, [number(2**70)]),
    reach("beyond-int64-inferred", (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), None, {"strides": 2**70}, []),
    reach("itemsize", (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), [1, 2**62, 1, 1, 1], {"strides": 2**62}, [number(2**62)]),
    reach("dilation", (1, 1, 1, 1, 1), (3, 1, 1, 1, 1), None, {"dilations": 2**70, "padding": "VALID"}, []),
    reach(
        "out-of-reach-beyond-int64",
        (1, 2, 2, 2, 1),
        (3, 3, 3, 1, 1),
        [1, 2**70, 2, 2, 1],
        {},
        [r"output_shape\[1\]", *numbers(2**70, 2)],
    ),
    # NumPy makes no such array either, though it would be empty
    reach("empty", (0, 1, 1, 1, 1), (1, 1, 1, 1, 1), [0, 2**62, 2**62, 1, 1], {"strides": [2**62, 2**62, 1]}, []),
]

SHAPE_CASES = [*SHAPES, *REACHES, *per_axis("strides"), *per_axis("dilations"), *WORDS, *SIZES]


def named(cases):
    """Return cases as parameters with their names as ids."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def refuse(case, **more):
    """Make the call, check what it raises, and that no array among its arguments is changed."""
    arguments = case.arguments() | more
    arrays = {name: given for name, given in arguments.items() if isinstance(given, np.ndarray)}
    before = {name: given.tobytes() for name, given in arrays.items()}
    with pytest.raises(case.error) as caught:
        conv3d_transpose(**arguments)
    case.matches(caught.value)
    for name, given in arrays.items():
        assert given.tobytes() == before[name], f"{name} was modified"


class TestArguments:
    """The table of refusals, with and without `out`, by function and by plan."""

    @named([*PAIRS, *RANKS, *SHAPE_CASES])
    def test_refused(self, case):
        """The function refuses."""
        refuse(case)

    @named([*PAIRS, *RANKS, *SHAPE_CASES])
    def test_refused_with_out(self, case):
        """The function refuses before it touches `out`, whose shape is that of the base call."""
        shape = oracle.caller_order([2, 6, 8, 10, 11], case.data_format)
        refuse(case, out=np.full(shape, 123.25, np.float32))

    @named(SHAPE_CASES)
    def test_refused_by_plan(self, case):
        """The plan refuses the same from shapes alone."""
        arguments = case.arguments()
        value_shape, filter_shape = arguments.pop("value").shape, arguments.pop("filter").shape
        with pytest.raises(case.error) as caught:
            plan_conv3d_transpose(value_shape, filter_shape, **arguments)
        case.matches(caught.value)

    @named([case for case in RANKS if hasattr(case.changes.get("value"), "shape")])
    def test_value_under_its_alias(self, case):
        """`input` is refused as `value` is."""
        arguments = case.arguments()
        arguments["input"] = arguments.pop("value")
        with pytest.raises(case.error, match=r"\b(value|input)"):
            conv3d_transpose(**arguments)

    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    def test_the_base_call_works(self, data_format):
        """What all these differ from is accepted, also after they were refused."""
        arguments = base(data_format)
        want = oracle.conv3d_transpose(**arguments).astype("f4")
        for case in [*RANKS, *SHAPES]:
            with pytest.raises((ValueError, TypeError)):
                conv3d_transpose(**case.arguments())
        assert same_bits(conv3d_transpose(**arguments), want)

    def test_no_eleventh_position(self):
        """Gemmconv's own arguments are keyword-only; unknown ones are refused by Python."""
        arguments = base()
        with pytest.raises(TypeError):
            conv3d_transpose(*arguments.values(), None, None, None, None, None, None, np.zeros(1))
        with pytest.raises(TypeError):
            conv3d_transpose(**arguments, threads=2)

    def test_memory(self):
        """An array of 2**61 bytes is more than any system gives: refused before any work, by one or by the other."""
        x, f = zeros(1, 2, 1, 1, 1), zeros(1, 1, 1, 1, 1)
        with pytest.raises((MemoryError, ValueError)):
            conv3d_transpose(x, f, [1, 2**59, 1, 1, 1], [2**58, 1, 1])


class TestPlanArguments:
    """What a plan alone can be given wrongly."""

    @pytest.mark.parametrize("name", ["value_shape", "filter_shape"])
    @pytest.mark.parametrize(
        ("bad", "error", "needle"),
        [
            ((2, 3, 4, 7), ValueError, number(5)),
            ((2, 3, 4, 5, 7, 1), ValueError, number(5)),
            ((), ValueError, number(5)),
            (7, (ValueError, TypeError), number(7)),
            (None, (ValueError, TypeError), "None"),
            ((2, 3, 4, -5, 7), ValueError, number(-5)),
            ((2, 3, 4, 5.0, 7), TypeError, "5.0"),
            ((2, 3, True, 5, 7), TypeError, "True"),
            ("23457", TypeError, "23457|'2'"),
            ((2, 3, "4", 5, 7), TypeError, "'4'"),
        ],
        ids=str,
    )
    def test_shapes(self, name, bad, error, needle):
        """The shapes are five integers, none negative."""
        shapes = {"value_shape": (2, 3, 4, 5, 7), "filter_shape": (3, 3, 3, 11, 7)} | {name: bad}
        with pytest.raises(error) as caught:
            plan_conv3d_transpose(**shapes)
        Case("", {}, error, [rf"\b{name.split('_')[0]}", needle]).matches(caught.value)

    @pytest.mark.parametrize("dtype", [np.int32, bool, np.longdouble, object, "U3", "M8[s]", "S2"], ids=str)
    def test_dtypes(self, dtype):
        """A dtype that is not supported is refused with those that are."""
        if np.dtype(dtype) == np.float64:
            pytest.skip("long double is double on this platform")
        with pytest.raises(TypeError) as caught:
            plan_conv3d_transpose((2, 3, 4, 5, 7), (3, 3, 3, 11, 7), dtype=dtype)
        Case("", {}, TypeError, ["dtype", "float32"]).matches(caught.value)

    @pytest.mark.parametrize("name", ["value", "filter"])
    def test_other_shapes_than_planned(self, name):
        """A plan computes what it was made for and refuses another shape."""
        arguments = base()
        plan = plan_conv3d_transpose((2, 3, 4, 5, 7), (3, 3, 3, 11, 7), strides=2)
        arrays = {"value": arguments["value"], "filter": arguments["filter"]}
        for other in [arrays[name].transpose(1, 0, 2, 3, 4)[:2], arrays[name][..., :6], arrays[name][0]]:
            out = np.full((2, 6, 8, 10, 11), 5.5, np.float32)
            with pytest.raises(ValueError, match=rf"conv3d_transpose.*\b{name}"):
                plan(**(arrays | {name: other}), out=out)
            assert (out == 5.5).all()

    def test_other_dtype_than_planned(self):
        """A float32 plan never narrows float64."""
        arguments = base()
        plan = plan_conv3d_transpose((2, 3, 4, 5, 7), (3, 3, 3, 11, 7), strides=2)
        with pytest.raises((TypeError, ValueError), match=r"conv3d_transpose.*float64"):
            plan(arguments["value"].astype(np.float64), arguments["filter"])


SUPPORTED = ["float32", "float64", "complex64", "complex128", r"(?<!b)float16"]


def bad_array(kind, shape):
    """Return an operand of a kind that is refused."""
    data = np.ones(shape, np.float32)
    if kind == "bool-list":
        return data.astype(bool).tolist()
    if kind == "string-list":
        return data.astype(str).tolist()
    if kind == "none-list":
        return np.full(shape, None).tolist()
    if kind == "masked":
        return np.ma.masked_array(data, mask=data > 2)
    if kind == "masked-without-mask":
        return np.ma.masked_array(data)
    if kind == "masked-int":
        return np.ma.masked_array(data.astype(int), mask=True)
    if kind == "structured":
        return np.zeros(shape, [("re", "f4"), ("im", "f4")])
    if kind == "void":
        return np.zeros(shape, "V2")
    if kind == "swapped-int":
        return data.astype(np.dtype("i4").newbyteorder())
    if kind == "empty-int":
        return np.zeros((0, *shape[1:]), np.int64)
    return data.astype(kind)


INTEGER = ["int8", "int16", "int32", "int64", "uint8", "uint64", "bool", "swapped-int", "empty-int"]
BAD_ARRAYS = [(kind, [r"\.astype\(np\.float32\)"]) for kind in INTEGER]
BAD_ARRAYS += [("bool-list", [r"bool"])]
BAD_ARRAYS += [("object", [r"object", r"astype|asarray|np\.array"])]
BAD_ARRAYS += [(kind, [r"mask", r"filled|\.data|asarray"]) for kind in ("masked", "masked-without-mask", "masked-int")]
BAD_ARRAYS += [
    (kind, SUPPORTED) for kind in ("longdouble", "clongdouble", "U4", "S4", "structured", "void", "M8[s]", "m8[s]")
]
BAD_ARRAYS += [(kind, []) for kind in ("string-list", "none-list")]


class TestOperands:
    """Arrays that are refused for what they hold."""

    @pytest.mark.parametrize("name", ["value", "filter"])
    @pytest.mark.parametrize("other", ["float32", "float64", "complex64", "list"])
    @pytest.mark.parametrize(("kind", "needles"), BAD_ARRAYS, ids=[kind for kind, _ in BAD_ARRAYS])
    def test_refused(self, kind, needles, other, name):
        """Whatever the other operand is, and although NumPy could find a common dtype."""
        if kind in ("longdouble", "clongdouble") and np.finfo(kind).bits == np.finfo(np.double).bits:
            pytest.skip("long double is double on this platform")
        arguments = base()
        names = {"value", "filter"}
        (partner,) = names - {name}
        arguments[name] = bad_array(kind, arguments[name].shape)
        arguments[partner] = arguments[partner].tolist() if other == "list" else arguments[partner].astype(other)
        arguments["out"] = out = np.full((2, 6, 8, 10, 11), 5.5, np.complex128)
        with pytest.raises(TypeError) as caught:
            conv3d_transpose(**arguments)
        Case("", {}, TypeError, [rf"\b{name}\b", *needles]).matches(caught.value)
        assert (out == 5.5).all()

    @pytest.mark.parametrize("name", ["value", "filter", "input", "filters"])
    def test_lazy(self, name):
        """A lazy array is refused, with a word on what to do, and not computed."""
        arguments = base()
        role = name.rstrip("s").replace("input", "value")
        lazy = Lazy(arguments.pop(role).shape)
        out = np.full((2, 6, 8, 10, 11), 5.5, np.float32)
        with pytest.raises(TypeError) as caught:
            conv3d_transpose(**arguments, **{name: lazy}, out=out)
        Case("", {}, TypeError, [rf"\b({name}|{role})\b", r"comput|asarray"]).matches(caught.value)
        assert not lazy.computed
        assert (out == 5.5).all()

    @pytest.mark.parametrize("function", ["conv_transpose3d", "conv3d"])
    @pytest.mark.parametrize("missing", [0, 1])
    def test_none(self, function, missing):
        """Of a front end that has no aliases for its operands."""
        operands = [np.ones((1, 1, 2, 2, 2), np.float32), np.ones((1, 1, 1, 1, 1), np.float32)]
        operands[missing] = None
        with pytest.raises(
            TypeError, match=rf"^compat.torch.{function}: {('input', 'weight')[missing]} is required, got None"
        ):
            getattr(torch, function)(*operands)

    @pytest.mark.parametrize("names", [("float16", "bfloat16"), ("bfloat16", "float16")], ids="-".join)
    def test_two_kinds_of_half(self, names):
        """float16 with bfloat16 has no common dtype."""
        arguments = base()
        for operand, name in zip(["value", "filter"], names, strict=True):
            arguments[operand] = arguments[operand].astype(dtype_named(name))
        with pytest.raises(TypeError) as caught:
            conv3d_transpose(**arguments)
        Case("", {}, TypeError, [r"\bvalue\b", r"\bfilter\b", r"(?<!b)float16", "bfloat16"]).matches(caught.value)

    @pytest.mark.parametrize("name", ["value", "filter"])
    @pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "int4"])
    def test_other_dtypes_of_ml_dtypes(self, kind, name):
        """NumPy would widen them to the other operand's; they are refused as all that is not supported."""
        dtype_named("bfloat16")
        arguments = base()
        arguments[name] = arguments[name].astype(getattr(pytest.importorskip("ml_dtypes"), kind))
        with pytest.raises(TypeError) as caught:
            conv3d_transpose(**arguments)
        Case("", {}, TypeError, [rf"\b{name}\b", kind]).matches(caught.value)

    @pytest.mark.parametrize("name", ["value", "filter"])
    def test_ragged_list(self, name):
        """A nested list that is no array is refused under the argument's name."""
        arguments = base()
        arguments[name] = [[[[[1.0, 2.0], [3.0]]]]]
        with pytest.raises((TypeError, ValueError)) as caught:
            conv3d_transpose(**arguments)
        Case("", {}, ValueError, [rf"\b{name}\b"]).matches(caught.value)

    @pytest.mark.parametrize("name", ["value", "filter"])
    @pytest.mark.parametrize("bad", ["a string", object(), {}, {1, 2}], ids=["str", "object", "dict", "set"])
    def test_no_array_at_all(self, bad, name):
        """Nor is anything else that NumPy makes an object or a string of."""
        with pytest.raises((TypeError, ValueError)) as caught:
            conv3d_transpose(**(base() | {name: bad}))
        Case("", {}, TypeError, [rf"\b{name}\b"]).matches(caught.value)

    def test_both_lists_of_bool(self):
        """Two lists have a default dtype, but not if they hold bool."""
        with pytest.raises(TypeError, match=r"(?s)conv3d_transpose.*bool"):
            conv3d_transpose([[[[[True]]]]], [[[[[True]]]]])


OUTS = [
    ("shape", np.zeros((2, 6, 8, 10, 12), "f4"), ValueError, ["shape", *numbers(12, 11)]),
    ("smaller", np.zeros((2, 6, 8, 9, 11), "f4"), ValueError, ["shape", *numbers(9, 10)]),
    ("broadcastable", np.zeros((1, 6, 8, 10, 11), "f4"), ValueError, ["shape", *numbers(1, 2)]),
    ("bigger-rank", np.zeros((1, 2, 6, 8, 10, 11), "f4"), ValueError, ["shape", *numbers(2, 6, 8, 10, 11)]),
    ("flat", np.zeros(2 * 6 * 8 * 10 * 11, "f4"), ValueError, ["shape", *numbers(10560, 11)]),
    ("layout", np.zeros((2, 11, 6, 8, 10), "f4"), ValueError, ["shape", *numbers(11, 6)]),
    ("0-d", np.zeros((), "f4"), ValueError, ["shape", number(11)]),
    ("empty", np.zeros((2, 6, 8, 10, 0), "f4"), ValueError, ["shape", *numbers(0, 11)]),
    ("float16", np.zeros((2, 6, 8, 10, 11), "f2"), TypeError, ["float16", "float32"]),
    ("int32", np.zeros((2, 6, 8, 10, 11), "i4"), TypeError, ["int32", "float32"]),
    ("int64", np.zeros((2, 6, 8, 10, 11), "i8"), TypeError, ["int64", "float32"]),
    ("bool", np.zeros((2, 6, 8, 10, 11), "?"), TypeError, ["bool", "float32"]),
    ("list", np.zeros((2, 6, 8, 10, 11), "f4").tolist(), TypeError, ["list", "ndarray"]),
    ("tuple", (np.zeros((2, 6, 8, 10, 11), "f4"),), TypeError, ["tuple", "ndarray"]),
    ("scalar", np.float32(0), TypeError, ["float32", "ndarray"]),
    ("memoryview", memoryview(np.zeros((2, 6, 8, 10, 11), "f4")), TypeError, ["memoryview", "ndarray"]),
    ("bytearray", bytearray(4 * 10560), TypeError, ["bytearray", "ndarray"]),
    ("false", False, TypeError, ["False|bool", "ndarray"]),
    ("lazy", Lazy((2, 6, 8, 10, 11)), TypeError, ["Lazy", "ndarray"]),
]


class TestOut:
    """Arrays that cannot be written to."""

    @pytest.mark.parametrize(("name", "out", "error", "needles"), OUTS, ids=[name for name, *_ in OUTS])
    @pytest.mark.parametrize("planned", [False, True], ids=["function", "plan"])
    def test_refused(self, name, out, error, needles, planned):
        """Not an ndarray, another shape, or a dtype that the result cannot be cast to safely."""
        arguments = base()
        if isinstance(out, np.ndarray):
            out = out.copy()
            out[...] = 1
        call = conv3d_transpose
        if planned:
            call = plan_conv3d_transpose((2, 3, 4, 5, 7), (3, 3, 3, 11, 7), arguments["output_shape"], 2)
            arguments = {"value": arguments["value"], "filter": arguments["filter"]}
        with pytest.raises(error) as caught:
            call(**arguments, out=out)
        Case(name, {}, error, [r"\bout\b", *needles]).matches(caught.value)
        assert not isinstance(out, np.ndarray) or (out == 1).all()

    @pytest.mark.parametrize(
        ("operands", "dtype"),
        [
            ("float64", "float32"),
            ("float64", "complex64"),
            ("complex64", "float32"),
            ("complex64", "float64"),
            ("complex128", "complex64"),
            ("float32", "bfloat16"),
            ("float16", "bfloat16"),
            ("bfloat16", "float16"),
        ],
    )
    def test_unsafe_casts(self, operands, dtype):
        """Nothing is narrowed and no imaginary part dropped."""
        operands, dtype = dtype_named(operands), dtype_named(dtype)
        arguments = base()
        x, f = arguments.pop("value").astype(operands), arguments.pop("filter").astype(operands)
        out = np.full((2, 6, 8, 10, 11), 1, dtype)
        with pytest.raises(TypeError) as caught:
            conv3d_transpose(x, f, **arguments, out=out)
        Case("", {}, TypeError, [r"\bout\b", operands.name, dtype.name]).matches(caught.value)
        assert (out == 1).all()

    @pytest.mark.parametrize("layout", ["contiguous", "view"])
    def test_read_only(self, layout):
        """A read-only array stays as it is."""
        out = np.full((2, 6, 8, 10, 11), 1, np.float32)
        if layout == "view":
            out = out[::-1, :, ::-1]
        frozen(out)
        with pytest.raises(ValueError, match=r"(?s)conv3d_transpose.*\bout\b.*(read-only|writ)"):
            conv3d_transpose(**base(), out=out)
        assert (out == 1).all()

    def test_shape_is_checked_on_empty_results(self):
        """Also where there is nothing to write."""
        x, f = zeros(0, 2, 2, 2, 1), zeros(1, 1, 1, 3, 1)
        for shape in [(0, 2, 2, 2, 4), (1, 2, 2, 2, 3), (0,)]:
            with pytest.raises(ValueError, match=r"(?s)conv3d_transpose.*\bout\b"):
                conv3d_transpose(x, f, out=np.zeros(shape, "f4"))
        with pytest.raises(TypeError, match=r"(?s)conv3d_transpose.*\bout\b"):
            conv3d_transpose(x, f, out=np.zeros((0, 2, 2, 2, 3), "f2"))


class TestAccepted:
    """The other side of the table: what counts as integers, and as five of them."""

    @pytest.mark.parametrize("name", ["strides", "dilations"])
    @pytest.mark.parametrize(
        "two",
        [
            2,
            np.int8(2),
            np.uint64(2),
            Index(2),
            np.array(2),
            [2],
            (2,),
            (np.int64(2),),
            np.array([2]),
            [2, 2, 2],
            (2, np.uint8(2), Index(2)),
            np.array([2, 2, 2], np.uint16),
            np.array([2, 2, 2], np.dtype("i4").newbyteorder()),
            Flat([2, 2, 2]),
            [1, 2, 2, 2, 1],
            (np.int64(1), Index(2), 2, 2, Index(1)),
            np.array([1, 2, 2, 2, 1]),
            range(2, 3),
            array.array("i", [2, 2, 2]),
            collections.deque([2, 2, 2]),
            collections.UserList([2, 2, 2]),
        ],
        ids=lambda two: f"{type(two).__name__}-{two!r:.24}",
    )
    def test_forms_of_two(self, name, two):
        """One, three or five integers, whatever they and their sequence are."""
        arguments = base() | {"output_shape": None}
        want = oracle.conv3d_transpose(**(arguments | {name: 2})).astype("f4")
        assert same_bits(conv3d_transpose(**(arguments | {name: two})), want)
        plan = plan_conv3d_transpose((2, 3, 4, 5, 7), (3, 3, 3, 11, 7), **({"strides": 2} | {name: two}))
        assert plan.output_shape == want.shape

    @pytest.mark.parametrize("name", ["strides", "dilations"])
    def test_none_is_1(self, name):
        """None means 1 on all axes."""
        arguments = base() | {"output_shape": None}
        want = oracle.conv3d_transpose(**(arguments | {name: 1})).astype("f4")
        assert same_bits(conv3d_transpose(**(arguments | {name: None})), want)

    @pytest.mark.parametrize("name", ["strides", "dilations"])
    @pytest.mark.parametrize("data_format", ["NDHWC", "NCDHW"])
    def test_three_are_depth_height_width(self, name, data_format):
        """Three never depend on the layout, five do."""
        arguments = base(data_format) | {"output_shape": None}
        want = oracle.conv3d_transpose(**(arguments | {name: [1, 2, 3]})).astype("f4")
        assert same_bits(conv3d_transpose(**(arguments | {name: [1, 2, 3]})), want)
        five = oracle.caller_order([1, 1, 2, 3, 1], data_format)
        assert same_bits(conv3d_transpose(**(arguments | {name: five})), want)

    @pytest.mark.parametrize(
        "shape",
        [
            [2, 6, 8, 10, 11],
            (2, 6, 8, 10, 11),
            np.array([2, 6, 8, 10, 11]),
            np.array([2, 6, 8, 10, 11], np.uint8),
            np.array([2, 6, 8, 10, 11], np.uint64),
            np.array([2, 6, 8, 10, 11], np.dtype("i8").newbyteorder()),
            [np.int16(2), Index(6), 8, np.uint8(10), Index(11)],
            Flat([2, 6, 8, 10, 11]),
            array.array("q", [2, 6, 8, 10, 11]),
            collections.deque([2, 6, 8, 10, 11]),
            collections.UserList([2, 6, 8, 10, 11]),
        ],
        ids=lambda shape: f"{type(shape).__name__}-{getattr(shape, 'dtype', '')}",
    )
    def test_forms_of_output_shape(self, shape):
        """Any sequence of five integers, and the result's shape is of Python integers again."""
        arguments = base()
        want = oracle.conv3d_transpose(**arguments).astype("f4")
        assert same_bits(conv3d_transpose(**(arguments | {"output_shape": shape})), want)
        plan = plan_conv3d_transpose((2, 3, 4, 5, 7), (3, 3, 3, 11, 7), shape, 2)
        assert plan.output_shape == want.shape
        assert {type(size) for size in plan.output_shape} == {int}

    def test_range_is_a_sequence(self):
        """A range can be an output_shape too."""
        x, f = zeros(2, 2, 2, 3, 1), zeros(1, 1, 1, 6, 1)
        assert conv3d_transpose(x, f, range(2, 7), [2, 2, 2], "VALID").shape == (2, 3, 4, 5, 6)

    def test_arguments_are_not_modified(self):
        """Lists given for shapes stay as they were."""
        shape, strides, dilations = [2, 6, 8, 10, 11], [2], [1, 1, 1]
        conv3d_transpose(**(base() | {"output_shape": shape, "strides": strides, "dilations": dilations}))
        assert (shape, strides, dilations) == ([2, 6, 8, 10, 11], [2], [1, 1, 1])

    @pytest.mark.parametrize("workers", [None, 1, 2, np.int64(2), Index(2)], ids=repr)
    def test_workers(self, workers):
        """None or an integer."""
        arguments = base()
        want = oracle.conv3d_transpose(**arguments).astype("f4")
        assert same_bits(conv3d_transpose(**arguments, workers=workers), want)
