"""Tasks whose effects must not repeat: what is lost goes to the dead letters, and not back."""

from __future__ import annotations

import jobguard
from tests.conformance.library import Library
from tests.conformance.words import BRISK, Records, end, environ
from tests.support import eventually

RULES = {
    f"{prefix}{task}": rule
    for prefix in ("", "tests.conformance.tasks.")
    for task, rule in (("die", "dead"), ("say", "never"))
}


def test_a_killed_run_is_dead_and_ran_once(
    library: Library, records: Records, database: str
) -> None:
    """Its worker was killed in the run: no worker runs it again. What Redis lost is not restored."""
    given = ",".join(f"{task}={rule}" for task, rule in RULES.items())
    env = {**environ(database, library.redis_url), "JOBGUARD_RECOVER": given}
    with jobguard.guard(library.target(), postgres=database, recover=RULES, **BRISK) as guard:
        first = library.start_worker(env)
        try:
            eventually(lambda: guard.reconcile() and records.trusted(), 30)
            job_id = library.send("die")
            first.wait(120)
        finally:
            end(first)
        eventually(lambda: guard.reconcile() and records.ended(job_id) == [("dead", 1)], 30)
        lost = library.send("say")
        library.client.flushall()
        eventually(lambda: guard.reconcile() and records.ended(lost) == [("dead", 1)], 30)
        second = library.start_worker(env)  # may report the death; runs nothing
        try:
            eventually(lambda: library.waiting() == [], 30)
        finally:
            end(second)
        assert library.said() == ["ran"]
        assert records.owed() == []
