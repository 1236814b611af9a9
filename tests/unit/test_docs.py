"""The manual agrees with the code. Run as a program, this module writes the generated pages."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from jobguard.cli import COMMANDS, main
from jobguard.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MADE = "<!-- made by python -m tests.unit.test_docs -->\n\n"
SETTINGS_HEAD = """\
# Settings

Each setting is an argument of `guard()` and the variable `JOBGUARD_<NAME>`. The argument has priority.
Durations are seconds. PostgreSQL is named by `postgres=` (a URL, a mapping, or a callable that returns
one), then by `JOBGUARD_POSTGRES_URL_FILE`, `JOBGUARD_POSTGRES_URL` or `DATABASE_URL`, in any usual
spelling. If PostgreSQL is not named, `guard()` logs one warning and guards nothing; with
`connect="require"` it raises an error. For the reconciler, Redis is named by `--redis` or
`JOBGUARD_REDIS_URL` (several URLs are separated by spaces), then by `REDIS_URL`.

"""
CLI_HEAD = """\
# Commands

Exit codes: 0 done, 1 found a problem, 2 wrong usage. Most commands take `--json`.

"""


def settings_page() -> str:
    """Return the page of settings, in markdown."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for setting in fields(Settings):
        meaning = setting.metadata["meaning"].replace("|", "\\|")
        rows.append(f"| `{setting.name}` | {shown(setting.default)} | {meaning} |")
    return MADE + SETTINGS_HEAD + "\n".join(rows) + "\n"


def shown(default: object) -> str:
    """Return a default in readable form."""
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float) and default.is_integer():
        return f"{int(default):,}"
    if isinstance(default, tuple):
        return ", ".join(shown(value) for value in default)
    return f"{default:,}" if isinstance(default, int) else str(default)


def cli_page() -> str:
    """Return the page of commands, in markdown."""
    root = click.Context(main, info_name="jobguard", terminal_width=100, max_content_width=100)
    return MADE + CLI_HEAD + "\n".join(_sections(main, root))


def _sections(command: click.Command, context: click.Context) -> list[str]:
    help_text = click.unstyle(command.get_help(context)).rstrip()
    sections = [f"## `{context.command_path}`\n\n```text\n{help_text}\n```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            inner = click.Context(child, parent=context, info_name=name, max_content_width=100)
            inner.terminal_width = 100
            sections += _sections(child, inner)
    return sections


PAGES = {"settings.md": settings_page, "cli.md": cli_page}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_that_is_made_from_code_is_up_to_date(page: str) -> None:
    """Run `python -m tests.unit.test_docs` after a change of a setting or a command.

    A fresh interpreter makes the page: other tests change the commands of this one.
    """
    program = f"from tests.unit.test_docs import PAGES; print(PAGES[{page!r}](), end='')"
    made = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (DOCS / page).read_text() == made.stdout


def test_every_command_has_a_section() -> None:
    """The page of commands names each command."""
    mentioned = set(re.findall(r"^## `jobguard (\w+)`$", (DOCS / "cli.md").read_text(), re.M))
    assert mentioned == set(COMMANDS)


def test_every_link_of_the_readme_and_the_manual_leads_to_a_file() -> None:
    """A link to a file that was moved or deleted fails here."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_every_file_that_the_manual_names_is_there() -> None:
    """The glossary and the page on internals name files; a renamed file must be renamed there."""
    missing = [
        f"{page.name}: {name}"
        for page in DOCS.glob("*.md")
        for name in re.findall(
            r"`((?:jobguard|adapters|schema|tests|demo)/[\w/*.-]+)`", page.read_text()
        )
        if not list(ROOT.glob(name.rstrip("/")))
    ]
    assert not missing


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
