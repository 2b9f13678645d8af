"""The one exception that the command line turns into a clear line and exit code 2."""


class SuperegoError(Exception):
    """Bad input or an impossible request: says what, where, expected and found, what to do."""
