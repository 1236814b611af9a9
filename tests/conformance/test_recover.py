"""Tasks whose effects must not repeat: what is lost goes to the dead letters, and not back."""

from __future__ import annotations

import psycopg

import jobguard
from jobguard.adapter import Source
from jobguard.hooks import JobEvent
from tests.conformance.library import Library
from tests.conformance.words import BRISK, Records, another_worker, end, environ
from tests.support import eventually

RULES = {
    f"{prefix}{task}": rule
    for prefix in ("", "tests.conformance.tasks.")
    for task, rule in (("die", "dead"), ("say", "never"))
}


def test_a_killed_run_is_dead_and_ran_once(
    library: Library, records: Records, database: str
) -> None:
    """A killed or lost job runs no more, and a worker calls the function for dead jobs once for each."""
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
        dead: list[tuple[str | None, str]] = []

        @guard.on("dead")
        def note(event: JobEvent) -> None:
            dead.append((event.job.id, type(event.error).__name__))
            raise RuntimeError("a wrong hook")

        lost = library.send("say")
        library.client.flushall()
        library.work()  # Its beats say that it is to learn of each dead job.
        eventually(lambda: guard.reconcile() and records.ended(lost) == [("dead", 1)], 30)
        library.work()
        library.work()
        assert dead[-1] == (lost, "WorkersDied")
        assert [job_id for job_id, _ in dead].count(lost) == 1
        assert library.said() == ["ran"]
        assert (records.owed(), library.waiting()) == ([], [])


def test_a_start_that_finds_its_run_lost_tells_the_application(
    library: Library, records: Records, source: Source, database: str
) -> None:
    """A start that makes its job dead calls the function for dead jobs once, and never the job's own."""
    rules = dict.fromkeys((name for name in RULES if name.endswith("say")), "dead")
    with jobguard.guard(library.target(), postgres=database, recover=rules, **BRISK) as guard:
        dead: list[str | None] = []
        guard.on("dead")(lambda event: dead.append(event.job.id))
        job_id = library.send("say")
        (owed,) = records.owed()
        with another_worker(database, source, owed):
            with psycopg.connect(database) as connection:
                connection.execute("update jobguard.workers set dead_at = now()")
            library.work()
        assert (dead, library.said()) == ([job_id], [])
        assert records.ended(job_id) == [("dead", 1)]
