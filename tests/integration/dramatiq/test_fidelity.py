"""Capture, FLUSHALL, restore: all keys that Dramatiq reads are the same as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from jobguard.adapter import Source
from jobguard.guard import JobGuard
from jobguard.model import Restored, new_token
from jobguard.settings import Settings
from jobguard.store.leader import PostgresLeaderStore
from tests.conformance.words import Leader, Records
from tests.integration.dramatiq.stage import Stage
from tests.support import eventually, keyspace

HOUR = 3_600_000


def plain(stage: Stage) -> None:
    """Send several messages, in order."""
    for word in range(5):
        stage.actor("say").send(word)


def with_options(stage: Stage) -> None:
    """Send a message with many options."""
    stage.actor("add").send_with_options(args=(1,), kwargs={"other": 2}, max_age=HOUR, time_limit=5)


def delayed(stage: Stage) -> None:
    """Send one message to the delay queue, and one without a delay."""
    stage.actor("say").send_with_options(args=("a",), delay=HOUR)
    stage.actor("say").send("b")


def retrying(stage: Stage) -> None:
    """Leave a message that failed once and waits for its next try, with traceback, retries and time."""
    stage.actor("fail").send_with_options(
        args=("a",), max_retries=3, min_backoff=HOUR, max_backoff=HOUR
    )
    with stage.worker():
        eventually(lambda: not stage.client.exists("dramatiq:default.msgs"))
    assert stage.client.hlen("dramatiq:default.DQ.msgs") == 1


def chained(stage: Stage) -> None:
    """Send a pipeline that is at its first step."""
    (stage.message("echo", "a") | stage.message("echo") | stage.message("echo")).run()


def in_the_middle(stage: Stage) -> None:
    """Leave a pipeline whose first step has run."""
    first, second = stage.message("echo", "a"), stage.message("echo")
    second = second.copy(options={"delay": HOUR})
    stage.pipeline([first, second]).run()
    with stage.worker():
        eventually(lambda: not stage.client.exists("dramatiq:default.msgs"))


def grouped(stage: Stage) -> None:
    """Send a group with a completion callback."""
    several = stage.group([stage.message("say", word) for word in range(4)])
    several.add_completion_callback(stage.message("say", "all"))
    several.run()


def half_a_group(stage: Stage) -> None:
    """Leave a group of which one member has completed, and the others will run later."""
    first, *others = (stage.message("say", word) for word in range(3))
    several = stage.group([first, *others])
    several.add_completion_callback(stage.message("say", "all"))
    several.run()
    rids = stage.client.lrange("dramatiq:default", 1, -1)
    for rid in rids:
        stage.client.lrem("dramatiq:default", 0, rid)
    with stage.worker():
        eventually(lambda: stage.said() == ["0"] and not stage.client.exists("dramatiq:default"))
        eventually(lambda: stage.client.hlen("dramatiq:default.msgs") == 2)
    stage.client.rpush("dramatiq:default", *rids)


SENT: list[Callable[[Stage], None]] = [
    plain,
    with_options,
    delayed,
    retrying,
    chained,
    in_the_middle,
    grouped,
    half_a_group,
]
_OURS = ("jobguard:", "dramatiq:__")


def jobs(stage: Stage) -> dict[str, Any]:
    """Return all keys except those of workers."""
    everything = keyspace(stage.client)
    return {key: value for key, value in everything.items() if not key.startswith(_OURS)}


def rejoin(leader: Leader, database: str, source: Source) -> None:
    """Restore the barriers, as a leader does before any member."""
    store = PostgresLeaderStore(lambda: database, "default", new_token(), Settings())
    joins = store.open_joins(source.id, after="", limit=100)
    leader.broker.rejoin(joins, finish=False, deadline=2e10)


@pytest.mark.parametrize("sent", SENT, ids=lambda sent: sent.__name__)
def test_what_is_restored_is_identical(
    stage: Stage,
    guard: JobGuard,
    records: Records,
    leader: Leader,
    source: Source,
    database: str,
    sent: Callable[[Stage], None],
) -> None:
    """The restored keys and their times to live are the same as before."""
    sent(stage)
    with psycopg.connect(database) as connection:  # ends are written a moment later
        eventually(lambda: connection.execute("select from jobguard.running").rowcount == 0)
    before = jobs(stage)
    lives = {key: stage.client.ttl(key) for key in before}
    assert before
    stage.client.flushdb()

    rejoin(leader, database, source)
    owed = records.owed()
    assert leader.restore(*owed) == [Restored.RESTORED] * len(owed)
    assert jobs(stage) == before
    assert {key: stage.client.ttl(key) for key in before} == pytest.approx(lives, abs=2)
