"""The benchmark on a user's own base and pictures, scored with the metrics that papers use."""
