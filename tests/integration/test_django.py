"""The app jobguard.django in a project with django-rq, Celery and the admin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

pytest.importorskip("django")

PROJECT = """
import json, os, sys
from django.conf import settings
settings.configure(
    SECRET_KEY="x", ROOT_URLCONF="project", ALLOWED_HOSTS=["*"], USE_TZ=True,
    INSTALLED_APPS=["django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes",
                    "django.contrib.sessions", "django.contrib.messages", "django_rq", "jobguard.django"],
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware",
                "django.contrib.auth.middleware.AuthenticationMiddleware",
                "django.contrib.messages.middleware.MessageMiddleware"],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True,
                "OPTIONS": {"context_processors": ["django.template.context_processors.request",
                                                   "django.contrib.auth.context_processors.auth",
                                                   "django.contrib.messages.context_processors.messages"]}}],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}, **OTHER},
    RQ_QUEUES={"mail": {"URL": URL}}, RQ=RQ, JOBGUARD=JOBGUARD,
)
import types
celery_module = types.ModuleType("shop_celery")
sys.modules["shop_celery"] = celery_module
import celery
celery_module.app = celery.Celery("shop", broker=URL, set_as_current=False)
import django
django.setup()
from django.contrib import admin
from django.urls import path
urlpatterns = [path("admin/", admin.site.urls)]
sys.modules["project"] = sys.modules["__main__"]
from django.core.management import call_command, execute_from_command_line
"""


def run(program: str, redis_url: str, database: str | None, tmp_path: Path, **changed: Any) -> str:
    """Run a program in a project of this kind, and return its output."""
    other: dict[str, Any] = {}
    if database is not None:
        place = psycopg.conninfo.conninfo_to_dict(database)
        keys = (("NAME", "dbname"), ("USER", "user"), ("HOST", "host"), ("PORT", "port"))
        other["jobs"] = {"ENGINE": "django.db.backends.postgresql"}
        other["jobs"] |= {name: str(place[key]) for name, key in keys if key in place}
    given = {
        "URL": redis_url,
        "OTHER": other,
        "RQ": {"WORKER_CLASS": "jobguard.adapters.rq.Worker"},
        "JOBGUARD": {"QUEUES": "all", "APPS": ["shop_celery:app"], "DATABASE": "jobs"},
        **changed,
    }
    lines = "".join(f"{name} = {value!r}\n" for name, value in given.items())
    file = tmp_path / "project.py"
    file.write_text(lines + PROJECT + program)
    done = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        timeout=100,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_project_is_guarded_by_its_settings(
    redis_url: str, database: str, tmp_path: Path
) -> None:
    """Jobs of django-rq and Celery are recorded; commands and the admin know the settings."""
    out = run(
        """
import django_rq
django_rq.get_queue("mail").enqueue(print, "x")
celery_module.app.send_task("t")
call_command("migrate", verbosity=0)
from django.contrib.auth.models import User
from django.test import Client
client = Client()
User.objects.create_superuser("root", password="x")
User.objects.create_user("staff", password="x", is_staff=True)
client.login(username="staff", password="x")
assert client.get("/admin/jobguard/overview/").status_code == 403
client.login(username="root", password="x")
page = client.get("/admin/jobguard/overview/")
assert page.status_code == 200 and "<td>mail</td>" in page.content.decode(), page.content
assert client.get("/admin/jobguard/overview/add/").status_code == 403
execute_from_command_line(["manage.py", "jobguard", "stats", "--json"])
""",
        redis_url,
        database,
        tmp_path,
    )
    found = json.loads(out)
    assert {one["queue"]: one["pending"] for one in found["counts"]} == {"mail": 1, "celery": 1}


def test_the_system_checks(redis_url: str, database: str, tmp_path: Path) -> None:
    """A wrong setting stops nothing; the checks name it, unguarded workers, and a missing schema."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("drop schema jobguard cascade")
    out = run(
        """
from django.core import checks
found = checks.run_checks(databases=["default"], include_deployment_checks=False)
print(json.dumps([f"{one.id} {one.msg} {one.hint}" for one in found if one.id.startswith("jobguard")]))
""",
        redis_url,
        database,
        tmp_path,
        RQ={},
        JOBGUARD={"QUEUES": ["mail"], "APPS": ["no_module:app"], "DATABASE": "jobs"},
    )
    found = {line.split()[0]: line for line in json.loads(out)}
    assert "no_module" in found["jobguard.E001"]
    assert "jobguard.adapters.rq.Worker" in found["jobguard.W003"]
    assert "manage.py jobguard migrate" in found["jobguard.W004"]


def test_a_project_without_a_postgres_starts(redis_url: str, tmp_path: Path) -> None:
    """A build without PostgreSQL starts, guards nothing, and the checks say what is missing."""
    out = run(
        """
from django.core import checks
print(json.dumps([one.id for one in checks.run_checks() if one.id.startswith("jobguard")]))
""",
        redis_url,
        None,
        tmp_path,
        JOBGUARD={},
    )
    assert json.loads(out) == ["jobguard.W001"]
