"""One RQ SimpleWorker: `python -m jobguard.demo.apps.rq_worker QUEUE`.

It is the same as `rq worker --worker-class … QUEUE` without the command line of RQ, whose import
takes as long as RQ itself. The demo starts workers often.
"""

from __future__ import annotations

import logging
import os
import sys

import redis
import rq

from jobguard.demo.apps import POSTGRES, REDIS


def main(queue: str) -> None:
    """Work until the process is stopped, or until RQ gives up because Redis is gone."""
    logging.basicConfig(format="%(asctime)s %(message)s")  # shows our warnings
    worker_class: type[rq.worker.BaseWorker] = rq.SimpleWorker
    if POSTGRES in os.environ:
        from jobguard.adapters.rq import SimpleWorker  # not in the run without jobguard

        worker_class = SimpleWorker
    connection = redis.Redis.from_url(os.environ[REDIS])
    worker_class([queue], connection=connection).work(logging_level="WARNING")


if __name__ == "__main__":
    main(*sys.argv[1:])
