from __future__ import annotations

import subprocess
import sys
from typing import Any

import fakeredis
import pytest
import redis
from dramatiq import group
from dramatiq.broker import Broker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import GroupCallbacks, Middleware, default_middleware
from dramatiq.rate_limits.backends import RedisBackend, StubBackend
from redis.sentinel import Sentinel

from jobguard.adapter import Source
from jobguard.adapters.dramatiq import DramatiqAdapter, patches
from jobguard.errors import UnsupportedTarget
from tests.fakes.adapters import FakeTracker

Make: Any = RedisBroker


def a_broker(**options: Any) -> RedisBroker:
    """Return a broker that is never connected."""
    middleware = [each() for each in default_middleware]
    made: RedisBroker = Make(middleware=middleware, **{"port": 6390, **options})
    return made


def guarded(target: object) -> Any:
    """Return what guarding it means."""
    return DramatiqAdapter().sources(target, namespace="n", name=None)


class TestSources:
    """What may be guarded."""

    @pytest.mark.parametrize(
        ("options", "address"),
        [
            ({"host": "LOCALHOST", "port": 6390, "db": 3}, "localhost:6390/3"),
            ({"url": "redis://user:secret@redis.example:6391/2"}, "redis.example:6391/2"),
            ({"client": redis.Redis(port=6392)}, "localhost:6392/0"),
            (
                {"client": Sentinel([("127.0.0.1", 1)]).master_for("main", db=4)},  # type: ignore[no-untyped-call]
                "sentinel:main/4",
            ),
        ],
        ids=["host and port", "url", "client", "sentinel"],
    )
    def test_a_redis_broker_with_all_its_queues(
        self, options: dict[str, Any], address: str
    ) -> None:
        """However it was told where its Redis is; never with a password."""
        found = guarded(a_broker(**options))
        assert found.source.address == address
        assert (found.source.library, found.source.one_body) == ("dramatiq", False)
        assert found.queues is None
        assert found.client is not None

    def test_a_namespace_is_told_apart(self) -> None:
        """The usual one has no name, and none at all is another."""
        prefixes = [guarded(a_broker(namespace=n)).source.prefix for n in ("dramatiq", "other", "")]
        assert prefixes == ["", "other", "="]

    def test_rabbitmq_is_refused_with_the_next_step(self) -> None:
        """Or any other broker that is none of Redis."""

        class RabbitmqBroker(Broker):
            pass

        with pytest.raises(UnsupportedTarget, match=r"RabbitmqBroker .* RedisBroker"):
            guarded(RabbitmqBroker())

    def test_what_dramatiq_could_not_read_itself_is_refused(self) -> None:
        """And what is no single Redis."""
        client: Any = redis.Redis(decode_responses=True)
        with pytest.raises(UnsupportedTarget, match="decode_responses"):
            guarded(a_broker(client=client))

    def test_test_doubles_are_inert(self) -> None:
        """So that users' tests run."""
        fake: Any = fakeredis.FakeRedis()
        assert guarded(StubBroker()).inert
        assert guarded(a_broker(client=fake)).inert

    def test_other_things_are_not_ours(self) -> None:
        """Another adapter may know them."""
        assert guarded(object()) is None
        assert guarded(redis.Redis()) is None


@pytest.fixture
def tracker(tmp_path: Any) -> FakeTracker:
    """Give a tracker in memory."""
    return FakeTracker(Source("n", "dramatiq", "localhost:6390/0"), tmp_path / "calls")


def hooked(broker: RedisBroker) -> tuple[dict[str, Any], list[Any], Any, list[dict[str, Any]]]:
    """Return whatever of it may be hooked."""
    own = {name: value for name, value in broker.__dict__.items() if name != "middleware"}
    return (
        own,
        list(broker.middleware),
        group.__dict__["run"],
        [dict(each.__dict__) for each in broker.middleware],
    )


class TestHooks:
    """They go on, and off again."""

    def test_installing_and_removing_are_mirror_images(self, tracker: Any) -> None:
        """On two brokers of one source, and the same again changes nothing."""
        brokers = [a_broker(), a_broker()]
        barriers: Any = RedisBackend
        brokers[0].add_middleware(GroupCallbacks(barriers(client=redis.Redis(port=6390))))
        before = [hooked(broker) for broker in brokers]
        for broker in brokers:
            patches.install(tracker, broker)
        first = hooked(brokers[0])
        patches.install(tracker, brokers[0])
        assert hooked(brokers[0]) == first != before[0]
        guard = patches.guard_of(brokers[0])
        assert guard is not None
        guard.joins.adopt()
        patches.uninstall(tracker)
        assert [hooked(broker) for broker in brokers] == before

    def test_a_class_that_is_hooked_later_is_called_all_the_same(
        self, tracker: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By somebody who measures, say."""
        broker = a_broker()
        patches.install(tracker, broker)
        seen: list[str] = []
        monkeypatch.setattr(RedisBroker, "flush", lambda self, name: seen.append(name))
        broker.flush("mail")
        patches.uninstall(tracker)
        assert seen == ["mail"]

    def test_what_others_put_over_ours_stays(self, tracker: Any) -> None:
        """It calls ours, which passes everything on."""
        broker: Any = a_broker()
        patches.install(tracker, broker)
        theirs = broker.enqueue = lambda message, *, delay=None: message
        patches.uninstall(tracker)
        assert broker.__dict__["enqueue"] is theirs

    def test_a_dramatiq_that_is_not_known_is_left_alone(self, tracker: Any) -> None:
        """All or nothing."""

        class Strange(RedisBroker):
            def enqueue(self, envelope: Any) -> Any:  # type: ignore[override]
                return None

        strange: Any = Strange
        broker = strange(port=6390)
        before = hooked(broker)
        with pytest.raises(UnsupportedTarget, match=r"enqueue\(message, \.\.\.\)"):
            patches.install(tracker, broker)
        assert hooked(broker) == before

    def test_ours_stands_last_when_a_worker_begins(self, tracker: Any) -> None:
        """Also behind what was added since; every other middleware hears of the beginning."""
        heard: list[str] = []

        class Other(Middleware):
            def before_worker_boot(self, broker: Any, worker: Any) -> None:
                heard.append("other")

        broker: Any = a_broker()
        patches.install(tracker, broker)
        broker.add_middleware(Other())
        worker: Any = type("Worker", (), {"consumer_whitelist": {"mail"}, "consumers": {}})()
        broker.emit_before("worker_boot", worker)
        guard = patches.guard_of(broker)
        assert guard is not None
        assert broker.middleware[-1] is guard._middleware
        assert heard == ["other"]
        patches.uninstall(tracker)

    def test_a_barrier_elsewhere_is_counted_as_ever(self, tracker: Any) -> None:
        """Only the ledger hears of it."""
        broker = a_broker()
        barriers: Any = StubBackend
        middleware = GroupCallbacks(barriers())
        broker.add_middleware(middleware)
        patches.install(tracker, broker)
        guard = patches.guard_of(broker)
        assert guard is not None
        guard.joins.adopt()
        backend: Any = middleware.rate_limiter_backend
        assert backend.add("g", 2, 1000)
        assert [backend.decr("g", 1, 1, 1000) for _ in range(2)] == [True, False]
        patches.uninstall(tracker)


def test_the_reconcilers_half_imports_no_dramatiq() -> None:
    """It runs where there is none."""
    program = (
        "import sys, jobguard.adapters.dramatiq.broker, jobguard.adapters.dramatiq\n"
        "assert 'dramatiq' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
