"""`python -m tests.chaos`: library x fault x seed, and a report; exits 1 if a promise was broken."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from jobguard.demo.servers import ServerError
from tests.chaos import report, soak
from tests.chaos.faults import FAULTS, faults_for
from tests.chaos.libraries import LIBRARIES, Library, failpoints
from tests.chaos.plan import HITS, Plan
from tests.chaos.run import Result, run
from tests.chaos.site import ChaosError


@click.command()
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--jobs", type=click.IntRange(min=50), default=2_000, show_default=True)
@click.option(
    "--seed", type=int, default=None, help="Seed of the first run; each later run adds 1."
)
@click.option(
    "--library",
    "libraries",
    type=click.Choice(list(LIBRARIES)),
    multiple=True,
    default=list(LIBRARIES),
    show_default=True,
)
@click.option(
    "--faults",
    default="all",
    show_default=True,
    help="all, or names of faults and failpoints, separated by commas.",
)
@click.option(
    "--hits",
    type=click.IntRange(min=1),
    default=None,
    help=f"Deaths at each failpoint in each run; {HITS} in all runs together if not given.",
)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), default=None)
@click.option("--sabotage", is_flag=True, help="Forbid recovery, to check that losses are found.")
@click.option(
    "--unguarded",
    is_flag=True,
    help="Run without jobguard, to see the losses of the library alone.",
)
@click.option(
    "--hostile",
    is_flag=True,
    help="Put a pooler before PostgreSQL, whose default transactions are serializable and read-only.",
)
@click.option(
    "--soak",
    "duration",
    default=None,
    metavar="DURATION",
    help="Cause fault after fault for 90s, 30m or 2h, in all libraries at once, and watch memory and logs.",
)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Keep ledgers, logs and kills in this folder.",
)
def main(
    runs: int,
    jobs: int,
    seed: int | None,
    libraries: tuple[str, ...],
    faults: str,
    hits: int | None,
    path: Path | None,
    sabotage: bool,
    unguarded: bool,
    hostile: bool,
    duration: str | None,
    keep: Path | None,
) -> None:
    """Kill processes at random moments, and count the jobs that ran, were lost, or ran twice."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a SIGTERM too must end our children
    soaked = _seconds(duration)
    if soaked and len(libraries) > 1:
        raise SystemExit(_each_alone(libraries, path))
    runs = 1 if soaked else runs
    console = Console()
    if not console.is_terminal:
        console = Console(width=112)  # the table is wider than the eighty characters of a log
    first = random.randrange(10_000) if seed is None else seed
    results: list[Result] = []
    found: list[str] = []
    for library in (LIBRARIES[name] for name in libraries):
        names, places = _chosen(library, faults, guarded=not unguarded)
        for nth in range(runs):
            plan = Plan(
                library=library,
                jobs=jobs,
                seed=first + nth,
                faults=names,
                # A process must live for long enough that its memory can be watched.
                hits={} if soaked else {n: hits or math.ceil(HITS / runs) for n in places},
                sabotage=sabotage,
                guarded=not unguarded,
                hostile=hostile,
                keep=keep,
                soak=soaked,
            )
            console.rule(f"{library.name}, seed {plan.seed}: {nth + 1} of {runs}")
            where = f"{library.name} " if soaked else ""

            def tell(text: str, where: str = where) -> None:
                console.print(where + text, highlight=False)

            try:
                results.append(run(plan, tell))
            except (ChaosError, ServerError) as error:
                raise click.ClickException(str(error)) from error
            report.show(console, results[-1:], report.problems(results[-1:]))
            as_ever = not (sabotage or unguarded or soaked)
            found = report.problems(results, hits=(hits or 0) * runs or HITS if as_ever else 0)
            if path is not None:  # a run that a person interrupts leaves its results too
                path.write_text(json.dumps(report.as_json(results, found), indent=1, default=str))
    if runs * len(libraries) > 1:
        console.rule("all runs")
        report.show(console, results, found)
    raise SystemExit(1 if found else 0)


def _seconds(duration: str | None) -> float:
    try:
        return soak.seconds_in(duration) if duration else 0.0
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _each_alone(libraries: Sequence[str], path: Path | None) -> int:
    """Run this command once for each library, all at once; return 1 if one of them failed."""
    arguments = _without(_without(sys.argv[1:], "--library"), "--json")
    children = []
    for library in libraries:
        report = [] if path is None else ["--json", str(path.with_stem(f"{path.stem}-{library}"))]
        command = [sys.executable, "-m", "tests.chaos", *arguments, "--library", library, *report]
        children.append(subprocess.Popen(command))
    try:
        return int(any([child.wait() for child in children]))
    finally:
        for child in children:
            child.terminate()
            child.wait()


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """Return the arguments without this option and its value."""
    found = []
    values = iter(arguments)
    for one in values:
        if one == option:
            next(values, None)
        elif not one.startswith(f"{option}="):
            found.append(one)
    return found


def _chosen(
    library: Library, wanted: str, *, guarded: bool
) -> tuple[tuple[str, ...], Sequence[str]]:
    """Return the requested faults and failpoints that this library has."""
    there, places = faults_for(library, guarded=guarded), failpoints(library) if guarded else ()
    if wanted == "all":
        return there, places
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    known = [*FAULTS, *(place for one in LIBRARIES.values() for place in failpoints(one))]
    unknown = sorted(set(names) - set(known))
    if unknown:
        reported = ", ".join(dict.fromkeys(known))
        raise click.BadParameter(f"there is no {', '.join(unknown)}; there are: {reported}")
    return tuple(n for n in names if n in there), [n for n in names if n in places]


if __name__ == "__main__":
    main()
