"""The rows of the benchmark, and what they are made with: one file of rows per task, trainings and files that rows share, costs,
and the versions that results depend on. `row.py` defines what a row is."""
