from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast
from unittest.mock import Mock
from uuid import UUID, uuid4

import pytest
import redis

from jobguard.errors import BadRow, BreakerOpen, NotMigrated, NotWritten, StoreUnavailable
from jobguard.host import tracker as tracker_module
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
    """A host's store that counts its calls and may raise a prepared error."""

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
        """Answer as the calls do, without counting as one."""
        if self.error is not None:
            raise self.error
        return self._inner.probe()

    def close(self) -> None:
        """Close the store, and note it."""
        self.closed = True


class HostProcess:
    """A process of the user's application, with a ledger in memory."""

    def __init__(self, ledger: MemoryLedger | None = None, **settings: Any) -> None:
        self.ledger = ledger or MemoryLedger()
        self.ledger.refuse(lambda text: "\x00" in text)
        self.settings = Settings(**{"namespace": NAMESPACE, "retry_interval": 1.0, **settings})
        self.stores: list[Store] = []
        self.tracker = HostTracker(SOURCE, self.settings, self._make)
        self.clock = Clock()
        self.tracker.circuit._clock = self.clock
        # Each test calls the replay itself.
        self.tracker._replay.drain = lambda: None  # type: ignore[method-assign]

    def _make(self) -> HostStore:
        store = Store(self.ledger.host())
        self.stores.append(store)
        return cast(HostStore, store)

    @property
    def store(self) -> Store:
        """Return the store that records go through."""
        return self.stores[0]

    def back(self) -> None:
        """Let the time pass after which the circuit checks Postgres again."""
        self.clock.advance(self.settings.retry_interval)

    @property
    def owed(self) -> dict[str, UUID]:
        """Return the owed tokens of the ledger by job id."""
        page = leader_store(self.ledger).page(SOURCE.id, after=None, limit=10_000)
        return {owed.job_id: owed.token for owed in page}

    def outcome(self, token: UUID) -> Outcome | None:
        """Return how a delivery has ended, or None."""
        return leader_store(self.ledger).tombstones(SOURCE.id, [token]).get(token)


def test_record() -> None:
    """A delivery is owed when record() returns, and the answer says whether a reconciler leads."""
    host = HostProcess()
    first, second = delivery("first"), delivery("second")

    assert host.tracker.record([first]) == Recorded()
    leader_store(host.ledger).elect(lease=FOR_EVER)
    assert host.tracker.record([second]) == Recorded(leader_live=True)

    assert host.owed == {"first": first.token, "second": second.token}


def test_nothing_to_record_is_no_call() -> None:
    """An empty list opens no connection."""
    host = HostProcess()

    assert host.tracker.record([]) == Recorded()
    assert host.store.calls == []


def test_no_call_before_the_first_need() -> None:
    """A new tracker makes no call to Postgres."""
    assert HostProcess().store.calls == []


def test_a_large_bulk_is_one_statement() -> None:
    """A bulk larger than a replay batch is one statement of its own."""
    host = HostProcess()

    host.tracker.record([delivery(str(n)) for n in range(1000)])

    assert host.store.calls == ["register", "record"]
    assert len(host.owed) == 1000


def test_outbox() -> None:
    """A record may leave its push to the leader."""
    host = HostProcess()
    job = delivery()

    host.tracker.record([job], outbox=True)

    watched = leader_store(host.ledger).watched(SOURCE.id, limit=9)
    assert [owed.token for owed in watched] == [job.token]


@pytest.mark.parametrize("settings", [{"when_redis_down": "raise"}, {"mode": "observe"}])
def test_no_outbox_for_what_is_not_accepted(settings: dict[str, Any]) -> None:
    """Without accept, a record is not left to the leader, because its sender receives the error."""
    host = HostProcess(**settings)
    host.tracker.record([delivery()], outbox=True)
    assert not leader_store(host.ledger).watched(SOURCE.id, limit=9)


def test_refused_are_my_own() -> None:
    """A caller gets only its own refused deliveries."""
    host = HostProcess()
    parent = delivery("job")
    host.tracker.record([parent])
    host.tracker.cancel(tokens=[parent.token])
    late = delivery("job", parent=Parent(parent.token))

    assert host.tracker.record([late]).refused == {late.token}


