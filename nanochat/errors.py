"""The errors for everything that a user can cause and correct."""


class UserError(ValueError):
    """The message says what was wrong, where, and what to do; scripts print it as one line and exit with 1.

    mend: whether the user must mend something before it is worth trying again; False for what may pass by itself.
    """

    mend = True


class Unreachable(UserError):
    """Other processes or machines do not answer. Those who start jobs try again (--max-restarts)."""

    mend = False


class NotWritten(UserError):
    """A file could not be written because of its disk. It is not there, or what it was before.

    full: whether it may succeed once there is more room.
    """

    def __init__(self, message: str, full: bool = False):
        super().__init__(message)
        self.full = full
