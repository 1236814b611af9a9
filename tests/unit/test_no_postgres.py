"""A module that calls guard() can be imported without a Postgres: a test run, a build, manage.py."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest

import jobguard
from jobguard.adapter import Guarded, Source
from jobguard.errors import ConfigurationError, NoPostgres


class Adapter:
    """An adapter that accepts every target and fails if it must hook one."""

    def sources(self, target: Any, *, namespace: str, name: str | None) -> Guarded:
        """Return a source for any target."""
        source = Source(namespace, "some", "localhost:1/0", one_body=False)
        return Guarded(source, None, lambda: pytest.fail("nothing is connected to"))

    def install(self, tracker: Any, target: Any) -> None:
        """Fail: nothing is guarded."""
        pytest.fail("hooked")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the adapter, and remove all variables that name a Postgres."""
    found = Adapter()

    def find_adapter(target: Any, chosen: Any) -> Any:
        return found, found.sources(target, namespace=chosen.namespace, name=chosen.source)

    module = importlib.import_module("jobguard.guard")
    monkeypatch.setattr(module, "find_adapter", find_adapter)
    monkeypatch.setattr(module, "_warned", set())
    for name in ("JOBGUARD_POSTGRES_URL", "JOBGUARD_POSTGRES_URL_FILE", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("JOBGUARD_POSTGRES_URL", "", "no Postgres is named"),
        ("DATABASE_URL", "sqlite:///test.db", "sqlite"),
        ("DATABASE_URL", "mysql://u:hidden@h/d", "mysql"),
    ],
)
def test_it_is_one_warning_and_an_inert_guard(
    name: str, value: str, word: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Several calls log one warning, which names the variable to set."""
    monkeypatch.setenv(name, value)
    guards = [jobguard.guard(object()) for _ in range(3)]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert word in record.getMessage() and "JOBGUARD_POSTGRES_URL" in record.getMessage()
    assert "hidden" not in record.getMessage()
    assert word in (guards[0].inert or "")
    assert guards[0].stats().total == 0


def test_require_raises() -> None:
    """With connect="require", a missing Postgres is an error."""
    with pytest.raises(NoPostgres, match="JOBGUARD_POSTGRES_URL"):
        jobguard.guard(object(), connect="require")


@pytest.mark.parametrize("given", ["", "  ", {}, "mysql://h/d", "postgresql://u:1/2@h/d"])
def test_a_wrong_argument_raises(given: Any) -> None:
    """A wrong value of the argument postgres is an error."""
    with pytest.raises(ConfigurationError) as refused:
        jobguard.guard(object(), postgres=given)
    assert not isinstance(refused.value, NoPostgres)


def test_a_wrong_variable_of_ours_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """DATABASE_URL belongs to the application; JOBGUARD_POSTGRES_URL is only for jobguard."""
    monkeypatch.setenv("JOBGUARD_POSTGRES_URL", "mysql://h/d")
    with pytest.raises(ConfigurationError, match="mysql"):
        jobguard.guard(object())


def test_a_misspelt_variable_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt variable is often the reason why a setting has no effect."""
    monkeypatch.setenv("JOBGUARD_POSTGRES_URI", "postgresql://h/d")
    for _ in range(2):
        jobguard.guard(object())
    reported = [record.getMessage() for record in caplog.records]
    assert sum("did you mean JOBGUARD_POSTGRES_URL" in one for one in reported) == 1
