"""An application of Dramatiq, as a worker imports it; the environment has the address of Redis."""

from __future__ import annotations

import os
import sys
import time

from dramatiq import Worker, set_broker

import jobguard
from tests.conformance.on_dramatiq import a_broker, declare

broker = a_broker(url=os.environ["JOBGUARD_REDIS_URL"])
set_broker(broker)
guard = jobguard.guard(broker)
declare(broker)

if __name__ == "__main__":
    Worker(broker, worker_timeout=100, worker_threads=int(sys.argv[1])).start()
    while True:
        time.sleep(60)
