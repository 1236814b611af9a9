"""An effect of a job happens once, even if the job runs again."""

from __future__ import annotations

import psycopg

from jobguard.guard import JobGuard
from tests.conformance.library import Library
from tests.conformance.words import Records
from tests.support import eventually


def test_the_effects_of_a_retried_job_happen_once(
    library: Library, guard: JobGuard, records: Records, database: str
) -> None:
    """A job that failed after its effects does not repeat them, in a transaction or outside of one."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table public.payments (id int generated always as identity)")
        job_id = library.send("pay", database, retries=1)
        library.work()
        library.move_delayed()
        library.work()
        eventually(lambda: [o for o, _ in records.ended(job_id)][-1:] == ["completed"])
        assert library.said() == ["mail:paid", "sms"]
        assert connection.execute("select count(*) from public.payments").fetchone() == (2,)
