"""``jobguard dashboard``: the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import uvicorn

from jobguard import log
from jobguard.cli.common import (
    namespace_option,
    postgres_option,
    redis_option,
    redis_urls_from,
    settings_of,
)
from jobguard.dashboard import app
from jobguard.dashboard.access import is_loopback
from jobguard.errors import ConfigurationError

_PORT = 8797


class _Port(click.IntRange):
    """A port. The URL that Kubernetes sets as JOBGUARD_DASHBOARD_PORT for a service is ignored."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        if isinstance(value, str) and value.startswith("tcp://"):
            value = _PORT
        return super().convert(value, param, ctx)


@click.command()
@postgres_option
@namespace_option
@redis_option
@click.option("--host", default="127.0.0.1", help="Address to listen at.")
@click.option(
    "--port",
    type=_Port(0, 65535),
    default=_PORT,
    help="Port to listen at.",
)
@click.option("--token", help="Needed to see the page.  [env: JOBGUARD_DASHBOARD_TOKEN]")
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with the token.  [env: JOBGUARD_DASHBOARD_TOKEN_FILE]",
)
@click.option("--read-only", is_flag=True, help="Nothing can be changed.")
@click.option("--root-path", default="", help="The path under which a proxy shows the page.")
def command(
    postgres: str | None,
    namespace: str | None,
    redis_urls: tuple[str, ...],
    host: str,
    port: int,
    token: str | None,
    token_file: Path | None,
    read_only: bool,
    root_path: str,
) -> None:
    """Show jobs, queues, incidents and workers in a browser, and act on them.

    Without a token it listens only at an address of this machine. It speaks plain HTTP: put a proxy with
    TLS in front of it. Another ASGI application can mount the same page: jobguard.dashboard.app().
    """
    if token_file is not None:
        token = token_file.read_text(encoding="utf-8").strip()
    if not is_loopback(host) and not token:
        raise ConfigurationError(
            f"{host} can be reached from other machines: give --token or --token-file "
            "(JOBGUARD_DASHBOARD_TOKEN), or listen at 127.0.0.1"
        )
    log.configure("info", False)
    page = app(
        postgres,
        namespace=settings_of(namespace).namespace,
        redis=redis_urls_from(redis_urls),
        token=token or None,
        read_only=read_only,
    )
    click.echo(f"http://{host}:{port}{root_path}/", err=True)
    uvicorn.run(
        page,
        host=host,
        port=port,
        root_path=root_path,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=3,
    )
