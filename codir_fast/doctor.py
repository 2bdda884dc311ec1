"""`codir-fast doctor`: versions, build, which backends can run and why not, and what to do."""

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from codir_fast import _C, backends
from codir_fast.errors import UsageError
from codir_fast.version import __version__

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "matplotlib",
)


def run(arguments: list[str]) -> int:
    """Prints the report, as text or with --json as one JSON object."""
    parser = argparse.ArgumentParser(prog="codir-fast doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UsageError(f"doctor has no flag {unknown[0]}; doctor --help lists them")
    report = diagnose()
    print(json.dumps(report, indent=2) if options.json else as_text(report))
    return 0


def diagnose() -> dict[str, Any]:
    """All that doctor knows, as plain data."""
    versions = {"python": platform.python_version(), "codir-fast": __version__}
    versions |= {name: _version(name) for name in PACKAGES}
    report: dict[str, Any] = {
        "versions": versions,
        "machine": f"{platform.machine()} {platform.system()}",
        "build": _C.build_info(),
        "cpu": {"in use": _C.cpu_isa(), "threads": _C.num_threads(), "has": _C.cpu_features()},
        "gpus": _C.cuda_devices() or _gpus_of_torch(),
        "backends": {
            name: {"available": status.available, "reason": status.reason, "ops": list(status.ops)}
            for name, status in backends().items()
        },
    }
    report["advice"] = _advice(report)
    return report


def _gpus_of_torch() -> list[dict[str, Any]]:
    """For a build without a CUDA part, which can't ask the driver itself."""
    return [
        {"name": torch.cuda.get_device_name(n), "capability": torch.cuda.get_device_capability(n)}
        for n in range(torch.cuda.device_count())
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _advice(report: dict[str, Any]) -> list[str]:
    versions, build = report["versions"], report["build"]
    advice = []
    if not build["cuda"]:
        advice.append(
            "built without CUDA: put nvcc on PATH, leave CODIR_FAST_CUDA out, and install again"
        )
    if report["gpus"] and not torch.cuda.is_available():
        advice.append("there is a GPU but torch is a CPU build: install torch with CUDA")
    if report["gpus"] and versions["triton"] == "not installed":
        advice.append("for the Triton kernels: pip install '.[triton]' in the sources")
    if any(versions[name] == "not installed" for name in ("transformers", "datasets")):
        advice.append("for finetune, distill, evaluate: pip install '.[train]' in the sources")
    if build["version"] != versions["codir-fast"]:
        advice.append("the compiled part is of another version: install again")
    return advice


def as_text(report: dict[str, Any]) -> str:
    build, cpu = report["build"], report["cpu"]
    lines = ["versions"]
    lines += [f"  {name:<13}{version}" for name, version in report["versions"].items()]
    architectures = build["cuda_architectures"].replace(" ", ", sm_")
    cuda = (
        f"CUDA {build['cuda_version']} for sm_{architectures}" if build["cuda"] else "no CUDA part"
    )
    lines += [
        "build",
        f"  {build['compiler']}, {build['build_type']}, {cuda}",
        f"  headers of torch {build['torch_version']}, for torch {build['torch_target']} or newer",
        "machine",
        f"  {report['machine']}, {cpu['in use']} code in use, {cpu['threads']} threads",
    ]
    gpus = [
        f"{gpu['name']} (sm_{gpu['capability'][0]}{gpu['capability'][1]})" for gpu in report["gpus"]
    ]
    lines.append(f"  GPUs: {', '.join(gpus) if gpus else 'none: ' + _C.cuda_error()}")
    lines.append("backends")
    for name, status in report["backends"].items():
        mark = "yes" if status["available"] else "no"
        lines.append(f"  {name:<8}{mark:<5}{status['reason']} [{', '.join(status['ops']) or '-'}]")
    lines.append("what to do")
    lines += [
        f"  {line}" for line in report["advice"] or ["nothing: all that can run here is there"]
    ]
    return "\n".join(lines)
