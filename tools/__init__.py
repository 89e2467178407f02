"""For developers, not packaged: making the embedded base, speed benchmarks, tables for the docs."""
