"""make test-gpu and bench-gpu up to the programs that they call, with a recorder in their place."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORDER = """#!/bin/sh
echo "$CODIR_FAST_GPU_TEST_LOG $*" >> "$RECORD"
case "$*" in *test_named_shapes*) exit 1;; esac
"""
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def make(tmp_path):
    python, record = tmp_path / "python", tmp_path / "record"
    python.write_text(RECORDER, encoding="utf-8")
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    environment |= {"RECORD": str(record), "OUT": str(tmp_path / "out")}

    # What is built, and that there is a GPU, is taken for granted.
    flags = ["-C", str(ROOT), "-o", "gpu", "-o", "build/gpu/.installed", f"PYTHON={python}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def start(*arguments, **options):
        return subprocess.Popen(["make", *flags, *arguments], env=environment, **pipes, **options)

    def run(*arguments):
        done = subprocess.run(["make", *flags, *arguments], env=environment, **pipes)
        lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
        return done, lines

    run.start = start
    return run


def test_a_part_that_fails_is_named_and_the_next_runs(make, tmp_path):
    done, lines = make("test-gpu", "QUICK=1", "WORKERS=3")
    assert done.returncode == 2 and "out of time, " in done.stderr
    assert done.stderr.rstrip().splitlines()[-2].count("test_named_shapes.py") == 1
    log = tmp_path / "out" / "tests.jsonl"
    flags = "-m pytest -q -n 3 --max-worker-restart 3"
    parts = (
        "test_sanitizer.py",
        "test_named_shapes.py",
        "test_cuda.py test_loss.py test_in_batch.py",
    )
    assert lines[1:] == [f"{log} {flags} {part}" for part in parts]


@pytest.fixture
def sanitizer(tmp_path):
    """A tool in place of compute-sanitizer's: that the rest of its line runs is enough."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\nwhile [ "${1#*/python}" = "$1" ]; do shift; done\nexec "$@"\n')
    tool.chmod(0o755)
    return f"SANITIZER={tool}"


def parts(lines):
    """What each call of pytest was given, after its own flags."""
    return [line.split(" -q ")[1] for line in lines if "-m pytest" in line]


def test_the_rest_is_all_other_files(make, tmp_path):
    log = tmp_path / "out" / "tests.jsonl"
    make("test-gpu", "QUICK=1")
    log.touch()
    _, lines = make("test-gpu", "REST=1")
    assert log.exists()
    named = {word for line in lines for word in line.split() if word.startswith("test_")}
    assert named == {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}


def test_quick_rest_and_sanitize_are_all(make, tmp_path, sanitizer):
    record = tmp_path / "record"
    each = {}
    for flag in ("QUICK=1", "REST=1", "SANITIZE=1", "QUICK="):
        record.unlink(missing_ok=True)
        each[flag] = parts(make("test-gpu", flag, sanitizer)[1])
    assert all(each.values())
    assert each["QUICK=1"] + each["REST=1"] + each["SANITIZE=1"] == each["QUICK="]
    assert {part.split()[0] for part in each["SANITIZE=1"]} == {"test_sanitizer.py"}


@pytest.mark.parametrize("flags", [[], ["QUICK=1"], ["SHAPE=clip"]], ids=str)
def test_a_benchmark_goes_to_a_folder_from_the_environment(make, tmp_path, flags):
    (ROOT / "build" / "gpu").mkdir(parents=True, exist_ok=True)
    done, lines = make("bench-gpu", *flags)
    assert done.returncode == 0, done.stderr
    assert lines[0].endswith(f"--out {tmp_path / 'out'}")
    assert f"--shape {'clip' if 'SHAPE=clip' in flags else 'all'} " in lines[0]
    assert ("--sweep K " in lines[0]) == (flags != ["QUICK=1"])


def test_a_benchmark_that_takes_too_long_ends_and_says_so(make, tmp_path):
    (ROOT / "build" / "gpu").mkdir(parents=True, exist_ok=True)
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    done, _ = make("bench-gpu", "BENCH_SECONDS=1")
    assert done.returncode == 2
    assert f"out of time; what was timed until then is in {tmp_path / 'out'}" in done.stderr


@pytest.mark.parametrize("target", ["bench-gpu", "test-gpu"])
def test_ctrl_c_ends_all_that_was_started(make, tmp_path, target):
    """A terminal sends it to make and the shell alone: what has a limit is in another group."""
    (ROOT / "build" / "gpu").mkdir(parents=True, exist_ok=True)
    started = tmp_path / "started"
    script = f'case "$*" in -c*) exit 0;; esac\necho $$ >> {started}\nexec sleep 60\n'
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}", encoding="utf-8")
    # Where the tests run in the background SIGINT is ignored, and would be by what they start.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with make.start(target, "QUICK=1", start_new_session=True, **heard) as process:
        while not (started.exists() and started.read_text(encoding="utf-8").endswith("\n")):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert process.returncode in (2, -signal.SIGINT), error
    (pid,) = started.read_text(encoding="utf-8").split()  # no part came after it
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
