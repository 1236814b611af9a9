"""A bill whose charge is made once, however often the job runs.

Start a worker:  rq worker mail --worker-class jobguard.adapters.rq.Worker --path examples
Send a job:      python examples/once_app.py
"""

import os

import redis
import rq
from rq_tasks import bill

import jobguard

client = redis.Redis.from_url(os.environ.get("JOBGUARD_REDIS_URL", "redis://localhost:6379/0"))
queue = rq.Queue("mail", connection=client)
guard = jobguard.guard(queue)

if __name__ == "__main__":
    job = queue.enqueue(bill, "ada@example.org", retry=rq.Retry(max=3))
    print("sent", job.id)
