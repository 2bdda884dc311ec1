"""The error of the command line: what a user gave is wrong, and one line says what and why."""


class UsageError(ValueError):
    """Printed as one line; the program ends with exit code 2."""
