"""The rules in docs/architecture.md: directions of imports, and a list of all files."""

import ast
import re

import pytest
from conftest import ROOT

FOLDERS = "serving evaluation training interop generation reporting distributed cpu data".split()
FRONT = {path.stem for path in ROOT.glob("*.py")}


def modules_of(path):
    """The modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def level(parts):
    """The level of a module of brisk: 0 is the highest folder; files at the root are lowest."""
    return FOLDERS.index(parts[1]) if len(parts) > 1 and parts[1] in FOLDERS else len(FOLDERS)


@pytest.mark.parametrize("path", sorted(ROOT.glob("brisk/**/*.py")), ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    mine = level(path.relative_to(ROOT).with_suffix("").parts)
    for module in modules_of(path):
        parts = module.split(".")
        assert parts[0] not in FRONT, f"{path} imports the script {module}"
        if parts[0] == "brisk" and len(parts) > 1:
            assert level(parts) >= mine, f"{path} imports {module}, which is above it"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_no_script_imports_another(path):
    imported = {module.split(".")[0] for module in modules_of(path)}
    measured = {"train"} if path.stem == "bench" else set()  # bench.py times train.py's steps
    assert imported & FRONT <= {"model", "configurator"} | measured


def test_every_file_is_listed():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[: page.index("## The way of a run")]
    named = set(re.findall(r"`(\w+)`", table))
    files = {path.stem for path in ROOT.glob("brisk/**/*.py") if path.stem != "__init__"}
    assert files <= named
    assert all((ROOT / name).exists() for name in re.findall(r"`(\w+\.py)`", table))
