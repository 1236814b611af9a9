"""What the commands share that change many jobs: they count first, and ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click

from jobguard.cli.common import print_json, redis_urls_from, safe
from jobguard.operations.brokers import Brokers

F = TypeVar("F", bound=Callable[..., Any])

yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Count what would be changed, and change nothing."
)


def brokers_from(urls: tuple[str, ...]) -> Brokers:
    """Return the brokers for the Redis URLs of the command line or the environment."""
    return Brokers(redis_urls_from(urls))


def confirm(
    verb: str, rows: Sequence[Mapping[str, Any]], *, yes: bool, dry_run: bool, as_json: bool
) -> bool:
    """Print how many jobs of which queue and state are concerned; return True if they shall be changed.

    Raises click.Abort if the person says no.
    """
    counts = Counter((row["queue"], row["state"]) for row in rows)
    if as_json and dry_run:
        print_json(
            [{"queue": q, "state": s, "jobs": count} for (q, s), count in sorted(counts.items())]
        )
        return False
    for (queue, state), count in sorted(counts.items()):
        click.echo(safe(f"{count} of queue {queue}: {state}"), err=as_json)
    if not rows:
        click.echo("none", err=as_json)
        return False
    if dry_run:
        return False
    if not yes:
        jobs = "1 job" if len(rows) == 1 else f"{len(rows)} jobs"
        click.confirm(f"{verb} {jobs}?", abort=True, err=as_json)
    return True


def report(verb: str, done: int, problems: Iterable[str], *, as_json: bool) -> None:
    """Print what was done. Raises Exit with 1 if there are problems."""
    found = sorted(set(problems))
    if as_json:
        print_json({"jobs": done, "problems": found})
    else:
        click.echo(f"{verb}: {done}")
    for problem in found[:20]:
        click.echo(safe(f"warning: {problem}"), err=True)
    if found:
        raise click.exceptions.Exit(1)


def described(words: Mapping[str, Any]) -> str:
    """Return the options that were given, as a note keeps them."""
    given = {name: value for name, value in words.items() if value not in (None, (), "", False)}
    return " ".join(f"{name}={_text(value)}" for name, value in given.items())


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value[:20])) + ("…" if len(value) > 20 else "")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
