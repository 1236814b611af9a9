"""The page ``/metrics``: what the ledger says of the namespace, and what this process does.

Numbers of jobs are the leader's counts, so that a scrape costs the same with a million owed jobs. Every
process of a namespace exports the same numbers of the ledger: use ``max by`` in queries. No label is a job
id, and the number of label values is bounded: queues beyond the largest are one queue ``other``.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

import jobguard
from jobguard.errors import JobguardError
from jobguard.log import log_event
from jobguard.operations.overview import Overview, overview_of
from jobguard.operations.read import ReadModel
from jobguard.reconciler.service import Service
from jobguard.store.ledger import labels as labels_of

QUEUES = 200
"""Queues that have labels of their own."""
_FRESH = 5.0
"""Seconds for which one reading of the ledger is used."""
_PATIENCE = 0.5
"""Seconds for which a scrape waits for a reading. Then it shows the reading before."""
_FIRST_PATIENCE = 5.0
"""The same where there was no reading before."""
_STALE = 20.0
"""Age at which a reading is not shown any more: the ledger does not answer."""
_SETTLED = timedelta(minutes=2)
"""Age at which the leader no longer adds to the counts of a minute."""
_OTHER = "other"
_STATES = ("pending", "scheduled", "processing", "stuck", "dead", "failed")
_ENDS = ("completed", "failed", "dead", "cancelled", "restored")


class Metrics:
    """The registry of one reconciler process."""

    def __init__(
        self,
        model: ReadModel,
        namespace: str,
        service: Service | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``service`` is None where each pass has a process part of its own (--on-tick)."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Ledger(model, namespace, clock, led=service is not None))
        if service is not None:
            self._registry.register(_Process(service))

    def page(self) -> tuple[str, bytes]:
        """Return the content type and the text of a scrape."""
        return CONTENT_TYPE_LATEST, generate_latest(self._registry)


class _Process(Collector):
    """What this process does; see Service.totals."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield _gauge("jobguard_leader", "This process leads.", self._service.leads)
        yield _gauge(
            "jobguard_ready", "This process reaches Postgres.", self._service.unready() is None
        )
        yield _gauge(
            "jobguard_live", "No step of this process is stuck.", self._service.stuck() is None
        )
        totals = self._service.totals()
        restored = CounterMetricFamily(
            "jobguard_recovered", "Jobs that this process put back, by cause.", labels=["cause"]
        )
        for cause, count in sorted(totals.restored.items()):
            restored.add_metric([cause.value], count)
        yield restored
        for name, text, count in (
            ("inspected", "Deliveries that this process inspected.", totals.inspected),
            ("requeued", "Jobs of dead workers that this process took back.", totals.requeued),
            (
                "released",
                "Jobs that this process released from their dependencies.",
                totals.released,
            ),
            ("buried", "Jobs that this process gave up.", totals.buried),
            ("restore_failures", "Restores that failed in this process.", totals.failed),
        ):
            yield CounterMetricFamily(f"jobguard_{name}", text, value=count)


