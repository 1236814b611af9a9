"""Celery with jobguard.

Start a worker:  celery -A celery_app --workdir examples worker
Send a task:     python examples/celery_app.py
"""

import os

import celery

import jobguard

app = celery.Celery("shop", broker=os.environ.get("JOBGUARD_REDIS_URL", "redis://localhost:6379/0"))
guard = jobguard.guard(app)


@app.task(name="send_mail")
def send_mail(address: str) -> str:
    """Send one mail. A killed worker starts this again from the beginning."""
    return f"mail to {address}"


if __name__ == "__main__":
    print("sent", send_mail.delay("ada@example.org").id)
