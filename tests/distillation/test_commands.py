"""finetune, distill and evaluate as a user calls them, and every error as one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import files_up_to
from tiny import make_tokenizer, tiny_config, write_examples
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    TrainingArguments,
)

from codir_fast.cli import main
from codir_fast.distillation.arguments import DataArguments, TextArguments
from codir_fast.distillation.config import PRESETS
from codir_fast.distillation.data import (
    load_examples,
    read_file,
    select_columns,
    tokenize,
    tokenize_texts,
)
from codir_fast.distillation.labels import check_label_column
from codir_fast.errors import UsageError

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_checkpoints_in_half_precision_are_trained_in_float32(dtype, folder, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(folder / "teacher", half)
    AutoModelForSequenceClassification.from_pretrained(half).to(dtype).save_pretrained(half)
    for name, flags in {
        "finetune": ["--model_name_or_path", str(half)],
        "distill": ["--teacher", str(half), "--student_layers", "2"],
    }.items():
        output = tmp_path / name
        assert main([name, *flags, *files(folder), *FAST, "--output_dir", str(output)]) == 0
        weights = load_file(output / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float32}


def test_full_disk_beneath_the_texts_is_told(folder, tmp_path, capsys):
    """datasets keeps tokens on disk."""
    write_examples(tmp_path / "many.csv", 3000, seed=5)
    flags = ["--model_name_or_path", str(folder / "teacher"), "--output_dir", str(tmp_path / "out")]
    given = ["finetune", *flags, "--train_file", str(tmp_path / "many.csv"), *FAST]
    for size in (4_000, 100_000):  # less than the texts take, and than the tokens
        with files_up_to(size):
            assert main(given) == 1
        shown = capsys.readouterr().err
        assert "File too large" in shown and "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_full_disk_beneath_few_tokens_is_told(tmp_path, capsys):
    """datasets has all of them in a buffer, and can't close their file. (Without capsys, the bar
    would go into a file, which would be limited too.)
    """
    write_examples(tmp_path / "few.csv", 48, seed=6)
    examples, _ = load_examples(DataArguments(train_file=str(tmp_path / "few.csv")), seed=0)
    with files_up_to(100), pytest.raises(OSError, match="File too large"):
        tokenize_texts(examples, make_tokenizer(), 16)


def test_finetuning_keeps_the_order_of_the_checkpoint_s_classes(folder, tmp_path):
    """Its classifier goes on where it was: a rate of 0 leaves its outputs as they are."""
    shutil.copytree(folder / "teacher", tmp_path / "swapped")
    config = json.loads((folder / "teacher" / "config.json").read_text())
    names = {"id2label": {"0": "positive", "1": "negative"}}
    names |= {"label2id": {"positive": 0, "negative": 1}}
    (tmp_path / "swapped" / "config.json").write_text(json.dumps(config | names))
    arguments = ["finetune", *files(folder), *FAST, "--learning_rate", "0"]
    scores = []
    for model in (folder / "teacher", tmp_path / "swapped"):
        output = tmp_path / f"of-{model.name}"
        options = ["--model_name_or_path", str(model), "--output_dir", str(output)]
        assert main([*arguments, *options]) == 0
        scores.append(json.loads((output / "metrics.json").read_text())["eval_accuracy"])
    assert scores[0] == pytest.approx(1 - scores[1])
    written = json.loads((tmp_path / "of-swapped" / "config.json").read_text())
    assert written["label2id"] == names["label2id"]


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
    tokens = tokenize(examples, make_tokenizer(), [0, 1, 0], 32)
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


@pytest.mark.parametrize("command", ["finetune", "distill", "evaluate", "pretrain"])
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


def test_the_named_file_is_read_and_no_other(tmp_path):
    """A path is no pattern, even where another file would fit it."""
    folder = tmp_path / "we[i]rd *"
    folder.mkdir()
    for name, text in (("data[1]?.csv", "right"), ("data1x.csv", "wrong")):
        (folder / name).write_text(f"text,label\n{text},a\n", encoding="utf-8")
    read = read_file("train_file", str(folder / "data[1]?.csv"))
    assert read["text"] == ["right"]


def test_words_for_nothing_are_words(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\nnull,None\nNA,nan\n,n/a\n", encoding="utf-8")
    read = read_file("train_file", str(path))
    assert read["text"] == ["null", "NA", None]
    assert read["label"] == ["None", "nan", "n/a"]


@pytest.mark.parametrize("missing", ["NA", "nan", "None", "-"])
@pytest.mark.parametrize("numbers", [["0", "1"], ["0.25", "3.5"]])
def test_a_number_that_is_missing_is_told(missing, numbers, tmp_path):
    """It does not make classes of all the others."""
    path = tmp_path / "train.csv"
    rows = "".join(f"text,{label}\n" for label in [*numbers, missing])
    path.write_text(f"text,label\n{rows}", encoding="utf-8")
    examples = read_file("train_file", str(path))
    with pytest.raises(UsageError, match=rf"row 2 has ('{missing}'|none)"):
        check_label_column(examples, "train_file")


def test_a_flag_that_is_misspelt_is_guessed(capsys):
    given = ["--teacher", "x", "--student_layers", "2", "--output_dir", "y"]
    assert main(["distill", *given, "--codir_wieght", "0.1"]) == 2
    assert "did you mean --codir_weight?" in capsys.readouterr().err


def test_the_teacher_is_not_written_over(folder, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", teacher)
    flags = ["--train_file", str(folder / "train.csv"), "--overwrite_output_dir", "--use_cpu"]
    given = ["--teacher", str(teacher), "--student_layers", "1", "--output_dir", f"{teacher}/."]
    assert main(["distill", *given, *flags]) == 2
    assert "`output_dir` must not be the folder of `teacher`" in capsys.readouterr().err


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("codir_fast.distillation.distill.run", interrupted)
    assert main(["distill", "--teacher", "x"]) == 130
    assert capsys.readouterr().err == "codir-fast: interrupted\n"
