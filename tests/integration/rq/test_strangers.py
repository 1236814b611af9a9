"""Unguarded workers that are missing in RQ's registry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
import redis
from rq import Queue, SimpleWorker, Worker

from jobguard.adapter import Source
from jobguard.adapters.rq import ended_workers
from jobguard.adapters.rq.broker import RQBroker
from jobguard.client_names import read_mark
from jobguard.clients import take_connection
from tests.fakes.adapters import FakeSession, FakeTracker
from tests.integration.rq import tasks
from tests.support import eventually

BARE = """
import sys, redis, rq
client = redis.Redis.from_url(sys.argv[1])
rq.Worker([rq.Queue(name, connection=client) for name in sys.argv[3:]], connection=client,
          name=sys.argv[2]).work()
"""


@contextmanager
def worker(url: str, name: str, *queues: str) -> Iterator[None]:
    """Start an unguarded worker in a separate process."""
    process = subprocess.Popen([sys.executable, "-c", BARE, url, name, *queues])
    try:
        with redis.Redis.from_url(url) as client:
            channel = f"rq:pubsub:{name}"
            before = subscribers(client, channel)
            eventually(lambda: subscribers(client, channel) > before, 20)
            yield
    finally:
        process.kill()
        process.wait(10)


def subscribers(client: redis.Redis, channel: str) -> int:
    """Return the number of subscribers of a channel."""
    found = dict(client.pubsub_numsub(channel))
    return int(found.get(channel.encode(), 0))


@pytest.fixture
def guarded(
    queue: Queue, tracker: FakeTracker, redis_url: str
) -> Iterator[Callable[[str], object]]:
    """Make this process look like a guarded worker to Redis."""
    made: list[tuple[Any, redis.Redis]] = []

    def begin(name: str) -> object:
        client = redis.Redis.from_url(redis_url)
        one: Any = Worker([queue.name], connection=client, name=name)
        one.register_birth()
        one.subscribe()
        made.append((one, client))
        return one

    yield begin
    for one, client in made:
        one.unsubscribe()
        client.close()


def strangers(broker: RQBroker, queue: str = "default") -> set[str]:
    """Return the consumers of the queue."""
    return set(broker.consumers()[queue])


def test_a_stranger_that_survives_a_flush(
    broker: RQBroker,
    client: Any,
    redis_url: str,
    guarded: Callable[[str], object],
) -> None:
    """An unguarded worker is found after a flush: its registration is lost, but it is still connected."""
    guarded("ours")
    client.sadd("rq:queues", "rq:queue:default")
    assert strangers(broker) == {"ours"}
    with worker(redis_url, "bare", "default"):
        eventually(lambda: strangers(broker) == {"ours", "bare"})  # when the one before is gone
        client.flushdb()
        eventually(lambda: any("subscribe" in name for name in strangers(broker)))
        eventually(lambda: any("bl" in name for name in strangers(broker)))
    client.flushdb()
    eventually(lambda: strangers(broker) == set())


@pytest.mark.parametrize("single", [True, False], ids=["the client keeps one", "in use"])
def test_connections_that_were_open_before_the_worker(
    queue: Queue, tracker: FakeTracker, redis_url: str, single: bool
) -> None:
    """A guarded worker is known as guarded on a connection that was open before its birth."""
    with redis.Redis.from_url(redis_url, single_connection_client=single) as client:
        pool: Any = client.connection_pool
        in_use = None if single else take_connection(pool, "PING")
        if in_use is not None and not hasattr(in_use, "mark_for_reconnect"):
            pytest.skip("this redis-py closes no connection that another thread uses")
        client.ping()
        ours: Any = Worker([queue.name], connection=client, name="ours")
        ours.register_birth()
        if in_use is not None:
            pool.release(in_use)  # the next command takes it
        name = client.client_getname()
        mark = read_mark(name if isinstance(name, str) else str(name, "ascii"))
        assert mark is not None and mark.name == "ours"


def test_workers_of_one_process_share_a_session(
    queue: Queue, tracker: FakeTracker, broker: RQBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SimpleWorkers in threads are one worker of the ledger, until the last of them has ended."""
    shared = FakeSession(tracker, "one", [queue.name])
    monkeypatch.setattr(tracker, "open_session", lambda **_: shared)
    one: Any = Worker([queue.name], connection=queue.connection, name="one")
    two: Any = Worker([queue.name], connection=queue.connection, name="two")
    one.register_birth()
    two.register_birth()
    queue.connection.sadd("rq:queues", queue.key)
    assert broker.consumers().sessions == dict.fromkeys(("one", "two"), shared.id.hex)
    closes: list[bool] = []  # The session itself counts them.
    monkeypatch.setattr(shared, "close", lambda **_: closes.append(True))
    one.register_death()
    one.register_death()
    two.register_death()
    assert len(closes) == 2


