"""RQ: the queue of the demo."""

from __future__ import annotations

import os

import redis
import rq

import jobguard
from jobguard.demo.apps import POSTGRES, REDIS

queue = rq.Queue("demo", connection=redis.Redis.from_url(os.environ[REDIS]))
if POSTGRES in os.environ:
    jobguard.guard(queue, postgres=os.environ[POSTGRES])


def enqueue(number: int, seconds: float) -> str:
    """Enqueue a job, and return its id."""
    return queue.enqueue("jobguard.demo.tasks.work", number, seconds).id
