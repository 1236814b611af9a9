"""The command ``jobguard``.

Each command has a module of its own that is loaded when the command is called, so that ``jobguard
--version`` does not load the imports of ``jobguard stats``. Exit codes: 0 done, 1 a problem was found,
2 wrong usage.
"""

from __future__ import annotations

import errno
import importlib
import io
import sys
from typing import Any

import click

from jobguard import __version__
from jobguard.errors import JobguardError

# The commands: (import path, line for `jobguard --help`, which is shown without loading the
# module).
COMMANDS = {
    "migrate": ("jobguard.cli.migrate:command", "Bring the database's schema up to date."),
    "reconcile": ("jobguard.cli.reconcile:command", "Watch Redis and put lost jobs back."),
    "run": ("jobguard.cli.run:command", "Run a worker command with jobguard in it."),
    "stats": ("jobguard.cli.stats:command", "Show how many jobs are in which state."),
    "top": ("jobguard.cli.top:command", "Show queues, workers and incidents, live."),
    "jobs": ("jobguard.cli.jobs:command", "List jobs, and show everything about one."),
    "incidents": ("jobguard.cli.incidents:command", "List losses, and what people did."),
    "workers": ("jobguard.cli.workers:command", "List the guarded workers."),
    "dead": ("jobguard.cli.dead:command", "List and requeue jobs that were given up."),
    "cancel": ("jobguard.cli.cancel:command", "Cancel jobs, by id or by what they have in common."),
    "purge": ("jobguard.cli.cancel:purge", "Cancel everything that waits in a queue."),
    "forget": ("jobguard.cli.cancel:forget", "Erase the arguments and errors of a job."),
    "replay": ("jobguard.cli.replay:command", "Run again what ran in a window of time."),
    "drift": ("jobguard.cli.drift:command", "Compare PostgreSQL and Redis, and change nothing."),
    "adopt": ("jobguard.cli.drift:adopt", "Record what waits in Redis and is not in PostgreSQL."),
    "requeue": ("jobguard.cli.requeue:command", "Put back owed jobs that are not recovered."),
    "schedules": ("jobguard.cli.schedules:command", "Send jobs at given times."),
    "pause": ("jobguard.cli.brake:pause", "Stop putting jobs back until `resume`."),
    "resume": ("jobguard.cli.brake:resume", "Continue after `pause`, or after a hold."),
    "dashboard": ("jobguard.cli.dashboard:command", "Show and do all this in a browser."),
    "doctor": ("jobguard.cli.doctor:command", "Check everything that jobguard relies on."),
    "encrypt": ("jobguard.cli.encrypt:command", "Make keys, and seal stored jobs with them."),
    "demo": ("jobguard.demo:command", "Kill Redis and workers, and count lost jobs."),
}


_EXTRAS = {"dashboard": "dashboard"}
"""Commands that need another extra than `demo` does."""


class _Commands(click.Group):
    """Group that loads a command when it is called, and prints an error of jobguard in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        try:
            command = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in ("", "jobguard"):
                raise
            raise click.ClickException(
                f"`jobguard {cmd_name}` needs the package {missing}: "
                f"pip install 'jobguard[{_EXTRAS.get(cmd_name, 'rq,embedded')}]'"
            ) from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(
                stream, io.TextIOWrapper
            ):  # names of jobs that its encoding does not have
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except JobguardError as error:
            click.echo(f"error: {_one_line(error)}", err=True)
            ctx.exit(1)
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # click handles a closed pipe
                raise
            click.echo(f"error: {_one_line(error)}", err=True)
            ctx.exit(1)


@click.group(
    cls=_Commands,
    context_settings={
        "auto_envvar_prefix": "JOBGUARD",
        "help_option_names": ["-h", "--help"],
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="jobguard", message="%(prog)s %(version)s")
def main() -> None:
    """Guard the jobs in Redis: RQ, Celery and Dramatiq keep their speed, PostgreSQL keeps the record.

    Every option can be given as a variable: --namespace as JOBGUARD_NAMESPACE, `dead list --limit` as
    JOBGUARD_DEAD_LIST_LIMIT.
    """


def _one_line(error: BaseException) -> str:
    from jobguard.operations.text import visible
    from jobguard.redact import redact

    return visible(" ".join(redact(str(error)).split()))
