from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobguard.model import Cause, Outcome, Presence
from jobguard.reconciler.decision import Action, Decision, Holder, Situation, decide

P, H, C, V, O = Presence, Holder, Cause, Action, Outcome  # noqa: E741
PUTS_BACK = (Action.RESTORE, Action.REQUEUE)

# The fields that differ from a normal situation (trusted queue, no hold, all reports written); then
# the action, the outcome, and the note: "suspect" or "clear".
TABLE: list[tuple[str, dict[str, Any], Action, Outcome | None, str]] = [
    # The history has its end.
    ("ended", {"presence": P.ABSENT, "tombstone": O.COMPLETED}, V.CLOSE, O.COMPLETED, ""),
    ("ended, waiting", {"presence": P.WAITING, "tombstone": O.CANCELLED}, V.CLOSE, O.CANCELLED, ""),
    ("ended, run", {"presence": P.RUNNING, "holder": H.LIVE, "tombstone": O.SUPERSEDED}, V.CLOSE,
     O.SUPERSEDED, ""),
    # Its worker is alive.
    ("live, absent", {"presence": P.ABSENT, "holder": H.LIVE}, V.WAIT, None, "clear"),
    ("live, overwritten", {"presence": P.OVERWRITTEN, "holder": H.LIVE}, V.WAIT, None, "clear"),
    ("live, finished", {"presence": P.FINISHED, "holder": H.LIVE}, V.WAIT, None, "clear"),
    # The library has its end.
    ("finished", {"presence": P.FINISHED}, V.CLOSE, O.COMPLETED, ""),
    ("failed", {"presence": P.FAILED}, V.CLOSE, O.FAILED, ""),
    ("cancelled", {"presence": P.CANCELLED}, V.CLOSE, O.CANCELLED, ""),
    ("finished, died", {"presence": P.FINISHED, "holder": H.DEAD}, V.CLOSE, O.COMPLETED, ""),
    # Another delivery of its id is in its place.
    ("overwritten once", {"presence": P.OVERWRITTEN}, V.WAIT, None, "suspect"),
    ("overwritten, young", {"presence": P.OVERWRITTEN, "seen_for": 9.9}, V.WAIT, None, "suspect"),
    ("overwritten twice", {"presence": P.OVERWRITTEN, "seen_for": 10.0}, V.CLOSE, O.SUPERSEDED, ""),
    # Listed by a live worker, but not claimed.
    ("listed", {"presence": P.ABSENT, "in_flight": True, "seen_for": 99.0}, V.WAIT, None, "clear"),
    ("listed, dead claim", {"presence": P.ABSENT, "in_flight": True, "holder": H.DEAD}, V.WAIT, None,
     "clear"),
    # Redis has it in its place.
    ("waiting", {"presence": P.WAITING}, V.WAIT, None, "clear"),
    ("scheduled", {"presence": P.SCHEDULED}, V.WAIT, None, "clear"),
    ("waiting again", {"presence": P.WAITING, "holder": H.DEAD}, V.WAIT, None, "clear"),
    # Its worker is dead.
    ("died", {"presence": P.RUNNING, "holder": H.DEAD}, V.REQUEUE, None, ""),
    ("died, absent", {"presence": P.ABSENT, "holder": H.DEAD}, V.REQUEUE, None, ""),
    ("died, untrusted", {"presence": P.RUNNING, "holder": H.DEAD, "trusted": False}, V.HOLD, None,
     "suspect"),
    ("died, held", {"presence": P.RUNNING, "holder": H.DEAD, "held": True}, V.HOLD, None, ""),
    ("second death", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 1}, V.REQUEUE, None, ""),
    ("third death", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 2}, V.BURY, O.DEAD, ""),
    ("spent", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 3}, V.BURY, O.DEAD, ""),
    ("in company", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 3, "alone": False},
     V.REQUEUE, None, ""),
    ("spent, goodbye", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 3, "announced": True},
     V.REQUEUE, None, ""),
    ("spent, held", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 3, "held": True}, V.BURY,
     O.DEAD, ""),
    ("died, dead rule", {"presence": P.RUNNING, "holder": H.DEAD, "recover": "dead"}, V.BURY, O.DEAD, ""),
    ("left, dead rule", {"presence": P.ABSENT, "holder": H.DEAD, "announced": True, "recover": "dead"},
     V.BURY, O.DEAD, ""),
    ("dropped, never rule", {"presence": P.ABSENT, "holder": H.DROPPED, "alone": False,
     "recover": "never"}, V.BURY, O.DEAD, ""),
    ("died, dead rule, untrusted", {"presence": P.RUNNING, "holder": H.DEAD, "trusted": False,
     "recover": "dead"}, V.HOLD, None, "suspect"),
    ("live, dead rule", {"presence": P.RUNNING, "holder": H.LIVE, "recover": "dead"}, V.WAIT, None,
     "clear"),
    # Running without a claim.
    ("unclaimed run", {"presence": P.RUNNING}, V.WAIT, None, "clear"),
    ("run of the dead", {"presence": P.RUNNING, "cause": C.WORKER, "seen_for": 10.0}, V.RESTORE,
     None, ""),
    # Absent.
    ("expired", {"presence": P.ABSENT, "expired": True}, V.CLOSE, O.CANCELLED, ""),
    ("untrusted", {"presence": P.ABSENT, "trusted": False, "seen_for": 99.0}, V.HOLD, None,
     "suspect"),
    ("was untrusted", {"presence": P.ABSENT, "cause": C.UNTRUSTED, "seen_for": 99.0}, V.HOLD, None,
     "suspect"),
    ("unflushed", {"presence": P.ABSENT, "reports_complete": False, "seen_for": 99.0}, V.WAIT, None,
     "suspect"),
    ("unflushed, dead worker's", {"presence": P.ABSENT, "reports_complete": False, "cause": C.WORKER,
     "seen_for": 99.0}, V.RESTORE, None, ""),
    ("once", {"presence": P.ABSENT}, V.WAIT, None, "suspect"),
    ("within the grace", {"presence": P.ABSENT, "seen_for": 9.9}, V.WAIT, None, ""),
    ("held", {"presence": P.ABSENT, "seen_for": 10.0, "held": True}, V.HOLD, None, ""),
    ("unexplained, hold", {"presence": P.ABSENT, "seen_for": 10.0, "hold_unexplained": True},
     V.HOLD, None, "suspect"),
    ("explained, hold", {"presence": P.ABSENT, "seen_for": 10.0, "hold_unexplained": True,
     "cause": C.EVICTION}, V.RESTORE, None, ""),
    ("lost", {"presence": P.ABSENT, "seen_for": 10.0}, V.RESTORE, None, ""),
    ("lost, dead rule", {"presence": P.ABSENT, "seen_for": 10.0, "recover": "dead"}, V.RESTORE, None, ""),
    ("lost, never rule", {"presence": P.ABSENT, "seen_for": 10.0, "recover": "never"}, V.BURY, O.DEAD, ""),
    ("once, never rule", {"presence": P.ABSENT, "recover": "never"}, V.WAIT, None, "suspect"),
    ("held, never rule", {"presence": P.ABSENT, "seen_for": 10.0, "held": True, "recover": "never"},
     V.HOLD, None, ""),
    ("not sent, never rule", {"presence": P.ABSENT, "seen_for": 10.0, "unsent": True,
     "recover": "never"}, V.RESTORE, None, ""),
    ("push failed, never rule", {"presence": P.ABSENT, "seen_for": 10.0, "cause": C.PUSH,
     "recover": "never"}, V.RESTORE, None, ""),
    ("lost, no grace", {"presence": P.ABSENT, "grace": 0.0}, V.RESTORE, None, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "action", "outcome", "note"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_table(fields: dict[str, Any], action: Action, outcome: Outcome | None, note: str) -> None:
    """Each situation has its action, its outcome, and says whether to suspect or to clear."""
    decision = decide(Situation(**fields))

    assert (decision.action, decision.outcome) == (action, outcome)
    assert (decision.suspect, decision.clear) == (note == "suspect", note == "clear")
    assert decision.reason


def seconds() -> st.SearchStrategy[float]:
    """Return durations around the ones that matter."""
    return st.floats(0, 100)


CASES = st.builds(
    Situation,
    presence=st.sampled_from(Presence),
    holder=st.sampled_from(Holder),
    tombstone=st.none() | st.sampled_from(Outcome),
    in_flight=st.booleans(),
    cause=st.sampled_from(Cause),
    seen_for=st.none() | seconds(),
    grace=seconds(),
    reports_complete=st.booleans(),
    trusted=st.booleans(),
    held=st.booleans(),
    hold_unexplained=st.booleans(),
    expired=st.booleans(),
    announced=st.booleans(),
    alone=st.booleans(),
    crashes=st.integers(0, 5),
    crash_budget=st.integers(0, 5),
    recover=st.sampled_from([None, "dead", "never"]),
)
OWED = CASES.map(lambda situation: replace(situation, tombstone=None))


@given(OWED)
def test_a_run_that_must_not_be_repeated_never_is(situation: Situation) -> None:
    """With a rule, no claim is voided and nothing that was claimed is restored."""
    decision = decide(situation)

    if situation.recover is not None:
        assert decision.action is not Action.REQUEUE
        if situation.holder is not Holder.NONE:
            assert decision.action is not Action.RESTORE


@given(CASES, st.sampled_from(Outcome))
def test_a_tombstone_always_closes(situation: Situation, outcome: Outcome) -> None:
    """A delivery that the history has ended is closed with the outcome in the history."""
    decision = decide(replace(situation, tombstone=outcome))

    assert (decision.action, decision.outcome) == (Action.CLOSE, outcome)


@given(OWED)
def test_a_live_holder_is_left_alone(situation: Situation) -> None:
    """A delivery whose worker is alive and lists it waits, and its suspicion is cleared."""
    decision = decide(replace(situation, holder=Holder.LIVE))

    assert decision.action is Action.WAIT
    assert decision.clear


@given(OWED)
def test_a_listed_delivery_is_never_put_back(situation: Situation) -> None:
    """A delivery that a live worker lists is neither restored nor buried, claimed or not."""
    decision = decide(replace(situation, in_flight=True))

    assert decision.action in (Action.WAIT, Action.CLOSE)


@given(OWED, st.sampled_from([Presence.WAITING, Presence.SCHEDULED]))
def test_what_is_where_it_belongs_is_not_pushed_again(
    situation: Situation, presence: Presence
) -> None:
    """A delivery that waits in Redis is neither restored nor requeued."""
    assert decide(replace(situation, presence=presence)).action is Action.WAIT


@given(OWED)
def test_untrusted_is_never_put_back(situation: Situation) -> None:
    """A delivery that an unguarded worker may have run is never put back."""
    assert decide(replace(situation, trusted=False)).action not in PUTS_BACK


@given(OWED)
def test_a_suspect_from_before_the_trust_is_never_restored(situation: Situation) -> None:
    """A delivery that was absent before its queue was trusted is not restored while it has no claim."""
    decision = decide(replace(situation, cause=Cause.UNTRUSTED, holder=Holder.NONE))

    assert decision.action not in PUTS_BACK


@given(OWED)
def test_held_is_never_put_back(situation: Situation) -> None:
    """No delivery of a held queue is put back."""
    assert decide(replace(situation, held=True)).action not in PUTS_BACK


@given(OWED)
def test_a_restore_needs_two_inspections_a_grace_apart(situation: Situation) -> None:
    """Only a delivery seen absent a grace ago, unchanged, is restored; without a grace, at once."""
    if decide(situation).action is Action.RESTORE:
        assert situation.grace == 0 or (
            situation.seen_for is not None and situation.seen_for >= situation.grace
        )


@given(OWED)
def test_a_restore_needs_written_reports_or_a_dead_worker(situation: Situation) -> None:
    """While a worker has unwritten reports, only the job of a dead worker is restored."""
    decision = decide(replace(situation, reports_complete=False))

    assert decision.action is not Action.RESTORE or situation.cause is Cause.WORKER


@given(CASES)
def test_an_end_has_an_outcome_and_nothing_else_has(situation: Situation) -> None:
    """Only CLOSE and BURY have an outcome; only WAIT clears; only WAIT and HOLD suspect."""
    decision: Decision = decide(situation)

    ends = decision.action in (Action.CLOSE, Action.BURY)
    assert (decision.outcome is not None) == ends
    assert not (decision.suspect and decision.clear)
    assert not decision.clear or decision.action is Action.WAIT
    assert not decision.suspect or decision.action in (Action.WAIT, Action.HOLD)


@given(OWED)
def test_a_delivery_that_a_live_worker_dropped_waits_for_all_reports(situation: Situation) -> None:
    """A delivery that its live worker dropped waits for all reports.

    Its end, or the retry that replaced it, may be among the reports that are not written yet.
    """
    decision = decide(replace(situation, holder=Holder.DROPPED, reports_complete=False))

    assert decision.action in (Action.WAIT, Action.CLOSE)


@given(OWED)
def test_only_a_dead_workers_unannounced_claim_is_buried(situation: Situation) -> None:
    """A job is buried only for worker deaths: the worker that ran it is dead and the budget is spent."""
    if decide(situation).action is Action.BURY:
        assert situation.holder in (Holder.DEAD, Holder.DROPPED)
        assert situation.crashes + 1 >= situation.crash_budget
        assert situation.alone and not situation.announced


@given(OWED)
def test_a_death_in_company_is_charged_once(situation: Situation) -> None:
    """A death of a worker with several jobs is charged once.

    The job that caused it is unknown: later deaths count only for a job that ran alone.
    """
    decision = decide(replace(situation, alone=False, announced=False))

    if decision.action is Action.REQUEUE:
        assert decision.charge == (situation.crashes == 0)
    else:
        assert not decision.charge


@pytest.mark.parametrize("presence", [Presence.FINISHED, Presence.FAILED, Presence.CANCELLED])
def test_an_end_that_only_redis_knows_waits_for_the_workers_own_word(presence: Presence) -> None:
    """An end that only Redis knows waits for the report of the worker.

    The report says more: the error, and the part of the job in a join.
    """
    situation = Situation(presence, reports_complete=False)
    decision = decide(situation)
    assert (decision.action, decision.suspect) == (Action.WAIT, False)
    assert decide(replace(situation, reports_complete=True)).action is Action.CLOSE
