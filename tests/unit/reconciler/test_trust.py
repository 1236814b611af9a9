from __future__ import annotations

from jobguard.reconciler.trust import Trust
from jobguard.store.protocols import QueueRow

SOURCE = 7
NOW = 10_000.0
QUIET = 30.0
SETTLE_AFTER_LOSS = 600.0
GUARDED = frozenset({"ours"})
MIXED = frozenset({"ours", "stranger"})


class Stage:
    """A leader that looks at one queue every two seconds."""

    def __init__(self, *rows: QueueRow) -> None:
        self.now = NOW
        self.stored = {row.queue: row for row in rows}
        self.lead_anew()

    def lead_anew(self, *, after: float = 0.0) -> None:
        """Let another leader take over with what is stored, so many seconds later."""
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
        vouch: bool = True,
        counted: bool = True,
    ) -> list[QueueRow]:
        """Let time pass, look who consumes, and vouch where that is asked."""
        self.now += after
        changed = self.trust.observe(
            self.now, {"mail": consumers}, {"mail": guarded}, ["mail"], counted=counted
        )
        self.stored.update((row.queue, row) for row in changed)
        for queue in self.trust.backlogs_to_check() if vouch else ():
            self.stored[queue] = self.trust.backlog_checked(queue)
        return changed

    def trusts(self, recorded_at: float | None = None, *, lost: bool = False) -> bool:
        """Whether what was recorded then (default: now) is trusted."""
        at = self.now if recorded_at is None else recorded_at
        return self.trust.trusts("mail", at, lost=lost)


def test_only_guarded_consumers() -> None:
    """A queue all of whose consumers are guarded is trusted as soon as it was vouched for."""
    stage = Stage()
    assert not stage.trusts()

    stage.poll()

    assert stage.trusts()


def test_vouching_covers_what_was_recorded_before() -> None:
    """Once its older deliveries have been looked at, all of a queue is trusted."""
    stage = Stage()
    stage.poll(vouch=False)
    assert stage.trust.backlogs_to_check() == ["mail"]
    assert not stage.trusts(NOW - 3600)

    stage.trust.backlog_checked("mail")

    assert stage.trusts(NOW - 3600)
    assert stage.trust.backlogs_to_check() == []


def test_a_queue_without_any_consumer_is_trusted_from_the_first_record() -> None:
    """Where the consumers were counted and no unguarded one was ever seen, no worker need be there."""
    stage = Stage()
    nobody: frozenset[str] = frozenset()

    stage.poll(nobody, nobody)

    assert stage.trusts(NOW - 3600)


def test_where_consumers_are_not_counted_a_guarded_worker_must_be_seen() -> None:
    """Names alone do not prove that no unguarded worker is there."""
    stage = Stage()
    nobody: frozenset[str] = frozenset()

    for _ in range(100):
        stage.poll(nobody, nobody, counted=False)

    assert not stage.trusts()
    stage.poll(counted=False)
    assert stage.trusts()


def test_where_a_stranger_was_seen_a_guarded_worker_must_be_seen() -> None:
    """A queue that had an unguarded worker, and now has none at all, is not yet trusted."""
    stage = Stage()
    nobody: frozenset[str] = frozenset()
    stage.poll(MIXED)
    stage.poll(MIXED)

    for _ in range(100):
        stage.poll(nobody, nobody)

    assert not stage.trusts()
    stage.poll()
    assert stage.trusts()


# -- gaps ------------------------------------------------------------------------------------------


def test_after_a_gap_what_is_older_is_vouched_for_again() -> None:
    """A rollback may have run the older deliveries while no leader looked."""
    stage = Stage()
    stage.poll()
    before = stage.now

    stage.lead_anew(after=60)
    stage.poll(vouch=False)

    assert stage.trust.backlogs_to_check() == ["mail"]
    assert stage.trusts()
    assert not stage.trusts(before)
    stage.trust.backlog_checked("mail")
    assert stage.trusts(before)


def test_a_change_of_leaders_within_seconds_is_no_gap() -> None:
    """The next leader goes on where the last one stopped."""
    stage = Stage()
    stage.poll()

    stage.lead_anew(after=1)
    stage.poll(vouch=False)

    assert stage.trust.backlogs_to_check() == []
    assert stage.trusts(NOW)


def test_what_redis_lost_is_trusted_across_a_gap() -> None:
    """The computer was restarted with all that was on it; no unguarded worker was ever seen there."""
    stage = Stage()
    stage.poll()

    stage.lead_anew(after=600)
    stage.poll(vouch=False)

    assert stage.trusts(NOW, lost=True)
    assert not stage.trusts(NOW)


