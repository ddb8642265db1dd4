"""The README's commands exist and its guarantees are the code's."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

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


def test_the_readme_has_one_place_for_results() -> None:
    assert README.count("<!-- results:begin -->") == README.count("<!-- results:end -->") == 1
