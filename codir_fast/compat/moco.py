"""The queue of MoCo (facebookresearch/moco: `MoCo.queue` and `MoCo.queue_ptr`)."""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast.checks import INTEGERS, check_float_dtype, check_tensor
from codir_fast.memory_bank import MemoryQueue


def memory_queue_from_moco(
    queue: Tensor, queue_ptr: Tensor | int, *, dtype: torch.dtype | None = None
) -> MemoryQueue:
    """A full MemoryQueue with the keys of a MoCo model or checkpoint, on the device of `queue`.

    MoCo keeps its keys as columns and `queue_ptr` is the column that the next key overwrites.

    Args:
        queue: (D, K), the buffer `queue`: columns of unit length (they are normalised again).
        queue_ptr: the buffer `queue_ptr`, one integer in [0, K).
        dtype: of the new rows; default that of `queue`.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or value; the message names the argument.

    Example:
        >>> state = torch.load("moco_v2_800ep.pth.tar", weights_only=True)["state_dict"]
        >>> queue = memory_queue_from_moco(state["module.queue"], state["module.queue_ptr"])
        >>> loss = codir_fast.ContrastiveLoss(0.2)(query, key, queue)
    """
    check_tensor("queue", queue)
    check_float_dtype("queue", queue.dtype)
    if queue.ndim != 2:
        raise ValueError(f"`queue` must have shape (D, K), got {tuple(queue.shape)}")
    dim, size = queue.shape
    position = _as_position(queue_ptr)
    if not 0 <= position < size:
        raise ValueError(f"`queue_ptr` must be in [0, {size}), got {position}")
    memory = MemoryQueue(size, dim, dtype=queue.dtype if dtype is None else dtype).to(queue.device)
    memory.load_state_dict(
        {
            "rows": F.normalize(queue.T, dim=1),
            "valid": torch.ones(size, dtype=torch.bool),
            "position": torch.tensor(position),
        }
    )
    return memory


def _as_position(queue_ptr: Tensor | int) -> int:
    if isinstance(queue_ptr, Tensor):
        if queue_ptr.numel() != 1:
            raise ValueError(f"`queue_ptr` must be one integer, got shape {tuple(queue_ptr.shape)}")
        if queue_ptr.dtype not in INTEGERS:
            raise TypeError(f"`queue_ptr` must be of an integer dtype, got {queue_ptr.dtype}")
        return int(queue_ptr)
    if isinstance(queue_ptr, bool) or not hasattr(queue_ptr, "__index__"):
        raise TypeError(f"`queue_ptr` must be an int, got {type(queue_ptr).__name__}")
    return operator.index(queue_ptr)
