"""The CUDA part of `make static-gpu OUT=dir`: compiles every kernel of this folder with nvcc,
without a GPU, and says what the compiler made of them.

Cubins go to dir/cuda/, figures to dir/cuda.json and dir/cuda.txt. Exits with 1 where a kernel
spills, takes more registers than its threads have, misses the matrix unit, waits for each product,
or draws a warning.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parent
# Source, architecture, definitions: as CMakeLists.txt builds them.
UNITS = [
    *(
        ("bank_contrast_sm90_pass", "90a", (f"CODIR_FAST_SM90_DIM={dim}",))
        for dim in (64, 128, 256, 384, 512)
    ),
    ("bank_contrast_sm90", "90a", ()),
    ("masked_pool_cuda", "90a", ()),
    ("masked_pool_cuda", "80", ()),
]
INSTRUCTIONS = ("HGMMA", "WARPGROUP.DEPBAR", "UTMALDG", "MUFU.EX2", "LDL", "STL")
REGISTERS = 64 << 10  # of a multiprocessor
TIMES_FEWER_WAITS = 4  # than products: more are a loop that waits for each


def find_cuobjdump() -> str:
    """Of the CUDA toolkit, or Triton's, which toolkits without it need."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def compile_unit(unit: tuple[str, str, tuple[str, ...]], folder: Path) -> list[dict[str, Any]]:
    source, arch, definitions = unit
    suffix = "".join(f"-{text.partition('=')[2]}" for text in definitions)
    cubin = folder / f"{source}{suffix}-sm_{arch}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += ["-I", str(CSRC), *(f"-D{text}" for text in definitions), "-cubin"]
    command += [str(CSRC / f"{source}.cu"), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"nvcc failed on {source}.cu for sm_{arch}:\n{done.stderr}")
    warnings = re.findall(r".*warning.*", done.stdout + done.stderr)
    return [row | {"arch": f"sm_{arch}"} for row in read_kernels(cubin, warnings)]


def read_kernels(cubin: Path, warnings: list[str]) -> list[dict[str, Any]]:
    usage, sass = (cuobjdump(option, cubin) for option in ("-res-usage", "-sass"))
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    rows = []
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for symbol, registers, stack, shared in re.findall(pattern, usage):
        body = bodies[symbol]
        counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", body)) for name in INSTRUCTIONS}
        row = {"kernel": readable(symbol), "registers": int(registers), "stack": int(stack)}
        row |= {"static_shared": int(shared)} | counts
        row["faults"] = faults(row, warnings)
        rows.append(row)
    return rows


def faults(row: dict[str, Any], warnings: list[str]) -> list[str]:
    found = [warning.strip() for warning in warnings]
    if row["stack"] or row["LDL"] or row["STL"]:
        found.append(f"spills: {row['stack']} bytes, {row['LDL']} LDL, {row['STL']} STL")
    if "bank_contrast_kernel" not in row["kernel"]:
        return found
    # The pass that does without masks has a third consumer at 64 columns.
    threads = 512 if re.search(r"64, .*Weighing\)0", row["kernel"]) else 384
    if row["registers"] > REGISTERS // threads // 8 * 8:
        found.append(f"{row['registers']} registers in {threads} threads")
    if not row["HGMMA"] or not row["UTMALDG"]:
        found.append(f"{row['HGMMA']} HGMMA, {row['UTMALDG']} UTMALDG")
    if row["WARPGROUP.DEPBAR"] * TIMES_FEWER_WAITS > row["HGMMA"]:
        found.append(f"{row['WARPGROUP.DEPBAR']} waits for {row['HGMMA']} HGMMA")
    return found


def readable(symbol: str) -> str:
    """The kernel's name and its template arguments."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|codir_fast::|sm90::|pool::|^void ", "", name.strip())
    return re.sub(r">\(.*$", ">", name)


def cuobjdump(option: str, cubin: Path) -> str:
    command = [find_cuobjdump(), option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def as_text(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        counts = ", ".join(f"{row[name]} {name}" for name in INSTRUCTIONS if row[name])
        what = f"{row['arch']:<6} {row['kernel']}"
        fault = f" FAULT: {row['faults']}" if row["faults"] else ""
        lines.append(f"{what:<92} {row['registers']:>3} registers, {counts}{fault}")
    return "".join(f"{line}\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for cubins and figures")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not on PATH: the CUDA kernels can't be compiled here")
    cubins = options.out / "cuda"
    cubins.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda unit: compile_unit(unit, cubins), UNITS)
        rows = [row for part in parts for row in part]
    command = ["nvcc", "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    release = re.findall(r"release \S+ (\S+)", version)
    result = {"nvcc": release[0] if release else "unknown", "kernels": rows}
    (options.out / "cuda.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "cuda.txt").write_text(as_text(rows), encoding="utf-8")
    wrong = [row for row in rows if row["faults"]]
    print(as_text(wrong), end="")
    print(f"{len(rows)} CUDA kernels, {len(wrong)} with faults; all in {options.out}/cuda.txt")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
