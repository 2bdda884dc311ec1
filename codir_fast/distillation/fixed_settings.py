"""Settings that can't change at a checkpoint: they are in its optimizer, or its place among the
examples depends on them.
"""

from typing import Any

from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from codir_fast.distillation.fingerprint import hash_tokens

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
TOKENS = "the tokens of the training examples"
SAMPLE = 1000  # examples whose tokens are looked at


def fixed_settings(training: TrainingArguments, batch_size: int) -> dict[str, Any]:
    """What a checkpoint keeps of them; `batch_size`: examples of one process in a batch."""
    known = training.to_dict()
    names = (*OF_OPTIMIZER, *OF_ORDER)
    return {name: known[name] for name in names} | {BATCH: batch_size * training.world_size}


def settings_of_examples(examples: Any) -> dict[str, Any]:
    """The same of a training set, None for what it does not tell: a stream has no length."""
    return {
        EXAMPLES: len(examples) if has_length(examples) else None,
        TOKENS: _hash_sample(examples),
    }


def _hash_sample(examples: Any) -> str | None:
    if not isinstance(examples, Dataset) or "input_ids" not in examples.column_names:
        return None
    step = max(1, len(examples) // SAMPLE)
    return hash_tokens(examples.select(range(0, len(examples), step)))


def check_fixed_settings(
    saved: dict[str, Any], own: dict[str, Any], *, makes_optimizer: bool, keeps_place: bool
) -> None:
    """Raises ValueError where a run would go on with what the checkpoint has, and not what it was
    given, or at another place among the examples.

    Args:
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
    if keeps_place and _differ(saved[TOKENS], own[TOKENS]):
        raise ValueError(f"{TOKENS} are others: of other texts, or another `max_seq_length`")


def _differ(one: str | None, other: str | None) -> bool:
    return None not in (one, other) and one != other
