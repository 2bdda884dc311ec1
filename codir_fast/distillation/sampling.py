"""The order of the training examples as a function of seed and epoch alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from codir_fast.distillation.checkpointed_trainer import CheckpointedTrainer
from codir_fast.distillation.model_card import CARD_FILE
from codir_fast.distillation.objectives import label_loss


class SeededByEpoch(Sampler[int]):
    """`sampler` with a generator of its own, seeded anew in each epoch.

    LengthGroupedSampler draws from the global generator, whose state at the start of an epoch is in
    no checkpoint: resumed in the middle of an epoch after the first, it would give other batches
    than those of the unbroken run, some examples twice and some never.

    Args:
        sampler: has an attribute `generator`.
        seed: of the run.
        epoch: tells the epoch that starts, counted from 0.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)


class ResumableTrainer(CheckpointedTrainer):
    """CheckpointedTrainer that resumes exactly where examples are grouped by length too, trains the
    same whether it is evaluated or not, and pushes the model card that is there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A classifier's loss is a mean though it takes more arguments: Trainer would not divide it
        # by the accumulated steps, and multiply it by the number of processes.
        self.model_accepts_loss_kwargs = False

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, whose loader of batches would move the random numbers that dropout sees."""
        with torch.random.fork_rng(devices=()):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """As Trainer's, with the loss of this process's own rows."""
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys
        )
        if loss is not None and logits is not None and labels is not None:
            count = self._own_rows(len(labels))
            if 0 < count < len(labels):
                loss = label_loss(logits[:count], labels[:count])
        return loss, logits, labels

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As Trainer's; `dataloader_drop_last` is of training: an evaluation leaves nothing out."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and kwargs.get("is_training", False)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _own_rows(self, size: int) -> int:
        """How many of an evaluation batch's rows come first that are not there only so that all
        processes have as many.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return size
        return min(max(state.remainder - size * self.args.process_index, 0), size)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's own card, where the folder has none: before a push it would replace any."""
        if not (Path(str(self.args.output_dir)) / CARD_FILE).exists():
            super().create_model_card(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(sampler, BatchRebalanceSampler):
            sampler.seed = seed  # Trainer leaves it at 42
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        sampler.batch_size *= self.args.world_size  # texts of like lengths for all processes
        # The whole part of state.epoch: in a resumed epoch it has a fraction, else it is exact.
        return SeededByEpoch(sampler, seed, lambda: int(self.state.epoch or 0))
