"""`compare`: a result against an earlier one of the same machine, row by row, and whether something became slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import statistics
from bench.environment import machine_of
from bench.results import Document, Row, failures, op_of, series_of
from bench.statistics import Interval

# What must be asked in the same way for times to mean the same.
SETTINGS = ("dtype", "layout", "end_to_end", "seed")


@dataclass(frozen=True)
class Change:
    """One row in both results: how many times as long it takes now, and whether that is a regression."""

    layer: str
    contender: str
    workers: int
    before_seconds: float
    after_seconds: float
    interval: Interval
    regressed: bool


@dataclass(frozen=True)
class Comparison:
    """All rows that are in both results, what they come to, and what is wrong or missing in the later one."""

    changes: Sequence[Change]
    mean: Interval | None
    broken: Sequence[Row]
    missing: Sequence[tuple[str, str, int]]

    @property
    def status(self) -> int:
        """0 fine, 1 a regression, 2 a wrong or missing result."""
        if self.broken or self.missing:
            return 2
        return int(any(change.regressed for change in self.changes))


def differences(before: Document, after: Document) -> list[str]:
    """Why two results cannot be compared: another machine, another kind, or other questions."""
    found = []
    if before["kind"] != "speed" or after["kind"] != "speed":
        found.append(f"only results of speed are compared, these are {before['kind']} and {after['kind']}")
    ours, theirs = machine_of(before["environment"]), machine_of(after["environment"])
    found += [f"{key} was {ours[key]!r} and is {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
    asked, now = ({key: d["settings"].get(key) for key in SETTINGS} | {"op": op_of(d)} for d in (before, after))
    return found + [f"{key} was {old!r} and is {now[key]!r}" for key, old in asked.items() if now[key] != old]


def compare(before: Document, after: Document, fail_over: float, only: str | None = None) -> Comparison:
    """Compare the rows of one contender, the subject unless `only` names another.

    A row regressed if it takes more than `fail_over` longer and its interval excludes no change: both, since a large
    ratio may be noise, and a sure one too small to matter. The two runs share no rounds, so nothing is paired.
    """
    name = only or str(after["settings"]["subject"])
    confidence = float(after["settings"]["confidence"])
    rows = [{(r["layer"], r["workers"]): r for r in d["rows"] if r["contender"] == name} for d in (before, after)]
    deviations = [s["launch_deviation_fraction"] for d in (before, after) for s in d.get("summaries", [])]
    deviation = max(deviations, default=0.0)
    changes, pairs = [], []
    for key, old in rows[0].items():
        new = rows[1].get(key)
        if new is None or "median_seconds" not in old or "median_seconds" not in new:
            continue
        pair = series_of(new), series_of(old)
        pairs.append(pair)
        interval = statistics.ratio(pair, confidence, deviation, paired=False)
        surely = interval.low is None or interval.low > 1
        regressed = interval.estimate > 1 + fail_over and surely
        seconds = old["median_seconds"], new["median_seconds"]
        changes.append(Change(key[0], name, key[1], *seconds, interval, regressed))
    mean = statistics.geometric_mean(pairs, confidence, deviation, paired=False) if pairs else None
    asked = {layer["name"] for layer in after["layers"]}
    counts = set(after["settings"]["workers"])
    missing = [
        (layer, name, workers)
        for (layer, workers) in rows[0]
        if layer in asked and workers in counts and (layer, workers) not in rows[1]
    ]
    return Comparison(changes, mean, failures(rows[1].values()), missing)
