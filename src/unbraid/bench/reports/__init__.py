"""Statistics, tables, plots and the report of a benchmark."""
