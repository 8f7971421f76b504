"""The structure: which way imports go, what configs may import, and what an install brings."""

import ast
import functools
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top to the ground; a module may import its own level and lower ones.
LEVELS = [
    {"main", "sample", "evaluate", "convert", "plan", "prepare", "reference"},
    {"cli"},
    {"evaluation", "planning", "preparation"},
    {"load_pipeline"},
    {"experiment", "weights"},
    {"train", "generate"},
    {"interop", "metrics"},
    {"models", "diffusion", "data"},
    {"parallel"},
    {"programs"},
    {
        "config",
        "compilation_cache",
        "exits",
        "extras",
        "files",
        "flops",
        "hardware",
        "output_paths",
        "seeds",
        "text_files",
        "types",
    },
]
# Siblings that must not know one another.
APART = {
    "diffusion": {"models", "data", "train"},
    "data": {"models", "diffusion"},
    "models": {"data", "diffusion"},
    "metrics": {"models", "train", "generate"},
}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@functools.cache
def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


FILES = sorted(p for p in (ROOT / "vdx").rglob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    me = path.relative_to(ROOT / "vdx").parts[0].removesuffix(".py")
    level = next(i for i, names in enumerate(LEVELS) if me in names)
    for module in imports(path):
        other = part(module) if module.startswith("vdx.") else ""
        if other and other != me:
            target = next(i for i, names in enumerate(LEVELS) if other in names)
            assert target >= level, f"{path.name} imports {module}, which stands above it"
            assert other not in APART.get(me, ()), f"{me} must not know {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_needs_neither_torch_nor_tensorflow(path):
    assert not {m.split(".")[0] for m in imports(path)} & {"torch", "tensorflow", "diffusers"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_are_names_numbers_and_paths(path):
    assert imports(path) <= {"ml_collections", "configs"}  # and one another
    assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Lambda)]


def test_install_brings_neither_torch_nor_tensorflow():
    deps = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {d.split("[")[0].split(">")[0].split("=")[0].strip() for d in deps}
    assert names and not names & {"torch", "tensorflow", "diffusers"}
