"""Celery: a worker is a main process whose children run the jobs; killing it kills the children.

``celery``: list of the messages that wait, in the one priority that is used here. ``unacked``: hash
of the messages that workers have fetched. ``_kombu.binding.celery.pidbox``: set of the workers'
mailboxes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from jobguard.demo.libraries import Library, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobguard.demo.ledger import Mark

APP = "jobguard.demo.apps.celery"
# In `unacked` the message is a string within a list: its quotes are escaped. Its body is base64.
_JOB_ID = re.compile(rb'\\?"correlation_id\\?": \\?"([^"\\]+)')
_CHUNK = 1000  # so many at a time do not block other clients


class _Celery(Library):
    name = "celery"
    title = "Celery"
    jobs_a_second = 400.0
    overhead_seconds = 0.003

    def worker_pool(self, workers: int | None, cores: int) -> WorkerPool:
        return WorkerPool(
            workers or 2, processes=cores
        )  # a child for each core is Celery's own default

    def commands(self, worker_pool: WorkerPool) -> Sequence[Sequence[str]]:
        return [
            (
                *("-m", "celery", "-A", APP, "worker", "--loglevel", "WARNING"),
                *("--concurrency", str(worker_pool.processes), "--hostname", f"demo-{number}@%h"),
            )
            for number in range(worker_pool.workers)
        ]

    def workers_known(self, client: Any) -> int:
        return int(client.scard("_kombu.binding.celery.pidbox"))

    def waiting(self, client: Any) -> int:
        return int(client.llen("celery"))

    def present(self, client: Any) -> set[str]:
        messages: list[bytes] = client.hvals("unacked")
        # Start at the side to which new messages are added, so that none is missed.
        for first in range(0, self.waiting(client) + _CHUNK, _CHUNK):
            messages += client.lrange("celery", first, first + _CHUNK - 1)
        found = (_JOB_ID.search(message) for message in messages)
        return {match[1].decode() for match in found if match}

    def worker_of(self, mark: Mark) -> int:
        return mark.parent


LIBRARY = _Celery()
