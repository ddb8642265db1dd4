"""The adapter over `transformers`: kinds of models, packed documents, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from specstream.models import PretrainedLM, UntrainedLM
from specstream.models.weights import resolve_dtype
from tests.toys import sharpened, toy_lm

SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    },
    "gpt_neox": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4
    },
    "phi3": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    },
}  # fmt: skip
GROUPED = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
WINDOW = dict(GROUPED, sliding_window=4)
MIXED = ["sliding_attention", "full_attention"]
KINDS = {
    "llama": ("llama", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED),
    "gpt2": ("gpt2", SIZES["gpt2"]),
    "opt": ("opt", SIZES["opt"]),
    "gpt_neox": ("gpt_neox", SIZES["gpt_neox"]),
    "phi3": ("phi3", SIZES["phi3"]),
    "mistral, sliding": ("mistral", WINDOW),
    "qwen2, sliding": ("qwen2", dict(WINDOW, use_sliding_window=True, max_window_layers=1)),
    "gemma3, mixed": ("gemma3_text", dict(WINDOW, layer_types=MIXED)),
    "gemma2, mixed, eager": ("gemma2", dict(WINDOW, layer_types=MIXED)),
    "gpt_oss, sinks, eager": (
        "gpt_oss", dict(WINDOW, layer_types=MIXED, num_local_experts=2, num_experts_per_tok=1)
    ),
    "gptj, eager": (
        "gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    ),
}  # fmt: skip
VOCABULARY = 31
TOKENS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))


def build(kind: str) -> PretrainedLM:
    name, sizes = KINDS[kind]
    config = AutoConfig.for_model(
        name, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes
    )
    torch.manual_seed(0)
    attention = "eager" if "eager" in kind else "sdpa"
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    return sharpened(PretrainedLM.of(model), 5.0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ragged_passes_over_the_cache_equal_the_models_own_forward(kind: str) -> None:
    lm = build(kind)
    cache = lm.new_cache(2, 128)
    lm.extend(TOKENS[:, :6], torch.tensor([0, 0]), cache, 128)  # the second row holds 3 of them
    following = torch.stack([TOKENS[0, 6:10], TOKENS[1, 3:7]])
    found = lm.extend(following, torch.tensor([6, 3]), cache, 128)
    whole = lm.model(TOKENS).logits
    expected = torch.stack([whole[0, 6:10], whole[1, 3:7]])
    assert expected.std() > 0.1, "the model must say something"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if "gemma2" not in k])
@torch.no_grad()
def test_packed_documents_equal_documents_alone(kind: str) -> None:
    lm = build(kind)
    positions = torch.tensor([[*range(7), *range(5)]] * 2)
    documents = torch.tensor([[0] * 7 + [1] * 5, [0] * 7 + [-1] * 5])
    packed = lm(TOKENS, positions, documents)
    for row, part in ((0, slice(0, 7)), (0, slice(7, 12)), (1, slice(0, 7))):
        alone = lm.model(TOKENS[row : row + 1, part]).logits
        torch.testing.assert_close(packed[row : row + 1, part], alone, atol=1e-4, rtol=1e-4)
    assert packed.isfinite().all(), "padding must not spoil a batch"


@torch.no_grad()
def test_the_training_forward_equals_the_decoding_forward() -> None:
    lm = toy_lm(VOCABULARY, num_layers=2)
    positions = torch.arange(12).expand(2, -1)
    trained = lm.head(lm.hidden(TOKENS, positions, torch.zeros_like(TOKENS)))
    decoded = lm.extend(TOKENS, torch.tensor([0, 0]), lm.new_cache(2, 128), 128)
    torch.testing.assert_close(trained, decoded, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_weight_and_checkpointing_keeps_them() -> None:
    lm = toy_lm(VOCABULARY, num_layers=2).requires_grad_(True)
    lm(TOKENS).logsumexp(-1).sum().backward()
    plain = {name: weight.grad.clone() for name, weight in lm.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in plain.values())
    lm.zero_grad()
    lm.train().enable_gradient_checkpointing()
    lm(TOKENS).logsumexp(-1).sum().backward()
    for name, weight in lm.named_parameters():
        torch.testing.assert_close(weight.grad, plain[name])


def test_a_model_that_rescales_its_logits_decodes_but_is_not_trained() -> None:
    with pytest.raises(ValueError, match="final_logit_softcapping in its config is not supported"):
        build("gemma2, mixed, eager")(TOKENS)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_saved_model_is_an_ordinary_transformers_folder(tmp_path: Path, tied: bool) -> None:
    lm = UntrainedLM(VOCABULARY, 16, 24, 2, 2, tie_embeddings=tied)
    lm.save(tmp_path / "model")
    for weight in lm.parameters():
        weight.copy_(weight.bfloat16())  # what was written
    expected = lm(TOKENS)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours = PretrainedLM(str(tmp_path / "model"), "float32")
    assert torch.equal(theirs(TOKENS).logits, expected)
    assert torch.equal(ours(TOKENS), expected)
    assert ours.max_positions == 1024 and ours.vocab_size == VOCABULARY and ours.num_layers == 2


def test_an_untrained_model_is_drawn_from_its_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        lm = UntrainedLM(VOCABULARY, 16, 24, 1, 2, seed=seed)
        return torch.cat([weight.flatten() for weight in lm.parameters()])

    torch.manual_seed(1)
    first = weights(4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, weights(4)) and not torch.equal(first, weights(5))
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"


def test_a_saved_model_names_the_end_of_its_tokenizer_and_else_none(tmp_path: Path) -> None:
    from specstream.data.tokenizer import train_tokenizer

    lm = UntrainedLM(300, 16, 24, 1, 2)
    for name, tokenizer in (("bare", None), ("whole", train_tokenizer(["text"], 257))):
        lm.save(tmp_path / name, tokenizer)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["eos_token_id"] == (None if tokenizer is None else 0)


def test_the_automatic_dtype_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert resolve_dtype("auto") is resolve_dtype("auto", "cuda:0") is torch.bfloat16
    assert resolve_dtype("auto", "cpu") is torch.float32


def test_a_dtype_has_a_name() -> None:
    assert resolve_dtype("float16") is torch.float16
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="dtype 'int8' is not one of auto, float32, bfloat16"):
        resolve_dtype("int8")
