"""`codir-fast doctor | head`: a reader that ends before the command is no error to tell."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["doctor"], 141), (["--help"], 141), (["distill", "--help"], 0)],  # argparse looks away
)
def test_output_without_a_reader_ends_quietly(arguments, code, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "codir_fast", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert done.returncode == code and done.stderr == ""


def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "codir_fast", "doctor"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr.splitlines()[0] == "codir-fast: error: [Errno 28] No space left on device"
