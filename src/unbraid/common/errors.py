"""The error that is shown to the user."""

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


def printable(text: object, limit: int = 120) -> str:
    """Untrusted text made safe for a terminal: one line without control characters, shortened in the middle to `limit` characters."""
    text = str(text)
    text = text if len(text) <= 4 * limit else f"{text[: 2 * limit]}{text[-2 * limit :]}"
    shown = "".join(letter if letter.isprintable() else " " if letter in "\n\r\t" else "\ufffd" for letter in text)
    if len(shown) <= limit:
        return shown
    return f"{shown[: limit // 2 - 1]}…{shown[-(limit - limit // 2) :]}"
