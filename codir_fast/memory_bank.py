"""Memory banks of negatives: a first-in-first-out queue, and one row per training example."""

from typing import Any

import torch
from torch import Tensor, nn

from codir_fast.checks import (
    check_count,
    check_device,
    check_flag,
    check_float_dtype,
    check_index,
    check_integers,
    check_number,
    check_tensor,
)
from codir_fast.ops.bank_update import bank_update

FLOAT8 = torch.float8_e4m3fn


def _bytes(rows: Tensor) -> Tensor:
    """float8 rows for indexing, which few devices know for their dtype; others as they are."""
    return rows.view(torch.int8) if rows.dtype == FLOAT8 else rows


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, D) in float8 and their factors (N,), which restore the length that they had, up to
    1e-12: it is what logits depend on most.
    """
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
    rounded = (rows * (torch.finfo(FLOAT8).max / largest)).to(FLOAT8)
    norms = (torch.linalg.vector_norm(x, dim=1) for x in (rows, rounded.float()))
    norm, rounded_norm = (x.clamp_min(1e-12) for x in norms)
    return rounded, norm / rounded_norm


class _Bank(nn.Module):
    """Unit rows (K, D), which of them are filled, and their labels; all of it buffers, in the
    state_dict.
    """

    rows: Tensor
    row_scale: Tensor | None
    valid: Tensor
    row_labels: Tensor | None

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype | None, labels: Tensor | None
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_count("dim", dim)
        is_float8 = dtype == FLOAT8
        if not is_float8:
            check_float_dtype("dtype", dtype)
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype))
        # Row j is row_scale[j] * rows[j], of unit length; None: rows[j] is.
        self.register_buffer("row_scale", torch.ones(size) if is_float8 else None)
        self.register_buffer("valid", torch.zeros(size, dtype=torch.bool))
        if labels is not None:
            if labels.is_meta and not self.rows.is_meta:
                raise ValueError("`labels` must hold values, got a tensor on the device meta")
            labels = labels.to(self.rows.device)
        self.register_buffer("row_labels", labels)
        self._full = False
        self._until_full = size  # rows to be written at least until every row is filled

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    @property
    def is_full(self) -> bool:
        """True once every row is known to be filled.

        On a GPU finding out would wait for the device: there a queue knows after a whole turn, an
        IndexedBank when a state is loaded.
        """
        return self._full

    def __len__(self) -> int:
        """Number of filled rows (reads the device)."""
        return int(self.valid.sum())

    def check_rows(self) -> None:
        """Raises ValueError unless all rows are finite and the filled ones of length 1 (or 0, from
        a key of 0), as the bank writes them; for states from elsewhere. Reads the device.
        """
        rows = self._rows_at(torch.arange(self.rows.shape[0], device=self.rows.device)).float()
        if not bool(rows.isfinite().all()):
            raise ValueError("the rows of a bank must be finite")
        lengths = torch.linalg.vector_norm(rows[self.valid], dim=1)
        dtype = self.rows.dtype if self.row_scale is None else self.row_scale.dtype
        wrong = ((lengths - 1).abs() > max(1e-4, 4 * torch.finfo(dtype).eps)) & (lengths > 0)
        if bool(wrong.any()):
            raise ValueError(
                f"the rows of a bank must have length 1, got {float(lengths[wrong][0]):.6g}"
            )

    def _write(self, index: Tensor, keys: Tensor, momentum: float) -> None:
        if self.row_scale is None:
            bank_update(self.rows, index, keys, momentum, self.valid, backend="auto")
        else:
            self._write_float8(self.row_scale, index, keys, momentum)
        if self._full or torch.compiler.is_compiling():
            return
        self._until_full -= index.numel()
        if self._until_full <= 0:
            self._find_if_full()

    def _write_float8(
        self, row_scale: Tensor, index: Tensor, keys: Tensor, momentum: float
    ) -> None:
        """Updates the named rows in float32, and rounds them once."""
        in_order, _ = index.sort()
        place = torch.searchsorted(in_order, index)  # the same for the same row
        named = self._rows_at(in_order)
        bank_update(named, place, keys, momentum, self.valid[in_order], backend="auto")
        rows, scale = _quantize(named[place])
        # Module.half() and its kin make others of these, with the same meaning.
        _bytes(self.rows)[index] = _bytes(rows.to(self.rows.dtype))
        row_scale[index] = scale.to(row_scale.dtype)
        self.valid.index_fill_(0, index, True)

    def _rows_at(self, index: Tensor) -> Tensor:
        """A copy of these rows; in float32, times their factors, where they are float8."""
        if self.row_scale is None:
            return self.rows[index]
        rows = _bytes(self.rows)[index].view(self.rows.dtype)
        return rows.float() * self.row_scale[index, None].float()

    def _find_if_full(self) -> None:
        if self.valid.is_cpu:
            self._until_full = int((~self.valid).sum())
            self._full = self._until_full == 0

    def _check_keys(self, keys: Tensor) -> None:
        check_tensor("keys", keys)
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            raise ValueError(
                f"`keys` must have shape (N, D) with D={self.dim}, got {tuple(keys.shape)}"
            )
        check_float_dtype("keys", keys.dtype)
        check_device("keys", keys, self.rows.device, "the bank")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict = self._in_own_precision(dict(state_dict), prefix)
        for name, buffer in self.named_buffers(recurse=False):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and loaded.shape != buffer.shape:
                # All or nothing: torch would go on to load the buffers that fit.
                errors = args[-1]
                errors.append(
                    f"{prefix}{name} must have shape {tuple(buffer.shape)}, the size of this "
                    f"{type(self).__name__}, got {tuple(loaded.shape)}"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._full = not self.valid.is_meta and bool(self.valid.all())
        self._until_full = self.rows.shape[0]
        self._find_if_full()

    def _in_own_precision(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A state of float8 rows for a bank of others, and the other way round."""
        rows, scale = (state_dict.get(f"{prefix}{name}") for name in ("rows", "row_scale"))
        if rows is None or (scale is None) == (self.row_scale is None):
            return state_dict
        if scale is None:
            rows, scale = _quantize(rows.float())
            return {**state_dict, f"{prefix}rows": rows, f"{prefix}row_scale": scale}
        del state_dict[f"{prefix}row_scale"]
        return {**state_dict, f"{prefix}rows": rows.float() * scale[:, None].float()}

    def extra_repr(self) -> str:
        size, dim = self.rows.shape
        return f"{size}, {dim}, dtype={self.rows.dtype}, labels={self.row_labels is not None}"


