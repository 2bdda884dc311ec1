"""pretrain as a user calls it: data of all kinds, what comes of it, and every error as one line."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import (
    MASKED_VOCABULARY,
    WORDS,
    make_masking_tokenizer,
    make_tokenizer,
    tiny_config,
    write_examples,
    write_texts,
)
from transformers import AutoModelForMaskedLM, BertForMaskedLM

from codir_fast.cli import main
from codir_fast.distillation.arguments import CorpusArguments
from codir_fast.distillation.texts import load_texts

FAST = ["--per_device_train_batch_size", "8", "--use_cpu", "--report_to", "none"]


def pretrain(output, **flags):
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return main(["pretrain", *arguments, "--output_dir", str(output), *FAST])


def test_from_an_encoder_to_a_fine_tuned_student(corpus, tmp_path, capsys):
    encoder, texts = corpus / "encoder", corpus / "texts.txt"
    mlm, student = tmp_path / "mlm", tmp_path / "student"
    layers = {"student_layers": 2, "train_file": texts}
    assert pretrain(student, teacher=encoder, **layers) == 2
    error = capsys.readouterr().err
    assert f"codir-fast pretrain --student {encoder} --train_file TEXTS --output_dir NEW" in error
    assert error.count("\n") == 1 and not student.exists()

    assert pretrain(mlm, student=encoder, train_file=texts) == 0  # what the error says
    assert "no head for masked tokens, cls.predictions.bias" in capsys.readouterr().err
    settings = json.loads((mlm / "pretraining.json").read_text())
    assert settings["kd_weight"] == settings["codir_weight"] == 0
    assert pretrain(student, teacher=mlm, validation_split=0.2, **layers, queue_size=16) == 0
    settings = json.loads((student / "pretraining.json").read_text())
    assert (settings["mlm_weight"], settings["kd_weight"], settings["codir_weight"]) == (1, 1, 0.1)
    metrics = json.loads((student / "metrics.json").read_text())
    assert metrics["eval_perplexity"] == pytest.approx(
        float(torch.tensor(metrics["eval_loss"]).exp()), rel=1e-4
    )
    assert "validation perplexity" in capsys.readouterr().err
    _, report = AutoModelForMaskedLM.from_pretrained(student, output_loading_info=True)
    assert not any(report.values())

    write_examples(tmp_path / "train.csv", 24, seed=1)
    data = ["--train_file", str(tmp_path / "train.csv"), *FAST]
    teacher, classifier = str(tmp_path / "teacher"), str(tmp_path / "classifier")
    command = ["finetune", "--model_name_or_path", str(student), "--output_dir", teacher]
    assert main([*command, *data]) == 0
    given, taken = (
        load_file(path / "model.safetensors") for path in (student, tmp_path / "teacher")
    )
    shared = [name for name in given if name.startswith("bert.")]
    assert len(shared) > 30 and all(given[name].shape == taken[name].shape for name in shared)
    command = ["distill", "--teacher", teacher, "--student", str(student)]
    assert main([*command, "--output_dir", classifier, *data]) == 0


def test_finished_run_is_resumed_without_a_change(corpus, tmp_path, capsys):
    flags = {"teacher": corpus / "mlm", "student_layers": 2, "train_file": corpus / "texts.txt"}
    output = tmp_path / "out"
    assert pretrain(output, **flags) == 0
    before = (output / "model.safetensors").read_bytes()
    assert pretrain(output, **flags) == 2
    assert "give --overwrite_output_dir" in capsys.readouterr().err
    assert pretrain(output, **flags, resume_from_checkpoint=True) == 0
    assert (output / "model.safetensors").read_bytes() == before
    assert pretrain(output, **flags, resume_from_checkpoint=True, projection_dim=16) == 2
    assert "does not fit" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same three texts as files of each kind, and as data sets of several parts."""
    path = tmp_path_factory.mktemp("sources")
    texts = ["w1 w2", "w3", "w4 w5 w6"]
    (path / "texts.txt").write_text("w1 w2\n\nw3\n  \nw4 w5 w6\n")
    (path / "texts.csv").write_text("title,body\n" + "".join(f"w9,{text}\n" for text in texts))
    rows = [json.dumps({"body": text, "n": 1}) for text in texts]
    (path / "texts.jsonl").write_text("\n".join(rows))
    Dataset.from_dict({"body": texts}).to_parquet(path / "texts.parquet")
    parts = path / "parts"
    for name in ("one", "two"):
        (parts / name).mkdir(parents=True)
    shutil.copy(path / "texts.parquet", parts / "one" / "train.parquet")
    shutil.copy(path / "texts.parquet", parts / "one" / "validation.parquet")
    Dataset.from_dict({"body": ["w7"]}).to_parquet(parts / "two" / "train.parquet")
    (parts / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_dir: one\n- config_name: two\n  data_dir: two\n"
        "---\n"
    )
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet", "parts"])
def test_texts_of_every_kind(sources, kind, streaming):
    given = {"train_file": str(sources / f"texts.{kind}")}
    if kind == "parts":
        given = {"dataset_name": str(sources / "parts"), "dataset_config": "one"}
    column = "text" if kind == "txt" else "body"
    data = CorpusArguments(**given, text_column=column, streaming=streaming, shuffle_buffer=3)
    train, validation = load_texts(data, seed=0)
    found = [row["text"] for row, _ in zip(train, range(6), strict=False)]
    assert sorted(set(found)) == ["w1 w2", "w3", "w4 w5 w6"]
    assert len(found) == (6 if streaming else 3)  # a stream starts over
    if kind == "parts":
        assert [row["text"] for row in validation] == ["w1 w2", "w3", "w4 w5 w6"]


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_first_texts(sources, streaming):
    file = str(sources / "texts.txt")
    data = CorpusArguments(
        train_file=file, streaming=streaming, max_train_samples=2, shuffle_buffer=3
    )
    train, _ = load_texts(data, seed=0)
    assert {row["text"] for row, _ in zip(train, range(6), strict=False)} == {"w1 w2", "w3"}


