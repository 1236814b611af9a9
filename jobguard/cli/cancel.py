"""``jobguard cancel``, ``purge`` and ``forget``: jobs that must not run, or not be kept."""

from __future__ import annotations

from datetime import datetime

import click

from jobguard.cli.bulk import brokers_from, confirm, described, dry_run_option, report, yes_option
from jobguard.cli.common import (
    MOMENT,
    json_option,
    namespace_option,
    open_ledger,
    postgres_option,
    redis_option,
    safe,
)
from jobguard.operations.act import WAITING
from jobguard.operations.read import OWED_STATES, JobFilter


@click.command()
@postgres_option
@namespace_option
@redis_option
@click.argument("job_ids", metavar="[JOB_ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All jobs that wait.")
@click.option("--queue", metavar="NAME", help="Jobs of this queue.")
@click.option("--task", metavar="NAME", help="Jobs of this task.")
@click.option("--priority", type=int, help="Jobs of this priority.")
@click.option(
    "--due-before", type=MOMENT, metavar="TIME", help="Jobs scheduled for an earlier time."
)
@click.option(
    "--state",
    "states",
    type=click.Choice(OWED_STATES),
    multiple=True,
    help="Jobs in this state; without it, all that no worker runs.",
)
@yes_option
@dry_run_option
@json_option
def command(
    postgres: str | None,
    namespace: str | None,
    redis_urls: tuple[str, ...],
    job_ids: tuple[str, ...],
    everything: bool,
    queue: str | None,
    task: str | None,
    priority: int | None,
    due_before: datetime | None,
    states: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Cancel jobs: by id, or all that fit every given option.

    They do not run, also if Redis loses or still has them. A job that a worker runs is cancelled only if
    it is named, or with --state processing; its run is not stopped.
    """
    given = {"queue": queue, "task": task, "priority": priority, "due_before": due_before}
    chosen = states or any(value is not None for value in given.values())
    if bool(job_ids) == bool(everything or chosen):
        raise click.UsageError("give job ids, or --all, or options that select jobs")
    with open_ledger(postgres, namespace) as (ledger, tenant):
        if job_ids:
            rows = [row for job_id in job_ids for row in ledger.owed_named(tenant, job_id)]
            missing = sorted(set(job_ids) - {row["job_id"] for row in rows})
        else:
            wanted = JobFilter(
                states or WAITING, queue, task, priority=priority, due_before=due_before
            )
            rows, missing = ledger.owed_of(tenant, wanted), []
            if not states:  # a stuck one may be in the hands of a worker that lives
                rows = [row for row in rows if row["state"] != "processing"]
        for job_id in missing:
            click.echo(
                safe(f"error: job {job_id} is not owed: it ended, or is not known"), err=True
            )
        ask = not yes and not (job_ids and len(job_ids) == 1)
        if confirm("Cancel", rows, yes=not ask, dry_run=dry_run, as_json=as_json):
            words = described({"ids": job_ids, "states": states, **given})
            done, problems = ledger.cancel(tenant, rows, brokers_from(redis_urls), words)
            report("cancelled", done, problems, as_json=as_json)
    if missing:
        raise click.exceptions.Exit(1)


@click.command()
@postgres_option
@namespace_option
@redis_option
@click.argument("queue")
@yes_option
@dry_run_option
@json_option
def purge(
    postgres: str | None,
    namespace: str | None,
    redis_urls: tuple[str, ...],
    queue: str,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Cancel everything that waits in a queue, also what is scheduled; running jobs go on."""
    with open_ledger(postgres, namespace) as (ledger, tenant):
        rows = [
            row
            for row in ledger.owed_of(tenant, JobFilter(WAITING, queue))
            if row["state"] != "processing"
        ]
        if confirm("Cancel", rows, yes=yes, dry_run=dry_run, as_json=as_json):
            words = f"purge of queue {queue}"
            done, problems = ledger.cancel(tenant, rows, brokers_from(redis_urls), words)
            report("cancelled", done, problems, as_json=as_json)


@click.command()
@postgres_option
@namespace_option
@redis_option
@click.argument("job_id")
@yes_option
@json_option
def forget(
    postgres: str | None,
    namespace: str | None,
    redis_urls: tuple[str, ...],
    job_id: str,
    yes: bool,
    as_json: bool,
) -> None:
    """Erase the arguments, message and errors of a job, in PostgreSQL and in Redis.

    Its id, queue, task, times and outcome stay, so that it cannot run again. A job that still waits is
    cancelled. Results in another store than the guarded Redis, logs and backups are not reached.
    """
    with open_ledger(postgres, namespace) as (ledger, tenant):
        if not yes:
            click.confirm(safe(f"Erase job {job_id} for good?"), abort=True, err=as_json)
        done, problems = ledger.forget(tenant, job_id, brokers_from(redis_urls))
        report("deliveries erased", done, problems, as_json=as_json)
