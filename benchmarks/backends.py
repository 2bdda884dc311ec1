"""Where "auto" should take the hand-written kernel of bank_contrast in place of Triton's:

    python -m codir_fast.benchmarks.backends --out DIR

Both backends over dtypes, widths, numbers of queries and forms of the operator, on a GPU: first
against float64, then the device's time of a replayed CUDA graph, in interleaved rounds. What fails
or is wrong is listed with the reason. The files of --out are written anew after each case; table.md
ends with the backend that each dtype, width and form should take.
"""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from codir_fast.benchmarks import measure, report
from codir_fast.benchmarks.backends_table import WIDTHS, as_table, summary
from codir_fast.benchmarks.comparison import TOLERANCE, failure
from codir_fast.benchmarks.options import folder
from codir_fast.benchmarks.peers import error_of
from codir_fast.benchmarks.peers.inputs import T
from codir_fast.benchmarks.peers.peer import replayed
from torch import Tensor

import codir_fast.ops.bank_contrast  # noqa: F401 (registers the operator's backends)
from codir_fast import reference
from codir_fast.backend import resolve
from codir_fast.errors import UsageError
from codir_fast.ops import registration

NAMES = ("cuda", "triton")
RESULTS = ("loss", "dquery", "dpositive", "dinv_temperature")
DTYPES = (torch.bfloat16, torch.float16)
ODD_D = 104
FEW, MANY = (32, 64), (256, 1024, 4096)  # queries
FORMS = ("plain", "masked", "labels", "nce", "normalize")
_FLOP = 40e9  # of a case, about
_TRUE_QUERIES = 64  # that are compared with float64
_MOST_PROCESSES = 16
_COMPILING = "compiling triton"
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A call of bank_contrast."""

    dtype: torch.dtype
    D: int
    B: int
    K: int
    form: str

    def row(self, names: Sequence[str]) -> report.Row:
        dtype = str(self.dtype).removeprefix("torch.")
        return asdict(self) | {"dtype": dtype, "backends": list(names), "errors": {}}


def grid() -> list[Case]:
    """Every dtype, D and form: plain with each B, the others with few and with many in turn."""
    cases = []
    for n, (dtype, D, form) in enumerate(itertools.product(DTYPES, (*WIDTHS, ODD_D), FORMS)):
        sizes = FEW + MANY if form == "plain" else (FEW[n % 2], MANY[n % 3])
        for B in sizes if D in WIDTHS else (MANY[n % 3],):
            K = 2 ** round(math.log2(_FLOP / (4 * B * D)))
            cases.append(Case(dtype, D, B, min(max(K, 1 << 14), 1 << 20), form))
    return cases


def make_arguments(case: Case, device: torch.device) -> dict[str, Any]:
    """Of the operator, by name."""
    torch.manual_seed(0)
    B, K, D = case.B, case.K, case.D

    def unit(n: int) -> Tensor:
        return F.normalize(torch.randn(n, D, device=device), dim=1)

    query, positive, bank = unit(B), unit(B), torch.empty(K, D, dtype=case.dtype, device=device)
    for part in bank.split(1 << 16):
        part.copy_(unit(len(part)))
    given: dict[str, Any] = {"normalize": case.form == "normalize"}
    if case.form == "normalize":
        query, positive = 3 * query, 0.2 * positive
    elif case.form == "masked":
        given["exclude_index"] = torch.randint(-1, K, (B,), device=device)
        given["valid"] = torch.rand(K, device=device) < 0.7
        bank.masked_fill_(~given["valid"][:, None], math.nan)
    elif case.form == "labels":
        given["labels"] = torch.randint(100, (B,), device=device)
        given["bank_labels"] = torch.randint(100, (K,), device=device)
    elif case.form == "nce":  # Z of random rows, and weights that float16 holds
        log_partition = math.log(K) + 1 / (2 * T**2 * D)
        given["log_partition"] = torch.tensor(log_partition, dtype=torch.float64, device=device)
        given |= {"num_noise": 4096, "num_data": K}
    given |= {"query": query.to(case.dtype), "positive": positive.to(case.dtype), "bank": bank}
    return given | {"inv_temperature": torch.tensor(1 / T, dtype=torch.float64)}


def truth(given: dict[str, Any], chosen: Tensor) -> tuple[Tensor, ...]:
    """RESULTS of the chosen queries, in float64."""
    of_queries = ("query", "positive", "labels", "exclude_index")
    given = {name: x[chosen] if name in of_queries else x for name, x in given.items()}
    leaves = [given[name].double().requires_grad_() for name in ("query", "positive")]
    query, positive = (F.normalize(x, dim=1) for x in leaves) if given["normalize"] else leaves
    del given["normalize"]
    loss = reference.bank_contrast(**given | {"query": query, "positive": positive})
    dquery, dpositive, dunit = torch.autograd.grad(loss.sum(), (*leaves, query))
    # The query and 1/t come as a product only.
    dinv_temperature = (query * dunit).sum(1) / given["inv_temperature"]
    return loss.detach(), dquery, dpositive, dinv_temperature.detach()


def errors(outputs: Sequence[Tensor], exact: Sequence[Tensor], chosen: Tensor) -> dict[str, float]:
    """By RESULTS, relative to the largest element; infinite where any query's isn't finite."""
    loss, _, *gradients = outputs
    return {
        name: error_of((ours[chosen],), (right,)) if ours.isfinite().all() else math.inf
        for name, ours, right in zip(RESULTS, (loss, *gradients), exact, strict=True)
    }


def make_call(name: str, given: dict[str, Any]) -> Call:
    """The operator by one backend, without autograd."""
    return torch.no_grad()(lambda: registration.overload("bank_contrast", name)(**given))


def measure_case(
    case: Case, budget: float, device: torch.device, names: Sequence[str] = NAMES
) -> report.Row:
    """Errors by backend, then times and their ratio, second to first; or why there are none.

    Raises:
        RuntimeError: the GPU takes no more work, after what failed.
    """
    row, runs, up = case.row(names), [], "inputs"
    try:
        given = make_arguments(case, device)
        chosen = torch.linspace(0, case.B - 1, min(case.B, _TRUE_QUERIES)).long().to(device)
        exact = truth(given, chosen)
        for up in names:
            call = make_call(up, given)
            runs.append(replayed(call) if device.type == "cuda" else call)
            row["errors"][up] = errors(runs[-1](), exact, chosen)
        wrong = _wrong(row["errors"], TOLERANCE[case.dtype])
        if wrong:
            row["refused"] = wrong
        else:
            up = "timing"
            times = measure.interleaved(runs, budget, device)
            row["times"] = {name: vars(taken) for name, taken in zip(names, times, strict=True)}
            row["ratio"] = times[1].median / times[0].median
    except Exception as error:
        row |= _failure(up, error)
        measure.wait(device)
    return row


def _wrong(errors_by_name: dict[str, dict[str, float]], allowed: float) -> str:
    return "; ".join(
        f"{name} wrong: {part} {error:.1e}, allowed {allowed:.0e}"
        for name, found in errors_by_name.items()
        for part, error in found.items()
        if not error <= allowed
    )


def _failure(up: str, error: Exception) -> report.Row:
    found = failure(error)
    return found | {"refused": f"{up} {found['refused']}".replace("|", "/")}


def compile_first(cases: Sequence[Case], work: Callable[[Case], None]) -> dict[Case, report.Row]:
    """work(case) of all in processes side by side, for the compiled kernels that stay in Triton's
    cache; a case that fails or ends its process, with why. What fails after it in its process may
    be its doing, and is not listed.
    """
    context, count = get_context("spawn"), min(_MOST_PROCESSES, os.cpu_count() or 1, len(cases))
    places: dict[Any, int] = {}
    jobs, failed, harmed = [], {}, set()
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(count)]
        for case in cases:  # a process compiles once what cases share
            place = places.setdefault((case.dtype, case.D, case.form), len(places)) % count
            jobs.append((place, case, pools[place].submit(_try, work, case)))
        for place, case, job in _bar(jobs, "compiling"):
            try:
                found = job.result()
            except BrokenProcessPool as error:
                found = _failure(_COMPILING, error)
            if found and place not in harmed:
                failed[case] = found
                harmed.add(place)
    return failed


def _try(work: Callable[[Case], None], case: Case) -> report.Row:
    """Empty, or why it failed: not all of Triton's errors can be sent to another process."""
    try:
        work(case)
    except Exception as error:
        return _failure(_COMPILING, error)
    return {}


