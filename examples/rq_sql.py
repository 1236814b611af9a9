"""A job that SQL sends: a trigger asks for it in the transaction of the row.

Start a worker:      rq worker mail --worker-class jobguard.adapters.rq.Worker --path examples
Start a reconciler:  jobguard reconcile
Insert a row:        python examples/rq_sql.py
"""

import os

import psycopg
import redis
import rq

import jobguard

client = redis.Redis.from_url(os.environ.get("JOBGUARD_REDIS_URL", "redis://localhost:6379/0"))
guard = jobguard.guard(rq.Queue("mail", connection=client))

TRIGGER = """
create table if not exists accounts (id bigserial primary key, mail text not null);

create or replace function welcome() returns trigger language plpgsql as $$
begin
  perform jobguard.enqueue(
    library => 'rq', queue => 'mail', task => 'rq_tasks.send_mail',
    args => jsonb_build_array(new.mail),
    unknown => 'accept');  -- until a worker has run this task once: no check for typing errors
  return null;
end $$;

create or replace trigger welcome after insert on accounts
  for each row execute function welcome();
"""

if __name__ == "__main__":
    guard.connect()  # the ledger must know this Redis; a worker or a sent job does the same
    with psycopg.connect(os.environ["JOBGUARD_POSTGRES_URL"]) as connection:
        connection.execute(TRIGGER)
        connection.execute("insert into accounts (mail) values ('ada@example.org')")
    print("committed: the reconciler sends the mail")
