"""The one kind of error that a user can cause, and mend."""


class UserError(ValueError):
    """Something the user can mend. The message says what was wrong, where, and what to do; scripts print it as one line."""
