"""The promises of guard(), on a real PostgreSQL and a real Redis."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any

import fakeredis
import psycopg
import pytest
import redis
from rq import Queue, SimpleWorker
from rq.job import Job

import jobguard
import jobguard.schema
from jobguard.adapters.rq import patches
from jobguard.errors import (
    ConfigurationError,
    ConflictingGuard,
    JobguardError,
    NotMigrated,
    StoreUnavailable,
    UnsupportedTarget,
)
from jobguard.operations.read import ReadModel
from jobguard.registry import tracker_for_worker
from tests.support import SLOWEST, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

guards = importlib.import_module("jobguard.guard")
UNREACHABLE = "postgresql://nobody@127.0.0.1:1/nothing"

# -- jobs ------------------------------------------------------------------------------------------

SEEN: list[Any] = []
"""Values that the jobs of this process found."""


def add(left: int, right: int = 0) -> int:
    """Return a sum."""
    return left + right


def fail() -> None:
    """Raise an error."""
    raise ValueError("as it must")


def read_the_current_job() -> None:
    """Read the current job, and report progress."""
    job = jobguard.current()
    heard = job.progress(0.25, step="half of a half")
    SEEN.append((bool(job), job.id, job.attempt, heard))


def ask_the_guard(job_id: str) -> None:
    """Ask the guard while the job runs."""
    (made,) = guards._guards.values()
    heard = made.heartbeat(job_id, progress=0.5, attrs={"rows": 7})
    (delivery,) = made.job(job_id)
    SEEN.append((heard, delivery["state"], delivery["progress"], delivery["attrs"]))


# -- fixtures --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_stays_guarded() -> Iterator[None]:
    """Close the guard after each test."""
    SEEN.clear()
    yield
    for made in list(guards._guards.values()):
        made.close()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """Give the host's client."""
    with redis.Redis.from_url(redis_url) as made:
        yield made


@pytest.fixture
def queue(client: redis.Redis) -> Queue:
    """Give the host's queue."""
    return Queue("mail", connection=client)


@pytest.fixture
def ask(database: str) -> Iterator[Callable[..., list[Any]]]:
    """Give a function that queries the ledger."""
    with psycopg.connect(database, autocommit=True) as connection:

        def asked(query: str, *values: Any) -> list[Any]:
            rows = connection.execute(query.encode(), values).fetchall()
            return [row[0] if len(row) == 1 else row for row in rows]

        yield asked


def work(*queues: Queue) -> None:
    """Run the waiting jobs in this process."""
    SimpleWorker(queues, connection=queues[0].connection).work(burst=True)


def guarded(client: redis.Redis, queue: str = "mail") -> bool:
    """Return True if an enqueue leaves our mark in Redis."""
    job = Queue(queue, connection=client).enqueue(add, 1)
    return bool(client.hexists(job.key, "jg"))


# -- what can be guarded ---------------------------------------------------------------------------


@pytest.mark.parametrize("target", [object(), "redis://localhost", None, [], [1, 2], 42])
def test_an_unsupported_target_is_refused_by_name(target: object, database: str) -> None:
    """An unsupported target raises an error that names it and the supported ones."""
    with pytest.raises(UnsupportedTarget) as raised:
        jobguard.guard(target, postgres=database)
    assert type(target).__name__ in str(raised.value)
    assert "rq.Queue" in str(raised.value)


