from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from jobguard.errors import BadRow, BreakerOpen, NotMigrated, NotWritten, StoreUnavailable
from jobguard.host.spool import Cancelled
from jobguard.host.tracker import HostTracker
from jobguard.model import Delivery, End, Outcome, Parent, Recorded, new_token
from jobguard.settings import Settings
from jobguard.store.protocols import HostStore, SourceRow
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
    source_row,
)


class Store:
    """A host's store that counts its calls and may fail as told."""

    def __init__(self, inner: HostStore) -> None:
        self._inner = inner
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.installation: str | None = None
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            if self.error is not None:
                raise self.error
            return method(*arguments, **named)

        return call

    def probe(self) -> bool:
        """Answer as the calls do; it is none."""
        if self.error is not None:
            raise self.error
        return self._inner.probe()

    def close(self) -> None:
        """Let go, and note it."""
        self.closed = True


class SessionTracker:
    """A process of the user's application, over a ledger in memory."""

    def __init__(self, ledger: MemoryLedger | None = None, **settings: Any) -> None:
        self.ledger = ledger or MemoryLedger()
        self.ledger.refuse(lambda text: "\x00" in text)
        self.settings = Settings(**{"namespace": NAMESPACE, "retry_interval": 1.0, **settings})
        self.stores: list[Store] = []
        self.tracker = HostTracker(SOURCE, self.settings, self._make)
        self.clock = Clock()
        self.tracker.circuit._clock = self.clock
        # Each test says itself when it is replayed.
        self.tracker._replay.drain = lambda: None  # type: ignore[method-assign]

    def _make(self) -> HostStore:
        store = Store(self.ledger.host())
        self.stores.append(store)
        return cast(HostStore, store)

    @property
    def store(self) -> Store:
        """The one that records go through."""
        return self.stores[0]

    def back(self) -> None:
        """Let the time pass after which the tracker looks for Postgres again."""
        self.clock.advance(self.settings.retry_interval)

    @property
    def owed(self) -> dict[str, UUID]:
        """What the ledger owes: tokens by job id."""
        page = leader_store(self.ledger).page(SOURCE.id, after=None, limit=10_000)
        return {owed.job_id: owed.token for owed in page}

    def outcome(self, token: UUID) -> Outcome | None:
        """How a delivery ended, if it has."""
        return leader_store(self.ledger).tombstones(SOURCE.id, [token]).get(token)


def test_record() -> None:
    """A delivery is owed when record() returns, and says whether somebody leads."""
    host = SessionTracker()
    first, second = delivery("first"), delivery("second")

    assert host.tracker.record([first]) == Recorded()
    leader_store(host.ledger).elect(lease=FOR_EVER)
    assert host.tracker.record([second]) == Recorded(leader_live=True)

    assert host.owed == {"first": first.token, "second": second.token}


def test_nothing_to_record_is_no_call() -> None:
    """An empty list opens no connection."""
    host = SessionTracker()

    assert host.tracker.record([]) == Recorded()
    assert host.store.calls == []


def test_no_call_before_the_first_need() -> None:
    """A tracker that was made has asked nothing of Postgres."""
    assert SessionTracker().store.calls == []


def test_a_large_bulk_is_one_statement() -> None:
    """A bulk larger than a replay's share goes by itself, whole."""
    host = SessionTracker()

    host.tracker.record([delivery(str(n)) for n in range(1000)])

    assert host.store.calls == ["register", "record"]
    assert len(host.owed) == 1000


def test_outbox() -> None:
    """A record may leave its push to the leader."""
    host = SessionTracker()
    job = delivery()

    host.tracker.record([job], outbox=True)

    watched = leader_store(host.ledger).watched(SOURCE.id, limit=9)
    assert [owed.token for owed in watched] == [job.token]


@pytest.mark.parametrize("settings", [{"when_redis_down": "raise"}, {"mode": "observe"}])
def test_no_outbox_for_what_is_not_accepted(settings: dict[str, Any]) -> None:
    """A leader would push what its sender is told has failed."""
    host = SessionTracker(**settings)
    host.tracker.record([delivery()], outbox=True)
    assert not leader_store(host.ledger).watched(SOURCE.id, limit=9)


