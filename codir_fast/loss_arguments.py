"""Arguments of the contrastive loss: what they must be, and what the operators take for them."""

import math

import torch
from torch import Tensor

from codir_fast.backend import resolve
from codir_fast.checks import (
    as_number,
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_float_dtype,
    check_number,
    check_tensor,
    is_readable,
)
from codir_fast.float8_rows import FLOAT8
from codir_fast.negative_rows import RowForm, as_rows
from codir_fast.negatives import ChosenNegatives, check_input_dtype
from codir_fast.ops.contrast import compute_dtype

OBJECTIVES = ("infonce", "nce")
REDUCTIONS = ("none", "mean", "sum")
_MIN_FLOAT8_TEMPERATURE = 0.0699  # 0.07, in whatever precision it comes


def check_options(objective: str, reduction: str, normalize: bool, symmetric: bool) -> None:
    check_choice("objective", objective, OBJECTIVES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_flag("normalize", normalize)
    check_flag("symmetric", symmetric)


def check_nce(objective: str, log_partition: float | Tensor | None, num_data: int | None) -> None:
    for name, value in (("log_partition", log_partition), ("num_data", num_data)):
        if objective != "nce" and value is not None:
            raise ValueError(f'`{name}` needs objective "nce", got {objective!r}')
    if num_data is not None:
        check_count("num_data", num_data)
    if log_partition is not None and not isinstance(log_partition, Tensor):
        _check_log_partition(log_partition)


def check_constants(
    objective: str,
    log_partition: float | Tensor | None,
    num_noise: int | None,
    num_data: int | None,
) -> tuple[int, int]:
    """M and n of a part of NCE's sum, which must be told; without meaning in InfoNCE."""
    given = {"log_partition": log_partition, "num_noise": num_noise, "num_data": num_data}
    for name, value in given.items():
        if (objective == "nce") != (value is not None):
            raise ValueError(
                f'`{name}` must be given for objective "nce" alone, got {value} for {objective!r}'
            )
    counts = {"num_noise": num_noise, "num_data": num_data} if objective == "nce" else {}
    for name, value in counts.items():
        check_count(name, value)
    return num_noise or 1, num_data or 1


def refuse_picks(**picks: Tensor | None) -> None:
    """Which negatives count has no meaning for the part of a sum that is the positive's."""
    for name, value in picks.items():
        if value is not None:
            raise ValueError(
                f"`{name}` needs `negative_keys`, got None: the positive's part has no negatives"
            )


def check_temperature(
    temperature: float, name: str = "temperature", dtype: torch.dtype = torch.float64
) -> None:
    """`dtype`: what logits, and with them 1/t, are computed in."""
    t = check_number(name, temperature)
    # Comparisons only: torch.compile can follow them.
    if not (0 < t < math.inf and 1 / t < math.inf):
        raise ValueError(f"`{name}` must be positive and finite, got {t}")
    if 1 / t > torch.finfo(dtype).max:
        raise ValueError(f"`{name}` must be at least {1 / torch.finfo(dtype).max:.3g}, got {t}")


def _check_log_partition(log_partition: float) -> None:
    log_partition = check_number("log_partition", log_partition)
    if not -math.inf < log_partition < math.inf:
        raise ValueError(f"`log_partition` must be finite, got {log_partition}")


def prepare(
    query: Tensor, positive_key: Tensor, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Both in the dtype that the operators compute in, of unit rows if `normalize`."""
    form = RowForm(normalize, compute_dtype(query.dtype), backend)
    return as_rows(query, form), as_rows(positive_key, form)


def product_dtype(query: Tensor, backend: str) -> torch.dtype:
    """What products run in: GPU kernels take the query's dtype, all others widen it."""
    wide = compute_dtype(query.dtype)
    if query.dtype == wide:
        return wide
    on_gpu = resolve("bank_contrast", backend, query) in ("triton", "cuda")
    return query.dtype if on_gpu else wide


def check_pair(
    query: Tensor, positive_key: Tensor, names: tuple[str, str] = ("query", "positive_key")
) -> None:
    """Two (B, D) that belong together; `names` are theirs in messages."""
    for name, value in zip(names, (query, positive_key), strict=True):
        check_tensor(name, value)
        check_float_dtype(name, value.dtype)
    first, second = names
    if query.ndim != 2 or query.shape[1] == 0:
        raise ValueError(
            f"`{first}` must have shape (B, D) with D at least 1, got {tuple(query.shape)}"
        )
    if positive_key.shape != query.shape:
        B, D = query.shape
        raise ValueError(
            f"`{second}` must have shape (B, D) with B={B}, D={D} as `{first}`, "
            f"got {tuple(positive_key.shape)}"
        )
    check_device(second, positive_key, query.device, f"`{first}`")
    check_input_dtype(second, positive_key, query, first)


def inverse_temperature(temperature: float | Tensor, query: Tensor) -> Tensor:
    compute = compute_dtype(query.dtype)
    if not isinstance(temperature, Tensor):
        check_temperature(temperature, dtype=compute)
        # On the CPU kernels get it as a number; in a compiled graph that would be a kernel of the
        # CPU's, which takes a C++ compiler.
        device = query.device if torch.compiler.is_compiling() else torch.device("cpu")
        return torch.full((), 1 / as_number(temperature), dtype=torch.float64, device=device)
    check_tensor("temperature", temperature)
    if temperature.ndim != 0:
        raise ValueError(f"`temperature` must be 0-d, got shape {tuple(temperature.shape)}")
    check_float_dtype("temperature", temperature.dtype)
    if temperature.device.type != "cpu":
        check_device("temperature", temperature, query.device, "`query` or on the CPU")
    if is_readable(temperature):
        check_temperature(temperature.item(), dtype=compute)
    return temperature.to(compute).reciprocal()


def check_float8(negatives: ChosenNegatives, temperature: float | Tensor) -> None:
    """Colder, the rounding of the rows would show: where looking does not wait for a device."""
    if negatives.rows.dtype != FLOAT8:
        return
    if isinstance(temperature, Tensor):
        if not is_readable(temperature):
            return
        temperature = temperature.item()
    if temperature < _MIN_FLOAT8_TEMPERATURE:
        raise ValueError(
            f"`temperature` must be at least 0.07 with a float8 bank, got {temperature}"
        )


def as_scalar(log_partition: float | Tensor, query: Tensor) -> Tensor:
    if not isinstance(log_partition, Tensor):
        return torch.full((), as_number(log_partition), dtype=torch.float64, device=query.device)
    check_tensor("log_partition", log_partition)
    if log_partition.ndim != 0:
        raise ValueError(f"`log_partition` must be 0-d, got shape {tuple(log_partition.shape)}")
    check_float_dtype("log_partition", log_partition.dtype)
    check_device("log_partition", log_partition, query.device, "`query`")
    if is_readable(log_partition):
        _check_log_partition(log_partition.item())
    return log_partition.detach().to(compute_dtype(log_partition.dtype))