def test_a_client_that_decodes_is_refused(redis_url: str, database: str) -> None:
    """A client that decodes responses is refused, because RQ's workers cannot use it."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        for target in (client, Queue("mail", connection=client)):
            with pytest.raises(UnsupportedTarget, match="decode_responses"):
                jobguard.guard(target, postgres=database)
        assert not guarded(client)


def test_queues_on_two_redises_need_two_calls(client: redis.Redis, database: str) -> None:
    """Queues on two Redis servers are refused, because one guard is one source."""
    with redis.Redis.from_url("redis://127.0.0.1:1/0") as other:
        queues = [Queue("a", connection=client), Queue("b", connection=other)]
        with pytest.raises(UnsupportedTarget, match="once for each"):
            jobguard.guard(queues, postgres=database)


def zero(guard: jobguard.JobGuard) -> bool:
    """Return True if an inert guard returns empty answers everywhere."""
    stats = guard.stats()
    guard.cancel("a")
    guard.pause()
    guard.resume()
    return (
        stats.total == 0
        and not stats.queues
        and not guard.job("a")
        and not guard.jobs().rows
        and not guard.heartbeat("a", progress=0.5)
        and guard.requeue("0" * 32) is None
        and guard.reconcile() == {}
        and guard.inert is not None
    )


def test_a_fakeredis_is_inert(no_connection: None) -> None:
    """With a fakeredis, a guard needs neither PostgreSQL nor settings, and returns empty answers."""
    queue = Queue("mail", connection=fakeredis.FakeStrictRedis())
    for target in (queue, queue.connection, [queue]):
        with jobguard.guard(target, postgres=UNREACHABLE) as guard:
            assert zero(guard)
            job = queue.enqueue(add, 1)
            assert not queue.connection.hexists(job.key, "jg")


def test_jobs_that_run_at_once_are_not_guarded(client: redis.Redis, no_connection: None) -> None:
    """With is_async=False there is nothing to guard, because the call is the run."""
    queue = Queue("mail", connection=client, is_async=False)
    with jobguard.guard(queue, postgres=UNREACHABLE) as guard:
        assert zero(guard)
        assert queue.enqueue(add, 1, 2).return_value() == 3


def test_disabled_wins_over_everything(
    client: redis.Redis, no_connection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With JOBGUARD_DISABLED=1 there is no connection and no hook, even with connect="require"."""
    monkeypatch.setenv("JOBGUARD_DISABLED", "1")
    with jobguard.guard(client, postgres=UNREACHABLE, connect="require") as guard:
        assert zero(guard)
        assert not guarded(client)


@pytest.fixture
def no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every attempt to reach a PostgreSQL fail the test."""
    from jobguard.store.connection import Connecting

    def never(_self: Connecting, conninfo: str) -> None:
        raise AssertionError(f"connected to {conninfo}")

    monkeypatch.setattr(Connecting, "__init__", never)
    monkeypatch.setattr(psycopg.Connection, "connect", never)


# -- the same call again -------------------------------------------------------------------------


def test_the_same_call_twice_is_one_guard(
    client: redis.Redis, database: str, ask: Callable[..., list[Any]]
) -> None:
    """A second call with the same arguments returns the same guard, as when a module is reloaded."""
    first = jobguard.guard(Queue("mail", connection=client), postgres=database)
    second = jobguard.guard(Queue("mail", connection=client), postgres=database)
    assert second is first
    job = Queue("mail", connection=client).enqueue(add, 1)
    assert ask("select job_id from jobguard.jobs") == [job.id]


def test_another_queue_of_the_source_joins_its_guard(client: redis.Redis, database: str) -> None:
    """Any Queue object with a guarded name is guarded, and no other."""
    jobguard.guard(Queue("mail", connection=client), postgres=database)
    assert guarded(client, "mail")
    assert not guarded(client, "bulk")
    jobguard.guard(Queue("bulk", connection=client), postgres=database)
    assert guarded(client, "bulk")
    assert not guarded(client, "other")


def test_other_settings_are_a_conflict_that_names_the_difference(
    client: redis.Redis, database: str, empty_database: str
) -> None:
    """The error names the difference, the old and the new value, and never a password."""
    jobguard.guard(client, postgres=database)
    with pytest.raises(ConflictingGuard, match=r"lease is 9\.0, now 8\.0"):
        jobguard.guard(client, postgres=database, lease=8)
    secret = empty_database.replace("postgres@", "postgres:secret@")
    with pytest.raises(ConflictingGuard, match=r"postgres is .* now ") as raised:
        jobguard.guard(client, postgres=secret)
    assert "secret" not in str(raised.value)
    with pytest.raises(ConfigurationError, match="did you mean 'lease'"):
        jobguard.guard(client, postgres=database, laese=8)
    assert guarded(client)


def test_an_object_of_the_library_is_no_id(client: redis.Redis, database: str) -> None:
    """`cancel`, `job` and `wait` raise an error if they get a job and not its id."""
    queue = Queue("mail", connection=client)
    with jobguard.guard(queue, postgres=database) as guard:
        job: Any = queue.enqueue(add, 1)
        for call in (guard.cancel, guard.job, lambda given: guard.wait(given, SLOWEST)):
            with pytest.raises(ConfigurationError, match="give the id of the job"):
                call(job)
        with pytest.raises(ConfigurationError, match="token"):
            guard.requeue("a job id")
        with pytest.raises(ConfigurationError, match="1 or more"):
            guard.jobs(limit=0)
        assert guard.job(job.id).state == "pending"


def test_a_job_whose_module_calls_guard_does_not_fail_by_its_worker(
    client: redis.Redis,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The worker's guard, made from the environment, stays in force; the log names the difference."""
    monkeypatch.setenv("JOBGUARD_POSTGRES_URL", database)
    assert tracker_for_worker(client) is not None
    queue = Queue("mail", connection=client)
    again = jobguard.guard(queue, recover={"app.charge": "dead"})
    assert again is jobguard.guard(queue) and again.inert is None
    assert "recover is None, now {'app.charge': 'dead'}" in caplog.text
    other = jobguard.guard(queue, namespace="other")
    assert other.inert is not None and "namespace 'other'" in caplog.text
    assert again.settings.recover is None and guarded(client, "mail")
    again.close()
    with jobguard.guard(queue, lease=8), pytest.raises(ConflictingGuard):
        jobguard.guard(queue, lease=9)


