"""What is sent inside ``guard.transaction()`` exists if, and only if, the transaction commits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

import jobguard
from jobguard import failpoint
from jobguard.adapter import Source
from jobguard.errors import ConfigurationError, NotTransactional, UnsupportedTarget
from jobguard.guard import JobGuard
from jobguard.host.tracker import HostTracker
from tests.conformance.library import Library
from tests.conformance.words import BRISK, Records
from tests.support import eventually


@pytest.fixture
def connection(database: str) -> Iterator[Any]:
    """Yield a connection of the application, with a table of its own and a session of its own taste."""
    with psycopg.connect(database, autocommit=True, row_factory=dict_row) as made:
        made.execute("create table public.orders (id int primary key)")
        made.execute("set search_path = pg_temp")
        made.execute("set default_transaction_isolation = 'serializable'")
        yield made


class Undo(Exception):
    """Roll back."""


def lost_pushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the process never push after a commit, as if it had died."""
    monkeypatch.setattr(HostTracker, "take_committed", lambda *_: frozenset())


def test_a_committed_job_is_pushed_after_the_commit(
    library: Library, guard: JobGuard, records: Records, connection: psycopg.Connection[Any]
) -> None:
    """A job appears with the commit: before, neither the ledger nor Redis has it."""
    with guard.transaction(connection):
        connection.execute("insert into public.orders values (1)")
        job_id = library.send()
        assert (library.waiting(), records.owed()) == ([], [])
        seen = connection.execute("select count(*) as n from jobguard.jobs").fetchall()
        assert seen == [{"n": 1}]
    assert library.waiting() == [job_id]
    (owed,) = records.owed()
    assert owed.token == library.token(job_id)
    library.work()
    assert library.said() == ["ran"]
    assert [outcome for outcome, _ in records.ended(job_id)] == ["completed"]
    assert connection.execute("show search_path").fetchall() == [{"search_path": "pg_temp"}]
    assert connection.execute("select count(*) as n from pg_prepared_statements").fetchall() == [
        {"n": 0}
    ]


@pytest.mark.parametrize("how", ["error", "rollback", "outer error"])
def test_a_rolled_back_job_is_never_sent(
    library: Library,
    guard: JobGuard,
    records: Records,
    connection: psycopg.Connection[Any],
    how: str,
) -> None:
    """The ledger and Redis have nothing of a rolled back transaction; later sends are not affected."""
    before = library.jobs()
    if how == "error":
        with pytest.raises(Undo), guard.transaction(connection):
            library.send()
            raise Undo
    elif how == "rollback":
        with guard.transaction(connection):
            library.send()
            raise psycopg.Rollback
    else:
        with pytest.raises(Undo), connection.transaction():
            with guard.transaction(connection):
                library.send()
            raise Undo
    assert (library.jobs(), records.owed()) == (before, [])
    job_id = library.send()
    assert library.waiting() == [job_id]


def test_a_rolled_back_savepoint_is_not_sent(
    library: Library, guard: JobGuard, records: Records, connection: psycopg.Connection[Any]
) -> None:
    """Of a transaction with rolled back savepoints, the other jobs are sent."""
    with guard.transaction(connection):
        first = library.send()
        with connection.transaction():
            library.send()
            raise psycopg.Rollback
        with pytest.raises(Undo), guard.transaction(connection):
            library.send()
            raise Undo
        with guard.transaction(connection), guard.batch():
            second = library.send()
    assert sorted(library.waiting()) == sorted([first, second])
    assert {owed.job_id for owed in records.owed()} == {first, second}


def test_a_block_in_an_open_transaction_waits_for_its_commit(
    library: Library, guard: JobGuard, records: Records, database: str
) -> None:
    """The push follows the commit of the application, wherever that is."""
    with psycopg.connect(database) as connection:
        connection.execute("select 1")
        with guard.transaction(connection.cursor()):
            job_id = library.send()
        assert (library.waiting(), records.owed()) == ([], [])
    assert library.waiting() == [job_id]
    assert "commit" not in vars(connection)


