"""Celery: the app of the demo, for `celery -A jobguard.demo.apps.celery worker`."""

from __future__ import annotations

import os

import celery

import jobguard
from jobguard.demo import tasks
from jobguard.demo.apps import POSTGRES, REDIS

app = celery.Celery("demo", broker=os.environ[REDIS], backend=os.environ[REDIS])
if POSTGRES in os.environ:
    jobguard.guard(app, postgres=os.environ[POSTGRES])

work = app.task(tasks.work)


def enqueue(number: int, seconds: float) -> str:
    """Enqueue a job, and return its id."""
    return str(work.delay(number, seconds).id)
