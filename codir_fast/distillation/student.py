"""A student of fewer layers, made from a fine-tuned teacher."""

import copy

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
    state = student.state_dict()
    for name, value in state.items():
        taken = given[_source_name(name, stacks, source)]
        # Of another shape is what looks at all layers at once, as ESM's contacts: it begins anew.
        if taken.shape == value.shape:
            state[name] = taken
    student.load_state_dict(state)
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


def _source_name(name: str, stacks: list[str], source: dict[int, int]) -> str:
    for stack in stacks:
        if name.startswith(f"{stack}."):
            layer, rest = name.removeprefix(f"{stack}.").split(".", 1)
            return f"{stack}.{source[int(layer) + 1] - 1}.{rest}"
    return name
