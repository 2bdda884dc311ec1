"""What memory banks share: unit rows in any precision, all of them or a shard, and their state."""

from typing import Any

import torch
from torch import Tensor, nn

from codir_fast.checks import (
    check_count,
    check_device,
    check_float_dtype,
    check_tensor,
    has_values,
    is_readable,
)
from codir_fast.collectives import Settings
from codir_fast.float8_rows import FLOAT8, as_bytes, quantize
from codir_fast.ops.bank_update import bank_update
from codir_fast.sharding import Shard, shard_of


def _version(tensor: Tensor) -> int:
    """How often it was written; inference tensors don't count."""
    return 0 if tensor.is_inference() else tensor._version


class BankRows(nn.Module):
    """Unit rows (K, D), which of them are filled, and their labels; all of it buffers, in the
    state_dict. Of a sharded bank, those of this rank.
    """

    rows: Tensor
    row_scale: Tensor | None
    valid: Tensor
    row_labels: Tensor | None
    first_row: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        dtype: torch.dtype | None,
        labels: Tensor | None,
        process_group: Any,
    ) -> None:
        super().__init__()
        self.size = size
        self.shard = shard_of(size, process_group)
        if self.shard is not None:
            size = self.shard.num_rows
            labels = None if labels is None else self.shard.own(labels).clone()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        dim = check_count("dim", dim)
        is_float8 = dtype == FLOAT8
        if not is_float8:
            check_float_dtype("dtype", dtype)
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype))
        # Row j is row_scale[j] * rows[j], of unit length; None: rows[j] is.
        self.register_buffer(
            "row_scale", torch.ones(size, dtype=torch.float32) if is_float8 else None
        )
        self.register_buffer("valid", torch.zeros(size, dtype=torch.bool))
        if labels is not None:
            if labels.is_meta and not self.rows.is_meta:
                raise ValueError("`labels` must hold values, got a tensor on the device meta")
            labels = labels.to(self.rows.device)
        self.register_buffer("row_labels", labels)
        if self.shard is not None:
            self.register_buffer("first_row", torch.tensor(self.shard.first))
        self._full = False
        self._until_full = size  # rows to be written at least until every row is filled
        self._mark()

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    @property
    def is_full(self) -> bool:
        """True once every row is known to be filled.

        On a GPU finding out would wait for the device: there a queue knows after a whole turn, an
        IndexedBank when a state is loaded. Where others write `valid`, or put another buffer in its
        place, as torch.func.functional_call does, nothing is known. A compiled step on a GPU can't
        see that `valid` was written: clear() empties a bank for it too.
        """
        if not torch.compiler.is_compiling():
            return self._full and self._is_as_left()
        # The mask of a full bank costs a CPU's kernels a hundredth, those of a GPU more. What is
        # exported serves other states.
        known = not (self.valid.is_cpu or torch.compiler.is_exporting())
        return known and self._full and self._left[0] is self.valid

    @torch.no_grad()
    def clear(self) -> None:
        """Makes every row an empty one, as in a new bank; of a sharded bank, those of this rank."""
        self.valid.zero_()
        self._full, self._until_full = False, self.rows.shape[0]
        self._mark()

    def _mark(self) -> None:
        """Notes `valid` as it is: what is known of it holds as long as it stays that."""
        self._left = self.valid, _version(self.valid)

    def _is_as_left(self) -> bool:
        valid, version = self._left
        return valid is self.valid and version == _version(valid)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not self._is_as_left():
            state |= {"_full": False, "_until_full": self.rows.shape[0]}
        del state["_left"]  # of this one's buffer, or of one that a transform has ended
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _apply(self, *args: Any, **kwargs: Any) -> "BankRows":
        is_as_left, rows = self._is_as_left(), self.rows
        super()._apply(*args, **kwargs)
        if self.rows.dtype == FLOAT8 and self.row_scale is None:
            self.rows, self.row_scale = quantize(rows.to(self.rows.device, torch.float32))
        if is_as_left:  # on another device, the same
            self._mark()
        return self

    def __len__(self) -> int:
        """Number of filled rows, of this rank if the bank is sharded (reads the device)."""
        return int(self.valid.sum())

    def is_empty(self) -> bool:
        """Whether no row is filled; of a sharded bank, on any rank: a step of all ranks then."""
        count = len(self)
        if self.shard is not None:
            what = f"{type(self).__name__}.is_empty"
            count = sum(self.shard.agree(what, self._settings(), count, self.first_row))
        return count == 0

    def of_all_rows(self, what: str, *columns: Tensor) -> list[Tensor]:
        """Columns of the rows here, as those of all rows; of a sharded bank a step of all ranks."""
        return list(columns) if self.shard is None else self.shard.whole(what, *columns)

    def entries(self, what: str, index: Tensor, *columns: Tensor) -> list[Tensor]:
        """What columns of the rows have for rows `index` of the whole bank; likewise."""
        if self.shard is None:
            return [column[index] for column in columns]
        return self.shard.from_owners(what, index, *columns)

    def _settings(self) -> Settings:
        """What all ranks must have alike."""
        return (
            ("size", self.size),
            ("dim", self.dim),
            ("dtype", str(self.rows.dtype)),
            ("labels", self.row_labels is not None),
        )

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
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and not self._is_as_left():
            self._full, self._until_full = False, self.rows.shape[0]
            self._find_if_full()
        if self.row_scale is None:
            bank_update(self.rows, index, keys, momentum, self.valid, backend="auto")
        else:
            self._write_float8(self.row_scale, index, keys, momentum)
        if is_compiling:
            return
        if not self._full:
            self._until_full -= index.numel()
            if self._until_full <= 0:
                self._find_if_full()
        self._mark()

    def _write_float8(
        self, row_scale: Tensor, index: Tensor, keys: Tensor, momentum: float
    ) -> None:
        """Updates the named rows in float32, and rounds them once."""
        in_order, _ = index.sort()
        place = torch.searchsorted(in_order, index)  # the same for the same row
        named = self._rows_at(in_order)
        bank_update(named, place, keys, momentum, self.valid[in_order], backend="auto")
        rows, scale = quantize(named[place])
        # Module.half() and its kin make others of these, with the same meaning.
        as_bytes(self.rows)[index] = as_bytes(rows.to(self.rows.dtype))
        row_scale[index] = scale.to(row_scale.dtype)
        self.valid.index_fill_(0, index, True)

    def _rows_at(self, index: Tensor) -> Tensor:
        """A copy of these rows; in float32, times their factors, where they are float8."""
        if self.row_scale is None:
            return self.rows[index]
        rows = as_bytes(self.rows)[index].view(self.rows.dtype)
        return rows.float() * self.row_scale[index, None].float()

    def _find_if_full(self) -> None:
        if is_readable(self.valid):
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
        is_part = f"{prefix}{SHARD_MARK}" in state_dict
        if self.shard is not None:
            state_dict = _own_part(state_dict, prefix, self.shard)
            found = state_dict.get(f"{prefix}first_row")
            if isinstance(found, Tensor) and int(found) != self.shard.first:
                args[-1].append(
                    f"{prefix}rows must be rows from {self.shard.first} on, this rank's, or all "
                    f"{self.size}, got rows from {int(found)} on: "
                    "codir_fast.distributed.reshard_state makes them fit"
                )
                return
        for name, buffer in self.named_buffers(recurse=False):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and loaded.shape != buffer.shape:
                # All or nothing: torch would go on to load the buffers that fit.
                remedy = ""
                if is_part and loaded.shape[1:] == buffer.shape[1:]:
                    remedy = ": codir_fast.distributed.reshard_state makes the states of ranks fit"
                args[-1].append(
                    f"{prefix}{name} must have shape {tuple(buffer.shape)}, the size of this "
                    f"{type(self).__name__}, got {tuple(loaded.shape)}{remedy}"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        # With assign=True buffers are what came, transposed or of another integer type maybe.
        self.rows, self.valid = self.rows.contiguous(), self.valid.to(torch.bool)
        if self.row_labels is not None:
            self.row_labels = self.row_labels.to(torch.int64)
        self._full = has_values(self.valid) and bool(self.valid.all())
        self._until_full = self.rows.shape[0]
        self._find_if_full()
        self._mark()

    def _in_own_precision(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A state of float8 rows for a bank of others, and the other way round."""
        rows, scale = (state_dict.get(f"{prefix}{name}") for name in ("rows", "row_scale"))
        if rows is None or (scale is None) == (self.row_scale is None):
            return state_dict
        if scale is None:
            rows, scale = quantize(rows.float())
            return {**state_dict, f"{prefix}rows": rows, f"{prefix}row_scale": scale}
        del state_dict[f"{prefix}row_scale"]
        return {**state_dict, f"{prefix}rows": rows.float() * scale[:, None].float()}

    def extra_repr(self) -> str:
        whole = (
            f"{self.size}, {self.dim}, dtype={self.rows.dtype}, "
            f"labels={self.row_labels is not None}"
        )
        if self.shard is None:
            return whole
        end = self.shard.first + self.shard.num_rows
        return f"{whole}, rows {self.shard.first} to {end} here"


ROW_BUFFERS = ("rows", "row_scale", "valid", "row_labels")
SHARD_MARK = "first_row"  # of a sharded bank alone


def _own_part(state_dict: dict[str, Any], prefix: str, shard: Shard) -> dict[str, Any]:
    """The state of all rows, where it is one, cut to those of this rank; others as they are."""
    rows = state_dict.get(f"{prefix}rows")
    if not isinstance(rows, Tensor) or rows.ndim == 0 or f"{prefix}first_row" in state_dict:
        return state_dict
    cut = {f"{prefix}first_row": torch.tensor(shard.first)}
    for name in ROW_BUFFERS:
        value = state_dict.get(f"{prefix}{name}")
        if isinstance(value, Tensor) and value.ndim and len(value) == shard.size:
            # With assign=True it becomes the buffer: a view would keep all rows alive.
            cut[f"{prefix}{name}"] = shard.own(value).clone()
    return {**state_dict, **cut}
