"""``jobguard doctor``: check everything that jobguard relies on.

Each module checks one thing and yields findings. A check that cannot be made is a problem, and the others
continue. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict

import click

from jobguard.cli.common import (
    cell,
    console,
    json_option,
    namespace_option,
    postgres_option,
    print_json,
    redis_option,
    redis_urls_from,
    safe,
    settings_of,
)
from jobguard.cli.doctor.finding import CheckResult, Finding, note, problem
from jobguard.cli.doctor.ledger import judge_ledger
from jobguard.cli.doctor.libraries import judge_app, judge_workers
from jobguard.cli.doctor.postgres import check_postgres
from jobguard.cli.doctor.redis_server import Reached, check_redis, judge_rights
from jobguard.cli.doctor.rollout import judge_rollout
from jobguard.cli.doctor.sealed import judge_sealed
from jobguard.cli.doctor.sources import judge_idle, judge_sources, judge_streams
from jobguard.conninfo import postgres_conninfo
from jobguard.errors import JobguardError
from jobguard.operations.read import ReadModel
from jobguard.settings import Settings, disabled, unknown_variables


@click.command()
@postgres_option
@namespace_option
@redis_option
@click.option(
    "--app",
    metavar="MODULE:NAME",
    multiple=True,
    help="Import this application (a Celery, a Queue, a RedisBroker) and check its settings.",
)
@click.option(
    "--rollout", is_flag=True, help="Also check whether JOBGUARD_MODE=observe may be removed now."
)
@json_option
def command(
    postgres: str | None,
    namespace: str | None,
    redis_urls: tuple[str, ...],
    app: tuple[str, ...],
    rollout: bool,
    as_json: bool,
) -> None:
    """Check everything that jobguard relies on; exit 1 if something is wrong."""
    settings = settings_of(namespace)
    conninfo = postgres_conninfo(postgres)
    findings = list(
        examine(settings, conninfo, redis_urls_from(redis_urls), apps=app, rollout=rollout)
    )
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    if any(finding.verdict is CheckResult.PROBLEM for finding in findings):
        raise click.exceptions.Exit(1)


def examine(
    settings: Settings,
    conninfo: Callable[[], str],
    redis_urls: Sequence[str],
    *,
    apps: Sequence[str] = (),
    rollout: bool = False,
) -> Iterator[Finding]:
    """Check everything. A check that cannot be made is a problem, and the others continue."""
    if disabled():
        yield problem("settings", "JOBGUARD_DISABLED is set: nothing is guarded")
    for variable in unknown_variables():
        yield note("settings", f"jobguard has no variable {variable}")
    for app in apps:
        yield from judge_app(app)
    schema_fits = False
    for finding in check_postgres(conninfo, pooler=settings.pooler):
        schema_fits |= finding.about == "schema" and finding.verdict is CheckResult.OK
        yield finding
    reached: list[Reached] = []
    for url in redis_urls:
        yield from check_redis(url, reached)
    if not redis_urls:
        yield note("redis", "no URL was given: give --redis URL, or set JOBGUARD_REDIS_URL")
    if not schema_fits:
        return
    with closing(ReadModel(conninfo, encrypt=settings.encrypt)) as ledger:
        try:
            overview = ledger.overview(settings.namespace)
            yield from judge_ledger(settings, overview)
            yield from judge_sources(settings, overview["sources"], reached)
            yield from judge_rights(overview, reached)
            yield from judge_streams(settings, overview["sources"], reached)
            yield from judge_idle(ledger, settings, overview["sources"], reached)
            workers = ledger.workers(settings.namespace)
            yield from judge_workers(conninfo, settings, workers)
            yield from judge_sealed(conninfo, settings)
            if rollout:
                yield from judge_rollout(overview, workers)
        except JobguardError as error:
            yield problem("ledger", str(error))
        finally:
            for one in reached:
                one.client.close()


_COLOURS = {CheckResult.OK: "green", CheckResult.NOTE: "yellow", CheckResult.PROBLEM: "bold red"}


def _print(findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    for finding in findings:
        parts = [finding.detail]
        if finding.consequence:
            parts.append(f"So: {finding.consequence}.")
        if finding.fix:
            parts.append(f"Change: {finding.fix}")
        table.add_row(
            Text(str(finding.verdict), _COLOURS[finding.verdict]),
            cell(finding.about),
            Text("\n".join(map(safe, parts))),
        )
    console().print(table)
