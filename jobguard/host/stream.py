"""The stream of a source in its guarded Redis: what Postgres could not take, safe from the process.

Every process that cannot reach Postgres adds its entries here, and the leader writes them to
Postgres in order (`jobguard.reconciler.stream_drain`). A process that outlives the outage also
writes its own entries itself, and deletes them here; an entry that is written twice changes nothing.

Keys, in the source's own db:

- ``jobguard:spool:<namespace>:<library>[:<prefix>]`` (stream): the entries; ``c`` is the content
  (see stream_entries.py), ``t`` the field of a note.
- ``….bytes`` (string): its size. ``….ended`` (hash): notes about the entries. An end notes its
  outcome under the token of its delivery. A cancel notes it under the tokens that it means, and its
  own time under ``cancelled:id:<job id>`` and ``cancelled:queue:<queue>``. A record notes its parent
  under ``after:<token>``, because what follows a cancelled delivery must not run, and its own token
  under ``replaced:<parent>``, because the parent must not run or be replaced again. A worker asks for
  the notes before it starts what Postgres does not decide, or may not know all about yet.
- ``….away:<host>`` (string, some seconds): Postgres is away for that host. A process that starts
  there need not find out by a wait.
- ``….of:<process>`` (string, two minutes): how many entries a process has added. If Redis does not know,
  or knows of fewer, it has lost entries, and the process adds all that it still has once more.
- ``jobguard:spool-sources`` (hash, a week): the sources that have a stream, by their ids. A source
  whose first process started in an outage is not in the ledger: the leader registers it from here.

The stream is bounded. At its bound, new records become references: the leader makes the records
from the jobs in Redis. At twice the bound it takes no more, and entries stay in the memory of their
processes.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import redis

from jobguard.adapter import Source
from jobguard.fork import OwnerProcess
from jobguard.host.spool import Adoptable, Cancelled, Entry, is_adoptable
from jobguard.host.stream_entries import decode_parent, encode, encode_parent
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import Delivery, End, Outcome, Parent, new_token
from jobguard.redis_values import json_in, number_in
from jobguard.scripts import Script
from jobguard.store.protocols import SourceRow

if TYPE_CHECKING:
    from uuid import UUID

    from jobguard.pulse import Kept

_SOURCES = "jobguard:spool-sources"
_AWAY = 10_000
"""Milliseconds after the last entry of a host for which a new process there expects an outage."""
_COUNTED = 120_000
"""Milliseconds for which Redis keeps the count of a process that neither adds nor asks."""
_ASK_EVERY = 1.0
"""Seconds between two questions whether Redis has lost entries."""
_OVERHEAD = 100
"""Bytes that Redis needs for an entry beside its content, about."""
_AT_ONCE = 500
"""The maximum number of entries in one call."""
_MOST_NOTES = 1_000
"""The maximum number of notes of one entry; a script of Redis cannot pass many more to one command."""


def stream_key(source: Kept) -> str:
    """Return the key of a source's stream. It has no address, as the key of the pulse."""
    key = f"jobguard:spool:{source.namespace}:{source.library}"
    return f"{key}:{source.prefix}" if source.prefix else key


class Notes(NamedTuple):
    """What waits in the stream about a delivery, and is not in Postgres yet."""

    outcome: Outcome | None = None
    """How it ended. What replaces a cancelled delivery, or one that another replaced, ends so as well."""
    parent: Parent | None = None
    """The delivery that it replaces."""


