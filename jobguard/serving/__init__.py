"""What a reconciler offers to its surroundings: health, metrics, passes on request, and notices.

Nothing here is in the path of a job or in a step of the leader. `jobguard reconcile` starts it.
"""
