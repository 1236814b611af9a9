"""The simulated site: one ledger, one Redis with a queue library, and the network to both.

The ledger and the Redis are the fakes of the unit tests. Every call to them passes ``Site.call``, where the
network may refuse it, delay it, execute it and lose the answer, or execute it after the caller gave up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import redis

from jobguard.adapter import Source
from jobguard.errors import StoreUnavailable
from jobguard.model import (
    Backlog,
    Delivery,
    Observation,
    OpenJoin,
    Owed,
    Part,
    Presence,
    Recorded,
    Restorable,
    Restored,
)
from jobguard.settings import Settings
from tests.fakes.store import MemoryLedger
from tests.fakes.world import FakeRedis
from tests.simulation.kernel import EPOCH, Kernel, Process

NAMESPACE = "simulation"
INSTALLATION = "simulated"
ADDRESS = "localhost:6379/0"
QUEUE = "mail"
TASK = "send"

SETTINGS = Settings(
    namespace=NAMESPACE,
    installation=INSTALLATION,
    beat_interval=1.0,
    worker_timeout=4.0,
    pulse_interval=0.5,
    sweep_interval=12.0,
    grace=2.0,
    loss_grace=0.5,
    lease=3.0,
    push_deadline=2.0,
    retry_interval=0.5,
    crash_backoff=(0.0, 1.0, 2.0),
    brake_count=100_000,
    brake_share=1e9,
)


_LONG_READS = 0.1
"""The share of the reads in whose middle the leader looks after the pulse and the beats."""
_REGISTERED = 10.0
"""Seconds after which the library forgets a worker that takes nothing."""


class Line(StrEnum):
    """The state of the network between a process and a store."""

    UP = "up"
    DOWN = "down"
    """Every call fails at once."""
    HANGS = "hangs"
    """No call is answered, and none is executed."""
    LOSSY = "lossy"
    """Some answers are lost, and some calls are executed after the caller gave up."""


@dataclass(slots=True)
class Entry:
    """A message of the library in Redis."""

    token: UUID
    job_id: str
    place: Presence
    due_at: float | None = None
    holder: str = ""
    """The worker that has taken it."""


@dataclass
class Shelf:
    """The library's data in Redis."""

    entries: dict[object, Entry] = field(default_factory=dict)
    """By job id if the library keeps one body per job id, else by token and copy."""
    queue: list[object] = field(default_factory=list)
    consumers: dict[str, float] = field(default_factory=dict)
    """When each worker last took a message: its entry expires."""

    def remove(self, key: object) -> None:
        """Delete a message, wherever it is."""
        self.entries.pop(key, None)
        self.queue = [one for one in self.queue if one != key]


