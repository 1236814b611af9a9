"""Dramatiq with jobguard.

Start a worker:  dramatiq dramatiq_app --path examples
Send a message:  python examples/dramatiq_app.py
"""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

import jobguard

broker = RedisBroker(url=os.environ.get("JOBGUARD_REDIS_URL", "redis://localhost:6379/0"))
dramatiq.set_broker(broker)
guard = jobguard.guard(broker)


@dramatiq.actor
def send_mail(address: str) -> None:
    """Send one mail. A killed worker starts this again from the beginning."""


if __name__ == "__main__":
    print("sent", send_mail.send("ada@example.org").message_id)