def test_guards() -> None:
    """A tracker guards the queues of its construction, and those that are added later."""
    one = HostTracker(SOURCE, Settings(), MemoryLedger().host, queues=frozenset({"mail"}))
    assert one.guards("mail")
    assert not one.guards("video")

    one.guard_also(frozenset({"video"}))
    assert one.guards("video")
    assert not one.guards("film")

    one.guard_also(None)
    assert one.guards("film")


# -- Postgres away ---------------------------------------------------------------------------------


def test_spooled_and_replayed_in_order() -> None:
    """Deliveries that Postgres could not take are recorded in order by the first call that reaches it."""
    host = HostProcess()
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
    """While Postgres is away, one record finds out, and the others make no call."""
    host = HostProcess()
    host.tracker.record([delivery("before")])
    host.store.error = StoreUnavailable()
    before = len(host.store.calls)

    for n in range(50):
        assert host.tracker.record([delivery(str(n))]).spooled

    assert len(host.store.calls) == before + 1


def test_raise() -> None:
    """With when_postgres_down="raise", enqueue raises, and no record is spooled."""
    host = HostProcess(when_postgres_down="raise")
    with outage(host.ledger):
        with pytest.raises(StoreUnavailable):
            host.tracker.record([delivery()])
        with pytest.raises(BreakerOpen):
            host.tracker.record([delivery()])
        with pytest.raises(StoreUnavailable):
            host.tracker.cancel(job_ids=["job"])

    assert len(host.tracker.spool) == 1, "an intent to cancel what may have been recorded"


def test_what_was_recorded_although_its_sender_got_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With "raise", a record whose answer was lost is cancelled, because its sender got an error."""
    host = HostProcess(when_postgres_down="raise")
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
    """With "raise", a delivery that was surely not written needs no cancel in the spool."""
    host = HostProcess(when_postgres_down="raise")
    host.store.error = NotWritten("connection refused")
    with pytest.raises(NotWritten):
        host.tracker.record([delivery()])
    assert len(host.tracker.spool) == 0


def test_of_many_of_which_one_is_bad_all_or_none_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With "raise", if Postgres goes away in a bulk written one by one, all its records are cancelled."""
    host = HostProcess(when_postgres_down="raise")
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
    """A cancel does not mean deliveries that were recorded while the network delayed the statement."""
    host = HostProcess()
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


def test_what_a_run_sends_is_spooled_with_raise() -> None:
    """With "raise", deliveries of a run that is over are spooled, because the run cannot send again."""
    host = HostProcess(when_postgres_down="raise")
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
    """With when_postgres_down="skip", the job goes unrecorded, and this is counted and logged."""
    host = HostProcess(when_postgres_down="skip")
    with outage(host.ledger):
        assert host.tracker.record([delivery(), delivery()]) == Recorded(lost=True)

    assert len(host.tracker.spool) == 0
    assert host.tracker.spool.counts.lost == 2
    assert "record_skipped" in events(caplog.records)


def test_a_full_spool_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A record without room in the spool is lost, and this is counted and logged."""
    host = HostProcess(spool_size=2)
    with outage(host.ledger):
        assert host.tracker.record([delivery("a"), delivery("b")]).spooled
        assert host.tracker.record([delivery("c")]) == Recorded(lost=True)
    assert host.tracker.spool.counts.lost == 1
    assert "spool_full" in events(caplog.records)

    host.back()
    host.tracker.connect()
    assert set(host.owed) == {"a", "b"}


def test_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """One outage does not fill the log of a busy producer."""
    host = HostProcess()
    for _ in range(2):
        with outage(host.ledger):
            for n in range(20):
                host.tracker.record([delivery(str(n))])
        host.back()
        host.tracker.connect()

    assert events(caplog.records).count("record_spooled") == 2
    assert events(caplog.records).count("postgres_away") == 2


def test_a_full_spool_is_no_line_for_every_job(caplog: pytest.LogCaptureFixture) -> None:
    """A producer with a full spool logs one line, and the count when the spool has room again."""
    host = HostProcess(spool_size=2)
    with outage(host.ledger):
        for n in range(1000):
            host.tracker.record([delivery(str(n))])
        host.tracker.record([delivery("a"), delivery("b")])

    assert events(caplog.records).count("spool_full") == 1


def test_not_migrated_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A missing schema has a log line of its own, with the command to run."""
    host = HostProcess()
    host.store.error = NotMigrated()

    assert host.tracker.record([delivery()]).spooled

    assert "not_migrated" in events(caplog.records)


