"""The children of a prefork worker hold no connection to Postgres: their worker reports for them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from jobguard.demo.servers import PostgresServer
from tests.integration.celery.rig import a_rig

SESSIONS = "select count(*) from pg_stat_activity where usename = %s"


@pytest.fixture
def role(database: str) -> str:
    """Return a role that may have two connections at once."""
    name = f"worker_{uuid4().hex}"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"create role {name} login connection limit 2 password 'x'")
        connection.execute(f"grant usage on schema jobguard to {name}")
        connection.execute(f"grant all on all tables in schema jobguard to {name}")
        connection.execute(f"grant all on all sequences in schema jobguard to {name}")
        connection.execute(f"grant all on all functions in schema jobguard to {name}")
    return name


def test_however_many_children_two_connections_do(
    tmp_path: Path, database: str, redis_url: str, role: str
) -> None:
    """No end is lost when children are replaced, and nothing runs again after a restart."""
    narrow = make_conninfo(database, user=role, password="x")
    with a_rig(tmp_path, database, redis_url) as rig:
        rig.reconciler()
        once = {"worker_max_tasks_per_child": 4}
        worker = rig.worker(concurrency=8, conf=once, JOBGUARD_POSTGRES_URL=narrow)
        rig.until(rig.trusted)
        sent = [rig.send("slow", f"w{n}", 0.1) for n in range(64)]
        rig.until(lambda: not rig.owed(), 90)
        assert rig.ask(SESSIONS, role)[0][0] in (1, 2)
        assert "starts without a claim" not in worker.text
        assert worker.stop() == 0
        rig.worker(concurrency=8, JOBGUARD_POSTGRES_URL=narrow)
        last = rig.send("ok")
        rig.until(lambda: rig.ended(last))
        assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 64
        assert set(rig.written().values()) == {1}
        claims = rig.ask("select distinct number from jobguard.history where worker is not null")
        assert claims == [(1,)]


def test_a_childs_report_in_an_outage_outlives_it(
    tmp_path: Path, own_database: str, redis_url: str, own_postgres: PostgresServer
) -> None:
    """The report of a child waits in the worker, even if the child is killed before Postgres is back."""
    with a_rig(tmp_path, own_database, redis_url) as rig:
        rig.reconciler()
        worker = rig.worker(JOBGUARD_CALL_TIMEOUT="0.5", JOBGUARD_CONNECT_TIMEOUT="0.5")
        rig.until(rig.trusted)
        sent = [rig.send("slow", f"w{n}", 2.0) for n in range(2)]
        rig.until(lambda: rig.written()["w0-begins"] and rig.written()["w1-begins"])
        own_postgres.pause()
        rig.until(lambda: rig.written()["w0"] and rig.written()["w1"])
        rig.until(lambda: worker.text.count("succeeded in") == 2)
        for n in range(2):
            os.kill(rig.pid(f"w{n}"), signal.SIGKILL)
        own_postgres.resume()
        rig.until(lambda: not rig.owed())
        assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 2
        assert rig.written() == {"w0-begins": 1, "w1-begins": 1, "w0": 1, "w1": 1}


def test_a_childs_record_in_an_outage_outlives_it(
    tmp_path: Path, own_database: str, redis_url: str, own_postgres: PostgresServer
) -> None:
    """Records wait in the worker as well."""
    with a_rig(tmp_path, own_database, redis_url) as rig:
        worker = rig.worker(JOBGUARD_CALL_TIMEOUT="0.5", JOBGUARD_CONNECT_TIMEOUT="0.5")
        rig.until(lambda: rig.queues_in_beats())
        job_id = rig.send("again", "again", 1, 30)
        rig.send("slow", "slow", 2.0)
        rig.until(lambda: rig.written()["slow-begins"])
        own_postgres.pause()
        sent = rig.send("again", "later", 1, 60)
        rig.until(lambda: rig.written()["later"])
        rig.until(lambda: "Retry in 60s" in worker.text)
        os.kill(rig.pid("later"), signal.SIGKILL)
        own_postgres.resume()
        rig.until(lambda: rig.ended(sent) == ["superseded"])
        assert rig.ended(job_id) == ["superseded"]
        assert rig.owed() == 2
