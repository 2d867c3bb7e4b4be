"""Measurements against other tools, on this machine, in the same run."""
