"""The entries of a spool reach Postgres without a call of the host, and past entries that fail."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import pytest

from jobguard.errors import StoreUnavailable
from jobguard.host import replay, tracker
from jobguard.host.spool import Cancelled
from jobguard.host.tracker import HostTracker
from jobguard.model import End, Outcome, new_token
from jobguard.settings import Settings
from tests.fakes.store import MemoryLedger
from tests.fakes.world import NAMESPACE, SOURCE, delivery, events, leader_store, outage
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jobguard.model import Delivery, Recorded
    from jobguard.store.protocols import HostStore


class Picky:
    """A host's store that never answers for some job ids."""

    def __init__(self, inner: HostStore, refuses: set[str]) -> None:
        self._inner = inner
        self._refuses = refuses
        self.installation: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def record(self, source: int, deliveries: Sequence[Delivery], **how: Any) -> Recorded:
        """Record the deliveries, unless one of them is refused."""
        if self._refuses & {one.job_id for one in deliveries}:
            raise StoreUnavailable("it did not answer in time")
        return self._inner.record(source, deliveries, **how)


class Producer:
    """A producer with short intervals, whose Postgres can be stopped."""

    def __init__(self, **settings: Any) -> None:
        self.ledger = MemoryLedger()
        self.refuses: set[str] = set()
        chosen = Settings(**{"namespace": NAMESPACE, "retry_interval": 0.02, **settings})
        self.tracker = HostTracker(SOURCE, chosen, self._store)

    def _store(self) -> HostStore:
        return cast("HostStore", Picky(self.ledger.host(), self.refuses))

    @property
    def owed(self) -> set[str]:
        """Return the job ids that are owed in the ledger."""
        page = leader_store(self.ledger).page(SOURCE.id, after=None, limit=10_000)
        return {owed.job_id for owed in page}

    def outcome(self, token: UUID) -> Outcome | None:
        """Return how a delivery has ended."""
        return leader_store(self.ledger).tombstones(SOURCE.id, [token]).get(token)


@pytest.fixture
def producer() -> Iterator[Producer]:
    """Start a producer."""
    made = Producer()
    yield made
    made.ledger.down = False
    made.refuses.clear()
    made.tracker.close()


def drains() -> list[threading.Thread]:
    """Return the threads that drain."""
    return [thread for thread in threading.enumerate() if thread.name == "jobguard-drain"]


def test_a_quiet_producer_writes_what_it_kept(producer: Producer) -> None:
    """A producer writes its spool without another call, and the thread ends when nothing is left."""
    others = set(drains())  # of trackers that other tests left behind
    with outage(producer.ledger):
        for n in range(5):
            producer.tracker.record([delivery(str(n))])
        assert set(drains()) - others
    eventually(lambda: producer.owed == set("01234"))
    eventually(lambda: not set(drains()) - others)


