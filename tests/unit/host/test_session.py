from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast
from uuid import UUID

import pytest

from jobguard.errors import BadRow, StoreUnavailable
from jobguard.host.session import WorkerSession
from jobguard.host.tracker import HostTracker
from jobguard.model import (
    Beat,
    Cause,
    Claim,
    Delivery,
    Ended,
    Outcome,
    Parent,
    Refusal,
    Refused,
    new_token,
)
from jobguard.settings import Settings
from jobguard.store.protocols import BeatReply, HostStore, LeaderStore, QueueRow
from tests.fakes.store import MemoryLedger
from tests.fakes.world import (
    FOR_EVER,
    NAMESPACE,
    SOURCE,
    Clock,
    delivery,
    events,
    leader_store,
    outage,
    request,
)
from tests.support import eventually


class Worker:
    """A worker process without running threads: the tests call beat and flush."""

    def __init__(self, ledger: MemoryLedger | None = None, **settings: Any) -> None:
        self.clock = Clock()
        self.ledger = ledger or MemoryLedger(clock=self.clock.wall)
        self.ledger.refuse(lambda text: "\x00" in text)
        quiet = {"namespace": NAMESPACE, "beat_interval": 1e6, "worker_timeout": 3e6}
        brief = {"ends_interval": 1e6, "record_timeout": 0.05}
        self.settings = Settings(**{**quiet, **brief, **settings})
        self.tracker = HostTracker(SOURCE, self.settings, self.ledger.host)
        self.tracker.circuit._clock = self.clock
        self.session = WorkerSession(self.tracker, self.ledger.host(), name="w1", queues=["mail"])
        self.tracker._session = self.session

    def begin(self) -> Worker:
        """Introduce the worker to Postgres."""
        assert self.session._beats.beat()
        return self

    def back(self) -> None:
        """Let the time pass after which the circuit checks Postgres again."""
        self.clock.advance(self.settings.retry_interval)

    def start(self, of: Delivery) -> Claim | Refused:
        """Start a job."""
        return self.session.start(of.token, lambda: of)

    def run(self, of: Delivery) -> Claim:
        """Start a job that must be granted, or run unclaimed."""
        claim = self.start(of)
        assert isinstance(claim, Claim)
        return claim

    def end(self, claim: Claim, outcome: Outcome = Outcome.COMPLETED, **fields: Any) -> None:
        """Report an end."""
        given = {"job_id": "job", "queue": "mail", "task": "send"}
        self.session.end(claim, outcome, **{**given, **fields})

    def owe(self, job_id: str = "job") -> Delivery:
        """Record a job, as a producer does."""
        job = delivery(job_id)
        self.ledger.host().record(SOURCE.id, [job], namespace=NAMESPACE)
        return job

    @property
    def in_flight(self) -> set[UUID]:
        """Return the deliveries that the next beat will list."""
        return set(self.session._beats._snapshot().claims)

    @property
    def unflushed(self) -> float | None:
        """Return since when reports wait, as the next beat will report it."""
        return self.session._beats._snapshot().unflushed_since

    @property
    def leader(self) -> LeaderStore:
        """Return a leader's view of the ledger."""
        return leader_store(self.ledger)

    def outcome(self, of: Delivery) -> Outcome | None:
        """Return how a delivery has ended, or None."""
        return self.leader.tombstones(SOURCE.id, [of.token]).get(of.token)

    def claimed_by(self, of: Delivery) -> UUID | None:
        """Return the worker that has the claim of a delivery."""
        page = self.leader.page(SOURCE.id, after=None, limit=999)
        return next((owed.claim_worker for owed in page if owed.token == of.token), None)