def test_after_a_long_gap_a_loss_proves_nothing_where_strangers_were_seen() -> None:
    """An unguarded worker that was there before may have been there in the gap; not in a short one."""
    for gap, trusted in ((600.0, False), (12.0, True)):
        stage = Stage()
        stage.poll(MIXED)
        stage.poll(MIXED)
        for _ in range(30):
            stage.poll()
        assert stage.trusts(NOW)

        stage.lead_anew(after=gap)
        stage.poll(vouch=False)

        assert stage.trusts(NOW, lost=True) is trusted, gap


def test_a_leader_that_could_not_look_for_long_leaves_a_gap() -> None:
    """Workers may have reached the Redis that the leader could not reach."""
    stage = Stage()
    stage.poll()

    stage.poll(after=600, vouch=False)

    assert not stage.trusts(NOW)
    assert stage.trust.backlogs_to_check() == ["mail"]


def test_a_stranger_takes_the_trust_away() -> None:
    """I1: while a stranger consumes a queue, nothing of it is trusted, however old."""
    stage = Stage()
    stage.poll()
    stage.poll(MIXED)
    stage.poll(MIXED)

    assert not stage.trusts()
    assert not stage.trusts(NOW)
    assert stage.stored["mail"].unguarded == ("stranger",)


def test_one_look_may_err() -> None:
    """A worker is in the library's registry a moment before its first beat: it takes two looks.

    Until the second look nothing is restored.
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


def test_two_strangers_seen_once_each() -> None:
    """Two workers that come up one after the other are each given their moment."""
    stage = Stage()
    stage.poll()

    stage.poll(GUARDED | {"second"})
    stage.poll(GUARDED | {"third"})
    stage.poll()

    assert stage.trusts()


def test_a_first_look_at_a_stranger_trusts_nothing() -> None:
    """Where a stranger was seen once, a queue not yet trusted does not become so."""
    stage = Stage()

    stage.poll(MIXED)

    assert stage.trust.backlogs_to_check() == []
    assert not stage.trusts()


def test_it_settles_before_it_is_trusted_again() -> None:
    """After the last look at a stranger a queue stays untrusted for the settling time."""
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


def test_a_stranger_that_stays_keeps_it_unsettled() -> None:
    """The settling time counts from the last look at a stranger, not from the first."""
    stage = Stage()
    for _ in range(60):
        stage.poll(MIXED)

    stage.poll()

    assert not stage.trusts()


def test_after_a_loss_it_settles_for_longer() -> None:
    """A registry of workers that was lost may hide a stranger for ten minutes."""
    stage = Stage()
    stage.poll(MIXED)
    stage.poll(MIXED)
    stage.trust.registry_lost(stage.now)
    lost_at = stage.now

    while stage.now + 2 - lost_at < SETTLE_AFTER_LOSS:
        stage.poll()
        assert not stage.trusts()
    stage.poll()

    assert stage.trusts()


def test_a_loss_takes_no_trust_away() -> None:
    """A queue that was trusted when Redis lost data stays so, or nothing would ever be restored."""
    stage = Stage()
    stage.poll()

    stage.trust.registry_lost(stage.now)
    stage.poll(frozenset(), GUARDED)

    assert stage.trusts(NOW)


def test_trust_outlives_the_workers() -> None:
    """I2: a queue scaled to zero stays trusted, for this leader and for the next."""
    stage = Stage()
    stage.poll()

    for _ in range(1000):
        stage.poll(frozenset(), frozenset())
    assert stage.trusts()

    stage.lead_anew()
    assert stage.trusts()
    assert stage.trusts(NOW - 3600)


def test_a_new_leader_takes_over_what_is_known() -> None:
    """A stranger of yesterday is not forgotten by a change of leaders."""
    stage = Stage()
    stage.poll(MIXED)
    stage.poll(MIXED)

    stage.lead_anew()
    stage.poll()

    assert not stage.trusts()


def test_a_new_leader_lets_it_settle_anew() -> None:
    """A stranger seen until the change of leaders is waited for as if there had been no change."""
    stage = Stage()
    for _ in range(100):
        stage.poll(MIXED)

    stage.lead_anew()
    stage.poll()

    assert not stage.trusts()


def test_only_changes_are_told() -> None:
    """A look that shows nothing new is no news to write."""
    stage = Stage()
    assert len(stage.poll()) == 1

    assert stage.poll() == []

    assert stage.poll(MIXED) == []
    assert [row.unguarded for row in stage.poll(MIXED)] == [("stranger",)]
    assert stage.poll(MIXED) == []


def test_queues_do_not_answer_for_each_other() -> None:
    """A stranger on one queue leaves the trust in another."""
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
