"""What nvcc makes of the hand-written kernels: the static gate of csrc/static_gate.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).resolve().parent.parent / "csrc" / "static_gate.py"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    out = tmp_path_factory.mktemp("static")
    command = [sys.executable, str(GATE), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with faults" in done.stdout
    assert len(list((out / "cuda").glob("*.cubin"))) == 8
    return json.loads((out / "cuda.json").read_text())["kernels"]


def test_every_pass_is_there(kernels):
    """Five widths; with a fixed shift bfloat16 alone."""
    passes = [row for row in kernels if row["kernel"].startswith("bank_contrast_kernel")]
    assert len(passes) == 5 * (3 + 2)


@pytest.mark.parametrize(
    ("dim", "least_rows"), [(64, 128), (128, 112), (256, 64), (384, 128), (512, 128)]
)
def test_passes_multiply_on_the_matrix_unit_and_keep_to_registers(kernels, dim, least_rows):
    for row in kernels:
        if f", {dim}, " not in row["kernel"]:
            continue
        # Logits of a tile before the loop and in it, weighted rows in it and after it; of wide
        # rows logits of each consumer's tile, and weighted rows of both tiles for each.
        assert row["HGMMA"] >= 2 * (dim // 16 + least_rows // 16)
        assert row["stack"] == row["LDL"] == row["STL"] == 0
        assert 4 * row["WARPGROUP.DEPBAR"] <= row["HGMMA"]
        assert row["UTMALDG"] > 0


def test_a_spill_is_a_fault(monkeypatch):
    monkeypatch.syspath_prepend(str(GATE.parent))
    import static_gate

    row = {"kernel": "bank_contrast_kernel<PassConfig<__half, 64, (Weighing)1> >", "stack": 8}
    row |= {"registers": 200, "HGMMA": 8, "UTMALDG": 0, "WARPGROUP.DEPBAR": 3, "LDL": 1, "STL": 1}
    found = static_gate.faults(row, ["ptxas warning: serialised"])
    assert len(found) == 5
