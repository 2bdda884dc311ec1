"""Errors of the command line, each printed as one line."""


class UsageError(ValueError):
    """What a user gave is wrong, and the line says what and why; exit code 2."""


class SaveError(OSError):
    """What a run makes can't be written, as on a full disk; exit code 1."""
