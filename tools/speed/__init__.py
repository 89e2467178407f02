"""Measures the cost of a training step: `python -m tools.speed`."""
