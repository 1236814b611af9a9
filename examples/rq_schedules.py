"""A schedule with jobguard: the reconciler sends the job, no scheduler process of RQ is needed.

Start a worker:      rq worker mail --worker-class jobguard.adapters.rq.Worker --path examples
Start a reconciler:  jobguard reconcile
Add the schedule:    python examples/rq_schedules.py
"""

import os

import redis
import rq
from rq_tasks import send_mail

import jobguard

client = redis.Redis.from_url(os.environ.get("JOBGUARD_REDIS_URL", "redis://localhost:6379/0"))
guard = jobguard.guard(rq.Queue("mail", connection=client))


def add_schedules() -> None:
    """Add the schedules of this application. Every process may do this: it changes nothing twice."""
    guard.schedules.add(
        "weekday report",
        send_mail,
        queue="mail",
        args=["ada@example.org"],
        cron="30 8 * * MON-FRI",
        timezone="Europe/Berlin",
    )


if __name__ == "__main__":
    add_schedules()
    for schedule in guard.schedules.list():
        print(schedule["name"], schedule["cron"], schedule["state"])
    print("runs once now:", guard.schedules.run_now("weekday report"))
