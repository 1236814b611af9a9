"""The code of a user of each library: the queue, the one call of `guard`, and the enqueue of a job.

Producer and workers import the same file. The environment says where Redis is and, in a run with
jobguard, where PostgreSQL is.
"""

from __future__ import annotations

# Not JOBGUARD_…, nor a variable that a library reads: the demo shows the defaults.
REDIS = "DEMO_REDIS_URL"
POSTGRES = "JOBGUARD_POSTGRES_URL"
