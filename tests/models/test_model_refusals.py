"""Models that the static cache cannot serve, and damaged ones, are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from specstream.models import PretrainedLM, UntrainedLM
from specstream.models.supported import refuse_unsupported

REFUSED = {
    "t5": "model type 't5' is an encoder-decoder, not a causal language model",
    "bloom": "model type 'bloom' uses ALiBi positions, which are not supported",
    "mpt": "model type 'mpt' uses ALiBi positions",
    "mamba": "model type 'mamba' has .* layers; only attention is supported",
    "rwkv": "model type 'rwkv' has recurrent layers; only attention is supported",
    "recurrent_gemma": "model type 'recurrent_gemma' has .* layers; only attention is supported",
    "llama4_text": "has chunked_attention layers; only attention is supported",
    "bert": "model type 'bert' does not work with a static key-value cache",
    "openai-gpt": "model type 'openai-gpt' does not work with a static key-value cache",
    "gpt_neo": "model type 'gpt_neo' does not work with a static key-value cache",
    "gemma3": "model type 'gemma3' is multimodal; only its language model would do",
    "vit": "model type 'vit' is not a causal language model of transformers",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_the_cache_cannot_serve_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[kind]) as refusal:
        refuse_unsupported(AutoConfig.for_model(kind))
    assert "\n" not in str(refusal.value)


def test_alibi_by_option_is_refused_too() -> None:
    refuse_unsupported(AutoConfig.for_model("falcon", alibi=False))
    with pytest.raises(ValueError, match="'falcon' uses ALiBi"):
        refuse_unsupported(AutoConfig.for_model("falcon", alibi=True))


def test_positions_that_change_with_the_longest_row_are_refused() -> None:
    refuse_unsupported(AutoConfig.for_model("phi3"))
    factors = [1.0] * 48
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors
    }  # fmt: skip
    with pytest.raises(ValueError, match="'phi3' uses longrope positions"):
        refuse_unsupported(AutoConfig.for_model("phi3", rope_parameters=rope))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    UntrainedLM(16, 16, 24, 1, 2).save(tmp_path / "model")
    return tmp_path / "model"


def refused(path: Path | str, **options: str) -> str:
    """Return the one line with which loading fails."""
    with pytest.raises(ValueError) as refusal:
        PretrainedLM(str(path), **options)
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)
    return str(refusal.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == f"no model folder at '{tmp_path / 'none'}'"


def test_a_folder_without_a_config_is_no_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "holds no config.json, so it is not a model folder" in refused(folder)


def test_a_damaged_config_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text[: len(text) // 2])
    refused(folder)
    config.write_text(json.dumps(json.loads(text) | {"model_type": "from-the-future"}))
    refused(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot load a model from" in refused(folder)
    weights.write_bytes(b"")
    assert "cannot load a model from" in refused(folder)


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "cannot load a model from" in refused(folder)


def test_a_missing_tensor_is_not_drawn_at_random(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "lacks 1 of its model's weights, model.layers.0.mlp.up_proj.weight" in refused(folder)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 25}))
    assert "cannot load a model from" in refused(folder)


def test_an_unknown_attention_is_refused(folder: Path) -> None:
    message = "attn_implementation 'flash_attention_2' is not one of sdpa, eager"
    with pytest.raises(ValueError, match=message):
        PretrainedLM(str(folder), attn_implementation="flash_attention_2")


def test_an_untrained_model_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="hidden_size 17 is not a multiple of num_heads 2"):
        UntrainedLM(16, 17, 24, 1, 2)
    with pytest.raises(ValueError, match="architecture 'lama' is not a transformers model type"):
        UntrainedLM(16, 16, 24, 1, 2, architecture="lama")


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_layers", "num_heads"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_fresh_model_needs_sizes_of_at_least_one(name: str, value: int) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, not {value}$"):
        UntrainedLM(intermediate_size=24, **sizes | {name: value})
