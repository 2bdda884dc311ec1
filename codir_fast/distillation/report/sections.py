"""What the page says of runs: each section as HTML, or a sentence that says what it needs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from codir_fast.distillation.report.bank import BankStatistics
from codir_fast.distillation.report.embeddings import Embeddings
from codir_fast.distillation.report.page import figure, folded, missing, paragraph, table
from codir_fast.distillation.report.pictures import TERMS, draw_curves, draw_scores, shown
from codir_fast.distillation.report.runs import Run
from codir_fast.distillation.report.spaces import draw_cosines, draw_embeddings
from codir_fast.distillation.run_settings import RUN_FILE

# Settings that are apart in any two runs, and tell nothing of them.
NAMES_OF_RUNS = ("output_dir", "run_name", "logging_dir")
LONG = ("training",)  # groups with more settings than one reads
TITLES = {
    "n": "examples",
    "loss": "loss (nats)",
    "milliseconds_per_sentence": "ms a sentence",
    "kl": "KL to the teacher (nats)",
    "agreement": "agreement with the teacher",
}


def results_section(
    runs: Sequence[Run], measured: Mapping[str, Mapping[str, Any]], needs: str
) -> list[str]:
    """Last evaluation of each run and size, and what was measured now on the test file.

    Args:
        needs: what is lacking, where nothing was measured.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    steps = {run.name: max((row["step"] for row in run.history), default=0) for run in runs}
    rows = {
        run.name: [
            _millions(run.parameters),
            steps[run.name],
            *(run.metrics.get(name) for name in names),
        ]
        for run in runs
    }
    head = ["run", "parameters (M)", "steps", *(_validation(name, runs) for name in names)]
    parts = [table(head, rows)]
    if not measured:
        return [*parts, missing(f"Accuracy against size and latency needs {needs}.")]
    columns = list(dict.fromkeys(name for result in measured.values() for name in result))
    columns.remove("parameters")
    rows = {
        run: [_millions(result["parameters"]), *(result.get(name) for name in columns)]
        for run, result in measured.items()
    }
    head = ["model", "parameters (M)", *(TITLES.get(name, name) for name in columns)]
    caption = (
        "Models on the test file. Bars are one standard error of the accuracy. Latency is of the "
        "forward pass in batches of like lengths, the fastest of three passes."
    )
    # So that each run has the colour of its curves.
    runs_first = {run.name: measured[run.name] for run in runs if run.name in measured}
    return [
        *parts,
        paragraph("On the test file, measured for this page:"),
        table(head, rows),
        figure(draw_scores({**runs_first, **measured}), caption),
    ]


def _validation(name: str, runs: Sequence[Run]) -> str:
    """Title of what an evaluation gave: the loss of classes and of tokens is in nats."""
    with_it = [run.metrics for run in runs if name in run.metrics]
    in_nats = all("accuracy" in metrics or "perplexity" in metrics for metrics in with_it)
    return f"validation {name} (nats)" if name == "loss" and in_nats else f"validation {name}"


def _millions(parameters: int | None) -> float | None:
    return None if parameters is None else parameters / 1e6


def settings_section(runs: Sequence[Run]) -> list[str]:
    """Every setting, those that differ highlighted and, of the long groups, first."""
    told = [run for run in runs if run.settings is not None]
    untold = [run.name for run in runs if run.settings is None]
    parts = []
    if untold:
        parts.append(missing(f"Settings of {', '.join(untold)} are not known: no {RUN_FILE}."))
    if not told:
        return parts
    groups = list(dict.fromkeys(group for run in told for group in run.settings or {}))
    by_group = {group: _settings(told, group) for group in groups}
    differing = {
        group: [name for name, values in rows.items() if _differ(name, values)]
        for group, rows in by_group.items()
    }
    if len(told) > 1:
        changed = {
            f"{group}: {name}": by_group[group][name]
            for group, names in differing.items()
            for name in names
        }
        parts.append(paragraph("What differs:" if changed else "No setting differs."))
        if changed:
            parts.append(table(["setting", *(run.name for run in told)], changed, changed))
    for group, rows in by_group.items():
        content = table([group, *(run.name for run in told)], rows, differing[group])
        parts.append(folded(f"All settings: {group} ({len(rows)})", content))
    return parts


