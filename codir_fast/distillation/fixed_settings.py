"""Settings that can't change at a checkpoint: they are in its optimizer, or its place among the
examples depends on them.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from codir_fast.distillation.fingerprint import INPUTS, hash_columns, hash_tokens

OF_OPTIMIZER = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim"),
    *("optim_args", "lr_scheduler_type", "lr_scheduler_kwargs"),
)
OF_ORDER = (
    *("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last"),
    "gradient_accumulation_steps",
)
# Not of TrainingArguments, and in words.
EXAMPLES, BATCH = "the number of training examples", "the batch size of all processes"
TEACHER = "the teacher"
TOKENS, LABELS = "the tokens of the training examples", "the labels of the training examples"
STREAM = "the stream"  # name -> what its texts and their order depend on
STREAM_FILE = "the contents of `train_file`"
LABEL_COLUMNS = ("labels", "label", "label_ids")  # that Trainer takes for labels


def fixed_settings(training: TrainingArguments, batch_size: int) -> dict[str, Any]:
    """What a checkpoint keeps of them; `batch_size`: examples of one process in a batch."""
    known = training.to_dict()
    names = (*OF_OPTIMIZER, *OF_ORDER)
    return {name: known[name] for name in names} | {BATCH: batch_size * training.world_size}


def settings_of_examples(examples: Any) -> dict[str, Any]:
    """The same of a training set, None for what it does not tell: a stream has no length."""
    return {
        EXAMPLES: len(examples) if has_length(examples) else None,
        TOKENS: _hash_columns(examples, INPUTS),
        LABELS: _hash_columns(examples, LABEL_COLUMNS),
    }


def _hash_columns(examples: Any, names: Sequence[str]) -> str | None:
    if not isinstance(examples, Dataset):
        return None
    there = [name for name in names if name in examples.column_names]
    return hash_columns(examples, there) if there else None


def _hash_sample(examples: Any) -> str | None:
    """The tokens as checkpoints had them before they had labels: of about 1,000 examples."""
    if not isinstance(examples, Dataset) or "input_ids" not in examples.column_names:
        return None
    step = max(1, len(examples) // 1000)
    return hash_tokens(examples.select(range(0, len(examples), step)))


def check_fixed_settings(
    saved: dict[str, Any],
    own: dict[str, Any],
    examples: Any,
    *,
    makes_optimizer: bool,
    keeps_place: bool,
) -> None:
    """Raises ValueError where a run would go on with what the checkpoint has, and not what it was
    given, or at another place among the examples.

    Args:
        examples: the training set of `own`.
        makes_optimizer: whether the optimizer is made of the run's settings.
        keeps_place: whether the run goes on at the example where the checkpoint was.
    """
    of_optimizer = OF_OPTIMIZER if makes_optimizer else ()
    of_place = (*OF_ORDER, BATCH, EXAMPLES) if keeps_place else ()
    for name in (*of_optimizer, *of_place):
        if saved[name] != own[name]:
            shown = name if name in (BATCH, EXAMPLES) else f"`{name}`"
            raise ValueError(f"{shown} was {saved[name]}, and is {own[name]} now")
    if _differ(saved.get(TEACHER), own.get(TEACHER)):
        raise ValueError(f"{TEACHER} is another one")
    if keeps_place:
        _check_examples(saved, own, examples)


def _check_examples(saved: dict[str, Any], own: dict[str, Any], examples: Any) -> None:
    tokens = own[TOKENS] if LABELS in saved else _hash_sample(examples)
    if _differ(saved[TOKENS], tokens):
        raise ValueError(f"{TOKENS} are others: of other texts, or another `max_seq_length`")
    if _differ(saved.get(LABELS), own[LABELS]):
        raise ValueError(f"{LABELS} are others")
    now = own.get(STREAM) or {}
    for name, before in (saved.get(STREAM) or {}).items():
        if name in now and before != now[name]:
            is_file = name == STREAM_FILE
            change = "are others" if is_file else f"was {before}, and is {now[name]} now"
            raise ValueError(f"{name if is_file else f'`{name}`'} {change}")


def _differ(one: str | None, other: str | None) -> bool:
    return None not in (one, other) and one != other
