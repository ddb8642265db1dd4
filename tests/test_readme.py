"""The README's commands exist and its guarantees are the code's."""

from __future__ import annotations

import re
import shlex
import subprocess
from inspect import isabstract
from pathlib import Path
from typing import get_args

import pytest

from specstream import drafters
from specstream.generation.media_loading import Sampler
from specstream.structures import Guarantee

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_readme_command_names_what_exists(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    assert words[0] == "python"
    assert (ROOT / words[1]).is_file()
    if "--config" in words:
        assert (ROOT / words[words.index("--config") + 1]).is_file()


def test_the_readme_explains_every_guarantee() -> None:
    explained = re.findall(r"^\| `([a-z ]+)` \|", README, flags=re.MULTILINE)
    assert explained == [guarantee.value for guarantee in Guarantee]


def test_the_map_of_the_code_names_what_exists() -> None:
    named = re.findall(r"^\| `(specstream/[\w/.]+)` \|", README, flags=re.MULTILINE)
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_map_of_the_code_names_every_module() -> None:
    rows = re.findall(r"^\| (`specstream/[^|]*) \|", README, flags=re.MULTILINE)
    named = {Path(name).stem for row in rows for name in re.findall(r"`([\w/.]+)`", row)}
    parts = [*(ROOT / "specstream").glob("*.py"), *(ROOT / "specstream").glob("*/__init__.py")]
    modules = {path.parent.name if path.name == "__init__.py" else path.stem for path in parts}
    assert named == modules - {"specstream"}


def test_the_pages_name_every_drafter_and_every_sampler_of_media() -> None:
    page = (ROOT / "docs/drafters.md").read_text()
    concrete = [name for name in drafters.__all__ if not isabstract(getattr(drafters, name))]
    assert not [name for name in concrete if f"`{name}`" not in page]
    page = (ROOT / "docs/media.md").read_text()
    assert not [name for name in get_args(Sampler) if f"`{name}`" not in page]


def test_every_page_is_named_in_the_readme() -> None:
    pages = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    assert not [page for page in pages if f"]({page})" not in README]


def test_the_readme_has_one_place_for_results() -> None:
    assert README.count("<!-- results:begin -->") == README.count("<!-- results:end -->") == 1
