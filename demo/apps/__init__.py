"""What a user of each library writes: the queue, the one call of `guard`, and how a job is enqueued.

Producer and workers import the same file. The environment says where Redis is, and where Postgres
is if the run is one with jobguard.
"""

from __future__ import annotations

# Not JOBGUARD_…, nor a variable that a library reads: what is shown are the defaults.
REDIS = "DEMO_REDIS_URL"
POSTGRES = "JOBGUARD_POSTGRES_URL"
