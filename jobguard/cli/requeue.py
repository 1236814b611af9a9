"""``jobguard requeue``: put back owed jobs that jobguard does not put back by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import click

from jobguard.cli.common import (
    json_option,
    namespace_option,
    open_ledger,
    postgres_option,
    requeue_each,
    safe,
)
from jobguard.cli.dead import queue_option
from jobguard.errors import JobguardError
from jobguard.model import Outcome
from jobguard.store.protocols import Ledger


@click.command()
@postgres_option
@namespace_option
@click.argument("job_ids", metavar="[JOB_ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All owed jobs that are absent from Redis.")
@queue_option
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@json_option
def command(
    postgres: str | None,
    namespace: str | None,
    job_ids: tuple[str, ...],
    everything: bool,
    queue: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Put owed jobs that are not recovered back into their queues, as new deliveries.

    Such jobs are absent from Redis: an unguarded worker may have run them (`untrusted`), or they were put
    back twice and disappeared again. First check whether they have run, because every job that is put back
    runs again. A job that is named by its id may also be pending, failed or dead. The leader pushes them.
    """
    if everything == bool(job_ids):
        raise click.UsageError("give job ids or --all")
    if queue and not everything:
        raise click.UsageError("--queue needs --all")
    with open_ledger(postgres, namespace) as (ledger, tenant):
        rows: Sequence[Any] = (
            ledger.absent(tenant, queue=queue)
            if everything
            else [_named(ledger, tenant, job_id) for job_id in job_ids]
        )
        found = [row for row in rows if not isinstance(row, JobguardError)]
        for line in _counts(found):
            click.echo(safe(line), err=as_json)
        if found and not yes:
            click.confirm(f"Put {len(found)} jobs back?", abort=True, err=as_json)
        requeue_each(ledger, tenant, rows, "requeue", as_json=as_json)


def _named(ledger: Ledger, namespace: str, job_id: str) -> Any:
    """Return the newest delivery of the job that can be put back, or the reason why there is none."""
    for row in ledger.job(namespace, job_id):
        if row["state"] in (Outcome.COMPLETED, Outcome.CANCELLED):
            return JobguardError(f"job {job_id} is {row['state']}: it is not put back")
        if row["state"] != Outcome.SUPERSEDED:
            return {**row, "cause": row["suspected"] or row["state"]}
    return JobguardError(f"no job {job_id} is known in the namespace {namespace!r}")


def _counts(rows: Sequence[Any]) -> Iterable[str]:
    counts = Counter((row["queue"], row["cause"]) for row in rows)
    for (queue, cause), count in sorted(counts.items()):
        yield f"{count} of queue {queue}: {cause}"
