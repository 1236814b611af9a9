"""RQ: a worker is one process that runs one job at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rq
from rq.worker_registration import REDIS_WORKER_KEYS

from jobguard.demo.libraries import Library, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobguard.demo.ledger import Mark

QUEUE = "demo"


class _RQ(Library):
    name = "rq"
    title = "RQ"
    jobs_a_second = 400.0
    overhead_seconds = 0.008

    def worker_pool(self, workers: int | None, cores: int) -> WorkerPool:
        return WorkerPool(workers or 2 * cores)

    def commands(self, worker_pool: WorkerPool) -> Sequence[Sequence[str]]:
        return [("-m", "jobguard.demo.apps.rq_worker", QUEUE)] * worker_pool.workers

    def workers_known(self, client: Any) -> int:
        return int(client.scard(REDIS_WORKER_KEYS))

    def waiting(self, client: Any) -> int:
        return int(client.llen(rq.Queue(QUEUE, connection=client).key))

    def present(self, client: Any) -> set[str]:
        queue = rq.Queue(QUEUE, connection=client)
        pipeline = client.pipeline(transaction=True)
        for key in (queue.key, queue.intermediate_queue_key):
            pipeline.lrange(key, 0, -1)
        for registry in (
            queue.started_job_registry,
            queue.scheduled_job_registry,
            queue.deferred_job_registry,
        ):
            pipeline.zrange(registry.key, 0, -1)
        return {
            member.decode().partition(":")[0]  # started: job id:execution id
            for members in pipeline.execute()
            for member in members
        }

    def worker_of(self, mark: Mark) -> int:
        return mark.pid


LIBRARY = _RQ()
