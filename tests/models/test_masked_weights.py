"""Masked models come from folders of this project, and from LLaDA's and Dream's files as they are.

The tiny networks here are written under the hub's names by a map of their own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from specstream.models import UntrainedLM
from specstream.models.pretrained_masked import MaskedForm, PretrainedMaskedLM

MASK = 30
TOKENS = torch.tensor([[3, 30, 7, 30, 30, 11, 2]])

LLADA_CONFIG: dict[str, Any] = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0, "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}, "bias_for_layer_norm": False,
    "block_group_size": 1, "block_type": "llama", "d_model": 32, "embedding_size": 32,
    "eos_token_id": 29, "flash_attention": False, "include_bias": False,
    "include_qkv_bias": False, "init_device": "meta", "input_emb_norm": False,
    "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": MASK,
    "max_sequence_length": 64, "mlp_hidden_size": 48, "mlp_ratio": 4, "model_type": "llada",
    "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2,
    "pad_token_id": 29, "residual_dropout": 0.0, "rms_norm_eps": 1e-3, "rope": True,
    "rope_full_precision": True, "rope_theta": 500.0, "scale_logits": False, "vocab_size": 32,
    "weight_tying": False,
}  # fmt: skip
DREAM_CONFIG: dict[str, Any] = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "modeling_dream.DreamModel"}, "bos_token_id": 28,
    "eos_token_id": 28, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "mask_token_id": MASK, "max_position_embeddings": 64,
    "max_window_layers": 1, "model_type": "Dream", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 28, "rms_norm_eps": 1e-3,
    "rope_scaling": None, "rope_theta": 500.0, "sliding_window": None,
    "tie_word_embeddings": False, "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 32,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
LLADA_NAMES = (
    (r"^model\.embed_tokens\.", "model.transformer.wte."),
    (r"^model\.norm\.", "model.transformer.ln_f."),
    (r"^lm_head\.", "model.transformer.ff_out."),
    (r"^model\.layers\.", "model.transformer.blocks."),
    (r"\.self_attn\.o_proj\.", ".attn_out."),
    (r"\.self_attn\.", "."),
    (r"\.mlp\.gate_proj\.", ".ff_proj."),
    (r"\.mlp\.up_proj\.", ".up_proj."),
    (r"\.mlp\.down_proj\.", ".ff_out."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ff_norm."),
)


def drawn(model: Any) -> Any:
    """Give every weight, also norms and biases, a value of its own."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = 0.3 * torch.randn(weight.shape, generator=noise)
            weight.copy_(value + 1 if "norm" in name else value)
    return model.eval()


def in_hub_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a Llama as LLaDA calls them."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, theirs in LLADA_NAMES:
            name = re.sub(pattern, theirs, name)
        renamed[name] = tensor.contiguous().clone()
    return renamed


def written(folder: Path, config: dict[str, Any], state: dict[str, Tensor], shards: int = 1) -> str:
    """Write a folder as the hub has it, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(state.items())[i::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return drawn(LlamaForCausalLM(LlamaConfig(**SIZES)))


@pytest.fixture
def llada(tmp_path: Path, llama: LlamaForCausalLM) -> Path:
    return Path(written(tmp_path / "llada", LLADA_CONFIG, in_hub_names(llama.state_dict())))


@pytest.fixture
def dream(tmp_path: Path) -> Path:
    model = drawn(Qwen2ForCausalLM(Qwen2Config(**SIZES)))
    return Path(written(tmp_path / "dream", DREAM_CONFIG, dict(model.state_dict())))


def seeing_all(model: Any, tokens: Tensor) -> Tensor:
    """Return a network's own logits where every position sees every other, no mask token."""
    everything = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=everything).logits
    logits[..., MASK] = torch.finfo(logits.dtype).min
    return logits


@torch.no_grad()
def logits_of(path: str | Path) -> Tensor:
    return PretrainedMaskedLM(str(path), dtype="float32")(TOKENS)


