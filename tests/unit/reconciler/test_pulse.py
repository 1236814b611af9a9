from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis

from jobguard.errors import NotLeading, StoreUnavailable
from jobguard.model import Cause
from jobguard.pulse import ACCEPTED, RESET, Reading, Standing, judge_pulse, parse_pulse, pulse_key
from jobguard.reconciler.pulse import Health, IdentityConfirmed, PulseKeeper
from tests.fakes.store import MemoryLedger
from tests.fakes.world import FOR_EVER, SOURCE, Clock, FakeRedis, leader_store, outage, source_row

OURS, THEIRS = uuid4(), uuid4()
E1, E2 = uuid4(), uuid4()


@pytest.mark.parametrize(
    ("standing", "epoch", "n", "reading"),
    [
        (None, None, None, Reading.FIRST),
        (None, E1, 7, Reading.LOST),
        ((E1, 7), E1, 7, Reading.STEADY),
        ((E1, 8), E1, 7, Reading.STEADY),
        ((E1, 9), E1, 7, Reading.AHEAD),
        ((E1, 6), E1, 7, Reading.LOST),
        ((E1, 0), E1, 7, Reading.LOST),
        ((E2, 7), E1, 7, Reading.LOST),
        ((E2, 8), E1, 7, Reading.LOST),
        ((E2, 9), E1, 7, Reading.AHEAD),
        ((E1, 7), None, None, Reading.AHEAD),
        ((E1, 1), None, None, Reading.UNACKNOWLEDGED),
        ((E1, 7), None, ACCEPTED, Reading.UNACKNOWLEDGED),
    ],
)
def test_judge_pulse(
    standing: tuple[UUID, int] | None, epoch: UUID | None, n: int | None, reading: Reading
) -> None:
    """The pulse in Redis is steady, lost, ahead or new, compared with the acknowledged one."""
    seen = None if standing is None else Standing(*standing, source=1, installation=OURS)

    assert judge_pulse(seen, epoch=epoch, n=n, installation=OURS) is reading


@pytest.mark.parametrize(("epoch", "n"), [(None, None), (E1, 7), (E2, 3)])
def test_judge_a_foreign_pulse(epoch: UUID | None, n: int | None) -> None:
    """The pulse of another installation is foreign, with any count."""
    seen = Standing(E1, 7, source=1, installation=THEIRS)

    assert judge_pulse(seen, epoch=epoch, n=n, installation=OURS) is Reading.FOREIGN


def test_parse_pulse() -> None:
    """An answer is a pulse only if all of its fields are there and readable."""
    whole = [str(E1).encode(), b"7", b"-3", str(OURS).encode()]

    assert parse_pulse(whole) == Standing(E1, 7, -3, OURS)
    assert parse_pulse(None) is None
    assert parse_pulse([None] * 4) is None
    assert parse_pulse([*whole[:3], None]) is None
    assert parse_pulse([whole[0], b"seven", *whole[2:]]) is None


class Killed(BaseException):
    """Ends the process of the leader here."""


def unasked(_since: float, /, *, own: bool) -> bool | None:
    """Fail: the identity of this Redis must not be in question."""
    raise AssertionError("the place is beyond doubt")


def sure(answer: bool | None, asked: list[tuple[float, bool]] | None = None) -> IdentityConfirmed:
    """Return a check that gives this answer, and keep its arguments."""

    def place(since: float, /, *, own: bool) -> bool | None:
        if asked is not None:
            asked.append((since, own))
        return answer

    return place


