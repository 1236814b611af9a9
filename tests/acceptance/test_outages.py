"""The promises that hold while PostgreSQL or Redis is away. The servers are real, killed and stopped.

Each of these faults made a test fail: the spool in memory keeps nothing (spooled); a record is
replayed without `replay=True` (no second run); the circuit lets every call through (one wait for
each outage); the tracker does not check if the circuit opened meanwhile, and the circuit logs every
failure (threads); `when_postgres_down` is ignored (raise; skip); ends do not enter the spool (a
working worker); the broker is never in doubt (a stopped Redis); jobs are accepted without a leader,
with any `when_redis_down` (no leader; raise); a refused record is not withdrawn (raise); an
ambiguous error has no note; the push deadline applies to spooled records (written nowhere); a
returned job is not completed (Redis gone at the end); no copy in the stream (what dies).
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from rq import Queue

import jobguard.host.redis_health
import jobguard.schema
from jobguard.demo.servers import PostgresServer, RedisServer
from jobguard.errors import StoreUnavailable
from jobguard.store.connection import Connecting, Database
from tests.acceptance import roads
from tests.acceptance.roads import Site, words
from tests.support import PATIENT, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BOUNDED = 20.0
"""Seconds in which one bounded wait is over, even on a slow and busy machine.

A call that waited for the end of an outage would take for ever, or the 30 s of a client's timeout.
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[PostgresServer, RedisServer]]:
    """Start servers for this file only. Its tests may kill them, and must restore them."""
    with PostgresServer() as postgres, RedisServer() as redis_server:
        jobguard.schema.migrate(postgres.create_database("template_of_tests"))
        yield postgres, redis_server


@pytest.fixture
def own_postgres(servers: tuple[PostgresServer, RedisServer]) -> PostgresServer:
    """Give a PostgreSQL that may be killed."""
    return servers[0]


@pytest.fixture
def own_redis(servers: tuple[PostgresServer, RedisServer]) -> RedisServer:
    """Give an empty Redis that may be killed."""
    with redis.Redis.from_url(servers[1].url) as client:
        client.flushall()
    return servers[1]


@pytest.fixture
def site(tmp_path: Path, own_postgres: PostgresServer, own_redis: RedisServer) -> Iterator[Site]:
    """Give a ledger and a Redis that may be killed."""
    name = f"jobguard_{uuid.uuid4().hex}"
    url = own_postgres.create_database(name, "template_of_tests")
    with psycopg.connect(url) as connection:
        jobguard.schema.accept_move(connection)
    made = Site(tmp_path, url, own_redis.url)
    yield made
    made.close()
    for server in (own_postgres, own_redis):
        server.resume()
        server.start()
    own_postgres.drop_database(name)


def timed(work: Callable[[], Any], what: str) -> float:
    """Print and return the seconds that a call took. Tests must not assert tight limits on them."""
    began = time.monotonic()
    work()
    took = time.monotonic() - began
    print(f"{what}: {took * 1000:.1f} ms")
    return took


