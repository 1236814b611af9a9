"""From the setting JOBGUARD to guarded queues.

::

    JOBGUARD = {
        "QUEUES": "all",              # of django-rq: all of RQ_QUEUES, or a list of names
        "APPS": ["proj.celery:app"],  # Celery applications, brokers of Dramatiq, other queues
        "DATABASE": "default",        # the alias of a PostgreSQL in DATABASES
        "namespace": "shop",          # any setting of jobguard, in lower case
    }

Without DATABASE, the variables JOBGUARD_POSTGRES_URL and DATABASE_URL name the ledger, and then the alias
``default`` if it is a PostgreSQL. A wrong setting stops no process: the log and `manage.py check` say it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import quote

from django.conf import settings

import jobguard
from jobguard.conninfo import FILE_VARIABLE, VARIABLES
from jobguard.errors import ConfigurationError, JobguardError
from jobguard.log import log_event

_OURS = ("QUEUES", "APPS", "DATABASE")

problems: list[str] = []
"""Why something that the setting names is not guarded; for the system checks."""


def chosen() -> Mapping[str, Any]:
    """Return the setting JOBGUARD."""
    return getattr(settings, "JOBGUARD", {})


def guard_all() -> None:
    """Guard everything that the setting names."""
    problems.clear()
    for name, find in targets():
        try:
            jobguard.guard(find(), postgres=postgres(), **options())
        except (JobguardError, ImportError, AttributeError, ValueError) as error:
            problems.append(f"{name}: {error}")
            log_event("guard_refused", error=f"{name}: {error}")


def options() -> dict[str, Any]:
    """Return the settings of jobguard in the setting."""
    return {name: value for name, value in chosen().items() if name not in _OURS}


def targets() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what is to be guarded: a name, and a function that imports it."""
    wanted = chosen().get("QUEUES", ())
    names = list(getattr(settings, "RQ_QUEUES", {})) if wanted == "all" else list(wanted)
    for name in names:
        yield f"queue {name}", partial(_queue, name)
    for path in chosen().get("APPS", ()):
        yield f"app {path}", partial(_imported, path)


def _queue(name: str) -> object:
    return importlib.import_module("django_rq").get_queue(name)


def _imported(path: str) -> object:
    module, colon, name = path.partition(":")
    if not colon:
        raise ConfigurationError(f"{path!r}: give MODULE:NAME, for example proj.celery:app")
    return getattr(importlib.import_module(module), name)


def postgres() -> Callable[[], Any] | None:
    """Return a function that returns the entry of DATABASES; None: the variables name the ledger."""
    alias = chosen().get("DATABASE")
    if alias is None:
        if any(os.environ.get(variable) for variable in (FILE_VARIABLE, *VARIABLES)):
            return None
        alias = "default"
        if "postgresql" not in settings.DATABASES.get(alias, {}).get("ENGINE", ""):
            return None
    if alias not in settings.DATABASES:
        raise ConfigurationError(
            f"JOBGUARD['DATABASE'] is {alias!r}, which DATABASES does not have"
        )
    return lambda: settings.DATABASES[alias]


def environment() -> dict[str, str]:
    """Return the variables that say to jobguard's commands what the setting says."""
    from jobguard.conninfo import postgres_conninfo

    found = {
        f"JOBGUARD_{name.upper()}": text
        for name, value in options().items()
        if (text := _variable(value)) is not None
    }
    if (given := postgres()) is not None:
        found["JOBGUARD_POSTGRES_URL"] = postgres_conninfo(given)()
    urls = dict.fromkeys(filter(None, map(_redis_url, _rq_queues())))
    for path in chosen().get("APPS", ()):
        conf = getattr(_imported(path), "conf", None)
        if conf is not None and conf.broker_url:
            urls[str(conf.broker_url)] = None
    if urls and not os.environ.get("JOBGUARD_REDIS_URL_FILE"):
        found["JOBGUARD_REDIS_URL"] = " ".join(urls)
    return {name: value for name, value in found.items() if not os.environ.get(name)}


def _variable(value: object) -> str | None:
    """Return a setting as its variable has it; None: it is not set, or only Python has it (a function)."""
    if value is None or callable(value):
        return None
    if isinstance(value, Mapping):
        value = [f"{name}={one}" for name, one in value.items()]
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _rq_queues() -> list[Mapping[str, Any]]:
    every = getattr(settings, "RQ_QUEUES", {})
    wanted = chosen().get("QUEUES", ())
    return list(every.values()) if wanted == "all" else [every[n] for n in wanted if n in every]


def _redis_url(queue: Mapping[str, Any]) -> str | None:
    """Return the URL of one entry of RQ_QUEUES; None for the forms that have no URL."""
    if "URL" in queue:
        return str(queue["URL"])
    if "HOST" not in queue:
        return None
    account = f"{quote(str(queue.get('USERNAME') or ''), safe='')}"
    if password := queue.get("PASSWORD"):
        account += f":{quote(str(password), safe='')}"
    at = f"{account}@" if account else ""
    scheme = "rediss" if queue.get("SSL") else "redis"
    return f"{scheme}://{at}{queue['HOST']}:{queue.get('PORT', 6379)}/{queue.get('DB', 0)}"
