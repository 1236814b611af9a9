"""Guarded applications of the three libraries, all in the process of the test."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, cast

import celery
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message
from rq import Queue

import jobguard
from jobguard.guard import JobGuard
from tests.conformance.words import BRISK
from tests.databases import rows

QUEUE = "mail"


class Host:
    """One guarded application: it can send jobs, and count the waiting jobs in its Redis."""

    def __init__(
        self,
        library: str,
        url: str,
        *,
        client: redis.Redis | None = None,
        conf: Mapping[str, Any] | None = None,
        queue: str = QUEUE,
    ) -> None:
        """Create the application; ``client`` (``conf`` for Celery) has options that a URL cannot have."""
        self.client = client or redis.Redis.from_url(url)
        self._library = library
        self._queue = queue
        self.target: Any
        if library == "rq":
            self.target = Queue(queue, connection=self.client)
        elif library == "celery":
            self.target = celery.Celery("app", broker=url, set_as_current=False)
            self.target.conf.update(task_default_queue=queue, **(conf or {}))
        else:
            by: dict[str, Any] = {"client": client} if client else {"url": url}
            self.target = cast(Any, RedisBroker)(**by)

    def guard(self, stack: ExitStack, database: str, **settings: Any) -> JobGuard:
        """Guard the application, with a worker that beats and takes no jobs."""
        given: Any = {"postgres": database, **BRISK, **settings}
        guard = stack.enter_context(jobguard.guard(self.target, **given))
        assert guard.inert is None
        assert guard._tracker is not None
        session = guard._tracker.open_session(name=f"worker {id(self)}", queues=[self._queue])
        stack.callback(session.close)
        stack.callback(self.client.close)
        return guard

    def send(self) -> str:
        """Send a job; return its id."""
        if self._library == "rq":
            job_id: str = self.target.enqueue("builtins.print", "x").id
        elif self._library == "celery":
            job_id = self.target.send_task("app.task", args=["x"]).id
        else:
            message: Message[Any] = Message(self._queue, "actor", ("x",), {}, {})
            self.target.declare_queue(self._queue)
            job_id = self.target.enqueue(message).message_id
        return job_id

    def waiting(self) -> int:
        """Return the number of waiting jobs."""
        queue = self._queue
        key = {"rq": f"rq:queue:{queue}", "celery": queue, "dramatiq": f"dramatiq:{queue}"}
        return int(self.client.llen(key[self._library]))


def trusted(database: str) -> int:
    """Return the number of trusted queues."""
    return len(rows(database, "select from jobguard.queues where trusted_since is not null"))
