"""README.md of a model: what the hub reads, what it tells, that its code runs, and whose it is."""

import re
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from test_trainer import make_trainer
from tiny import make_tokenizer, tiny_config
from transformers import BertForMaskedLM, BertForSequenceClassification, TrainingArguments

from codir_fast.cli import main
from codir_fast.distillation.arguments import DataArguments
from codir_fast.distillation.distill import DistillArguments
from codir_fast.distillation.finetune import FinetuneArguments
from codir_fast.distillation.model_card import model_card, write_model_card
from codir_fast.distillation.run_settings import run_settings
from codir_fast.distillation.trainer import DistillationTrainer
from codir_fast.distillation.training import train_and_save

FAST = ["--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--use_cpu"]


def distill(folder, output, *flags):
    return main(
        [
            *("distill", "--teacher", str(folder / "teacher"), "--student_layers", "2"),
            *("--train_file", str(folder / "train.csv"), "--output_dir", str(output)),
            *("--validation_file", str(folder / "validation.csv"), *FAST, *flags),
        ]
    )


@pytest.fixture(scope="module")
def student(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("card") / "student"
    assert distill(folder, path, "--codir_weight", "0.25") == 0
    return path


def run_of(command, origin, data=None):
    data = DataArguments(**{"train_file": "train.csv"} | (data or {}))
    training = TrainingArguments("out", use_cpu=True)
    return run_settings(command, model=origin, data=data, training=training)


def card_of(command="finetune", model=None, origin=None, data=None):
    """The text of a card for settings as given."""
    model = model or BertForSequenceClassification(tiny_config())
    run = run_of(command, origin or FinetuneArguments("encoder"), data)
    return model_card(model, run, {}, train_size=48, eval_size=None)


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_card_of_a_student(student):
    card = ModelCard.load(student / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["distill", "codir-fast", "knowledge-distillation", "codir"],
        "metrics": ["accuracy"],
    }
    model = BertForSequenceClassification(tiny_config(num_hidden_layers=2))
    size = sum(p.numel() for p in model.parameters())
    for part in (
        f"A text classifier of {size / 1e6:.1f} million parameters in 2 layers, distilled from a "
        "model in the folder teacher",
        "On train.csv, 48 examples.",
        "| `codir_weight` | 0.25 |",
        "| `layer_mapping` | uniform |",
        "| `seed` | 42 |",
        "At the end of the run, on validation.csv, 20 examples:",
        "| `accuracy` | ",
        "Labels: negative, positive.",
        f"torch {torch.__version__}",
    ):
        assert part in card.text
    assert str(student.parent) not in card.content  # a machine's folders are not the reader's
    assert "runtime" not in card.text


def run_code_of(text, folder, monkeypatch, capsys):
    """What the card's code prints in the folder of the card, where codir_fast is not installed."""
    code = re.search(r"```python\n(.*?)```", text, re.S)
    with monkeypatch.context() as here:
        here.chdir(folder)
        here.setitem(sys.modules, "codir_fast", None)
        capsys.readouterr()
        exec(code[1], {})
    return capsys.readouterr().out


def test_code_of_the_card_loads_the_student(student, monkeypatch, capsys):
    printed = run_code_of((student / "README.md").read_text(), student, monkeypatch, capsys)
    assert printed in ("negative\n", "positive\n")


@pytest.mark.parametrize(
    ("kind", "changes", "pipeline"),
    [
        (BertForMaskedLM, {}, "fill-mask"),
        (BertForSequenceClassification, {"num_labels": 1}, "text-classification"),
        (BertForSequenceClassification, {}, "text-classification"),
    ],
    ids=["language model", "regression", "pairs"],
)
def test_code_of_other_models_runs(kind, changes, pipeline, tmp_path, monkeypatch, capsys):
    labels = {} if changes else {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    model = kind(tiny_config(**changes, **labels))
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "w7"})
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    text = card_of(model=model, data={"text_pair_column": "answer"})
    assert header(text)["pipeline_tag"] == pipeline
    printed = run_code_of(text, tmp_path, monkeypatch, capsys)
    if kind is BertForMaskedLM:
        assert printed.strip() in [*make_tokenizer().vocab, "w7"]
    elif changes:
        float(printed)
    else:
        assert printed in ("no\n", "yes\n") and 'tokenizer("A text.", "Another.", ' in text
    assert ("Labels: " in text) == (kind is not BertForMaskedLM and not changes)


