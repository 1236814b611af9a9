"""The place of the jobs of each library in Redis: faults delete from it, and the report describes it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

from jobguard.model import DROPPED_BY_LIVE_WORKER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import redis

_SHOWN = 200
"""Characters of one value that the report shows."""


class Layout(Protocol):
    """The keys of one library."""

    books: Sequence[str]
    """Patterns of the keys for the jobs of workers and for counters, if there are any."""

    def lists(self, client: redis.Redis, queues: Iterable[str]) -> Mapping[str, Sequence[bytes]]:
        """Return the key of each list of waiting jobs, with its members."""

    def unfinished(self, client: redis.Redis, queues: Iterable[str]) -> set[str]:
        """Return the ids of the jobs that wait, are delayed, or were taken and not acknowledged."""

    def delete(self, client: redis.Redis, key: str, member: bytes) -> str | None:
        """Delete the one job of this member of a list, and return its name; None if it was already gone."""

    def about(self, client: redis.Redis, queues: Iterable[str], job_id: str) -> dict[str, Any]:
        """Return where Redis has a job."""


class RQLayout:
    """`rq:queue:<queue>` lists ids, `rq:job:<id>` is the job."""

    books: Sequence[str] = ()

    def lists(self, client: redis.Redis, queues: Iterable[str]) -> Mapping[str, Sequence[bytes]]:
        """Return one list for each queue."""
        return _lists(client, [f"rq:queue:{queue}" for queue in queues])

    def unfinished(self, client: redis.Redis, queues: Iterable[str]) -> set[str]:
        """Return the members of the lists: a scheduled or running job has no second body."""
        return {one.decode() for members in self.lists(client, queues).values() for one in members}

    def delete(self, client: redis.Redis, key: str, member: bytes) -> str | None:
        """Delete the hash; its id stays in the list."""
        name = f"rq:job:{member.decode()}"
        return name if client.delete(name) else None

    def about(self, client: redis.Redis, queues: Iterable[str], job_id: str) -> dict[str, Any]:
        """Return the fields of the job's hash."""
        fields: Any = client.hgetall(f"rq:job:{job_id}")
        return {name.decode(): _shown(value) for name, value in fields.items() if name != b"data"}


class CeleryLayout:
    """A list of whole messages for each queue and priority; messages taken by workers are in `unacked`."""

    books: Sequence[str] = (
        "unacked",
        "unacked_index",
        "_kombu.binding.*",
        "celery-taskset-meta-*",
    )

    def lists(self, client: redis.Redis, queues: Iterable[str]) -> Mapping[str, Sequence[bytes]]:
        """Return the lists of the default priority, with which all jobs are published."""
        return _lists(client, queues)

    def unfinished(self, client: redis.Redis, queues: Iterable[str]) -> set[str]:
        """Return the ids of the messages in lists and with workers.

        Messages that a live worker has dropped do not count: if such a job has ended, nothing puts
        it back before the visibility timeout.
        """
        unacked: Any = client.hvals("unacked")
        taken = [json.loads(one)[0] for one in unacked]
        messages = [
            one for one in taken if one["headers"].get("jobguard-worker") != DROPPED_BY_LIVE_WORKER
        ]
        for members in self.lists(client, queues).values():
            messages += map(json.loads, members)
        return {str(message["headers"]["id"]) for message in messages}

    def delete(self, client: redis.Redis, key: str, member: bytes) -> str | None:
        """Delete the message."""
        job_id = json.loads(member)["headers"]["id"]
        return f"{job_id} of {key}" if client.lrem(key, 1, member.decode()) else None

    def about(self, client: redis.Redis, queues: Iterable[str], job_id: str) -> dict[str, Any]:
        """Return the lists and tags that have a message of this id, and the job's result."""
        lists = self.lists(client, queues).items()
        unacked: Any = client.hgetall("unacked")
        result: Any = client.get(f"celery-task-meta-{job_id}")
        wanted = f'"id": "{job_id}"'.encode()
        return {
            "lists": [key for key, members in lists for one in members if wanted in one],
            "unacked": [tag.decode() for tag, one in unacked.items() if wanted in one],
            "result": result and _shown(result),
        }


class DramatiqLayout:
    """`dramatiq:<queue>` lists ids whose bodies are in the hash `dramatiq:<queue>.msgs`."""

    books: Sequence[str] = (
        "dramatiq:*.msgs",
        "dramatiq:__acks__.*",
        "dramatiq:__heartbeats__",
        "????????-????-????-????-????????????",  # the counters of the members of a group
    )

    def lists(self, client: redis.Redis, queues: Iterable[str]) -> Mapping[str, Sequence[bytes]]:
        """Return one list for each queue; delayed messages wait in the memory of workers."""
        return _lists(client, [f"dramatiq:{queue}" for queue in queues])

    def unfinished(self, client: redis.Redis, queues: Iterable[str]) -> set[str]:
        """Return the id of every body in Redis, except dead letters."""
        found: set[str] = set()
        for queue in queues:
            for name in (queue, f"{queue}.DQ"):
                bodies: Any = client.hvals(f"dramatiq:{name}.msgs")
                found |= {str(json.loads(body)["message_id"]) for body in bodies}
        return found

    def delete(self, client: redis.Redis, key: str, member: bytes) -> str | None:
        """Delete the body; its id stays in the list."""
        job = member.decode()
        return f"{job} of {key}.msgs" if client.hdel(f"{key}.msgs", job) else None

    def about(self, client: redis.Redis, queues: Iterable[str], job_id: str) -> dict[str, Any]:
        """Return where there is a body of this id, if its id is listed, and which worker has taken it."""
        reported: dict[str, Any] = {}
        acks: Any = [key.decode() for key in client.scan_iter("dramatiq:__acks__.*")]
        for queue in queues:
            for name in (queue, f"{queue}.DQ", f"{queue}.XQ"):
                bodies: Any = client.hgetall(f"dramatiq:{name}.msgs")
                for token, body in bodies.items():
                    if json.loads(body)["message_id"] != job_id:
                        continue
                    listed = name[-3:] != ".XQ" and client.lpos(f"dramatiq:{name}", token.decode())
                    reported[f"{name} {token.decode()}"] = {
                        "listed": listed is not None and listed is not False,
                        "taken by": [key for key in acks if client.sismember(key, token.decode())],
                        "body": _shown(body),
                    }
        return reported


def _lists(client: redis.Redis, keys: Iterable[str]) -> Mapping[str, Sequence[bytes]]:
    found: dict[str, Any] = {key: client.lrange(key, 0, -1) for key in keys}
    return found


def _shown(value: bytes) -> str:
    return value[:_SHOWN].decode(errors="replace")
