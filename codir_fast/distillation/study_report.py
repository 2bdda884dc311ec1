"""Table and pictures of a study, from its lines."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from codir_fast.distillation.checkpoint import replaced_file
from codir_fast.distillation.model_card import escaped
from codir_fast.distillation.report.pictures import COLOURS, plt, save

Line = dict[str, Any]
# Name in a line -> title, factor for reading, and whether more is better.
METRICS: dict[str, tuple[str, float, bool]] = {
    "accuracy": ("accuracy (%)", 100, True),
    "agreement": ("agreement with the teacher (%)", 100, True),
    "nll": ("NLL (nats)", 1, False),
    "nll_calibrated": ("NLL, calibrated (nats)", 1, False),
    "kl": ("KL to the teacher (nats)", 1, False),
    "kl_calibrated": ("KL to the teacher, calibrated (nats)", 1, False),
}
# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; infinite for one difference."""
    n = len(differences)
    if n < 2:
        return mean(differences), float("inf")
    t = T_95[n - 2] if n - 2 < len(T_95) else 1.96
    return mean(differences), t * stdev(differences) / n**0.5


def paired(
    lines: Iterable[Line], arm: str, reference: str, metric: str, split: str = "test"
) -> list[float]:
    """Differences arm - reference on a split's texts, for each seed that both have."""
    by_arm: dict[str, dict[int, float]] = defaultdict(dict)
    for line in lines:
        by_arm[line["arm"]][line["seed"]] = line[split][metric]
    seeds = sorted(by_arm[arm].keys() & by_arm[reference].keys())
    return [by_arm[arm][seed] - by_arm[reference][seed] for seed in seeds]


def write_report(lines: list[Line], reference: str, output: Path, *, trials: bool) -> str:
    """Writes table.md and a picture per regime, or trials.md; the text."""
    if trials:
        return _write(output / "trials.md", _trials_table(lines))
    parts = []
    for regime in dict.fromkeys(line["regime"] for line in lines):
        of_regime = [line for line in lines if line["regime"] == regime]
        parts += [
            f"## {escaped(regime)}, {split} texts\n\n{_tables(of_regime, reference, split)}"
            for split in ("test", "validation")
        ]
        if any(line["arm"] != reference for line in of_regime):
            plot_differences(of_regime, reference, output / f"differences-{regime}.png")
    return _write(output / "table.md", "\n".join(parts))


def _write(path: Path, text: str) -> str:
    with replaced_file(path) as file:
        file.write_text(text, encoding="utf-8")
    return text


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _number(value: float, factor: float) -> str:
    return f"{factor * value:.{2 if factor == 100 else 4}f}"


def _tables(lines: list[Line], reference: str, split: str) -> str:
    arms = list(dict.fromkeys(line["arm"] for line in lines))
    titles = [title for title, _, _ in METRICS.values()]
    levels, differences = [], []
    for arm in arms:
        own = [line for line in lines if line["arm"] == arm]
        cells = _mean_cells(own, split)
        seconds = median(line["seconds_per_step"] for line in own)
        levels.append([escaped(arm), str(len(own)), *cells, f"{1000 * seconds:.0f}"])
        if arm != reference:
            differences.append([escaped(arm), *_difference_cells(lines, arm, reference, split)])
    return (
        _markdown(["arm", "runs", *titles, "ms a step"], levels)
        + f"\nDifferences to {escaped(reference)}, paired by seed, with 95 % intervals:\n\n"
        + _markdown(["arm", *titles], differences)
    )


def _difference_cells(lines: list[Line], arm: str, reference: str, split: str) -> list[str]:
    cells = []
    for metric, (_, factor, _) in METRICS.items():
        found = paired(lines, arm, reference, metric, split)
        if not found:
            cells.append("")
            continue
        middle, half = interval(found)
        sign = "+" if middle >= 0 else ""
        cells.append(f"{sign}{_number(middle, factor)} ± {_number(half, factor)}")
    return cells


def _trials_table(lines: list[Line]) -> str:
    """Mean of each trial's scores on the validation split; what is chosen is a person's to say."""
    by_trial: dict[tuple[str, str], list[Line]] = defaultdict(list)
    common = set.intersection(*(set(_items(line)) for line in lines)) if lines else set()
    for line in lines:
        own = ", ".join(
            f"{name} {value}" for name, value in _items(line) if (name, value) not in common
        )
        by_trial[line["arm"], own].append(line)
    rows = [
        [escaped(arm), escaped(own), str(len(runs)), *_mean_cells(runs, "validation")]
        for (arm, own), runs in by_trial.items()
    ]
    titles = [title for title, _, _ in METRICS.values()]
    return _markdown(["arm", "settings", "runs", *titles], rows)


def _mean_cells(lines: list[Line], split: str) -> list[str]:
    return [
        _number(mean(line[split][metric] for line in lines), factor)
        for metric, (_, factor, _) in METRICS.items()
    ]


def _items(line: Line) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in line["settings"].items()]


def plot_differences(lines: list[Line], reference: str, path: Path) -> None:
    """A panel for each metric: each arm's difference to the reference, with its interval."""
    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm != reference]
    figure, axes = plt.subplots(2, 3, figsize=(12, 1.6 + 0.7 * len(arms)), layout="constrained")
    for axis, (metric, (title, factor, more)) in zip(axes.flat, METRICS.items(), strict=True):
        for row, arm in enumerate(arms):
            found = paired(lines, arm, reference, metric)
            if len(found) < 2:
                continue
            middle, half = interval(found)
            better = middle - half > 0 if more else middle + half < 0
            colour = COLOURS[2] if better else COLOURS[0]
            axis.errorbar(
                factor * middle, row, xerr=factor * half, fmt="o", color=colour, capsize=3
            )
        axis.axvline(0, color="grey", linewidth=1)
        axis.locator_params(axis="x", nbins=5)  # more would run into each other
        axis.set_yticks(range(len(arms)), arms)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.set_title(f"{title}, {'more' if more else 'less'} is better", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Difference to {reference}, 95 % intervals; green: better than it")
    with replaced_file(path) as file:
        save(figure, file)
