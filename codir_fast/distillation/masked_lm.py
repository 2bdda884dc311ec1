"""The pre-training stage: a masked language model learns from texts and from a larger one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from codir_fast.distillation.config import PretrainingConfig
from codir_fast.distillation.contrast import QueueContrast
from codir_fast.distillation.teacher_student import TeacherStudent, kd_loss

IGNORED = -100  # the label of a position that is not masked


class PretrainingModel(TeacherStudent):
    """The pre-training stage of CoDIR: loss = mlm_weight MLM + kd_weight KD + codir_weight CoDIR +
    pkd_weight PKD.

    With N masked positions m in the batch, y their tokens, s and t the logits over the vocabulary
    of student and teacher, and T = kd_temperature, in nats:

        MLM = -1/N sum_m log softmax(s_m)[y_m]
        KD = T^2/N sum_m KL(softmax(t_m / T) || softmax(s_m / T))

    Logits are computed at the masked positions alone. CoDIR: pooled hidden states of the mapped
    layers, over all real tokens, through one projection head per side; the student's z must
    recognise the teacher's z of the same masked text among those of earlier texts, which a queue
    holds (see LayerContrast). PKD: distance of the mapped layers, see pkd_loss. Student and teacher
    read the same masked tokens.

    In eval mode only the student runs: the loss is MLM, the queue stays.

    Args:
        student: masked language model to train.
        teacher: masked language model of the same vocabulary; None where only mlm_weight > 0.
        config: weights, temperatures, layers, size of the queue.
        process_group: as for DistillationModel, of the queue.

    Raises:
        ValueError: the vocabularies differ; a model has no head whose logits at some positions can
            be had alone; no teacher where a term needs one.

    Source: Sun et al. 2020, Contrastive Distillation on Intermediate Representations, section 3.
    """

    distillation_config: PretrainingConfig

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        config: PretrainingConfig,
        process_group: Any = None,
    ) -> None:
        check_head("student", student)
        if teacher is not None:
            check_head("teacher", teacher)
            sizes = student.config.vocab_size, teacher.config.vocab_size
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"`student` must read the teacher's tokens, a vocabulary of {sizes[1]}, got "
                    f"{sizes[0]}"
                )

        def new_contrast(widths: tuple[int, int]) -> QueueContrast:
            return QueueContrast(config, widths, process_group)

        super().__init__(student, teacher, config, new_contrast)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss and, in training, each term that has a weight: mlm, kd, codir, pkd.

        Args:
            input_ids, attention_mask, token_type_ids: (B, T), with masked tokens.
            labels: (B, T) int64, the token of a masked position, -100 elsewhere.
        """
        config = self.distillation_config
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        is_masked = labels != IGNORED
        positions = is_masked.flatten().nonzero()[:, 0]
        sees_layers = self.training and self.sees_layers
        student = outputs_at(self.student, positions, inputs, output_hidden_states=sees_layers)
        targets = labels.flatten()[positions]
        total = F.cross_entropy(student.logits.float(), targets, reduction="sum")
        mlm = total / max(len(targets), 1)  # short texts may have no masked token
        if not self.training:
            return {"loss": mlm}
        terms = {"mlm": mlm}
        if config.kd_weight > 0 or sees_layers:
            terms |= self._teacher_terms(student, positions, inputs)
        return {"loss": self._weighted(terms), **terms}

    def _teacher_terms(
        self, student: Any, positions: Tensor, inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        config, mask, terms = self.distillation_config, inputs["attention_mask"], {}
        with torch.no_grad():
            if config.kd_weight > 0:
                teacher = outputs_at(
                    self.teacher, positions, inputs, output_hidden_states=self.sees_layers
                )
                terms["kd"] = kd_loss(student.logits, teacher.logits, config.kd_temperature)
            else:
                teacher = self.teacher.base_model(**inputs, output_hidden_states=True)
        if self.sees_layers:
            features = self._pool(student, mask, self.student_layers)
            terms |= self._layer_terms(features, self._pool(teacher, mask, self.teacher_layers))
        return terms


def outputs_at(
    model: PreTrainedModel,
    positions: Tensor,
    inputs: dict[str, Tensor],
    *,
    output_hidden_states: bool = False,
) -> Any:
    """What a masked language model gives, with logits at some positions alone: (N, V) instead of
    (B, T, V).

    Its head acts on each position by itself, so that the last hidden states (B, T, H) of its base
    model can reach it as (1, N, H), whatever the head is.

    Args:
        positions: (N,) int64, in the flattened (B*T,) batch.
        inputs: what the model takes, (B, T) each.
    """

    def choose(module: torch.nn.Module, arguments: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state.flatten(0, 1)[positions][None]
        return outputs

    handle = model.base_model.register_forward_hook(choose)
    try:
        outputs = model(**inputs, output_hidden_states=output_hidden_states)
    finally:
        handle.remove()
    outputs.logits = outputs.logits[0]
    return outputs


@torch.no_grad()
def check_head(name: str, model: PreTrainedModel) -> None:
    """Refuses a model whose logits at some positions are not had by `outputs_at`: it is tried."""
    fault = f"`{name}` must be a masked language model, {type(model).__name__} has no head for it"
    if model.base_model is model or model.get_output_embeddings() is None:
        raise ValueError(fault)
    tokens = torch.arange(4, device=model.device)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    positions = torch.tensor([1, 3], device=model.device)
    was_training = model.training
    model.eval()
    try:
        every = model(**inputs).logits[0, positions].float()
        some = outputs_at(model, positions, inputs).logits.float()
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{fault} that is known here: {error}") from error
    finally:
        model.train(was_training)
    if some.shape != every.shape or (some - every).abs().max() > 0.01 * every.abs().max():
        raise ValueError(f"{fault} that acts on each position by itself")
