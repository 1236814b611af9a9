"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from jobguard.redact import redact


class CheckResult(StrEnum):
    """The result of a check."""

    OK = "ok"
    NOTE = "note"
    """Good to know; nothing is broken."""
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    about: str
    verdict: CheckResult
    detail: str
    consequence: str = ""
    """What happens if it stays so."""
    fix: str = ""
    """The line to change, or the command to run."""


def ok(about: str, detail: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(about, CheckResult.OK, detail)


def note(about: str, detail: str, consequence: str = "", fix: str = "") -> Finding:
    """Return a finding that is good to know."""
    return Finding(about, CheckResult.NOTE, detail, consequence, fix)


def problem(about: str, detail: str, consequence: str = "", fix: str = "") -> Finding:
    """Return a finding that a person must act on."""
    return Finding(about, CheckResult.PROBLEM, " ".join(redact(detail).split()), consequence, fix)
