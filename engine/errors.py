"""The exceptions a user is meant to read."""


class UserError(Exception):
    """Bad input. One line: the value, the legal range, and the next thing to do.

    A command prints the message and exits with status 2, before any work and with nothing on disk touched.
    """


class RankError(Exception):
    """Another process of the same run died or failed. One line; a command prints it and exits with status 1."""
