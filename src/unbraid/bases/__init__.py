"""Base models: opening them from folders, hub ids and single files, and fitting them into memory. This package does not
depend on methods or runs."""