def test_refused_are_my_own() -> None:
    """A caller hears of its own refused deliveries."""
    host = SessionTracker()
    parent = delivery("job")
    host.tracker.record([parent])
    host.tracker.cancel(tokens=[parent.token])
    late = delivery("job", parent=Parent(parent.token))

    assert host.tracker.record([late]).refused == {late.token}


def test_guards() -> None:
    """A tracker guards the queues it was told, and those it is told of later."""
    one = HostTracker(SOURCE, Settings(), MemoryLedger().host, queues=frozenset({"mail"}))
    assert one.guards("mail")
    assert not one.guards("video")

    one.guard_also(frozenset({"video"}))
    assert one.guards("video")
    assert not one.guards("film")

    one.guard_also(None)
    assert one.guards("film")


# -- Postgres away -----------------------------------------------------------------------------------


def test_spooled_and_replayed_in_order() -> None:
    """What Postgres could not take is owed, in order, after the first call that reaches it again."""
    host = SessionTracker()
    early = [delivery(f"early-{n}") for n in range(3)]
    with outage(host.ledger):
        for one in early:
            assert host.tracker.record([one]) == Recorded(spooled=True)
    assert len(host.tracker.spool) == 3
    host.back()

    host.tracker.record([delivery("late")])

    assert list(host.owed) == ["early-0", "early-1", "early-2", "late"]
    assert len(host.tracker.spool) == 0
    assert host.tracker.spool.counts.replayed == 3


def test_one_call_an_outage() -> None:
    """While Postgres is away one record finds out, and the others make no call."""
    host = SessionTracker()
    host.tracker.record([delivery("before")])
    host.store.error = StoreUnavailable()
    before = len(host.store.calls)

    for n in range(50):
        assert host.tracker.record([delivery(str(n))]).spooled

    assert len(host.store.calls) == before + 1


def test_raise() -> None:
    """when_postgres_down="raise": enqueue says so, and nothing is spooled."""
    host = SessionTracker(when_postgres_down="raise")
    with outage(host.ledger):
        with pytest.raises(StoreUnavailable):
            host.tracker.record([delivery()])
        with pytest.raises(BreakerOpen):
            host.tracker.record([delivery()])
        with pytest.raises(StoreUnavailable):
            host.tracker.cancel(job_ids=["job"])

    assert len(host.tracker.spool) == 1, "an intent to cancel what may have been recorded"


def test_what_was_recorded_though_its_sender_heard_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """when_postgres_down="raise", and only the answer was lost: nobody expects it to run."""
    host = SessionTracker(when_postgres_down="raise")
    first, second = delivery("first"), delivery("second")
    host.tracker.record([first])
    with monkeypatch.context() as patch:

        def slow(*args: Any, **options: Any) -> Recorded:
            record(*args, **options)
            raise StoreUnavailable("Postgres did not answer in time")

        record = host.store.record
        patch.setattr(host.store, "record", slow, raising=False)
        with pytest.raises(StoreUnavailable):
            host.tracker.record([second])
    assert set(host.owed.values()) == {first.token, second.token}
    host.tracker.replay()
    assert set(host.owed.values()) == {first.token}
    assert host.outcome(second.token) is Outcome.CANCELLED


def test_what_was_not_sent_need_not_be_cancelled() -> None:
    """when_postgres_down="raise": a process that was refused is not kept from its end for that."""
    host = SessionTracker(when_postgres_down="raise")
    host.store.error = NotWritten("connection refused")
    with pytest.raises(NotWritten):
        host.tracker.record([delivery()])
    assert len(host.tracker.spool) == 0


def test_of_many_of_which_one_is_bad_all_or_none_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """when_postgres_down="raise": one by one, and Postgres goes; to their sender none is recorded."""
    host = SessionTracker(when_postgres_down="raise")
    first, second = delivery("first"), delivery("second")
    with monkeypatch.context() as patch:

        def goes(source: int, deliveries: Sequence[Delivery], **options: Any) -> Recorded:
            if len(deliveries) > 1:
                raise BadRow("one of them")
            if deliveries[0] is second:
                raise NotWritten("connection refused")
            return cast(Recorded, record(source, deliveries, **options))

        record = host.store.record
        patch.setattr(host.store, "record", goes, raising=False)
        with pytest.raises(StoreUnavailable):
            host.tracker.record([first, second])
    assert set(host.owed.values()) == {first.token}
    host.tracker.replay()
    assert host.owed == {}
    assert host.outcome(first.token) is Outcome.CANCELLED


