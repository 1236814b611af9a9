"""RQ, as the suite sees it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import fakeredis
import rq.worker
from rq import Queue, Retry, SimpleWorker
from rq.job import Job
from rq.registry import FailedJobRegistry, ScheduledJobRegistry
from rq.scheduler import RQScheduler

from jobguard.adapters.rq import RQAdapter, patches
from jobguard.adapters.rq.layout import SPENT
from tests.conformance.library import QUEUE, Library

_HOOKED = {
    *(Queue, Job, FailedJobRegistry, ScheduledJobRegistry),
    *(kind for kind in rq.worker.SimpleWorker.__mro__ if kind is not object),
    rq.worker.Worker,
}
_NO_JOBS = ("rq:worker", "rq:clean_", "rq:results:", "rq:finished:", "rq:failed:", "jobguard:")


class OnRQ(Library):
    """RQ."""

    adapter = RQAdapter()
    one_body_per_id = True

    def _queue(self, name: str = QUEUE) -> Queue:
        return Queue(name, connection=self.client)

    def target(self, queue: str | None = None) -> object:
        """A Queue, or the Redis."""
        return self.client if queue is None else self._queue(queue)

    def doubles(self) -> Mapping[str, object]:
        """What keeps nothing that could be lost."""
        fake = fakeredis.FakeRedis()
        return {
            "fakeredis": fake,
            "a queue on fakeredis": Queue(connection=fake),
            "is_async=False": Queue(connection=self.client, is_async=False),
        }

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Without the hooks of a worker class that somebody imported."""
        holders = set(patches._holders)
        for holder in holders:
            patches.uninstall(holder)
        try:
            yield
        finally:
            for holder in holders:
                patches.install(holder)

    def hooks(self) -> object:
        """The classes, entry by entry."""
        return {kind: dict(kind.__dict__) for kind in _HOOKED}

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
        """Enqueue it."""
        call: tuple[Any, ...] = (f"tests.conformance.tasks.{task}", str(self.ledger), *words)
        options: dict[str, Any] = {"job_id": job_id, "at_front": at_front}
        if retries:
            options["retry"] = Retry(max=retries, interval=int(retry_delay))
        host = self._queue(queue)
        if delay is not None:
            return host.enqueue_in(timedelta(seconds=delay), *call, **options).id
        return host.enqueue(*call, **options).id

    def cancel(self, job_id: str) -> None:
        """As a person does, who knows the id."""
        Job.fetch(job_id, connection=self.client).cancel()

    def drop_push(self) -> None:
        """Enqueue on a pipeline that is never executed."""
        with self.client.pipeline() as pipe:
            self._queue().enqueue("tests.conformance.tasks.say", str(self.ledger), pipeline=pipe)

    def work(self, queue: str = QUEUE) -> None:
        """In bursts, by the worker that does not fork."""
        SimpleWorker([self._queue(queue)], connection=self.client).work(burst=True)

    def move_delayed(self) -> None:
        """What RQ's scheduler does once a second."""
        queue = self._queue()
        for job_id in queue.scheduled_job_registry.get_job_ids():
            self.client.zadd(f"rq:scheduled:{QUEUE}", {job_id: time.time() - 1})
        scheduler: Any = RQScheduler([queue], connection=self.client)
        scheduler.acquire_locks()
        scheduler.enqueue_scheduled_jobs()
        scheduler.release_locks()

    def start_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """The command of the manual, with the worker that does not fork."""
        return self._command(environ)

    def start_scheduling_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """With RQ's own scheduler."""
        return self._command(environ, "--with-scheduler")

    def delayed_copies(self) -> int:
        """What is scheduled: RQ leaves it in Redis until it is due."""
        return int(self.client.zcard(f"rq:scheduled:{QUEUE}"))

    def _command(self, environ: Mapping[str, str], *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "rq.cli", "worker", "--url", self.redis_url),
                *(
                    "--worker-class",
                    "jobguard.adapters.rq.SimpleWorker",
                    "--quiet",
                    *options,
                    QUEUE,
                ),
            ],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
        )

    def waiting(self, queue: str = QUEUE) -> list[str]:
        """The list, from its head; before it, what a worker took and has not begun."""
        begun: Any = self.client.lrange(f"rq:queue:{queue}:intermediate", 0, -1)
        return [*(job_id.decode() for job_id in begun), *self._queue(queue).job_ids]

    def body(self, job_id: str) -> object:
        """Its hash."""
        return self.client.hgetall(f"rq:job:{job_id}") or None

    def token(self, job_id: str) -> UUID | None:
        """The field of ours."""
        field: Any = self.client.hget(f"rq:job:{job_id}", "jg")
        return UUID(hex=field.decode().rstrip(SPENT)) if field else None

    def forget(self, job_id: str) -> None:
        """Its hash and its places."""
        self.client.delete(f"rq:job:{job_id}")
        self.client.lrem(f"rq:queue:{QUEUE}", 0, job_id)
        self.client.zrem(f"rq:scheduled:{QUEUE}", job_id)

    def is_a_jobs(self, key: str) -> bool:
        """All but workers, results and RQ's own locks."""
        return not key.startswith(_NO_JOBS)