def test_a_replay_that_is_cut_short_goes_on_later() -> None:
    """If Postgres goes away during a replay, the rest stays in the spool, and nothing is written twice."""
    host = HostProcess()
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


def test_an_ended_delivery_is_not_owed_again() -> None:
    """A spooled record of a delivery that has ended in between stays ended."""
    host = HostProcess()
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
    """A job that was recorded and cancelled in an outage is cancelled after it."""
    host = HostProcess()
    job = delivery()
    with outage(host.ledger):
        host.tracker.record([job])
        host.tracker.cancel(job_ids=["job"])
    host.back()
    host.tracker.connect()

    assert host.owed == {}
    assert host.outcome(job.token) is Outcome.CANCELLED


def test_the_younger_life_of_an_id_wins() -> None:
    """A job id enqueued in an outage and again after it is owed as the last one."""
    host = HostProcess()
    older, younger = delivery("job"), delivery("job")
    with outage(host.ledger):
        host.tracker.record([older])
    host.back()

    host.tracker.record([younger])

    assert host.owed == {"job": younger.token}
    assert host.outcome(older.token) is Outcome.SUPERSEDED


def test_a_cancellation_right_after_the_outage() -> None:
    """A job enqueued in an outage, and cancelled by the call that ends it, stays cancelled."""
    host = HostProcess()
    with outage(host.ledger):
        host.tracker.record([delivery("job")])
    host.back()

    host.tracker.cancel(job_ids=["job"])

    assert host.owed == {}


_LATE = pytest.mark.parametrize("waiting", [0, 300])
"""One call writes fewer entries than the larger number, so a later call replays the cancel."""
_WHAT = pytest.mark.parametrize(
    "what", [{"job_ids": ["job"]}, {"queue": "mail"}], ids=["id", "queue"]
)


def _fill(host: HostProcess, waiting: int) -> None:
    host.tracker.record([delivery(f"other-{n}", queue="film") for n in range(waiting)])


def _drain(host: HostProcess) -> None:
    while len(host.tracker.spool):
        host.tracker.connect()


@_LATE
@_WHAT
def test_a_late_cancellation_spares_what_is_recorded_after_the_outage(
    what: dict[str, Any], waiting: int
) -> None:
    """A job with the id or queue of an earlier cancel that is enqueued after it is a new life."""
    host = HostProcess()
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
    """A job enqueued after the cancel within the outage stays; only those before it are cancelled."""
    host = HostProcess()
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
    """A cancel ends a job recorded before the outage, and one enqueued in it before the cancel."""
    host = HostProcess()
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
def test_a_cancellation_written_twice_spares_what_came_between(what: dict[str, Any]) -> None:
    """A cancel that is written at once and again after the spool means the same both times."""
    host = HostProcess()
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
    """The record time of the ledger counts for other processes, whose clocks may be behind."""
    clock = Clock()
    host = HostProcess(MemoryLedger(clock=clock.wall))
    other = HostProcess(host.ledger)
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
    """The tokens of this process show what came after a cancel that took long to arrive."""
    clock = Clock()
    host = HostProcess(MemoryLedger(clock=clock.wall))
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
    """A cancel by token ends that delivery, even if it was recorded later."""
    host = HostProcess()
    job = delivery("job")
    with outage(host.ledger):
        _fill(host, 300)
        host.tracker.cancel(tokens=[job.token])
    host.back()
    host.tracker.record([job])
    _drain(host)

    assert host.outcome(job.token) is Outcome.CANCELLED
    assert len(host.owed) == 300


