"""The reconciler: a separate process that finds and restores jobs that Redis or a dead worker lost.

One process leads, the others stand by and watch (``vigil``). These are the files, in the order in which
the leader uses them after a loss:

- ``leader``    holds the lease: this process leads until ``trusted_until`` on its own clock
- ``pulse``     checks whether Redis lost data, and whether it is still the same Redis
- ``identity``  checks whether this is the right Redis for this ledger; ``evidence``, whether Redis lost
  data before any leader inspected it
- ``stream_drain``  writes to Postgres what processes left in Redis while Postgres was away
- ``workers``   reads which workers beat, and into which Redis; ``liveness`` decides which are dead
- ``trust``     knows which queues have only guarded consumers; ``backlog_trust`` checks older
  deliveries
- ``backfill``  records what waits in Redis and is not in the ledger
- ``tally``     counts the owed deliveries of each queue
- ``context``   holds the state of the source that an inspection uses
- ``inspection``  inspects a page of owed deliveries: where Redis has them, and what to do
- ``decision``  decides about one delivery, as a pure function
- ``restore``   restores deliveries to Redis; ``joins`` finds jobs whose dependencies have all ended, and
  ``rejoin`` restores what the library counts in Redis
- ``limiter``   bounds the rate of restores; ``hold``, ``bypass`` and ``refusals`` stop them
- ``source_monitor``  does all of this for one source, in small steps; ``result`` counts what it did
- ``requests``  records the jobs of SQL callers and schedules; this work needs no Redis
- ``runner``    gives each source, and the requests, a thread for one term
- ``service``   runs the process: sources, signals, one pass or an endless loop

The reconciler imports no user code and unpickles nothing. An error does not end the process: it
logs and counts the error, backs off, and continues.
"""
