"""Create the schema of jobguard with `python manage.py migrate`.

For a later version of jobguard write a second migration with ``schema.sql(after=N)``, where N is the
number that `jobguard migrate --check` printed before the upgrade.
"""

from django.db import migrations

from jobguard import schema


class Migration(migrations.Migration):
    """Run all migrations of jobguard in the transaction of this one."""

    operations = (migrations.RunSQL(schema.sql(), reverse_sql="drop schema jobguard cascade"),)
