"""The contrastive loss as a module: it holds the options, and what is learnt or kept;
functional.contrastive_loss does the work.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from codir_fast.backend import NAMES as BACKENDS
from codir_fast.checks import as_number, check_choice, check_flag, check_number, has_values
from codir_fast.collectives import ranks_of
from codir_fast.functional import contrastive_loss, estimate_log_partition
from codir_fast.loss_arguments import check_nce, check_options, check_temperature
from codir_fast.memory_bank import IndexedBank, MemoryQueue
from codir_fast.negatives import Negatives
from codir_fast.ops.registration import is_transformed

_MIN_LOG_INV, _MAX_LOG_INV = math.log(0.01), math.log(100)
_MARGIN_ARGUMENTS = ("margin", "pos_margin", "neg_margin")


class ContrastiveLoss(nn.Module):
    """InfoNCE or NCE against in-batch, shared or banked negatives; see
    codir_fast.functional.contrastive_loss.

    Args:
        temperature: t > 0, where learning starts if it is learnt.
        objective, normalize, reduction, symmetric, backend, num_data: as for the function.
        learnable_temperature: makes log(1/t) a parameter, `log_inv_temperature`, kept where 1/t is
            in [0.01, 100]: in training each call first clamps the parameter in place, and a leaf
            that is given for it (torch.func.functional_call) likewise.
        log_partition: log Z of NCE, a number. Default: that of the first batch in training that
            meets negatives, kept from then on. It is a buffer in float64, NaN as long as it is not
            known; until then a batch goes by its own where there are none (a bank that is still
            empty), or in eval mode, and keeps none. A compiled step can't see that it is known: it
            makes the estimate in each call until train(), eval() or a call outside has looked.
        process_group: as for the function.

    Example:
        >>> loss_fn = codir_fast.ContrastiveLoss(temperature=0.07)
        >>> loss_fn(query, positive_key, negative_keys).backward()

    Source: learnt temperature as in Radford et al. 2021, CLIP, section 2.5.
    """

    log_partition: Tensor

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        objective: str = "infonce",
        normalize: bool = True,
        reduction: str = "mean",
        learnable_temperature: bool = False,
        symmetric: bool = False,
        backend: str = "auto",
        log_partition: float | None = None,
        num_data: int | None = None,
        process_group: Any = None,
        **unknown: Any,
    ) -> None:
        _refuse(unknown)
        super().__init__()
        check_options(objective, reduction, normalize, symmetric)
        check_flag("learnable_temperature", learnable_temperature)
        check_nce(objective, log_partition, num_data)
        if log_partition is not None:
            log_partition = check_number("log_partition", log_partition)
        check_temperature(temperature)
        temperature, num_data = as_number(temperature), as_number(num_data)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self._ranks = ranks_of(process_group)
        self.objective, self.normalize, self.reduction = objective, normalize, reduction
        self.symmetric, self.backend, self.num_data = symmetric, backend, num_data
        self._log_partition_known = log_partition is not None
        if objective == "nce":
            known = math.nan if log_partition is None else log_partition
            self.register_buffer("log_partition", torch.tensor(known, dtype=torch.float64))
        self.learnable_temperature = learnable_temperature
        if not learnable_temperature:
            self._temperature = temperature
            return
        if not 0.01 <= temperature <= 100:
            raise ValueError(
                f"`temperature` must be in [0.01, 100] to be learnt, got {temperature}"
            )
        self.log_inv_temperature = nn.Parameter(torch.tensor(-math.log(temperature)))

    @property
    def temperature(self) -> float | Tensor:
        """t: a number, which may be set anew, or where it is learnt a 0-d tensor with gradient."""
        if not self.learnable_temperature:
            return self._temperature
        # A copy: the parameter may be brought back into range before this is differentiated. In
        # half precision e^x would be off by its rounding of 1/t.
        parameter = self.log_inv_temperature
        wide = parameter.clone().to(torch.promote_types(parameter.dtype, torch.float32))
        return wide.clamp(_MIN_LOG_INV, _MAX_LOG_INV).neg().exp()

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        if self.learnable_temperature:
            raise AttributeError("`temperature` is learnt: `log_inv_temperature` holds it")
        check_temperature(temperature)
        self._temperature = as_number(temperature)

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Negatives = None,
        *,
        labels: Tensor | None = None,
        negative_labels: Tensor | None = None,
        negative_index: Tensor | None = None,
        exclude_index: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss with the options held here; see codir_fast.functional.contrastive_loss.

        Args:
            query, positive_key: (B, D).
            negative_keys: None for in-batch, (K, D), (B, M, D), a MemoryQueue or an IndexedBank.
            labels, negative_labels, negative_index, exclude_index: which negatives count, as for
                the function.
            weight: (B,) factor on each query's loss.

        Returns:
            In nats, float32 (float64 for float64 input), a scalar, or (B,) with `reduction`
            "none". Differentiable once in query, positive_key, negative_keys (a tensor), weight and
            `log_inv_temperature`.

        Raises:
            ValueError, TypeError: a wrong shape, dtype, device or value; the message names the
                argument.
            RuntimeError: the backend can't run here; a rank has ended; NCE in training under
                torch.vmap or torch.func, whose `log_partition` is not known yet.
        """
        if self.learnable_temperature and self.training and self.log_inv_temperature.is_leaf:
            # The parameter itself is held in range, as CLIP does: beyond it there is no gradient to
            # come back. Others may have used it by now, a penalty on it, say; in range it is as
            # they left it.
            parameter = self.log_inv_temperature
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
                parameter.clamp_(_MIN_LOG_INV, _MAX_LOG_INV)
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "normalize": self.normalize,
            "symmetric": self.symmetric,
            "backend": self.backend,
            "labels": labels,
            "negative_labels": negative_labels,
            "negative_index": negative_index,
            "exclude_index": exclude_index,
            "num_data": self.num_data,
            "process_group": None if self._ranks is None else self._ranks.group,
        }
        vectors = (query, positive_key, negative_keys)
        log_partition = None
        if self.objective == "nce":
            log_partition = self._partition(vectors, options)
        return contrastive_loss(
            *vectors,
            objective=self.objective,
            reduction=self.reduction,
            weight=weight,
            log_partition=log_partition,
            **options,
        )

    def _partition(self, vectors: tuple[Any, ...], options: dict[str, Any]) -> Tensor | None:
        """log Z, kept for good at the first batch in training that meets negatives; None: the
        batch's own, not kept.
        """
        self._look_for_partition()
        if self._log_partition_known:
            return self.log_partition
        estimate = estimate_log_partition(*vectors, **options)
        is_alone = self._ranks is None
        if not self.training or (is_alone and vectors[0].shape[0] == 0):
            return None
        if is_transformed(estimate):
            raise RuntimeError(
                "`log_partition` must be given, or fixed by a batch outside, before NCE is trained "
                "under torch.vmap or torch.func: what one of their samples has can't be kept"
            )
        if not _may_look(self.log_partition):
            return self._keep_unseen(estimate, *vectors[1:])
        if _has_none(vectors[1], vectors[2], is_alone) or not estimate.isfinite():
            return None
        self.log_partition.copy_(estimate)
        self._log_partition_known = True
        return self.log_partition

    def _keep_unseen(
        self, estimate: Tensor, positive_key: Tensor, negative_keys: Negatives
    ) -> Tensor:
        """The same where nobody can look, as in a compiled step: what is not known is estimated in
        every step, until somebody looks outside.
        """
        meets = estimate.isfinite()
        if isinstance(negative_keys, (MemoryQueue, IndexedBank)):
            if self._ranks is not None:
                raise RuntimeError(
                    "`log_partition` must be given, or fixed by a batch outside, before NCE "
                    "against a sharded bank is trained under torch.compile or captured"
                )
            meets = meets & negative_keys.valid.any()
        elif _has_none(positive_key, negative_keys, self._ranks is None):
            return estimate
        is_first = self.log_partition.isnan() & meets
        self.log_partition.copy_(torch.where(is_first, estimate, self.log_partition))
        return torch.where(self.log_partition.isnan(), estimate, self.log_partition)

    def _look_for_partition(self) -> None:
        """Others write buffers, too: DistributedDataParallel, an average of models, a compiled
        step.
        """
        if not self._log_partition_known and _may_look(self.log_partition):
            self._log_partition_known = not bool(self.log_partition.isnan())

    def train(self, mode: bool = True) -> "ContrastiveLoss":
        if self.objective == "nce":
            self._look_for_partition()
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.objective == "nce":
            known = has_values(self.log_partition) and not bool(self.log_partition.isnan())
            self._log_partition_known = known

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ContrastiveLoss":
        before = self.log_partition if self.objective == "nce" else None
        super()._apply(fn, recurse)
        if before is not None and self.log_partition.dtype != before.dtype:
            # half() is for what has many digits to lose: Z itself would be off by percents.
            self.log_partition = before.to(self.log_partition.device)
        return self

    def extra_repr(self) -> str:
        with torch.no_grad():
            t = self.temperature
        shown = "on meta" if isinstance(t, Tensor) and t.is_meta else f"{float(t):.4g}"
        return (
            f"temperature={shown}, objective={self.objective!r}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}, learnable_temperature={self.learnable_temperature}, "
            f"symmetric={self.symmetric}, backend={self.backend!r}"
            + ("" if self._ranks is None else f", {self._ranks.size} ranks")
        )


def _may_look(value: Tensor) -> bool:
    """Whether a number that is looked at once may be: a GPU is waited for, but not in a capture."""
    capturing = value.is_cuda and torch.cuda.is_current_stream_capturing()
    return has_values(value) and not (torch.compiler.is_compiling() or capturing)


def _has_none(positive_key: Tensor, negative_keys: Negatives, is_alone: bool) -> bool:
    """Whether these are negatives for nobody: a bank that nothing was put into, no rows. All ranks
    say the same.
    """
    if isinstance(negative_keys, (MemoryQueue, IndexedBank)):
        return negative_keys.is_empty()
    if negative_keys is None:
        return is_alone and len(positive_key) == 1
    return is_alone and 0 in negative_keys.shape


def _refuse(unknown: dict[str, Any]) -> None:
    margins = [name for name in _MARGIN_ARGUMENTS if name in unknown]
    if margins:
        raise TypeError(
            f"`{margins[0]}` belongs to a margin loss, ContrastiveLoss of pytorch_metric_learning; "
            "codir_fast.ContrastiveLoss is InfoNCE and has a `temperature`"
        )
    if unknown:
        raise TypeError(f"ContrastiveLoss got an unexpected argument `{next(iter(unknown))}`")
