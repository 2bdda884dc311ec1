"""`make static-gpu OUT=dir`: compiles every Triton kernel of the tables for sm_80, sm_89, sm_90,
sm_100 and sm_120, without a GPU, and says what the compiler made of them.

Cubins go to dir/triton/, figures to dir/triton.json and dir/triton.txt. Exits with 1 where a kernel
spills, or misses what its architecture multiplies with.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from codir_fast.kernels import bank_contrast, in_batch_passes, tiles, variants
from codir_fast.kernels.ahead_of_time import INSTRUCTIONS, Built, build
from codir_fast.kernels.variants import ARCHITECTURES, Variant

# Which multiply queries by tiles of the rows that they walk over.
_PASSES = (
    bank_contrast.bank_contrast_kernel,
    in_batch_passes.in_batch_sums_kernel,
    in_batch_passes.in_batch_gradient_sums_kernel,
)
# Bytes a program may have. sm_80's tiles serve sm_86, sm_89 and sm_120 too, which have less.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Bytes a thread may put aside outside of loops: none where the tiles were chosen for the
# architecture. With another's, ptxas now and then does so with a number or two, to keep a program
# more on the multiprocessor.
SPILL_LIMIT = {80: 0, 89: 16, 90: 0, 120: 16}
TIMES_FEWER_WAITS = 4  # than wgmma: more are a loop that waits for each product


def faults(variant: Variant, built: Built) -> list[str]:
    """What a kernel of the tables must not have."""
    found = []
    counts = built.counts
    limit = tiles.choose(SPILL_LIMIT, variant.arch)
    if built.local_in_loops or built.stack > limit:
        spills = f"{counts['LDL']} LDL, {counts['STL']} STL, {built.local_in_loops} in loops"
        found.append(f"spills: {built.stack} bytes, {spills}")
    if built.shared > tiles.choose(SHARED_LIMIT, variant.arch):
        found.append(f"{built.shared} bytes of shared memory")
    if variant.kernel in _PASSES and variant.arguments.get("WHOLE", True):
        found += _faults_of_the_pass(variant, counts)
    return found


def _faults_of_the_pass(variant: Variant, counts: dict[str, int]) -> list[str]:
    wide = variant.arguments["BLOCK_B"] >= 64
    half = variant.arguments["PRECISION"] == "ieee"
    if not (wide and half) or not 90 <= variant.arch < 120:
        return [] if counts["HMMA"] else ["no HMMA"]
    if variant.arch >= 100:
        return [] if counts["UTCHMMA"] else ["no UTCHMMA"]
    waits, products = counts["WARPGROUP.DEPBAR"], counts["HGMMA"]
    if not products:
        return ["no HGMMA"]
    # A tile of 16 or 32 rows has so few products that the waits at a loop's ends count.
    few = variant.arguments["BLOCK_K"] < 64
    serial = waits * TIMES_FEWER_WAITS > products and not few
    return [f"{waits} waits for {products} HGMMA"] if serial else []


def measure(variant: Variant, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {
        "operator": variant.operator,
        "variant": variant.name,
        "arch": f"sm_{variant.arch}",
        "kernel": variant.kernel.fn.__name__,
        **variant.options,
    }
    built = build(variant.kernel, variant.arch, variant.arguments, **variant.options)
    file = f"{variant.operator}-{variant.name}-sm_{variant.arch}.cubin"
    (folder / file.replace(", ", "-").replace(" ", "_")).write_bytes(built.cubin)
    row |= {"registers": built.registers, "stack": built.stack, "shared": built.shared}
    row["local_in_loops"] = built.local_in_loops
    return row | built.counts | {"faults": faults(variant, built)}


def _measure(job: tuple[int, int, Path]) -> dict[str, Any]:
    arch, number, folder = job
    return measure(variants.every(arch)[number], folder)


def as_text(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        counts = ", ".join(f"{row[name]} {name}" for name in INSTRUCTIONS if row[name])
        size = f"{row['registers']:>3} registers, {row['shared'] >> 10:>3} KiB, {counts}"
        what = f"{row['arch']:<6} {row['operator']}: {row['variant']}"
        lines.append(f"{what:<78} {size} {'FAULT: ' * bool(row['faults'])}{row['faults'] or ''}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for cubins and figures")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    options = parser.parse_args()
    cubins = options.out / "triton"
    cubins.mkdir(parents=True, exist_ok=True)
    jobs = [
        (arch, number, cubins)
        for arch in options.arch
        for number in range(len(variants.every(arch)))
    ]
    from tqdm import tqdm

    with ProcessPoolExecutor() as pool:
        done = pool.map(_measure, jobs, chunksize=4)
        rows = list(tqdm(done, total=len(jobs), unit="kernel", dynamic_ncols=True))
    result = {"triton": triton.__version__, "kernels": rows}
    (options.out / "triton.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "triton.txt").write_text(as_text(rows), encoding="utf-8")
    wrong = [row for row in rows if row["faults"]]
    print(as_text(wrong), end="")
    print(f"{len(rows)} kernels, {len(wrong)} with faults; all in {options.out}/triton.txt")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
