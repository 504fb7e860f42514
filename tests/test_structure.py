"""The shape of the house: what a newcomer may rely on when looking for something."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tgi_kernels", "tgi_server")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FAMILIES = sorted(
    path.parent.name for path in (ROOT / "csrc").glob("*/ops.cpp") if path.parent.name != "runtime"
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, "split this file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 50, f"{node.name} has {length} lines; split it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_and_the_command_line_are_read_in_cli_only(path: Path) -> None:
    if path.name == "cli.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            assert name not in {"os.environ", "os.getenv"}, f"line {node.lineno} reads {name}"
            # A module with a command line of its own reads it below `if __name__ == "__main__"`.
            assert name != "sys.argv" or 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_evaluates_or_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}, f"line {node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert "pickle" not in names, f"line {node.lineno}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_family_has_its_function_oracle_and_test(family: str) -> None:
    for path in (
        f"tgi_kernels/{family}.py",
        f"tgi_kernels/reference/{family}.py",
        f"tests/kernels/test_{family}.py",
    ):
        assert (ROOT / path).exists(), f"{path} is missing"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "csrc").rglob("*.cu")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_cuda_files_include_no_torch(path: Path) -> None:
    includes = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#include")]
    assert not [line for line in includes if "torch" in line]


def test_the_structure_page_stays_one_page_and_names_every_folder() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 60
    folders = [path.parent for package in PACKAGES for path in (ROOT / package).glob("*/__init__.py")]
    for folder in folders:
        assert f"{folder.relative_to(ROOT)}/" in page, f"{folder.name} is not explained"


@pytest.mark.parametrize(
    "module", ["tgi_server.cli", "tgi_server.service", "tgi_server.http.app", "tgi_server.engine.client"]
)
def test_a_front_end_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