class Beats:
    """A store of beats that notes each list, even if Postgres is away."""

    def __init__(self, inner: HostStore) -> None:
        self._inner = inner
        self.lists: list[set[UUID]] = []
        self.queues: list[tuple[str, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def beat(self, source: int, beat: Beat, *, namespace: str) -> BeatReply:
        """Note a beat and pass it on."""
        self.lists.append(set(beat.claims))
        self.queues.append(tuple(beat.queues))
        return self._inner.beat(source, beat, namespace=namespace)


def lead(ledger: MemoryLedger) -> tuple[LeaderStore, int]:
    """Make a leader whose lease never ends."""
    store = leader_store(ledger)
    term = store.elect(lease=FOR_EVER)
    assert term is not None
    return store, term


def declared_dead(worker: Worker) -> tuple[LeaderStore, int]:
    """Let a leader declare this worker dead."""
    store, term = lead(worker.ledger)
    store.declare_dead(term, [worker.session.id])
    return store, term


@pytest.fixture(autouse=True)
def all_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Capture all log levels."""
    caplog.set_level(logging.DEBUG, "jobguard")


# -- starts ----------------------------------------------------------------------------------------


def test_a_start_is_claimed() -> None:
    """The start of a recorded job gets a claim of this worker."""
    worker = Worker().begin()
    job = worker.owe()

    assert worker.start(job) == Claim(job.token, 1)
    assert worker.claimed_by(job) == worker.session.id


def test_a_worker_introduces_itself_before_its_first_claim() -> None:
    """A start waits for the first beat, because a claim needs a worker that Postgres knows."""
    worker = Worker(record_timeout=10.0)
    worker.session.open()
    beats = Beats(worker.ledger.host())
    worker.session._beats._store = cast(HostStore, beats)
    worker.session._beats.register_again(worker.session.id)
    job = worker.owe()

    assert worker.run(job).number == 1
    assert {job.token} in beats.lists
    worker.session.close()


def test_what_has_ended_is_refused() -> None:
    """The start of an ended delivery is refused with its outcome, and the delivery is not in flight."""
    worker = Worker().begin()
    job = worker.owe()
    worker.tracker.cancel(tokens=[job.token])

    assert worker.start(job) == Refused(job.token, Refusal.ENDED, Outcome.CANCELLED)
    assert worker.in_flight == set()


def test_what_another_live_worker_runs_is_refused() -> None:
    """The start of a delivery that another live worker has claimed is refused."""
    first = Worker().begin()
    second = Worker(first.ledger).begin()
    job = first.owe()
    first.run(job)
    first.session._beats.beat()

    assert second.start(job) == Refused(job.token, Refusal.CLAIMED)
    assert second.in_flight == set()
    assert first.claimed_by(job) == first.session.id


def test_skipping_without_a_leader_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A start that is skipped while no reconciler leads is logged with a warning."""
    worker = Worker().begin()
    job = worker.owe()
    worker.tracker.cancel(tokens=[job.token])

    worker.start(job)
    assert "nobody_leads" in events(caplog.records)

    caplog.clear()
    lead(worker.ledger)
    worker.session._beats.beat()
    worker.start(job)
    assert "nobody_leads" not in events(caplog.records)


def test_a_declined_job_is_recorded_first() -> None:
    """Its record may be under way beside its push. Without a leader nothing is declined."""
    worker = Worker().begin()
    job = delivery("unrecorded")

    def is_declined(token: UUID, **how: Any) -> bool:
        return worker.session.decline(token, job_id="job", error="no such task", **how)

    assert not is_declined(job.token, describe=lambda: job)
    store, term = lead(worker.ledger)
    store.acknowledge(term, SOURCE.id, (None, None), (new_token(), 1), run_id=None)
    store.trust(term, [QueueRow(SOURCE.id, "mail", 0.0)])
    assert is_declined(job.token, describe=lambda: job)

    other = delivery("of another")
    assert not is_declined(other.token)
    assert is_declined(other.token, describe=lambda: other)
    worker.clock.advance(6)
    assert [row.suspected for row in store.watched(SOURCE.id, limit=9)] == 2 * [Cause.WORKER]


def test_only_who_hears_the_beats_says_that_nobody_leads(caplog: pytest.LogCaptureFixture) -> None:
    """A skip before the first beat, or in a forked child, says nothing about a leader."""
    worker = Worker()
    job = worker.owe()
    worker.tracker.cancel(tokens=[job.token])
    worker.start(job)
    worker.begin()  # The answer to the first beat says that no process leads.
    worker.session._beats.pid = os.getpid() + 1
    worker.start(job)
    assert "nobody_leads" not in events(caplog.records)


def test_a_refused_second_start_keeps_the_listing_of_the_first() -> None:
    """A job that runs in one thread stays in flight when another thread's start of it is refused."""
    worker = Worker().begin()
    job = worker.owe()
    worker.run(job)
    worker.session._beats.beat()

    assert isinstance(worker.start(job), Refused)

    assert worker.in_flight == {job.token}


def test_a_copy_that_starts_while_the_first_one_ends_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each start has its own count: the end of the first one does not remove the second."""
    worker = Worker().begin()
    job = worker.owe()
    claim = worker.run(job)
    request = worker.session._claim

    def ends_meanwhile(*given: Any) -> Any:
        worker.end(claim)
        worker.session.flush()
        assert worker.in_flight == {job.token}
        return request(*given)

    monkeypatch.setattr(worker.session, "_claim", ends_meanwhile)
    assert worker.start(job) == Refused(job.token, Refusal.ENDED, Outcome.COMPLETED)
    assert worker.in_flight == set()


def test_an_unknown_delivery_is_recorded_and_claimed() -> None:
    """A delivery without a record is recorded by the worker that starts it."""
    worker = Worker().begin()
    job = delivery()

    assert worker.start(job) == Claim(job.token, 1)
    assert worker.claimed_by(job) == worker.session.id


def test_a_task_that_must_not_repeat_does_not_start_without_a_claim(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While Postgres is away it is skipped; with Postgres, the claim carries the rule."""
    worker = Worker(record_timeout=0.01, recover={"send": "dead"}).begin()
    ruled = replace(worker.owe("a"), task="send")
    free = replace(worker.owe("b"), task="other")
    with outage(worker.ledger):
        assert worker.start(ruled) == Refused(ruled.token, Refusal.CLAIMED)
        assert worker.run(free) == Claim(free.token, 0)
    assert worker.in_flight == {free.token}
    assert "start_not_allowed" in events(caplog.records)
    worker.back()
    assert worker.run(ruled) == Claim(ruled.token, 1)
    assert worker.leader.rules(SOURCE.id, [ruled.token, free.token]) == {ruled.token: "dead"}


def test_a_child_without_a_worker_starts_no_task_that_must_not_repeat() -> None:
    """Its worker was declared dead, so that it gets no claim."""
    parent = Worker().begin()
    child = Worker(parent.ledger, record_timeout=FOR_EVER, recover={"send": "dead"})
    inherited = (parent.session.id, os.getpid() + 1)
    child.session = WorkerSession(
        child.tracker, child.ledger.host(), name="w1", queues=["mail"], inherited=inherited
    )
    declared_dead(parent)
    job = replace(child.owe(), task="send")

    assert child.start(job) == Refused(job.token, Refusal.CLAIMED)


def test_an_outage_is_no_line_for_every_start(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that starts 100 jobs while Postgres is away does not log each missing claim."""
    worker = Worker(record_timeout=0.01).begin()
    jobs = [worker.owe() for _ in range(100)]
    with outage(worker.ledger):
        for job in jobs:
            worker.run(job)

    assert events(caplog.records).count("start_unclaimed") <= 2  # one for each kind of error


def test_describe_is_asked_only_for_the_unknown() -> None:
    """A known delivery is not described."""
    worker = Worker().begin()
    job = worker.owe()

    def never() -> Delivery:
        raise AssertionError("it is known")

    assert isinstance(worker.session.start(job.token, never), Claim)


def test_a_description_that_fails_costs_no_run(caplog: pytest.LogCaptureFixture) -> None:
    """A job whose description fails runs without a claim."""
    worker = Worker().begin()

    def broken() -> Delivery:
        raise ValueError("unreadable")

    token = new_token()
    assert worker.session.start(token, broken) == Claim(token, 0)
    assert "guest_failed" in events(caplog.records)


def test_observe_runs_what_would_be_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """With mode="observe" a job that would be skipped runs, and this is logged."""
    first = Worker().begin()
    second = Worker(first.ledger, mode="observe").begin()
    job = first.owe()
    first.run(job)
    first.session._beats.beat()

    assert second.start(job) == Claim(job.token, 0)
    assert "start_unfenced" in events(caplog.records)
    second.end(Claim(job.token, 0), Outcome.FAILED)
    second.session.flush()
    assert has_claim(first, job)


def has_claim(worker: Worker, job: Delivery) -> bool:
    """Return True if this worker's claim is still valid."""
    return worker.claimed_by(job) == worker.session.id and worker.outcome(job) is None


# -- Postgres away ---------------------------------------------------------------------------------


def test_fail_open_and_late_claim() -> None:
    """A start while Postgres is away runs at once, and is claimed when Postgres is back."""
    worker = Worker().begin()
    job = worker.owe()
    with outage(worker.ledger):
        assert worker.start(job) == Claim(job.token, 0)
        assert worker.in_flight == {job.token}
    worker.back()
    assert worker.claimed_by(job) is None

    assert worker.session._beats.beat()
    worker.session._late_claims()

    assert worker.claimed_by(job) == worker.session.id
    worker.end(Claim(job.token, 0))
    worker.session.flush()
    assert worker.outcome(job) is Outcome.COMPLETED


def test_a_postgres_that_was_slow_once_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start asks a slow Postgres again, so the job does not run without a claim beside a copy."""
    worker = Worker(record_timeout=10.0).begin()
    job = worker.owe()
    request, slow = worker.tracker.circuit.calling, [StoreUnavailable()]

    @contextmanager
    def calling() -> Iterator[None]:
        with request():
            if slow:
                raise slow.pop()
            yield

    monkeypatch.setattr(worker.tracker.circuit, "calling", calling)
    assert worker.start(job) == Claim(job.token, 1)


def test_a_late_claim_of_what_another_runs(caplog: pytest.LogCaptureFixture) -> None:
    """If another worker has the claim, this is logged, and the claim is not requested again."""
    first = Worker().begin()
    second = Worker(first.ledger).begin()
    job = first.owe()
    with outage(first.ledger):
        first.run(job)
    second.run(job)
    second.session._beats.beat()
    first.back()

    first.session._beats.beat()
    first.session._late_claims()

    assert "claim_lost" in events(caplog.records)
    assert first.session._in_flight.unclaimed() == []
    assert has_claim(second, job)


def test_a_late_claim_of_what_still_waits_in_a_spool() -> None:
    """A run whose record waits in its producer's spool stays in flight, and is claimed later."""
    worker = Worker().begin()
    job = delivery()
    with outage(worker.ledger):
        worker.run(job)
    worker.back()
    worker.session._beats.beat()
    worker.session._late_claims()
    assert worker.in_flight == {job.token}
    assert job.token in dict(worker.session._in_flight.unclaimed())

    worker.ledger.host().record(SOURCE.id, [job], namespace=NAMESPACE, replay=True)
    worker.session._late_claims()
    assert worker.claimed_by(job) == worker.session.id


def test_an_end_cancels_the_request_for_a_claim() -> None:
    """A job that ended before Postgres was back is reported, and no claim is requested."""
    worker = Worker().begin()
    job = worker.owe()
    with outage(worker.ledger):
        claim = worker.run(job)
        worker.end(claim)
        worker.session.flush()
    worker.back()

    worker.session._beats.beat()
    worker.session._late_claims()
    worker.tracker.connect()

    assert worker.outcome(job) is Outcome.COMPLETED
    assert worker.claimed_by(job) is None
    assert worker.in_flight == set()


def test_the_wrong_installation_runs_unguarded() -> None:
    """A worker with another installation's database runs its jobs, and writes nothing there."""
    worker = Worker(installation="production")
    job = delivery()

    assert not worker.session._beats.beat()
    assert worker.start(job) == Claim(job.token, 0)
    worker.end(Claim(job.token, 0))
    worker.session.flush()

    assert worker.leader.workers(SOURCE.id) == []
    assert worker.outcome(job) is None


def test_a_received_beat_closes_the_circuit() -> None:
    """Beats ignore the circuit, and the first beat that Postgres received closes it."""
    worker = Worker().begin()
    with outage(worker.ledger):
        worker.run(worker_job := delivery())
        assert not worker.tracker.circuit.closed
        assert not worker.session._beats.beat()

    assert worker.session._beats.beat()

    assert worker.tracker.circuit.closed
    assert worker_job.token in worker.in_flight


# -- lists and ends --------------------------------------------------------------------------------


def test_in_flight_before_the_claim_is_requested() -> None:
    """A beat during the request of the claim lists the delivery already."""
    worker = Worker().begin()
    job = worker.owe()
    seen: list[set[UUID]] = []
    call = worker.tracker.call

    def observe(work: Any) -> Any:
        seen.append(worker.in_flight)
        return call(work)

    worker.tracker.call = observe  # type: ignore[method-assign]
    worker.run(job)

    assert seen == [{job.token}]


def test_in_flight_until_its_end_is_committed() -> None:
    """A delivery stays in flight while its end waits for a batch, until the end is committed."""
    worker = Worker().begin()
    job = worker.owe()
    claim = worker.run(job)
    worker.end(claim)
    assert worker.in_flight == {job.token}
    assert worker.outcome(job) is None

    worker.session.flush()

    assert worker.in_flight == set()
    assert worker.outcome(job) is Outcome.COMPLETED


def test_in_flight_while_its_end_is_in_the_spool() -> None:
    """A delivery stays in flight while its end is in the spool, until the end is replayed."""
    worker = Worker().begin()
    job = worker.owe()
    claim = worker.run(job)
    with outage(worker.ledger):
        worker.end(claim)
        worker.session.flush()
        assert worker.in_flight == {job.token}
        assert len(worker.tracker.spool) == 1
    worker.back()

    worker.tracker.connect()

    assert worker.outcome(job) is Outcome.COMPLETED
    assert worker.in_flight == set()


def test_a_superseded_delivery_is_not_in_flight() -> None:
    """A superseded delivery is no longer in flight."""
    worker = Worker().begin()
    job = worker.owe()

    worker.session.mark_superseded(worker.run(job))

    assert worker.in_flight == set()


def test_the_end_of_a_superseded_run_comes_after_the_record_of_its_successor() -> None:
    """The end does not pass a record that another thread is just writing: the record would be refused."""
    worker = Worker().begin()
    job = worker.owe()
    claim = worker.run(job)
    retry = delivery(job.job_id, parent=Parent(job.token, claim.number, worker=worker.session.id))
    with outage(worker.ledger):
        assert worker.tracker.record([retry]).spooled
    worker.back()
    another_thread = worker.tracker._replay._replaying
    assert another_thread.take(0)

    worker.end(claim, Outcome.SUPERSEDED)
    worker.session.flush()
    assert worker.in_flight == {job.token}
    another_thread.free()
    worker.tracker.connect()

    assert worker.outcome(job) is Outcome.SUPERSEDED
    (owed,) = worker.leader.page(SOURCE.id, after=None, limit=9)
    assert owed.token == retry.token
    assert worker.in_flight == set()


def test_ends_of_one_batch_in_order() -> None:
    """Ends are written in batches, in the order of their reports."""
    worker = Worker(ends_batch=3).begin()
    batches: list[list[UUID]] = []
    end = worker.tracker.end

    def monitor(ends: Any) -> Any:
        batches.append([e.token for e in ends])
        return end(ends)

    worker.tracker.end = monitor  # type: ignore[method-assign]
    jobs = [worker.owe(str(n)) for n in range(7)]
    for job in jobs:
        worker.end(worker.run(job))
    worker.session.flush()

    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert [token for batch in batches for token in batch] == [job.token for job in jobs]


class NotedReports:
    """A beat process that notes what is reported to it, and when it is written."""

    def __init__(self) -> None:
        self.known: list[UUID] = []
        self.writes = 0
        self._waiting: list[UUID] = []

    def begins(self, claim: str) -> None:
        """Note a start that is still to be written."""
        self._waiting.append(UUID(hex=claim))

    def ends(self, claim: str) -> None:
        """Ignore an end."""

    def flush(self) -> None:
        """Write."""
        self.writes += bool(self._waiting)
        self.known += self._waiting
        self._waiting = []


class NotedClaims:
    """A store that notes which requested claims the beat process knew of at that moment."""

    def __init__(self, inner: HostStore, reports: NotedReports) -> None:
        self._inner, self._reports = inner, reports
        self.known: list[list[bool]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def claims(self, source: int, requests: Any) -> Any:
        """Note and answer claim requests."""
        self.known.append([request.token in self._reports.known for request in requests])
        return self._inner.claims(source, requests)


def test_the_beat_process_knows_a_start_before_its_claim_is_requested() -> None:
    """Starts that share a claim statement are reported with one write, before the statement."""
    worker = Worker(record_timeout=10.0).begin()
    jobs = [worker.owe(str(n)) for n in range(3)]
    worker.session.mark_superseded(worker.run(worker.owe("first")))
    reports: Any = NotedReports()
    worker.session._in_flight.beat_process = reports
    store: Any = NotedClaims(worker.tracker._store, reports)
    worker.tracker._store = store
    claims = worker.tracker._claims
    with ThreadPoolExecutor() as pool:
        assert claims._committing.take(0)  # the starts meet in the batch after this one
        runs = [pool.submit(worker.run, job) for job in jobs]
        eventually(lambda: claims._open is not None and len(claims._open.parts) == 3)
        claims._committing.free()
        assert all(run.result().number for run in runs)

    assert store.known == [[True, True, True]]
    assert reports.writes == 1


def test_the_beat_process_knows_a_start_without_a_claim() -> None:
    """A start that no claim was requested for is reported before the job runs."""
    worker = Worker().begin()
    jobs = [worker.owe("opens the circuit"), worker.owe()]
    reports: Any = NotedReports()
    worker.session._in_flight.beat_process = reports
    with outage(worker.ledger):
        for job in jobs:
            worker.run(job)
            assert job.token in reports.known


def test_a_flush_leaves_what_is_reported_meanwhile_to_the_next() -> None:
    """An end that is reported while a batch is committed waits for the next batch."""
    worker = Worker().begin()
    jobs = [worker.owe(str(n)) for n in range(3)]
    claims = [worker.run(job) for job in jobs]
    end = worker.tracker.end

    def report_another(ends: Any) -> Any:
        if claims:
            worker.end(claims.pop())
        return end(ends)

    worker.tracker.end = report_another  # type: ignore[method-assign]
    worker.end(claims.pop(0))
    worker.session.flush()
    assert [worker.outcome(job) for job in jobs] == [Outcome.COMPLETED, None, None]

    worker.session.flush()
    assert [worker.outcome(job) for job in jobs] == [Outcome.COMPLETED, None, Outcome.COMPLETED]


def test_durable_ends_are_committed_at_once() -> None:
    """With ends="durable", end() commits before it returns."""
    worker = Worker(ends="durable").begin()
    job = worker.owe()

    worker.end(worker.run(job))

    assert worker.outcome(job) is Outcome.COMPLETED


def test_unflushed_since_the_oldest_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat reports waiting reports: those in the spool at once, those in the batch when they are old."""
    worker = Worker().begin()
    assert worker.unflushed is None
    claim = worker.run(worker.owe())
    worker.end(claim)
    ended_at = worker.session._pending[0].ended_at
    assert worker.unflushed is None

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 5)
    assert worker.unflushed == ended_at

    with outage(worker.ledger):
        worker.session.flush()
    assert worker.unflushed == worker.tracker.spool.oldest() is not None
    worker.back()
    worker.tracker.connect()
    assert worker.unflushed is None


def test_a_bad_end_is_quarantined_and_the_rest_written() -> None:
    """In a batch with a bad end, the others are written whole, and the bad one without its texts."""
    worker = Worker().begin()
    good, bad, fine = (worker.owe(name) for name in ("good", "bad", "fine"))
    for job in (good, bad, fine):
        worker.end(worker.run(job), task="t\x00" if job is bad else "send")

    worker.session.flush()

    assert worker.outcome(good) is worker.outcome(fine) is Outcome.COMPLETED
    assert worker.outcome(bad) is Outcome.COMPLETED
    assert worker.ledger._tables.history[SOURCE.id, bad.token].task == "send"  # from its record
    assert worker.tracker.spool.counts.quarantined == 1


def test_a_job_whose_end_was_refused_is_not_run_again() -> None:
    """A completed job is ended without the text that Postgres refused, so it does not run again."""
    worker = Worker().begin()
    job = worker.owe()
    worker.end(worker.run(job), task="t\x00", error="what went wrong")
    worker.session.flush()

    assert worker.outcome(job) is Outcome.COMPLETED
    assert worker.in_flight == set()


def test_in_flight_while_its_end_of_a_bad_batch_is_in_the_spool() -> None:
    """An end that was spooled while its batch was written one by one keeps its delivery in flight."""
    worker = Worker().begin()
    good, bad = worker.owe("good"), worker.owe("bad")
    for job in (good, bad):
        worker.end(worker.run(job))

    def end(ends: Any) -> list[Ended]:
        raise BadRow("one of them") if len(ends) > 1 else StoreUnavailable()

    worker.tracker.end = end  # type: ignore[method-assign]
    worker.session.flush()

    assert len(worker.tracker.spool) == 2
    assert worker.in_flight == {good.token, bad.token}


def test_ends_that_find_no_place_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Ends that neither Postgres nor the spool took are counted and logged."""
    worker = Worker(spool_size=1).begin()
    claims = [worker.run(worker.owe(str(n))) for n in range(2)]
    with outage(worker.ledger):
        for claim in claims:
            worker.end(claim)
        worker.session.flush()

    assert worker.tracker.spool.counts.lost == 2
    assert "spool_full" in events(caplog.records)


def test_errors_are_redacted() -> None:
    """The kept text of an error contains no secret."""
    worker = Worker().begin()
    job = worker.owe()
    worker.end(worker.run(job), Outcome.FAILED, error="password='hunter2'")
    worker.session.flush()

    error = worker.ledger._tables.history[SOURCE.id, job.token].error
    assert error is not None
    assert "hunter2" not in error


# -- death and new registration --------------------------------------------------------------------


def test_declared_dead_it_registers_again(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that was declared dead registers under another id, with all its deliveries."""
    worker = Worker().begin()
    job = worker.owe()
    worker.run(job)
    before = worker.session.id
    declared_dead(worker)

    assert worker.session._beats.beat()

    assert worker.session.id != before
    rows = {row.id: row for row in worker.leader.workers(SOURCE.id)}
    assert rows[before].dead
    assert not rows[worker.session.id].dead
    assert worker.leader.listed(SOURCE.id, [job.token]) == (frozenset([job.token]), False)
    assert "worker_renewed" in events(caplog.records)


def test_declared_dead_without_notice_it_claims_under_a_new_id() -> None:
    """A start that finds its worker declared dead before the next beat claims under the new id.

    Claims under the old id would be void at once. All threads claim at that moment, and stay one
    worker.
    """
    worker = Worker(MemoryLedger(), record_timeout=10.0)
    worker.session.open()
    before, jobs = worker.session.id, [worker.owe(f"job{n}") for n in range(8)]
    declared_dead(worker)
    with ThreadPoolExecutor(len(jobs)) as threads:
        claims = list(threads.map(worker.run, jobs))

    assert [claim.number for claim in claims] == [1] * len(jobs)
    assert worker.session.id != before
    assert {worker.claimed_by(job) for job in jobs} == {worker.session.id}
    rows = {row.id: row for row in worker.leader.workers(SOURCE.id)}
    assert {id: row.dead for id, row in rows.items()} == {before: True, worker.session.id: False}
    worker.session.close()


def test_it_is_declared_dead_once() -> None:
    """A late answer to a beat with the old id does not change the new id."""
    worker = Worker().begin()
    late = worker.session._beats._snapshot()
    declared_dead(worker)
    worker.session._beats.beat()
    now = worker.session.id

    assert worker.session._beats._beat_postgres(late)
    assert worker.session.id == now


def test_a_beat_in_the_old_name_does_not_introduce_the_new() -> None:
    """A beat with the old id that is answered late does not make the new id known."""
    worker = Worker().begin()
    late, job = worker.session._beats._snapshot(), worker.owe()
    worker.session._beats.register_again(worker.session.id)

    assert worker.session._beats._beat_postgres(late)
    assert worker.run(job).number == 0


def test_a_start_just_after_a_long_outage_waits_for_its_workers_beat() -> None:
    """A worker that started in an outage becomes known as soon as Postgres is back."""
    worker = Worker(record_timeout=10.0)
    job = worker.owe()
    worker.session._beats.named_at -= 60
    with outage(worker.ledger):
        worker.session._settings = replace(worker.settings, record_timeout=0.05)
        worker.session._beats.start(lambda: None)
        assert not worker.session._beats.beat()
    worker.session._settings = worker.settings
    worker.clock.advance(60)

    assert worker.run(job).number == 1
    assert worker.claimed_by(job) == worker.session.id
    worker.session.close()


def test_a_connection_of_many_steps_is_carried_on_by_the_beat() -> None:
    """The beat advances the connection of an idle worker, which has no other caller."""
    worker = Worker(record_timeout=10.0)
    with outage(worker.ledger), pytest.raises(StoreUnavailable):
        worker.tracker.connect()
    worker.back()
    steps = iter([False] * 5)
    worker.tracker._store.probe = lambda: next(steps, True)  # type: ignore[method-assign]

    assert worker.session._beats.beat()
    assert worker.session._beats.known


def test_a_child_waits_until_its_worker_is_introduced() -> None:
    """A child does not beat for its worker, because its list lacks the deliveries of other children."""
    worker = Worker()
    beats = Beats(worker.ledger.host())
    worker.session._beats._store = cast(HostStore, beats)
    (asked, requests), (resumed, go_on) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        beat_sender, code = worker.session._beats, 1
        with suppress(BaseException):
            before = beat_sender.introduced()
            os.write(requests, b"x")
            os.read(resumed, 1)
            code = (
                0
                if (before, beat_sender.introduced()) == (None, beat_sender.id) and not beats.lists
                else 1
            )
        os._exit(code)
    os.close(requests)
    os.read(asked, 1)
    worker.begin()
    os.write(go_on, b"x")

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_child_of_a_worker_that_was_declared_dead_leaves_what_another_runs() -> None:
    """The child gets no claim, but its start is refused if another worker has the claim."""
    parent = Worker().begin()
    other = Worker(parent.ledger).begin()
    child = Worker(parent.ledger)
    inherited = (parent.session.id, os.getpid() + 1)
    child.session = WorkerSession(
        child.tracker, child.ledger.host(), name="w1", queues=["mail"], inherited=inherited
    )
    job = parent.owe()
    declared_dead(parent)
    other.run(job)

    assert child.start(job) == Refused(job.token, Refusal.CLAIMED)


def test_the_child_of_a_worker_that_is_another_now_runs_unclaimed() -> None:
    """The child knows only the old id, so it runs unclaimed, and its worker lists its delivery."""
    parent = Worker().begin()
    child = Worker(parent.ledger, record_timeout=FOR_EVER)
    inherited = (parent.session.id, os.getpid() + 1)
    child.session = WorkerSession(
        child.tracker, child.ledger.host(), name="w1", queues=["mail"], inherited=inherited
    )
    declared_dead(parent)
    job = child.owe()

    assert child.run(job) == Claim(job.token, 0)
    assert child.claimed_by(job) is None


def test_an_old_failure_after_a_new_registration_changes_nothing() -> None:
    """The report of a worker declared dead is late if another worker has the claim."""
    zombie = Worker().begin()
    other = Worker(zombie.ledger).begin()
    job = zombie.owe()
    old = zombie.run(job)
    declared_dead(zombie)
    new = other.run(job)
    assert new.number == old.number + 1
    zombie.session._beats.beat()

    zombie.end(old, Outcome.FAILED)
    zombie.session.flush()

    assert has_claim(other, job)
    other.end(new)
    other.session.flush()
    assert zombie.outcome(job) is Outcome.COMPLETED


def test_a_run_after_a_new_registration() -> None:
    """A claim after the new registration has the new id."""
    worker = Worker().begin()
    declared_dead(worker)
    worker.session._beats.beat()
    job = worker.owe()

    worker.run(job)

    assert worker.claimed_by(job) == worker.session.id


def test_the_ledger_in_memory_returns_what_workers_list() -> None:
    """A leader of the memory ledger reads the list of a worker's last beat."""
    worker = Worker().begin()
    job = worker.owe()
    worker.run(job)
    worker.session._beats.beat()

    leader = worker.ledger.leader(NAMESPACE, new_token())
    assert leader.listed(SOURCE.id, [job.token]) == (frozenset([job.token]), False)


def test_a_beat_names_the_queues_that_are_consumed_now() -> None:
    """A beat names the queues that the worker takes jobs from now, as a leader trusts only those."""
    worker = Worker().begin()
    (before,) = worker.leader.workers(SOURCE.id)

    worker.session.consumes(["mail", "bulk"])
    worker.session._beats.beat()
    (after,) = worker.leader.workers(SOURCE.id)
    worker.session.consumes(["bulk"])
    worker.session._beats.beat()
    (last,) = worker.leader.workers(SOURCE.id)

    assert [tuple(row.queues) for row in (before, after, last)] == [
        ("mail",),
        ("mail", "bulk"),
        ("bulk",),
    ]


# -- forks -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_work_horse_shares_no_lock() -> None:
    """A child that was forked while the parent's threads had the locks reports its end at once."""
    worker = Worker().begin()
    job, waiting = worker.owe("job"), worker.owe("waiting")
    claim = worker.run(job)
    worker.end(worker.run(waiting))
    session = worker.session

    with session._lock, session._flushing:
        pid = os.fork()
        if pid == 0:
            good = False
            try:
                worker.end(claim)
                good = (
                    worker.outcome(job) is Outcome.COMPLETED
                    and worker.outcome(waiting) is None  # the parent reports it
                    and not session.is_mine
                )
                session.close()  # the child must not close it
                good = good and not worker.leader.workers(SOURCE.id)[0].left
            finally:
                os._exit(0 if good else 1)
        watchdog = threading.Timer(20, os.kill, (pid, 9))
        watchdog.start()
        _, status = os.waitpid(pid, 0)
        watchdog.cancel()

    assert os.waitstatus_to_exitcode(status) == 0
    assert len(session._pending) == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_its_worker_lists_what_a_child_runs() -> None:
    """A worker lists the delivery of a child while it runs, even if the library has lost it."""
    worker = Worker().begin()
    job = worker.owe("job")
    session = worker.session
    begun, go_on = os.pipe(), os.pipe()

    pid = os.fork()
    if pid == 0:
        good = False
        try:
            claim = worker.run(job)
            os.write(begun[1], b".")
            os.read(go_on[0], 1)
            worker.end(claim)
            os.write(begun[1], b".")
            os.read(go_on[0], 1)
            good = True
        finally:
            os._exit(0 if good else 1)
    watchdog = threading.Timer(20, os.kill, (pid, 9))
    watchdog.start()
    os.read(begun[0], 1)
    in_flight = [session._beats._snapshot().claims]
    os.write(go_on[1], b".")
    os.read(begun[0], 1)
    in_flight.append(session._beats._snapshot().claims)
    os.write(go_on[1], b".")
    _, status = os.waitpid(pid, 0)
    watchdog.cancel()

    assert os.waitstatus_to_exitcode(status) == 0
    assert in_flight == [(job.token,), ()]


# -- with real threads -----------------------------------------------------------------------------


@pytest.fixture
def lively() -> Iterator[Worker]:
    """Start a worker whose own threads beat and flush at short intervals."""
    worker = Worker(
        MemoryLedger(),
        beat_interval=0.02,
        worker_timeout=5.0,
        ends_interval=0.005,
        retry_interval=0.01,
    )
    worker.tracker.circuit._clock = time.monotonic
    worker.session.open()
    yield worker
    worker.session.close()


def test_it_beats_by_itself(lively: Worker) -> None:
    """An open session beats by itself."""

    def beat() -> int:
        return lively.leader.workers(SOURCE.id)[0].beat

    first = beat()
    eventually(lambda: beat() > first + 2)


def test_a_worker_introduces_itself_with_patience() -> None:
    """A worker is known when its session is open, even if Postgres accepts the first beat late."""
    worker = Worker(record_timeout=10.0)
    tries = iter([StoreUnavailable(), StoreUnavailable()])

    class Slow(Beats):
        def beat(self, source: int, beat: Beat, *, namespace: str) -> BeatReply:
            if error := next(tries, None):
                raise error
            return super().beat(source, beat, namespace=namespace)

    worker.session._beats._store = cast(HostStore, Slow(worker.ledger.host()))
    worker.session.open()

    assert [row.id for row in worker.leader.workers(SOURCE.id)] == [worker.session.id]
    worker.session.close()


def test_it_flushes_by_itself(lively: Worker) -> None:
    """An open session commits ends by itself."""
    job = lively.owe()
    lively.end(lively.run(job))

    eventually(lambda: lively.outcome(job) is Outcome.COMPLETED)


def test_it_claims_late_by_itself(lively: Worker) -> None:
    """After an outage an open session claims its running jobs by itself."""
    job = lively.owe()
    with outage(lively.ledger):
        assert lively.run(job).number == 0

    eventually(lambda: lively.claimed_by(job) == lively.session.id)


def test_close_flushes_and_leaves() -> None:
    """close() commits waiting ends, deregisters and ends the threads; a second call does nothing."""
    worker = Worker()
    worker.session.open()
    job = worker.owe()
    worker.end(worker.run(job))

    worker.session.close()
    worker.session.close()

    assert worker.outcome(job) is Outcome.COMPLETED
    assert [row.left for row in worker.leader.workers(SOURCE.id)] == [True]
    assert worker.session.closed
    beats, flusher = worker.session._beats.ended, worker.session._flusher
    assert beats is not None and flusher is not None
    eventually(lambda: beats.is_set() and not flusher.is_alive())


@pytest.mark.parametrize("what", ["start", "end"])
def test_what_postgres_missed_is_in_flight_at_once(what: str) -> None:
    """A start or an end that Postgres did not take is on the list of a beat before the next is due."""
    worker = Worker()
    worker.session.open()
    job = worker.owe()
    claim = worker.run(job) if what == "end" else Claim(job.token, 0)
    beats = Beats(worker.ledger.host())
    worker.session._beats._store = cast(HostStore, beats)
    with outage(worker.ledger):
        if what == "start":
            worker.run(job)
        else:
            worker.end(claim)
            worker.session.flush()

    eventually(lambda: {job.token} in beats.lists)
    worker.session.close()


def test_another_queue_is_reported_at_once() -> None:
    """A new queue is reported at once: if the worker died before, no beat would name the queue."""
    worker = Worker()
    worker.session.open()
    beats = Beats(worker.ledger.host())
    worker.session._beats._store = cast(HostStore, beats)

    worker.session.consumes(["mail", "bulk"])

    eventually(lambda: beats.queues == [("mail", "bulk")])
    worker.session.close()


def test_close_waits_for_postgres() -> None:
    """A worker that ends in an outage reports its ends when Postgres is back, and then deregisters."""
    worker = Worker(retry_interval=0.01).begin()
    worker.tracker.circuit._clock = time.monotonic
    job = worker.owe()
    claim = worker.run(job)
    with outage(worker.ledger):
        worker.end(claim)
        worker.session.flush()
        closing = threading.Thread(target=worker.session.close)
        closing.start()
        eventually(lambda: worker.session.closed)
    closing.join(10)

    assert worker.outcome(job) is Outcome.COMPLETED
    assert [row.left for row in worker.leader.workers(SOURCE.id)] == [True]


def test_no_deregistration_with_unwritten_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that cannot report its ends does not deregister, as the jobs would run again at once."""
    worker = Worker().begin()
    worker.tracker._patience = 0.0
    monkeypatch.setattr(worker.tracker._store, "probe", lambda: False)
    job = worker.owe()
    claim = worker.run(job)
    with outage(worker.ledger):
        worker.end(claim)
        worker.session.flush()
    worker.session.close()  # its beats reach Postgres again, but its ends do not

    assert len(worker.tracker.spool) == 1
    assert [row.left for row in worker.leader.workers(SOURCE.id)] == [False]
    monkeypatch.undo()
    worker.back()
    worker.tracker.close()
    assert worker.outcome(job) is Outcome.COMPLETED


def test_the_same_session_again_until_it_is_closed() -> None:
    """A process has one session for all its workers, which ends with the last; then comes a new one."""
    worker = Worker()
    first = worker.tracker.open_session(name="w", queues=["mail"])
    assert worker.tracker.open_session(name="w2", queues=["mail", "low"]) is first
    assert list(first.queues) == ["low", "mail"]

    first.close()
    assert not first.closed
    assert worker.tracker.open_session(name="w3", queues=["mail"]) is first
    for _ in range(3):  # of the worker of this test, "w2" and "w3"
        assert not first.closed
        first.close()
    assert first.closed
    second = worker.tracker.open_session(name="w", queues=["mail"])

    assert second is not first
    assert second.id != first.id
    assert worker.tracker.open_session(name="w2", queues=["mail"]) is second
    worker.tracker.close()  # It closes the session for all.
    assert second.closed


def test_a_deregistration_releases_its_claims() -> None:
    """Claims of a worker that deregistered are free at once, and count as no crash."""
    first = Worker().begin()
    second = Worker(first.ledger).begin()
    job = first.owe()
    first.run(job)

    first.session.close()

    assert second.start(job) == Claim(job.token, 2, crashes=0)
    assert first.ledger.host().claim(SOURCE.id, request(job, first.session.id)) == Refused(
        job.token, Refusal.CLAIMED
    )
