"""Django and Celery with jobguard, in one file.

In a project of your own, the lines about Celery stand in ``proj/celery.py``.

Start a worker:  celery -A django_celery --workdir examples worker
Send a task:     python examples/django_celery.py
"""

import os

import celery
import django
from django.conf import settings

import jobguard

settings.configure(
    CELERY_BROKER_URL=os.environ.get("JOBGUARD_REDIS_URL", "redis://localhost:6379/0"),
    LOGGING={
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"stderr": {"class": "logging.StreamHandler"}},
        "loggers": {"jobguard": {"handlers": ["stderr"], "level": "INFO"}},
    },
)
django.setup()

app = celery.Celery("proj")
app.config_from_object("django.conf:settings", namespace="CELERY")
guard = jobguard.guard(app)


@app.task(name="send_mail")
def send_mail(address: str) -> str:
    """Send one mail. A killed worker starts this again from the beginning."""
    return f"mail to {address}"


if __name__ == "__main__":
    print("sent", send_mail.delay("ada@example.org").id)