class Site:
    """Everything that outlives a process."""

    def __init__(self, kernel: Kernel, *, one_body: bool) -> None:
        self.kernel = kernel
        self.source = Source(NAMESPACE, "fake", ADDRESS, one_body=one_body)
        self.ledger = MemoryLedger(clock=self.wall)
        self.redis = SimulatedRedis(self)
        self.shelf = Shelf()
        self.postgres, self.broker = Line.UP, Line.UP
        self.lines: dict[tuple[str, str], Line] = {}
        """Of single processes, by name and store, in addition to the state of the store."""
        self.network = Process("network")
        self.traps: list[tuple[str, bool]] = []
        """Steps at which the next caller dies: the name of the call, and whether it is executed."""
        self._saved: tuple[Any, ...] | None = None

    def wall(self) -> float:
        """Return the time of both servers."""
        return EPOCH + self.kernel.now

    def call(self, process: Process, store: str, name: str, work: Callable[[], Any]) -> Any:
        """Make one call of a process to a store."""
        kernel = self.kernel
        kernel.point()
        self._die(process, name, executed=False)
        line = self.line(process, store)
        error, patience = _failure(store, name)
        if line is Line.DOWN:
            raise error
        if line is Line.HANGS:
            kernel.wait(patience)
            raise error
        if line is Line.LOSSY and (draw := kernel.random.random()) < 0.3:
            if draw < 0.1:  # executed, and the answer is lost
                work()
            elif draw < 0.2:  # executed late
                kernel.start(self.network, partial(self._late, process, store, work), "late")
            kernel.wait(patience)
            raise error
        answer = work()
        self._die(process, name, executed=True)
        kernel.point()
        return answer

    def _die(self, process: Process, name: str, *, executed: bool) -> None:
        """Kill the caller if it stands at a step that a fault has chosen."""
        if (name, executed) in self.traps:
            self.traps.remove((name, executed))
            self.kernel.kill(process)

    def _late(self, process: Process, store: str, work: Callable[[], Any]) -> None:
        self.kernel.wait(0.1 + self.kernel.random.random())
        if self.line(process, store) not in (Line.DOWN, Line.HANGS):
            try:
                work()
            except (StoreUnavailable, redis.RedisError):
                pass
            except Exception as error:  # nobody is there to receive the refusal
                if not type(error).__module__.startswith("jobguard"):
                    raise

    def line(self, process: Process, store: str) -> Line:
        """Return the state of the network between this process and this store."""
        whole = self.postgres if store == "postgres" else self.broker
        own = self.lines.get((process.name, store), Line.UP)
        for state in (Line.DOWN, Line.HANGS, Line.LOSSY):
            if state in (whole, own):
                return state
        return Line.UP

    # -- what happens to Redis -----------------------------------------------------------------------

    def flush(self) -> None:
        """Delete all data of Redis."""
        self.redis.flushall()
        self.shelf = Shelf()

    def save(self) -> None:
        """Write a snapshot of Redis."""
        self._saved = copy.deepcopy(
            (self.shelf, self.redis.hashes, self.redis.strings, self.redis.streams)
        )

    def restart(self) -> None:
        """Restart Redis from the last snapshot, if there is one."""
        saved = copy.deepcopy(self._saved)
        self.flush()
        self.redis.flushes = 0
        self.redis.run_id = uuid4().hex
        self.redis.started_at = self.wall()
        if saved is not None:
            (self.shelf, self.redis.hashes, self.redis.strings, self.redis.streams) = saved

    def evict(self) -> None:
        """Delete one message, if there is one."""
        waiting = [key for key in self.shelf.queue if key in self.shelf.entries]
        if not waiting:
            return
        self.shelf.remove(self.kernel.random.choice(waiting))
        self.redis.evicted += 1


def _failure(store: str, name: str) -> tuple[Exception, float]:
    if store == "postgres":
        return StoreUnavailable(f"{name}: Postgres is away"), SETTINGS.call_timeout
    return redis.ConnectionError(f"{name}: Redis is away"), SETTINGS.redis_timeout


