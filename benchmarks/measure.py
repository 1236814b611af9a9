"""Measure cases in turn, round by round, so that a change of the machine affects all of them.

A case gives one figure for one round. Each round runs all cases of a table in a new random order. The
report gives the median and the quartiles of the rounds, and the median of the ratios to the base case of
the same round: the ratio is what counts on a machine that does other work as well.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure, in one table."""

    name: str
    run: Callable[[], float]
    """Measures one round."""
    base: str | None = None
    """The case of the same table to which it is compared."""
    note: str = ""


@dataclass(slots=True)
class Table:
    """Cases that are measured in the same rounds, with one unit."""

    title: str
    unit: str
    cases: list[Case]
    rounds: int
    is_rate: bool = False
    """More is better."""


@dataclass(slots=True)
class Row:
    """The figures of one case."""

    table: str
    name: str
    unit: str
    median: float
    low: float
    high: float
    ratio: float | None
    base: str | None
    rounds: int
    is_rate: bool
    note: str = ""
    figures: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def measure(table: Table, *, rounds: int | None = None) -> list[Row]:
    """Measure all cases of a table; ``rounds`` replaces the number of rounds of the table."""
    count = rounds or table.rounds
    figures: dict[str, list[float]] = {case.name: [] for case in table.cases}
    for nth in range(count):
        order = list(table.cases)
        random.shuffle(order)
        for case in order:
            figures[case.name].append(case.run())
        print(f"\r{table.title}: round {nth + 1} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [_row(table, case, figures) for case in table.cases]


def _row(table: Table, case: Case, figures: dict[str, list[float]]) -> Row:
    own = figures[case.name]
    low, _, high = statistics.quantiles(own, n=4) if len(own) > 1 else (own[0],) * 3
    ratio = None
    if case.base is not None:
        ratio = statistics.median(a / b for a, b in zip(own, figures[case.base], strict=True))
    return Row(
        table=table.title,
        name=case.name,
        unit=table.unit,
        median=statistics.median(own),
        low=low,
        high=high,
        ratio=ratio,
        base=case.base,
        rounds=len(own),
        is_rate=table.is_rate,
        note=case.note,
        figures=own,
    )


def median_us(call: Callable[[], object], calls: int) -> float:
    """Return the median duration of so many calls, in microseconds."""
    took = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def rate(calls: int, run: Callable[[], object]) -> float:
    """Return the calls a second, if ``run`` makes so many."""
    began = time.perf_counter()
    run()
    return calls / (time.perf_counter() - began)
