"""``jobguard replay``: run again what ran in a window of time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

import click

from jobguard.cli.bulk import confirm, described, dry_run_option, report, yes_option
from jobguard.cli.common import (
    MOMENT,
    json_option,
    namespace_option,
    open_ledger,
    postgres_option,
)
from jobguard.model import Outcome
from jobguard.operations.act import REPLAYED


@click.command()
@postgres_option
@namespace_option
@click.option(
    "--since", type=MOMENT, metavar="TIME", required=True, help="Ended at this time or later."
)
@click.option(
    "--until", type=MOMENT, metavar="TIME", help="Ended before this time.  [default: now]"
)
@click.option("--queue", metavar="NAME", help="Only this queue.")
@click.option("--task", metavar="NAME", help="Only this task.")
@click.option(
    "--outcome",
    "outcomes",
    type=click.Choice([outcome.value for outcome in REPLAYED]),
    multiple=True,
    default=["completed"],
    help="How they ended; may be given several times.",
)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Largest number a second.")
@yes_option
@dry_run_option
@json_option
def command(
    postgres: str | None,
    namespace: str | None,
    since: datetime,
    until: datetime | None,
    queue: str | None,
    task: str | None,
    outcomes: tuple[str, ...],
    rate: float | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send jobs again that ended in a window, as new deliveries of the same jobs, oldest first.

    Completed jobs can be replayed only if the reconciler ran with keep_envelopes when they ended. A job
    that was sent again since, by its application or by a replay, is left out: an interrupted replay can
    be repeated.
    """
    until = until or datetime.now(UTC)
    if since >= until:
        raise click.UsageError("--since must be before --until")
    wanted = {"since": since, "until": until, "queue": queue, "task": task, "outcomes": outcomes}
    with open_ledger(postgres, namespace) as (ledger, tenant):
        found = list(
            ledger.ended_in(
                tenant,
                since,
                until,
                outcomes=[Outcome(outcome) for outcome in outcomes],
                queue=queue,
                task=task,
            )
        )
        kept = [row for row in found if row["kept"]]
        if len(kept) < len(found):
            click.echo(
                f"{len(found) - len(kept)} more jobs ended in this window, and their messages were not "
                "kept: the reconciler keeps them with JOBGUARD_KEEP_ENVELOPES=1",
                err=True,
            )
        if confirm("Run again", kept, yes=yes, dry_run=dry_run, as_json=as_json):
            words = described(wanted)
            done, problems = ledger.send_again(
                tenant, kept, "replay", words, outcomes=REPLAYED, pace=_pace(rate)
            )
            report("sent again", done, problems, as_json=as_json)


def _pace(rate: float | None) -> Callable[[], None]:
    """Return a function that waits so that it returns at most ``rate`` times a second."""
    due = time.monotonic()

    def wait() -> None:
        nonlocal due
        if rate is not None:
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due, time.monotonic() - 1) + 1 / rate

    return wait
