"""Runs of train.py with masked diffusion models, and what they fill while they train."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specstream.cli import train
from specstream.drafters import MaskedDraftModel
from specstream.drafters.loading import load_canvas_drafter, read_record
from specstream.models.pretrained_masked import MaskedForm, PretrainedMaskedLM
from specstream.sampling import Sampling
from specstream.training import HeldOutFilling, MaskedDiffusionModule
from tests.toys import toy_lm
from tests.training.conftest import OPTIMIZER, TRAINER, data_block
from tests.training.test_processes import halve_the_batch, run_two
from tests.training.test_resume import AVERAGING, assert_equal, contents, metrics

BLOCK = 8
DECODING = {
    "num_prompts": 3,
    "max_new_tokens": 16,
    "unmasking": {
        "class_path": "specstream.unmasking.StaticSchedule",
        "init_args": {"num_steps": 4},
    },
}


def fresh(**options: Any) -> dict[str, Any]:
    """Return the config block of an untrained masked model."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1}
    return {
        "class_path": "specstream.models.UntrainedMaskedLM",
        "init_args": {**sizes, "num_heads": 2, "max_positions": 64, **options},
    }


def masked(model: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return the config block of a training."""
    schedule = {"class_path": "specstream.training.ConstantRate"}
    fixed = {"optimizer": OPTIMIZER, "schedule": schedule, "chunk_tokens": 64}
    return {
        "class_path": "specstream.training.MaskedDiffusionModule",
        "init_args": {"model": model, "pad_canvas": True, "decoding": DECODING, **fixed, **options},
    }


def puzzles(cache: Path) -> dict[str, Any]:
    sources = [
        {"class_path": f"specstream.data.{name}", "init_args": {"num_puzzles": 60}}
        for name in ("Sudoku", "Countdown")
    ]
    return {
        "class_path": "specstream.data.TextDataModule",
        "init_args": {
            "sources": sources,
            "characters": True,
            "sequence_length": 48,
            "pack": False,
            "batch_size": 8,
            "validation_fraction": 0.2,
            "cache_dir": str(cache),
            "show_sample": False,
        },
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a config for a tiny run on puzzles under tmp_path and return its path."""

    def write(
        name: str, model: dict[str, Any], data: dict[str, Any] | None = None, **trainer: Any
    ) -> str:
        path = tmp_path / f"{name}.yaml"
        config = {
            "run": str(tmp_path / name),
            "model": model,
            "data": data or puzzles(tmp_path.parent / "cache"),
            "trainer": TRAINER | trainer,
        }
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a target that was trained for a few steps."""
    folder = tmp_path_factory.mktemp("planning")
    config = {
        "run": str(folder / "target"),
        "model": masked(fresh(), corruption=0.1),
        "data": puzzles(folder.parent / "cache"),
        "trainer": TRAINER | {"callbacks": [AVERAGING]},
    }
    (folder / "target.yaml").write_text(yaml.safe_dump(config))
    assert train(["--config", str(folder / "target.yaml")]) == 0
    return folder / "target"


def beside(target: Path) -> dict[str, Any]:
    path = {"path": str(target / "model")}
    return {"class_path": "specstream.models.PretrainedMaskedLM", "init_args": path}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_target_is_trained_validated_and_exported(target: Path) -> None:
    model = PretrainedMaskedLM(str(target / "model"))
    assert model.form == MaskedForm(mask_id=1, corruption=0.1) and model.vocab_size == 32
    names: set[str] = set().union(*lines(target / "metrics.jsonl"))
    assert {"val/loss", "val/surprise", "val/solved", "train/loss", "train/surprise"} <= names
    assert not {"val/acceptance", "val/call_ratio"} & names
    samples = lines(target / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [2] * 3 + [4] * 3
    assert all(sample.keys() == {"step", "prompt", "filled"} for sample in samples)
    assert {sample["prompt"].split()[0] for sample in samples} == {"sudoku", "countdown"}
    average, weights = contents(target)["state_dict"], contents(target)["optimized_weights"]
    assert average.keys() == weights.keys()
    exported = model.model.state_dict()
    key = "model.model.model.norm.weight"
    assert not torch.equal(average[key], weights[key])
    found = exported["model.norm.weight"].bfloat16()
    assert torch.equal(found, average[key].bfloat16())


@pytest.mark.parametrize(
    ("block_length", "divergence"),
    [(BLOCK, None), (None, {"class_path": "specstream.training.Certainty"})],
    ids=["block", "certainty"],
)
def test_a_drafter_is_trained_beside_its_target_and_names_it(
    block_length: int | None,
    divergence: dict[str, Any] | None,
    target: Path,
    write: Callable[..., str],
    tmp_path: Path,
) -> None:
    size = {} if block_length is None else {"block_length": block_length}
    options = {"complementary": True, "divergence": divergence, "target": beside(target)}
    model = masked(fresh(seed=1, **size), **options)
    assert train(["--config", write("drafter", model)]) == 0
    run = tmp_path / "drafter"
    record = read_record(run / "draft")
    assert record["target"] == {"path": str(target / "model")}
    whole = PretrainedMaskedLM(str(target / "model"))
    drafter = load_canvas_drafter(run / "draft", whole)
    assert isinstance(drafter, MaskedDraftModel)
    assert drafter.model.form == MaskedForm(1, block_length)
    for row in lines(run / "metrics.jsonl"):
        if "val/loss" in row:
            assert 0 <= row["val/solved"] <= 1 and 0 <= row["val/acceptance"] <= 1
            assert row["val/call_ratio"] > 0
    sample = lines(run / "samples.jsonl")[-1]
    assert sample.keys() == {"step", "prompt", "filled", "filled_with_drafts"}
    assert not any(name.startswith("target.") for name in contents(run)["state_dict"])


def test_an_interrupted_run_resumes_to_the_same_bits(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = masked(fresh(), corruption=0.1)
    more = {"callbacks": [AVERAGING], "max_steps": 14, "val_check_interval": 5}  # over an epoch
    assert train(["--config", write("whole", model, **more)]) == 0
    parts = write("parts", model, **more)
    begin = MaskedDiffusionModule.on_train_batch_start

    def interrupted(self: MaskedDiffusionModule, batch: Any, batch_idx: int) -> None:
        begin(self, batch, batch_idx)
        if self.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedDiffusionModule, "on_train_batch_start", interrupted)
        assert train(["--config", parts]) == 143
    assert train(["--config", parts, "--ckpt_path", "last"]) == 0
    one, other = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert one["epoch"] > 0
    for key in ("state_dict", "optimizer_states", "optimized_weights", "global_step"):
        assert_equal(one[key], other[key])
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


@pytest.mark.parametrize("shifted", [False, True])
def test_a_causal_model_becomes_a_masked_one_with_room_for_the_mask(
    shifted: bool, corpus: Path, write: Callable[..., str], tmp_path: Path
) -> None:
    toy_lm(300, max_positions=256).save(tmp_path / "causal")
    path = {"path": str(tmp_path / "causal"), "shifted": shifted}
    model = {"class_path": "specstream.models.MaskedFromCausal", "init_args": path}
    data = data_block(corpus, tmp_path.parent)
    data["init_args"] |= {"mask_token": True}
    options = {"pad_canvas": False, "decoding": DECODING | {"num_prompts": 1}}
    assert train(["--config", write("grown", masked(model, **options), data)]) == 0
    found = PretrainedMaskedLM(str(tmp_path / "grown" / "model"))
    assert found.vocab_size == 301 and found.form == MaskedForm(300, None, shifted)
    assert found.model.get_output_embeddings().weight.shape == (301, 16)
    rows = lines(tmp_path / "grown" / "metrics.jsonl")
    assert all("val/solved" not in row for row in rows)  # the prompts are no puzzles
    losses = [row["val/loss"] for row in rows if "val/loss" in row]  # of the same masks
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(
    target: Path, write: Callable[..., str], tmp_path: Path
) -> None:
    """One of the processes has no prompt to fill, and the last validation batch is not full."""
    model = masked(
        fresh(block_length=BLOCK),
        target=beside(target),
        corruption=0.1,
        decoding=DECODING | {"num_prompts": 1},
    )
    more = {"max_steps": 3, "val_check_interval": 3, "limit_val_batches": 1.0}
    assert train(["--config", write("one", model, **more)]) == 0
    two = write("two", model, **more, devices=2, strategy="ddp")
    halve_the_batch(two)
    run_two(two)
    states = [contents(tmp_path / name)["state_dict"] for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-6)
    found = [lines(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two")]
    for name in ("val/loss", "val/solved", "val/acceptance", "val/call_ratio"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_a_causal_model_is_refused_in_one_line(
    write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_lm(300).save(tmp_path / "causal")
    causal = {"path": str(tmp_path / "causal")}
    given = {"class_path": "specstream.models.PretrainedMaskedLM", "init_args": causal}
    for model in (masked(given), masked(fresh(), target=given)):
        assert train(["--config", write("refused", model)]) == 2
        said = capsys.readouterr().err.strip()
        assert "is a causal language model, not a masked diffusion one" in said
        assert "\n" not in said
    assert not (tmp_path / "refused").exists()


def test_prompts_without_room_are_refused(
    write: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    long = DECODING | {"max_new_tokens": 50}
    assert train(["--config", write("long", masked(fresh(), decoding=long))]) == 2
    assert "decoding: a canvas of" in capsys.readouterr().err
    many = DECODING | {"num_prompts": 5000}
    assert train(["--config", write("many", masked(fresh(), decoding=many))]) == 2
    assert "decoding: 5000 prompts are asked for" in capsys.readouterr().err
    assert train(["--config", write("block", masked(fresh(block_length=BLOCK)))]) == 2
    assert "decoding: the target must be bidirectional" in capsys.readouterr().err


def test_a_filling_that_has_no_meaning_is_refused() -> None:
    for options, message in (
        ({"num_prompts": 0}, "num_prompts must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"block_tokens": 5, "max_new_tokens": 16}, "block_tokens 5 does not divide"),
        ({"sampling": Sampling(repetition_penalty=1.2)}, "repetition penalty has no meaning"),
    ):
        with pytest.raises(ValueError, match=message):
            HeldOutFilling(**options)  # type: ignore[arg-type]