def test_a_list_guards_each_of_its_queues(client: redis.Redis, database: str) -> None:
    """A list guards each of its queues, and a redis.Redis every present and future queue."""
    queues = [Queue(name, connection=client) for name in ("mail", "bulk")]
    with jobguard.guard(queues, postgres=database):
        assert [guarded(client, name) for name in ("mail", "bulk", "other")] == [True, True, False]
    with jobguard.guard(client, postgres=database):
        assert [guarded(client, name) for name in ("mail", "bulk", "other")] == [True] * 3


@pytest.fixture
def bare_rq() -> Iterator[None]:
    """Give an RQ without hooks: a worker class that another test imported would keep them."""
    others = list(patches._holders)
    for holder in others:
        patches.uninstall(holder)
    yield
    for holder in others:
        patches.install(holder)


def test_close_takes_the_hooks_out_again(bare_rq: None, client: redis.Redis, database: str) -> None:
    """After close() RQ's methods are its own again; a second close() does nothing."""
    names = ("enqueue_job", "enqueue_many", "_enqueue_job", "schedule_job", "empty", "delete")
    before = [Queue.__dict__[name] for name in names]
    with jobguard.guard(client, postgres=database) as guard:
        assert guarded(client)
        assert [Queue.__dict__[name] for name in names] != before
    assert [Queue.__dict__[name] for name in names] == before
    assert not guarded(client)
    guard.close()
    assert zero(guard)
    jobguard.guard(client, postgres=database)  # it can be guarded again
    assert guarded(client)


# -- PostgreSQL unreachable, or not migrated -----------------------------------------------------


def test_guard_itself_opens_no_connection(client: redis.Redis, no_connection: None) -> None:
    """guard() opens no connection, so it works in image builds, migrations and every test."""
    guard = jobguard.guard(client, postgres="postgresql://no.such.host.invalid/db")
    assert guard.inert is None


