"""Pictures of training runs: loss terms over steps, accuracy against latency."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt

TERMS = {"ce": "cross-entropy", "kd": "KD, T² KL(teacher, student)", "codir": "CoDIR (contrastive)"}
# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def read_history(run: Path) -> list[dict[str, float]]:
    """The log of a run: one dictionary per logged step, from trainer_state.json."""
    return json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def plot_terms(runs: Mapping[str, Path], path: Path) -> None:
    """Each loss term over optimizer steps, one panel a term, one line a run."""
    histories = {name: read_history(run) for name, run in runs.items()}
    terms = [term for term in TERMS if any(term in row for h in histories.values() for row in h)]
    figure, axes = plt.subplots(
        1, len(terms), figsize=(4 * len(terms), 3.2), layout="constrained", squeeze=False
    )
    for axis, term in zip(axes[0], terms, strict=True):
        for colour, (name, history) in zip(COLOURS, histories.items(), strict=False):
            points = [(row["step"], row[term]) for row in history if term in row]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=name)
        axis.set(title=TERMS[term], xlabel="optimizer step", ylabel="loss (nats)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    save(figure, path)


def plot_accuracy(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Accuracy against milliseconds a sentence; the bar is the standard error of the accuracy."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for colour, (name, result) in zip(COLOURS, results.items(), strict=False):
        accuracy, latency = result["accuracy"], result["milliseconds_per_sentence"]
        error = (accuracy * (1 - accuracy) / result["n"]) ** 0.5
        axis.errorbar(latency, accuracy, yerr=error, fmt="o", color=colour, capsize=3, label=name)
    axis.set(xlabel="latency (ms a sentence)", ylabel="validation accuracy")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
