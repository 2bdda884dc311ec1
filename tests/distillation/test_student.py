"""Layer mappings, and students made from a teacher."""

import pytest
import torch
from tiny import tiny_config
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EsmConfig,
    EsmForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMConfig,
    XLMForSequenceClassification,
)

from codir_fast.distillation.layer_mapping import layer_pairs
from codir_fast.distillation.student import student_from_teacher


@pytest.mark.parametrize(
    ("mapping", "student", "teacher", "expected"),
    [
        ("uniform", 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        ("uniform", 3, 6, [(1, 2), (2, 4), (3, 6)]),
        ("uniform", 2, 5, [(1, 2), (2, 5)]),
        ("uniform", 4, 4, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ("official", 6, 12, [(1, 1), (2, 3), (3, 5), (4, 7), (5, 9), (6, 11)]),
        ("last", 3, 12, [(3, 12)]),
        ("1:4,3:12", 3, 12, [(1, 4), (3, 12)]),
    ],
)
def test_pairs(mapping, student, teacher, expected):
    assert layer_pairs(mapping, student, teacher) == expected


@pytest.mark.parametrize("mapping", ["middle", "1-2", "1:2:3", "a:b", ""])
def test_unknown_mapping_is_refused(mapping):
    with pytest.raises(ValueError, match="`layer_mapping` must be one of"):
        layer_pairs(mapping, 3, 6)


@pytest.mark.parametrize("mapping", ["0:1", "4:1", "1:7"])
def test_pairs_out_of_range_are_refused(mapping):
    with pytest.raises(ValueError, match="within 3 student and 6 teacher layers"):
        layer_pairs(mapping, 3, 6)


SMALL = {"vocab_size": 30, "max_position_embeddings": 20}
TEACHERS = {
    "bert": lambda: BertForSequenceClassification(tiny_config()),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(
            **SMALL,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**SMALL, dim=16, n_layers=4, n_heads=2, hidden_dim=32)
    ),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_student_starts_as_every_second_layer(kind):
    teacher = TEACHERS[kind]()
    student = student_from_teacher(teacher, 2)
    assert student.config.num_hidden_layers == 2
    given, taken = teacher.state_dict(), student.state_dict()
    for name, value in taken.items():
        source = name
        for layer in (1, 0):
            source = source.replace(f"layer.{layer}.", f"layer.{2 * layer + 1}.")
        assert torch.equal(value, given[source]), name
    with torch.no_grad():  # copies, not the teacher's own
        next(student.parameters()).add_(1)
    assert not torch.equal(next(student.parameters()), next(teacher.parameters()))


def test_layers_keep_their_kind_of_attention():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    teacher = ModernBertForSequenceClassification(
        ModernBertConfig(
            **SMALL,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            layer_types=kinds,
            pad_token_id=0,
        )
    )
    assert student_from_teacher(teacher, 2).config.layer_types == kinds[1::2]


def modernbert():
    """Whose first layer has no norm before its attention."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = ModernBertConfig(**SMALL, **sizes, num_hidden_layers=4, pad_token_id=0)
    return ModernBertForSequenceClassification(config)


def test_what_a_layer_has_no_place_for_is_told():
    with pytest.warns(UserWarning, match="no place for model.layers.1.attn_norm.weight of"):
        student_from_teacher(modernbert(), 2)


def test_what_a_layer_lacks_begins_anew():
    teacher = modernbert()
    student = student_from_teacher(teacher, 2, "1:1,2:1")
    assert torch.equal(student.model.layers[1].attn_norm.weight, torch.ones(16))
    for layer in student.model.layers:
        assert torch.equal(layer.attn.Wqkv.weight, teacher.model.layers[0].attn.Wqkv.weight)


def test_layers_keep_how_far_they_see():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = LongformerConfig(
        **SMALL, **sizes, num_hidden_layers=4, attention_window=[4, 8, 16, 32], pad_token_id=0
    )
    teacher = LongformerForSequenceClassification(config)
    assert student_from_teacher(teacher, 2).config.attention_window == [8, 32]
    assert teacher.config.attention_window == [4, 8, 16, 32]


def test_what_looks_at_all_layers_begins_anew():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = EsmConfig(**SMALL, **sizes, num_hidden_layers=4, pad_token_id=0, mask_token_id=1)
    teacher = EsmForSequenceClassification(config)
    student = student_from_teacher(teacher, 2)
    for name, value in student.state_dict().items():
        if "contact_head" not in name:
            source = name.replace("layer.1.", "layer.3.").replace("layer.0.", "layer.1.")
            assert torch.equal(value, teacher.state_dict()[source]), name


@pytest.fixture
def in_parts():
    """A teacher whose layers are several lists: of attentions, of their norms, ..."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "emb_dim": 16, "n_layers": 4, "n_heads": 2, "pad_index": 0}
    return XLMForSequenceClassification(XLMConfig(**sizes)).eval()


def test_layers_in_parts(in_parts):
    student = student_from_teacher(in_parts, 2, "1:2,2:3")
    given, taken = in_parts.state_dict(), student.state_dict()
    for part in ("attentions", "layer_norm1", "ffns", "layer_norm2"):
        names = [name for name in taken if f".{part}." in name]
        assert names
        for name in names:
            source = name.replace(f"{part}.1.", f"{part}.2.").replace(f"{part}.0.", f"{part}.1.")
            assert torch.equal(taken[name], given[source]), name


@pytest.mark.parametrize("kind", ["bert", "in parts"])
def test_full_depth_student_computes_what_the_teacher_does(kind, in_parts):
    teacher = in_parts if kind == "in parts" else TEACHERS[kind]().eval()
    student = student_from_teacher(teacher, 4).eval()
    tokens = torch.randint(4, 20, (3, 7))
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)


@pytest.mark.parametrize("layers", [0, 5])
def test_wrong_number_of_layers_is_refused(layers):
    with pytest.raises(ValueError, match=r"`student_layers` must be in \[1, 4\]"):
        student_from_teacher(TEACHERS["bert"](), layers)
