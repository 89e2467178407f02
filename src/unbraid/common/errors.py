"""The error that is shown to the user, and helpers for its text."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 800  # characters of a message
PLACE, MENDING = 240, 400  # characters of its `where` and `fix`; the rest is for what is wrong


class UsageError(Exception):
    """A problem that the user can fix: `what` is wrong, `where`, and how to `fix` it.

    The command line prints it as one line and exits with status 1. Of a text that is too long, that line has the end of `where`, which
    is the end of a path, and both ends of `what`, which can contain another message.
    """

    def __init__(self, what: str, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        place, mending = printable(self.where, PLACE, 0), printable(fix, MENDING)
        wrong = printable(what, LONGEST - len(place) - len(mending) - len(": . "))
        parts = [part for part in (place, wrong) if part]
        super().__init__(": ".join(parts) + (f". {mending}" if fix else ""))


class UnsuitedError(UsageError):
    """A method cannot train on this kind of base."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """The `fix` for an unknown name: the most similar known name, or all of them if none is similar."""
    names = list(known)
    lower = {name.lower(): name for name in names}
    near = get_close_matches(word.lower(), lower, 1)
    return f"Did you mean {lower[near[0]]!r}?" if near else f"There are: {', '.join(names)}."


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, shortened in the middle to `limit` characters, but a UsageError's is whole; the name of
    its class if it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0], LONGEST if isinstance(error, UsageError) else limit)


def printable(text: object, limit: int = 120, start: int | None = None) -> str:
    """Untrusted text made safe for a terminal: one line without control characters. Of a text that is longer than `limit`
    characters, the first `start` stay (without it, half of them), and the last."""
    shown = str(text)
    if len(shown) > limit:
        first = limit // 2 - 1 if start is None else start
        shown = f"{shown[:first]}…{shown[len(shown) - (limit - first - 1) :]}"
    return "".join(letter if letter.isprintable() else " " if letter in "\n\r\t" else "\ufffd" for letter in shown)
