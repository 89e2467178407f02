"""Training runs: one job, trained into a folder and resumable; many runs at once; the verbs as Python functions."""
