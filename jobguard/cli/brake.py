"""``jobguard pause`` and ``jobguard resume``: the brake."""

from __future__ import annotations

import click

from jobguard.cli.common import (
    json_option,
    namespace_option,
    open_ledger,
    postgres_option,
    print_json,
)

queue_option = click.option("--queue", metavar="NAME", help="Only this queue.")


@click.command()
@postgres_option
@namespace_option
@queue_option
@click.option("--force", is_flag=True, help="Accept a queue that no job or worker has named yet.")
@json_option
def pause(
    postgres: str | None, namespace: str | None, queue: str | None, force: bool, as_json: bool
) -> None:
    """Stop putting jobs back until `jobguard resume`; this takes effect within a second.

    Producers and workers continue, and are recorded.
    """
    with open_ledger(postgres, namespace) as (ledger, tenant):
        ledger.pause(tenant, queue=queue, force=force)
        brake = ledger.overview(tenant)["brake"]
    if as_json:
        print_json({"namespace": tenant, **brake})
    else:
        click.echo(f"paused: {_scope(tenant, queue)}")


@click.command()
@postgres_option
@namespace_option
@queue_option
@click.option(
    "--moved",
    is_flag=True,
    help="Accept this database, which was moved or restored on purpose.",
)
@json_option
def resume(
    postgres: str | None, namespace: str | None, queue: str | None, moved: bool, as_json: bool
) -> None:
    """Allow jobs to be put back again after `jobguard pause`, or after jobguard held a queue."""
    if moved and queue is not None:
        raise click.UsageError("--moved applies to the whole database, not to one queue")
    with open_ledger(postgres, namespace) as (ledger, tenant):
        ledger.resume(tenant, queue=queue, moved=moved)
        brake = ledger.overview(tenant)["brake"]
    if as_json:
        print_json({"namespace": tenant, **brake})
        return
    click.echo(f"resumed: {_scope(tenant, queue)}")
    if brake["paused_at"] and queue is not None:
        click.echo(f"but the whole namespace {tenant} is still paused: run `jobguard resume`")


def _scope(namespace: str, queue: str | None) -> str:
    return f"the namespace {namespace}" if queue is None else f"queue {queue} of {namespace}"
