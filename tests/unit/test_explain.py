from __future__ import annotations

from typing import Any

import pytest

from jobguard.model import Presence
from jobguard.operations.explain import duration, why_ended, why_owed
from jobguard.settings import Settings

SETTINGS = Settings()


def owed(**more: Any) -> dict[str, Any]:
    """Return a delivery that waits in Redis, as ReadModel.standing describes it."""
    calm: dict[str, Any] = {
        "queue": "mail", "age": 30.0, "due_in": 0.0, "backoff": 0.0, "crashes": 0,
        "claim_number": None, "running_for": None, "runs": False, "worker_known": False,
        "worker_name": None, "beat_age": None, "dead_for": None, "left_for": None,
        "suspected": None, "suspected_for": None, "in_outbox": False, "unsent": False,
        "trusted": True, "unguarded": [], "led": True, "paused_at": None, "held": None,
    }  # fmt: skip
    return calm | more


def claimed(**more: Any) -> dict[str, Any]:
    """Return a delivery that a worker has claimed."""
    claim = {"claim_number": 1, "running_for": 9.0, "worker_known": True, "worker_name": "w1"}
    return owed(**(claim | {"beat_age": 1.0} | more))


@pytest.mark.parametrize(
    ("row", "presence", "sentence"),
    [
        (owed(), Presence.WAITING, "it waits in Redis for a worker of queue mail, for 30 s"),
        (owed(), None, "recorded 30 s ago, and waits for a worker as far as is known"),
        (owed(due_in=300.0), Presence.SCHEDULED, "due in 5 min; Redis holds it until then"),
        (
            owed(due_in=300.0),
            Presence.ABSENT,
            "due in 5 min, and absent from Redis; goes back in 10 s",
        ),
        (claimed(runs=True), Presence.RUNNING, "it runs for 9 s on w1, which beat 1 s ago"),
        (
            claimed(dead_for=4.0, backoff=11.0),
            Presence.RUNNING,
            "claimed by a worker that died 4 s ago; goes back in 11 s",
        ),
        (
            claimed(dead_for=4.0),
            Presence.RUNNING,
            "claimed by a worker that died 4 s ago; goes back now",
        ),
        (
            claimed(dead_for=4.0, crashes=1),
            Presence.RUNNING,
            "claimed by a worker that died 4 s ago (death 2); goes back now",
        ),
        (
            claimed(beat_age=10.0),
            Presence.RUNNING,
            "claimed by w1, which has been silent for 10 s; goes back in 8 s",
        ),
        (
            owed(suspected="incident", suspected_for=0.0),
            Presence.ABSENT,
            "absent from Redis (incident); goes back in 1 s",
        ),
        (
            owed(suspected="unexplained", suspected_for=4.0),
            Presence.ABSENT,
            "absent from Redis (unexplained); goes back in 6 s",
        ),
        (
            owed(suspected="unexplained", suspected_for=4.0, led=False),
            Presence.ABSENT,
            "absent from Redis (unexplained); no reconciler leads: run `jobguard reconcile`",
        ),
        (
            owed(suspected="incident", suspected_for=4.0, paused_at="now"),
            Presence.ABSENT,
            "absent from Redis (incident); recoveries are paused: `jobguard resume`",
        ),
        (
            owed(suspected="unexplained", suspected_for=1.0, held={"reason": "many vanish"}),
            Presence.ABSENT,
            "absent from Redis (unexplained); queue mail is held (many vanish): "
            "`jobguard resume --queue NAME`",
        ),
        (
            owed(suspected="untrusted", trusted=False),
            Presence.ABSENT,
            "absent from Redis, and an unguarded worker may have run it: check, then `jobguard requeue`",
        ),
        (
            owed(crashes=1, backoff=20.0, suspected="worker"),
            Presence.ABSENT,
            "its worker died (1 of 3 times); it goes back in 20 s",
        ),
        (owed(in_outbox=True), Presence.ABSENT, "recorded, and the leader pushes it at once"),
        (
            owed(suspected="incident"),
            Presence.WAITING,
            "it was seen absent, and Redis has it again; the leader forgets the suspicion",
        ),
    ],
)
def test_why_an_owed_job_stands_there(
    row: dict[str, Any], presence: Presence | None, sentence: str
) -> None:
    """One sentence says where an owed delivery is, and what happens to it next."""
    assert why_owed(row, presence, SETTINGS) == sentence


def test_why_a_job_has_ended() -> None:
    """The sentence of an ended delivery names the next step, or the delivery that came after it."""
    dead = {"state": "dead", "next": None, "crashes": 3}
    assert why_ended(dead).startswith("given up: 3 worker deaths; `jobguard dead requeue`")
    ruled = dead | {"crashes": 0, "errors": ["lost before its run, and recover='never' forbids it"]}
    assert why_ended(ruled).startswith(
        "given up: lost before its run, and recover='never' forbids it;"
    )
    again = {"state": "failed", "next": "t", "crashes": 0}
    assert why_ended(again) == "failed; it was sent again as delivery t"


def test_durations_are_short() -> None:
    """A length of time has one unit."""
    assert [duration(s) for s in (-1, 4, 119, 121, 7300, 400_000)] == [
        *("0 s", "4 s", "119 s", "2 min", "2 h", "5 d")
    ]
