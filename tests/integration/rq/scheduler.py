"""One pass of RQ's scheduler, on demand."""

from __future__ import annotations

from typing import Any

from rq import Queue
from rq.scheduler import RQScheduler


def move_scheduled(queue: Queue) -> None:
    """Do the work that RQ's scheduler does once a second."""
    scheduler: Any = RQScheduler([queue], connection=queue.connection)
    scheduler.acquire_locks()
    scheduler.enqueue_scheduled_jobs()
    scheduler.release_locks()
