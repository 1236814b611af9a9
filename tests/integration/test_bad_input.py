"""Unusual input from a host: each one is recorded or clearly refused, and the next job works."""

from __future__ import annotations

import importlib
import os
import pickle
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from rq import Queue, SimpleWorker
from rq.job import Job

import jobguard
from jobguard.model import Delivery, End, Outcome, new_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

guards = importlib.import_module("jobguard.guard")


def length(of: Any) -> int:
    """Return the length of a value."""
    return len(of)


def fail(words: str) -> None:
    """Fail with this text."""
    raise ValueError(words)


@pytest.fixture
def queue(redis_url: str, database: str) -> Iterator[Queue]:
    """Give a guarded queue with long timeouts, because nothing here is about time."""
    with (
        redis.Redis.from_url(redis_url) as client,
        jobguard.guard(client, postgres=database, call_timeout=5, connect_timeout=5),
    ):
        yield Queue("mail", connection=client)


@pytest.fixture
def tracker(queue: Queue) -> Any:
    """Give the tracker behind the queue."""
    (made,) = guards._guards.values()
    return made._tracker


@pytest.fixture
def ask(database: str) -> Iterator[Callable[..., list[Any]]]:
    """Give a function that queries the ledger."""
    with psycopg.connect(database, autocommit=True) as connection:

        def asked(query: str, *values: Any) -> list[Any]:
            rows = connection.execute(query.encode(), values).fetchall()
            return [row[0] if len(row) == 1 else row for row in rows]

        yield asked


@pytest.fixture
def fine_afterwards(queue: Queue, tracker: Any, ask: Callable[..., list[Any]]) -> Iterator[None]:
    """After each test a good job is recorded, pushed, run and ended."""
    yield
    assert tracker.circuit.closed
    good = queue.enqueue(length, "abc")
    assert good.id in ask("select job_id from jobguard.jobs")
    SimpleWorker([queue], connection=queue.connection).work(burst=True)
    assert Job.fetch(good.id, connection=queue.connection).return_value() == 3
    assert ask("select outcome::text from jobguard.history where job_id = %s", good.id) == [
        "completed"
    ]
    assert ask("select count(*) from jobguard.running") == [0]
    assert len(tracker.spool) == 0


def run(queue: Queue) -> None:
    """Run the waiting jobs in this process."""
    SimpleWorker([queue], connection=queue.connection).work(burst=True)


@pytest.mark.usefixtures("fine_afterwards")
class TestAcceptedInput:
    """Unusual input that works."""

    def test_two_megabytes(self, queue: Queue, ask: Callable[..., list[Any]]) -> None:
        """The envelope holds every byte of two megabytes."""
        job = queue.enqueue(length, os.urandom(2_000_000))
        (kept,) = ask("select length(envelope) from jobguard.jobs where job_id = %s", job.id)
        assert kept > 2_000_000
        run(queue)
        assert ask("select outcome::text from jobguard.history where job_id = %s", job.id) == [
            "completed"
        ]

    @pytest.mark.parametrize(
        "given",
        [
            {"args": ("a\x00b",)},
            {"args": ([b"\x00\xff\x00"],)},
            {"args": ("abc",), "description": "one\x00two"},
            {"args": ("abc",), "meta": {"nul": "\x00", "surrogate": "\udcff"}},
            {"args": ("\udcff",)},
            {"args": ("abc",), "description": "long " * 20_000},
            {"args": ("abc",), "job_id": "i" * 300},
            {"args": ("abc",), "description": "💥 häßlich — ''; drop table jobs; --"},
        ],
        ids=lambda given: ascii({k: v for k, v in given.items()})[:40],
    )
    def test_unusual_words(
        self, queue: Queue, ask: Callable[..., list[Any]], given: dict[str, Any]
    ) -> None:
        """A job with unusual words is recorded under its id before it runs, and completed under it."""
        job = queue.enqueue(length, **given)
        assert ask("select job_id from jobguard.jobs") == [job.id]
        run(queue)
        assert ask("select job_id, outcome::text from jobguard.history") == [(job.id, "completed")]

    @pytest.mark.parametrize(
        "words", ["one\x00two", "💥" * 5_000, "'; drop table jobs; --", "%s %(a)s {}"]
    )
    def test_errors_in_unusual_words(
        self, queue: Queue, ask: Callable[..., list[Any]], words: str
    ) -> None:
        """An error in unusual words is stored, as far as PostgreSQL can store it."""
        job = queue.enqueue(fail, words)
        run(queue)
        assert Job.fetch(job.id, connection=queue.connection).get_status() == "failed"
        assert ask("select job_id, outcome::text from jobguard.history") == [(job.id, "failed")]
        (errors,) = ask("select errors from jobguard.history")
        assert "ValueError" in errors[0] or "💥" in errors[0]

    @pytest.mark.parametrize("odd", ["nul\x00nul", "q" * 10_000], ids=["nul", "long"])
    def test_a_queue_name_in_unusual_words(
        self, queue: Queue, ask: Callable[..., list[Any]], odd: str
    ) -> None:
        """A job in a queue with an unusual name is recorded, run and ended like any other."""
        unusual = Queue(odd, connection=queue.connection)
        job = unusual.enqueue(length, "abc")
        assert ask("select job_id from jobguard.jobs") == [job.id]
        run(unusual)
        assert ask("select job_id, outcome::text from jobguard.history") == [(job.id, "completed")]


