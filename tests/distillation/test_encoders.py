"""Decoders are refused by name wherever a model is given, encoders of all kinds are taken."""

import pytest
import torch
from tiny import make_tokenizer, tiny_config
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    DistilBertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
    XLNetConfig,
)

from codir_fast import DistillationConfig, DistillationModel
from codir_fast.cli import main
from codir_fast.distillation.encoders import encoder_fault

VOCABULARY = tiny_config().vocab_size
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32},
}
GEMMA = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
OPT = SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16}
OF_GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32}
ENCODERS = {
    "bert": lambda: tiny_config(),
    "roberta": lambda: RobertaConfig(**SIZES),
    "distilbert": lambda: DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "xlnet": lambda: XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=32),
    "gemma in both directions": lambda: Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True),
}
DECODERS = {
    "bert": lambda: tiny_config(is_decoder=True),
    "gpt2": lambda: GPT2Config(**OF_GPT),
    "llama": lambda: LlamaConfig(**SIZES),
    "opt": lambda: OPTConfig(**OPT),
    "gemma3_text": lambda: Gemma3TextConfig(**GEMMA),
}


@torch.no_grad()
def sees_what_follows(config):
    """Whether the first token's hidden state depends on the last token."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    one, other = (model(torch.tensor([[5, 6, 7, last]])).last_hidden_state[0, 0] for last in (8, 9))
    return not torch.equal(one, other)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_known(name):
    config = ENCODERS[name]()
    assert sees_what_follows(config) and encoder_fault(config) is None


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_are_known(name):
    config = DECODERS[name]()
    fault = f"is a decoder, of type {name}: its tokens see only what is before them"
    assert not sees_what_follows(config) and encoder_fault(config) == fault


def test_models_of_both_are_known():
    assert encoder_fault(BartConfig()) == "has a decoder too"


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """gpt2/ as its authors leave it, without a pad token; causal/, a BERT that reads forwards."""
    path = tmp_path_factory.mktemp("decoders")
    names = {key: getattr(tiny_config(), key) for key in ("id2label", "label2id")}
    for name, config in (
        ("gpt2", GPT2Config(**OF_GPT, **names)),
        ("causal", tiny_config(is_decoder=True)),
    ):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(path / name)
        tokenizer = make_tokenizer()
        if name == "gpt2":
            tokenizer.pad_token = None
        tokenizer.save_pretrained(path / name)
    return path


COMMANDS = {
    "finetune": ["model_name_or_path"],
    "distill": ["teacher", "student"],
    "evaluate": ["model_name_or_path", "teacher"],
    "pretrain": ["teacher", "student"],
}


@pytest.mark.parametrize("kind", ["gpt2", "causal"])
@pytest.mark.parametrize(
    ("command", "flag"), [(name, flag) for name, flags in COMMANDS.items() for flag in flags]
)
def test_a_decoder_is_refused_in_one_line(
    folder, corpus, decoders, tmp_path, capsys, command, flag, kind
):
    encoder = corpus / "mlm" if command == "pretrain" else folder / "teacher"
    given = {"model_name_or_path": encoder} if command == "evaluate" else {"teacher": encoder}
    given = {} if command == "finetune" else given
    given[flag] = decoders / kind
    if command == "evaluate":
        given |= {"test_file": folder / "validation.csv", "device": "cpu"}
    else:
        texts = corpus / "texts.txt" if command == "pretrain" else folder / "train.csv"
        given |= {"train_file": texts, "output_dir": tmp_path / "out", "use_cpu": True}
    if flag == "teacher" and command != "evaluate":
        given["student_layers"] = 2
    arguments = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    kind = {"causal": "bert"}.get(kind, kind)
    expected = f"`{flag}` must be an encoder, {given[flag]} is a decoder, of type {kind}: its"
    assert error.startswith(f"codir-fast: error: {expected}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_decoder_is_refused_from_python():
    encoder = AutoModelForSequenceClassification.from_config(tiny_config())
    decoder = AutoModelForSequenceClassification.from_config(GPT2Config(**OF_GPT))
    config = DistillationConfig(codir_weight=0)
    for sides, message in (
        ((decoder, encoder), "`student` must be an encoder, GPT2ForSequenceClassification is a"),
        ((encoder, decoder), "`teacher` must be an encoder, GPT2ForSequenceClassification is a"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationModel(*sides, config)


def test_a_decoder_has_no_head_for_masked_tokens():
    """Pre-training from Python; its commands are above."""
    from codir_fast.distillation.config import PretrainingConfig
    from codir_fast.distillation.masked_lm import PretrainingModel

    decoder = GPT2LMHeadModel(GPT2Config(**OF_GPT))
    config = PretrainingConfig(kd_weight=0, codir_weight=0)
    with pytest.raises(ValueError, match="`student` must be an encoder, GPT2LMHeadModel is a dec"):
        PretrainingModel(decoder, None, config)
