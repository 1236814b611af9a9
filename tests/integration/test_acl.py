"""A Redis user with the rights that the manual names: records, beats and recovery work."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import redis

from jobguard.demo.servers import RedisServer
from tests.conformance.words import leading
from tests.databases import rows
from tests.integration.hosts import QUEUE, Host, trusted
from tests.support import eventually

KEYS = {
    "rq": ("rq:*",),
    "celery": (f"{QUEUE}*", "_kombu.*", "unacked*", "celery-task-meta-*", "jobguard:celery:*"),
    "dramatiq": ("dramatiq:*",),
}
RIGHTS = ("+@all", "-@dangerous", "+info", "+client|list", "+client|setname", "+pubsub")


@pytest.mark.parametrize("library", KEYS)
def test_the_rights_of_the_manual_are_enough(
    library: str, database: str, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """With these keys and commands a lost queue comes back, and its consumers are counted."""
    server = stack.enter_context(RedisServer())
    admin: Any = redis.Redis.from_url(server.database_url(0))
    stack.callback(admin.close)
    patterns = [f"~{pattern}" for pattern in (*KEYS[library], "jobguard:*")]
    admin.execute_command("ACL", "SETUSER", "app", "on", ">secret", "&*", *patterns, *RIGHTS)
    url = server.database_url(0).replace("redis://", "redis://app:secret@")
    host = Host(library, url)
    guard = host.guard(stack, database)
    stack.enter_context(leading(guard, database, url))
    eventually(lambda: trusted(database) == 1, 30)
    for _ in range(3):
        host.send()
    admin.flushdb()
    eventually(lambda: host.waiting() == 3, 30)
    assert rows(database, "select count(*) from jobguard.incidents") == [(1,)]
    assert "NOPERM" not in caplog.text