# -- bad rows --------------------------------------------------------------------------------------


def test_a_bad_row_is_quarantined_and_the_rest_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """Of a bulk with a bad row the others are recorded, and the circuit stays closed."""
    host = HostProcess()
    rows = [delivery("a"), delivery("b\x00d"), delivery("c")]

    recorded = host.tracker.record(rows)

    assert recorded.lost
    assert set(host.owed) == {"a", "c"}
    assert host.tracker.spool.counts.quarantined == 1
    assert host.tracker.circuit.closed
    assert "row_refused" in events(caplog.records)


def test_a_bad_row_in_the_spool() -> None:
    """A bad row among spooled records is quarantined at the replay; the others are recorded."""
    host = HostProcess()
    with outage(host.ledger):
        for job_id in ("a", "b\x00d", "c"):
            host.tracker.record([delivery(job_id)])
    host.back()
    host.tracker.connect()

    assert set(host.owed) == {"a", "c"}
    assert host.tracker.spool.counts.quarantined == 1
    assert len(host.tracker.spool) == 0


def test_a_bad_end_in_the_spool() -> None:
    """A bad end among spooled entries is quarantined, and does not block the entries after it."""
    host = HostProcess()
    bad = End(new_token(), 0, Outcome.COMPLETED, new_token(), job_id="b\x00d")
    with outage(host.ledger):
        host.tracker.record([delivery("a")])
        host.tracker.spool.put([bad])
        host.tracker.record([delivery("c")])
    host.back()
    host.tracker.connect()

    assert set(host.owed) == {"a", "c"}
    assert len(host.tracker.spool) == 0


# -- the host goes on ------------------------------------------------------------------------------


