"""What is promised while one of the two stores is away. Real servers, killed and stopped.

Planted once, each seen to fail: MemorySpool.put keeping nothing (spooled), a record replayed
without `replay=True` (no second run), Circuit.calling letting every call through (one wait an
outage), HostTracker._write not asking whether the circuit opened meanwhile, and Circuit telling of
every failure (threads), `when_postgres_down` ignored (raise; skip), ends not put into the spool (a
working worker), `broker_in_doubt` never true (a stopped Redis), accepts_without_broker without a
leader, and whatever `when_redis_down` says (no leader; raise), `_take_back` not withdrawing (raise),
no note on an ambiguous error, the push deadline applied to what was spooled (written nowhere),
`_completed_if_returned` doing nothing (Redis gone at the end).
"""

from __future__ import annotations

import logging
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
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BOUNDED = 3.0
"""Seconds in which one bounded wait is over, however busy the machine."""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[PostgresServer, RedisServer]]:
    """Start servers for this file alone, which its tests may kill, and leave as they found them."""
    with PostgresServer() as postgres, RedisServer() as redis_server:
        jobguard.schema.migrate(postgres.create_database("template_of_tests"))
        yield postgres, redis_server


@pytest.fixture
def own_postgres(servers: tuple[PostgresServer, RedisServer]) -> PostgresServer:
    """Give a PostgreSQL that may be killed."""
    return servers[0]


@pytest.fixture
def own_redis(servers: tuple[PostgresServer, RedisServer]) -> RedisServer:
    """Give a Redis that may be killed; empty."""
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
    """How long it took; a figure to read, not to assert tightly."""
    began = time.monotonic()
    work()
    took = time.monotonic() - began
    print(f"{what}: {took * 1000:.1f} ms")
    return took


class Contacts:
    """Counts what of this process reaches for Postgres."""

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
        """Count from here."""
        self.calls = self.connects = 0
        self.waits = []


# -- Postgres is away ------------------------------------------------------------------------------


def test_killed_postgres_stops_neither_enqueue_nor_work(
    site: Site, own_postgres: PostgresServer
) -> None:
    """Jobs are taken and run at once; when it is back they are recorded as ended, and run no more."""
    site.worker()  # one that knows Postgres; another starts in the outage
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
        site.said(5)
        late = site.start(
            "late",
            *(str(roads.BIN / "rq"), "worker", "--url", site.redis_url),
            *("--worker-class", "jobguard.adapters.rq.Worker", "late"),
        )
        for_late = Queue("late", connection=queue.connection)
        jobs += [for_late.enqueue(roads.say, str(site.ledger), f"w{n}") for n in "45"]
        assert site.said(7) == {"before": 1, **{f"w{n}": 1 for n in range(6)}}
        own_postgres.start()

        # The ends that the workers kept, and the records that this process kept, in any order.
        site.completed(*(job.id for job in jobs))
        eventually(lambda: guard.heartbeat("any call") or not guard._tracker.spool)  # type: ignore[union-attr]
        assert site.owed() == []
        site.reconciler()
        site.trusted()
        site.swept(queue)
        assert site.outcomes(*(job.id for job in jobs)) == ["completed"] * 6
    assert words(site.ledger).total() == 7, late.log


def test_what_a_producer_kept_is_recorded_when_postgres_is_back(
    site: Site, own_postgres: PostgresServer
) -> None:
    """The next call carries it along: owed jobs are owed, and none of them is pushed again."""
    with site.producer(retry_interval=0.05) as (queue, guard):
        queue.enqueue(roads.say, str(site.ledger), "before")
        own_postgres.kill()
        kept = [queue.enqueue(roads.say, str(site.ledger), f"w{n}") for n in range(20)]
        assert len(queue.job_ids) == 21
        assert len(guard._tracker.spool) == 20  # type: ignore[union-attr]
        own_postgres.start()

        def recorded() -> bool:
            guard.heartbeat("any call will do")
            return set(site.owed()) >= {job.id for job in kept}

        eventually(recorded)
        assert len(site.owed()) == 21
        site.reconciler()
        site.worker()
        assert site.said(21) == {"before": 1, **{f"w{n}": 1 for n in range(20)}}
        site.completed(*(job.id for job in kept))
    eventually(lambda: site.owed() == [])
    assert words(site.ledger).total() == 21


