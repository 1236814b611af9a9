"""Problems that `jobguard doctor` must find, on real servers."""

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
from jobguard.host.spool import Released
from jobguard.model import new_token
from tests.conformance.words import leading
from tests.databases import rows
from tests.integration.hosts import Host
from tests.support import eventually

LIBRARIES = ["celery", "dramatiq", "rq"]


def problems(database: str, *urls: str, **environ: str) -> list[str]:
    """Run the doctor and return its problems."""
    words = ["doctor", "--json", "--postgres", database]
    for url in urls:
        words += ["--redis", url]
    done = CliRunner().invoke(main, words, env=environ, catch_exceptions=False)
    found = json.loads(done.stdout)
    wrong = [f"{one['about']}: {one['detail']}" for one in found if one["verdict"] == "problem"]
    assert done.exit_code == (1 if wrong else 0), done.output
    # The servers of the tests run without fsync, for speed.
    return [one for one in wrong if one != "postgres: fsync is off"]


def about(found: list[str], word: str) -> str:
    """Return the one problem that begins with this word."""
    (one,) = [line for line in found if line.startswith(word)]
    return one


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_source_that_the_reconciler_knows_by_another_address(
    library: str, own_redis: RedisServer, database: str, stack: ExitStack
) -> None:
    """A reconciler that uses another address does not watch the source, and the doctor reports it."""
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
        assert f"127.1:{port}/0 and localhost:{port}/0 are two addresses of one Redis" in problem
        assert "JOBGUARD_SOURCE" in problem
    with leading(guard, database, own_redis.url):
        eventually(lambda: not problems(database, own_redis.url), 30)


def test_processes_that_use_two_addresses(
    own_redis: RedisServer, database: str, stack: ExitStack
) -> None:
    """Two addresses of one Redis make two sources, and the doctor reports it."""
    other = own_redis.url.replace("127.0.0.1", "127.1")
    hosts = [Host("rq", own_redis.url), Host("rq", other)]
    guards = [host.guard(stack, database) for host in hosts]
    with leading(guards[0], database, own_redis.url, other):
        found = problems(database, own_redis.url, other)
    assert any("are two addresses of one Redis" in problem for problem in found), found


def test_commands_that_redis_does_not_have(database: str, stack: ExitStack) -> None:
    """The doctor names the commands that rename-command took away: the user may have all rights."""
    renamed = {f"rename-command {name}": '""' for name in ("EVAL", "CLIENT", "EXEC")}
    server = stack.enter_context(RedisServer(config=renamed))
    (problem,) = [line for line in problems(database, server.url) if line.startswith("redis ")]
    assert "the commands EVAL CLIENT EXEC, which a reconciler needs" in problem


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_redis_user_without_the_rights(
    library: str, own_redis: RedisServer, database: str, stack: ExitStack
) -> None:
    """The doctor lists the missing rights, and the printed command grants all that a reconciler needs."""
    host = Host(library, own_redis.url)
    guard = host.guard(stack, database, lease=2.0)
    host.send()
    admin: Any = host.client
    admin.execute_command(
        "ACL", "SETUSER", "jg", "on", ">pw", "~rq:*", "+@read", "+@write", "-hset", "+ping"
    )
    url = own_redis.url.replace("//", "//jg:pw@")

    def rights() -> str:
        (one,) = [line for line in problems(database, url) if "the user jg lacks" in line]
        return one

    lacking = rights()
    for right in ("+hset", "+eval ", "+info", "~jobguard:doctor"):
        assert right in lacking
    assert "pw" not in lacking
    with leading(guard, database, own_redis.url):
        queues = "select from jobguard.queues"
        eventually(lambda: rows(database, queues), 30)
        line = re.search(r"ACL SETUSER .*", rights())
    assert line is not None
    admin.execute_command(*line[0].split())
    words = ["reconcile", "--once", "--postgres", database, "--redis", url]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobguard.log.configure", lambda level, json: None)
        eventually(lambda: CliRunner().invoke(main, words).exit_code == 0, 30)
    assert not [one for one in problems(database, url) if one.startswith("redis ")]


def test_a_queue_whose_live_workers_take_no_job(
    redis_url: str, database: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue whose live workers take no job is reported; a deferred job does not count."""
    monkeypatch.setattr("jobguard.cli.doctor.sources._IDLE_SECONDS", 0.5)
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
        host.client.lrem("rq:queue:mail", 0, first.id)  # as if a worker had taken it
        guard.pause()
        assert not alarm()


def test_connections_that_run_out_and_sessions_that_cannot_write(database: str) -> None:
    """The limits of the role and its session defaults are checked."""
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
    """A Redis in cluster mode is a problem, because scripts need all keys of a job on one node."""
    with RedisServer(config={"cluster-enabled": "yes"}) as server:
        found = problems(database, server.url)
        assert any("cluster mode is on" in problem for problem in found), found


def test_unknown_options_and_variables_are_noted(database: str, redis_url: str) -> None:
    """Unknown options and variables are notes, because they have no effect."""
    words = ["doctor", "--postgres", database, "--redis", f"{redis_url}?protcol=3"]
    done = CliRunner().invoke(main, words, env={"JOBGUARD_NAMSPACE": "x"})
    assert "protcol" in done.stdout
    assert "did you mean JOBGUARD_NAMESPACE?" in done.stdout


def test_reports_that_wait_in_redis_are_noted(
    database: str, redis_url: str, stack: ExitStack
) -> None:
    """The doctor says how many reports no reconciler has written yet; that is no problem by itself."""
    host = Host("rq", redis_url)
    guard: Any = host.guard(stack, database)
    host.send()
    tracker = guard._tracker
    assert tracker.stream.append([Released(new_token(), new_token(), 1)])
    words = ["doctor", "--json", "--postgres", database, "--redis", redis_url]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    details = [one["detail"] for one in json.loads(done.stdout)]
    assert any(detail.startswith("1 reports (") for detail in details), details
