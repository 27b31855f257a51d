"""The one exception whose message is written for the user."""


class UserError(ValueError):
    """Something the user gave cannot be used: the message names the value, the allowed range
    and the remedy. The command line prints it without a traceback and exits with 2."""
