"""Imports point one way, and what ships to the Hub needs only what the Hub's users have."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
ALLOWED = {
    "torch", "numpy", "PIL", "tokenizers", "transformers", "diffusers", "huggingface_hub", "safetensors",
}  # fmt: skip
REMOTE = sorted((ROOT / "modeling_mot").glob("*.py"))
OURS = {"modeling_mot", "training", "conversion"}


def imports(path):
    """(node, level, module) of every import, those in function bodies included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node, node.level, node.module or ""


def inside_try(path):
    """Lines of imports whose absence is handled."""
    tries = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Try)]
    return {
        child.lineno
        for node in tries
        for statement in node.body
        for child in ast.walk(statement)
        if hasattr(child, "lineno")
    }


def files_of(package):
    return sorted((ROOT / package).rglob("*.py"))


def test_modeling_mot_is_flat():
    assert files_of("modeling_mot") == REMOTE


@pytest.mark.parametrize("path", REMOTE, ids=lambda path: path.name)
def test_modeling_mot_imports_only_what_is_allowed(path):
    handled = inside_try(path)
    for node, level, module in imports(path):
        top = module.split(".")[0]
        if level == 0 and node.lineno not in handled:
            assert top in ALLOWED or top in sys.stdlib_module_names, f"{path.name}:{node.lineno} imports {module}"


@pytest.mark.parametrize("path", REMOTE, ids=lambda path: path.name)
def test_siblings_are_imported_in_the_form_that_the_hub_loads(path):
    for node, level, module in imports(path):
        assert level in (0, 1), f"{path.name}:{node.lineno} leaves the folder"
        if level == 1:
            where = f"{path.name}:{node.lineno}"
            assert module and "." not in module, f"{where} must be `from .sibling import name`"
            assert (ROOT / "modeling_mot" / f"{module}.py").exists(), f"{where}: there is no {module}.py"
        else:
            assert module.split(".")[0] not in OURS, f"{path.name}:{node.lineno} imports {module}"


@pytest.mark.parametrize("path", REMOTE, ids=lambda path: path.name)
def test_no_text_looks_like_a_sibling_import(path):
    """The Hub's loader reads files with a regular expression, docstrings included."""
    code = {node.lineno for node, level, _ in imports(path) if level == 1}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip().startswith(("from .", "import .")):
            assert number in code, f"{path.name}:{number}: {line.strip()}"


@pytest.mark.parametrize(("package", "forbidden"), [("training", "conversion"), ("conversion", "training")])
def test_training_and_conversion_do_not_import_each_other(package, forbidden):
    for path in files_of(package):
        for node, level, module in imports(path):
            assert level or module.split(".")[0] != forbidden, f"{path}:{node.lineno} imports {module}"
