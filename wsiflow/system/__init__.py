"""What lies under a run: published files and their receipts, this machine, its processes and their cost."""