class ReportStream:
    """One source's stream. No method raises; what could not be done is in the answer."""

    def __init__(
        self,
        source: Source,
        client: Callable[[], redis.Redis],
        *,
        bound: int,
        settings: str = "",
        away: Callable[[], bool] = lambda: False,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the stream.

        ``settings``: what the source's processes must agree on. ``away``: return True if Redis is known
        not to answer; ``failed``: note that it did not.
        """
        self._key = stream_key(source)
        self._id = str(source.id)
        self._description = json.dumps({**_described(source), "settings": settings})
        self._make = client
        self._bound = bound
        self._is_away = away
        self._failed = failed
        self._owner = OwnerProcess()
        self._client: Any = None
        self._full = False
        self._process, self._count = "", 0
        self._lost = False
        self._ask_at = 0.0

    def append(self, entries: Sequence[Entry]) -> list[bytes] | None:
        """Add these entries; return their ids, or None if not all of them are surely there."""
        ids: list[bytes] = []
        for start in range(0, len(entries), _AT_ONCE):
            some = entries[start : start + _AT_ONCE]
            args: list[Any] = [self._bound, _AWAY, _OVERHEAD, self._id, self._description]
            args.append(_COUNTED)
            for entry in some:
                notes = _notes(entry)
                args += (encode(entry), _shorter(entry), len(notes), *chain.from_iterable(notes))
            found = self._ask(partial(self._add, args))
            if found is None:
                return None
            self._note_full(not found)
            if not found:
                return None
            ids += found
        self._note_full(False)
        return ids

    def _add(self, args: Sequence[Any]) -> list[bytes]:
        self._redis()
        before = self._count
        *ids, count = self._run("stream_append.lua", args) or [before]
        self._compare(count, before + len(ids))
        return ids

    def has_lost(self) -> bool:
        """Return True once if Redis has lost entries of this process that no leader has drained."""
        if self._client is not None:
            self._ask(self._count_again)
        lost, self._lost = self._lost, False
        return lost

    def _count_again(self) -> None:
        self._redis()
        before, now = self._count, time.monotonic()
        if before and now >= self._ask_at:
            self._ask_at = now + _ASK_EVERY
            self._compare(number_in(self._redis().getex(self._count_key, px=_COUNTED)) or 0, before)

    def _compare(self, count: int, least: int) -> None:
        """Compare the count in Redis with what it was at least, before another thread added more."""
        if count < least:
            self._lost, self._count = True, count
        else:
            self._count = max(self._count, count)

    @property
    def _count_key(self) -> str:
        return f"{self._key}.of:{self._process}"

    def forget(self, ids: Sequence[bytes]) -> int:
        """Delete these entries, which Postgres has; return how many were surely deleted now."""
        deleted = 0
        for start in range(0, len(ids), _AT_ONCE):
            args = [_OVERHEAD, *ids[start : start + _AT_ONCE]]
            found = self._ask(partial(self._run, "stream_forget.lua", args))
            deleted += found if isinstance(found, int) else 0
        return deleted

    def notes_of(self, delivery: Delivery) -> Notes:
        """Return what the entries of the stream say of this delivery; nothing if Redis is away."""
        cancels = (("id", delivery.job_id), ("queue", delivery.queue))
        fields: list[str | bytes] = [
            delivery.token.hex,
            _replaced(delivery.token),
            _after(delivery),
        ]
        fields += [_cancel_field(*one) for one in cancels]
        ended, successor, after, *until = self._notes_in(fields)
        parent = delivery.parent or (None if after is None else decode_parent(after))
        before = (parent or delivery).token
        if ended is None and parent is not None:
            ended, successor = self._notes_in((before.hex, _replaced(before)))
            completed = parent.outcome is Outcome.SUPERSEDED and ended == b"completed"
            if not completed and ended != b"cancelled":
                ended = None  # the parent has ended in order that this delivery runs
        if ended is not None:
            return Notes(Outcome(ended.decode()), parent)
        # A delivery that was sent after the cancel is a new life of the job.
        if any(one is not None and before.hex <= one.decode() for one in until):
            return Notes(Outcome.CANCELLED, parent)
        if successor is not None and successor.decode() != delivery.token.hex:
            return Notes(Outcome.SUPERSEDED, parent)
        return Notes(None, parent)

    def late_retries(self, deliveries: Sequence[Delivery]) -> frozenset[UUID]:
        """Return the retries of runs without a claim whose job another run has completed since.

        In an outage of Postgres the library may deliver a job twice. A retry whose record came before the
        report of the other run would supersede the completed job.
        """
        retries = [one for one in deliveries if one.parent is not None and one.parent.claim == 0]
        if not retries:
            return frozenset()
        parents = [one.parent.token.hex for one in retries if one.parent is not None]
        ended = zip(retries, self._notes_in(parents), strict=True)
        return frozenset(one.token for one, outcome in ended if outcome == b"completed")

    def _notes_in(self, fields: Sequence[str | bytes]) -> Sequence[bytes | None]:
        found = self._ask(lambda: self._redis().hmget(f"{self._key}.ended", fields))
        return found if isinstance(found, list) else [None] * len(fields)

    def length(self) -> tuple[int, int] | None:
        """Return the number of entries and their bytes; None: Redis does not answer."""
        found = self._ask(self._length)
        return cast("tuple[int, int] | None", found)

    def postgres_is_away(self) -> bool:
        """Return True if another process of this host found Postgres away, some seconds ago at most."""
        return bool(self._ask(lambda: self._redis().exists(self._away_key)))

    def postgres_is_back(self) -> None:
        """Note that a process of this host reaches Postgres."""
        self._ask(lambda: self._redis().delete(self._away_key))

    def read(self, after: bytes, limit: int) -> Sequence[tuple[bytes, bytes]]:
        """Return the ids and contents of the entries after this one. Raises RedisError."""
        start = b"(" + after if after else b"-"
        entries = self._redis().xrange(self._key, min=start, count=limit)
        return [(id, fields.get(b"c", b"")) for id, fields in entries]

    @property
    def _away_key(self) -> str:
        return f"{self._key}.away:{socket.gethostname()}"

    def _length(self) -> tuple[int, int]:
        with self._redis().pipeline(transaction=False) as pipe:
            pipe.xlen(self._key)
            pipe.get(f"{self._key}.bytes")
            entries, size = pipe.execute()
        return int(entries), int(size or 0)

    def _run(self, name: str, args: Sequence[Any]) -> Any:
        self._redis()
        keys = [self._key, f"{self._key}.bytes", f"{self._key}.ended"]
        keys += [self._away_key, _SOURCES, self._count_key]
        (answer,) = self._scripts[name].run([(keys, args)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _redis(self) -> Any:
        self._owner.take_over(self._renew)
        if self._client is None:
            self._renew()
        return self._client

    def _renew(self) -> None:
        client = self._make()
        self._process, self._count = new_token().hex, 0
        names = ("stream_append.lua", "stream_forget.lua")
        self._scripts = {name: Script(client, __package__, name) for name in names}
        self._client = client  # last: another thread that finds it also finds the scripts

    def _ask(self, work: Callable[[], Any]) -> Any:
        """Return the answer of Redis; None if it does not answer, or refuses."""
        if self._is_away():
            return None
        with contain_errors("stream", let_pass=redis.RedisError):
            try:
                return work()
            except (redis.ConnectionError, redis.TimeoutError):
                self._failed()
            except redis.RedisError as error:  # it is full, read-only, or refuses access
                log_event("stream_refused", error=str(error))
        return None

    def _note_full(self, full: bool) -> None:
        if full and not self._full:
            log_event("stream_full", bytes=2 * self._bound)
        self._full = full


def _described(source: Source) -> dict[str, Any]:
    names = ("namespace", "library", "address", "prefix", "name", "one_body")
    return {name: getattr(source, name) for name in names}


def sources_with_streams(client: Any) -> list[SourceRow]:
    """Return the sources that have, or had, a stream in this Redis. Raises RedisError.

    A description that does not fit its id, or that a later version wrote, is left out.
    """
    found = []
    for id, description in client.hgetall(_SOURCES).items():
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            fields = json_in(description)
            settings = str(fields.pop("settings"))
            source = Source(**fields)
            if source.id == number_in(id):
                found.append(SourceRow(source.id, **_described(source), settings=settings))
    return found


def _shorter(entry: Entry) -> bytes:
    """Return the reference that stands for a record past the bound."""
    if isinstance(entry, Delivery) and is_adoptable(entry):
        return encode(Adoptable(entry.token, entry.job_id, entry.queue))
    return b""


def _notes(entry: Entry) -> list[tuple[bytes | str, bytes | str]]:
    """Return what a worker must find by a delivery while the entry waits, as fields and texts."""
    if isinstance(entry, End):
        return [(entry.token.hex, entry.outcome.value)]
    if isinstance(entry, Delivery) and entry.parent is not None:
        return [
            (_after(entry), encode_parent(entry.parent)),
            (_replaced(entry.parent.token), entry.token.hex),
        ]
    if not isinstance(entry, Cancelled):
        return []
    tokens = {token.hex for token in (*entry.tokens, *entry.waiting)}
    meant = [("id", job_id) for job_id in entry.job_ids]
    if entry.queue is not None:
        meant.append(("queue", entry.queue))
    notes: list[tuple[bytes | str, bytes | str]] = [
        (token, Outcome.CANCELLED.value) for token in tokens
    ]
    notes += [(_cancel_field(*one), entry.until.hex) for one in meant]
    return notes[:_MOST_NOTES]


def _after(delivery: Delivery) -> str:
    return f"after:{delivery.token.hex}"


def _replaced(parent: UUID) -> str:
    return f"replaced:{parent.hex}"


def _cancel_field(kind: str, of: str) -> bytes:
    return f"cancelled:{kind}:{of}".encode("utf-8", "surrogatepass")
