"""The app ``jobguard.django``: it guards what the setting JOBGUARD names, in every process."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks


class JobguardConfig(AppConfig):  # type: ignore[misc]  # Django has no types
    """Guard the project's queues when Django is set up. No connection is opened."""

    name = "jobguard.django"
    label = "jobguard"
    verbose_name = "jobguard"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Guard, and register the system checks."""
        from jobguard.django.checks import check_database, check_settings
        from jobguard.django.wiring import guard_all

        checks.register(check_settings, "jobguard")
        checks.register(check_database, checks.Tags.database)
        guard_all()