def _settings(runs: Sequence[Run], group: str) -> dict[str, list[str]]:
    """name -> its value in each run, as JSON; empty where a run has none."""
    found = [(run.settings or {}).get(group, {}) for run in runs]
    names = dict.fromkeys(name for settings in found for name in settings)
    return {name: [_value(s[name]) if name in s else "" for s in found] for name in names}


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _differ(name: str, values: Sequence[str]) -> bool:
    return name not in NAMES_OF_RUNS and len(set(values)) > 1


def curves_section(runs: Sequence[Run]) -> list[str]:
    """The loss and each of its terms, and what evaluations gave, over the steps."""
    named = {run.name: run for run in runs}
    evaluated = {name for run in runs for name in run.evaluated}
    titles = TERMS | {
        name: shown(_validation(name.removeprefix("eval_"), runs)) for name in evaluated
    }
    parts = []
    for kind, caption in (
        (
            "terms",
            "The loss and its terms, each without its weight; a point is the mean of the steps "
            "since the one before. CoDIR rises from 0 while an empty bank fills.",
        ),
        ("evaluated", "Evaluations of the runs, on their validation examples."),
    ):
        names = dict.fromkeys(name for run in runs for name in getattr(run, kind))
        names = dict.fromkeys([name for name in TERMS if name in names]) | names
        if names:
            parts.append(figure(draw_curves(named, list(names), titles), caption))
        else:
            what = "The loss needs --logging_steps" if kind == "terms" else "They need evaluations"
            parts.append(missing(f"{what} smaller than the run: its log has none."))
    return parts


def embeddings_section(
    found: Mapping[str, Embeddings], labels: Sequence[Any], wanted: str
) -> list[str]:
    """Student and teacher in their common space.

    Args:
        wanted: what the page lacks for this, where nothing was found.
    """
    if not found:
        return [missing(wanted)]
    head = ["run", "of one text", "of two texts", "own teacher is nearest", "texts"]
    rows = {
        run: [e.same, e.other, f"{100 * e.found:.1f}%", len(e.student)] for run, e in found.items()
    }
    caption = (
        "Embeddings z of both sides, projected to the first two principal components of each run. "
        "Circles are the student's, crosses the teacher's; lines join a few texts' two."
    )
    return [
        paragraph("Mean cosine of a student's and a teacher's embedding:"),
        table(head, rows),
        figure(draw_embeddings(found, labels), caption),
    ]


def banks_section(banks: Mapping[str, BankStatistics], names: Mapping[int, str]) -> list[str]:
    """Fill, lengths and cosines of each memory bank.

    Args:
        banks: under the names of run and bank.
        names: of the labels, where a run knows them.
    """
    if not banks:
        text = "A bank is in the folder of a run of distill or pretrain with codir_weight > 0."
        return [missing(f"No run has a memory bank. {text}")]
    head = ["bank", "rows filled", "width", "norm", "cosine, one label", "cosine, two labels"]
    rows = {title: _bank_row(bank) for title, bank in banks.items()}
    counts = [bank.per_label or {} for bank in banks.values()]
    labels = sorted({label for count in counts for label in count})
    per_label = {
        names.get(label, f"label {label}"): [count.get(label) for count in counts]
        for label in labels
    }
    parts = [table(head, rows)]
    if per_label:
        parts.append(folded("Rows of each label", table(["label", *banks], per_label)))
    caption = (
        "Cosines of the filled rows, of up to 1,000 rows spread evenly. Negatives that are "
        "hard to tell from the positive are the pairs on the right."
    )
    return [*parts, figure(draw_cosines(banks), caption)]


def _bank_row(bank: BankStatistics) -> list[Any]:
    norm = None
    if bank.norms is not None:
        mean, least, largest = bank.norms
        norm = f"{mean:.4f} ({least:.4f} to {largest:.4f})"
    return [f"{bank.filled} of {bank.size}", bank.dim, norm, bank.within, bank.between]
