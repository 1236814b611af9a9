"""Tests of the PostgreSQL and Redis servers that other tests use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from jobguard.demo.servers import NamedPostgres, PostgresServer, RedisServer, ServerError
from jobguard.demo.servers.postgres import postgres_bin
from jobguard.demo.servers.redis import redis_binary
from tests.support import eventually

if TYPE_CHECKING:
    from jobguard.demo.servers import Persistence


def ask_redis(server: RedisServer) -> redis.Redis:
    """Return a client with a short timeout and no retries."""
    never = Retry(NoBackoff(), 0)
    return redis.Redis(port=server.port, socket_timeout=0.5, retry=never, decode_responses=True)


def one(url: str, question: str = "select 1") -> object:
    """Return the first value of a query, on a new connection."""
    with psycopg.connect(url, connect_timeout=5) as connection:
        row = connection.execute(question.encode()).fetchone()
        return row[0] if row else None


def gone(pid: int) -> bool:
    """Return True if no process runs under this pid."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_database_is_created_cloned_and_dropped(postgres_server: NamedPostgres) -> None:
    """A clone has the data of its template, and can be dropped while a client is connected."""
    template = postgres_server.create_database("servers_template")
    with psycopg.connect(template) as connection:
        connection.execute("create table kept as select 42 as answer")

    clone = postgres_server.create_database("servers_clone", "servers_template")
    assert one(clone, "select answer from kept") == 42

    client = psycopg.connect(clone)
    postgres_server.drop_database("servers_clone")
    postgres_server.drop_database("servers_template")
    postgres_server.drop_database("servers_template")  # absent: no error
    client.close()
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        one(clone)


def test_a_paused_postgres_answers_nothing_until_it_is_resumed(
    own_postgres: PostgresServer,
) -> None:
    """A pause also stops the backends: an open connection hangs, and continues after the resume."""
    connection = psycopg.connect(own_postgres.url, autocommit=True)
    own_postgres.pause()
    states = {psutil.Process(pid).status() for pid in own_postgres.pids()}
    # A backend that has just ended stays a zombie, because the paused postmaster does not reap it.
    assert states - {psutil.STATUS_ZOMBIE} == {psutil.STATUS_STOPPED}
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        psycopg.connect(own_postgres.url, connect_timeout=2)

    own_postgres.resume()
    row = connection.execute("select 7").fetchone()
    assert row == (7,)
    connection.close()


def test_a_killed_postgres_keeps_what_was_committed(own_postgres: PostgresServer) -> None:
    """After SIGKILL of all processes, PostgreSQL starts again on its port, with its data."""
    url, pids = own_postgres.url, own_postgres.pids()
    with psycopg.connect(url) as connection:
        connection.execute("create table kept as select 1 as answer")

    own_postgres.kill()
    assert own_postgres.pids() == []
    assert all(gone(pid) for pid in pids)
    with pytest.raises(psycopg.OperationalError):
        one(url)

    own_postgres.start()
    assert own_postgres.url == url
    assert one(url, "select answer from kept") == 1

    own_postgres.restart()
    assert one(url, "select answer from kept") == 1


def test_a_postgres_that_is_killed_while_paused_comes_back(own_postgres: PostgresServer) -> None:
    """A PostgreSQL that was killed while it was paused starts again."""
    own_postgres.pause()
    own_postgres.kill()
    own_postgres.start()
    assert one(own_postgres.url) == 1


def test_a_closed_postgres_leaves_nothing_behind() -> None:
    """A closed PostgreSQL leaves neither processes nor files."""
    with PostgresServer(fsync=False) as server:
        pids, folder = server.pids(), server.data_dir
        assert len(pids) > 1
    assert all(gone(pid) for pid in pids)
    assert not folder.parent.exists()


def test_settings_reach_postgres() -> None:
    """The caller's settings override the defaults."""
    with PostgresServer(fsync=False, max_connections=50, settings={"jit": "off"}) as server:
        assert one(server.url, "show max_connections") == "50"
        assert one(server.url, "show fsync") == "off"
        assert one(server.url, "show jit") == "off"


def test_the_error_of_a_server_that_cannot_start() -> None:
    """The error contains the message of the server."""
    server = PostgresServer(settings={"shared_buffers": "no size"})
    with pytest.raises(ServerError, match="shared_buffers"):
        server.start()
    assert server.pids() == []
    server.close()


