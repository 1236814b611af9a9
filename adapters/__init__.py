"""The adapters: what jobguard knows of each queue library, and nowhere else."""
