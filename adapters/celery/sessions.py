"""Who works here: the session of this process' worker, and who speaks for it in its children.

A worker opens its session before its pool starts, in its main process, which beats for all its
children. What they may be running it knows from Celery's own books (``active_requests``). A child
claims and reports by itself, in the name of the main process' session: a forked one has inherited
it, a spawned one is told its id with every task; and so it hears of it when its worker was taken
for dead, and has begun anew.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID
from weakref import WeakKeyDictionary

from celery.concurrency import get_implementation, prefork
from celery.worker import state

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.announce import announcement, leave
from jobguard.adapters.celery.header import TOKEN, WORKER, token_of
from jobguard.adapters.celery.unacked import Unacked, snapshot

if TYPE_CHECKING:
    from jobguard.adapter import Session, Tracker

log = logging.getLogger("jobguard")

CONTENT = "jobguard-content"
"""Of which kind the body was, in what the main process tells its children of a task."""
QUEUE = "jobguard-queue"
"""The same: from which queue it came. Its routing key is another name where a named exchange is used."""
_ANNOUNCE = 4.0
"""Seconds between two announcements."""
_HANDED = 10.0
"""Seconds within which a child surely says that it has taken what was handed to it."""


@dataclass(slots=True)
class Working:
    """One guarded worker of this process."""

    controller: Any
    """Celery's WorkController."""
    tracker: Tracker
    session: Session = field(init=False)
    queues: list[str] = field(default_factory=list)
    pid: int = field(default_factory=os.getpid)
    handed: WeakKeyDictionary[Any, float] = field(default_factory=WeakKeyDictionary)
    """Requests by when they were given to the pool."""
    last: set[UUID] = field(default_factory=set)
    """Deliveries that a cold shutdown has killed: ours until the goodbye."""
    tell: Callable[[UUID], None] | None = None
    """Makes us known, once we are."""
    announced: float = -math.inf
    unacked: Unacked | None = None
    """What it has taken, if the others are to leave it to us."""
    live: int = 0
    """Tasks that run in this very process."""

    def open(self) -> None:
        """Begin to beat."""
        controller = self.controller
        self.queues = self._consumed()
        self.session = self.tracker.open_session(
            name=controller.hostname,
            queues=self.queues,
            lists=self.lists,
            apart=not _slots_of(controller),
            serves=_slots_of(controller),
        )
        if self.tracker.mends_library:
            self.unacked = Unacked(
                controller.app,
                self.tracker.source,
                session=lambda: self.session.id,
                is_ours=self.consumes_by,
                runs=self.backlog,
            )
        self._introduce()
        self.announce()

    def follow(self) -> None:
        """Have all who are told hear which queues it consumes now. In the main thread; see announcement."""
        before, self.queues = self.queues, self._consumed()
        if self.queues != before:
            # What it leaves stays in its beats until Redis does not name it there any more: it would
            # be taken for an unguarded worker of that queue.
            self.session.consumes(list(dict.fromkeys([*before, *self.queues])))
            self._introduce()
            self.announced = -math.inf

    def _consumed(self) -> list[str]:
        return [queue.name for queue in self.controller.app.amqp.queues.consume_from.values()]

    def _introduce(self) -> None:
        """Have it say from now on what it consumes now: in Redis, and then in its beats."""
        controller, queues = self.controller, self.queues
        headers = announcement(controller.app, name=controller.hostname, queues=queues)

        def tell(session: UUID) -> None:
            if headers is None or headers(session):
                self.session.consumes(queues)

        self.tell = tell

    def announce(self) -> None:
        """Say in the broker's Redis that we are there, if that was some time ago."""
        now = time.monotonic()
        if self.tell is not None and now - self.announced >= _ANNOUNCE:
            self.announced = now
            self.tell(self.session.id)

    def lists(self) -> Iterable[UUID]:
        """What children of this process may be running; asked at every beat, from its thread.

        Nothing that kombu keeps may be asked for here: it would be locked in a child forked just then.
        """
        if self.pid == os.getpid():  # a child that beats holds nothing
            self.announce()
            if self.unacked is not None:
                self.unacked.tend()
        running = {token for request in self._with_children() if (token := token_in(request))}
        return running | self.last

    def backlog(self) -> set[str]:
        """The tags of what this process will run by itself, though its connection is gone.

        Celery clears the backlog of a prefork pool then, and of no other.
        """
        if self._has_children():
            return set()
        return {request.message.delivery_tag for request in snapshot(self.handed)}

    def consumes_by(self, connection: Any) -> bool:
        """Whether this connection of kombu's is that of our consumer."""
        consumer = getattr(self.controller, "consumer", None)
        return consumer is not None and consumer.connection is connection

    def hand(self, request: Any) -> None:
        """Tell whoever will run this request what it must know to claim it."""
        self.handed[request] = time.monotonic()
        headers = request.request_dict
        headers[WORKER], headers[CONTENT] = self.session.id.hex, request.content_type
        if queue := getattr(request.message, "__dict__", {}).get(QUEUE):
            headers[QUEUE] = queue
        if (token := token_in(request)) is not None:
            headers[TOKEN] = token.hex  # protocol 1 has none where a child would look for it

    def handed_over(self, tag: str) -> bool:
        """Whether the message of this tag was given to the pool as a request."""
        return any(request.message.delivery_tag == tag for request in snapshot(self.handed))

    def _has_children(self) -> bool:
        return isinstance(getattr(self.controller, "pool", None), prefork.TaskPool)

    def _with_children(self) -> Iterator[Any]:
        if not self._has_children():
            return  # it runs what it claims itself, and lists that by itself
        for request in snapshot(state.active_requests):
            if _is_there(request.worker_pid):
                yield request
        now = time.monotonic()
        for request, at in snapshot(self.handed.items()):
            if now - at < _HANDED and request.worker_pid is None:
                yield request


