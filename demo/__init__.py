"""`jobguard demo`: jobs survive a Redis without persistence that is killed with -9.

Workers import this package too, for the tasks. So modules with a long import time are imported only
by the command.
"""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobguard.demo import libraries

if TYPE_CHECKING:
    from rich.console import Console

    from jobguard.demo.figures import Figures
    from jobguard.demo.harness import Plan

__all__ = ["command"]


def _cores() -> int:
    # Where the system knows it, count the cores that we may use, not those of the machine.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@click.command("demo")
@click.option("--jobs", type=click.IntRange(min=200), default=10_000, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=None,
    show_default="rq: 2 for each core; celery: 2 with a child for each core;"
    " dramatiq: 2 processes with 30 threads",
)
@click.option(
    "--kills",
    type=click.IntRange(min=1, max=20),
    default=2,
    show_default=True,
    help="How often Redis is killed; a worker is killed once besides.",
)
@click.option(
    "--library",
    type=click.Choice(libraries.NAMES),
    default="rq",
    show_default=True,
    help="Whose jobs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--compare", is_flag=True, help="Run without jobguard first, and show both.")
@click.option(
    "--seed", type=int, default=None, help="For the moments of the kills; printed, else by chance."
)
@click.option(
    "--sabotage",
    is_flag=True,
    help="Forbid the reconciler to put anything back, to see that the demo can fail.",
)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Keep the ledger and the logs of all processes in this folder.",
)
@click.option("--unguarded", is_flag=True, hidden=True, help="Only the run without jobguard.")
def command(
    jobs: int,
    workers: int | None,
    kills: int,
    library: str,
    as_json: bool,
    compare: bool,
    seed: int | None,
    sabotage: bool,
    keep: Path | None,
    unguarded: bool,
) -> None:
    """Kill Redis and a worker under load, and count what was lost.

    A Redis without persistence is killed with -9 at peak load and restarted empty; a worker is
    killed with -9 in the middle of a job. The figures come from a ledger that the tasks write and
    jobguard never sees. The exit code is 1 if anything was lost, or completed twice without the
    excuse of a worker that was killed between its last line and its report.
    """
    if unguarded and (compare or sabotage):
        raise click.UsageError("--unguarded goes neither with --compare nor with --sabotage")
    try:
        from rich.console import Console

        from jobguard.demo.harness import DemoError, Plan
        from jobguard.demo.servers import ServerError

        known = libraries.named(library)
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"the demo needs the package {error.name}; do: pip install 'jobguard[{library},embedded]'"
        ) from error

    plan = Plan(
        jobs=jobs,
        worker_pool=known.worker_pool(workers, _cores()),
        cores=_cores(),
        kills=kills,
        seed=random.randrange(10_000) if seed is None else seed,
        library=known,
        guarded=not unguarded,
        sabotage=sabotage,
        keep=keep,
    )
    # With --json, the display goes to stderr: stdout is for the object.
    console = Console(stderr=as_json)
    # Raise KeyboardInterrupt on SIGTERM, so that our children are ended in this case too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        columns = _runs(plan, compare=compare, console=console)
    except (DemoError, ServerError) as error:
        raise click.ClickException(str(error)) from error
    _report(columns, as_json=as_json, console=console)
    raise SystemExit(0 if columns[-1][1].promise_is_kept else 1)


def _runs(plan: Plan, *, compare: bool, console: Console) -> list[tuple[str, Figures]]:
    from dataclasses import replace

    from jobguard.demo.harness import run
    from jobguard.demo.screen import Screen

    console.print(
        f"{plan.jobs:,} {plan.library.title} jobs, {_worker_pool(plan)} on {plan.cores} cores,"
        f" {plan.kills} kills of Redis and one of a worker, seed {plan.seed}",
        highlight=False,
    )
    plans = [replace(plan, guarded=False, sabotage=False), plan] if compare else [plan]
    columns = []
    for one in plans:
        name = "with jobguard" if one.guarded else "without jobguard"
        if one.sabotage:
            name = "with jobguard sabotaged"
        console.rule(name)
        with Screen(console) as screen:
            columns.append((name, run(one, screen)))
    return columns


def _worker_pool(plan: Plan) -> str:
    worker_pool = plan.worker_pool
    at_once = (
        f" that run {worker_pool.at_once} at once"
        if worker_pool.at_once > worker_pool.workers
        else ""
    )
    return f"{worker_pool.workers} workers{at_once}"


def _report(columns: list[tuple[str, Figures]], *, as_json: bool, console: Console) -> None:
    from jobguard.demo.screen import show_results

    if not as_json:
        show_results(console, columns)
        return
    result: dict[str, Any] = columns[-1][1].public()
    if len(columns) > 1:
        result["unguarded"] = columns[0][1].public()
    click.echo(json.dumps(result))
