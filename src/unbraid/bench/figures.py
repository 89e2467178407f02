"""What the studies' tables are made of."""

import statistics
from collections.abc import Sequence


def harmonic(a: float, b: float) -> float:
    """The harmonic mean of two cosines; 0 where one of them is not positive."""
    return 2 * a * b / (a + b) if a > 0 and b > 0 else 0.0


def with_error(values: Sequence[float]) -> str:
    """Mean ± standard error of the mean."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"
