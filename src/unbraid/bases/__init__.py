"""Base models: opening them from folders, hub names and single files, and fitting them into memory. Nothing here knows methods or runs."""
