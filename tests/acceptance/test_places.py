"""The wrong Redis, the wrong Postgres, the unguarded worker: noticed before anything is pushed.

Planted once, each seen to fail: Service._out_of_place blind to copies (a copy), the name not asked
for by the host, or only after the lease was taken (another installation), FOREIGN read as LOST (two
ledgers), Place.is_sure answering True (an empty Redis), Trust.observe sure of no stranger (an
unguarded worker), Vouching without the absent ones (before any trust).
"""

from __future__ import annotations

import subprocess
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest

import jobguard.schema
from jobguard.adapter import Source
from jobguard.demo.servers import PostgresServer, RedisServer
from jobguard.demo.servers.postgres import postgres_bin
from jobguard.pulse import parse_pulse, read_pulse
from tests.acceptance import roads
from tests.acceptance.roads import QUEUE, Site, words
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


def copy(database: str, into: str) -> None:
    """Dump a database and load the dump elsewhere, as whoever builds a staging system does."""
    tools = postgres_bin()
    if not (tools / "pg_dump").exists() or not (tools / "psql").exists():
        pytest.skip(f"there is no pg_dump in {tools}")
    dump = subprocess.run([str(tools / "pg_dump"), "-d", database], capture_output=True, check=True)
    subprocess.run(
        [str(tools / "psql"), "-q", "-v", "ON_ERROR_STOP=1", "-d", into],
        input=dump.stdout,
        stdout=subprocess.DEVNULL,
        check=True,
    )


def keys(site: Site, pattern: str = "*") -> list[bytes]:
    """What is in a site's Redis."""
    with site.client() as client:
        return sorted(client.keys(pattern))


# -- the wrong Postgres ----------------------------------------------------------------------------


def test_a_copy_of_the_ledger_beside_an_empty_redis_puts_nothing_back(
    site: Site, own_postgres: PostgresServer, own_redis: RedisServer
) -> None:
    """It says that it is a copy and touches nothing, until a person says that it has moved."""
    site.settings["JOBGUARD_SOURCE"] = "main"  # production and staging call their Redis the same
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
        copy(site.postgres, staging.postgres)
        staging.settings["JOBGUARD_REDIS_URL"] = f"main={staging.redis_url}"
        once = staging.command("reconcile", "--once", "--json")
        assert '"restored": 0' in once.stdout, once.stderr
        assert "jobguard resume --moved" in once.stdout + once.stderr
        reconciler = staging.reconciler()
        assert reconciler.tells("ledger_moved")["event"] == "ledger_moved"
        staging.worker()  # it beats, but nobody puts anything back for it
        assert keys(staging, "jobguard:pulse:*") == []
        assert keys(staging, "rq:job:*") == []
        assert set(staging.owed()) == {job.id for job in jobs}
        assert not reconciler.events("watching"), reconciler.log

        moved = staging.command("resume", "--moved")
        assert moved.returncode == 0, moved.stderr
        reconciler.tells("jobs_restored")
        assert staging.said(3) == {"w0": 1, "w1": 1, "w2": 1}
        staging.completed(*(job.id for job in jobs))
    finally:
        staging.close()


def test_another_installations_ledger_is_not_written_to(site: Site) -> None:
    """Its host goes on unharmed and unrecorded, and its reconciler complains and does nothing."""
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
    reconciler.says("this database is installation 'prod-eu', JOBGUARD_INSTALLATION says 'staging'")
    assert keys(site, "jobguard:pulse:*") == []
    assert site.ask("select count(*) from jobguard.leader") == [
        0
    ]  # the lease is not theirs to hold
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
    """The first keeps its pulse there; the second alarms, and what it owes it does not push."""
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
            # Both went on for some ticks: the pulse moves, in the first one's name alone.
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
def test_an_empty_redis_that_nobody_vouches_for(
    site: Site, own_redis: RedisServer, named: bool
) -> None:
    """Unnamed, with no worker of before: it holds and says the command; a named one goes on."""
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
            reported = fresh.tells("place_unsure")
            assert "jobguard resume" in " ".join(map(str, reported.values()))
            assert keys(site, "rq:job:*") == []
            assert keys(site, "jobguard:pulse:*") == []
            assert site.ask("select count(*) from jobguard.incidents") == [0]
            stats = site.command("stats")
            assert "held" in stats.stdout, stats.stdout
            assert site.command("resume").returncode == 0
        eventually(lambda: set(queue.job_ids) == {job.id for job in jobs}, 20, message=fresh.log)
        assert queue.job_ids == [job.id for job in jobs]
        reported = fresh.tells("redis_lost_data")
        assert not named or not fresh.events("place_unsure")
    site.worker()
    assert site.said(3) == {"w0": 1, "w1": 1, "w2": 1}


# -- the unguarded worker --------------------------------------------------------------------------


def test_what_an_unguarded_worker_may_have_run_is_reported_not_recovered(site: Site) -> None:
    """Neither job by job nor after a FLUSHALL: they stay owed, held, and in everybody's sight."""
    site.worker()  # a guarded one as well: one stranger is enough
    reconciler = site.reconciler()
    bare = site.bare_worker()
    with site.producer() as (queue, guard):
        job = queue.enqueue_in(timedelta(hours=1), roads.say, str(site.ledger))
        reported = reconciler.tells("queue_untrusted")
        assert reported["queue"] == QUEUE
        assert any("bare" in worker for worker in reported["workers"])
        with site.client() as client:
            client.delete(job.key)
            eventually(lambda: guard.stats().stuck == 1, 20, message=reconciler.log)
            bare.pause()  # it would register again
            client.flushdb()
            reconciler.tells("redis_lost_data")
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


def test_what_was_recorded_before_anybody_watched_is_vouched_for_by_presence(site: Site) -> None:
    """What Redis still had when the queue became trusted is recovered; what was absent then never is."""
    go = site.folder / "go"
    with site.producer() as (queue, _):
        first = queue.enqueue(roads.say_and_wait, str(site.ledger), "first", str(go))
        present = [queue.enqueue(roads.say, str(site.ledger), f"w{n}") for n in range(2)]
        absent = queue.enqueue(roads.say, str(site.ledger), "absent")
        with site.client() as client:
            client.delete(absent.key)
            client.lrem(queue.key, 0, absent.id)
            client.config_resetstat()  # other tests have flushed this server: that would be a loss
        reconciler = site.reconciler()
        site.worker()  # busy with the first
        reported = reconciler.tells("jobs_untrusted")
        assert (reported["queue"], reported["count"]) == (QUEUE, 1)
        site.trusted()
        with site.client() as client:
            client.flushdb()
        reconciler.tells("jobs_restored")
        go.touch()
        site.completed(first.id, *(job.id for job in present))
        after = queue.enqueue(roads.say, str(site.ledger), "after")
        site.completed(after.id)
        site.swept(queue)
    assert site.owed() == [absent.id]
    assert site.ask("select cause::text from jobguard.suspects") == ["untrusted"]
    assert words(site.ledger) == {"first": 1, "w0": 1, "w1": 1, "after": 1}
