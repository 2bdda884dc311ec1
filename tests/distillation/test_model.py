"""DistillationModel: each term against its formula, and what stays frozen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config
from transformers import BertForSequenceClassification

from codir_fast import DistillationConfig, DistillationModel, reference
from codir_fast.distillation.student import student_from_teacher

EXAMPLES, BATCH, TOKENS = 12, 6, 8


def make(bank_labels=None, **config):
    torch.manual_seed(3)
    teacher = BertForSequenceClassification(tiny_config(hidden_dropout_prob=0.0))
    student = student_from_teacher(teacher, 2)
    labels = torch.arange(EXAMPLES) % 2 if bank_labels is None else bank_labels
    return DistillationModel(student, teacher, DistillationConfig(**config), labels)


def make_batch(first=0):
    torch.manual_seed(first)
    index = torch.arange(first, first + BATCH)
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (BATCH, 1))).long()
    tokens = torch.randint(4, 40, (BATCH, TOKENS))
    return {"input_ids": tokens, "attention_mask": mask, "labels": index % 2, "index": index}


def pooled(outputs, layers, mask):
    weights = mask[:, :, None].double()
    states = [outputs.hidden_states[layer].double() for layer in layers]
    return torch.cat([(s * weights).sum(1) / weights.sum(1) for s in states], dim=1)


def project(head, rows):
    projected = rows @ head.linear.weight.double().T + head.linear.bias.double()
    return F.normalize(projected, dim=1)


def test_terms_and_loss_are_those_of_the_paper():
    model = make(ce_weight=0.3, kd_weight=0.5, codir_weight=0.7, kd_temperature=3.0).train()
    model.student.eval()  # no dropout in the comparison
    model(**make_batch(BATCH))
    model.update_bank()
    batch = make_batch()
    outputs = model(**batch)

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student = model.student(**inputs, output_hidden_states=True)
    teacher = model.teacher(**inputs, output_hidden_states=True)
    ce = F.cross_entropy(student.logits, batch["labels"])
    kd = 9 * F.kl_div(
        F.log_softmax(student.logits / 3, 1),
        F.softmax(teacher.logits / 3, 1),
        reduction="batchmean",
    )
    mask = batch["attention_mask"]
    z_student = project(model.student_projection, pooled(student, [1, 2], mask))
    z_teacher = project(model.teacher_projection, pooled(teacher, [2, 4], mask))
    codir = reference.bank_contrast(
        z_student,
        z_teacher,
        model.bank.rows.double(),
        1 / 0.07,
        labels=batch["labels"],
        bank_labels=model.bank.labels,
        exclude_index=batch["index"],
        valid=model.bank.valid,
    ).mean()
    for name, expected in (("ce", ce), ("kd", kd), ("codir", codir)):
        torch.testing.assert_close(outputs[name].double(), expected.double(), rtol=1e-4, atol=1e-6)
    expected = 0.3 * ce + 0.5 * kd + 0.7 * codir
    torch.testing.assert_close(outputs["loss"].double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_gradient_reaches_student_and_heads_but_not_the_teacher():
    model = make().train()
    model(**make_batch(BATCH))
    model.update_bank()
    before = copy.deepcopy(model.teacher.state_dict())
    model(**make_batch())["loss"].backward()
    for name, parameter in model.named_parameters():
        if "classifier" not in name and "pooler" not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(
        torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items()
    )


def test_teacher_is_neither_trained_nor_saved_but_moves():
    model = make().train()
    assert not model.teacher.training
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {"student", "student_projection", "teacher_projection", "bank"}
    own = {id(parameter) for parameter in model.parameters()}
    assert not own & {id(parameter) for parameter in model.teacher.parameters()}
    assert next(model.double().teacher.parameters()).dtype == torch.float64


def test_eval_mode_runs_the_student_alone_and_leaves_the_bank():
    model = make().train()
    model(**make_batch())
    model.update_bank()
    rows = model.bank.rows.clone()
    model.eval()
    batch = make_batch(BATCH)
    outputs = model(**batch)
    model.update_bank()
    assert set(outputs) == {"loss", "logits"}
    torch.testing.assert_close(
        outputs["loss"], F.cross_entropy(outputs["logits"], batch["labels"]), rtol=0, atol=0
    )
    assert torch.equal(model.bank.rows, rows)


def test_bank_holds_the_teachers_embeddings_after_the_update():
    model = make().train()
    batch = make_batch()
    model(**batch)
    assert not model.bank.valid.any()
    model.update_bank()
    assert model.bank.valid.tolist() == [True] * BATCH + [False] * (EXAMPLES - BATCH)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher = model.teacher(**inputs, output_hidden_states=True)
        expected = project(
            model.teacher_projection, pooled(teacher, [2, 4], batch["attention_mask"])
        )
    torch.testing.assert_close(model.bank.rows[:BATCH].double(), expected, rtol=1e-4, atol=1e-5)


def test_weight_zero_leaves_the_term_out():
    model = make(codir_weight=0.0).train()
    batch = make_batch()
    outputs = model(**batch)
    assert set(outputs) == {"loss", "logits", "ce", "kd"}
    assert {name.split(".")[0] for name in model.state_dict()} == {"student"}
    del batch["index"]
    assert set(make(codir_weight=0.0, kd_weight=0.0).train()(**batch)) == {"loss", "logits", "ce"}


def test_what_is_missing_is_named():
    batch = make_batch()
    del batch["index"]
    with pytest.raises(ValueError, match="`index` must be given"):
        make().train()(**batch)
    model = make()
    with pytest.raises(ValueError, match="`bank_labels` must be given"):
        DistillationModel(model.student, model.teacher, DistillationConfig())
    other = BertForSequenceClassification(tiny_config(id2label={0: "a", 1: "b", 2: "c"}))
    with pytest.raises(ValueError, match="`student` must have the teacher's 2 labels, got 3"):
        DistillationModel(other, model.teacher, DistillationConfig())


def test_state_of_another_kind_of_run_is_refused():
    with pytest.raises(ValueError, match="another kind of run"):
        make().load_distillation_state(make(codir_weight=0.0).distillation_state())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_mapping", "middle"),
        ("pooling", "sum"),
        ("projection_dim", 0),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("kd_temperature", -1.0),
        ("ce_weight", -0.1),
        ("codir_weight", float("inf")),
        ("bank_momentum", 1.5),
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must"):
        DistillationConfig(**{field: value})


def test_config_without_any_loss_is_refused():
    with pytest.raises(ValueError, match="no loss is left"):
        DistillationConfig(ce_weight=0, kd_weight=0, codir_weight=0)


def test_config_is_saved_and_read(tmp_path):
    config = DistillationConfig(codir_weight=0.3, layer_mapping="1:2,2:4")
    config.save(tmp_path)
    assert DistillationConfig.load(tmp_path) == config
