"""House rules that a machine can hold (the rest is in .github/CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "specstream").rglob("*.py")) + sorted(ROOT.glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50  # without its docstring
VAGUE_NAMES = {"common", "factory", "helper", "helpers", "manager", "misc", "util", "utils"}
# An absolute path into somebody's own directories; part of a URL does not count.
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:home|root|Users|work|workspace)/\w")


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_no_committed_file_names_a_machine_path() -> None:
    found = []
    for path in _tracked():
        try:
            text = path.read_text()
        except (UnicodeDecodeError, OSError):
            continue  # weights, a file deleted but not yet committed, a link
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in MACHINE_PATH.findall(text)]
    assert not found


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SOURCES + TESTS}
    assert not {name: n for name, n in lengths.items() if n > MAX_FILE_LINES}


def test_no_function_is_longer_than_50_lines() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{function.name}": _num_lines(function)
        for path in SOURCES
        for function in _functions(path)
    }
    assert not {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES}


def test_no_module_has_a_name_that_says_nothing() -> None:
    vague = [p for p in SOURCES + TESTS if VAGUE_NAMES & set(p.stem.lower().split("_"))]
    assert not vague


def _passes_on(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> bool:
    """Whether `function` hands its `**name` to a call, where a wrong key still fails."""
    return any(
        keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == name
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
    )


def test_no_constructor_swallows_unknown_arguments() -> None:
    swallowing = [
        f"{path.relative_to(ROOT)}:{function.lineno}"
        for path in SOURCES
        for function in _functions(path)
        if function.name == "__init__" and function.args.kwarg
        if not _passes_on(function, function.args.kwarg.arg)
    ]
    assert not swallowing


def test_comments_and_docstrings_are_ascii() -> None:
    assert not [str(path) for path in SOURCES if not path.read_text().isascii()]


def _imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return roots


def test_every_third_party_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w.-]", line)[0].lower() for line in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    roots = set().union(*map(_imported_roots, SOURCES)) - set(sys.stdlib_module_names)
    missing = {
        root
        for root in roots - {"specstream"}
        if not declared & {name.lower() for name in distributions.get(root, [root])}
    }
    assert not missing


def test_the_pins_satisfy_what_the_project_declares() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and line[0] != "#")
    assert not [name for name, version in pins.items() if "+" in version]  # local builds
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])
    assert not [r for r in wanted if pins.get(r.name.lower()) not in r.specifier]
