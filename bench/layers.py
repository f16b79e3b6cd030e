"""The problems that are measured: their geometry, worked out here from TensorFlow's rules, and the suites of them.

Nothing is taken from gemmconv, so that a mistake of the package cannot hide in what it is measured by.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Sizes = tuple[int, ...]
LAYOUTS = ("NDHWC", "NCDHW")
TRANSPOSE, CONV, FILTER_GRADIENT = "conv3d_transpose", "conv3d", "conv3d_backprop_filter"
# Of each operation the first operand, the second and the result: arrays on the coarse grid, on the fine one, filters.
OPS = {
    TRANSPOSE: ("coarse", "filter", "fine"),
    CONV: ("fine", "filter", "coarse"),
    FILTER_GRADIENT: ("fine", "coarse", "filter"),
}


@dataclass(frozen=True)
class Layer:
    """One operation; sizes are depth, height, width, or height, width.

    Names are those of the transposed convolution, from the coarse grid `input` to the fine grid `output`, whatever
    `op` is. Its forward twin, conv3d, takes an array of the output's shape with `cout` channels, has the same filter,
    strides, padding and dilations, and gives one of the input's shape with `cin` channels: TensorFlow's sizes, since
    an output that can be asked for is one whose convolution has the input's size. The filter's gradient takes both.
    `sweep` says where the layer stands in the sweep suite, as pairs of an axis and a size.
    """

    name: str
    batch: int
    cin: int
    cout: int
    input: Sizes
    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    output: Sizes
    padding: str = "SAME"
    source: str = ""
    sweep: tuple[tuple[str, int], ...] = ()
    groups: int = 1
    op: str = TRANSPOSE

    @property
    def rank(self) -> int:
        """Spatial axes: 3, or 2 in a suite of planes."""
        return len(self.input)

    @property
    def roles(self) -> tuple[str, str, str]:
        """What the first operand, the second and the result are."""
        return OPS[self.op]

    @property
    def spans(self) -> Sizes:
        """Output cells from the first tap to the last, K, on each axis."""
        return tuple((k - 1) * step + 1 for k, step in zip(self.kernel, self.dilations, strict=True))

    @property
    def before(self) -> Sizes:
        """Cells cut off in front of each axis: the smaller half of what SAME cuts, 0 for VALID."""
        if self.padding == "VALID":
            return (0,) * self.rank
        return tuple(max(0, full - o) // 2 for full, o in zip(self.full, self.output, strict=True))

    @property
    def full(self) -> Sizes:
        """Cells of each axis before anything is cut: (n-1)*s + K."""
        return tuple((n - 1) * s + k for n, s, k in zip(self.input, self.strides, self.spans, strict=True))

    @property
    def behind(self) -> Sizes:
        """Cells cut off behind each axis; negative where the output has cells that no tap reaches."""
        return tuple(f - lo - o for f, lo, o in zip(self.full, self.before, self.output, strict=True))

    @property
    def room(self) -> Sizes:
        """Cells of the uncropped fine grid: what is cut off, and outputs that reach beyond the last tap."""
        return tuple(max(f, lo + o) for f, lo, o in zip(self.full, self.before, self.output, strict=True))

    @property
    def kept(self) -> tuple[slice, ...]:
        """Where in `room` the output lies, with all of the batch."""
        return slice(None), *(slice(lo, lo + o) for lo, o in zip(self.before, self.output, strict=True))

    def reached(self, tap: Sizes) -> tuple[slice, ...]:
        """Where in `room` a tap carries the input's positions, with all of the batch."""
        sizes = zip(tap, self.dilations, self.input, self.strides, strict=True)
        return slice(None), *(slice(a * d, a * d + (n - 1) * s + 1, s) for a, d, n, s in sizes)

    @property
    def taps(self) -> int:
        """Taps of the filter, kd*kh*kw."""
        return math.prod(self.kernel)

    @property
    def rows(self) -> int:
        """Input positions, N*D*H*W."""
        return self.batch * math.prod(self.input)

    @property
    def products(self) -> int:
        """Products of a cell of the result, at most."""
        if self.op == FILTER_GRADIENT:
            return self.rows
        return self.taps * (self.cin if self.op == TRANSPOSE else self.cout) // self.groups

    def shape(self, role: str, layout: str = "NDHWC") -> Sizes:
        """The shape of the coarse array, the fine one or the filter; the latter is TensorFlow's in both layouts.

        [kd, kh, kw, Cout, Cin], and with groups [kd, kh, kw, Cout of a group, Cin of all].
        """
        if role == "filter":
            return (*self.kernel, self.cout // self.groups, self.cin)
        spatial, channels = (self.input, self.cin) if role == "coarse" else (self.output, self.cout)
        return (self.batch, *spatial, channels) if layout == "NDHWC" else (self.batch, channels, *spatial)

    def result_shape(self, layout: str = "NDHWC") -> Sizes:
        """The result's shape in a layout."""
        return self.shape(self.roles[2], layout)

    def flops(self, complex_: bool = False) -> int:
        """2*N*D*H*W*Cin*Cout*kd*kh*kw/groups, the input's sizes, cropped products counted; complex ones four times."""
        return 2 * self.rows * self.cin * self.cout // self.groups * self.taps * (4 if complex_ else 1)

    def bytes(self, itemsize: int = 4) -> int:
        """Bytes of both operands and the result, each once."""
        return sum(math.prod(self.shape(role)) for role in self.roles) * itemsize

    def volume(self) -> Layer:
        """The same with three axes: a plane as a volume of depth 1."""
        names = ("input", "kernel", "strides", "dilations", "output")
        lacking = (1,) * (3 - self.rank)
        return dataclasses.replace(self, **{name: lacking + getattr(self, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Layer:
        """The layer that `to_dict` described, also after a way through JSON."""
        given: dict[str, Any] = dict(fields)
        given |= {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        given["sweep"] = tuple((axis, size) for axis, size in given["sweep"])
        return cls(**given)


def make(
    name: str,
    batch: int,
    input: Any,
    cin: int,
    cout: int,
    kernel: Any,
    strides: Any = 1,
    dilations: Any = 1,
    output: Any = None,
    padding: str = "SAME",
    source: str = "",
    sweep: tuple[tuple[str, int], ...] = (),
    groups: int = 1,
) -> Layer:
    """A layer from sizes as the files write them: lists, or one number for all axes, three if there is no list.

    Without `output`, a list, it is the one that TensorFlow's Keras infers.
    """
    given = (input, kernel, strides, dilations)
    rank = next((len(size) for size in given if isinstance(size, list)), 3)
    n, k, s, d = (tuple(size) if isinstance(size, list) else (size,) * rank for size in given)
    if output is None:
        spans = [(kernel - 1) * dilation + 1 for kernel, dilation in zip(k, d, strict=True)]
        output = [
            size * step if padding == "SAME" else (size - 1) * step + max(step, span)
            for size, step, span in zip(n, s, spans, strict=True)
        ]
    return Layer(name, batch, cin, cout, n, k, s, d, tuple(output), padding, source, sweep, groups)


def from_file(suite: str) -> list[Layer]:
    """Layers from workloads.json, which names their sources."""
    return [make(**fields) for fields in json.loads(Path(__file__).with_name("workloads.json").read_text())[suite]]


SWEEPS: dict[str, tuple[int, ...]] = {
    "space": (4, 8, 12, 16, 24, 32, 48),
    "channels": (4, 8, 16, 32, 64, 128, 256),
    "kernel": (1, 2, 3, 4, 5, 7),
    "stride": (1, 2, 3, 4),
    "dilation": (1, 2, 3, 4),
    "batch": (1, 2, 4, 8),
}
SWEEP_BASE = {"space": 16, "channels": 64, "kernel": 3, "stride": 2, "dilation": 1, "batch": 1}


def sweep() -> list[Layer]:
    """One layer, and what becomes of it as each of its sizes is changed alone; the first is the one in common."""

    def at(name: str, place: tuple[tuple[str, int], ...], **changed: int) -> Layer:
        size = SWEEP_BASE | changed
        channels = size["channels"]
        return make(
            name, size["batch"], size["space"], channels, channels, size["kernel"], size["stride"], size["dilation"],
            source="synthetic", sweep=place,
        )  # fmt: skip

    found = [at("base", tuple(SWEEP_BASE.items()))]
    for axis, sizes in SWEEPS.items():
        found += [at(f"{axis}_{n}", ((axis, n),), **{axis: n}) for n in sizes if n != SWEEP_BASE[axis]]
    return found


def tiny() -> list[Layer]:
    """Layers of microseconds, where the cost of a call is what is measured; every feature is in one of them."""
    return [
        make("tiny_k3s2", 1, 2, 16, 16, 3, 2, source="synthetic"),
        make("tiny_k2s2", 2, 4, 8, 4, 2, 2, source="synthetic"),
        make("tiny_odd", 1, [3, 4, 5], 5, 3, [3, 2, 4], [2, 1, 3], output=[5, 4, 14], source="synthetic"),
        make("tiny_gaps", 1, 3, 4, 8, 2, 3, output=[9, 8, 7], source="synthetic"),
        make("tiny_dilated", 1, 4, 8, 8, 3, [1, 2, 2], 2, padding="VALID", source="synthetic"),
        make("tiny_line", 1, [1, 1, 64], 8, 8, [1, 1, 3], [1, 1, 2], source="synthetic"),
    ]


def extremes() -> list[Layer]:
    """Layers beyond the models', where a careless engine needs the most memory."""
    line, plane, million = [1, 1, 3], [1, 4, 4], 1_000_000
    return [
        make("line_1e6", 1, [1, 1, million], 16, 16, line, [1, 1, 2], source="1-D, a million samples"),
        make("depth_1e6", 1, [million, 1, 1], 16, 16, line[::-1], [2, 1, 1], source="1-D along depth"),
        make("plane_1024", 1, [1, 1024, 1024], 8, 8, plane, [1, 2, 2], source="a plane"),
        make("plane_1024_1", 1, [1, 1024, 1024], 8, 1, plane, [1, 2, 2], source="a plane, one output channel"),
        make("filter_64MiB", 1, 2, 512, 512, 4, 2, source="a filter larger than its operands"),
    ]


# What layers are drawn from: kernels and strides of decoders, channels, and limits of FLOPs and of an output's values.
KINDS: tuple[tuple[Sizes, Sizes], ...] = (
    ((2, 2, 2), (2, 2, 2)), ((4, 4, 4), (2, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((3, 3, 3), (1, 1, 1)),
    ((1, 2, 2), (1, 2, 2)), ((1, 3, 3), (1, 2, 2)), ((1, 4, 4), (1, 2, 2)), ((3, 3, 3), (1, 2, 2)),
    ((5, 5, 5), (2, 2, 2)), ((6, 4, 4), (2, 2, 2)), ((3, 1, 1), (1, 1, 1)), ((1, 3, 3), (1, 1, 1)),
    ((4, 4, 4), (4, 4, 4)),
)  # fmt: skip
DRAWN, DRAWN_FROM = 24, 20_261_128
CHANNELS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512)
DRAWN_FLOPS, DRAWN_OUTPUT = (50_000_000, 5_000_000_000), 10_000_000


def drawn() -> list[Layer]:
    """Layers that nobody chose, the same each time: what a plan takes that was made with the models in view."""
    found: list[Layer] = []
    draw = random.Random(DRAWN_FROM)
    while len(found) < DRAWN:
        kernel, strides = map(list, draw.choice(KINDS))
        batch, cin, cout = draw.choice((1, 1, 1, 2, 4)), draw.choice(CHANNELS), draw.choice((1, 3, *CHANNELS))
        height = draw.randint(4, 36)
        sizes = [draw.choice((2, 4, 5, 7, 8, 10, 12, 16, 20, 24, 32)), height, height + draw.choice((0, 0, 1, 4))]
        dilations = 2 if max(strides) == 1 and draw.random() < 0.25 else 1
        padding, name = draw.choice(("SAME", "SAME", "VALID")), f"drawn_{len(found)}"
        layer = make(name, batch, sizes, cin, cout, kernel, strides, dilations, padding=padding, source="drawn")
        small = math.prod(layer.result_shape()) <= DRAWN_OUTPUT
        if small and DRAWN_FLOPS[0] <= layer.flops() <= DRAWN_FLOPS[1]:
            found.append(layer)
    return found


SUITES: dict[str, Callable[[], list[Layer]]] = {
    "models": partial(from_file, "layers"),
    "planes": partial(from_file, "planes"),
    "groups": partial(from_file, "groups"),
    "sweep": sweep,
    "drawn": drawn,
    "tiny": tiny,
    "extremes": extremes,
}


def suite(name: str, op: str = TRANSPOSE) -> list[Layer]:
    """The layers of a suite, for an operation."""
    return [dataclasses.replace(layer, op=op) for layer in SUITES[name]()]
