"""CRDLoss and ContrastMemory of RepDistiller (HobbitLong/RepDistiller, crd/), which the released
CoDIR code (intersun/CoDIR, crd/) uses too.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codir_fast.checks import (
    check_count,
    check_device,
    check_float_dtype,
    check_index,
    check_integers,
    check_number,
    check_tensor,
)
from codir_fast.functional import contrastive_loss, estimate_log_partition
from codir_fast.loss_arguments import check_temperature
from codir_fast.negatives import check_input_dtype

_Z_V1, _Z_V2 = 2, 3  # places in `params`


class ContrastMemory(nn.Module):
    """Two banks, one row per training example and network, and how well each query fits them.

    Same constructor, buffers, initialisation and update as `crd.memory.ContrastMemory`. Rows start
    uniform in [-sqrt(3 / inputSize), sqrt(3 / inputSize)), and in training mode each call ends with
    memory[y] <- normalise(momentum * memory[y] + (1 - momentum) * v). Z is that of the first
    training batch: the mean of e^{s/T} over its positives and negatives, times outputSize.

    Differs from the original in that it needs no GPU and prints nothing, and that in eval mode
    neither the rows nor Z change (where Z is not set yet, the batch's own is used).

    Args:
        inputSize: width of a row, D.
        outputSize: number of training examples, n.
        K: number of negatives per query.
        T: temperature, above 0.
        momentum: of the rows, in [0, 1].

    Attributes:
        params: float (5,): K, T, Z_v1, Z_v2, momentum; Z is negative until it is set. The values
            here count, those of a loaded checkpoint too.
        memory_v1, memory_v2: (n, D), rows of the first and of the second network.

    Source: Tian et al. 2020, Contrastive Representation Distillation, section 3 and eq. 19.
    """

    params: Tensor
    memory_v1: Tensor
    memory_v2: Tensor

    def __init__(
        self, inputSize: int, outputSize: int, K: int, T: float = 0.07, momentum: float = 0.5
    ) -> None:
        super().__init__()
        for name, value in (("inputSize", inputSize), ("outputSize", outputSize), ("K", K)):
            check_count(name, value)
        check_temperature(T, "T")
        _check_momentum("momentum", momentum)
        self.K = K
        self.register_buffer("params", torch.tensor([K, T, -1, -1, momentum], dtype=torch.float32))
        bound = 1 / math.sqrt(inputSize / 3)
        for name in ("memory_v1", "memory_v2"):
            rows = torch.rand(outputSize, inputSize).mul_(2 * bound).sub_(bound)
            self.register_buffer(name, rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ContrastMemory":
        before = self.params
        super()._apply(fn, recurse)
        if self.params.dtype.itemsize < before.dtype.itemsize:  # too few digits for K and Z
            self.params = before.to(self.params.device)
        return self

    def forward(
        self, v1: Tensor, v2: Tensor, y: Tensor, idx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """e^{s/T} / Z of each query with its K + 1 rows: of v1 with memory_v2, of v2 with
        memory_v1.

        Gathers the rows, (B, K + 1, D), as the original does; CRDLoss does not.

        Args:
            v1, v2: (B, D), unit rows.
            y: (B,) integers in [0, n), the examples, whose rows are updated.
            idx: (B, K + 1) integers, the positive's row first; None: y, then K rows drawn uniformly
                from all (y itself may be among them).

        Returns:
            out_v1, out_v2: (B, K + 1, 1) each, differentiable in v1 and v2.
        """
        rows = self.choose_rows(y, idx)
        for name, vectors in (("v1", v1), ("v2", v2)):
            self._check_vectors(name, vectors, len(y))
        out_v1 = self._probabilities(v1, self.memory_v2, rows, _Z_V1)
        out_v2 = self._probabilities(v2, self.memory_v1, rows, _Z_V2)
        self.update(v1, v2, y)
        return out_v1, out_v2

    def choose_rows(
        self, y: Tensor, idx: Tensor | None, names: tuple[str, str] = ("y", "idx")
    ) -> Tensor:
        """The (B, K + 1) rows that count for each query, its positive's first; `names` are those
        of the two arguments in messages.
        """
        check_tensor(names[0], y)
        B, K, n = y.shape[0] if y.ndim == 1 else 0, int(self.params[0]), self.memory_v1.shape[0]
        check_integers(names[0], y, f"(B,) with B={B}", B)
        check_index(names[0], y, 0, n)
        if B == 0:
            raise ValueError(f"`{names[0]}` must have at least one row, got (0,)")
        if idx is None:
            drawn = torch.randint(n, (B, K), device=y.device)
            return torch.cat([y.to(torch.int64)[:, None], drawn], dim=1)
        check_tensor(names[1], idx)
        if idx.shape != (B, K + 1):
            raise ValueError(
                f"`{names[1]}` must have shape (B, K + 1) with B={B}, K={K}, got {tuple(idx.shape)}"
            )
        check_integers(names[1], idx.flatten(), "(B, K + 1)", B * (K + 1))
        check_index(names[1], idx, 0, n)
        return idx.to(torch.int64)

    def _check_vectors(self, name: str, vectors: Tensor, B: int) -> None:
        check_tensor(name, vectors)
        check_float_dtype(name, vectors.dtype)
        D = self.memory_v1.shape[1]
        if vectors.shape != (B, D):
            raise ValueError(
                f"`{name}` must have shape (B, D) with B={B} as `y`, D={D}, "
                f"got {tuple(vectors.shape)}"
            )
        check_device(name, vectors, self.memory_v1.device, "the memory")
        check_input_dtype(name, vectors, self.memory_v1, "memory_v1")

    def log_partition(self, place: int, query: Tensor, memory: Tensor, rows: Tensor) -> float:
        """log Z of `params[place]`; where that is not set, of this batch, and in training it is set
        then.
        """
        Z = float(self.params[place])
        if Z < 0:
            log_Z = estimate_log_partition(
                query.detach(),
                memory[rows[:, 0]],
                memory,
                temperature=float(self.params[1]),
                normalize=False,
                negative_index=rows[:, 1:],
                num_data=memory.shape[0],
            )
            estimate = log_Z.exp().to(self.params.dtype)
            if self.training:
                self.params[place] = estimate
            Z = float(estimate)
        return math.log(Z)

    def _probabilities(self, query: Tensor, memory: Tensor, rows: Tensor, place: int) -> Tensor:
        log_Z = self.log_partition(place, query, memory, rows)
        logits = memory[rows] @ query[:, :, None] / float(self.params[1])
        return torch.exp(logits - log_Z)

    @torch.no_grad()
    def update(self, v1: Tensor, v2: Tensor, y: Tensor) -> None:
        """Mixes v1 and v2, (B, D), into the rows y of memory_v1 and memory_v2; not in eval mode."""
        if not self.training:
            return
        momentum = float(self.params[4])
        for memory, v in ((self.memory_v1, v1), (self.memory_v2, v2)):
            mixed = momentum * memory[y] + (1 - momentum) * v.to(memory.dtype)
            memory.index_copy_(0, y.to(torch.int64), F.normalize(mixed, dim=1))


class CRDLoss(nn.Module):
    """Contrastive representation distillation, as `crd.criterion.CRDLoss` of RepDistiller: the NCE
    loss of the student's embedding against the teacher's memory, plus the reverse.

    Same constructor, submodules `embed_s`, `embed_t` and `contrast`, state_dict keys, random start
    and numbers as the original: checkpoints load both ways. The positive is the memory's row of
    `contrast_idx[:, 0]`, not the current embedding, and has no gradient.

    Differs from the original in memory: rows are gathered inside the kernel, and neither the
    (B, K + 1, D) rows nor the (B, K + 1) probabilities are made. The loss is taken in log space, so
    that it stays finite where e^{s/T} / Z is 0 or overflows. A zero vector embeds to 0, not NaN. In
    eval mode the memory does not change. The released CoDIR code returns half of this sum.

    Args:
        opt: an object with s_dim, t_dim (widths of the two features), feat_dim (D), n_data (number
            of training examples), nce_k (negatives per query), nce_t (temperature, above 0), nce_m
            (momentum of the memory, in [0, 1]).

    Example:
        >>> criterion = CRDLoss(opt)
        >>> loss = criterion(student_feature, teacher_feature, index, contrast_idx)

    Source: Tian et al. 2020, Contrastive Representation Distillation, eq. 18.
    """

    def __init__(self, opt: Any) -> None:
        super().__init__()
        for name in ("s_dim", "t_dim", "feat_dim", "n_data", "nce_k"):
            check_count(f"opt.{name}", getattr(opt, name))
        check_temperature(opt.nce_t, "opt.nce_t")
        _check_momentum("opt.nce_m", opt.nce_m)
        self.embed_s = _Embed(opt.s_dim, opt.feat_dim)
        self.embed_t = _Embed(opt.t_dim, opt.feat_dim)
        self.contrast = ContrastMemory(opt.feat_dim, opt.n_data, opt.nce_k, opt.nce_t, opt.nce_m)

    def forward(
        self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor | None = None
    ) -> Tensor:
        """The mean loss of the batch, (1,) as the original gives it; differentiable in f_s, f_t and
        the weights.

        Args:
            f_s, f_t: (B, s_dim) and (B, t_dim), or any shape that flattens to it.
            idx: (B,) integers in [0, n_data), the examples.
            contrast_idx: (B, nce_k + 1) integers, the positive's row first; None: idx, then nce_k
                rows drawn uniformly.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or value; the message names the argument.
        """
        contrast = self.contrast
        check_tensor("idx", idx)
        for name, feature, embed in (("f_s", f_s, self.embed_s), ("f_t", f_t, self.embed_t)):
            _check_feature(name, feature, idx.numel(), embed.linear.in_features)
        v_s, v_t = self.embed_s(f_s), self.embed_t(f_t)
        rows = contrast.choose_rows(idx, contrast_idx, ("idx", "contrast_idx"))
        loss = self._one_way(v_s, contrast.memory_v2, rows, _Z_V1)
        loss = loss + self._one_way(v_t, contrast.memory_v1, rows, _Z_V2)
        contrast.update(v_s, v_t, idx)
        return loss.view(1)

    def _one_way(self, query: Tensor, memory: Tensor, rows: Tensor, place: int) -> Tensor:
        return contrastive_loss(
            query,
            memory[rows[:, 0]],
            memory,
            negative_index=rows[:, 1:],
            temperature=float(self.contrast.params[1]),
            objective="nce",
            log_partition=self.contrast.log_partition(place, query, memory, rows),
            num_data=memory.shape[0],
            normalize=False,
        )


def _check_momentum(name: str, momentum: float) -> None:
    m = check_number(name, momentum)
    if not 0 <= m <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {m}")


def _check_feature(name: str, feature: Tensor, B: int, width: int) -> None:
    check_tensor(name, feature)
    check_float_dtype(name, feature.dtype)
    if feature.ndim < 2 or feature.shape[0] != B or feature.shape[1:].numel() != width:
        raise ValueError(
            f"`{name}` must have shape (B, {width}), or one that flattens to it, with B={B} as "
            f"`idx`, got {tuple(feature.shape)}"
        )


class _Embed(nn.Module):
    """Flattens, a linear layer, L2 normalisation."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.linear(x.flatten(1)), dim=1)
