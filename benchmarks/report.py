"""The results of a benchmark as a table and as pictures."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = "codir_fast"
# Okabe and Ito's colours, told apart by colour-blind readers too; grey for the others.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"
_LINES = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")

Row = dict[str, Any]


def as_table(rows: Sequence[Row], ceilings: dict[str, float]) -> str:
    """Markdown, one table a shape."""
    parts = []
    if ceilings:
        parts.append(
            "Ceilings in the same run: matrix product "
            f"{ceilings['product_flops'] / 1e9:.0f} GFLOP/s, "
            f"copy {ceilings['copy_bytes_per_second'] / 1e9:.1f} GB/s."
        )
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape]
        sizes = ", ".join(f"{letter}={size}" for letter, size in own[0]["sizes"].items())
        unit = "GFLOP/s" if any("gflops" in row for row in own) else "GB/s"
        parts += [
            "",
            f"### {shape}: {own[0]['operator']}, {sizes}",
            "",
            f"| peer | ms | times {OURS} | {unit} | of ceiling | one read of the bank, of copy | "
            "extra memory (MiB) | error |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        parts += [_line(row) for row in own]
    return "\n".join(parts)


def _line(row: Row) -> str:
    if "refused" in row:
        return f"| {row['peer']} | {row['refused']} | | | | | | |"
    memory = "?" if row["extra_memory"] is None else f"{row['extra_memory'] / 2**20:.1f}"
    error = "not the loss" if row["error"] is None else f"{row['error']:.1e}"
    rate = row["gflops"] if "gflops" in row else row["gigabytes_per_second"]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    # A bank is read at this share of the copy's rate at least, were it read once.
    read = f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else ""
    return (
        f"| {row['peer']} | {row['median'] * 1e3:.3g} | {ratio} | {rate:.3g} | "
        f"{row['share_of_ceiling']:.0%} | {read} | {memory} | {error} |"
    )


def train_step_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    sizes = ", ".join(f"{letter}={size}" for letter, size in rows[0]["sizes"].items())
    lines = [
        f"### A training step, teacher cached: {sizes}",
        "",
        f"Added: as a share of the CE + KD step of the same round, {rows[0]['rounds']} rounds.",
        "",
        "| step | ms | added, median | its 95% interval | quartiles |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        added = {name: f"{share:+.1%}" for name, share in row["added"].items()}
        lines.append(
            f"| {row['what']} | {row['median'] * 1e3:.1f} | {added['median']} | "
            f"{added['low']} to {added['high']} | {added['lower']} to {added['upper']} |"
        )
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Whole or not at all: what is there stays until the new file is complete."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(f"{text}\n", encoding="utf-8")
    os.replace(part, path)


def plot_shapes(rows: Sequence[Row], stamp: str, path: Path) -> None:
    """One panel a shape, one bar a peer: time relative to ours, where ours was timed."""
    rows = [row for row in rows if row.get("ratio") is not None]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if not shapes:
        return
    columns = min(len(shapes), 3)
    lines = -(-len(shapes) // columns)
    figure, axes = _figure(lines, columns, width=4.6, height=3.0)
    for axis in axes.flat[len(shapes) :]:
        axis.axis("off")
    for axis, shape in zip(axes.flat, shapes, strict=False):
        own = [row for row in rows if row["shape"] == shape]
        own.sort(key=lambda row: -row["median"])
        names = [row["peer"] for row in own]
        ratios = [row["ratio"] for row in own]
        colours = [_BLUE if row["peer"].startswith(OURS) else _GREY for row in own]
        axis.barh(names, ratios, color=colours)
        for name, row in zip(names, own, strict=True):
            label = f" {_number(row['median'] * 1e3)} ms ({_number(row['ratio'])}x), {_rate(row)}"
            axis.text(row["ratio"], name, label, va="center", fontsize=7)
        low, high = min(ratios) / 2, max(ratios)
        axis.set(xscale="log", xlim=(low, high * (high / low) ** 1.1))  # room for the labels
        _plain_ticks(axis.xaxis, high / low)
        sizes = ", ".join(str(size) for size in own[0]["sizes"].values())
        axis.set_title(f"{shape} ({sizes})", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel(f"time, relative to {OURS} (logarithmic)", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, stamp, path)


def _rate(row: Row) -> str:
    if "gflops" not in row:
        return f"{_number(row['gigabytes_per_second'])} GB/s"
    small = row["gflops"] < 1000
    rate = row["gflops"] if small else row["gflops"] / 1e3
    return f"{_number(rate)} {'GFLOP/s' if small else 'TFLOP/s'}"


def _number(value: float) -> str:
    """Two digits at least, without an exponent."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def plot_sweep(points: Sequence[Row], letter: str, stamp: str, path: Path) -> None:
    """Time and peak extra memory over one size, both logarithmic, a line a peer that was timed."""
    points = [point for point in points if "median" in point]
    if not points:
        return
    panels = [("median", "time (ms)", 1e3), ("extra_memory", "peak extra memory (MiB)", 2**-20)]
    figure, axes = _figure(1, 2, width=5.4, height=3.8)
    names = list(dict.fromkeys(point["peer"] for point in points))
    others = iter(_LINES * len(names))
    colours = {name: _BLUE if name == OURS else next(others) for name in names}
    for axis, (key, label, factor) in zip(axes.flat, panels, strict=True):
        for name in names:
            own = [p for p in points if p["peer"] == name and p.get(key) is not None]
            own = [p for p in own if p[key] > 0]
            if not own:
                continue
            xs, ys = [p["sizes"][letter] for p in own], [p[key] * factor for p in own]
            width = 2.2 if name == OURS else 1.3
            axis.plot(xs, ys, "o-", color=colours[name], lw=width, ms=3, label=name)
        axis.set(xscale="log", yscale="log", ylabel=label)
        axis.set_xlabel("K, rows of the bank" if letter == "K" else "B, queries")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8)
    fixed = {k: v for k, v in points[0]["sizes"].items() if k != letter}
    axes.flat[0].set_title(", ".join(f"{k} = {v:,}" for k, v in fixed.items()), fontsize=9)
    _save(figure, stamp, path)


def _figure(lines: int, columns: int, width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")  # files only, no display
    import matplotlib.pyplot as plt

    size = (width * columns, height * lines)
    return plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)


def _plain_ticks(axis: Any, spread: float) -> None:
    """Numbers as people write them, on a logarithmic axis: more of them where few powers fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 30 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axis.set_minor_formatter(NullFormatter())


def _save(figure: Any, stamp: str, path: Path) -> None:
    import matplotlib.pyplot as plt
    from PIL import Image  # which matplotlib needs itself

    figure.supxlabel(stamp, fontsize=7, color="#555555")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    # A palette, for its few colours, takes a third of the bytes.
    Image.open(picture).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