@pytest.mark.parametrize("known", [True, False], ids=["connected before", "never connected"])
def test_a_stopped_postgres_is_waited_for_once(
    site: Site, own_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """The first enqueue finds it out; the others neither call it nor wait for it."""
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
        print(f"{many / 200 * 1000:.2f} ms each, {len(contacts.waits)} looks without waiting")
        assert first < BOUNDED
        assert contacts.calls == 0
        assert not any(contacts.waits)  # no look has ever waited
        assert contacts.connects <= 1  # one connection under way, carried on by whoever comes
        assert many < BOUNDED
        assert len(queue.job_ids) == 201 + known

        def recorded() -> bool:
            guard.heartbeat("any call will do")
            return len(site.owed()) == 201 + known

        eventually(recorded)


@pytest.mark.parametrize("when", ["spool", "skip"])
def test_what_was_written_nowhere_is_pushed_however_late(
    site: Site, own_postgres: PostgresServer, when: str
) -> None:
    """Past the push deadline a record is the leader's to push; but no leader knows of these."""
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
    """Sixteen threads that meet a stopped Postgres together: one asks, all wait for that one answer."""
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
                thread.join(20)
        finally:
            own_postgres.resume()
        assert len(took) == 16
        assert max(took) < BOUNDED
        assert contacts.calls == 1
        assert not any(contacts.waits)
        assert sum("Postgres does not answer" in line for line in caplog.messages) == 1


def test_raise_tells_the_caller_that_postgres_is_away(
    site: Site, own_postgres: PostgresServer
) -> None:
    """The caller hears it and nothing is in Redis, so that the caller may try again."""
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
    """The job is pushed and forgotten; a guarded worker that runs it records it all the same."""
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
    """The worker goes on, its ends are written when it is back, and nothing runs twice."""
    site.reconciler()
    worker = site.worker(kind="Worker")
    site.trusted()
    with site.producer() as (queue, _):
        jobs = [queue.enqueue(roads.say_slowly, str(site.ledger), f"w{n}", 0.1) for n in range(8)]
        site.said(2)
        own_postgres.kill()
        timed(lambda: site.said(8), "the rest of the jobs")
        own_postgres.start()
        site.completed(*(job.id for job in jobs))
        eventually(lambda: site.owed() == [])
        site.swept(queue)
    assert words(site.ledger) == {f"w{n}": 1 for n in range(8)}, worker.log
    assert site.ask("select count(*) from jobguard.running") == [0]
    assert worker.stop() == 0


# -- Redis is away ---------------------------------------------------------------------------------


def away(server: RedisServer, how: str) -> None:
    """Take Redis away."""
    server.kill() if how == "killed" else server.pause()


def back(server: RedisServer, how: str) -> None:
    """Bring it back; a killed one is empty."""
    server.start() if how == "killed" else server.resume()


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_enqueue_is_accepted_while_redis_is_away(
    site: Site, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """With a leader, enqueue returns in bounded time; the jobs are pushed when Redis is back, and run."""
    reconciler = site.reconciler()
    site.worker()
    site.trusted()
    monkeypatch.setattr(
        jobguard.host.redis_health, "_PROOF", 0.0
    )  # it answered longer ago than that
    patient = redis.Redis.from_url(own_redis.url, socket_timeout=30)  # as hosts' clients are
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
        timed(lambda: site.said(7), "until all had run")
        site.completed(*(job.id for job in jobs))
    assert words(site.ledger) == {"before": 1, **{f"w{n}": 1 for n in range(6)}}, reconciler.log


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("warned", [True, False], ids=["asked before", "in the middle of a push"])
def test_without_a_leader_the_librarys_own_error_is_raised(
    site: Site, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, how: str, warned: bool
) -> None:
    """Nobody would push it: the caller hears what RQ would have said, and nothing is owed.

    But what may have reached Redis stays recorded, and the error says which job that is.
    """
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
    # Of a stopped Redis the first is written to a connection that stood, the second has none.
    ambiguous = [job_id for job_id in site.owed() if job_id != known.id]
    assert len(ambiguous) == (how == "stopped")
    assert all(job_id in notes for job_id in ambiguous)


def test_raise_tells_the_caller_that_redis_is_away(site: Site, own_redis: RedisServer) -> None:
    """Although a leader would push it; what was refused is not owed, and never comes to be pushed."""
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
    """What the function did is done: the job is completed, and an empty Redis does not bring it back."""
    site.reconciler()
    worker = site.worker(kind=kind)
    site.trusted()
    go = site.folder / "go"
    with site.producer() as (queue, _):
        job = queue.enqueue(roads.say_and_wait, str(site.ledger), "once", str(go))
        site.said(1)
        own_redis.kill()
        go.touch()
        site.completed(job.id)
        own_redis.start()
        site.swept(queue)
        other = queue.enqueue(roads.say, str(site.ledger), "after")
        if worker.process.poll() is not None:  # RQ gave up: a supervisor starts it again
            site.worker(kind=kind)
        site.completed(other.id)
    assert words(site.ledger) == {"once": 1, "after": 1}, worker.log
