"""The reconciler: a process of its own that sees what Redis lost and whom a worker left behind.

One leads, the rest stand by. The leader's day, in the order in which a loss meets the files:

- ``leader``    this term is mine, until ``trusted_until`` on my own clock
- ``pulse``     does Redis still know what it knew? is it still the same Redis?
- ``workers``   who beats, and where; ``liveness``: who is dead, by the exact rule
- ``place``     whether this is the right Redis
- ``trust``     which queues have only guarded consumers; ``vouching``: what was there before
- ``look``      a page of owed deliveries: where are they?
- ``verdict``   what follows, as a pure function
- ``putback``   what goes back into Redis; ``joins``: what waits in vain for jobs that have ended
- ``limiter``   how many may go back now; ``brake``: whether any may
- ``watch``     all of this for one source, in small steps
- ``service``   the process: sources, signals, one pass or for ever

It imports no user code and unpickles nothing. It never dies of an error: it logs, counts, backs off,
and goes on.
"""
