"""What a training step costs: `python -m tools.speed`."""