class _Ledger(Collector):
    """What the ledger says of one namespace.

    It is read in a thread, so that a server that does not answer holds no scrape: Prometheus would take a
    late page for a reconciler that is gone.
    """

    def __init__(
        self, model: ReadModel, namespace: str, clock: Callable[[], float], *, led: bool
    ) -> None:
        """``led``: whether to export jobguard_led. With --on-tick there is mostly no leader."""
        self._model = model
        self._namespace = namespace
        self._clock = clock
        self._led = led
        self._lock = threading.Lock()
        self._reading: threading.Thread | None = None
        self._read_at = float("-inf")
        self._known: Overview | None = None
        self._seconds = 0.0
        self._until = datetime.now(UTC) - _SETTLED
        self._ended: Counter[tuple[str, str]] = Counter()

    def collect(self) -> Iterator[Metric]:
        overview = self._overview()
        yield _gauge("jobguard_postgres_up", "The ledger answers.", overview is not None)
        yield _gauge("jobguard_read_seconds", "Time of the last reading.", self._seconds)
        info = GaugeMetricFamily(
            "jobguard_build_info", "The version.", labels=["version", "namespace"]
        )
        info.add_metric([jobguard.__version__, self._namespace], 1)
        yield info
        if overview is not None:
            yield from self._families(overview)

    def _overview(self) -> Overview | None:
        """Return what is known; None if the ledger does not answer."""
        with self._lock:  # Two scrapers at a time read once.
            if self._reading is None and self._clock() - self._read_at >= _FRESH:
                self._reading = threading.Thread(
                    target=self._read, name="jobguard metrics", daemon=True
                )
                self._reading.start()
            reading, is_first = self._reading, self._read_at == float("-inf")
        if reading is not None:
            reading.join(_FIRST_PATIENCE if is_first else _PATIENCE)
        with self._lock:
            return self._known if self._clock() - self._read_at < _STALE else None

    def _read(self) -> None:
        began = self._clock()
        found: Overview | None = None
        try:
            found = overview_of(self._model, self._namespace)
        except Exception as error:
            known = isinstance(error, JobguardError)
            log_event("metrics_unread", error=str(error), exc_info=None if known else error)
        finally:
            with self._lock:
                if found is not None:
                    self._add_ends(found)
                self._known, self._reading = found, None
                self._read_at = self._clock()
                self._seconds = self._read_at - began

    def _add_ends(self, overview: Overview) -> None:
        """Add the minutes that are complete, so that the sum only grows."""
        settled = datetime.now(UTC) - _SETTLED
        for row in overview.activity:
            if self._until <= row["minute"] < settled and row["what"] in _ENDS:
                self._ended[row["queue"], row["what"]] += row["count"]
        self._until = max(self._until, settled.replace(second=0, microsecond=0))

    def _families(self, overview: Overview) -> Iterator[Metric]:
        if self._led:
            leader = overview.state["leader"]
            live = bool(leader and leader["live"])
            yield _gauge("jobguard_led", "Some process leads the namespace.", live)
        yield from _leader(overview.state)
        yield from _sources(overview)
        yield from _queues(overview)
        yield from self._ends()
        yield from _workers(overview)
        incidents = GaugeMetricFamily(
            "jobguard_incidents_open", "Incidents that are not over.", labels=["cause"]
        )
        for cause, count in _counted(str(one["cause"]) for one in overview.open_incidents):
            incidents.add_metric([cause], count)
        yield incidents

    def _ends(self) -> Iterator[Metric]:
        ends = CounterMetricFamily(
            "jobguard_ended",
            "Jobs that ended or were restored since this process started, some minutes late.",
            labels=["queue", "outcome"],
        )
        sizes: Counter[str] = Counter()
        for (queue, _), count in self._ended.items():
            sizes[queue] += count
        folded: Counter[tuple[str, str]] = Counter()
        kept = _largest(sizes)
        for (queue, what), count in self._ended.items():
            folded[queue if queue in kept else _OTHER, what] += count
        for (queue, what), count in sorted(folded.items()):
            ends.add_metric([queue, what], count)
        yield ends


def _leader(state: Mapping[str, Any]) -> Iterator[Metric]:
    leader, brake = state["leader"], state["brake"]
    yield _gauge("jobguard_term", "The number of the term.", leader["term"] if leader else 0)
    yield _gauge("jobguard_paused", "Recoveries are paused.", bool(brake["paused_at"]))
    yield _gauge("jobguard_queues_held", "Queues that are on hold.", len(brake["held"]))
    yield _gauge(
        "jobguard_requests_held",
        "Jobs that SQL or a schedule asked for and that cannot be sent; counted up to 1,000.",
        state["held_requests"]["count"],
    )
    yield _gauge(
        "jobguard_schedules_failed",
        "Schedules that cannot be planned.",
        len(state["failed_schedules"]),
    )
    yield _gauge(
        "jobguard_database_moved", "The database is a copy.", bool(state["installation"]["moved"])
    )


