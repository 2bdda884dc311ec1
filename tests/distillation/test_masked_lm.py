"""PretrainingModel: each term against its formula over dense logits, heads, and the queue."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import MASKED_VOCABULARY, tiny_config
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from codir_fast import PretrainingConfig, PretrainingModel, pool_hidden_states, reference
from codir_fast.distillation.masked_lm import IGNORED, outputs_at
from codir_fast.distillation.student import student_from_teacher

BATCH, TOKENS = 6, 9
SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1}
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=30, max_position_embeddings=20, dim=16, n_layers=4, n_heads=2, hidden_dim=32
        )
    ),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=8)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SIZES, **SPECIAL, eos_token_id=2)
    ),
}


def make_teacher(**changes):
    config = {"vocab_size": MASKED_VOCABULARY, "initializer_range": 0.2} | changes
    return BertForMaskedLM(tiny_config(**config))  # sure of itself, so that the two differ


def make(**config):
    torch.manual_seed(3)
    teacher = make_teacher()
    config = {"projection_dim": 8, "queue_size": 10} | config
    return PretrainingModel(student_from_teacher(teacher, 2), teacher, PretrainingConfig(**config))


def make_batch(seed=0, vocabulary=MASKED_VOCABULARY):
    torch.manual_seed(seed)
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (BATCH, 1))).long()
    tokens = torch.randint(4, vocabulary, (BATCH, TOKENS)) * mask
    labels = torch.where((torch.rand(BATCH, TOKENS) < 0.3) & mask.bool(), tokens, IGNORED)
    tokens = torch.where(labels != IGNORED, vocabulary - 1, tokens)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def started(**config):
    """A model whose queue has seen a batch, without dropout."""
    model = make(**config).train()
    model.student.eval()
    if model.needs_features:
        model.fit_features([make_batch(1)])
    model(**make_batch(1))
    model.update_bank()
    return model


def dense(model, batch):
    """In float64: student's and teacher's logits at the masked positions, taken from those of all
    positions, and the pooled features of their layers.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = []
    for side, layers in ((model.student, [1, 2]), (model.teacher, [2, 4])):
        with torch.no_grad():
            outputs = side.double()(**inputs, output_hidden_states=True)
        side.float()
        features = pool_hidden_states(
            outputs.hidden_states, inputs["attention_mask"], layers=layers
        )
        found.append((outputs.logits[batch["labels"] != IGNORED], features))
    return found


def embedding(head, features):
    linear = head.linear
    return F.normalize(features @ linear.weight.double().T + linear.bias.double(), dim=1)


