"""`python -m jobguard.demo`."""

from jobguard.demo import command

command(prog_name="jobguard demo")
