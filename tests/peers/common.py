"""What the peer scripts share: random problems, the comparison with gemmconv, and the report.

A peer script draws problems here, computes each with the peer and hands the result over; gemmconv's own result is
compared with it. The rules of sizes and offsets are written out again from TensorFlow's, not taken from gemmconv.
The scripts run in processes of their own, so this module imports no peer, and gemmconv only to call it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# Largest difference allowed on normal data, as a part of the largest output. The float32 bound leaves room for the
# summation order of both sides at 1728 products a cell; the half precisions differ by one unit in the last place.
BOUNDS = {
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float32": 2e-6,
    "float64": 4e-15,
    "complex64": 2e-6,
    "complex128": 4e-15,
}
LARGEST_INTEGER = 8
LAYER_EVERY = 8  # one problem in 8 has the channels and the space of a small real layer
EMPTY_EVERY = 16  # and one in 16, where the peer may see such, has an axis of size 0
LAYER_PRODUCTS = 60_000_000
MANY = 100  # problems that have every feature among them
SHOWN = 5  # disagreements printed in full


class Axis(NamedTuple):
    """One of D, H, W: input size, kernel, stride, dilation and output size."""

    n: int
    k: int
    s: int
    d: int
    o: int

    @property
    def span(self) -> int:
        """Output cells from a filter's first tap to its last, both included."""
        return max(0, (self.k - 1) * self.d + 1)

    def pad_front(self, padding: str) -> int:
        """Cells cut in front: the smaller half of what SAME cuts."""
        return self.total_cut(padding) // 2

    def total_cut(self, padding: str) -> int:
        """Cells cut in front and behind together."""
        return max(0, (self.n - 1) * self.s + self.span - self.o) if padding == "SAME" else 0

    @property
    def full(self) -> int:
        """Cells from the first that a tap reaches to the last, before anything is cut."""
        return (self.n - 1) * self.s + self.span


def reachable(padding: str, n: int, k: int, s: int, d: int) -> range:
    """Every output size an axis can have."""
    span = max(0, (k - 1) * d + 1)
    if n == 0:
        return range(1 if padding == "SAME" else max(0, span - 1) + 1)
    first = (n - 1) * s + (1 if padding == "SAME" else span)
    return range(first, first + s)


