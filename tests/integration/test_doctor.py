"""What `jobguard doctor` must not be content with, on real servers."""

from __future__ import annotations

import json
import os
import re
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from jobguard.cli import main
from jobguard.demo.servers import RedisServer
from tests.integration.hosts import Host, leading, rows
from tests.support import eventually

LIBRARIES = ["celery", "dramatiq", "rq"]


def problems(database: str, *urls: str, **environ: str) -> list[str]:
    """Ask the doctor; return what is wrong."""
    words = ["doctor", "--json", "--postgres", database]
    for url in urls:
        words += ["--redis", url]
    done = CliRunner().invoke(main, words, env=environ, catch_exceptions=False)
    found = json.loads(done.stdout)
    wrong = [f"{one['about']}: {one['detail']}" for one in found if one["verdict"] == "problem"]
    assert done.exit_code == (1 if wrong else 0), done.output
    return wrong


def about(found: list[str], word: str) -> str:
    """Return the one problem that begins with this."""
    (one,) = [line for line in found if line.startswith(word)]
    return one


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_source_that_the_reconciler_knows_by_another_address(
    library: str, own_redis: RedisServer, database: str, stack: ExitStack
) -> None:
    """It leads, it is content, and it does not watch: the jobs are owed and would stay lost."""
    host = Host(library, own_redis.url)
    guard = host.guard(stack, database)
    for _ in range(5):
        host.send()
    other = own_redis.url.replace("127.0.0.1", "127.1")
    assert other != own_redis.url
    with leading(guard, database, other):
        eventually(lambda: rows(database, "select from jobguard.leader where term > 0"), 20)
        port = own_redis.port
        problem = about(problems(database, other), f"source {library}")
        assert "has 5 owed jobs and no reconciler watches it" in problem
        assert f"127.1:{port}/0 and localhost:{port}/0 are one Redis" in problem
        assert "JOBGUARD_SOURCE" in problem
    with leading(guard, database, own_redis.url):
        eventually(lambda: not problems(database, own_redis.url), 30)


def test_processes_that_use_two_addresses(
    own_redis: RedisServer, database: str, stack: ExitStack
) -> None:
    """Two sources in one Redis: what one records, workers of the other run."""
    other = own_redis.url.replace("127.0.0.1", "127.1")
    hosts = [Host("rq", own_redis.url), Host("rq", other)]
    guards = [host.guard(stack, database) for host in hosts]
    with leading(guards[0], database, own_redis.url, other):
        found = problems(database, own_redis.url, other)
    assert any("are one Redis by two addresses" in problem for problem in found), found


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_redis_user_without_the_rights(
    library: str, own_redis: RedisServer, database: str, stack: ExitStack
) -> None:
    """What is missing is listed, and the line that is printed grants all that a reconciler does."""
    host = Host(library, own_redis.url)
    guard = host.guard(stack, database, lease=2.0)
    host.send()
    admin: Any = host.client
    admin.execute_command(
        "ACL", "SETUSER", "jg", "on", ">pw", "~rq:*", "+@read", "+@write", "-hset", "+ping"
    )
    url = own_redis.url.replace("//", "//jg:pw@")
    lacking = about(problems(database, url), "redis ")
    assert "the user jg lacks" in lacking
    for right in ("+hset", "+eval ", "+info", "~jobguard:doctor"):
        assert right in lacking
    assert "pw" not in lacking
    with leading(guard, database, own_redis.url):
        queues = "select from jobguard.queues"
        eventually(lambda: rows(database, queues), 30)
        line = re.search(r"ACL SETUSER .*", about(problems(database, url), "redis "))
    assert line is not None
    admin.execute_command(*line[0].split())
    words = ["reconcile", "--once", "--postgres", database, "--redis", url]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobguard.log.configure", lambda level, json: None)
        eventually(lambda: CliRunner().invoke(main, words).exit_code == 0, 30)
    assert not [one for one in problems(database, url) if one.startswith("redis ")]


def test_a_queue_whose_workers_are_alive_and_take_nothing(
    redis_url: str, database: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name; a job that is deferred until its parent has ended does not count."""
    monkeypatch.setattr("jobguard.cli.doctor._IDLE_SECONDS", 0.5)
    host = Host("rq", redis_url)
    guard = host.guard(stack, database)
    first = host.target.enqueue("builtins.print", "x")
    host.target.enqueue("builtins.print", "y", depends_on=first)
    with leading(guard, database, redis_url):
        name = f"worker {id(host)}"

        def alarm() -> bool:
            found = problems(database, redis_url)
            return any(p.startswith("queue mail") and name in p for p in found)

        eventually(alarm, 30)
        host.client.lrem("rq:queue:mail", 0, first.id)  # taken, as it were
        guard.pause()
        assert not alarm()


def test_connections_that_run_out_and_sessions_that_cannot_write(database: str) -> None:
    """A limit of the role counts, and so does what the role sets for every session."""
    name = "few_" + os.urandom(4).hex()
    with psycopg.connect(database, autocommit=True) as admin:

        def do(statement: str) -> None:
            admin.execute(statement.encode())

        do(f"create role {name} login connection limit 4")
        try:
            url = database.replace("//postgres@", f"//{name}@")
            found = about(problems(url), "connections")
            assert "limit of the role 4" in found and "connections left" in found
            do(f"alter role {name} connection limit -1")
            assert not [p for p in problems(url) if p.startswith("connections")]
        finally:
            do(f"drop owned by {name}")
            do(f"drop role {name}")


def test_a_cluster_is_refused_with_a_reason(database: str) -> None:
    """Scripts need all keys of a job on one node."""
    with RedisServer(config={"cluster-enabled": "yes"}) as server:
        found = problems(database, server.url)
        assert any("cluster mode is on" in problem for problem in found), found


def test_unknown_options_and_variables_are_noted(database: str, redis_url: str) -> None:
    """They break nothing, and explain why something has no effect."""
    words = ["doctor", "--postgres", database, "--redis", f"{redis_url}?protcol=3"]
    done = CliRunner().invoke(main, words, env={"JOBGUARD_NAMSPACE": "x"})
    assert "protcol" in done.stdout
    assert "did you mean JOBGUARD_NAMESPACE?" in done.stdout
