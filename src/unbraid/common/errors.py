"""The error that is shown to the user, and helpers for its text."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 299  # characters of a message


class UsageError(Exception):
    """A problem that the user can fix: `what` is wrong, `where`, and how to `fix` it.

    The command line prints it as one line and exits with status 1.
    """

    def __init__(self, what: str, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        where_ = printable(self.where, max(LONGEST - min(len(what), 120) - min(len(fix), 90) - 8, 60))
        parts = [part for part in (where_, printable(what, 120)) if part]
        super().__init__(": ".join(parts) + (f". {printable(fix, 90)}" if fix else ""))


class UnsuitedError(UsageError):
    """A method cannot train on this kind of base."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """The `fix` for an unknown name: the most similar known name, or all of them if none is similar."""
    names = list(known)
    lower = {name.lower(): name for name in names}
    near = get_close_matches(word.lower(), lower, 1)
    return f"Did you mean {lower[near[0]]!r}?" if near else f"There are: {', '.join(names)}."


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, at most `limit` characters; the name of its class if it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit]


def printable(text: object, limit: int = 120) -> str:
    """Untrusted text made safe for a terminal: one line without control characters, shortened in the middle to `limit` characters."""
    text = str(text)
    text = text if len(text) <= 4 * limit else f"{text[: 2 * limit]}{text[-2 * limit :]}"
    shown = "".join(letter if letter.isprintable() else " " if letter in "\n\r\t" else "\ufffd" for letter in text)
    if len(shown) <= limit:
        return shown
    return f"{shown[: limit // 2 - 1]}…{shown[-(limit - limit // 2) :]}"
