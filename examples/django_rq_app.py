"""django-rq with jobguard, in one file.

In a project of your own, the call of ``guard`` stands in ``AppConfig.ready``.

Start a worker:  python examples/django_rq_app.py rqworker mail
Send a job:      python examples/django_rq_app.py
"""

import os
import sys
from pathlib import Path

import django
from django.conf import settings
from django.core.management import execute_from_command_line

sys.path.insert(0, str(Path(__file__).parent))

settings.configure(
    INSTALLED_APPS=["django_rq"],
    RQ_QUEUES={"mail": {"URL": os.environ.get("JOBGUARD_REDIS_URL", "redis://localhost:6379/0")}},
    RQ={"WORKER_CLASS": "jobguard.adapters.rq.Worker"},
)
django.setup()

import django_rq  # noqa: E402 - after the settings
from rq_tasks import send_mail  # noqa: E402

import jobguard  # noqa: E402

queue = django_rq.get_queue("mail")
guard = jobguard.guard(queue)

if __name__ == "__main__":
    if len(sys.argv) > 1:
        execute_from_command_line(sys.argv)
    else:
        print("sent", queue.enqueue(send_mail, "ada@example.org").id)