def test_the_leader_pushes_for_a_process_that_died_after_its_commit(
    library: Library,
    guard: JobGuard,
    records: Records,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A committed job that its process never pushes is pushed by the leader, and runs once."""
    lost_pushes(monkeypatch)
    with guard.transaction(connection):
        job_id = library.send()
    assert library.waiting() == []
    assert len(records.owed()) == 1
    guard.reconcile()
    assert library.waiting() == [job_id]
    library.work()
    assert library.said() == ["ran"]


def test_a_newer_job_of_an_id_supersedes_the_older_one_at_its_commit(
    library: Library,
    guard: JobGuard,
    records: Records,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one body per id, the committed job replaces an older one, also if the leader pushes it."""
    if not library.one_body_per_id:
        pytest.skip("each delivery has a body of its own")
    library.send("say", "old", job_id="given")
    with guard.transaction(connection):
        library.send("say", "new", job_id="given")
        assert len(records.owed()) == 1
    (owed,) = records.owed()
    assert library.token("given") == owed.token
    lost_pushes(monkeypatch)
    with guard.transaction(connection):
        library.send("say", "newest", job_id="given")
    guard.reconcile()
    library.work()
    assert library.said()[-1] == "newest"
    assert records.owed() == []


def test_a_push_that_fails_after_the_commit_is_left_to_the_leader(
    library: Library, guard: JobGuard, records: Records, connection: psycopg.Connection[Any]
) -> None:
    """A committed job is not withdrawn if Redis refuses it, and the application gets no error."""
    with guard.transaction(connection):
        job_id = library.send()
        library.client.config_set("maxmemory", 1)
        library.client.config_set("maxmemory-policy", "noeviction")
    try:
        assert library.waiting() == []
        assert [owed.job_id for owed in records.owed()] == [job_id]
    finally:
        library.client.config_set("maxmemory", 0)
    guard.reconcile()
    assert library.waiting() == [job_id]


def test_other_threads_are_not_part_of_the_transaction(
    library: Library, guard: JobGuard, connection: psycopg.Connection[Any]
) -> None:
    """A job that another thread sends meanwhile goes out at once, and survives the rollback."""
    with pytest.raises(Undo), guard.transaction(connection):
        sent: list[str] = []
        thread = threading.Thread(target=lambda: sent.append(library.send()))
        thread.start()
        thread.join()
        assert library.waiting() == sent
        raise Undo
    assert library.waiting() == sent


def test_another_database_is_refused_before_the_block(
    library: Library, guard: JobGuard, database: str
) -> None:
    """A connection to a database without the ledger is refused, and its transaction goes on."""
    url = psycopg.conninfo.make_conninfo(database, dbname="postgres")
    with psycopg.connect(url) as elsewhere, elsewhere.transaction():
        with pytest.raises(ConfigurationError, match="ledger"), guard.transaction(elsewhere):
            raise AssertionError("the block must not begin")
        assert elsewhere.execute("select 1").fetchone() == (1,)


def test_an_unknown_connection_and_the_mode_observe_are_refused(
    library: Library, database: str, connection: psycopg.Connection[Any]
) -> None:
    """The errors name the connections that are known, and the mode that is needed."""
    with jobguard.guard(library.target(), postgres=database, mode="observe", **BRISK) as guard:
        with pytest.raises(UnsupportedTarget, match="psycopg connection"):
            guard.transaction(object())
        with pytest.raises(ConfigurationError, match="observe"):
            guard.transaction(connection)


def test_a_record_that_passes_the_transaction_is_refused(
    library: Library, guard: JobGuard, source: Source, connection: psycopg.Connection[Any]
) -> None:
    """A job whose push reads Redis is refused with an error, and not sent outside of the transaction."""
    tracker = guard._tracker
    assert tracker is not None
    with pytest.raises(NotTransactional), guard.transaction(connection):
        tracker.open_join("chord", 2)
    with pytest.raises(NotTransactional), guard.transaction(connection):
        library.send_with_read()
    assert library.waiting() == []


PLACES = ("in_transaction", "after_commit", "after_take", "after_record", "after_push", "nowhere")


def test_a_producer_that_is_killed_anywhere(
    library: Library,
    database: str,
    records: Records,
    connection: psycopg.Connection[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job runs exactly once if its transaction is committed, and never if it is not."""
    monkeypatch.setenv("JOBGUARD_FAILPOINT_LOGS", str(tmp_path))
    quick = {**BRISK, "push_deadline": 0.5}
    with jobguard.guard(library.target(), postgres=database, **quick) as guard:
        for number, place in enumerate(PLACES):
            (tmp_path / place).touch()
            child = os.fork()
            if not child:
                monkeypatch.setattr(failpoint, "_armed", {place: 1.0})
                with psycopg.connect(database) as own, guard.transaction(own):
                    own.execute("insert into public.orders values (%s)", [number])
                    library.send("say", place)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            expected = 0 if place == "nowhere" else signal.SIGKILL
            assert (place, os.WTERMSIG(status)) == (place, expected)
        ordered = connection.execute("select id from public.orders order by id").fetchall()
        assert [row["id"] for row in ordered] == [1, 2, 3, 4, 5]

        def all_pushed() -> bool:
            guard.reconcile()
            return len(library.waiting()) >= 5

        eventually(all_pushed, 30)
        guard.reconcile()
        assert len(library.waiting()) == 5
        library.work()
        assert sorted(library.said()) == sorted(PLACES[1:])
        assert records.owed() == []


def test_an_inert_guard_keeps_the_transaction(
    library: Library, connection: psycopg.Connection[Any]
) -> None:
    """Without a ledger the block is still the application's transaction."""
    guard = JobGuard(jobguard.guard.__globals__["settings_from"]({}), inert="a test")
    with guard.transaction(connection):
        connection.execute("insert into public.orders values (1)")
    with pytest.raises(Undo), guard.transaction(connection):
        connection.execute("insert into public.orders values (2)")
        raise Undo
    assert connection.execute("select id from public.orders").fetchall() == [{"id": 1}]
