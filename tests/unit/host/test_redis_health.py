from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

import pytest
import redis

from jobguard.host.redis_health import RedisHealth
from tests.fakes.world import Clock
from tests.support import eventually


class Pinged:
    """A Redis that can only be asked whether it is there."""

    def __init__(self) -> None:
        self.pings = 0
        self.error: Exception | None = None
        self.meanwhile: Callable[[], object] = lambda: None

    def ping(self) -> bool:
        """Answer, or fail as told."""
        self.pings += 1
        self.meanwhile()
        if self.error is not None:
            raise self.error
        return True


class Stage:
    """A doubt, its Redis and its clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.redis = Pinged()
        self.made = 0
        self.doubt = RedisHealth(self._client, self.clock, lambda work: work())

    def _client(self) -> redis.Redis:
        self.made += 1
        return cast(redis.Redis, self.redis)


def test_an_answer_is_proof_for_a_moment() -> None:
    """A Redis that answered a tenth of a second ago is not asked again; later it is."""
    stage = Stage()
    assert not stage.doubt()

    stage.clock.advance(0.05)
    assert not stage.doubt()
    assert stage.redis.pings == 1

    stage.clock.advance(0.06)
    assert not stage.doubt()
    assert stage.redis.pings == 2
    assert stage.made == 1


@pytest.mark.parametrize("error", [redis.ConnectionError(), redis.TimeoutError()])
def test_no_answer_is_doubt(error: Exception) -> None:
    """A Redis that cannot be reached is in doubt."""
    stage = Stage()
    stage.redis.error = error

    assert stage.doubt()


@pytest.mark.parametrize(
    "error",
    [redis.ResponseError("LOADING"), redis.exceptions.NoPermissionError(), redis.ReadOnlyError()],
)
def test_a_refusal_is_an_answer(error: Exception) -> None:
    """A Redis that refuses us does answer: it is the host's to deal with."""
    stage = Stage()
    stage.redis.error = error

    assert not stage.doubt()


def test_in_doubt_nobody_asks() -> None:
    """While in doubt, calls are answered without a word to Redis."""
    stage = Stage()
    stage.redis.error = redis.TimeoutError()
    stage.doubt()

    for _ in range(100):
        stage.clock.advance(0.004)
        assert stage.doubt()

    assert stage.redis.pings == 1


def test_in_doubt_one_asks_again_now_and_then() -> None:
    """Every half second one caller asks again; an answer ends the doubt."""
    stage = Stage()
    stage.redis.error = redis.TimeoutError()
    stage.doubt()

    stage.clock.advance(0.5)
    assert stage.doubt()
    assert stage.redis.pings == 2

    stage.redis.error = None
    assert stage.doubt()
    stage.clock.advance(0.5)
    assert not stage.doubt()
    assert stage.redis.pings == 3


def test_no_caller_waits_a_second_time() -> None:
    """In doubt, Redis is asked again by a thread: a caller has its answer before that has one."""
    stage = Stage()
    doubt = RedisHealth(stage._client, stage.clock)
    doubt.failed()
    stage.clock.advance(0.5)
    go_on = threading.Event()
    stage.redis.meanwhile = lambda: go_on.wait(10)
    try:
        for _ in range(20):
            stage.clock.advance(0.5)
            assert doubt()
        assert stage.redis.pings <= 1
    finally:
        go_on.set()
    eventually(lambda: not doubt())


def test_the_hosts_failure_is_doubt_at_once() -> None:
    """A Redis that failed the host a moment after it answered us is in doubt, and not asked."""
    stage = Stage()
    assert not stage.doubt()

    stage.doubt.failed()

    assert stage.doubt()
    assert stage.redis.pings == 1


def test_while_one_asks_in_doubt_the_others_do_not_wait() -> None:
    """In doubt, a question under way keeps nobody else."""
    stage = Stage()
    stage.doubt.failed()
    stage.clock.advance(0.5)
    asking, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        asking.set()
        go_on.wait(10)

    stage.redis.meanwhile = slowly
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(stage.doubt()))
    thread.start()
    try:
        assert asking.wait(10)
        assert stage.doubt()
        assert stage.redis.pings == 1
    finally:
        go_on.set()
        thread.join(10)
    assert answers == [False]


def two_ask_at_once(stage: Stage, error: Exception | None) -> list[bool]:
    """Let a second thread come while the first one's question is under way."""
    asking, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        asking.set()
        go_on.wait(10)
        stage.redis.error = error

    stage.redis.meanwhile = slowly
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(stage.doubt())) for _ in range(2)]
    threads[0].start()
    assert asking.wait(10)
    lock = Waited(stage.doubt._asking)
    stage.doubt._asking = cast(threading.Lock, lock)
    threads[1].start()
    eventually(lambda: lock.waiting)
    go_on.set()
    for thread in threads:
        thread.join(10)
    return answers


class Waited:
    """A lock that tells when somebody comes to it."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self.waiting = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock."""
        self.waiting = True
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        """Let go of the lock."""
        self._lock.release()


def test_an_answer_serves_all_who_waited_for_it() -> None:
    """Two who come at once ask once."""
    stage = Stage()

    assert two_ask_at_once(stage, None) == [False, False]
    assert stage.redis.pings == 1


def test_a_silence_serves_all_who_waited_for_it() -> None:
    """Two who come at once to a Redis that does not answer wait for one timeout between them."""
    stage = Stage()

    assert two_ask_at_once(stage, redis.TimeoutError()) == [True, True]
    assert stage.redis.pings == 1


def test_a_child_asks_on_a_client_of_its_own() -> None:
    """After a fork the parent's client is left alone, and what is known is kept."""
    stage = Stage()
    stage.redis.error = redis.TimeoutError()
    stage.doubt()

    stage.doubt.after_fork()

    assert stage.doubt()
    assert stage.made == 1
    stage.redis.error = None
    stage.clock.advance(0.5)
    assert not stage.doubt()
    assert stage.made == 2
