"""Many changes of one customer, one mail.

Start a worker:  rq worker mail --worker-class jobguard.adapters.rq.Worker --path examples
Send the jobs:   python examples/keys_app.py
"""

import os

import redis
import rq
from rq_tasks import send_mail

import jobguard

client = redis.Redis.from_url(os.environ.get("JOBGUARD_REDIS_URL", "redis://localhost:6379/0"))
queue = rq.Queue("mail", connection=client)
guard = jobguard.guard(queue)

if __name__ == "__main__":
    for _ in range(3):
        answer = guard.send(send_mail, "ada@example.org", key="mail:ada")
        print("sent" if answer.sent else "waits already:", answer.job_id)