def test_one_that_always_fails_is_set_aside(
    producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    """An entry that always fails is set aside: later entries are written and the circuit closes."""
    producer.refuses.add("odd")
    with outage(producer.ledger):
        for job_id in ("first", "odd", "second", "third"):
            producer.tracker.record([delivery(job_id)])
    eventually(lambda: producer.owed == {"first", "second", "third"})
    assert producer.tracker.spooled()["aside"] == 1
    assert events(caplog.records).count("entry_set_aside") == 1
    assert producer.tracker.spool.oldest() is None
    eventually(producer.tracker.circuit.check)
    assert not producer.tracker.record([delivery("fourth")]).spooled


def test_what_was_set_aside_is_tried_again(
    producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that was set aside is tried again, and written when it succeeds."""
    monkeypatch.setattr(replay, "_AGAIN", 0.05)
    producer.refuses.add("odd")
    with outage(producer.ledger):
        producer.tracker.record([delivery("odd")])
    eventually(lambda: producer.tracker.spooled()["aside"] == 1)
    producer.refuses.clear()
    eventually(lambda: producer.owed == {"odd"})
    eventually(lambda: producer.tracker.spool.pending == 0)


def test_what_was_set_aside_is_given_up_in_the_end(
    producer: Producer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An entry is given up after a fixed number of tries, with its id in the log."""
    monkeypatch.setattr(replay, "_AGAIN", 0.001)
    producer.refuses.add("odd")
    with outage(producer.ledger):
        producer.tracker.record([delivery("odd")])
    # The entry leaves the spool before it is logged.
    eventually(lambda: "entry_given_up" in events(caplog.records))
    assert producer.tracker.spool.pending == 0
    assert events(caplog.records).count("entry_given_up") == 1
    assert producer.tracker.spool.counts.lost == 1


def test_an_outage_sets_nothing_aside(producer: Producer) -> None:
    """In an outage no entry is set aside, because the first entry is not the cause."""
    with outage(producer.ledger):
        for n in range(5):
            producer.tracker.record([delivery(str(n))])
        for _ in range(20):
            producer.tracker.circuit.answered()  # it accepts connections, and answers nothing
            producer.tracker.replay()
        assert producer.tracker.spooled()["aside"] == 0
    eventually(lambda: producer.owed == set("01234"))


def test_a_cancel_finds_a_record_that_was_set_aside(
    producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tombstone of a cancelled record that was set aside is written before the record."""
    monkeypatch.setattr(replay, "_AGAIN", 0.3)
    producer.refuses.add("odd")
    job = delivery("odd")
    with outage(producer.ledger):
        producer.tracker.record([job])
        producer.tracker.cancel(job_ids=["odd"])
    eventually(lambda: producer.outcome(job.token) is Outcome.CANCELLED)
    producer.refuses.clear()
    eventually(lambda: producer.tracker.spool.pending == 0)
    assert producer.owed == set()


def test_a_full_spool_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A full spool is logged once, and once more when it has room again."""
    producer = Producer(spool_size=3)
    with outage(producer.ledger):
        for n in range(50):
            producer.tracker.record([delivery(str(n))])
        assert events(caplog.records).count("spool_full") == 1
    caplog.set_level("INFO", "jobguard")
    eventually(lambda: len(producer.owed) == 3)
    eventually(lambda: events(caplog.records).count("spool_has_room") == 1)
    assert producer.tracker.spooled()["lost"] == 47
    producer.tracker.close()


def test_the_bound_in_bytes_is_a_setting(caplog: pytest.LogCaptureFixture) -> None:
    """At the bound in bytes, records of jobs in Redis lose their envelopes, which is logged once."""
    producer = Producer(spool_bytes=100_000)
    with outage(producer.ledger):
        for n in range(50):
            assert producer.tracker.record([delivery(str(n), envelope=b"x" * 10_000)]).spooled
            assert producer.tracker.spooled()["bytes"] <= 100_000
    eventually(lambda: producer.tracker.spool.pending == 0)
    assert producer.owed
    assert len(producer.owed) + producer.tracker.spooled()["adoptable"] == 50
    assert events(caplog.records).count("spool_lightened") == 1
    producer.tracker.close()


def closing(producer: Producer) -> float:
    """Close it; return the seconds of this by a clock that counts sleeps."""
    began = time.monotonic()
    producer.tracker.close()
    return time.monotonic() - began


def test_a_short_process_does_not_wait_for_what_workers_can_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At its end a process waits less for records that workers can write, and logs their ids once."""
    monkeypatch.setattr(tracker, "_PATIENCE", 3600.0)
    producer = Producer()
    with outage(producer.ledger):
        producer.tracker.record([delivery("mail-7")])
        closing(producer)
        closing(producer)
    left = [r for r in caplog.records if r.__dict__["jobguard"]["event"] == "spool_left"]
    assert [r.__dict__["jobguard"]["job_ids"] for r in left] == [["mail-7"]]


@pytest.mark.parametrize("what", ["end", "cancel"])
def test_what_only_this_process_knows_is_not_waited_for_in_a_long_outage(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """An outage that is older than the patience costs no wait, because it will not end in time."""
    monkeypatch.setattr(tracker, "_PATIENCE", 3600.0)
    producer = Producer()
    with outage(producer.ledger):
        producer.tracker.record([delivery("job")])
        kinds: dict[str, End | Cancelled] = {
            "end": End(new_token(), 0, Outcome.COMPLETED, new_token()),
            "cancel": Cancelled((), ("job",), None),
        }
        producer.tracker.spool.put([kinds[what]])
        producer.tracker.circuit._opened_at -= 7200
        closing(producer)
    assert producer.tracker.spool.pending == 2
