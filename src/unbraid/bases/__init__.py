"""Base models: opening them from folders, hub names and single files, and drop_foreign_moments them into memory. Nothing here knows methods or runs."""