def test_an_unforeseen_error_is_not_the_hosts(caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected error in a record is counted, and the host's enqueue goes on."""
    host = HostProcess()
    host.store.error = RuntimeError("a bug of ours")

    assert host.tracker.record([delivery()]) == Recorded(lost=True)
    assert host.tracker.spool.counts.lost == 1
    assert "record_lost" in events(caplog.records)

    host.tracker.withdraw([delivery()])
    host.tracker.leave_to_outbox([new_token()])
    host.tracker.cancel(job_ids=["job"])
    assert not host.tracker.heartbeat("job")


def test_another_installation_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A database of another installation is not written to; the host goes on and the reason is logged."""
    host = HostProcess(installation="production")
    host.store.installation = "staging"

    for _ in range(3):
        assert host.tracker.record([delivery()]) == Recorded(lost=True)
    host.tracker.cancel(job_ids=["job"])

    assert host.store.calls == ["register"]
    assert host.owed == {}
    assert events(caplog.records).count("wrong_installation") == 1


def test_the_right_installation_is_not() -> None:
    """A database of the configured installation is used."""
    host = HostProcess(installation="production")
    host.store.installation = "production"

    host.tracker.record([delivery("job")])

    assert set(host.owed) == {"job"}


def test_settings_that_disagree_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A process whose settings differ from those of the first process logs both, once, and works on."""
    ledger = MemoryLedger()
    first, second = HostProcess(ledger), HostProcess(ledger, mode="observe")
    first.tracker.record([delivery("a")])
    assert events(caplog.records) == []

    second.tracker.record([delivery("b")])
    second.tracker.record([delivery("c")])

    assert events(caplog.records) == ["settings_differ"]
    assert "mode=observe" in caplog.text
    assert set(first.owed) == {"a", "b", "c"}


def test_withdraw() -> None:
    """A first delivery that was surely not pushed can be withdrawn."""
    host = HostProcess()
    job = delivery()
    host.tracker.record([job])

    host.tracker.withdraw([job])

    assert host.owed == {}
    assert host.outcome(job.token) is None


def test_withdrawing_what_is_just_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that another thread is writing from the spool is withdrawn when Postgres has it."""
    host = HostProcess(call_timeout=60.0)
    job = delivery()
    with outage(host.ledger):
        assert host.tracker.record([job]).spooled
    host.back()
    begun, goes_on = threading.Event(), threading.Event()
    write = host.tracker._replay._write

    def slowly(entries: Sequence[Any]) -> bool:
        begun.set()
        assert goes_on.wait(60)
        return write(entries)

    monkeypatch.setattr(host.tracker._replay, "_write", slowly)
    writer = threading.Thread(target=host.tracker.replay)
    withdrawal = threading.Thread(target=host.tracker.withdraw, args=([job],))
    writer.start()
    assert begun.wait(60)
    withdrawal.start()
    withdrawal.join(0.1)  # it waits, or the test fails below
    goes_on.set()
    writer.join()
    withdrawal.join()

    assert host.owed == {}


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
    """While Redis is away, a job is accepted only if it is recorded and a leader will push it."""
    assert HostProcess(**settings).tracker.accepts_without_broker(recorded) is accepted


def test_no_client_never_away() -> None:
    """A tracker without a Redis client never reports that Redis is away."""
    host = HostProcess()
    host.tracker.broker_failed()

    assert not host.tracker.broker_in_doubt()


def test_heartbeat() -> None:
    """A running job's progress is noted; unknown ids are ignored."""
    host = HostProcess()
    job = delivery("job")
    host.tracker.record([job])
    worker = new_token()
    host.ledger.host().claim(SOURCE.id, request(job, worker))

    assert host.tracker.heartbeat("job", progress=0.5, attrs={"step": 2})
    assert not host.tracker.heartbeat("unknown", progress=0.5)


# -- forks and threads -----------------------------------------------------------------------------


def in_a_child(work: Callable[[], bool]) -> None:
    """Fork, and call this in the child; fail unless it returns True within a few seconds."""
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
    """A child that was forked while a thread had every lock records with its own store."""
    host = HostProcess()
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
    assert commit._committing.take(0) and host.tracker._replay._replaying.take(0)
    with commit._joining, host.tracker._registering:
        in_a_child(child)
    assert len(host.stores) == stores


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_knows_of_the_outage_and_leaves_the_parents_spool() -> None:
    """A child starts with its parent's open circuit, and replays nothing of its parent's spool."""
    host = HostProcess()
    with outage(host.ledger):
        host.tracker.record([delivery("parent")])

        def child() -> bool:
            answer = host.tracker.record([delivery("child")])
            mine = list(host.tracker.spool.peek(9))
            return (
                answer == Recorded(spooled=True)
                and len(host.stores[-1].calls) <= 1  # a short life checks at once
                and [entry.job_id for entry in mine if isinstance(entry, Delivery)] == ["child"]
            )

        in_a_child(child)
    assert len(host.tracker.spool) == 1


def test_many_threads_through_an_outage() -> None:
    """No record of many threads is lost while Postgres goes away and comes back."""
    host = HostProcess()
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


# -- the end ---------------------------------------------------------------------------------------


def test_close_replays() -> None:
    """close() writes waiting entries, and closes the store."""
    host = HostProcess()
    with outage(host.ledger):
        host.tracker.record([delivery("job")])
    host.back()

    host.tracker.close()

    assert set(host.owed) == {"job"}
    assert host.store.closed


def test_close_in_an_outage_says_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """close() does not hang in an outage, and logs how many entries are lost with this process."""
    host = HostProcess()
    with outage(host.ledger):
        host.tracker.record([delivery("job")])
        host.tracker.close()

    assert "spool_left" in events(caplog.records)


def test_the_source_is_registered_once() -> None:
    """A process registers its source once, with its fingerprint."""
    host = HostProcess()
    for n in range(3):
        host.tracker.record([delivery(str(n))])

    assert host.store.calls.count("register") == 1
    (row,) = leader_store(host.ledger).sources()
    expected: SourceRow = replace(source_row(), settings=host.settings.fingerprint())
    assert row == expected


def test_a_write_that_only_fails_in_company() -> None:
    """A BadRow for a batch of several threads reaches only the caller of the bad row."""
    host = HostProcess()
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
    host = HostProcess()
    for _ in range(10):
        host.tracker.record([delivery("b\x00d")])
    assert host.tracker.circuit.closed
    with pytest.raises(BadRow):
        host.tracker._commit.submit([delivery("b\x00d")])


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> None:
    """Capture warnings and errors."""
    caplog.set_level(logging.WARNING, "jobguard")


def test_a_record_and_its_push_overlap() -> None:
    """The record of a plain delivery is under way while it is pushed, once the source is registered."""
    process = HostProcess()
    first, it = delivery("first", fresh=True), delivery("a", fresh=True)
    assert process.tracker.record_beside([first]) is None
    process.tracker.record([first])
    beside = process.tracker.record_beside([it])
    assert beside is not None
    # Others share the next commit.
    assert process.tracker.record_beside([delivery("b", fresh=True)]) is None
    assert beside.result().written
    assert set(process.owed) == {"first", "a"}
    assert process.tracker.record_beside([delivery("b", fresh=True)]) is not None


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ([delivery("a")], {}),
        ([delivery("a", fresh=True, parent=Parent(new_token()))], {}),
        ([delivery("a", fresh=True, derived=True)], {}),
        ([delivery("a", fresh=True, closes="j")], {}),
        ([delivery("a", fresh=True), delivery("b", fresh=True)], {}),
        ([delivery("a", fresh=True)], {"when_postgres_down": "raise"}),
    ],
)
def test_a_record_that_may_be_refused_comes_first(
    what: list[Delivery], settings: dict[str, Any]
) -> None:
    """Nothing is pushed before its record if the record may be refused or its sender may get an error."""
    process = HostProcess(**settings)
    process.tracker.record([delivery("first", fresh=True)])
    assert process.tracker.record_beside(what) is None


