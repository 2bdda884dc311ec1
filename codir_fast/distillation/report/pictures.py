"""Pictures of training runs: curves of the log, scores against size and latency."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import matplotlib

from codir_fast.distillation.report.runs import Run, read_runs

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt

TERMS = {
    "loss": "loss (weighted sum of the terms)",
    "ce": "CE, cross-entropy (nats)",
    "kd": "KD, T² KL(teacher, student) (nats)",
    "codir": "CoDIR, contrastive (nats)",
    "pkd": "PKD, squared distance of layers",
    "mlm": "MLM, masked tokens (nats)",
}
# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
# Scores that are better where they are higher; the first that the results have is drawn.
SCORES = ("accuracy", "pearson")
SIZES = {
    "parameters": (1e-6, "parameters (millions)"),
    "milliseconds_per_sentence": (1.0, "latency (ms a sentence)"),
}
COLUMNS = 3


def plot_terms(runs: Mapping[str, Path], path: Path) -> None:
    """Each loss term over optimizer steps, one panel a term, one line a run."""
    folders = [str(folder) for folder in runs.values()]
    save(draw_curves(dict(zip(runs, read_runs(folders), strict=True)), list(TERMS)[1:]), path)


def plot_accuracy(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Accuracy against size and latency, as `draw_scores` has it."""
    save(draw_scores(results), path)


def draw_curves(
    runs: Mapping[str, Run], names: Sequence[str], titles: Mapping[str, str] = TERMS
) -> Any:
    """Values of the log over optimizer steps: a panel for each name that a run has, a line for each
    run.
    """
    rows = [row for run in runs.values() for row in run.history]
    present = [name for name in names if any(name in row for row in rows)]
    figure, axes = panels(len(present), (4, 3))
    for axis, name in zip(axes, present, strict=True):
        for (title, run), (style, colour) in _with_looks(runs, STYLES):
            points = [(row["step"], row[name]) for row in run.history if name in row]
            if points:
                marker = "." if len(points) < 30 else None
                look = {"color": colour, "linestyle": style, "marker": marker}
                axis.plot(*zip(*points, strict=True), label=shown(title), **look)
        axis.set(title=titles.get(name, shown(name)), xlabel="optimizer step")
    add_legend(figure, axes)
    return figure


def draw_scores(results: Mapping[str, Mapping[str, Any]]) -> Any:
    """The score against millions of parameters and milliseconds a sentence; the bar is the standard
    error of an accuracy.

    Args:
        results: what `codir-fast evaluate` gives, and parameters, of each model.
    """
    score = next(name for name in SCORES if any(name in r for r in results.values()))
    figure, axes = panels(len(SIZES), (4.4, 3.4))
    for axis, (name, (unit, title)) in zip(axes, SIZES.items(), strict=True):
        for (run, result), (marker, colour) in _with_looks(results, MARKERS):
            if score not in result:
                continue
            value = result[score]
            error = (value * (1 - value) / result["n"]) ** 0.5 if score == "accuracy" else None
            look = {"fmt": marker, "color": colour, "capsize": 3, "label": shown(run)}
            axis.errorbar(result[name] * unit, value, yerr=error, **look)
        axis.set(xlabel=title, ylabel=score)
        axis.set_xlim(0, 1.05 * axis.get_xlim()[1])
    add_legend(figure, axes)
    return figure


def _with_looks(named: Mapping[str, Any], kinds: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """(name, value) and (one of `kinds`, colour), which repeat after all of them."""
    return zip(named.items(), cycle(product(kinds, COLOURS)), strict=False)


def panels(count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure of `count` axes in rows of COLUMNS, each of this size in inches."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(size[0] * columns, size[1] * rows),
        layout="constrained",
        squeeze=False,
    )
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def add_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One above all panels, with each of their labels once; none for a single label."""
    handles: dict[str, Any] = {}
    for axis in axes:
        marks, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, marks, strict=True))
    if len(handles) < 2:
        return
    fitting = int(10 * figure.get_figwidth()) // (6 + max(map(len, handles)))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=max(1, min(len(handles), fitting)),
        frameon=False,
    )


def shown(name: str) -> str:
    """A text from outside as matplotlib shows it unchanged: $ begins a formula, a first _ hides the
    label, and characters that no font has are left out.
    """
    plain = "".join(c for c in name if c.isprintable()).replace("$", r"\$")
    return f"\u200b{plain}" if plain.startswith("_") else plain


def save(figure: Any, path: Path | Any) -> None:
    """As PNG, into a file or what can be written like one."""
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)
