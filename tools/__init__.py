"""Programs for developers, which are not part of the package: making the embedded base, measuring speed, tables for the
docs."""
