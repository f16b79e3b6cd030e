"""The measurement: for each number of workers a process a contender, for each layer a check and then rounds.

Rounds go A B C A B C, with every process stopped but the one that is timed. All of it is repeated in a few launches,
since a process differs from another of the same contender by where its memory happens to lie. How many rounds and how
many calls a visit has is decided from the first warm calls and the time there is, never from what the rounds give:
stopping when an interval looks good makes it look too good. Nothing here prints.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.contenders import Spec, parse
from bench.layers import TRANSPOSE, Layer
from bench.process import Lost, Member, Process
from bench.reference import BOUNDS

Row = dict[str, Any]
Tell = Callable[[str], None]
MOST_CALLS = 200
ROOF_VISITS = 3
MOST_LOSSES = 2  # in a row, after which a contender is not started again


@dataclass(frozen=True)
class Options:
    """What is measured, and how long that may take."""

    suite: str
    layers: Sequence[Layer]
    subject: Spec
    against: Sequence[Spec]
    workers: Sequence[int]
    op: str = TRANSPOSE
    dtype: str = "float32"
    layout: str = "NDHWC"
    end_to_end: bool = False
    seed: int = 0
    launches: int = 3
    rounds: int | None = None  # of one launch; None takes as many of the next two as the budget allows
    fewest_rounds: int = 2
    most_rounds: int = 7
    budget_s: float = 600.0
    visit_s: float = 0.06
    warm_s: float = 0.08  # a CPU's memory side takes so long to wake: see docs/benchmarks.md
    timeout_s: float = 60.0
    confidence: float = 0.95
    keep_env: bool = False

    @property
    def contenders(self) -> list[Spec]:
        """The subject first, then those it is measured against, then the roof."""
        return [self.subject, *self.against, parse("sgemm")]


@dataclass
class Seat:
    """A contender's place among those of one number of workers: its process, or why it has none."""

    spec: Spec
    workers: int
    keep_env: bool
    op: str = TRANSPOSE
    process: Member | None = None
    losses: int = 0
    status: str = "ok"
    detail: str = ""
    hello: dict[str, Any] = field(default_factory=dict)

    def sit(self) -> bool:
        """Have a process, started anew if the last one was lost; False if there is none."""
        if self.process is not None or self.status == "missing":
            return self.process is not None
        if self.losses >= MOST_LOSSES:
            self.status = "given up"
            return False
        try:
            if reason := self.spec.missing(self.op):
                self.status, self.detail = "missing", reason
                return False
            started = Member(self.spec, self.workers, self.keep_env)
        except Lost as loss:
            self._lose(loss)
            return False
        if started.hello["status"] != "ok":
            self.status, self.detail = "raised", self.spec.without_path(started.hello["detail"])
            self.losses = MOST_LOSSES
            started.close()
            return False
        self.hello = started.hello | {"start_seconds": started.start_seconds}
        self.process = started
        return True

    def ask(self, do: str, timeout_s: float, **arguments: Any) -> Row:
        """Ask with all others stopped; a loss is an answer too."""
        if self.process is None:
            return {"status": self.status, "detail": self.detail}
        try:
            answer = self.process.ask(do, timeout_s, **arguments)
        except Lost as loss:
            self._lose(loss)
            return {"status": loss.status, "detail": self.detail}
        self.process.stop()
        return answer | {"detail": self.spec.without_path(answer["detail"])} if "detail" in answer else answer

    def _lose(self, loss: Lost) -> None:
        self.process = None
        self.losses += 1
        self.detail = self.spec.without_path(loss.detail)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.close()
            self.process = None

    def describe(self) -> Row:
        """What is said of the contender as a whole."""
        facts: Row = {"name": self.spec.name, "spec": self.spec.text, "workers": self.workers, "status": self.status}
        facts["detail"] = self.detail
        return facts | {key: self.hello.get(key) for key in ("versions", "pools", "cpus", "start_seconds")}


def measure(options: Options, tell: Tell) -> tuple[list[Row], list[Row]]:
    """Return what is said of the contenders, and a row for each of them, layer and number of workers."""
    deadline = time.monotonic() + options.budget_s
    contenders: list[Row] = []
    rows: dict[tuple[int, str, str], Row] = {}
    todo = [(n, layer) for n in options.workers for _ in range(options.launches) for layer in options.layers]
    weights = _weights(todo)
    with tempfile.TemporaryDirectory(prefix="gemmconv-bench-") as folder:
        references = References(Path(folder), options)
        try:
            for workers in options.workers:
                seats = [Seat(spec, workers, options.keep_env, options.op) for spec in options.contenders]
                try:
                    for launch in range(options.launches):
                        where = f"{workers} worker(s), launch {launch + 1} of {options.launches}"
                        for seat in seats:
                            tell(f"{where}: starting {seat.spec.name}")
                            seat.sit()
                        for layer in options.layers:
                            tell(f"{where}: {layer.name}")
                            budget_s = (deadline - time.monotonic()) * weights[0] / sum(weights)
                            del weights[0]
                            measure_layer(layer, launch, seats, rows, references, options, budget_s)
                        for seat in seats:
                            seat.close()
                finally:
                    for seat in seats:
                        seat.close()
                contenders += [seat.describe() for seat in seats if seat.spec.kind != "sgemm"]
        finally:
            references.close()
    return contenders, list(rows.values())