class Contacts:
    """Counter of the contacts of this process with PostgreSQL."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.connects = 0
        self.waits: list[float] = []
        execute, probe, begin = Database._attempt, Database.probe, Connecting.__init__

        def counted_execute(database: Database, *args: Any) -> Any:
            self.calls += 1
            return execute(database, *args)

        def counted_probe(database: Database, wait: float = 0.0) -> bool:
            self.waits.append(wait)
            return probe(database, wait)

        def counted_begin(connecting: Connecting, conninfo: str) -> None:
            self.connects += 1
            begin(connecting, conninfo)

        monkeypatch.setattr(Database, "_attempt", counted_execute)
        monkeypatch.setattr(Database, "probe", counted_probe)
        monkeypatch.setattr(Connecting, "__init__", counted_begin)

    def forget(self) -> None:
        """Set all counts to zero."""
        self.calls = self.connects = 0
        self.waits = []


# -- PostgreSQL is away -------------------------------------------------------------------------


def test_killed_postgres_stops_neither_enqueue_nor_work(
    site: Site, own_postgres: PostgresServer
) -> None:
    """Jobs are accepted and run at once; when PostgreSQL is back, their ends are recorded."""
    site.worker()  # this worker knows PostgreSQL; another one starts during the outage
    with site.producer(retry_interval=0.05) as (queue, guard):
        before = queue.enqueue(roads.say, str(site.ledger), "before")
        site.completed(before.id)
        own_postgres.kill()
        jobs: list[Any] = []
        timed(lambda: jobs.append(queue.enqueue(roads.say, str(site.ledger), "w0")), "the first")
        timed(
            lambda: jobs.extend(queue.enqueue(roads.say, str(site.ledger), f"w{n}") for n in "123"),
            "three more",
        )
        site.wait_for_runs(5)
        late = site.start(
            "late",
            *(str(roads.BIN / "rq"), "worker", "--url", site.redis_url),
            *("--worker-class", "jobguard.adapters.rq.Worker", "late"),
        )
        for_late = Queue("late", connection=queue.connection)
        jobs += [for_late.enqueue(roads.say, str(site.ledger), f"w{n}") for n in "45"]
        assert site.wait_for_runs(7) == {"before": 1, **{f"w{n}": 1 for n in range(6)}}
        own_postgres.start()

        # The ends from the spools of the workers, and the records from the spool of this process,
        # in any order.
        site.completed(*(job.id for job in jobs))
        eventually(lambda: guard.heartbeat("any call") or not guard._tracker.spool)  # type: ignore[union-attr]
        assert site.owed() == []
        site.reconciler()
        site.trusted()
        site.swept(queue)
        assert site.outcomes(*(job.id for job in jobs)) == ["completed"] * 6
    assert words(site.ledger).total() == 7, late.log


SENDS = {
    "rq": """
import jobguard, redis, rq, sys
from tests.acceptance import roads
client = redis.Redis.from_url(sys.argv[1])
queue = rq.Queue(roads.QUEUE, connection=client)
with jobguard.guard(client):
    for n in range(40):
        queue.enqueue(roads.say_slowly, sys.argv[2], f"w{n}", 0.05)
""",
    "celery": """
import sys
from tests.acceptance.roads_celery import say_slowly
for n in range(40):
    say_slowly.delay(sys.argv[2], f"w{n}", 0.05)