_here: dict[int, Working] = {}
"""By source: the workers of this process; in a forked child, of its parent."""
_inherited: dict[int, Session] = {}
_lock = threading.Lock()


def begin(controller: Any) -> None:
    """Open the session of a worker that is about to start, once."""
    tracker = lookup.tracker_for(controller.app)
    if tracker is None:
        return
    with _lock:
        working = _here.get(tracker.source.id)
        if working is None or working.pid != os.getpid() or working.controller is not controller:
            working = Working(controller, tracker)
            working.open()
            _here[tracker.source.id] = working


def end(tracker: Tracker) -> None:
    """Say goodbye: all has ended, or is back in its queue, or is nobody's from now on.

    Threads that still run a task go on, and the process with them: then it is its exit that does this.
    """
    working = _here.get(tracker.source.id)
    if working is not None and working.pid == os.getpid() and not working.live:
        del _here[tracker.source.id]
        leave(working.controller.app, session=working.session.id)
        working.session.close()


def forget(tracker: Tracker) -> None:
    """This source is no longer guarded: its tracker has closed, or closes, its session."""
    _here.pop(tracker.source.id, None)
    _inherited.pop(tracker.source.id, None)


def working_for(app: Any) -> Working | None:
    """Return this process' own guarded worker of an app."""
    tracker = lookup.tracker_for(app)
    working = None if tracker is None else _here.get(tracker.source.id)
    return working if working is not None and working.pid == os.getpid() else None


def is_worker() -> bool:
    """Whether this very process is a guarded worker."""
    return any(working.pid == os.getpid() for working in _here.values())


def consuming(connection: Any) -> Working | None:
    """Return the worker of this process that consumes by this connection of kombu's."""
    for working in _here.values():
        if working.consumes_by(connection):
            return working if working.pid == os.getpid() else None
    return None


def session_for(tracker: Tracker, request: Any) -> Session | None:
    """Return the session that claims this task: this process', or that of its parent."""
    working = _here.get(tracker.source.id)
    if working is not None and working.pid == os.getpid():
        return working.session
    headers = request.get(WORKER)
    if not isinstance(headers, str):
        return None if working is None else working.session
    worker = UUID(hex=headers)
    if working is not None and working.session.id == worker:
        return working.session
    return _of_parent(tracker, worker, request)


def _of_parent(tracker: Tracker, worker: UUID, request: Any) -> Session:
    known = _inherited.get(tracker.source.id)
    if known is None or known.id != worker:
        known = tracker.inherit_session(worker, os.getppid(), name=request.hostname, queues=())
        _inherited[tracker.source.id] = known
    return known


def own(session: Session) -> Working | None:
    """Return the worker of this very process that beats for a session; None: it is the parent's."""
    mine = (one for one in _here.values() if one.pid == os.getpid())
    return next((one for one in mine if one.session is session), None)


def count(working: Working, change: int) -> None:
    """One more, or less, of its tasks runs in this process."""
    with _lock:
        working.live += change


def children() -> Iterator[Session]:
    """Return the sessions in whose name this process, a child, has spoken."""
    yield from _inherited.values()
    yield from (one.session for one in _here.values() if one.pid != os.getpid())


def token_in(request: Any) -> UUID | None:
    """Return the token of a request of the main process."""
    return token_of(request.request_dict) or token_of(getattr(request.message, "headers", None))


def _slots_of(controller: Any) -> bool:
    """Whether tasks will run in children: else a C call of one of them can stop every beat."""
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
