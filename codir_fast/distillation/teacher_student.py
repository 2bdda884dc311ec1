"""A student that is trained beside a frozen teacher, and the terms that compare their layers: what
both stages of CoDIR share.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from codir_fast.bank_rows import SHARD_MARK
from codir_fast.distillation.config import LayerConfig
from codir_fast.distillation.contrast import LayerContrast
from codir_fast.distillation.encoders import encoder_fault
from codir_fast.distillation.fingerprint import INPUTS, hash_weights
from codir_fast.distillation.layer_contrasts import LayerContrasts
from codir_fast.distillation.layer_mapping import layer_pairs
from codir_fast.distributed import gather_state
from codir_fast.errors import UsageError
from codir_fast.pooling import pool_hidden_states

STUDENT_PREFIX = "student."


class TeacherStudent(nn.Module):
    """A student, the heads and the bank of the contrastive term, and a teacher that is frozen and
    always in eval mode: it is neither in parameters() nor in state_dict() but moves with the
    module.

    A stage is a subclass with a `forward` that gives the loss and, in training, each of its terms
    under the name of its weight in `config`.

    Args:
        student: the model to train.
        teacher: reads the same tokens; None where no term of the loss has one.
        config: weights, temperatures, layers.
        new_contrast: makes the contrastive term, where it has a weight, for the features' widths of
            student and teacher.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        config: LayerConfig,
        new_contrast: Callable[[tuple[int, int]], LayerContrast],
    ) -> None:
        super().__init__()
        for name, side in (("student", student), ("teacher", teacher)):
            if side is not None and (fault := encoder_fault(side.config)):
                raise ValueError(f"`{name}` must be an encoder, {type(side).__name__} {fault}")
        self.distillation_config = config
        self.student = student
        if teacher is None and (self.sees_layers or config.kd_weight > 0):
            raise ValueError(
                "`teacher` must be given where kd_weight, codir_weight or pkd_weight > 0"
            )
        # In a tuple, so that it is no submodule: not trained, not saved, not wrapped by DDP.
        self._teacher: tuple[PreTrainedModel, ...] = ()
        self._teacher_hash: str | None = None
        if teacher is not None:
            self._teacher = (teacher.eval().requires_grad_(False),)
        if self.sees_layers:
            self._map_layers()
        if config.codir_weight > 0:
            self.contrast = self._whole_contrast(new_contrast)

    def _map_layers(self) -> None:
        """Finds the layers to compare."""
        config = self.distillation_config
        student, teacher = self.student.config, self.teacher.config
        pairs = layer_pairs(
            config.layer_mapping, student.num_hidden_layers, teacher.num_hidden_layers
        )
        self.student_layers, self.teacher_layers = (list(side) for side in zip(*pairs, strict=True))
        widths = self._hidden_sizes()
        equal_heads = config.codir_weight > 0 and config.head_init == "equal"
        for needs, name in (
            (config.pkd_weight > 0, "pkd_weight` > 0"),
            (equal_heads, "head_init` equal"),
        ):
            if needs and widths[0] != widths[1]:
                raise ValueError(
                    f"`{name} needs a student as wide as the teacher, got hidden sizes "
                    f"{widths[0]} and {widths[1]}"
                )

    def _hidden_sizes(self) -> tuple[int, int]:
        return self.student.config.hidden_size, self.teacher.config.hidden_size

    def _whole_contrast(
        self, new_contrast: Callable[[tuple[int, int]], LayerContrast]
    ) -> LayerContrast | LayerContrasts:
        student, teacher = self._hidden_sizes()
        num_layers = len(self.student_layers)
        if self.distillation_config.contrast_layers == "each":
            return LayerContrasts(new_contrast, (student, teacher), num_layers)
        return new_contrast((num_layers * student, num_layers * teacher))

    @property
    def teacher(self) -> PreTrainedModel:
        if not self._teacher:
            raise RuntimeError(
                "the teacher was released; give `teacher_logits`, `teacher_features`"
            )
        return self._teacher[0]

    def release_teacher(self) -> None:
        """Lets the teacher's memory go: its outputs must come with the batches from now on."""
        self._teacher_hash = self.teacher_hash
        self._teacher = ()

    @property
    def teacher_hash(self) -> str | None:
        """By which a checkpoint knows the teacher again; None without one."""
        if self._teacher_hash is None and self._teacher:
            self._teacher_hash = hash_weights(self.teacher)
        return self._teacher_hash

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TeacherStudent":
        for teacher in self._teacher:
            teacher._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def sees_layers(self) -> bool:
        """Whether a term of the loss compares layers."""
        return self.distillation_config.codir_weight > 0 or self.distillation_config.pkd_weight > 0

    def _pool(self, outputs: Any, mask: Tensor, layers: list[int]) -> Tensor:
        """The pooled hidden states of `layers`, side by side, (B, L*H)."""
        mode, tokens = self.distillation_config.pooling, mask.shape[1]
        for layer in layers:
            states = outputs.hidden_states[layer].shape[1]
            if states != tokens:  # as of Funnel, which pools them
                raise UsageError(
                    "`layer_mapping` must name layers that have a hidden state for each token, "
                    f"layer {layer} has {states} for {tokens} tokens"
                )
        return pool_hidden_states(outputs.hidden_states, mask, mode=mode, layers=layers)

    def _layer_terms(
        self, student: Tensor, teacher: Tensor | None, **examples: Tensor
    ) -> dict[str, Tensor]:
        """The terms that compare pooled features; `examples`: what the contrastive term takes."""
        config, terms = self.distillation_config, {}
        if teacher is None:
            raise ValueError("`teacher_features` must be given beside `teacher_logits`")
        if config.codir_weight > 0:
            if self.needs_features:
                raise ValueError("`standardize_features` needs fit_features before training")
            terms["codir"] = self.contrast(student, teacher, **examples)
        if config.pkd_weight > 0:
            terms["pkd"] = pkd_loss(student, teacher, len(self.student_layers))
        return terms

    def _weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        weighted = [
            getattr(self.distillation_config, f"{name}_weight") * term
            for name, term in terms.items()
        ]
        return sum(weighted[1:], weighted[0])

    @property
    def needs_features(self) -> bool:
        """Whether `fit_features` must be called before training."""
        return self.distillation_config.codir_weight > 0 and self.contrast.needs_features

    @torch.no_grad()
    def fit_features(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Takes the mean and deviation of the mapped layers' pooled features from batches of the
        training examples, each with what `forward` takes.
        """

        def features() -> Iterator[tuple[Tensor | None, Tensor]]:
            for batch in batches:
                teacher = batch.get("teacher_features")
                if teacher is None:
                    teacher = self._features(self.teacher, self.teacher_layers, batch)
                student = None
                if self.contrast.widths[0] != self.contrast.widths[1]:
                    student = self._features(self.student, self.student_layers, batch)
                yield student, teacher

        was_training = self.student.training
        self.student.eval()
        self.contrast.fit_features(features())
        self.student.train(was_training)

    def _features(
        self, model: PreTrainedModel, layers: list[int], batch: Mapping[str, Tensor]
    ) -> Tensor:
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        outputs = model.base_model(**inputs, output_hidden_states=True)
        return self._pool(outputs, batch["attention_mask"], layers)

    def update_bank(self) -> None:
        """Takes the embeddings of all examples seen since the last call into the bank.

        Called once after each optimizer step, so that accumulated micro-batches change the bank as
        the one large batch would.
        """
        if self.distillation_config.codir_weight > 0:
            self.contrast.update_banks()

    def forget_waiting(self) -> None:
        """Lets go what waits for `update_bank`, of a batch whose step is not taken."""
        if self.distillation_config.codir_weight > 0:
            self.contrast.forget_waiting()

    def distillation_state(self) -> dict[str, Tensor]:
        """Heads and bank: all of state_dict() that is not the student. A bank that ranks share is
        put together: a step of all of them, of which rank 0 alone gets something.
        """
        if self.distillation_config.codir_weight == 0:
            return {}
        state = gather_state(self.contrast) or {}
        return {f"contrast.{name}": value for name, value in state.items()}

    def load_distillation_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `distillation_state` gave, on however many ranks; every name and shape must
        fit.
        """
        own = (name for name in self.state_dict() if not name.startswith(STUDENT_PREFIX))
        expected = {name for name in own if not name.endswith(f".{SHARD_MARK}")}
        if set(state) != expected:
            raise ValueError(
                f"`state` must hold {sorted(expected)}, got {sorted(state)}: it is of another kind "
                "of run"
            )
        self.load_state_dict(state, strict=False)

    def get_input_embeddings(self) -> nn.Module:
        """The student's, where Trainer adds NEFTune's noise."""
        return self.student.get_input_embeddings()

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self.student.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:  # the older name
        self.student.gradient_checkpointing_enable(**kwargs)


def pkd_loss(student: Tensor, teacher: Tensor, num_layers: int) -> Tensor:
    """|u_S - u_T|^2 of unit vectors u, mean over batch and layers; both (B, L*H), pooled layers
    side by side.

    Source: Sun et al. 2019, Patient Knowledge Distillation for BERT Model Compression, equation 7,
        whose layers are the first token's; here they are pooled as the run says.
    """
    student, teacher = (
        F.normalize(rows.float().unflatten(1, (num_layers, -1)), dim=-1)
        for rows in (student, teacher)
    )
    return (student - teacher).square().sum(-1).mean()


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the rows (0 of none), in
    nats.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    total = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * (total / max(len(student), 1))
