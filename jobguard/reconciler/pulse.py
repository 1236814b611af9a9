"""Keep the pulse of one source, and find out whether Redis lost data or is another Redis."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID, uuid4

import redis

from jobguard import failpoint
from jobguard.log import log_event
from jobguard.model import Cause
from jobguard.pulse import (
    ACCEPTED,
    RESET,
    TICK,
    Reading,
    Standing,
    judge_pulse,
    parse_pulse,
    pulse_key,
    read_pulse,
)
from jobguard.redis_refusal import refusal_of
from jobguard.store.protocols import LeaderStore, SourceRow

_QUIET = 1.5
"""Seconds between two moves of the pulse when nothing is owed. Each move notes that the consumers are
watched, and a new leader believes that for ``GAP`` seconds (see trust.py).
"""
_ALARM_AGAIN = 30.0
"""Seconds between two log lines about a state that only a person can end."""


class IdentityConfirmed(Protocol):
    """Confirms the Redis when the pulse is not the expected one and this process has never seen it here."""

    def __call__(self, missed_since: float, /, *, own: bool) -> bool | None:
        """Return True if this is the right Redis; None: not known yet.

        ``own``: this Redis has an older pulse of this ledger.
        """


class Health(StrEnum):
    """The meaning of one reading of the pulse for this step."""

    DOWN = "down"
    """Redis cannot be asked, or is not ready to answer for its data yet."""
    UNSURE = "unsure"
    """Redis answers, but it is not known yet whether it is the right one."""
    STEADY = "steady"
    LOST = "lost"
    """Redis has just been found to have lost data; the incident is recorded."""
    STOP = "stop"
    """Change nothing: this is the wrong Redis, or Postgres lost data."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Properties of the server that change with a restart, a failover or an eviction."""

    run_id: str = ""
    replication_id: str = ""
    role: str = ""
    evicted: int = 0


