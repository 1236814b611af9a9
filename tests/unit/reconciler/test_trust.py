from __future__ import annotations

from typing import Any

import pytest

from jobguard.reconciler.trust import Trust
from jobguard.store.protocols import QueueRow

SOURCE = 7
NOW = 10_000.0
QUIET = 30.0
QUIET_AFTER_LOSS = 600.0
GUARDED = frozenset({"ours"})
MIXED = frozenset({"ours", "unguarded"})


class Stage:
    """A leader that inspects the consumers of one queue every two seconds."""

    def __init__(self, *rows: QueueRow) -> None:
        self.now = NOW
        self.stored = {row.queue: row for row in rows}
        self.replace_leader()

    def replace_leader(self, *, after: float = 0.0) -> None:
        """Replace the leader by another one with the stored rows, so many seconds later."""
        watched = self.now if self.stored else None
        self.now += after
        self.trust = Trust(SOURCE, watching_since=self.now, watched_until=watched)
        self.trust.load(self.stored.values())

    def poll(
        self,
        consumers: frozenset[str] = GUARDED,
        guarded: frozenset[str] = GUARDED,
        *,
        after: float = 2.0,
        check_backlog: bool = True,
        counted: bool = True,
        **names: Any,
    ) -> list[QueueRow]:
        """Advance the time, inspect the consumers, and check the backlog where that is asked."""
        self.now += after
        changed = self.trust.observe(
            self.now, {"mail": consumers}, {"mail": guarded}, ["mail"], counted=counted, **names
        )
        self.stored.update((row.queue, row) for row in changed)
        for queue in self.trust.backlogs_to_check() if check_backlog else ():
            self.stored[queue] = self.trust.backlog_checked(queue)
        return changed

    def trusts(self, recorded_at: float | None = None, *, lost: bool = False) -> bool:
        """Return True if a delivery recorded then (default: now) is trusted."""
        at = self.now if recorded_at is None else recorded_at
        return self.trust.trusts("mail", at, lost=lost)


def test_only_guarded_consumers() -> None:
    """A queue all of whose consumers are guarded is trusted as soon as its backlog was checked."""
    stage = Stage()
    assert not stage.trusts()

    stage.poll()

    assert stage.trusts()


def test_the_backlog_check_covers_older_deliveries() -> None:
    """After the check of its older deliveries, all of a queue is trusted."""
    stage = Stage()
    stage.poll(check_backlog=False)
    assert stage.trust.backlogs_to_check() == ["mail"]
    assert not stage.trusts(NOW - 3600)

    stage.trust.backlog_checked("mail")

    assert stage.trusts(NOW - 3600)
    assert stage.trust.backlogs_to_check() == []


def test_a_queue_without_any_consumer_is_trusted_from_the_first_record() -> None:
    """If the consumers were counted and no unguarded one was ever seen, no worker needs to be there."""
    stage = Stage()
    no_worker: frozenset[str] = frozenset()

    stage.poll(no_worker, no_worker)

    assert stage.trusts(NOW - 3600)


def test_where_consumers_are_not_counted_a_guarded_worker_must_be_seen() -> None:
    """Names alone do not prove that there is no unguarded worker."""
    stage = Stage()
    no_worker: frozenset[str] = frozenset()

    for _ in range(100):
        stage.poll(no_worker, no_worker, counted=False)

    assert not stage.trusts()
    stage.poll(counted=False)
    assert stage.trusts()


def test_after_an_unguarded_worker_a_guarded_one_must_be_seen() -> None:
    """A queue that had an unguarded worker, and now has no worker at all, is not trusted yet."""
    stage = Stage()
    no_worker: frozenset[str] = frozenset()
    stage.poll(MIXED)
    stage.poll(MIXED)

    for _ in range(100):
        stage.poll(no_worker, no_worker)

    assert not stage.trusts()
    stage.poll()
    assert stage.trusts()


