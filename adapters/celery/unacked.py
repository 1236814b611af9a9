"""The messages of a worker in ``unacked``: marked with the worker's session, and renewed while it lives.

kombu moves the messages that a worker has taken to the hash ``unacked``, without the name of the worker.
If the worker dies, its messages stay there for the visibility timeout, an hour by default. A guarded
worker writes its session into each message that it puts there, where a leader reads it. A message
without a token, from an unguarded program, gets one, so that it stays the same delivery each time it is
put back.

kombu redelivers a message that was not acknowledged for ``visibility_timeout``, even if its worker
waits for the task's ETA, or still runs it. The fence refuses that second run, but not while
Postgres is away. So a guarded worker writes at its beats that its messages were taken just now:
that is the meaning of the time in ``unacked_index``.

Celery forgets the messages that it had taken by a connection that broke. kombu would put them back,
but Redis is away at that moment. They stay in ``unacked`` for the rest of the visibility timeout,
under the name of a live worker. So the worker reports that it dropped them, and a leader puts them
back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import redis
from celery.app.task import Task
from kombu.serialization import prepare_accept_content
from kombu.transport.redis import QoS, Transport

from jobguard.adapters.celery import killed_runs, sessions
from jobguard.adapters.celery.connection import client_of
from jobguard.adapters.celery.envelope import TOKEN, WORKER, token_of
from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.push import TIMEOUT
from jobguard.adapters.celery.sessions import Working, snapshot
from jobguard.clients import own_client
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import DROPPED_BY_LIVE_WORKER, Outcome, new_token
from jobguard.patching import Hooks
from jobguard.scripts import Script, chunks

if TYPE_CHECKING:
    from uuid import UUID

    from jobguard.adapter import Source

Hook = Callable[..., Any]

_FROM = "_jobguard_from"
_SHARE = 4
"""The part of the visibility timeout after which the times are renewed: a fourth."""
_CHUNK = 1000  # so many tags at a time do not block other clients


def put_on(hooks: Hooks) -> None:
    """Mark the messages that this process' workers take, and see those that they acknowledge."""
    hooks.put(QoS, "append", append)
    hooks.put(QoS, "ack", ack)
    hooks.put(Transport, "_deliver", deliver)


def deliver(original: Hook) -> Hook:
    """Transport._deliver: note the queue of a message, which kombu does not write into the message."""

    @wraps(original)
    def hook(self: Any, message: Any, queue: Any) -> Any:
        vars(self)[_FROM] = queue
        return original(self, message, queue)

    return hook


def append(original: Hook) -> Hook:
    """QoS.append: a message was popped off its queue, and is now written into ``unacked``."""

    @wraps(original)
    def hook(self: Any, message: Any, delivery_tag: Any) -> Any:
        with contain_errors("mark a message with the session of this worker"):
            _mark(self, message)
        try:
            return original(self, message, delivery_tag)
        except BaseException:
            with contain_errors("note a message that this worker may have taken"):
                _note_uncertain(self, delivery_tag)
            raise

    return hook


def ack(original: Hook) -> Hook:
    """QoS.ack: the end of a task that a custom strategy runs outside of the worker's pool.

    Such a strategy (that of celery-batches) acknowledges messages without a run that asks for a
    claim.
    """

    @wraps(original)
    def hook(self: Any, delivery_tag: Any) -> Any:
        headers = None
        with contain_errors("read an acknowledged message"):
            headers = _outside_of_pool(self, delivery_tag)
        result = original(self, delivery_tag)
        if headers is not None:
            with contain_errors("report an acknowledged message"):
                _report(self, headers)
        return result

    return hook


def _outside_of_pool(qos: Any, tag: Any) -> dict[str, Any] | None:
    """Return the headers of a task that its own strategy has taken and not given to the pool."""
    headers = getattr(qos._delivered.get(tag), "headers", None)
    if not isinstance(headers, dict) or token_of(headers) is None:
        return None
    working = sessions.consuming(qos.channel.connection.client)
    if working is None:
        return None
    task = working.controller.app.tasks.get(headers.get("task"))
    if task is None or task.Strategy == Task.Strategy or working.handed_over(tag):
        return None
    return headers


def _report(qos: Any, headers: dict[str, Any]) -> None:
    working, token = sessions.consuming(qos.channel.connection.client), token_of(headers)
    if working is not None and token is not None:
        killed_runs.report(working, token, Outcome.COMPLETED, job_id=str(headers.get("id") or ""))


def _mark(qos: Any, message: Any) -> None:
    working = sessions.consuming(qos.channel.connection.client)
    headers = message.headers
    if working is None or not isinstance(headers, dict):
        return
    queue = vars(qos.channel.connection).get(_FROM)
    vars(message)[sessions.QUEUE] = queue
    fanout = vars(message)[sessions.FANOUT] = queue in qos.channel._fanout_queues
    if working.unacked is not None:
        working.unacked.add(qos)
    if token_of(headers) is None and not fanout:
        if not _is_a_task(message, working.controller.app.conf.accept_content):
            return
        headers[TOKEN] = new_token().hex
    headers[WORKER] = working.session.id.hex
    message._raw["headers"] = headers


