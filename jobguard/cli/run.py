"""``jobguard run -- CMD``: run any worker command in this process, with our hooks installed.

The environment is not changed (a ``sitecustomize`` on ``PYTHONPATH`` would collide with other tools
that use one): the command's Python code runs in this process, after the hooks are installed. A child
process that starts a new Python instead of forking does not have the hooks, except the workers of RQ and
Dramatiq.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import click

from jobguard.errors import JobguardError
from jobguard.log import log_event
from jobguard.registry import ever_guarded, share_mark
from jobguard.settings import disabled

Program = Callable[[], object]


class NotPython(JobguardError):
    """Raised for a command that cannot run inside a Python process."""


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("words", metavar="CMD [ARG]...", nargs=-1, type=click.UNPROCESSED, required=True)
def command(words: tuple[str, ...]) -> None:
    """Run a worker command with jobguard in it: jobguard run -- rq worker mail.

    CMD is a command that a Python package installed, a script, or `python -m MODULE`.
    """
    program = resolve(words)
    if disabled():
        program()
        return
    share_mark()  # the worker may be a child: rq worker-pool, dramatiq
    install_hooks()
    try:
        program()
    finally:
        if not ever_guarded():
            click.echo(
                f"jobguard: nothing was guarded: {words[0]} used no queue that jobguard knows, or its "
                "environment lacks the settings (see the log, and `jobguard doctor`)",
                err=True,
            )


def resolve(words: Sequence[str]) -> Program:
    """Return a function that runs the command in this process.

    Raise NotPython with the reason.
    """
    name, *arguments = words
    if re.fullmatch(r"python(3(\.\d+)?)?", Path(name).name):
        return _of_python(name, arguments)
    path = name if os.path.isfile(name) and name.endswith(".py") else shutil.which(name)
    if path is None:
        raise NotPython(f"there is no command {name!r} on PATH")
    if not path.endswith(".py"):
        _require_same_python(path, _interpreter(path))
    return lambda: _run_script(path, arguments)


def install_hooks() -> None:
    """Let every adapter install the hooks of its library, for a worker that calls no guard()."""
    for entry_point in entry_points(group="jobguard.adapters"):
        _install(entry_point)


def _install(entry_point: EntryPoint) -> None:
    try:
        loaded = entry_point.load()
        adapter = loaded() if isinstance(loaded, type) else loaded
        prepare = getattr(adapter, "prepare_worker", None)
        if prepare is not None:
            prepare()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "jobguard":
            log_event("adapter_failed", library=entry_point.name, error=error)
        # Otherwise that library is not installed here, so its workers do not run here.
    except Exception as error:  # the worker must run, unguarded and with a log line
        log_event("adapter_failed", library=entry_point.name, error=error, exc_info=True)
        click.echo(f"jobguard: {entry_point.name} is not guarded: {error}", err=True)
    else:
        log_event("adapter_loaded", library=entry_point.name)


def _of_python(name: str, words: Sequence[str]) -> Program:
    _require_same_python(name, shutil.which(name))
    words = [word for number, word in enumerate(words) if number or word != "-u"]
    if words[:1] == ["-m"] and len(words) > 1:
        module, arguments = words[1], words[2:]
        return lambda: _run_module(module, arguments)
    if words and not words[0].startswith("-"):
        path, arguments = words[0], words[1:]
        if not os.path.isfile(path):
            raise NotPython(f"there is no file {path!r}")
        return lambda: _run_script(path, arguments)
    raise NotPython(
        "after python, give -m MODULE or a script; options of Python itself come too late "
        "for a running process: set them by their variables (PYTHONWARNINGS, PYTHONDEVMODE, …)"
    )


def _run_module(module: str, arguments: Sequence[str]) -> None:
    sys.argv[:] = [module, *arguments]
    _put_first_on_path(os.getcwd())
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_script(path: str, arguments: Sequence[str]) -> None:
    sys.argv[:] = [path, *arguments]
    _put_first_on_path(os.path.dirname(os.path.realpath(path)))
    runpy.run_path(path, run_name="__main__")


def _put_first_on_path(folder: str) -> None:
    """Replace our own folder at the start of the path, as the interpreter does for a script."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _interpreter(path: str) -> str | None:
    """Return the Python named in the first lines of a script, or None if it is no Python script."""
    with open(path, "rb") as file:
        first, second = file.readline(4096), file.readline(4096)
    if not first.startswith(b"#!"):
        return None
    words = first[2:].decode("utf-8", "replace").split()
    # pip writes the second form for long paths.
    if words[:1] == ["/bin/sh"] and second.startswith(b"'''exec' "):
        words = second[len(b"'''exec' ") :].decode("utf-8", "replace").split()
    if words and Path(words[0]).name == "env":
        words = [word for word in words[1:] if not word.startswith("-")]
        words[:1] = [shutil.which(words[0]) or words[0]] if words else []
    interpreter = words[0].strip('"') if words else ""
    return interpreter if Path(interpreter).name.startswith("python") else None


def _require_same_python(name: str, interpreter: str | None) -> None:
    if interpreter is None:
        raise NotPython(
            f"{name} is not a Python program, and jobguard works inside the worker's process: "
            "name the command that starts the worker itself"
        )
    theirs, ours = Path(interpreter).parent, Path(sys.executable).parent
    # The resolved file is not compared: every virtual environment of a machine links to the same
    # one.
    if not (theirs.exists() and theirs.samefile(ours)):
        raise NotPython(
            f"{name} belongs to the Python in {theirs}, jobguard to the one in {ours}: "
            "install jobguard there, and use that Python"
        )