""",
}


@pytest.mark.parametrize(
    ("library", "prefix", "at_once"), [("rq", "rq:rq", 1), ("celery", "celery", 2)]
)
def test_what_dies_while_postgres_is_away_loses_nothing(
    library: str,
    prefix: str,
    at_once: int,
    site: Site,
    own_postgres: PostgresServer,
    own_redis: RedisServer,
) -> None:
    """The producer ends, the worker is killed, and later Redis is: every job runs, and completes once."""
    start_worker = site.worker if library == "rq" else site.celery_worker
    site.reconciler("--redis", site.redis_url)
    worker = start_worker()
    site.trusted()
    own_postgres.kill()
    began = time.monotonic()
    send = (sys.executable, "-c", SENDS[library], site.redis_url, str(site.ledger))
    assert site.start("producer", *send).ends() == 0
    assert time.monotonic() - began < BOUNDED
    site.wait_for_runs(12)
    time.sleep(0.02)
    worker.close()  # SIGKILL; the ends of its last twentieth of a second may go with it
    ran = words(site.ledger)
    assert ran.total() == len(ran) < 40
    own_postgres.start()
    with site.client() as client:
        stream = f"jobguard:spool:default:{prefix}"
        eventually(lambda: len(site.owed()) >= 40 - len(ran) and not client.exists(stream), 60)
    own_redis.restart(keep_data=False)
    start_worker()
    eventually(lambda: len(words(site.ledger)) == 40, 60)
    site.nothing_is_owed(60)
    again = [word for word, count in words(site.ledger).items() if count > 1]
    # What it ran when it was killed, and what it may have ended less than 100 ms before.
    assert set(again) <= set(list(ran)[-3 * at_once :]), again


def test_spooled_records_of_a_producer_are_written_when_postgres_is_back(
    site: Site, own_postgres: PostgresServer
) -> None:
    """The next call writes the spool: spooled jobs are owed then, and none of them is pushed again."""
    with site.producer(retry_interval=0.05) as (queue, guard):
        queue.enqueue(roads.say, str(site.ledger), "before")
        own_postgres.kill()
        spooled = [queue.enqueue(roads.say, str(site.ledger), f"w{n}") for n in range(20)]
        assert len(queue.job_ids) == 21
        assert len(guard._tracker.spool) == 20  # type: ignore[union-attr]
        own_postgres.start()

        def recorded() -> bool:
            guard.heartbeat("any call will do")
            return set(site.owed()) >= {job.id for job in spooled}

        eventually(recorded)
        assert len(site.owed()) == 21
        site.reconciler()
        site.worker()
        assert site.wait_for_runs(21) == {"before": 1, **{f"w{n}": 1 for n in range(20)}}
        site.completed(*(job.id for job in spooled))
    eventually(lambda: site.owed() == [])
    assert words(site.ledger).total() == 21


@pytest.mark.parametrize("known", [True, False], ids=["connected before", "never connected"])
def test_a_stopped_postgres_is_waited_for_once(
    site: Site, own_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """The first enqueue detects the outage; the others neither call PostgreSQL nor wait for it."""
    contacts = Contacts(monkeypatch)
    with site.producer(retry_interval=0.05) as (queue, guard):
        if known:
            queue.enqueue(roads.say, str(site.ledger))
        own_postgres.pause()
        try:
            first = timed(lambda: queue.enqueue(roads.say, str(site.ledger)), "the first")
            contacts.forget()
            many = timed(
                lambda: [queue.enqueue(roads.say, str(site.ledger)) for _ in range(200)],
                "200 more",
            )
        finally:
            own_postgres.resume()
        print(f"{many / 200 * 1000:.2f} ms each, {len(contacts.waits)} checks without waiting")
        assert first < BOUNDED
        assert contacts.calls == 0
        assert not any(contacts.waits)  # no check has ever waited
        # One connection in progress, which each call continues; on a busy machine it times out.
        assert contacts.connects <= 1 + many / guard.settings.connect_timeout
        assert many < BOUNDED
        assert len(queue.job_ids) == 201 + known

        def recorded() -> bool:
            guard.heartbeat("any call will do")
            return len(site.owed()) == 201 + known

        eventually(recorded)


@pytest.mark.parametrize("when", ["spool", "skip"])
def test_an_unrecorded_job_is_pushed_after_the_deadline(
    site: Site, own_postgres: PostgresServer, when: str
) -> None:
    """After the push deadline a record is the leader's to push, but spooled records have no leader."""
    slow: dict[str, Any] = {
        "connect_timeout": 0.4,
        "push_deadline": 0.1,
        "when_postgres_down": when,
    }
    for pipelined in (False, True):
        with site.producer(**slow) as (queue, _):
            own_postgres.pause()
            try:
                with queue.connection.pipeline() as pipe:
                    queue.enqueue(roads.say, str(site.ledger), pipeline=pipe if pipelined else None)
                    pipe.execute()
            finally:
                own_postgres.resume()
            assert len(queue.job_ids) == 1 + pipelined


