"""Keeping the pulse of one source, and finding out whether Redis lost data or is another Redis."""

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

_ALARM_AGAIN = 30.0
"""Seconds between two lines in the log about a state that only a person can end."""


class IdentityConfirmed(Protocol):
    """Asked where the pulse is not what it was, and this process has never seen it here."""

    def __call__(self, missed_since: float, /, *, own: bool) -> bool | None:
        """Whether this is the right Redis; None: not known yet. ``own``: it has an older pulse of ours."""


class Health(StrEnum):
    """What one look at the pulse means for this step."""

    DOWN = "down"
    """Redis cannot be asked, or is not itself yet."""
    UNSURE = "unsure"
    """It answers, but whether it is the right one is not known yet."""
    STEADY = "steady"
    LOST = "lost"
    """It has just been seen to have lost data; the incident is written down."""
    STOP = "stop"
    """Touch nothing: the wrong Redis, or a Postgres that forgot."""


@dataclass(frozen=True, slots=True)
class Topology:
    """What would be different after a restart, a failover or an eviction."""

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
        self._raw: tuple[bytes, ...] = (b"", b"")  # epoch and n, also where they make no pulse
        self._ticked = False
        self._noted: UUID | None = None  # the epoch whose loss is written down
        self._down = False
        self._misplaced_since: float | None = None
        self._alarmed = float("-inf")
        self.refusal: str | None = None
        """What Redis says if it takes no writes."""
        self.doubts: list[Cause] = []
        """New reasons to verify what is owed; whoever acts on them empties the list."""

    @property
    def epoch(self) -> UUID | None:
        """The pulse's present epoch."""
        return self._epoch

    def tick(self, term: int, *, identity_confirmed: IdentityConfirmed, now: float) -> Health:
        """Look at the pulse and move it on. ``now`` is monotonic."""
        try:
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
            # Loading, read-only, master down, refused: it is down, never "missing".
            if not self._down:
                log_event("redis_away", source=self._source.address, error=str(error))
            self._down = True
            return Health.DOWN
        if self._down:
            self._down = False
            self.doubts.append(Cause.TOPOLOGY)
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
            self._move(term, standing)
            self._ticked = True
            return Health.STEADY
        if reading is Reading.UNACKNOWLEDGED and standing is not None:
            self._adopt(term, standing)
            return Health.STEADY
        if reading is Reading.FIRST and self._n == ACCEPTED:
            # A person said that all is well; but what was owed here is in no Redis any more.
            self._ticked = True
            return self._lost(term, standing, identity_confirmed, now)
        if reading is Reading.FIRST:
            self._begin(term, standing, uuid4())
            return Health.STEADY
        if reading is Reading.LOST:
            return self._lost(term, standing, identity_confirmed, now)
        if reading is Reading.AHEAD and standing is not None and self._accepted():
            self._adopt(term, standing)
            return Health.STEADY
        if now - self._alarmed >= _ALARM_AGAIN:
            self._alarmed = now
            self._alarm(reading)
        return Health.STOP

    def _move(self, term: int, standing: Standing) -> None:
        # A counter that is ahead was moved by a leader that died before it told Postgres: tell it now.
        n = standing.n
        if standing.n == self._n:
            moved = self._tick(standing)
            if moved is False:
                return  # somebody else moved it: the next look says what that means
            # It stands where we know it, so that nothing is lost, also where no write is taken.
            n = standing.n if moved is None else standing.n + 1
        self._store.acknowledge(
            term,
            self._source.id,
            standing.epoch,
            n,
            run_id=self._topology.run_id if self._topology else None,
        )
        self._n = n

    def _tick(self, standing: Standing) -> bool | None:
        """Move the counter on; None: Redis takes no writes, but it is up and what it was."""
        try:
            moved = self._script(TICK, standing.epoch, str(standing.n), str(standing.n + 1))
        except redis.ResponseError as error:
            self.refusal = refusal_of(error)
            if self.refusal is None or isinstance(error, redis.ReadOnlyError):
                raise
            return None
        self.refusal = None
        return moved

    def _begin(self, term: int, standing: Standing | None, epoch: UUID) -> None:
        """Make the pulse anew, where what was judged still stands."""
        was: tuple[Any, ...] = self._raw
        if standing is not None:
            was = (standing.epoch, standing.n)
        made = self._script(
            RESET, *was, str(epoch), "1", str(self._source.id), str(self._installation)
        )
        if not made:
            return
        self._store.acknowledge(
            term,
            self._source.id,
            epoch,
            1,
            run_id=self._topology.run_id if self._topology else None,
        )
        self._epoch, self._n, self._ticked = epoch, 1, True

    def _lost(
        self,
        term: int,
        standing: Standing | None,
        identity_confirmed: IdentityConfirmed,
        now: float,
    ) -> Health:
        self._misplaced_since = self._misplaced_since or now
        seen = "missing" if standing is None else f"{standing.n} of epoch {standing.epoch}"
        # The same server process, or one whose pulse we moved ourselves at this address: the right
        # place. Else somebody must vouch for it before anything is pushed.
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
            # First the row, then the counter: a loss must never be noticed and then forgotten.
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
        self._begin(term, standing, uuid4())
        self._misplaced_since = None
        return Health.LOST

    def _alarm(self, reading: Reading) -> None:
        if reading is Reading.FOREIGN:
            log_event("foreign_pulse", source=self._source.address)
        else:
            log_event("ledger_behind", source=self._source.address)

    def stands(self) -> bool:
        """Whether the pulse is in Redis right now as we know it: nothing was lost up to here."""
        standing = parse_pulse(self._read())
        return standing is not None and standing.epoch == self._epoch

    def _read(self) -> list[bytes | None]:
        """Read the pulse; what is no hash at all is none."""
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
        """Whether a person has said that what stands in Redis is right."""
        rows = [row for row in self._store.sources() if row.id == self._source.id]
        return bool(rows) and rows[0].pulse_epoch is None and rows[0].pulse_n == ACCEPTED

    def _adopt(self, term: int, standing: Standing) -> None:
        """Take the pulse that stands in Redis for ours."""
        self._store.acknowledge(
            term,
            self._source.id,
            standing.epoch,
            standing.n,
            run_id=self._topology.run_id if self._topology else None,
        )
        self._epoch, self._n = standing.epoch, standing.n

    def _check_topology(self) -> None:
        seen = Topology()
        try:
            info: dict[str, Any] = {}
            for section in ("server", "replication", "stats"):
                info.update(self._client.info(section))
            seen = Topology(
                run_id=str(info.get("run_id", "")),
                replication_id=str(info.get("master_replid", "")),
                role=str(info.get("role", "")),
                evicted=int(info.get("evicted_keys", 0)),
            )
        except redis.ResponseError:
            return  # INFO is forbidden here: the pulse and the sweep must do
        before, self._topology = self._topology, seen
        if before is None:
            if self._run_id and self._run_id != seen.run_id:
                self.doubts.append(Cause.TOPOLOGY)
            return
        if (before.run_id, before.replication_id, before.role) != (
            seen.run_id,
            seen.replication_id,
            seen.role,
        ):
            self.doubts.append(Cause.TOPOLOGY)
        if seen.evicted > before.evicted:
            self.doubts.append(Cause.EVICTION)
            log_event(
                "redis_evicted",
                source=self._source.address,
                keys=seen.evicted - before.evicted,
            )

    def _script(self, text: str, *arguments: Any) -> bool:
        given = (a if isinstance(a, bytes) else str(a) for a in arguments)
        return bool(self._client.eval(text, 1, self._key, *given))
