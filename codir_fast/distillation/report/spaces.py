"""Pictures of the space in which student and teacher are compared: embeddings, and cosines."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch

from codir_fast.distillation.report.bank import BINS, BankStatistics, evenly
from codir_fast.distillation.report.embeddings import Embeddings, first_two_components
from codir_fast.distillation.report.pictures import COLOURS, add_legend, panels, shown

OTHERS = "other labels"
JOINED_PAIRS = 25
SIDES = {"student": "o", "teacher": "x"}


def draw_embeddings(found: Mapping[str, Embeddings], labels: Sequence[Any]) -> Any:
    """Embeddings of both sides on the first two components of them all, a panel a run: a colour a
    label, circles for the student, crosses for the teacher, lines that join a few texts' two.
    """
    groups = label_groups(labels)
    figure, axes = panels(len(found), (5.4, 4.6))
    for axis, (title, embeddings) in zip(axes, found.items(), strict=True):
        axis.set_title(shown(title))
        _draw_both_sides(axis, embeddings, groups)
    add_legend(figure, axes)
    return figure


def _draw_both_sides(axis: Any, embeddings: Embeddings, groups: list[str]) -> None:
    both = torch.cat([embeddings.student, embeddings.teacher])
    points, shares = first_two_components(both)
    sides = dict(zip(SIDES, points.chunk(2), strict=True))
    for i in evenly(len(groups), JOINED_PAIRS).tolist():
        ends = torch.stack([side[i] for side in sides.values()])
        axis.plot(ends[:, 0], ends[:, 1], color="0.55", linewidth=0.7, zorder=1)
    names = sorted(set(groups), key=lambda name: (name == OTHERS, name))
    for colour, name in zip(COLOURS, names, strict=False):
        mine = torch.tensor([group == name for group in groups])
        for side, rows in sides.items():
            look = {"marker": SIDES[side], "color": colour, "s": 18, "linewidths": 0.9}
            x, y = rows[mine].T
            axis.scatter(x, y, alpha=0.75, zorder=2, label=shown(f"{name}, {side}"), **look)
    axis.set_xlabel(f"first component, {100 * shares[0]:.0f}% of the variance")
    axis.set_ylabel(f"second component, {100 * shares[1]:.0f}%")


def label_groups(labels: Sequence[Any]) -> list[str]:
    """At most as many names as there are colours: numbers of a regression in quarters, and what is
    left of many labels in one.
    """
    if all(isinstance(label, float) for label in labels):
        return _quarters(labels)
    names = [str(label) for label in labels]
    counts = Counter(names)
    if len(counts) <= len(COLOURS):
        return names
    kept = {name for name, _ in counts.most_common(len(COLOURS) - 1)}
    return [name if name in kept else OTHERS for name in names]


def _quarters(values: Sequence[float]) -> list[str]:
    bounds = numpy.unique(numpy.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
    place = numpy.clip(numpy.searchsorted(bounds, values, side="left") - 1, 0, None)
    top = len(bounds) - 1
    return [f"{bounds[n]:.3g} to {bounds[min(n + 1, top)]:.3g}" for n in place]


def draw_cosines(banks: Mapping[str, BankStatistics]) -> Any:
    """Histograms of the cosines of a bank's rows, a panel a bank: of one label and of two."""
    edges = numpy.linspace(-1, 1, BINS + 1)
    figure, axes = panels(len(banks), (4.4, 3))
    for axis, (title, bank) in zip(axes, banks.items(), strict=True):
        for colour, (name, shares) in zip(COLOURS, bank.histograms.items(), strict=False):
            if shares is not None:
                look = {"color": colour, "linewidth": 1.4}
                axis.stairs(shares.numpy(), edges, label=name, **look)
                axis.stairs(shares.numpy(), edges, color=colour, fill=True, alpha=0.2)
        axis.set(title=shown(title), xlabel="cosine", ylabel="share of pairs")
        axis.set_xticks(numpy.linspace(-1, 1, 5))
    add_legend(figure, axes)
    return figure
