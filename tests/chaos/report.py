"""The report of all runs: a table, a result, and one JSON object."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tests.chaos import soak
from tests.chaos.libraries import LIBRARIES
from tests.chaos.plan import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tests.chaos.run import Result


def problems(results: Sequence[Result], *, hits: int = 0) -> list[str]:
    """Return all reasons for which chaos fails; `hits`: the required deaths at each failpoint."""
    found = []
    for result in results:
        where = f"{result.library}, seed {result.seed}"
        if result.count.lost:
            found.append(f"{where}: {len(result.count.lost)} jobs were lost")
        if result.count.twice:
            found.append(
                f"{where}: {len(result.count.twice)} jobs completed twice without an excuse"
            )
        if result.count.early:
            found.append(f"{where}: {len(result.count.early)} jobs began before those they follow")
        found += [f"{where}: {name} found no target" for name in result.missed]
        bare = LIBRARIES[result.library].grows
        found += [
            f"{where}: {one}" for one in soak.problems(result.growth, result.lines, bare=bare)
        ]
    for library in sorted({result.library for result in results}):
        total = total_hits([result for result in results if result.library == library])
        found += [
            f"{library}: {name} was hit {count} times, not {hits}"
            for name, count in total.items()
            if count < hits
        ]
    return found


def total_hits(results: Sequence[Result]) -> Counter[str]:
    """Count the hits of each failpoint in all runs; one that was never hit counts 0."""
    total: Counter[str] = Counter()
    for result in results:
        total.update(result.failpoints)
    return total


def as_json(results: Sequence[Result], found: Sequence[str]) -> dict[str, Any]:
    """Return the whole report as plain values."""
    return {
        "passed": not found,
        "problems": list(found),
        "settings": SETTINGS,
        "failpoints": dict(total_hits(results)),
        "runs": [result.as_json() for result in results],
    }


def show(console: Console, results: Sequence[Result], found: Sequence[str]) -> None:
    """Print a row for each run, the failpoints, and the problems."""
    table = Table(
        title="from the ledger that tasks and producers wrote",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("library", "seed", "faults", "deaths", "enqueued", "refused"):
        table.add_column(name, justify="left" if name == "library" else "right")
    for name in ("lost", "twice", "early", "excused", "seconds"):
        table.add_column(name, justify="right")
    for result in results:
        counted = result.count
        table.add_row(
            *(result.library, str(result.seed), str(len(result.faults))),
            *(str(sum(result.failpoints.values())), f"{counted.enqueued:,}"),
            *(str(counted.refused), _bad(len(counted.lost)), _bad(len(counted.twice))),
            *(_bad(len(counted.early)), str(len(counted.excused)), f"{result.seconds:.0f}"),
        )
    console.print(table)
    hits = total_hits(results)
    if hits:
        reported = ", ".join(f"{name} {count}" for name, count in hits.items())
        console.print(f"deaths at failpoints: {reported}", highlight=False)
    for result in results:
        if result.lines:
            console.print(
                f"{result.library}: MB an hour at most {soak.most(result.growth)};"
                f" lines a minute at most {soak.most(result.lines)}",
                highlight=False,
            )
    for problem in found:
        console.print(f"[bold red]{problem}[/]", highlight=False)
    if not found:
        console.print("[bold green]Nothing was lost, and nothing completed twice.[/]")


def _bad(number: int) -> str:
    return f"[bold red]{number:,}[/]" if number else "0"