def test_a_cancel_means_what_was_there_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that keeps the statement brings it to a queue that has gone on."""
    host = SessionTracker()
    before, since = delivery("before"), delivery("since")
    host.tracker.record([before])

    def late(*args: Any, **what: Any) -> int:
        host.ledger.host().record(SOURCE.id, [since], namespace=NAMESPACE)
        return cast(int, cancel(*args, **what))

    cancel = host.store.cancel
    monkeypatch.setattr(host.store, "cancel", late, raising=False)
    host.tracker.cancel(queue=before.queue)
    assert set(host.owed.values()) == {since.token}
    assert host.outcome(before.token) is Outcome.CANCELLED


def test_what_a_run_sends_is_spooled_all_the_same() -> None:
    """when_postgres_down="raise" is for whoever can send it again: a run that is over cannot."""
    host = SessionTracker(when_postgres_down="raise")
    parent = delivery()
    host.tracker.record([parent])
    retry = delivery(parent=Parent(parent.token))
    sent = replace(delivery("other"), derived=True)
    with outage(host.ledger):
        assert host.tracker.record([retry]).spooled
        assert host.tracker.record([sent]).spooled
    host.back()
    host.tracker.replay()
    assert set(host.owed.values()) == {retry.token, sent.token}


def test_skip(caplog: pytest.LogCaptureFixture) -> None:
    """when_postgres_down="skip": the job goes unrecorded, which is counted and said."""
    host = SessionTracker(when_postgres_down="skip")
    with outage(host.ledger):
        assert host.tracker.record([delivery(), delivery()]) == Recorded(lost=True)

    assert len(host.tracker.spool) == 0
    assert host.tracker.spool.counts.lost == 2
    assert "record_skipped" in events(caplog.records)


def test_a_full_spool_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """What finds no place in the spool goes unrecorded, which is counted and said."""
    host = SessionTracker(spool_size=2)
    with outage(host.ledger):
        assert host.tracker.record([delivery("a"), delivery("b")]).spooled
        assert host.tracker.record([delivery("c")]) == Recorded(lost=True)
    assert host.tracker.spool.counts.lost == 1
    assert "spool_full" in events(caplog.records)

    host.back()
    host.tracker.connect()
    assert set(host.owed) == {"a", "b"}


def test_an_outage_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A busy producer does not fill its log with one outage."""
    host = SessionTracker()
    for _ in range(2):
        with outage(host.ledger):
            for n in range(20):
                host.tracker.record([delivery(str(n))])
        host.back()
        host.tracker.connect()

    assert events(caplog.records).count("record_spooled") == 2
    assert events(caplog.records).count("postgres_away") == 2


def test_a_full_spool_is_no_line_for_every_job(caplog: pytest.LogCaptureFixture) -> None:
    """A producer that goes on with a full spool writes one line, and its count when that is over."""
    host = SessionTracker(spool_size=2)
    with outage(host.ledger):
        for n in range(1000):
            host.tracker.record([delivery(str(n))])
        host.tracker.record([delivery("a"), delivery("b")])

    assert events(caplog.records).count("spool_full") == 1


