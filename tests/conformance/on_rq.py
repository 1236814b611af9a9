"""RQ for the suite."""

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
        """Return a Queue, or the Redis client."""
        return self.client if queue is None else self._queue(queue)

    def doubles(self) -> Mapping[str, object]:
        """Return the targets that keep nothing that could be lost."""
        fake = fakeredis.FakeRedis()
        return {
            "fakeredis": fake,
            "a queue on fakeredis": Queue(connection=fake),
            "is_async=False": Queue(connection=self.client, is_async=False),
        }

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Remove the hooks of a worker class that a test imported."""
        holders = set(patches._holders)
        for holder in holders:
            patches.uninstall(holder)
        try:
            yield
        finally:
            for holder in holders:
                patches.install(holder)

    def hooks(self) -> object:
        """Return the classes, entry by entry."""
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
        """Enqueue the job."""
        call: tuple[Any, ...] = (f"tests.conformance.tasks.{task}", str(self.ledger), *words)
        options: dict[str, Any] = {"job_id": job_id, "at_front": at_front}
        if retries:
            options["retry"] = Retry(max=retries, interval=int(retry_delay))
        host = self._queue(queue)
        if delay is not None:
            return host.enqueue_in(timedelta(seconds=delay), *call, **options).id
        return host.enqueue(*call, **options).id

    def cancel(self, job_id: str) -> None:
        """Cancel the job by its id, as a person does."""
        Job.fetch(job_id, connection=self.client).cancel()

    def drop_push(self) -> None:
        """Enqueue on a pipeline that is never executed."""
        with self.client.pipeline() as pipe:
            self._queue().enqueue("tests.conformance.tasks.say", str(self.ledger), pipeline=pipe)

    def send_with_read(self) -> None:
        """Enqueue a job on a pipeline of the application, as RQ does for dependencies."""
        with self.client.pipeline() as pipe:
            self._queue().enqueue("tests.conformance.tasks.say", str(self.ledger), pipeline=pipe)
            pipe.execute()

    def task(self) -> object:
        """Return the name of the function."""
        return "tests.conformance.tasks.say"

    def send_with_options(self, options: Mapping[str, object]) -> None:
        """Enqueue with the options in the meta."""
        self._queue().enqueue("tests.conformance.tasks.say", str(self.ledger), meta=dict(options))

    def work(self, queue: str = QUEUE) -> None:
        """Run the worker that does not fork, in burst mode."""
        SimpleWorker([self._queue(queue)], connection=self.client).work(burst=True)

    def move_delayed(self) -> None:
        """Do the work that RQ's scheduler does once a second."""
        queue = self._queue()
        for job_id in queue.scheduled_job_registry.get_job_ids():
            self.client.zadd(f"rq:scheduled:{QUEUE}", {job_id: time.time() - 1})
        scheduler: Any = RQScheduler([queue], connection=self.client)
        scheduler.acquire_locks()
        scheduler.enqueue_scheduled_jobs()
        scheduler.release_locks()

    def start_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start the command of the manual, with the worker that does not fork."""
        return self._command(environ)

    def start_scheduling_worker(self, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start the command with RQ's own scheduler."""
        return self._command(environ, "--with-scheduler")

    def delayed_copies(self) -> int:
        """Return the number of scheduled jobs: RQ leaves them in Redis until they are due."""
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
        """Return the jobs that a worker fetched and has not started, then the list from its head."""
        begun: Any = self.client.lrange(f"rq:queue:{queue}:intermediate", 0, -1)
        return [*(job_id.decode() for job_id in begun), *self._queue(queue).job_ids]

    def body(self, job_id: str) -> object:
        """Return its hash."""
        return self.client.hgetall(f"rq:job:{job_id}") or None

    def token(self, job_id: str) -> UUID | None:
        """Return the token in our field."""
        field: Any = self.client.hget(f"rq:job:{job_id}", "jg")
        return UUID(hex=field.decode().rstrip(SPENT)) if field else None

    def forget(self, job_id: str) -> None:
        """Delete its hash and its entries."""
        self.client.delete(f"rq:job:{job_id}")
        self.client.lrem(f"rq:queue:{QUEUE}", 0, job_id)
        self.client.zrem(f"rq:scheduled:{QUEUE}", job_id)

    def is_a_jobs(self, key: str) -> bool:
        """Return True for all keys except workers, results and RQ's own locks."""
        return not key.startswith(_NO_JOBS)
