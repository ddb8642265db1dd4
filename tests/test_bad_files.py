"""Damaged model folders and wrong paths: each is one line that names the file or the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specstream.cli import generate
from specstream.data.tokenizer import load_tokenizer, train_character_tokenizer
from specstream.drafters import MaskedDraftModel
from specstream.drafters.loading import RECORD, save_drafter
from specstream.models import PretrainedLM, PretrainedMaskedLM, UntrainedLM, UntrainedMaskedLM
from specstream.processors import TextProcessor
from tests.masked_toys import VOCABULARY, characters, masked_lm
from tests.run_folders import processor, tiny_lm

Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model, a masked one, and a run with a drafter of the masked one."""
    folder = tmp_path_factory.mktemp("bad")
    tiny_lm().save(folder / "causal", processor().tokenizer)
    masked_lm().save(folder / "masked", characters().tokenizer)
    drafter = MaskedDraftModel(masked_lm(), lambda: masked_lm(1, block_length=8))
    save_drafter(folder / "run" / "draft", drafter, characters(), str(folder / "masked"))
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy to be damaged; the run's target is in it too."""
    copied = shutil.copytree(source, tmp_path / "models")
    change(copied / "run" / "draft" / RECORD, lambda r: r["target"].update(path=f"{copied}/masked"))
    return copied


def change(file: Path, how: Change) -> None:
    """Change the table in a file by `how`, in place or by what it returns."""
    table = json.loads(file.read_text())
    replaced = how(table)
    file.write_text(json.dumps(table if replaced is None else replaced))


def line_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run generate.py, which must fail in one line, and return that line."""
    assert generate([*arguments, "--max_new_tokens", "8"]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == ""
    return line


CONFIGS: dict[str, Change] = {
    "null": lambda _: None,
    "a list": lambda _: [],
    "a number": lambda _: 5,
    "sizes of text": lambda found: found.update(hidden_size="wide"),
    "layers of text": lambda found: found.update(num_hidden_layers="two"),
    "a list of heads": lambda found: found.update(num_attention_heads=[2]),
    "a list as model type": lambda found: found.update(model_type=["llama"]),
    "a number as layer types": lambda found: found.update(layer_types=7),
    "a text as end": lambda found: found.update(eos_token_id="end"),
}


@pytest.mark.parametrize("name", ["causal", "masked"])
@pytest.mark.parametrize("damage", CONFIGS)
def test_a_config_of_wrong_values_is_one_line_that_names_the_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    file = folder / name / "config.json"
    if damage == "null":
        file.write_text("null")
    else:
        change(file, CONFIGS[damage])
    line = line_of(capsys, "--run", str(folder / name), "--prompt", "a")
    assert str(folder / name) in line


@pytest.mark.parametrize("text", ["null", "{", "[]", '{"model": 3}', '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (folder / "masked" / "tokenizer.json").write_text(text)
    line = line_of(capsys, "--run", str(folder / "masked"), "--prompt", "a")
    assert f"no tokenizer could be loaded from '{folder / 'masked'}'" in line


@pytest.mark.parametrize(
    ("kind", "layers", "what"),
    [
        ("masked", 1, "holds 9 weights that its config.json has no place for, model.layers.1."),
        ("masked", 3, "lacks 9 of its model's weights, model.layers.2."),
    ],
)
def test_weights_that_are_too_many_or_too_few_are_named_and_nothing_else_is_shown(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str, layers: int, what: str
) -> None:
    file = folder / kind / "config.json"
    change(file, lambda found: found.update(num_hidden_layers=layers, layer_types=None))
    assert what in line_of(capsys, "--run", str(folder / kind), "--prompt", "a")


RECORDS: dict[str, tuple[Change, str]] = {
    "a class that is not ours": (
        lambda r: r["drafter"].update(class_path="os.path.join"),
        "names os.path.join, not a specstream drafter",
    ),
    "a class that is not stored": (
        lambda r: r["drafter"].update(class_path="specstream.drafters.Drafter"),
        "names specstream.drafters.Drafter, not a specstream drafter",
    ),
    "a class of no name": (
        lambda r: r["drafter"].update(class_path=None),
        "drafter.class_path must be a text, not None",
    ),
    "a target of no name": (
        lambda r: r["target"].update(path=7),
        "target.path must be a text, not 7",
    ),
    "arguments of another type": (
        lambda r: r["drafter"]["init_args"].update(sure="very"),
        "makes no MaskedDraftModel: ",
    ),
    "a list of arguments": (lambda r: r["drafter"].update(init_args=[1]), "is damaged: "),
    "a list": (lambda r: [r], "is damaged: "),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_an_odd_record_of_a_drafter_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    how, what = RECORDS[damage]
    change(folder / "run" / "draft" / RECORD, how)
    line = line_of(capsys, "--run", str(folder / "run"), "--prompt", "a")
    assert what in line and str(folder) in line


@pytest.mark.parametrize(
    ("form", "what"),
    [
        ({"mask_id": None}, "names no mask token: its config.json has mask_id null"),
        ({"block_length": 10**9}, "block_length 1000000000 is more than the 128 positions"),
    ],
)
def test_an_odd_form_of_a_drafter_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], form: dict[str, Any], what: str
) -> None:
    config = folder / "run" / "draft" / "config.json"
    change(config, lambda found: found["masked_diffusion"].update(form))
    assert what in line_of(capsys, "--run", str(folder / "run"), "--prompt", "a")


def test_a_misspelt_folder_is_not_asked_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*arguments: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("transformers.utils.hub.cached_files", asked)
    for kind in (PretrainedLM, PretrainedMaskedLM):
        with pytest.raises(ValueError, match=r"^no model folder at 'models/maskd'$"):
            kind("models/maskd")
    with pytest.raises(ValueError, match="no tokenizer could be loaded from 'models/maskd': there"):
        load_tokenizer("models/maskd")


FRESH = [
    ({"architecture": "electra"}, "'electra' does not work with a static key-value cache"),
    ({"architecture": "falcon"}, "architecture 'falcon' is not of the Llama family"),
    ({"architecture": "gemma3"}, "'gemma3' is multimodal"),
    ({"architecture": "phi3"}, "architecture 'phi3' cannot be made of these sizes: Padding_idx"),
    ({"vocab_size": 10**12}, r"has 1.6e\+13 parameters or more, which do not fit into this mach"),
    ({"num_layers": 10**9}, "parameters or more, which do not fit"),
]


@pytest.mark.parametrize("kind", [UntrainedLM, UntrainedMaskedLM])
@pytest.mark.parametrize(("option", "message"), FRESH)
def test_fresh_models_that_cannot_be_made_are_one_line(
    kind: type[UntrainedLM], option: dict[str, Any], message: str, capfd: Any
) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=message) as refusal:
        kind(intermediate_size=24, **sizes | option)
    assert "\n" not in str(refusal.value) and capfd.readouterr().err == ""


def test_a_model_that_reads_its_positions_off_the_mask_is_told_them() -> None:
    lm = UntrainedMaskedLM(VOCABULARY, 16, 24, 1, 2, architecture="opt", mask_id=1)
    assert lm(characters_of("abc")).shape == (1, 4, VOCABULARY)


def characters_of(text: str) -> Any:
    import torch

    return torch.tensor([characters().encode(text)])


def test_a_character_without_a_token_is_named() -> None:
    words = TextProcessor(train_character_tokenizer(["abc"]))
    assert words.unknown("abc") is None and words.unknown("aéb") == "é"
