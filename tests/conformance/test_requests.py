"""Jobs that SQL asks for, on every library: recorded and pushed without the application, and run once."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from jobguard.adapter import Source
from jobguard.guard import JobGuard
from jobguard.model import Outcome, Restored, new_token
from jobguard.reconciler.requests import Requests
from jobguard.settings import Settings
from jobguard.store.leader import PostgresLeaderStore
from jobguard.store.protocols import Signs
from tests.conformance.library import QUEUE, Library
from tests.conformance.words import Leader, Records

ENQUEUE = """
select jobguard.enqueue(library => %(library)s, queue => %(queue)s, task => %(task)s,
                        args => to_jsonb(%(args)s::text[]), due => %(due)s)
"""


class Sql:
    """A SQL session, and the leader's part of the work."""

    def __init__(self, database: str, source: Source, leader: Leader) -> None:
        self._source, self._leader = source, leader
        self._store = PostgresLeaderStore(
            lambda: database, "default", new_token(), Settings(call_timeout=20, lease=600)
        )
        term = self._store.elect(lease=600)
        assert term is not None
        self._term = term
        self._session = psycopg.connect(database, autocommit=True)

    def ask(self, query: str, **values: Any) -> Any:
        """Return the one value of a query."""
        return self._session.execute(query.encode(), values).fetchall()[0][0]

    def push(self) -> list[Restored]:
        """Render what was requested, and push what is in the outbox."""
        requests = Requests(self._store, "default", {self._source.id: self._leader.broker})
        requests.step(self._term, Signs())
        waiting = self._store.watched(self._source.id, limit=100)
        given = self._store.envelopes(self._source.id, [owed.token for owed in waiting])
        done = self._leader.restore(*given)
        self._store.restored(self._term, self._source.id, [one.token for one in given])
        return done

    def close(self) -> None:
        """Close the connections."""
        self._session.close()
        self._store.close()


@pytest.fixture
def json_messages(library: Library) -> None:
    """Let Dramatiq write JSON; the suite has another encoder, whose messages cannot be rendered."""
    if library.adapter.library == "dramatiq":
        dramatiq = importlib.import_module("dramatiq")
        dramatiq.set_encoder(dramatiq.JSONEncoder())


@pytest.fixture
def sql(database: str, source: Source, leader: Leader) -> Iterator[Sql]:
    """Give a SQL session, and a leader."""
    made = Sql(database, source, leader)
    yield made
    made.close()


def test_a_job_that_sql_asks_for_looks_as_if_the_application_had_sent_it(
    library: Library,
    json_messages: None,
    guard: JobGuard,
    records: Records,
    sql: Sql,
) -> None:
    """The pushed job has the keys of a job that the library sent, it runs once, and its task is known."""
    library.send("say", "application")
    (sent,) = records.owed()
    shape = sorted(key.replace(sent.job_id, "ID") for key in library.jobs())
    with psycopg.connect(sql._session.info.dsn) as connection:
        ((task,),) = connection.execute("select task from jobguard.jobs").fetchall()
    library.work()
    values = {"library": library.adapter.library, "queue": QUEUE, "task": task, "due": None}
    args = [str(library.ledger), "sql"]
    library.client.flushdb()

    job_id = sql.ask(ENQUEUE, **values, args=args)
    assert sql.push() == [Restored.RESTORED]
    keys = sorted(key.replace(job_id, "ID") for key in library.jobs())
    assert keys == shape
    assert [owed.job_id for owed in records.owed()] == [job_id]
    library.work()
    assert library.said() == ["application", "sql"]
    assert records.owed() == []
    assert [outcome for outcome, _ in records.ended(job_id)] == ["completed"]
    known = sql.ask("select array_agg(task order by task) from jobguard.tasks")
    assert known == [task]


def test_a_job_that_sql_asks_for_later_waits_in_the_library(
    library: Library,
    json_messages: None,
    guard: JobGuard,
    records: Records,
    sql: Sql,
) -> None:
    """A job with a due time waits where the library keeps delayed jobs, and can be cancelled by SQL."""
    library.send("say", "application")
    with psycopg.connect(sql._session.info.dsn) as connection:
        ((task,),) = connection.execute("select task from jobguard.jobs").fetchall()
    library.work()
    due = "now() + interval '1 hour'"
    job_id = sql.ask(
        ENQUEUE.replace("%(due)s", due),
        library=library.adapter.library,
        queue=QUEUE,
        task=task,
        args=[str(library.ledger), "late"],
    )
    sql.push()
    (owed,) = records.owed()
    assert owed.due_at is not None and owed.due_at > time.time() + 3000
    assert library.jobs() != {}
    assert sql.ask("select state from jobguard.job(%(id)s)", id=job_id) == "scheduled"
    assert sql.ask("select jobguard.cancel_job(%(id)s)", id=job_id) == 1
    assert sql.ask("select state from jobguard.job(%(id)s)", id=job_id) == "cancelled"
    assert records.owed() == []


def test_the_application_learns_of_the_runs_of_its_jobs(library: Library, guard: JobGuard) -> None:
    """A run that returns starts and finishes, one that raises has its error, and its end can be awaited."""
    seen: list[tuple[str, str | None, str]] = []
    for event in ("start", "finish", "error"):
        guard.on(event)(lambda e: seen.append((e.name, e.job.id, repr(e.error))))
    first = library.send("say")
    library.work()
    second = library.send("fail")
    library.work()
    names = [(name, job_id) for name, job_id, _ in seen]
    assert names[:2] == [("start", first), ("finish", first)]
    assert names[2:4] == [("start", second), ("error", second)]
    assert "fails on purpose" in seen[3][2]
    assert guard.wait(first, 60) is Outcome.COMPLETED
