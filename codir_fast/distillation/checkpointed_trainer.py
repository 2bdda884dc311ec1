"""transformers.Trainer whose checkpoints survive a crash, hold no pickle and resume exactly."""

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, set_seed
from transformers.optimization import Adafactor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.training_args import OptimizerNames

from codir_fast.collectives import gather_bytes, ranks_of
from codir_fast.distillation.arguments import say
from codir_fast.distillation.checkpoint import (
    last_whole_checkpoint,
    refusing,
    remove_leftovers,
    replaced_files,
    rotate,
    whole_checkpoint,
    written_checkpoint,
)
from codir_fast.distillation.fixed_settings import (
    check_fixed_settings,
    fixed_settings,
    settings_of_examples,
)
from codir_fast.distillation.loading import load_weights
from codir_fast.distillation.manifest import DamagedFolder, verify
from codir_fast.distillation.processes import OwnRandomNumbers, process_group
from codir_fast.distillation.trainer_state import (
    SaveAfterEpoch,
    best_beside,
    check_steps,
    read_trainer_state,
    restore_callbacks,
)
from codir_fast.distillation.training_state import (
    load_optimizer,
    load_tree,
    parameters_of,
    random_state,
    save_tree,
    set_random_state,
    tree_bytes,
)
from codir_fast.errors import Diverged, UsageError

ARGUMENTS_FILE = "training_arguments.json"
STATE_FILE = "training_state.safetensors"
RANDOM_FILE = "random_state_{}.safetensors"  # of each process
# Of TrainingArguments; their states are numbers and tensors.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop")


