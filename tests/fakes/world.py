"""A world without servers: simulated time, a Redis and a broker made of dicts, and workers that beat."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast
from uuid import UUID, uuid4

import redis

from jobguard.adapter import Source
from jobguard.errors import CannotRender
from jobguard.model import (
    Backlog,
    Beat,
    Cause,
    Claim,
    ClaimAnswer,
    Delivery,
    End,
    Ended,
    Join,
    Observation,
    OpenJoin,
    Outcome,
    Owed,
    Part,
    Presence,
    Request,
    Restorable,
    Restored,
)
from jobguard.pulse import NO_PULSE, RESET, TICK, beat_key, pulse_key
from jobguard.reconciler.source_monitor import SourceMonitor
from jobguard.redis_refusal import RedisRefuses
from jobguard.settings import Settings
from jobguard.store.protocols import (
    Brake,
    ClaimRequest,
    HostStore,
    LeaderStore,
    Signs,
    SourceRow,
    WorkerRow,
)
from tests.fakes.store import MemoryLedger

NAMESPACE = "tests"
SOURCE = Source(NAMESPACE, "fake", "localhost:6379/0")
FOR_EVER = 1e9


class Clock:
    """A clock that only moves when a test advances it; ``wall`` returns seconds since the epoch."""

    def __init__(self, at: float = 1000.0) -> None:
        self.at = at
        self._epoch = time.time() - at

    def __call__(self) -> float:
        """Return the time, as a monotonic clock does."""
        return self.at

    def wall(self) -> float:
        """Return the time, as a database does."""
        return self._epoch + self.at

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self.at += seconds


_sequence = itertools.count()


def token(at: float | None = None) -> UUID:
    """Make a token that sorts after every token made earlier for the same millisecond or before."""
    milliseconds = int((time.time() if at is None else at) * 1000)
    number = next(_sequence)
    return UUID(
        int=(milliseconds << 80)
        | 7 << 76
        | (number >> 20 & 0xFFF) << 64
        | 2 << 62
        | (number & 0xFFFFF) << 40
        | random.getrandbits(40)
    )


def delivery(job_id: str = "job", **fields: Any) -> Delivery:
    """Make a delivery of which only some fields matter."""
    given: dict[str, Any] = {
        "token": token(),
        "job_id": job_id,
        "queue": "mail",
        "task": "send",
        "envelope": b"bytes",
    }
    return Delivery(**{**given, **fields})


def request(of: Delivery | UUID, worker: UUID, **fields: Any) -> ClaimRequest:
    """Make a request for a claim."""
    given: dict[str, Any] = {
        "token": of.token if isinstance(of, Delivery) else of,
        "nonce": uuid4(),
        "worker": worker,
        "pid": 1,
        "namespace": NAMESPACE,
        "worker_timeout": 15.0,
        "crash_budget": 3,
    }
    return ClaimRequest(**{**given, **fields})


def source_row(source: Source = SOURCE, **fields: Any) -> SourceRow:
    """Make the row of a source as the database has it."""
    row = SourceRow(
        id=source.id,
        namespace=source.namespace,
        library=source.library,
        address=source.address,
        prefix=source.prefix,
        name=source.name,
        settings="",
    )
    return replace(row, **fields)


def worker_row(**fields: Any) -> WorkerRow:
    """Make the row of a worker that beats and has no claims."""
    row = WorkerRow(
        id=token(),
        name="w",
        host="h1",
        pid=1,
        queues=("mail",),
        beat=1,
        started_at=0.0,
        unflushed_since=None,
        pulse=None,
        left_age=None,
        dead=False,
        claims=0,
    )
    return replace(row, **fields)


def leader_store(ledger: MemoryLedger, holder: UUID | None = None) -> LeaderStore:
    """Return the ledger as a reconciler uses it."""
    return ledger.leader(NAMESPACE, holder or uuid4())


class FakeRedis:
    """The part of a Redis client that the reconciler uses."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.hashes: dict[str, dict[str, bytes]] = {}
        self.strings: dict[str, bytes] = {}
        self.run_id = uuid4().hex
        self.role = "master"
        self.evicted = 0
        self.flushes = 0
        self.started_at = float("-inf")
        self.error: Exception | None = None
        """The error that every command raises, if set."""
        self.info_error: Exception | None = None
        self.before_eval: Callable[[str], None] = lambda _text: None
        self.after_eval: Callable[[str], None] = lambda _text: None

    @property
    def client(self) -> redis.Redis:
        """This object, with the type of a client."""
        return cast(redis.Redis, self)

    def flushall(self) -> None:
        """Delete all data."""
        self.flushes += 1
        self.hashes.clear()
        self.strings.clear()

    def restart(self) -> None:
        """Come back empty, as another server process."""
        self.flushall()
        self.flushes = 0
        self.started_at = self.clock.wall()
        self.run_id = uuid4().hex

    def pulse(self) -> tuple[str, int] | None:
        """Return the pulse (epoch, n) that this Redis has."""
        found = self.hashes.get(pulse_key(SOURCE))
        return None if found is None else (found["epoch"].decode(), int(found["n"]))

    def set_pulse(self, **fields: object) -> None:
        """Overwrite fields of the pulse."""
        at = self.hashes.setdefault(pulse_key(SOURCE), {})
        at.update({name: str(value).encode() for name, value in fields.items()})

    def _up(self) -> None:
        if self.error is not None:
            raise self.error

    def hmget(self, key: str, fields: Sequence[str]) -> list[bytes | None]:
        """Return these fields of a hash."""
        self._up()
        found = self.hashes.get(key, {})
        return [found.get(name) for name in fields]

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return these strings."""
        self._up()
        return [self.strings.get(key) for key in keys]

    def exists(self, key: str) -> int:
        """Return 1 if there is this string."""
        self._up()
        return int(key in self.strings)

    def time(self) -> tuple[int, int]:
        """Return the time in seconds and microseconds."""
        self._up()
        at = self.clock.wall()
        return int(at), int(at % 1 * 1e6)

    def info(self, section: str = "") -> Mapping[str, Any]:
        """Return this section of information about the server, or all that Redis gives without a name."""
        self._up()
        if self.info_error is not None:
            raise self.info_error
        sections: dict[str, dict[str, Any]] = {
            "server": {
                "run_id": self.run_id,
                "uptime_in_seconds": self.clock.wall() - self.started_at,
            },
            "commandstats": {"cmdstat_flushall": {"calls": self.flushes}} if self.flushes else {},
            "replication": {"role": self.role, "master_replid": "replication"},
            "stats": {"evicted_keys": self.evicted},
        }
        usual = sections["server"] | sections["replication"] | sections["stats"]
        return sections[section] if section else usual

    def eval(self, text: str, _keys: int, key: str, *arguments: str) -> int:
        """Do the work of one of the two scripts of the pulse."""
        self._up()
        self.before_eval(text)
        scripts: dict[str, Callable[..., bool]] = {TICK: self._tick, RESET: self._reset}
        result = scripts[text](key, *arguments)
        self.after_eval(text)
        return int(result)

    def _tick(self, key: str, epoch: str, n: str, to: str) -> bool:
        found = self.hashes.get(key, {})
        if (found.get("epoch"), found.get("n")) != (epoch.encode(), n.encode()):
            return False
        found["n"] = to.encode()
        return True

    def _reset(
        self,
        key: str,
        epoch: str | bytes,
        n: str | bytes,
        new: str,
        to: str,
        source: str,
        installation: str,
    ) -> bool:
        found = self.hashes.get(key, {})
        if (found.get("epoch", b""), found.get("n", b"")) != (_bytes(epoch), _bytes(n)):
            return False
        fields = {"epoch": new, "n": to, "source": source, "installation": installation}
        self.hashes[key] = {name: value.encode() for name, value in fields.items()}
        return True


def _bytes(given: str | bytes) -> bytes:
    return given if isinstance(given, bytes) else given.encode()


OOM = "OOM command not allowed when used memory > 'maxmemory'."


@dataclass
class FakeBroker:
    """A library that keeps one body per job id, in a dict."""

    redis: FakeRedis
    bodies: dict[str, tuple[UUID, Presence]] = field(default_factory=dict)
    names: dict[str, frozenset[str]] = field(default_factory=dict)
    """The library's registry of workers, by queue."""
    pushed: list[str] = field(default_factory=list)
    """The job ids that were restored, in order."""
    taken_over: list[str] = field(default_factory=list)
    """Of these: those whose run was known to be a dead worker's."""
    abandoned: list[str] = field(default_factory=list)
    """Job ids whose run was removed from the library's lists."""
    buried: list[str] = field(default_factory=list)
    """Job ids that the library shows as failed for good."""
    joins: dict[str, Join] = field(default_factory=dict)
    """For each delayed job, the jobs that it waits for and that have ended, as far as the library
    can see."""
    released: list[str] = field(default_factory=list)
    """Job ids that were released although the library would not have released them."""
    shown: list[str] = field(default_factory=list)
    """The running jobs whose bodies were restored."""
    taken: dict[str, str] = field(default_factory=dict)
    """For each job that a worker has taken and not started, the name of the worker."""
    taken_from: list[tuple[str, str]] = field(default_factory=list)
    """Jobs that were restored from a worker that is gone, with its name."""
    left: dict[str, Part] = field(default_factory=dict)
    """The part of a completed job in a join, as the library shows it."""
    rejoined: list[tuple[str, bool]] = field(default_factory=list)
    """The joins that were restored, in order, and whether they were reported again."""
    reported: list[tuple[str, bytes]] = field(default_factory=list)
    """Dead jobs that a worker is to report to the library, with their envelopes."""
    readable: list[Delivery] = field(default_factory=list)
    """The deliveries whose records can be made from Redis, while they wait there."""
    full: int | None = None
    """Redis has room for only so many jobs; None: there is no limit."""
    tries: list[int] = field(default_factory=list)
    """How many jobs were tried at each restore."""
    before_restore: Callable[[], None] = lambda: None
    reading: Callable[[], None] = lambda: None
    """Called while this is asked for a presence: Redis takes its time."""
    _pause: Callable[[], None] = lambda: None

    def pause_with(self, work: Callable[[], None]) -> None:
        """Call this in the middle of a read; see Broker."""
        self._pause = work

    def put(self, given: Delivery, presence: Presence = Presence.WAITING) -> None:
        """Push a delivery, as the host does."""
        self.bodies[given.job_id] = (given.token, presence)

    def presence(self, page: Sequence[Owed]) -> Mapping[UUID, Observation]:
        """Return where these are; see Broker."""
        self.redis._up()
        self.reading()
        self._pause()
        return {owed.token: self._sight(owed) for owed in page}

    def _sight(self, owed: Owed) -> Observation:
        found = self.bodies.get(owed.job_id)
        if found is None:
            return Observation(Presence.ABSENT, "absent", bodiless=True)
        if found[0] != owed.token:
            return Observation(Presence.OVERWRITTEN, f"other:{found[0]}", other=found[0])
        join = self.joins.get(owed.job_id) if found[1] is Presence.SCHEDULED else None
        holder = self.taken.get(owed.job_id, "")
        return Observation(found[1], found[1].value, joins=join, taken_by=holder)

    def render(self, request: Request, token: UUID) -> Delivery:
        """Return the delivery of a request; a task named "wrong" cannot be rendered."""
        if request.task == "wrong":
            raise CannotRender("a wrong task")
        return Delivery(
            token, request.job_id, request.queue, request.task, b"rendered", key=request.key
        )

    def restore(
        self, deliveries: Sequence[Restorable], *, deadline: float
    ) -> Mapping[UUID, Restored]:
        """Restore these; see Broker."""
        self.before_restore()
        self.redis._up()
        self.tries.append(len(deliveries))
        if self.full is not None:
            result = {g.token: self._restore(g, deadline) for g in deliveries[: self.full]}
            self.full -= len(result)
            if len(result) < len(deliveries):
                raise RedisRefuses(OOM, result)
            return result
        return {given.token: self._restore(given, deadline) for given in deliveries}

    def _restore(self, given: Restorable, deadline: float) -> Restored:
        if self.redis.clock.wall() > deadline:
            return Restored.TOO_LATE
        found = self.bodies.get(given.job_id)
        if given.running:
            if found is not None:
                return Restored.PRESENT
            self.bodies[given.job_id] = (given.token, Presence.RUNNING)
            self.shown.append(given.job_id)
            return Restored.RESTORED
        if given.released and found == (given.token, Presence.SCHEDULED):
            self.bodies[given.job_id] = (given.token, Presence.WAITING)
            self.released.append(given.job_id)
            return Restored.RESTORED
        if found is not None and given.taken_by and self.taken.get(given.job_id) == given.taken_by:
            self.taken_from.append((given.job_id, self.taken.pop(given.job_id)))
            found = None
        if found is not None:
            if found[0] == given.token and not given.takeover:
                return Restored.PRESENT
            if found[0] != given.token and found[0] not in given.replaces:
                return Restored.CHANGED
        self.bodies[given.job_id] = (given.token, Presence.WAITING)
        self.pushed.append(given.job_id)
        if given.takeover:
            self.taken_over.append(given.job_id)
        return Restored.RESTORED

    def abandon(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Remove the runs of dead workers from the library's lists."""
        self.abandoned += [owed.job_id for owed in page]

    def bury(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Show these as failed for good."""
        self.buried += [owed.job_id for owed in page]

    def report(
        self, dead: Sequence[Restorable], *, deadline: float, all_of_them: bool = False
    ) -> None:
        """Give these to a worker to report; see Broker."""
        self.reported += [(one.job_id, one.envelope) for one in dead]

    def hide(self, page: Sequence[Owed]) -> None:
        """Remove the bodies of ended jobs."""
        for owed in page:
            self.bodies.pop(owed.job_id, None)

    def discard(self, page: Sequence[Owed], *, erase: bool = False) -> None:
        """Remove the bodies of cancelled jobs."""
        self.hide(page)

    def rejoin(self, joins: Sequence[OpenJoin], *, finish: bool, deadline: float) -> None:
        """Restore the counts of joins; see Broker."""
        self.redis._up()
        self.rejoined += [(join.id, finish) for join in joins]

    def parts(self, ended: Sequence[Restorable]) -> Mapping[UUID, Part]:
        """Return the parts that the test has set; see Broker."""
        return {
            given.token: self.left[given.job_id] for given in ended if given.job_id in self.left
        }

    def backlog(
        self, queues: Collection[str], *, after: str = "", limit: int, mark: bool
    ) -> Backlog:
        """Return the waiting jobs that the test has set as readable; see Broker."""
        self.redis._up()
        waiting = [
            given
            for given in self.readable
            if given.queue in queues and self.bodies.get(given.job_id, ("",))[0] == given.token
        ]
        at = int(after or 0)
        rest = len(waiting) > at + limit
        return Backlog(waiting[at : at + limit], after=str(at + limit) if rest else None)

    def consumers(self) -> Mapping[str, frozenset[str]]:
        """Return the workers that the library knows; see Broker."""
        self.redis._up()
        return self.names


class World:
    """One source, its ledger, its Redis and its workers; time moves only when a test advances it."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(namespace=NAMESPACE, **settings)
        self.clock = Clock()
        self.ledger = MemoryLedger(clock=self.clock.wall)
        self.redis = FakeRedis(self.clock)
        self.broker = FakeBroker(self.redis)
        self.host: HostStore = self.ledger.host()
        self.host.register(source_row())
        self.installation = UUID(self.ledger._tables.installation)
        self.workers: list[FakeWorker] = []
        self.brake = Brake()
        self.term = 0
        self._holders: list[LeaderStore] = []
        self.new_leader()

    def new_leader(
        self,
        *,
        named: bool = False,
        vouches: Callable[[float], bool] = lambda _gap: False,
        saw: Callable[[Mapping[str, frozenset[str]]], None] = lambda _consumers: None,
    ) -> None:
        """Replace the leader by another reconciler, which knows only the rows of the ledger."""
        if self._holders:
            self._holders[-1].resign(self.term)
        self.store = leader_store(self.ledger)
        self._holders.append(self.store)
        term = self.store.elect(lease=FOR_EVER)
        assert term is not None
        self.term = term
        (row,) = self.store.sources()
        self.monitor = SourceMonitor(
            self.redis.client,
            self.broker,
            self.store,
            row,
            self.installation,
            self.settings,
            named=named,
            clock=self.clock,
            vouches=vouches,
            saw=saw,
        )

    @property
    def signs(self) -> Signs:
        """The signs, with the brake of this test together with the queues that the monitor holds."""
        signs = self.store.signs(self.term)
        held = {**signs.brake.held, **self.brake.held}
        return replace(signs, brake=Brake(self.brake.paused, held))

    def step(self, seconds: float = 0.1) -> None:
        """Advance the time, let the workers beat, and do one step of the monitor."""
        self.clock.advance(seconds)
        for worker in self.workers:
            worker.beat_if_due()
        self.monitor.step(self.term, self.signs)

    def run(self, seconds: float, step: float = 0.25) -> None:
        """Advance the time by so many seconds, in steps."""
        until = self.clock() + seconds
        while self.clock() < until - 1e-9:
            self.step(min(step, until - self.clock()))

    def run_until(
        self, predicate: Callable[[], object], within: float, step: float = 0.25
    ) -> float:
        """Advance the time until the predicate is true; return how long it took.

        Fails if it took longer than ``within``.
        """
        began = self.clock()
        while not predicate():
            assert self.clock() - began < within, f"not within {within} simulated seconds"
            self.step(step)
        return self.clock() - began

    def worker(self, name: str = "w1", **fields: Any) -> FakeWorker:
        """Start a guarded worker that the library's registry also knows."""
        made = FakeWorker(self, name, **fields)
        self.workers.append(made)
        for queue in made.queues:
            self.broker.names[queue] = self.broker.names.get(queue, frozenset()) | {name}
        made.beat()
        return made

    def trusted(self) -> FakeWorker:
        """Start a worker, and run until the queue is trusted and the leader has no open work."""
        worker = self.worker()
        self.run_until(lambda: self.is_trusted("mail"), within=40)
        self.run(8)
        return worker

    def is_trusted(self, queue: str) -> bool:
        """Return True if the ledger has this queue as trusted."""
        rows = self.store.queues(SOURCE.id)
        return any(row.queue == queue and row.trusted_since is not None for row in rows)

    def describe(self, job_id: str, **fields: Any) -> Delivery:
        """Make a delivery at the present time of this world."""
        return delivery(job_id, **{"token": token(self.clock.wall()), **fields})

    def enqueue(self, *job_ids: str, push: bool = True, **fields: Any) -> list[Delivery]:
        """Record jobs, and push them as a host does."""
        made = [self.describe(job_id, **fields) for job_id in job_ids]
        self.record(*made)
        if push:
            for one in made:
                self.broker.put(one)
        return made

    def record(self, *deliveries: Delivery, outbox: bool = False) -> None:
        """Record deliveries."""
        recorded = self.host.record(SOURCE.id, deliveries, namespace=NAMESPACE, outbox=outbox)
        assert not recorded.refused

    def flushall(self) -> None:
        """Delete all data of Redis, including the library's queues."""
        self.redis.flushall()
        self.broker.bodies.clear()

    def restart(self) -> None:
        """Restart Redis empty, as another server process."""
        self.redis.restart()
        self.broker.bodies.clear()

    def owed(self) -> dict[str, Owed]:
        """Return the owed deliveries by job id."""
        page = self.store.page(SOURCE.id, after=None, limit=1_000_000)
        return {owed.job_id: owed for owed in page}

    def outcome(self, of: Delivery) -> Outcome | None:
        """Return how a delivery ended, or None."""
        return self.store.tombstones(SOURCE.id, [of.token]).get(of.token)

    def suspects(self) -> dict[str, Cause]:
        """Return the cause of each suspect, by job id."""
        return {
            job_id: owed.suspected
            for job_id, owed in self.owed().items()
            if owed.suspected is not None
        }


class FakeWorker:
    """A guarded worker process."""

    def __init__(
        self, world: World, name: str, *, host: str = "h1", queues: Sequence[str] = ("mail",)
    ) -> None:
        self.world = world
        self.name = name
        self.host = host
        self.queues = tuple(queues)
        self.id = token(world.clock.wall())
        self.alive = True
        self.in_flight: list[UUID] = []
        self.unflushed_since: float | None = None
        self.pulse: tuple[UUID, int] | None = None
        self.sees_redis = True
        self._counter = 0
        self._next = 0.0

    def beat(self) -> None:
        """Beat into both stores."""
        self._counter += 1
        self._next = self.world.clock() + self.world.settings.beat_interval
        if self.sees_redis:
            self.world.redis.strings[beat_key(self.id)] = str(self._counter).encode()
        if self.sees_redis:
            standing = self.world.redis.pulse()
            self.pulse = (UUID(standing[0]), standing[1]) if standing else NO_PULSE
        self.world.host.beat(
            SOURCE.id,
            Beat(
                self.id,
                self._counter,
                tuple(self.in_flight),
                name=self.name,
                host=self.host,
                queues=self.queues,
                unflushed_since=self.unflushed_since,
                pulse=self.pulse,
            ),
            namespace=NAMESPACE,
        )

    def beat_if_due(self) -> None:
        """Beat as often as a worker does, while it lives."""
        if self.alive and self.world.clock() >= self._next:
            self.beat()

    def start(self, given: Delivery) -> ClaimAnswer:
        """Take a job from Redis and claim it."""
        self.world.broker.put(given, Presence.RUNNING)
        self.in_flight.append(given.token)
        return self.world.host.claim(SOURCE.id, request(given, self.id))

    def end(self, given: Delivery, claim: Claim, outcome: Outcome = Outcome.COMPLETED) -> Ended:
        """Report an end."""
        end = End(given.token, claim.number, outcome, self.id, ended_at=self.world.clock.wall())
        (answer,) = self.world.host.end(SOURCE.id, [end])
        return answer

    def kill(self) -> None:
        """Die without a report."""
        self.alive = False

    def leave(self) -> None:
        """Sign off and stop."""
        self.alive = False
        self.world.host.leave(self.id)


def ids(count: int) -> list[str]:
    """Name so many jobs."""
    return [f"job-{n:04}" for n in range(count)]


def calm(**settings: object) -> World:
    """Begin with one guarded worker, a trusted queue, and a leader that has heard all workers."""
    world = World(**settings)
    world.trusted()
    return world


def running(world: World, worker: FakeWorker, name: str = "job") -> None:
    """Let a worker run a job that a producer enqueued."""
    if name not in world.owed():
        world.enqueue(name)
    recorded = delivery(name, token=world.owed()[name].token)
    assert isinstance(worker.start(recorded), Claim)
    worker.beat()


def resume(world: World) -> None:
    """Do the work of `jobguard resume`."""
    world.ledger._tables.leases[NAMESPACE].held.clear()


@contextmanager
def outage(ledger: MemoryLedger) -> Iterator[None]:
    """Take Postgres away for a while."""
    ledger.down = True
    try:
        yield
    finally:
        ledger.down = False


def events(records: Sequence[Any]) -> list[str]:
    """Return the names of the logged events."""
    return [record.jobguard["event"] for record in records if hasattr(record, "jobguard")]
