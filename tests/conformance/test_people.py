"""What people do to jobs, with each library: cancel, forget, replay, and look."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import psycopg
import pytest

import jobguard
from jobguard.guard import JobGuard
from jobguard.model import Outcome
from jobguard.operations.act import REPLAYED, Operations
from jobguard.operations.brokers import Brokers
from jobguard.operations.job import read_job
from jobguard.operations.read import JobFilter
from jobguard.settings import Settings
from tests.conformance.library import Library
from tests.conformance.words import BRISK, Records
from tests.support import eventually

HERE = "default"
SECRET = "a-word-that-nothing-else-says"
UNREACHABLE = "postgresql://127.0.0.1:1/none"


@pytest.fixture
def people(database: str) -> Iterator[Operations]:
    """Give what a person on call has."""
    with closing(Operations(lambda: database)) as made:
        yield made


@pytest.fixture
def brokers(library: Library) -> Brokers:
    """Give the brokers by the URL that a person names."""
    return Brokers([library.redis_url])


def test_a_job_that_a_person_cancels_does_not_run_and_leaves_redis(
    library: Library, guard: JobGuard, records: Records, people: Operations, brokers: Brokers
) -> None:
    """Waiting and delayed jobs that a filter selects are cancelled, and nothing waits for them in Redis."""
    kept = library.send("say", "kept", queue="other")
    waiting, delayed = library.send(), library.send(delay=3600.0)
    rows = people.owed_of(HERE, JobFilter(queue="mail"))
    assert {row["job_id"] for row in rows} == {waiting, delayed}
    assert people.cancel(HERE, rows, brokers, "queue=mail") == (2, [])
    assert library.waiting() == [] and library.waiting("other") == [kept]
    library.work()
    library.work("other")
    assert library.said() == ["kept"]
    assert records.ended(waiting) == records.ended(delayed) == [("cancelled", 1)]
    (note,) = people.incidents(HERE)
    assert (note["cause"], note["restored"], note["detail"]) == ("cancel", 2, "queue=mail")
    assert "@" in note["actor"]


def test_a_job_cancelled_while_redis_is_empty_never_runs(
    library: Library, guard: JobGuard, people: Operations, brokers: Brokers
) -> None:
    """A cancel between a loss and its restore is final: the leader puts back the other job alone."""
    cancelled = library.send("say", "cancelled")
    library.send("say", "kept")
    assert guard.reconcile()["leads"]
    library.client.flushdb()
    people.cancel(HERE, people.owed_named(HERE, cancelled), brokers, cancelled)
    eventually(lambda: guard.reconcile() and len(library.waiting()) == 1)
    library.work()
    assert library.said() == ["kept"]


def test_a_job_cancelled_while_postgres_is_away_never_runs(
    library: Library, database: str, records: Records
) -> None:
    """The tombstone waits until PostgreSQL is back; then a lost Redis does not bring the job back."""
    place = [database]
    settings = BRISK | {"retry_interval": 0.1, "connect_timeout": 0.5}
    with jobguard.guard(library.target(), postgres=lambda: place[0], **settings) as guard:
        job_id = library.send()
        assert guard.reconcile()["leads"]
        place[0] = UNREACHABLE
        end_sessions(database)
        library.cancel(job_id)
        place[0] = database
        eventually(lambda: library.send() and records.ended(job_id) == [("cancelled", 1)])
        library.client.flushdb()
        eventually(lambda: guard.reconcile() and library.waiting())
        assert job_id not in library.waiting()


def end_sessions(database: str) -> None:
    """End all other sessions of a database, as an outage does."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )


def test_a_forgotten_job_leaves_no_argument_behind(
    library: Library, guard: JobGuard, people: Operations, brokers: Brokers, database: str
) -> None:
    """After forget, neither Redis nor PostgreSQL contains an argument of the job, failed or waiting."""
    failed = library.send("fail", SECRET)
    library.work()
    waiting = library.send("say", SECRET)
    assert secret_in(library, database)
    for job_id in (failed, waiting):
        assert people.forget(HERE, job_id, brokers) == (1, [])
    assert not secret_in(library, database)
    library.work()
    assert library.said() == [SECRET]


def secret_in(library: Library, database: str) -> bool:
    """Return True if the secret is somewhere in Redis or in the ledger, compressed or not."""
    client: Any = library.client
    found: list[bytes] = []
    for key in client.scan_iter():
        kind = client.type(key).decode()
        if kind == "hash":
            found += client.hgetall(key).values()
        elif kind == "list":
            found += client.lrange(key, 0, -1)
        elif kind == "string":
            found.append(client.get(key))
    with psycopg.connect(database) as connection:
        for query in (
            "select envelope from jobguard.jobs",
            "select coalesce(envelope, '') from jobguard.history",
            "select convert_to(array_to_string(errors, ''), 'UTF8') from jobguard.history"
            " where errors is not null",
        ):
            found += [bytes(row[0]) for row in connection.execute(query.encode())]
    for raw in found:
        decompressed = b""
        for start in (at for at in range(min(len(raw), 4000)) if raw[at : at + 1] == b"x"):
            try:
                decompressed += zlib.decompressobj().decompress(raw[start:])
            except zlib.error:
                continue
        if SECRET.encode() in raw + decompressed or b64(SECRET) in raw:
            return True
    return False