def test_not_migrated_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A schema that is not there is a state of its own, with the command in the log."""
    host = SessionTracker()
    host.store.error = NotMigrated()

    assert host.tracker.record([delivery()]).spooled

    assert "not_migrated" in events(caplog.records)


def test_a_replay_that_is_cut_short_goes_on_later() -> None:
    """Postgres away again in the middle of a replay leaves the rest in the spool, and nothing twice."""
    host = SessionTracker()
    with outage(host.ledger):
        for n in range(600):
            host.tracker.record([delivery(str(n))])
    host.back()

    host.tracker.connect()
    assert 0 < len(host.owed) < 600
    left = len(host.tracker.spool)
    with outage(host.ledger):
        host.tracker.replay()
    assert len(host.tracker.spool) == left
    host.back()
    while len(host.tracker.spool):
        host.tracker.connect()

    assert list(host.owed) == [str(n) for n in range(600)]


def test_old_news_is_not_owed_again() -> None:
    """G1: a spooled record of what has ended meanwhile stays ended."""
    host = SessionTracker()
    job = delivery()
    with outage(host.ledger):
        host.tracker.record([job])
    host.ledger.host().end(
        SOURCE.id, [End(job.token, 0, Outcome.COMPLETED, new_token(), job_id="job")]
    )
    host.back()
    host.tracker.connect()

    assert host.owed == {}
    assert host.outcome(job.token) is Outcome.COMPLETED


def test_a_cancellation_is_spooled_after_its_record() -> None:
    """R8: a job that was recorded and cancelled during an outage is cancelled after it."""
    host = SessionTracker()
    job = delivery()
    with outage(host.ledger):
        host.tracker.record([job])
        host.tracker.cancel(job_ids=["job"])
    host.back()
    host.tracker.connect()

    assert host.owed == {}
    assert host.outcome(job.token) is Outcome.CANCELLED


def test_the_younger_life_of_an_id_wins() -> None:
    """An id enqueued in an outage and again after it is owed as it was enqueued last."""
    host = SessionTracker()
    older, younger = delivery("job"), delivery("job")
    with outage(host.ledger):
        host.tracker.record([older])
    host.back()

    host.tracker.record([younger])

    assert host.owed == {"job": younger.token}
    assert host.outcome(older.token) is Outcome.SUPERSEDED


def test_a_cancellation_right_after_the_outage() -> None:
    """R8: a job enqueued in an outage, and cancelled by the call that ends it, stays cancelled."""
    host = SessionTracker()
    with outage(host.ledger):
        host.tracker.record([delivery("job")])
    host.back()

    host.tracker.cancel(job_ids=["job"])

    assert host.owed == {}


_LATE = pytest.mark.parametrize("waiting", [0, 300])
"""A call carries along less than the larger number: the cancellation is replayed by a later one."""
_WHAT = pytest.mark.parametrize(
    "what", [{"job_ids": ["job"]}, {"queue": "mail"}], ids=["id", "queue"]
)


def _fill(host: SessionTracker, waiting: int) -> None:
    host.tracker.record([delivery(f"other-{n}", queue="film") for n in range(waiting)])


def _drain(host: SessionTracker) -> None:
    while len(host.tracker.spool):
        host.tracker.connect()


@_LATE
@_WHAT
def test_a_late_cancellation_spares_what_is_recorded_after_the_outage(
    what: dict[str, Any], waiting: int
) -> None:
    """R8: who enqueues an id, or to a queue, after it was cancelled means a new life of it."""
    host = SessionTracker()
    old = delivery("job")
    host.tracker.record([old])
    with outage(host.ledger):
        _fill(host, waiting)
        host.tracker.cancel(**what)
    host.back()

    new = delivery("job", token=new_token())
    host.tracker.record([new])
    _drain(host)

    assert host.owed["job"] == new.token
    assert host.outcome(old.token) is (Outcome.SUPERSEDED if waiting else Outcome.CANCELLED)
    assert len(host.owed) == waiting + 1


@_LATE
@_WHAT
def test_a_late_cancellation_spares_what_was_enqueued_behind_it(
    what: dict[str, Any], waiting: int
) -> None:
    """R8: also while the outage lasts; what waited before it is cancelled, and nothing else."""
    host = SessionTracker()
    old, new = delivery("job"), delivery("job")
    with outage(host.ledger):
        _fill(host, waiting)
        host.tracker.record([old])
        host.tracker.cancel(**what)
        host.tracker.record([new])
    host.back()
    _drain(host)

    assert host.owed["job"] == new.token
    assert host.outcome(old.token) is Outcome.CANCELLED
    assert len(host.owed) == waiting + 1


@_LATE
@_WHAT
def test_a_late_cancellation_finds_what_was_recorded_or_waited_before_it(
    what: dict[str, Any], waiting: int
) -> None:
    """R8: what stood in the ledger before the outage ends with what was enqueued in it."""
    host = SessionTracker()
    recorded, kept = delivery("job", fresh=True), delivery("job", fresh=True)
    host.tracker.record([recorded])
    with outage(host.ledger):
        _fill(host, waiting)
        host.tracker.record([kept])
        host.tracker.cancel(**what)
    host.back()
    _drain(host)

    assert host.outcome(recorded.token) is Outcome.CANCELLED
    assert host.outcome(kept.token) is Outcome.CANCELLED
    assert len(host.owed) == waiting


@_WHAT
def test_a_cancellation_told_twice_spares_what_came_between(what: dict[str, Any]) -> None:
    """R8: one that is told at once, and again after what waited, means the same both times."""
    host = SessionTracker()
    old = delivery("job")
    with outage(host.ledger):
        _fill(host, 600)
        host.tracker.record([old])
    host.back()

    host.tracker.cancel(**what)
    new = delivery("job", token=new_token())
    host.tracker.record([new])
    _drain(host)

    assert host.owed["job"] == new.token
    assert host.outcome(old.token) is Outcome.SUPERSEDED
    assert len(host.owed) == 601


@_WHAT
def test_a_late_cancellation_spares_what_others_recorded_since(what: dict[str, Any]) -> None:
    """R8: another process, whose clock may be behind, is known by when its record came."""
    clock = Clock()
    host = SessionTracker(MemoryLedger(clock=clock.wall))
    other = SessionTracker(host.ledger)
    old, new = delivery("job", fresh=True), delivery("job", fresh=True)
    other.tracker.record([old])
    clock.advance(10)
    made_at = time.monotonic() - 60
    reported = Cancelled((), tuple(what.get("job_ids", ())), what.get("queue"), made_at=made_at)
    host.tracker.spool.put([reported])
    clock.advance(60)
    other.tracker.record([new])

    host.tracker.connect()

    assert host.owed == {"job": new.token}
    assert host.outcome(old.token) is Outcome.CANCELLED


@_WHAT
def test_a_late_cancellation_that_is_long_on_its_way_spares_what_its_process_sent(
    what: dict[str, Any],
) -> None:
    """R8: its age does not tell how long it was on its way; the tokens of this process do."""
    clock = Clock()
    host = SessionTracker(MemoryLedger(clock=clock.wall))
    old = delivery("job", fresh=True)
    host.tracker.record([old])
    with outage(host.ledger):
        _fill(host, 300)
        host.tracker.cancel(**what)
    host.back()
    new = delivery("job", fresh=True, token=new_token())
    host.tracker.record([new])
    clock.advance(60)

    _drain(host)

    assert host.owed["job"] == new.token
    assert host.outcome(old.token) is Outcome.CANCELLED


def test_a_late_cancellation_of_a_delivery_finds_it_whenever_it_was_recorded() -> None:
    """R8: a token means one delivery, and none that could be taken for it."""
    host = SessionTracker()
    job = delivery("job")
    with outage(host.ledger):
        _fill(host, 300)
        host.tracker.cancel(tokens=[job.token])
    host.back()
    host.tracker.record([job])
    _drain(host)

    assert host.outcome(job.token) is Outcome.CANCELLED
    assert len(host.owed) == 300


# -- bad rows ----------------------------------------------------------------------------------------


def test_a_bad_row_is_quarantined_and_the_rest_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """Of a bulk with a bad row the others are recorded; the circuit stays closed."""
    host = SessionTracker()
    rows = [delivery("a"), delivery("b\x00d"), delivery("c")]

    recorded = host.tracker.record(rows)

    assert recorded.lost
    assert set(host.owed) == {"a", "c"}
    assert host.tracker.spool.counts.quarantined == 1
    assert host.tracker.circuit.closed
    assert "row_refused" in events(caplog.records)


def test_a_bad_row_in_the_spool() -> None:
    """A bad row among spooled records is quarantined at the replay; the others are recorded."""
    host = SessionTracker()
    with outage(host.ledger):
        for job_id in ("a", "b\x00d", "c"):
            host.tracker.record([delivery(job_id)])
    host.back()
    host.tracker.connect()

    assert set(host.owed) == {"a", "c"}
    assert host.tracker.spool.counts.quarantined == 1
    assert len(host.tracker.spool) == 0


def test_a_bad_end_in_the_spool() -> None:
    """A bad end among spooled entries is quarantined, and does not block what stands behind it."""
    host = SessionTracker()
    bad = End(new_token(), 0, Outcome.COMPLETED, new_token(), job_id="b\x00d")
    with outage(host.ledger):
        host.tracker.record([delivery("a")])
        host.tracker.spool.put([bad])
        host.tracker.record([delivery("c")])
    host.back()
    host.tracker.connect()

    assert set(host.owed) == {"a", "c"}
    assert len(host.tracker.spool) == 0


# -- the host goes on --------------------------------------------------------------------------------


def test_an_unforeseen_error_is_not_the_hosts(caplog: pytest.LogCaptureFixture) -> None:
    """R7: whatever goes wrong in a record, the host's enqueue goes on, and it is counted."""
    host = SessionTracker()
    host.store.error = RuntimeError("a bug of ours")

    assert host.tracker.record([delivery()]) == Recorded(lost=True)
    assert host.tracker.spool.counts.lost == 1
    assert "record_lost" in events(caplog.records)

    host.tracker.withdraw([delivery()])
    host.tracker.leave_to_outbox([new_token()])
    host.tracker.cancel(job_ids=["job"])
    assert not host.tracker.heartbeat("job")


