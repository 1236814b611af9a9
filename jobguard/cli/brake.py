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

queue_option = click.option("--queue", metavar="NAME", help="This queue alone.")


@click.command()
@postgres_option
@namespace_option
@queue_option
@json_option
def pause(postgres: str | None, namespace: str | None, queue: str | None, as_json: bool) -> None:
    """Put nothing back until `jobguard resume`; holds within a second.

    Enqueueing and working go on, and are recorded.
    """
    with open_ledger(postgres, namespace) as (ledger, tenant):
        ledger.pause(tenant, queue=queue)
        brake = ledger.overview(tenant)["brake"]
    if as_json:
        print_json({"namespace": tenant, **brake})
    else:
        click.echo(f"paused: {_what(tenant, queue)}")


@click.command()
@postgres_option
@namespace_option
@queue_option
@click.option(
    "--moved",
    is_flag=True,
    help="This database was moved or restored on purpose, and is the one that counts now.",
)
@json_option
def resume(
    postgres: str | None, namespace: str | None, queue: str | None, moved: bool, as_json: bool
) -> None:
    """Go on after `jobguard pause`, or after jobguard held a queue by itself."""
    if moved and queue is not None:
        raise click.UsageError("--moved is about the whole database, not about one queue")
    with open_ledger(postgres, namespace) as (ledger, tenant):
        ledger.resume(tenant, queue=queue, moved=moved)
        brake = ledger.overview(tenant)["brake"]
    if as_json:
        print_json({"namespace": tenant, **brake})
        return
    click.echo(f"resumed: {_what(tenant, queue)}")
    if brake["paused_at"] and queue is not None:
        click.echo(f"but all of the namespace {tenant} is paused: `jobguard resume`")


def _what(namespace: str, queue: str | None) -> str:
    return f"the namespace {namespace}" if queue is None else f"queue {queue} of {namespace}"
