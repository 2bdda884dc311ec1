"""Errors of the command line, each printed as one line."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UsageError(ValueError):
    """What a user gave is wrong, and the line says what and why; exit code 2."""


class Diverged(RuntimeError):
    """A run's weights are no numbers any more; exit code 1."""


class LostProcess(RuntimeError):
    """Another of the processes that train together has ended; exit code 1."""


class SaveError(OSError):
    """What a run makes can't be written, as on a full disk; exit code 1."""


def is_full(error: BaseException | None) -> bool:
    """Whether the disk is full, or a file larger than it may be, beneath whatever libraries say."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    return False
