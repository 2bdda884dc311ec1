"""transformers.Trainer with what CoDIR adds: bank updates, heads and bank in checkpoints, terms in
the log.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import TrainOutput

from codir_fast.distillation.checkpoint import refusing
from codir_fast.distillation.fixed_settings import TEACHER
from codir_fast.distillation.loading import load_weights
from codir_fast.distillation.model import DistillationModel
from codir_fast.distillation.sampling import ResumableTrainer
from codir_fast.distillation.teacher_student import TeacherStudent
from codir_fast.distributed import ignore_shards_in_ddp
from codir_fast.memory_bank import IndexedBank, MemoryQueue

STATE_FILE = "distillation_state.safetensors"
# Settings by which a step may differ from the one before.
_FREE = ("kd_temperature", "bank_momentum", "mlm_probability")


class DistillationTrainer(ResumableTrainer):
    """Trains a DistillationModel; accumulation, precision, resume and trackers are Trainer's.

    A checkpoint is the student in transformers' own format, with its tokenizer, and beside it
    distillation.json and distillation_state.safetensors (heads and bank). The training set needs a
    column `index`, the number of each example, where the contrastive term has a weight.

    Under torchrun and its kin each process has its own batches, which are those of one process
    with a batch that is as many times larger, and the model must have the bank over all of them,
    `process_group`. Checkpoints are those of one process: they resume on any number.

    Raises:
        ValueError: `model` is no DistillationModel; several processes and a bank without a process
            group; several GPUs in one process.
        NotImplementedError: label smoothing; FSDP or DeepSpeed.
    """

    model_class: ClassVar[type[TeacherStudent]] = DistillationModel

    def __init__(
        self, model: TeacherStudent, args: TrainingArguments | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(model, self.model_class):
            wanted = self.model_class.__name__
            raise ValueError(f"`model` must be a {wanted}, got {type(model).__name__}")
        if args is not None:
            check_arguments(args)
            check_banks(model, args.world_size)
        ignore_shards_in_ddp(model)
        super().__init__(model, args, **kwargs)
        device = self.args.device
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        self._count = 0
        self._kept: dict[str, Tensor] = {}
        self.add_callback(_BankUpdate())

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        model = self._module()
        if model.needs_features and not resume_from_checkpoint:  # else they come from there
            model.to(self.args.device)
            model.fit_features(self._feature_batches())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Each try of `auto_find_batch_size` starts here. The one before may have ended in the
        middle of a step, whose embeddings and terms are of no batch of this one.
        """
        super()._update_auto_batch_size(batch_size)
        self._module().forget_waiting()
        self._sums.clear()
        self._count = 0

    def _feature_batches(self) -> Iterator[dict[str, Any]]:
        """Batches of the training examples that features are standardised over."""
        # The loader for evaluation would be kept, with its workers, and evaluated on from then on.
        examples: Any = self.train_dataset
        batches = self.get_test_dataloader(examples)
        for batch in tqdm(batches, "Standardize", leave=False, disable=not self.args.should_log):
            if count := self._own_rows(find_batch_size(batch)):
                yield {n: x[:count] for n, x in self._prepare_inputs(batch).items()}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs)
        if model.training:
            self._count += 1
            for name, term in outputs.items():  # in an order that is the same on all ranks
                if name not in ("loss", "logits"):
                    self._sums[name] += term.detach()
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._count:
            means = torch.stack(list(self._sums.values())) / self._count
            means = self.accelerator.reduce(means, "mean")
            logs |= dict(zip(self._sums, means.tolist(), strict=True))
            self._sums.clear()
            self._count = 0
        super().log(logs, start_time)

    def _fixed_settings(self) -> dict[str, Any]:
        return super()._fixed_settings() | {TEACHER: self._module().teacher_hash}

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self._kept = self._module().distillation_state()  # by all ranks; one of them writes
        super().save_model(*args, **kwargs)
        self._kept = {}

    def write_model(self, directory: Path, state_dict: dict[str, Any] | None = None) -> None:
        model = self._module()
        model.student.save_pretrained(directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        model.distillation_config.save(directory)
        # Copies: safetensors refuses tensors that share memory, as a bank moved by .to() may.
        state = {name: value.clone() for name, value in self._kept.items()}
        save_file(state, directory / STATE_FILE)

    def read_model(self, directory: Path) -> None:
        load_checkpoint(self._module(), directory)


def check_arguments(args: TrainingArguments) -> None:
    """Raises what DistillationTrainer raises for arguments that a distillation can't follow."""
    if args.label_smoothing_factor != 0:
        raise NotImplementedError("`label_smoothing_factor` is not built for distillation yet")
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name):
            raise NotImplementedError(
                f"`{name}` is not built for distillation: it would spread the bank's rows in its "
                "own way; torchrun alone trains with DistributedDataParallel"
            )
    if args.n_gpu > 1:
        raise ValueError(
            "a distillation needs one GPU per process, DataParallel leaves teacher and bank "
            f"behind: choose one with CUDA_VISIBLE_DEVICES, got {args.n_gpu} GPUs"
        )


def check_banks(model: TeacherStudent, world_size: int) -> None:
    """Raises ValueError where processes train together and each has a bank of its own."""
    for name, bank in model.named_modules():
        if isinstance(bank, (IndexedBank, MemoryQueue)):
            ranks = 1 if bank.shard is None else bank.shard.ranks.size
            if ranks != world_size:
                raise ValueError(
                    f"`model` must have {name} over all {world_size} processes, got it over "
                    f"{ranks}: each would fill a bank of its own, and DistributedDataParallel copy "
                    "the first one's over the others; give the model `process_group`"
                )


def load_checkpoint(model: TeacherStudent, directory: Path) -> None:
    """Student, heads and bank as they were saved.

    Raises:
        UsageError: no checkpoint of a distillation, or one of other layers, weights or data; a
            bank's row is not finite, or not of unit length.
    """
    with refusing(directory):
        if not (directory / STATE_FILE).is_file():
            raise ValueError(f"it has no {STATE_FILE}, so that it is of no distillation")
        load_weights(model.student, directory)
        state = load_file(directory / STATE_FILE)
        _check_features(model, directory)
        _check_labels(model, state)
        model.load_distillation_state(state)
        if model.needs_features:
            raise ValueError(f"{STATE_FILE} has no mean of the features")
        for part in model.modules():
            if isinstance(part, (IndexedBank, MemoryQueue)):
                part.check_rows()


def _check_features(model: TeacherStudent, directory: Path) -> None:
    """Its heads and the rows of its bank are of features like those of this run."""
    config = model.distillation_config
    saved = type(config).load(directory)
    for name, now in asdict(config).items():
        before = getattr(saved, name)
        if name not in (*config.WEIGHTS, *_FREE) and before != now:
            raise ValueError(f"`{name}` was {before}, and is {now} now")
        if name == "codir_weight" and (before > 0) != (now > 0):  # heads and banks come with it
            raise ValueError(f"`{name}` was {before}, and can't become {now}")


def _check_labels(model: TeacherStudent, state: dict[str, Tensor]) -> None:
    """A bank with a row per training example has the labels of this run's."""
    for name, bank in model.named_modules():
        if isinstance(bank, IndexedBank) and bank.labels is not None:
            loaded = state.get(f"{name}.row_labels")
            if loaded is not None and bank.shard is not None:
                loaded = bank.shard.own(loaded)
            if loaded is None or not torch.equal(loaded, bank.labels.cpu()):
                raise ValueError(f"the labels in {name} are not those of the training examples")


class _BankUpdate(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        getattr(model, "module", model).update_bank()
