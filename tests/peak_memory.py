"""The peak memory of a step, in a process of its own."""

import os
import subprocess
import sys

import pytest

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")

_PROBE = """
import sys, torch

torch.set_num_threads(2)


def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def peak_above(function):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts over at what is held now
    start = status("VmRSS")
    result = function()
    return status("VmHWM") - start, result


control = peak_above(lambda: torch.ones(4096, 4096))[0]
if control < 60 * 1024:
    sys.exit(f"no way to see the peak: {control} KiB for 64 MiB")
"""


def peaks_of(program: str, *arguments: str) -> list[int]:
    """The numbers that a program prints, in KiB: what peak_above(function) gives is how far memory
    rose while the function ran, and its result.
    """
    # What is freed goes back to the system at once, so that it isn't taken for free the next time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
    command = [sys.executable, "-c", _PROBE + program, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "no way to see the peak" in run.stderr or "clear_refs" in run.stderr:
        pytest.skip("this system doesn't let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    return [int(line) for line in run.stdout.split()]
