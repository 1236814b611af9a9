"""Dramatiq: the broker and the actor of the demo, for `dramatiq jobguard.demo.apps.dramatiq`."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

import jobguard
from jobguard.demo import tasks
from jobguard.demo.apps import POSTGRES, REDIS

broker = RedisBroker(url=os.environ[REDIS])  # type: ignore[no-untyped-call] # partly typed
dramatiq.set_broker(broker)
if POSTGRES in os.environ:
    jobguard.guard(broker, postgres=os.environ[POSTGRES])

work = dramatiq.actor(tasks.work)


def enqueue(number: int, seconds: float) -> str:
    """Enqueue a job, and return its id."""
    return work.send(number, seconds).message_id
