"""Create the schema of jobguard in a migration of your own.

For a later version of jobguard write a second migration with ``schema.sql(after=N)``, where N is the
number that `jobguard migrate --check` printed before the upgrade.
"""

from alembic import op

from jobguard import schema

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Run all migrations of jobguard in the transaction of this one."""
    connection = op.get_bind().execution_options(no_parameters=True)
    connection.exec_driver_sql(schema.sql())


def downgrade() -> None:
    """Forget every job that is owed."""
    op.execute("drop schema jobguard cascade")
