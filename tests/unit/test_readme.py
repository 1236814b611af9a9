"""The README says what the code does; run as a program, this rewrites what is made from code."""

import re
from dataclasses import fields
from pathlib import Path

from jobguard.cli import COMMANDS
from jobguard.settings import Settings

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- settings: made from jobguard.settings by tests/unit/test_readme.py -->\n"
END = "<!-- /settings -->"


def settings_table() -> str:
    """Return the table of settings, in markdown."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for setting in fields(Settings):
        meaning = setting.metadata["meaning"].replace("|", "\\|")
        rows.append(f"| `{setting.name}` | {shown(setting.default)} | {meaning} |")
    return "\n".join(rows) + "\n"


def shown(default: object) -> str:
    """Return a default as people read it."""
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float) and default.is_integer():
        return f"{int(default):,}"
    if isinstance(default, tuple):
        return ", ".join(shown(value) for value in default)
    return f"{default:,}" if isinstance(default, int) else str(default)


def test_the_settings_table_is_the_code_s() -> None:
    """The README lists every setting with its default, as the code has it."""
    text = README.read_text()
    assert text.split(BEGIN)[1].split(END)[0] == settings_table()


def test_every_command_is_mentioned_and_none_that_is_not_there() -> None:
    """The README's list of commands is the list of commands."""
    line = re.search(r"^`migrate .*?Exit codes", README.read_text(), re.DOTALL | re.MULTILINE)
    assert line is not None
    mentioned = set(re.findall(r"`(\w+)", line.group()))
    assert mentioned == set(COMMANDS)


if __name__ == "__main__":
    text = README.read_text()
    head, _, rest = text.partition(BEGIN)
    README.write_text(head + BEGIN + settings_table() + END + rest.partition(END)[2])
