"""The Triton kernels without a GPU: run by the interpreter, and compiled for some of them. All
that the tables hold is compiled by `make static-gpu`; here, what users meet most.
"""

import json
import sys
from dataclasses import replace

import needs_triton
import pytest
import torch
import triton_interpreter

pytestmark = needs_triton.MARKS
ARCHITECTURES = (80, 90, 100, 120)
HALF, FLOAT = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "operator",
    [
        "bank_contrast",
        "in_batch_contrast",
        "indexed_contrast",
        "bank_update",
        "masked_pool",
        "unit_rows",
    ],
)
def test_interpreted(operator):
    triton_interpreter.run_tests(f"test_interpreted_{operator}.py")


def build(variant):
    from codir_fast.kernels import ahead_of_time, static_gate

    arguments = (variant.kernel, variant.arch, variant.arguments)
    built = ahead_of_time.build(*arguments, **variant.options)
    assert static_gate.faults(variant, built) == [], str(variant)
    return built


@pytest.mark.parametrize("D", [64, 128, 256, 512])
@pytest.mark.parametrize("B", [64, 256])
def test_the_pass_on_hopper(B, D):
    """wgmma, fed by the copy engine, waits for a quarter of the products at most, no spill."""
    from codir_fast.kernels import variants

    (variant,) = variants.passes(90, HALF, B, D, "all rows")
    counts = build(variant).counts
    assert counts["HGMMA"] > 0 and counts["UTMALDG"] > 0
    assert 4 * counts["WARPGROUP.DEPBAR"] <= counts["HGMMA"]
    assert counts["LDL"] == counts["STL"] == 0


@pytest.mark.parametrize("D", [64, 128])
def test_the_pass_on_blackwell(D):
    from codir_fast.kernels import variants

    (variant,) = variants.passes(100, HALF, 256, D, "all rows")
    assert build(variant).counts["UTCHMMA"] > 0


@pytest.mark.parametrize("use", ["bank with labels", "bank not full", "rows of any length", "NCE"])
@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_pass(arch, dtype, use):
    from codir_fast.kernels import variants

    for variant in variants.passes(arch, dtype, 64, 128, use):
        build(variant)


@pytest.mark.parametrize("arch", [89, 120])
def test_the_pass_on_smaller_gpus(arch):
    """They have a bit over half the shared memory of sm_80, and no newer matrix instruction."""
    from codir_fast.kernels import variants

    (variant,) = variants.passes(arch, HALF, 256, 128, "all rows")
    assert build(variant).shared <= 99 << 10


@pytest.mark.parametrize("B", [64, 256])
def test_a_float32_bank_beside_queries_of_half_precision(B):
    from codir_fast.kernels import variants

    (variant,) = variants.passes(90, HALF, B, 256, "all rows", FLOAT)
    build(variant)


def test_the_copy_engine_takes_row_numbers_of_32_bits():
    from codir_fast.kernels.bank_access import fits_copy_engine

    row = torch.empty(1, 8, dtype=HALF)
    assert fits_copy_engine(row.expand((1 << 31) - 1, 8))
    assert not fits_copy_engine(row.expand(1 << 31, 8))


def test_nan_stays_nan_under_masks():
    """A logit that is NaN is not lifted to the smallest that counts, as a GPU's maximum would."""
    from codir_fast.kernels import ahead_of_time, variants

    (variant,) = variants.passes(90, HALF, 16, 64, "bank with labels")
    built = ahead_of_time.build(variant.kernel, variant.arch, variant.arguments, **variant.options)
    assert "FMNMX.NAN" in built.sass


@pytest.fixture
def restore_fp32_precision():
    matmul = torch.backends.cuda.matmul
    before = torch.backends.fp32_precision, matmul.fp32_precision
    yield
    torch.backends.fp32_precision, matmul.fp32_precision = before


