"""The program codir-fast: finds the command, turns errors of use into one line and exit code 2."""

import importlib
import importlib.util
import os
import select
import sys
import traceback
from collections.abc import Sequence

from codir_fast.errors import Diverged, LostProcess, SaveError, UsageError, is_full
from codir_fast.version import __version__

# Command -> (module with run(arguments) -> int, what it does).
COMMANDS = {
    "finetune": ("codir_fast.distillation.finetune", "fine-tune an encoder into a teacher"),
    "distill": ("codir_fast.distillation.distill", "distil a teacher into a smaller student"),
    "study": ("codir_fast.distillation.study", "many distillations side by side, from a file"),
    "pretrain": ("codir_fast.distillation.pretrain", "pre-train a student on plain texts"),
    "evaluate": ("codir_fast.distillation.evaluate", "accuracy and speed of a model, as JSON"),
    "report": ("codir_fast.distillation.report.command", "one page about runs, with pictures"),
    "bench": ("codir_fast.benchmarks.run", "speed and memory of the kernels beside their peers"),
    "doctor": ("codir_fast.doctor", "versions, backends, and what to do about what is missing"),
}
# Start of a module's name -> (packages it needs, extra that brings them).
NEEDS = {
    "codir_fast.distillation": (
        ("transformers", "datasets", "accelerate", "safetensors"),
        "train",
    ),
    "codir_fast.distillation.report": (("matplotlib",), "train"),
    "codir_fast.benchmarks": (("tqdm",), "bench"),
}

TRACEBACK = "CODIR_FAST_TRACEBACK"

USAGE = "\n".join(
    [
        "usage: codir-fast COMMAND [--flag value ...]",
        "",
        "commands:",
        *(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()),
        "",
        "codir-fast COMMAND --help lists the flags; codir-fast --version prints the version.",
        f"An error is one line; with {TRACEBACK}=1 in the environment its traceback comes first.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for an error of use, 1 for a full disk,
    weights that are no numbers, or another process that ended, 130 after Ctrl-C, 141 where a reader
    of its output, such as head, has ended.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at the end of Python nobody would meet the error
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _has_lost_reader():
            return 141
        if not is_full(error):
            raise
        return _failed(error, 1)


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"codir-fast {__version__}")
        return 0
    try:
        return _run(arguments[0], arguments[1:])
    except (UsageError, NotImplementedError) as error:
        return _failed(error, 2)
    except (SaveError, LostProcess, Diverged) as error:
        return _failed(error, 1)
    except KeyboardInterrupt as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            traceback.print_exception(error)
        print("codir-fast: interrupted", file=sys.stderr)
        return 130


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        raise UsageError(f"COMMAND must be one of {', '.join(COMMANDS)}, got {command!r}")
    module = COMMANDS[command][0]
    for start, (packages, extra) in NEEDS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if module.startswith(start) and missing:
            raise UsageError(
                f"{command} needs {', '.join(missing)}: pip install '.[{extra}]' in the sources"
            )
    return importlib.import_module(module).run(arguments)


def _has_lost_reader() -> bool:
    """Whether standard output has no reader any more; what it still holds is dropped then."""
    if sys.stdout is None:
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors are told whatever is asked for
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _failed(error: Exception, code: int) -> int:
    """Says in one line what is wrong; before it, where, for those who look for a mistake in us."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        traceback.print_exception(error)
    print(f"codir-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
