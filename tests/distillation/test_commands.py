"""finetune, distill and evaluate as a user calls them, and every error as one line."""

import json
import shutil

import pytest
import torch
from tiny import make_tokenizer, tiny_config, write_examples
from transformers import BertForSequenceClassification, BertModel, TrainingArguments

from codir_fast.cli import main
from codir_fast.distillation.arguments import TextArguments
from codir_fast.distillation.config import PRESETS
from codir_fast.distillation.data import read_file, select_columns, tokenize
from codir_fast.distillation.manifest import write_manifest

FAST = ["--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--use_cpu"]


def files(folder):
    return [
        *("--train_file", str(folder / "train.csv")),
        *("--validation_file", str(folder / "validation.csv")),
    ]


def test_finetune_distill_evaluate(folder, tmp_path, capsys):
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    encoder = str(folder / "teacher")
    command = ["finetune", "--model_name_or_path", encoder, "--output_dir", teacher]
    assert main([*command, *files(folder), *FAST]) == 0
    command = ["distill", "--teacher", teacher, "--student_layers", "2", "--output_dir", student]
    assert main([*command, *files(folder), *FAST, "--codir_weight", "0.2"]) == 0
    settings = json.loads((tmp_path / "student" / "distillation.json").read_text())
    assert settings["codir_weight"] == 0.2
    metrics = json.loads((tmp_path / "student" / "metrics.json").read_text())
    capsys.readouterr()

    test_file = str(folder / "validation.csv")
    assert main(["evaluate", "--model_name_or_path", student, "--test_file", test_file]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    result = json.loads(printed)
    assert set(result) == {"accuracy", "n", "loss", "milliseconds_per_sentence"}
    assert result["n"] == 20
    assert result["accuracy"] == pytest.approx(metrics["eval_accuracy"])
    assert result["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-3)

    before = (tmp_path / "student" / "model.safetensors").read_bytes()
    command = ["distill", "--teacher", teacher, "--student_layers", "2", "--output_dir", student]
    assert main([*command, *files(folder), *FAST]) == 2
    assert "give --overwrite_output_dir" in capsys.readouterr().err
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == before
    resume = [*FAST, "--resume_from_checkpoint", "True"]
    assert main([*command, *files(folder), *resume]) == 0  # all steps are done: nothing changes
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == before


def test_split_string_labels_json_and_student_checkpoint(folder, tmp_path):
    write_examples(tmp_path / "all.csv", 40, seed=3)
    rows = [line.rsplit(",", 1) for line in (tmp_path / "all.csv").read_text().splitlines()[1:]]
    lines = [json.dumps({"sentence": text, "class": label}) for text, label in rows]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    shutil.copytree(folder / "teacher", tmp_path / "other")
    arguments = [
        *("--teacher", str(folder / "teacher"), "--student", str(tmp_path / "other")),
        *("--train_file", str(tmp_path / "all.jsonl"), "--validation_split", "0.2"),
        *("--text_column", "sentence", "--label_column", "class", "--max_train_samples", "24"),
        *("--output_dir", str(tmp_path / "out"), "--layer_mapping", "last"),
    ]
    assert main(["distill", *arguments, *FAST]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "eval_accuracy" in metrics


ERRORS = {
    "missing train file": ({"--train_file": "nowhere.csv"}, "`train_file` must be an existing"),
    "missing validation file": ({"--validation_file": "no.csv"}, "`validation_file` must be an"),
    "unknown format": ({"--train_file": "FOLDER/teacher/config.xml"}, "`train_file` must end in"),
    "no such column": ({"--text_column": "sentence"}, "`train_file` has no column 'sentence'"),
    "no such label column": ({"--label_column": "y"}, "`train_file` has no column 'y'"),
    "no model": ({"--teacher": "FOLDER/empty"}, "`teacher` must be a model"),
    "no folder": ({"--teacher": "./nowhere"}, "`teacher` must be a model's folder or hub name"),
    "too many layers": ({"--student_layers": "9"}, "`student_layers` must be in [1, 4]"),
    "no layers": ({"--student_layers": "0"}, "`student_layers` must be in [1, 4]"),
    "not a number": ({"--student_layers": "many"}, "--student_layers"),
    "negative weight": ({"--kd_weight": "-1"}, "`kd_weight` must be 0 or more"),
    "temperature 0": ({"--temperature": "0"}, "`temperature` must be positive"),
    "temperature nan": ({"--temperature": "nan"}, "`temperature` must be positive"),
    "unknown preset": (
        {"--preset": "mine"},
        "`preset` must be one of ('paper', 'official', 'fidelity')",
    ),
    "unknown objective": ({"--objective": "margin"}, "`objective` must be one of"),
    "unknown positive": ({"--positive": "none"}, "`positive` must be one of"),
    "unknown negatives": ({"--negatives": "own"}, "`negatives` must be one of"),
    "fewer than no negatives": ({"--num_negatives": "-1"}, "`num_negatives` must be 0 or more"),
    "unknown bank": ({"--bank_init": "full"}, "`bank_init` must be one of"),
    "unknown head": ({"--head_init": "same"}, "`head_init` must be one of"),
    "negative pkd": ({"--pkd_weight": "-1"}, "`pkd_weight` must be 0 or more"),
    "no loss": ({"--ce_weight=0": "--kd_weight=0", "--codir_weight": "0"}, "no loss is left"),
    "unknown pooling": ({"--pooling": "sum"}, "`pooling` must be one of"),
    "unknown flag": ({"--learning_speed": "1"}, "--learning_speed"),
    "output is a file": ({"--output_dir": "FOLDER/train.csv"}, "`output_dir` must be a folder"),
    "output is used": ({"--output_dir": "FOLDER/teacher"}, "`output_dir` must be empty"),
    "no checkpoint": ({"--resume_from_checkpoint": "True"}, "found no checkpoint"),
    "bad split": ({"--validation_split": "1.5"}, "`validation_split` must be in [0, 1)"),
    "bad model file": ({"--teacher": "FOLDER/garbled"}, "`teacher` can't be loaded from"),
    "no tokenizer": ({"--teacher": "FOLDER/mute"}, "`teacher` must have a tokenizer"),
    "garbled csv": ({"--train_file": "FOLDER/ragged.csv"}, "`train_file` can't be read as csv"),
    "no such pair": ({"--text_pair_column": "b"}, "has no column 'b' (`text_pair_column`)"),
    "a text with itself": ({"--text_pair_column": "text"}, "`text_pair_column` must not be the"),
    "a text with its label": (
        {"--text_pair_column": "label"},
        "`label_column` must not be the `text_pair_column`",
    ),
    "pair of numbers": (
        {"--train_file": "FOLDER/pairs.csv", "--text_pair_column": "number"},
        "`train_file` must hold texts, row 0 has 1",
    ),
    "one column": ({"--text_column": "label"}, "`label_column` must not be the `text_column`"),
    "nothing left": ({"--validation_split": "0.999"}, "`validation_split` 0.999 of 48 examples"),
    "output below a file": ({"--output_dir": "FOLDER/train.csv/x"}, "is no folder to write in"),
    "no checkpoint at all": (
        {"--resume_from_checkpoint": "FOLDER/teacher"},
        "`resume_from_checkpoint` must be the folder of a checkpoint",
    ),
    "another checkpoint": (
        {"--resume_from_checkpoint": "FOLDER/finetuned"},
        "so that it is of no distillation",
    ),
    "negative rate": ({"--learning_rate": "-1"}, "`learning_rate` must be in [0"),
    "rate nan": ({"--learning_rate": "nan"}, "`learning_rate` must be in [0"),
    "negative epochs": ({"--num_train_epochs": "-1"}, "`num_train_epochs` must be in [0"),
    "empty batch": (
        {"--per_device_train_batch_size": "0"},
        "`per_device_train_batch_size` must be in [1",
    ),
    "no accumulation": (
        {"--gradient_accumulation_steps": "0"},
        "`gradient_accumulation_steps` must be in [1",
    ),
    "negative seed": ({"--seed": "-1"}, "`seed` must be in [0, 4294967295]"),
    "unknown label": ({"--train_file": "FOLDER/strange.csv"}, "row 1 has the label 'neutral'"),
    "empty text": ({"--train_file": "FOLDER/hole.csv"}, "`train_file` must hold texts, row 0"),
    "nothing to evaluate on": ({"--eval_strategy": "epoch"}, "`eval_strategy` epoch needs"),
    "label smoothing": ({"--label_smoothing_factor": "0.1"}, "`label_smoothing_factor` is not"),
    "regression": ({"--train_file": "FOLDER/numbers.csv"}, "regression is not built yet"),
    "no rows": ({"--train_file": "FOLDER/none.csv"}, "`train_file`"),
}


@pytest.fixture(scope="module")
def broken(folder, tmp_path_factory):
    """The tiny folder with files that no run should accept."""
    path = tmp_path_factory.mktemp("broken")
    shutil.copytree(folder, path, dirs_exist_ok=True)
    (path / "empty").mkdir()
    for name in ("garbled", "mute", "finetuned"):
        shutil.copytree(folder / "teacher", path / name)
    (path / "garbled" / "model.safetensors").write_bytes(b"no tensors at all")
    for file in (path / "mute").glob("tokenizer*"):
        file.unlink()
    (path / "finetuned" / "trainer_state.json").write_text("{}")
    write_manifest(path / "finetuned", order=0)
    (path / "ragged.csv").write_text("text,label\nw1,positive\nw2,negative,more\n")
    (path / "teacher" / "config.xml").write_text("<a/>")
    (path / "strange.csv").write_text("text,label\nw1,positive\nw2,neutral\n")
    (path / "hole.csv").write_text("text,label\n,positive\nw2,negative\n")
    (path / "numbers.csv").write_text("text,label\nw1,0.5\nw2,1.5\n")
    (path / "pairs.csv").write_text("text,number,label\nw1,1,positive\nw2,2,negative\n")
    (path / "none.csv").write_text("text,label\n")
    return path


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line_with_exit_code_2(name, broken, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, message = ERRORS[name]
    given = {
        "--teacher": "FOLDER/teacher",
        "--student_layers": "2",
        "--train_file": "FOLDER/train.csv",
        "--output_dir": "out",
    } | changes
    arguments = [part.replace("FOLDER", str(broken)) for pair in given.items() for part in pair]
    before = sorted(broken.rglob("*"))
    assert main(["distill", *arguments, "--use_cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("codir-fast: error: ") and error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == [] and sorted(broken.rglob("*")) == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--neftune_noise_alpha", "5"],
        ["--batch_eval_metrics", "True", "--per_device_eval_batch_size", "8"],
        ["--eval_do_concat_batches", "False", "--per_device_eval_batch_size", "8"],
        ["--gradient_checkpointing", "True"],
        ["--bf16", "True"],
    ],
    ids=lambda flags: flags[0],
)
def test_flags_of_training_arguments_work(flags, folder, tmp_path):
    arguments = ["--teacher", str(folder / "teacher"), "--student_layers", "2"]
    output = ["--output_dir", str(tmp_path / "out")]
    assert main(["distill", *arguments, *files(folder), *FAST, *flags, *output]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 <= metrics["eval_accuracy"] <= 1


def write_pairs(path, count):
    """The label says whether both texts have the same word."""
    lines = [
        json.dumps(
            {
                "text": f"w{n % 3}",
                "pair": 0,
                "question": f"w{n % 7} w9",
                "same": ("no", "yes")[n % 3 == n % 7],
            }
        )
        for n in range(count)
    ]
    path.write_text("\n".join(lines))


def test_pairs_of_texts(folder, tmp_path, capsys):
    """Columns may have each other's names; a text that is cut leaves the other whole."""
    write_pairs(tmp_path / "pairs.jsonl", 42)
    columns = ["--text_column", "question", "--text_pair_column", "text"]
    columns += ["--label_column", "same", "--max_seq_length", "6"]
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    data = ["--train_file", str(tmp_path / "pairs.jsonl"), *columns]
    command = ["finetune", "--model_name_or_path", str(folder / "teacher")]
    assert main([*command, *data, *FAST, "--output_dir", teacher]) == 0
    command = ["distill", "--teacher", teacher, "--student_layers", "2"]
    assert main([*command, *data, *FAST, "--output_dir", student]) == 0
    capsys.readouterr()
    command = ["evaluate", "--model_name_or_path", student]
    assert main([*command, "--test_file", str(tmp_path / "pairs.jsonl"), *columns]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 42


def test_tokens_of_pairs(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 3)
    data = TextArguments(text_column="question", text_pair_column="text", label_column="same")
    examples = read_file("train_file", str(tmp_path / "pairs.jsonl"))
    examples = select_columns(examples, "train_file", data)
    assert examples[2] == {"text": "w2 w9", "pair": "w2", "label": "yes"}
    tokens = tokenize(examples, make_tokenizer(), [0, 1, 0], 32, 32)
    # [CLS] 2, [SEP] 3, words from 4 on
    assert tokens[2]["input_ids"] == [2, 6, 13, 3, 6, 3]
    assert tokens[2]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert set(tokens.column_names) >= {"labels", "index"} and "pair" not in tokens.column_names


@pytest.mark.parametrize("preset", [["--preset", "official"], ["--preset=official"]], ids=str)
def test_a_preset_gives_way_to_flags(preset, folder, tmp_path, capsys):
    arguments = ["--teacher", str(folder / "teacher"), "--student_layers", "2", *preset]
    arguments += ["--pooling", "mean", "--max_train_samples", "16"]
    output = ["--output_dir", str(tmp_path / "out")]
    assert main(["distill", *arguments, *files(folder), *FAST, *output]) == 0
    settings = json.loads((tmp_path / "out" / "distillation.json").read_text())
    expected = PRESETS["official"] | {"pooling": "mean"}
    assert {name: settings[name] for name in expected} == expected
    printed = capsys.readouterr().err
    assert all(f"{name} {value}" in printed for name, value in expected.items())


@pytest.mark.parametrize("command", ["finetune", "distill", "evaluate"])
def test_help_lists_the_flags(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: codir-fast {command} [--flag" in shown and "--max_seq_length" in shown
    for flag in ("--learning_rate", "--train_file"):
        assert (flag in shown) == (command != "evaluate")


def test_missing_required_flags(capsys):
    assert main(["distill", "--train_file", "x.csv"]) == 2
    assert "--teacher" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "--model_name_or_path" in capsys.readouterr().err


def test_several_gpus_are_refused_in_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    models = ["--teacher", str(folder / "teacher"), "--student_layers", "2"]
    assert main(["distill", *models, *files(folder), "--output_dir", str(tmp_path / "out")]) == 2
    assert "needs one GPU per process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_student_with_fewer_positions_cuts_the_texts(folder, tmp_path):
    torch.manual_seed(0)
    small = BertForSequenceClassification(tiny_config(max_position_embeddings=6))
    small.save_pretrained(tmp_path / "small")
    models = ["--teacher", str(folder / "teacher"), "--student", str(tmp_path / "small")]
    assert (
        main(["distill", *models, *files(folder), *FAST, "--output_dir", str(tmp_path / "o")]) == 0
    )


def test_encoder_without_classifier_is_no_teacher(folder, tmp_path, capsys):
    shutil.copytree(folder / "teacher", tmp_path / "encoder")
    BertModel.from_pretrained(folder / "teacher").save_pretrained(tmp_path / "encoder")
    arguments = ["--teacher", str(tmp_path / "encoder"), "--student_layers", "2"]
    output = ["--output_dir", str(tmp_path / "out")]
    assert main(["distill", *arguments, *files(folder), *output]) == 2
    assert "`teacher` must be a fine-tuned classifier" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluate_beside_a_teacher(folder, tmp_path, capsys):
    torch.manual_seed(4)
    student = BertForSequenceClassification(tiny_config(num_hidden_layers=2)).eval()
    with torch.no_grad():  # sure of itself, so that the two differ
        student.classifier.weight *= 100
    student.save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    test_file = str(folder / "validation.csv")
    command = ["evaluate", "--test_file", test_file, "--device", "cpu", "--batch_size", "6"]
    command += ["--model_name_or_path", str(tmp_path / "student")]
    assert main([*command, "--teacher", str(folder / "teacher")]) == 0
    result = json.loads(capsys.readouterr().out)

    teacher = BertForSequenceClassification.from_pretrained(folder / "teacher").eval()
    texts = read_file("test_file", test_file)["text"]
    tokens = make_tokenizer()(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (side(**tokens).logits.double().softmax(1) for side in (student, teacher))
    agreement = (ours.argmax(1) == theirs.argmax(1)).double().mean()
    assert result["agreement"] == pytest.approx(float(agreement))
    kl = (theirs * (theirs / ours).log()).sum(1).mean()
    assert result["kl"] == pytest.approx(float(kl), rel=1e-4)

    assert main([*command, "--teacher", str(tmp_path / "student")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["agreement"] == 1 and abs(result["kl"]) < 1e-6
    other = tiny_config(label2id={"no": 0, "yes": 1}, id2label={0: "no", 1: "yes"})
    BertForSequenceClassification(other).save_pretrained(tmp_path / "other")
    assert main([*command, "--teacher", str(tmp_path / "other")]) == 2
    assert "`teacher` must have the model's labels" in capsys.readouterr().err


def test_evaluate_refuses_a_missing_test_file(folder, capsys):
    model = str(folder / "teacher")
    assert main(["evaluate", "--model_name_or_path", model, "--test_file", "no.csv"]) == 2
    assert "`test_file` must be an existing file" in capsys.readouterr().err
