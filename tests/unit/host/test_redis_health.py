from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import cast

import pytest
import redis

from jobguard.host.redis_health import RedisHealth
from jobguard.locks import Turn
from tests.fakes.world import Clock
from tests.support import eventually


class Pinged:
    """A Redis that only answers a ping."""

    def __init__(self) -> None:
        self.pings = 0
        self.error: Exception | None = None
        self.meanwhile: Callable[[], object] = lambda: None

    def ping(self) -> bool:
        """Answer, or raise the prepared error."""
        self.pings += 1
        self.meanwhile()
        if self.error is not None:
            raise self.error
        return True


class Stage:
    """A health check, its Redis and its clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.redis = Pinged()
        self.made = 0
        self.health = RedisHealth(self._client, self.clock, lambda work: work())

    def _client(self) -> redis.Redis:
        self.made += 1
        return cast(redis.Redis, self.redis)


def test_an_answer_is_proof_for_a_moment() -> None:
    """A Redis that answered a tenth of a second ago is not asked again, but later it is."""
    stage = Stage()
    assert not stage.health()

    stage.clock.advance(0.05)
    assert not stage.health()
    assert stage.redis.pings == 1

    stage.clock.advance(0.06)
    assert not stage.health()
    assert stage.redis.pings == 2
    assert stage.made == 1


@pytest.mark.parametrize("error", [redis.ConnectionError(), redis.TimeoutError()])
def test_no_answer_means_away(error: Exception) -> None:
    """A Redis that cannot be reached is away."""
    stage = Stage()
    stage.redis.error = error

    assert stage.health()


@pytest.mark.parametrize(
    "error",
    [redis.ResponseError("LOADING"), redis.exceptions.NoPermissionError(), redis.ReadOnlyError()],
)
def test_a_refusal_is_an_answer(error: Exception) -> None:
    """A Redis that refuses access does answer, so it is not away."""
    stage = Stage()
    stage.redis.error = error

    assert not stage.health()


def test_while_away_no_caller_asks() -> None:
    """While Redis is away, calls return without a request to it."""
    stage = Stage()
    stage.redis.error = redis.TimeoutError()
    stage.health()

    for _ in range(100):
        stage.clock.advance(0.004)
        assert stage.health()

    assert stage.redis.pings == 1


def test_while_away_one_asks_again_now_and_then() -> None:
    """Every half second one caller asks again, and an answer ends the outage."""
    stage = Stage()
    stage.redis.error = redis.TimeoutError()
    stage.health()

    stage.clock.advance(0.5)
    assert stage.health()
    assert stage.redis.pings == 2

    stage.redis.error = None
    assert stage.health()
    stage.clock.advance(0.5)
    assert not stage.health()
    assert stage.redis.pings == 3


def test_no_caller_waits_a_second_time() -> None:
    """While Redis is away, a thread asks it again, and the caller returns before the answer."""
    stage = Stage()
    health = RedisHealth(stage._client, stage.clock)
    health.failed()
    stage.clock.advance(0.5)
    go_on = threading.Event()
    stage.redis.meanwhile = lambda: go_on.wait(10)
    try:
        for _ in range(20):
            stage.clock.advance(0.5)
            assert health()
        assert stage.redis.pings <= 1
    finally:
        go_on.set()
    eventually(lambda: not health())


def test_the_hosts_failure_means_away_at_once() -> None:
    """A Redis that failed the host just after an answer is away, and is not asked."""
    stage = Stage()
    assert not stage.health()

    stage.health.failed()

    assert stage.health()
    assert stage.redis.pings == 1


def test_while_one_asks_again_the_others_do_not_wait() -> None:
    """While Redis is away, a request under way delays no other caller."""
    stage = Stage()
    stage.health.failed()
    stage.clock.advance(0.5)
    asking, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        asking.set()
        go_on.wait(10)

    stage.redis.meanwhile = slowly
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(stage.health()))
    thread.start()
    try:
        assert asking.wait(10)
        assert stage.health()
        assert stage.redis.pings == 1
    finally:
        go_on.set()
        thread.join(10)
    assert answers == [False]


def two_ask_at_once(stage: Stage, error: Exception | None) -> list[bool]:
    """Let a second thread call while the first thread's request is under way."""
    asking, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        asking.set()
        go_on.wait(10)
        stage.redis.error = error

    stage.redis.meanwhile = slowly
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(stage.health())) for _ in range(2)]
    threads[0].start()
    assert asking.wait(10)
    lock = Waited(stage.health._asking)
    stage.health._asking = cast(Turn, lock)
    threads[1].start()
    eventually(lambda: lock.waiting)
    go_on.set()
    for thread in threads:
        thread.join(10)
    return answers


class Waited:
    """A lock that signals when a thread waits for it."""

    def __init__(self, lock: Turn) -> None:
        self._lock = lock
        self.waiting = False

    def take(self, timeout: float) -> bool:
        """Take the lock."""
        self.waiting = True
        return self._lock.take(timeout)

    def free(self) -> None:
        """Release the lock."""
        self._lock.free()


def test_an_answer_serves_all_who_waited_for_it() -> None:
    """Two callers at the same time send one request."""
    stage = Stage()

    assert two_ask_at_once(stage, None) == [False, False]
    assert stage.redis.pings == 1


def test_a_silence_serves_all_who_waited_for_it() -> None:
    """Two callers of a Redis that does not answer wait for one timeout together."""
    stage = Stage()

    assert two_ask_at_once(stage, redis.TimeoutError()) == [True, True]
    assert stage.redis.pings == 1


def test_a_child_asks_on_a_client_of_its_own() -> None:
    """After a fork the child uses its own client, and keeps the known state."""
    stage = Stage()
    stage.redis.error = redis.TimeoutError()
    stage.health()

    stage.health.after_fork()

    assert stage.health()
    assert stage.made == 1
    stage.redis.error = None
    stage.clock.advance(0.5)
    assert not stage.health()
    assert stage.made == 2


def test_the_error_is_known_without_a_wait() -> None:
    """A caller that needs the error gets it without a wait, and a fresh one if it is old."""
    stage = Stage()
    assert stage.health.error() is None
    stage.redis.error = redis.TimeoutError("no answer")
    assert stage.health()
    pings = stage.redis.pings
    assert stage.health.error() is stage.redis.error
    assert stage.redis.pings == pings

    stage.clock.advance(5)
    stage.redis.error = None
    assert stage.health.error() is None
    assert not stage.health()


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import gevent, redis
from jobguard.host.redis_health import RedisHealth

thread = monkey.get_original("_thread", "get_ident")
asked = []

class Pinged:
    def ping(self):
        asked.append(thread())
        raise redis.ConnectionError("as it must")

health = RedisHealth(Pinged)
with gevent.Timeout(60):
    while len(asked) < 2:
        assert health()
        gevent.sleep(0.01)
assert set(asked) == {thread()}, asked
"""


def test_greenlets_share_a_connection_with_none_but_greenlets() -> None:
    """A connection that gevent made in another thread fails, and Redis would seem to answer."""
    pytest.importorskip("gevent")
    result = subprocess.run([sys.executable, "-c", GREENLETS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
