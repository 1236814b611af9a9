"""The servers that other tests rely on do what they say."""

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
    """Connect with little patience."""
    never = Retry(NoBackoff(), 0)
    return redis.Redis(port=server.port, socket_timeout=0.5, retry=never, decode_responses=True)


def one(url: str, question: str = "select 1") -> object:
    """Ask PostgreSQL one question on a new connection."""
    with psycopg.connect(url, connect_timeout=5) as connection:
        row = connection.execute(question.encode()).fetchone()
        return row[0] if row else None


def gone(pid: int) -> bool:
    """Tell whether nothing runs under this pid."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_database_is_created_cloned_and_dropped(postgres_server: NamedPostgres) -> None:
    """A clone has what its template had, and goes even while somebody is connected."""
    template = postgres_server.create_database("servers_template")
    with psycopg.connect(template) as connection:
        connection.execute("create table kept as select 42 as answer")

    clone = postgres_server.create_database("servers_clone", "servers_template")
    assert one(clone, "select answer from kept") == 42

    visitor = psycopg.connect(clone)
    postgres_server.drop_database("servers_clone")
    postgres_server.drop_database("servers_template")
    postgres_server.drop_database("servers_template")  # absent: no error
    visitor.close()
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        one(clone)


def test_a_paused_postgres_answers_nothing_until_it_is_resumed(
    own_postgres: PostgresServer,
) -> None:
    """SIGSTOP reaches the backends too: an open connection hangs, and goes on afterwards."""
    connection = psycopg.connect(own_postgres.url, autocommit=True)
    own_postgres.pause()
    states = {psutil.Process(pid).status() for pid in own_postgres.pids()}
    # A backend that has just ended waits for the postmaster, which is paused, to be reaped.
    assert states - {psutil.STATUS_ZOMBIE} == {psutil.STATUS_STOPPED}
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        psycopg.connect(own_postgres.url, connect_timeout=2)

    own_postgres.resume()
    row = connection.execute("select 7").fetchone()
    assert row == (7,)
    connection.close()


def test_a_killed_postgres_keeps_what_was_committed(own_postgres: PostgresServer) -> None:
    """After SIGKILL of the whole tree it comes back on its port, with its data."""
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
    """The faults can be combined."""
    own_postgres.pause()
    own_postgres.kill()
    own_postgres.start()
    assert one(own_postgres.url) == 1


def test_a_closed_postgres_leaves_nothing_behind() -> None:
    """Neither processes nor files."""
    with PostgresServer(fsync=False) as server:
        pids, folder = server.pids(), server.data_dir
        assert len(pids) > 1
    assert all(gone(pid) for pid in pids)
    assert not folder.parent.exists()


def test_settings_reach_postgres() -> None:
    """What the caller sets goes before our own choice."""
    with PostgresServer(fsync=False, max_connections=50, settings={"jit": "off"}) as server:
        assert one(server.url, "show max_connections") == "50"
        assert one(server.url, "show fsync") == "off"
        assert one(server.url, "show jit") == "off"


def test_a_server_that_cannot_start_says_why() -> None:
    """The error carries the server's own words."""
    server = PostgresServer(settings={"shared_buffers": "no size"})
    with pytest.raises(ServerError, match="shared_buffers"):
        server.start()
    assert server.pids() == []
    server.close()


def test_a_paused_redis_answers_nothing_until_it_is_resumed(own_redis: RedisServer) -> None:
    """SIGSTOP leaves connections open and silent."""
    client = ask_redis(own_redis)
    client.set("key", "value")

    own_redis.pause()
    with pytest.raises(redis.TimeoutError):
        client.get("key")

    own_redis.resume()
    assert client.get("key") == "value"


def test_a_killed_redis_comes_back_empty_on_its_port(own_redis: RedisServer) -> None:
    """Without persistence a kill loses all, and clients find the server where it was."""
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
def test_persistence_says_what_survives_a_kill(
    persistence: Persistence, survivors: set[str]
) -> None:
    """Nothing, what was saved, or every write."""
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
    """The caller decides what a restart keeps, whatever the persistence."""
    with RedisServer(persistence=persistence) as server:
        client = ask_redis(server)
        client.set("key", "value")
        server.restart(keep_data=True)
        assert client.get("key") == "value"
        server.restart(keep_data=False)
        assert client.dbsize() == 0


@pytest.mark.parametrize("persistence", ["none", "rdb", "aof"])
def test_redis_comes_back_from_an_old_snapshot(persistence: Persistence) -> None:
    """What was written after the snapshot is lost, as with a backup of this morning."""
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's death")
def test_servers_die_with_a_parent_that_is_killed() -> None:
    """SIGKILL of the program leaves no server running."""
    program = (
        "import json, signal, jobguard.demo.servers as s\n"
        "p, r = s.PostgresServer(fsync=False), s.RedisServer()\n"
        "p.start(); r.start()\n"
        "folders = [str(p.data_dir.parent), str(r._home)]\n"
        "print(json.dumps([p.pids() + r.pids(), *folders]), flush=True)\n"
        "signal.pause()\n"
    )
    # Named, so that a child that is killed need not have made, and left, a copy of the binaries.
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
    """Whatever is on PATH; and a name that leads nowhere is an error that repeats it."""
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
