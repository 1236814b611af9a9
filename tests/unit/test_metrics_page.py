"""The page /metrics while PostgreSQL is slow or does not answer."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobguard.errors import StoreUnavailable
from jobguard.operations.overview import Overview, QueueNow
from jobguard.operations.read import Counted, ReadModel
from jobguard.serving import metrics
from jobguard.serving.metrics import Metrics
from jobguard.store.protocols import Counts
from tests.support import SLOWEST, eventually

HELD = {"3/mail": {"reason": "why"}}


def overview(**state: Any) -> Overview:
    """Return what an empty ledger says, but for this."""
    empty: dict[str, Any] = {
        "leader": None,
        "brake": {"paused_at": None, "held": {}},
        "sources": [],
        "queues": [],
        "held_requests": {"count": 0},
        "failed_schedules": [],
        "installation": {"moved": False},
    }
    return Overview("default", empty | state, Counted({}), [], [], [], [])


class Ledger:
    """A ledger that answers when it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.reads = 0
        self.now = 0.0
        self.error: StoreUnavailable | None = None
        self.value = overview()
        monkeypatch.setattr(metrics, "overview_of", lambda model, namespace: self._read())
        self.page = Metrics(cast(ReadModel, None), "default", clock=lambda: self.now)

    def _read(self) -> Overview:
        self.reads += 1
        assert self.answers.wait(SLOWEST)
        if self.error is not None:
            raise self.error
        return self.value

    def samples(self) -> dict[str, float]:
        """Return the samples without labels of a scrape."""
        text = self.page.page()[1].decode()
        families = text_string_to_metric_families(text)
        return {one.name: one.value for family in families for one in family.samples}


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Give a ledger and its page."""
    return Ledger(monkeypatch)


def test_a_ledger_that_does_not_answer_holds_no_scrape(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape shows the reading before; when that is too old, it says that PostgreSQL is away."""
    assert ledger.samples()["jobguard_queues_held"] == 0
    ledger.answers.clear()
    ledger.value = overview(brake={"paused_at": None, "held": HELD})
    ledger.now = metrics._FRESH + 1
    began = time.monotonic()
    for _ in range(2):
        found = ledger.samples()
        assert (found["jobguard_postgres_up"], found["jobguard_queues_held"]) == (1, 0)
    assert time.monotonic() - began < SLOWEST / 2
    assert ledger.reads == 2, "one reading at a time"
    ledger.now = metrics._STALE + 1
    found = ledger.samples()
    assert found["jobguard_postgres_up"] == 0 and "jobguard_queues_held" not in found
    ledger.answers.set()
    monkeypatch.setattr(metrics, "_PATIENCE", SLOWEST)
    eventually(lambda: ledger.samples().get("jobguard_queues_held") == 1)


def test_an_error_is_shown_at_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL that refuses is away from the next reading on, and back at the one after."""
    monkeypatch.setattr(metrics, "_PATIENCE", SLOWEST)
    assert ledger.samples()["jobguard_postgres_up"] == 1
    ledger.now, ledger.error = 10.0, StoreUnavailable("away")
    assert ledger.samples()["jobguard_postgres_up"] == 0
    ledger.now, ledger.error = 20.0, None
    assert ledger.samples()["jobguard_postgres_up"] == 1


def test_between_two_passes_nobody_has_to_lead(ledger: Ledger) -> None:
    """With --on-tick there is no metric of a leader: an alert would fire between two passes."""
    assert "jobguard_led" not in ledger.samples()


def test_an_unguarded_consumer_is_shown_among_many_queues(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queues that an alert is for come before the others."""
    monkeypatch.setattr(metrics, "QUEUES", 2)
    queue: dict[str, Any] = {"source": 1, "trusted_since": None, "unguarded": []}
    queues = [queue | {"queue": f"q{n}"} for n in range(3)]
    queues[2] |= {"unguarded": ["a worker"]}
    source = {"id": 1, "library": "rq", "address": "r", "prefix": "", "name": None}
    sources = [source | {"watched_seconds": 1.0, "outbox": 0, "suspects": 0}]
    ledger.value = overview(sources=sources, queues=queues)
    text = ledger.page.page()[1].decode()
    assert 'jobguard_queue_unguarded_consumers{queue="q2",source="r"} 1.0' in text
    assert 'queue="q1"' not in text


def test_a_source_is_used_if_it_owes_jobs_or_has_workers(ledger: Ledger) -> None:
    """A Redis that no application uses any more is known as such."""
    common = {"prefix": "", "name": None, "watched_seconds": None, "outbox": 0, "suspects": 0}
    sources = [
        common | {"id": id, "library": "rq", "address": address}
        for id, address in enumerate(("owes", "works", "old"))
    ]
    made = overview(sources=sources)
    queue = QueueNow("owes", "mail", Counts(scheduled=1), None, 0.0, 0.0)
    done = QueueNow("old", "mail", Counts(completed=9), None, 0.0, 0.0)
    worker = {"library": "rq", "address": "works", "beat_seconds": 1.0, "unflushed_seconds": None}
    ledger.value = replace(made, queues=[queue, done], workers=[worker | {"claims": 0}])
    text = ledger.page.page()[1].decode()
    for name, used in (("owes", 1), ("works", 1), ("old", 0)):
        assert f'jobguard_source_used{{library="rq",source="{name}"}} {used}.0' in text
