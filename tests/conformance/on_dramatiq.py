"""Dramatiq for the suite."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import dramatiq
import fakeredis
import pytest
from dramatiq import Worker, group
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.encoder import Encoder

from jobguard.adapters.dramatiq import DramatiqAdapter
from jobguard.model import Presence
from tests.conformance import tasks
from tests.conformance.library import QUEUE, Library
from tests.support import eventually

MINUTE = 60_000
_TASKS = {
    name: getattr(tasks, name) for name in ("say", "fail", "pay", "probe", "nap", "die", "hold")
}
_NO_JOBS = ("dramatiq:__heartbeats__", "dramatiq:__acks__", "jobguard:")


class _Pickles(Encoder):
    """JSON, or pickle for objects that JSON cannot encode, as an application may have it."""

    def encode(self, data: Any) -> bytes:
        try:
            return json.dumps(data, separators=(",", ":")).encode()
        except TypeError:
            return pickle.dumps(data)

    def decode(self, data: bytes) -> Any:
        return json.loads(data) if data.startswith(b"{") else pickle.loads(data)


def a_broker(**options: Any) -> RedisBroker:
    """Return a broker; the arguments of RedisBroker have no types."""
    make: Any = RedisBroker
    made: RedisBroker = make(**options)
    return made


def declare(broker: RedisBroker, queue: str = QUEUE) -> None:
    """Declare the tasks of the suite on the broker."""
    actor: Any = dramatiq.actor
    for name, task in _TASKS.items():
        actor(task, broker=broker, actor_name=name, queue_name=queue, max_retries=0)


class OnDramatiq(Library):
    """Dramatiq."""

    adapter = DramatiqAdapter()
    one_body_per_id = False
    remembers: ClassVar[Mapping[str, Presence]] = {"say": Presence.ABSENT, "fail": Presence.FAILED}

    def __init__(self, redis_url: str, ledger: Path) -> None:
        super().__init__(redis_url, ledger)
        dramatiq.set_encoder(_Pickles())
        self.broker = a_broker(url=redis_url)
        declare(self.broker)

    def target(self, queue: str | None = None) -> object:
        """Return the broker; for a single queue, another broker."""
        return self.broker if queue is None else a_broker(url=self.redis_url)

    def doubles(self) -> Mapping[str, object]:
        """Return the targets that keep nothing that could be lost."""
        fake: Any = fakeredis.FakeRedis()
        return {"fakeredis": a_broker(client=fake), "StubBroker": StubBroker()}

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Do nothing, because only a broker is hooked."""
        yield

    def hooks(self) -> object:
        """Return the broker, entry by entry, and the one hooked method of Dramatiq."""
        own = {name: value for name, value in self.broker.__dict__.items() if name != "logger"}
        return {**own, "middleware": list(self.broker.middleware)}, group.__dict__["run"]

    def send(
        self,
        task: str = "say",
        *words: object,
        queue: str = QUEUE,
        job_id: str | None = None,
        delay: float | None = None,
        retries: int = 0,
        retry_delay: float = 0.0,
        at_front: bool = False,
    ) -> str:
        """Enqueue the job."""
        if at_front:
            pytest.skip("a Dramatiq queue has no front")
        backoff = max(1, int(retry_delay * 1000))
        message = self.broker.actors[task].message_with_options(
            args=(str(self.ledger), *words),
            max_retries=retries,
            min_backoff=backoff,
            max_backoff=backoff,
        )
        message = message.copy(queue_name=queue, **({"message_id": job_id} if job_id else {}))
        self.broker.declare_queue(queue)
        wait = None if delay is None else int(delay * 1000)
        return self.broker.enqueue(message, delay=wait).message_id

    def cancel(self, job_id: str) -> None:
        """Flush the queue of the job, because Dramatiq can only delete whole queues."""
        for queue in self.broker.get_declared_queues():
            if job_id in self.waiting(queue):
                self.broker.flush(queue)

    @contextmanager
    def worker(self, *queues: str, threads: int = 1) -> Iterator[Worker]:
        """Run a worker in this process."""
        worker = Worker(self.broker, queues=set(queues), worker_timeout=20, worker_threads=threads)
        worker.start()
        try:
            yield worker
        finally:
            worker.stop()

    def send_with_read(self) -> None:
        """Send a group with a callback, whose members are counted in Redis."""
        pytest.skip("tests/integration/dramatiq sends a group with a callback")

    def task(self) -> object:
        """Return the name of the actor."""
        return "say"

    def send_with_options(self, options: Mapping[str, object]) -> None:
        """Send with the options of the message."""
        actor: Any = self.broker.actors["say"]
        self.broker.enqueue(
            actor.message_with_options(args=(str(self.ledger),), **options).copy(queue_name=QUEUE)
        )

    def work(self, queue: str = QUEUE) -> None:
        """Run a worker until no due message waits."""
        self.broker.declare_queue(queue)
        with self.worker(queue):
            eventually(lambda: not self._due(queue), 30)

    def _due(self, queue: str) -> bool:
        """Return True if a message waits or runs; one read sees a moving message in one of the places."""
        with self.client.pipeline(transaction=True) as pipe:
            pipe.exists(f"dramatiq:{queue}")
            pipe.keys(f"dramatiq:__acks__.*.{queue}")
            pipe.hvals(f"dramatiq:{queue}.DQ.msgs")
            waits, fetched, delayed = pipe.execute()
        soon = time.time() * 1000 + MINUTE
        etas = [dramatiq.Message.decode(body).options["eta"] for body in delayed]
        return bool(waits or fetched) or any(eta < soon for eta in etas)

    def move_delayed(self) -> None:
        """Do the work of a delay queue's consumer, without a worker that runs the moved messages."""
        key = f"dramatiq:{QUEUE}.DQ.msgs"
        stored: Any = self.client.hgetall(key)
        for rid, data in stored.items():
            message = dramatiq.Message.decode(data)
            message.options["eta"] = int(time.time() * 1000) - 1
            self.client.hset(key, rid, message.encode())
        worker = Worker(self.broker, queues={QUEUE}, worker_timeout=20, worker_threads=0)
        worker.delay_prefetch = 1000
        worker.start()
        try:
            eventually(lambda: not self.client.exists(key), 30)
        finally:
            worker.stop()

    def start_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a worker without the command, whose workers go on when it is killed."""
        return self._program(environ, threads=1)

    def start_crowded_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a worker with several threads."""
        return self._program(environ, threads=4)

    def _program(self, environ: Mapping[str, str], *, threads: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.dramatiq_app", str(threads)],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
        )

    def delayed_copies(self) -> int:
        """Return the number of messages that are fetched from the delay queue."""
        keys: Any = self.client.keys(f"dramatiq:__acks__.*.{QUEUE}.DQ")
        return sum(self.client.scard(key) for key in keys)

    def waiting(self, queue: str = QUEUE) -> list[str]:
        """Return the fetched messages, then the list from its head."""
        rids: list[bytes] = []
        for key in self.client.scan_iter(f"dramatiq:__acks__.*.{queue}"):
            rids += self.client.smembers(key)  # type: ignore[arg-type]
        rids += self.client.lrange(f"dramatiq:{queue}", 0, -1)  # type: ignore[arg-type]
        bodies: Any = self.client.hmget(f"dramatiq:{queue}.msgs", rids) if rids else []
        return [dramatiq.Message.decode(body).message_id for body in bodies if body]

    def body(self, job_id: str) -> object:
        """Return its message, as it is in Redis."""
        found = self._find(job_id)
        return {**json.loads(found[1]), **json.loads(found[1])["options"]} if found else None

    def token(self, job_id: str) -> UUID | None:
        """Return its id in Redis, if it is one of our tokens."""
        found = self._find(job_id)
        token = UUID(found[0].decode()) if found else None
        return token if token is not None and token.version == 7 else None

    def _find(self, job_id: str) -> tuple[bytes, bytes] | None:
        for key in self.client.scan_iter("dramatiq:*.msgs"):
            stored: Any = self.client.hgetall(key)
            for rid, data in stored.items():
                if not key.endswith(b".XQ.msgs") and job_id in data.decode(errors="replace"):
                    return rid, data
        return None

    def forget(self, job_id: str) -> None:
        """Delete its message and its entry in the list."""
        found = self._find(job_id)
        assert found is not None
        for queue in (QUEUE, f"{QUEUE}.DQ"):
            self.client.hdel(f"dramatiq:{queue}.msgs", found[0])
            self.client.lrem(f"dramatiq:{queue}", 0, found[0].decode())

    def is_a_jobs(self, key: str) -> bool:
        """Return True for all keys except workers and their fetched ids."""
        return not key.startswith(_NO_JOBS)
