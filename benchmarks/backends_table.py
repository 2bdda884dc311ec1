"""The tables of codir_fast.benchmarks.backends: a line a case, and what the cases of a dtype, a
width and a form say together.
"""

import statistics
from collections.abc import Sequence

from codir_fast.benchmarks import report

WIDTHS = (64, 128, 256, 384, 512)  # that the hand-written kernel pads D to
_TIE = 0.98  # of the ratio of times: by less than 2 % nothing is slower


def as_table(rows: Sequence[report.Row]) -> str:
    """Markdown, a line a case; an error is the largest of RESULTS."""
    first, second = rows[0]["backends"]
    heads = ["dtype", "form", "D", "B", "K", f"{first} us", f"{second} us", f"{second} / {first}"]
    lines = [[*heads, f"{first} error", f"{second} error"], ["---"] * 2 + ["---:"] * 8]
    for row in rows:
        figures = [row.get("refused", ""), "", ""]
        if "times" in row:
            figures = [f"{row['times'][name]['median'] * 1e6:.1f}" for name in (first, second)]
            figures.append(f"{row['ratio']:.2f}")
        found = [row["errors"].get(name) for name in (first, second)]
        worst = [f"{max(parts.values()):.1e}" if parts else "" for parts in found]
        sizes = [f"{row[name]:,}" for name in "DBK"]
        lines.append([row["dtype"], row["form"], *sizes, *figures, *worst])
    return _markdown(lines)


def summary(rows: Sequence[report.Row]) -> str:
    """Markdown: the ratios and the backend to take, one or by B, of each dtype, padded D, form."""
    groups: dict[tuple[str, int, str], list[report.Row]] = {}
    for row in rows:
        width = min(width for width in WIDTHS if width >= row["D"])
        groups.setdefault((row["dtype"], width, row["form"]), []).append(row)
    heads = ["dtype", "padded D", "form", "lowest ratio", "median ratio", "take"]
    lines = [heads, ["---", "---:", "---", "---:", "---:", "---"]]
    for (dtype, width, form), group in groups.items():
        ratios = [row["ratio"] for row in group if "ratio" in row]
        figures = [f"{f(ratios):.2f}" if ratios else "" for f in (min, statistics.median)]
        lines.append([dtype, str(width), form, *figures, choice(group)])
    return _markdown(lines)


def choice(group: Sequence[report.Row]) -> str:
    """What rows that differ in B say: a backend's name, or which where."""
    first, second = group[0]["backends"]
    taken: dict[str, list[str]] = {first: [], second: [], "failed": []}
    for row in group:
        name = "failed" if "ratio" not in row else first if row["ratio"] >= _TIE else second
        taken[name].append(f"{row['B']}" + ("" if row["D"] in WIDTHS else f" (D={row['D']})"))
    taken = {name: places for name, places in taken.items() if places}
    if len(taken) == 1:
        return next(iter(taken))
    return "; ".join(f"{name} at B = {', '.join(places)}" for name, places in taken.items())


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
