"""The keys of Dramatiq in Redis, and the ids of its workers.

====================================  =================================================
``<ns>:<queue>``                      list of the ids that wait
``<ns>:<queue>.msgs``                 hash of id to message, until it is acknowledged
``<ns>:<queue>.DQ``, ``.DQ.msgs``     the same for delayed messages
``<ns>:<queue>.XQ``, ``.XQ.msgs``     zset by time and hash of the messages that failed for good
``<ns>:__acks__.<worker>.<queue>``    set of the ids that a worker has fetched
``<ns>:__heartbeats__``               zset of workers *and producers*, by their last heartbeat
``<group>``                           the barrier of a group: how many members must still complete
====================================  =================================================

The id of a message here is its ``redis_message_id``, new at every push: it is our token. We add two
keys beside the barrier of a group: ``<group>@jobguard``, the set of the members that were counted
(see count.lua), and ``<group>@jobguard:finish``, with which a leader marks the group as complete.

A worker's id is a UUID that its broker creates. Its version shows the kind of process: 7 is a
guarded worker, 8 is a guarded process that consumes nothing, and any other version is an unguarded
process.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from jobguard.model import new_token

DEFAULT = "dramatiq"
_NO_NAME = "="
_WORKER, _SHORT_LIVED = 7, 8


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of the keys of one RedisBroker."""

    namespace: str = DEFAULT

    @property
    def prefix(self) -> str:
        """The key prefix of the source."""
        return "" if self.namespace == DEFAULT else self.namespace or _NO_NAME

    @classmethod
    def parse(cls, prefix: str) -> Layout:
        """Return the layout for the prefix of a source."""
        return cls("" if prefix == _NO_NAME else prefix or DEFAULT)

    def key(self, name: str) -> str:
        """Return the key of a queue's list, or of another thing by its name."""
        return f"{self.namespace}:{name}"

    @property
    def heartbeats(self) -> str:
        """The key of the heartbeats."""
        return self.key("__heartbeats__")

    @property
    def acks_prefix(self) -> str:
        """The start of the keys of fetched ids; the worker and the queue follow."""
        return self.key("__acks__.")

    def report(self, token: UUID) -> str:
        """Return the key that permits one worker to report a message as dead."""
        return self.key(f"jobguard:report:{token}")

    def acks(self, worker: str, queue: str) -> str:
        """Return the key of the ids that a worker has fetched from a queue."""
        return f"{self.acks_prefix}{worker}.{queue}"


def counted_key(join: str) -> str:
    """Return the key of the members of a group that were counted."""
    return f"{join}@jobguard"


def finish_key(join: str) -> str:
    """Return the key with which a leader marks a group as complete."""
    return f"{join}@jobguard:finish"


def canonical(queue: str) -> str:
    """Return the name of the queue to which this list belongs."""
    return queue[:-3] if queue.endswith((".DQ", ".XQ")) else queue


def token_of(rid: object) -> UUID | None:
    """Return the token of a message; None if its id cannot be a token."""
    try:
        token = UUID(rid) if isinstance(rid, str) else None
    except ValueError:
        return None
    return token if token is not None and str(token) == rid else None


def new_worker() -> UUID:
    """Return a new id for a guarded worker."""
    return new_token()


def new_short_lived() -> UUID:
    """Return a new id for a guarded process that consumes nothing, so that it is not taken for a worker."""
    token = new_token().int
    return UUID(int=token & ~(0xF << 76) | _SHORT_LIVED << 76)


def is_short_lived(worker: str) -> bool:
    """Return True if this is the id of a guarded process that consumes nothing."""
    token = token_of(worker)
    return token is not None and token.version == _SHORT_LIVED


def is_stranger(worker: str) -> bool:
    """Return True if this id is not the id of a guarded process."""
    token = token_of(worker)
    return token is None or token.version not in (_WORKER, _SHORT_LIVED)


def is_worker(worker: str) -> bool:
    """Return True if this is the id of a guarded worker."""
    token = token_of(worker)
    return token is not None and token.version == _WORKER


def name_of(worker: str) -> str:
    """Return the session name of the process with this id.

    The name of a guarded worker is the hex form of its id. By that name a leader recognises one of
    our workers that is no longer in the ledger.
    """
    token = token_of(worker)
    return token.hex if token is not None and token.version == _WORKER else worker


def worker_of(name: str) -> str:
    """Return the id in Redis of the worker whose session has this name."""
    try:
        return str(UUID(hex=name)) if len(name) == 32 else name
    except ValueError:
        return name