def test_another_installation_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A database of another name is not written to, the host goes on, and the log says why."""
    host = SessionTracker(installation="production")
    host.store.installation = "staging"

    for _ in range(3):
        assert host.tracker.record([delivery()]) == Recorded(lost=True)
    host.tracker.cancel(job_ids=["job"])

    assert host.store.calls == ["register"]
    assert host.owed == {}
    assert events(caplog.records).count("wrong_installation") == 1


def test_the_right_installation_is_not() -> None:
    """A database of the name that was asked for is used."""
    host = SessionTracker(installation="production")
    host.store.installation = "production"

    host.tracker.record([delivery("job")])

    assert set(host.owed) == {"job"}


def test_settings_that_disagree_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """A process whose settings differ from those of who came first says both, once, and works on."""
    ledger = MemoryLedger()
    first, second = SessionTracker(ledger), SessionTracker(ledger, mode="observe")
    first.tracker.record([delivery("a")])
    assert events(caplog.records) == []

    second.tracker.record([delivery("b")])
    second.tracker.record([delivery("c")])

    assert events(caplog.records) == ["settings_differ"]
    assert "mode=observe" in caplog.text
    assert set(first.owed) == {"a", "b", "c"}


def test_withdraw() -> None:
    """A first delivery that was surely not pushed can be taken back."""
    host = SessionTracker()
    job = delivery()
    host.tracker.record([job])

    host.tracker.withdraw([job])

    assert host.owed == {}
    assert host.outcome(job.token) is None


@pytest.mark.parametrize(
    ("settings", "recorded", "accepted"),
    [
        ({}, Recorded(leader_live=True), True),
        ({}, Recorded(), False),
        ({}, Recorded(leader_live=True, lost=True), False),
        ({}, Recorded(leader_live=True, refused=frozenset({uuid4()})), False),
        ({"when_redis_down": "raise"}, Recorded(leader_live=True), False),
        ({"mode": "observe"}, Recorded(leader_live=True), False),
    ],
)
def test_accepting_without_redis(
    settings: dict[str, Any], recorded: Recorded, accepted: bool
) -> None:
    """A job is accepted while Redis is away only if it is recorded and somebody leads who will push."""
    assert SessionTracker(**settings).tracker.accepts_without_broker(recorded) is accepted


def test_no_client_no_doubt() -> None:
    """A tracker without a Redis client of its own has no doubts."""
    host = SessionTracker()
    host.tracker.broker_failed()

    assert not host.tracker.broker_in_doubt()


def test_heartbeat() -> None:
    """A running job's progress is noted; unknown ids are ignored."""
    host = SessionTracker()
    job = delivery("job")
    host.tracker.record([job])
    worker = new_token()
    host.ledger.host().claim(SOURCE.id, request(job, worker))

    assert host.tracker.heartbeat("job", progress=0.5, attrs={"step": 2})
    assert not host.tracker.heartbeat("unknown", progress=0.5)


