"""The wrong Redis, the wrong PostgreSQL, the unguarded worker: jobguard detects each before a push.

Each of these faults made a test fail: the service does not detect copies (a copy); the host does
not compare the name, or compares it only after the lease was taken (another installation); FOREIGN
is read as LOST (two ledgers); the identity check is always sure (an empty Redis); trust never finds
an unguarded consumer (an unguarded worker); the check of the backlog ignores absent jobs (before
the first trust).
"""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest

import jobguard.schema
from jobguard.adapter import Source
from jobguard.demo.servers import PostgresServer, RedisServer
from jobguard.pulse import parse_pulse, read_pulse
from tests.acceptance import roads
from tests.acceptance.roads import QUEUE, Site, words
from tests.databases import copy_database
from tests.support import PATIENT, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jobguard.demo.servers import NamedPostgres


RQ = Source("default", "rq", "any", "rq")


@pytest.fixture
def site(tmp_path: Path, database: str, redis_url: str) -> Iterator[Site]:
    """Give a ledger and a Redis."""
    made = Site(tmp_path, database, redis_url, **PATIENT)
    yield made
    made.close()


def keys(site: Site, pattern: str = "*") -> list[bytes]:
    """Return the keys in the Redis of a site."""
    with site.client() as client:
        return sorted(client.keys(pattern))


# -- the wrong Postgres ----------------------------------------------------------------------------


def test_a_copy_of_the_ledger_beside_an_empty_redis_puts_nothing_back(
    site: Site, own_postgres: PostgresServer, own_redis: RedisServer
) -> None:
    """A copied ledger logs that it is a copy and pushes nothing, until `resume --moved` is run."""
    site.settings["JOBGUARD_SOURCE"] = (
        "main"  # production and staging use the same name for their Redis
    )
    leader = site.reconciler(JOBGUARD_REDIS_URL=f"main={site.redis_url}")
    worker = site.worker()
    site.trusted()
    worker.stop()
    with site.producer() as (queue, _):
        jobs = [queue.enqueue(roads.say, str(site.ledger), f"w{n}") for n in range(3)]
    leader.stop()

    (site.folder / "staging").mkdir()
    staging = Site(
        site.folder / "staging",
        own_postgres.create_database("staging"),
        own_redis.url,
        JOBGUARD_SOURCE="main",
    )
    staging.ledger = site.ledger
    try:
        copy_database(site.postgres, staging.postgres)
        staging.settings["JOBGUARD_REDIS_URL"] = f"main={staging.redis_url}"
        once = staging.command("reconcile", "--once", "--json")
        assert '"restored": 0' in once.stdout, once.stderr
        assert "jobguard resume --moved" in once.stdout + once.stderr
        reconciler = staging.reconciler()
        assert reconciler.wait_for_event("ledger_moved")["event"] == "ledger_moved"
        staging.worker()  # it beats, but no reconciler puts anything back for it
        assert keys(staging, "jobguard:pulse:*") == []
        assert keys(staging, "rq:job:*") == []
        assert set(staging.owed()) == {job.id for job in jobs}
        assert not reconciler.events("watching"), reconciler.log

        moved = staging.command("resume", "--moved")
        assert moved.returncode == 0, moved.stderr
        reconciler.wait_for_event("jobs_restored")
        assert staging.wait_for_runs(3) == {"w0": 1, "w1": 1, "w2": 1}
        staging.completed(*(job.id for job in jobs))
    finally:
        staging.close()


def test_another_installations_ledger_is_not_written_to(site: Site) -> None:
    """With a wrong installation name, the host runs unrecorded, and the reconciler only logs."""
    named = site.command("migrate", "--installation", "prod-eu")
    assert named.returncode == 0, named.stderr
    site.settings["JOBGUARD_INSTALLATION"] = "staging"
    reconciler = site.reconciler(leads=False)
    with site.producer() as (queue, _):
        job = queue.enqueue(roads.say, str(site.ledger))
        assert queue.job_ids == [job.id]
    worker = site.start(
        "worker",
        *(str(roads.BIN / "rq"), "worker", "--url", site.redis_url, "--burst"),
        *("--worker-class", "jobguard.adapters.rq.Worker", QUEUE),
    )
    assert worker.ends() == 0
    assert words(site.ledger).total() == 1
    for table in ("jobs", "history", "workers", "running"):
        assert site.ask(f"select count(*) from jobguard.{table}") == [0]
    reconciler.wait_for_log(
        "this database is installation 'prod-eu', JOBGUARD_INSTALLATION says 'staging'"
    )
    assert keys(site, "jobguard:pulse:*") == []
    # Another installation must not take the lease.
    assert site.ask("select count(*) from jobguard.leader") == [0]
    for words_of_it in (("reconcile", "--once"), ("stats",), ("resume",)):
        refused = site.command(*words_of_it)
        assert refused.returncode == 1, refused.stdout
        assert "prod-eu" in refused.stderr
    site.settings["JOBGUARD_INSTALLATION"] = "prod-eu"
    assert site.command("stats").returncode == 0


# -- the wrong Redis -------------------------------------------------------------------------------