def test_stream_with_a_validation_file(corpus, tmp_path):
    flags = {"teacher": corpus / "mlm", "student_layers": 2, "train_file": corpus / "texts.txt"}
    flags |= {"streaming": True, "max_steps": 7, "shuffle_buffer": 9}
    assert pretrain(tmp_path / "out", **flags, validation_file=corpus / "texts.txt") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_perplexity"] > 1


def test_stream_of_a_data_set_with_its_validation_split(corpus, sources, tmp_path):
    flags = {"student": corpus / "mlm", "dataset_name": sources / "parts", "dataset_config": "one"}
    flags |= {"text_column": "body", "streaming": True, "max_steps": 2, "shuffle_buffer": 3}
    flags |= {"max_train_samples": 2, "mlm_probability": 1}
    assert pretrain(tmp_path / "out", **flags) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_perplexity"] > 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "first", "last", "message"),
    [
        ("late.csv", "w1 w2", "w1,w2,w3", "`train_file` can't be read as csv"),
        ("late.jsonl", '{"text": "w1"}', '{"text": 7}', "`train_file` must hold texts, row 10"),
        ("late.txt", "w1 w2", "\x80", "`train_file` can't be read as txt"),
    ],
)
def test_fault_far_on_in_a_stream_is_one_line(
    corpus, tmp_path, capfd, name, first, last, message, workers
):
    header = ["text"] if name.endswith("csv") else []
    lines = [*header, *[first] * 10050, last, ""]  # past the part that is read first
    (tmp_path / name).write_bytes("\n".join(lines).encode("latin-1"))
    flags = {"teacher": corpus / "mlm", "student_layers": 2, "per_device_train_batch_size": 256}
    flags |= {"streaming": True, "max_steps": 50, "train_file": tmp_path / name}
    flags |= {"dataloader_num_workers": workers}
    assert pretrain(tmp_path / "out", **flags, shuffle_buffer=10000) == 2
    shown = capfd.readouterr().err
    errors = [line for line in shown.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in shown


def test_text_that_is_too_long_is_cut(corpus, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join(["w1 " * 100] * 8))
    for flags in ({}, {"max_seq_length": 12}):
        output = tmp_path / f"out{len(flags)}"
        flags = flags | {"student": corpus / "mlm", "train_file": tmp_path / "long.txt"}
        assert pretrain(output, **flags) == 0  # the model has 32 positions


def test_queue_that_holds_every_text_is_told(corpus, tmp_path, capsys):
    flags = {"teacher": corpus / "mlm", "student_layers": 2, "train_file": corpus / "texts.txt"}
    for size in (39, 40):
        assert pretrain(tmp_path / str(size), **flags, queue_size=size) == 0
        is_told = "`queue_size` 40 is not below the 40 training texts" in capsys.readouterr().err
        assert is_told == (size == 40)


def test_student_from_another_checkpoint_of_another_width(corpus, tmp_path):
    other = tiny_config(vocab_size=MASKED_VOCABULARY, hidden_size=8, num_hidden_layers=2)
    BertForMaskedLM(other).save_pretrained(tmp_path / "other")
    flags = {"teacher": corpus / "mlm", "student": tmp_path / "other"}
    flags |= {"standardize_features": True, "train_file": corpus / "texts.txt"}
    assert pretrain(tmp_path / "out", **flags) == 0
    state = load_file(tmp_path / "out" / "distillation_state.safetensors")
    assert state["contrast.student_features.mean"].shape == (16,)
    assert state["contrast.teacher_features.mean"].shape == (32,)


ERRORS = {
    "weights of another model": (
        {"--teacher": None, "--student_layers": None, "--student": "FOLDER/foreign"},
        "`student` must hold the weights of its layers,",
    ),
    "queue of nothing": (
        {"--teacher": None, "--student_layers": None, "--student": "FOLDER/mlm"}
        | {"--queue_size": 5},
        "`queue_size` needs `codir_weight` > 0",
    ),
    "no whole batch": (
        {"--dataloader_drop_last": True, "--per_device_train_batch_size": 64},
        "`dataloader_drop_last` leaves nothing of 40 examples in batches of 64",
    ),
    "no student": ({"--student_layers": None}, "exactly one of `student_layers` and `student`"),
    "two students": ({"--student": "FOLDER/mlm"}, "exactly one of `student_layers` and `student`"),
    "layers of nothing": ({"--teacher": None}, "`student_layers` needs `teacher`"),
    "too many layers": ({"--student_layers": "9"}, "`student_layers` must be in [1, 4]"),
    "no teacher": ({"--teacher": "FOLDER/nothing"}, "`teacher` must be a model's folder"),
    "encoder": ({"--teacher": "FOLDER/encoder"}, "`teacher` must be a masked language model"),
    "no mask token": ({"--teacher": "FOLDER/maskless"}, "`teacher` must have a tokenizer with a"),
    "too many tokens": ({"--teacher": "FOLDER/small"}, "has 45 tokens, more than its model's"),
    "other vocabulary": (
        {"--student": "FOLDER/large", "--student_layers": None},
        "`student` must read the teacher's tokens, a vocabulary of 45, got 60",
    ),
    "other words": (
        {"--student": "FOLDER/reversed", "--student_layers": None},
        "mlm does: '[MASK]' is 4 in ",
    ),
    "terms without a teacher": (
        {"--teacher": None, "--student_layers": None, "--student": "FOLDER/mlm", "--kd_weight": 1},
        "`teacher` must be given where kd_weight",
    ),
    "no loss": ({"--mlm_weight=0": "--kd_weight=0", "--codir_weight": 0}, "no loss is left"),
    "of the other stage": ({"--negatives": "other_labels"}, "pretrain has no flag --negatives"),
    "label": ({"--label_column": "label"}, "pretrain has no flag --label_column"),
    "preset": ({"--preset": "paper"}, "pretrain has no flag --preset"),
    "mask nothing": ({"--mlm_probability": 0}, "`mlm_probability` must be in (0, 1], got 0.0"),
    "mask too much": ({"--mlm_probability": 1.5}, "`mlm_probability` must be in (0, 1], got 1.5"),
    "no queue": ({"--queue_size": 0}, "`queue_size` must be at least 1"),
    "text": ({"--queue_size": "many"}, "--queue_size"),
    "no file": ({"--train_file": "nowhere.txt"}, "`train_file` must be an existing file"),
    "two sources": ({"--dataset_name": "x"}, "exactly one of `train_file` and `dataset_name`"),
    "config of nothing": ({"--dataset_config": "x"}, "`dataset_config` needs `dataset_name`"),
    "unknown format": ({"--train_file": "FOLDER/mlm/config.xml"}, "`train_file` must end in"),
    "no such column": ({"--text_column": "body"}, "`train_file` has no column 'body'"),
    "numbers": ({"--train_file": "FOLDER/numbers.csv"}, "must hold texts, row 0 has 1"),
    "blank": ({"--train_file": "FOLDER/blank.txt"}, "`train_file` holds no text"),
    "not utf-8": ({"--train_file": "FOLDER/bytes.txt"}, "`train_file` can't be read as txt"),
    "nothing to evaluate on": ({"--eval_strategy": "epoch"}, "`eval_strategy` epoch needs"),
    "output is used": ({"--output_dir": "FOLDER/mlm"}, "`output_dir` must be empty"),
    "smoothing": ({"--label_smoothing_factor": "0.1"}, "`label_smoothing_factor` is not"),
    "no length": ({"--max_seq_length": 0}, "`max_seq_length` must be at least 1"),
    "buffer of no stream": ({"--shuffle_buffer": 9}, "`shuffle_buffer` needs `streaming`"),
    "no buffer": ({"--shuffle_buffer": 0}, "`shuffle_buffer` must be at least 1"),
    "stream without end": ({"--streaming": True}, "`streaming` needs `max_steps`"),
    "stream split": (
        {"--streaming": True, "--max_steps": 3, "--validation_split": 0.1},
        "`validation_split` needs all the texts at once",
    ),
    "stream by length": (
        {"--streaming": True, "--max_steps": 3, "--train_sampling_strategy": "group_by_length"},
        "`train_sampling_strategy` must be random with `streaming`",
    ),
    "stream by epoch": (
        {"--streaming": True, "--max_steps": 3, "--save_strategy": "epoch"},
        "`save_strategy` must not be epoch with `streaming`",
    ),
    "stream of no column": (
        {"--streaming": True, "--max_steps": 3, "--text_column": "body"},
        "`train_file` has no column 'body'",
    ),
    "stream of numbers": (
        {"--streaming": True, "--max_steps": 3, "--train_file": "FOLDER/numbers.csv"},
        "must hold texts, row 0 has 1",
    ),
    "stream of blanks": (
        {"--streaming": True, "--max_steps": 3, "--train_file": "FOLDER/blank.txt"},
        "`train_file` holds no text",
    ),
    "seed of a stream": (
        {"--streaming": True, "--max_steps": 3, "--data_seed": 1},
        "`data_seed` needs an order that it draws",
    ),
    "pieces of outputs": (
        {"--validation_file": "FOLDER/texts.txt", "--eval_accumulation_steps": 2},
        "`eval_accumulation_steps` needs metrics of the outputs",
    ),
    "no training": ({"--do_train": "False"}, "`do_train` False can't be used"),
    "stream of nothing": (
        {"--streaming": True, "--max_steps": 3, "--train_file": "FOLDER/empty.txt"},
        "`train_file` has no rows, the file",
    ),
    "stream of nothing in JSON": (
        {"--streaming": True, "--max_steps": 3, "--train_file": "FOLDER/empty.jsonl"},
        "`train_file` has no rows, the file",
    ),
    "queue beyond memory": (
        {"--queue_size": 99999999999999},
        "`queue_size` 99999999999999 can't be had, as rows of 128 numbers: ",
    ),
    "queue beyond numbers": (
        {"--queue_size": 10**20},
        "`queue_size` 100000000000000000000 can't be had, as rows of 128 numbers: ",
    ),
}


@pytest.fixture(scope="module")
def broken(corpus, tmp_path_factory):
    """The corpus with files that no run should accept."""
    path = tmp_path_factory.mktemp("broken")
    shutil.copytree(corpus, path, dirs_exist_ok=True)
    shutil.copytree(corpus / "mlm", path / "maskless")
    make_tokenizer().save_pretrained(path / "maskless")
    for name, size in (("small", 44), ("large", 60)):
        BertForMaskedLM(tiny_config(vocab_size=size)).save_pretrained(path / name)
        make_masking_tokenizer().save_pretrained(path / name)
    shutil.copytree(corpus / "mlm", path / "reversed")
    make_tokenizer(["[MASK]", *WORDS[::-1]]).save_pretrained(path / "reversed")
    shutil.copytree(corpus / "mlm", path / "foreign")
    save_file({"other": torch.ones(2)}, path / "foreign" / "model.safetensors", {"format": "pt"})
    (path / "mlm" / "config.xml").write_text("<a/>")
    (path / "numbers.csv").write_text("text\n1\n2\n")
    (path / "blank.txt").write_text("\n  \n")
    (path / "empty.txt").write_text("")
    (path / "empty.jsonl").write_text("")
    (path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x81\n")
    return path


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line_with_exit_code_2(name, broken, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, message = ERRORS[name]
    given = {
        "--teacher": "FOLDER/mlm",
        "--student_layers": "2",
        "--train_file": "FOLDER/texts.txt",
        "--output_dir": "out",
    } | changes
    pairs = [(flag, str(value)) for flag, value in given.items() if value is not None]
    arguments = [part.replace("FOLDER", str(broken)) for pair in pairs for part in pair]
    before = sorted(broken.rglob("*"))
    assert main(["pretrain", *arguments, "--use_cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    error = [line for line in lines if line and "examples/s]" not in line]  # a bar had begun
    assert len(error) == 1 and error[0].startswith("codir-fast: error: ")
    assert message in error[0]
    assert list(tmp_path.iterdir()) == [] and sorted(broken.rglob("*")) == before


def test_source_that_is_missing_is_named(corpus, tmp_path, capsys):
    assert pretrain(tmp_path / "out", student=corpus / "mlm") == 2
    assert "exactly one of `train_file` and `dataset_name`" in capsys.readouterr().err
    write_texts(tmp_path / "more.txt", 8, seed=2)
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "more.txt", tmp_path / "set" / "test.txt")
    assert pretrain(tmp_path / "out", student=corpus / "mlm", dataset_name=tmp_path / "set") == 2
    assert "`dataset_name` must have a train split" in capsys.readouterr().err
