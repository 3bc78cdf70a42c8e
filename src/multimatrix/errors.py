"""The one exception a user is meant to read."""

from __future__ import annotations


class InputError(ValueError):
    """What the user asked for cannot work.

    The message is one sentence with the numbers involved and the way out. The command line prints it and
    exits with status 2; everything else that is raised is a bug of ours and keeps its traceback.
    """


def one_line(error: BaseException) -> str:
    """The message of somebody else's exception, fit for the middle of one of our sentences."""
    message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return message if len(message) <= 300 else message[:300] + "..."
