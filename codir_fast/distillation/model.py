"""The fine-tuning stage: a sequence classifier learns from labels and from a larger one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from codir_fast.distillation.config import DistillationConfig
from codir_fast.distillation.contrast import BankContrast
from codir_fast.distillation.objectives import (
    bank_classes,
    check_settings,
    check_task,
    is_regression,
    label_loss,
)
from codir_fast.distillation.teacher_student import TeacherStudent, kd_loss


class DistillationModel(TeacherStudent):
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

    A loop of your own calls update_bank() after each step of the optimizer, as DistillationTrainer
    does: until then the bank has no row of the examples, and the contrastive term is 0.

    The teacher is frozen and always in eval mode; it is neither in parameters() nor in state_dict()
    but moves with the module. In eval mode only the student runs: the loss is CE, the bank stays.

    Args:
        student: sequence classifier to train.
        teacher: fine-tuned sequence classifier that reads the same tokens.
        config: weights, temperatures, layers.
        bank_labels: (num_examples,) integers, in regression numbers, label of each training
            example; row n of the bank belongs to example n. Needed where codir_weight > 0.
        process_group: ranks of torch.distributed that train it together, each with its own
            batches, and share the bank; see codir_fast.distributed. Default: this process has all
            of it.

    Source: Sun et al. 2020, Contrastive Distillation on Intermediate Representations, section 3.
    """

    distillation_config: DistillationConfig
    bins: Tensor  # of each training example, in regression

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        config: DistillationConfig,
        bank_labels: Tensor | None = None,
        process_group: Any = None,
    ) -> None:
        if student.config.num_labels != teacher.config.num_labels:
            raise ValueError(
                f"`student` must have the teacher's {teacher.config.num_labels} labels, "
                f"got {student.config.num_labels}"
            )
        for name, side in (("student", student), ("teacher", teacher)):
            check_task(name, side.config)
        regression = is_regression(teacher.config)
        check_settings(config, regression)
        classes = None
        if config.codir_weight > 0:
            if bank_labels is None:
                raise ValueError("`bank_labels` must be given where codir_weight > 0")
            classes = bank_classes(bank_labels, config, regression)

        def new_contrast(widths: tuple[int, int]) -> BankContrast:
            assert classes is not None
            return BankContrast(config, widths, classes, process_group)

        super().__init__(student, teacher, config, new_contrast)
        self.is_regression = regression
        if regression and classes is not None:
            self.register_buffer("bins", classes, persistent=False)

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
        """Loss, logits and, in training, each term that has a weight: ce, kd (whenever the teacher
        runs), codir, pkd.

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
            features = self._pool(student, attention_mask, self.student_layers)
            examples: dict[str, Tensor] = {}
            if config.codir_weight > 0:
                if index is None:
                    raise ValueError("`index` must be given in training where codir_weight > 0")
                classes = self.bins[index] if self.is_regression else labels
                examples = {"labels": classes, "index": index}
            terms |= self._layer_terms(features, teacher_features, **examples)
        return {"loss": self._weighted(terms), "logits": student.logits, **terms}

    def _kd(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.is_regression:
            return F.mse_loss(student.float(), teacher.float())
        return kd_loss(student, teacher, self.distillation_config.kd_temperature)

    @torch.no_grad()
    def teacher_outputs(self, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits (B, C) and, where a term compares layers, the pooled hidden states
        of its mapped layers, side by side, (B, L*H); of inputs as `forward` takes them.
        """
        outputs = self.teacher(**inputs, output_hidden_states=self.sees_layers)
        if not self.sees_layers:
            return outputs.logits, None
        return outputs.logits, self._pool(outputs, inputs["attention_mask"], self.teacher_layers)