class Stage:
    """The Redis of a source, the ledger, and the process that keeps the pulse."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.ledger = MemoryLedger(clock=self.clock.wall)
        self.ledger.host().register(source_row())
        self.redis = FakeRedis(self.clock)
        self.store = leader_store(self.ledger)
        term = self.store.elect(lease=FOR_EVER)
        assert term is not None
        self.term = term
        self.installation = OURS
        self.keeper = self.another()

    def another(self) -> PulseKeeper:
        """Let another process keep the pulse, which knows only the rows in Postgres."""
        (row,) = self.store.sources()
        self.keeper = PulseKeeper(self.redis.client, self.store, row, self.installation)
        return self.keeper

    def tick(self, place: IdentityConfirmed = unasked) -> Health:
        """Advance the time by half a second, and read the pulse."""
        self.clock.advance(0.5)
        return self.keeper.tick(self.term, identity_confirmed=place, now=self.clock())

    @property
    def acknowledged(self) -> tuple[str, int] | None:
        """The pulse that Postgres has."""
        (row,) = self.store.sources()
        if row.pulse_epoch is None or row.pulse_n is None:
            return None
        return str(row.pulse_epoch), row.pulse_n

    @property
    def incidents(self) -> list[Cause]:
        """The causes of the open incidents."""
        return [incident.cause for incident in self.store.incidents(SOURCE.id)]

    @property
    def to_verify(self) -> list[Cause]:
        """The reasons so far to verify all deliveries."""
        return self.keeper.to_verify


def started() -> Stage:
    """Begin with a pulse that has ticked."""
    stage = Stage()
    for _ in range(3):
        assert stage.tick() is Health.STEADY
    return stage


def test_a_first_start_makes_the_pulse() -> None:
    """If neither store has a pulse, nothing can have been lost."""
    stage = Stage()

    assert stage.tick() is Health.STEADY

    assert stage.redis.pulse() == stage.acknowledged
    assert stage.acknowledged is not None
    assert stage.acknowledged[1] == 1
    assert stage.incidents == []


def test_the_pulse_names_its_source_and_installation() -> None:
    """The pulse in Redis names the source and the installation that it belongs to."""
    stage = started()

    fields = stage.redis.hashes[pulse_key(SOURCE)]

    assert fields["source"] == str(SOURCE.id).encode()
    assert fields["installation"] == str(OURS).encode()


def test_it_ticks() -> None:
    """Each step moves the counter by one, in Redis and then in Postgres."""
    stage = started()
    before = stage.redis.pulse()
    assert before is not None

    stage.tick()

    assert stage.redis.pulse() == (before[0], before[1] + 1) == stage.acknowledged


def test_the_next_tick_waits_for_the_acknowledgement() -> None:
    """While Postgres has not taken the last tick, the counter does not move."""
    stage = started()
    before = stage.redis.pulse()
    assert before is not None
    with outage(stage.ledger):
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                stage.tick()
    assert stage.redis.pulse() == (before[0], before[1] + 1)
    assert stage.acknowledged == before

    assert stage.tick() is Health.STEADY
    assert stage.acknowledged == (before[0], before[1] + 1) == stage.redis.pulse()

    stage.tick()
    assert stage.acknowledged == (before[0], before[1] + 2) == stage.redis.pulse()


def test_a_lost_answer_to_a_tick_is_no_loss() -> None:
    """A tick that Redis did, but whose answer was lost, is acknowledged at the next step."""
    stage = started()

    def silent(_text: str) -> None:
        stage.redis.after_eval = lambda _: None
        raise redis.TimeoutError

    stage.redis.after_eval = silent
    assert stage.tick() is Health.DOWN

    assert stage.tick() is Health.STEADY
    assert stage.tick() is Health.STEADY
    assert stage.redis.pulse() == stage.acknowledged
    assert stage.incidents == []


def test_a_leader_killed_between_tick_and_acknowledgement() -> None:
    """The next leader finds Redis one ahead, and that is no incident."""
    stage = started()

    def kill(_text: str) -> None:
        stage.redis.after_eval = lambda _: None
        raise Killed

    stage.redis.after_eval = kill
    with pytest.raises(Killed):
        stage.tick()

    stage.another()
    assert stage.tick() is Health.STEADY
    assert stage.tick() is Health.STEADY
    assert stage.incidents == []


def test_a_missing_pulse_is_a_loss() -> None:
    """A FLUSHALL is found at the next step: an incident, and a pulse of a new epoch."""
    stage = started()
    before = stage.redis.pulse()
    assert before is not None
    stage.redis.flushall()

    assert stage.tick() is Health.LOST

    assert stage.incidents == [Cause.INCIDENT]
    after = stage.redis.pulse()
    assert after is not None
    assert after[0] != before[0]
    assert after == stage.acknowledged
    assert stage.tick() is Health.STEADY
    assert stage.incidents == [Cause.INCIDENT]


def test_a_lower_counter_is_a_loss() -> None:
    """An old snapshot has an old counter."""
    stage = started()
    stage.redis.set_pulse(n=1)

    assert stage.tick() is Health.LOST
    assert stage.incidents == [Cause.INCIDENT]
    assert stage.tick() is Health.STEADY


def test_another_epoch_is_a_loss() -> None:
    """A snapshot from before an earlier incident is old: its counter is lower."""
    stage = started()
    before = stage.redis.pulse()
    assert before is not None
    stage.redis.flushall()
    assert stage.tick() is Health.LOST
    stage.redis.set_pulse(epoch=UUID(before[0]), n=before[1])

    assert stage.tick() is Health.LOST
    assert stage.tick() is Health.STEADY


def test_the_incident_is_written_before_the_pulse_is_made() -> None:
    """A leader killed while it makes the new pulse has already recorded the incident."""
    stage = started()
    before = stage.acknowledged
    stage.redis.flushall()

    def kill(text: str) -> None:
        assert text is RESET
        assert stage.incidents == [Cause.INCIDENT]
        raise Killed

    stage.redis.before_eval = kill
    with pytest.raises(Killed):
        stage.tick()
    stage.redis.before_eval = lambda _: None

    assert stage.redis.pulse() is None
    assert stage.acknowledged == before
    stage.another()
    assert stage.tick() is Health.LOST
    assert set(stage.incidents) == {Cause.INCIDENT}
    assert stage.tick() is Health.STEADY


def test_a_leader_killed_after_the_pulse_was_made() -> None:
    """If the new epoch is in Redis and not in Postgres, the next leader finds a loss, and an incident."""
    stage = started()
    stage.redis.flushall()

    def kill(_text: str) -> None:
        stage.redis.after_eval = lambda _: None
        raise Killed

    stage.redis.after_eval = kill
    with pytest.raises(Killed):
        stage.tick()

    stage.another()
    assert stage.tick() is Health.LOST
    assert set(stage.incidents) == {Cause.INCIDENT}
    assert stage.tick() is Health.STEADY
    assert stage.redis.pulse() == stage.acknowledged


def test_no_incident_row_no_new_pulse() -> None:
    """While Postgres cannot take the incident, the loss stays visible in Redis."""
    stage = started()
    stage.redis.flushall()
    with outage(stage.ledger), pytest.raises(StoreUnavailable):
        stage.tick()

    assert stage.redis.pulse() is None
    assert stage.tick() is Health.LOST
    assert stage.incidents == [Cause.INCIDENT]


def test_one_loss_is_one_incident_though_the_acknowledgement_failed() -> None:
    """A second reading of the same loss by the same leader writes no second row."""
    stage = started()
    stage.redis.flushall()

    def outage_after(_text: str) -> None:
        stage.ledger.down = True

    stage.redis.after_eval = outage_after
    with pytest.raises(StoreUnavailable):
        stage.tick()
    stage.redis.after_eval = lambda _: None
    stage.ledger.down = False

    assert stage.tick() is Health.LOST
    assert stage.incidents == [Cause.INCIDENT]
    assert stage.tick() is Health.STEADY


def test_two_losses_are_two_incidents() -> None:
    """A second flush of Redis is a second loss."""
    stage = started()
    for _ in range(2):
        stage.redis.flushall()
        assert stage.tick() is Health.LOST
        assert stage.tick() is Health.STEADY

    assert stage.incidents == [Cause.INCIDENT, Cause.INCIDENT]


def test_a_counter_too_far_ahead_stops() -> None:
    """A counter more than one ahead means that Postgres lost data: change nothing, ask a person."""
    stage = started()
    ahead = stage.redis.pulse()
    assert ahead is not None
    stage.redis.set_pulse(n=ahead[1] + 2)

    for _ in range(3):
        assert stage.tick() is Health.STOP

    assert stage.redis.pulse() == (ahead[0], ahead[1] + 2)
    assert stage.acknowledged == ahead
    assert stage.incidents == []


@pytest.mark.parametrize("flushed", [False, True], ids=["one epoch", "an earlier epoch"])
@pytest.mark.parametrize("new_leader", [False, True], ids=["same leader", "next leader"])
def test_a_ledger_that_is_set_back_under_a_leader_stops(flushed: bool, new_leader: bool) -> None:
    """A failover to a Postgres that lagged, or a restored backup, is noticed by a leader that goes on."""
    stage = started()
    sources = stage.ledger._tables.sources
    backup = sources[SOURCE.id]
    if flushed:
        stage.redis.flushall()
        assert stage.tick() is Health.LOST
    for _ in range(3):
        assert stage.tick() is Health.STEADY
    sources[SOURCE.id] = backup
    if new_leader:
        stage.another()

    for _ in range(3):
        assert stage.tick() is Health.STOP

    assert sources[SOURCE.id] == backup
    assert stage.incidents == [Cause.INCIDENT] * flushed


def test_a_ledger_that_is_set_back_while_redis_loses_its_data_stops() -> None:
    """No loss is handled with a ledger that does not know which jobs have ended."""
    stage = started()
    sources = stage.ledger._tables.sources
    backup = sources[SOURCE.id]
    for _ in range(3):
        assert stage.tick() is Health.STEADY
    sources[SOURCE.id] = backup
    stage.redis.flushall()

    for _ in range(3):
        assert stage.tick() is Health.STOP


def test_a_ledger_that_knows_of_no_pulse_stops() -> None:
    """A pulse that Postgres never acknowledged was made by a ledger that was lost."""
    stage = Stage()
    stage.redis.set_pulse(epoch=E1, n=7, source=SOURCE.id, installation=OURS)

    assert stage.tick() is Health.STOP
    assert stage.redis.pulse() == (str(E1), 7)


def test_a_first_acknowledgement_that_failed() -> None:
    """A short outage of Postgres at the very first tick does not stop the reconciler for ever."""
    stage = Stage()

    def outage_after(_text: str) -> None:
        stage.ledger.down = True

    stage.redis.after_eval = outage_after
    with pytest.raises(StoreUnavailable):
        stage.tick()
    stage.redis.after_eval = lambda _: None
    stage.ledger.down = False

    assert stage.tick() is Health.STEADY


@pytest.mark.parametrize("new_leader", [False, True], ids=["same leader", "next leader"])
def test_a_person_may_accept_the_pulse_in_redis(new_leader: bool) -> None:
    """After `resume --moved` the pulse continues from its value in Redis."""
    stage = started()
    stage.redis.set_pulse(n=99)
    assert stage.tick() is Health.STOP

    sources = stage.ledger._tables.sources
    sources[SOURCE.id] = replace(sources[SOURCE.id], pulse_epoch=None, pulse_n=ACCEPTED)
    if new_leader:
        stage.another()

    assert stage.tick() is Health.STEADY
    assert stage.acknowledged == stage.redis.pulse()


def test_a_foreign_pulse_stops() -> None:
    """Two ledgers that share one Redis do not move the counter of each other."""
    stage = started()
    stage.redis.set_pulse(installation=THEIRS)
    there = stage.redis.pulse()

    for _ in range(3):
        assert stage.tick() is Health.STOP

    assert stage.redis.pulse() == there
    assert stage.incidents == []


def test_a_person_may_say_that_the_other_ledger_is_gone() -> None:
    """After `resume --moved` a ledger that was made anew keeps its own pulse."""
    stage = started()
    stage.redis.set_pulse(installation=THEIRS)
    assert stage.tick() is Health.STOP

    sources = stage.ledger._tables.sources
    sources[SOURCE.id] = replace(sources[SOURCE.id], pulse_epoch=None, pulse_n=ACCEPTED)

    assert [stage.tick(), stage.tick()] == [Health.STEADY, Health.STEADY]
    assert stage.acknowledged == stage.redis.pulse()


def test_a_replica_is_down() -> None:
    """A key that is missing on a replica may be on its master: that is never a loss."""
    stage = started()
    stage.redis.role = "slave"
    stage.redis.flushall()

    assert stage.tick() is Health.DOWN
    assert stage.redis.pulse() is None
    assert stage.incidents == []


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("refused"),
        redis.TimeoutError("slow"),
        redis.BusyLoadingError("LOADING"),
        redis.ReadOnlyError("READONLY"),
        redis.exceptions.MasterDownError("MASTERDOWN"),
        redis.AuthenticationError("NOAUTH"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_redis_that_cannot_answer_is_down(error: redis.RedisError) -> None:
    """Loading, read-only, refused: Redis is down, its pulse is not missing; later all is verified."""
    stage = started()
    stage.redis.error = error

    assert stage.tick() is Health.DOWN
    assert stage.incidents == []

    stage.redis.error = None
    assert stage.tick() is Health.STEADY
    assert stage.to_verify == [Cause.TOPOLOGY]


def test_a_restart_that_kept_its_data() -> None:
    """Another run id with the same pulse is a reason to verify, and no loss."""
    stage = started()
    stage.redis.run_id = "another"

    assert stage.tick() is Health.STEADY
    assert stage.to_verify == [Cause.TOPOLOGY]
    assert stage.incidents == []


def test_a_restart_between_two_leaders() -> None:
    """A new leader compares the run id with the one that Postgres has."""
    stage = started()
    stage.redis.run_id = "another"
    stage.another()

    assert stage.tick() is Health.STEADY
    assert stage.to_verify == [Cause.TOPOLOGY]


def test_a_cluster(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis in cluster mode, which its clients do not notice, is an error in the log, once."""
    stage = Stage()
    info = stage.redis.info
    monkeypatch.setattr(stage.redis, "info", lambda *of: {**info(*of), "cluster_enabled": 1})
    for _ in range(3):
        stage.tick()
    assert [record.levelname for record in caplog.records if "cluster" in record.message] == [
        "ERROR"
    ]


