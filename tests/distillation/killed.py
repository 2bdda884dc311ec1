"""A run of codir-fast in a forked process that has everything imported, and may kill itself."""

import os
import signal
import sys

from codir_fast.cli import main

# What a program does to files, as Python's audit hooks tell it.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def run(arguments: list[str], output: str, last: int, report: str) -> None:
    """Runs the command; kills itself at the change number `last` of files in `output`.

    Args:
        report: file for what is printed, and for the number of changes where no kill comes.
    """
    count = 0

    def watch(event: str, values: tuple) -> None:
        nonlocal count
        if event in CHANGES or (event == "open" and output in str(values[0])):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    with open(report, "w") as sys.stdout:
        sys.stderr = sys.stdout
        sys.addaudithook(watch)
        code = main(arguments)
        changes, last = count, 0
        print(f"\nchanges {changes}", flush=True)
    os._exit(code)
