"""The error for everything that a user can cause and correct."""


class UserError(ValueError):
    """The message says what was wrong, where, and what to do; scripts print it as one line and exit with 1."""
