"""Karpathy's llama2.c checkpoints (version 0) and tokenizers, as `transformers` knows them.

A .bin holds seven little-endian int32 (dim, hidden, layers, heads, key-value heads, vocabulary,
context), then float32: embedding, attention norms, wq, wk, wv, wo, feed-forward norms, w1, w2, w3
(each for all layers), final norm, two rotary tables.  A negative vocabulary means an untied head,
which follows.  Rotary pairs are interleaved there and halves here, so wq and wk are permuted.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from specstream.models import PretrainedLM

HEADER = struct.Struct("<7i")


def load_llama2c(path: Path) -> PretrainedLM:
    """Return the model of a version 0 checkpoint, float32, ready to decode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    content = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = HEADER.unpack_from(content)
    config = LlamaConfig(
        vocab_size=abs(vocab), hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=context,
        tie_word_embeddings=vocab > 0, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    numbers = torch.frombuffer(bytearray(content[HEADER.size :]), dtype=torch.float32)
    weights = _state(numbers, config, kv_heads)
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=not config.tie_word_embeddings)
    return PretrainedLM.of(model).eval().requires_grad_(False)


def _state(numbers: Tensor, config, kv_heads: int) -> dict[str, Tensor]:
    """Cut the numbers into tensors under the names of `transformers`."""
    dim, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = config.num_attention_heads
    kv_dim = dim // heads * kv_heads
    place = 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        size = torch.Size(shape).numel()
        place += size
        return numbers[place - size : place].view(shape)

    state = {"model.embed_tokens.weight": take(config.vocab_size, dim)}
    parts = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": _halves(take(layers, dim, dim), heads),
        "self_attn.k_proj": _halves(take(layers, kv_dim, dim), kv_heads),
        "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    for name, stacked in parts.items():
        for layer in range(layers):
            state[f"model.layers.{layer}.{name}.weight"] = stacked[layer]
    state["model.norm.weight"] = take(dim)
    take(2 * config.max_position_embeddings * (dim // heads // 2))  # the rotary tables
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = take(config.vocab_size, dim)
    assert place == len(numbers), "the file holds what its header says"
    return state


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Turn rows of interleaved rotary pairs (x0, x1) into two halves, (layers, H * D, dim)."""
    pairs = weight.view(len(weight), heads, -1, 2, weight.shape[-1])
    return pairs.transpose(2, 3).reshape(weight.shape)


class Pieces:
    """The tokenizer of a llama2.c .bin: pieces with scores; text starts with a space."""

    eos_token_id = 2
    chat_template = None

    def __init__(self, path: Path) -> None:
        content, place = path.read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while place < len(content):
            score, size = struct.unpack_from("<fi", content, place)
            place += 8 + size
            self.pieces.append(content[place - size : place])
            self.scores.append(score)
        self.ids = {piece: token for token, piece in enumerate(self.pieces)}

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Merge the best-scored pair of neighbours until none is a piece."""
        tokens = [self.ids[letter.encode()] for letter in f" {text}"]
        while True:
            pairs = [self.pieces[a] + self.pieces[b] for a, b in pairwise(tokens)]
            known = [(self.scores[self.ids[p]], -i) for i, p in enumerate(pairs) if p in self.ids]
            if not known:
                return {"input_ids": [1, *tokens]}
            best = -max(known)[1]
            tokens[best : best + 2] = [self.ids[pairs[best]]]

    def decode(self, tokens: list[int], **options: bool) -> str:
        return b"".join(self.pieces[t] for t in tokens if t > 2).decode(errors="replace")
