"""Dramatiq: one command starts all workers, each a process with many threads.

When one of them is killed, the command ends the others and itself; its supervisor restarts it.
``dramatiq:default``: list of the ids of the messages that wait. ``dramatiq:default.msgs`` and, for
delayed messages, ``…:default.DQ.msgs``: hash of the messages, each from its push until it is
acknowledged. ``dramatiq:__heartbeats__``: sorted set of the processes that sent a heartbeat to
Redis.
"""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, Any

from jobguard.demo.libraries import Library, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobguard.demo.ledger import Mark

APP = "jobguard.demo.apps.dramatiq"
_JOB_ID = re.compile(rb'"message_id":"([^"]+)"')


class _Dramatiq(Library):
    name = "dramatiq"
    title = "Dramatiq"
    jobs_a_second = 300.0
    overhead_seconds = 0.005
    orphan_signal = signal.SIGTERM  # after SIGKILL its workers would go on

    def worker_pool(self, workers: int | None, cores: int) -> WorkerPool:
        return WorkerPool(workers or 2, threads=30)

    def commands(self, worker_pool: WorkerPool) -> Sequence[Sequence[str]]:
        processes, threads = str(worker_pool.workers), str(worker_pool.threads)
        return [("-m", "dramatiq", APP, "--processes", processes, "--threads", threads)]

    def workers_known(self, client: Any) -> int:
        return int(client.zcard("dramatiq:__heartbeats__"))

    def waiting(self, client: Any) -> int:
        return int(client.llen("dramatiq:default"))

    def present(self, client: Any) -> set[str]:
        messages = client.hvals("dramatiq:default.msgs") + client.hvals("dramatiq:default.DQ.msgs")
        found = (_JOB_ID.search(message) for message in messages)
        return {match[1].decode() for match in found if match}

    def worker_of(self, mark: Mark) -> int:
        return mark.pid


LIBRARY = _Dramatiq()
