"""train.py end to end on tiny models: run folders, exports, resuming."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specstream.cli import train
from specstream.models import PretrainedLM
from specstream.training import LanguageModelingModule
from specstream.training.command import check_devices

Config = dict[str, Any]
Write = Callable[..., str]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)["state_dict"]


def test_a_language_model_is_trained_and_exported(
    tmp_path: Path, write_config: Write, language_model: Config
) -> None:
    assert train(["--config", write_config("lm", language_model)]) == 0
    run = tmp_path / "lm"
    files = {path.name for path in run.iterdir()}
    assert files >= {"config.yaml", "provenance.json", "metrics.jsonl", "last.ckpt", "best.ckpt"}
    assert {path.name for path in (run / "model").iterdir()} >= {
        "README.md",
        "config.json",
        "loss.png",
        "model.safetensors",
        "tokenizer.json",
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_a_drafter_is_distilled_and_stands_alone(
    tmp_path: Path, write_config: Write, language_model: Config, distillation: Config
) -> None:
    assert train(["--config", write_config("lm", language_model)]) == 0
    distillation["init_args"]["target"] = {
        "class_path": "specstream.models.PretrainedLM",
        "init_args": {"path": str(tmp_path / "lm" / "model")},
    }
    distillation["init_args"]["decoding"] = {"num_prompts": 2, "max_new_tokens": 8}
    assert train(["--config", write_config("draft", distillation)]) == 0
    from specstream.generation.loading import load_run

    run = tmp_path / "draft"
    (completion,) = load_run(run).complete(["the draft"], seed=1)
    assert completion.tokens
    names = set(weights(run / "last.ckpt"))
    assert names and all(name.startswith("drafter.") for name in names)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/tau" in row and "val/alpha_1" in row for row in rows)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and set(samples[0]) >= {"prompt", "speculative", "plain"}


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (
            "--trainer.max_steps=-5",
            "config error: trainer: `max_steps` must be a non-negative integer or -1",
        ),
        (
            "--trainer.max_epochs=-1 --trainer.max_steps=-1",
            "error: trainer: training has no end that a schedule could plan for; give max_steps",
        ),
        ("--trainer.devices=two", "config error: trainer: `devices` selected with "),
        (
            "--trainer.accumulate_grad_batches=0",
            "config error: trainer.accumulate_grad_batches: must be above 0, got 0",
        ),
        (
            "--trainer.val_check_interval=0",
            "config error: trainer.val_check_interval: must be above 0, got 0",
        ),
        (
            "--checkpoint.every_steps=-1",
            "config error: checkpoint.every_steps: must be 0 or more, got -1",
        ),
        ("--trainer.fast_dev_run=true", "config error: trainer.fast_dev_run: keeps nothing"),
        (
            "--trainer.gradient_clip_algorithm=value",
            "config error: trainer.gradient_clip_algorithm: gradients are clipped by norm",
        ),
        (
            "--model.init_args.chunk_tokens=0",
            "config error: model: chunk_tokens must be at least 1, got 0",
        ),
        pytest.param(
            "--trainer.accelerator=gpu",
            "config error: trainer: No supported gpu backend found!",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_lightning_or_train_py_refuses_is_one_line(
    option: str,
    line: str,
    tmp_path: Path,
    write_config: Write,
    language_model: Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(["--config", write_config("run", language_model), *option.split()]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        (
            "num_drafted",
            90,
            "error: decoding: num_drafted 90 is more than the 64 tokens that this ",
        ),
        (
            "num_prompts",
            999,
            "error: decoding: 999 prompts are asked for, but the validation split",
        ),
        ("max_new_tokens", 999, "error: decoding: a prompt of "),
    ],
)
def test_what_validation_could_not_decode_is_refused_before_training(
    option: str,
    value: int,
    line: str,
    tmp_path: Path,
    write_config: Write,
    distillation: Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    distillation["init_args"]["decoding"] = {option: value}
    assert train(["--config", write_config("run", distillation)]) == 2
    (error,) = [e for e in capsys.readouterr().err.splitlines() if "error" in e]
    assert error.startswith(line)
    assert not (tmp_path / "run").exists()


def test_more_processes_than_cores_are_refused_before_anything_starts() -> None:
    cores = os.cpu_count() or 1
    for devices in (cores, str(cores), "auto", [0, 1]):
        check_devices("cpu", devices)
    for too_many in (cores + 1, str(cores + 1)):
        with pytest.raises(ValueError, match=f"trainer.devices: at most {cores} on"):
            check_devices("cpu", too_many)
    check_devices("gpu", cores + 1)


def test_a_disk_full_at_the_export_is_one_line_and_the_next_resumption_exports(
    tmp_path: Path,
    write_config: Write,
    language_model: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = write_config("run", language_model, limit_val_batches=0)
    with monkeypatch.context() as patch:
        patch.setattr(PretrainedLM, "save", full)
        assert train(["--config", config]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"could not export to {tmp_path / 'run'}: No space left on device; ")
    assert train(["--config", config, "--ckpt_path", "last"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_rows_too_long_for_a_model_end_a_run_in_one_line(
    write_config: Write,
    language_model: Config,
    distillation: Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, model in (("lm", language_model), ("drafter", distillation)):
        config = write_config(name, model)
        assert train(["--config", config, "--data.sequence_length", "257"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "sequence_length 257 is longer than the 256 positions of the" in line


def test_the_seed_of_a_run_reaches_its_module(
    write_config: Write,
    language_model: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(module: LanguageModelingModule) -> None:
        raise ValueError(f"the seed is {module.run_seed}")

    monkeypatch.setattr(LanguageModelingModule, "configure_model", refuse)
    assert train(["--config", write_config("run", language_model), "--seed_everything", "7"]) == 2
    assert capsys.readouterr().err == "error: the seed is 7\n"


def files_of(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        ("--data.vocab_size=400", "error: the data's tokenizer has "),
        ("--trainer.val_check_interval=99", "error: `val_check_interval` (99) must be less than"),
    ],
)
def test_a_mistake_while_overwriting_leaves_the_old_run_as_it_was(
    mistake: str,
    line: str,
    tmp_path: Path,
    write_config: Write,
    language_model: Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config("run", language_model, check_val_every_n_epoch=1)
    assert train(["--config", config]) == 0
    before = files_of(tmp_path / "run")
    assert train(["--config", config, "--overwrite", "true", mistake]) == 2
    assert capsys.readouterr().err.startswith(line)
    assert files_of(tmp_path / "run") == before


def test_a_run_that_fails_before_its_first_checkpoint_gives_the_old_one_back(
    tmp_path: Path,
    write_config: Write,
    language_model: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write_config("run", language_model)
    assert train(["--config", config]) == 0
    run = tmp_path / "run"
    before = files_of(run)

    def fail(module: LanguageModelingModule, *arguments: object) -> None:
        moved_aside = {name for name in files_of(run) if name.startswith(".replaced/")}
        assert moved_aside == {f".replaced/{name}" for name in before}
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelingModule, "training_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(["--config", config, "--overwrite", "true"])
    assert files_of(run) == before
    assert train(["--config", config, "--overwrite", "true", "--data.seed", "5"]) == 0
    after = files_of(run)
    assert set(after) == set(before) and after["last.ckpt"] != before["last.ckpt"]


def test_a_training_of_no_steps_exports_what_it_began_with(
    tmp_path: Path, write_config: Write, language_model: Config
) -> None:
    assert train(["--config", write_config("run", language_model, max_steps=0)]) == 0
    assert {"config.yaml", "provenance.json", "model"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
