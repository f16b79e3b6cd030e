"""The problems that are measured: their geometry, worked out here from TensorFlow's rules, and the suites of them.

Nothing is taken from gemmconv, so that a mistake of the package cannot hide in what it is measured by.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Three = tuple[int, int, int]
SUITES = ("models", "sweep", "tiny", "extremes")
LAYOUTS = ("NDHWC", "NCDHW")


@dataclass(frozen=True)
class Layer:
    """One transposed convolution; triples are depth, height, width.

    `output` is always explicit. `sweep` says where the layer stands in the sweep suite, as pairs of an axis and a size.
    """

    name: str
    batch: int
    cin: int
    cout: int
    input: Three
    kernel: Three
    strides: Three
    dilations: Three
    output: Three
    padding: str = "SAME"
    source: str = ""
    sweep: tuple[tuple[str, int], ...] = ()

    @property
    def spans(self) -> Three:
        """Output cells from the first tap to the last, K, on each axis."""
        d, h, w = ((k - 1) * step + 1 for k, step in zip(self.kernel, self.dilations, strict=True))
        return d, h, w

    @property
    def before(self) -> Three:
        """Cells cut off in front of each axis: the smaller half of what SAME cuts, 0 for VALID."""
        if self.padding == "VALID":
            return 0, 0, 0
        d, h, w = (max(0, full - o) // 2 for full, o in zip(self.full, self.output, strict=True))
        return d, h, w

    @property
    def full(self) -> Three:
        """Cells of each axis before anything is cut: (n-1)*s + K."""
        d, h, w = ((n - 1) * s + k for n, s, k in zip(self.input, self.strides, self.spans, strict=True))
        return d, h, w

    @property
    def behind(self) -> Three:
        """Cells cut off behind each axis; negative where the output has cells that no tap reaches."""
        d, h, w = (f - lo - o for f, lo, o in zip(self.full, self.before, self.output, strict=True))
        return d, h, w

    @property
    def taps(self) -> int:
        """Taps of the filter, kd*kh*kw."""
        return math.prod(self.kernel)

    @property
    def rows(self) -> int:
        """Input positions, N*D*H*W."""
        return self.batch * math.prod(self.input)

    @property
    def filter_shape(self) -> tuple[int, ...]:
        """TensorFlow's: [kd, kh, kw, Cout, Cin], in both layouts."""
        return (*self.kernel, self.cout, self.cin)

    def value_shape(self, layout: str = "NDHWC") -> tuple[int, ...]:
        """The input's shape in a layout."""
        return in_layout(layout, self.batch, self.input, self.cin)

    def output_shape(self, layout: str = "NDHWC") -> tuple[int, ...]:
        """The result's shape in a layout."""
        return in_layout(layout, self.batch, self.output, self.cout)

    def flops(self, complex_: bool = False) -> int:
        """2*N*D*H*W*Cin*Cout*kd*kh*kw with the input's sizes, cropped products counted; complex ones four times."""
        return 2 * self.rows * self.cin * self.cout * self.taps * (4 if complex_ else 1)

    def bytes(self, itemsize: int = 4) -> int:
        """Bytes of value, filter and result, each once."""
        shapes = self.value_shape(), self.filter_shape, self.output_shape()
        return sum(map(math.prod, shapes)) * itemsize

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


def in_layout(layout: str, batch: int, spatial: Sequence[int], channels: int) -> tuple[int, ...]:
    """Batch, three spatial sizes and channels in the layout's order."""
    return (batch, *spatial, channels) if layout == "NDHWC" else (batch, channels, *spatial)


def three(size: Any) -> Three:
    """One size for all axes, or one for each."""
    d, h, w = size if isinstance(size, list | tuple) else (size,) * 3
    return d, h, w


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
) -> Layer:
    """A layer from sizes as the files write them; without `output`, the one TensorFlow's Keras infers."""
    n, k, s, d = map(three, (input, kernel, strides, dilations))
    if output is None:
        spans = [(kernel - 1) * dilation + 1 for kernel, dilation in zip(k, d, strict=True)]
        output = [
            size * step if padding == "SAME" else (size - 1) * step + max(step, span)
            for size, step, span in zip(n, s, spans, strict=True)
        ]
    return Layer(name, batch, cin, cout, n, k, s, d, three(output), padding, source, sweep)


def suite(name: str) -> list[Layer]:
    """The layers of a suite, by name."""
    return {"models": models, "sweep": sweep, "tiny": tiny, "extremes": extremes}[name]()


def models() -> list[Layer]:
    """Layers of public models, from workloads.json, which names their sources."""
    return [make(**fields) for fields in json.loads(Path(__file__).with_name("workloads.json").read_text())["layers"]]


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
