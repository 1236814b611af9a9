"""Alembic's environment: run the migrations on the database of jobguard.

Models of yours that are compared with ``include_schemas=True`` need ``include_name``: without it,
autogenerate proposes to drop the tables of jobguard.
"""

from typing import Any

import sqlalchemy as sa
from alembic import context

from jobguard.conninfo import postgres_conninfo


def include_name(name: str | None, kind: str, _parents: Any) -> bool:
    """Leave the schema of jobguard out of autogenerate."""
    return kind != "schema" or name != "jobguard"


def connect() -> Any:
    """Connect as jobguard does, with JOBGUARD_POSTGRES_URL or DATABASE_URL."""
    import psycopg

    return psycopg.connect(postgres_conninfo()())


engine = sa.create_engine("postgresql+psycopg://", creator=connect, poolclass=sa.NullPool)
with engine.connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=sa.MetaData(),
        include_schemas=True,
        include_name=include_name,
    )
    with context.begin_transaction():
        context.run_migrations()