def _weights(todo: Sequence[tuple[int, Layer]]) -> list[float]:
    """The parts of the time that layers get: half of it in equal shares, half by their work."""
    works = [layer.flops() / workers + 1e7 for workers, layer in todo]
    return [0.5 / len(todo) + 0.5 * work / sum(works) for work in works]


class References:
    """The float64 results, computed once in a process that is stopped otherwise, in files that workers map."""

    def __init__(self, folder: Path, options: Options) -> None:
        self._folder = folder
        self._options = options
        self._process: Process | None = None
        self._found: dict[str, tuple[str, float]] = {}

    def of(self, layer: Layer) -> tuple[str, float]:
        """The file of a layer's result, and its largest magnitude."""
        if layer.name not in self._found:
            if self._process is None:
                self._process = Process(max(self._options.workers), self._options.keep_env)
            path = str(self._folder / f"{len(self._found)}.npy")
            answer = self._process.ask(
                "reference", 600, layer=layer.to_dict(), dtype=self._options.dtype, seed=self._options.seed, path=path
            )
            self._process.stop()
            if answer["status"] != "ok":
                raise RuntimeError(f"the reference of {layer.name} could not be computed: {answer['detail']}")
            self._found[layer.name] = path, answer["largest"]
        return self._found[layer.name]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()


def measure_layer(
    layer: Layer,
    launch: int,
    seats: Sequence[Seat],
    rows: dict[tuple[int, str, str], Row],
    references: References,
    options: Options,
    budget_s: float,
) -> None:
    """Check all contenders on a layer, then time those that are right, in rounds, and the roof after them."""
    start = time.monotonic()
    path, largest = references.of(layer)
    running: list[tuple[Seat, Row]] = []
    roof: tuple[Seat, Row] | None = None
    for seat in seats:
        seat.sit()
        if seat.status == "missing":
            continue
        fresh: Row = {"layer": layer.name, "contender": seat.spec.name, "workers": seat.workers, "status": "ok"}
        row = rows.setdefault((seat.workers, layer.name, seat.spec.name), fresh)
        if row["status"] != "ok":  # in an earlier launch
            continue
        is_roof = seat.spec.kind == "sgemm"
        error = row.get("error")
        row |= seat.ask(
            "prepare",
            options.timeout_s,
            layer=layer.to_dict(),
            dtype=options.dtype,
            layout=options.layout,
            end_to_end=options.end_to_end,
            seed=options.seed,
            reference=None if is_roof else path,
            largest=largest,
            choice=row.get("choice"),
        )
        if error is not None and row.get("error") is not None:
            row["error"] = max(error, row["error"])
        row.setdefault("visits_seconds", [])
        row.setdefault("launch_of_visit", [])
        if row["status"] == "ok":
            # As many calls a visit in every launch.
            row.setdefault("calls", max(1, min(MOST_CALLS, round(options.visit_s / row["seconds"]))))
            if is_roof:
                roof = seat, row
            else:
                running.append((seat, row))
    for _ in range(_rounds(options, running, budget_s - (time.monotonic() - start))):
        for seat, row in running:
            _visit(seat, row, launch, options)
    # Not among the others: after sgemm, which leaves memory alone, the next contender's first 0.1 s are slower.
    for _ in range(ROOF_VISITS if roof is not None else 0):
        assert roof is not None
        _visit(*roof, launch, options)
    for seat, row in running:
        if row["status"] == "ok" and launch == options.launches - 1:
            row |= seat.ask("finish", options.timeout_s, warm_s=options.warm_s)
        if row["status"] == "ok":
            seat.losses = 0


def _visit(seat: Seat, row: Row, launch: int, options: Options) -> None:
    if row["status"] != "ok":
        return
    answer = seat.ask("visit", options.timeout_s, calls=row["calls"], warm_s=options.warm_s)
    row |= {key: answer[key] for key in ("status", "detail") if key in answer}
    if answer["status"] == "ok":
        row["visits_seconds"].append(answer["seconds"])
        row["launch_of_visit"].append(launch)


def _rounds(options: Options, running: Sequence[tuple[Seat, Row]], budget_s: float) -> int:
    """How many rounds the time allows, from the calls that were made to check."""
    if options.rounds is not None:
        return options.rounds
    round_s = sum(row["seconds"] * (row["calls"] + 1) + options.warm_s + 0.003 for _, row in running)
    return max(options.fewest_rounds, min(options.most_rounds, int(0.85 * budget_s / max(round_s, 1e-6))))


def settings(options: Options) -> Row:
    """The options, as JSON takes them."""
    facts = {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in ("layers", "subject", "against")
    }
    facts |= {"subject": options.subject.name, "against": [spec.name for spec in options.against]}
    facts["error_bound"] = BOUNDS[options.dtype]
    return dict(json.loads(json.dumps(facts)))