@pytest.mark.usefixtures("restore_fp32_precision")
def test_tf32_is_asked_for_by_either_interface():
    from codir_fast.kernels.problem import precision

    matmul = torch.backends.cuda.matmul
    assert precision(FLOAT) == "tf32x3"
    torch.backends.fp32_precision = "tf32"
    assert precision(FLOAT) == "tf32"
    matmul.fp32_precision = "ieee"
    assert precision(FLOAT) == "tf32x3"
    torch.backends.fp32_precision = "none"
    for allowed in (True, False):
        matmul.allow_tf32 = allowed
        assert precision(FLOAT) == ("tf32" if allowed else "tf32x3")
    assert precision(HALF) == "ieee"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_other_kernels(arch):
    from codir_fast.kernels import variants

    chosen = [
        *(v for B in (64, 256) for v in variants.two_products(arch, HALF, B, "all rows")),
        variants.backward(arch, HALF, 128, "all rows"),
        *variants.by_index(arch, 128, "bank with labels" if arch == 90 else "all rows"),
        *variants.others(arch, 128),
    ]
    for variant in chosen:
        build(variant)


@pytest.mark.parametrize("D", [128, 512, 1024])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_in_batch_contrast(arch, D):
    from codir_fast.kernels import in_batch_variants

    for variant in in_batch_variants.passes(arch, HALF, 1024, D, D == 512):
        build(variant)
    if D == 512:
        for variant in in_batch_variants.ends(arch, HALF, D):
            build(variant)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_masked_pool(arch):
    """In 16-byte accesses, with room for twelve programs of a warp on a multiprocessor; more layers
    are no more registers.
    """
    from codir_fast.kernels import variants

    for mode, dtype, L in (("mean", HALF, 25), ("max", torch.float16, 6), ("last", FLOAT, 1)):
        forward, backward = (build(v) for v in variants.pool(arch, dtype, mode, torch.int64, L))
        assert max(forward.registers, backward.registers) <= 168
        assert backward.sass.count("STG.E.128") > 0
        assert mode == "last" or forward.sass.count("LDG.E.128") > 0


@pytest.fixture
def launched():
    """Kernels as launched on sm_90, on CPU tensors, by name; nothing is computed."""
    import triton_driver
    from codir_fast.kernels import (
        bank_contrast,
        bank_contrast_backward,
        bank_contrast_wide,
        bank_update,
        contrast,
        in_batch_ends,
        in_batch_passes,
        indexed_contrast,
        indexed_contrast_backward,
        masked_pool,
        masked_pool_backward,
    )
    from triton.runtime import JITFunction

    modules = (
        bank_contrast,
        bank_contrast_backward,
        bank_contrast_wide,
        bank_update,
        contrast,
        in_batch_ends,
        in_batch_passes,
        indexed_contrast,
        indexed_contrast_backward,
        masked_pool,
        masked_pool_backward,
    )
    functions = [f for module in modules for f in vars(module).values()]
    with triton_driver.sm_90([f for f in functions if isinstance(f, JITFunction)]) as names:
        yield names


