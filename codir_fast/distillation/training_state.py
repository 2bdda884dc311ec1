"""What a run needs beside its weights to go on as if it had never stopped: optimizer, schedule,
loss scale and random numbers, as safetensors whose header holds the rest as JSON, without pickle.
"""

import copy
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

TREE = "tree"


def save_tree(tree: Any, path: Path) -> None:
    """Writes nested dicts, lists and tuples of tensors, numbers, strings, bools and None.

    Raises:
        TypeError: anything else in it.
    """
    tensors, header = _parts(tree)
    save_file(tensors, path, metadata=header)


def tree_bytes(tree: Any) -> bytes:
    """What `save_tree` would write."""
    tensors, header = _parts(tree)
    return save(tensors, metadata=header)


def _parts(tree: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, and a header that holds the rest."""
    tensors: dict[str, Tensor] = {}
    return tensors, {TREE: json.dumps(_encode(tree, "", tensors))}


def load_tree(path: Path) -> Any:
    """What save_tree wrote, equal in every bit and type; tensors on the CPU.

    Raises:
        ValueError, SafetensorError, OSError: the file is something else.
    """
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(TREE)
    if text is None:
        raise ValueError(f"{path.name} has no {TREE} in its header")
    return _decode(json.loads(text), load_file(path))


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors`, under names that begin with `name`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) in (Tensor, nn.Parameter):
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{name}.{n}", tensors) for n, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping) and all(isinstance(key, (int, str)) for key in value):
        # Pairs: the keys of JSON are strings, those of an optimizer numbers.
        items = [[key, _encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    raise TypeError(f"{name[1:]} is a {type(value).__name__}, which a checkpoint can't hold")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"{kind} is no kind of value")


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the generators of Python, numpy, torch on the CPU and torch on the device."""
    name, keys, *rest = np.random.get_state(legacy=True)
    on_device = _generator_of(device)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
        "device": device.type,
        "on_device": None if on_device is None else on_device.get_rng_state(),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Takes what `random_state` gave; of a generator of another kind of device, nothing."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    on_device = _generator_of(device)
    if on_device is not None and state["device"] == device.type:
        on_device.set_rng_state(state["on_device"])


def _generator_of(device: torch.device) -> ModuleType | None:
    """The module with the device's own generator; the CPU has torch's."""
    return None if device.type == "cpu" else torch.get_device_module(device)


def parameters_of(optimizer: Any, model: nn.Module) -> list[list[Any]]:
    """Name and shape of each parameter, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [names.get(id(parameter), ""), list(parameter.shape)]
        for parameter in _parameters(optimizer)
    ]


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Takes a state_dict() without rounding it to the parameters' dtype, as load_state_dict does.

    Raises:
        ValueError: it is of another kind of optimizer, or a parameter's state has other names or
            shapes than the optimizer gives it. A parameter without a gradient has no state.
    """
    groups, own_groups = (holder["param_groups"] for holder in (state, optimizer.state_dict()))
    if [group.keys() for group in groups] != [group.keys() for group in own_groups]:
        raise ValueError("its optimizer is of another kind")
    parameters = {}
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        for number, parameter in zip(group["params"], own["params"], strict=True):
            parameters[number] = parameter
            if number in state["state"]:  # without a gradient it has none
                _check_state(state["state"][number], _first_state(optimizer, group, parameter))
    if not state["state"].keys() <= parameters.keys():
        raise ValueError("its optimizer keeps something of parameters that there are none of")
    optimizer.load_state_dict(state)
    for number, values in state["state"].items():
        loaded = optimizer.state[parameters[number]]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dtype != loaded[name].dtype:
                loaded[name] = value.to(loaded[name].device)


def _parameters(optimizer: Any) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _first_state(optimizer: Any, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """What it keeps of a parameter after a step with the options of `group`, seen on copies."""
    copied = copy.copy(getattr(optimizer, "optimizer", optimizer))  # accelerate's has it inside
    twin = torch.zeros_like(parameter)
    twin.grad = torch.zeros_like(parameter)
    copied.state, copied.param_groups = defaultdict(dict), [group | {"params": [twin]}]
    copied.step()
    return copied.state[twin]


def _check_state(values: dict[str, Any], expected: dict[str, Any]) -> None:
    if values.keys() != expected.keys():
        raise ValueError(
            f"its optimizer keeps {sorted(values)} of a parameter, expected {sorted(expected)}"
        )
    for name, value in values.items():
        form, wanted = _form(value), _form(expected[name])
        if form != wanted:
            raise ValueError(f"{name} of the optimizer {form}, that of this run {wanted}")


def _form(value: Any) -> str:
    return f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else "is no tensor"
