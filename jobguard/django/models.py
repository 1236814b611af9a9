"""A model without a table: it gives the admin an entry."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class Overview(models.Model):  # type: ignore[misc]  # Django has no types
    """The state of the guarded queues."""

    class Meta:
        """No table and one right."""

        managed = False
        default_permissions: ClassVar[tuple[str, ...]] = ("view",)
        verbose_name_plural = "guarded queues"