def inputs(B, K, D, dtype, masks, nce):
    query, bank = torch.randn(B, D).to(dtype), torch.randn(K, D).to(dtype)
    options = {"inv_temperature": torch.tensor(14.0), "normalize": True}
    if masks:
        options["labels"], options["bank_labels"] = (torch.randint(0, 3, (n,)) for n in (B, K))
        options |= {"exclude_index": torch.randint(0, K, (B,)), "valid": torch.rand(K) < 0.5}
    if nce:
        options |= {"log_partition": torch.tensor(1.0), "num_data": 10}
    return query, bank, options


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    ("B", "K", "D", "dtype"),
    [
        (32, 4096, 128, HALF),
        (3, 70, 31, torch.float16),
        (1, 1, 1, FLOAT),
        (200, 300, 768, HALF),
        (5, 40, 300, FLOAT),
    ],
)
def test_launches(launched, B, K, D, dtype, masks):
    """One pass is three launches, the mean makes it four; gradients are made by then."""
    from codir_fast.kernels import (
        bank_contrast,
        bank_contrast_backward,
        indexed_contrast,
        indexed_contrast_backward,
    )

    query, bank, options = inputs(B, K, D, dtype, masks, nce=masks)
    outputs = bank_contrast.bank_contrast(query, query, bank, **options)
    products = ["bank_contrast_weights_kernel", "bank_contrast_rows_kernel"]
    passes = ["bank_contrast_kernel"] if D <= 256 else products
    assert launched == ["prepare_kernel", *passes, "combine_kernel"]
    launched.clear()
    grad, lse = torch.ones(B), outputs[1]
    bank_contrast_backward.bank_contrast_backward(grad, query, bank, lse=lse, **options)
    assert launched == ["prepare_kernel", "bank_contrast_backward_kernel"]
    launched.clear()
    index = torch.randint(0, K, (B, 9))
    indexed_contrast.indexed_contrast(query, query, bank, index=index, **options)
    assert launched == ["prepare_kernel", "indexed_contrast_kernel", "combine_kernel"]
    launched.clear()
    rest = {"lse": lse, "index": index, **options}
    indexed_contrast_backward.indexed_contrast_backward(grad, query, bank, **rest)
    assert launched == ["prepare_kernel", "indexed_contrast_backward_kernel"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("B", "D", "dtype"),
    [(64, 384, HALF), (3, 31, torch.float16), (1, 1, FLOAT), (300, 768, HALF), (40, 300, FLOAT)],
)
def test_launches_in_batch(launched, B, D, dtype, labelled, symmetric):
    """Three each way, whatever ways there are: the gradients to both sides come from one pass."""
    from codir_fast.kernels import in_batch_contrast

    labels = torch.randint(0, 3, (B,)) if labelled else None
    given = (*torch.randn(2, B, D).to(dtype), torch.tensor(14.0))
    options = (labels, symmetric, True)
    _, lse = in_batch_contrast.in_batch_contrast(*given, *options)
    kernels = [f"in_batch_{name}_kernel" for name in ("rows", "sums", "losses")]
    assert launched == kernels
    launched.clear()
    in_batch_contrast.in_batch_contrast_backward(torch.ones(B), *given, lse, *options)
    assert launched == [kernels[0], "in_batch_gradient_sums_kernel", "in_batch_gradients_kernel"]


@pytest.mark.parametrize("D", [384, 768])
def test_launches_with_a_float32_bank(launched, D):
    """As a queue of the default dtype has it under autocast: its tiles fit into shared memory."""
    from codir_fast.kernels import bank_contrast

    query, bank, options = inputs(64, 300, D, HALF, False, nce=False)
    bank_contrast.bank_contrast(query, query, bank.float(), **options)
    assert launched[-2:] == ["bank_contrast_rows_kernel", "combine_kernel"]


@pytest.mark.parametrize("D", [128, 768])
def test_launches_with_one_row_of_any_stride(launched, D):
    """It is contiguous whatever its stride is, which the copy engine would refuse."""
    from codir_fast.kernels import bank_contrast

    query, bank = (torch.randn(D, 1).to(HALF).T for _ in range(2))
    assert bank.is_contiguous() and bank.stride(0) == 1
    bank_contrast.bank_contrast(query, query, bank, torch.tensor(14.0))
    assert launched[-1] == "combine_kernel"


def test_launches_of_pooling_and_update(launched):
    from codir_fast.kernels import bank_update, masked_pool, masked_pool_backward

    bank_update.bank_update(
        torch.randn(9, 16), torch.zeros(5).long(), torch.randn(5, 16), 0.5, torch.ones(9).bool()
    )
    assert launched == ["bank_update_kernel"]
    launched.clear()
    states, mask = [torch.randn(2, 5, 24) for _ in range(7)], torch.ones(2, 5, dtype=torch.bool)
    for mode in masked_pool.MODES:
        pooled, argmax = masked_pool.masked_pool(states, mask, mode)
        masked_pool_backward.masked_pool_backward(pooled, mask, argmax, 7, 5, mode)
    assert launched == ["masked_pool_kernel", "masked_pool_backward_kernel"] * 4