class MemoryQueue(_Bank):
    """First-in-first-out queue of negatives (the dictionary of MoCo).

    Rows are L2-normalised and carry no gradient. A new queue is empty and gives no negatives. In
    eval mode it never changes: `enqueue` checks its arguments and does nothing. The whole state
    (rows, labels, position, fill) is in the state_dict; it loads into a queue of another dtype or
    device.

    Args:
        size: number of rows, K.
        dim: width of a row, D.
        dtype: of the rows; default torch's default dtype. Half precision halves the memory,
            torch.float8_e4m3fn takes a quarter: its rows have a float32 factor each, gradients are
            right to about 1 % of their largest element at a temperature of 0.07, which must not be
            lower. The Triton kernels take it on sm_89 and newer; elsewhere backend "torch" runs.
        with_labels: keep an int64 label per row, to leave out negatives of the query's own class.

    Example:
        >>> queue = MemoryQueue(65536, 128)
        >>> loss = ContrastiveLoss()(query, positive_key, queue)
        >>> queue.enqueue(positive_key)

    Source: He et al. 2020, Momentum Contrast, section 3.2.
    """

    position: Tensor

    def __init__(
        self, size: int, dim: int, *, dtype: torch.dtype | None = None, with_labels: bool = False
    ) -> None:
        check_count("size", size)
        check_flag("with_labels", with_labels)
        labels = torch.full((size,), -1) if with_labels else None
        super().__init__(size, dim, dtype, labels)
        # Where the next key goes; a tensor, so that it travels with the state and needs no
        # recompilation.
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @property
    def keys(self) -> Tensor:
        """The filled rows, oldest first: a copy, (len, D); in float32 for a float8 queue."""
        return self._rows_at(self._oldest_first())

    @property
    def labels(self) -> Tensor | None:
        """Labels of `keys`, (len,) int64; None for a queue without labels."""
        return None if self.row_labels is None else self.row_labels[self._oldest_first()]

    def _oldest_first(self) -> Tensor:
        size = self.rows.shape[0]
        order = (self.position + torch.arange(size, device=self.rows.device)) % size
        return order[self.valid[order]]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Writes keys over the oldest rows, in order; of more keys than rows the newest stay.

        Args:
            keys: (N, D) floating point, any length; detached and normalised here. N need not divide
                the size.
            labels: (N,) integers, given exactly where the queue was made with labels.

        Raises:
            ValueError, TypeError: a wrong shape, device or dtype; labels missing or not expected;
                nothing is changed then.
        """
        self._check_keys(keys)
        self._check_labels(keys, labels)
        if not self.training:
            return
        size, N = self.rows.shape[0], keys.shape[0]
        skipped = max(N - size, 0)
        offset = torch.arange(skipped, N, device=keys.device)
        index = (self.position + offset) % size
        self._write(index, keys[skipped:], momentum=0.0)
        if self.row_labels is not None and labels is not None:
            self.row_labels[index] = labels[skipped:].to(torch.int64)
        self.position.copy_((self.position + N) % size)

    def _find_if_full(self) -> None:
        super()._find_if_full()
        if not self.valid.is_cpu:
            self._full = self._full or self._until_full <= 0  # every row has had its turn

    def _check_labels(self, keys: Tensor, labels: Tensor | None) -> None:
        if self.row_labels is None:
            if labels is not None:
                raise ValueError("`labels` needs a MemoryQueue made with with_labels=True")
            return
        if labels is None:
            raise ValueError("`labels` must be given: the queue was made with with_labels=True")
        check_integers("labels", labels, f"(N,) with N={keys.shape[0]}", keys.shape[0])
        check_device("labels", labels, self.rows.device, "the bank")


class IndexedBank(_Bank):
    """One row per training example: b_r <- normalise(m * b_r + (1 - m) * key).

    A row that was never updated is no negative, and takes its first key, normalised. In eval mode
    the bank never changes: `update` checks its arguments and does nothing. The whole state (rows,
    which of them are filled, labels) is in the state_dict; it loads into a bank of another dtype or
    device.

    Args:
        num_rows: number of training examples, K.
        dim: width of a row, D.
        momentum: m in [0, 1].
        dtype: of the rows; default torch's default dtype; torch.float8_e4m3fn as for MemoryQueue.
        labels: (num_rows,) integers, the class of each example.

    Source: Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric Instance
        Discrimination; momentum 0.5 as in Sun et al. 2020, Contrastive Distillation on Intermediate
        Representations.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        momentum: float = 0.5,
        dtype: torch.dtype | None = None,
        labels: Tensor | None = None,
    ) -> None:
        check_number("momentum", momentum)
        if not 0 <= momentum <= 1:
            raise ValueError(f"`momentum` must be in [0, 1], got {momentum}")
        check_count("num_rows", num_rows)
        if labels is not None:
            check_integers("labels", labels, f"(num_rows,) with num_rows={num_rows}", num_rows)
            labels = labels.to(torch.int64, copy=True)
        super().__init__(num_rows, dim, dtype, labels)
        self.momentum = momentum

    @property
    def keys(self) -> Tensor:
        """All rows in order, (num_rows, D): the bank itself, no copy (one in float32 for a float8
        bank); a row that was never updated is 0.
        """
        if self.row_scale is None:
            return self.rows
        return self.rows.float() * self.row_scale[:, None].float()

    @property
    def labels(self) -> Tensor | None:
        """The label of each row, (num_rows,) int64; None for a bank without labels."""
        return self.row_labels

    @torch.no_grad()
    def update(self, index: Tensor, keys: Tensor) -> None:
        """Mixes each key into its example's row; a row that is named more than once takes its keys
        one after the other, in batch order.

        Nothing waits for a GPU, but where backend "torch" runs there (see codir_fast.backends()):
        it reads back how often rows repeat if momentum is above 0, so that no CUDA graph can hold
        it.

        Args:
            index: (N,) integers in [0, num_rows). The range is checked on the CPU; a GPU checks it
                by itself.
            keys: (N, D) floating point, any length; detached here.

        Raises:
            ValueError, TypeError: a wrong shape, device, dtype or index; nothing is changed then.
        """
        self._check_keys(keys)
        check_integers("index", index, f"(N,) with N={keys.shape[0]}", keys.shape[0])
        check_device("index", index, self.rows.device, "the bank")
        check_index("index", index, 0, self.rows.shape[0])
        if self.training:
            self._write(index.to(torch.int64), keys, self.momentum)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}"