# -- forks and threads -------------------------------------------------------------------------------


def in_a_child(work: Callable[[], bool]) -> None:
    """Fork, and have the child do this; fails unless it answers True within a few seconds."""
    pid = os.fork()
    if pid == 0:
        good = False
        try:
            good = work()
        finally:
            os._exit(0 if good else 1)
    watchdog = threading.Timer(20, os.kill, (pid, 9))
    watchdog.start()
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        watchdog.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_shares_no_lock_and_no_connection() -> None:
    """A child forked while a thread of the parent holds every lock records on a store of its own."""
    host = SessionTracker()
    host.tracker.record([delivery("parent")])
    stores = len(host.stores)

    def child() -> bool:
        recorded = host.tracker.record([delivery("child")])
        return (
            recorded == Recorded()
            and len(host.stores) == stores + 1
            and "record" in host.stores[-1].calls
            and not host.store.closed
        )

    commit = host.tracker._commit
    with (
        commit._committing,
        commit._joining,
        host.tracker._registering,
        host.tracker._replay._replaying,
    ):
        in_a_child(child)
    assert len(host.stores) == stores


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_knows_of_the_outage_and_leaves_the_parents_spool() -> None:
    """A child begins with its parent's open circuit, and replays nothing of its parent's."""
    host = SessionTracker()
    with outage(host.ledger):
        host.tracker.record([delivery("parent")])

        def child() -> bool:
            answer = host.tracker.record([delivery("child")])
            mine = list(host.tracker.spool.peek(9))
            return (
                answer == Recorded(spooled=True)
                and len(host.stores[-1].calls) <= 1  # a short life looks at once
                and [entry.job_id for entry in mine if isinstance(entry, Delivery)] == ["child"]
            )

        in_a_child(child)
    assert len(host.tracker.spool) == 1


