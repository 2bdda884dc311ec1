"""transformers.Trainer with what CoDIR adds: bank updates, heads and bank in checkpoints, terms in
the log.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from codir_fast.distillation.config import LayerConfig
from codir_fast.distillation.model import DistillationModel
from codir_fast.distillation.sampling import ResumableTrainer
from codir_fast.distillation.teacher_student import TeacherStudent

STATE_FILE = "distillation_state.safetensors"


class DistillationTrainer(ResumableTrainer):
    """Trains a DistillationModel; accumulation, precision, resume and trackers are Trainer's.

    A checkpoint is the student in transformers' own format, with its tokenizer, and beside it
    distillation.json and distillation_state.safetensors (heads and bank). The training set needs a
    column `index`, the number of each example, where the contrastive term has a weight.

    Raises:
        ValueError: `model` is no DistillationModel; or more than one process, for which the bank is
            not built yet; or several GPUs in one process.
        NotImplementedError: label smoothing.
    """

    model_class: ClassVar[type[TeacherStudent]] = DistillationModel

    def __init__(
        self, model: TeacherStudent, args: TrainingArguments | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(model, self.model_class):
            wanted = self.model_class.__name__
            raise ValueError(f"`model` must be a {wanted}, got {type(model).__name__}")
        if args is not None:
            check_arguments(args, model.distillation_config)
        super().__init__(model, args, **kwargs)
        device = self.args.device
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        self._count = 0
        self.add_callback(_BankUpdate())

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        model = self._distilled()
        if model.needs_features and not resume_from_checkpoint:  # else they come from there
            model.to(self.args.device)
            model.fit_features(self._feature_batches())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _feature_batches(self) -> Iterator[dict[str, Any]]:
        """Batches of the training examples that features are standardised over."""
        for batch in tqdm(self.get_eval_dataloader(self.train_dataset), "Standardize", leave=False):
            yield self._prepare_inputs(batch)

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
            for name in outputs.keys() - {"loss", "logits"}:
                self._sums[name] += outputs[name].detach()
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._count:
            logs |= {name: float(total) / self._count for name, total in self._sums.items()}
            self._sums.clear()
            self._count = 0
        super().log(logs, start_time)

    def _distilled(self) -> TeacherStudent:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(str(output_dir or self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        model = self._distilled()
        model.student.save_pretrained(directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        model.distillation_config.save(directory)
        # Copies: safetensors refuses tensors that share memory, as a bank moved by .to() may.
        state = {name: value.clone() for name, value in model.distillation_state().items()}
        save_file(state, directory / STATE_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        load_checkpoint(self._distilled(), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_checkpoint(self._distilled(), Path(str(self.state.best_model_checkpoint)))


def check_arguments(args: TrainingArguments, config: LayerConfig) -> None:
    """Raises what DistillationTrainer raises for arguments that a distillation can't follow."""
    if args.label_smoothing_factor != 0:
        raise NotImplementedError("`label_smoothing_factor` is not built for distillation yet")
    if args.world_size > 1 and config.codir_weight > 0:
        raise ValueError(
            "`codir_weight` > 0 needs one process: each process would fill a bank of its own, "
            f"got {args.world_size} processes"
        )
    if args.n_gpu > 1:
        raise ValueError(
            "a distillation needs one GPU per process, DataParallel leaves teacher and bank "
            f"behind: choose one with CUDA_VISIBLE_DEVICES, got {args.n_gpu} GPUs"
        )


def load_checkpoint(model: TeacherStudent, directory: Path) -> None:
    """Student, heads and bank as they were saved.

    Raises:
        ValueError: no checkpoint of a distillation, or one of other layers, weights or data.
    """
    state_file = directory / STATE_FILE
    if not state_file.is_file():
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint of a distillation, {directory} has "
            f"no {STATE_FILE}"
        )
    try:
        loaded = type(model.student).from_pretrained(
            directory, use_safetensors=True, local_files_only=True
        )
        model.student.load_state_dict(loaded.state_dict())
        model.load_distillation_state(load_file(state_file))
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"`resume_from_checkpoint` does not fit this run, {directory}: {error}"
        ) from error


class _BankUpdate(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        getattr(model, "module", model).update_bank()
