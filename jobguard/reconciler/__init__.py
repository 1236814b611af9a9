"""The reconciler: a separate process that finds and restores jobs that Redis or a dead worker lost.

One process leads, the others stand by. These are the files, in the order in which the leader uses
them after a loss:

- ``leader``    holds the lease: this process leads until ``trusted_until`` on its own clock
- ``pulse``     checks whether Redis lost data, and whether it is still the same Redis
- ``identity``  checks whether this is the right Redis for this ledger
- ``workers``   reads which workers beat, and into which Redis; ``liveness`` decides which are dead
- ``trust``     knows which queues have only guarded consumers; ``backlog_trust`` checks older
  deliveries
- ``context``   holds the state of the source that an inspection uses
- ``inspection``  inspects a page of owed deliveries: where Redis has them, and what to do
- ``decision``  decides about one delivery, as a pure function
- ``restore``   restores deliveries to Redis; ``joins`` finds jobs whose dependencies have all ended
- ``limiter``   bounds the rate of restores; ``hold`` stops them
- ``source_monitor``  does all of this for one source, in small steps
- ``service``   runs the process: sources, signals, one pass or an endless loop

The reconciler imports no user code and unpickles nothing. An error does not end the process: it
logs and counts the error, backs off, and continues.
"""
