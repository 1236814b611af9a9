"""The files of the migrations."""

from __future__ import annotations

from jobguard.schema.migrator import latest, migrations


def test_each_number_is_used_once() -> None:
    """The migrations are numbered 1, 2, 3, …; two branches that take one number are noticed here."""
    assert [migration.number for migration in migrations()] == list(range(1, latest() + 1))