def test_evictions() -> None:
    """Keys that Redis evicted are a reason to verify; earlier evictions are not."""
    stage = Stage()
    stage.redis.evicted = 5
    stage.tick()
    stage.tick()
    assert stage.to_verify == []

    stage.redis.evicted = 6
    stage.tick()

    assert stage.to_verify == [Cause.EVICTION]


def test_a_redis_that_forbids_info() -> None:
    """Without INFO the pulse finds a loss alone."""
    stage = Stage()
    stage.redis.info_error = redis.exceptions.NoPermissionError("NOPERM")
    assert stage.tick() is Health.STEADY
    stage.redis.flushall()

    assert stage.tick() is Health.LOST
    assert stage.tick() is Health.STEADY


def lost_at_a_new_leader() -> Stage:
    """Begin with a Redis that is empty and another process, before a leader that has never seen it."""
    stage = started()
    stage.redis.restart()
    stage.another()
    return stage


def test_the_same_server_process_is_the_right_place() -> None:
    """A new leader that finds the run id that Postgres has needs no confirmation."""
    stage = started()
    stage.redis.flushall()
    stage.another()

    assert stage.tick() is Health.LOST


def test_a_place_that_is_sure() -> None:
    """If the identity of the Redis is confirmed, a missing pulse is a loss."""
    stage = lost_at_a_new_leader()

    assert stage.tick(sure(True)) is Health.LOST
    assert stage.incidents == [Cause.INCIDENT]
    assert stage.tick() is Health.STEADY


