"""Imports only point down, and importing is cheap."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "datasets",
    "diffusers",
    "lightning",
    "matplotlib",
    "peft",
    "torchao",
    "transformers",
    "wandb",
}


def _imported_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after `statement`."""
    program = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_imports_only_point_down() -> None:
    from importlinter.cli import lint_imports

    before = Path.cwd()
    try:
        os.chdir(ROOT)
        assert lint_imports(no_cache=True) == 0
    finally:
        os.chdir(before)


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not _imported_by("import specstream") & (HEAVY | {"torch", "numpy"})


@pytest.mark.parametrize("module", ["sampling", "divergences", "verification"])
def test_importing_the_science_needs_torch_only(module: str) -> None:
    assert not _imported_by(f"import specstream.{module}") & HEAVY


@pytest.mark.parametrize("module", ["drafters", "generation"])
def test_importing_a_decoding_layer_adds_the_base_class_of_the_cache_only(module: str) -> None:
    assert not _imported_by(f"import specstream.{module}") & (HEAVY - {"transformers"})


def test_importing_the_command_line_is_cheap() -> None:
    assert not _imported_by("import specstream.cli") & HEAVY
