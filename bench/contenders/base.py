"""What a contender is: something that offers one or more ways to call itself on a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench.layers import Layer
from bench.reference import Array


class Unsupported(Exception):  # noqa: N818 - not an error of anyone
    """A contender cannot do what was asked, by its documentation: said in the results, not counted as a failure."""


@dataclass(frozen=True)
class Job:
    """What one contender computes: operands in the posed `layout`, and how it may be called.

    With `end_to_end`, calls take these operands and give an array in `layout`; without it, a contender may convert
    both, outside of the timing, to what it likes best.
    """

    layer: Layer
    value: Array
    filter: Array
    dtype: str
    layout: str
    workers: int
    end_to_end: bool = False


@dataclass(frozen=True)
class Call:
    """One way to compute a layer.

    `run` is what is timed, `result` makes an array in the posed layout of what it returned, outside of the timing.
    `run_into`, where there is one, writes into an array of the shape of `out_shape`, so that no page is fresh.
    """

    layout: str
    run: Callable[[], Any]
    result: Callable[[Any], Array]
    run_into: Callable[[Array], Any] | None = None
    out_shape: tuple[int, ...] = ()
    note: str = ""


class Contender(Protocol):
    """Loaded once in a process of its own; makes calls for one layer after the other."""

    versions: dict[str, str]

    def calls(self, job: Job) -> Sequence[Call]:
        """The ways to compute a layer, of which the fastest is measured; raises Unsupported where there is none."""


def posed(job: Job, result: Array, layout: str) -> Array:
    """An array in one layout, in the one that the problem was posed in."""
    return relaid(result, layout, job.layout)


def relaid(array: Array, have: str, want: str) -> Array:
    """A view of an array in another layout."""
    if have == want:
        return array
    import numpy as np

    return np.moveaxis(array, -1, 1) if want == "NCDHW" else np.moveaxis(array, 1, -1)


def packed(array: Array) -> Array:
    """A C-contiguous array of the same numbers: the array itself if it is one."""
    import numpy as np

    return np.ascontiguousarray(array)


def only_float32(job: Job, *others: str) -> None:
    """Raise Unsupported for a dtype that a contender has not."""
    allowed = ("float32", *others)
    if job.dtype not in allowed:
        raise Unsupported(f"{job.dtype} is not measured here, only {', '.join(allowed)}")
