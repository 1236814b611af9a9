"""``jobguard dead``: the jobs that were given up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import click

from jobguard.cli.bulk import confirm, described, dry_run_option, report, yes_option
from jobguard.cli.common import (
    age,
    cell,
    console,
    json_option,
    namespace_option,
    open_ledger,
    postgres_option,
    print_json,
    requeue_each,
    table_of,
)
from jobguard.errors import JobguardError
from jobguard.model import Outcome
from jobguard.store.protocols import Ledger

_MANY = 1000
"""Largest number of failed jobs that are counted."""

queue_option = click.option("--queue", metavar="NAME", help="Only this queue.")
failed_option = click.option(
    "--failed", is_flag=True, help="Also jobs that the library itself gave up (failed)."
)


@click.group()
def command() -> None:
    """List and requeue jobs that were given up.

    A job is dead when it has caused as many worker deaths as its crash budget allows (3: with the third
    death). A job is failed when its library gave it up.
    """


@command.command("list")
@postgres_option
@namespace_option
@queue_option
@failed_option
@click.option("--limit", type=click.IntRange(1), default=100, help="Largest number of jobs.")
@json_option
def list_(
    postgres: str | None,
    namespace: str | None,
    queue: str | None,
    failed: bool,
    limit: int,
    as_json: bool,
) -> None:
    """List jobs that were given up and not requeued since, newest first.

    Jobs that the library gave up after the last retry (failed, a dead letter) are only counted;
    --failed lists them.
    """
    with open_ledger(postgres, namespace) as (ledger, tenant):
        rows = ledger.dead(tenant, outcomes=_outcomes(failed), queue=queue, limit=limit)
        others = (
            []
            if failed or as_json
            else ledger.dead(tenant, outcomes=[Outcome.FAILED], queue=queue, limit=_MANY)
        )
    if as_json:
        print_json(rows)
    elif rows:
        _print_table(rows)
    else:
        click.echo("none")
    if others:
        count = f"{_MANY} or more" if len(others) == _MANY else len(others)
        click.echo(f"failed in their library: {count}; list them with --failed")


@command.command()
@postgres_option
@namespace_option
@click.argument("job_ids", metavar="[JOB_ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All jobs that `list` shows.")
@queue_option
@failed_option
@json_option
def requeue(
    postgres: str | None,
    namespace: str | None,
    job_ids: tuple[str, ...],
    everything: bool,
    queue: str | None,
    failed: bool,
    as_json: bool,
) -> None:
    """Put jobs that were given up back into their queues, as new deliveries of the same jobs.

    The leader pushes them. A job that is named by its id may be dead or failed.
    """
    if everything == bool(job_ids):
        raise click.UsageError("give job ids or --all")
    if job_ids and (queue or failed):
        raise click.UsageError("--queue and --failed need --all")
    with open_ledger(postgres, namespace) as (ledger, tenant):
        rows = (
            _everything(ledger, tenant, _outcomes(failed), queue)
            if everything
            else (_given_up(ledger, tenant, job_id) for job_id in job_ids)
        )
        requeue_each(ledger, tenant, rows, "dead requeue", as_json=as_json)


@command.command()
@postgres_option
@namespace_option
@click.argument("job_id")
@json_option
@click.pass_context
def show(
    ctx: click.Context, postgres: str | None, namespace: str | None, job_id: str, as_json: bool
) -> None:
    """Tell everything about one job that was given up: `jobguard jobs show` without Redis."""
    from jobguard.cli.jobs import show as show_job

    ctx.invoke(
        show_job,
        postgres=postgres,
        namespace=namespace,
        redis_urls=(),
        job_id=job_id,
        no_redis=True,
        as_json=as_json,
    )


@command.command()
@postgres_option
@namespace_option
@click.argument("job_ids", metavar="[JOB_ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All jobs that `list` shows.")
@queue_option
@failed_option
@yes_option
@dry_run_option
@json_option
def purge(
    postgres: str | None,
    namespace: str | None,
    job_ids: tuple[str, ...],
    everything: bool,
    queue: str | None,
    failed: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Drop jobs that were given up: they count as cancelled, and cannot be requeued any more."""
    if everything == bool(job_ids):
        raise click.UsageError("give job ids or --all")
    if job_ids and (queue or failed):
        raise click.UsageError("--queue and --failed need --all")
    with open_ledger(postgres, namespace) as (ledger, tenant):
        given: Iterable[Any] = (
            _everything(ledger, tenant, _outcomes(failed), queue)
            if everything
            else (_given_up(ledger, tenant, job_id) for job_id in job_ids)
        )
        rows = list(given)
        found = [row for row in rows if not isinstance(row, JobguardError)]
        problems = [str(row) for row in rows if isinstance(row, JobguardError)]
        done = 0
        if confirm("Drop", found, yes=yes, dry_run=dry_run, as_json=as_json):
            words = described({"ids": job_ids, "queue": queue, "failed": failed})
            done = ledger.purge_dead(tenant, found, words)
        if problems or (found and not dry_run):
            report("dropped", done, problems, as_json=as_json)


def _outcomes(failed: bool) -> list[Outcome]:
    return [Outcome.DEAD, Outcome.FAILED] if failed else [Outcome.DEAD]


def _given_up(ledger: Ledger, namespace: str, job_id: str) -> Any:
    """Return the newest ended delivery of the job, or the reason why there is none."""
    for row in ledger.job(namespace, job_id):
        if row["ended_at"] is None:
            return JobguardError(
                f"job {job_id} is {row['state']}: it was not given up; `jobguard requeue` "
                "puts owed jobs back"
            )
        if row["state"] != Outcome.SUPERSEDED:
            return row
    return JobguardError(f"no job {job_id} is known in the namespace {namespace!r}")


def _everything(
    ledger: Ledger, namespace: str, outcomes: Sequence[Outcome], queue: str | None
) -> Iterable[Any]:
    # A requeued job leaves the list. A job that cannot be requeued stays in it, and is tried once.
    offered: set[Any] = set()
    while True:
        limit = len(offered) + 1000
        rows = ledger.dead(namespace, outcomes=outcomes, queue=queue, limit=limit)
        fresh = [row for row in rows if row["token"] not in offered]
        if not fresh:
            return
        offered.update(row["token"] for row in fresh)
        yield from fresh


def _print_table(rows: Sequence[Any]) -> None:
    numbers = ("attempt", "crashes")
    names = ("job", "queue", "task", "state", "ended", "attempt", "crashes", "last error")
    table = table_of({name: "right" if name in numbers else "left" for name in names})
    for row in rows:
        errors = row["errors"] or [""]
        last = (errors[-1] or "").strip().splitlines() or [""]
        table.add_row(
            *map(cell, (row["job_id"], row["queue"], row["task"], row["state"])),
            f"{age(row['ended_at'])} ago",
            str(row["attempt"]),
            str(row["crashes"]),
            cell(last[-1][:100]),
        )
    console().print(table)
