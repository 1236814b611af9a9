"""Unguarded workers that Celery's own names do not show, and times without a leader's inspection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
from kombu.entity import Exchange, Queue

from tests.integration.celery.rig import PROGRAM, Rig, a_rig

WORDS = [f"w{n}" for n in range(8)]
ASKS = """
import sys, time, celery
app = celery.Celery(broker=sys.argv[1])
while True:
    for _ in range(3):
        app.control.ping(timeout=1.0)
    time.sleep(9)
"""
"""A program without a guard that asks the workers again and again, as exporters of metrics do."""
ASKS_ALWAYS = """
import sys, celery, jobguard
app = celery.Celery(broker=sys.argv[1])
jobguard.guard(app)
while True:
    app.control.ping(timeout=1.0)
"""
"""A guarded program that asks without a rest, and sends no task."""
UNSEEN = {"task_ignore_result": True}
"""Settings of an unguarded worker: with a stored result a leader would see what the worker ran."""


@pytest.fixture
def rig(tmp_path: Path, database: str, redis_url: str) -> Iterator[Rig]:
    """Give real workers with a leader, and a guarded application."""
    with a_rig(tmp_path, database, redis_url) as rig:
        yield rig


def trusted(rig: Rig) -> None:
    """Make the queue trusted: a guarded worker has run a task of it."""
    job_id = rig.send("ok", "first")
    rig.until(lambda: rig.ended(job_id) == ["completed"])
    rig.until(rig.trusted)


def unguarded_consumers(rig: Rig) -> list[str]:
    """Return the unguarded consumers of the queue, as the ledger names them."""
    rows = rig.ask("select unguarded from jobguard.queues where queue = 'celery'")
    return [name for (names,) in rows for name in names]


def suspected(rig: Rig) -> int:
    """Return how many owed deliveries the leader has seen absent."""
    ((count,),) = rig.ask("select count(*) from jobguard.suspects")
    return int(count)


@pytest.mark.parametrize(
    "hidden",
    [
        {"conf": {"worker_enable_remote_control": False}},
        {"conf": {"control_exchange": "another"}},
        {"options": ["--hostname", "w1@%h"], "conf": {"worker_enable_remote_control": False}},
        {"conf": {"worker_enable_remote_control": False, "worker_prefetch_multiplier": 1}},
    ],
    ids=["no remote control", "another exchange", "of the same name", "one by one"],
)
def test_an_unguarded_worker_that_no_name_shows(rig: Rig, hidden: dict[str, Any]) -> None:
    """An unguarded worker is counted by its connection: no trust in its queue, and no second run."""
    rig.reconciler()
    guarded = rig.worker(concurrency=1)
    trusted(rig)
    assert unguarded_consumers(rig) == []
    guarded.stop()
    rig.worker("solo", *hidden.get("options", ()), guarded=False, conf={**UNSEEN, **hidden["conf"]})
    rig.until(lambda: unguarded_consumers(rig))
    assert any("brpop" in name for name in unguarded_consumers(rig)), unguarded_consumers(rig)
    assert not rig.trusted()
    for word in WORDS:
        rig.send("ok", word, ignore_result=True)
    rig.until(lambda: rig.written().keys() >= set(WORDS))
    rig.until(lambda: suspected(rig) == rig.owed() == len(WORDS))
    rig.worker(concurrency=1)
    job_id = rig.send("ok", "last")
    rig.until(lambda: rig.written()["last"])
    assert set(rig.written().values()) == {1}, job_id


def test_an_unguarded_worker_that_survives_a_flush(rig: Rig) -> None:
    """After a flush Redis has lost the name of an unguarded worker, but not its connection."""
    rig.reconciler()
    rig.worker(concurrency=1)
    trusted(rig)
    rig.worker("solo", guarded=False, conf=UNSEEN)
    rig.until(lambda: unguarded_consumers(rig))
    rig.redis.flushdb()
    rig.until(lambda: rig.ask("select 1 from jobguard.incidents"))  # the leader has seen the loss
    for word in WORDS:
        rig.send("ok", word, ignore_result=True)
    rig.until(lambda: rig.written().keys() >= set(WORDS))
    rig.until(lambda: suspected(rig) == rig.owed())
    assert set(rig.written().values()) == {1}
    assert not rig.trusted()


def test_guarded_workers_and_programs_that_only_ask_are_recognised(rig: Rig) -> None:
    """Busy and idle guarded workers, a flush, and programs that wait for replies count as guarded."""
    rig.reconciler()
    rig._start("asks", "-c", ASKS, rig.redis_url)
    rig._start("asks_always", "-c", ASKS_ALWAYS, rig.redis_url)
    rig.worker(concurrency=1)
    rig.worker("threads", concurrency=2, conf={"worker_enable_remote_control": False})
    trusted(rig)
    rig.redis.flushdb()
    assert rig.app.control.ping(timeout=3.0) is not None
    watched = "select max(opened_at) from jobguard.incidents where closed_at is not null"
    rig.until(lambda: rig.ask(watched)[0][0] is not None)
    for word in WORDS:
        rig.send("ok", word, ignore_result=True)
    rig.until(lambda: not rig.owed())
    assert unguarded_consumers(rig) == []
    assert rig.ask("select unguarded_at from jobguard.queues where unguarded_at is not null") == []


def test_a_rollback(rig: Rig) -> None:
    """Guarded workers stop, unguarded ones work, guarded ones come back: nothing runs twice."""
    reconciler = rig.reconciler()
    guarded = rig.worker(concurrency=1)
    trusted(rig)
    guarded.stop()
    for word in WORDS:
        rig.send("ok", word, ignore_result=True)
    reconciler.close()
    bare = rig.worker("solo", guarded=False, conf=UNSEEN)
    rig.until(lambda: rig.written().keys() >= set(WORDS))
    bare.stop()
    rig.reconciler()
    rig.worker(concurrency=1)
    untrusted = "select count(*) from jobguard.suspects where cause = 'untrusted'"
    rig.until(lambda: rig.ask(untrusted) == [(len(WORDS),)])
    rig.until(rig.trusted)
    job_id = rig.send("ok", "last")
    rig.until(lambda: rig.ended(job_id) == ["completed"])
    assert set(rig.written().values()) == {1}
    ((token,),) = rig.ask("select token from jobguard.suspects order by token limit 1")
    rig.guard.requeue(token)
    rig.until(lambda: rig.written()[WORDS[0]] == 2)
    rig.until(lambda: rig.owed() == len(WORDS) - 1)


def test_what_an_unguarded_worker_stored_is_closed(rig: Rig) -> None:
    """In a rolling restart, tasks that an unguarded worker ran are closed by their stored results."""
    rig.reconciler()
    guarded = rig.worker(concurrency=1)
    trusted(rig)
    bare = rig.worker("solo", guarded=False)
    guarded.stop()
    sent = [rig.send("ok", word) for word in WORDS]
    rig.until(lambda: rig.written().keys() >= set(WORDS))
    rig.worker(concurrency=1)
    bare.stop()
    rig.until(lambda: not rig.owed())
    assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * len(WORDS)
    assert {rig.written()[word] for word in WORDS} == {1}


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_message_of_a_named_exchange_belongs_to_its_queue(rig: Rig, pool: str) -> None:
    """A message of a named exchange belongs to the queue that it came from, not to its routing key."""
    exchange = Exchange("shop", "topic")
    queues = [Queue(name, exchange, routing_key="order.#") for name in ("one", "two")]
    rig.reconciler()
    first = rig.worker(pool, "-Q", "one,two", concurrency=2)
    rig.until(lambda: rig.queues_in_beats() == [{"one", "two"}])
    bare = celery.Celery("bare", broker=rig.redis_url, set_as_current=False)
    bare.conf.task_queues = queues
    bare.send_task(
        f"{PROGRAM}.slow",
        ("word", 30.0),
        exchange=exchange,
        routing_key="order.new",
        declare=queues,
    )
    rig.until(lambda: rig.written()["word-begins"] == 2)
    rows = rig.ask("select queue from jobguard.jobs order by queue")
    assert rows == [("one",), ("two",)]
    rig.until(lambda: rig.trusted("one") and rig.trusted("two"))
    first.kill()
    rig.hurry()  # each of the two runs alone in its process
    rig.worker(pool, "-Q", "one,two", concurrency=2)
    rig.until(lambda: rig.written()["word-begins"] == 4)
