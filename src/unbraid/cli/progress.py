"""The progress bars of all commands."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


def progress_bar(*more: ProgressColumn, quiet: bool, count: ProgressColumn | None = None) -> Progress:
    """Description, bar, count (by default such as "3/10"), time remaining, and `more` columns. `quiet` shows nothing."""
    columns = [TextColumn("{task.description}"), BarColumn(), count or MofNCompleteColumn(), TimeRemainingColumn()]
    return Progress(*columns, *more, console=console, disable=quiet)
