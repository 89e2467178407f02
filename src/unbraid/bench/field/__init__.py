"""The benchmark on a user's own pictures, by the field's metrics."""
