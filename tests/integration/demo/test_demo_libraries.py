"""The demo finds each library's jobs where that library stores them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import redis

from jobguard.demo.apps import REDIS
from jobguard.demo.libraries import NAMES, named

ENQUEUE = """
import importlib, sys
app = importlib.import_module(f"jobguard.demo.apps.{sys.argv[1]}")
print(app.enqueue(1, 0.0), app.enqueue(2, 0.0))
"""

# Each program takes one job as a worker does, and exits before it acknowledges the job.
TAKE = {
    "celery": """
import os
from jobguard.demo.apps.celery import app
app.connection().SimpleQueue("celery").get(timeout=10)
os._exit(0)
""",
    "dramatiq": """
import os
from jobguard.demo.apps.dramatiq import broker
assert next(iter(broker.consume("default", timeout=10_000)))
os._exit(0)
""",
    "rq": """
import os, rq
from jobguard.demo.apps.rq import queue
queue.connection.lmove(queue.key, queue.intermediate_queue_key)
os._exit(0)
""",
}


def run(program: str, *arguments: str, redis_url: str) -> str:
    """Run a program of a user; return its output."""
    environ = {name: value for name, value in os.environ.items() if name != "JOBGUARD_POSTGRES_URL"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environ | {REDIS: redis_url, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    ).stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_job_is_present_from_its_push_until_it_is_acknowledged(name: str, redis_url: str) -> None:
    """A job is present in the queue and at a worker, by the id that enqueue returned."""
    library = named(name)
    with redis.Redis.from_url(redis_url) as client:
        assert (library.waiting(client), library.present(client)) == (0, set())
        ids = set(run(ENQUEUE, name, redis_url=redis_url).split())
        assert (library.waiting(client), library.present(client)) == (2, ids)
        run(TAKE[name], redis_url=redis_url)
        assert (library.waiting(client), library.present(client)) == (1, ids)
        client.flushdb()
        assert (library.waiting(client), library.present(client)) == (0, set())