def _note_uncertain(qos: Any, tag: str) -> None:
    working = sessions.consuming(qos.channel.connection.client)
    if working is not None and working.unacked is not None:
        working.unacked.add_uncertain(qos, tag)


def _is_a_task(message: Any, accepted: Any) -> bool:
    """Return True if Celery takes this for a task, by its headers, or with protocol 1 by its body.

    ``accepted``: the content types that the worker accepts. kombu sets them only after this moment, and
    keeps what is decoded.
    """
    if "task" in message.headers:
        return True
    try:
        message.accept = prepare_accept_content(accepted)
        body = message.decode()
    except Exception:  # Celery is about to report any such error itself
        return False
    return isinstance(body, dict) and "task" in body


@dataclass(slots=True)
class _Taken:
    """The messages that one channel has taken."""

    connection: Any
    """Its connection. A second channel of the same connection does not count as later."""
    since: float = field(default_factory=time.time)  # kombu uses the same clock
    uncertain: set[str] = field(default_factory=set)


class Unacked:
    """The messages that one worker has taken and not acknowledged."""

    def __init__(
        self,
        app: Any,
        source: Source,
        *,
        session: Callable[[], UUID],
        is_ours: Callable[[Any], bool],
        runs: Callable[[], set[str]],
    ) -> None:
        """Take the worker's connection and its questions.

        ``is_ours``: whether the worker still consumes by a connection of kombu. ``runs``: the tags
        of messages that it will run although their connection is lost.
        """
        self._client: Any = own_client(client_of(app.connection_for_read()), timeout=TIMEOUT)
        self._report_dropped = Script(self._client, __package__, "let_go.lua")
        self._layout = Layout.parse(source.prefix)
        self._session = session
        self._is_ours = is_ours
        self._runs = runs
        self._by_channel: dict[QoS, _Taken] = {}
        self._dropped: set[str] = set()
        self._timeout = math.inf
        self._renewed = time.monotonic()

    def add(self, qos: QoS) -> None:
        """Remember where kombu keeps its taken messages; called in kombu's own thread."""
        if qos not in self._by_channel:
            self._timeout = float(qos.visibility_timeout)
            self._by_channel[qos] = _Taken(qos.channel.connection.client)

    def add_uncertain(self, qos: QoS, tag: str) -> None:
        """Note a message whose move to ``unacked`` failed: Redis may have done it."""
        self._by_channel[qos].uncertain.add(tag)

    def drop(self, tag: str) -> None:
        """Stop renewing a message that Celery dropped; after the timeout any worker may take it."""
        self._dropped.add(tag)

    def refresh(self) -> None:
        """Renew the times if that is due, and report dropped messages. From any thread; raise nothing."""
        try:
            for qos, taken in snapshot(self._by_channel.items()):
                if not self._is_open(qos):
                    self._report_lost(qos, taken)
            now = time.monotonic()
            if now - self._renewed >= self._timeout / _SHARE:
                self._renewed = now
                self._renew()
        except redis.RedisError as error:
            log_event("unacked_not_renewed", error=error)

    def _renew(self) -> None:
        """Write that all of these messages were taken just now."""
        at = time.time()
        qos = filter(self._is_open, snapshot(self._by_channel))
        unacked = {tag for each in qos for tag in snapshot(each._delivered)}
        self._dropped &= unacked
        tags = sorted(unacked - self._dropped)
        for some in chunks(tags, _CHUNK):
            self._client.zadd(self._layout.unacked_index, dict.fromkeys(some, at), xx=True)

    def _report_lost(self, qos: QoS, taken: _Taken) -> None:
        """Report a lost connection's messages as dropped, at every beat until Redis takes it."""
        now = time.time()  # taken before the later connections are read
        others = [
            one
            for one in snapshot(self._by_channel.values())
            if one.connection is not taken.connection
        ]
        later = min((one.since for one in others if one.since > taken.since), default=now)
        tags = {*snapshot(qos._delivered), *taken.uncertain}
        running = tags & self._runs()
        keys = (self._layout.unacked, self._layout.unacked_index)
        arguments = (self._session().hex, DROPPED_BY_LIVE_WORKER, repr(later))
        lost = sorted(tags - running)
        answers = self._report_dropped.run(
            [(keys, (*arguments, *some)) for some in chunks(lost, _CHUNK)]
        )
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        if not running:
            self._by_channel.pop(qos, None)

    def _is_open(self, qos: Any) -> bool:
        channel = qos.channel
        return not channel.closed and self._is_ours(getattr(channel.connection, "client", None))


def attach(working: Working) -> None:
    """Have a worker renew its messages, if jobguard fixes the library."""
    if working.tracker.mends_library:
        working.unacked = Unacked(
            working.controller.app,
            working.tracker.source,
            session=lambda: working.session.id,
            is_ours=working.consumes_by,
            runs=working.backlog,
        )
