"""Groups with a completion callback, and the barrier in Redis that counts their members.

The ledger counts the members too. Each end names its group, and a message that waited for the group
is recorded as its continuation, under an id derived from the group. So a lost barrier is restored,
and the waiting messages are sent once, by any process that finds the group complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID

import redis
from dramatiq import Message, pipeline
from dramatiq.broker import MessageProxy
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend

from jobguard.adapter import refuse_ended_member
from jobguard.adapters.dramatiq.layout import counted_key, finish_key
from jobguard.adapters.dramatiq.producer import continuing
from jobguard.adapters.dramatiq.run import current_run
from jobguard.clients import address_of
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.scripts import text_of

if TYPE_CHECKING:
    from dramatiq.brokers.redis import RedisBroker

    from jobguard.adapter import Tracker
    from jobguard.model import Refused


_uncounted: ContextVar[bool] = ContextVar("jobguard_dramatiq_uncounted", default=False)
"""True if the group that starts here is counted only by Dramatiq."""


class Joins:
    """The groups of one guarded broker."""

    def __init__(self, tracker: Tracker, broker: RedisBroker) -> None:
        self._tracker = tracker
        self._broker = broker
        self._adopted: list[tuple[Any, Any, str, Any]] = []

    def adopt(self) -> None:
        """Replace the barriers of the middleware that counts members."""
        for middleware in self._broker.middleware:
            if not isinstance(middleware, GroupCallbacks):
                continue
            backend = middleware.rate_limiter_backend
            if isinstance(backend, Barriers):
                continue
            self._put(middleware, "rate_limiter_backend", Barriers(self._tracker, backend))
            hook = self._after_process_message(middleware.after_process_message)
            self._put(middleware, "after_process_message", hook)

    def _put(self, owner: Any, name: str, ours: Any) -> None:
        self._adopted.append((owner, owner.__dict__.get(name), name, ours))
        setattr(owner, name, ours)

    def release(self) -> None:
        """Restore the original barriers."""
        while self._adopted:
            owner, before, name, ours = self._adopted.pop()
            if owner.__dict__.get(name) is not ours:
                continue
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def of(self, message: MessageProxy) -> str | None:
        """Return the group of a message, if something waits for that group."""
        join = message.options.get("group_completion_uuid")
        return join if join and message.options.get("group_completion_callbacks") else None

    def ended_before(self, message: MessageProxy, token: UUID) -> Refused | None:
        """Return the refusal of a member that was pushed again only to be counted; None for others."""
        join = self.of(message)
        try:
            if join is None or not self._broker.client.exists(finish_key(join)):
                return None
        except redis.RedisError:  # the finish key is in this Redis, and is lost with it
            return None
        return refuse_ended_member(self._tracker, token)

    def finish(self, message: MessageProxy) -> None:
        """Send the callbacks of a group if a leader marked it complete; this member ended before."""
        join = self.of(message)
        if join is None:
            return
        # If this fails, a leader tries again.
        with contain_errors("finish_group", group=join):
            client: Any = self._broker.client
            if client.getdel(finish_key(join)) is None:
                return
            log_event("group_continued", group=join)
            with continuing(join), self._tracker.batch(unheard=True):
                for callback in message.options["group_completion_callbacks"]:
                    self._broker.enqueue(Message(**callback))

    def _after_process_message(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap GroupCallbacks.after_process_message: its messages continue the group, all or none."""

        @wraps(original)
        def hook(broker: Any, message: MessageProxy, *args: Any, **kwargs: Any) -> Any:
            join = self.of(message)
            if join is None:
                return original(broker, message, *args, **kwargs)
            with continuing(join), self._tracker.batch(unheard=True):
                return original(broker, message, *args, **kwargs)

        return hook


class Barriers:
    """Backend of a rate limiter, with barriers that count each member once."""

    def __init__(self, tracker: Tracker, backend: Any) -> None:
        self._tracker = tracker
        self._backend = backend
        self._open = self._count = None
        if isinstance(backend, RedisBackend):
            self._open = backend.client.register_script(text_of(__package__, "open.lua"))
            self._count = backend.client.register_script(text_of(__package__, "count.lua"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def add(self, key: str, value: int, ttl: int) -> bool:
        """Create a barrier; Group.run calls this before it sends the first member."""
        if _uncounted.get():
            return bool(self._backend.add(key, value, ttl))
        redis_ = self._open is not None
        at = address_of(self._backend.client) if redis_ else type(self._backend).__name__
        state = json.dumps({"at": at, "ttl": ttl})
        self._tracker.open_join(key, value, state.encode())
        try:
            if self._open is None:
                return bool(self._backend.add(key, value, ttl))
            return bool(self._open(keys=[key, counted_key(key)], args=[value, ttl]))
        except BaseException:
            self._tracker.close_join(key)
            raise

    def decr(self, key: str, amount: int, minimum: int, ttl: int) -> bool:
        """Count the member that runs here; return False if it was the last one."""
        run = current_run()
        if self._count is not None and run is not None and run.join == key:
            answer = self._count(keys=[key, counted_key(key)], args=[run.job_id, ttl])
            if answer != b"plain":
                return bool(answer != b"cleared")
        return bool(self._backend.decr(key, amount, minimum, ttl))


def _has_duplicates(members: Sequence[Any]) -> bool:
    """Return True if a group has a message twice: members are counted by id, so it would count once."""
    last = [each.messages[-1] if isinstance(each, pipeline) else each for each in members]
    ids = [getattr(message, "message_id", None) for message in last]
    return len(set(ids)) < len(ids)


def run_group(tracker_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap group.run: all its messages are one record."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            guard = tracker_of(self.broker)
            if guard is None:
                return original(self, *args, **kwargs)
            guard.joins.adopt()
            before = _uncounted.set(_has_duplicates(self.children))
            try:
                with guard.tracker.batch():
                    return original(self, *args, **kwargs)
            finally:
                _uncounted.reset(before)

        return hook

    return make
