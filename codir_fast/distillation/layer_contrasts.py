"""A contrastive term for each compared layer, where `contrast_layers` is each."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from codir_fast.distillation.contrast import LayerContrast
from codir_fast.distillation.standardization import both_moments


class LayerContrasts(nn.Module):
    """Mean of one LayerContrast per compared layer, each with heads and banks of its own.

    It is called as a LayerContrast is, with the features of all layers side by side.

    Args:
        new_contrast: makes a LayerContrast of features so wide.
        widths: hidden sizes of student and teacher, H each.
        num_layers: L.
    """

    def __init__(
        self,
        new_contrast: Callable[[tuple[int, int]], LayerContrast],
        widths: tuple[int, int],
        num_layers: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(new_contrast(widths) for _ in range(num_layers))
        self.widths = (num_layers * widths[0], num_layers * widths[1])

    def _layers(self) -> list[LayerContrast]:
        return cast(list[LayerContrast], list(self.layers))

    @property
    def needs_features(self) -> bool:
        return self._layers()[0].needs_features

    def fit_features(self, features: Iterable[tuple[Tensor | None, Tensor]]) -> None:
        first = self._layers()[0]
        device = first.teacher_features.mean.device
        sides = both_moments(features, self.widths, first.process_group, device)
        parts = [
            list(zip(*(v.chunk(len(self.layers)) for v in side), strict=True)) for side in sides
        ]
        for layer, student, teacher in zip(self.layers, *parts, strict=True):
            layer.set_features(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor, **examples: Tensor) -> Tensor:
        sides = (side.chunk(len(self.layers), dim=1) for side in (student, teacher))
        terms = [
            layer(*pair, **examples) for layer, *pair in zip(self._layers(), *sides, strict=True)
        ]
        return torch.stack(terms).mean()

    def update_banks(self) -> None:
        for layer in self._layers():
            layer.update_banks()

    def forget_waiting(self) -> None:
        for layer in self._layers():
            layer.forget_waiting()
