"""in_batch_contrast: InfoNCE of B queries whose negatives are one another's positive keys, one way
or both.

Unit rows of both sides are laid side by side, rows padded to whole tiles. Forward, a program keeps
a block of one side's rows and walks over rows of the other: sums of e^s, 2 B^2 D operations each
way. Backward it weighs them too, by both directions' shares at once, which are known by then: 4 B^2
D for the gradient of each side. Embeddings that are too wide to be held whole are weighed a piece
at a time, for each of which logits are made anew. Either way splits are merged in a fixed order,
one program a pair, in float64. Nothing of size B x B exists.
"""

from collections.abc import Callable
from typing import Any

import torch
from codir_fast.kernels import autotune, tiles, work_split
from codir_fast.kernels.bank_access import describe
from codir_fast.kernels.in_batch_ends import (
    in_batch_gradients_kernel,
    in_batch_losses_kernel,
    pair_tile,
)
from codir_fast.kernels.in_batch_passes import (
    in_batch_gradient_sums_kernel,
    in_batch_rows_kernel,
    in_batch_sums_kernel,
    rows_tile,
)
from codir_fast.kernels.launch import cdiv, launch
from codir_fast.kernels.problem import MAX_DIM, QUERY_DTYPES, check, number, padded, precision
from torch import Tensor

Run = Callable[[tiles.Tile], list[Tensor]]


