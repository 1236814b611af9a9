"""The cost of an outage of PostgreSQL: the slowest calls, the workers, and the time until all is written.

A producer enqueues at a steady rate, bare, guarded, and guarded while PostgreSQL is stopped. Then
PostgreSQL comes back, and the reconciler writes what waits in Redis.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import psycopg

from benchmarks.measure import Case, Table
from benchmarks.site import SENDERS, SMALL, Send, Site, reconciler, site
from benchmarks.work import WORKERS, run

RATE = 500
"""Jobs a second."""
SECONDS = float(os.environ.get("BENCHMARK_OUTAGE", "10"))
_PATIENCE = 120.0


def _p99_us(send: Send) -> float:
    """Enqueue at the rate; return the 99th percentile of the calls in microseconds."""
    took, began = [], time.perf_counter()
    for nth in range(int(RATE * SECONDS)):
        time.sleep(max(0.0, began + nth / RATE - time.perf_counter()))
        at = time.perf_counter()
        send(SMALL)
        took.append(time.perf_counter() - at)
    return statistics.quantiles(took, n=100)[98] * 1e6


class _Outages:
    """One outage in each round of each table; both figures of a round come from the same outage."""

    def __init__(self, at: Site, send: Send) -> None:
        self._at, self._send = at, send
        self._figures: dict[str, list[float]] = defaultdict(list)

    def figure(self, name: str) -> float:
        """Return this figure of an outage; make one if none is left."""
        if not self._figures[name]:
            self._stop_and_start()
        return self._figures[name].pop()

    def _stop_and_start(self) -> None:
        before, jobs = self._written(), int(RATE * SECONDS)
        self._at.server.stop()
        self._figures["p99"].append(_p99_us(self._send))
        self._at.server.start()
        began = time.monotonic()
        while (written := self._written() - before) < jobs:
            if time.monotonic() - began > _PATIENCE:
                raise SystemExit(f"only {written} of {jobs} records came after the outage")
            time.sleep(0.05)
        self._figures["written"].append(time.monotonic() - began)

    def _written(self) -> int:
        with psycopg.connect(self._at.postgres) as connection:
            return int(connection.execute("select count(*) from jobguard.jobs").fetchall()[0][0])


@contextmanager
def tables(_shared: Site) -> Iterator[list[Table]]:
    """Give the tables, on servers of their own; the variable BENCHMARK_OUTAGE changes the seconds."""
    with ExitStack() as stack:
        at = stack.enter_context(site())
        calls, written = [], []
        for library, make in SENDERS.items():
            bare, guarded = make(at, guard=False), make(at, guard=True)
            bare(SMALL)
            guarded(SMALL)
            stack.enter_context(reconciler(at, namespace=_newest_namespace(at)))
            outages = _Outages(at, guarded)
            base, away = f"{library}, bare", f"{library}, PostgreSQL away"
            calls += [
                Case(base, partial(_p99_us, bare)),
                Case(f"{library}, guarded", partial(_p99_us, guarded), base=base),
                Case(away, partial(outages.figure, "p99"), base=base),
            ]
            written.append(Case(library, partial(outages.figure, "written")))
        jobs = f"{int(RATE * SECONDS):,}"
        yield [
            Table(f"Enqueue {RATE} a second, p99", "us", calls, rounds=3),
            Table(f"{jobs} records written after an outage", "s", written, rounds=3),
        ]


@contextmanager
def work_tables(_shared: Site) -> Iterator[list[Table]]:
    """Give the tables of workers, on servers of their own: no reconciler of another case runs beside."""
    with site() as at:
        yield [
            _work_table(at, "nothing", "no-op jobs"),
            _work_table(at, "ten_milliseconds", "jobs of 10 ms"),
        ]


def _work_table(at: Site, task: str, title: str) -> Table:
    cases = []
    for worker in WORKERS:
        base = f"{worker.title}, bare"
        away = partial(run, at, worker, task, guard=True, meanwhile=partial(_away, at))
        cases += [
            Case(base, partial(run, at, worker, task, guard=False)),
            Case(f"{worker.title}, PostgreSQL away", away, base=base),
        ]
    return Table(f"Work in an outage, {title}", "jobs/s", cases, rounds=3, is_rate=True)


@contextmanager
def _away(at: Site, namespace: str) -> Iterator[None]:
    """Stop PostgreSQL inside; after it a reconciler writes the ends that wait in Redis."""
    at.server.stop()
    try:
        yield
    finally:
        at.server.start()
    with reconciler(at, namespace=namespace):
        began = time.monotonic()
        while _owed(at, namespace):
            if time.monotonic() - began > _PATIENCE:
                raise SystemExit(f"jobs of {namespace} are still owed after the outage")
            time.sleep(0.05)


def _owed(at: Site, namespace: str) -> int:
    query = (
        "select count(*) from jobguard.jobs j join jobguard.sources s on s.id = j.source"
        " where s.namespace = %s"
    )
    with psycopg.connect(at.postgres) as connection:
        return int(connection.execute(query, [namespace]).fetchall()[0][0])


def _newest_namespace(at: Site) -> str:
    with psycopg.connect(at.postgres) as connection:
        namespaces = "select namespace from jobguard.sources order by created_at desc limit 1"
        return str(connection.execute(namespaces).fetchall()[0][0])