def test_a_paused_redis_answers_nothing_until_it_is_resumed(own_redis: RedisServer) -> None:
    """During a pause, connections stay open and get no answer."""
    client = ask_redis(own_redis)
    client.set("key", "value")

    own_redis.pause()
    with pytest.raises(redis.TimeoutError):
        client.get("key")

    own_redis.resume()
    assert client.get("key") == "value"


def test_a_killed_redis_comes_back_empty_on_its_port(own_redis: RedisServer) -> None:
    """Without persistence a kill loses all data, and the server starts again on the same port."""
    client, url, pids = ask_redis(own_redis), own_redis.url, own_redis.pids()
    client.set("key", "value")

    own_redis.kill()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(redis.ConnectionError):
        client.get("key")

    own_redis.start()
    assert own_redis.url == url
    assert client.dbsize() == 0


@pytest.mark.parametrize(
    ("persistence", "survivors"),
    [("none", set()), ("rdb", {"saved"}), ("aof", {"saved", "later"})],
)
def test_persistence_decides_what_survives_a_kill(
    persistence: Persistence, survivors: set[str]
) -> None:
    """After a kill Redis has nothing, the saved data, or every write, depending on the persistence."""
    with RedisServer(persistence=persistence) as server:
        client = ask_redis(server)
        client.set("saved", "1")
        server.save()
        client.set("later", "1")
        server.kill()
        server.start()
        assert set(client.keys()) == survivors


@pytest.mark.parametrize("persistence", ["none", "rdb", "aof"])
def test_redis_restarts_with_all_or_nothing(persistence: Persistence) -> None:
    """The caller decides if a restart keeps the data, with any persistence."""
    with RedisServer(persistence=persistence) as server:
        client = ask_redis(server)
        client.set("key", "value")
        server.restart(keep_data=True)
        assert client.get("key") == "value"
        server.restart(keep_data=False)
        assert client.dbsize() == 0


@pytest.mark.parametrize("persistence", ["none", "rdb", "aof"])
def test_redis_comes_back_from_an_old_snapshot(persistence: Persistence) -> None:
    """Writes after the snapshot are lost, as after a restore of an old backup."""
    with RedisServer(persistence=persistence) as server:
        client = ask_redis(server)
        client.set("early", "1")
        snapshot = server.snapshot()
        client.set("late", "1")
        server.restore(snapshot)
        assert client.keys() == ["early"]
        server.kill()
        server.start()
        assert client.keys() == ([] if persistence == "none" else ["early"])


def test_redis_urls_are_fresh(redis_url: str) -> None:
    """The database of a test is empty."""
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_servers_die_with_a_parent_that_is_killed() -> None:
    """After SIGKILL of the program no server runs."""
    program = (
        "import json, signal, jobguard.demo.servers as s\n"
        "p, r = s.PostgresServer(fsync=False), s.RedisServer()\n"
        "p.start(); r.start()\n"
        "folders = [str(p.data_dir.parent), str(r._home)]\n"
        "print(json.dumps([p.pids() + r.pids(), *folders]), flush=True)\n"
        "signal.pause()\n"
    )
    # Set the path, so that the killed child does not create and leave a copy of the binaries.
    environment = os.environ | {"JOBGUARD_TEST_POSTGRES_BIN": str(postgres_bin())}
    command = [sys.executable, "-c", program]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids, *folders = json.loads(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    eventually(lambda: all(gone(pid) for pid in pids), message="the servers are gone")
    for folder in folders:
        shutil.rmtree(Path(folder))


def test_a_redis_binary_is_named_by_itself_or_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable names a binary or its folder; a wrong path is an error that contains the path."""
    find = redis_binary.__wrapped__
    here = find()
    monkeypatch.setenv("JOBGUARD_TEST_REDIS_BIN", str(here))
    assert find() == here
    (tmp_path / "valkey-server").touch()
    monkeypatch.setenv("JOBGUARD_TEST_REDIS_BIN", str(tmp_path))
    assert find() == tmp_path / "valkey-server"
    monkeypatch.setenv("JOBGUARD_TEST_REDIS_BIN", str(tmp_path / "nothing"))
    with pytest.raises(ServerError, match="nothing"):
        find()
