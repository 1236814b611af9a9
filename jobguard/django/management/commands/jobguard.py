"""``python manage.py jobguard …``: every command of jobguard, with the settings of the project."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from django.core.management.base import BaseCommand

from jobguard.cli import main
from jobguard.django.wiring import environment


class Command(BaseCommand):  # type: ignore[misc]  # Django has no types
    """Pass everything on to jobguard's own command line."""

    help = (
        "jobguard's commands (migrate, reconcile, stats, doctor, …), with the project's settings."
    )
    requires_system_checks: ClassVar[list[str]] = []

    def run_from_argv(self, argv: list[str]) -> None:
        """Run the command with its own options, and exit with its code."""
        self._run(argv[2:])

    def handle(self, *args: str, **options: Any) -> None:
        """Run the command, called from Python."""
        self._run(list(args))

    def add_arguments(self, parser: Any) -> None:
        """Accept words for ``call_command``."""
        parser.add_argument("args", nargs="*")

    @staticmethod
    def _run(words: list[str]) -> None:
        os.environ.update(environment())
        main.main(args=words, prog_name="manage.py jobguard")