def test_a_place_that_is_wrong() -> None:
    """If a worker reads the pulse in another Redis, nothing is changed here."""
    stage = lost_at_a_new_leader()

    for _ in range(3):
        assert stage.tick(sure(False)) is Health.STOP

    assert stage.redis.pulse() is None
    assert stage.incidents == []


def test_a_place_that_is_not_known_yet() -> None:
    """While the identity is not known, nothing is done; the check gets the time of the first miss."""
    stage = lost_at_a_new_leader()
    asked: list[tuple[float, bool]] = []
    unknown = sure(None, asked)

    assert stage.tick(unknown) is Health.UNSURE
    first = stage.clock()
    assert stage.tick(unknown) is Health.UNSURE
    assert asked == [(first, False), (first, False)]
    assert stage.redis.pulse() is None
    assert stage.incidents == []

    assert stage.tick(sure(True)) is Health.LOST


def test_a_pulse_that_comes_back_is_not_missed_any_more() -> None:
    """The time of a missing pulse counts from its last reading."""
    stage = lost_at_a_new_leader()
    stage.tick(sure(None))
    acknowledged = stage.acknowledged
    assert acknowledged is not None
    stage.redis.set_pulse(
        epoch=acknowledged[0], n=acknowledged[1], source=SOURCE.id, installation=OURS
    )
    assert stage.tick() is Health.STEADY

    stage.redis.restart()
    stage.another()
    asked: list[tuple[float, bool]] = []
    stage.tick(sure(None, asked))

    assert asked == [(stage.clock(), False)]


