"""Several processes that train together, under torchrun and its kin."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from codir_fast.distillation.checkpoint import advice
from codir_fast.errors import LostProcess

_GIVEN_UP = "Application timeout caused pair closure"


def process_group(training: TrainingArguments) -> Any:
    """All processes of the run; None where this one is alone."""
    return dist.group.WORLD if training.world_size > 1 else None


def wait_for_all(training: TrainingArguments) -> None:
    """Returns once every process has called it."""
    training.distributed_state.wait_for_everyone()


def keep_timeout(training: TrainingArguments) -> None:
    """Makes `ddp_timeout` that of processes on CPUs too, where TrainingArguments leaves it out."""
    if training.world_size > 1 and training.use_cpu:
        _set_pg_timeout(training.ddp_timeout_delta, dist.group.WORLD)


def is_first() -> bool:
    """Whether this process speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def silence_others() -> None:
    """Leaves progress bars to the first process."""
    if not is_first():
        datasets.disable_progress_bars()
        logging.disable_progress_bar()


@contextmanager
def telling_of_loss(training: TrainingArguments) -> Iterator[None]:
    """Says in one line that another process has ended, and what the run can go on from."""
    try:
        yield
    except RuntimeError as error:
        if training.world_size == 1 or not _is_of_connection(error):
            raise
        raise LostProcess(
            f"process {training.process_index} of {training.world_size} could not talk to all "
            "others: one of them has ended, or did not come within `ddp_timeout`, "
            f"{training.ddp_timeout} s; its own output says why ({error})"
            f"{advice(Path(str(training.output_dir)))}"
        ) from error


def _is_of_connection(error: RuntimeError) -> bool:
    """gloo raises what anything raises. Its messages begin with one of its file names, but for that
    of a collective whose connection was given up because another one waited too long.
    """
    said = str(error)
    return isinstance(error, dist.DistError) or "gloo" in said or _GIVEN_UP in said


class OwnRandomNumbers(TrainerCallback):
    """Gives each process random numbers of its own once the run starts: until then all have the
    same, and begin with the same weights, heads and bank. The order of examples has a seed of its
    own.
    """

    def on_train_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            set_seed(args.seed + args.process_index)
