"""DistillationModel: each term against its formula, and what stays frozen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config
from transformers import (
    BertForSequenceClassification,
    FunnelConfig,
    FunnelForSequenceClassification,
)

from codir_fast import DistillationConfig, DistillationModel, pool_hidden_states, reference
from codir_fast.distillation.config import PRESETS
from codir_fast.distillation.standardization import Standardization, both_moments
from codir_fast.distillation.student import student_from_teacher
from codir_fast.errors import UsageError

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
    z_student = project(model.contrast.student_projection, pooled(student, [1, 2], mask))
    z_teacher = project(model.contrast.teacher_projection, pooled(teacher, [2, 4], mask))
    codir = reference.bank_contrast(
        z_student,
        z_teacher,
        model.contrast.bank.rows.double(),
        1 / 0.07,
        labels=batch["labels"],
        bank_labels=model.contrast.bank.labels,
        exclude_index=batch["index"],
        valid=model.contrast.bank.valid,
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
    assert parts == {"student", "contrast"}
    own = {id(parameter) for parameter in model.parameters()}
    assert not own & {id(parameter) for parameter in model.teacher.parameters()}
    assert next(model.double().teacher.parameters()).dtype == torch.float64


def test_eval_mode_runs_the_student_alone_and_leaves_the_bank():
    model = make().train()
    model(**make_batch())
    model.update_bank()
    rows = model.contrast.bank.rows.clone()
    model.eval()
    batch = make_batch(BATCH)
    outputs = model(**batch)
    model.update_bank()
    assert set(outputs) == {"loss", "logits"}
    torch.testing.assert_close(
        outputs["loss"], F.cross_entropy(outputs["logits"], batch["labels"]), rtol=0, atol=0
    )
    assert torch.equal(model.contrast.bank.rows, rows)


def test_bank_holds_the_teachers_embeddings_after_the_update():
    model = make().train()
    batch = make_batch()
    model(**batch)
    assert not model.contrast.bank.valid.any()
    model.update_bank()
    assert model.contrast.bank.valid.tolist() == [True] * BATCH + [False] * (EXAMPLES - BATCH)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher = model.teacher(**inputs, output_hidden_states=True)
        expected = project(
            model.contrast.teacher_projection, pooled(teacher, [2, 4], batch["attention_mask"])
        )
    torch.testing.assert_close(
        model.contrast.bank.rows[:BATCH].double(), expected, rtol=1e-4, atol=1e-5
    )


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


def test_layers_that_pool_tokens_are_refused():
    torch.manual_seed(0)
    sizes = {"vocab_size": 44, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}
    student = FunnelForSequenceClassification(FunnelConfig(block_sizes=[1, 1], **sizes))
    teacher = BertForSequenceClassification(tiny_config())
    config = DistillationConfig(projection_dim=8, layer_mapping="2:4")
    model = DistillationModel(student, teacher, config, torch.arange(8) % 2)
    with pytest.raises(UsageError, match=f"layer 2 has . for {TOKENS} tokens"):
        model.train()(**make_batch())


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


def embeddings(model, batch):
    """z_S and z_T of a batch, in double."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    contrast, found = model.contrast, []
    for side, head, layers in (
        (model.student, contrast.student_projection, model.student_layers),
        (model.teacher, contrast.teacher_projection, model.teacher_layers),
    ):
        states = side(**inputs, output_hidden_states=True)
        found.append(project(head, pooled(states, layers, batch["attention_mask"])))
    return found


def started(**config):
    """A model whose bank has seen the second half of the examples, without dropout."""
    model = make(**config).train()
    model.student.eval()
    model(**make_batch(BATCH))
    model.update_bank()
    return model


