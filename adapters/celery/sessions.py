"""The guarded workers of this process, and the sessions that its children use.

A worker opens its session before its pool starts, in its main process. That process beats for all
its children. Celery's own table (``active_requests``) shows which tasks the children may be
running. A child claims and reports by itself, in the session of the main process: a forked child
has inherited the session, a spawned one gets its id with every task. So a child also gets the new
id after its worker was declared dead and registered again.

Several workers in threads of one process share one session, which has the name of the first. Each of
them is announced by itself. The session ends with the last of them.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID
from weakref import WeakKeyDictionary

from celery.concurrency import get_implementation, prefork
from celery.worker import state

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.announce import announcement, leave
from jobguard.adapters.celery.envelope import TOKEN, WORKER, token_of
from jobguard.fork import OwnerProcess

if TYPE_CHECKING:
    from jobguard.adapter import Session, Tracker
    from jobguard.adapters.celery.unacked import Unacked


CONTENT = "jobguard-content"
"""The content type of the body, as the main process passes it to its children."""
QUEUE = "jobguard-queue"
"""The queue of the task. With a named exchange, the routing key has another name."""
FANOUT = "jobguard-fanout"
"""On the message of a broadcast: every worker runs a copy of its own, and no ledger has it."""
_ANNOUNCE = 4.0
"""Seconds between two announcements."""
_HANDED = 10.0
"""Seconds within which a child certainly confirms a task that was given to it."""
_numbers = itertools.count()


@dataclass(slots=True)
class Working:
    """One guarded worker of this process."""

    controller: Any
    """Celery's WorkController."""
    tracker: Tracker
    session: Session = field(init=False)
    queues: list[str] = field(default_factory=list)
    number: int = field(default_factory=_numbers.__next__)
    """Tells it from the other workers of its session."""
    owner: OwnerProcess = field(default_factory=OwnerProcess)
    handed: WeakKeyDictionary[Any, float] = field(default_factory=WeakKeyDictionary)
    """Requests with the time at which they were given to the pool."""
    last: set[UUID] = field(default_factory=set)
    """Deliveries that a cold shutdown has killed: they stay claimed until the worker leaves."""
    announcer: Callable[[UUID], None] | None = None
    """Announces this worker, once it has a session."""
    announced: float = -math.inf
    unacked: Unacked | None = None
    """The messages that it has taken, if jobguard fixes the library."""

    def open(self) -> None:
        """Open the session and begin to beat, or share the session of the other workers of this process."""
        controller, source = self.controller, self.tracker.source.id
        self.queues = self._consumed()
        self.session = self.tracker.open_session(
            name=controller.hostname,
            queues=self.queues,
            lists=lambda: {token for one in _here.get(source, ()) for token in one.lists()},
            apart=not _slots_of(controller),
            serves=_slots_of(controller),
        )
        self._introduce()
        self.announce()

    def follow(self) -> None:
        """Publish the queues that the worker consumes now. Only in the main thread; see announcement."""
        before, self.queues = self.queues, self._consumed()
        if self.queues != before:
            # A queue that the worker leaves stays in its beats until Redis does not name the worker
            # there any more: otherwise the worker would count as an unguarded consumer of that
            # queue.
            self.report([*before, *self.queues])
            self._introduce()
            self.announced = -math.inf

    def report(self, queues: Iterable[str]) -> None:
        """Report these queues, and those of the other workers of the session."""
        others = [one for one in _current(self.tracker) if one is not self]
        more = [queue for other in others for queue in other.queues]
        self.session.consumes(list(dict.fromkeys([*queues, *more])))

    def _consumed(self) -> list[str]:
        return [queue.name for queue in self.controller.app.amqp.queues.consume_from.values()]

    def _introduce(self) -> None:
        """Set the announcement to the queues of now: first in Redis, and then in the beats."""
        controller, queues = self.controller, self.queues
        announce_now = announcement(
            controller.app, name=controller.hostname, queues=queues, number=self.number
        )

        def announcer(session: UUID) -> None:
            if announce_now is None or announce_now(session):
                self.report(queues)

        self.announcer = announcer

    def announce(self) -> None:
        """Announce this worker in the broker's Redis, if the last announcement is old enough."""
        now = time.monotonic()
        if self.announcer is not None and now - self.announced >= _ANNOUNCE:
            self.announced = now
            self.announcer(self.session.id)

    def lists(self) -> Iterable[UUID]:
        """Return the deliveries that children may be running; called at every beat, from the beat's thread.

        This method must not use anything that kombu caches: a child forked at that moment would get
        a lock that stays locked.
        """
        if self.owner.is_current:  # a child that beats has claimed nothing itself
            self.announce()
            if self.unacked is not None:
                self.unacked.refresh()
        running = {
            token for request in self._with_children() if (token := token_of_request(request))
        }
        return running | self.last

    def backlog(self) -> set[str]:
        """Return the tags of messages that this process will run itself, although its connection is gone.

        In that case Celery clears the backlog of a prefork pool, and of no other pool. A request whose run
        Celery has cancelled may live on in a cycle of references.
        """
        if self._has_children():
            return set()
        return {
            request.message.delivery_tag
            for request in snapshot(self.handed)
            if not getattr(request, "_already_cancelled", False)
        }

    def consumes_by(self, connection: Any) -> bool:
        """Return True if this connection of kombu belongs to our consumer."""
        consumer = getattr(self.controller, "consumer", None)
        return consumer is not None and consumer.connection is connection

    def hand(self, request: Any) -> None:
        """Add to a request the headers that its child needs to claim it."""
        self.handed[request] = time.monotonic()
        headers = request.request_dict
        headers[WORKER], headers[CONTENT] = self.session.id.hex, request.content_type
        of_message = getattr(request.message, "__dict__", {})
        if queue := of_message.get(QUEUE):
            headers[QUEUE] = queue
        if of_message.get(FANOUT):
            headers[FANOUT] = True
        if (token := token_of_request(request)) is not None:
            headers[TOKEN] = token.hex  # protocol 1 has no token where a child would read it

    def handed_over(self, tag: str) -> bool:
        """Return True if the message of this tag was given to the pool as a request."""
        return any(request.message.delivery_tag == tag for request in snapshot(self.handed))

    def _has_children(self) -> bool:
        return isinstance(getattr(self.controller, "pool", None), prefork.TaskPool)

    def _with_children(self) -> Iterator[Any]:
        if not self._has_children():
            return  # it runs its claims itself, and they are already in flight in this process
        for request in snapshot(state.active_requests):
            if _is_there(request.worker_pid):
                yield request
        now = time.monotonic()
        for request, at in snapshot(self.handed.items()):
            if now - at < _HANDED and request.worker_pid is None:
                yield request


