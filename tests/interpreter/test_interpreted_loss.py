"""contrastive_loss on Triton's backend: what it hands to the kernels where keys serve as negatives
too, and what comes out, against float64.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from codir_fast.kernels import bank_contrast as kernels
from codir_fast.kernels import in_batch_contrast as in_batch

from codir_fast.functional import contrastive_loss, estimate_log_partition
from codir_fast.reference import NCE_EPS

B, K, D, TEMPERATURE = 21, 37, 24, 0.2
NCE = {"objective": "nce", "log_partition": 3.0, "num_data": 50}


@pytest.fixture
def dtypes(monkeypatch):
    """Of queries and bank, of each pass."""
    seen, pass_over, lay_out = [], kernels.bank_contrast, in_batch._Batch.rows

    def remember(query, positive, bank, *others):
        seen.append((query.dtype, bank.dtype))
        return pass_over(query, positive, bank, *others)

    def remember_rows(batch, tile):
        queries, others, *sizes = lay_out(batch, tile)
        seen.append((queries.dtype, others.base.dtype))
        return queries, others, *sizes

    monkeypatch.setattr(kernels, "bank_contrast", remember)
    monkeypatch.setattr(in_batch._Batch, "rows", remember_rows)
    return seen


def dense(vectors, upstream, products, *, normalize, symmetric, nce):
    """Loss and gradients, from unit rows rounded to the dtype of products."""
    inputs = [x.detach().clone().requires_grad_() for x in vectors]
    wide = torch.promote_types(products, torch.float32)
    units = [F.normalize(x.to(wide), dim=1) if normalize else x.to(wide) for x in inputs]
    query, positive, *explicit = (x.to(products).to(wide) for x in units)

    def one_way(query, positive, negatives):
        own = (query * positive).sum(1, keepdim=True) / TEMPERATURE
        logits = query @ negatives.T / TEMPERATURE
        if not explicit:
            logits = logits.masked_fill(torch.eye(B, dtype=torch.bool), -torch.inf)
        if not nce:
            return torch.logsumexp(torch.cat([own, logits], 1), 1) - own[:, 0]
        noise = (logits != -torch.inf).sum(1).max() / NCE["num_data"]
        offset = NCE["log_partition"] + torch.log(noise + NCE_EPS)
        extra = torch.where(logits == -torch.inf, 0.0, math.log1p(NCE_EPS / noise))
        return F.softplus(offset - own[:, 0]) + (F.softplus(logits - offset) + extra).sum(1)

    loss = one_way(query, positive, *(explicit or [positive]))
    if symmetric:
        loss = (loss + one_way(positive, query, *(explicit or [query]))) / 2
    return [loss.detach(), *torch.autograd.grad(loss, inputs, upstream.to(loss.dtype))]


@pytest.mark.parametrize("nce", [False, True], ids=["infonce", "nce"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("negatives", ["in-batch", "explicit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_negatives_with_a_gradient(
    dtypes, dtype, negatives, normalize, symmetric, nce, assert_accurate
):
    """Products run in the dtype of the inputs, like those of a bank."""
    sizes = (B, B) if negatives == "in-batch" else (B, B, K)
    vectors = [torch.randn(n, D) for n in sizes]
    if not normalize:
        vectors = [F.normalize(x, dim=1) * 1.5 for x in vectors]
    vectors = [x.to(dtype).requires_grad_() for x in vectors]
    upstream = torch.randn(B)
    options = NCE if nce else {}
    loss = contrastive_loss(
        *vectors,
        temperature=TEMPERATURE,
        normalize=normalize,
        symmetric=symmetric,
        reduction="none",
        backend="triton",
        **options,
    )
    found = [loss.detach(), *torch.autograd.grad(loss, vectors, upstream)]
    # In-batch InfoNCE is a pass forward and one backward, whichever ways.
    fused = negatives == "in-batch" and not nce
    assert dtypes == [(dtype, dtype)] * (2 if fused else 1 + symmetric)
    how = {"normalize": normalize, "symmetric": symmetric, "nce": nce}
    eager = dense(vectors, upstream, dtype, **how)
    exact = dense([x.double() for x in vectors], upstream, torch.float64, **how)
    assert all(gradient.dtype == dtype for gradient in found[1:])
    assert_accurate(found, eager, exact, condition=1.5 * 1.5 / TEMPERATURE)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("negatives", ["in-batch", "explicit"])
def test_log_partition_is_estimated_in_the_dtype_of_the_loss(
    dtypes, negatives, normalize, symmetric
):
    scale = 1.0 if normalize else 1.5
    query, key, rows = (F.normalize(torch.randn(n, D), dim=1).half() * scale for n in (B, B, K))
    explicit = () if negatives == "in-batch" else (rows,)
    found = estimate_log_partition(
        query,
        key,
        *explicit,
        temperature=TEMPERATURE,
        normalize=normalize,
        symmetric=symmetric,
        num_data=50,
        backend="triton",
    )
    assert dtypes == [(torch.float16, torch.float16)] * (1 + symmetric)
    assert found.dtype == torch.float32

    def exponentials(query, key, negatives):
        own = (query * key).sum(1) / TEMPERATURE
        logits = query @ negatives.T / TEMPERATURE
        allowed = torch.ones_like(logits).bool() if explicit else ~torch.eye(B, dtype=torch.bool)
        return torch.cat([own, logits[allowed]]).exp()

    query, key, rows = (x.double() for x in (query, key, rows))
    each = [exponentials(query, key, rows if explicit else key)]
    if symmetric:
        each.append(exponentials(key, query, rows if explicit else query))
    expected = (50 * torch.cat(each).mean()).log()
    assert abs(found - expected) < 4e-3  # two roundings of rows to half precision, s up to 11


def test_under_autocast_the_query_decides(dtypes):
    query, key = (torch.randn(B, D, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(query.bfloat16(), key, temperature=TEMPERATURE, backend="triton")
    loss.backward()
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 2
    assert query.grad.isfinite().all() and key.grad.isfinite().all()
