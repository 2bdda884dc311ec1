"""PretrainingTrainer: what is masked, exact repetition and resume, the queue, evaluation."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import MASKED_VOCABULARY, make_masking_tokenizer, make_tokenizer
from transformers import (
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    TrainingArguments,
    set_seed,
)

from codir_fast import PretrainingConfig, PretrainingModel, PretrainingTrainer
from codir_fast.distillation import masked_lm_trainer
from codir_fast.distillation.arguments import CorpusArguments
from codir_fast.distillation.data import tokenize_texts
from codir_fast.distillation.masked_lm import IGNORED
from codir_fast.distillation.student import student_from_teacher
from codir_fast.distillation.texts import load_texts

STEPS = 7  # of 8 texts: the 40 texts and some again


def make_trainer(corpus, output, *, config=None, streaming=False, dropout=True, **training):
    set_seed(5)
    teacher = BertForMaskedLM.from_pretrained(corpus / "mlm")
    if not dropout:
        teacher.config.hidden_dropout_prob = teacher.config.attention_probs_dropout_prob = 0.0
    tokenizer = make_masking_tokenizer()
    file = str(corpus / "texts.txt")
    data = CorpusArguments(train_file=file, streaming=streaming, shuffle_buffer=16)
    train, _ = load_texts(data, seed=5)
    validation, _ = load_texts(CorpusArguments(train_file=file), seed=5)
    config = PretrainingConfig(**({"projection_dim": 8, "queue_size": 30} | (config or {})))
    defaults = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 7,  # the last batch is smaller
        "max_steps": STEPS,
        "save_strategy": "no",
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
    }
    return PretrainingTrainer(
        PretrainingModel(student_from_teacher(teacher, 2), teacher, config),
        TrainingArguments(str(output), **(defaults | training)),
        train_dataset=tokenize_texts(train, tokenizer, 16),
        eval_dataset=tokenize_texts(validation, tokenizer, 16),
        processing_class=tokenizer,
    )


def record(trainer, name):
    """The batches that a method of the trainer is given, or gives for `_mask`."""
    seen, method = [], getattr(trainer, name)

    def recorded(*args, **kwargs):
        result = method(*args, **kwargs)
        seen.append(result if name == "_mask" else args[1])
        return result

    setattr(trainer, name, recorded)
    return seen


def assert_same_state(one, other):
    one, other = one.model.state_dict(), other.model.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_masking_is_that_of_bert(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path)
    tokens = torch.randint(4, 40, (400, 100))
    tokens[:, 0], tokens[:, 50], tokens[:, 90:] = 2, 3, 0  # [CLS], [SEP], [PAD]
    masked = trainer._mask({"input_ids": tokens, "attention_mask": tokens != 0})
    labels, found = masked["labels"], masked["input_ids"]
    is_masked = labels != IGNORED
    is_special = tokens < 4
    assert not (is_masked & is_special).any()
    assert torch.equal(labels[is_masked], tokens[is_masked])
    assert torch.equal(found[~is_masked], tokens[~is_masked])
    share = is_masked.sum() / (~is_special).sum()
    assert abs(share - 0.15) < 0.01
    replaced = (found[is_masked] == MASKED_VOCABULARY - 1).float().mean()
    kept = (found[is_masked] == tokens[is_masked]).float().mean()
    assert abs(replaced - 0.8) < 0.03 and abs(kept - 0.1) < 0.03
    assert torch.equal(masked["attention_mask"], tokens != 0)


def test_texts_are_masked_anew_in_each_epoch(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path, per_device_train_batch_size=40, max_steps=2)
    seen = record(trainer, "_mask")
    trainer.train()
    texts = []
    for batch in seen:
        whole = torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])
        order = sorted(range(40), key=lambda n, whole=whole: whole[n].tolist())
        texts.append((whole[order], batch["labels"][order]))
    (one, first), (other, second) = texts
    assert torch.equal(one, other) and not torch.equal(first, second)


@pytest.mark.parametrize("streaming", [False, True])
def test_two_runs_with_one_seed_are_bit_equal(corpus, tmp_path, streaming):
    runs = []
    for name in ("a", "b"):
        runs.append(make_trainer(corpus, tmp_path / name, streaming=streaming))  # seeds
        runs[-1].train()
    assert_same_state(*runs)
    assert runs[0].model.contrast.bank.valid.all()


RESUMED = {
    "paper": {},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "stream": {"streaming": True},
    "stream, accumulated": {
        "streaming": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    },
    "standardised": {
        "config": {"standardize_features": True, "head_init": "equal", "train_heads": False}
    },
    "drawn": {"config": {"num_negatives": 4, "both_sides": True, "objective": "nce"}},
    "evaluated on the way": {"eval_strategy": "steps", "eval_steps": 2},
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("checkpoint", [3, 6])  # in the first and in the second epoch
def test_resumed_run_is_bit_equal_to_the_unbroken_one(corpus, tmp_path, name, checkpoint):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 9} | RESUMED[name]
    unbroken = make_trainer(corpus, tmp_path / "unbroken", **settings)
    unbroken.train()
    resumed = make_trainer(corpus, tmp_path / "resumed", **settings)
    seen = record(resumed, "training_step")
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / f"checkpoint-{checkpoint}"))
    assert len(seen) == (9 - checkpoint) * settings.get("gradient_accumulation_steps", 1)
    assert_same_state(unbroken, resumed)


def test_a_stream_goes_on_where_it_was_and_starts_over_at_its_end(corpus, tmp_path):
    whole = make_trainer(corpus, tmp_path, streaming=True, max_steps=10)
    seen = record(whole, "training_step")
    whole.train()
    assert len(seen) == 10 and all(len(batch["input_ids"]) == 8 for batch in seen)  # 80 of 40


def test_accumulated_batches_enter_the_queue_as_the_large_batch(corpus, tmp_path):
    runs = []
    for pieces in (1, 2):
        run = make_trainer(
            corpus,
            tmp_path / str(pieces),
            config={"queue_size": 20},
            dropout=False,
            learning_rate=0.0,
            max_steps=3,
            per_device_train_batch_size=8 // pieces,
            gradient_accumulation_steps=pieces,
        )
        run._masking = DataCollatorForLanguageModeling(  # the same masks for both
            run.processing_class, mlm_probability=1.0, mask_replace_prob=1.0, random_replace_prob=0
        )
        run.train()
        runs.append(run.model.contrast.bank)
    large, accumulated = runs
    assert large.position == accumulated.position == 24 % 20
    torch.testing.assert_close(large.rows, accumulated.rows, rtol=1e-4, atol=1e-5)
    assert (large.rows[1:] - large.rows[:-1]).abs().max() > 1e-3


def test_evaluation_is_repeatable_and_leaves_training_alone(corpus, tmp_path):
    evaluated = make_trainer(corpus, tmp_path / "a", eval_strategy="steps", eval_steps=1)
    evaluated.train()
    plain = make_trainer(corpus, tmp_path / "b")  # seeds
    plain.train()
    assert_same_state(evaluated, plain)
    results = [evaluated.evaluate(), evaluated.evaluate()]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]


def test_evaluation_counts_each_masked_token_once(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path)
    seen = record(trainer, "_mask")
    result = trainer.evaluate()
    assert [len(batch["labels"]) for batch in seen] == [7] * 5 + [5]
    student, losses = trainer.model.student.double().eval(), []
    for batch in seen:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            logits = student(**inputs).logits
        is_masked = batch["labels"] != IGNORED
        targets = batch["labels"][is_masked]
        losses.append(F.cross_entropy(logits[is_masked], targets, reduction="none"))
    expected = float(torch.cat(losses).mean())
    means = torch.stack([part.mean() for part in losses]).mean()
    assert abs(means - expected) > 1e-4  # so that the mean of the batches' would be told apart
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_log_has_every_term(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path, config={"pkd_weight": 0.5})
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == STEPS // 2
    for row in rows:
        weighted = row["mlm"] + row["kd"] + 0.1 * row["codir"] + 0.5 * row["pkd"]
        assert row["loss"] == pytest.approx(weighted, rel=1e-3)


def test_features_are_standardised_over_the_first_texts(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(masked_lm_trainer, "FEATURE_TEXTS", 20)
    for streaming in (False, True):
        trainer = make_trainer(
            corpus, tmp_path, config={"standardize_features": True}, streaming=streaming
        )
        seen = record(trainer, "_mask")
        trainer.train()
        assert len(seen) == 3 + STEPS and seen[0]["labels"].max() > 0
        assert not trainer.model.needs_features


def test_what_the_trainer_can_not_follow_is_refused(corpus, tmp_path):
    model = make_trainer(corpus, tmp_path).model
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="`processing_class` must be a tokenizer, got NoneType"):
        PretrainingTrainer(model, args)
    with pytest.raises(ValueError, match="mask token"):
        PretrainingTrainer(model, args, processing_class=make_tokenizer())
    tokenizer = make_masking_tokenizer()
    with pytest.raises(ValueError, match="`compute_metrics` must be None"):
        PretrainingTrainer(model, args, processing_class=tokenizer, compute_metrics=lambda _: {})
    with pytest.raises(ValueError, match="`model` must be a PretrainingModel, got Linear"):
        PretrainingTrainer(torch.nn.Linear(2, 2), args, processing_class=tokenizer)
    trainer = PretrainingTrainer(model, args, processing_class=tokenizer)
    with pytest.raises(ValueError, match="must come without labels"):
        trainer._mask({"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2)})