def test_enqueue_works_although_postgres_cannot_be_reached(
    client: redis.Redis, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    """Jobs are pushed and run without PostgreSQL, with one log line."""
    caplog.set_level(logging.INFO, "jobguard")
    jobguard.guard(queue, postgres=UNREACHABLE)
    jobs = [queue.enqueue(add, n) for n in range(5)]
    assert queue.job_ids == [job.id for job in jobs]
    reported = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert sum("wait in the spool" in record.getMessage() for record in reported) == 1
    assert len(reported) <= 2, caplog.text
    work(queue)
    assert [Job.fetch(job.id, connection=client).return_value() for job in jobs] == list(range(5))


def test_require_raises_the_problem_and_guards_nothing(
    client: redis.Redis, database: str, empty_database: str
) -> None:
    """connect="require" raises different errors for an unreachable and an unmigrated database."""
    with pytest.raises(StoreUnavailable):
        jobguard.guard(client, postgres=UNREACHABLE, connect="require")
    assert not guarded(client)
    with pytest.raises(NotMigrated, match="jobguard migrate"):
        jobguard.guard(client, postgres=empty_database, connect="require")
    assert not guarded(client)
    jobguard.guard(client, postgres=database, connect="require")
    assert guarded(client)


def test_an_unmigrated_database_is_one_error_line_until_it_is_migrated(
    queue: Queue, empty_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An unmigrated database gives one log line; after the migration, waiting records are written too."""
    guard = jobguard.guard(queue, postgres=empty_database, retry_interval=0.05)
    early = [queue.enqueue(add, n) for n in range(3)]
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "jobguard migrate" in errors[0]
    jobguard.schema.migrate(empty_database)

    def all_recorded() -> bool:
        queue.enqueue(add, 9)
        return all(guard.job(job.id) for job in early)

    eventually(all_recorded)
    with psycopg.connect(empty_database) as connection:
        jobs = connection.execute("select job_id from jobguard.jobs").fetchall()
    assert {job_id for (job_id,) in jobs} == set(queue.job_ids)


# -- a fork ----------------------------------------------------------------------------------------


def test_a_forked_child_records_for_itself(
    queue: Queue, database: str, ask: Callable[..., list[Any]]
) -> None:
    """Parent and child each use a connection of their own."""
    jobguard.guard(queue, postgres=database)
    before = queue.enqueue(add, 1)
    backends = "select pid from pg_stat_activity where application_name = 'jobguard'"
    backends += " and datname = current_database()"
    (parents,) = ask(backends)
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    theirs.settimeout(20)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            ours.close()
            job = queue.enqueue(add, 2)
            theirs.sendall(job.id.encode())
            theirs.recv(1)
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    between = ours.recv(100).decode()
    pids = ask(backends)
    assert parents in pids
    assert len(pids) == 2
    after = queue.enqueue(add, 3)
    ours.sendall(b".")
    assert os.waitpid(child, 0)[1] == 0
    last = queue.enqueue(add, 4)
    ours.close()
    recorded = ask("select job_id from jobguard.jobs order by token")
    assert set(recorded) == {before.id, between, after.id, last.id}
    eventually(lambda: ask(backends) == [parents])


# -- the methods of a guard ----------------------------------------------------------------------


def test_stats_count_by_state_and_queue(client: redis.Redis, queue: Queue, database: str) -> None:
    """A job is counted once, in its state."""
    guard = jobguard.guard(client, postgres=database)
    queue.enqueue(add, 1)
    queue.enqueue(fail)
    work(queue)
    queue.enqueue(add, 2)
    guard.cancel(queue.enqueue(add, 3).id)
    bulk = Queue("bulk", connection=client)
    bulk.enqueue_in(jobguard_later(), add, 4)

    def finished() -> bool:
        stats = guard.stats()
        return (
            (stats.completed, stats.failed, stats.pending) == (1, 1, 1)
            and (stats.cancelled, stats.scheduled, stats.processing) == (1, 1, 0)
            and stats.total == 5
            and stats.queues["bulk"].total == 1
            and stats.queues["mail"].total == 4
        )

    eventually(finished, message=str(guard.stats()))


def jobguard_later() -> Any:
    """Return the time an hour from now."""
    from datetime import timedelta

    return timedelta(hours=1)


def test_a_cancelled_job_is_not_run(
    client: redis.Redis, queue: Queue, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The fence skips a cancelled job that still waits in Redis; an unknown id is no error."""
    guard = jobguard.guard(queue, postgres=database)
    job, other = queue.enqueue(add, 1), queue.enqueue(add, 2)
    guard.cancel(job.id, "unknown")
    assert [delivery["state"] for delivery in guard.job(job.id)] == ["cancelled"]
    assert job.id in queue.job_ids
    work(queue)
    assert Job.fetch(other.id, connection=client).return_value() == 2
    assert Job.fetch(job.id, connection=client).get_status() == "canceled"
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_a_failed_job_is_requeued_by_its_token(queue: Queue, database: str) -> None:
    """A requeue leaves a new delivery to the leader; a second one, or an unknown token, is an error."""
    guard = jobguard.guard(queue, postgres=database)
    job = queue.enqueue(fail)
    work(queue)
    (failed,) = eventually(lambda: guard.job(job.id))
    assert failed["state"] == "failed"
    assert "as it must" in failed["errors"][0]
    fresh = guard.requeue(str(failed["token"]))
    newest, older = guard.job(job.id)
    assert (newest["token"], newest["state"], newest["attempt"]) == (fresh, "pending", 2)
    assert older["next"] == fresh
    assert guard.stats().total == 1
    with pytest.raises(JobguardError, match="requeued already"):
        guard.requeue(failed["token"])
    with pytest.raises(JobguardError):
        guard.requeue("00000000-0000-0000-0000-000000000000")


def test_a_pause_of_an_unknown_queue_is_an_error(queue: Queue, database: str) -> None:
    """A name that no job has is an error with the known names; each pause is noted for people."""
    guard = jobguard.guard(queue, postgres=database)
    queue.enqueue(add, 1)
    for act in (guard.pause, guard.resume):
        with pytest.raises(JobguardError, match=f"'typo' is known .* known: {queue.name}"):
            act("typo")
    guard.pause("typo", force=True)
    guard.pause(queue.name)
    guard.resume(queue.name)
    with closing(ReadModel(lambda: database)) as ledger:
        notes = [(row["cause"], row["detail"]) for row in ledger.incidents("default")]
    of = f"queue {queue.name}"
    assert notes == [("resume", of), ("pause", of), ("pause", "queue typo")]


def test_heartbeats_are_noted_in_the_running_claim(queue: Queue, database: str) -> None:
    """A heartbeat is stored by job id from any process; for other jobs it does nothing."""
    guard = jobguard.guard(queue, postgres=database)
    job = queue.enqueue(ask_the_guard, "an-id", job_id="an-id")
    assert guard.heartbeat(job.id, progress=0.1) is False
    assert guard.heartbeat("unknown", attrs={"a": 1}) is False
    work(queue)
    assert SEEN == [(True, "processing", 0.5, {"rows": 7})]


def test_a_job_knows_which_job_it_is(queue: Queue, database: str) -> None:
    """jobguard.current() has the job's id and attempt and takes its progress.

    Outside a job it is empty.
    """
    jobguard.guard(queue, postgres=database)
    job = queue.enqueue(read_the_current_job)
    assert (bool(jobguard.current()), jobguard.current().id) == (False, None)
    assert jobguard.current().progress(0.5) is False
    work(queue)
    (seen,) = SEEN
    assert seen == (True, job.id, 1, True)
    assert not jobguard.current()


def test_an_unguarded_job_has_no_current_job(queue: Queue) -> None:
    """The same function runs without a guard too."""
    queue.enqueue(read_the_current_job)
    work(queue)
    assert SEEN == [(False, None, 0, False)]


def test_reconcile_makes_one_pass(client: redis.Redis, queue: Queue, database: str) -> None:
    """reconcile() restores the lost job and reports it, and the lease is free again."""
    guard = jobguard.guard(queue, postgres=database, grace=0.2, push_deadline=0.2, lease=2)
    worker: Any = SimpleWorker([queue], connection=client)
    worker.register_birth()  # a queue is recovered once it has a guarded worker
    try:
        quiet = guard.reconcile()
        assert quiet["leads"] is True
        assert quiet["restored"] == 0
        job = queue.enqueue(add, 1)
        client.delete(job.key)
        client.delete(queue.key)
        done = guard.reconcile()
        assert done["restored"] == 1, done
        assert queue.job_ids == [job.id]
        assert client.hget(job.key, "jg") == guard.job(job.id)[0]["token"].hex.encode()
        guard.pause()
        client.delete(job.key)
        client.delete(queue.key)

        def held() -> bool:
            counts = guard.reconcile()
            assert counts["restored"] == 0, counts
            return bool(counts["held"])

        eventually(held, 30)  # before its second beat the worker may not have read the pulse
        guard.resume()
    finally:
        worker.register_death()