def test_card_of_a_teacher(folder, tmp_path):
    teacher = tmp_path / "teacher"
    assert (
        main(
            [
                *("finetune", "--model_name_or_path", str(folder / "teacher"), *FAST),
                *("--train_file", str(folder / "train.csv"), "--output_dir", str(teacher)),
            ]
        )
        == 0
    )
    card = ModelCard.load(teacher / "README.md")
    assert card.data.tags == ["finetune", "codir-fast"] and card.data.metrics is None
    assert "fine-tuned from a model in the folder teacher" in card.text
    assert "## Evaluation" not in card.text  # there was none


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ("org/teacher-1.0", None, "org/teacher-1.0"),
        ("bert", "org/small", ["bert", "org/small"]),
        ("FOLDER", "org/small", "org/small"),
        ("FOLDER", None, None),
        ("../teacher", None, None),
        ("org/teacher: x\nlicense: mit", None, None),
    ],
    ids=str,
)
def test_base_models_are_those_of_the_hub(teacher, student, expected, tmp_path):
    layers = None if student else 2
    models = DistillArguments(teacher.replace("FOLDER", str(tmp_path)), layers, student)
    text = card_of("distill", origin=models)
    assert header(text).get("base_model") == expected
    assert set(header(text)) <= {"library_name", "pipeline_tag", "tags", "base_model"}
    for name in [expected] if isinstance(expected, str) else expected or []:
        assert f"[{name}](https://huggingface.co/{name})" in text


def test_data_set_of_the_hub_is_named():
    text = card_of(data={"train_file": None, "dataset_name": "org/data"})
    assert header(text)["datasets"] == ["org/data"] and "On org/data, 48 examples." in text


def test_text_of_users_stays_text():
    nasty = "a|b](http://x) <script>alert(1)</script> `c` **d**\n\n---\nlicense: mit\n# e"
    model = BertForSequenceClassification(tiny_config(id2label={0: nasty, 1: "fine"}))
    text = card_of(
        model=model, data={"train_file": f"/data/{nasty.replace('/', '-')}", "label_column": "y"}
    )
    assert "license" not in header(text)
    assert "<script>" not in text and "&lt;script&gt;" in text
    body = text.split("---\n", 2)[2]
    assert "\n# e" not in body and "\n---\n" not in body  # one line each
    assert r"a\|b\](http://x)" in body and r"\`c\` \*\*d\*\*" in body


def test_next_run_replaces_an_unchanged_card_alone(folder, tmp_path, capsys):
    run = run_of("distill", DistillArguments("teacher", 2))
    card, trainer = tmp_path / "README.md", make_trainer(folder, tmp_path)
    write_model_card(trainer, run, {"eval_accuracy": 0.5})
    first = card.read_text()
    assert "| `accuracy` | 0.5000 |" in first
    write_model_card(trainer, run, {"eval_accuracy": 0.75})
    assert "| `accuracy` | 0.7500 |" in card.read_text()
    assert "is left as it is" not in capsys.readouterr().err

    mine = (b"# mine\n", b"", b"\xff\xfe", first.replace("## Use", "## How to use").encode())
    for kept in mine:
        card.write_bytes(kept)
        write_model_card(trainer, run, {"eval_accuracy": 0.25})
        assert card.read_bytes() == kept
        assert f"{card} is left as it is" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_other_processes_write_nothing(folder, tmp_path, monkeypatch):
    run = run_of("distill", DistillArguments("teacher", 2))
    trainer = make_trainer(folder, tmp_path)
    monkeypatch.setattr(DistillationTrainer, "is_world_process_zero", lambda self: False)
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    train_and_save(trainer, trainer.args, None, run)
    assert list(tmp_path.iterdir()) == []


def test_a_push_keeps_the_card(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    trainer.create_model_card(model_name="name")  # what push_to_hub does first
    assert (tmp_path / "README.md").read_text() == "mine"