def b64(text: str) -> bytes:
    """Return what base64 makes of the middle of a text, wherever it begins."""
    return base64.b64encode(text.encode())[4:20]


def test_completed_jobs_of_a_window_run_again(
    library: Library, database: str, people: Operations, records: Records
) -> None:
    """With keep_envelopes, replay sends what ended in the window once more, and a second replay nothing."""
    with jobguard.guard(library.target(), postgres=database, keep_envelopes=True, **BRISK) as guard:
        library.send("say", "before")  # ended before the leader stored the setting
        library.work()
        assert guard.reconcile()["leads"]
        jobs = [library.send("say", word) for word in ("one", "two")]
        library.work()
        eventually(lambda: all(records.ended(job_id) for job_id in jobs))
        found = ended_now(people)
        assert [row["kept"] for row in found] == [False, True, True]
        kept = [row for row in found if row["kept"]]
        again = partial(people.send_again, HERE, kept, "replay", "again", outcomes=REPLAYED)
        assert again() == (2, [])
        assert not [row for row in ended_now(people) if row["kept"]]
        assert again()[0] == 0
        eventually(lambda: guard.reconcile() and sorted(library.waiting()) == sorted(jobs))
        library.work()
        assert library.said() == ["before", "one", "two", "one", "two"]
        (first, *_) = [row for row in people.job(HERE, jobs[0]) if row["next"]]
        assert first["state"] == "completed"


def ended_now(people: Operations) -> list[dict[str, Any]]:
    """Return what completed in the last hour."""
    now = datetime.now(UTC)
    window = (now - timedelta(hours=1), now + timedelta(hours=1))
    return list(people.ended_in(HERE, *window, outcomes=[Outcome.COMPLETED]))


def test_a_person_sees_where_redis_has_a_job_and_its_arguments_if_they_are_json(
    library: Library, guard: JobGuard, people: Operations, brokers: Brokers
) -> None:
    """The presence is asked from Redis; arguments are shown if they are JSON, and never unpickled."""
    job_id = library.send("say", SECRET)
    job = read_job(people, HERE, job_id, Settings(), brokers)
    assert job[0]["presence"] == "waiting" and job.why.startswith("it waits in Redis for a worker")
    if job.arguments is None:
        assert "not JSON" in job.arguments_note  # the suite uses pickle where it can
    else:
        assert job.arguments["args"][-1] == SECRET
    hidden = read_job(people, HERE, job_id, Settings(redact_arguments=True), brokers)
    assert hidden.arguments is None and "redacted" in hidden.arguments_note
    assert guard.job(job_id)[0]["presence"] == "waiting"
    library.client.flushdb()
    lost = read_job(people, HERE, job_id, Settings(), brokers)
    assert lost[0]["presence"] == "absent" and "absent from Redis" in lost.why
    found = people.drift(HERE, brokers, Settings())
    assert found.differs and [row["job_id"] for row in found.absent] == [job_id]
    nowhere = read_job(people, HERE, job_id, Settings(), Brokers(["redis://127.0.0.1:1/0"]))
    assert nowhere[0]["presence"] is None and "no --redis URL" in nowhere[0]["presence_error"]


def test_what_waits_without_a_record_is_seen_and_adopted(
    library: Library, database: str, records: Records, people: Operations, brokers: Brokers
) -> None:
    """Drift counts jobs of unguarded programs; adopt records them, and a lost Redis gets them back."""
    settings = Settings(**BRISK)
    with library.bare():
        unguarded = library.send("say", "unguarded")
    with jobguard.guard(library.target(), postgres=database, **BRISK) as guard:
        library.send("say", "guarded")
        assert sum(people.drift(HERE, brokers, settings).unrecorded.values()) == 1
        assert len(records.owed()) == 1
        (found,) = people.adopt(HERE, brokers, settings)
        assert (found["waiting"], found["recorded"], found["problem"]) == (2, 1, None)
        assert not people.drift(HERE, brokers, settings).differs
        assert {owed.job_id for owed in records.owed()} > {unguarded}
        (again,) = people.adopt(HERE, brokers, settings)
        assert again["recorded"] == 0
        assert guard.reconcile()["leads"]
        library.client.flushdb()
        eventually(lambda: guard.reconcile() and len(library.waiting()) == 2)
        library.work()
    assert sorted(library.said()) == ["guarded", "unguarded"]
