"""`unbraid selftest`: every verb for a few steps on this machine, with a table of what works."""