def test_a_worker_that_was_declared_dead_names_its_new_session(
    queue: Queue, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session continues under another id, by which the ledger knows it from then on."""

    class Renewed(FakeSession):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            answer = super().start(*args, **kwargs)
            self.id = uuid4()
            return answer

    session = Renewed(tracker, "ours", [queue.name])
    first = session.id
    monkeypatch.setattr(tracker, "open_session", lambda **_: session)
    for _ in range(2):
        queue.enqueue(tasks.add, 1)
    SimpleWorker([queue], connection=queue.connection, name="ours").work(burst=True)
    named = queue.connection.hget("rq:worker:ours", "jg")
    assert named and named != first.hex.encode()


def ended(broker: RQBroker) -> set[str]:
    """Return the names of the unguarded workers that are shown as ended."""
    return {name.split()[0] for name in strangers(broker) if "(ended " in name}


def test_a_stranger_that_came_and_went(
    broker: RQBroker,
    client: Any,
    tracker: FakeTracker,
    redis_url: str,
) -> None:
    """An unguarded burst worker is found by what RQ keeps of it for a minute; a guarded one is not.

    It is found by some inspections: a queue must not be untrusted for as long as RQ keeps its hash.
    """
    Worker(["default"], connection=redis.Redis.from_url(redis_url), name="ours").work(burst=True)
    assert client.hget("rq:worker:ours", "death")
    assert len(tracker.sessions) == 1
    assert strangers(broker) == set()
    burst = BARE.replace("work()", "work(burst=True)")
    subprocess.run([sys.executable, "-c", burst, redis_url, "bare", "default", "low"], check=True)
    assert ended(broker) == {"bare"}
    found = broker.consumers()
    assert [name.split()[0] for name in found["low"]] == ["bare"]
    assert not found.get("other")
    assert ended(broker) == {"bare"}, "a second inspection in a row must see it too"
    assert client.exists("rq:worker:bare") and ended(broker) == set()
    leads_now = RQBroker(tracker.source, client)
    assert ended(leads_now) == set(), "this process has seen it while it stood by"


def test_a_stranger_that_came_and_went_in_a_large_redis(
    broker: RQBroker, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several inspections share the walk over many keys."""
    monkeypatch.setattr(ended_workers, "_COUNT", 10)
    client.mset({f"other:{n}": 1 for n in range(1000)})
    client.hset("rq:worker:bare", mapping={"death": "now", "queues": "default"})
    client.zadd("rq:worker:bare:executions", {"x": 1})  # a key of another type
    eventually(lambda: ended(broker) == {"bare"})


def test_a_user_that_may_not_scan(broker: RQBroker, client: Any, redis_url: str) -> None:
    """A user without the right to SCAN still gets the other consumers."""
    client.execute_command("ACL", "SETUSER", "noscan", "on", ">pw", "~*", "&*", "+@all", "-scan")
    try:
        client.hset("rq:worker:bare", mapping={"death": "now", "queues": "default"})
        narrow = redis.Redis.from_url(redis_url, username="noscan", password="pw")
        found = RQBroker(Source("n", "rq", "a", "rq"), narrow).consumers()
        assert found["default"] == frozenset() and found.uncounted == ""
        narrow.close()
    finally:
        client.execute_command("ACL", "DELUSER", "noscan")


def test_two_workers_of_one_name(
    broker: RQBroker,
    client: Any,
    redis_url: str,
    guarded: Callable[[str], object],
) -> None:
    """Two workers with one name are both found, although the registry has one entry."""
    client.sadd("rq:queues", "rq:queue:default")
    with worker(redis_url, "same", "default"):
        client.hset("rq:worker:same", "death", "-")  # else RQ refuses a second one
        guarded("same")
        eventually(lambda: any("subscribe" in name for name in strangers(broker)))


def test_a_registered_worker_of_another_queue_is_no_stranger_here(
    broker: RQBroker,
    client: Any,
    redis_url: str,
    guarded: Callable[[str], object],
) -> None:
    """A registered worker of another queue is not a consumer of this queue."""
    guarded("ours")
    client.sadd("rq:queues", "rq:queue:default", "rq:queue:other")
    with worker(redis_url, "bare", "other"):
        eventually(lambda: "bare" in strangers(broker, "other"))
        eventually(lambda: strangers(broker) == {"ours"})


def test_a_client_that_only_reads_or_subscribes_is_no_consumer(
    broker: RQBroker,
    client: Any,
    redis_url: str,
    guarded: Callable[[str], object],
) -> None:
    """A dashboard, a subscriber of the user, and workers of another database are no consumers."""
    guarded("ours")
    client.sadd("rq:queues", "rq:queue:default")
    other = redis_url.rpartition("/")
    elsewhere = f"{other[0]}/{(int(other[2]) + 1) % 16}"
    with client.pubsub() as own, worker(elsewhere, "elsewhere", "default"):
        own.psubscribe("news*")
        eventually(lambda: strangers(broker) == {"ours"})


def test_clients_that_may_not_be_listed(
    broker: RQBroker, client: Any, tracker: FakeTracker, redis_url: str
) -> None:
    """If Redis does not list its clients, the refusal is reported and the registry is used."""
    client.execute_command(
        "ACL", "SETUSER", "narrow", "on", ">pw", "~*", "&*", "+@all", "-client", "-pubsub"
    )
    try:
        kwargs = client.connection_pool.connection_kwargs
        narrow = redis.Redis(
            host=kwargs["host"],
            port=kwargs["port"],
            db=kwargs["db"],
            username="narrow",
            password="pw",
        )
        with narrow:
            found = RQBroker(tracker.source, narrow).consumers()
        assert "client" in found.uncounted
        assert broker.consumers().uncounted == ""
    finally:
        client.execute_command("ACL", "DELUSER", "narrow")