def _compile(case: Case) -> None:
    device = torch.device("cuda")
    make_call("triton", make_arguments(case, device))()
    measure.wait(device)


def measure_cases(
    cases: Sequence[Case],
    failed: dict[Case, report.Row],
    budget: float,
    device: torch.device,
    out: Path,
    names: Sequence[str] = NAMES,
) -> list[report.Row]:
    """All rows, also in the files of a folder."""
    machine = measure.stamp(device) | {"dtype": "bfloat16, float16"}
    what = [machine.get("gpu") or machine["cpu"], f"torch {machine['torch']}"]
    what += [f"codir_fast {machine['codir_fast']} ({machine['commit']})", machine["date"]]
    rows: list[report.Row] = []
    for case in _bar(cases, "measuring"):
        torch.cuda.empty_cache()  # graphs that are gone leave their memory
        known = failed.get(case)
        row = case.row(names) | known if known else measure_case(case, budget, device, names)
        rows.append(row)
        parts = (f"Measured on {', '.join(what)}.", as_table(rows), summary(rows))
        report.write(out / "table.md", "\n\n".join(parts))
        results = {"machine": machine, "rows": rows}
        report.write(out / "results.json", json.dumps(results, indent=1))
    return rows


def _bar(items: Sequence[Any], what: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=what, unit="case", dynamic_ncols=True)


def main() -> int:
    options = _parse()
    try:
        device, out = _gpu(), folder(options.out)
    except (UsageError, RuntimeError) as error:
        print(f"codir-fast: error: {error}", file=sys.stderr)
        return 2
    cases = grid()[:: 5 if options.quick else 1]
    rows = measure_cases(cases, compile_first(cases, _compile), options.budget, device, out)
    refused = sum("refused" in row for row in rows)
    print(f"{summary(rows)}\n\n{refused} of {len(rows)} failed; written to {out}")
    return 1 if refused else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for table.md and results.json")
    parser.add_argument("--budget", type=float, default=0.15, help="seconds a case; default 0.15")
    parser.add_argument("--quick", action="store_true", help="a fifth of the cases")
    options = parser.parse_args()
    if not 0 < options.budget < math.inf:
        parser.error(f"--budget must be positive seconds, got {options.budget}")
    return options


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise UsageError("backends of bank_contrast are compared on a GPU: torch sees no CUDA GPU")
    for name in NAMES:
        resolve("bank_contrast", name, torch.empty(1, 64, dtype=DTYPES[0], device="cuda"))
    return torch.device("cuda")


if __name__ == "__main__":
    sys.exit(main())