class SimulatedRedis(FakeRedis):
    """The server."""

    def __init__(self, site: Site) -> None:
        super().__init__(_Clock(site))  # type: ignore[arg-type]
        self._site = site
        self._last_id = 0
        self.streams: dict[str, dict[bytes, tuple[bytes, list[str]]]] = {}

    def flushall(self) -> None:
        """Delete all data."""
        super().flushall()
        self.streams.clear()

    def set(self, key: str, value: object, ex: int | None = None) -> bool:
        """Set a string."""
        self.strings[key] = str(value).encode()
        return True

    def get(self, key: str) -> bytes | None:
        """Return a string."""
        return self.strings.get(key)

    def getex(self, key: str, px: int) -> bytes | None:
        """Return a string, which does not expire within a run."""
        return self.get(key)

    def exists(self, key: str) -> int:
        """Return 1 if this string exists and has not expired."""
        return int(float(self.strings.get(key, b"0")) > self._site.wall())

    def hget(self, key: str, field: str) -> bytes | None:
        """Return one field of a hash."""
        return self.hmget(key, [field])[0]

    def hmget(self, key: str, fields: Sequence[str | bytes]) -> list[bytes | None]:
        """Return some fields of a hash."""
        return [self.hashes.get(key, {}).get(_text(field)) for field in fields]

    def hgetall(self, key: str) -> dict[bytes, bytes]:
        """Return no hash: all sources are in the ledger from the beginning."""
        return {}

    def xlen(self, key: str) -> int:
        """Return the length of a stream."""
        return len(self.streams.get(key, ()))

    def xrange(self, key: str, min: bytes, count: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Return the entries after an id."""
        entries = self.streams.get(key, {})
        after = b"" if min == b"-" else min[1:]
        found = [(id, {b"c": content}) for id, (content, _) in entries.items() if id > after]
        return found[:count]

    def script_load(self, text: str) -> str:
        """Accept one of the scripts of the stream; its first words are its name."""
        return text.split(".")[0]

    def evalsha(self, sha: str, keys: int, *given: Any) -> Any:
        """Do the work of a script of the stream."""
        stream, notes, args = given[0], given[2], given[keys:]
        if sha.startswith("-- Add"):
            self.strings[given[3]] = str(self._site.wall() + float(args[1]) / 1e3).encode()
            ids = list(self._added(stream, notes, list(args[6:])))
            count = int(self.strings.get(given[5], b"0")) + len(ids)
            self.strings[given[5]] = str(count).encode()
            return [*ids, count]
        entries = self.streams.get(stream, {})
        found = [entries.pop(id, None) for id in args[1:]]
        for entry in found:
            for noted in () if entry is None else entry[1]:
                self.hashes.get(notes, {}).pop(noted, None)
        return sum(entry is not None for entry in found)

    def _added(self, stream: str, notes: str, entries: list[Any]) -> Iterator[bytes]:
        while entries:
            content, _, count = entries[:3]
            noted, entries = entries[3 : 3 + 2 * count], entries[3 + 2 * count :]
            fields = [_text(field) for field in noted[::2]]
            texts = [text.encode() if isinstance(text, str) else text for text in noted[1::2]]
            self._last_id += 1
            id = f"{self._last_id:012}".encode()
            self.streams.setdefault(stream, {})[id] = (content, fields)
            self.hashes.setdefault(notes, {}).update(zip(fields, texts, strict=True))
            yield id

    def delete(self, *keys: str) -> int:
        """Delete keys."""
        return sum(self.strings.pop(key, None) is not None for key in keys)

    def ping(self) -> bool:
        """Answer."""
        return True


def _text(field: str | bytes) -> str:
    return field.decode() if isinstance(field, bytes) else field


class _Clock:
    def __init__(self, site: Site) -> None:
        self._site = site

    def wall(self) -> float:
        return self._site.wall()


class Client:
    """A client of Redis in one process."""

    def __init__(self, site: Site, process: Process) -> None:
        self._site = site
        self._process = process
        self.connection_pool = _Pool()

    def __getattr__(self, name: str) -> Any:
        def command(*arguments: Any, **options: Any) -> Any:
            return self._site.call(
                self._process,
                "redis",
                name,
                lambda: getattr(self._site.redis, name)(*arguments, **options),
            )

        return command

    def pipeline(self, transaction: bool = True) -> Pipeline:
        """Collect commands, and send them together."""
        return Pipeline(self._site, self._process)

    def close(self) -> None:
        """Close nothing."""


class Pipeline:
    """Commands that travel together."""

    def __init__(self, site: Site, process: Process) -> None:
        self._site = site
        self._process = process
        self._commands: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def command(*arguments: Any, **options: Any) -> Pipeline:
            self._commands.append((name, arguments, options))
            return self

        return command

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Execute all of them."""

        def work() -> list[Any]:
            return [getattr(self._site.redis, n)(*a, **o) for n, a, o in self._commands]

        answers: list[Any] = self._site.call(self._process, "redis", "pipeline", work)
        return answers

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.clear()


class _Pool:
    def disconnect(self, **_: Any) -> None:
        """Keep no connection."""


class Store:
    """A store of the ledger in one process."""

    def __init__(self, site: Site, process: Process, inner: Any) -> None:
        self._site = site
        self._process = process
        self._inner = inner
        self.installation = INSTALLATION

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)

        def statement(*arguments: Any, **options: Any) -> Any:
            return self._site.call(
                self._process, "postgres", name, lambda: found(*arguments, **options)
            )

        return statement

    def record_beside(self, source: int, delivery: Delivery, **how: Any) -> Callable[[], Recorded]:
        """Send a record that is committed while its caller goes on; see HostStore."""
        site, kernel, process = self._site, self._site.kernel, self._process
        answers: list[Any] = []

        def commit() -> None:
            kernel.wait(0.05 * kernel.random.random() ** 2)
            if (
                process.alive or kernel.random.random() < 0.5
            ):  # the statement was sent, or it was not
                try:
                    begun = site.call(
                        site.network,
                        "postgres",
                        "record_beside",
                        lambda: self._inner.record_beside(source, delivery, **how),
                    )
                    answers.append(begun())
                except StoreUnavailable as error:
                    answers.append(error)

        kernel.point()
        if site.line(process, "postgres") is Line.DOWN:
            raise StoreUnavailable("record_beside: Postgres is away")
        kernel.start(site.network, commit, "record")

        def answer() -> Recorded:
            until = kernel.now + SETTINGS.call_timeout
            cut = site.line(process, "postgres") is Line.HANGS
            while (cut or not answers) and kernel.now < until:
                kernel.wait(0.01)
            if cut or not answers or isinstance(answers[0], Exception):
                raise StoreUnavailable("record_beside: Postgres is away")
            recorded: Recorded = answers[0]
            return recorded

        return answer

    def conninfo(self) -> None:
        """Return no address: another process cannot reach this store."""

    def identity(self) -> Mapping[str, str | None]:
        """Return the identity of the ledger, with the name of the installation."""
        found: Mapping[str, str | None] = self._site.call(
            self._process, "postgres", "identity", self._inner.identity
        )
        return {**found, "name": INSTALLATION}

    def close(self) -> None:
        """Close nothing."""


