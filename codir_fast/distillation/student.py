"""A student of fewer layers, made from a fine-tuned teacher."""

import copy
import warnings

from torch import nn
from transformers import PreTrainedModel

from codir_fast.distillation.layer_mapping import layer_pairs

# Of a configuration, with an entry for each layer: its kind of attention, and how far it reaches.
_BY_LAYER = ("layer_types", "attention_window")


def student_from_teacher(
    teacher: PreTrainedModel, num_layers: int, layer_mapping: str = "uniform"
) -> PreTrainedModel:
    """The teacher's embeddings, pooler and classifier around `num_layers` of its layers.

    Student layer i starts as the teacher layer that `layer_mapping` gives it; a mapping that leaves
    a layer out gives it the uniform one.

    Raises:
        ValueError: more layers than the teacher has, fewer than 1, or a model whose layers are not
            found.
    """
    total = teacher.config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(
            f"`student_layers` must be in [1, {total}], the teacher's layers, got {num_layers}"
        )
    source = dict(layer_pairs("uniform", num_layers, total))
    if layer_mapping != "last":
        source.update(layer_pairs(layer_mapping, num_layers, total))
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = num_layers
    for name in _BY_LAYER:
        if isinstance(of_layer := getattr(config, name, None), list):
            setattr(config, name, [of_layer[source[i] - 1] for i in range(1, num_layers + 1)])
    student = type(teacher)(config)

    stacks = _layer_stacks(teacher, total)
    given = teacher.state_dict()
    state, used = student.state_dict(), set()
    for name, value in state.items():
        taken = given.get(_source_name(name, stacks, source))
        used.add(_source_name(name, stacks, source))
        # What a layer lacks begins anew, as the first norm of ModernBERT's first layer; and of
        # another shape is what looks at all layers at once, as ESM's contacts.
        if taken is not None and taken.shape == value.shape:
            state[name] = taken
    student.load_state_dict(state)
    left = [n for n in given if n not in used and _layer_of(n, stacks) in source.values()]
    if left:
        warnings.warn(
            f"the student's layers have no place for {', '.join(left)} of the teacher's",
            stacklevel=2,
        )
    return student


def _layer_stacks(model: PreTrainedModel, num_layers: int) -> list[str]:
    """Name of the list of layers, such as bert.encoder.layer; or of the lists, side by side, of
    their parts, such as transformer.attentions and transformer.ffns.
    """
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if len({name.rpartition(".")[0] for name in stacks}) != 1:
        raise ValueError(
            f"`teacher` must have one list of {num_layers} layers to make a student from, "
            f"{type(model).__name__} has {len(stacks)}; give a `student` instead"
        )
    return stacks


def _layer_of(name: str, stacks: list[str]) -> int | None:
    """The number of the layer that it is part of, from 1 on."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            return int(name.removeprefix(f"{stack}.").split(".", 1)[0]) + 1
    return None


def _source_name(name: str, stacks: list[str], source: dict[int, int]) -> str:
    for stack in stacks:
        if name.startswith(f"{stack}."):
            layer, rest = name.removeprefix(f"{stack}.").split(".", 1)
            return f"{stack}.{source[int(layer) + 1] - 1}.{rest}"
    return name
