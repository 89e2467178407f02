"""The one error that is meant for the user's eyes."""


class UsageError(Exception):
    """Something the user can mend: `what` is wrong, `where` it was seen, and how to `fix` it.

    The command line prints it as one line and exits with status 1.
    """

    def __init__(self, what: str, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        super().__init__(": ".join(part for part in (self.where, what) if part) + (f". {fix}" if fix else ""))