class CheckpointedTrainer(Trainer):
    """Trainer with other checkpoints: written whole or not at all, in safetensors and JSON, with a
    manifest by which damage is seen.

    `train(True)` resumes from the last checkpoint that is as it was written. A resumed run on the
    CPU is bit-equal to the unbroken one: weights, optimizer, schedule, random numbers, order of the
    examples, counters of callbacks, best model. A subclass with more to keep than a transformers
    model extends `write_model` and `read_model`.

    Raises:
        UsageError: checkpoints are asked for and the optimizer's state has no place in them; FSDP
            or DeepSpeed, likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._had_stopped = False
        self._makes_optimizer = self.optimizer is None and not self.optimizer_cls_and_kwargs
        self._of_examples: tuple[Any, dict[str, Any]] | None = None  # hashed once
        self.add_callback(OwnRandomNumbers())
        self.add_callback(SaveAfterEpoch())
        if self.args.save_strategy != SaveStrategy.NO:
            self._check_state()

    def _check_state(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UsageError("checkpoints of FSDP and DeepSpeed are not built: --save_strategy no")
        given = self.optimizer_cls_and_kwargs and self.optimizer_cls_and_kwargs[0]
        given = given if self.optimizer is None else type(self.optimizer)
        if given is None and self.args.optim not in OPTIMIZERS:
            raise UsageError(
                f"`optim` must be one of {OPTIMIZERS}, whose state a checkpoint can hold, got "
                f"{OptimizerNames(self.args.optim).value}; others need --save_strategy no"
            )
        if given is not None and not (
            given is Adafactor or f"{given.__module__}.".startswith("torch.optim.")
        ):
            raise UsageError(
                "the optimizer must be of torch.optim or transformers' Adafactor, whose state a "
                f"checkpoint can hold, got {given.__name__}; others need save_strategy='no'"
            )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        output = Path(str(self.args.output_dir))
        self._had_stopped = False
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                directory = last_whole_checkpoint(output, say)
            else:
                directory = whole_checkpoint(resume_from_checkpoint)
            read_trainer_state(directory)
            resume_from_checkpoint = str(directory)
        if self.args.should_save:
            remove_leftovers(output)
        result = super().train(resume_from_checkpoint or None, *args, **kwargs)
        self._check_weights()
        return result

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self._check_weights()
        super().save_model(*args, **kwargs)

    def _check_weights(self) -> None:
        """Raises Diverged where a weight is no number: nothing of it is saved."""
        for name, weight in self._module().named_parameters():
            if not bool(weight.detach().isfinite().all()):
                raise Diverged(
                    f"training diverged: {name} is not finite after step "
                    f"{self.state.global_step}; start anew with a lower `learning_rate`"
                )

    def _module(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def write_model(self, directory: Path, state_dict: dict[str, Any] | None = None) -> None:
        """Everything of the model that a checkpoint and the final folder hold."""
        model = self._module()
        model.save_pretrained(directory, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        with replaced_files(Path(str(output_dir or self.args.output_dir))) as directory:
            self.write_model(directory, state_dict)
            text = self.args.to_json_string() + "\n"
            (directory / ARGUMENTS_FILE).write_text(text, encoding="utf-8")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        output = Path(self._get_output_dir(trial))
        final = output / f"checkpoint-{self.state.global_step}"
        is_main, wait = self.args.should_save, self.accelerator.wait_for_everyone
        with written_checkpoint(final, is_main=is_main, wait=wait) as directory:
            self.save_model(str(directory), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(directory))
                self._save_rng_state(str(directory))
            self._update_state(final)
            if is_main:
                self.state.save_to_json(str(directory / TRAINER_STATE_NAME))
        if is_main:
            rotate(output, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _update_state(self, final: Path) -> None:
        """What the Trainer's state says about the checkpoint that is being written."""
        best = final.with_name(f"checkpoint-{self.state.best_global_step}")
        if best == final or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        callbacks = TrainerState(stateful_callbacks=self._stateful() + [self.control])
        self.state.stateful_callbacks = callbacks.stateful_callbacks

    def _stateful(self) -> list[Any]:
        return [cb for cb in self.callback_handler.callbacks if isinstance(cb, ExportableState)]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        scaler = getattr(self.accelerator, "scaler", None)
        tree = {
            "settings": self._fixed_settings(),
            "parameters": parameters_of(self.optimizer, self._module()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        save_tree(tree, Path(output_dir) / STATE_FILE)

    def _fixed_settings(self) -> dict[str, Any]:
        if self._of_examples is None or self._of_examples[0] is not self.train_dataset:
            self._of_examples = self.train_dataset, settings_of_examples(self.train_dataset)
        return fixed_settings(self.args, self._train_batch_size) | self._of_examples[1]

    def _save_rng_state(self, output_dir: str) -> None:
        states = [tree_bytes(random_state(self.args.device))]
        if ranks := ranks_of(process_group(self.args)):  # one may see no disk of the others
            states = gather_bytes(ranks, "checkpoint", states[0], self.args.device)
        if self.args.should_save:
            for rank, state in enumerate(states):
                (Path(output_dir) / RANDOM_FILE.format(rank)).write_bytes(state)

    def read_model(self, directory: Path) -> None:
        """Takes what `write_model` wrote; raises UsageError where it does not fit."""
        with refusing(directory):
            load_weights(self._module(), directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.read_model(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        directory = Path(str(self.state.best_model_checkpoint))
        try:
            verify(directory.resolve())
        except (DamagedFolder, OSError) as error:
            raise UsageError(f"the best model is lost, {directory} is damaged: {error}") from error
        self.read_model(directory)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        with refusing(Path(checkpoint)):
            path = Path(checkpoint) / STATE_FILE
            if not path.is_file():
                raise ValueError(f"it has no {STATE_FILE}, as with --save_only_model")
            tree = load_tree(path)
            keeps_place = not self.args.ignore_data_skip
            check_fixed_settings(
                tree["settings"],
                self._fixed_settings(),
                self.train_dataset,
                makes_optimizer=self._makes_optimizer,
                keeps_place=keeps_place,
            )
            expected = parameters_of(self.optimizer, self._module())
            if tree["parameters"] != expected:
                raise ValueError("its optimizer is that of another model")
            load_optimizer(self.optimizer, tree["optimizer"])
            if tree["scheduler"].keys() != self.lr_scheduler.state_dict().keys():
                raise ValueError("its learning rates follow another schedule")
            self.lr_scheduler.load_state_dict(tree["scheduler"])
            scaler = getattr(self.accelerator, "scaler", None)
            if (scaler is None) != (tree["scaler"] is None):
                raise ValueError(
                    "one of the two runs scales its loss, as with --fp16, one does not"
                )
            if scaler is not None:
                scaler.load_state_dict(tree["scaler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """With the optimizer, from the same file."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            device = self.args.device
            before = len(list(Path(checkpoint).glob(RANDOM_FILE.format("*"))))
            if before not in (0, self.args.world_size):
                say(
                    f"resumed on {self.args.world_size} processes instead of {before}: their "
                    "random numbers start anew"
                )
                set_seed(self.args.seed + self.state.global_step + self.args.process_index)
                return
            name = RANDOM_FILE.format(self.args.process_index)
            with refusing(Path(checkpoint)):
                state = load_tree(Path(checkpoint) / name)
                set_random_state(state, device)
                if state["device"] != device.type:
                    say(f"resumed on {device.type} instead of {state['device']}: not bit-equal")

    def _init_training_state(
        self, max_steps: Any, steps: Any, epochs: Any, resume_from_checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        start = super()._init_training_state(
            max_steps, steps, epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            directory = Path(resume_from_checkpoint)
            saved = read_trainer_state(directory)
            self.state.best_model_checkpoint = best_beside(directory, saved)
            self.state.compute_steps(self.args, max_steps)  # Trainer would keep the checkpoint's
            with refusing(directory):
                check_steps(saved, max_steps)
                self._had_stopped = restore_callbacks(self._stateful(), saved)
        return start

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks whether the run is over only after a step.
        if self._had_stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)
