"""The keys of Celery on kombu's Redis transport.

==============================  =========================================================
``<queue>``                     list of messages: pushed at the head, taken from the tail
``<queue><sep><step>``          the same of a lower priority; 0 is the highest, and has no suffix
``unacked``                     hash of taken messages: tag to ``[message, exchange, key]``
``unacked_index``               zset of those tags by the time of the taking
``_kombu.binding.<exchange>``   set of ``routing key, pattern, queue``, joined by the separator
``celery-task-meta-<id>``       the result of a task, if the results are in a Redis
``celery-taskset-meta-<gid>``   of a chord: ``.s`` its size, ``.j`` the results so far, and more
==============================  =========================================================

All keys but the results begin with ``global_keyprefix``. Our own keys:

==============================  =========================================================
``jobguard:celery:restored``    zset of tokens put back lately, by the time in microseconds
``jobguard:celery:workers``     zset of guarded workers (session.number) by the time of their announcement
``jobguard:celery:about``       hash of the same: worker to its description, and the places of results
==============================  =========================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import parse_qsl, urlencode

BINDING_SEP = "\x06\x16"


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of the keys of one broker. The fields are named as kombu's transport options."""

    global_keyprefix: str = ""
    sep: str = BINDING_SEP
    priority_steps: tuple[int, ...] = (0, 3, 6, 9)
    unacked_key: str = "unacked"
    unacked_index_key: str = "unacked_index"
    fanout_prefix: str = "/{db}."

    def __str__(self) -> str:
        """Return the layout as the prefix of a source: empty if all options are kombu's defaults."""
        unusual = {
            f.name: _text(value)
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default
        }
        return urlencode(unusual)

    @classmethod
    def parse(cls, prefix: str) -> Layout:
        """Return the layout that a source's prefix describes."""
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {k: v for k, v in parse_qsl(prefix, keep_blank_values=True)}
        if "priority_steps" in given:
            given["priority_steps"] = tuple(map(int, given["priority_steps"].split(".")))
        return cls(**{name: value for name, value in given.items() if name in known})

    def list_of(self, queue: str, step: int = 0) -> str:
        """Return the key of a queue's list of this step."""
        suffix = f"{self.sep}{step}" if step else ""
        return f"{self.global_keyprefix}{queue}{suffix}"

    def lists_of(self, queues: Iterable[str]) -> list[str]:
        """Return the keys of all the lists of these queues."""
        return [self.list_of(queue, step) for queue in queues for step in self.priority_steps]

    @property
    def unacked(self) -> str:
        """The key of the hash of the messages that workers have taken."""
        return self.global_keyprefix + self.unacked_key

    @property
    def unacked_index(self) -> str:
        """The key of the zset of the messages that workers have taken."""
        return self.global_keyprefix + self.unacked_index_key

    def binding(self, exchange: str) -> str:
        """Return the key of an exchange's table."""
        return f"{self.global_keyprefix}_kombu.binding.{exchange}"

    def fanout(self, exchange: str, db: int) -> str:
        """Return the channel of a fanout exchange."""
        return f"{self.global_keyprefix}{self.fanout_prefix.format(db=db)}{exchange}"

    @property
    def restored(self) -> str:
        """The key of the zset of the tokens that were put back lately."""
        return f"{self.global_keyprefix}jobguard:celery:restored"

    @property
    def workers(self) -> str:
        """The key of the zset of guarded workers."""
        return f"{self.global_keyprefix}jobguard:celery:workers"

    @property
    def about(self) -> str:
        """The key of the hash that describes the guarded workers."""
        return f"{self.global_keyprefix}jobguard:celery:about"


def _text(value: object) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)
