"""What training streams computes, changes and saves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specstream.divergences import DPace, EndToEndTV
from specstream.drafters import SpeculativeStreaming
from specstream.generation.loading import load_run
from specstream.models import PretrainedLM
from specstream.models.lora import add_adapters, save_adapter
from specstream.training import StreamingModule
from specstream.training.command import run_training
from specstream.training.language_modeling import scored_ahead
from specstream.training.run_folder import check_apart
from specstream.training.streaming import stream_places
from tests.toys import toy_lm
from tests.training.conftest import OPTIMIZER


def block(target: str, mode: str, **options: Any) -> dict[str, Any]:
    return {
        "class_path": "specstream.training.StreamingModule",
        "init_args": {
            "target": {"class_path": "specstream.models.PretrainedLM", "init_args": {
                "path": target, "dtype": "float32"}},
            "drafter": {
                "class_path": "specstream.drafters.SpeculativeStreaming",
                "init_args": {"num_streams": 2, "mode": mode, "rank": 2},
            },
            "optimizer": OPTIMIZER,
            "chunk_tokens": 16,
            "decoding": {
                "class_path": "specstream.training.HeldOutDecoding",
                "init_args": {"num_prompts": 1, "max_new_tokens": 4, "num_drafted": 2},
            },
            **options,
        },
    }  # fmt: skip


@pytest.fixture
def target(write_config: Callable[..., str], language_model: dict[str, Any], tmp_path: Path) -> str:
    assert run_training(["--config", write_config("target", language_model)]) == 0
    return str(tmp_path / "target" / "model")


def losses(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_streams_learn_and_the_run_decodes(
    mode: str, target: str, write_config: Callable[..., str], tmp_path: Path
) -> None:
    config = write_config(mode, block(target, mode), max_steps=16, val_check_interval=16)
    assert run_training(["--config", config]) == 0
    run = tmp_path / mode
    for name in ("train/stream_1", "train/stream_2"):
        found = losses(run, name)
        assert sum(found[-4:]) < sum(found[:4]), name
    assert len(losses(run, "val/early_exit")) == 1
    names = set(torch.load(run / "last.ckpt", weights_only=False)["state_dict"])
    assert any("lora" in name for name in names)
    assert not any("base_layer" in name or "embed_tokens" in name for name in names)
    decoder = load_run(run, dtype="float32")
    tuned = mode == "shared"
    assert decoder.target.path == (str(run / "target") if tuned else target)
    assert len(decoder.complete(["3 the draft"])[0].tokens) > 0


def test_decoding_amid_training_changes_nothing_of_it(
    target: str, write_config: Callable[..., str], tmp_path: Path
) -> None:
    found = []
    for interval in (2, 4):
        name = f"every-{interval}"
        config = write_config(name, block(target, "lossless"), val_check_interval=interval)
        assert run_training(["--config", config]) == 0
        found.append(torch.load(tmp_path / name / "last.ckpt", weights_only=False)["state_dict"])
    often, once = found
    assert often.keys() == once.keys()
    for name, value in once.items():
        assert torch.equal(often[name], value), name


def test_streams_are_scored_where_their_token_is_in_the_same_document() -> None:
    batch = {
        "documents": torch.tensor([[0, 0, 0, 0, 1, 1, -1]]),
        "loss_mask": torch.tensor([[False, False, True, True, True, True, False]]),
    }
    assert scored_ahead(batch, 2).tolist() == [[True, True, False, False, False, False, False]]
    assert scored_ahead(batch, 3).tolist() == [[True, False, False, False, False, False, False]]
    assert not scored_ahead(batch, 9).any(), "a row may be shorter than the streams reach"
    places, real = stream_places(batch, 2)
    assert places.tolist() == [[0, 1]] and bool(real.all())


def test_a_tuned_target_is_kept_whole_or_as_its_adapters(
    target: str, write_config: Callable[..., str], tmp_path: Path
) -> None:
    laws = []
    for merge in (True, False):
        name = f"merge-{merge}"
        config = write_config(name, block(target, "shared", merge=merge), max_steps=4)
        assert run_training(["--config", config]) == 0
        decoder = load_run(tmp_path / name, dtype="float32")
        laws.append(decoder.target(torch.tensor([[3, 5, 7, 9]])))
    files = {file.name for file in (tmp_path / "merge-False" / "target").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "config.json" not in files
    config = write_config("merge-True", block(target, "shared", merge=False), max_steps=4)
    assert run_training(["--config", config, "--ckpt_path=last"]) == 0
    again = {file.name for file in (tmp_path / "merge-True" / "target").iterdir()}
    assert again == files, "the whole model is gone"
    base = PretrainedLM(target, dtype="float32")(torch.tensor([[3, 5, 7, 9]]))
    assert (laws[0] - base).abs().max() > 10 * (laws[0] - laws[1]).abs().max()


def test_an_adapter_that_does_not_fit_its_base_is_refused_in_a_line(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = toy_lm(num_layers=2)
    model.save(base)
    add_adapters(model.decoder.layers, 2, 4.0, 0)
    save_adapter(tmp_path / "adapter", model.model, str(base))
    PretrainedLM(str(tmp_path / "adapter"))
    toy_lm(num_layers=1).save(base)
    with pytest.raises(ValueError, match=r"adapter in .*adapter. was made for another model"):
        PretrainedLM(str(tmp_path / "adapter"))
    toy_lm(num_layers=2, hidden_size=24).save(base)
    with pytest.raises(ValueError, match=r"adapter in .*adapter. was made for another model"):
        PretrainedLM(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="cannot load the adapter in"):
        PretrainedLM(str(tmp_path / "adapter"))
    (base / "config.json").unlink()
    with pytest.raises(ValueError, match=r"the base of the adapter in .* holds no config.json"):
        PretrainedLM(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no readable adapter_config.json"):
        PretrainedLM(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"future_weight": -1.0}, "future_weight must not be negative or infinite, got -1.0"),
        ({"future_weight": math.nan}, "future_weight must not be negative or infinite, got nan"),
        ({"divergence": DPace()}, "DPace weighs consecutive places"),
        ({"divergence": EndToEndTV()}, "EndToEndTV weighs consecutive places"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        StreamingModule(SpeculativeStreaming, toy_lm, **options)


def test_a_run_never_replaces_the_target_that_it_reads(tmp_path: Path) -> None:
    for path in (tmp_path / "other" / "model", tmp_path / "run" / "mine", "facebook/opt-125m"):
        check_apart(str(path), tmp_path / "run")
    for name in ("model", "target"):
        with pytest.raises(ValueError, match=f"run holds the target '.*/{name}', which would be"):
            check_apart(str(tmp_path / "run" / name), tmp_path / "run")