def _sources(overview: Overview) -> Iterator[Metric]:
    state = overview.state
    owing = {one.source for one in overview.queues if one.owed}
    working = {(one["library"], one["address"]) for one in overview.workers}
    watched, used, outbox, suspects = (
        GaugeMetricFamily(f"jobguard_{name}", text, labels=["library", "source"])
        for name, text in (
            ("source_watched_seconds", "Time since a leader last saw the source; -1: never."),
            ("source_used", "The source has owed jobs or live workers."),
            ("outbox", "Jobs that are recorded and still to be pushed."),
            ("suspects", "Owed jobs that are absent from Redis, and whose backoff is over."),
        )
    )
    names = labels_of(state["sources"])
    for source in state["sources"][:QUEUES]:
        labels = [source["library"], names[source["id"]]]
        seconds = source["watched_seconds"]
        watched.add_metric(labels, -1 if seconds is None else seconds)
        works = (source["library"], source["address"]) in working
        used.add_metric(labels, works or names[source["id"]] in owing)
        outbox.add_metric(labels, source["outbox"])
        suspects.add_metric(labels, source["suspects"])
    yield from (watched, used, outbox, suspects)
    trusted, unguarded = (
        GaugeMetricFamily(f"jobguard_queue_{name}", text, labels=["source", "queue"])
        for name, text in (
            ("trusted", "All consumers of the queue are guarded."),
            ("unguarded_consumers", "Consumers of the queue that are not guarded."),
        )
    )
    # Those with unguarded consumers come first: an alert needs them.
    for queue in sorted(state["queues"], key=lambda queue: not queue["unguarded"])[:QUEUES]:
        labels = [names[queue["source"]], queue["queue"]]
        trusted.add_metric(labels, queue["trusted_since"] is not None)
        unguarded.add_metric(labels, len(queue["unguarded"]))
    yield from (trusted, unguarded)


def _queues(overview: Overview) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("jobguard_jobs", "Jobs by state.", labels=["source", "queue", "state"])
    oldest = GaugeMetricFamily(
        "jobguard_oldest_pending_seconds",
        "Age of the oldest job that is due and does not run.",
        labels=["source", "queue"],
    )
    kept = _largest({(one.source, one.queue): one.owed for one in overview.queues})
    numbers: Counter[tuple[str, str, str]] = Counter()
    ages: dict[tuple[str, str], float] = {}
    for one in overview.queues:
        key = (one.source, one.queue if (one.source, one.queue) in kept else _OTHER)
        counts = asdict(one.counts)
        for state in _STATES:
            numbers[(*key, state)] += counts[state]
        if one.oldest is not None:
            ages[key] = max(ages.get(key, 0.0), one.oldest)
    for labels, number in sorted(numbers.items()):
        jobs.add_metric(labels, number)
    for key, age in sorted(ages.items()):
        oldest.add_metric(key, age)
    yield from (jobs, oldest)


def _workers(overview: Overview) -> Iterator[Metric]:
    """What workers report in their rows: they live, when they beat, and since when they spool."""
    workers = GaugeMetricFamily("jobguard_workers", "Guarded workers.", labels=["library"])
    for library, count in _counted(str(worker["library"]) for worker in overview.workers):
        workers.add_metric([library], count)
    yield workers
    silent = [worker["beat_seconds"] or 0.0 for worker in overview.workers]
    yield _gauge(
        "jobguard_worker_silent_seconds",
        "Age of the oldest beat of a live worker.",
        max(silent, default=0.0),
    )
    unflushed = [worker["unflushed_seconds"] or 0.0 for worker in overview.workers]
    yield _gauge(
        "jobguard_unflushed_seconds",
        "Longest time for which a live worker has had reports that Postgres does not have.",
        max(unflushed, default=0.0),
    )
    yield _gauge(
        "jobguard_claims", "Jobs that live workers run.", sum(w["claims"] for w in overview.workers)
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _counted(values: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(Counter(values).items())


def _largest(sizes: Mapping[Any, int]) -> set[Any]:
    return {key for key, _ in Counter(sizes).most_common(QUEUES)}
