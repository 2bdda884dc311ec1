"""The trainer of the pre-training stage: it masks each batch when the batch is used."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm import tqdm
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from codir_fast.distillation.fixed_settings import STREAM
from codir_fast.distillation.masked_lm import IGNORED, PretrainingModel
from codir_fast.distillation.trainer import DistillationTrainer

FEATURE_TEXTS = 8192


class PretrainingTrainer(DistillationTrainer):
    """Trains a PretrainingModel on texts: DistillationTrainer with dynamic masking.

    Each time a text is used, `mlm_probability` of its tokens are masked anew, special tokens never:
    80 % become the mask token, 10 % a token drawn from the vocabulary, 10 % stay
    (transformers.DataCollatorForLanguageModeling draws them). The draws are made just before the
    batch goes into the model, from the generator that dropout draws from: a DataLoader works ahead,
    so that masks drawn there would not come again in a resumed run. With gradient accumulation the
    losses of the micro-batches are averaged, and their teacher embeddings enter the queue after the
    optimizer step, in order, as those of the one large batch would.

    Evaluation masks the texts as `seed` says, the same way each time, and leaves the generators of
    training as they are. `eval_loss` is MLM over all masked positions of the set, in nats, and
    `eval_perplexity` its exponential; NaN where no token was masked.

    Features are standardised over the first 8,192 texts (FEATURE_TEXTS) of the training order,
    masked.

    Args:
        processing_class: tokenizer with a mask token.
        train_dataset, eval_dataset: columns of the tokenizer, without labels.
        data_collator: pads; that is what it does if it is not given.
        of_stream: what the texts of a stream and their order depend on, name -> value, to be kept
            in checkpoints and compared; called once, when it is needed.

    Raises:
        ValueError: no tokenizer, or one without a mask token; `compute_metrics`, which would need
            the logits of every position; what DistillationTrainer raises.
    """

    model_class = PretrainingModel

    def __init__(
        self,
        model: PretrainingModel,
        args: TrainingArguments | None = None,
        *,
        of_stream: Callable[[], dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if args is not None and isinstance(kwargs.get("train_dataset"), IterableDataset):
            config: Any = args.accelerator_config
            if config.dispatch_batches is None:
                # The first process would cut its batches for the others, which differ in length.
                config.dispatch_batches = False
        super().__init__(model, args, **kwargs)
        if self.compute_metrics is not None:
            raise ValueError("`compute_metrics` must be None: no logits are kept in pre-training")
        tokenizer = self.processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"`processing_class` must be a tokenizer, got {type(tokenizer).__name__}"
            )
        self._masking = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=model.distillation_config.mlm_probability
        )
        self._evaluated = torch.zeros(2, device=self.args.device)
        self._of_stream = None if of_stream is None else cache(of_stream)

    def _fixed_settings(self) -> dict[str, Any]:
        settings = super()._fixed_settings()
        return settings if self._of_stream is None else settings | {STREAM: self._of_stream()}

    def _mask(self, batch: dict[str, Any]) -> dict[str, Any]:
        if "labels" in batch:
            raise ValueError("texts must come without labels: their tokens are masked here")
        tokens = batch["input_ids"]
        special = torch.tensor(self._masking.tokenizer.all_special_ids, device=tokens.device)
        with tokens.device:  # so that the draws are made there
            masked, labels = self._masking.torch_mask_tokens(
                tokens.clone(), special_tokens_mask=torch.isin(tokens, special)
            )
        return {**batch, "input_ids": masked, "labels": labels}

    def _feature_batches(self) -> Iterator[dict[str, Any]]:
        count = math.ceil(FEATURE_TEXTS / self.args.train_batch_size / self.args.world_size)
        batches = islice(self.get_train_dataloader(), count)
        is_silent = not self.args.should_log
        for batch in tqdm(batches, "Standardize", leave=False, disable=is_silent):
            yield self._mask(self._prepare_inputs(batch))

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        return super().training_step(model, self._mask(inputs), *args, **kwargs)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._mask(self._prepare_inputs(inputs))
        inputs["labels"][self._own_rows(len(inputs["labels"])) :] = IGNORED
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        assert loss is not None
        count = (inputs["labels"] != IGNORED).sum()
        self._evaluated += torch.stack([loss * count, count])
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        device = self.args.device
        self._evaluated.zero_()
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type):
            torch.manual_seed(self.args.seed + self.args.process_index)
            output = super().evaluation_loop(*args, **kwargs)
        total, count = self.accelerator.reduce(self._evaluated).tolist()
        loss = total / count if count else math.nan
        prefix = kwargs.get("metric_key_prefix", "eval")
        perplexity = float(torch.tensor(loss).exp())  # math.exp raises where this is infinite
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_loss": loss, f"{prefix}_perplexity": perplexity})
        return output
