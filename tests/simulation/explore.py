"""Let hypothesis choose schedules, and run them."""

from __future__ import annotations

import gc
import json
import logging
import random
import sys
import time
from dataclasses import dataclass, replace

import click
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from tests.simulation.planted import PLANTED, planted
from tests.simulation.scenario import FAULTS, STEPS, Fault, Schedule, simulate


def schedules(always: tuple[Fault, ...] = ()) -> st.SearchStrategy[Schedule]:
    """Return the schedules with these faults, about at their times; without any: all schedules."""
    counts = st.just(2) if always else st.integers(0, 2)
    faults = st.builds(
        Fault,
        kind=st.sampled_from(FAULTS),
        at=st.floats(0.0, 6.0),
        seconds=st.sampled_from((0.3, 1.0, 3.0, 8.0)),
        nth=st.integers(0, 1),
        step=st.sampled_from(STEPS),
    )
    skews = st.sampled_from((0.0, 0.0, 0.0, 3600.0, -3600.0, 0.7, -0.7))
    return st.builds(
        Schedule,
        seed=st.integers(0, 2**32 - 1),
        one_body=st.booleans(),
        plain=st.integers(1, 4),
        retrying=counts,
        delayed=counts,
        long=st.just(1) if always else st.integers(0, 1),
        deadly=st.sampled_from((0, 0, 0, 1)),
        cancelled=counts,
        skews=st.tuples(skews, skews, skews),
        faults=st.tuples(*map(_about, always))
        if always
        else st.lists(faults, max_size=5).map(tuple),
    )


def _about(fault: Fault) -> st.SearchStrategy[Fault]:
    return st.floats(0.0, 2.0).map(lambda later: replace(fault, at=fault.at + later))


@dataclass
class Report:
    """The result of an exploration."""

    schedules: int = 0
    seconds: float = 0.0
    schedule: Schedule | None = None
    """The simplest schedule that broke a rule."""
    broken: tuple[str, ...] = ()


def explore(
    count: int, *, start: int, always: tuple[Fault, ...] = (), simplify: bool = True
) -> Report:
    """Run schedules until one breaks a rule; report the simplest one that does."""
    report, began = Report(), time.perf_counter()
    phases = [Phase.generate, *([Phase.shrink] if simplify else [])]

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(schedules(always))
    def run(schedule: Schedule) -> None:
        report.schedules += 1
        state = random.getstate()
        try:
            broken = simulate(schedule)
        finally:
            random.setstate(state)
        if broken:
            report.schedule, report.broken = schedule, tuple(broken)
        assert not broken

    try:
        run()
    except (AssertionError, HypothesisException):
        if report.schedule is None:
            raise
    report.seconds = time.perf_counter() - began
    return report


@click.command()
@click.option("--schedules", "count", type=click.IntRange(min=1), default=10_000, show_default=True)
@click.option("--seed", "start", type=int, default=0, show_default=True)
@click.option("--planted", "fault", type=click.Choice(sorted(PLANTED)), help="Plant this fault.")
@click.option("--simplify/--no-simplify", default=True, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(count: int, start: int, fault: str | None, simplify: bool, as_json: bool) -> None:
    """Run schedules; exit with 1 if one of them broke a rule."""
    logging.getLogger("jobguard").setLevel(logging.CRITICAL)
    # A schedule makes many objects and little garbage in cycles, whose collection took a quarter of
    # the time.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    if fault is None:
        report = explore(count, start=start, simplify=simplify)
    else:
        with planted(fault):
            faults = PLANTED[fault].faults
            report = explore(count, start=start, always=faults, simplify=simplify)
    if as_json:
        found = {
            "schedules": report.schedules,
            "seconds": round(report.seconds, 1),
            "broken": list(report.broken),
            "schedule": repr(report.schedule) if report.schedule else None,
        }
        click.echo(json.dumps(found))
    else:
        click.echo(f"{report.schedules} schedules in {report.seconds:.0f} s")
        for line in report.broken:
            click.echo(line)
        if report.schedule is not None:
            click.echo(f"schedule: {report.schedule!r}")
    sys.exit(1 if report.broken else 0)
