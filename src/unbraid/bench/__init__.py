"""Measuring: the judge, its validation, and the real held-out art that everything is compared with."""