# -- gaps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", [2.0, 60.0])
def test_after_a_gap_the_backlog_is_checked_again(away: float) -> None:
    """After a gap the older deliveries are checked again, because a rollback may have run them."""
    stage = Stage()
    stage.poll()
    before = stage.now

    stage.replace_leader(after=away)
    stage.poll(check_backlog=False)

    assert stage.trust.backlogs_to_check() == ["mail"]
    assert stage.trusts()
    assert not stage.trusts(before)
    stage.trust.backlog_checked("mail")
    assert stage.trusts(before)


def test_a_change_of_leaders_within_seconds_is_no_gap() -> None:
    """The next leader continues where the last one stopped."""
    stage = Stage()
    stage.poll()

    stage.replace_leader(after=1)
    stage.poll(check_backlog=False)

    assert stage.trust.backlogs_to_check() == []
    assert stage.trusts(NOW)


def test_what_redis_lost_is_trusted_across_a_gap() -> None:
    """A lost delivery is trusted across a gap if no unguarded worker was ever seen.

    The computer may have been restarted with all processes on it.
    """
    stage = Stage()
    stage.poll()

    stage.replace_leader(after=600)
    stage.poll(check_backlog=False)

    assert stage.trusts(NOW, lost=True)
    assert not stage.trusts(NOW)


def test_after_a_long_gap_a_loss_proves_nothing_if_unguarded_workers_were_seen() -> None:
    """An unguarded worker that was seen before may have run in a long gap, but not in a short one."""
    for gap, trusted in ((600.0, False), (12.0, True)):
        stage = Stage()
        stage.poll(MIXED)
        stage.poll(MIXED)
        for _ in range(30):
            stage.poll()
        assert stage.trusts(NOW)

        stage.replace_leader(after=gap)
        stage.poll(check_backlog=False)

        assert stage.trusts(NOW, lost=True) is trusted, gap


def test_a_leader_that_could_not_inspect_for_long_leaves_a_gap() -> None:
    """A leader that could not inspect for long leaves a gap: workers may have reached the Redis."""
    stage = Stage()
    stage.poll()

    stage.poll(after=600, check_backlog=False)

    assert not stage.trusts(NOW)
    assert stage.trust.backlogs_to_check() == ["mail"]


def test_a_leader_that_watched_all_the_while_leaves_no_gap() -> None:
    """In an outage of Postgres it cannot inspect, and its process watches the consumers in Redis."""
    stage = Stage()
    stage.poll()
    gaps: list[float] = []

    def vouches(gap: float) -> bool:
        gaps.append(gap)
        return gap < 700

    stage.trust.vouches = vouches
    stage.poll(after=600)
    assert stage.trusts(NOW)
    stage.poll(after=800, check_backlog=False)
    assert not stage.trusts(NOW)
    assert gaps == [600, 800]


def test_an_unguarded_worker_ends_the_trust() -> None:
    """While an unguarded worker consumes a queue, none of its deliveries is trusted, however old."""
    stage = Stage()
    stage.poll()
    stage.poll(MIXED)
    stage.poll(MIXED)

    assert not stage.trusts()
    assert not stage.trusts(NOW)
    assert stage.stored["mail"].unguarded == ("unguarded",)


def test_one_inspection_may_err() -> None:
    """A worker is in the library's registry a moment before its first beat: two inspections decide.

    Until the second inspection nothing is restored.
    """
    stage = Stage()
    stage.poll()

    assert stage.poll(MIXED) == []
    assert not stage.trusts()
    stage.poll()
    assert stage.trusts(NOW)

    assert stage.poll(MIXED) == []
    stage.poll()
    assert stage.trusts(NOW)


def test_a_worker_that_may_still_register() -> None:
    """Nothing is restored beside it, and the queue stays trusted until it is known to be unguarded."""
    stage = Stage()
    stage.poll()
    for _ in range(9):
        assert stage.poll(MIXED, expected=frozenset({"unguarded"})) == []
        assert not stage.trusts(NOW)
    assert stage.poll(MIXED, proved=frozenset({"unguarded"})) == []
    assert stage.trusts(NOW)
    stage.poll(MIXED, expected=frozenset({"unguarded"}))
    assert [row.unguarded for row in stage.poll(MIXED)] == [("unguarded",)]