def every_axis(padding: str, dilations: Sequence[int]) -> list[Axis]:
    """All small axes, with every reachable output size of each; k < s is among them."""
    return [
        Axis(n, k, s, d, o)
        for n, k, s, d in itertools.product((1, 2, 3), (1, 2, 3, 5), (1, 2, 3, 4), dilations)
        for o in reachable(padding, n, k, s, d)
    ]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, without its arrays; `seed` and `index` find it again."""

    seed: int
    index: int
    kind: str
    padding: str
    data_format: str
    batch: int
    cin: int
    cout: int
    axes: tuple[Axis, Axis, Axis]
    data: str
    dtype: str
    algorithm: str
    workers: int | None
    given_out: bool

    @property
    def strides(self) -> list[int]:
        """Of D, H, W."""
        return [axis.s for axis in self.axes]

    @property
    def dilations(self) -> list[int]:
        """Of D, H, W."""
        return [axis.d for axis in self.axes]

    @property
    def output_sizes(self) -> list[int]:
        """Of D, H, W."""
        return [axis.o for axis in self.axes]

    @property
    def is_empty(self) -> bool:
        """Whether any size but an output's is 0."""
        return 0 in (self.batch, self.cin, self.cout, *(axis.n for axis in self.axes), *(a.k for a in self.axes))

    @property
    def features(self) -> list[str]:
        """What the report counts of this problem."""
        found = {
            self.padding: True,
            self.data_format: True,
            self.kind: True,
            self.data: True,
            self.dtype: True,
            "strided": max(self.strides) > 1,
            "dilated": max(self.dilations) > 1,
            "dilated and strided": max(self.dilations) > 1 and max(self.strides) > 1,
            "k < s": any(axis.k < axis.s for axis in self.axes),
            "unlike axes": len(set(self.axes)) > 1,
        }
        return [name for name, holds in found.items() if holds]

    def shape(self, sizes: Sequence[int], channels: int) -> list[int]:
        """A 5-vector in this problem's layout."""
        if self.data_format == "NCDHW":
            return [self.batch, channels, *sizes]
        return [self.batch, *sizes, channels]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The value as NDHWC and the filter as TensorFlow has it, read-only."""
        rng = np.random.default_rng([self.seed, self.index, 1])
        dtype = named_dtype(self.dtype)
        value = draw(rng, [self.batch, *(axis.n for axis in self.axes), self.cin], self.data, dtype)
        weights = draw(rng, [*(axis.k for axis in self.axes), self.cout, self.cin], self.data, dtype)
        value.flags.writeable = weights.flags.writeable = False
        return value, weights

    def arguments(self, value: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
        """TensorFlow's arguments, strides and dilations spelled in one of the ways that mean the same."""
        rng = np.random.default_rng([self.seed, self.index, 2])
        if self.data_format == "NCDHW":
            value = np.moveaxis(value, -1, 1)
        if rng.integers(2):
            value = np.ascontiguousarray(value)
        output_shape: Any = self.shape(self.output_sizes, self.cout)
        spelled_as = rng.integers(3)
        if spelled_as:
            output_shape = np.array(output_shape, (np.int32, np.int64)[spelled_as - 1])
        return {
            "value": value,
            "filter": weights,
            "output_shape": output_shape,
            "strides": self._spelled(self.strides, rng),
            "padding": self.padding,
            "data_format": self.data_format,
            "dilations": self._spelled(self.dilations, rng),
        }

    def _spelled(self, three: list[int], rng: np.random.Generator) -> int | list[int] | None:
        five = [1, 1, *three] if self.data_format == "NCDHW" else [1, *three, 1]
        spellings: list[int | list[int] | None] = [three, five]
        if len(set(three)) == 1:
            spellings += [three[0], three[:1]]
            if three[0] == 1:
                spellings.append(None)
        return spellings[rng.integers(len(spellings))]

    def result_of_gemmconv(self, value: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The answer of gemmconv, as NDHWC."""
        import gemmconv

        out = None
        if self.given_out:
            out = np.full(self.shape(self.output_sizes, self.cout), np.nan, value.dtype)
        result = gemmconv.conv3d_transpose(
            **self.arguments(value, weights), out=out, algorithm=self.algorithm, workers=self.workers
        )
        if out is not None and result is not out:
            raise AssertionError("the result is not the array given as out")
        return np.moveaxis(result, 1, -1) if self.data_format == "NCDHW" else result


def named_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def draw(rng: np.random.Generator, shape: Sequence[int], data: str, dtype: np.dtype) -> np.ndarray:
    """Integers whose sums are exact in float32 whatever their order, or normal values."""

    def real() -> np.ndarray:
        if data == "integers":
            return rng.integers(-LARGEST_INTEGER, LARGEST_INTEGER + 1, shape).astype(np.float64)
        return rng.standard_normal(shape)

    return (real() + 1j * real() if dtype.kind == "c" else real()).astype(dtype)


@functools.cache
def _decks(seed: int) -> list[tuple[str, list[Axis]]]:
    """Four shuffled decks: SAME and VALID, without and with dilation."""
    rng = np.random.default_rng([seed])
    decks = []
    for dilations, padding in itertools.product(((1,), (1, 2, 3)), ("SAME", "VALID")):
        cards = every_axis(padding, dilations)
        decks.append((padding, [cards[i] for i in rng.permutation(len(cards))]))
    return decks


def make_problem(
    seed: int, index: int, dtypes: Sequence[str] = ("float32",), empties: bool = False, algorithm: str | None = None
) -> Problem:
    """The problem of this number. Small axes are dealt from the decks: every card once before one comes twice."""
    rng = np.random.default_rng([seed, index])
    kind, place = _kind_and_place(index, empties)
    decks = _decks(seed)
    padding, cards = decks[place % len(decks)]
    hand = 3 * (place // len(decks))
    axes = [cards[(hand + i) % len(cards)] for i in range(3)]
    batch, cin, cout = (int(rng.integers(1, top)) for top in (4, 7, 7))
    if kind == "layer":
        padding = ("SAME", "VALID")[rng.integers(2)]
        batch, cin, cout, axes = _layer(padding, rng)
    elif kind == "empty":
        padding, cards = decks[rng.integers(len(decks))]
        axes = [cards[i] for i in rng.integers(len(cards), size=3)]
        what = rng.integers(5)
        batch, cin, cout = (0 if what == i else size for i, size in enumerate((batch, cin, cout)))
        if what >= 3:
            which = rng.integers(3)
            axis = axes[which]._replace(**{"n" if what == 3 else "k": 0})
            sizes = reachable(padding, axis.n, axis.k, axis.s, axis.d)
            axes[which] = axis._replace(o=int(rng.choice(sizes)))
    return Problem(
        seed=seed,
        index=index,
        kind=kind,
        padding=padding,
        data_format=("NDHWC", "NCDHW")[rng.integers(2)],
        batch=batch,
        cin=cin,
        cout=cout,
        axes=(axes[0], axes[1], axes[2]),
        data=("integers", "normal")[rng.integers(2)],
        dtype=dtypes[rng.integers(len(dtypes))],
        algorithm=algorithm or ("auto", "auto", "auto", "col2im")[rng.integers(4)],
        workers=(None, 1, 2)[rng.integers(3)],
        given_out=bool(rng.integers(4) == 0),
    )


def _kind_and_place(index: int, empties: bool) -> tuple[str, int]:
    """Whether a problem is small, a layer or empty, and how many small ones come before it."""
    layers = (index + 1) // LAYER_EVERY
    empty = (index + EMPTY_EVERY - 3) // EMPTY_EVERY if empties else 0
    if index % LAYER_EVERY == LAYER_EVERY - 1:
        return "layer", index - layers - empty + 1
    if empties and index % EMPTY_EVERY == 3:
        return "empty", index - layers - empty
    return "small", index - layers - empty


def _layer(padding: str, rng: np.random.Generator) -> tuple[int, int, int, list[Axis]]:
    """Channels and sizes of a small real layer, few enough products to take milliseconds."""
    while True:
        batch = int(rng.integers(1, 3))
        cin, cout = (int(rng.choice((1, 3, 16, 32, 64, 128))) for _ in range(2))
        axes = []
        for _ in range(3):
            n, k, s = int(rng.integers(2, 17)), int(rng.integers(1, 6)), int(rng.integers(1, 4))
            d = int(rng.choice((1, 1, 1, 2)))
            axes.append(Axis(n, k, s, d, int(rng.choice(reachable(padding, n, k, s, d)))))
        products = batch * cin * cout * np.prod([axis.n * axis.k for axis in axes])
        if products <= LAYER_PRODUCTS:
            return batch, cin, cout, axes


def difference(got: np.ndarray, expected: np.ndarray, exact: bool, bound: float) -> tuple[str | None, float]:
    """What is wrong with `got`, or None, and the largest difference as a part of the largest expected value."""
    if not isinstance(got, np.ndarray):
        return f"the result is a {type(got).__name__}, not an ndarray", 0.0
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return f"the result is {got.dtype} {got.shape}, the peer's {expected.dtype} {expected.shape}", 0.0
    if got.size == 0:
        return None, 0.0
    wide = np.complex128 if got.dtype.kind == "c" else np.float64
    got, expected = got.astype(wide), expected.astype(wide)
    parts = (got.real, got.imag) if got.dtype.kind == "c" else (got,)
    if any(np.signbit(part[part == 0]).any() for part in parts):
        return "a zero of the result is -0.0", 0.0
    same = got == expected
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(got - expected))
    where = tuple(int(i) for i in np.unravel_index(np.argmax(np.nan_to_num(gap, nan=np.inf)), gap.shape))
    place = f"{(~same).sum()} of {same.size} cells differ, most at {where}: {got[where]} for {expected[where]}"
    if exact:
        return (None if same.all() else f"integer data: {place}"), 0.0
    part = float(gap.max() / max(np.abs(expected).max(), np.finfo(np.float64).tiny))
    if part <= bound:
        return None, part
    return f"normal data: {part:.2e} of the largest output, bound {bound:.0e}: {place}", part


class Report:
    """Counts what was compared and refused; its last line is JSON."""

    def __init__(self, peer: str, version: str) -> None:
        """Start with nothing compared."""
        self.peer = peer
        self.version = version
        self.compared = 0
        self.refused: collections.Counter[str] = collections.Counter()
        self.features: collections.Counter[str] = collections.Counter()
        self.worst: dict[str, float] = {}
        self.disagreements: list[str] = []
        self.more: dict[str, Any] = {}

    def check(
        self,
        problem: Problem,
        compute: Callable[[Problem, np.ndarray, np.ndarray], np.ndarray],
        errors: tuple[type[Exception], ...],
        explain: Callable[[Problem, str], str | None],
    ) -> None:
        """Compare one problem. `explain` gives the reason of a refusal the peer is known for, of its message."""
        value, weights = problem.arrays()
        try:
            expected = compute(problem, value, weights)
        except errors as error:
            reason = explain(problem, str(error))
            if reason is not None:
                self.refused[reason] += 1
            else:
                self.disagreements.append(f"{self.peer} refuses: {str(error)[:400]}; {problem}")
            return
        try:
            got = problem.result_of_gemmconv(value, weights)
        except (AssertionError, TypeError, ValueError) as error:
            self.disagreements.append(f"gemmconv refuses: {error}; {problem}")
            return
        wrong, part = difference(got, expected, problem.data == "integers", BOUNDS[problem.dtype])
        if wrong:
            self.disagreements.append(f"{wrong}; {_stability(problem, got, expected, compute)}; {problem}")
        self.compared += 1
        self.features.update(problem.features)
        self.worst[problem.dtype] = max(part, self.worst.get(problem.dtype, 0.0))

    def require(self, holds: bool, sentence: str) -> None:
        """Note a disagreement that is not one of numbers."""
        if not holds:
            self.disagreements.append(sentence)

    def finish(self, minimum: int, features: Sequence[str] = ()) -> int:
        """Print the report; 0 if all agree, at least `minimum` were compared, and each feature among them."""
        if self.compared < minimum:
            self.disagreements.append(f"only {self.compared} problems were compared, at least {minimum} are expected")
        for feature in features:
            self.require(self.features[feature] > 0, f"no problem compared has the feature {feature!r}")
        for line in self.disagreements[:SHOWN]:
            print(f"{self.peer}: {line}", file=sys.stderr)
        print(
            json.dumps(
                {
                    "peer": self.peer,
                    "version": self.version,
                    "compared": self.compared,
                    "minimum": minimum,
                    "refused": dict(self.refused),
                    "features": dict(self.features),
                    "worst": self.worst,
                    "disagreements": len(self.disagreements),
                    **self.more,
                }
            )
        )
        return 1 if self.disagreements else 0


def finish_problems(report: Report, arguments: Any, share: float, features: Sequence[str]) -> int:
    """Finish a command line: the least share to be compared, and the features if the problems are many."""
    if arguments.only is not None:
        return report.finish(minimum=0)
    return report.finish(int(share * arguments.problems), features if arguments.problems >= MANY else ())


def _stability(
    problem: Problem,
    got: np.ndarray,
    expected: np.ndarray,
    compute: Callable[[Problem, np.ndarray, np.ndarray], np.ndarray],
) -> str:
    """Which side gives another result when asked again: a difference that comes and goes has its cause there."""
    value, weights = problem.arrays()
    pairs = {"the peer": (expected, compute(problem, value, weights))}
    pairs["gemmconv"] = (got, problem.result_of_gemmconv(value, weights))
    moved = [name for name, (first, again) in pairs.items() if np.asarray(first).tobytes() != again.tobytes()]
    return f"computed again, {' and '.join(moved) or 'neither'} changes"


def parse_arguments(description: str | None, problems: int, argv: Sequence[str] | None = None, **more: Any) -> Any:
    """The command line every script has; `more` maps an option's name to what argparse is told of it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--problems", type=int, default=problems, help="how many random problems (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the problems (%(default)s)")
    parser.add_argument("--only", type=int, help="just the problem of this index")
    parser.add_argument("--algorithm", help="force one of gemmconv's lowerings")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args(argv)


def draw_problems(arguments: Any, dtypes: Sequence[str], empties: bool = False) -> Iterator[Problem]:
    """The problems a command line asks for."""
    indices = range(arguments.problems) if arguments.only is None else [arguments.only]
    for index in indices:
        yield make_problem(arguments.seed, index, dtypes, empties, arguments.algorithm)