class Library:
    """The queue library in one process: its commands, each one atomic in Redis."""

    def __init__(self, site: Site, process: Process) -> None:
        self._site = site
        self._process = process

    def _call(self, name: str, work: Callable[[Shelf], Any]) -> Any:
        return self._site.call(self._process, "redis", name, lambda: work(self._site.shelf))

    def ping(self) -> None:
        """Reach Redis."""
        self._call("ping", lambda _shelf: None)

    def push(self, token: UUID, job_id: str, due_at: float | None) -> None:
        """Push a message."""
        entry = Entry(token, job_id, Presence.WAITING, due_at=due_at)
        self._call("push", lambda shelf: put(shelf, self._site, entry))

    def _seen(self, shelf: Shelf) -> None:
        shelf.consumers[self._process.name] = self._site.kernel.now

    def take(self) -> tuple[object, Entry] | None:
        """Take the next message."""

        def work(shelf: Shelf) -> tuple[object, Entry] | None:
            self._seen(shelf)
            now = self._site.wall()
            for key in shelf.queue:
                entry = shelf.entries.get(key)
                delayed = entry is not None and entry.due_at is not None and entry.due_at > now
                if entry is None or (delayed and self._site.source.one_body):
                    continue
                shelf.queue.remove(key)
                entry.place, entry.holder = Presence.RUNNING, self._process.name
                return key, copy.copy(entry)
            return None

        found: tuple[object, Entry] | None = self._call("take", work)
        return found

    def ack(self, key: object, token: UUID) -> None:
        """Acknowledge a message: it is done."""

        def work(shelf: Shelf) -> None:
            entry = shelf.entries.get(key)
            if entry is not None and entry.token == token and entry.holder == self._process.name:
                del shelf.entries[key]

        self._call("ack", work)

    def delete(self, job_id: str) -> None:
        """Delete the waiting messages of a job."""

        def work(shelf: Shelf) -> None:
            for key, entry in list(shelf.entries.items()):
                if entry.job_id == job_id and entry.place is Presence.WAITING:
                    shelf.remove(key)

        self._call("delete", work)

    def redeliver(self, holder: str, only: object = None) -> None:
        """Put back what a consumer took, all of it or one message."""

        def work(shelf: Shelf) -> None:
            for key, entry in shelf.entries.items():
                if (
                    entry.place is Presence.RUNNING
                    and entry.holder == holder
                    and only in (None, key)
                ):
                    entry.place, entry.holder = Presence.WAITING, ""
                    shelf.queue.append(key)

        self._call("redeliver", work)


def delivery(entry: Entry) -> Delivery:
    """Return the record of a message, as the message shows it."""
    return Delivery(
        token=entry.token,
        job_id=entry.job_id,
        queue=QUEUE,
        task=TASK,
        envelope=b"bytes",
        due_at=entry.due_at,
    )


def put(shelf: Shelf, site: Site, entry: Entry) -> None:
    """Store a message in the library's queue."""
    key: object = entry.job_id if site.source.one_body else (entry.token, uuid4())
    if key in shelf.entries and key in shelf.queue:
        shelf.queue.remove(key)
    shelf.entries[key] = entry
    shelf.queue.append(key)