def test_a_second_ledger_on_one_redis_and_namespace_touches_nothing(
    site: Site, postgres_server: NamedPostgres, template_database: str
) -> None:
    """The first ledger keeps its pulse there; the second logs an alarm and does not push its owed job."""
    first = site.reconciler()
    with site.producer() as (queue, _):
        queue.enqueue(roads.say, str(site.ledger), "ours")
    with site.client() as client:
        eventually(lambda: parse_pulse(read_pulse(client, RQ)))
        name = f"jobguard_test_{uuid.uuid4().hex}"
        url = postgres_server.create_database(name, template_database)
        with psycopg.connect(url) as connection:
            jobguard.schema.accept_move(connection)
            connection.execute("update jobguard.installation set id = gen_random_uuid()")
        (site.folder / "second").mkdir()
        second = Site(site.folder / "second", url, site.redis_url)
        try:
            with second.producer() as (queue, _):
                job = queue.enqueue(roads.say, str(site.ledger), "theirs")
            client.delete(job.key)
            before = keys(site)
            reconciler = second.reconciler()
            eventually(lambda: "another ledger keeps its pulse" in reconciler.log, 20)
            standing = parse_pulse(read_pulse(client, RQ))
            assert standing is not None
            assert [str(standing.installation)] == site.ask(
                "select id::text from jobguard.installation"
            )
            # Both have run for some ticks: the pulse counts on, with the name of the first one
            # only.
            later = standing.n + 5

            def moved() -> bool:
                now = parse_pulse(read_pulse(client, RQ))
                return now is not None and now.n >= later and now.epoch == standing.epoch

            eventually(moved)
            assert keys(site) == before
            assert second.owed() == [job.id]
            assert not reconciler.events("jobs_restored")
            assert not first.events("redis_lost_data")
        finally:
            second.close()
            postgres_server.drop_database(name)


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_an_empty_redis_without_a_known_worker(
    site: Site, own_redis: RedisServer, named: bool
) -> None:
    """Without a name and a known worker, jobguard holds and logs the command; with a name it continues."""
    site.redis_url = own_redis.url
    if named:
        site.command("migrate", "--installation", "prod-eu")
        site.settings["JOBGUARD_INSTALLATION"] = "prod-eu"
    leader = site.reconciler()
    worker = site.worker()
    site.trusted()
    worker.stop()
    with site.producer() as (queue, _):
        jobs = [queue.enqueue(roads.say, str(site.ledger), f"w{n}") for n in range(3)]
        leader.stop()
        own_redis.restart(keep_data=False)
        fresh = site.reconciler()
        if not named:
            reported = fresh.wait_for_event("place_unsure")
            assert "jobguard resume" in " ".join(map(str, reported.values()))
            assert keys(site, "rq:job:*") == []
            assert keys(site, "jobguard:pulse:*") == []
            assert site.ask("select count(*) from jobguard.incidents") == [0]
            stats = site.command("stats")
            assert "held" in stats.stdout, stats.stdout
            assert site.command("resume").returncode == 0
        eventually(lambda: set(queue.job_ids) == {job.id for job in jobs}, 20, message=fresh.log)
        assert queue.job_ids == [job.id for job in jobs]
        reported = fresh.wait_for_event("redis_lost_data")
        assert not named or not fresh.events("place_unsure")
    site.worker()
    assert site.wait_for_runs(3) == {"w0": 1, "w1": 1, "w2": 1}


# -- the unguarded worker --------------------------------------------------------------------------


def test_jobs_that_an_unguarded_worker_may_have_run_are_reported_not_recovered(site: Site) -> None:
    """Such jobs stay owed, held and visible, after a single deletion and after a FLUSHALL."""
    site.worker()  # a guarded worker as well: one unguarded worker is enough
    reconciler = site.reconciler()
    bare = site.bare_worker()
    with site.producer() as (queue, guard):
        job = queue.enqueue_in(timedelta(hours=1), roads.say, str(site.ledger))
        reported = reconciler.wait_for_event("queue_untrusted")
        assert reported["queue"] == QUEUE
        assert any("bare" in worker for worker in reported["workers"])
        with site.client() as client:
            client.delete(job.key)
            eventually(lambda: guard.stats().stuck == 1, 20, message=reconciler.log)
            bare.pause()  # otherwise it would register again
            client.flushdb()
            reconciler.wait_for_event("redis_lost_data")
            other = queue.enqueue_in(timedelta(hours=1), roads.say, str(site.ledger))
            client.delete(other.key)
            eventually(lambda: guard.stats().stuck == 2, 20, message=reconciler.log)
            assert site.ask("select restored from jobguard.incidents") == [0]
            assert client.keys("rq:job:*") == []
        assert site.owed() == [job.id, other.id]
    assert not reconciler.events("jobs_restored")
    (row,) = site.ask("select trusted_since is null, clean_since is null from jobguard.queues")
    assert row == (True, True)
    assert QUEUE in site.command("stats").stdout


def test_jobs_recorded_before_the_first_trust_are_recovered_if_redis_has_them(site: Site) -> None:
    """Jobs that Redis had when the queue became trusted are recovered; jobs absent at that time are not."""
    go = site.folder / "go"
    with site.producer() as (queue, _):
        first = queue.enqueue(roads.say_and_wait, str(site.ledger), "first", str(go))
        present = [queue.enqueue(roads.say, str(site.ledger), f"w{n}") for n in range(2)]
        absent = queue.enqueue(roads.say, str(site.ledger), "absent")
        with site.client() as client:
            client.delete(absent.key)
            client.lrem(queue.key, 0, absent.id)
            # Other tests have flushed this server, and that would count as a loss.
            client.config_resetstat()
        reconciler = site.reconciler()
        site.worker()  # busy with the first job
        reported = reconciler.wait_for_event("jobs_untrusted")
        assert (reported["queue"], reported["count"]) == (QUEUE, 1)
        site.trusted()
        with site.client() as client:
            client.flushdb()
        reconciler.wait_for_event("jobs_restored")
        go.touch()
        site.completed(first.id, *(job.id for job in present))
        after = queue.enqueue(roads.say, str(site.ledger), "after")
        site.completed(after.id)
        site.swept(queue)
    assert site.owed() == [absent.id]
    assert site.ask("select cause::text from jobguard.suspects") == ["untrusted"]
    assert words(site.ledger) == {"first": 1, "w0": 1, "w1": 1, "after": 1}
