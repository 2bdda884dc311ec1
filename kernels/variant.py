"""A kernel of the tables as the compiler takes it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from codir_fast.kernels.ahead_of_time import Type
from triton.runtime import JITFunction

HALF, FLOAT = torch.bfloat16, torch.float32
COUNT, NUMBER = Type("i32"), Type("fp32")
WIDTH = Type("i32", divisible=True)


@dataclass(frozen=True)
class Variant:
    """A kernel for sm_`arch`, as ahead_of_time.build takes it."""

    operator: str
    name: str
    arch: int
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.operator}: {self.name}, sm_{self.arch}"


def make_variant(
    operator: str, name: str, arch: int, kernel: JITFunction, given: dict[str, Any]
) -> Variant:
    options = {key: given[key] for key in ("num_warps", "num_stages") if key in given}
    arguments = {key: given[key] for key in kernel.arg_names}
    return Variant(operator, name, arch, kernel, arguments, options)


def name_of(*parts: Any) -> str:
    return ", ".join(str(part).removeprefix("torch.") for part in parts)
