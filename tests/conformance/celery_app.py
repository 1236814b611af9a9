"""A Celery application with the tasks of the suite; it is guarded if a worker imports it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from celery import Celery

import jobguard
from tests.conformance import tasks
from tests.conformance.library import QUEUE


def make(redis_url: str) -> Celery:
    """Return the application on this Redis."""
    app = Celery("suite", broker=redis_url, backend=redis_url, set_as_current=False)
    app.conf.update(
        task_default_queue=QUEUE,
        task_queues=None,
        task_serializer="pickle",
        accept_content=["pickle", "json"],
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
    )
    for plain in (tasks.say, tasks.fail, tasks.pay, tasks.probe, tasks.nap, tasks.die, tasks.hold):
        app.task(_retried(plain), bind=True, shared=False, name=name_of(plain.__name__))
    app.finalize()
    return app


def name_of(task: str) -> str:
    """Return Celery's name of a task of the suite."""
    return f"tests.conformance.tasks.{task}"


def _retried(plain: Callable[..., None]) -> Callable[..., None]:
    def run(self: Any, *args: object, retries: int = 0, wait: float = 0) -> None:
        try:
            plain(*args)
        except Exception as error:
            if not retries:
                raise
            raise self.retry(exc=error, countdown=wait, max_retries=retries) from error

    run.__name__ = plain.__name__
    return run


if "JOBGUARD_REDIS_URL" in os.environ:
    app = make(os.environ["JOBGUARD_REDIS_URL"])
    jobguard.guard(app)