def test_terms_are_those_of_dense_logits_in_float64():
    weights = {"mlm_weight": 0.5, "kd_weight": 0.7, "codir_weight": 0.3, "pkd_weight": 0.2}
    model = started(kd_temperature=3.0, **weights)
    batch = make_batch()
    outputs = model(**batch)

    (logits, features), (teacher_logits, teacher_features) = dense(model, batch)
    targets = batch["labels"][batch["labels"] != IGNORED]
    assert 0 < len(targets) < BATCH * TOKENS
    student, teacher = ((x / 3).log_softmax(1) for x in (logits, teacher_logits))
    contrast = model.contrast
    units = [F.normalize(x.unflatten(1, (2, -1)), dim=-1) for x in (features, teacher_features)]
    expected = {
        "mlm": -logits.log_softmax(1).gather(1, targets[:, None]).mean(),
        "kd": 9 * (teacher.exp() * (teacher - student)).sum(1).mean(),
        "codir": reference.bank_contrast(
            embedding(contrast.student_projection, features),
            embedding(contrast.teacher_projection, teacher_features),
            contrast.bank.keys.double(),
            1 / 0.07,
        ).mean(),
        "pkd": (units[0] - units[1]).square().sum(-1).mean(),
    }
    assert set(outputs) == {"loss", *expected} and len(contrast.bank.keys) == BATCH
    for name, value in expected.items():
        assert value > 0.01
        torch.testing.assert_close(outputs[name].double(), value, rtol=1e-4, atol=1e-6)
    loss = sum(weights[f"{name}_weight"] * value for name, value in expected.items())
    torch.testing.assert_close(outputs["loss"].double(), loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_head_sees_the_masked_positions_alone(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    student = student_from_teacher(model, 2).eval()
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    PretrainingModel(student, model, PretrainingConfig(queue_size=4))  # both have heads it knows
    batch = make_batch(vocabulary=30)
    labels = batch.pop("labels")
    positions = (labels != IGNORED).flatten().nonzero()[:, 0]
    seen = []
    for side in (model, student):
        projector = side.get_output_embeddings()
        handle = projector.register_forward_hook(lambda _, args, out: seen.append(out.shape))
        some = outputs_at(side, positions, batch, output_hidden_states=True)
        assert seen.pop().numel() == len(positions) * 30
        handle.remove()
        every = side(**batch, output_hidden_states=True)
        torch.testing.assert_close(some.logits, every.logits[labels != IGNORED])
        torch.testing.assert_close(some.hidden_states, every.hidden_states)


class Mixed(torch.nn.Module):
    """A head that looks at other positions too."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, states):
        return self.head(states + states.mean(1, keepdim=True))


def test_model_without_a_head_that_is_known_is_refused():
    config = tiny_config(vocab_size=MASKED_VOCABULARY)
    for model in (BertForSequenceClassification(config), BertModel(config)):
        with pytest.raises(ValueError, match="`teacher` must be a masked language model, Bert"):
            PretrainingModel(make_teacher(), model, PretrainingConfig())
    mixed = make_teacher()
    mixed.cls = Mixed(mixed.cls)
    mixed.get_output_embeddings = lambda: mixed.cls.head.predictions.decoder
    with pytest.raises(ValueError, match="`student`.* acts on each position by itself"):
        PretrainingModel(mixed, make_teacher(), PretrainingConfig())


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="`teacher` must be given where kd_weight"):
        PretrainingModel(make_teacher(), None, PretrainingConfig())
    other = make_teacher(vocab_size=50)
    with pytest.raises(ValueError, match="a vocabulary of 45, got 50"):
        PretrainingModel(other, make_teacher(), PretrainingConfig())
    narrow = make_teacher(hidden_size=8)
    with pytest.raises(ValueError, match="`head_init` equal needs a student as wide"):
        PretrainingModel(narrow, make_teacher(), PretrainingConfig(head_init="equal"))


def test_plain_masked_language_modelling_needs_no_teacher():
    config = PretrainingConfig(kd_weight=0, codir_weight=0)
    model = PretrainingModel(make_teacher(), None, config).train()
    outputs = model(**make_batch())
    assert set(outputs) == {"loss", "mlm"} and torch.equal(outputs["loss"], outputs["mlm"])
    assert model.distillation_state() == {}


def test_batch_without_a_masked_token_has_loss_0():
    model = started(pkd_weight=0, codir_weight=0)
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    outputs = model(**batch)
    assert outputs["mlm"] == 0 and outputs["kd"] == 0
    outputs["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_teachers_head_is_left_out_where_no_term_needs_it():
    model = started(kd_weight=0)
    model.teacher.cls.predictions.decoder.register_forward_hook(lambda *_: pytest.fail("it ran"))
    assert set(model(**make_batch())) == {"loss", "mlm", "codir"}


def test_gradient_reaches_student_and_heads_but_not_the_teacher():
    model = started()
    model.student.train()
    model(**make_batch())["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_eval_mode_runs_the_student_alone_and_leaves_the_queue():
    model = started()
    before = model.contrast.bank.rows.clone()
    model.eval()
    batch = make_batch()
    outputs = model(**batch)
    model.update_bank()
    (logits, _), _ = dense(model, batch)
    mlm = F.cross_entropy(logits, batch["labels"][batch["labels"] != IGNORED])
    assert set(outputs) == {"loss"}
    torch.testing.assert_close(outputs["loss"].double(), mlm, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.contrast.bank.rows, before)


def test_queue_holds_the_newest_teacher_embeddings_in_order():
    """Of micro-batches as of the large batch; it changes after the step, not before."""
    batches = [make_batch(seed) for seed in range(3)]
    large, small = make().train(), make().train()
    expected = []
    for batch in batches:
        _, (_, features) = dense(large, batch)
        expected.append(embedding(large.contrast.teacher_projection, features))
        large(**batch)
        for half in (slice(None, 2), slice(2, None)):
            before = small.contrast.bank.keys
            small(**{name: rows[half] for name, rows in batch.items()})
            assert torch.equal(small.contrast.bank.keys, before)
        for model in (large, small):
            model.update_bank()
    expected = torch.cat(expected)[-10:]  # 18 of them, the queue has 10 rows
    for model in (large, small):
        keys = model.contrast.bank.keys
        torch.testing.assert_close(keys.double(), expected, rtol=1e-4, atol=1e-6)


OPTIONS = {
    "both sides": {"both_sides": True},
    "drawn": {"num_negatives": 3},
    "nce": {"objective": "nce", "bank_init": "random"},
    "fidelity": {"standardize_features": True, "head_init": "equal", "train_heads": False},
    "each layer": {"contrast_layers": "each"},
    "last layer, first token": {"layer_mapping": "last", "pooling": "first"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_contrastive_term(name):
    model = started(**OPTIONS[name])
    outputs = model(**make_batch())
    outputs["loss"].backward()
    assert outputs["codir"] > 0 and outputs["loss"].isfinite()
    heads = [p for key, p in model.contrast.named_parameters() if "projection" in key]
    assert heads and all((p.grad is not None) == (name != "fidelity") for p in heads)


def test_drawn_negatives_are_filled_rows():
    model = started(num_negatives=4, queue_size=50)
    drawn = model.contrast._picks(model.contrast.bank, BATCH, {})["negative_index"]
    assert drawn.shape == (BATCH, 4) and model.contrast.bank.valid[drawn].all()


def test_standardised_features_are_those_of_the_masked_texts():
    model = make(standardize_features=True).train()
    with pytest.raises(ValueError, match="needs fit_features before training"):
        model(**make_batch())
    batches = [make_batch(0), make_batch(1)]
    model.fit_features(batches)
    features = torch.cat([dense(model, batch)[1][1] for batch in batches])
    mean, deviation = features.mean(0), features.std(0, correction=0)
    part = model.contrast.teacher_features
    torch.testing.assert_close(part.mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.deviation.double(), deviation, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mlm_weight", -1.0),
        ("kd_weight", math.nan),
        ("mlm_probability", 0.0),
        ("mlm_probability", 1.1),
        ("mlm_probability", math.nan),
        ("queue_size", 0),
        ("objective", "margin"),
        ("contrast_layers", "some"),
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must"):
        PretrainingConfig(**{field: value})


@pytest.mark.parametrize("field", ["ce_weight", "negatives", "positive", "bank_momentum"])
def test_config_has_no_field_that_a_queue_could_not_follow(field):
    with pytest.raises(TypeError, match=field):
        PretrainingConfig(**{field: 1})


def test_config_without_any_loss_is_refused():
    with pytest.raises(ValueError, match="`mlm_weight`, `kd_weight`.* no loss is left"):
        PretrainingConfig(mlm_weight=0, kd_weight=0, codir_weight=0)


def test_config_is_saved_and_read(tmp_path):
    config = PretrainingConfig(codir_weight=0.3, queue_size=7)
    config.save(tmp_path)
    assert (tmp_path / "pretraining.json").is_file()
    assert PretrainingConfig.load(tmp_path) == config
