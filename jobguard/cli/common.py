"""Options and output functions that the commands share."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

from jobguard.conninfo import postgres_conninfo
from jobguard.errors import ConfigurationError, JobguardError, StoreUnavailable
from jobguard.operations.explain import duration
from jobguard.operations.text import HOSTILE, visible
from jobguard.redis_urls import split_urls
from jobguard.settings import Settings, settings_from, unknown_variables

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from jobguard.operations.act import Operations

F = TypeVar("F", bound=Callable[..., Any])

# settings.py and conninfo.py read the variables of these options, because they support files and
# fallbacks. click must not read them first, so `allow_from_autoenv` is off.
postgres_option = click.option(
    "--postgres",
    metavar="URL",
    allow_from_autoenv=False,
    help="The database of the ledger.  [env: JOBGUARD_POSTGRES_URL, JOBGUARD_POSTGRES_URL_FILE, "
    "DATABASE_URL]",
)
namespace_option = click.option(
    "--namespace",
    metavar="NAME",
    allow_from_autoenv=False,
    help="The tenant.  [env: JOBGUARD_NAMESPACE; default: default]",
)
redis_option = click.option(
    "--redis",
    "redis_urls",
    metavar="URL",
    multiple=True,
    allow_from_autoenv=False,
    help="A guarded Redis; may be given several times.  [env: JOBGUARD_REDIS_URL, separated by spaces, "
    "JOBGUARD_REDIS_URL_FILE, REDIS_URL]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def settings_of(namespace: str | None = None) -> Settings:
    """Return the settings of the environment, with the namespace of the command line."""
    for variable in unknown_variables():
        click.echo(f"warning: jobguard has no variable {variable}", err=True)
    return settings_from({"namespace": namespace})


def redis_urls_from(given: tuple[str, ...], environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the Redis URLs of the command line, or those of the environment if there are none."""
    environ = os.environ if environ is None else environ
    if given:
        return [url for urls in given for url in split_urls(urls)]
    named = secret_from("REDIS_URL", environ) or environ.get("REDIS_URL", "")
    return split_urls(named)


def secret_from(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the secret of JOBGUARD_<name>_FILE or JOBGUARD_<name>; None if there is none."""
    environ = os.environ if environ is None else environ
    if path := environ.get(f"JOBGUARD_{name}_FILE", "").strip():
        try:
            with open(path, encoding="utf-8") as file:
                return file.read().strip() or None
        except OSError as error:
            raise ConfigurationError(f"JOBGUARD_{name}_FILE: {error}") from error
    return environ.get(f"JOBGUARD_{name}", "").strip() or None


@contextmanager
def open_ledger(postgres: str | None, namespace: str | None) -> Iterator[tuple[Operations, str]]:
    """Give the ledger and the namespace that the command line or the environment names.

    Raise WrongInstallation if JOBGUARD_INSTALLATION names another database than this one.
    """
    from jobguard.operations.act import Operations

    settings = settings_of(namespace)
    made = Operations(postgres_conninfo(postgres), keep=True, encrypt=settings.encrypt)
    with closing(made) as ledger:
        ledger.require_installation(settings.installation)
        yield ledger, settings.namespace


def safe(text: object) -> str:
    """Return a text for a terminal: queue names, ids and errors may contain what it would obey."""
    return visible(text)


def print_json(value: Any) -> None:
    """Print one JSON value, with times in ISO 8601."""
    ascii_only = "utf" not in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    text = json.dumps(_finite(value), default=_plain, ensure_ascii=ascii_only, indent=2)
    lines = (
        HOSTILE.sub(lambda found: f"\\u{ord(found[0]):04x}", line) for line in text.split("\n")
    )
    click.echo("\n".join(lines))


class Moment(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since click 8.4
    """A time: ISO 8601, or how long ago: 30s, 10m, 2h, 3d."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Return the time; without an offset, it is local."""
        if isinstance(value, datetime):
            return value
        try:
            if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", value.strip()):
                size = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[found[2]]
                return datetime.now(UTC) - timedelta(seconds=float(found[1]) * size)
            return datetime.fromisoformat(value.strip()).astimezone()
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time: give 2026-01-31T14:00, or 10m for ten minutes ago")


MOMENT = Moment()


def table_of(columns: Mapping[str, str]) -> Table:
    """Return an empty table: the title of each column, and "right" or "left". Texts are not folded."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title, side in columns.items():
        table.add_column(title, justify="right" if side == "right" else "left", overflow="fold")
    return table


def cell(text: object) -> Text:
    """Return the cell of a table: no markup, no control characters."""
    from rich.text import Text

    return Text(safe("" if text is None else text))


def age(at: datetime | None) -> str:
    """Return how long ago a time was."""
    return "" if at is None else ago((datetime.now(UTC) - at).total_seconds())


def console() -> Console:
    """Return rich's console. In a pipe or a file its lines are not folded."""
    from rich.console import Console

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(width=None if is_terminal else 240, highlight=False)


def ago(seconds: float | None) -> str:
    """Return an age in a short form: 5 s, 3 min, 2 h, 4 d."""
    return "" if seconds is None else duration(seconds)


def _finite(value: Any) -> Any:
    """Return the value with null for numbers that JSON does not have, such as a progress of NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def requeue_each(
    ledger: Operations, namespace: str, rows: Iterable[Any], action: str, *, as_json: bool
) -> None:
    """Requeue each delivery and report it; a row may be the error that explains why there is none.

    Raises Exit with 1 if a row is an error or could not be requeued, and StoreUnavailable.
    """
    done: list[dict[str, Any]] = []
    problems = 0
    note = ledger.note(namespace, action, "")
    try:
        for row in rows:
            try:
                if isinstance(row, JobguardError):
                    raise row
                token = ledger.send_one(namespace, row)
            except StoreUnavailable:
                raise
            except JobguardError as error:
                problems += 1
                click.echo(safe(f"error: {error}"), err=True)
                continue
            done.append({"job_id": row["job_id"], "queue": row["queue"], "token": token})
            if not as_json:
                click.echo(safe(f"requeued {row['job_id']} in {row['queue']}"))
    finally:
        ledger.noted(note, len(done))
    if as_json:
        print_json(done)
    elif not done and not problems:
        click.echo("none")
    if problems:
        raise click.exceptions.Exit(1)