def test_threads_share_the_one_wait(
    site: Site,
    own_postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If sixteen threads meet a stopped PostgreSQL, one of them calls it, and all wait for its answer."""
    contacts = Contacts(monkeypatch)
    caplog.set_level(logging.INFO, "jobguard")
    with site.producer() as (queue, _):
        queue.enqueue(roads.say, str(site.ledger))
        contacts.forget()
        own_postgres.pause()
        took: list[float] = []
        threads = [
            threading.Thread(
                target=lambda: took.append(
                    timed(lambda: queue.enqueue(roads.say, str(site.ledger)), "a thread's first")
                )
            )
            for _ in range(16)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        finally:
            own_postgres.resume()
        assert len(took) == 16
        assert max(took) < BOUNDED
        assert contacts.calls == 1
        assert not any(contacts.waits)
        assert sum("Postgres does not answer" in line for line in caplog.messages) == 1


def test_raise_reports_to_the_caller_that_postgres_is_away(
    site: Site, own_postgres: PostgresServer
) -> None:
    """The caller gets the error and nothing is in Redis, so that the caller may try again."""
    with site.producer(when_postgres_down="raise", retry_interval=0.05) as (queue, _):
        own_postgres.kill()
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                queue.enqueue(roads.say, str(site.ledger))
        with pytest.raises(StoreUnavailable):
            queue.enqueue_many([Queue.prepare_data(roads.say, (str(site.ledger),))])
        with site.client() as client:
            assert client.keys("rq:job:*") == []
            assert client.llen(queue.key) == 0
        own_postgres.start()
        eventually(lambda: _accepted(queue, site))
        assert site.owed() == queue.job_ids


def _accepted(queue: Queue, site: Site) -> bool:
    try:
        queue.enqueue(roads.say, str(site.ledger))
    except StoreUnavailable:
        return False
    return True


def test_skip_goes_on_unrecorded(site: Site, own_postgres: PostgresServer) -> None:
    """The job is pushed without a record; a guarded worker that runs the job still records it."""
    with site.producer(when_postgres_down="skip") as (queue, guard):
        own_postgres.kill()
        job = queue.enqueue(roads.say, str(site.ledger))
        assert queue.job_ids == [job.id]
        assert len(guard._tracker.spool) == 0  # type: ignore[union-attr]
        own_postgres.start()
    assert site.owed() == []
    site.worker()
    site.completed(job.id)
    assert words(site.ledger).total() == 1


def test_postgres_killed_under_a_working_worker(site: Site, own_postgres: PostgresServer) -> None:
    """The worker continues, its ends are written when PostgreSQL is back, and nothing runs twice."""
    site.reconciler()
    worker = site.worker(kind="Worker")
    site.trusted()
    with site.producer() as (queue, _):
        jobs = [queue.enqueue(roads.say_slowly, str(site.ledger), f"w{n}", 0.1) for n in range(8)]
        site.wait_for_runs(2)
        own_postgres.kill()
        timed(lambda: site.wait_for_runs(8), "the rest of the jobs")
        own_postgres.start()
        site.completed(*(job.id for job in jobs))
        eventually(lambda: site.owed() == [])
        site.swept(queue)
    assert words(site.ledger) == {f"w{n}": 1 for n in range(8)}, worker.log
    assert site.ask("select count(*) from jobguard.running") == [0]
    assert worker.stop() == 0


# -- Redis is away ------------------------------------------------------------------------------


def away(server: RedisServer, how: str) -> None:
    """Kill or stop Redis."""
    server.kill() if how == "killed" else server.pause()


def back(server: RedisServer, how: str) -> None:
    """Start or resume Redis. After a kill it is empty."""
    server.start() if how == "killed" else server.resume()


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_enqueue_is_accepted_while_redis_is_away(
    site: Site, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """With a leader, enqueue returns in bounded time; the jobs are pushed when Redis is back, and run."""
    site.settings.update(PATIENT)
    reconciler = site.reconciler()
    site.worker()
    site.trusted()
    monkeypatch.setattr(
        jobguard.host.redis_health, "_PROOF", 0.0
    )  # its last answer is older than this
    patient = redis.Redis.from_url(own_redis.url, socket_timeout=30)  # as the clients of hosts are
    with site.producer(client=patient) as (queue, _):
        known = queue.enqueue(roads.say, str(site.ledger), "before")
        site.completed(known.id)
        away(own_redis, how)
        jobs: list[Any] = []
        try:
            first = timed(
                lambda: jobs.append(queue.enqueue(roads.say, str(site.ledger), "w0")), "the first"
            )
            more = timed(
                lambda: jobs.extend(
                    queue.enqueue(roads.say, str(site.ledger), f"w{n}") for n in range(1, 6)
                ),
                "five more",
            )
        finally:
            back(own_redis, how)
        assert first < BOUNDED
        assert more < BOUNDED
        timed(lambda: site.wait_for_runs(7), "until all had run")
        site.completed(*(job.id for job in jobs))
    assert words(site.ledger) == {"before": 1, **{f"w{n}": 1 for n in range(6)}}, reconciler.log


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("warned", [True, False], ids=["asked before", "in the middle of a push"])
def test_without_a_leader_the_librarys_own_error_is_raised(
    site: Site, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, how: str, warned: bool
) -> None:
    """Without a leader, the caller gets RQ's own error, and nothing is owed.

    But a job that may have reached Redis stays recorded, and the error names that job.
    """
    site.settings.update(PATIENT)
    monkeypatch.setattr(jobguard.host.redis_health, "_PROOF", 0.0 if warned else 60.0)
    with site.producer() as (queue, _):
        known = queue.enqueue(roads.say, str(site.ledger))
        away(own_redis, how)
        notes = ""
        try:
            for _ in range(2):
                began = time.monotonic()
                with pytest.raises((redis.ConnectionError, redis.TimeoutError)) as raised:
                    queue.enqueue(roads.say, str(site.ledger))
                assert time.monotonic() - began < BOUNDED
                notes += " ".join(getattr(raised.value, "__notes__", ()))
        finally:
            back(own_redis, how)
    # In the middle of a push to a stopped Redis, the first call writes to an open connection, and the
    # second has no connection. If Redis was asked before, nothing was sent.
    ambiguous = [job_id for job_id in site.owed() if job_id != known.id]
    assert len(ambiguous) == (how == "stopped" and not warned)
    assert all(job_id in notes for job_id in ambiguous)


def test_raise_reports_to_the_caller_that_redis_is_away(site: Site, own_redis: RedisServer) -> None:
    """`raise` refuses although a leader would push; a refused job is not owed, and is never pushed."""
    site.settings.update(PATIENT)
    site.reconciler()
    with site.producer(when_redis_down="raise") as (queue, _):
        own_redis.kill()
        with pytest.raises((redis.ConnectionError, redis.TimeoutError)):
            queue.enqueue(roads.say, str(site.ledger), "refused")
        own_redis.start()
        assert site.owed() == []

        def accepted() -> bool:
            try:
                queue.enqueue(roads.say, str(site.ledger), "accepted")
            except redis.RedisError:
                return False
            return True

        eventually(accepted)
        assert queue.job_ids == site.owed()
        assert len(queue.job_ids) == 1


@pytest.mark.parametrize("kind", ["SimpleWorker", "Worker"])
def test_redis_gone_when_the_function_returns(
    site: Site, own_redis: RedisServer, kind: str
) -> None:
    """The job is completed because its function returned, and an empty Redis does not bring it back."""
    site.settings.update(PATIENT)
    site.reconciler()
    worker = site.worker(kind=kind)
    site.trusted()
    go = site.folder / "go"
    with site.producer() as (queue, _):
        job = queue.enqueue(roads.say_and_wait, str(site.ledger), "once", str(go))
        site.wait_for_runs(1)
        own_redis.kill()
        go.touch()
        site.completed(job.id)
        own_redis.start()
        site.swept(queue)
        other = queue.enqueue(roads.say, str(site.ledger), "after")

        def completed() -> bool:
            nonlocal worker
            if worker.process.poll() is not None:  # RQ gave up: a supervisor starts it again
                worker = site.worker(kind=kind)
            return site.outcomes(other.id) == ["completed"]

        eventually(completed)
    assert words(site.ledger) == {"once": 1, "after": 1}, worker.log
