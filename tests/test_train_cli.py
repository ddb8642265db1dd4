"""train.py says what is wrong in one line, exits 2, and has created nothing by then."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from specstream.cli import quiet_known_noise, train
from specstream.config_errors import OneLineErrors

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
run: {run}
model:
  class_path: specstream.training.DistillationModule
  init_args:
    target:
      class_path: specstream.models.PretrainedLM
      init_args: {{path: {target}}}
    drafter:
      class_path: specstream.drafters.DraftModel
      init_args:
        model:
          class_path: specstream.models.UntrainedLM
          init_args: {{vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_layers: 1,
                      num_heads: 2{option}}}
    divergence: {{class_path: specstream.divergences.{divergence}}}
data:
  class_path: specstream.data.TextDataModule
  init_args:
    sources:
      - class_path: specstream.data.RawText
        init_args: {{path: {path}}}
    vocab_size: 300
trainer: {{max_steps: 1, accelerator: cpu, logger: false}}
"""


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run train.py and return the one line that it leaves on stderr."""
    assert train(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: str) -> str:
        text = tmp_path / "text.txt"
        text.write_text("the draft and the target\n" * 50)
        values = {
            "run": str(tmp_path / "run"),
            "target": str(tmp_path / "nothing"),
            "path": str(text),
            "option": "",
            "divergence": "ForwardKL",
        }
        path = tmp_path / "config.yaml"
        path.write_text(CONFIG.format(**values | changes))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--model.drafter.init_args.dpeth", "3"],
            "config error: model.drafter: option 'dpeth' is not accepted by DraftModel; "
            "accepted are model",
        ),
        (
            ["--model.drafter.model.num_layer", "3"],
            "config error: model.drafter.model: option 'num_layer' is not accepted by "
            "UntrainedLM; did you mean 'num_layers'?",
        ),
        (
            ["--trainer.max_stesp", "3"],
            "config error: trainer: option 'max_stesp' is not accepted; did you mean 'max_steps'?",
        ),
        (
            ["--trainer.max_steps", "many"],
            "config error: trainer.max_steps: expected int, got 'many'",
        ),
        (
            ["--model.chunk_tokens", "few"],
            "config error: model.chunk_tokens: expected int, got 'few'",
        ),
        (
            ["--config", "nowhere.yaml"],
            f"config error: there is no file '{ROOT / 'nowhere.yaml'}'",
        ),
    ],
)
def test_a_wrong_option_is_named_where_it_stands(
    arguments: list[str],
    line: str,
    config: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert fails(capsys, "--config", config(), *arguments) == line
    assert not (tmp_path / "run").exists()


def test_a_misspelt_option_of_a_file_is_named_too(
    config: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fails(capsys, "--config", config(option=", num_kv_head: 2")) == (
        "config error: model.drafter.model: option 'num_kv_head' is not accepted by UntrainedLM; "
        "did you mean 'num_kv_heads'?"
    )


@pytest.mark.parametrize("key", ["kept_nodes", "branching", "weights"])
def test_null_reaches_the_option_of_a_class_within_a_class(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = pytest.importorskip("specstream.training.command")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])

    class Parsed(Exception):
        pass

    class ParseOnly(command.TrainCLI):  # type: ignore[name-defined]
        def before_instantiate_classes(self) -> None:
            raise Parsed(self.config["model"]["init_args"]["drafter"]["init_args"])

    monkeypatch.setattr(command, "TrainCLI", ParseOnly)
    words = ["--config", "configs/train/streaming-shared-e2e-wikisql.yaml"]
    if key == "weights":  # null already: first a folder
        words += ["--model.init_args.drafter.init_args.weights", "some/folder"]
    with pytest.raises(Parsed) as found:
        command.run_training([*words, f"--model.init_args.drafter.init_args.{key}", "null"])
    assert found.value.args[0][key] is None


def test_a_null_that_an_option_does_not_take_is_refused(
    config: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "--config", config(option=", max_positions: null"))
    assert line == "config error: model.drafter.model.max_positions: expected int, got null"
    given = ["--config", config(), "--model.divergence.temperature", "null"]
    assert fails(capsys, *given).startswith("config error: model.divergence.temperature: expected ")
    assert not (tmp_path / "run").exists()


def test_a_text_that_ends_like_a_null_is_kept() -> None:
    class Inner:
        def __init__(self, text: str = "") -> None:
            self.text = text

    parser = OneLineErrors()
    parser.add_class_arguments(Inner)
    assert parser.parse_args(["--text=x=None"])["text"] == "x=None"


def test_an_overlay_before_its_recipe_is_told_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = ROOT / "configs/train", tmp_path / "run"
    overlay, recipe = folder / "overlays/dialogsum.yaml", folder / "eagle3-e2e-wikisql.yaml"
    given = ["--config", str(overlay), "--config", str(recipe), "--run", str(run)]
    assert fails(capsys, *given) == (
        "config error: model: has init_args and no class_path: give an overlay after what it is "
        "laid over"
    )
    assert not run.exists()


def test_an_unknown_class_is_named(
    config: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "--config", config(divergence="ForwradKL"))
    assert line.startswith("config error: model.divergence: ") and "ForwradKL" in line


def test_missing_data_is_an_error_before_anything_is_created(
    config: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = fails(capsys, "--config", config(path=str(tmp_path / "none.jsonl")))
    assert "none.jsonl" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--data.sequence_length", "0"],
            "config error: data: sequence_length must be at least 2, not 0",
        ),
        (
            ["--model.schedule", "specstream.training.WarmupCosine"]
            + ["--model.schedule.warmup_steps", "-1"],
            "config error: model.schedule: warmup_steps must be 0 or more, got -1",
        ),
        (
            ["--data.sources.path", "/nowhere.txt"],
            "config error: data: '/nowhere.txt' does not exist; '/' has no data files",
        ),
    ],
)
def test_a_constructor_that_refuses_is_quoted_alone(
    arguments: list[str],
    line: str,
    config: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fails(capsys, "--config", config(), *arguments) == line
    assert not (tmp_path / "run").exists()


def test_a_missing_target_is_an_error_of_one_line(
    config: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = fails(capsys, "--config", config())
    assert line == f"error: no model folder at '{tmp_path / 'nothing'}'"
    assert not (tmp_path / "run").exists()


def test_help_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--ckpt_path" in done.stdout and "--run" in done.stdout
    assert "specstream.data.TextDataModule" in done.stdout
    assert done.stderr == ""


def test_the_guess_of_epochs_shorter_than_the_logging_interval_is_silenced() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_known_noise()
        warnings.warn("The number of training batches (12) is smaller than the", stacklevel=1)
        warnings.warn("The number of training batches is odd", stacklevel=1)
    assert [str(one.message) for one in seen] == ["The number of training batches is odd"]


@pytest.mark.parametrize("accelerator", ["tpu", "abacus"])
def test_an_accelerator_that_is_not_here_is_one_line(
    accelerator: str,
    config: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = fails(capsys, "--config", config(), "--trainer.accelerator", accelerator)
    assert line.startswith("config error: trainer: ")
    assert re.search("torch_xla|invalid accelerator name", line)
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_not_installed_is_one_line(
    config: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = fails(capsys, "--config", config(), "--wandb.project", "p")
    assert line.startswith("config error: ") and "wandb" in line
