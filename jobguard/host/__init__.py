"""Code that runs inside the user's process: producers and workers."""
