"""train.py: models, data and folders that do not fit are one line, before data is prepared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from specstream.cli import train
from specstream.data import TextDataModule
from specstream.data.loader import TooFewRows
from specstream.data.tokenizer import train_character_tokenizer, train_tokenizer
from specstream.models import UntrainedLM, UntrainedMaskedLM
from specstream.training import command
from specstream.training.command import lost_peer
from specstream.training.masked_diffusion import take_mask_token
from specstream.training.run_folder import check_apart
from tests.training.conftest import VOCABULARY

Config = dict[str, Any]
Write = Callable[..., str]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2}


def line_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run train.py, which must fail in one line, and return that line."""
    assert train(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(data: TextDataModule) -> None:
        raise AssertionError("data was prepared")

    monkeypatch.setattr(TextDataModule, "prepare_data", prepared)


MISTAKES = [
    ("--data.sequence_length 257", "sequence_length 257 is longer than the 256 positions of the"),
    ("--model.drafter.model.max_positions 63", "longer than the 63 positions of the drafter"),
    ("--model.drafter.model.architecture electra", "'electra' does not work with a static key-v"),
    ("--model.drafter.model.vocab_size 1000000000000", "parameters or more, which do not fit"),
]


@pytest.mark.parametrize(("options", "what"), MISTAKES)
@pytest.mark.usefixtures("nothing_is_prepared")
def test_models_that_cannot_be_made_or_filled_are_refused_before_data_is_prepared(
    write_config: Write,
    distillation: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: str,
    what: str,
) -> None:
    assert what in line_of(capsys, "--config", write_config("run", distillation), *options.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("nothing_is_prepared")
def test_the_positions_of_a_model_in_a_folder_are_known_before_data_is_prepared(
    write_config: Write, distillation: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    UntrainedLM(VOCABULARY, 16, 32, 1, 2, max_positions=32).save(tmp_path / "target")
    path = {"path": str(tmp_path / "target")}
    target = {"class_path": "specstream.models.PretrainedLM", "init_args": path}
    distillation["init_args"]["target"] = target
    line = line_of(capsys, "--config", write_config("run", distillation))
    assert line.endswith("sequence_length 64 is longer than the 32 positions of the target")
    (tmp_path / "target" / "config.json").write_text("null")
    line = line_of(capsys, "--config", write_config("run", distillation))
    assert "config.json' is damaged: it holds null, not a table of keys" in line


def masked(write_config: Write, model: Config, **data: Any) -> str:
    """Write a config that trains a masked model on the corpus; return its path."""
    block = {"class_path": "specstream.training.MaskedDiffusionModule", "init_args": model}
    path = Path(write_config("run", block))
    config = yaml.safe_load(path.read_text())
    config["data"]["init_args"] |= {"mask_token": True} | data
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_causal_model_keeps_its_own_tokenizer_when_it_becomes_a_masked_one(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train_tokenizer(["quite another text, of zebras and xylophones"] * 9, VOCABULARY)
    UntrainedLM(VOCABULARY, **SIZES).save(tmp_path / "causal", other)
    model = {
        "class_path": "specstream.models.MaskedFromCausal",
        "init_args": {"path": str(tmp_path / "causal")},
    }
    line = line_of(capsys, "--config", masked(write_config, {"model": model}))
    assert f"the data's tokenizer is not that of model '{tmp_path / 'causal'}': token " in line
    assert not (tmp_path / "run").exists()


def fresh(**options: Any) -> Config:
    sizes = {"vocab_size": VOCABULARY + 1, "max_positions": 64, **SIZES, **options}
    return {"class_path": "specstream.models.UntrainedMaskedLM", "init_args": sizes}


@pytest.mark.usefixtures("nothing_is_prepared")
def test_a_drafter_beside_a_target_of_no_folder_is_refused_before_data_is_prepared(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    causal = {
        "class_path": "specstream.models.MaskedFromCausal",
        "init_args": {"path": str(tmp_path / "causal")},
    }
    for target, name in ((fresh(), "UntrainedMaskedLM"), (causal, "MaskedFromCausal")):
        models = {"model": fresh(block_length=8), "target": target}
        line = line_of(capsys, "--config", masked(write_config, models))
        assert line.startswith("error: the target must be a PretrainedMaskedLM of a folder or the")
        assert line.endswith(f"which the drafter is to be loaded with, not {name}")
    assert not (tmp_path / "run").exists()


def test_one_token_for_the_mask_and_the_end_is_refused() -> None:
    tokenizer = train_character_tokenizer(["abc"])
    tokenizer.mask_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="has one token, 0, for the mask and the end of text"):
        take_mask_token(UntrainedMaskedLM(16, **SIZES), tokenizer, "model")


def test_a_run_inside_the_folder_of_its_target_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target" / "model"
    UntrainedMaskedLM(16, **SIZES, mask_id=1).save(target)
    for run in (target, target / "run"):
        with pytest.raises(ValueError, match="is in the folder of the target"):
            check_apart(str(target), run)
    check_apart(str(target), tmp_path / "target" / "drafter")
    check_apart("", Path("run"))


@pytest.mark.usefixtures("nothing_is_prepared")
def test_a_run_in_the_way_of_its_target_is_refused_before_data_is_prepared(
    write_config: Write, distillation: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    UntrainedLM(VOCABULARY, **SIZES, max_positions=64).save(tmp_path / "first" / "model")
    path = {"path": str(tmp_path / "first" / "model")}
    distillation["init_args"]["target"] = {
        "class_path": "specstream.models.PretrainedLM",
        "init_args": path,
    }
    config = write_config("run", distillation)
    inside = tmp_path / "first" / "model" / "drafter"
    line = line_of(capsys, "--config", config, "--run", str(inside))
    assert line.startswith(f"error: run: {inside} is in the folder of the target")
    words = ["--run", str(tmp_path / "first"), "--overwrite", "true"]
    line = line_of(capsys, "--config", config, *words)
    assert line.startswith(f"error: run: {tmp_path / 'first'} holds the target")
    assert not inside.exists() and (tmp_path / "first" / "model").is_dir()


def test_rows_too_few_for_all_processes_are_said_by_the_first_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_few(arguments: list[str]) -> int:
        raise TooFewRows("the data gives 3 rows, fewer than one global batch of 8")

    monkeypatch.setattr(command, "fit_and_export", too_few)
    line = "error: the data gives 3 rows, fewer than one global batch of 8\n"
    for rank, said in ((0, line), (1, "")):
        monkeypatch.setattr(command.rank_zero_only, "rank", rank, raising=False)
        assert train([]) == 2
        assert capsys.readouterr().err == said


def test_weights_that_are_not_finite_are_not_exported(
    write_config: Write, language_model: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = deepcopy(language_model)
    wild["init_args"]["optimizer"]["init_args"]["lr"] = 1e30
    config = write_config("run", wild, limit_val_batches=0)
    assert train(["--config", config]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("training diverged: after 4 steps there are weights that are not finite")
    assert (tmp_path / "run" / "last.ckpt").exists() and not (tmp_path / "run" / "model").exists()


def test_a_process_that_lost_its_peer_has_no_mistake_of_its_own() -> None:
    assert lost_peer(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:22250."))
    assert not lost_peer(RuntimeError("out of memory"))


NETWORK = (
    '{"class_path": "specstream.models.PatchTransformer", "init_args": {"in_channels": 1, '
    '"out_channels": 1, "patch": [3, 3], "hidden_size": 8, "num_classes": 10%s}}'
)
MEDIA_MISTAKES = [
    (("model.network", NETWORK % ""), "model.network: patches of [3, 3] do not cut a grid of [8,"),
    (("model.network", NETWORK % ', "text_size": -1'), "text_size must be in 0..100000, got -1"),
    (("data", "specstream.data.CaptionDataModule"), "trains with media, specstream.data.MediaData"),
    (("model.decoding.num_samples", "1000000000000"), "num_samples must be in 1..10000, got 1000"),
    (("model.decoding.num_steps", "1000000000000"), "must be in 1..100000, got 1000000000000"),
    (("model.decoding.guidance", ".nan"), "guidance must be a finite number, got nan"),
    (("model.decoding.window", "65"), "window must be in 0..64, got 65"),
]


@pytest.mark.parametrize(("option", "what"), MEDIA_MISTAKES)
def test_media_and_models_that_do_not_fit_leave_no_run(
    option: tuple[str, str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, (name, value) = tmp_path / "run", option
    given = ["--config", "configs/train/digits.yaml", "--run", str(run), "--trainer.max_steps", "1"]
    given += ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
    given += [f"--{name}", value]
    given += ["--data.prompts", "[a]"] if name == "data" else []
    assert what in line_of(capsys, *given)
    assert not run.exists()


@pytest.mark.parametrize("config", ["digits-residual", "digits-independent"])
def test_a_run_in_the_way_of_a_target_of_media_is_refused(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = shutil.copytree("checkpoints/digits", tmp_path / "digits")
    given = ["--config", f"configs/train/{config}.yaml", "--model.target", str(home / "model")]
    line = line_of(capsys, *given, "--run", str(home), "--overwrite", "true")
    assert line.startswith(f"error: run: {home} holds the target")
    if config == "digits-residual":
        line = line_of(capsys, *given, "--run", str(home / "model" / "run"))
        assert f"is in the folder of the target '{home / 'model'}'" in line
    assert (home / "model").is_dir() and not (home / "model" / "run").exists()


NUMBERS = ["trainer.gradient_clip_val", "checkpoint.every_minutes"]


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_not_0_or_more(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", "configs/train/digits.yaml", "--run", str(tmp_path / "run")]
    line = line_of(capsys, *given, f"--{name}", ".nan")
    assert line == f"config error: {name}: must be 0 or more, got nan"
