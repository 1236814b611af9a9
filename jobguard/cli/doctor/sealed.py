"""The setting ``encrypt``: owed envelopes are sealed, and this process has a key that opens them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jobguard.cli.doctor.finding import Finding, ok, problem
from jobguard.errors import JobguardError, NoRights, Unsealable
from jobguard.sealing import Sealer
from jobguard.settings import Settings

_SAMPLE = 500


def judge_sealed(conninfo: Callable[[], str], settings: Settings) -> Iterator[Finding]:
    """Look at the envelopes of the oldest and the newest owed jobs."""
    sealer = Sealer(settings.encrypt)
    try:
        sealer.check()
        stored = _envelopes(conninfo)
    except NoRights:
        return
    except JobguardError as error:
        yield problem("encryption", str(error))
        return
    unreadable = plain = 0
    for envelope in stored:
        try:
            plain += sealer.unseal(envelope) == envelope
        except (Unsealable, JobguardError):
            unreadable += 1
    if unreadable:
        yield problem(
            "encryption",
            f"{unreadable} of {len(stored)} owed jobs that were looked at are sealed with another key",
            "a reconciler with these settings cannot put them back",
            "JOBGUARD_ENCRYPT=FILE, with the keys that producers use",
        )
    elif sealer.active and plain:
        yield problem(
            "encryption",
            f"{plain} of {len(stored)} owed jobs that were looked at are not sealed",
            "their arguments can be read in the database",
            "set JOBGUARD_ENCRYPT in every producer and worker, then run `jobguard encrypt rotate`",
        )
    elif sealer.active:
        yield ok("encryption", "owed jobs are sealed, and can be unsealed here")


def _envelopes(conninfo: Callable[[], str]) -> list[bytes]:
    import psycopg

    from jobguard.postgres_hosts import writable

    one_end = "(select envelope from jobguard.jobs order by token {} limit %s)"
    query = f"{one_end.format('')} union all {one_end.format('desc')}"
    try:
        with psycopg.connect(
            writable(conninfo()), connect_timeout=5, prepare_threshold=None
        ) as connection:
            rows = connection.execute(query.encode(), [_SAMPLE, _SAMPLE]).fetchall()
    except psycopg.errors.InsufficientPrivilege as error:
        raise NoRights(str(error)) from error
    return [bytes(envelope) for (envelope,) in rows]