class PulseKeeper:
    """The pulse of one source, while this process leads."""

    def __init__(
        self,
        client: redis.Redis,
        store: LeaderStore,
        source: SourceRow,
        installation: UUID,
    ) -> None:
        self._client = client
        self._store = store
        self._source = source
        self._installation = installation
        self._key = pulse_key(source)
        self._epoch = source.pulse_epoch
        self._n = source.pulse_n
        self._run_id = source.run_id
        self._topology: Topology | None = None
        # Epoch and n as Redis has them, even if they are not a valid pulse.
        self._raw: tuple[bytes, ...] = (b"", b"")
        self._ticked = False
        self._noted: UUID | None = None  # The epoch whose loss is recorded.
        self._down = False
        self._misplaced_since: float | None = None
        self._alarmed = float("-inf")
        self._moved_at = float("-inf")
        self.refusal: str | None = None
        """The error text of Redis if it takes no writes."""
        self.to_verify: list[Cause] = []
        """New reasons to verify all owed deliveries. The caller that handles them empties the list."""

    @property
    def epoch(self) -> UUID | None:
        """The present epoch of the pulse."""
        return self._epoch

    def tick(
        self,
        term: int,
        *,
        identity_confirmed: IdentityConfirmed,
        now: float,
        quiet: bool = False,
    ) -> Health:
        """Read the pulse and move it on.

        ``now`` is monotonic seconds. ``quiet``: nothing is owed, so the pulse is moved less often.
        """
        try:
            if quiet and now - self._moved_at < _QUIET and self._is_as_left():
                return Health.STEADY
            self._check_topology()
            if self._topology is not None and self._topology.role == "slave":
                raise redis.ReadOnlyError("it is a replica: what is not here may be on its master")
            answer = self._read()
            standing = parse_pulse(answer)
            self._raw = tuple(bytes(value or b"") for value in answer[:2])
            if standing is None and any(answer):
                log_event("value_unreadable", source=self._source.address, key=self._key)
            reading = judge_pulse(
                standing, epoch=self._epoch, n=self._n, installation=self._installation
            )
            health = self._act(term, reading, standing, identity_confirmed, now)
        except redis.RedisError as error:
            # Loading, read-only, master down, refused: all of these mean that Redis is down, never
            # that the pulse is missing.
            if not self._down:
                log_event("redis_away", source=self._source.address, error=str(error))
            self._down = True
            return Health.DOWN
        if self._down:
            self._down = False
            self.to_verify.append(Cause.TOPOLOGY)
            log_event("redis_back", source=self._source.address)
        return health

    def _act(
        self,
        term: int,
        reading: Reading,
        standing: Standing | None,
        identity_confirmed: IdentityConfirmed,
        now: float,
    ) -> Health:
        if reading is Reading.STEADY and standing is not None:
            self._misplaced_since = None
            if not self._move(term, standing):
                return Health.STOP
            self._ticked = True
            self._moved_at = now
            return Health.STEADY
        if reading is Reading.UNACKNOWLEDGED and standing is not None:
            self._adopt(term, standing)
            return Health.STEADY
        if reading is Reading.FIRST and self._n == ACCEPTED:
            # A person said that this state is right. But the owed deliveries are not in any Redis
            # any more.
            self._ticked = True
            return self._lost(term, standing, identity_confirmed, now)
        if reading is Reading.FIRST:
            return Health.STEADY if self._begin(term, standing) else Health.STOP
        if reading is Reading.LOST:
            return self._lost(term, standing, identity_confirmed, now)
        if standing is not None and self._accepted():
            if reading is Reading.FOREIGN:  # the other ledger is gone
                return Health.STEADY if self._begin(term, standing) else Health.STOP
            self._adopt(term, standing)
            return Health.STEADY
        if now - self._alarmed >= _ALARM_AGAIN:
            self._alarmed = now
            self._alarm(reading)
        return Health.STOP

    def _move(self, term: int, standing: Standing) -> bool:
        """Move the counter on. Return False if Postgres does not have the known pulse any more."""
        # The counter is ahead if the leader that moved it died before it wrote to Postgres: write
        # it now.
        n = standing.n
        if standing.n == self._n:
            moved = self._tick(standing)
            if moved is False:
                return True  # Another process moved it: the next reading shows the result.
            # The counter is the known one, so that nothing is lost, even if Redis takes no writes.
            n = standing.n if moved is None else standing.n + 1
        return self._acknowledge(term, standing.epoch, n)

    def _tick(self, standing: Standing) -> bool | None:
        """Move the counter on; None: Redis takes no writes, but it is up and has the known counter."""
        try:
            moved = self._script(TICK, standing.epoch, str(standing.n), str(standing.n + 1))
        except redis.ResponseError as error:
            self.refusal = refusal_of(error)
            if self.refusal is None or isinstance(error, redis.ReadOnlyError):
                raise
            return None
        self.refusal = None
        return moved

    def _begin(self, term: int, standing: Standing | None) -> bool:
        """Make a new pulse, if Redis still has the one that was judged.

        Return False if Postgres does not have the known pulse any more.
        Its count is higher than that of every epoch before, so that a Postgres that was set back to an
        earlier epoch is not taken for a Redis that lost its data.
        """
        epoch, n = uuid4(), max(self._n or 0, 0) + 1
        was: tuple[Any, ...] = self._raw
        if standing is not None:
            was = (standing.epoch, standing.n)
        made = self._script(
            RESET, *was, str(epoch), str(n), str(self._source.id), str(self._installation)
        )
        if not made:
            return True
        if not self._acknowledge(term, epoch, n):
            return False
        self._ticked = True
        return True

    def _lost(
        self,
        term: int,
        standing: Standing | None,
        identity_confirmed: IdentityConfirmed,
        now: float,
    ) -> Health:
        self._misplaced_since = self._misplaced_since or now
        seen = "missing" if standing is None else f"{standing.n} of epoch {standing.epoch}"
        # If it is the same server process, or if this process moved the pulse at this address
        # before, it is the right Redis. Otherwise it must be confirmed before anything is pushed.
        here = self._ticked or (
            bool(self._run_id)
            and self._topology is not None
            and self._topology.run_id == self._run_id
        )
        if not here:
            sure = identity_confirmed(self._misplaced_since, own=standing is not None)
            if sure is None:
                return Health.UNSURE
            if not sure:
                return Health.STOP
        if self._noted is None or self._noted != self._epoch or self._epoch is None:
            # First the incident row, then the counter: a loss must never be noticed and then
            # forgotten.
            self._store.open_incident(
                term,
                self._source.id,
                Cause.INCIDENT,
                f"the pulse is {seen}, postgres knows {self._n} of epoch {self._epoch}",
                self._epoch,
            )
            self._noted = self._epoch
            failpoint.hit("after_incident_row")
        log_event("redis_lost_data", source=self._source.address, pulse=seen)
        if not self._begin(term, standing):
            return Health.STOP
        self._misplaced_since = None
        return Health.LOST

    def _alarm(self, reading: Reading) -> None:
        if reading is Reading.FOREIGN:
            log_event("foreign_pulse", source=self._source.address)
        else:
            log_event("ledger_behind", source=self._source.address)

    def _is_as_left(self) -> bool:
        standing = parse_pulse(self._read())
        as_left = standing is not None and (standing.epoch, standing.n) == (self._epoch, self._n)
        return as_left and not self._down

    def stands(self) -> bool:
        """Return True if Redis has the known pulse right now: no data was lost until now."""
        standing = parse_pulse(self._read())
        return standing is not None and standing.epoch == self._epoch

    def _read(self) -> list[bytes | None]:
        """Read the pulse. A key that is no hash counts as no pulse."""
        try:
            answer: list[bytes | None] = read_pulse(self._client, self._source)
        except redis.ResponseError as error:
            if not str(error).startswith("WRONGTYPE"):
                raise
            log_event(
                "value_unreadable", source=self._source.address, key=self._key, error=str(error)
            )
            return [None] * 4
        return answer

    def _accepted(self) -> bool:
        """Return True if a person has said that the pulse in Redis is right."""
        self._read_ledger()
        return self._epoch is None and self._n == ACCEPTED

    def _adopt(self, term: int, standing: Standing) -> None:
        """Take over the pulse that Redis has."""
        self._acknowledge(term, standing.epoch, standing.n)

    def _acknowledge(self, term: int, epoch: UUID, n: int) -> bool:
        """Store a pulse. Return False if Postgres does not have the one before it: it is judged anew."""
        known, pulse = (self._epoch, self._n), (epoch, n)
        run_id = self._topology.run_id if self._topology else None
        stored = self._store.acknowledge(term, self._source.id, known, pulse, run_id=run_id)
        if stored:
            self._epoch, self._n = pulse
        else:
            self._read_ledger()
        return stored

    def _read_ledger(self) -> None:
        """Read which pulse Postgres has."""
        for row in self._store.sources():
            if row.id == self._source.id:
                self._epoch, self._n = row.pulse_epoch, row.pulse_n

    def _check_topology(self) -> None:
        seen = Topology()
        try:
            info: dict[str, Any] = self._client.info()
            seen = Topology(
                run_id=str(info.get("run_id", "")),
                replication_id=str(info.get("master_replid", "")),
                role=str(info.get("role", "")),
                evicted=int(info.get("evicted_keys", 0)),
            )
        except redis.ResponseError:
            return  # INFO is forbidden here: the pulse and the sweep have to suffice.
        before, self._topology = self._topology, seen
        if before is None:
            if info.get("cluster_enabled"):
                log_event("redis_is_cluster", source=self._source.address)
            if self._run_id and self._run_id != seen.run_id:
                self.to_verify.append(Cause.TOPOLOGY)
            return
        if (before.run_id, before.replication_id, before.role) != (
            seen.run_id,
            seen.replication_id,
            seen.role,
        ):
            self.to_verify.append(Cause.TOPOLOGY)
        if seen.evicted > before.evicted:
            self.to_verify.append(Cause.EVICTION)
            log_event(
                "redis_evicted",
                source=self._source.address,
                keys=seen.evicted - before.evicted,
            )

    def _script(self, text: str, *arguments: Any) -> bool:
        given = (a if isinstance(a, bytes) else str(a) for a in arguments)
        return bool(self._client.eval(text, 1, self._key, *given))