def refused(path: str | Path) -> str:
    """Return the one line with which loading fails."""
    with pytest.raises(ValueError) as refusal:
        PretrainedMaskedLM(str(path), dtype="float32")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def changed(folder: Path, **keys: object) -> Path:
    """Write other keys into a folder's config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | keys
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_llada_is_a_llama_under_other_names(tmp_path: Path, llama: Any, shards: int) -> None:
    state = in_hub_names(llama.state_dict())
    assert "model.transformer.blocks.1.ff_proj.weight" in state
    lm = PretrainedMaskedLM(written(tmp_path, LLADA_CONFIG, state, shards), dtype="float32")
    assert lm.form == MaskedForm(MASK, None, False)
    assert lm.max_positions == 64 and not lm.model.training
    torch.testing.assert_close(lm(TOKENS), seeing_all(llama, TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize("shards", [1, 2])
def test_dream_is_a_qwen2_whose_outputs_speak_of_the_next_position(
    tmp_path: Path, shards: int
) -> None:
    qwen = drawn(Qwen2ForCausalLM(Qwen2Config(**SIZES)))
    path = written(tmp_path, DREAM_CONFIG, dict(qwen.state_dict()), shards)
    lm = PretrainedMaskedLM(path, dtype="float32")
    assert lm.form == MaskedForm(MASK, None, True)
    expected = seeing_all(qwen, TOKENS)
    with torch.no_grad():
        found = lm(TOKENS)
    torch.testing.assert_close(found[:, 1:], expected[:, :-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[:, :1], expected[:, :1], rtol=1e-6, atol=1e-6)


def test_tied_embeddings_need_no_head_in_the_file(tmp_path: Path) -> None:
    llama = drawn(LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)))
    state = in_hub_names(llama.state_dict())
    config = LLADA_CONFIG | {"weight_tying": True}
    expected = seeing_all(llama, TOKENS)
    with_head = written(tmp_path / "a", config, state)
    del state["model.transformer.ff_out.weight"]
    for path in (with_head, written(tmp_path / "b", config, state)):
        lm = PretrainedMaskedLM(path, dtype="float32")
        assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
        torch.testing.assert_close(lm(TOKENS), expected, rtol=0, atol=0)


def test_sizes_that_llada_leaves_out_follow_from_the_others(tmp_path: Path) -> None:
    sizes = SIZES | {"num_key_value_heads": 4, "intermediate_size": 4 * 32}
    llama = drawn(LlamaForCausalLM(LlamaConfig(**sizes)))
    config = LLADA_CONFIG | {"n_kv_heads": None, "mlp_hidden_size": None, "embedding_size": None}
    path = written(tmp_path, config, in_hub_names(llama.state_dict()))
    torch.testing.assert_close(logits_of(path), seeing_all(llama, TOKENS), rtol=0, atol=0)


def test_weights_take_the_wanted_dtype_and_frequencies_stay_exact(llada: Path) -> None:
    lm = PretrainedMaskedLM(str(llada), dtype="bfloat16")
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16} and lm.dtype == torch.bfloat16
    rotary = lm.model.model.rotary_emb
    expected = 500.0 ** (-torch.arange(0, 8, 2) / 8)
    for frequencies in (rotary.inv_freq, rotary.original_inv_freq):
        torch.testing.assert_close(frequencies, expected)
    assert lm(TOKENS).isfinite().all()


def test_weights_do_not_change_with_the_file_they_came_from(llada: Path) -> None:
    lm = PretrainedMaskedLM(str(llada), dtype="float32")
    before = lm(TOKENS)
    file = llada / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    torch.testing.assert_close(lm(TOKENS), before, rtol=0, atol=0)


def test_eager_attention_reads_the_same_full_mask(llada: Path, dream: Path) -> None:
    for folder in (llada, dream):
        lm = PretrainedMaskedLM(str(folder), dtype="float32", attn_implementation="eager")
        torch.testing.assert_close(lm(TOKENS), logits_of(folder), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="attn_implementation 'flash' is not one of sdpa, eager"):
        PretrainedMaskedLM(str(llada), attn_implementation="flash")


def test_a_hub_id_is_found_in_the_hubs_cache(
    tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--some--llada"
    written(repository / "snapshots" / "1", LLADA_CONFIG, in_hub_names(llama.state_dict()), 2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.testing.assert_close(logits_of("some/llada"), seeing_all(llama, TOKENS))
    assert refused("some/other").startswith("cannot load a model from 'some/other': ")


def test_what_was_loaded_from_the_hub_is_kept_as_a_folder_of_this_project(
    tmp_path: Path, dream: Path
) -> None:
    lm = PretrainedMaskedLM(str(dream), dtype="bfloat16")
    lm.save(tmp_path / "kept")
    kept = PretrainedMaskedLM(str(tmp_path / "kept"), dtype="bfloat16")
    assert kept.form == lm.form and kept.config.model_type == "qwen2"
    torch.testing.assert_close(kept(TOKENS), lm(TOKENS), rtol=0, atol=0)


NOT_A_LLAMA = {
    "alibi": True, "activation_type": "gelu", "attention_layer_norm": True,
    "bias_for_layer_norm": True, "block_group_size": 2, "block_type": "sequential",
    "include_bias": True, "include_qkv_bias": True, "input_emb_norm": True,
    "layer_norm_type": "gemma_rms", "layer_norm_with_affine": False, "rope": False,
    "scale_logits": True,
}  # fmt: skip


@pytest.mark.parametrize("key", NOT_A_LLAMA)
def test_a_llada_that_is_no_llama_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLADA_CONFIG | {key: NOT_A_LLAMA[key]}))
    message = refused(tmp_path)  # there are no weights to read
    assert f"a LLaDA with {key} {NOT_A_LLAMA[key]!r} is not what the class of Llama" in message


@pytest.mark.parametrize(
    ("key", "value"), [("use_sliding_window", True), ("use_mrope", True), ("hidden_act", "gelu"),
    ("rope_scaling", {"type": "yarn"})],
)  # fmt: skip
def test_a_dream_that_is_no_qwen2_is_refused(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DREAM_CONFIG | {key: value}))
    assert f"a Dream with {key} {value!r} is not what the class of Qwen2" in refused(tmp_path)


def test_relatives_of_llada_and_dream_are_refused(tmp_path: Path) -> None:
    others: dict[str, dict[str, Any]] = {
        "only LLaDAModelLM is supported, not ['LLaDAMoEModelLM']": {
            "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "num_experts": 64,
        },
        "only DreamModel is supported, not ['DreamForCausalLM']": DREAM_CONFIG
        | {"architectures": ["DreamForCausalLM"], "block_size": 32},
        "is of model type 'llada2_moe', not a masked diffusion model that can be loaded (llada,": {
            "model_type": "llada2_moe"
        },
        "is of model type None": {"d_model": 4},
    }  # fmt: skip
    for message, config in others.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert message in refused(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"d_model": 0}, "d_model in config.json must be a whole number above 0, not 0"),
        ({"n_layers": None}, "n_layers in config.json must be a whole number above 0, not None"),
        ({"n_heads": 5}, "n_heads 5 in config.json does not divide 32"),
        ({"n_kv_heads": 3}, "n_kv_heads 3 in config.json does not divide 4"),
        ({"rope_theta": "far"}, "rope_theta in config.json must be a number above 0, not 'far'"),
        ({"mask_token_id": 32}, "mask_token_id in config.json must be one of 32 tokens, not 32"),
        ({"eos_token_id": "x"}, "eos_token_id in config.json must be a token or null, not 'x'"),
        ({"activation_type": None}, "a LLaDA with activation_type None is not what"),
    ],
)
def test_a_damaged_config_is_refused(llada: Path, keys: dict[str, Any], message: str) -> None:
    found = refused(changed(llada, **keys))
    assert message in found and str(llada) in found


def test_the_mask_token_has_the_published_value_where_the_config_lacks_it(llada: Path) -> None:
    message = refused(changed(llada, mask_token_id=None))  # a tiny vocabulary has no such token
    assert "mask_token_id in config.json must be one of 32 tokens, not 126336" in message


def test_missing_foreign_and_misshapen_tensors_are_named(llada: Path) -> None:
    file = llada / "model.safetensors"
    whole = load_file(file)
    gone = "model.transformer.blocks.1.ff_norm.weight"
    save_file({name: t for name, t in whole.items() if name != gone}, file)
    assert refused(llada) == f"{str(llada)!r} lacks 1 of its model's weights, {gone} for one"
    foreign = "model.transformer.blocks.0.q_proj.bias"
    save_file(whole | {foreign: torch.zeros(32)}, file)
    assert (
        refused(llada) == f"{str(llada)!r} holds {foreign}, which its config.json has no place for"
    )
    save_file(whole | {gone: torch.zeros(5)}, file)
    assert f"{gone} in {str(llada)!r} has the shape (5,), not (32,)" in refused(llada)


def test_damaged_and_missing_weights_are_refused(llada: Path, dream: Path) -> None:
    file = llada / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"cannot load a model from {str(llada)!r}: " in refused(llada)
    file.unlink()
    assert f"cannot load a model from {str(llada)!r}: " in refused(llada)
    for index in ("{", "[]", "{}", json.dumps({"weight_map": {"a": "none.safetensors"}})):
        (dream / "model.safetensors.index.json").write_text(index)
        assert f"cannot load a model from {str(dream)!r}: " in refused(dream)


@pytest.mark.parametrize(
    "form",
    [
        None, [], "yes", {}, {"mask_id": 1, "block_length": 4},
        {"mask_id": 1, "block_length": 4, "shifted": False, "length": 3},
        {"mask_id": "x", "block_length": None, "shifted": False},
        {"mask_id": 1, "block_length": True, "shifted": False},
        {"mask_id": 1, "block_length": None, "shifted": 0},
        {"mask_id": 1, "block_length": None, "shifted": False, "corruption": None},
        {"mask_id": 1, "block_length": None, "shifted": False, "corruption": True},
    ],
)  # fmt: skip
def test_a_damaged_form_is_refused(tmp_path: Path, form: object) -> None:
    config = {"model_type": "llama", "vocab_size": 32, "masked_diffusion": form}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path)
    assert f"in the config.json of {str(tmp_path)!r} must hold mask_id and" in message
    assert message.endswith(f"not {form!r}")


def test_a_form_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for form, message in (
        ({"mask_id": 32, "block_length": None, "shifted": False}, "is none of its 32 tokens"),
        ({"mask_id": -1, "block_length": None, "shifted": False}, "is none of its 32 tokens"),
    ):
        config = {"model_type": "llama", "vocab_size": 32, "masked_diffusion": form}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert message in refused(tmp_path)


def test_a_causal_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    UntrainedLM(32, 16, 24, 1, 2).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert refused(tmp_path) == (
        f"{str(tmp_path)!r} is a causal language model, not a masked diffusion one (its "
        "config.json has no masked_diffusion)"
    )


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == f"no model folder at '{tmp_path / 'none'}'"
    assert "holds no config.json, so it is not a model folder" in refused(tmp_path)
    for text in ('{"model_type": "lla', "[]"):
        (tmp_path / "config.json").write_text(text)
        assert f"cannot load a model from {str(tmp_path)!r}: " in refused(tmp_path)


def test_an_adapter_for_files_of_the_hub_is_refused(llada: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    named = {"base_model_name_or_path": str(llada)}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    assert "is for a llada model; only one for a folder that this project" in refused(folder)
    named = {"base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    assert "names itself as its base" in refused(folder)
