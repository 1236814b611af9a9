"""Where RQ keeps its things in Redis, key by key.

=================================  ====================================================
``rq:queues``                      set of queue keys
``rq:queue:<queue>``               list of the ids that wait
``rq:queue:<queue>:intermediate``  list of the ids that one-queue workers took, not yet begun
``rq:job:<id>``                    hash of the job; no ``data`` field: not a job, only its ghost
``rq:job:<id>:dependents``         set of the ids that wait for this job
``rq:job::<id>:dependencies``      set of the ids this job waits for (the double colon is RQ's)
``rq:wip:<queue>``                 zset of ``id:execution`` by the time it counts as abandoned
``rq:executions:<id>``             zset of executions by that time and 60 s more
``rq:scheduled:<queue>``           zset of ids by due time; ``deferred``, ``ready`` likewise
``rq:rl:<key>:rate_limited``       zset of ids that wait for a slot; ``allowed``: that hold one
``rq:workers:<queue>``             set of the keys of the workers that listen
=================================  ====================================================

Ours in the hash: ``jg``, the token in hex, with ``!`` behind it once RQ itself wrote the end of
that delivery: a job that unguarded code puts back (a dashboard's "requeue") keeps our field, and
must not be taken for the life that ended. ``jg_attempt`` and ``jg_task`` stand beside it where they
are not obvious.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

FIELD = "jg"
ATTEMPT_FIELD = "jg_attempt"
TASK_FIELD = "jg_task"
SPENT = "!"
KEPT = (500, 31_536_000)
"""Seconds for which RQ keeps what has finished and what has failed, unless the job says otherwise."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of the keys of one RQ."""

    base: str = "rq"
    job_prefix: str = "rq:job:"
    queue_prefix: str = "rq:queue:"
    queues_key: str = "rq:queues"

    def __str__(self) -> str:
        """Return it as the prefix of a source: one word where everything hangs together."""
        if self == _usual(self.base):
            return self.base
        return "|".join((self.base, self.job_prefix, self.queue_prefix, self.queues_key))

    @classmethod
    def parse(cls, prefix: str) -> Layout:
        """Return the layout that a source's prefix names."""
        parts = prefix.split("|")
        return cls(*parts) if len(parts) == 4 else _usual(prefix or "rq")

    def job(self, job_id: str) -> str:
        """Return the key of a job's hash."""
        return self.job_prefix + job_id

    def queue(self, name: str) -> str:
        """Return the key of a queue's list."""
        return self.queue_prefix + name

    def intermediate(self, name: str) -> str:
        """Return the key of the list where a one-queue worker puts what it takes."""
        return f"{self.queue_prefix}{name}:intermediate"

    def wip(self, name: str) -> str:
        """Return the key of a queue's running executions."""
        return f"{self.base}:wip:{name}"

    def executions(self, job_id: str) -> str:
        """Return the key of a job's running executions."""
        return f"{self.base}:executions:{job_id}"

    def run(self, job_id: str, name: str) -> list[str]:
        """Return the keys by which RQ knows of a job's runs: what abandon.lua takes."""
        return [
            self.job(job_id),
            self.wip(name),
            self.executions(job_id),
            self.intermediate(name),
        ]

    def ending(self, job_id: str, name: str) -> list[str]:
        """Return the keys by which RQ knows how a job ended: what skip.lua takes."""
        intermediate = self.intermediate(name)
        return [
            self.job(job_id),
            intermediate,
            f"{intermediate}:first_seen:{job_id}",
            self.wip(name),
            f"{self.base}:finished:{name}",
            f"{self.base}:failed:{name}",
        ]

    def workers(self, name: str) -> str:
        """Return the key of the workers that listen to a queue."""
        return f"{self.base}:workers:{name}"


def _usual(base: str) -> Layout:
    return Layout(base, f"{base}:job:", f"{base}:queue:", f"{base}:queues")


@lru_cache(maxsize=64)
def prefix_of(base: str, job_prefix: str, queue_prefix: str, queues_key: str) -> str:
    """Return the source's prefix for these class attributes of RQ."""
    return str(Layout(base, job_prefix, queue_prefix, queues_key))
