"""codir_fast.compat: what it offers, and that it brings no other library with it."""

import subprocess
import sys

from codir_fast import compat


def test_public_names():
    for name in compat.__all__:
        assert getattr(compat, name).__doc__, name
    assert compat.NTXentLoss is not compat.pytorch_metric_learning.NTXentLoss
    assert compat.NTXentLoss.__module__ == "codir_fast.compat.lightly"


def test_the_originals_are_not_imported():
    code = (
        "import sys, codir_fast.compat\n"
        "names = 'info_nce lightly pytorch_metric_learning open_clip crd moco'.split()\n"
        "print([name for name in names if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
