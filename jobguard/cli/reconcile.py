"""``jobguard reconcile``: watch Redis and put lost jobs back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import click

from jobguard import log
from jobguard.cli.common import (
    json_option,
    namespace_option,
    postgres_option,
    print_json,
    redis_option,
    redis_urls_from,
    secret_from,
    settings_of,
)
from jobguard.conninfo import postgres_conninfo
from jobguard.errors import ConfigurationError, JobguardError
from jobguard.reconciler.service import (
    Clients,
    Service,
    clients_from_urls,
    run_once,
    stop_on_signals,
)
from jobguard.sealing import Sealer
from jobguard.serving.http import Endpoints, HttpServer
from jobguard.serving.notify import Notifier, Watcher, receivers
from jobguard.settings import Settings

if TYPE_CHECKING:
    from jobguard.operations.read import ReadModel

_ANSWER = 30.0
"""Seconds that metrics and notices wait for an answer of a PostgreSQL that may be gone without a word."""


@click.command()
@postgres_option
@namespace_option
@redis_option
@click.option("--once", is_flag=True, help="Make one full pass, print the result, and exit.")
@click.option(
    "--http",
    metavar="HOST:PORT",
    envvar="JOBGUARD_RECONCILE_HTTP",
    show_envvar=True,
    help="Serve /livez, /readyz, /metrics and POST /tick.",
)
@click.option(
    "--on-tick",
    is_flag=True,
    help="Make a pass at each POST /tick only.  [secret: JOBGUARD_TICK_SECRET, "
    "JOBGUARD_TICK_SECRET_FILE]",
)
@click.option(
    "--notify-command",
    metavar="COMMAND",
    envvar="JOBGUARD_NOTIFY_COMMAND",
    show_envvar=True,
    help="Run this at an incident, a hold or a dead job, with JSON as its input. For a webhook set "
    "JOBGUARD_NOTIFY_URL or JOBGUARD_NOTIFY_URL_FILE.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
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
    http: str | None,
    on_tick: bool,
    notify_command: str | None,
    log_level: str,
    log_json: bool,
    as_json: bool,
) -> None:
    """Watch Redis and put lost jobs back.

    Run two or more on different machines: one leads, the others are ready to take over. After SIGTERM
    another one leads at once.

    Where nothing can run all the time, let cron start it with --once, or a scheduler of HTTP requests
    call POST /tick of one with --on-tick. A loss is then put back at the next pass.
    """
    if once and (http or on_tick):
        raise click.UsageError("--once excludes --http and --on-tick")
    if on_tick and not http:
        raise click.UsageError("--on-tick needs --http")
    log.configure(log_level, log_json)
    settings = settings_of(namespace)
    urls = redis_urls_from(redis_urls)
    if not urls:
        raise ConfigurationError("no Redis URL: give --redis URL, or set JOBGUARD_REDIS_URL")
    Sealer(settings.encrypt).check()
    conninfo = postgres_conninfo(postgres)
    told = receivers(secret_from("NOTIFY_URL"), notify_command)
    clients = clients_from_urls(urls)
    if once:
        _once(settings, conninfo, clients, as_json=as_json)
        return
    if on_tick:
        assert http is not None
        _serve_ticks(http, settings, conninfo, clients)
        return
    service = Service(settings, conninfo, clients)
    stop_on_signals(service)
    with ExitStack() as stack:
        if http or told:
            model = stack.enter_context(closing(_read_model(conninfo, settings)))
        if http:
            endpoints = Endpoints(
                live=service.stuck,
                ready=service.unready,
                metrics=_metrics(model, settings.namespace, service),
            )
            stack.enter_context(closing(HttpServer(http, endpoints)))
        if told:
            watcher = Watcher(model, settings.namespace)
            stack.enter_context(closing(Notifier(watcher, told, lambda: service.leads)))
        service.run()


def _once(
    settings: Settings, conninfo: Callable[[], str], clients: Clients, *, as_json: bool
) -> None:
    service = Service(settings, conninfo, clients)
    if threading.current_thread() is threading.main_thread():
        stop_on_signals(service)
    counts = service.once()
    if as_json:
        print_json(counts)
    else:
        for name, count in counts.items():
            click.echo(f"{name:20} {', '.join(count) if isinstance(count, list) else count}")
    if not counts["leads"]:
        click.echo("another reconciler leads this namespace: this pass did nothing", err=True)
    for address in counts["unfinished"]:
        click.echo(
            f"error: the source {address} was not inspected completely: its Redis did not answer, or "
            "no --redis URL is its address; see `jobguard doctor`",
            err=True,
        )
    if counts["unfinished"] or counts.get("misplaced"):
        raise click.exceptions.Exit(1)


def _serve_ticks(
    http: str, settings: Settings, conninfo: Callable[[], str], clients: Clients
) -> None:
    """Serve until SIGTERM or SIGINT."""
    failed: list[str] = []

    def tick() -> Mapping[str, Any]:
        failed.clear()
        try:
            return run_once(settings, conninfo, clients)
        except JobguardError as error:
            failed.append(str(error))
            raise

    model = _read_model(conninfo, settings)
    endpoints = Endpoints(
        live=lambda: None,
        ready=lambda: failed[0] if failed else None,
        metrics=_metrics(model, settings.namespace, None),
        tick=tick,
        secret=secret_from("TICK_SECRET"),
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    with closing(model), closing(HttpServer(http, endpoints)):
        stop.wait()


def _read_model(conninfo: Callable[[], str], settings: Settings) -> ReadModel:
    # Loaded here: SQLAlchemy takes more time and memory than all the rest, and restores no job.
    from jobguard.operations.read import ReadModel

    return ReadModel(conninfo, answer_timeout=_ANSWER, encrypt=settings.encrypt)


def _metrics(
    model: ReadModel, namespace: str, service: Service | None
) -> Callable[[], tuple[str, bytes]] | None:
    try:
        from jobguard.serving.metrics import Metrics
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("prometheus_client"):
            return None
        raise
    return Metrics(model, namespace, service).page
