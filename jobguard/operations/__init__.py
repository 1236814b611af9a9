"""What a person on call reads and does: one read model for the commands, Python, the metrics and the page.

Nothing here is in the path of a job. Nothing is unpickled, and no user code is imported.
"""
