"""A Redis that answers and refuses writes: a push either raises and does not run, or is accepted.

With ``when_redis_down="accept"``, a push that fails for a passing reason is accepted, and the
leader pushes it. If a person must correct the reason (rights, a key of another type), the push
raises. With ``"raise"``, all of them raise. A push that raised is not recorded either.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from kombu.exceptions import OperationalError

import jobguard
from jobguard.demo.servers import RedisServer
from jobguard.guard import JobGuard
from tests.conformance.conftest import LIBRARIES
from tests.conformance.library import QUEUE, Library
from tests.conformance.words import BRISK, Records
from tests.support import eventually

KEYS = {"celery": QUEUE, "dramatiq": f"dramatiq:{QUEUE}", "rq": f"rq:queue:{QUEUE}"}


def configured(name: str, value: str, usual: str) -> Callable[[Any], Callable[[], object]]:
    """Return a function that sets an option of Redis and returns a function that resets it."""

    def begin(client: Any) -> Callable[[], object]:
        client.config_set(name, value)
        return lambda: client.config_set(name, usual)

    return begin


def replica(client: Any) -> Callable[[], object]:
    """Make it a replica of a server that does not exist."""
    client.replicaof("127.0.0.1", "1")
    return lambda: client.replicaof("no", "one")


def replica_without_data(client: Any) -> Callable[[], object]:
    """Make it a replica that answers nothing before it has contacted its master."""
    client.config_set("replica-serve-stale-data", "no")
    return replica(client)


def rights(client: Any) -> Callable[[], object]:
    """Take the right to write lists from the default user."""
    client.execute_command("ACL", "SETUSER", "default", "-rpush", "-lpush", "-evalsha")
    return lambda: client.execute_command("ACL", "SETUSER", "default", "+@all")


STATES: dict[str, Callable[[Any], Callable[[], object]]] = {
    "OOM": configured("maxmemory", "1", "0"),
    "READONLY": replica,
    "MASTERDOWN": replica_without_data,
    "NOREPLICAS": configured("min-replicas-to-write", "1", "0"),
    "NOPERM": rights,
    "WRONGTYPE": lambda client: lambda: None,
}
PASSING = ("OOM", "READONLY", "MASTERDOWN", "NOREPLICAS")


@contextmanager
def led(database: str) -> Iterator[None]:
    """Own the lease, as a leader that does nothing."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "insert into jobguard.leader (namespace, term, holder, host, pid, expires_at)"
            " values ('default', 7, gen_random_uuid(), 'h', 1, now() + interval '1 hour')"
        )
        yield
        connection.execute("update jobguard.leader set expires_at = now()")


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("mode", ["accept", "raise"])
@pytest.mark.parametrize("state", STATES)
def test_what_raises_does_not_run(
    own_redis: RedisServer, tmp_path: Path, database: str, name: str, mode: str, state: str
) -> None:
    """A push that raises does not run, and one that does not raise runs once."""
    kind: type[Library] = pkgutil.resolve_name(LIBRARIES[name])
    library = kind(own_redis.url, tmp_path / "ledger")
    records = Records(database)
    client: Any = redis.Redis.from_url(own_redis.url)
    settings = {**BRISK, "when_redis_down": mode}
    with jobguard.guard(library.target(), postgres=database, **settings) as guard:
        if state == "WRONGTYPE":
            client.set(KEYS[name], "no list")
        else:
            library.send()  # opens a connection, and sends the queries that are sent to Redis only once
        before = len(records.owed())
        with led(database):
            restore = STATES[state](client)
            try:
                library.send()
                raised = False
            except Exception:
                raised = True
            finally:
                restore()
        taken = state == "NOREPLICAS" and not raised  # Redis 6 does not check this for a script
        assert taken or raised == (mode == "raise" or state not in PASSING)
        assert len(records.owed()) == before + (not raised)
        if state == "WRONGTYPE":
            client.delete(KEYS[name])
        assert_all_run(library, records, guard, before + (not raised))
    library.close()
    records.close()
    client.close()


@pytest.mark.parametrize("name", LIBRARIES)
def test_with_both_stores_away_nothing_is_accepted(tmp_path: Path, name: str) -> None:
    """Without PostgreSQL and Redis the library's own error is raised, and nothing of the job is kept."""
    kind: type[Library] = pkgutil.resolve_name(LIBRARIES[name])
    library = kind("redis://127.0.0.1:1/0", tmp_path / "ledger")
    nowhere = "postgresql://nobody@127.0.0.1:1/nothing"
    with jobguard.guard(library.target(), postgres=nowhere, **BRISK) as guard:
        tracker: Any = guard._tracker
        with pytest.raises((redis.ConnectionError, OSError, OperationalError)):
            library.send()
        assert tracker.spool.pending == 0
    library.close()


def assert_all_run(library: Library, records: Records, guard: JobGuard, count: int) -> None:
    """Run all jobs, and check that each accepted job ran once."""
    library.work()
    with psycopg.connect(records.database, autocommit=True) as connection:
        connection.execute(
            "insert into jobguard.queues (source, queue, trusted_since)"
            " select id, %s, '-infinity' from jobguard.sources on conflict (source, queue)"
            " do update set trusted_since = '-infinity'",
            [QUEUE],
        )
    if records.owed():
        eventually(lambda: guard.reconcile() and library.waiting(), 30)
        library.work()
    assert library.said() == ["ran"] * count
    assert records.owed() == []
