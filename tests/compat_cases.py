"""Random calls in PyTorch's and ONNX's terms, and what they must give: the definitions as loops over taps in float64.

The peer scripts draw the same calls to compare with the frameworks themselves. Nothing here imports the package or a
peer; the rules of sizes and paddings are written out again from the documentation of both.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

LARGEST = 8  # whole numbers whose sums float32 holds, in whatever order they are added


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: which function, and its arguments by the names of its framework."""

    seed: int
    index: int
    function: str
    arguments: dict[str, Any]
    exact: bool  # whole numbers: any order of summation gives the same bits
    typical: float  # the size of a sum of as many products as a cell has at most, of normal numbers
    features: tuple[str, ...]

    def bound(self, part: float, expected: np.ndarray) -> float:
        """Return a part of the largest output, or of a typical one where cancellation makes all outputs smaller."""
        return part * max(1.0, self.typical / max(np.abs(expected).max(initial=0), 1e-9))

    def __str__(self) -> str:
        """Everything it takes to make the call again, arrays by their shapes."""
        shown = {k: f"{v.dtype} {v.shape}" if isinstance(v, np.ndarray) else v for k, v in self.arguments.items()}
        return f"seed {self.seed}, index {self.index}: {self.function}({shown})"


def pairs(fine: int, coarse: int, tap: int, stride: int, dilation: int, before: int) -> tuple[list[int], list[int]]:
    """Return the fine and the coarse positions that one tap of one axis joins."""
    both = [(i * stride + tap * dilation - before, i) for i in range(coarse)]
    both = [(p, i) for p, i in both if 0 <= p < fine]
    return [p for p, _ in both], [i for _, i in both]