def test_search_for_tiles(monkeypatch):
    """Only when it is asked for, once a shape; what does not fit the hardware is passed over."""
    from codir_fast.kernels import autotune
    from triton.runtime.errors import OutOfResources

    table = {"BLOCK_B": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    gpu, timed = torch.device("cuda"), []

    def run(tile):
        if tile["BLOCK_K"] == 128:
            raise OutOfResources(2, 1, "shared memory")
        return tile

    def do_bench(function, return_mode):
        timed.append(function())
        return abs(timed[-1]["BLOCK_K"] - 32) + timed[-1]["num_stages"]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(autotune, "_FOUND", {})
    assert autotune.run_best(("shape",), table, run, gpu) == table and not timed
    monkeypatch.setenv("CODIR_FAST_AUTOTUNE", "1")
    best = autotune.run_best(("shape",), table, run, gpu)
    assert timed[0] == table
    assert (best["BLOCK_K"], best["num_stages"]) == (32, 2)
    count = len(timed)
    assert count == len({tuple(tile.items()) for tile in timed}) == 36
    assert autotune.run_best(("shape",), table, run, gpu) == best and len(timed) == count
    assert autotune.run_best(("shape",), table, run, torch.device("cpu")) == table


def test_what_is_put_aside_outside_of_loops():
    """A number that sm_120 keeps in local memory from before the loop until after it is no fault;
    on sm_90, whose tiles are its own, it is.
    """
    from codir_fast.kernels import ahead_of_time, static_gate, variants

    (variant, _) = variants.pool(120, HALF, "mean", None)
    built = ahead_of_time.build(variant.kernel, 120, variant.arguments, **variant.options)
    outside = replace(built, stack=8, local_in_loops=0)
    assert static_gate.faults(variant, outside) == []
    assert static_gate.faults(replace(variant, arch=90), outside) != []
    assert static_gate.faults(variant, replace(outside, local_in_loops=1)) != []
    assert static_gate.faults(variant, replace(outside, stack=24)) != []


def test_local_memory_in_loops():
    from codir_fast.kernels.ahead_of_time import local_in_loops

    code = ("LDL R1, [R1]", "FADD R2, R2, R1", "@P0 BRA 0x0010", "STL [R1], R2", "BRA 0x0040")
    sass = "\n".join(f"  /*{16 * n:04x}*/  {text} ;  /* 0x00 */" for n, text in enumerate(code))
    assert local_in_loops(sass) == 0
    assert local_in_loops(sass.replace("FADD R2, R2, R1", "STL [R1+0x4], R2")) == 1
    assert local_in_loops(sass.replace("0x0010", "0x0000")) == 1


def test_faults_are_seen():
    """The gate finds a kernel that keeps more than registers hold, or waits for each product."""
    from codir_fast.kernels import ahead_of_time, static_gate, variants

    (variant,) = variants.passes(90, HALF, 256, 256, "all rows")
    arguments = {**variant.arguments, "BLOCK_K": 128}
    arguments["bank"] = ahead_of_time.descriptor(HALF, 128, 256)
    built = ahead_of_time.build(variant.kernel, 90, arguments, num_warps=4, num_stages=2)
    assert built.local_in_loops > 0
    assert any("spills" in fault for fault in static_gate.faults(variant, built))
    good = build(variant)
    serial = {**good.counts, "WARPGROUP.DEPBAR": good.counts["HGMMA"]}
    faults = static_gate.faults(variant, replace(good, counts=serial))
    assert [fault.split()[1:3] for fault in faults] == [["waits", "for"]]
    faults = static_gate.faults(variant, replace(good, counts={**good.counts, "HGMMA": 0}))
    assert faults == ["no HGMMA"]


def test_gate_writes_cubins_and_figures(tmp_path, monkeypatch, capsys):
    from codir_fast.kernels import static_gate, variants

    few = list(variants.others(90, 64))
    monkeypatch.setattr(variants, "every", lambda arch: few if arch == 90 else [])
    monkeypatch.setattr(static_gate, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(sys, "argv", ["static_gate", "--out", str(tmp_path), "--arch", "90"])
    assert static_gate.main() == 0
    rows = json.loads((tmp_path / "triton.json").read_text())["kernels"]
    assert [row["variant"] for row in rows] == [variant.name for variant in few]
    assert len(list((tmp_path / "triton").glob("*.cubin"))) == len(few)
    assert "bank_update: D=64" in (tmp_path / "triton.txt").read_text()
    assert "0 with faults" in capsys.readouterr().out


class InThisProcess:
    """In place of a pool of processes, which would not see what the test has changed."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def map(self, function, jobs, chunksize):
        return map(function, jobs)