def test_two_unknown_workers_seen_once_each() -> None:
    """Two workers that start one after the other each have the time of two inspections."""
    stage = Stage()
    stage.poll()

    stage.poll(GUARDED | {"second"})
    stage.poll(GUARDED | {"third"})
    stage.poll()

    assert stage.trusts()


def test_an_unguarded_worker_seen_once_prevents_trust() -> None:
    """An unguarded worker that was seen once keeps an untrusted queue untrusted."""
    stage = Stage()

    stage.poll(MIXED)

    assert stage.trust.backlogs_to_check() == []
    assert not stage.trusts()


def test_the_quiet_time_before_trust_returns() -> None:
    """After the last sight of an unguarded worker a queue stays untrusted for the quiet time."""
    stage = Stage()
    stage.poll(MIXED)
    stage.poll(MIXED)
    last_seen = stage.now

    while stage.now + 2 - last_seen < QUIET:
        stage.poll()
        assert not stage.trusts(), stage.now - last_seen
    stage.poll()

    assert stage.trusts()
    assert stage.stored["mail"].unguarded == ()


def test_an_unguarded_worker_that_stays_prevents_trust() -> None:
    """The quiet time counts from the last sight of an unguarded worker, not from the first."""
    stage = Stage()
    for _ in range(60):
        stage.poll(MIXED)

    stage.poll()

    assert not stage.trusts()


def test_after_a_loss_the_quiet_time_is_longer() -> None:
    """A registry of workers that was lost may hide an unguarded worker for ten minutes."""
    stage = Stage()
    stage.poll(MIXED)
    stage.poll(MIXED)
    stage.trust.registry_lost(stage.now)
    lost_at = stage.now

    while stage.now + 2 - lost_at < QUIET_AFTER_LOSS:
        stage.poll()
        assert not stage.trusts()
    stage.poll()

    assert stage.trusts()


def test_a_loss_takes_no_trust_away() -> None:
    """A queue that was trusted when Redis lost data stays trusted; otherwise nothing would be restored."""
    stage = Stage()
    stage.poll()

    stage.trust.registry_lost(stage.now)
    stage.poll(frozenset(), GUARDED)

    assert stage.trusts(NOW)


def test_trust_outlives_the_workers() -> None:
    """A queue scaled to zero stays trusted, for this leader and for the next."""
    stage = Stage()
    stage.poll()

    for _ in range(1000):
        stage.poll(frozenset(), frozenset())
    assert stage.trusts()

    stage.replace_leader()
    assert stage.trusts()
    assert stage.trusts(NOW - 3600)


def test_a_new_leader_takes_over_what_is_known() -> None:
    """A new leader knows the unguarded worker that an earlier leader saw."""
    stage = Stage()
    stage.poll(MIXED)
    stage.poll(MIXED)

    stage.replace_leader()
    stage.poll()

    assert not stage.trusts()


def test_a_new_leader_waits_the_quiet_time() -> None:
    """A new leader waits as long for an unguarded worker as the old one would have."""
    stage = Stage()
    for _ in range(100):
        stage.poll(MIXED)

    stage.replace_leader()
    stage.poll()

    assert not stage.trusts()


def test_only_changed_rows_are_returned() -> None:
    """An inspection without news changes no row."""
    stage = Stage()
    assert len(stage.poll()) == 1

    assert stage.poll() == []

    assert stage.poll(MIXED) == []
    assert [row.unguarded for row in stage.poll(MIXED)] == [("unguarded",)]
    assert stage.poll(MIXED) == []


def test_queues_do_not_answer_for_each_other() -> None:
    """An unguarded worker on one queue does not affect the trust in another queue."""
    trust = Trust(SOURCE, watching_since=NOW)
    for _ in range(2):
        trust.observe(
            NOW,
            {"mail": MIXED, "video": GUARDED},
            {"mail": GUARDED, "video": GUARDED},
            ["mail", "video"],
        )
    for queue in trust.backlogs_to_check():
        trust.backlog_checked(queue)

    assert trust.trusts("video", NOW)
    assert not trust.trusts("mail", NOW)
    assert not trust.trusts("unheard of", NOW)
