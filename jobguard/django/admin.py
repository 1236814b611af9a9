"""An entry in the admin that shows the state and changes nothing."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from jobguard.conninfo import postgres_conninfo
from jobguard.django import wiring
from jobguard.django.models import Overview
from jobguard.errors import JobguardError
from jobguard.operations.overview import overview_of
from jobguard.operations.read import ReadModel
from jobguard.settings import settings_from


@admin.register(Overview)
class OverviewAdmin(admin.ModelAdmin):  # type: ignore[misc]  # Django has no types
    """Show counts, leader and incidents to staff with the right to view."""

    def has_add_permission(self, request: HttpRequest, *_: Any) -> bool:
        """Nothing is added here."""
        return False

    def has_change_permission(self, request: HttpRequest, *_: Any) -> bool:
        """Nothing is changed here."""
        return False

    def has_delete_permission(self, request: HttpRequest, *_: Any) -> bool:
        """Nothing is deleted here."""
        return False

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        """Show the state, or why it cannot be read."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        context = {**self.admin_site.each_context(request), "title": "Guarded queues"}
        try:
            namespace = settings_from(wiring.options()).namespace
            model = ReadModel(postgres_conninfo(wiring.postgres()))
            with closing(model):
                overview = overview_of(model, namespace)
            context |= {"lines": list(overview.lines()), "overview": overview}
        except JobguardError as error:
            context["problem"] = str(error)
        return TemplateResponse(request, "admin/jobguard/overview.html", context)