def test_a_record_that_fails_beside_its_push_is_spooled() -> None:
    """The delivery is pushed already, so its record waits in the spool, and is not owed if it ended."""
    process = HostProcess()
    process.tracker.record([delivery("first", fresh=True)])
    it = delivery("a", fresh=True)

    def fails(*_: Any, **__: Any) -> Callable[[], Recorded]:
        def read() -> Recorded:
            raise StoreUnavailable("gone")

        return read

    process.tracker._ready().record_beside = fails  # type: ignore[method-assign]
    beside = process.tracker.record_beside([it])
    assert beside is not None and beside.result().spooled
    assert not process.tracker.circuit.closed
    assert process.tracker.record_beside([delivery("b", fresh=True)]) is None
    assert [entry for entry in process.tracker.spool.left()] == [it]


def _pulse(epoch: UUID, source: int = SOURCE.id) -> list[bytes]:
    return [str(value).encode() for value in (epoch, 7, source, uuid4())]


_EPOCH = uuid4()


@pytest.mark.parametrize(
    ("looks", "logged"),
    [
        ([_pulse(_EPOCH, source=1)], ["source_differs"]),
        ([[None] * 4, [None] * 4, [None] * 4], ["pulse_elsewhere"]),
        ([_pulse(uuid4()), _pulse(uuid4())], ["pulse_elsewhere"]),
        ([[None] * 4, _pulse(_EPOCH)], []),
        ([redis.ConnectionError(), [None] * 4, [None] * 4], ["pulse_elsewhere"]),
    ],
)
def test_a_producer_of_another_redis_says_so(
    looks: list[Any],
    logged: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It looks for the ledger's pulse in its Redis, and once more: the pulse may have been just lost."""
    monkeypatch.setattr(tracker_module, "_COMPARE_AGAIN", 0.0)
    host = HostProcess()
    client = Mock(hmget=Mock(side_effect=looks))
    host.tracker = HostTracker(SOURCE, host.settings, host._make, client=lambda: client)
    leader_store(host.ledger).elect(lease=FOR_EVER)
    settings = host.settings.fingerprint()
    host.ledger.host().register(source_row(pulse_epoch=_EPOCH, pulse_n=7, settings=settings))

    for _ in looks:
        host.tracker.record([delivery("job")])

    assert events(caplog.records) == logged