class Broker:
    """The library in the reconciler; see jobguard.adapter.Broker."""

    def __init__(self, site: Site, process: Process) -> None:
        self._site = site
        self._process = process
        self._pause: Callable[[], None] = lambda: None

    def pause_with(self, work: Callable[[], None]) -> None:
        """Call this in the middle of long reads."""
        self._pause = work

    def _call(self, name: str, work: Callable[[Shelf], Any]) -> Any:
        return self._site.call(self._process, "redis", name, lambda: work(self._site.shelf))

    def presence(self, page: Sequence[Owed]) -> Mapping[UUID, Observation]:
        """Return where these are."""
        found: Mapping[UUID, Observation] = self._call(
            "presence", lambda shelf: {owed.token: self._observed(shelf, owed) for owed in page}
        )
        if self._site.kernel.random.random() < _LONG_READS:
            self._pause()
        return found

    def _observed(self, shelf: Shelf, owed: Owed) -> Observation:
        found = [entry for entry in shelf.entries.values() if entry.token == owed.token]
        waiting = [entry for entry in found if entry.place is Presence.WAITING]
        if waiting:
            return Observation(Presence.WAITING, "waiting")
        if found:
            return Observation(Presence.RUNNING, "running", taken_by=found[0].holder)
        other = shelf.entries.get(owed.job_id) if self._site.source.one_body else None
        if other is not None:
            return Observation(Presence.OVERWRITTEN, f"other:{other.token}", other=other.token)
        return Observation(Presence.ABSENT, "absent", bodiless=True)

    def restore(
        self, deliveries: Sequence[Restorable], *, deadline: float
    ) -> Mapping[UUID, Restored]:
        """Restore these, each one atomically."""
        return {
            given.token: self._call("restore", partial(self._restore, given, deadline))
            for given in deliveries
        }

    def _restore(self, given: Restorable, deadline: float, shelf: Shelf) -> Restored:
        if self._site.wall() > deadline:
            return Restored.TOO_LATE
        found = {
            key: entry
            for key, entry in shelf.entries.items()
            if entry.token == given.token
            or (self._site.source.one_body and entry.job_id == given.job_id)
        }
        for key, entry in found.items():
            if entry.token != given.token:
                if entry.token not in given.replaces:
                    return Restored.CHANGED
            elif entry.place is not Presence.RUNNING or not (
                given.takeover or entry.holder == given.taken_by
            ):
                return Restored.PRESENT
            shelf.remove(key)
        if not given.running:
            put(
                shelf,
                self._site,
                Entry(given.token, given.job_id, Presence.WAITING, due_at=given.due_at),
            )
        return Restored.RESTORED

    def abandon(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Change nothing: the library keeps no other record of a run."""

    def bury(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Delete the messages of these."""

        def work(shelf: Shelf) -> None:
            tokens = {owed.token for owed in page}
            for key, entry in list(shelf.entries.items()):
                if entry.token in tokens:
                    shelf.remove(key)

        self._call("bury", work)

    def report(
        self, dead: Sequence[Restorable], *, deadline: float, all_of_them: bool = False
    ) -> None:
        """Tell no worker: this library has no failure handlers."""

    def hide(self, page: Sequence[Owed]) -> None:
        """Undo nothing."""

    def rejoin(self, joins: Sequence[OpenJoin], *, finish: bool, deadline: float) -> None:
        """Count nothing: this library has no joins."""

    def parts(self, ended: Sequence[Restorable]) -> Mapping[UUID, Part]:
        """Return no parts."""
        return {}

    def discard(self, page: Sequence[Owed], *, erase: bool = False) -> None:
        """Delete the messages of these that wait."""
        self.bury(page, deadline=0.0)

    def backlog(
        self, queues: Collection[str], *, after: str = "", limit: int, mark: bool
    ) -> Backlog:
        """Return all messages that wait."""

        def work(shelf: Shelf) -> Backlog:
            waiting = [e for e in shelf.entries.values() if e.place is Presence.WAITING]
            return Backlog([delivery(entry) for entry in waiting])

        found: Backlog = self._call("backlog", work)
        return found

    def consumers(self) -> Mapping[str, frozenset[str]]:
        """Return the workers that Redis knows."""

        def work(shelf: Shelf) -> frozenset[str]:
            since = self._site.kernel.now - _REGISTERED
            return frozenset(name for name, at in shelf.consumers.items() if at > since)

        found: frozenset[str] = self._call("consumers", work)
        return {QUEUE: found}


class Adapter:
    """Makes the brokers of a reconciler."""

    library = "fake"

    def __init__(self, site: Site, process: Process) -> None:
        self._site = site
        self._process = process

    def broker(self, source: Source, client: redis.Redis) -> Broker:
        """Return the broker of the one source."""
        return Broker(self._site, self._process)