_here: dict[int, Sequence[Working]] = {}
"""By source: the workers of this process; in a forked child, those of its parent."""
_live: Counter[int] = Counter()
"""By source: the number of tasks that run in this process itself."""
_inherited: dict[int, Session] = {}
_lock = threading.RLock()


def _current(tracker: Tracker) -> list[Working]:
    """Return the workers of this process itself."""
    return [one for one in _here.get(tracker.source.id, ()) if one.owner.is_current]


def _everywhere() -> Iterator[Working]:
    """Yield the workers of all sources."""
    return itertools.chain.from_iterable(list(_here.values()))


def begin(controller: Any) -> Working | None:
    """Open the session of a worker that is about to start; return None if it is open already."""
    tracker = lookup.tracker_for(controller.app)
    if tracker is None:
        return None
    with _lock:
        others = _current(tracker)
        if any(one.controller is controller for one in others):
            return None
        working = Working(controller, tracker)
        working.open()
        _here[tracker.source.id] = [*others, working]
        return working


def end(controller: Any) -> None:
    """End a worker: all its tasks have ended, or are back in their queue, or are released now.

    The session closes with the last worker of this process. If threads still run a task then, the process
    goes on with them, and the session closes at its exit.
    """
    with _lock:
        working = working_of(controller)
        if working is None:
            return
        source = working.tracker.source.id
        others = [one for one in _current(working.tracker) if one is not working]
        if not others and _live[source]:
            return
        _here[source] = others
        leave(controller.app, session=working.session.id, number=working.number)
        working.session.close()
        if not others:
            del _here[source]
            return
        others[0].report(others[0].queues)
        if working.unacked is not None:
            working.unacked.refresh()  # what it leaves there has the mark of a session that goes on


