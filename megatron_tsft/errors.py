"""The one exception that means "the user can fix this": entry points print it as one line and exit
2."""


class UserError(ValueError):
    """Bad input or a combination that cannot work; the message says what was wrong, with the value,
    and what to do.

    met_here_alone: other ranks do not know of it, so this one must say it at once.
    """

    met_here_alone = False
