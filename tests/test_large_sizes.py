"""Banks and products of more elements than 32 bits count: K * D and B * K over 2^31.

Most of a bank is 0 and its logits are too, so that the truth is a formula over the few rows that
are not: some at the front, the rest where a product of 32 bits would have wrapped around.
"""

import os
from pathlib import Path

import pytest
import torch

from codir_fast import MemoryQueue
from codir_fast.functional import contrastive_loss

BACKENDS = ("cpu", "torch")
D = 128
K = 2**31 // D + 84
T = 0.05
MARKED = torch.tensor([0, 5, 2**30 // D + 1, 2**31 // D - 1, 2**31 // D, K - 40, K - 1])
FAR = MARKED[-3:]  # beyond 2^31 elements


def free_bytes() -> int:
    """What this machine can give to a process: available memory, or the cgroup's limit."""
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":") for line in info.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder, names in (
        ("/sys/fs/cgroup", ("memory.max", "memory.current")),
        ("/sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ):
        limit, used = (Path(folder, name) for name in names)
        if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
            free = min(free, int(text) - int(used.read_text()))
    return free


def need(gigabytes: float) -> None:
    free = free_bytes() / 1e9
    if free < gigabytes + 2:
        pytest.skip(f"needs {gigabytes} + 2 GB of free memory, there are {free:.1f}")


@pytest.fixture(scope="module")
def bank():
    """(K, D) bfloat16, 4.3 GB: unit rows at MARKED, 0 elsewhere. Nobody changes it."""
    need(5)
    rows = torch.zeros(K, D, dtype=torch.bfloat16)
    rows[MARKED, torch.arange(len(MARKED)) % 3] = 1.0
    return rows


@pytest.fixture
def pair():
    """Queries with logits of 0 to 20, where ln K is 16.6."""
    query = torch.zeros(3, D)
    query[:, :3] = torch.tensor([[1.0, 0.9, 0.8], [0.7, 1.0, 0.95], [0.85, 0.9, 1.0]])
    positive = torch.zeros(3, D)
    positive[:, :4] = torch.tensor([0.1, 0.05, 0.2, 0.3])
    return query.bfloat16().requires_grad_(), positive.bfloat16().requires_grad_()


def exact(query, positive, marked, others: torch.Tensor | int, exclude=None, index=None):
    """Loss of each query and gradient of its sum, in float64, for `others` rows of 0."""
    q, p = (x.detach().double().requires_grad_() for x in (query, positive))
    logits = q @ marked.double().T / T
    if exclude is not None:
        logits = logits.masked_fill(exclude[:, None] == MARKED, -torch.inf)
    positive_logit = (q * p).sum(1, keepdim=True) / T
    zeros = torch.full_like(positive_logit, others).log()
    loss = torch.logsumexp(torch.cat([positive_logit, logits, zeros], 1), 1) - positive_logit[:, 0]
    return loss.detach(), *torch.autograd.grad(loss.sum(), [q, p])


def results(query, positive, negatives, backend, **options):
    loss = contrastive_loss(
        query, positive, negatives, temperature=T, reduction="none", backend=backend, **options
    )
    inputs = [query, positive]
    if isinstance(negatives, torch.Tensor) and negatives.requires_grad:
        inputs.append(negatives)
    return loss.detach(), *torch.autograd.grad(loss.sum(), inputs)


def assert_close(got, expected):
    loss, *gradients = got
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, expected[1:], strict=True):  # bfloat16 keeps 8 bits
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=2**-8 * float(b.abs().max()))


def test_the_far_rows_count_in_the_truth(pair):
    """Else the tests below would show nothing: they differ from those without the far rows."""
    marked = torch.eye(3, D)[torch.arange(len(MARKED)) % 3]
    with_far = exact(*pair, marked, K - len(MARKED))
    without = exact(*pair, marked[: -len(FAR)], K - len(MARKED) + len(FAR))
    assert (with_far[0] - without[0]).min() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_bank_elements_than_32_bits_count(backend, bank, pair):
    expected = exact(*pair, bank[MARKED], K - len(MARKED))
    assert_close(results(*pair, bank, backend, normalize=False), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_row_at_the_far_end(backend, bank, pair):
    own = FAR.flip(0)
    expected = exact(*pair, bank[MARKED], K - len(MARKED), exclude=own)
    options = {"normalize": False, "exclude_index": own}
    assert_close(results(*pair, bank, backend, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_the_far_end_by_index(backend, bank, pair):
    index = torch.cat([MARKED, MARKED + 1])[[0, 2, 4, 5, 6, 11, 12]].clamp(max=K - 1)
    expected = exact_by_index(*pair, bank, index)
    options = {"negative_index": index.expand(3, -1), "normalize": False}
    assert_close(results(*pair, bank, backend, **options), expected)


def exact_by_index(query, positive, bank, index):
    q, p = (x.detach().double().requires_grad_() for x in (query, positive))
    logits = torch.cat([(q * p).sum(1, keepdim=True), q @ bank[index].double().T], 1) / T
    loss = torch.logsumexp(logits, 1) - logits[:, 0]
    return loss.detach(), *torch.autograd.grad(loss.sum(), [q, p])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_far_rows(backend, bank, pair):
    """bank_contrast_backward writes 4.3 GB; rows of 0 get a gradient as well."""
    need(5)
    needs = bank.detach().requires_grad_()
    query, positive = pair
    options = {"temperature": T, "normalize": False, "reduction": "sum", "backend": backend}
    (got,) = torch.autograd.grad(contrastive_loss(query, positive, needs, **options), needs)
    rows = torch.cat([MARKED, MARKED[:-1] + 1])
    q, p = query.detach().double(), positive.detach().double()
    loss = exact(query, positive, bank[MARKED], K - len(MARKED))[0]
    lse = loss + (q * p).sum(1) / T
    weights = (q @ bank[rows].double().T / T - lse[:, None]).exp()
    expected = weights.T @ q / T
    torch.testing.assert_close(got[rows].double(), expected, rtol=2**-7, atol=1e-12)
    assert got.shape == bank.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_queue_over_the_far_end(backend, bank, pair):
    queue = MemoryQueue(1, D, dtype=torch.bfloat16)
    queue.rows, queue.valid = bank, torch.ones(K, dtype=torch.bool)
    queue.valid[MARKED[:-1]] = False
    query, positive = pair
    got = results(query, positive, queue, backend, normalize=False)
    assert_close(got, exact(query, positive, bank[MARKED[-1:]], K - len(MARKED)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_logits_than_32_bits_count(backend):
    """B * K = 2.4e9 with D = 1: the bank holds eight values, so that the truth is eight terms."""
    B, K = 40000, 60000
    need(2)
    query = torch.linspace(-2, 2, B)[:, None].requires_grad_()
    positive = torch.linspace(1, -1, B)[:, None].requires_grad_()
    values = torch.linspace(-3, 3, 8)
    kind = torch.arange(K) % 8
    kind[-5:] = torch.tensor([7, 7, 0, 7, 0])
    q, p = (x.detach().double().requires_grad_() for x in (query, positive))
    count = torch.bincount(kind, minlength=8).double()
    logits = torch.cat([q * p, q * values.double() + count.log()], 1)
    loss = torch.logsumexp(logits, 1) - logits[:, 0]
    expected = loss.detach(), *torch.autograd.grad(loss.sum(), [q, p])
    options = {"temperature": 1.0, "normalize": False, "reduction": "none", "backend": backend}
    got = contrastive_loss(query, positive, values[kind][:, None], **options)
    got = got.detach(), *torch.autograd.grad(got.sum(), [query, positive])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