@pytest.mark.usefixtures("fine_afterwards")
class TestRefusedInput:
    """Input that RQ or PostgreSQL refuses."""

    def test_an_argument_that_cannot_be_pickled(
        self, queue: Queue, tracker: Any, ask: Callable[..., list[Any]]
    ) -> None:
        """An argument that cannot be pickled raises RQ's own error, and nothing is recorded or pushed."""
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            queue.enqueue(length, lambda: None)
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            queue.enqueue_in(timedelta(hours=1), length, lambda: None)
        assert ask("select count(*) from jobguard.jobs") == [0]
        assert len(tracker.spool) == 0
        assert queue.job_ids == []

    @pytest.mark.parametrize("priority", [40_000, -40_000])
    def test_a_priority_out_of_range(
        self,
        tracker: Any,
        ask: Callable[..., list[Any]],
        caplog: pytest.LogCaptureFixture,
        priority: int,
    ) -> None:
        """A priority out of range is refused alone: the other records of its batch are written."""
        together = [delivery("good"), delivery("bad", priority=priority), delivery("fine")]
        recorded = tracker.record(together)
        assert recorded.lost
        assert set(ask("select job_id from jobguard.jobs")) == {"good", "fine"}
        assert "bad" in caplog.text
        assert f"priority {priority} is out of range" in caplog.text
        assert tracker.spool.counts.quarantined == 1
        tracker.cancel(job_ids=["good", "fine"])

    def test_an_attempt_out_of_range(self, tracker: Any, ask: Callable[..., list[Any]]) -> None:
        """The attempt of a job is limited to the range of the column."""
        tracker.record([delivery("often", attempt=1_000_000)])
        assert ask("select job_id, attempt from jobguard.jobs") == [("often", 32767)]
        tracker.cancel(job_ids=["often"])

    def test_a_bad_row_in_the_spool_delays_no_other(
        self,
        tracker: Any,
        ask: Callable[..., list[Any]],
        database: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """After an outage each bad row is refused alone, and the rows behind it are written."""
        with psycopg.connect(database) as connection:
            for table in ("jobs", "history"):
                connection.execute(f"alter table jobguard.{table} add check (task <> 'bad')")
        kept = [
            delivery("bad record", task="bad"),
            delivery("good record"),
            replace(ended("bad end"), task="bad"),
            ended("good end"),
        ]
        tracker.spool.put(kept)
        while tracker.replay():
            pass
        assert len(tracker.spool) == 0
        assert tracker.spool.counts.quarantined == 2
        assert ask("select job_id from jobguard.jobs") == ["good record"]
        # The error stays in history.
        assert set(ask("select job_id from jobguard.history")) == {"", "good end"}
        assert "bad record" in caplog.text
        assert "bad end" in caplog.text
        tracker.cancel(job_ids=["good record"])


def ended(job_id: str, queue: str = "mail") -> End:
    """Return an end as a session would."""
    return End(
        token=new_token(),
        number=0,
        outcome=Outcome.COMPLETED,
        worker=new_token(),
        job_id=job_id,
        queue=queue,
        task="t",
    )


def delivery(job_id: str, **fields: Any) -> Delivery:
    """Return a delivery as an adapter would."""
    usual = {"queue": "mail", "task": "t", "envelope": b"e"}
    return Delivery(token=new_token(), job_id=job_id, **(usual | fields))