class _Batch:
    """The arguments, checked, as kernels take them, and both sides' rows side by side."""

    def __init__(
        self,
        query: Tensor,
        positive: Tensor,
        inv_temperature: Tensor,
        labels: Tensor | None,
        symmetric: bool,
        normalize: bool,
    ) -> None:
        if query.ndim != 2 or not 0 < query.shape[1] <= MAX_DIM:
            raise ValueError(
                f"`query` must have shape (B, D) with D at most {MAX_DIM}, got {tuple(query.shape)}"
            )
        (self.B, self.D), self.device = query.shape, query.device
        check("query", query, (self.B, self.D), QUERY_DTYPES, self.device)
        check("positive", positive, (self.B, self.D), QUERY_DTYPES, self.device)
        if labels is not None:
            check("labels", labels, (self.B,), (torch.int64,), self.device)
            labels = labels.contiguous()
        self.query, self.positive, self.labels = query.contiguous(), positive.contiguous(), labels
        self.dtype, self.symmetric, self.normalize = query.dtype, symmetric, normalize
        self.inv_temperature, on_device = number(inv_temperature, self.device)
        self.flags: dict[str, Any] = {
            "HAS_LABELS": labels is not None,
            "T_ON_DEVICE": on_device,
            "PRECISION": precision(query.dtype),
        }
        self.arch = tiles.architecture(self.device)

    def new(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def rows(self, tile: tiles.Tile) -> tuple[Any, Any, int, int]:
        """Rows (2 * padded_B, W) as blocks of queries are loaded, and of what they look through; W
        and padded_B.
        """
        block = max(tile["BLOCK_B"], tile["BLOCK_K"])  # both are powers of two
        padded_B, W = cdiv(self.B, block) * block, cdiv(self.D, 16) * 16
        rows = self.new(2 * padded_B, W, dtype=self.dtype)
        launch(
            in_batch_rows_kernel,
            (padded_B, 2),
            rows,
            self.query,
            self.positive,
            *(self.B, self.D, W, padded_B),
            NORMALIZE=self.normalize,
            **rows_tile(padded(self.D)),
        )
        chunk, TMA = tile["CHUNK_D"], tile["TMA"]
        queries, _ = describe(rows, (tile["BLOCK_B"], chunk), TMA and not tile["WHOLE"])
        others, fits = describe(rows, (tile["BLOCK_K"], chunk), TMA)
        assert fits == TMA  # padded rows do
        return queries, others, W, padded_B

    def splits(self, tile: tiles.Tile, programs: int, width: int) -> tuple[int, int]:
        """How many, and the rows of each, where so many programs walk over the same rows, each for
        sums of this width.
        """
        sizes = (programs * self.B, self.B, width)
        rows = work_split.split(*sizes, self.dtype, tile, self.device)
        return cdiv(self.B, rows), rows

    def run_best(self, name: str, ways: int, tile: tiles.Tile, run: Run) -> list[Tensor]:
        key = (name, ways, self.B, self.D, self.dtype, self.normalize, *self.flags.items())
        return autotune.run_best(key, tile, run, self.device)

    def finish(self, kernel: Any, *arguments: Any, splits: int, **constants: Any) -> None:
        launch(
            kernel,
            (self.B,),
            *arguments,
            self.query,
            self.positive,
            self.inv_temperature,
            *(self.B, self.D, splits),
            **constants,
            NORMALIZE=self.normalize,
            T_ON_DEVICE=self.flags["T_ON_DEVICE"],
            **pair_tile(padded(self.D), splits),
        )


def in_batch_contrast(
    query: Tensor,
    positive: Tensor,
    inv_temperature: Tensor,
    labels: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss of each query among the positives of the others; if `symmetric`, the mean with that of
    its positive among the other queries.

    Products run in the dtype of the query, as bank_contrast's; sums in float32, the end of each
    pair in float64. Seen right on an H200; for other GPUs compiled only, and run by the
    interpreter.

    Args:
        query, positive: (B, D), float32, bfloat16 or float16, D up to 4096.
        inv_temperature: 0-d, 1/t, on the CPU or the query's device.
        labels: (B,) int64: what has the query's own label is no negative.
        normalize: L2-normalise query and positive.

    Returns:
        loss (B,) in float32, and lse (1 or 2, B) in float64: log-sum-exp with the positive, of the
        queries, and of the keys if `symmetric`.
    """
    batch = _Batch(query, positive, inv_temperature, labels, symmetric, normalize)
    B, ways = batch.B, 2 if symmetric else 1
    loss, lse = batch.new(B), batch.new(ways, B, dtype=torch.float64)
    if B == 0:
        return loss, lse
    tile = tiles.in_batch_contrast(batch.arch, batch.dtype, B, batch.D, labels is not None)

    def run(tile: tiles.Tile) -> list[Tensor]:
        splits, rows_per_split = batch.splits(tile, ways, 1)
        queries, others, *sizes = batch.rows(tile)
        sums = [batch.new(splits, ways, B) for _ in range(2)]
        launch(
            in_batch_sums_kernel,
            (cdiv(B, tile["BLOCK_B"]), splits, ways),
            *sums,
            queries,
            others,
            batch.labels,
            batch.inv_temperature,
            *(B, *sizes, rows_per_split),
            **batch.flags,
            **tile,
        )
        return sums

    with torch.cuda.device_of(query):
        sums = batch.run_best("in_batch_contrast", ways, tile, run)
        batch.finish(in_batch_losses_kernel, loss, lse, *sums, splits=len(sums[0]), WAYS=ways)
    return loss, lse


def in_batch_contrast_backward(
    grad_loss: Tensor,
    query: Tensor,
    positive: Tensor,
    inv_temperature: Tensor,
    lse: Tensor,
    labels: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_i grad_loss_i * loss_i to query and positive, (B, D) in their dtypes, and
    each query's part of that to 1/t, (B,) in float32.

    `grad_loss` is (B,) float32, `lse` as in_batch_contrast returned it; the other arguments as they
    were given to it.
    """
    batch = _Batch(query, positive, inv_temperature, labels, symmetric, normalize)
    B, D = batch.B, batch.D
    check("grad_loss", grad_loss, (B,), (torch.float32,), batch.device)
    check("lse", lse, (2 if symmetric else 1, B), (torch.float64,), batch.device)
    dquery, dpositive = (batch.new(B, D, dtype=x.dtype) for x in (query, positive))
    of_each = batch.new(B)
    if B == 0:
        return dquery, dpositive, of_each
    tile = tiles.in_batch_contrast_backward(batch.arch, batch.dtype, B, D)
    unit = None
    if batch.dtype == torch.float16:
        # Its weights become 2^14 at most for the largest that comes in, of what is finite: the mean
        # over a batch would leave them among its smallest numbers, or none.
        size = grad_loss.abs().nan_to_num_(nan=0.0, posinf=0.0).amax()
        unit = size.clamp_min_(2.0**-100).mul_(2.0**-14)
        grad_loss = grad_loss / unit
    alike = grad_loss.stride(0) == 0
    grad_loss = grad_loss if alike else grad_loss.contiguous()
    flags = {"STRIDE": 0 if alike else 1, "SYMMETRIC": symmetric}

    def run(tile: tiles.Tile) -> list[Tensor]:
        sides = 2 * cdiv(D, tile["BLOCK_D"])  # of each piece of D
        splits, rows_per_split = batch.splits(tile, sides, tile["BLOCK_D"])
        queries, others, W, padded_B = batch.rows(tile)
        share, sums = batch.new(splits, 2, B), batch.new(splits, 2, B, W)
        launch(
            in_batch_gradient_sums_kernel,
            (cdiv(B, tile["BLOCK_B"]), splits, sides),
            share,
            sums,
            queries,
            others,
            lse.contiguous(),
            grad_loss,
            batch.labels,
            batch.inv_temperature,
            *(B, W, padded_B, rows_per_split),
            **flags,
            **batch.flags,
            **tile,
        )
        return [share, sums]

    with torch.cuda.device_of(query):
        ways = 2 if symmetric else 1
        share, sums = batch.run_best("in_batch_contrast_backward", ways, tile, run)
        outputs = (dquery, dpositive, of_each, share, sums, grad_loss, unit)
        batch.finish(in_batch_gradients_kernel, *outputs, splits=len(sums), **flags)
    return dquery, dpositive, of_each