def test_many_threads_through_an_outage() -> None:
    """Of what many threads record while Postgres comes and goes, nothing is lost."""
    host = SessionTracker()
    started = threading.Barrier(9)

    def produce(name: int) -> None:
        started.wait(10)
        for n in range(50):
            host.tracker.record([delivery(f"{name}-{n}")])

    threads = [threading.Thread(target=produce, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    started.wait(10)
    for _ in range(20):
        with outage(host.ledger):
            host.clock.advance(0.1)
        host.back()
    for thread in threads:
        thread.join(30)
    host.back()
    while len(host.tracker.spool):
        host.back()
        host.tracker.connect()

    assert len(host.owed) == 400
    assert host.tracker.spool.counts.lost == 0


# -- the end -----------------------------------------------------------------------------------------


def test_close_replays() -> None:
    """close() writes what waits, and lets go of the store."""
    host = SessionTracker()
    with outage(host.ledger):
        host.tracker.record([delivery("job")])
    host.back()

    host.tracker.close()

    assert set(host.owed) == {"job"}
    assert host.store.closed


def test_close_in_an_outage_says_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """close() does not hang on an outage: it says how much is lost with this process."""
    host = SessionTracker()
    with outage(host.ledger):
        host.tracker.record([delivery("job")])
        host.tracker.close()

    assert "spool_left" in events(caplog.records)


def test_the_source_is_registered_once() -> None:
    """A process makes its source known once, with its fingerprint."""
    host = SessionTracker()
    for n in range(3):
        host.tracker.record([delivery(str(n))])

    assert host.store.calls.count("register") == 1
    (row,) = leader_store(host.ledger).sources()
    expected: SourceRow = replace(source_row(), settings=host.settings.fingerprint())
    assert row == expected


def test_a_write_that_only_fails_in_company() -> None:
    """A BadRow for a batch of threads is pinned on the bad one, whoever leads."""
    host = SessionTracker()
    begun, go_on = threading.Event(), threading.Event()
    real = host.tracker._commit._write

    def slowly(rows: Sequence[Delivery]) -> Recorded:
        begun.set()
        go_on.wait(10)
        return real(rows)

    host.tracker._commit._write = slowly
    answers: dict[str, Recorded] = {}

    def record(job_id: str) -> None:
        answers[job_id] = host.tracker.record([delivery(job_id)])

    threads = [threading.Thread(target=record, args=(j,)) for j in ("first", "good", "b\x00d")]
    threads[0].start()
    assert begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(10)

    assert answers["b\x00d"] == Recorded(lost=True)
    assert answers["first"] == answers["good"] == Recorded()
    assert set(host.owed) == {"first", "good"}


def test_bad_rows_are_no_outage() -> None:
    """BadRow never opens the circuit."""
    host = SessionTracker()
    for _ in range(10):
        host.tracker.record([delivery("b\x00d")])
    assert host.tracker.circuit.closed
    with pytest.raises(BadRow):
        host.tracker._commit.submit([delivery("b\x00d")])


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    """Hear warnings and worse."""
    caplog.set_level(logging.WARNING, "jobguard")
