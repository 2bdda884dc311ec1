"""A run that is resumed with other data, fewer steps or another model is told so in one line, and
its output folder stays as it is.
"""

import json

import pytest
import torch
from datasets import Dataset, Features, List, Value
from test_checkpoint import plain_trainer, tokenized_rows
from tiny import LABELS as NAMES
from tiny import WORDS, tiny_config, write_texts
from transformers import BertForSequenceClassification

from codir_fast.cli import main
from codir_fast.distillation.checkpointed_trainer import STATE_FILE
from codir_fast.distillation.fingerprint import hash_columns, hash_file, hash_tokens
from codir_fast.distillation.fixed_settings import LABELS, TOKENS
from codir_fast.distillation.loading import load_weights
from codir_fast.distillation.manifest import MANIFEST, read_manifest, write_manifest
from codir_fast.distillation.training_state import load_tree, save_tree
from codir_fast.errors import UsageError

STEPS = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2}


def call(command, output, **flags):
    flags = {"output_dir": output, "use_cpu": True, "report_to": "none", **STEPS, **flags}
    return main([command, *(part for f, x in flags.items() for part in (f"--{f}", str(x)))])


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return path


def rows_of(count):
    return [[WORDS[n % 20], NAMES[n % 2]] for n in range(count)]


def change_text(rows):
    rows[2 * len(rows) // 3 + 1][0] += " w3"


def change_label(rows):
    rows[5][1], rows[6][1] = rows[6][1], rows[5][1]


@pytest.mark.parametrize(
    ("command", "count", "change", "message"),
    [
        ("finetune", 2000, change_text, "the tokens of the training examples are others"),
        ("finetune", 40, change_label, "the labels of the training examples are others"),
        ("distill", 40, change_label, "the labels of the training examples are others"),
    ],
)
def test_one_other_row_is_seen(command, count, change, message, folder, tmp_path, capsys):
    models = {
        "finetune": {"model_name_or_path": folder / "teacher"},
        "distill": {"teacher": folder / "teacher", "student_layers": 2, "codir_weight": 0},
    }
    rows = rows_of(count)
    flags = models[command] | {"train_file": write_rows(tmp_path / "a.jsonl", rows)}
    output = tmp_path / "out"
    assert call(command, output, **flags, max_steps=2) == 0
    change(rows)
    before = contents(output)
    other = flags | {"train_file": write_rows(tmp_path / "b.jsonl", rows), "max_steps": 3}
    capsys.readouterr()
    assert call(command, output, **other, resume_from_checkpoint=True) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("codir-fast: error: `resume_from_checkpoint` does") and message in error
    assert contents(output) == before
    assert call(command, output, **flags | {"max_steps": 3}, resume_from_checkpoint=True) == 0


def test_another_stream_is_seen(corpus, tmp_path, capsys):
    texts = write_texts(tmp_path / "a.txt", 40, seed=1)
    other = write_texts(tmp_path / "b.txt", 40, seed=2)
    flags = {"student": corpus / "encoder", "train_file": texts, "streaming": True}
    output = tmp_path / "out"
    assert call("pretrain", output, **flags, max_steps=2) == 0
    before = contents(output)
    for change, message in (
        ({"shuffle_buffer": 7}, "`shuffle_buffer` was 10000, and is 7 now"),
        ({"max_seq_length": 5}, "`max_seq_length` was 32, and is 5 now"),
        ({"max_train_samples": 9}, "`max_train_samples` was None, and is 9 now"),
        ({"train_file": other}, "the contents of `train_file` are others"),
    ):
        changed = flags | {"max_steps": 3, "resume_from_checkpoint": True} | change
        capsys.readouterr()
        assert call("pretrain", output, **changed) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert contents(output) == before
    moved = tmp_path / "moved.txt"
    texts.rename(moved)
    flags |= {"train_file": moved, "max_steps": 3, "resume_from_checkpoint": True}
    assert call("pretrain", output, **flags) == 0


def test_a_run_does_not_end_before_its_checkpoint(folder, tmp_path, capsys):
    flags = {"model_name_or_path": folder / "teacher", "train_file": folder / "train.csv"}
    output = tmp_path / "out"
    assert call("finetune", output, **flags, max_steps=8) == 0
    before = contents(output)
    for steps in ({"max_steps": 7}, {"num_train_epochs": 1}):  # an epoch has 6
        capsys.readouterr()
        assert call("finetune", output, **flags, **steps, resume_from_checkpoint=True) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "checkpoint-8: it has 8 steps, and this run ends after " in error
        assert contents(output) == before


def test_checkpoint_of_before_there_were_labels_resumes(tmp_path):
    """Its tokens are those of some examples, hashed in another way."""
    rows = Dataset.from_list(tokenized_rows())
    plain_trainer(tmp_path, rows=rows).train()
    checkpoint = tmp_path / "checkpoint-7"
    tree = load_tree(checkpoint / STATE_FILE)
    del tree["settings"][LABELS]
    tree["settings"][TOKENS] = hash_tokens(rows)
    save_tree(tree, checkpoint / STATE_FILE)
    order = read_manifest(checkpoint)["order"]
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, order)
    other = Dataset.from_list(tokenized_rows()[::-1])
    with pytest.raises(UsageError, match=f"{TOKENS} are others"):
        plain_trainer(tmp_path / "other", rows=other).train(str(checkpoint))
    again = plain_trainer(tmp_path / "again", rows=rows).train(str(checkpoint))
    assert again.global_step == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, r"lacks weights of this run's model: (bert\S+ ){3}and 29 more$"),
        ({"num_hidden_layers": 5}, r"weights that this run's model has not: (bert\S+ ){3}and 13 "),
        ({"num_labels": 3}, r"classifier.weight is \(3, 16\), here \(2, 16\), classifier.bias is"),
        ({"hidden_size": 8}, r"word_embeddings.weight is \(44, 8\), here \(44, 16\), .* more$"),
    ],
)
def test_another_model_is_told_shortly(changes, message, tmp_path):
    config = tiny_config(**changes) if "num_labels" not in changes else tiny_config()
    config.num_labels = changes.get("num_labels", config.num_labels)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(BertForSequenceClassification(tiny_config()), tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_hash_is_of_all_numbers_and_not_of_how_they_are_stored():
    rows = [{"input_ids": [n, 2 * n][: 1 + n % 2], "labels": n / 4} for n in range(25_000)]
    whole = Dataset.from_list(rows)
    features = Features({"input_ids": List(Value("int32")), "labels": Value("float32")})
    names = ["input_ids", "labels"]
    wanted = hash_columns(whole, names)
    assert hash_columns(Dataset.from_list(rows, features), names) == wanted
    order = torch.randperm(len(rows)).tolist()
    back = torch.tensor(order).argsort().tolist()
    assert hash_columns(whole.select(order).select(back), names) == wanted
    assert hash_columns(whole.select(order), names) != wanted
    for n in (0, 12_345, len(rows) - 1):
        for change in ({"input_ids": [7]}, {"labels": 0.1}):
            other = [*rows[:n], rows[n] | change, *rows[n + 1 :]]
            assert hash_columns(Dataset.from_list(other), names) != wanted
    split = [{"input_ids": [1]}, {"input_ids": [2, 3]}], [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    one, another = (hash_columns(Dataset.from_list(part), ["input_ids"]) for part in split)
    assert one != another
    words = [Dataset.from_dict({"label": ["a", text]}) for text in ("b", "c")]
    assert len({hash_columns(part, ["label"]) for part in words}) == 2


def test_hash_of_a_file_is_of_its_contents(tmp_path):
    for name, data in (("a", b"x" * 3_000_000), ("b", b"x" * 2_999_999 + b"y")):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes())
    a, b, c = (hash_file(str(tmp_path / name)) for name in "abc")
    assert a == c != b
