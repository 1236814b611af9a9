"""Where each library keeps its jobs in Redis: what the faults take away, and what is told afterwards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

from jobguard.model import DROPPED_BY_LIVE_WORKER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import redis

_SHOWN = 200
"""Characters of one value that are worth being read."""


class Layout(Protocol):
    """One library's keys."""

    books: Sequence[str]
    """Patterns of the keys in which it notes what workers hold and what is counted, if any."""

    def lists(self, client: redis.Redis, queues: Iterable[str]) -> Mapping[str, Sequence[bytes]]:
        """Give the key of each list of waiting jobs, and what is in it."""

    def held(self, client: redis.Redis, queues: Iterable[str]) -> set[str]:
        """Give the ids of the jobs that wait, are delayed, or were taken and not acknowledged."""

    def delete(self, client: redis.Redis, key: str, member: bytes) -> str | None:
        """Delete the one job that this member of a list stands for; None: it was gone already."""

    def about(self, client: redis.Redis, queues: Iterable[str], job_id: str) -> dict[str, Any]:
        """Tell where Redis has a job."""


class RQLayout:
    """`rq:queue:<queue>` lists ids, `rq:job:<id>` is the job."""

    books: Sequence[str] = ()

    def lists(self, client: redis.Redis, queues: Iterable[str]) -> Mapping[str, Sequence[bytes]]:
        """One list a queue."""
        return _lists(client, [f"rq:queue:{queue}" for queue in queues])

    def held(self, client: redis.Redis, queues: Iterable[str]) -> set[str]:
        """What is in lists: a job that is scheduled or runs has no second body."""
        return {one.decode() for members in self.lists(client, queues).values() for one in members}

    def delete(self, client: redis.Redis, key: str, member: bytes) -> str | None:
        """Delete the hash; its id stays in the list."""
        name = f"rq:job:{member.decode()}"
        return name if client.delete(name) else None

    def about(self, client: redis.Redis, queues: Iterable[str], job_id: str) -> dict[str, Any]:
        """Give the fields of its hash."""
        fields: Any = client.hgetall(f"rq:job:{job_id}")
        return {name.decode(): _shown(value) for name, value in fields.items() if name != b"data"}


class CeleryLayout:
    """A list of whole messages for each queue and priority; those that a worker took are in `unacked`."""

    books: Sequence[str] = (
        "unacked",
        "unacked_index",
        "_kombu.binding.*",
        "celery-taskset-meta-*",
    )

    def lists(self, client: redis.Redis, queues: Iterable[str]) -> Mapping[str, Sequence[bytes]]:
        """All are published with the default priority."""
        return _lists(client, queues)

    def held(self, client: redis.Redis, queues: Iterable[str]) -> set[str]:
        """What is in lists, and what workers hold.

        Not what one has let go of: if that has ended, nothing puts it back before the visibility timeout.
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
        """Tell which lists and tags have a message of this id, and give its result."""
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
        "????????-????-????-????-????????????",  # what counts the members of a group
    )

    def lists(self, client: redis.Redis, queues: Iterable[str]) -> Mapping[str, Sequence[bytes]]:
        """One list a queue; what is delayed waits in the memory of workers."""
        return _lists(client, [f"dramatiq:{queue}" for queue in queues])

    def held(self, client: redis.Redis, queues: Iterable[str]) -> set[str]:
        """Every body that is there; a dead letter is done with."""
        held: set[str] = set()
        for queue in queues:
            for name in (queue, f"{queue}.DQ"):
                bodies: Any = client.hvals(f"dramatiq:{name}.msgs")
                held |= {str(json.loads(body)["message_id"]) for body in bodies}
        return held

    def delete(self, client: redis.Redis, key: str, member: bytes) -> str | None:
        """Delete the body; its id stays in the list."""
        job = member.decode()
        return f"{job} of {key}.msgs" if client.hdel(f"{key}.msgs", job) else None

    def about(self, client: redis.Redis, queues: Iterable[str], job_id: str) -> dict[str, Any]:
        """Tell where there is a body of this id, whether it is listed, and who has taken it."""
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
