"""A run: a job, trained into a folder that can be resumed; many runs at once; and the verbs as Python functions."""
