"""The keys of RQ in Redis.

=================================  ====================================================
``rq:queues``                      set of queue keys
``rq:queue:<queue>``               list of the ids of waiting jobs
``rq:queue:<queue>:intermediate``  list of the ids that one-queue workers took and did not start yet
``rq:job:<id>``                    hash of the job; without a ``data`` field it is not a job
``rq:job:<id>:dependents``         set of the ids that wait for this job
``rq:job::<id>:dependencies``      set of the ids this job waits for (the double colon is RQ's)
``rq:wip:<queue>``                 zset of ``id:execution`` by the time when RQ calls it abandoned
``rq:executions:<id>``             zset of executions by that time plus 60 s
``rq:scheduled:<queue>``           zset of ids by due time; ``deferred`` and ``ready`` are similar
``rq:rl:<key>:rate_limited``       zset of ids that wait for a slot; ``allowed``: ids that have one
``rq:workers:<queue>``             set of the keys of the workers that listen
``rq:worker:<name>``               hash of a worker, for 60 s after its end
=================================  ====================================================

jobguard adds these fields to the hash: ``jg`` is the token in hex. It gets the suffix ``!`` when RQ
itself has written the end of that delivery: a job that unguarded code requeues (for example a
dashboard) keeps the field, and must not count as the delivery that ended. ``jg_attempt`` and
``jg_task`` are there where they cannot be derived. The hash of a guarded worker has the field ``jg`` too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

FIELD = "jg"
ATTEMPT_FIELD = "jg_attempt"
TASK_FIELD = "jg_task"
WORKER_FIELD = "jg"
SPENT = "!"
TIMESTAMP = "%Y-%m-%dT%H:%M:%S.%fZ"
"""The format of RQ's timestamps."""
KEPT = (500, 31_536_000)
"""Seconds for which RQ keeps finished and failed jobs, unless the job has other values."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of the keys of one RQ."""

    base: str = "rq"
    job_prefix: str = "rq:job:"
    queue_prefix: str = "rq:queue:"
    queues_key: str = "rq:queues"

    def __str__(self) -> str:
        """Return the layout as the prefix of a source: one word if all keys have the usual names."""
        if self == _usual(self.base):
            return self.base
        return "|".join((self.base, self.job_prefix, self.queue_prefix, self.queues_key))

    @classmethod
    def parse(cls, prefix: str) -> Layout:
        """Return the layout for the prefix of a source."""
        parts = prefix.split("|")
        return cls(*parts) if len(parts) == 4 else _usual(prefix or "rq")

    def job(self, job_id: str) -> str:
        """Return the key of a job's hash."""
        return self.job_prefix + job_id

    def queue(self, name: str) -> str:
        """Return the key of a queue's list."""
        return self.queue_prefix + name

    def intermediate(self, name: str) -> str:
        """Return the key of the list to which a one-queue worker moves the ids that it takes."""
        return f"{self.queue_prefix}{name}:intermediate"

    def wip(self, name: str) -> str:
        """Return the key of a queue's running executions."""
        return f"{self.base}:wip:{name}"

    def executions(self, job_id: str) -> str:
        """Return the key of a job's running executions."""
        return f"{self.base}:executions:{job_id}"

    def run(self, job_id: str, name: str) -> list[str]:
        """Return the keys of a job's runs, as abandon.lua expects them."""
        return [
            self.job(job_id),
            self.wip(name),
            self.executions(job_id),
            self.intermediate(name),
        ]

    def ending(self, job_id: str, name: str) -> list[str]:
        """Return the keys of a job's end, as skip.lua expects them."""
        intermediate = self.intermediate(name)
        return [
            self.job(job_id),
            intermediate,
            f"{intermediate}:first_seen:{job_id}",
            self.wip(name),
            f"{self.base}:finished:{name}",
            f"{self.base}:failed:{name}",
        ]

    def places(self, job_id: str, name: str) -> list[str]:
        """Return the keys in which a job may be, as discard.lua expects them."""
        return [
            self.job(job_id),
            self.queue(name),
            *(
                f"{self.base}:{kind}:{name}"
                for kind in ("scheduled", "deferred", "ready", "canceled")
            ),
            f"{self.base}:results:{job_id}",
            *(f"{self.base}:{kind}:{name}" for kind in ("finished", "failed")),
        ]

    def workers(self, name: str) -> str:
        """Return the key of the set of workers that listen to a queue."""
        return f"{self.base}:workers:{name}"


def _usual(base: str) -> Layout:
    return Layout(base, f"{base}:job:", f"{base}:queue:", f"{base}:queues")


@lru_cache(maxsize=64)
def prefix_of(base: str, job_prefix: str, queue_prefix: str, queues_key: str) -> str:
    """Return the prefix of a source for these class attributes of RQ."""
    return str(Layout(base, job_prefix, queue_prefix, queues_key))
