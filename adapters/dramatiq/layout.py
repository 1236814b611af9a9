"""Where Dramatiq keeps its things in Redis, key by key, and who is who among its workers.

====================================  =================================================
``<ns>:<queue>``                      list of the ids that wait
``<ns>:<queue>.msgs``                 hash of id to message, until it is acknowledged
``<ns>:<queue>.DQ``, ``.DQ.msgs``     the same of what is delayed
``<ns>:<queue>.XQ``, ``.XQ.msgs``     zset by time and hash of what has failed for good
``<ns>:__acks__.<worker>.<queue>``    set of the ids that a worker has fetched
``<ns>:__heartbeats__``               zset of workers *and producers* by when they last said a word
``<group>``                           a group's barrier: how many members are still to complete
====================================  =================================================

The id of a message here is its ``redis_message_id``, new at every push: our token. Ours beside a
group's barrier: ``<group>@jobguard``, the set of the members that were counted (see count.lua), and
``<group>@jobguard:finish``, a leader's word that all of them have completed.

A worker's id is a UUID that its broker makes up. By its version one sees whose it is: 7 is a guarded
worker, 8 a guarded process that consumes nothing; any other is a stranger's.
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
        """The prefix of its source."""
        return "" if self.namespace == DEFAULT else self.namespace or _NO_NAME

    @classmethod
    def parse(cls, prefix: str) -> Layout:
        """Return the layout that a source's prefix names."""
        return cls("" if prefix == _NO_NAME else prefix or DEFAULT)

    def key(self, name: str) -> str:
        """Return the key of a queue's list, or of anything else by its name."""
        return f"{self.namespace}:{name}"

    @property
    def heartbeats(self) -> str:
        """The key of the workers' last words."""
        return self.key("__heartbeats__")

    @property
    def acks_prefix(self) -> str:
        """What the keys of what workers have fetched begin with: the worker and the queue follow."""
        return self.key("__acks__.")

    def report(self, token: UUID) -> str:
        """Return the key of the mark by which a worker may tell that a message is dead."""
        return self.key(f"jobguard:report:{token}")

    def acks(self, worker: str, queue: str) -> str:
        """Return the key of what a worker has fetched from a queue."""
        return f"{self.acks_prefix}{worker}.{queue}"


def counted_key(join: str) -> str:
    """Return the key of the members of a group that were counted."""
    return f"{join}@jobguard"


def finish_key(join: str) -> str:
    """Return the key of a leader's word that all members of a group have completed."""
    return f"{join}@jobguard:finish"


def canonical(queue: str) -> str:
    """Return a queue's own name for the name of one of its lists."""
    return queue[:-3] if queue.endswith((".DQ", ".XQ")) else queue


def token_of(rid: object) -> UUID | None:
    """Return the token that a message carries; None: an id that could not be one."""
    try:
        token = UUID(rid) if isinstance(rid, str) else None
    except ValueError:
        return None
    return token if token is not None and str(token) == rid else None


def new_worker() -> UUID:
    """Return the id of a guarded worker that begins."""
    return new_token()


def new_short_lived() -> UUID:
    """Return the id of a guarded process that consumes nothing, so that nobody takes it for a worker."""
    token = new_token().int
    return UUID(int=token & ~(0xF << 76) | _SHORT_LIVED << 76)


def is_short_lived(worker: str) -> bool:
    """Whether this is the id of a guarded process that consumes nothing."""
    token = token_of(worker)
    return token is not None and token.version == _SHORT_LIVED


def is_stranger(worker: str) -> bool:
    """Whether whoever has this id is not guarded, as far as its id tells."""
    token = token_of(worker)
    return token is None or token.version not in (_WORKER, _SHORT_LIVED)


def name_of(worker: str) -> str:
    """Return the name of the session of whoever has this id.

    A guarded worker's is the hex of its id: by that a leader knows one of ours that it has forgotten.
    """
    token = token_of(worker)
    return token.hex if token is not None and token.version == _WORKER else worker


def worker_of(name: str) -> str:
    """Return the id in Redis of the worker whose session has this name."""
    try:
        return str(UUID(hex=name)) if len(name) == 32 else name
    except ValueError:
        return name
