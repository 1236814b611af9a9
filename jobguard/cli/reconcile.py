"""``jobguard reconcile``: watch Redis and put lost jobs back."""

from __future__ import annotations

import click

from jobguard import log
from jobguard.cli.common import (
    json_option,
    namespace_option,
    postgres_option,
    print_json,
    redis_option,
    redis_urls_from,
    settings_of,
)
from jobguard.conninfo import postgres_conninfo
from jobguard.errors import ConfigurationError
from jobguard.reconciler import service
from jobguard.sealing import Sealer


@click.command()
@postgres_option
@namespace_option
@redis_option
@click.option("--once", is_flag=True, help="Make one full pass, print the result, and exit.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    envvar="JOBGUARD_LOG_LEVEL",
    show_envvar=True,
    help="Lowest level that is logged to stderr.",
)
@click.option(
    "--log-json",
    is_flag=True,
    envvar="JOBGUARD_LOG_JSON",
    show_envvar=True,
    help="Log one JSON object per line.",
)
@json_option
def command(
    postgres: str | None,
    namespace: str | None,
    redis_urls: tuple[str, ...],
    once: bool,
    log_level: str,
    log_json: bool,
    as_json: bool,
) -> None:
    """Watch Redis and put lost jobs back.

    Run two or more on different machines: one leads, the others are ready to take over. After SIGTERM
    another one leads at once.
    """
    log.configure(log_level, log_json)
    settings = settings_of(namespace)
    urls = redis_urls_from(redis_urls)
    if not urls:
        raise ConfigurationError("no Redis URL: give --redis URL, or set JOBGUARD_REDIS_URL")
    Sealer(settings.encrypt).check()
    counts = service.run(settings, postgres_conninfo(postgres), urls, once=once)
    if once and as_json:
        print_json(counts)
    elif once:
        for name, count in counts.items():
            click.echo(f"{name:20} {', '.join(count) if isinstance(count, list) else count}")
    if once and not counts.get("leads", True):
        click.echo("another reconciler leads this namespace: this pass did nothing", err=True)
    for address in counts.get("unfinished", ()):
        click.echo(
            f"error: the source {address} was not inspected completely: its Redis did not answer, or "
            "no --redis URL is its address; see `jobguard doctor`",
            err=True,
        )
    if counts.get("unfinished") or counts.get("misplaced"):
        raise click.exceptions.Exit(1)