def layer(
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray | None,
    groups: int,
    strides: list[int],
    dilations: list[int],
    before: list[int],
    sizes: list[int],
    transposed: bool,
) -> np.ndarray:
    """Return y of spatial `sizes`: with p = i*stride + a*dilation - before, y[p] += x[i] w[a] or y[i] += x[p] w[a].

    Arrays have channels first. Weights are [Cin, Cout/groups, *k], or [Cout, Cin/groups, *k] of a convolution.
    """
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    kernel = w.shape[2:]
    split_w = w.astype(wide).reshape(groups, w.shape[0] // groups, *w.shape[1:])
    split_x = x.astype(wide).reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    made = w.shape[1] if transposed else w.shape[0] // groups
    y = np.zeros([x.shape[0], groups, made, *sizes], wide)
    subscripts = "ngi...,gio->ngo..." if transposed else "ngi...,goi->ngo..."
    fine, coarse = (sizes, x.shape[2:]) if transposed else (x.shape[2:], sizes)
    for tap in itertools.product(*map(range, kernel)):
        numbers = zip(fine, coarse, tap, strides, dilations, before, strict=True)
        on_fine, on_coarse = zip(*(pairs(*axis) for axis in numbers), strict=True)
        lead = [np.arange(size) for size in y.shape[:3]]
        to = np.ix_(*lead, *(on_fine if transposed else on_coarse))
        places = on_coarse if transposed else on_fine
        lead[2] = np.arange(split_x.shape[2])
        if all(places):
            y[to] += np.einsum(subscripts, split_x[np.ix_(*lead, *places)], split_w[(..., *tap)])
    y = y.reshape(x.shape[0], groups * made, *sizes)
    return y if b is None else y + b.astype(wide).reshape(-1, *[1] * len(sizes))


def each(value: Any, rank: int) -> list[int]:
    """Return one integer or a sequence of one or of `rank` as a list of `rank`."""
    listed = [int(value)] if np.ndim(value) == 0 else [int(number) for number in value]
    return listed * rank if len(listed) == 1 else listed


def by_torch(case: Case) -> np.ndarray:
    """Return what PyTorch's documentation says the call gives, in float64."""
    a = case.arguments
    x, w, b = a["input"], a["weight"], a.get("bias")
    rank, transposed = w.ndim - 2, "transpose" in case.function
    batched = x.ndim == rank + 2
    x = x if batched else x[None]
    strides, dilations = each(a.get("stride", 1), rank), each(a.get("dilation", 1), rank)
    spans = [(k - 1) * d for k, d in zip(w.shape[2:], dilations, strict=True)]
    padding = a.get("padding", 0)
    if padding in ("same", "valid"):
        before = [span // 2 if padding == "same" else 0 for span in spans]
        total = spans if padding == "same" else [0] * rank
    else:
        before = each(padding, rank)
        total = [2 * p for p in before]
    if transposed:
        more = each(a.get("output_padding", 0), rank)
        numbers = zip(x.shape[2:], strides, total, spans, more, strict=True)
        sizes = [(n - 1) * s - cut + span + extra + 1 for n, s, cut, span, extra in numbers]
    else:
        numbers = zip(x.shape[2:], strides, total, spans, strict=True)
        sizes = [(n + zeros - span - 1) // s + 1 for n, s, zeros, span in numbers]
    y = layer(x, w, b, a.get("groups", 1), strides, dilations, before, sizes, transposed)
    return y if batched else y[0]


def by_onnx(case: Case) -> np.ndarray:
    """Return what the text of the standard says the call gives, in float64; no pads are negative."""
    a = case.arguments
    x, w, b = a["X"], a["W"], a.get("B")
    rank, transposed = w.ndim - 2, "transpose" in case.function
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    pads, auto_pad = a.get("pads", [0] * 2 * rank), a.get("auto_pad", "NOTSET")
    before, sizes = [], []
    for i, (n, s, span) in enumerate(zip(x.shape[2:], strides, spans, strict=True)):
        begin, end = pads[i], pads[i + rank]
        if transposed:
            full = s * (n - 1) + a.get("output_padding", [0] * rank)[i] + span
            size = full - begin - end
            if "output_shape" in a or "SAME" in auto_pad:
                size = a["output_shape"][i] if "output_shape" in a else n * s
                begin = share(full - size, auto_pad)
        else:
            size = (n + begin + end - span) // s + 1
            if "SAME" in auto_pad:
                size = -(-n // s)
                begin = share((size - 1) * s + span - n, auto_pad)
        before.append(begin)
        sizes.append(size)
    return layer(x, w, b, a.get("group", 1), strides, dilations, before, sizes, transposed)


def share(total: int, auto_pad: str) -> int:
    """Return the part of a padding that goes to the beginning."""
    half = max(0, total) // 2
    return half if auto_pad == "SAME_UPPER" else max(0, total) - half


def draw_array(rng: np.random.Generator, shape: list[int], exact: bool, dtype: str) -> np.ndarray:
    """Return a read-only array of whole numbers or of normal ones."""

    def real() -> np.ndarray:
        return rng.integers(-LARGEST, LARGEST + 1, shape) if exact else rng.standard_normal(shape)

    array = np.asarray(real() + 1j * real() if dtype.startswith("complex") else real()).astype(dtype)
    array.flags.writeable = False
    return array


@dataclasses.dataclass
class Drawn:
    """What the calls of both frameworks have in common."""

    rank: int
    transposed: bool
    batch: int
    groups: int
    x_channels: int
    w_channels: tuple[int, int]
    made: int
    sizes: list[int]
    kernel: list[int]
    strides: list[int]
    dilations: list[int]

    @property
    def typical(self) -> float:
        """The root of the most products of a cell."""
        return float(np.sqrt(self.x_channels // self.groups * np.prod(self.kernel)))

    @property
    def full(self) -> list[int]:
        """What the taps of a transposed convolution reach, on each axis."""
        axes = zip(self.sizes, self.kernel, self.strides, self.dilations, strict=True)
        return [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in axes]


def draw(rng: np.random.Generator, index: int) -> Drawn:
    """Draw a small call, every tenth with more channels and space."""
    rank, transposed, large = int(rng.integers(1, 4)), bool(rng.integers(2)), index % 10 == 9
    groups = int(rng.choice([1, 1, 2, 3]))
    per_group = [int(rng.choice([8, 16, 20])) if large else int(rng.integers(1, 4)) for _ in range(2)]
    if rng.integers(8) == 0:  # depthwise
        groups, per_group = int(rng.integers(2, 6)), [1, int(rng.integers(1, 3))]
    first, second = per_group if transposed else per_group[::-1]
    most = {1: 40, 2: 12, 3: 7}[rank] if large else {1: 9, 2: 6, 3: 4}[rank]
    return Drawn(
        rank,
        transposed,
        int(rng.integers(1, 4)),
        groups,
        per_group[0] * groups,
        (first * groups, second),
        per_group[1] * groups,
        [int(n) for n in rng.integers(1, most + 1, rank)],
        [int(k) for k in rng.integers(1, 4 if rank == 3 else 6, rank)],
        [int(s) for s in rng.integers(1, 5, rank)],
        [int(d) for d in rng.choice([1, 1, 2, 3], rank)],
    )


def spelled(rng: np.random.Generator, numbers: list[int]) -> Any:
    """Return one of the ways to say the same numbers to PyTorch."""
    ways = [list(numbers), tuple(numbers)]
    if len(set(numbers)) == 1:
        ways += [numbers[0], (numbers[0],)]
    return ways[rng.integers(len(ways))]


def torch_case(seed: int, index: int) -> Case:
    """Return the call of PyTorch of this number."""
    rng = np.random.default_rng([seed, index])
    drawn = draw(rng, index)
    exact, dtype = bool(index % 2), str(rng.choice(["float32"] * 6 + ["float64", "complex64"]))
    rank, features = drawn.rank, {f"{drawn.rank}-D", dtype, "whole numbers" if exact else "normal numbers"}
    more: dict[str, Any] = {}
    if drawn.transposed:
        reach = [max(s, d) for s, d in zip(drawn.strides, drawn.dilations, strict=True)]
        added = [int(rng.integers(0, most)) for most in reach]
        cut = [int(rng.integers(0, min(3, (f + a - 1) // 2) + 1)) for f, a in zip(drawn.full, added, strict=True)]
        more = {"output_padding": spelled(rng, added), "padding": spelled(rng, cut)}
        if max(added) and drawn.groups > 1 and max(drawn.dilations) > 1:
            features.add("groups, output padding and dilation")
    else:
        word = rng.choice(["", "", "", "valid", "same"])
        if word == "same":
            drawn.strides = [1] * rank
        zeros = [int(p) for p in rng.integers(0, 4, rank)] if word == "" else [0] * rank
        more = {"padding": str(word) if word else spelled(rng, zeros)}
        for i in range(rank):  # the kernel has to fit
            span = (drawn.kernel[i] - 1) * drawn.dilations[i] + 1
            drawn.sizes[i] = max(drawn.sizes[i], span - 2 * zeros[i])
        features.add(str(word) or "explicit padding")
    batched = rng.integers(5) > 0
    x = draw_array(rng, [*([drawn.batch] if batched else []), drawn.x_channels, *drawn.sizes], exact, dtype)
    w = draw_array(rng, [*drawn.w_channels, *drawn.kernel], exact, dtype)
    arguments = {"input": x, "weight": w, "groups": drawn.groups} | more
    arguments |= {"stride": spelled(rng, drawn.strides), "dilation": spelled(rng, drawn.dilations)}
    if rng.integers(2):
        arguments["bias"] = draw_array(rng, [drawn.made], exact, dtype)
    for name, default in (("groups", 1), ("output_padding", 0), ("stride", 1), ("dilation", 1)):
        if arguments.get(name) == default and rng.integers(2):
            del arguments[name]
    features |= _features(drawn, "bias" in arguments) | ({"unbatched"} if not batched else set())
    function = f"conv{'_transpose' if drawn.transposed else ''}{rank}d"
    return Case(seed, index, function, arguments, exact, drawn.typical, tuple(sorted(features)))


def onnx_case(seed: int, index: int) -> Case:
    """Return the call of ONNX of this number."""
    rng = np.random.default_rng([seed, index, 1])
    drawn = draw(rng, index)
    exact, rank = bool(index % 2), drawn.rank
    features = {f"{rank}-D", "whole numbers" if exact else "normal numbers"}
    auto_pad = str(rng.choice(["NOTSET", "NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    arguments: dict[str, Any] = {"strides": drawn.strides, "dilations": drawn.dilations, "group": drawn.groups}
    if auto_pad != "NOTSET" or rng.integers(2):
        arguments["auto_pad"] = auto_pad
    if drawn.transposed:
        reach = [max(s, d) for s, d in zip(drawn.strides, drawn.dilations, strict=True)]
        added = [int(rng.integers(0, most)) for most in reach] if rng.integers(2) else [0] * rank
        full = [f + more for f, more in zip(drawn.full, added, strict=True)]
        if max(added):
            arguments["output_padding"] = added
        if rng.integers(3) == 0:
            most = [f + r - 1 for f, r in zip(drawn.full, reach, strict=True)]
            arguments["output_shape"] = [int(rng.integers(max(1, f - 5), f + 1)) for f in most]
            features.add("output_shape")
        elif auto_pad == "NOTSET" and rng.integers(4):
            begins = [int(rng.integers(0, min(4, f))) for f in full]
            ends = [int(rng.integers(0, min(4, f - begin))) for f, begin in zip(full, begins, strict=True)]
            arguments["pads"] = begins + ends
    elif auto_pad == "NOTSET" and rng.integers(4):
        arguments["pads"] = [int(p) for p in rng.integers(0, 4, 2 * rank)]
    if not drawn.transposed and "SAME" not in auto_pad:
        pads = arguments.get("pads", [0] * 2 * rank)
        for i in range(rank):
            span = (drawn.kernel[i] - 1) * drawn.dilations[i] + 1
            drawn.sizes[i] = max(drawn.sizes[i], span - pads[i] - pads[i + rank])
    if len(set(arguments.get("pads", [0]))) > 1:
        features.add("asymmetric pads")
    if rng.integers(2):
        arguments["kernel_shape"] = drawn.kernel
    for name in ("strides", "dilations", "group"):
        if set(np.ravel(arguments[name])) == {1} and rng.integers(2):
            del arguments[name]
    arrays = {
        "X": draw_array(rng, [drawn.batch, drawn.x_channels, *drawn.sizes], exact, "float32"),
        "W": draw_array(rng, [*drawn.w_channels, *drawn.kernel], exact, "float32"),
    }
    if rng.integers(2):
        arrays["B"] = draw_array(rng, [drawn.made], exact, "float32")
    features |= _features(drawn, "B" in arrays) | {auto_pad}
    function = "conv_transpose" if drawn.transposed else "conv"
    return Case(seed, index, function, arrays | arguments, exact, drawn.typical, tuple(sorted(features)))


def _features(drawn: Drawn, biased: bool) -> set[str]:
    found = {
        "transposed": drawn.transposed,
        "convolution": not drawn.transposed,
        "groups": drawn.groups > 1,
        "depthwise": drawn.groups > 1 and drawn.groups == drawn.x_channels,
        "bias": biased,
        "dilated and strided": max(drawn.dilations) > 1 and max(drawn.strides) > 1,
        "kernel smaller than stride": any(k < s for k, s in zip(drawn.kernel, drawn.strides, strict=True)),
    }
    return {name for name, holds in found.items() if holds}


def with_arrays(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with arrays of ones for what the tables below have as shapes, or as pairs of shape and dtype."""
    made = dict(given)
    for name in {"input", "weight", "bias", "X", "W", "B"} & set(made):
        shape, dtype = made[name] if isinstance(made[name], list) else (made[name], "float32")
        made[name] = np.ones(shape, dtype)
    return made


# Function, arguments, exception, and a pattern of its text that names the numbers. PyTorch refuses each of these.
TORCH_REFUSALS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (name, {"input": x, "weight": w} | more, error, text)
    for name, x, w, more, error, text in [
        # ranks
        ("conv_transpose3d", (4, 4, 4), (2, 3, 3, 3, 3), {}, ValueError, r"input must be 5-D .* or 4-D .*, got 3-D"),
        ("conv_transpose1d", (1, 1, 2, 4), (2, 3, 3), {}, ValueError, r"input must be 3-D .* or 2-D .*, got 4-D"),
        ("conv2d", (4, 4), (3, 2, 3, 3), {}, ValueError, r"input must be 4-D .* or 3-D .*, got 2-D"),
        (
            "conv3d",
            (1, 2, 4, 4, 4),
            (3, 2, 3, 3),
            {},
            ValueError,
            r"weight must be 5-D .* got 4-D, shape \(3, 2, 3, 3\)",
        ),
        ("conv_transpose2d", (1, 2, 4, 4), (2, 3, 3, 3, 1), {}, ValueError, r"weight must be 4-D .* got 5-D"),
        # channels and groups
        ("conv_transpose2d", (1, 4, 4, 4), (2, 3, 3, 3), {"groups": 2}, ValueError, "take 2 input channels.* has 4"),
        (
            "conv_transpose1d",
            (1, 4, 4),
            (4, 3, 3),
            {"groups": 3},
            ValueError,
            "groups=3 must divide the 4 input channels",
        ),
        ("conv3d", (1, 3, 4, 4, 4), (4, 2, 3, 3, 3), {}, ValueError, "take 2 input channels, but input has 3"),
        ("conv1d", (1, 4, 4), (3, 2, 3), {"groups": 2}, ValueError, "groups=2 must divide the 3 output channels"),
        ("conv2d", (1, 2, 4, 4), (4, 2, 3, 3), {"groups": 2}, ValueError, "groups=2 take 4 input channels.* has 2"),
        ("conv2d", (1, 2, 4, 4), (3, 2, 3, 3), {"groups": 0}, ValueError, "groups=0 must be at least 1"),
        (
            "conv_transpose3d",
            (1, 2, 4, 4, 4),
            (2, 3, 3, 3, 3),
            {"groups": -1},
            ValueError,
            "groups=-1 must be at least",
        ),
        (
            "conv_transpose2d",
            (1, 2, 4, 4),
            (2, 3, 3, 3),
            {"groups": 1.0},
            TypeError,
            "groups must be an integer, got 1.0",
        ),
        # bias
        (
            "conv2d",
            (1, 2, 4, 4),
            (3, 2, 3, 3),
            {"bias": (2,)},
            ValueError,
            r"bias must be of shape \(3,\).* got shape \(2,\)",
        ),
        (
            "conv2d",
            (1, 2, 4, 4),
            (3, 2, 3, 3),
            {"bias": ()},
            ValueError,
            r"bias must be of shape \(3,\).* got shape \(\)",
        ),
        ("conv_transpose1d", (1, 2, 4), (2, 3, 3), {"bias": (1,)}, ValueError, r"shape \(3,\).* got shape \(1,\)"),
        (
            "conv_transpose1d",
            (1, 4, 4),
            (4, 3, 3),
            {"bias": (3,), "groups": 2},
            ValueError,
            r"shape \(6,\).* got shape \(3,\)",
        ),
        ("conv_transpose3d", (1, 2, 4, 4, 4), (2, 3, 3, 3, 3), {"bias": (3, 1)}, ValueError, r"got shape \(3, 1\)"),
        # strides, dilations and paddings
        ("conv_transpose2d", (1, 2, 4, 4), (2, 3, 3, 3), {"stride": 0}, ValueError, r"stride=\[0\] must be at least 1"),
        ("conv1d", (1, 2, 4), (3, 2, 3), {"stride": (-1,)}, ValueError, r"stride=\[-1\] must be at least 1"),
        (
            "conv3d",
            (1, 2, 4, 4, 4),
            (3, 2, 3, 3, 3),
            {"dilation": (1, 0, 1)},
            ValueError,
            r"dilation=\[1, 0, 1\].* got 0",
        ),
        (
            "conv_transpose2d",
            (1, 2, 4, 4),
            (2, 3, 3, 3),
            {"dilation": 0},
            ValueError,
            r"dilation=\[0\] must be at least 1",
        ),
        (
            "conv_transpose2d",
            (1, 2, 4, 4),
            (2, 3, 3, 3),
            {"padding": -1},
            ValueError,
            r"padding=\[-1\] must be at least 0",
        ),
        ("conv2d", (1, 2, 4, 4), (3, 2, 3, 3), {"padding": (0, -2)}, ValueError, r"padding=\[0, -2\].* got -2"),
        (
            "conv_transpose1d",
            (1, 2, 4),
            (2, 3, 3),
            {"output_padding": -1},
            ValueError,
            r"output_padding=\[-1\] must be at l",
        ),
        (
            "conv_transpose2d",
            (1, 2, 4, 4),
            (2, 3, 3, 3),
            {"stride": [2, 2, 2]},
            ValueError,
            r"of length 1 or 2, got 3",
        ),
        (
            "conv_transpose3d",
            (1, 2, 4, 4, 4),
            (2, 3, 3, 3, 3),
            {"stride": []},
            ValueError,
            r"of length 1 or 3, got 0: \[\]",
        ),
        (
            "conv1d",
            (1, 2, 4),
            (3, 2, 3),
            {"padding": [1, 1]},
            ValueError,
            r"padding must be of length 1, got 2: \[1, 1\]",
        ),
        (
            "conv_transpose2d",
            (1, 2, 4, 4),
            (2, 3, 3, 3),
            {"stride": 2.0},
            TypeError,
            "stride must be an integer, got 2.0",
        ),
        (
            "conv2d",
            (1, 2, 4, 4),
            (3, 2, 3, 3),
            {"stride": [1, 1.5]},
            TypeError,
            r"stride\[1\] must be an integer, got 1.5",
        ),
        (
            "conv_transpose2d",
            (1, 2, 4, 4),
            (2, 3, 3, 3),
            {"stride": True},
            TypeError,
            "stride must be an integer, got .* True",
        ),
        (
            "conv_transpose2d",
            (1, 2, 4, 4),
            (2, 3, 3, 3),
            {"dilation": None},
            TypeError,
            "dilation must be an integer, got None",
        ),
        (
            "conv_transpose2d",
            (1, 2, 4, 4),
            (2, 3, 3, 3),
            {"padding": "same"},
            TypeError,
            "padding must be an integer, got 'same'",
        ),
        (
            "conv2d",
            (1, 2, 4, 4),
            (3, 2, 3, 3),
            {"padding": "SAME"},
            ValueError,
            "padding must be 'valid' or 'same', got 'SAME'",
        ),
        ("conv2d", (1, 2, 4, 4), (3, 2, 3, 3), {"padding": "same", "stride": (1, 2)}, ValueError, r"got \[1, 2\]"),
        # output padding: less than the stride or the dilation
        (
            "conv_transpose1d",
            (1, 2, 4),
            (2, 3, 3),
            {"output_padding": 1},
            ValueError,
            "got 1 beside stride 1 and dilation 1",
        ),
        (
            "conv_transpose2d",
            (1, 2, 4, 4),
            (2, 3, 3, 3),
            {"output_padding": (0, 2), "stride": 2},
            ValueError,
            "got 2 beside str",
        ),
        (
            *("conv_transpose3d", (1, 2, 4, 4, 4), (2, 3, 3, 3, 3)),
            *(
                {"output_padding": 3, "stride": (4, 3, 4), "dilation": (1, 2, 1)},
                ValueError,
                "got 3 beside stride 3 and dil",
            ),
        ),
        # sizes
        (
            "conv_transpose2d",
            (1, 2, 1, 1),
            (2, 3, 2, 2),
            {"padding": 1},
            ValueError,
            "output height would be 0.*input height 1",
        ),
        (
            "conv_transpose1d",
            (1, 2, 1),
            (2, 3, 1),
            {"padding": 1},
            ValueError,
            "output width would be -1, it must be at least 1",
        ),
        ("conv3d", (1, 2, 4, 4, 4), (3, 2, 3, 5, 3), {}, ValueError, "padded input height, 4: .* kernel 5"),
        (
            "conv1d",
            (1, 2, 2),
            (3, 2, 3),
            {"dilation": 2, "padding": 1},
            ValueError,
            "input width, 4: .* 2, so 5 with its gaps",
        ),
        ("conv2d", (0, 2, 4, 4), (3, 2, 5, 5), {}, ValueError, "padded input height, 4: .* kernel 5"),
        # only the batch may be empty
        (
            "conv_transpose2d",
            (1, 2, 0, 4),
            (2, 3, 3, 3),
            {},
            ValueError,
            r"in its batch only, got shape \(1, 2, 0, 4\)",
        ),
        ("conv3d", (1, 2, 4, 4, 0), (3, 2, 1, 1, 1), {"padding": 1}, ValueError, r"in its batch only, got shape"),
        (
            "conv_transpose3d",
            (1, 2, 4, 4, 4),
            (2, 0, 3, 3, 3),
            {},
            ValueError,
            r"weight must not be empty, got shape \(2, 0,",
        ),
        ("conv_transpose1d", (1, 0, 4), (0, 3, 3), {}, ValueError, r"weight must not be empty, got shape \(0, 3, 3\)"),
        ("conv2d", (1, 2, 4, 4), (0, 2, 3, 3), {}, ValueError, r"weight must not be empty, got shape \(0, 2, 3, 3\)"),
        ("conv2d", (1, 2, 4, 4), (3, 2, 0, 3), {}, ValueError, r"weight must not be empty, got shape \(3, 2, 0, 3\)"),
        # dtypes
        (
            "conv3d",
            (1, 2, 4, 4, 4),
            [(3, 2, 3, 3, 3), "float64"],
            {},
            TypeError,
            "weight has dtype float64, but input has float32",
        ),
        (
            "conv_transpose2d",
            (1, 2, 4, 4),
            [(2, 3, 3, 3), "float16"],
            {},
            TypeError,
            "weight has dtype float16, but input has float32",
        ),
        (
            "conv_transpose1d",
            (1, 2, 4),
            [(2, 3, 3), "complex64"],
            {},
            TypeError,
            "weight has dtype complex64, but input has",
        ),
        (
            "conv2d",
            (1, 2, 4, 4),
            (3, 2, 3, 3),
            {"bias": [(3,), "float64"]},
            TypeError,
            "bias has dtype float64, but input has",
        ),
        ("conv2d", [(1, 2, 4, 4), "bool"], [(3, 2, 3, 3), "bool"], {}, TypeError, "input has dtype bool"),
    ]
]

# Function, arguments and the shape of the result, which is empty in PyTorch too.
TORCH_EMPTY: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("conv_transpose1d", {"input": (0, 2, 4), "weight": (2, 3, 3)}, (0, 3, 6)),
    ("conv_transpose2d", {"input": (0, 2, 4, 4), "weight": (2, 3, 3, 3), "stride": 2, "bias": (3,)}, (0, 3, 9, 9)),
    ("conv_transpose3d", {"input": (0, 4, 4, 4, 4), "weight": (4, 3, 3, 3, 3), "groups": 2}, (0, 6, 6, 6, 6)),
    ("conv1d", {"input": (0, 2, 4), "weight": (3, 2, 3), "padding": "same"}, (0, 3, 4)),
    ("conv2d", {"input": (0, 2, 4, 4), "weight": (3, 2, 3, 3)}, (0, 3, 2, 2)),
    ("conv3d", {"input": (0, 2, 4, 4, 4), "weight": (3, 2, 3, 3, 3), "stride": 2, "padding": 1}, (0, 3, 2, 2, 2)),
]

# The same for ONNX; ONNX Runtime refuses each of these.
ONNX_REFUSALS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (name, {"X": x, "W": w} | more, error, text)
    for name, x, w, more, error, text in [
        ("conv_transpose", (1, 1), (1, 1), {}, ValueError, "X must be 3-D to 5-D .*, got 2-D"),
        ("conv_transpose", (1, 1, 3), (1, 1, 3, 3), {}, ValueError, r"W must be 3-D .* got 4-D, shape \(1, 1, 3, 3\)"),
        ("conv", (1, 1, 4, 4), (2, 1, 3), {}, ValueError, "W must be 4-D .* got 3-D"),
        ("conv_transpose", (1, 2, 3), (3, 1, 3), {}, ValueError, "take 3 input channels, but X has 2"),
        (
            "conv_transpose",
            (1, 4, 3),
            (4, 1, 3),
            {"group": 3},
            ValueError,
            "group=3 must divide the 4 input channels of W",
        ),
        ("conv_transpose", (1, 4, 3), (2, 1, 3), {"group": 2}, ValueError, "take 2 input channels, but X has 4"),
        ("conv_transpose", (1, 4, 3), (4, 1, 3), {"group": 0}, ValueError, "group=0 must be at least 1"),
        ("conv", (1, 2, 4), (2, 1, 3), {}, ValueError, "take 1 input channels, but X has 2"),
        ("conv", (1, 4, 4), (3, 2, 3), {"group": 2}, ValueError, "group=2 must divide the 3 output channels of W"),
        ("conv", (1, 4, 4), (3, 4, 3), {"group": 0}, ValueError, "group=0 must be at least 1"),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 2, 3),
            {"B": (3,)},
            ValueError,
            r"B must be of shape \(2,\).* got shape \(3,\)",
        ),
        ("conv", (1, 1, 4), (2, 1, 3), {"B": (1,)}, ValueError, r"B must be of shape \(2,\).* got shape \(1,\)"),
        ("conv", (1, 1, 4), (2, 1, 3), {"B": (2, 1)}, ValueError, r"B must be of shape \(2,\).* got shape \(2, 1\)"),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 1, 3),
            {"strides": [2, 2]},
            ValueError,
            r"strides must be of length 1, got 2",
        ),
        ("conv_transpose", (1, 1, 3), (1, 1, 3), {"strides": [0]}, ValueError, r"strides=\[0\] must be at least 1"),
        ("conv", (1, 1, 4), (2, 1, 3), {"strides": [0]}, ValueError, r"strides=\[0\] must be at least 1"),
        ("conv", (1, 1, 4), (2, 1, 3), {"dilations": [0]}, ValueError, r"dilations=\[0\] must be at least 1"),
        ("conv", (1, 1, 4), (2, 1, 3), {"dilations": [1, 1]}, ValueError, "dilations must be of length 1, got 2"),
        ("conv_transpose", (1, 1, 3), (1, 1, 3), {"pads": [1]}, ValueError, r"pads must be of length 2, got 1: \[1\]"),
        ("conv_transpose", (1, 1, 3), (1, 1, 3), {"pads": [-1, 0]}, ValueError, r"pads=\[-1, 0\] must be at least 0"),
        ("conv", (1, 1, 4), (1, 1, 3), {"pads": [0, -1]}, ValueError, r"pads=\[0, -1\] must be at least 0"),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 1, 3),
            {"kernel_shape": [2]},
            ValueError,
            r"kernel_shape=\[2\] is not .* \[3\]",
        ),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 1, 3),
            {"kernel_shape": [3, 3]},
            ValueError,
            "kernel_shape must be of length 1",
        ),
        (
            "conv",
            (1, 1, 4),
            (1, 1, 3),
            {"kernel_shape": [2]},
            ValueError,
            r"kernel_shape=\[2\] is not the kernel of W, \[3\]",
        ),
        (
            "conv",
            (1, 1, 4),
            (1, 1, 0),
            {},
            ValueError,
            r"W must have a kernel of at least 1 everywhere, got .*\(1, 1, 0\)",
        ),
        ("conv", (1, 1, 4), (1, 1, 3), {"auto_pad": "same"}, ValueError, "auto_pad must be 'NOTSET' or .*, got 'same'"),
        ("conv", (1, 1, 4), (1, 1, 3), {"auto_pad": b"s"}, ValueError, "auto_pad must be 'NOTSET' or .*, got 's'"),
        (
            "conv",
            (1, 1, 4),
            (1, 1, 3),
            {"auto_pad": "SAME_UPPER", "pads": [1, 1]},
            ValueError,
            "pads and auto_pad='SAME_UPPER'",
        ),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 1, 3),
            {"auto_pad": "VALID", "pads": [0, 1]},
            ValueError,
            "pads and auto_pad='VALID'",
        ),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 1, 3),
            {"output_padding": [1]},
            ValueError,
            "got 1 beside stride 1 and dilation 1",
        ),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 1, 3),
            {"output_padding": [2], "strides": [2]},
            ValueError,
            "got 2 beside stride 2",
        ),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 1, 3),
            {"output_padding": [-1]},
            ValueError,
            r"output_padding=\[-1\] must be at l",
        ),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 1, 3),
            {"output_shape": [5, 5]},
            ValueError,
            "output_shape must be of length 1",
        ),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 1, 3),
            {"output_shape": [0]},
            ValueError,
            r"output_shape=\[0\] must be at least 1",
        ),
        (
            *("conv_transpose", (1, 1, 3), (1, 1, 3), {"output_shape": [9], "strides": [2]}, ValueError),
            r"output_shape=\[9\] is out of reach: the taps reach 7, .* allow up to 8, got 9",
        ),
        (
            "conv_transpose",
            (1, 1, 1),
            (1, 1, 2),
            {"pads": [1, 1]},
            ValueError,
            "output width would be 0.* cut by 1 before and 1",
        ),
        ("conv_transpose", (1, 1, 1), (1, 1, 2), {"pads": [2, 1]}, ValueError, "output width would be -1"),
        ("conv", (1, 1, 2), (1, 1, 3), {}, ValueError, "padded input width, 2: .* kernel 3"),
        (
            "conv",
            (1, 1, 2),
            (1, 1, 3),
            {"strides": [2], "auto_pad": "VALID"},
            ValueError,
            "padded input width, 2: .* kernel 3",
        ),
        ("conv", (1, 1, 0), (1, 1, 1), {}, ValueError, "padded input width, 0: .* kernel 1"),
        ("conv", (1, 1, 4), [(1, 1, 3), "float64"], {}, TypeError, "W has dtype float64, but X has float32"),
        (
            "conv_transpose",
            (1, 1, 3),
            (1, 2, 3),
            {"B": [(2,), "float64"]},
            TypeError,
            "B has dtype float64, but X has float32",
        ),
        (
            "conv_transpose",
            [(1, 1, 4), "complex64"],
            [(1, 1, 3), "complex64"],
            {},
            TypeError,
            "X has dtype complex64, .* real",
        ),
        ("conv", [(1, 1, 4), "int32"], [(1, 1, 3), "int32"], {}, TypeError, "X has dtype int32"),
    ]
]