def test_positive_from_the_bank():
    """The row of before where there is one, else the embedding itself."""
    model = started(positive="bank")
    batch = make_batch(BATCH)
    batch["index"] = batch["index"].clone()
    batch["index"][0] = 0  # not seen yet
    z_student, z_teacher = embeddings(model, batch)
    bank = model.contrast.bank
    positive = bank.rows[batch["index"]].double()
    positive[0] = z_teacher[0]
    expected = reference.bank_contrast(
        z_student,
        positive,
        bank.rows.double(),
        1 / 0.07,
        labels=batch["labels"],
        bank_labels=bank.labels,
        exclude_index=batch["index"],
        valid=bank.valid,
    ).mean()
    found = model(**batch)["codir"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_negatives_of_all_labels_leave_out_the_own_row_alone():
    model = started(negatives="all")
    batch = make_batch(BATCH)
    z_student, z_teacher = embeddings(model, batch)
    logits = z_student @ model.contrast.bank.rows[BATCH:].double().T / 0.07
    logits.fill_diagonal_(-torch.inf)
    positive = (z_student * z_teacher).sum(1, keepdim=True) / 0.07
    expected = (torch.cat([positive, logits], 1).logsumexp(1) - positive[:, 0]).mean()
    found = model(**batch)["codir"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("negatives", ["other_labels", "all"])
def test_drawn_negatives(negatives):
    model = started(negatives=negatives, num_negatives=5)
    bank, drawn = model.contrast.bank, []
    batch = make_batch(BATCH)
    original = model.contrast._draw
    model.contrast._draw = lambda *args: drawn.append(original(*args)) or drawn[-1]
    torch.manual_seed(8)
    found = model(**batch)["codir"]
    (index,) = drawn
    assert index.shape == (BATCH, 5) and bank.valid[index].all()
    if negatives == "other_labels":
        assert (bank.labels[index] != batch["labels"][:, None]).all()
    z_student, z_teacher = embeddings(model, batch)
    expected = reference.indexed_contrast(
        z_student,
        z_teacher,
        bank.rows.double(),
        1 / 0.07,
        index,
        exclude_index=batch["index"],
    ).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_drawn_before_there_is_a_row_of_another_label():
    model = make(num_negatives=3).train()
    batch = make_batch()
    of_one_label = {name: rows[::2] for name, rows in batch.items()}
    assert model(**of_one_label)["codir"] == 0  # the bank is empty
    model.update_bank()
    outputs = model(**batch)
    assert outputs["codir"] == 0
    outputs["loss"].backward()


def test_a_bank_of_random_rows_is_full_from_the_start():
    model = make(bank_init="random", num_negatives=3).train()
    rows = model.contrast.bank.rows
    assert model.contrast.bank.is_full
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(EXAMPLES))
    assert model(**make_batch())["codir"] > 0


def test_both_sides_are_the_mean_of_two_terms():
    model = started(both_sides=True)
    batch = make_batch()
    z_student, z_teacher = embeddings(model, batch)
    sides = []
    for query, key, bank in (
        (z_student, z_teacher, model.contrast.bank),
        (z_teacher, z_student, model.contrast.student_bank),
    ):
        loss = reference.bank_contrast(
            query,
            key,
            bank.rows.double(),
            1 / 0.07,
            labels=batch["labels"],
            bank_labels=bank.labels,
            exclude_index=batch["index"],
            valid=bank.valid,
        )
        sides.append(loss.mean())
    found = model(**batch)["codir"]
    torch.testing.assert_close(found.double(), sum(sides) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.contrast.bank.rows, model.contrast.student_bank.rows)


def test_nce_keeps_the_partition_of_its_first_batch():
    model = started(objective="nce", bank_init="random")
    known = model.contrast.loss.log_partition.clone()
    assert known.isfinite()
    assert "contrast.loss.log_partition" in model.distillation_state()
    assert model(**make_batch())["codir"] > 0
    assert torch.equal(model.contrast.loss.log_partition, known)


def test_heads_that_begin_equal_and_are_not_trained():
    model = make(head_init="equal", train_heads=False).train()
    contrast = model.contrast
    student, teacher = contrast.student_projection, contrast.teacher_projection
    assert torch.equal(student.linear.weight, teacher.linear.weight)
    model(**make_batch())
    model.update_bank()
    model(**make_batch(BATCH))["loss"].backward()
    assert student.linear.weight.grad is None and teacher.linear.weight.grad is None
    assert not torch.equal(
        *(
            make().contrast.state_dict()[f"{side}_projection.linear.weight"]
            for side in ("student", "teacher")
        )
    )


def test_pkd_is_the_distance_of_unit_vectors():
    model = make(pkd_weight=2.0, codir_weight=0.0).train()
    model.student.eval()
    batch = make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    sides = [
        pooled(side(**inputs, output_hidden_states=True), layers, batch["attention_mask"])
        for side, layers in ((model.student, [1, 2]), (model.teacher, [2, 4]))
    ]
    width = model.student.config.hidden_size
    total = sum(
        (F.normalize(s, dim=1) - F.normalize(t, dim=1)).square().sum(1)
        for s, t in zip(*(side.split(width, 1) for side in sides), strict=True)
    )
    outputs = model(**batch)
    expected = (total / 2).mean()
    torch.testing.assert_close(outputs["pkd"].double(), expected, rtol=1e-4, atol=1e-6)
    others = 0.1 * outputs["ce"] + 0.9 * outputs["kd"]
    torch.testing.assert_close(outputs["loss"], others + 2 * outputs["pkd"])


@pytest.mark.parametrize("config", [{"pkd_weight": 1.0}, {"head_init": "equal"}], ids=str)
def test_what_needs_a_student_as_wide_as_the_teacher(config):
    teacher = BertForSequenceClassification(tiny_config())
    student = BertForSequenceClassification(tiny_config(hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ValueError, match=f"`{next(iter(config))}`.* as wide as the teacher"):
        DistillationModel(student, teacher, DistillationConfig(**config), torch.arange(4))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_train(name):
    model = make(**PRESETS[name]).train()
    if model.needs_features:
        model.fit_features([make_batch(0), make_batch(BATCH)])
    for first in (0, BATCH):
        outputs = model(**make_batch(first))
        outputs["loss"].backward()
        model.update_bank()
    assert outputs["codir"] > 0 and outputs["codir"].isfinite()


def test_the_preset_of_the_paper_is_the_default():
    assert DistillationConfig(**PRESETS["paper"]) == DistillationConfig()


@pytest.mark.parametrize("student_width", [16, 32])
def test_features_are_standardised_by_the_teacher_or_by_themselves(student_width):
    teacher = BertForSequenceClassification(tiny_config())
    student = BertForSequenceClassification(
        tiny_config(hidden_size=student_width, num_hidden_layers=2)
    )
    config = DistillationConfig(standardize_features=True)
    model = DistillationModel(student, teacher, config, torch.arange(EXAMPLES) % 2).train()
    assert model.needs_features
    with pytest.raises(ValueError, match="needs fit_features before training"):
        model(**make_batch())
    batches = [make_batch(0), make_batch(BATCH)]
    model.fit_features(batches)
    assert model.student.training and not model.needs_features

    seen = {"student": [], "teacher": []}
    with torch.no_grad():
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            states = [
                side(**inputs, output_hidden_states=True).hidden_states
                for side in (student.eval(), teacher)
            ]
            sides = (states[0], model.student_layers), (states[1], model.teacher_layers)
            for name, (hidden, layers) in zip(seen, sides, strict=True):
                seen[name].append(
                    pool_hidden_states(hidden, batch["attention_mask"], layers=layers)
                )
    contrast = model.contrast
    for name, part in (
        ("teacher", contrast.teacher_features),
        ("teacher" if student_width == 16 else "student", contrast.student_features),
    ):
        rows = torch.cat(seen[name])
        torch.testing.assert_close(part.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.deviation, rows.std(0, correction=0), rtol=1e-3, atol=1e-5)
    rows = contrast.teacher_features(torch.cat(seen["teacher"]))
    torch.testing.assert_close(rows.mean(0), torch.zeros(rows.shape[1]), rtol=0, atol=1e-4)
    assert {"contrast.teacher_features.mean"} <= set(model.distillation_state())
    assert model.train()(**make_batch())["loss"].isfinite()


def test_a_feature_that_never_moves_becomes_0():
    config = DistillationConfig(standardize_features=True)
    part = Standardization(2, config)
    rows = torch.stack([torch.full((5,), 7.3), torch.arange(5.0)], dim=1)
    features = [(None, part_of_rows) for part_of_rows in rows.split(2)]
    part.set(*both_moments(features, (2, 2), None, torch.device("cpu"))[1])
    found = part(rows)
    assert found[:, 0].abs().max() < 1e-5
    torch.testing.assert_close(found[:, 1].std(correction=0), torch.tensor(1.0))


@pytest.mark.parametrize("settings", [{}, PRESETS["fidelity"], PRESETS["official"]], ids=str)
def test_a_term_for_each_layer_is_the_mean_of_terms_of_one_layer(settings):
    torch.manual_seed(1)
    each = make(**(settings | {"contrast_layers": "each", "layer_mapping": "1:2,2:4"})).train()
    each.student.eval()
    parts = list(each.contrast.layers)
    for n, (student, teacher) in enumerate(((1, 2), (2, 4))):
        mapping = f"{student}:{teacher}"
        one = make(**(settings | {"contrast_layers": "joint", "layer_mapping": mapping})).train()
        one.student.load_state_dict(each.student.state_dict())
        one._teacher = each._teacher
        one.student.eval()
        one.contrast.load_state_dict(parts[n].state_dict())
        parts[n] = one
    batches = [make_batch(0), make_batch(BATCH)]
    models = [each, *parts]
    for model in models:
        if model.needs_features:
            model.fit_features(batches)
    for batch in batches:
        found = []
        for model in models:
            torch.manual_seed(2)  # official draws its negatives
            found.append(model(**batch)["codir"])
            model.update_bank()
        if settings != PRESETS["official"]:
            torch.testing.assert_close(found[0], (found[1] + found[2]) / 2)
    for n, model in enumerate(parts):
        layer = each.contrast.layers[n]
        torch.testing.assert_close(layer.bank.rows, model.contrast.bank.rows)
        assert layer.bank.valid.all()
    assert found[0] > 0


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16], ids=str)
def test_models_in_half_precision(student):
    """As transformers loads checkpoints that were saved so; heads and bank stay in float32."""
    model = make().train()
    model.teacher.to(torch.bfloat16)
    model.student.to(student)
    for first in (BATCH, 0):
        outputs = model(**make_batch(first))
        model.update_bank()
    assert outputs["codir"] > 0 and outputs["loss"].isfinite()
    outputs["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.student.bert.encoder.parameters())
    assert model.contrast.bank.rows.dtype == torch.float32
