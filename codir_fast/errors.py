"""Errors of the command line, each printed as one line."""


class UsageError(ValueError):
    """What a user gave is wrong, and the line says what and why; exit code 2."""


class LostProcess(RuntimeError):
    """Another of the processes that train together has ended; exit code 1."""


class SaveError(OSError):
    """What a run makes can't be written, as on a full disk; exit code 1."""