def forget(tracker: Tracker) -> None:
    """Forget a source that is no longer guarded: its tracker has closed, or closes, its session."""
    _here.pop(tracker.source.id, None)
    _inherited.pop(tracker.source.id, None)


def working_of(controller: Any) -> Working | None:
    """Return the guarded worker of this process that has this controller of Celery."""
    mine = (one for one in _everywhere() if one.owner.is_current)
    return next((one for one in mine if one.controller is controller), None)


def working_for(app: Any) -> Working | None:
    """Return this process' own guarded worker of an app, or else one that shares the session with it."""
    tracker = lookup.tracker_for(app)
    workers = [] if tracker is None else _current(tracker)
    return next((one for one in workers if one.controller.app is app), next(iter(workers), None))


def is_worker() -> bool:
    """Return True if this process itself is a guarded worker."""
    return any(working.owner.is_current for working in _everywhere())


def consuming(connection: Any) -> Working | None:
    """Return the worker of this process that consumes by this connection of kombu."""
    for working in _everywhere():
        if working.consumes_by(connection):
            return working if working.owner.is_current else None
    return None


def session_for(tracker: Tracker, request: Any) -> Session | None:
    """Return the session that claims this task: that of this process, or that of its parent."""
    working = next(iter(_here.get(tracker.source.id, ())), None)
    if working is not None and working.owner.is_current:
        return working.session
    worker_hex = request.get(WORKER)
    if not isinstance(worker_hex, str):
        return None if working is None else working.session
    worker = UUID(hex=worker_hex)
    if working is not None and working.session.id == worker:
        return working.session
    return _of_parent(tracker, worker, request)


def _of_parent(tracker: Tracker, worker: UUID, request: Any) -> Session:
    known = _inherited.get(tracker.source.id)
    if known is None or known.id != worker:
        known = tracker.inherit_session(worker, os.getppid(), name=request.hostname, queues=())
        _inherited[tracker.source.id] = known
    return known


def own(session: Session) -> list[Working]:
    """Return the workers of this process that have this session; none if the parent beats for it."""
    mine = [one for one in _everywhere() if one.owner.is_current]
    return [one for one in mine if one.session is session]


def count(tracker: Tracker, change: int) -> None:
    """Add this change to the number of tasks that run in this process."""
    with _lock:
        _live[tracker.source.id] += change


def children() -> Iterator[Session]:
    """Yield the sessions that this process, as a child, has used."""
    yield from _inherited.values()
    yield from (one.session for one in _everywhere() if not one.owner.is_current)


def token_of_request(request: Any) -> UUID | None:
    """Return the token of a request of the main process."""
    return token_of(request.request_dict) or token_of(getattr(request.message, "headers", None))


def queue_of(request: Any) -> str:
    """Return the queue of a task, from its worker's header, or else from its message."""
    return request.get(QUEUE) or (request.delivery_info or {}).get("routing_key") or ""


def _slots_of(controller: Any) -> bool:
    """Return True if tasks run in children; without children, a C call of one task can stop every beat."""
    pool = get_implementation(controller.pool_cls)
    return isinstance(pool, type) and issubclass(pool, prefork.TaskPool)


def _is_there(pid: int | None) -> bool:
    if not pid:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def snapshot(of: Iterable[Any]) -> list[Any]:
    """Copy a collection that another thread may be changing."""
    while True:
        try:
            return list(of)
        except RuntimeError:
            continue
