"""The rules of the layout: imports go one way, and nothing imports a second copy of the kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "codir_fast"

# A module may import modules of a lower level, and of its own.
LEVELS = {
    "version": 0,
    "_C": 0,
    "kernels": 0,
    "errors": 0,
    "checks": 1,
    "reference": 1,
    "backend": 1,
    "bank_facts": 1,
    "collectives": 1,
    "ops": 2,
    "sharding": 2,
    "bank_rows": 2,
    "float8_rows": 2,
    "partial_sums": 3,
    "directions": 3,
    "functional": 3,
    "losses": 3,
    "negative_rows": 3,
    "negatives": 3,
    "loss_arguments": 3,
    "global_batch": 3,
    "sharded_contrast": 3,
    "sharded_passes": 3,
    "distributed": 3,
    "memory_bank": 3,
    "pooling": 3,
    "projection": 3,
    "sampling": 3,
    "compat": 4,
    "distillation": 4,
    "cli": 5,
    "doctor": 4,
    "__main__": 6,
    "__init__": 6,
}
BINDINGS = (
    "binding",
    "binding_contrast",
    "binding_cuda",
    "binding_in_batch",
    "binding_rows",
    "module",
)
HEAVY = {"triton", "transformers", "datasets", "accelerate", "matplotlib"}


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Absolute names of the modules a file imports, and whether that happens when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            prefix = "." * node.level
            found += [(prefix + name, node not in late) for name in names]
    return found


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = python_files(PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    level = LEVELS[unit(path)]
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "codir_fast" and len(parts) > 1 and parts[1] in LEVELS:
            assert LEVELS[parts[1]] <= level, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_light_modules_stay_light(path):
    if LEVELS[unit(path)] > 3 and unit(path) != "__init__":
        return
    heavy = [name for name, early in imports(path) if early and name.split(".")[0] in HEAVY]
    assert not heavy
    if unit(path) != "__init__":
        early = [name for name, early in imports(path) if early]
        assert not [name for name in early if name.startswith("codir_fast.kernels")]


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in ("codir_fast", "kernels", "tests", "benchmarks", "examples")
        for path in python_files(ROOT / folder)
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_kernels_have_one_name(path):
    banned = [name for name, _ in imports(path) if name.split(".")[0] == "kernels"]
    assert not banned, "import codir_fast.kernels: `kernels` would be a second copy of the module"


def test_the_kernels_know_no_framework_above_them():
    for path in python_files(ROOT / "kernels"):
        above = [name for name, _ in imports(path) if name.startswith("codir_fast.")]
        assert all(name.startswith("codir_fast.kernels") for name in above), (path, above)


def test_only_the_binding_knows_torch_and_only_the_module_knows_python():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu") or path.stem in BINDINGS:
            continue
        text = path.read_text(encoding="utf-8")
        assert "#include <torch/" not in text and "#include <pybind11/" not in text, path


def test_one_operator_one_name():
    """The name of an op finds its specification, schema, Python face and test."""
    binding = (ROOT / "csrc" / "binding.cpp").read_text(encoding="utf-8")
    reference = (PACKAGE / "reference.py").read_text(encoding="utf-8")
    operators = ("masked_pool", "bank_contrast", "in_batch_contrast", "indexed_contrast")
    for op in (*operators, "bank_update"):
        assert f"def {op}(" in reference and f'"{op}(' in binding
        assert (PACKAGE / "ops" / f"{op}.py").is_file()
        assert (ROOT / "tests" / f"test_{op}.py").is_file()
        assert (ROOT / "csrc" / f"{op}.h").is_file()
