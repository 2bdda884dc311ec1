"""Student, heads and bank as one trainable module beside a frozen teacher."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from codir_fast.distillation.config import DistillationConfig
from codir_fast.distillation.contrast import LayerContrast
from codir_fast.distillation.layer_contrasts import LayerContrasts
from codir_fast.distillation.layer_mapping import layer_pairs
from codir_fast.distillation.objectives import (
    bank_classes,
    check_settings,
    check_task,
    is_regression,
    label_loss,
)
from codir_fast.pooling import pool_hidden_states

STUDENT_PREFIX = "student."
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class DistillationModel(nn.Module):
    """The fine-tuning stage of CoDIR: loss = ce_weight CE + kd_weight KD + codir_weight CoDIR +
    pkd_weight PKD.

    CE is the student's cross-entropy with the labels. KD = T^2 KL(teacher || student) of the logits
    at T = kd_temperature. CoDIR: hidden states of the mapped layers, pooled over the real tokens
    and put side by side, go through one projection head per side; the student's z must recognise
    the teacher's z of the same text among the bank's rows of other labels (InfoNCE; other forms by
    `config`, see LayerContrast). PKD: distance of the mapped layers, see pkd_loss.

    Where the teacher has one output it is regression: CE is the mean squared error of the student's
    output with the labels, KD that with the teacher's output (kd_temperature has no meaning), and
    examples have one label to CoDIR where they are of one bin, see quantile_bins and label_bins.

    The teacher is frozen and always in eval mode; it is neither in parameters() nor in state_dict()
    but moves with the module. In eval mode only the student runs: the loss is CE, the bank stays.

    Args:
        student: sequence classifier to train.
        teacher: fine-tuned sequence classifier that reads the same tokens.
        config: weights, temperatures, layers.
        bank_labels: (num_examples,) integers, in regression numbers, label of each training
            example; row n of the bank belongs to example n. Needed where codir_weight > 0.

    Source: Sun et al. 2020, Contrastive Distillation on Intermediate Representations, section 3.
    """

    bins: Tensor  # of each training example, in regression

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        config: DistillationConfig,
        bank_labels: Tensor | None = None,
    ) -> None:
        super().__init__()
        if student.config.num_labels != teacher.config.num_labels:
            raise ValueError(
                f"`student` must have the teacher's {teacher.config.num_labels} labels, "
                f"got {student.config.num_labels}"
            )
        for name, side in (("student", student), ("teacher", teacher)):
            check_task(name, side.config)
        self.is_regression = is_regression(teacher.config)
        check_settings(config, self.is_regression)
        self.distillation_config = config
        self.student = student
        # In a tuple, so that it is no submodule: not trained, not saved, not wrapped by DDP.
        self._teacher: tuple[PreTrainedModel, ...] = (teacher.eval().requires_grad_(False),)
        if config.codir_weight > 0 or config.pkd_weight > 0:
            self._add_layers(bank_labels)

    def _add_layers(self, bank_labels: Tensor | None) -> None:
        config, student, teacher = (
            self.distillation_config,
            self.student.config,
            self.teacher.config,
        )
        pairs = layer_pairs(
            config.layer_mapping, student.num_hidden_layers, teacher.num_hidden_layers
        )
        self.student_layers, self.teacher_layers = (list(side) for side in zip(*pairs, strict=True))
        widths = student.hidden_size, teacher.hidden_size
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
        if config.codir_weight > 0:
            if bank_labels is None:
                raise ValueError("`bank_labels` must be given where codir_weight > 0")
            bank_labels = bank_classes(bank_labels, config, self.is_regression)
            if self.is_regression:
                self.register_buffer("bins", bank_labels, persistent=False)
            features = len(pairs) * widths[0], len(pairs) * widths[1]
            self.contrast: LayerContrast | LayerContrasts
            if config.contrast_layers == "each":
                self.contrast = LayerContrasts(config, features, bank_labels, len(pairs))
            else:
                self.contrast = LayerContrast(config, features, bank_labels)

    @property
    def teacher(self) -> PreTrainedModel:
        if not self._teacher:
            raise RuntimeError(
                "the teacher was released; give `teacher_logits`, `teacher_features`"
            )
        return self._teacher[0]

    def release_teacher(self) -> None:
        """Lets the teacher's memory go: its outputs must come with the batches from now on."""
        self._teacher = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DistillationModel":
        for teacher in self._teacher:
            teacher._apply(fn)
        return super()._apply(fn, recurse)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        token_type_ids: Tensor | None = None,
        index: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        teacher_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss, logits and, in training, each term that has a weight: ce, kd, codir, pkd.

        Args:
            input_ids, attention_mask, token_type_ids: (B, T), as the tokenizer gives them.
            labels: (B,) int64, in regression numbers.
            index: (B,) int64, number of each example in the training set; needed in training where
                codir_weight > 0.
            teacher_logits, teacher_features: (B, C) and (B, L*H), what `teacher_outputs` gave for
                these texts before; the teacher is then not run.
        """
        config = self.distillation_config
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        sees_layers = self.training and self.sees_layers
        student = self.student(**inputs, output_hidden_states=sees_layers)
        ce = label_loss(student.logits, labels)
        if not self.training:
            return {"loss": ce, "logits": student.logits}
        terms = {"ce": ce}
        if teacher_logits is None and (sees_layers or config.kd_weight > 0):
            teacher_logits, teacher_features = self.teacher_outputs(**inputs)
        if teacher_logits is not None:
            terms["kd"] = self._kd(student.logits, teacher_logits)
        if sees_layers:
            features = self._pool(student.hidden_states, attention_mask, self.student_layers)
            terms |= self._layer_terms(features, teacher_features, labels, index)
        weights = {name: getattr(config, f"{name}_weight") for name in terms}
        loss = sum((weights[name] * term for name, term in terms.items()), torch.zeros_like(ce))
        return {"loss": loss, "logits": student.logits, **terms}

    def _kd(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.is_regression:
            return F.mse_loss(student.float(), teacher.float())
        return kd_loss(student, teacher, self.distillation_config.kd_temperature)

    @property
    def sees_layers(self) -> bool:
        """Whether a term of the loss compares layers."""
        return self.distillation_config.codir_weight > 0 or self.distillation_config.pkd_weight > 0

    @torch.no_grad()
    def teacher_outputs(self, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits (B, C) and, where a term compares layers, the pooled hidden states
        of its mapped layers, side by side, (B, L*H); of inputs as `forward` takes them.
        """
        outputs = self.teacher(**inputs, output_hidden_states=self.sees_layers)
        if not self.sees_layers:
            return outputs.logits, None
        mask = inputs["attention_mask"]
        return outputs.logits, self._pool(outputs.hidden_states, mask, self.teacher_layers)

    def _pool(self, states: Sequence[Tensor], mask: Tensor, layers: list[int]) -> Tensor:
        return pool_hidden_states(
            states, mask, mode=self.distillation_config.pooling, layers=layers
        )

    def _layer_terms(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, index: Tensor | None
    ) -> dict[str, Tensor]:
        config, terms = self.distillation_config, {}
        if teacher is None:
            raise ValueError("`teacher_features` must be given beside `teacher_logits`")
        if config.codir_weight > 0:
            if index is None:
                raise ValueError("`index` must be given in training where codir_weight > 0")
            if self.needs_features:
                raise ValueError("`standardize_features` needs fit_features before training")
            classes = self.bins[index] if self.is_regression else labels
            terms["codir"] = self.contrast(student, teacher, classes, index)
        if config.pkd_weight > 0:
            terms["pkd"] = pkd_loss(student, teacher, len(self.student_layers))
        return terms

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
                inputs = {name: batch[name] for name in INPUTS if name in batch}
                teacher = batch.get("teacher_features")
                if teacher is None:
                    teacher = self.teacher_outputs(**inputs)[1]
                assert teacher is not None
                student = None
                if not self.contrast.has_one_width:
                    states = self.student(**inputs, output_hidden_states=True).hidden_states
                    student = self._pool(states, batch["attention_mask"], self.student_layers)
                yield student, teacher

        was_training = self.student.training
        self.student.eval()
        self.contrast.fit_features(features())
        self.student.train(was_training)

    def update_bank(self) -> None:
        """Moves the bank's rows to the embeddings of all examples seen since the last call.

        Called once after each optimizer step, so that accumulated micro-batches change the bank as
        the one large batch would.
        """
        if self.distillation_config.codir_weight > 0:
            self.contrast.update_banks()

    def distillation_state(self) -> dict[str, Tensor]:
        """Heads and bank: all of state_dict() that is not the student."""
        state = self.state_dict()
        return {name: state[name] for name in state if not name.startswith(STUDENT_PREFIX)}

    def load_distillation_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `distillation_state` gave; every name and shape must fit."""
        expected = set(self.distillation_state())
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
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch, in nats.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