def test_a_broken_pulse_is_replaced() -> None:
    """A pulse of which a field is missing or unreadable is a loss once, and then steady again."""
    stage = started()
    del stage.redis.hashes[pulse_key(SOURCE)]["source"]

    assert stage.tick() is Health.LOST
    assert stage.tick() is Health.STEADY


def test_somebody_else_moved_it() -> None:
    """A counter that another process moved between reading and tick is not changed in this step."""
    stage = started()

    def intrude(_text: str) -> None:
        stage.redis.before_eval = lambda _: None
        at = stage.redis.pulse()
        assert at is not None
        stage.redis.set_pulse(n=at[1] + 1)

    stage.redis.before_eval = intrude
    before = stage.acknowledged
    assert stage.tick() is Health.STEADY
    assert stage.acknowledged == before

    assert stage.tick() is Health.STEADY
    assert stage.acknowledged == stage.redis.pulse()


def test_a_stale_leader_moves_nothing_in_postgres() -> None:
    """A keeper of an older term cannot acknowledge, so that the counter moves once at most."""
    stage = started()
    stage.store.resign(stage.term)
    other = leader_store(stage.ledger)
    assert other.elect(lease=FOR_EVER) is not None
    before = stage.redis.pulse()
    assert before is not None

    for _ in range(3):
        with pytest.raises(NotLeading):
            stage.tick()

    at = stage.redis.pulse()
    assert at is not None
    assert at[1] - before[1] <= 1


@pytest.mark.parametrize(
    "other", [{"namespace": "another"}, {"library": "celery"}, {"prefix": "p"}]
)
def test_two_sources_two_pulses(other: dict[str, Any]) -> None:
    """A source of another namespace, library or prefix has its own pulse."""
    row = replace(source_row(), id=SOURCE.id + 1, **other)
    stage = started()
    stage.ledger.host().register(row)
    keeper = PulseKeeper(stage.redis.client, stage.store, row, OURS)

    assert keeper.tick(stage.term, identity_confirmed=unasked, now=1.0) is Health.STEADY
    assert stage.tick() is Health.STEADY
    assert set(stage.redis.hashes) == {pulse_key(SOURCE), pulse_key(row)}
    assert len(stage.redis.hashes) == 2


def test_one_redis_by_two_addresses_has_one_pulse() -> None:
    """The key of the pulse is the same for every address, so that a second source with it is found."""
    assert pulse_key(source_row()) == pulse_key(replace(source_row(), address="other:1/0"))
