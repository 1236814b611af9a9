"""An order and its mail in one transaction: both or neither.

Start a worker:  rq worker mail --worker-class jobguard.adapters.rq.Worker --path examples
Place an order:  python examples/transactions_app.py
"""

import os

import psycopg
import redis
import rq
from rq_tasks import send_mail

import jobguard

client = redis.Redis.from_url(os.environ.get("JOBGUARD_REDIS_URL", "redis://localhost:6379/0"))
queue = rq.Queue("mail", connection=client)
guard = jobguard.guard(queue)


def order(connection: psycopg.Connection, customer: str, *, in_stock: bool) -> None:
    """Place an order. Without stock, neither the order nor its mail exists."""
    with guard.transaction(connection):
        connection.execute("insert into orders (customer) values (%s)", [customer])
        queue.enqueue(send_mail, customer)
        if not in_stock:
            raise LookupError("out of stock")


if __name__ == "__main__":
    # The database of the ledger is the database of the application.
    with psycopg.connect(os.environ["JOBGUARD_POSTGRES_URL"]) as connection:
        connection.execute("create table if not exists orders (customer text)")
        connection.commit()
        order(connection, "ada@example.org", in_stock=True)
        try:
            order(connection, "bob@example.org", in_stock=False)
        except LookupError as error:
            print("not ordered:", error)
    print("ordered")
