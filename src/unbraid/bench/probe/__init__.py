"""Measuring which layers of a base serve content and which style (`unbraid probe-blocks`)."""
